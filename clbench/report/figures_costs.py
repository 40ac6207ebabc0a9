"""Figures of cost: parameters and operations over tasks, peak memory per phase."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter, NullLocator

from clbench.report.end_labels import end_labels, height, margin
from clbench.report.measures import MEASURES, Measure, amount, exact, peak_of
from clbench.report.select import Block
from clbench.report.stats import Estimate, estimate
from clbench.report.style import COLUMN, Look, Plot, handle, sheet, task_ticks, text_width, wide_range

PHASES = {
    "train": Look("#0173b2", "o", ""),
    "grow": Look("#de8f05", "^", ""),
    "consolidate": Look("#029e73", "D", ""),
    "evaluate": Look("#777777", "s", ""),
}
"""Phases in order."""
_DEARER = 1.05
"""A step that takes so many times the first task's shows that costs grow."""


def parameters_over_tasks(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return the weights stored after each task, a line a baseline, mean over seeds."""
    curves: dict[str, list[Estimate]] = {}
    for group in block.groups:
        columns = zip(*([kept.parameters for kept in run.footprints] for run in group.runs), strict=False)
        curve = [point for column in columns if (point := estimate(column)) is not None]
        if curve:
            curves[group.label] = curve
    caption = "Weights stored after each task, mean over seeds. Markers are staggered where lines coincide."
    axes = ("after_task", "tasks learned", "parameters stored")
    return _over_tasks("parameters", caption, axes, MEASURES["parameters"], curves, block, looks)


def step_flops_over_tasks(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return the operations of a training step of each task, a line a baseline; nothing where none costs more later.

    What replay, penalties over earlier tasks and growth add to a step is what lines of different slope show.
    """
    curves: dict[str, list[Estimate]] = {}
    for group in block.groups:
        known = [[flops.step for flops in run.flops] for run in group.runs if run.flops]
        columns = [[step for step in column if step is not None] for column in zip(*known, strict=False)]
        curve = [point for column in columns if len(column) == len(known) and (point := estimate(column)) is not None]
        if curve and len(curve) == len(columns):
            curves[group.label] = curve
    if not any(point.mean > _DEARER * curve[0].mean for curve in curves.values() for point in curve):
        curves = {}
    caption = (
        "Floating-point operations of a training step of each task, of the kind that there were most of, mean over "
        "seeds; what is counted: clbench list metrics. Markers are staggered where lines coincide."
    )
    axes = ("task", "task in training", "operations of a training step")
    return _over_tasks("step-flops", caption, axes, MEASURES["step_flops"], curves, block, looks)


def _over_tasks(
    name: str,
    caption: str,
    axes: tuple[str, str, str],
    measure: Measure,
    curves: Mapping[str, list[Estimate]],
    block: Block,
    looks: Mapping[str, Look],
) -> Plot:
    """Return a line a baseline over tasks, from 0 on, or logarithmic where lines are far apart.

    Args:
        name: of the figure.
        caption: of the figure.
        axes: names of the tasks' column in the data, of x and of y.
        measure: what is drawn.
        curves: by label.
        block: for the number of tasks.
        looks: by label.
    """

    def draw() -> Figure:
        figure, (axis,), _ = sheet(COLUMN, height(list(curves), 2.0), left=0.55, right=margin(list(curves)))
        for i, (label, curve) in enumerate(curves.items()):
            # Many baselines keep the same net: staggered markers tell lines apart that lie on each other.
            every = (i % len(curve), max(1, min(len(curve), len(curves))))
            x = range(1, len(curve) + 1)
            axis.plot(x, [point.mean for point in curve], markevery=every, **looks[label].curve)
        if wide_range([point.mean for curve in curves.values() for point in curve]):
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        amount_ticks(axis.yaxis, measure)
        task_ticks(axis, block.task.n_tasks, most=6)
        axis.set(xlabel=axes[1], ylabel=axes[2])
        end_labels(axis, {label: (len(curve), curve[-1].mean) for label, curve in curves.items()}, looks)
        return figure

    rows = [
        (label, str(i + 1), exact(point.mean), exact(point.low), exact(point.high), str(point.n))
        for label, curve in curves.items()
        for i, point in enumerate(curve)
    ]
    header = ("baseline", axes[0], "mean", "low", "high", "n")
    return Plot(name, caption, header, tuple(rows), draw)


def peak_memory(block: Block) -> Plot:
    """Return the peak allocated memory of each phase above the level before it, worst task, mean over seeds.

    Phases side by side and never stacked: a sum of peaks that lie at different times is no amount of memory.
    """
    found: dict[str, dict[str, Estimate]] = {}
    for group in block.groups:
        of_phase = {phase: estimate(peak_of(run, phase) for run in group.runs) for phase in PHASES}
        measured = {phase: value for phase, value in of_phase.items() if value is not None}
        if measured:
            found[group.label] = measured
    used = [phase for phase in PHASES if any(phase in v and v[phase].mean > 0 for v in found.values())]

    def draw() -> Figure:
        left = 0.15 + max(text_width(label) for label in found)
        figure, (axis,), finish = sheet(COLUMN, 0.15 + 0.16 * len(found), legend=used, left=left, right=0.2)
        for place, values in enumerate(found.values()):
            end = max(value.mean for value in values.values())
            axis.plot([0, end], [place] * 2, color="#cccccc", linewidth=0.8, zorder=1)
            for phase, value in values.items():
                if value.mean == 0:
                    continue
                look = PHASES[phase]
                axis.errorbar(
                    value.mean, place, xerr=value.half or None, fmt=look.marker, color=look.colour, markersize=4,
                    markeredgecolor="white", markeredgewidth=0.3, elinewidth=0.7,
                )  # fmt: skip
        axis.set_yticks(range(len(found)), list(found))
        axis.set_ylim(len(found) - 0.4, -0.6)
        highest = max(value.mean for values in found.values() for value in values.values()) or 1
        axis.set_xlim(-0.02 * highest, 1.08 * highest)
        axis.grid(axis="y", visible=False)
        amount_ticks(axis.xaxis, MEASURES["peak_train_bytes"])
        axis.set_xlabel(f"peak memory of a phase, {block.device}")
        finish([handle(phase, PHASES[phase]) for phase in used])
        return figure

    rows = [
        (label, phase, exact(value.mean), exact(value.low), exact(value.high), str(value.n))
        for label, values in found.items()
        for phase, value in values.items()
    ]
    caption = (
        "Peak allocated memory of each phase above the level before that phase, worst task, mean over seeds. Bars: "
        "95 % Student-t intervals. Peaks of different phases fall at different times: they are not to be added. "
        "A phase that allocated nothing has no mark."
    )
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
    """Return the smallest power of two, in bytes, that divides a range into at most five steps: 256 MiB, never 250."""
    return 2.0 ** math.ceil(math.log2(span / 5)) if span > 0 else 1.0
