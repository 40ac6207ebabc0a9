"""What each task adds: the parameters that it answers with and no task before it did, as a share of one task's net.

A block whose records hold nothing of the kind has no such figure. Letters: N baselines, T tasks.
"""

from __future__ import annotations

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from clbench.records import RunRecord
from clbench.report.measures import cells
from clbench.report.select import Block
from clbench.report.sharing import USED
from clbench.report.stats import Estimate, estimate
from clbench.report.style import COLUMN, PAGE, Plot, sheet, text_width

STATISTICS = ("mean", "low", "high", "n")
NUMBERED = 20
"""Most tasks whose cells have room for a number."""


def marginal_parameters(block: Block) -> Plot:
    """Return the parameters that each task adds, a row a baseline and a column a task, in percent of one task's net."""
    counts: dict[str, list[Estimate | None]] = {}
    shares: dict[str, list[Estimate | None]] = {}
    for group in block.groups:
        runs = [run for run in group.runs if run.sharing is not None and run.single_task_parameters]
        if runs:
            tasks = range(max(len(run.sharing.tasks) for run in runs if run.sharing is not None))
            counts[group.label] = [estimate(_added(run, task) for run in runs) for task in tasks]
            shares[group.label] = [estimate(_share(run, task) for run in runs) for task in tasks]
    n_tasks = max(map(len, counts.values()), default=0)

    def draw() -> Figure:
        values = np.full((len(shares), n_tasks), np.nan)
        for i, row in enumerate(shares.values()):
            values[i, : len(row)] = [np.nan if value is None else 100 * value.mean for value in row]
        width = COLUMN if n_tasks <= 10 else PAGE
        left, numbered = 0.12 + max(text_width(label) for label in shares), n_tasks <= NUMBERED
        right = 0.08 if numbered else 0.58
        figure, (axis,), _ = sheet(width, max(0.3, 0.15 * len(shares)), left=left, right=right, top=0.24)
        axis.set_title("parameters added (% of one net)", pad=3)
        # The root spreads the small shares, which most later tasks have.
        highest = max(100.0, float(np.nanmax(values)))
        image = axis.imshow(
            values, cmap="Greys", norm=PowerNorm(0.5, 0, highest), extent=(0.5, n_tasks + 0.5, len(shares) - 0.5, -0.5),
            aspect="auto", interpolation="none",
        )  # fmt: skip
        axis.grid(False)
        axis.tick_params(length=0, pad=2)
        axis.hlines(np.arange(0.5, len(shares) - 1), 0.5, n_tasks + 0.5, colors="white", linewidth=0.8)
        axis.set_yticks(range(len(shares)), list(shares))
        axis.xaxis.set_major_locator(FixedLocator(list(range(1, n_tasks + 1, max(1, -(-n_tasks // 20))))))
        axis.set_xlabel("task")
        if numbered:
            for (i, j), value in np.ndenumerate(values):
                colour = "white" if value > 0.36 * highest else "black"
                axis.text(j + 1, i, _number(value), ha="center", va="center", fontsize=5, color=colour)
            return figure
        box = axis.get_position()
        bar = figure.add_axes((1 - 0.5 / width, box.y0, 0.09 / width, box.height))
        ticks = [tick for tick in (0, 10, 50, 100, 200, 400, 800, 1600) if tick <= highest]
        figure.colorbar(image, cax=bar, ticks=ticks, format="%.0f")
        return figure

    rows = [
        (label, str(task + 1), *cells(count), *cells(shares[label][task]))
        for label, known in counts.items()
        for task, count in enumerate(known)
    ]
    caption = (
        "What each task adds: parameters that it uses when it answers and no task learned before it does, in percent "
        f"of one task's net, mean over seeds; the shade goes with the root. {USED} Counts and 95 % Student-t intervals "
        "are in the data."
    )
    out = [group.label for group in block.groups if group.label not in counts]
    if out:
        caption += f" Recorded without: {', '.join(out)}."
    header = ("baseline", "task", *(f"{name}.{end}" for name in ("parameters", "of_one_net") for end in STATISTICS))
    return Plot("marginal-parameters", caption, header, tuple(rows), draw)


def _added(run: RunRecord, task: int) -> float | None:
    found = run.sharing.tasks if run.sharing is not None else []
    return float(found[task].marginal_parameters) if task < len(found) else None


def _share(run: RunRecord, task: int) -> float | None:
    added, single = _added(run, task), run.single_task_parameters
    return None if added is None or not single else added / single


def _number(value: float) -> str:
    """Return a percentage in at most four letters."""
    if np.isnan(value):
        return ""
    return f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}" if value >= 0.05 else "<.1"
