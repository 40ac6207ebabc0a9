"""Names of lines at their right ends, in place of a legend: read without matching colours, so in grey too.

Letters: N lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clbench.report.style import LEGEND_TYPE, Look, text_width

LINE = 0.105
"""Distance of two names, in."""
_LEADER, _MARK = 0.16, 0.09
"""Room for the line that leads to a name, and for the marker before it, in."""


def margin(labels: Sequence[str]) -> float:
    """Return the room that names take at the right of the axes, in."""
    return _LEADER + _MARK + 0.05 + max(map(text_width, labels), default=0.0)


def height(labels: Sequence[str], least: float) -> float:
    """Return how high a panel is so that its names fit beside it, in."""
    return max(least, LINE * len(labels))


def end_labels(axis: Axes, ends: Mapping[str, tuple[float, float]], looks: Mapping[str, Look]) -> dict[str, float]:
    """Write every line's name at the right of the axes, as near the line's end as the other names let it.

    Args:
        axis: its ranges are set already.
        ends: label -> where its line ends, in data.
        looks: of the labels.

    Returns:
        Label -> height of its name above the figure's lower edge, in.
    """
    figure = axis.get_figure()
    assert isinstance(figure, Figure)
    dpi, frame = figure.dpi, axis.get_window_extent()
    points = {label: tuple(axis.transData.transform(end) / dpi) for label, end in ends.items()}
    # From below; of ends at one height the later label is the lower, as in a legend.
    order = sorted(reversed(list(ends)), key=lambda label: points[label][1])
    places = spread([points[label][1] for label in order], LINE, frame.y0 / dpi, frame.y1 / dpi)
    right = frame.x1 / dpi + _LEADER
    pixels = figure.dpi_scale_trans
    for label, y in zip(order, places, strict=True):
        look, (end_x, end_y) = looks[label], points[label]
        clear: dict[str, Any] = {"transform": pixels, "clip_on": False}
        axis.plot([end_x, frame.x1 / dpi + 0.03, right], [end_y, end_y, y], color=look.colour, linewidth=0.4, **clear)
        axis.plot([right + _MARK / 2], [y], **{**look.curve, "markersize": 3.5}, **clear)
        axis.text(
            right + _MARK + 0.03, y, label, fontsize=LEGEND_TYPE, va="center_baseline", color="black", transform=pixels
        )
    return dict(zip(order, places, strict=True))


def spread(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Return places at least `distance` apart and within [low, high], with the least squared distance to those wanted.

    Args:
        wanted: (N,), rising.
        distance: between neighbours.
        low: lowest place.
        high: highest place; where N places do not fit below it, they go on above it.
    """
    # With z_i = y_i - i * distance, "apart" is "rising": isotonic regression, which pools neighbours that violate it.
    pools: list[tuple[float, int]] = []
    for i, y in enumerate(wanted):
        total, count = y - i * distance, 1
        while pools and pools[-1][0] / pools[-1][1] >= total / count:
            before, others = pools.pop()
            total, count = total + before, count + others
        pools.append((total, count))
    top = max(low, high - (len(wanted) - 1) * distance)
    rising = [min(max(total / count, low), top) for total, count in pools for _ in range(count)]
    return [z + i * distance for i, z in enumerate(rising)]
