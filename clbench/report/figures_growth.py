"""Figures of growing nets: units per layer, growth events, capacity against accuracy, which unit serves which task.

A block whose records hold nothing of the kind has none of these figures.

Letters: T tasks, U units.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from clbench.metrics import accuracy_of_seen
from clbench.records import GrowthKind, RunRecord
from clbench.report.figures_costs import amount_ticks
from clbench.report.growth import KINDS, LayerGrowth, growing, over_runs
from clbench.report.measures import MEASURES, cells, exact
from clbench.report.select import Block, Group, slug
from clbench.report.stats import Estimate, estimate
from clbench.report.style import COLUMN, PAGE, Look, Plot, handle, sheet, task_ticks, wide_range

PANELS = 12
"""Most layers that get a panel."""
STATISTICS = ("mean", "low", "high", "n")


def widths_over_tasks(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return the units of every layer (at most PANELS are drawn) after each task, a line a baseline."""
    found = {group.label: {layer: over_runs(group, layer) for layer in growing(group)} for group in block.groups}
    found = {label: layers for label, layers in found.items() if layers}
    layers = list(dict.fromkeys(layer for known in found.values() for layer in known))

    def draw() -> Figure:
        shown = layers[:PANELS]
        columns = min(4, len(shown))
        width = COLUMN if columns == 1 else PAGE if columns > 2 else 4.6
        figure, axes, finish = sheet(
            width, 1.5, rows=-(-len(shown) // columns), columns=columns, legend=list(found), left=0.5, top=0.22,
            gap=(0.42, 0.45),
        )
        for axis, layer in zip(axes, shown, strict=False):
            for label, known in found.items():
                if layer in known:
                    _band(axis, known[layer].widths, looks[label])
            axis.set_title(layer, pad=2)
            axis.set_ylim(bottom=0)
            axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            task_ticks(axis, block.task.n_tasks, most=7)
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
        for place, axis in enumerate(axes):
            below_is_empty = place + columns >= len(shown)
            axis.set(xlabel="tasks learned" if below_is_empty else "", ylabel="" if place % columns else "units")
        finish([handle(label, looks[label]) for label in found])
        return figure

    rows = [row for label, known in found.items() for layer in known for row in _rows(label, layer, known[layer])]
    header = ["baseline", "layer", "after_task", *(f"units.{end}" for end in STATISTICS)]
    header += [f"{kind}.{end}" for kind in (*KINDS, "reused_share") for end in STATISTICS]
    caption = "Units of each layer after each task, mean over seeds. Bands: 95 % Student-t intervals over seeds."
    if len(layers) > PANELS:
        caption += f" {PANELS} of {len(layers)} layers are drawn."
    return Plot("units", caption, tuple(header), tuple(rows), draw)


def _band(axis: Any, curve: list[Estimate | None], look: Look) -> None:
    points = [(task + 1, point) for task, point in enumerate(curve) if point is not None]
    x = [task for task, _ in points]
    axis.plot(x, [point.mean for _, point in points], **{**look.curve, "markersize": 2.6, "linewidth": 0.9})
    low = [point.mean if point.low is None else point.low for _, point in points]
    high = [point.mean if point.high is None else point.high for _, point in points]
    axis.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)


def _rows(label: str, layer: str, found: LayerGrowth) -> list[tuple[str, ...]]:
    counts = [found.counts[kind] for kind in KINDS]
    return [
        (label, layer, str(task + 1), *(text for value in values for text in cells(value)))
        for task, values in enumerate(zip(found.widths, *counts, found.reused, strict=True))
    ]


EVENTS: dict[GrowthKind, tuple[str, str, int]] = {
    "added": ("#0173b2", "", 1),
    "split": ("#de8f05", "////", 1),
    "pruned": ("#949494", "....", -1),
}
"""Kind -> colour, hatch, and side of the axis."""


