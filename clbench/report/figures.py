"""Figures of accuracy: per task over time, of the tasks seen, as a matrix, and forgetting.

Letters: T tasks. Each function returns a `Plot`: its numbers now, its drawing when asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clbench.metrics import accuracy_of_seen
from clbench.report.end_labels import end_labels, height, margin
from clbench.report.figures_costs import parameters_over_tasks, peak_memory, step_flops_over_tasks
from clbench.report.figures_growth import capacity_over_tasks, growth_events, serving_units, widths_over_tasks
from clbench.report.figures_marginal import marginal_parameters
from clbench.report.figures_plasticity import stability_plasticity
from clbench.report.figures_sharing import sharing_ladder, sharing_map
from clbench.report.figures_trade import (
    accuracy_against_bytes,
    accuracy_against_flops,
    accuracy_against_parameters,
    accuracy_against_time,
)
from clbench.report.figures_within import within_tasks
from clbench.report.measures import MEASURES, cells
from clbench.report.select import Block, Group
from clbench.report.stats import Estimate, estimate
from clbench.report.style import COLUMN, PAGE, Look, Plot, handle, label_panels, sheet, task_ticks, text_width

PANELS = 20
"""Most tasks, or baselines, that get a panel of their own."""
STATISTICS = ("mean", "low", "high", "n")


def plots(block: Block, looks: Mapping[str, Look]) -> list[Plot]:
    """Return every figure of a block that has something to show, in the order of the report."""
    averaged = (
        accuracy_of_seen_tasks(block, looks),
        accuracy_per_task(block, looks),
        accuracy_matrices(block),
        forgetting_bars(block, looks),
        stability_plasticity(block, looks),
        accuracy_against_bytes(block, looks),
        accuracy_against_flops(block, looks),
        accuracy_against_parameters(block, looks),
        parameters_over_tasks(block, looks),
        step_flops_over_tasks(block, looks),
        marginal_parameters(block),
        peak_memory(block),
        widths_over_tasks(block, looks),
        growth_events(block),
        capacity_over_tasks(block, looks),
        sharing_ladder(block, looks),
    )
    # These say themselves how many runs they show.
    counted = (
        within_tasks(block, looks), accuracy_against_time(block, looks), *serving_units(block), sharing_map(block),
    )  # fmt: skip
    drawn = [replace(plot, caption=f"{plot.caption} {runs_of(block)}") for plot in averaged]
    drawn += [replace(plot, caption=f"{plot.caption} Device: {block.where}.") for plot in counted]
    return [plot for plot in drawn if plot.rows]


def runs_of(block: Block) -> str:
    """Return the sentences that end a caption: how many runs a baseline has, and on what device."""
    counts = sorted({len(group.runs) for group in block.groups})
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"n = {span} a baseline. Device: {block.where}."


def _over_runs(values: list[float]) -> Estimate:
    # What another tool did not measure is NaN over no run.
    return estimate(values) or Estimate(math.nan, None, 0)


def _matrix(group: Group) -> list[list[Estimate]]:
    """Return the accuracy matrix (T, T) with every entry estimated over the group's runs."""
    stack = np.stack([run.matrix for run in group.runs])
    size = stack.shape[1]
    return [[_over_runs(stack[:, i, j].tolist()) for j in range(size)] for i in range(size)]


# ----------------------------------------------------------------------------------------------------- over the tasks


