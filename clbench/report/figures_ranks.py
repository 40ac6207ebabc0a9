"""The critical-difference diagram: average ranks over streams, and which methods they do not tell apart.

Letters: K methods, N streams.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from clbench.report.measures import MEASURES, exact
from clbench.report.ranks import ALPHA, METHODS, STREAMS, Ranking, rank, scores
from clbench.report.select import Selection
from clbench.report.style import COLUMN, LEGEND_TYPE, Plot, sheet, text_width

NAME, TITLE = "critical-difference", "Average ranks over streams"
ROW = 0.14
"""Height of a name, and distance of two bars, in."""


def critical_difference_diagram(selection: Selection) -> Plot | None:
    """Return the diagram of every method that ran on all of enough streams; None for fewer than 4 methods, 5 streams.

    `why_none` says what is missing.
    """
    everything = scores(selection)
    found = rank(everything)
    if found is None:
        return None
    rows = [
        (label, exact(found.average[j]), stream, exact(everything[stream][label]), exact(float(found.ranks[i, j])))
        for j, label in enumerate(found.methods)
        for i, stream in enumerate(found.streams)
    ]
    header = ("baseline", "average_rank", "stream", "average_accuracy", "rank")
    return Plot("", _caption(found, everything), header, tuple(rows), lambda: _draw(found))


def why_none(selection: Selection) -> str:
    """Return why there is no diagram; "" where there is one."""
    everything = scores(selection)
    if rank(everything) is not None:
        return ""
    counts: dict[str, int] = {}
    for methods in everything.values():
        for method in methods:
            counts[method] = counts.get(method, 0) + 1
    enough = sum(count >= STREAMS for count in counts.values())
    return (
        f"No critical-difference diagram: it needs {METHODS} baselines, bounds aside, with runs on the same {STREAMS} "
        f"streams or more; of {len(counts)} baselines on {len(everything)} streams, {enough} ran on {STREAMS}."
    )


def _caption(found: Ranking, everything: dict[str, dict[str, float]]) -> str:
    k, n = len(found.methods), len(found.streams)
    measure = MEASURES["average_accuracy"]
    out = sorted({method for methods in everything.values() for method in methods} - set(found.methods))
    absent = [stream for stream in everything if stream not in found.streams]
    text = (
        f"Average ranks of {k} baselines over {n} streams ({', '.join(found.streams)}), 1 the best, ties sharing their "
        f"mean rank, by average accuracy after the last task, mean over seeds; {measure.definition}. Friedman's test: "
    )
    text += (
        "every stream ties all of them. "
        if math.isnan(found.chi_squared)
        else f"chi squared {found.chi_squared:.2f} with {k - 1} degrees of freedom, p = {found.p_value:.2g}. "
    )
    if found.differs:
        text += (
            f"Baselines that a bar joins are not told apart by Nemenyi's test at {ALPHA}: their average ranks lie "
            f"closer than the critical difference CD = {found.difference:.2f} (Demsar 2006)."
        )
    else:
        text += f"At {ALPHA} it finds no difference, so that one bar joins all of them (Demsar 2006)."
    text += " The tests take streams for independent, which several of one data set are not. Bounds and results of"
    text += " other tools are not ranked."
    if out:
        text += f" Baselines without a run on all of these streams are left out: {', '.join(out)}."
    if absent:
        text += f" Streams that not all of these baselines ran on are left out: {', '.join(absent)}."
    return text


def _draw(found: Ranking) -> Figure:
    k = len(found.methods)
    half = (k + 1) // 2
    bars = found.cliques()
    names = [f"{label} ({average:.2f})" for label, average in zip(found.methods, found.average, strict=True)]
    left, right = (0.2 + max(map(text_width, names[:half])), 0.2 + max(map(text_width, names[half:])))
    # Above the axis the scale and the critical difference, below it bars, then names.
    below = 0.12 + 0.09 * len(bars) + ROW * half
    figure, (axis,), _ = sheet(COLUMN, below, left=left, right=right, bottom=0.05, top=0.5)
    axis.set_xlim(1, k)
    axis.set_ylim(below, 0)
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    axis.spines["bottom"].set_visible(False)
    axis.spines["top"].set_visible(True)
    axis.xaxis.tick_top()
    axis.yaxis.set_visible(False)
    step = max(1, math.ceil((k - 1) / 6))
    axis.set_xticks(range(1, k + 1, step))
    axis.tick_params(top=True, bottom=False)
    clear: dict[str, Any] = {"clip_on": False, "solid_capstyle": "butt"}
    # One inch is this many ranks: names stand beside the axis, out of its range.
    inch = (k - 1) / (COLUMN - left - right)
    for j, (average, name) in enumerate(zip(found.average, names, strict=True)):
        row = j if j < half else k - 1 - j
        y = 0.14 + 0.09 * len(bars) + ROW * row
        end, side = (1 - 0.06 * inch, "right") if j < half else (k + 0.06 * inch, "left")
        axis.plot([average, average, end], [0, y, y], color="#444444", linewidth=0.6, **clear)
        beside = end - 0.04 * inch if j < half else end + 0.04 * inch
        axis.text(beside, y, name, ha=side, va="center_baseline", fontsize=LEGEND_TYPE)
    axis.plot(found.average, np.zeros(k), marker="o", markersize=2.5, linestyle="none", color="black", clip_on=False)
    for i, (first, last) in enumerate(bars):
        ends = [found.average[first] - 0.03 * inch, found.average[last] + 0.03 * inch]
        axis.plot(ends, [0.08 + 0.09 * i] * 2, color="black", linewidth=2.2, **clear)
    if found.difference < k - 1:
        y = -0.3
        axis.plot([1, 1 + found.difference], [y, y], color="black", linewidth=0.9, **clear)
        for x in (1, 1 + found.difference):
            axis.plot([x, x], [y - 0.03, y + 0.03], color="black", linewidth=0.9, **clear)
        text = f"CD = {found.difference:.2f}"
        axis.text(1 + found.difference / 2, y - 0.03, text, ha="center", va="bottom", fontsize=LEGEND_TYPE)
    return figure
