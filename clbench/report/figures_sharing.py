"""Figures of sharing: the ladder from one net for all tasks to one net per task, and which tensor serves which task.

A block whose records hold nothing of the kind has none of these figures.

Letters: T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from clbench.records import RunRecord, Sharing, TensorUse
from clbench.report.figures_costs import amount_ticks
from clbench.report.measures import MEASURES, Measure, amount, cells, exact
from clbench.report.select import Block, Group
from clbench.report.sharing import IN_COMMON, MARGINAL_RELATIVE, USED, ladder, mapped
from clbench.report.stats import Estimate
from clbench.report.style import PAGE, Look, Plot, sheet, wide_range

MAPS = 6
"""Most baselines whose map is drawn."""
ROWS = 24
"""Most rows of a drawn map: the largest."""
STATISTICS = ("mean", "low", "high", "n")
_LETTER, _LINE = 0.049, 0.085
"""Width of a letter and height of a line of a label, in, at the size below."""
_TYPE = 5.5

LEAST, MOST = -8.0, 108.0
"""Range of the axis of shares, in percent."""

Point = tuple[float, float]
Box = tuple[float, float, float, float]
"""Left, low, right, high."""


# --------------------------------------------------------------------------------------------------------- the ladder


def sharing_ladder(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return accuracy, forgetting, bytes to answer and what a task adds, against the share of parameters in common."""
    rungs = ladder(block)
    answer, keep = MEASURES["answer_bytes"], MEASURES["keep_learning_bytes"]
    panels = (MEASURES["average_accuracy"], MEASURES["forgetting.chaudhry2018"], answer, MARGINAL_RELATIVE)
    words = ("average accuracy (%)", "forgetting (points)", "bytes to answer", "a task adds (x one net)")
    found = {
        group.label: {measure.name: measure.over(group.runs) for measure in (IN_COMMON, *panels, keep)}
        for group in rungs
    }
    ranges = [_range(found, measure) for measure in panels]

    def draw() -> Figure:
        figure, axes, _ = sheet(PAGE, 2.5, rows=2, columns=2, left=0.62, bottom=0.36, gap=(0.6, 0.2))
        for place, (axis, measure, word) in enumerate(zip(axes, panels, words, strict=True)):
            points = _scatter(axis, found, measure, looks)
            taken = list(points.values())
            lines = _intervals(found, measure)
            if measure is answer:
                hollow = _open_markers(axis, found, keep, looks)
                taken += hollow
                lines += [((x, y), top) for top in hollow for x, y in points.values() if x == top[0] and y < top[1]]
            axis.set_xlim(LEAST, MOST)
            axis.set_ylabel(word)
            _finish_scale(axis, measure, ranges[place])
            if place > 1:
                axis.set_xlabel("parameters in common (%)")
            else:
                axis.tick_params(labelbottom=False)
            write_labels(axis, points, taken, lines, looks)
        return figure

    rows = []
    for group in rungs:
        line = [group.label]
        for measure in (IN_COMMON, *panels, keep):
            line += cells(found[group.label][measure.name])
        rows.append(tuple(line))
    names = [f"{measure.name}.{end}" for measure in (IN_COMMON, *panels, keep) for end in STATISTICS]
    caption = (
        "The ladder from one net per task (left) to one net for all (right): accuracy, forgetting, bytes to answer "
        "(hollow: to go on learning) and the parameters that a task after the first adds, against the share of the "
        f"other tasks that use a parameter too. {USED} 95 % Student-t intervals over seeds."
    )
    if any(one.cuts for one in ranges):
        caption += " An interval that leaves its panel is cut at the edge."
    return Plot("sharing-ladder", caption, ("baseline", *names), tuple(rows), draw)


def _scale(measure: Measure) -> float:
    return 100.0 if measure.unit == "fraction" else 1.0


def _pair(values: Mapping[str, Estimate | None], measure: Measure) -> tuple[Estimate, Estimate] | None:
    x, y = values[IN_COMMON.name], values[measure.name]
    return None if x is None or y is None else (x, y)


