"""`clbench new strategy`: a user's own method, ready to run beside the built-in ones.

Writes `<name>.py`, `<name>.toml` and `test_<name>.py` into a folder: the small template below, or a copy of a built-in
method under a new name.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from pathlib import Path

from clbench import recipes
from clbench.errors import UserError, unknown
from clbench.records import write_atomic

_DEMONSTRATIONS = ("digits_", "synthetic_")
"""Tasks that run at once; what a baseline needs on them, such as a deeper net, a copy needs too."""

STRATEGY = '''"""__CLASS__: say here what it does, which paper it is from, and what it stores.

As written, an L2 anchor: a quadratic penalty holds every weight near its value after the last task.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor

from clbench.strategies.base import Setup, Strategy


class __CLASS__(Strategy):
    """Penalises lam / 2 * |theta - theta*|^2, theta* the weights after the last task."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        lam: Annotated[float, Field(ge=0)] = 0.01

    stores: ClassVar[tuple[str, ...]] = ("anchor",)  # what is kept between tasks: counted, and saved

    def __init__(self, *, setup: Setup, config: Any) -> None:
        super().__init__(setup=setup, config=config)
        self.anchor: dict[str, Tensor] = {}

    def after_task(self, experience: DatasetExperience) -> None:
        self.anchor = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}

    def extra_loss(self) -> Tensor | None:
        kept = [(weight, self.anchor[name]) for name, weight in self.model.named_parameters() if name in self.anchor]
        if not kept:
            return None
        return self.config.lam / 2 * sum((weight - anchor).square().sum() for weight, anchor in kept)
'''

RECIPE = """# Run:  clbench run --task digits_split --baseline ./__NAME__.toml finetune ewc --seeds 3
schema = 1
title = "__CLASS__"
strategy = "__NAME__.py:__CLASS__"
family = "own"
paper = "none yet"

[settings]
lam = 0.01
"""

TEST = '''"""__CLASS__ does what it says."""

from pathlib import Path

from clbench.runner import run

RECIPE = str(Path(__file__).with_name("__NAME__.toml"))


def test_it_learns_every_task_and_says_what_it_keeps() -> None:
    record = run("synthetic_split", RECIPE, seed=0)
    assert record.status == "done", record.traceback
    assert all(record.acc[task][task] > 0.8 for task in range(record.task.n_tasks))
    assert record.footprints[-1].keep_learning_bytes >= record.footprints[-1].answer_bytes
'''


def new_strategy(name: str, folder: Path, source: str | None = None) -> list[Path]:
    """Write a new strategy's three files.

    Args:
        name: of the files and the recipe, such as `my_method`; the class becomes `MyMethod`.
        folder: where to.
        source: a shipped baseline whose method is copied instead of the template.

    Returns:
        The files written.

    Raises:
        UserError: the name is no Python name, a file is there already, or `source` is not one of the suite's own.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UserError(f"new strategy '{name}': the name must be a Python name, like my_method")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    if not class_name.isidentifier() or not name.isascii():
        raise UserError(f"new strategy '{name}': the name must have plain letters, like my_method")
    if name in recipes.names("baseline"):
        raise UserError(f"new strategy '{name}': a shipped baseline has that name; records would mix")
    code, recipe = (STRATEGY, RECIPE) if source is None else _copied(source)
    files = {f"{name}.py": code, f"{name}.toml": recipe, f"test_{name}.py": TEST}
    there = [file for file in files if (folder / file).exists()]
    if there:
        raise UserError(*(f"{folder / file}: is there already; nothing was written" for file in there))
    for file, text in files.items():
        try:
            write_atomic(folder / file, text.replace("__NAME__", name).replace("__CLASS__", class_name))
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return [folder / file for file in files]


def _copied(source: str) -> tuple[str, str]:
    """Return the code and recipe of a shipped baseline, its names replaced by the template's marks."""
    baseline = recipes.load_baseline(source)
    module, _, class_name = baseline.strategy.partition(":")
    own = [name for name in recipes.names("baseline") if _is_own(recipes.load_baseline(name).strategy)]
    if not _is_own(baseline.strategy):
        nearest = unknown("baseline of the suite", source, own)
        raise UserError(f"--from {source}: its class is not the suite's own; {nearest}")
    file = Path(__file__).parent / "strategies" / f"{module.rpartition('.')[2]}.py"
    # Not within an address, such as that of the authors' code.
    code = re.sub(rf"(?<![\w/-]){class_name}(?![\w/-])", "__CLASS__", file.read_text())
    recipe = RECIPE[: RECIPE.index("lam = ")] + _lines(baseline.settings)
    for task, on in baseline.on.items():
        if task.startswith(_DEMONSTRATIONS):
            changes = {key: value for key, value in (("train", on.train), ("model", on.model)) if value}
            recipe += f"\n[on.{task}]\n" + _lines({"origin": on.origin, **on.settings, **changes})
    if "scenarios" in baseline.model_fields_set:
        recipe = recipe.replace("\n[settings]", f"scenarios = {_toml(list(baseline.scenarios))}\n\n[settings]")
    return code, recipe.replace('paper = "none yet"', f"paper = {_toml('after ' + baseline.paper)}")


def _is_own(strategy: str) -> bool:
    return strategy.startswith("clbench.strategies.")


def _lines(table: Mapping[str, object]) -> str:
    """Return a TOML table's lines."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in table.items())


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {_toml(item)}' for key, item in value.items())} }}"
    return repr(value) if isinstance(value, (int, float)) else '"' + str(value).replace('"', '\\"') + '"'
