"""Who may import whom: read from the code, so that the house keeps its rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clbench.report.drawn import ROOMS

PACKAGE = Path(__file__).resolve().parent.parent / "clbench"

PLAIN = {"errors", "published_row", "seeds", "spec", "specs"}
"""Needed by anyone, needing nothing of ours but each other."""

ALLOWED: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "seeds": set(),
    "spec": set(),
    "published_row": {"spec"},
    "specs": {"published_row", "spec"},
    "imports": {"errors"},
    "recipes": PLAIN,
    "tuning": PLAIN | {"recipes"},
    "record_parts": set(),
    "records": {"errors", "record_checks", "record_parts"},
    "record_checks": {"record_parts", "records"},
    "importing": PLAIN | {"", "importing", "metrics", "record_parts", "recipes", "records"},
    "metrics": set(),
    "metrics_within": {"metrics"},
    "nets": {"nets"},
    "tensors": set(),
    "randomness": set(),
    "budgets": {"record_parts", "records"},
    "sharing": {"records", "tensors"},
    "footprint": {"randomness", "records", "tensors"},
    "flops": {"record_parts"},
    "books": PLAIN
    | {
        "environment", "recipes", "record_parts", "records", "strategies.base", "strategies.build",
        "strategies.evaluation",
    },
    "continual_evaluation": {"checkpoint", "flops", "record_parts", "strategies.base", "strategies.foreign"},
    "memory": {"records"},
    "checkpoint": {"records"},
    "environment": {"", "errors", "records"},
    "process": {"checkpoint", "seeds"},
    "progress": set(),
    "tracking": {"errors", "randomness", "records"},
    "data_content": {"errors"},
    "data_sources": {"errors", "data_content"},
    "data": {"errors", "data_content", "data_sources", "records"},
    "views": set(),
    "loading": {"views"},
    "streams": PLAIN | {"data", "data_content", "loading", "views", "recipes"},
    "strategies": PLAIN
    | {
        "strategies.base", "strategies.anchored", "strategies.buffer", "strategies.cloning", "strategies.constrained",
        "strategies.expanding", "strategies.masking", "strategies.sample_gradients",
        "strategies.evaluation", "strategies.generating", "strategies.schedule", "strategies.state",
        "nets", "loading", "views", "footprint", "records", "sharing",
    },
    "strategies.evaluation": {"metrics", "nets"},
    "strategies.schedule": {"specs"},
    "strategies.state": set(),
    "strategies.build": PLAIN | {"recipes", "imports", "strategies.base", "strategies.foreign"},
    "runner": PLAIN
    | {
        "", "books", "continual_evaluation", "recipes", "records", "streams", "nets", "flops", "footprint", "memory",
        "checkpoint", "environment", "imports", "loading", "process", "progress", "sharing", "strategies.base",
        "strategies.build", "strategies.foreign",
    },
    "matching": PLAIN
    | {
        "budgets", "flops", "footprint", "process", "recipes", "records", "runner", "strategies.base",
        "strategies.build", "streams",
    },
    "preflight": PLAIN | {"recipes", "runner", "strategies.base", "strategies.build", "strategies.foreign", "streams"},
    "sweep": PLAIN
    | {
        "books", "data", "environment", "preflight", "progress", "recipes", "records", "runner", "strategies.build",
        "tracking", "tuning",
    },
    "checks": PLAIN | {"", "recipes", "report", "strategies.build", "tuning"},
    "lab": {"lab", "lab.record", "nets", "memory", "records", "environment", "errors"},
    "lab.record": {"errors", "records"},
    "report": PLAIN
    | {"", "report", "budgets", "records", "recipes", "metrics", "metrics_within", "lab.record", "tuning"},
    "scaffold": {"errors", "recipes", "records"},
    "doctor": {"", "errors", "data", "memory", "recipes"},
    "cli": {"", "commands", "errors"},
    "commands": PLAIN
    | {
        "commands", "budgets", "checks", "data", "doctor", "importing", "lab", "matching", "recipes", "records",
        "report", "scaffold", "sweep", "tuning",
    },
}  # fmt: skip

OUTSIDE: dict[str, set[str]] = {
    "torch": {
        "books", "checkpoint", "continual_evaluation", "data", "data_content", "data_sources", "doctor", "environment",
        "flops", "footprint", "lab", "loading", "matching", "memory", "nets", "preflight", "process", "randomness",
        "runner", "sharing", "strategies", "streams", "sweep", "tensors", "tracking", "views",
    },
    "avalanche": {"continual_evaluation", "loading", "runner", "strategies", "streams", "scaffold"},
}  # fmt: skip
"""Third-party packages that only some rooms may import."""


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__") or "__init__", path


def imported(path: Path) -> set[str]:
    """Every module a file imports, at any depth of it, fully named."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path.name}: relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            is_module = {name for name in whole if _exists(name)}
            found |= is_module | ({node.module} if whole - is_module else set())
    return found


