"""Stability against plasticity: forgetting against how well tasks are learned.

Letters: T tasks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from clbench.metrics import intransigence
from clbench.report.figures_trade import INTERVALS, cloud, entries, marks, sentence
from clbench.report.measures import MEASURES, cells
from clbench.report.select import Block, Group
from clbench.report.stats import Estimate, estimate
from clbench.report.style import COLUMN, Look, Plot, sheet

STATISTICS = ("mean", "low", "high", "n")
FORGETTING, LEARNING = MEASURES["forgetting.first_minus_last"], MEASURES["learning_accuracy"]

Vector = NDArray[np.float64]


def stability_plasticity(block: Block, looks: Mapping[str, Look]) -> Plot:
    """Return forgetting (first minus last) against learning accuracy, with lines of equal average accuracy.

    With this definition of forgetting the lines are exact: ACC = LA - (T - 1) / T x forgetting. None for T = 1.
    """
    found = cloud(block.groups, LEARNING, FORGETTING)
    reference = joint_reference(block)
    n_tasks = block.task.n_tasks

    def draw() -> Figure:
        figure, (axis,), finish = sheet(COLUMN, 2.3, legend=list(found.points), right=0.3)
        marks(axis, found, looks, (100.0, 100.0))
        x = [100 * point.mean for point, _ in found.points.values()]
        y = [100 * point.mean for _, point in found.points.values()]
        wide, high = max(max(x) - min(x), 1.0), max(max(y) - min(y), 1.0)
        axis.set_xlim(min(x) - 0.08 * wide, max(x) + 0.08 * wide)
        axis.set_ylim(min(y) - 0.08 * high, max(y) + 0.08 * high)
        axis.axhline(0, color="#777777", linewidth=0.5, zorder=0.5)
        _equal_accuracy(axis, n_tasks)
        axis.set(xlabel="learning accuracy (%)", ylabel="forgetting (percentage points)")
        finish(entries(found, looks))
        return figure

    rows = []
    for group in block.groups:
        if group.label in found.points:
            learned, forgot = found.points[group.label]
            chaudhry = MEASURES["forgetting.chaudhry2018"].over(group.runs)
            average, last = _intransigence(group, reference)
            rows.append((group.label, *cells(learned), *cells(forgot), *cells(chaudhry), *cells(average), *cells(last)))
    columns = (
        LEARNING.name, FORGETTING.name, "forgetting.chaudhry2018", "intransigence_mean", "intransigence_last"
    )  # fmt: skip
    header = ("baseline", *(f"{name}.{end}" for name in columns for end in STATISTICS))
    caption = (
        f"Stability against plasticity: the best corner is at the lower right. {sentence(LEARNING)}; "
        f"{FORGETTING.definition}. {INTERVALS} Grey lines: equal average accuracy (%), "
        "ACC = LA - (T-1)/T x forgetting. Bounds are hollow."
    )
    if reference is not None:
        caption += (
            " With the block's joint training as reference, intransigence (its a[k,k] less a method's, mean over k; "
            f"RWalk, Chaudhry et al. 2018) is {100 * float(reference.mean()):.1f} % less LA: the same axis "
            "from the other side."
        )
    return Plot("stability-plasticity", caption, header, tuple(rows), draw)


def joint_reference(block: Block) -> Vector | None:
    """Return accuracy on task k of a model trained on tasks 0..k together, (T,), mean over runs; None without one."""
    group = next((group for group in block.groups if group.key == "joint"), None)
    return None if group is None else np.mean([np.diag(run.matrix) for run in group.runs], axis=0)


def _intransigence(group: Group, reference: Vector | None) -> tuple[Estimate | None, Estimate | None]:
    """Return intransigence over a group's runs: its mean over tasks, and that of the last task."""
    if reference is None:
        return None, None
    found = [intransigence(run.matrix, reference) for run in group.runs]
    return estimate(float(values.mean()) for values in found), estimate(float(values[-1]) for values in found)


def _equal_accuracy(axis: Axes, n_tasks: int) -> None:
    """Draw lines of equal average accuracy across a panel, each with its number where it leaves it."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    slope = n_tasks / (n_tasks - 1)
    span = (right - left) + (high - low) / slope
    step = next((step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 25) if span / step <= 7), 50)
    first = np.floor((left - high / slope) / step) * step
    for level in np.arange(first, right - low / slope + step, step):
        if not 0 <= level <= 100:
            continue
        axis.plot([left, right], [slope * (left - level), slope * (right - level)], color="#bbbbbb", lw=0.5, zorder=0.4)
        top, beside = level + high / slope, slope * (right - level)
        text: dict[str, Any] = {"fontsize": 5, "color": "#777777", "clip_on": False}
        if left + 0.04 * (right - left) < top < right - 0.02 * (right - left):
            axis.annotate(f"{level:g}", (top, high), (0, 1), textcoords="offset points", ha="center", **text)
        elif low < beside <= high:
            axis.annotate(f"{level:g}", (right, beside), (2, 0), textcoords="offset points", va="center", **text)
    axis.set_xlim(left, right)
    axis.set_ylim(low, high)
