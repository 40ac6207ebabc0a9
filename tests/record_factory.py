"""Made-up run records for the tests of everything that reads records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clbench.record_parts import Within
from clbench.records import (
    BaselineInfo,
    Code,
    Environment,
    Footprint,
    Generation,
    GrowthEvent,
    Peak,
    RunRecord,
    Status,
    TaskInfo,
    Timing,
)

FAMILY = {
    "finetune": "bounds",
    "joint": "bounds",
    "independent": "bounds",
    "frozen": "bounds",
    "ewc": "regularisation",
    "si": "regularisation",
    "lwf": "regularisation",
    "er": "replay",
    "agem": "replay",
    "gem": "replay",
    "derpp": "replay",
    "den": "expansion",
    "hnet": "hypernetwork",
}
KEPT = {"finetune": 0.35, "joint": 1.0, "independent": 1.0, "frozen": 0.98, "ewc": 0.8, "si": 0.78, "lwf": 0.7}


def matrix_of(baseline: str, n_tasks: int, seed: int, chance: float = 0.1) -> NDArray[np.float64]:
    """Return a (T, T) accuracy matrix that looks like the baseline's: each task decays after it was learned."""
    number = int(hashlib.sha256(f"{baseline}{seed}".encode()).hexdigest()[:8], 16)
    rng = np.random.default_rng(number)
    age = np.subtract.outer(np.arange(n_tasks), np.arange(n_tasks))
    learned = 0.96 - 0.01 * np.arange(n_tasks) * (3.0 if baseline == "frozen" else 0.5)
    keep = KEPT.get(baseline, 0.9)
    acc = chance + (learned - chance) * (keep + (1 - keep) * 0.75 ** np.maximum(age, 0)) * (age >= 0)
    return np.clip(np.round(acc + rng.normal(0, 0.01, acc.shape), 4), 0, 1)


def make_record(
    task: str = "toy_3",
    baseline: str = "finetune",
    seed: int = 0,
    *,
    acc: list[list[float]] | NDArray[np.float64] | None = None,
    acc_init: list[float] | None = None,
    auroc: list[list[float]] | None = None,
    inferred: list[list[float]] | None = None,
    generation: Generation | None = None,
    within: Sequence[Within] = (),
    n_tasks: int = 3,
    label: str | None = None,
    family: str | None = None,
    status: Status = "done",
    error: str | None = None,
    version: int = 1,
    task_hash: str = "0123456789ab",
    baseline_hash: str = "ba9876543210",
    scenario: Literal["task", "domain", "class"] = "domain",
    device: Literal["cpu", "cuda"] = "cpu",
    device_name: str = "Test CPU",
    settings: dict[str, Any] | None = None,
    departures: dict[str, Any] | None = None,
    parameters: int = 89_610,
    growth: int = 0,
    events: Sequence[GrowthEvent] = (),
    widths: Sequence[dict[str, int]] = (),
    units: Sequence[dict[str, list[tuple[int, int]]]] = (),
    replay_samples: int = 0,
    peak: int | None = 3_500_000,
    seconds: float = 12.5,
) -> RunRecord:
    """Return one record; what is not given is made up, the same for the same arguments.

    Args:
        task: name of the task; its title is made from it.
        baseline: name of the baseline; a known one gets its family and a likely accuracy matrix.
        seed: of the run; moves accuracies and seconds a little.
        acc: (rows, T); T is taken from it when given.
        acc_init: (T,).
        auroc: (rows, T); also T where `acc` is not given. None leaves it out.
        inferred: (rows, T). None leaves it out.
        generation: what generates weights.
        within: accuracies within tasks, one a task.
        n_tasks: T, when `acc` is not given.
        label: of the baseline, when it is not its name.
        family: of the baseline.
        status: "failed" and "interrupted" runs keep their first rows only, unless `acc` says otherwise.
        error: one line.
        version: of the task.
        task_hash: of the task.
        baseline_hash: of the baseline.
        scenario: of the task.
        device: "cpu" or "cuda".
        device_name: of the device.
        settings: of the strategy.
        departures: from the task's budget or model.
        parameters: elements after the first task.
        growth: elements added by every further task.
        events: the growth log.
        widths: layer -> units, one a task.
        units: layer -> ranges of units that serve a task, one a task.
        replay_samples: kept, of 784 bytes each.
        peak: allocated bytes in training; None is unknown.
        seconds: of the whole run.
    """
    if acc is None:
        n_tasks = len(auroc[0]) if auroc else n_tasks
        rows = n_tasks if status == "done" else n_tasks // 2
        acc = matrix_of(baseline, n_tasks, seed)[:rows]
    table = [[float(value) for value in row] for row in acc]
    n_tasks = len(table[0]) if table else n_tasks
    replay = replay_samples * 784
    sizes = [parameters + growth * i for i in range(len(table))]

    def footprint(size: int, i: int) -> Footprint:
        answer = size * 4
        return Footprint(
            parameters=size,
            parameters_trainable=size - growth * i,
            parameters_shared=parameters,
            parameters_per_task=growth * i,
            parameters_nonzero=size,
            parameter_bytes=answer,
            buffer_bytes=0,
            optimizer_bytes=answer,
            auxiliary_bytes={"fisher": answer} if baseline == "ewc" else {},
            replay_samples=replay_samples,
            replay_bytes=replay,
            answer_bytes=answer,
            keep_learning_bytes=2 * answer + replay + (answer if baseline == "ewc" else 0),
        )

    def one_peak(share: float) -> Peak:
        size = None if peak is None else int(peak * share)
        return Peak(allocated_bytes=size, reserved_bytes=None, resident_bytes=None, meter="allocator")

    total = round(seconds * (1 + 0.02 * (seed % 5)), 3)
    return RunRecord(
        status=status,
        task=TaskInfo(
            name=task,
            version=version,
            hash=task_hash,
            title=f"{task.replace('_', ' ').capitalize()} of the tests",
            scenario=scenario,
            n_tasks=n_tasks,
            train={"epochs": 5, "batch_size": 128, "lr": 0.001},
        ),
        baseline=BaselineInfo(
            name=baseline,
            label=label or baseline,
            hash=baseline_hash,
            family=family or FAMILY.get(baseline, "other"),
            strategy=f"clbench.strategies.{baseline}:{baseline.upper()}",
            paper="A paper",
            settings=settings or {},
            departures=departures or {},
            origin="ours: made up",
        ),
        seed=seed,
        code=Code(version="0.1.0", commit="abc1234", dirty=False),
        environment=Environment(
            device=device,
            device_name=device_name,
            threads=1,
            python="3.11",
            torch="2.14",
            cuda=None,
            avalanche="0.6",
            platform="test",
        ),
        data={"synthetic": "f00d"},
        acc=table,
        acc_init=acc_init if acc_init is not None else [0.1] * n_tasks,
        auroc=auroc,
        auroc_init=None if auroc is None else [0.5] * n_tasks,
        inferred=inferred,
        generation=generation,
        within=list(within),
        single_task_parameters=parameters,
        footprints=[footprint(size, i) for i, size in enumerate(sizes)],
        growth=list(events),
        widths=list(widths),
        units=list(units),
        error=error,
        peaks=[{"train": one_peak(1.0), "consolidate": one_peak(0.4), "evaluate": one_peak(0.25)} for _ in sizes],
        timing=Timing(
            started="2026-01-01T00:00:00+00:00",
            seconds=[{"train": total / max(1, len(sizes))} for _ in sizes],
            total_seconds=total,
            train_samples_per_second=50_000.0,
        ),
    )
