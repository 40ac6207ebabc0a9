"""The figures of `clbench lab growth`: peak memory of a growth, a training step after it, what freezing costs."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from clbench.lab.record import FROZEN_METHODS, METHODS, STEP_METHODS, GrowthRecord
from clbench.report.lab import runs, step_case, where
from clbench.report.style import COLUMN, PAGE, Plot, looks, sheet

_CASES = {
    ("linear", "fan-out"): ("#0173b2", "o"),
    ("linear", "fan-in"): ("#0173b2", "D"),
    ("conv", "fan-out"): ("#de8f05", "o"),
    ("conv", "fan-in"): ("#de8f05", "D"),
}
_LEAST = 0.01
"""W: what stays below is drawn here, as a logarithm has no room for nothing."""
_KINDS = {"gradients": "#0173b2", "Adam's state": "#de8f05", "peak of a step": "#949494"}


def plots(record: GrowthRecord) -> list[Plot]:
    """Return the figures of one record."""
    return [_memory(record), _steps(record), _frozen(record)]


def _memory(record: GrowthRecord) -> Plot:
    peaks = [peak for peak in record.peaks if not peak.adam and peak.peak is not None]
    methods = [method for method in METHODS if any(peak.method == method for peak in peaks)]
    cases = {case: look for case, look in _CASES.items() if any((peak.layer, peak.side) == case for peak in peaks)}
    names = [" ".join(case) for case in cases]

    def draw() -> Figure:
        new = f"the new part, {record.share:g} W"
        left = 0.12 + 0.051 * max(len(METHODS[method]) for method in methods)
        figure, (axis,), finish = sheet(COLUMN, 0.2 + 0.19 * len(methods), legend=[*names, new], left=left, right=0.15)
        axis.set_xscale("log")
        axis.axvline(record.share, color="#555555", linestyle="--", linewidth=0.8, zorder=1)
        for peak in peaks:
            colour, marker = cases[peak.layer, peak.side]
            # A little apart, so that none hides another: in most methods all four are equal.
            place = methods.index(peak.method) + 0.16 * (list(cases).index((peak.layer, peak.side)) - 1.5)
            assert peak.peak is not None
            x = max(peak.peak / peak.weight_bytes, _LEAST)
            axis.plot(x, place, marker, color=colour, markersize=3.2, markeredgewidth=0)
        axis.set_yticks(range(len(methods)), [METHODS[method] for method in methods])
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.set_xlim(0.8 * _LEAST, 2.8)
        ticks = (_LEAST, 0.03, 0.1, 0.3, 1, 2)
        axis.set_xticks(ticks, [f"≤{tick:g}" if tick == _LEAST else f"{tick:g}" for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(f"extra memory of one growth (W), {record.environment.device}")
        handles: list[Any] = [
            Line2D([], [], marker=marker, color=colour, linestyle="none", label=name, markersize=3.2)
            for name, (colour, marker) in zip(names, cases.values(), strict=True)
        ]
        finish([*handles, Line2D([], [], color="#555555", linestyle="--", linewidth=0.8, label=new)])
        return figure

    rows = tuple(
        (peak.method, peak.layer, peak.side, f"{peak.peak / peak.weight_bytes:.4f}")
        for peak in peaks
        if peak.peak is not None
    )
    caption = (
        f"Peak memory of one growth by {100 * record.share:g} % of a side above the level before it, in units of the "
        f"weight's own bytes W; the worse of allocator and resident set, medians, "
        f"{runs(peak.allocated or peak.resident for peak in peaks)} fresh processes. {where(record)}"
    )
    return Plot("memory", caption, ("method", "layer", "side", "peak_w"), rows, draw)


def _steps(record: GrowthRecord) -> Plot:
    panels = list(dict.fromkeys(step_case(step)[:2] for step in record.steps))
    methods = [name for name in STEP_METHODS if name != "dense" and any(step.method == name for step in record.steps)]
    ratios = {(step.method, *step_case(step)): step.ratio.median for step in record.steps}
    found = looks(methods)

    def draw() -> Figure:
        names = [STEP_METHODS[method] for method in methods]
        figure, axes, finish = sheet(
            PAGE, 1.7, columns=max(1, len(panels)), legend=names, top=0.2, left=0.4, share=True
        )
        for axis, (layer, batch) in zip(axes, panels, strict=False):
            for method in methods:
                points = sorted((key[3], value) for key, value in ratios.items() if key[:3] == (method, layer, batch))
                axis.plot(*zip(*points, strict=True), **found[method].curve)
            axis.set_xscale("log")
            axis.set_yscale("log", base=2)
            counts = sorted({step.growths for step in record.steps})
            axis.set_xticks(counts, [str(count) for count in counts])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.set_ylim(0.95 * min(ratios.values()), 1.1 * max(ratios.values()))
            axis.yaxis.set_major_locator(FixedLocator([0.5, 0.7, 1, 1.4, 2, 3, 4, 6, 8]))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_title(f"{layer}, batch {batch}")
            axis.set_xlabel("growths so far")
        axes[0].set_ylabel("time of a step, to an ordinary layer")
        finish([Line2D([], [], label=STEP_METHODS[method], **found[method].curve) for method in methods])
        return figure

    rows = tuple(
        (step.method, step.layer, str(step.batch), str(step.growths), f"{step.ratio.median:.4f}", str(step.ratio.n))
        for step in record.steps
    )
    caption = (
        f"Forward and backward of one layer after growths of both sides by {100 * record.share:g} %, as ratio to an "
        f"ordinary layer of the same shape in the same round; medians, {runs(step.ratio for step in record.steps)}. "
        f"{where(record)}"
    )
    return Plot("steps", caption, ("method", "layer", "batch", "growths", "ratio", "n"), rows, draw)


def _frozen(record: GrowthRecord) -> Plot:
    layers = list(dict.fromkeys(cost.layer for cost in record.frozen))
    bars = {
        (cost.layer, cost.method): {
            "gradients": cost.gradient_bytes / cost.weight_bytes,
            "Adam's state": cost.state_bytes / cost.weight_bytes,
            **({} if cost.peak is None else {"peak of a step": cost.peak.median / cost.weight_bytes}),
        }
        for cost in record.frozen
    }

    def draw() -> Figure:
        left = 0.2 + 0.056 * max(map(len, FROZEN_METHODS.values()))
        figure, axes, finish = sheet(
            COLUMN, 1.0, columns=max(1, len(layers)), legend=list(_KINDS), left=left, top=0.2, right=0.12
        )
        for axis, layer in zip(axes, layers, strict=False):
            mine = {method: values for (kind, method), values in bars.items() if kind == layer}
            for place, values in enumerate(mine.values()):
                for i, (kind, value) in enumerate(values.items()):
                    axis.barh(place + 0.27 * (i - 1), value, height=0.25, color=_KINDS[kind])
            axis.set_yticks(range(len(mine)), [FROZEN_METHODS[method] for method in mine] if axis is axes[0] else [])
            axis.set_ylim(len(mine) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
            axis.set_title(layer)
            axis.set_xlabel("W of the old part")
        finish([Patch(color=colour, label=kind) for kind, colour in _KINDS.items()])
        return figure

    rows = tuple(
        (layer, method, kind, f"{value:.4f}")
        for (layer, method), values in bars.items()
        for kind, value in values.items()
    )
    caption = (
        f"What one step with Adam keeps and needs after both sides grew by {100 * record.share:g} %, in units of the "
        f"old part's bytes; {runs(cost.peak for cost in record.frozen)}. {where(record)}"
    )
    return Plot("frozen", caption, ("layer", "method", "quantity", "w"), rows, draw)
