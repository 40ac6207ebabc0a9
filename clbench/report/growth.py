"""What the growth logs of a baseline's runs say of one layer, per task and over all of them.

Letters: T tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from clbench.records import GrowthKind, RunRecord
from clbench.report.select import Group
from clbench.report.stats import Estimate, estimate

KINDS: tuple[GrowthKind, ...] = ("added", "pruned", "split")


@dataclass(frozen=True)
class LayerGrowth:
    """Estimates over the runs of a group that have the layer; None where no run has the number."""

    widths: list[Estimate | None]
    """(T,): units after each task."""
    counts: dict[GrowthKind, list[Estimate | None]]
    """Kind -> (T,): units added, pruned or split during each task."""
    totals: dict[GrowthKind, Estimate | None]
    """Kind -> the same over the tasks after the first, whose units may or may not be logged as added."""
    reused: list[Estimate | None]
    """(T,): of the units there were before a task, the share that it builds on; None for the first task."""
    mean_reused: Estimate | None
    """Mean of `reused` over the tasks after the first, by run."""


def growing(group: Group) -> list[str]:
    """Return the layers whose sizes a group's runs recorded, in the net's order; [] for nets that keep their size."""
    return list(dict.fromkeys(layer for run in group.runs for widths in run.widths for layer in widths))


def over_runs(group: Group, layer: str) -> LayerGrowth:
    """Return what the runs of a group say of a layer."""
    runs = [run for run in group.runs if any(layer in widths for widths in run.widths)]
    tasks = range(max(len(run.widths) for run in runs))
    shares = [[_reused(run, layer, task) for task in tasks] for run in runs]
    return LayerGrowth(
        widths=[estimate(run.widths[task].get(layer) for run in runs) for task in tasks],
        counts={kind: [estimate(_count(run, layer, kind, task) for run in runs) for task in tasks] for kind in KINDS},
        totals={kind: estimate(_total(run, layer, kind) for run in runs) for kind in KINDS},
        reused=[estimate(column) for column in zip(*shares, strict=True)],
        mean_reused=estimate(_mean(row) for row in shares),
    )


def _count(run: RunRecord, layer: str, kind: GrowthKind, task: int) -> int:
    found = (event for event in run.growth if (event.layer, event.kind, event.after_task) == (layer, kind, task))
    return sum(event.units for event in found)


def _total(run: RunRecord, layer: str, kind: GrowthKind) -> int:
    found = (event for event in run.growth if (event.layer, event.kind) == (layer, kind) and event.after_task > 0)
    return sum(event.units for event in found)


def _reused(run: RunRecord, layer: str, task: int) -> float | None:
    """Return the share of a layer's units before a task that it builds on; None where nothing is known of it.

    A method that logs no use of older units at all has no share, rather than one of 0.
    """
    before = run.widths[task - 1].get(layer, 0) if task else 0
    if not before or not any(event.kind == "reused" for event in run.growth):
        return None
    return _count(run, layer, "reused", task) / before


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
