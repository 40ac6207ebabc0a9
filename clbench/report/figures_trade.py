"""Figures of accuracy against what it costs: parameters, memory and operations with the Pareto front, time.

Continual learners are drawn filled. Bounds (joint training, a net per task, ...) are hollow and on no front, unless the
block has nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clbench.report.figures_costs import amount_ticks
from clbench.report.front import DEFINITION, area_under_front, pareto
from clbench.report.measures import MEASURES, Measure, cells, exact, shown
from clbench.report.select import Block, Group
from clbench.report.stats import Estimate
from clbench.report.style import COLUMN, PAGE, Look, Plot, handle, sheet, wide_range

STATISTICS = ("mean", "low", "high", "n")
ACCURACY, INCREMENTAL = MEASURES["average_accuracy"], MEASURES["average_incremental_accuracy"]
SIZE = 4.5
"""Of markers, points."""

INTERVALS = "Bars: 95 % Student-t intervals over seeds, cut where they leave the panel."
"""For captions."""

Points = dict[str, tuple[Estimate, Estimate]]


@dataclass(frozen=True)
class Cloud:
    """Points of a block in two measures, and who of them is a continual learner."""

    points: Points
    """Label -> (x, y)."""
    learners: tuple[str, ...]
    """Those that are no bound; all of them where there is nothing else."""

    @property
    def hollow(self) -> set[str]:
        """Bounds beside learners."""
        return set(self.points) - set(self.learners)

    @property
    def front(self) -> set[str]:
        """Learners that no other learner beats: less x, more y."""
        return pareto({label: (x.mean, y.mean) for label, (x, y) in self._of_learners().items()})

    def area(self) -> float | None:
        """Return the area under the learners' front, in the unit of y (`clbench.report.front`)."""
        return area_under_front([(x.mean, y.mean) for x, y in self._of_learners().values()])

    def _of_learners(self) -> Points:
        return {label: self.points[label] for label in self.learners}


def cloud(groups: Sequence[Group], x: Measure, y: Measure) -> Cloud:
    """Return the groups that have both measures as points."""
    points = {}
    for group in groups:
        pair = x.over(group.runs), y.over(group.runs)
        if pair[0] is not None and pair[1] is not None:
            points[group.label] = (pair[0], pair[1])
    bounds = {group.label for group in groups if group.baseline.family == "bounds"}
    return Cloud(points, tuple(label for label in points if label not in bounds) or tuple(points))


# ------------------------------------------------------------------------------------------------------------ drawing


def marks(axis: Axes, found: Cloud, looks: Mapping[str, Look], scale: tuple[float, float] = (1.0, 100.0)) -> None:
    """Draw the points of a cloud with their intervals, each measure times its scale; small intervals on top."""
    for label, (x, y) in found.points.items():
        axis.errorbar(
            scale[0] * x.mean,
            scale[1] * y.mean,
            xerr=scale[0] * x.half if x.half else None,
            yerr=scale[1] * y.half if y.half else None,
            fmt=looks[label].marker,
            color=looks[label].colour,
            markersize=SIZE,
            elinewidth=0.6,
            **_face(label, found, looks),
        )


def _face(label: str, found: Cloud, looks: Mapping[str, Look]) -> dict[str, Any]:
    colour = looks[label].colour
    return {
        "markerfacecolor": "white" if label in found.hollow else colour,
        "markeredgecolor": colour if label in found.hollow else "white",
        "markeredgewidth": 0.9 if label in found.hollow else 0.3,
    }


def entries(found: Cloud, looks: Mapping[str, Look]) -> list[Line2D]:
    """Return the legend's entries: markers alone."""
    made = [handle(label, looks[label]) for label in found.points]
    for label, entry in zip(found.points, made, strict=True):
        entry.set(linestyle="none", markersize=SIZE, **_face(label, found, looks))
    return made


def _front_line(axis: Axes, found: Cloud) -> None:
    """Draw the front as steps, level from its last corner to the right edge of the panel."""
    corners = sorted((found.points[label][0].mean, 100 * found.points[label][1].mean) for label in found.front)
    right = max(corners[-1][0], axis.get_xlim()[1])
    corners.append((right, corners[-1][1]))
    axis.step(*zip(*corners, strict=True), where="post", color="#777777", linewidth=0.8, zorder=1)


def _cost_axis(axis: Axes, found: Cloud, cost: Measure) -> None:
    """Scale the axis of a cost to its means: an interval may leave the panel, but squeezes nothing together."""
    means = [x.mean for x, _ in found.points.values()]
    if wide_range(means, factor=4):
        axis.set_xscale("log")
        step = (max(means) / min(means)) ** 0.08
        axis.set_xlim(min(means) / step, max(means) * step)
    else:
        axis.set_xlim(0, 1.08 * max(means))
    amount_ticks(axis.xaxis, cost)


