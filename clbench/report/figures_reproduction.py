"""The forest plot of published numbers: the difference of every row with its interval, its margin and its verdict."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from clbench.report.measures import exact
from clbench.report.published import Comparison
from clbench.report.style import COLUMN, PAGE, Plot, sheet

LOOKS: dict[str, tuple[str, str, bool]] = {
    "reproduced": ("o", "#029e73", True),
    "differs": ("D", "#d55e00", True),
    "under-powered": ("s", "#0173b2", False),
    "not comparable": ("x", "#777777", True),
}
"""Verdict -> marker, colour, filled: told apart without colour, too."""
BAND = "#dcdcdc"
LINES = 60
"""Most lines of a panel; more go into a second one, over the width of a page."""
TICKS = (1, 5, 20)

Line = str | Comparison
"""A heading or a row."""


def forest(comparisons: Sequence[Comparison]) -> Plot:
    """Return the forest plot of the comparisons whose metric is a fraction; in percentage points."""
    drawn = [item for item in comparisons if item.difference is not None and _in_points(item)]
    panels = _panels(drawn)
    verdicts = [name for name in LOOKS if any(item.verdict == name for item in drawn)]

    def draw() -> Figure:
        left = 0.3 + 0.05 * max(len(_label(item)) for item in drawn)
        longest = max(map(len, panels))
        height = 0.2 + 0.12 * longest
        width = COLUMN if len(panels) == 1 else PAGE
        figure, axes, finish = sheet(
            width, height, columns=len(panels), legend=[*verdicts, "margin"], left=left, gap=(left, 0), top=0.04
        )
        reach = 110 * max(max(map(abs, _ends(item))) for item in drawn)
        for axis, lines in zip(axes, panels, strict=True):
            _draw(axis, lines, reach)
            axis.set_ylim(longest - 0.4, -0.6)
            # Headings begin where the labels of the panel do.
            start = -(left - 0.04) / (axis.get_position().width * width)
            for y, line in enumerate(lines):
                if isinstance(line, str):
                    where, box = axis.get_yaxis_transform(), {"facecolor": "white", "linewidth": 0, "pad": 0.6}
                    axis.text(start, y, line, transform=where, va="center", fontsize=6, fontweight="bold", bbox=box)
        handles = [_handle(name) for name in verdicts]
        finish([*handles, Patch(color=BAND, label="margin")])
        return figure

    rows = tuple(_row(item) for item in drawn)
    devices = "; ".join(sorted({item.device for item in drawn}))
    caption = (
        "Ours minus the paper's, in percentage points: linear up to 1, logarithmic beyond. Lines: 95 % intervals, "
        f"thick 90 %; band: the row's margin; marker: the verdict. Device: {devices}."
    )
    header: tuple[str, ...] = ("source", "task", "baseline", "device", "metric", "difference")
    header += ("low95", "high95", "low90", "high90", "margin", "verdict")
    return Plot("", caption, header, rows, draw)


def _in_points(item: Comparison) -> bool:
    return item.row.measure.unit in ("fraction", "area")


def _panels(drawn: Sequence[Comparison]) -> list[list[Line]]:
    """Return the lines of each panel: one panel, or two of about the same length, broken between sections."""
    sections: list[list[Line]] = []
    for heading, group in groupby(drawn, key=_heading):
        sections.append([heading, *group])
    total = sum(map(len, sections))
    panels: list[list[Line]] = [[]]
    for section in sections:
        if total > LINES and len(panels) == 1 and len(panels[0]) >= total / 2:
            panels.append([])
        panels[-1] += section
    return panels


def _heading(item: Comparison) -> str:
    return f"{item.row.source}/{item.row.task}, {item.device.partition(' ')[0]}"


def _label(item: Comparison) -> str:
    name, metric = item.row.experiment.label, item.row.measure
    return name if metric.name == "average_accuracy" else f"{name}, {metric.label}"


def _ends(item: Comparison) -> tuple[float, ...]:
    return (item.difference or 0.0, item.row.margin, *(item.judgement.interval or ()))


def _draw(axis: Axes, lines: Sequence[Line], reach: float) -> None:
    axis.set_xscale("symlog", linthresh=1, linscale=1)
    axis.axvline(0, color="black", linewidth=0.6, zorder=1)
    rows = [(y, line) for y, line in enumerate(lines) if not isinstance(line, str)]
    for y, line in rows:
        marker, colour, filled = LOOKS[line.verdict]
        margin, middle = 100 * line.row.margin, 100 * (line.difference or 0.0)
        axis.fill_betweenx([y - 0.4, y + 0.4], -margin, margin, color=BAND, linewidth=0, zorder=0)
        found = line.judgement
        for ends, thickness in ((found.interval, 0.7), (found.inner, 1.8)):
            if ends is not None:
                axis.plot([100 * end for end in ends], [y, y], color=colour, linewidth=thickness, zorder=2)
        face = colour if filled else "white"
        axis.plot(middle, y, marker, color=colour, markerfacecolor=face, markersize=3.6, zorder=3)
    axis.set_yticks([y for y, _ in rows], [_label(line) for _, line in rows])
    axis.set_xlim(-reach, reach)
    ticks = [tick for tick in TICKS if tick < reach]
    axis.xaxis.set_major_locator(FixedLocator([*(-tick for tick in reversed(ticks)), 0, *ticks]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("ours minus the paper's (points)")


def _handle(verdict: str) -> Line2D:
    marker, colour, filled = LOOKS[verdict]
    face = colour if filled else "white"
    return Line2D([], [], marker=marker, color=colour, markerfacecolor=face, linewidth=1, markersize=3.6, label=verdict)


def _row(item: Comparison) -> tuple[str, ...]:
    row, found = item.row, item.judgement
    ends = (*(found.interval or (None, None)), *(found.inner or (None, None)))
    names = (row.source, row.task, row.experiment.label, item.device, row.measure.name)
    return (*names, *map(exact, (item.difference, *ends, row.margin)), found.verdict)