def growth_events(block: Block) -> Plot:
    """Return the units added, split and pruned during each task, over all layers: a panel a baseline that logs any.

    Counts of one task add up, so they are stacked: what came above the axis, what went below it.
    """
    found: dict[str, dict[GrowthKind, list[Estimate]]] = {}
    for group in block.groups:
        runs = [run for run in group.runs if run.widths]
        if any(event.kind in EVENTS for run in runs for event in run.growth):
            tasks = range(min(len(run.widths) for run in runs))
            found[group.label] = {
                kind: [value for task in tasks if (value := estimate(_units(run, kind, task) for run in runs))]
                for kind in KINDS
            }
    shown = list(found)[:PANELS]
    used = [kind for kind in EVENTS if any(value.mean for known in found.values() for value in known[kind])]

    def draw() -> Figure:
        columns = min(3, len(shown))
        rows = -(-len(shown) // columns)
        width = COLUMN if columns == 1 else PAGE if columns > 2 else 4.6
        figure, axes, finish = sheet(
            width, 1.2, rows=rows, columns=columns, legend=used, left=0.5, top=0.22, gap=(0.42, 0.45)
        )
        for axis, label in zip(axes, shown, strict=False):
            ends = {1: np.zeros(block.task.n_tasks), -1: np.zeros(block.task.n_tasks)}
            for kind, (colour, hatch, side) in EVENTS.items():
                values = np.array([value.mean for value in found[label][kind]])
                places, start = np.arange(1, len(values) + 1), ends[side][: len(values)]
                style: dict[str, Any] = {"color": colour, "edgecolor": "white", "linewidth": 0.3, "hatch": hatch}
                axis.bar(places, side * values, 0.75, bottom=start, **style)
                ends[side][: len(values)] += side * values
            axis.axhline(0, color="black", linewidth=0.6)
            axis.set_ylim(1.08 * ends[-1].min(), 1.08 * max(1.0, ends[1].max()))
            axis.set_title(label, pad=2)
            axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
            task_ticks(axis, block.task.n_tasks, most=7)
            axis.set_xlim(0.3, block.task.n_tasks + 0.7)
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
        for place, axis in enumerate(axes):
            below_is_empty = place + columns >= len(shown)
            axis.set(xlabel="task" if below_is_empty else "", ylabel="" if place % columns else "units")
        finish([Patch(facecolor=EVENTS[k][0], hatch=EVENTS[k][1], edgecolor="white", lw=0.3, label=k) for k in used])
        return figure

    rows = [
        (label, str(task + 1), kind, *cells(value))
        for label, known in found.items()
        for kind, values in known.items()
        for task, value in enumerate(values)
    ]
    caption = (
        "Growth events: units added, split (copied, the old ones kept for earlier tasks) and, below the axis, pruned "
        "during each task, over all layers, mean over seeds; intervals are in the data."
    )
    if len(shown) < len(found):
        caption += f" {len(shown)} of {len(found)} baselines are drawn."
    return Plot("growth-events", caption, ("baseline", "task", "kind", *STATISTICS), tuple(rows), draw)


def _units(run: RunRecord, kind: GrowthKind, task: int) -> int:
    return sum(event.units for event in run.growth if (event.kind, event.after_task) == (kind, task))


def capacity_over_tasks(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return accuracy of the tasks seen against parameters stored, a path a baseline, a point a task."""
    paths: dict[str, list[tuple[Estimate, Estimate]]] = {}
    if any(growing(group) for group in block.groups):
        paths = {group.label: path for group in block.groups if (path := _path(group))}

    def draw() -> Figure:
        figure, (axis,), finish = sheet(COLUMN, 2.2, legend=list(paths), right=0.2)
        for label, path in paths.items():
            x, y = [size.mean for size, _ in path], [100 * accuracy.mean for _, accuracy in path]
            look = looks[label]
            axis.plot(x, y, **{**look.curve, "marker": "", "linewidth": 0.8, "alpha": 0.8})
            # Small points on the way, the usual marker where it ends.
            axis.plot(x[:-1], y[:-1], linestyle="none", marker=".", markersize=3.2, color=look.colour)
            end = {**look.curve, "linestyle": "none", "markersize": 5}
            axis.plot(x[-1:], y[-1:], **end, zorder=3)
        if wide_range([size.mean for path in paths.values() for size, _ in path], factor=4):
            axis.set_xscale("log")
        else:
            axis.set_xlim(left=0)
        axis.margins(x=0.08, y=0.08)
        amount_ticks(axis.xaxis, MEASURES["parameters"])
        axis.set(xlabel="parameters stored", ylabel="accuracy of tasks seen (%)")
        finish([handle(label, looks[label]) for label in paths])
        return figure

    rows = [
        (label, str(task + 1), *cells(size), *cells(accuracy))
        for label, path in paths.items()
        for task, (size, accuracy) in enumerate(path)
    ]
    header = ["baseline", "after_task", *(f"{name}.{end}" for name in ("parameters", "accuracy") for end in STATISTICS)]
    caption = (
        "Capacity against accuracy over the course of the tasks: a point after each task, mean over seeds; the marker "
        "is the last. Accuracy is the mean over the tasks seen by then."
    )
    return Plot("capacity", caption, tuple(header), tuple(rows), draw)


def _path(group: Group) -> list[tuple[Estimate, Estimate]]:
    sizes = [[kept.parameters for kept in run.footprints] for run in group.runs]
    accuracies = [accuracy_of_seen(run.matrix).tolist() for run in group.runs]
    path = []
    for size, accuracy in zip(zip(*sizes, strict=False), zip(*accuracies, strict=True), strict=False):
        x, y = estimate(size), estimate(accuracy)
        if x is not None and y is not None:
            path.append((x, y))
    return path


def serving_units(block: Block) -> list[Plot]:
    """Return a figure for each baseline that recorded it: which units of its first run serve which task."""
    firsts = [(group, next((run for run in group.runs if run.units), None)) for group in block.groups]
    return [_serving(group, run) for group, run in firsts if run is not None]


def _serving(group: Group, run: RunRecord) -> Plot:
    layers = list(dict.fromkeys(layer for served in run.units for layer in served))
    rows = [
        (group.label, str(run.seed), layer, str(task + 1), exact(start), exact(end))
        for layer in layers
        for task, served in enumerate(run.units)
        for start, end in served.get(layer, [])
    ]
    caption = (
        f"Which unit serves which task: {group.label}, seed {run.seed} (n = 1), after the last task. A row is filled "
        "where the unit serves the task; the colour says which task the unit served first."
    )
    if len(layers) > PANELS:
        caption += f" {PANELS} of {len(layers)} layers are drawn."
    header = ("baseline", "seed", "layer", "task", "first_unit", "end_unit")
    draw = partial(_draw_serving, run, layers[:PANELS])
    return Plot(f"serving-{slug(group.label)}", caption, header, tuple(rows), draw)


def first_served(run: RunRecord, layer: str) -> NDArray[np.float64]:
    """Return for every unit and task, (T, U), the first task the unit serves; NaN where it does not serve the task."""
    ends = [end for served in run.units for _, end in served.get(layer, [])]
    width = max([*ends, run.widths[-1].get(layer, 0) if run.widths else 0])
    first = np.full(width, np.nan)
    table = np.full((len(run.units), width), np.nan)
    for task, served in enumerate(run.units):
        for start, end in served.get(layer, []):
            new = np.isnan(first[start:end])
            first[start:end][new] = task
            table[task, start:end] = first[start:end]
    return table


def _draw_serving(run: RunRecord, layers: list[str]) -> Figure:
    n_tasks = run.task.n_tasks
    columns = min(2, len(layers))
    rows = -(-len(layers) // columns)
    width = COLUMN if columns == 1 else PAGE
    figure, axes, _ = sheet(
        width, min(2.2, 0.35 + 0.11 * n_tasks), rows=rows, columns=columns, left=0.4, right=0.62, top=0.22,
        gap=(0.3, 0.5),
    )
    colours = mpl.colormaps["viridis"].resampled(max(2, n_tasks))
    for place, (axis, layer) in enumerate(zip(axes, layers, strict=False)):
        table = first_served(run, layer)
        extent = (0.0, float(table.shape[1]), n_tasks + 0.5, 0.5)
        # No interpolation at all: a unit is a rectangle at any size.
        image = axis.imshow(
            table, cmap=colours, vmin=-0.5, vmax=n_tasks - 0.5, extent=extent, aspect="auto", interpolation="none"
        )
        axis.grid(False)
        axis.set_title(layer, pad=2)
        axis.set_yticks(range(1, n_tasks + 1, max(1, -(-n_tasks // 5))))
        # Lines between tasks, so that rows can be told apart where all are filled.
        axis.hlines(np.arange(1.5, n_tasks), *extent[:2], colors="white", linewidth=0.6)
        axis.set(ylabel="" if place % columns else "task", xlabel="unit" if place + columns >= len(layers) else "")
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    top, low = axes[0].get_position(), axes[(rows - 1) * columns].get_position()
    bar = figure.add_axes((1 - 0.52 / width, low.y0, 0.09 / width, top.y1 - low.y0))
    ticks = range(0, n_tasks, max(1, -(-n_tasks // 5)))
    figure.colorbar(image, cax=bar, ticks=list(ticks))
    bar.set_yticklabels([str(tick + 1) for tick in ticks])
    bar.set_ylabel("first task served", labelpad=2)
    bar.invert_yaxis()
    return figure
