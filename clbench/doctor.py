"""`clbench doctor`: what this installation can do, and what stands in its way."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from clbench import __version__, data, memory, recipes
from clbench.errors import UserError

PACKAGES = ("torch", "torchvision", "avalanche-lib", "numpy", "scipy", "pandas", "matplotlib", "pydantic", "quadprog")


def examine() -> Iterator[tuple[bool, str]]:
    """Yield one finding a line: whether it is well, and what it is."""
    yield True, f"clbench {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for name in PACKAGES:
        try:
            yield True, f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield False, f"{name} is missing: pip install {name}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            size = torch.cuda.get_device_properties(index).total_memory / 2**30
            yield True, f"CUDA device {index}: {torch.cuda.get_device_name(index)}, {size:.0f} GiB"
    else:
        yield True, "no CUDA device: runs use the CPU"
    yield True, f"{os.cpu_count()} CPU cores; one thread a run unless --threads says otherwise"
    yield True, f"CPU memory is measured by {memory.describe()}"
    yield from _data()
    yield from _recipes()


def _data() -> Iterator[tuple[bool, str]]:
    root = data.cache_root()
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    writable = os.access(place, os.W_OK)
    yield writable, f"data cache {root}" + ("" if writable else ": cannot be written; set CLBENCH_DATA")
    for entry in data.status():
        if entry.problem:
            yield False, entry.problem
        else:
            missing = f"not here; clbench data prepare {entry.name}"
            yield True, f"data set {entry.name}: {entry.origin if entry.present else missing}"


def _recipes() -> Iterator[tuple[bool, str]]:
    broken: list[str] = []
    loaders: list[tuple[str, Callable[[str], object]]] = [
        *((name, recipes.load_task) for name in recipes.names("task")),
        *((name, recipes.load_baseline) for name in recipes.names("baseline")),
    ]
    for name, load in loaders:
        try:
            load(name)
        except UserError as error:
            broken += error.lines
    for line in broken:
        yield False, line
    counts = f"{len(recipes.names('task'))} tasks, {len(recipes.names('baseline'))} baselines"
    yield not broken, f"recipes in {_shown(recipes.shipped('task').parent)}: {counts}"


def _shown(path: Path) -> str:
    try:
        return f"~/{path.relative_to(Path.home())}"
    except ValueError:
        return str(path)