def _accuracy_range(clouds: Sequence[Cloud]) -> tuple[float, float]:
    """Return the range of an axis of accuracies, percent: of the means, and of intervals to as much again each side."""
    means = [100 * y.mean for found in clouds for _, y in found.points.values()]
    bars = [(y.low, y.high) for found in clouds for _, y in found.points.values()]
    ends = [100 * end for bar in bars for end in bar if end is not None]
    low, high = min(means), max(means)
    reach = max(high - low, 2.0)
    low, high = max(low - reach, min([low, *ends])), min(high + reach, max([high, *ends]))
    margin = 0.06 * max(high - low, 1.0)
    return max(low - margin, -2.0), min(high + margin, 102.0)


# ------------------------------------------------------------------------------------------- accuracy against costs


def accuracy_against_parameters(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return average accuracy against the parameters stored, with 95 % t-intervals and the Pareto front."""
    cost = MEASURES["parameters"]
    found = cloud(block.groups, cost, ACCURACY)
    front = found.front if found.points else set()

    def draw() -> Figure:
        figure, (axis,), finish = sheet(COLUMN, 2.1, legend=list(found.points), right=0.2)
        marks(axis, found, looks)
        _cost_axis(axis, found, cost)
        axis.set_ylim(_accuracy_range([found]))
        _front_line(axis, found)
        axis.set(xlabel="parameters stored", ylabel="average accuracy (%)")
        finish(entries(found, looks))
        return figure

    rows = [
        (label, *cells(x), *cells(y), "yes" if label in front else "no") for label, (x, y) in found.points.items()
    ]
    header = ("baseline", *(f"{name}.{end}" for name in (cost.name, ACCURACY.name) for end in STATISTICS), "on_front")
    caption = (
        f"Average accuracy against parameters stored. {sentence(ACCURACY)}; {cost.definition}. {INTERVALS} "
        "Line: Pareto front of the continual learners; bounds are hollow and not on it."
    )
    return Plot("accuracy-parameters", caption, header, tuple(rows), draw)


BUDGETS = (
    (MEASURES["answer_bytes"], "bytes to answer for all tasks"),
    (MEASURES["keep_learning_bytes"], "bytes to go on learning"),
)
"""Measures of memory, and the words on their axes."""
WORK = ((MEASURES["answer_flops"], "FLOPs of an answer"), (MEASURES["step_flops"], "FLOPs of a training step"))
"""Likewise of operations."""


def accuracy_against_bytes(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return average accuracy against the bytes to answer, and to go on learning, with the front and its area."""
    clouds = [cloud(block.groups, cost, ACCURACY) for cost, _ in BUDGETS]
    incremental = [cloud(block.groups, cost, INCREMENTAL) for cost, _ in BUDGETS]
    named = _named(clouds)

    def draw() -> Figure:
        return _two_panels(clouds, BUDGETS, named, looks)

    rows, areas = [], []
    for (cost, words), found, also in zip(BUDGETS, clouds, incremental, strict=True):
        last, average = found.area(), also.area()
        costs = [found.points[label][0].mean for label in found.learners]
        ends = (min(costs), max(costs)) if costs else (None, None)
        if last is not None and average is not None:
            low, high = (shown(Estimate(end, 0.0, 1), "bytes", 1) for end in ends if end is not None)
            areas.append(
                f"{words}, {low} to {high}: {100 * last:.1f} % (AUC-L) and {100 * average:.1f} % (AUC-A)"
            )
        for label, (x, y) in found.points.items():
            rows.append(
                (
                    cost.name, label, *cells(x), *cells(y), *cells(also.points[label][1]),
                    "learner" if label in found.learners else "bound", "yes" if label in found.front else "no",
                    exact(last), exact(average), exact(ends[0]), exact(ends[1]),
                )
            )  # fmt: skip
    caption = (
        "Average accuracy against total memory: to answer for all tasks seen (left) and to go on learning, optimiser, "
        f"replay and all other state included (right). {sentence(ACCURACY)}. {INTERVALS} "
        "Line: Pareto front of the continual learners; bounds are hollow and not on it."
    )
    if areas:
        caption += f" {DEFINITION}, accuracy being that after the last task (AUC-L) or {INCREMENTAL.label} (AUC-A): "
        caption += f"{'; '.join(areas)}. Only areas over the same range are comparable."
    header = (
        "memory", "baseline",
        *(f"{name}.{end}" for name in ("bytes", ACCURACY.name, INCREMENTAL.name) for end in STATISTICS),
        "role", "on_front", "front_area_last", "front_area_average", "range_low_bytes", "range_high_bytes",
    )  # fmt: skip
    return Plot("accuracy-bytes", caption, header, tuple(rows), draw)


def accuracy_against_flops(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return average accuracy against the operations of an answer, and of a training step, with the front.

    Nothing is drawn where operations of fewer than two baselines were counted.
    """
    clouds = [cloud(block.groups, cost, ACCURACY) for cost, _ in WORK]
    if min(len(found.points) for found in clouds) < 2:
        clouds = [Cloud({}, ())] * len(WORK)
    named = _named(clouds)

    def draw() -> Figure:
        return _two_panels(clouds, WORK, named, looks)

    rows = [
        (
            cost.name, label, *cells(x), *cells(y), "learner" if label in found.learners else "bound",
            "yes" if label in found.front else "no",
        )
        for (cost, _), found in zip(WORK, clouds, strict=True)
        for label, (x, y) in found.points.items()
    ]  # fmt: skip
    caption = (
        f"Average accuracy against work: {'; '.join(cost.definition for cost, _ in WORK)}. {sentence(ACCURACY)}. "
        f"{INTERVALS} Line: Pareto front of the continual learners; bounds are hollow and not on it."
    )
    absent = [group.label for group in block.groups if group.label not in named]
    if absent:
        caption += f" Not counted: {', '.join(absent)}."
    columns = (f"{name}.{end}" for name in ("flops", ACCURACY.name) for end in STATISTICS)
    return Plot("accuracy-flops", caption, ("work", "baseline", *columns, "role", "on_front"), tuple(rows), draw)


def _named(clouds: Sequence[Cloud]) -> list[str]:
    return list(dict.fromkeys(label for found in clouds for label in found.points))


def _two_panels(
    clouds: Sequence[Cloud], costs: Sequence[tuple[Measure, str]], named: Sequence[str], looks: Mapping[str, Look]
) -> Figure:
    """Draw two clouds of one accuracy side by side, each with its front."""
    figure, axes, finish = sheet(PAGE, 2.1, columns=2, legend=list(named), right=0.2, gap=(0.45, 0.0))
    for axis, found, (cost, words) in zip(axes, clouds, costs, strict=True):
        marks(axis, found, looks)
        _cost_axis(axis, found, cost)
        axis.set_ylim(_accuracy_range(clouds))
        _front_line(axis, found)
        axis.set_xlabel(words)
    axes[0].set_ylabel("average accuracy (%)")
    axes[1].tick_params(labelleft=False)
    finish(entries(max(clouds, key=lambda found: len(found.points)), looks))
    return figure


def sentence(measure: Measure) -> str:
    """Return a measure's definition as the beginning of a sentence."""
    return measure.definition[0].upper() + measure.definition[1:]


# -------------------------------------------------------------------------------------------------------------- time


def accuracy_against_time(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return average accuracy against wall-clock seconds, of the runs on one model of machine: that with most runs.

    Seconds of different processors are no cost to compare, let alone to average. Nothing is drawn where fewer than two
    baselines ran on one.
    """
    names = [run.environment.device_name for run in block.runs if run.timing.total_seconds is not None]
    machine = min(set(names), key=lambda name: (-names.count(name), name), default="")
    groups = [
        replace(group, runs=runs)
        for group in block.groups
        if (runs := tuple(run for run in group.runs if run.environment.device_name == machine))
    ]
    seconds = MEASURES["seconds"]
    found = cloud(groups, seconds, ACCURACY)
    if len(found.points) < 2:
        found = Cloud({}, ())
    absent = [group.label for group in block.groups if group.label not in found.points]

    def draw() -> Figure:
        figure, (axis,), finish = sheet(COLUMN, 2.1, legend=list(found.points), right=0.2)
        marks(axis, found, looks)
        _cost_axis(axis, found, seconds)
        axis.set_ylim(_accuracy_range([found]))
        axis.set(xlabel="seconds, training and evaluation of all tasks", ylabel="average accuracy (%)")
        finish(entries(found, looks))
        return figure

    rows = [(label, machine, *cells(x), *cells(y)) for label, (x, y) in found.points.items()]
    columns = [f"{name}.{end}" for name in (seconds.name, ACCURACY.name) for end in STATISTICS]
    counts = sorted({len(group.runs) for group in groups if group.label in found.points})
    caption = (
        f"Average accuracy against time: wall clock of all tasks, training to evaluation, of the runs on "
        f"{machine or block.device} alone (n = {_spans(counts)} a baseline), since seconds of different processors do "
        f"not compare. {sentence(ACCURACY)}. {INTERVALS} Bounds are hollow."
    )
    if absent:
        caption += f" Without a run there: {', '.join(absent)}."
    return Plot("accuracy-time", caption, ("baseline", "device_name", *columns), tuple(rows), draw)


def _spans(counts: Sequence[int]) -> str:
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}" if counts else "0"
