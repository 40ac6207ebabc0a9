"""Choosing hyper-parameters on validation data: the protocol, the grid, and the runs that they ask for.

A study is one baseline on one task over a grid of settings. Its runs are ordinary runs of another protocol, which
`on_validation` makes of the task's: the first tasks of the same stream, with training samples held out where the test
samples were (`specs.Selection`). The stream of such a protocol is built from data sets whose test files stay closed, so
nothing that happens here can depend on a test sample.

Protocols, by what the choice gets to see:
    first-task     the first task of the stream
    first-<k>      the first k tasks: as many as somebody has seen who must choose before the rest comes (Chaudhry et
                   al. 2019, A-GEM, choose on 3 of 20, and report the other 17)
    oracle         all tasks: what most published numbers do, and no learner could; captions say so
"""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from clbench.errors import UserError, nearest
from clbench.recipes import FOLDERS, Experiment, load_baseline, load_task, resolve
from clbench.specs import BaselineSpec, OnTask, Selection, TaskSpec, values_to_try

SHARE = 0.1
"""Of each task's training samples, held out where the task sets none aside."""
SEEDS = "100,101,102"
"""Apart from those that results are usually run with."""
METRICS = ("average_accuracy", "average_incremental_accuracy")
"""What can be chosen by; larger is better."""


@dataclass(frozen=True)
class Study:
    """One baseline on one task over a grid."""

    task: str
    """The task's name, or its file, as given."""
    baseline: str
    """Likewise."""
    protocol: str
    n_tasks: int
    """Tasks of the whole stream."""
    tasks_seen: int
    """Those that the protocol looks at."""
    share: float
    """Of each task's training samples, held out."""
    own_validation: bool
    """Whether the task itself sets these samples aside, so that training may look at them too."""
    grid: dict[str, list[Any]]
    """Setting, `train.<key>` or `model.<key>` to the values to try."""
    fixed: dict[str, Any]
    """Settings that every point overrides in the same way."""
    origin: str
    """Where the grid is written: a recipe's file and section, or --grid."""
    seeds: tuple[int, ...]
    base: Experiment
    """On the protocol's stream, without the grid."""
    points: tuple[dict[str, Any], ...]
    """Each a value for every key of the grid, the last key's changing fastest."""
    experiments: tuple[Experiment, ...]
    """One a point, on the protocol's stream."""

    @property
    def name(self) -> str:
        """The task's own name; that of its runs has the protocol's after it."""
        return self.base.task.name.removesuffix(f"@{self.protocol}")

    @property
    def is_oracle(self) -> bool:
        """Whether the choice sees every task."""
        return self.tasks_seen == self.n_tasks


def studies(
    tasks: Iterable[str],
    baselines: Iterable[str],
    protocol: str,
    seeds: Iterable[int],
    *,
    grid: Sequence[str] = (),
    fixed: Mapping[str, Any] | None = None,
    share: float | None = None,
) -> list[Study]:
    """Return a study for every task and baseline.

    Args:
        tasks: shipped names or recipe files.
        baselines: likewise.
        protocol: "first-task", "first-<k>" or "oracle".
        seeds: of every point.
        grid: "key=a,b,c" each; given any, they take the place of the recipes' grids.
        fixed: overrides that hold at every point.
        share: held out of each task's training samples where the task sets none aside; None for `SHARE`.

    Raises:
        UserError: every mistake in recipes, protocol and grid that can be told without building anything.
    """
    problems: list[str] = []
    found: list[Study] = []
    loaded_tasks = _each(load_task, tasks, problems)
    loaded_baselines = _each(load_baseline, baselines, problems)
    for name, task in loaded_tasks:
        for given, baseline in loaded_baselines:
            try:
                origin, values = _grid(task, baseline, grid)
                found.append(_study((name, task), (given, baseline), protocol, origin, values, fixed, share, seeds))
            except UserError as error:
                problems += error.lines
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return found


