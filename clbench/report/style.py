"""How figures look: colours and markers per baseline, sizes in inches, and files that come out the same every time.

No figure touches pyplot's global state. Sizes are those of print: 3.4 in is a column of a two-column page, 7 in its
width; type is 7 points there.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextToPath

from clbench.records import write_atomic
from clbench.report.fonts import family

COLUMN, PAGE = 3.4, 7.0
DPI = 200
_TYPE = 7.0
LEGEND_TYPE = _TYPE - 0.5
"""Size of the names of baselines beside their marks, points."""
_LINE = 0.118
"""Height of one line of a legend, in."""
_SPARE = 0.06
"""Of a figure's width, in: a legend as wide as its estimate comes out a little wider."""

# Any: the type of its keys differs between versions of matplotlib.
_RC: Any = {
    "font.size": _TYPE,
    "axes.labelsize": _TYPE,
    "axes.titlesize": _TYPE,
    "xtick.labelsize": _TYPE - 1,
    "ytick.labelsize": _TYPE - 1,
    "legend.fontsize": LEGEND_TYPE,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,
    "svg.hashsalt": "clbench",
    "svg.fonttype": "none",
}
_BOUNDS = {
    "finetune": ("#8c8c8c", "o", ":"),
    "joint": ("#000000", "s", "--"),
    "independent": ("#555555", "D", "-."),
    "frozen": ("#b3b3b3", "v", ":"),
}
_INDIGO, _OLIVE = "#332288", "#a08c00"
_TO_PATH = TextToPath()
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of one baseline, the same in every figure of a report."""

    colour: str
    marker: str
    line: str

    @property
    def curve(self) -> dict[str, Any]:
        """Keywords of `Axes.plot`."""
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.3}
        return {"color": self.colour, "marker": self.marker, "linestyle": self.line, **edge}


def looks(labels: Sequence[str]) -> dict[str, Look]:
    """Return a look for every label: greys for the bounds, colour-blind-safe colours and markers for the rest.

    Overridden variants (`<name>@<hash>`) and results of other tools (`<name> (<tool>)`) come after the plain names, so
    that trying one out moves no other colour.
    """
    palette = [mpl.colors.to_hex(colour) for colour in seaborn.color_palette("colorblind", 10)]
    # The grey is kept for the bounds; pink and yellow, pale on white, are replaced by darker colours.
    order = [*palette[:6], palette[9], _INDIGO, _OLIVE]
    others = set(labels) - set(_BOUNDS)
    rest = sorted(others, key=lambda label: ("(" in label, "@" in label, label))
    found = {label: Look(*_BOUNDS[label]) for label in labels if label in _BOUNDS}
    for i, label in enumerate(rest):
        line = ("-", "--", ":", "-.")[i // len(order) % 4]
        found[label] = Look(order[i % len(order)], _MARKERS[i % len(_MARKERS)], line)
    return found


@dataclass(frozen=True)
class Plot:
    """One figure: its data as rows of text, which `check` compares, and how to draw it."""

    name: str
    """"" for the only figure of its owner."""
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    draw: Callable[[], Figure]

    def stem(self, owner: str) -> str:
        """Return the name of its files: the owner's, then its own where it has one."""
        return f"{owner}-{self.name}" if self.name else owner


