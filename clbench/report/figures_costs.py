"""Figures of cost: parameters over tasks, accuracy against a cost with its Pareto front, peak memory per phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter, NullLocator

from clbench.report.measures import MEASURES, Measure, amount, exact, peak_of
from clbench.report.select import Block
from clbench.report.stats import Estimate, estimate
from clbench.report.style import COLUMN, Look, Plot, handle, sheet, task_ticks, wide_range

PHASES = {"train": "#0173b2", "grow": "#de8f05", "consolidate": "#029e73", "evaluate": "#949494"}
"""Phases in order, each with its colour."""


def parameters_over_tasks(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return the weights stored after each task, a line a baseline, mean over seeds."""
    curves: dict[str, list[Estimate]] = {}
    for group in block.groups:
        columns = zip(*([kept.parameters for kept in run.footprints] for run in group.runs), strict=False)
        curve = [point for column in columns if (point := estimate(column)) is not None]
        if curve:
            curves[group.label] = curve

    def draw() -> Figure:
        figure, (axis,), finish = sheet(COLUMN, 2.0, legend=list(curves), left=0.55)
        for i, (label, curve) in enumerate(curves.items()):
            # Many baselines keep the same net: staggered markers tell lines apart that lie on each other.
            every = (i % len(curve), max(1, min(len(curve), len(curves))))
            x = range(1, len(curve) + 1)
            axis.plot(x, [point.mean for point in curve], markevery=every, **looks[label].curve)
        if wide_range([point.mean for curve in curves.values() for point in curve]):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        amount_ticks(axis.yaxis, MEASURES["parameters"])
        task_ticks(axis, block.task.n_tasks)
        axis.set(xlabel="tasks learned", ylabel="parameters stored")
        finish([handle(label, looks[label]) for label in curves])
        return figure

    rows = [
        (label, str(i + 1), exact(point.mean), exact(point.low), exact(point.high), str(point.n))
        for label, curve in curves.items()
        for i, point in enumerate(curve)
    ]
    header = ("baseline", "after_task", "mean", "low", "high", "n")
    caption = "Weights stored after each task, mean over seeds. Markers are staggered where lines coincide."
    return Plot("parameters", caption, header, tuple(rows), draw)


def accuracy_against(block: Block, looks: Mapping[str, Look], cost: Measure, words: str) -> Plot:
    """Return average accuracy against a cost, with 95 % t-intervals and the Pareto front.

    The front runs over continual learners; bounds (joint training, a net per task, ...) are drawn hollow and do not
    count, unless the block has nothing else.

    Args:
        block: what to draw.
        looks: of the baselines.
        cost: across, lower is better.
        words: what the cost is, for the axis and the caption.
    """
    accuracy = MEASURES["average_accuracy"]
    points: dict[str, tuple[Estimate, Estimate]] = {}
    bounds = set()
    for group in block.groups:
        x, y = cost.over(group.runs), accuracy.over(group.runs)
        if x is not None and y is not None:
            points[group.label] = (x, y)
            if group.baseline.family == "bounds":
                bounds.add(group.label)
    learners = [label for label in points if label not in bounds] or list(points)
    front = pareto({label: (points[label][0].mean, points[label][1].mean) for label in learners})

    def draw() -> Figure:
        figure, (axis,), finish = sheet(COLUMN, 2.1, legend=list(points), right=0.2)
        log = wide_range([x.mean for x, _ in points.values()], factor=4)
        if log:
            axis.set_xscale("log")
        corners = sorted((points[label][0].mean, 100 * points[label][1].mean) for label in front)
        axis.step(*zip(*corners, strict=True), where="post", color="#999999", linewidth=0.8, zorder=1)
        handles = []
        for label, (x, y) in points.items():
            look = looks[label]
            face = "white" if label in bounds and len(learners) < len(points) else look.colour
            style: dict[str, Any] = {"markerfacecolor": face, "markeredgecolor": look.colour, "markeredgewidth": 0.8}
            axis.errorbar(
                x.mean,
                100 * y.mean,
                xerr=x.half or None,
                yerr=None if y.half is None else 100 * y.half,
                fmt=look.marker,
                color=look.colour,
                markersize=4.5,
                elinewidth=0.7,
                capsize=1.5,
                **style,
            )
            entry = handle(label, look)
            entry.set(linestyle="none", markersize=4.5, **style)
            handles.append(entry)
        axis.margins(x=0.08, y=0.08)
        if not log:
            axis.set_xlim(left=0)
        amount_ticks(axis.xaxis, cost)
        axis.set(xlabel=words, ylabel="average accuracy (%)")
        finish(handles)
        return figure

    rows = [
        (
            label,
            *(exact(x.mean), exact(x.low), exact(x.high), str(x.n)),
            *(exact(y.mean), exact(y.low), exact(y.high), str(y.n)),
            "yes" if label in front else "no",
        )
        for label, (x, y) in points.items()
    ]
    statistics = ("mean", "low", "high", "n")
    header = ("baseline", *(f"{name}.{end}" for name in (cost.name, accuracy.name) for end in statistics), "on_front")
    caption = (
        f"Average accuracy against {words}, with 95 % Student-t intervals over seeds. "
        "Line: Pareto front of the continual learners; bounds are hollow."
    )
    name = "accuracy-parameters" if cost.name == "parameters" else "accuracy-bytes"
    return Plot(name, caption, header, tuple(rows), draw)