def _scatter(
    axis: Axes, found: Mapping[str, Mapping[str, Estimate | None]], measure: Measure, looks: Mapping[str, Look]
) -> dict[str, Point]:
    """Draw a panel's points with their intervals; return them."""
    points, scale = {}, _scale(measure)
    for label, values in found.items():
        if (pair := _pair(values, measure)) is None:
            continue
        x, y = pair
        look = looks[label]
        axis.errorbar(
            100 * x.mean,
            scale * y.mean,
            xerr=100 * x.half if x.half else None,
            yerr=scale * y.half if y.half else None,
            fmt=look.marker,
            color=look.colour,
            markersize=4,
            elinewidth=0.6,
            markeredgecolor="white",
            markeredgewidth=0.3,
        )
        points[label] = (100 * x.mean, scale * y.mean)
    return points


def _intervals(found: Mapping[str, Mapping[str, Estimate | None]], measure: Measure) -> list[tuple[Point, Point]]:
    """Return the ends of the intervals that a panel shows."""
    lines, scale = [], _scale(measure)
    for values in found.values():
        if (pair := _pair(values, measure)) is not None:
            (x, dx), (y, dy) = ((value.mean, value.half or 0) for value in pair)
            lines += [((100 * (x - dx), scale * y), (100 * (x + dx), scale * y))] if dx else []
            lines += [((100 * x, scale * (y - dy)), (100 * x, scale * (y + dy)))] if dy else []
    return lines


def _open_markers(
    axis: Axes, found: Mapping[str, Mapping[str, Estimate | None]], measure: Measure, looks: Mapping[str, Look]
) -> list[Point]:
    """Draw hollow markers, joined to the points of the panel below them; return where they are."""
    places = []
    for label, values in found.items():
        if (pair := _pair(values, measure)) is None:
            continue
        x, y = pair
        base, look = values[MEASURES["answer_bytes"].name], looks[label]
        if base is not None and y.mean > base.mean:
            axis.plot([100 * x.mean] * 2, [base.mean, y.mean], color=look.colour, linewidth=0.5, alpha=0.6, zorder=1)
            style: dict[str, Any] = {"markersize": 3.6, "markeredgewidth": 0.7, "markerfacecolor": "white"}
            axis.plot(100 * x.mean, y.mean, marker=look.marker, markeredgecolor=look.colour, **style)
            places.append((100 * x.mean, y.mean))
    return places


@dataclass(frozen=True)
class _Range:
    """Of a panel's y axis."""

    low: float
    high: float
    log: bool
    cuts: bool
    """Whether an interval of the panel, in y or x, leaves it."""


def _range(found: Mapping[str, Mapping[str, Estimate | None]], measure: Measure) -> _Range:
    """Return the range of a panel: that of its means, and of the intervals where they widen it to no more than thrice.

    So an interval of two seeds, 13 times as wide as they are apart, does not squeeze the rest together.
    """
    scale, means = _scale(measure), list[float]()
    for values in found.values():
        pair = _pair(values, measure)
        means += [scale * pair[1].mean] if pair else []
        keep = values[MEASURES["keep_learning_bytes"].name]
        means += [keep.mean] if pair and keep and measure.unit == "bytes" else []
    if not means:
        return _Range(0.0, 1.0, log=False, cuts=False)
    ends = [end for line in _intervals(found, measure) for end in line]
    log = measure.unit == "bytes" and wide_range(means, factor=4)
    if log:
        low, high = _widened(np.log(means).tolist(), [float(np.log(y)) if y > 0 else -np.inf for _, y in ends])
        low, high = float(np.exp(low)) / 1.6, float(np.exp(high)) * 1.6
    else:
        low, high = _widened(means, [y for _, y in ends])
        margin = 0.12 * (max(means) - min(means)) or 0.1 * abs(high) or 0.1
        low, high = low - margin, high + margin
        high = min(high, 102) if measure.unit == "fraction" else high
    cuts = any(not (LEAST <= x <= MOST and low <= y <= high) for x, y in ends)
    return _Range(low, high, log=log, cuts=cuts)