def sheet(
    width: float,
    height: float,
    *,
    rows: int = 1,
    columns: int = 1,
    legend: Sequence[str] = (),
    left: float = 0.5,
    right: float = 0.08,
    bottom: float = 0.36,
    top: float = 0.08,
    gap: tuple[float, float] = (0.18, 0.32),
    share: bool = False,
) -> tuple[Figure, list[Axes], Callable[[Sequence[Any]], None]]:
    """Return a figure, its axes in reading order, and a function that draws the legend below them.

    Args:
        width: of the figure, in.
        height: of one panel, in; the figure grows with rows of panels and of the legend.
        rows: of panels.
        columns: of panels.
        legend: labels of the legend; room is left for as many lines as they take.
        left: margin for tick labels, in.
        right: margin, in.
        bottom: margin for tick labels and the axis label, in.
        top: margin, in.
        gap: between panels, horizontal and vertical, in.
        share: one range of x and y for all panels.
    """
    across = _legend_columns(legend, width)
    lines = math.ceil(len(legend) / across) if legend else 0
    below = bottom + lines * _LINE + (0.06 if lines else 0)
    total = top + rows * height + (rows - 1) * gap[1] + below
    figure = Figure(figsize=(width, total))
    FigureCanvasAgg(figure)
    panel = (width - left - right - (columns - 1) * gap[0]) / columns
    grid = figure.subplots(
        rows,
        columns,
        squeeze=False,
        sharex=share,
        sharey=share,
        gridspec_kw={
            "left": left / width,
            "right": 1 - right / width,
            "bottom": below / total,
            "top": 1 - top / total,
            "wspace": gap[0] / panel,
            "hspace": gap[1] / height,
        },
    )

    def finish(handles: Sequence[Any]) -> None:
        figure.legend(
            # Matplotlib fills a legend column by column; this order reads row by row.
            handles=[handles[i] for start in range(across) for i in range(start, len(handles), across)],
            loc="lower center",
            ncols=across,
            frameon=False,
            borderaxespad=0.1,
            borderpad=0,
            labelspacing=0.25,
            handlelength=2.2,
            handletextpad=0.5,
            columnspacing=1.2,
        )

    return figure, [axis for line in grid for axis in line], finish


def _legend_columns(labels: Sequence[str], width: float) -> int:
    if not labels:
        return 1

    def taken(across: int) -> float:
        # 3.9 times the height of the type for a line, its gap and the space between columns.
        beside = 3.9 * LEGEND_TYPE / 72
        return sum(beside + max(text_width(label) for label in labels[column::across]) for column in range(across))

    return max((across for across in range(1, len(labels) + 1) if taken(across) <= width - _SPARE), default=1)


def text_width(text: str, size: float = LEGEND_TYPE) -> float:
    """Return how wide a text is, in, at a size in points."""
    width, _, _ = _TO_PATH.get_text_width_height_descent(text, FontProperties(family=family(), size=size), ismath=False)
    return float(width) / 72


def handle(label: str, look: Look) -> Line2D:
    """Return the legend's entry of one baseline."""
    return Line2D([], [], label=label, **look.curve)


def label_panels(figure: Figure, axes: Sequence[Axes], shown: int, columns: int, x: str, y: str) -> None:
    """Name the shared axes of a sheet of panels, of which the first so many are drawn and the others empty."""
    for place in range(shown, len(axes)):
        axes[place].set_visible(False)
        # The panel above an empty place carries the ticks of the shared axis.
        axes[place - columns].tick_params(labelbottom=True)
    low, high = axes[-1].get_position().y0, axes[0].get_position().y1
    figure.supxlabel(x, y=low - 0.33 / figure.get_figheight(), va="bottom", fontsize=_TYPE)
    figure.supylabel(y, x=0.01, y=(low + high) / 2, fontsize=_TYPE)


def task_ticks(axis: Axes, n_tasks: int, most: int = 10) -> None:
    """Put at most `most` whole-numbered ticks, counted from 1, on the x axis of tasks."""
    step = max(1, math.ceil(n_tasks / most))
    axis.set_xticks(range(1, n_tasks + 1, step))
    axis.set_xlim(0.7, n_tasks + 0.3)


def wide_range(values: Sequence[float], factor: float = 10) -> bool:
    """Whether a log axis helps: positive values over more than a factor."""
    known = [value for value in values if value > 0]
    return len(known) == len(values) > 0 and max(known) > factor * min(known)


def render(plot: Plot) -> dict[str, bytes]:
    """Draw a plot and return it as "pdf", "png" and "svg", without dates: the same input gives the same bytes."""
    metadata = {"pdf": {"CreationDate": None, "ModDate": None}, "png": {"Software": None}, "svg": {"Date": None}}
    made = {}
    with mpl.rc_context({**_RC, "font.family": family()}):
        figure = plot.draw()
        for kind, dates in metadata.items():
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=DPI, metadata=dates)
            made[kind] = buffer.getvalue()
    return made


def save(plot: Plot, stem: Path) -> tuple[Path, Path]:
    """Draw a plot and write `<stem>.pdf` and `<stem>.png`."""
    made = render(plot)
    paths = stem.with_name(f"{stem.name}.pdf"), stem.with_name(f"{stem.name}.png")
    for path in paths:
        write_atomic(path, made[path.suffix[1:]])
    return paths
