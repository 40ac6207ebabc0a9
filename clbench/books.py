"""What a run has to show so far, and the record that comes of it.

Letters: T tasks.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from clbench.environment import code_version, environment
from clbench.recipes import Experiment
from clbench.record_parts import Flops, Within
from clbench.records import (
    BaselineInfo,
    Code,
    Footprint,
    Generation,
    GrowthEvent,
    Peak,
    RunRecord,
    Sharing,
    TaskInfo,
    Timing,
)
from clbench.strategies.base import Strategy
from clbench.strategies.build import resolved_settings
from clbench.strategies.evaluation import Evaluation

WITHIN = "within"
"""The phase of evaluations within a task: what is asked for on top, and no part of the run's seconds."""


@dataclass
class Books:
    """What a run has to show so far."""

    experiment: Experiment
    seed: int
    device: torch.device
    threads: int
    fingerprints: dict[str, str]
    counts_flops: bool = True
    evaluates_every: int | None = None
    """Training iterations between two evaluations within a task; None for none."""
    status: Literal["done", "failed", "interrupted"] = "interrupted"
    acc: list[list[float]] = field(default_factory=list)
    acc_init: list[float] = field(default_factory=list)
    auroc: list[list[float]] | None = None
    auroc_init: list[float] | None = None
    inferred: list[list[float]] | None = None
    growth: list[GrowthEvent] = field(default_factory=list)
    widths: list[dict[str, int]] = field(default_factory=list)
    units: list[dict[str, list[tuple[int, int]]]] = field(default_factory=list)
    sharing: Sharing | None = None
    generation: Generation | None = None
    footprints: list[Footprint] = field(default_factory=list)
    flops: list[Flops] = field(default_factory=list)
    within: list[Within] = field(default_factory=list)
    peaks: list[dict[str, Peak]] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)
    samples: int = 0
    single_task_parameters: int = 0
    error: str | None = None
    trace: str | None = None
    code: Code = field(default_factory=code_version)
    """As it was when the run began: a checkout may move on meanwhile."""
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def start(self, found: Sequence[Evaluation]) -> None:
        """Enter the answers to every task (T,) before any training."""
        self.acc_init = [one.accuracy for one in found]
        if self.experiment.task.auroc:
            self.auroc, self.auroc_init = [], _areas(found, "before training")
        self.inferred = [] if self.experiment.task.entropy else None

    def learned(self, found: Sequence[Evaluation], inferred: list[float] | None) -> None:
        """Enter the answers to every task (T,) after another one was learned; also those where it is inferred."""
        when = f"after task {len(self.acc) + 1}"
        row = [one.accuracy for one in found]
        if not np.isfinite(row).all():
            raise FloatingPointError(f"an accuracy {when} is {row}")
        if self.auroc is not None:
            self.auroc.append(_areas(found, when))
        if self.inferred is not None and inferred is not None:
            self.inferred.append(inferred)
        self.acc.append(row)

    def grown(self, strategy: Strategy) -> None:
        """Enter what the strategy says of the sizes of its layers after another task."""
        self.growth = list(strategy.growth)
        self.widths.append(strategy.widths())
        self.units = [{layer: ranges(mask) for layer, mask in task.items()} for task in strategy.serving()]

    def fail(self, error: Exception) -> None:
        """Note what went wrong."""
        self.status = "failed"
        self.error = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
        self.trace = _without_paths("".join(traceback.format_exception(error)))

    def record(self) -> RunRecord:
        """Return the run as a record."""
        experiment, task, baseline = self.experiment, self.experiment.task, self.experiment.baseline
        trained = sum(seconds.get("train", 0.0) for seconds in self.seconds)
        return RunRecord(
            status=self.status,
            task=TaskInfo(
                name=task.name,
                version=task.version,
                hash=task.hash,
                title=task.title,
                scenario=task.stream.scenario,
                n_tasks=task.stream.n_tasks,
                train=task.train.model_dump(mode="json"),
            ),
            baseline=BaselineInfo(
                name=baseline.name,
                label=experiment.label,
                hash=experiment.hash,
                family=baseline.family,
                strategy=baseline.strategy,
                paper=baseline.paper,
                settings=resolved_settings(experiment),
                departures=experiment.departures,
                origin=experiment.origin,
            ),
            seed=int(self.seed),
            code=self.code,
            environment=environment(self.device, self.threads),
            data=self.fingerprints,
            acc=self.acc,
            acc_init=self.acc_init,
            auroc=self.auroc,
            auroc_init=self.auroc_init,
            inferred=self.inferred,
            single_task_parameters=self.single_task_parameters,
            footprints=self.footprints,
            growth=self.growth,
            widths=self.widths if any(self.widths) else [],
            units=self.units,
            sharing=self.sharing,
            generation=self.generation,
            flops=self.flops,
            within=self.within,
            error=self.error,
            traceback=self.trace,
            peaks=self.peaks,
            timing=Timing(
                started=self.started,
                seconds=self.seconds,
                total_seconds=sum(
                    spent for seconds in self.seconds for phase, spent in seconds.items() if phase != WITHIN
                ),
                train_samples_per_second=self.samples / trained if trained > 0 and self.samples else None,
            ),
        )


def _areas(found: Sequence[Evaluation], when: str) -> list[float]:
    """Return the AUROC of every task (T,)."""
    row = [math.nan if one.auroc is None else one.auroc for one in found]
    if not np.isfinite(row).all():
        raise FloatingPointError(f"an AUROC {when} is {row}")
    return row


def ranges(mask: torch.Tensor) -> list[tuple[int, int]]:
    """Return the half-open ranges where a bool mask (units,) is true, ascending and apart from each other."""
    padded = np.concatenate([[False], mask.detach().cpu().numpy().astype(bool), [False]])
    edges = np.flatnonzero(padded[1:] != padded[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def failed_record(experiment: Experiment, seed: int, device: str, threads: int, error: str) -> RunRecord:
    """Return the record of a run whose process died before it could write one."""
    books = Books(experiment, seed, torch.device(device), threads, {}, status="failed", error=error)
    return books.record()


def _without_paths(trace: str) -> str:
    """Keep a traceback free of the folders of the machine it happened on."""
    for folder in sorted({*sys.path, str(Path(__file__).resolve().parent.parent), str(Path.home())}, key=len)[::-1]:
        if len(folder) > 1:
            trace = trace.replace(folder.rstrip("/") + "/", "")
    return trace