def _widened(means: Sequence[float], ends: Iterable[float]) -> Point:
    """Return the range of means and ends of intervals, beyond the means' at most by its own length on each side."""
    low, high, reach = min(means), max(means), list(ends)
    most = high - low or np.inf
    return max(low - most, min([low, *reach])), min(high + most, max([high, *reach]))


def _finish_scale(axis: Axes, measure: Measure, found: _Range) -> None:
    if found.log:
        axis.set_yscale("log")
    axis.set_ylim(found.low, found.high)
    if measure.unit == "bytes":
        amount_ticks(axis.yaxis, measure)


def write_labels(
    axis: Axes,
    points: Mapping[str, Point],
    taken: Sequence[Point],
    lines: Sequence[tuple[Point, Point]],
    looks: Mapping[str, Look],
) -> dict[str, Box]:
    """Write each label beside its point, off every marker and label before it, with a thin line to one farther away.

    Points on top of each other get one label: two names, and how many more.

    Args:
        axis: its range is set already.
        points: label -> (x, y) in data.
        taken: where markers are, in data.
        lines: horizontal and vertical ones, which labels keep off too where there is room.
        looks: of the labels.

    Returns:
        The labels' boxes, in from the corner of the figure.
    """
    figure = axis.get_figure()
    assert isinstance(figure, Figure)
    place = axis.transData.transform
    frame = axis.get_window_extent()
    dpi = figure.dpi
    limits = (frame.x0 / dpi, frame.y0 / dpi, frame.x1 / dpi, frame.y1 / dpi)
    marks = [(x / dpi - 0.04, y / dpi - 0.03, x / dpi + 0.04, y / dpi + 0.03) for x, y in (place(p) for p in taken)]
    bars = [_between(place(start), place(end), dpi, limits) for start, end in lines]
    boxes: dict[str, Box] = {}
    leaders: list[Box] = []
    inches = {label: (float(x) / dpi, float(y) / dpi) for label, (x, y) in ((k, place(p)) for k, p in points.items())}
    for labels in together(inches):
        (x, y), label = inches[labels[0]], ", ".join(labels[:2]) + (f" +{len(labels) - 2}" if len(labels) > 2 else "")
        colour = looks[labels[0]].colour if len(labels) == 1 else "#444444"
        width, occupied = _LETTER * len(label), [*marks, *boxes.values()]
        found = (
            _free(x, y, width, limits, [*occupied, *leaders, *bars], 0.7, crossed=boxes.values())
            or _free(x, y, width, limits, [*occupied, *leaders], 2.5, crossed=boxes.values())
            or _free(x, y, width, limits, occupied, 2.5)
        )
        box, anchor = found or ((x, y, x + width, y + _LINE), (x, y))
        boxes[label] = box
        if math.dist(anchor, (x, y)) > 0.15:
            leaders += _along((x, y), anchor)
            ends = axis.transData.inverted().transform([(x * dpi, y * dpi), (anchor[0] * dpi, anchor[1] * dpi)])
            axis.plot(ends[:, 0], ends[:, 1], color="#888888", linewidth=0.5, linestyle=":", zorder=1)
        middle = ((box[0] + box[2]) / 2 * dpi, (box[1] + box[3]) / 2 * dpi)
        at_x, at_y = axis.transData.inverted().transform(middle)
        axis.text(at_x, at_y, label, fontsize=_TYPE, color=colour, ha="center", va="center")
    return boxes


def together(points: Mapping[str, Point], near: float = 0.035) -> list[list[str]]:
    """Return the labels in groups whose points lie within `near` of the group's first, from right to left and up."""
    groups: list[list[str]] = []
    for label, (x, y) in sorted(points.items(), key=lambda item: (-item[1][0], item[1][1], item[0])):
        at = (group for group in groups if max(abs(points[group[0]][0] - x), abs(points[group[0]][1] - y)) <= near)
        group = next(at, None)
        if group is None:
            groups.append([label])
        else:
            group.append(label)
    return groups