def _each(load: Any, names: Iterable[str], problems: list[str]) -> list[tuple[str, Any]]:
    loaded = []
    for name in dict.fromkeys(names):
        try:
            loaded.append((name, load(name)))
        except UserError as error:
            problems += error.lines
    return loaded


def _study(
    named_task: tuple[str, TaskSpec],
    named_baseline: tuple[str, BaselineSpec],
    protocol: str,
    origin: str,
    grid: dict[str, list[Any]],
    fixed: Mapping[str, Any] | None,
    share: float | None,
    seeds: Iterable[int],
) -> Study:
    (task_name, task), (baseline_name, baseline) = named_task, named_baseline
    both = sorted(set(grid) & set(fixed or {}))
    if both:
        raise UserError(f"--set {both[0]}: the grid has this key too ({origin}); a value cannot be fixed and varied")
    own = task.stream.validation > 0
    if own and share is not None:
        raise UserError(
            f"--validation {share}: task '{task.name}' sets {task.stream.validation} of its training samples aside "
            "itself; leave --validation out"
        )
    seen = tasks_of(protocol, task)
    held_out = task.stream.validation if own else SHARE if share is None else share
    there, method = on_validation(task, protocol, held_out), _for_study(task, baseline, protocol)
    base, points = resolve(there, method, fixed), points_of(grid)
    experiments = []
    for point in points:
        try:
            experiments.append(resolve(there, method, {**(fixed or {}), **point}))
        except UserError as error:
            raise UserError(*(placed(line, origin) for line in error.lines)) from None
    return Study(
        task=task_name, baseline=baseline_name, protocol=protocol, n_tasks=task.stream.n_tasks, tasks_seen=seen,
        share=held_out, own_validation=own, grid=grid, fixed=dict(fixed or {}), origin=origin,
        seeds=tuple(dict.fromkeys(seeds)),
        base=base, points=points, experiments=tuple(experiments),
    )  # fmt: skip


