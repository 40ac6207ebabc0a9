"""What `clbench check` looks at: that recipes say what they may, and that strategies take what they are told."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from clbench import recipes, tuning
from clbench.errors import UserError, nearest
from clbench.report import published
from clbench.specs import BaselineSpec, TaskSpec
from clbench.strategies.build import check, scenarios


def check_recipes(files: Iterable[str]) -> tuple[int, list[str], list[str]]:
    """Check recipe files; none means all shipped ones.

    Returns:
        How many there were, a line for everything that is no mistake but may be a slip, and a line for every mistake.
    """
    wanted = list(files) or [
        *(str(recipes.find("task", name)) for name in recipes.names("task")),
        *(str(recipes.find("baseline", name)) for name in recipes.names("baseline")),
    ]
    problems: list[str] = []
    notes: list[str] = []
    for file in wanted:
        try:
            if _is_task(file):
                recipes.load_task(file)
                continue
            baseline = recipes.load_baseline(file)
            for task in sorted(baseline.on.keys() - set(recipes.names("task"))):
                # Perhaps a task of the user's own, perhaps a slip: settings that are never used say nothing.
                notes.append(f"{file}: note: [on.{task}] is no shipped task.{nearest(task, recipes.names('task'))}")
            problems += published.mistakes(baseline, file) + _check_baseline(baseline)
        except UserError as error:
            problems += error.lines
    return len(wanted), notes, list(dict.fromkeys(problems))


def _check_baseline(baseline: BaselineSpec) -> list[str]:
    """Return what is wrong with the settings and grids of a baseline, on the shipped tasks that it names."""
    problems: list[str] = []
    shipped = [task for task in baseline.on if task in recipes.names("task")]
    for name in shipped or [_example(scenarios(baseline))]:
        task = recipes.load_task(name)
        origin, grid = tuning.grid_of(task, baseline)
        alone = _mistakes(task, baseline, {})
        if not grid:
            problems += alone
        # Where a grid says a setting, the recipe need not be whole without it.
        for point in tuning.points_of(grid) if grid else ():
            lines = _mistakes(task, baseline, point)
            problems += [line if line in alone else tuning.placed(line, origin) for line in lines]
    return problems


def _example(scenarios: Collection[str]) -> str:
    """Return a demonstration task of these scenarios, on which a recipe without tasks of its own is tried."""
    demonstrations = {"domain": "digits_permuted", "task": "digits_split", "class": "digits_split_class"}
    return next((task for scenario, task in demonstrations.items() if scenario in scenarios), "digits_permuted")


def _mistakes(task: TaskSpec, baseline: BaselineSpec, overrides: dict[str, Any]) -> tuple[str, ...]:
    try:
        check(recipes.resolve(task, baseline, overrides))
    except UserError as error:
        return error.lines
    return ()


def _is_task(file: str) -> bool:
    try:
        return "stream" in tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