def _between(start: NDArray[Any], end: NDArray[Any], dpi: float, limits: Box) -> Box:
    """Return a line from pixel to pixel as a thin box in the frame; one end may lie at no place of a log axis."""
    (x0, x1), (y0, y1) = sorted((start[0] / dpi, end[0] / dpi)), sorted((start[1] / dpi, end[1] / dpi))
    clipped = np.nan_to_num([x0 - 0.01, y0 - 0.01, x1 + 0.01, y1 + 0.01], nan=limits[1], neginf=-1e3, posinf=1e3)
    low, high = np.array([*limits[:2]] * 2), np.array([*limits[2:]] * 2)
    left, bottom, right, top = np.clip(clipped, low, high).tolist()
    return left, bottom, right, top


def _free(
    x: float, y: float, width: float, limits: Box, taken: Sequence[Box], reach: float, crossed: Iterable[Box] = ()
) -> tuple[Box, Point] | None:
    """Return the nearest place for a label of a width around (x, y), in, and the point of it that faces (x, y).

    A line from there to (x, y) meets none of `crossed`.
    """
    others = list(crossed)
    for away in np.arange(0.06, reach, 0.04).tolist():
        for angle in (0, 180, 30, 150, -30, 210, 60, 120, -60, 240, 90, -90):
            dx, dy = float(np.cos(np.radians(angle))), float(np.sin(np.radians(angle)))
            anchor = (x + away * dx, y + away * dy)
            left = anchor[0] - (0 if dx > 0.2 else width if dx < -0.2 else width / 2)
            low = anchor[1] - _LINE / 2 + (math.copysign(_LINE / 2, dy) if abs(dx) <= 0.9 else 0)
            box = (left, low, left + width, low + _LINE)
            inside = box[0] > limits[0] and box[1] > limits[1] and box[2] < limits[2] and box[3] < limits[3]
            if inside and not any(overlap(box, other) for other in taken):
                line = _along((x, y), anchor)
                if not any(overlap(step, other) for step in line for other in others):
                    return box, anchor
    return None


def _along(start: Point, end: Point) -> list[Box]:
    """Return small boxes along a line, in."""
    steps = max(2, math.ceil(math.dist(start, end) / 0.03))
    places = np.linspace(start, end, steps).tolist()
    return [(x - 0.01, y - 0.01, x + 0.01, y + 0.01) for x, y in places]


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes touch."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# ------------------------------------------------------------------------------------------------------------ the map


def sharing_map(block: Block) -> Plot:
    """Return which tensor serves which task, for the first run of at most MAPS baselines spread over the ladder."""
    firsts = [(group, next((run for run in group.runs if run.sharing is not None), None)) for group in mapped(block)]
    known = [(group, run, run.sharing) for group, run in firsts if run is not None and run.sharing is not None]
    rows = [
        (group.label, str(run.seed), _name(row), str(row.elements), str(row.tensors), " ".join(row.layers), *of_task)
        for group, run, found in known
        for row in found.map
        for of_task in ((str(task + 1), exact(share)) for task, share in enumerate(row.shares))
    ]
    drawn = chosen_maps(known)

    def draw() -> Figure:
        return _draw_maps(block, drawn)

    caption = (
        "Which tensor serves which task after the last one: a row is a tensor, or all tensors that one task alone uses "
        f"wholly, with its parameters; the shade is the share of it that the task uses. {USED} One run each."
    )
    if len(drawn) < len(known):
        caption += f" {len(drawn)} of {len(known)} baselines are drawn, spread over the shares in common; "
        caption += "of maps that look the same, the first."
    if any(len(found.map) > ROWS for _, _, found in drawn):
        caption += f" Of a longer map the {ROWS} largest rows are drawn."
    header = ("baseline", "seed", "tensor", "elements", "tensors", "layers", "task", "share")
    return Plot("sharing-map", caption, header, tuple(rows), draw)


Known = tuple[Group, RunRecord, Sharing]


