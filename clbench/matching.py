"""Sizes with which one baseline costs as much as another: `clbench run --match BUDGET --to BASELINE`.

What a method costs after the last task is found by going through the stream's tasks with it, one optimiser step each:
the same code as a run, so that every byte and every operation is counted that a run would count, without the training.
A test runs every shipped baseline both ways. What is kept by methods that grow where they need to, or keep what they
found to be sparse, depends on what they learn (`Strategy.sized_by_learning`); what a step computes, with a memory that
fills step by step, on how many there were (`Strategy.work_by_steps`): others are matched to their recorded runs, they
to none.

What is changed is the first of `Strategy.sized_by` that meets the budget: a setting (a replay buffer, the compression
of a hypernetwork), or "width", the widths of the net's layers in proportion. Whole numbers are tried one by one, reals
in steps of 1e-4; of those the nearest is taken. Budgets are taken to grow with sizes, but for those of work: where they
miss, sizes up to 16 times smaller and larger are tried besides, and what lies between two that work in opposite ways.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clbench.budgets import BUDGETS, TOLERANCE, WORK, Costs
from clbench.errors import UserError, unknown
from clbench.flops import StepCounter, of_answer
from clbench.footprint import footprint
from clbench.process import reproducible
from clbench.recipes import Experiment, load_baseline, load_task, names, resolve
from clbench.records import RunRecord, load_all
from clbench.runner import net_factory
from clbench.specs import tasks_in_all
from clbench.strategies.base import Setup, Strategy
from clbench.strategies.build import build, check, find_class, resolved_settings
from clbench.streams import Stream, make_stream

WIDTH = "width"
_WIDTHS = {
    "mlp": ("hidden",),
    "normed_mlp": ("hidden",),
    "zenke": ("channels", "hidden"),
    "lenet": ("channels", "hidden"),
    "resnet18": ("width",),
}
"""Kind of net -> its keys that are widths."""
_STEPS = 10_000
"""Of a setting that is no whole number, within 1."""
_MOST_DOUBLINGS = 24


@dataclass(frozen=True)
class Match:
    """The size of a baseline that costs as much as another on a task."""

    experiment: Experiment
    """With the size."""
    budget: str
    to: str
    wanted: float
    reached: int
    changed: dict[str, Any]
    """What of the baseline was changed, as `--set` takes it; empty where it was as large already."""
    before: dict[str, Any]

    @property
    def off(self) -> float:
        """How far the budget is from what was wanted, as a share of it."""
        return (self.reached - self.wanted) / self.wanted

    def __str__(self) -> str:
        changes = ", ".join(f"{key} {self.before.get(key)} -> {value}" for key, value in self.changed.items())
        return (
            f"{self.experiment.task.name}: {self.experiment.label}: {changes or 'as it is'}: {self.budget} "
            f"{self.reached:,} of {self.to}'s {self.wanted:,.0f} ({self.off:+.2%})"
        )


def match(
    task: str,
    baseline: str,
    to: str,
    budget: str,
    *,
    by: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    runs: Path | None = None,
    data_root: Path | None = None,
) -> Match:
    """Return the size of `baseline` at which its budget is that of `to` on a task.

    Args:
        task: shipped name or path of a recipe.
        baseline: likewise; what is sized.
        to: likewise, or a label of records (`ewc@1a2b3c4d`).
        budget: a key of `BUDGETS`.
        by: the setting to change, or "width"; None for what the method is sized by.
        overrides: of `baseline`, as of `resolve`.
        runs: folder of records, for what only they can tell.
        data_root: the data cache; None for the user's.

    Raises:
        UserError: a name or setting that is not known; `to` has no record where one is needed; a baseline or net whose
            size cannot be set; no size within 2 %, with the nearest there is.
    """
    start, target = _begin(task, baseline, to, budget, by, overrides, runs)
    stream = make_stream(start.task.stream, 0, torch.device("cpu"), data_root)
    wanted = target if isinstance(target, float) else _known(budget, dry_costs(target, stream), target.label)
    return _search(start, stream, Path(to).stem if to.endswith(".toml") else to, budget, wanted, by)


def check_match(
    task: str,
    baseline: str,
    to: str,
    budget: str,
    *,
    by: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    runs: Path | None = None,
) -> None:
    """Raise UserError for every mistake of `match` that shows before data are read and anything is tried."""
    _begin(task, baseline, to, budget, by, overrides, runs)


def dry_costs(experiment: Experiment, stream: Stream) -> Costs:
    """Return what a method costs after the last task of a stream, trained on for one optimiser step a task.

    Raises:
        UserError: the method cannot be built, or stops on the way.
    """
    train = experiment.train.model_copy(update={"epochs": None, "iterations": 1, "schedule": None})
    short = replace(experiment, train=train)
    device = torch.device("cpu")
    with reproducible(0, 1):
        tasks = tasks_in_all(experiment.task.stream)
        setup = Setup(new_net=net_factory(short, stream, 0), train=train, device=device, seed=0, tasks=tasks)
        try:
            strategy = build(short, setup)
            strategy.around = counter = StepCounter(lambda: strategy.samples_trained)
            work = None
            for experience, test in zip(stream.benchmark.train_stream, stream.benchmark.test_stream, strict=True):
                strategy.train_task(experience)
                is_last = len(stream.benchmark.test_stream) == 1 + experience.current_experience
                answer = strategy.evaluate if isinstance(strategy, Strategy) else strategy.evaluate_one
                work = counter.take(*(of_answer(answer, test) if is_last else (None, "")))
        except UserError:
            raise
        # Whatever a method raises here, it would raise in the run: the user asked for a size, and gets a line.
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            raise UserError(f"'{experiment.label}' cannot be sized: {type(error).__name__}: {said}") from None
        return Costs(footprint(strategy.holdings()), work)


# ------------------------------------------------------------------------------------------------------- what is wanted


def _begin(
    task: str, baseline: str, to: str, budget: str, by: str | None, overrides: Mapping[str, Any] | None,
    runs: Path | None,
) -> tuple[Experiment, Experiment | float]:  # fmt: skip
    """Return what is sized, and what it is to cost as much as: a method for a dry run, or a number of records."""
    if budget not in BUDGETS:
        raise UserError(unknown("budget", budget, BUDGETS))
    start = resolve(load_task(task), load_baseline(baseline), overrides)
    check(start)
    why = _by_training(start, budget)
    if why:
        name = start.baseline.name
        raise UserError(f"'{name}': {why}: others can be matched to it (--to {name}), it to none")
    if by:
        _knob(start, by)
    return start, _target(start, task, to, budget, runs)


def _by_training(experiment: Experiment, budget: str) -> str:
    """Return why only a whole run can tell a budget of a method; "" where one step a task can."""
    cls = find_class(experiment.baseline)
    if not issubclass(cls, Strategy):
        return ""
    if cls.sized_by_learning:
        return "its size depends on what it learns"
    fills = budget == "step_flops" and cls.work_by_steps
    return "its memory fills step by step, and so does the work of a step" if fills else ""


def _target(start: Experiment, task: str, to: str, budget: str, runs: Path | None) -> Experiment | float:
    """Return the method to be matched; or its budget, where only records can tell."""
    known = to in names("baseline") or to.endswith(".toml") or "/" in to
    why = ""
    if known:
        target = resolve(start.task, load_baseline(to))
        check(target)
        why = _by_training(target, budget)
        if not why:
            return target
    found = _recorded(
        runs, lambda record: record.task.name == start.task.name and record.task.hash == start.task.hash
    )
    name = target.label if known else to
    mine = [run for run in found if run.baseline.label == name and (not known or run.baseline.hash == target.hash)]
    if mine:
        return math.fsum(_known(budget, Costs.of(run), name) for run in mine) / len(mine)
    if known:
        raise UserError(
            f"'{name}': {why}, and there is no finished run of it on {start.task.name}; run it first: "
            f"clbench run --task {task} --baseline {to}"
        )
    labels = {run.baseline.label for run in found}
    raise UserError(f"{unknown('baseline', to, {*names('baseline'), *labels})}")


def _known(budget: str, costs: Costs, name: str) -> float:
    """Return a budget; raise UserError where it was not counted."""
    value = BUDGETS[budget](costs)
    if value is None:
        why = costs.work.why if costs.work is not None else "its runs counted no operations"
        raise UserError(f"'{name}': {budget} is not known ({why})")
    return float(value)


def _recorded(runs: Path | None, wanted: Callable[[RunRecord], bool]) -> list[RunRecord]:
    records = load_all(runs)[0] if runs is not None and runs.is_dir() else []
    return [record for record in records if record.status == "done" and record.footprints and wanted(record)]


# ----------------------------------------------------------------------------------------------------------- the search


class _Cost:
    """The budget of a baseline by the size of one of its settings, each size tried once."""

    def __init__(self, start: Experiment, stream: Stream, budget: str, way: str) -> None:
        self.start, self.stream, self.budget = start, stream, budget
        self.begin, self.changes = _knob(start, way)
        self.known: dict[int, int | None] = {}

    def __call__(self, size: int) -> int | None:
        """Return the budget of a size; None where there is no such method."""
        if size not in self.known:
            try:
                found = dry_costs(_changed(self.start, self.changes(size)), self.stream)
                self.known[size] = int(_known(self.budget, found, self.start.label))
            except UserError:
                if size == self.begin and self.changes(size) == _now(self.start, self.changes(size)):
                    raise  # the baseline as it is
                self.known[size] = None
        return self.known[size]


def _search(start: Experiment, stream: Stream, to: str, budget: str, wanted: float, by: str | None) -> Match:
    """Return the nearest size by the first setting that meets the budget."""
    cls = find_class(start.baseline)
    ways = (by,) if by else cls.sized_by if issubclass(cls, Strategy) else (WIDTH,)
    nearest: tuple[float, str] | None = None
    for way in ways:
        cost = _Cost(start, stream, budget, way)
        if cost(cost.begin) == cost(2 * cost.begin):
            continue
        size = _nearest(cost, cost.begin, wanted)
        if budget in WORK and abs((cost(size) or 0) - wanted) > TOLERANCE * wanted:
            size = _nearest_of_many(cost, cost.begin, wanted)
        reached, changes = cost(size), cost.changes(size)
        assert reached is not None
        before = _now(start, changes)
        changed = {} if before == changes else changes
        found = Match(_changed(start, changed), budget, to, wanted, reached, changed, before)
        if abs(found.off) <= TOLERANCE:
            return found
        size_of_it = ", ".join(f"{key} = {value}" for key, value in changes.items())
        if nearest is None or abs(found.off) < nearest[0]:
            nearest = abs(found.off), f"{reached:,} ({found.off:+.1%}), with {size_of_it}"
    if nearest is not None:
        raise UserError(
            f"'{start.label}' on {start.task.name}: {budget} of '{to}' is {wanted:,.0f}; the nearest "
            f"{'found' if budget in WORK else 'it can be'} is {nearest[1]}"
        )
    raise UserError(f"'{start.label}' on {start.task.name}: {' and '.join(ways)} does not change {budget}")


def _nearest(cost: Callable[[int], int | None], begin: int, wanted: float) -> int:
    """Return the whole number, 1 or more, at which a cost that does not fall is nearest to what is wanted."""
    low, high = 0, begin

    def is_over(size: int) -> bool:
        """Whether a size above `low` costs too much, or is too large to be one: no method, and one below it."""
        value = cost(size)
        return low > 0 and cost(low) is not None if value is None else value >= wanted

    for _ in range(_MOST_DOUBLINGS):
        if is_over(high):
            break
        low, high = high, 2 * high
    step = 0
    while high - low > 1:
        step += 1
        # A straight line is nearly right, and halving makes sure of it.
        middle = (low + high) // 2 if step % 4 == 0 else _between(low, high, cost, wanted)
        low, high = (low, middle) if is_over(middle) else (middle, high)
    seen = {size: value for size in (low, high) if size > 0 and (value := cost(size)) is not None}
    if not seen:
        raise UserError("no size will do: the method cannot be built with any that was tried")
    return min(seen, key=lambda size: (abs(seen[size] - wanted), size))


def _nearest_of_many(cost: Callable[[int], int | None], begin: int, wanted: float) -> int:
    """Return the nearest of many whole numbers, 1 or more, where a cost may rise and fall."""
    sizes = sorted({max(1, round(begin * 2 ** (step / 8))) for step in range(-32, 33)})
    seen = {size: value for size in sizes if (value := cost(size)) is not None}
    for low, high in itertools.pairwise(sizes):
        if low not in seen or high not in seen:
            continue
        rises = seen[low] < wanted
        while high - low > 1 and rises != (seen[high] < wanted):
            middle = (low + high) // 2
            value = cost(middle)
            if value is None:
                break
            seen[middle] = value
            low, high = (middle, high) if rises == (value < wanted) else (low, middle)
    return min(seen, key=lambda size: (abs(seen[size] - wanted), size))


def _between(low: int, high: int, cost: Callable[[int], int | None], wanted: float) -> int:
    """Return where the straight line through the costs of both ends meets what is wanted; halfway without a line."""
    first, last = cost(low) if low > 0 else None, cost(high)
    if first is None or last is None or last <= first:
        return (low + high) // 2
    guess = low + (high - low) * (wanted - first) / (last - first)
    return min(high - 1, max(low + 1, round(guess)))


def _changed(start: Experiment, changes: Mapping[str, Any]) -> Experiment:
    if not changes:
        return start
    found = resolve(start.task, start.baseline, {**start.overrides, **changes})
    check(found)
    return found


def _knob(start: Experiment, way: str) -> tuple[int, Callable[[int], dict[str, Any]]]:
    """Return where a size is now, as a whole number, and what to set for another."""
    if way == WIDTH:
        return _width(start)
    settings = resolved_settings(start)
    if way not in settings:
        raise UserError(unknown("setting to size by", way, [WIDTH, *settings]))
    value = settings[way]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"'{start.label}': {way} is no number ({value!r})")
    if isinstance(value, int):
        return max(1, value), lambda size: {way: size}
    return max(1, round(value * _STEPS)) if value else _STEPS, lambda size: {way: size / _STEPS}


def _width(start: Experiment) -> tuple[int, Callable[[int], dict[str, Any]]]:
    """Return the widest layer's width, and the net's widths in proportion to another."""
    kind = start.model.kind
    if kind not in _WIDTHS:
        raise UserError(f"'{start.label}' on {start.task.name}: a net of kind {kind} has no width that could be set")
    now = {key: value for key, value in start.model.model_dump(mode="json").items() if key in _WIDTHS[kind]}
    widest = max(max(value) if isinstance(value, list) else value for value in now.values())

    def scaled(value: int, size: int) -> int:
        return max(1, int(value * size / widest + 0.5))

    def changes(size: int) -> dict[str, Any]:
        return {
            f"model.{key}": [scaled(one, size) for one in value] if isinstance(value, list) else scaled(value, size)
            for key, value in now.items()
        }

    return widest, changes


def _now(start: Experiment, keys: Iterable[str]) -> dict[str, Any]:
    """Return what settings are, as `--set` takes them."""
    settings, found = resolved_settings(start), {}
    for key in keys:
        section, dot, name = key.partition(".")
        value = getattr(start.model, name) if dot and section == "model" else settings.get(key)
        found[key] = list(value) if isinstance(value, tuple) else value
    return found