def pareto(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names that no other point beats: none has at most the cost and at least the gain, and one better.

    Args:
        points: name -> (cost, gain).
    """

    def beaten(name: str) -> bool:
        cost, gain = points[name]
        return any(other[0] <= cost and other[1] >= gain and other != (cost, gain) for other in points.values())

    return {name for name in points if not beaten(name)}


def peak_memory(block: Block) -> Plot:
    """Return the peak allocated memory of each phase above the level before it, worst task, mean over seeds."""
    bars: dict[str, dict[str, Estimate]] = {}
    for group in block.groups:
        found = {phase: estimate(peak_of(run, phase) for run in group.runs) for phase in PHASES}
        measured = {phase: value for phase, value in found.items() if value is not None}
        if measured:
            bars[group.label] = measured
    used = [phase for phase in PHASES if any(phase in values for values in bars.values())]

    def draw() -> Figure:
        left = 0.25 + 0.056 * max(map(len, bars))
        height = 0.1 + (0.075 * len(used) + 0.06) * len(bars)
        figure, (axis,), finish = sheet(COLUMN, height, legend=used, left=left, right=0.2)
        thick = 0.85 / max(1, len(used))
        for place, values in enumerate(bars.values()):
            for i, phase in enumerate(used):
                if phase in values:
                    y = place + (i - (len(used) - 1) / 2) * thick
                    axis.barh(y, values[phase].mean, height=thick, color=PHASES[phase], xerr=values[phase].half or None)
        axis.set_yticks(range(len(bars)), list(bars))
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
        amount_ticks(axis.xaxis, MEASURES["peak_train_bytes"])
        axis.set_xlabel(f"peak memory, {block.device}")
        finish([Patch(color=PHASES[phase], label=phase) for phase in used])
        return figure

    rows = [
        (label, phase, exact(value.mean), exact(value.low), exact(value.high), str(value.n))
        for label, values in bars.items()
        for phase, value in values.items()
    ]
    caption = f"Peak allocated memory of each phase above the level before it, worst task, on {block.where}."
    return Plot("peak-memory", caption, ("baseline", "phase", "mean", "low", "high", "n"), tuple(rows), draw)


def amount_ticks(axis: Axis, measure: Measure) -> None:
    """Label the ticks of an axis in the measure's unit, few enough not to touch; bytes at whole binary steps."""

    def label(value: float, _: int | None = None) -> str:
        number, _space, suffix = amount(value, measure.unit).partition(" ")
        number = number.rstrip("0").rstrip(".") if "." in number else number
        return f"{number} {suffix}".strip()

    low, high = axis.get_view_interval()
    axis.set_major_formatter(FuncFormatter(label))
    axis.set_minor_formatter(NullFormatter())
    binary = measure.unit == "bytes"
    if axis.get_scale() == "log":
        subs = (1.0,) if binary or high > 300 * low else (1.0, 3.0) if high > 30 * low else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(base=2.0 if binary else 10.0, subs=subs, numticks=6))
        axis.set_minor_locator(NullLocator())
    elif binary:
        axis.set_major_locator(MultipleLocator(_binary_step(high - low)))
    else:
        axis.set_major_locator(MaxNLocator(5))


def _binary_step(span: float) -> float:
    """Return the smallest of 1, 2, 5, 10, ... 500 bytes, KiB, MiB, ... that divides a range into at most five steps."""
    steps = (digit * ten * 1024.0**power for power in range(6) for ten in (1, 10, 100) for digit in (1, 2, 5))
    return next((step for step in steps if span <= 5 * step), span)