def _exists(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith("clbench.") and (place.with_suffix(".py").is_file() or (place / "__init__.py").is_file())


def room(module: str) -> str:
    """The most specific rule that covers a module."""
    while module not in ALLOWED and "." in module:
        module = module.rpartition(".")[0]
    return module


@pytest.mark.parametrize(("module", "path"), [pytest.param(*item, id=item[0]) for item in modules()])
def test_a_module_imports_only_what_its_room_may(module: str, path: Path) -> None:
    assert room(module) in ALLOWED, f"clbench.{module} has no rule: say here what it may import"
    allowed = ALLOWED[room(module)]
    ours = {name.removeprefix("clbench").removeprefix(".") for name in imported(path) if name.startswith("clbench")}
    wrong = {name for name in ours if name not in allowed and room(name) not in allowed}
    assert not wrong, f"clbench.{module} imports {sorted(wrong)}; its room may import {sorted(allowed)}"


@pytest.mark.parametrize("package", sorted(OUTSIDE))
def test_heavy_packages_stay_in_their_rooms(package: str) -> None:
    users = {module for module, path in modules() if any(name.split(".")[0] == package for name in imported(path))}
    rooms = {module.split(".")[0] for module in users}
    assert rooms <= OUTSIDE[package], sorted(rooms - OUTSIDE[package])


def test_one_strategy_never_imports_another() -> None:
    shared = {"base", "anchored", "buffer", "cloning", "constrained", "expanding", "generating", "masking"}
    shared |= {"sample_gradients", "schedule", "evaluation", "state", "build", "foreign", "__init__"}
    methods = {path.stem for path in (PACKAGE / "strategies").glob("*.py")} - shared
    for method in methods:
        names = imported(PACKAGE / "strategies" / f"{method}.py")
        others = {f"clbench.strategies.{other}" for other in methods - {method}}
        assert not names & others, method


def test_no_file_is_longer_than_it_should_be() -> None:
    long = {module: lines for module, path in modules() if (lines := len(path.read_text().splitlines())) > 460}
    assert not long


@pytest.mark.parametrize("module", ["clbench.report.build", "clbench.report.console", "clbench.records", "clbench.cli"])
def test_reports_need_neither_torch_nor_avalanche(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'avalanche', 'torchvision'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_figures_are_keyed_by_all_the_code_that_the_report_may_import() -> None:
    """Followed from import to import, packages' own files included; a file without code cannot change a figure."""
    by_name = dict(modules())
    todo, reached = [path for name, path in by_name.items() if name.split(".")[0] == "report"], set[Path]()
    while todo:
        path = todo.pop()
        if path in reached:
            continue
        reached.add(path)
        for name in imported(path):
            if name.split(".")[0] == PACKAGE.name:
                inner = name.partition(".")[2] or "__init__"
                todo += [by_name[part] for part in (inner, inner.rpartition(".")[0]) if part in by_name]
    keyed = {path for pattern in ROOMS for path in PACKAGE.glob(pattern)}
    assert {path.relative_to(PACKAGE).as_posix() for path in reached - keyed} == set()