def placed(line: str, origin: str) -> str:
    """Return a line on a mistake in a point of a grid with the grid, not --set, as its place."""
    return f"{origin}: {line.removeprefix('--set').lstrip(': ')}"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words with which a command line says a study."""
    parser.add_argument("--task", nargs="+", required=True, metavar="NAME", help="shipped names or recipe files")
    parser.add_argument("--baseline", nargs="+", required=True, metavar="NAME", help="shipped names or recipe files")
    parser.add_argument(
        "--protocol", required=True, metavar="NAME",
        help="what the choice gets to see: first-task, first-<k> (such as first-3), or oracle (all tasks)",
    )  # fmt: skip
    parser.add_argument(
        "--grid", action="extend", nargs="+", default=[], metavar="KEY=A,B,C",
        help="values of a setting, train.<key> or model.<key>; several make every combination. Takes the place of the "
        "recipe's [tune] and [on.<task>.tune]",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE", help="the same at every point"
    )
    parser.add_argument(
        "--validation", type=_share, metavar="SHARE",
        help=f"share of each task's training samples to hold out where the task sets none aside ({SHARE})",
    )  # fmt: skip
    parser.add_argument("--metric", default=METRICS[0], choices=METRICS, help="to choose by (default %(default)s)")


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"must be a share between 0 and 1, not '{text}'")
    return share


# ---------------------------------------------------------------------------------------------------------- protocol


def tasks_of(protocol: str, task: TaskSpec) -> int:
    """Return how many of a stream's tasks a protocol looks at.

    Raises:
        UserError: there is no such protocol, or the stream has too few tasks for it.
    """
    whole = task.stream.n_tasks
    if protocol == "oracle":
        return whole
    if protocol == "first-task":
        return 1
    number = re.fullmatch(r"first-([1-9]\d*)", protocol)
    if number is None:
        guess = nearest(protocol, ["first-task", "first-3", "oracle"])
        raise UserError(f"--protocol {protocol}: one of first-task, first-<k> (such as first-3) and oracle.{guess}")
    if int(number[1]) >= whole:
        raise UserError(
            f"--protocol {protocol}: task '{task.name}' has {whole} tasks; seeing all of them is called oracle"
        )
    return int(number[1])


def on_validation(task: TaskSpec, protocol: str, share: float = SHARE) -> TaskSpec:
    """Return the task as a protocol sees it: its first tasks, tested on training samples that are held out.

    Nothing is measured but accuracy.
    """
    seen = tasks_of(protocol, task)
    stream = Selection(of=task.stream, n_tasks=seen, share=share)
    first = "all" if seen == task.stream.n_tasks else f"the first {seen} of {task.stream.n_tasks}"
    return task.model_copy(
        update={
            "stream": stream,
            "name": f"{task.name}@{protocol}",
            "title": f"{task.title}: validation data of {first} tasks",
            "auroc": False,
            "entropy": False,
        }
    )


def _for_study(task: TaskSpec, baseline: BaselineSpec, protocol: str) -> BaselineSpec:
    """Return the baseline with its settings for the task under the name that the task has in a study."""
    on = baseline.on.get(task.name)
    origin = f"a point of a grid, {protocol}, validation data: clbench tune"
    on = OnTask(origin=origin) if on is None else on.model_copy(update={"origin": origin, "published": []})
    return baseline.model_copy(update={"on": {f"{task.name}@{protocol}": on}})


# -------------------------------------------------------------------------------------------------------------- grid


def grid_of(task: TaskSpec, baseline: BaselineSpec) -> tuple[str, dict[str, list[Any]]]:
    """Return where a recipe writes its grid for a task, and the grid: the task's own, else the baseline's, else {}.

    Raises:
        UserError: a table of lists under another key than train and model.
    """
    on = baseline.on.get(task.name)
    file = Path(baseline.folder or FOLDERS["baseline"], f"{baseline.name}.toml")
    section, written = (f"on.{task.name}.tune", on.tune) if on is not None and on.tune else ("tune", baseline.tune)
    grid: dict[str, list[Any]] = {}
    for key, values in written.items():
        if not isinstance(values, dict):
            grid[key] = values
        elif key in ("train", "model"):
            grid.update({f"{key}.{inner}": listed for inner, listed in values.items()})
        else:
            raise UserError(f"{file}: '{section}.{key}': should be one list of values; only train and model are tables")
    return f"{file}: [{section}]", grid


def points_of(grid: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], ...]:
    """Return every combination of a grid's values; the last key's changes fastest."""
    return tuple(dict(zip(grid, values, strict=True)) for values in product(*grid.values()))


def _grid(task: TaskSpec, baseline: BaselineSpec, given: Sequence[str]) -> tuple[str, dict[str, list[Any]]]:
    """Return where the grid is written, and the grid: the command line's, else the recipe's."""
    if given:
        return "--grid", parse_grid(given)
    origin, grid = grid_of(task, baseline)
    if not grid:
        file = origin.partition(": [")[0]
        raise UserError(f"{file}: no [tune] nor [on.{task.name}.tune] to take a grid from; or give --grid key=a,b,c")
    return origin, grid


def parse_grid(given: Sequence[str]) -> dict[str, list[Any]]:
    """Read "key=a,b,c" words; values as TOML writes them, anything else as text.

    Raises:
        UserError: a word of another form, a key twice, a value twice.
    """
    found: dict[str, list[Any]] = {}
    for word in given:
        key, equals, text = word.partition("=")
        if not equals or not key or not text:
            raise UserError(f"--grid {word}: must be key=a,b,c, such as lam=1,10,100 or train.lr=0.01,0.001")
        if key in found:
            raise UserError(f"--grid {word}: {key} has a list already")
        try:
            values = tomllib.loads(f"v = [{text}]")["v"]
        except tomllib.TOMLDecodeError:
            values = [_value(part) for part in text.split(",")]
            if "" in values:
                raise UserError(f"--grid {word}: there is nothing between two commas") from None
        try:
            found[key] = values_to_try(values)
        except ValueError as error:
            raise UserError(f"--grid {word}: {error}") from None
    return found


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text.strip()
