"""Accuracies within tasks, where a run was asked for them: the stability gap of De Lange et al. 2023.

Letters: T tasks, N iterations between two evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from clbench.records import RunRecord
from clbench.report.figures_costs import amount_ticks
from clbench.report.measures import MEASURES, cells, evaluated_every, exact
from clbench.report.select import Block
from clbench.report.stats import Estimate, estimate
from clbench.report.style import COLUMN, PAGE, Look, Plot, label_panels, sheet

PANELS = 20
"""Most baselines that get a panel."""
STATISTICS = ("mean", "low", "high", "n")
_SEEN = "#555555"


@dataclass(frozen=True)
class Point:
    """One evaluation, over the runs of a baseline."""

    task: int
    """In training, or just learned, from 0."""
    iteration: float
    """Of the task; the mean over runs after a task, whose length may differ."""
    total: float
    """Of the stream, likewise."""
    is_after: bool
    """Whether it is that after the task, a row of the accuracy matrix."""
    first: Estimate
    """Accuracy on the first task."""
    seen: Estimate
    """Mean accuracy of the tasks seen, the one in training among them."""


def curve(runs: Sequence[RunRecord]) -> list[Point]:
    """Return the evaluations that all these runs have, in order of training; of runs with evaluations within tasks."""
    points: list[Point] = []
    began = [0] * len(runs)
    for task in range(runs[0].task.n_tasks):
        inside = [dict(zip(run.within[task].at, run.within[task].acc, strict=True)) for run in runs]
        for at in sorted(set.intersection(*(set(found) for found in inside))):
            rows = [found[at] for found in inside]
            points.append(_point(task, at, _mean(began) + at, False, rows))
        lengths = [run.within[task].iterations for run in runs]
        began = [start + length for start, length in zip(began, lengths, strict=True)]
        rows = [run.acc[task][: task + 1] for run in runs]
        points.append(_point(task, _mean(lengths), _mean(began), True, rows))
    return points


def _point(task: int, iteration: float, total: float, is_after: bool, rows: Sequence[Sequence[float]]) -> Point:
    first, seen = estimate(row[0] for row in rows), estimate(math.fsum(row) / len(row) for row in rows)
    assert first is not None
    assert seen is not None
    return Point(task, iteration, total, is_after, first, seen)


def _mean(values: Sequence[int]) -> float:
    return math.fsum(values) / len(values)


def within_tasks(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return a panel a baseline (at most PANELS): the first task, and the mean of those seen, over the iterations."""
    runs = {group.label: [run for run in group.runs if run.within] for group in block.groups}
    runs = {label: found for label, found in runs.items() if found}
    curves = {label: curve(found) for label, found in runs.items()}
    shown = list(curves)[:PANELS]

    def draw() -> Figure:
        columns = 2 if len(shown) == 4 else min(3, len(shown))
        lines = -(-len(shown) // columns)
        names = ["first task", "mean of the tasks seen"]
        figure, axes, finish = sheet(
            PAGE if columns > 1 else COLUMN, 1.25, rows=lines, columns=columns, legend=names, top=0.22,
            gap=(0.22, 0.28), right=0.12, share=True,
        )  # fmt: skip
        for axis, label in zip(axes, shown, strict=False):
            _panel(axis, curves[label], looks[label])
            axis.set_title(label, pad=2)
        # By the lines: with few seeds a band may be wider than all there is to see.
        drawn = [point for points in curves.values() for point in points]
        ends = [100 * value.mean for point in drawn for value in (point.first, point.seen)]
        spare = max(1.0, 0.06 * (max(ends) - min(ends)))
        axes[0].set_ylim(min(ends) - spare, max(ends) + spare)
        axes[0].yaxis.set_major_locator(MaxNLocator(5))
        axes[0].set_xlim(0, 1.02 * max(points[-1].total for points in curves.values()))
        amount_ticks(axes[0].xaxis, MEASURES["samples"])
        axes[0].xaxis.set_major_locator(MaxNLocator(4))
        label_panels(figure, axes, len(shown), columns, "training iterations", "accuracy (%)")
        finish([Line2D([], [], label=names[0], color="black"), _handle_of_seen(names[1])])
        return figure

    rows = [
        (
            label, str(point.task + 1), exact(point.iteration), exact(point.total), "yes" if point.is_after else "no",
            *cells(point.first), *cells(point.seen),
        )
        for label, points in curves.items()
        for point in points
    ]  # fmt: skip
    ends = [f"{name}.{end}" for name in ("first_task", "seen") for end in STATISTICS]
    header = ("baseline", "task", "iteration", "iteration_of_stream", "after_task", *ends)
    return Plot("within-task", _caption(runs, len(shown)), header, tuple(rows), draw)


def _caption(runs: Mapping[str, Sequence[RunRecord]], shown: int) -> str:
    found = [run for group in runs.values() for run in group]
    steps = sorted({every for run in found if (every := evaluated_every(run)) is not None})
    counts = sorted({len(group) for group in runs.values()})
    caption = (
        f"Accuracy while tasks are learned, evaluated every {_span(steps)} iterations (continual evaluation, De Lange "
        "et al. 2023): of the first task, and the mean of the tasks seen, the one in training among them. Marks: after "
        "a task, as in every other figure; vertical lines: where the next task begins. Bands: 95 % Student-t "
        f"intervals over seeds for the first task, n = {_span(counts)} a baseline; the others are in the data."
    )
    if shown < len(runs):
        caption += f" {shown} of {len(runs)} baselines are drawn."
    return caption


def _span(values: Sequence[int]) -> str:
    return " to ".join(str(value) for value in dict.fromkeys((*values[:1], *values[-1:])))


def _panel(axis: Axes, points: Sequence[Point], look: Look) -> None:
    """Draw one baseline."""
    axis.grid(axis="x", visible=False)
    x = [point.total for point in points]
    after = [i for i, point in enumerate(points) if point.is_after]
    for i in after[:-1]:
        axis.axvline(x[i], color="#aaaaaa", linewidth=0.5, zorder=0.6)
    marks: dict[str, Any] = {"markersize": 3, "markeredgecolor": "white", "markeredgewidth": 0.3, "markevery": after}
    first = [point.first for point in points]
    low = [100 * max(0.0, value.mean if value.low is None else value.low) for value in first]
    high = [100 * min(1.0, value.mean if value.high is None else value.high) for value in first]
    axis.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
    seen = [100 * point.seen.mean for point in points]
    axis.plot(x, seen, color=_SEEN, linestyle="--", linewidth=0.8, marker=look.marker, **marks)
    y = [100 * value.mean for value in first]
    axis.plot(x, y, color=look.colour, linestyle="-", linewidth=1.0, marker=look.marker, **marks)


def _handle_of_seen(label: str) -> Line2D:
    return Line2D([], [], label=label, color=_SEEN, linestyle="--")