def chosen_maps(known: Sequence[Known]) -> list[Known]:
    """Return at most MAPS of the ladder's rungs: of those that look the same the first, then evenly spread."""
    different: dict[object, Known] = {}
    for rung in known:
        pattern = tuple((row.elements, tuple(row.shares), tuple(row.layers)) for row in rung[2].map)
        different.setdefault(pattern, rung)
    rungs = list(different.values())
    places = sorted({round(place) for place in np.linspace(0, len(rungs) - 1, min(MAPS, len(rungs)))})
    return [rungs[place] for place in places]


def _draw_maps(block: Block, drawn: Sequence[Known]) -> Figure:
    columns = min(2, len(drawn))
    lines = -(-len(drawn) // columns)
    kept = [_largest(found) for _, _, found in drawn]
    left = [
        0.1 + 0.043 * max((len(_label(row)) for rows in kept[column::columns] for row in rows), default=0)
        for column in range(columns)
    ]
    heights = [max(len(rows) for rows in kept[i : i + columns]) for i in range(0, len(kept), columns)]
    each, top, between, bottom = 0.105, 0.2, 0.42, 0.36
    total = top + sum(each * max(1, height) for height in heights) + between * (lines - 1) + bottom
    width = PAGE if columns > 1 else 3.4
    figure, axes, _ = sheet(width, total, rows=lines, columns=columns)
    figure.set_size_inches(width, total)
    panel = (width - 0.55 - sum(left)) / columns
    image = None
    for place, (axis, (group, _, found), rows) in enumerate(zip(axes, drawn, kept, strict=False)):
        line, column = divmod(place, columns)
        high = each * max(1, len(rows))
        y = total - top - sum(each * max(1, height) for height in heights[:line]) - between * line - high
        x = sum(left[: column + 1]) + column * panel
        axis.set_position((x / width, y / total, (panel - 0.1) / width, high / total))
        n = len(found.tasks)
        values = np.array([[100 * share for share in row.shares] for row in rows]).reshape(len(rows), n)
        extent = (0.5, n + 0.5, len(rows) - 0.5, -0.5)
        image = axis.imshow(
            values, cmap="Blues", vmin=0, vmax=100, extent=extent, aspect="auto", interpolation="none"
        )
        axis.grid(False)
        axis.tick_params(length=0, pad=2)
        axis.hlines(np.arange(0.5, len(rows) - 1), *extent[:2], colors="white", linewidth=0.6)
        axis.vlines(np.arange(1.5, n), len(rows) - 0.5, -0.5, colors="white", linewidth=0.6)
        axis.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=5.5)
        axis.xaxis.set_major_locator(FixedLocator(list(range(1, n + 1, max(1, -(-n // 10))))))
        common = "-" if found.in_common is None else amount(found.in_common, "fraction")
        axis.set_title(f"{group.label}: {common} % in common", pad=2)
        axis.set_xlabel("task", labelpad=1)
        for spine in axis.spines.values():
            spine.set_visible(True)
            spine.set_linewidth(0.4)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    if image is not None:
        high = each * max(1, heights[0])
        bar = figure.add_axes((1 - 0.48 / width, (total - top - high) / total, 0.09 / width, high / total))
        figure.colorbar(image, cax=bar)
        bar.set_ylabel("in use (%)", labelpad=2)
    return figure


def _largest(found: Sharing) -> list[TensorUse]:
    """Return the map's rows, in order; of more than ROWS the largest."""
    largest = sorted(range(len(found.map)), key=lambda i: -found.map[i].elements)[:ROWS]
    return [found.map[i] for i in sorted(largest)]


def _name(row: TensorUse) -> str:
    """Return what a row is called; tasks count from 1, as in all figures."""
    return row.name if row.tensors == 1 else f"task {row.shares.index(1) + 1}'s own"


def _label(row: TensorUse) -> str:
    """Return a row's name, without what all names have in them and short enough, and its elements."""
    name = _name(row).replace("trunk.", "")
    name = name if len(name) <= 26 else f"…{name[-25:]}"
    times = f" x{len(row.layers)}" if len(row.layers) > 1 and row.tensors == 1 else ""
    return f"{name}{times} ({amount(row.elements, 'count')})"