def accuracy_of_seen_tasks(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return the mean accuracy of the tasks seen against tasks learned, with t-interval bands over seeds."""
    curves = {}
    for group in block.groups:
        seen = np.stack([accuracy_of_seen(run.matrix) for run in group.runs])
        curves[group.label] = [_over_runs(column.tolist()) for column in seen.T]

    def draw() -> Figure:
        figure, (axis,), _ = sheet(COLUMN, height(list(curves), 2.1), right=margin(list(curves)))
        for label, curve in curves.items():
            x = np.arange(1, len(curve) + 1)
            axis.plot(x, [100 * point.mean for point in curve], **looks[label].curve)
            low = [100 * max(0.0, point.low if point.low is not None else point.mean) for point in curve]
            high = [100 * min(1.0, point.high if point.high is not None else point.mean) for point in curve]
            axis.fill_between(x, low, high, color=looks[label].colour, alpha=0.15, linewidth=0)
        task_ticks(axis, block.task.n_tasks, most=6)
        axis.set(xlabel="tasks learned", ylabel="accuracy of tasks seen (%)")
        end_labels(axis, {label: (len(curve), 100 * curve[-1].mean) for label, curve in curves.items()}, looks)
        return figure

    rows = [
        (label, str(i + 1), *cells(point)) for label, curve in curves.items() for i, point in enumerate(curve)
    ]
    caption = "Mean accuracy of the tasks seen so far after each task. Bands: 95 % Student-t intervals over seeds."
    return Plot("seen", caption, ("baseline", "after_task", *STATISTICS), tuple(rows), draw)


def accuracy_per_task(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return the accuracy on each task from its learning to the end, a panel a task (at most PANELS, evenly spread)."""
    matrices = {group.label: _matrix(group) for group in block.groups}
    n_tasks = block.task.n_tasks
    shown = sorted({round(place) for place in np.linspace(0, n_tasks - 1, min(n_tasks, PANELS))})

    def draw() -> Figure:
        columns = min(5, len(shown))
        rows = -(-len(shown) // columns)
        figure, axes, finish = sheet(
            PAGE if columns > 2 else COLUMN, 0.95, rows=rows, columns=columns, legend=list(matrices), top=0.22,
            gap=(0.12, 0.24), share=True,
        )
        for axis, j in zip(axes, shown, strict=False):
            for label, matrix in matrices.items():
                y = [100 * matrix[i][j].mean for i in range(j, n_tasks)]
                axis.plot(range(j + 1, n_tasks + 1), y, **{**looks[label].curve, "markersize": 2.2, "linewidth": 0.9})
            axis.set_title(f"task {j + 1}", pad=2)
            task_ticks(axis, n_tasks, most=7)
            axis.yaxis.set_major_locator(MaxNLocator(4))
        label_panels(figure, axes, len(shown), columns, "tasks learned", "accuracy (%)")
        finish([handle(label, looks[label]) for label in matrices])
        return figure

    rows = [
        (label, str(j + 1), str(i + 1), *cells(matrix[i][j]))
        for label, matrix in matrices.items()
        for j in range(n_tasks)
        for i in range(j, n_tasks)
    ]
    caption = (
        "Accuracy on each task from when it was learned to the end of the stream, mean over seeds; intervals are in "
        "the data."
    )
    if len(shown) < n_tasks:
        caption += f" {len(shown)} of {n_tasks} tasks are drawn."
    return Plot("per-task", caption, ("baseline", "task", "after_task", *STATISTICS), tuple(rows), draw)


# ------------------------------------------------------------------------------------------------------------ matrices


def accuracy_matrices(block: Block) -> Plot:
    """Return the accuracy matrix of every baseline (at most PANELS) as a heat map, 0 to 100 %."""
    matrices = {group.label: _matrix(group) for group in block.groups}
    shown = list(matrices)[:PANELS]
    n_tasks = block.task.n_tasks

    def draw() -> Figure:
        columns = min(4, len(shown))
        rows = -(-len(shown) // columns)
        width = PAGE if columns > 2 else COLUMN
        # Square panels: as high as they come out wide beside the margins and the colour bar.
        panel = (width - 0.40 - 0.60 - (columns - 1) * 0.25) / columns
        figure, axes, _ = sheet(
            width, panel, rows=rows, columns=columns, left=0.40, right=0.60, top=0.22, gap=(0.25, 0.30), share=True
        )
        for axis, label in zip(axes, shown, strict=False):
            values = np.array([[100 * entry.mean for entry in line] for line in matrices[label]])
            span = (0.5, n_tasks + 0.5)
            image = axis.imshow(values, cmap="cividis", vmin=0, vmax=100, extent=(*span, span[1], span[0]))
            axis.grid(False)
            axis.tick_params(length=0, pad=2)
            axis.set_title(label, pad=2)
            axis.set_xticks(range(1, n_tasks + 1, max(1, -(-n_tasks // 5))))
            axis.set_yticks(range(1, n_tasks + 1, max(1, -(-n_tasks // 5))))
            if n_tasks <= 5 and panel > 1.2:
                for (i, j), value in np.ndenumerate(values):
                    if math.isnan(value):
                        continue
                    colour = "white" if value < 55 else "black"
                    axis.text(j + 1, i + 1, f"{value:.0f}", ha="center", va="center", fontsize=5.5, color=colour)
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
            axes[axes.index(axis) - columns].tick_params(labelbottom=True)
        box = axes[0].get_position(), axes[(rows - 1) * columns].get_position()
        bar = figure.add_axes((1 - 0.52 / width, box[1].y0, 0.09 / width, box[0].y1 - box[1].y0))
        figure.colorbar(image, cax=bar)
        bar.set_ylabel("accuracy (%)", labelpad=2)
        figure.supxlabel("accuracy on task", y=0.03 / figure.get_figheight(), fontsize=7, va="bottom")
        figure.supylabel("after task", x=0.01, y=(box[0].y1 + box[1].y0) / 2, fontsize=7)
        return figure

    rows = [
        (label, str(i + 1), str(j + 1), *cells(matrix[i][j]))
        for label, matrix in matrices.items()
        for i in range(n_tasks)
        for j in range(n_tasks)
    ]
    caption = "Accuracy on every task (across) after every task (down), mean over seeds; intervals are in the data."
    if len(shown) < len(matrices):
        caption += f" {len(shown)} of {len(matrices)} baselines are drawn."
    return Plot("matrix", caption, ("baseline", "after_task", "task", *STATISTICS), tuple(rows), draw)


# ---------------------------------------------------------------------------------------------------------- forgetting


def forgetting_bars(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return forgetting (Chaudhry et al. 2018) as bars with 95 % t-intervals; none for streams of one task."""
    measure = MEASURES["forgetting.chaudhry2018"]
    found = {group.label: measure.over(group.runs) for group in block.groups}
    bars = {label: value for label, value in found.items() if value is not None}

    def draw() -> Figure:
        left = 0.15 + max(text_width(label) for label in bars)
        figure, (axis,), _ = sheet(COLUMN, 0.2 + 0.16 * len(bars), left=left)
        for place, (label, value) in enumerate(bars.items()):
            error = None if value.half is None else 100 * value.half
            colour, whisker = looks[label].colour, {"elinewidth": 0.8}
            axis.barh(place, 100 * value.mean, 0.7, color=colour, alpha=0.75, xerr=error, capsize=2, error_kw=whisker)
        axis.set_yticks(range(len(bars)), list(bars))
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.grid(axis="y", visible=False)
        axis.axvline(0, color="black", linewidth=0.6)
        axis.set_xlabel("forgetting (percentage points)")
        return figure

    rows = [(label, *cells(value)) for label, value in bars.items()]
    caption = f"{measure.definition[0].upper()}{measure.definition[1:]}. 95 % Student-t intervals over seeds."
    return Plot("forgetting", caption, ("baseline", *STATISTICS), tuple(rows), draw)
