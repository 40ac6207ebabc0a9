"""What a table can have in a column: the metrics of accuracy, and the costs, each one number per run.

A measure knows its unit; `shown` turns an estimate into the text of a cell. Fractions are shown in percent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clbench.errors import UserError, unknown
from clbench.metrics import METRICS, Matrix, Metric, compute
from clbench.metrics_within import min_acc, wc_acc
from clbench.records import RunRecord, Sharing
from clbench.report.stats import Estimate, estimate

Unit = Literal["fraction", "area", "count", "bytes", "ratio", "seconds"]
"""area: a fraction close to 1, shown in percent with a decimal more."""
EMPTY = "-"
"""A value that does not exist or was not measured."""


@dataclass(frozen=True)
class Measure:
    """One number per run."""

    name: str
    """Dotted public name; the heads of csv columns start with it."""
    label: str
    unit: Unit
    definition: str
    """For captions."""
    of: Callable[[RunRecord], float | None]
    """None or NaN where the run does not have it."""
    is_cost: bool
    is_optional: bool = False
    """Only some tasks or methods have it: without having been asked for, it is a column where a run has it."""
    alike: Callable[[RunRecord], object] = lambda record: None
    """What has to be the same for all runs that have the number, or they are not averaged."""

    def over(self, records: Iterable[RunRecord]) -> Estimate | None:
        """Return mean, spread and n over runs; None when no run has the number, or it is not the same thing in all."""
        runs = list(records)
        if self.unit == "seconds" and len({run.environment.device_name for run in runs}) > 1:
            return None  # a second of one processor is not a second of another
        if len({self.alike(run) for run in runs} - {None}) > 1:
            return None
        return estimate(self.of(run) for run in runs)


def _metric(metric: Metric) -> Measure:
    def of(record: RunRecord) -> float:
        return compute(metric.name, record.matrix, np.asarray(record.acc_init))

    definition = f"{metric.definition} ({metric.source})"
    return Measure(metric.name, metric.label, "fraction", definition, of, is_cost=False)


def _areas(record: RunRecord, metric: str) -> float | None:
    """Return a metric of the AUROC matrix in place of the accuracy matrix."""
    return None if record.auroc is None else compute(metric, np.array(record.auroc), np.array(record.auroc_init))


_AREAS = (
    Measure(
        "average_auroc", "AUROC", "area",
        "AUROC = 1/T sum_j u[T,j], u[i,j] = mean over the classes of task j of the one-against-rest area under the ROC "
        "curve after task i",
        lambda record: _areas(record, "average_accuracy"), is_cost=False, is_optional=True,
    ),
    Measure(
        "auroc_forgetting", "AUROC forgetting", "area",
        "AUROC forgetting = mean over j < T of (max over l < T of u[l,j]) - u[T,j]",
        lambda record: _areas(record, "forgetting.chaudhry2018"), is_cost=False, is_optional=True,
    ),
)


def _average(rows: list[list[float]]) -> float:
    return compute("average_accuracy", np.array(rows), np.zeros(len(rows)))


_INFERRED = Measure(
    "average_accuracy_entropy", "ACC, task inferred", "fraction",
    "ACC, task inferred = 1/T sum_j e[T,j], e[i,j] = share of task j's samples answered rightly after task i when the "
    "task is not named: a sample is answered as if it were of each task learned, and the answer of lowest entropy is "
    "taken; a wrong task is a wrong answer (HNET+ENT, von Oswald et al. 2020)",
    lambda record: None if record.inferred is None else _average(record.inferred),
    is_cost=False, is_optional=True,
)


def _stability(of: Callable[[Matrix, list[Matrix]], float]) -> Callable[[RunRecord], float | None]:
    def found(record: RunRecord) -> float | None:
        rows = [np.array(task.acc).reshape(-1, i + 1) for i, task in enumerate(record.within)]
        # Where tasks are shorter than N nothing was seen within them.
        return of(record.matrix, rows) if any(map(len, rows)) else None

    return found


def evaluated_every(record: RunRecord) -> int | None:
    """Return the training iterations between two evaluations within a task; None where there are none."""
    return record.within[0].every if record.within else None


_STABILITY = tuple(
    Measure(
        name, label, "fraction", f"{definition} (stability gap, De Lange et al. 2023)", _stability(of), is_cost=False,
        is_optional=True, alike=evaluated_every,
    )
    for name, label, definition, of in (
        (
            "min_acc", "min-ACC",
            "min-ACC = mean over j < T of the lowest accuracy on task j after it was learned, over the evaluations "
            "within later tasks and after them; the rarer they are, the more falls they miss", min_acc,
        ),
        ("wc_acc", "WC-ACC", "WC-ACC = 1/T a[T,T] + (1 - 1/T) min-ACC", wc_acc),
    )
)  # fmt: skip


def peak_of(record: RunRecord, phase: str) -> int | None:
    """Return the highest `allocated_bytes` of a phase over the tasks of a run; None when it was never measured."""
    values = [peaks[phase].allocated_bytes for peaks in record.peaks if phase in peaks]
    return max((value for value in values if value is not None), default=None)


def _relative_size(record: RunRecord) -> float | None:
    single = record.single_task_parameters
    return record.footprints[-1].parameters / single if record.footprints and single else None


def _generation(field: str) -> Callable[[RunRecord], float | None]:
    return lambda record: None if record.generation is None else float(getattr(record.generation, field))


def _samples(record: RunRecord) -> float | None:
    """Return how many samples were trained on.

    The record has their number by the seconds spent training: the product, rounded, is exact below 2^50 samples.
    """
    rate = record.timing.train_samples_per_second
    return None if rate is None else round(rate * sum(task.get("train", 0.0) for task in record.timing.seconds))


def _all_flops(record: RunRecord) -> float | None:
    """Return the operations of all training steps; None where those of a task are unknown."""
    known = [task.train for task in record.flops if task.train is not None]
    return float(sum(known)) if known and len(known) == len(record.flops) else None


def _last_flops(field: str) -> Callable[[RunRecord], float | None]:
    return lambda record: getattr(record.flops[-1], field) if record.flops else None


def _footprint(field: str) -> Callable[[RunRecord], float | None]:
    return lambda record: float(getattr(record.footprints[-1], field)) if record.footprints else None


def _cost(
    name: str,
    label: str,
    unit: Unit,
    definition: str,
    of: Callable[[RunRecord], float | None],
    is_optional: bool = False,
) -> Measure:
    return Measure(name, label, unit, definition, of, is_cost=True, is_optional=is_optional)


_COSTS = (
    _cost("parameters", "Params", "count", "Params = weights stored after the last task", _footprint("parameters")),
    _cost(
        "parameters_trainable", "Trainable", "count", "Trainable = those of them still trained after the last task",
        _footprint("parameters_trainable"),
    ),
    _cost(
        "parameters_per_task", "Per task", "count", "Per task = those that serve one task alone, over all tasks",
        _footprint("parameters_per_task"),
    ),
    _cost("relative_size", "x one net", "ratio", "x one net = Params over those of one task's net", _relative_size),
    _cost(
        "generated_parameters", "Generated", "count", "Generated = weights of a task's net that a generator makes",
        _generation("target_parameters"), is_optional=True,
    ),
    _cost(
        "compression", "Compression", "ratio",
        "Compression = parameters of the generator and of all tasks' embeddings by the weights generated for one task",
        _generation("compression"), is_optional=True,
    ),
    _cost(
        "answer_bytes", "To answer", "bytes", "To answer = bytes kept to answer for all tasks",
        _footprint("answer_bytes"),
    ),
    _cost(
        "keep_learning_bytes", "To go on", "bytes",
        "To go on = bytes kept to go on learning, replay and optimiser included", _footprint("keep_learning_bytes"),
    ),
    _cost(
        "peak_train_bytes", "Peak", "bytes",
        "Peak = highest allocated memory in training above the level before it, worst task",
        lambda record: peak_of(record, "train"),
    ),
    _cost(
        "samples", "Samples", "count",
        "Samples = those that went through a training step, over all tasks and phases, each as often as it did: where "
        "they are more than fine-tuning's, the comparison is with a method that trained longer",
        _samples,
    ),
    _cost(
        "train_flops", "FLOPs", "count",
        "FLOPs = of all training steps of all tasks: products of matrices and convolutions, 2 a multiply-add; all else "
        "counts 0, so that a penalty over weights such as EWC's is free in it, as is what happens outside of steps",
        _all_flops, is_optional=True,
    ),
    _cost(
        "step_flops", "FLOPs/step", "count",
        "FLOPs/step = of one training step of the last task, of the kind that there were most of, replay included",
        _last_flops("step"), is_optional=True,
    ),
    _cost(
        "answer_flops", "FLOPs/answer", "count",
        "FLOPs/answer = of one answer to one sample, alone in its batch, after the last task; weights that are "
        "generated are generated for it",
        _last_flops("answer"), is_optional=True,
    ),
    _cost(
        "seconds", "Time", "seconds",
        "Time = wall clock of all tasks, training to evaluation; none over runs of different processors",
        lambda run: run.timing.total_seconds,
    ),
)


def _sharing(value: Callable[[Sharing], float | None]) -> Callable[[RunRecord], float | None]:
    return lambda record: None if record.sharing is None else value(record.sharing)


def _later(found: Sharing) -> float | None:
    """Return the mean of the parameters that the tasks after the first add."""
    added = [task.marginal_parameters for task in found.tasks[1:]]
    return math.fsum(added) / len(added) if added else None


def _later_relative(record: RunRecord) -> float | None:
    added = None if record.sharing is None else _later(record.sharing)
    return None if added is None or not record.single_task_parameters else added / record.single_task_parameters


_SHARING = (
    _cost(
        "in_common", "In common", "fraction",
        "In common = of the parameters that a task answers with, the share of the other tasks that use them too, mean "
        "over parameters and tasks",
        _sharing(lambda found: found.in_common), is_optional=True,
    ),
    _cost(
        "reuse_ratio", "Reuse", "ratio", "Reuse = parameters used, over tasks and applications, by those in use",
        _sharing(lambda found: found.reuse_ratio), is_optional=True,
    ),
    *(
        _cost(
            f"shared_by_{whom}", f"By {whom}", "count", f"By {whom} = parameters that {words}",
            _sharing(of), is_optional=True,
        )
        for whom, words, of in (
            ("all", "all tasks use, of more than one", lambda found: found.shared_by_all),
            ("some", "several tasks use, not all", lambda found: found.shared_by_some),
        )
    ),
    _cost(
        "private_parameters", "By one", "count", "By one = parameters that one task uses",
        _sharing(lambda found: found.private), is_optional=True,
    ),
    _cost(
        "marginal_parameters", "Task adds", "count",
        "Task adds = parameters that no earlier task uses, mean over the tasks after the first",
        _sharing(_later), is_optional=True,
    ),
    _cost(
        "marginal_relative", "Task adds", "ratio",
        "Task adds = parameters that no earlier task uses, mean over the tasks after the first, over those of one "
        "task's net",
        _later_relative, is_optional=True,
    ),
    _cost(
        "marginal_last", "Last adds", "count", "Last adds = those of the last task",
        _sharing(lambda found: found.tasks[-1].marginal_parameters if len(found.tasks) > 1 else None), is_optional=True,
    ),
    _cost(
        "marginal_last_bytes", "Bytes added", "bytes",
        "Bytes added = bytes that the last task answers with and no earlier one, masks and buffers included",
        _sharing(lambda found: found.tasks[-1].marginal_bytes if len(found.tasks) > 1 else None), is_optional=True,
    ),
)

MEASURES: dict[str, Measure] = {
    **{name: _metric(metric) for name, metric in METRICS.items()},
    **{measure.name: measure for measure in (_INFERRED, *_AREAS, *_STABILITY, *_COSTS, *_SHARING)},
}

DEFAULT = (
    "average_accuracy",
    "average_incremental_accuracy",
    "learning_accuracy",
    "forgetting.chaudhry2018",
    "bwt.gem",
    "fwt.gem",
    *(measure.name for measure in (_INFERRED, *_AREAS, *_STABILITY, *_COSTS)),
)
"""The columns of a table unless others are asked for; optional ones where a run has them."""


def chosen(names: Sequence[str] | None, records: Iterable[RunRecord] = ()) -> list[Measure]:
    """Return the measures of these names in this order; None: the usual ones, optional ones where a record has them.

    Raises:
        UserError: a name is not known.
    """
    wrong = [unknown_measure(name) for name in names or () if name not in MEASURES]
    if wrong:
        raise UserError(*wrong)
    return [MEASURES[name] for name in names] if names else present(DEFAULT, records)


def unknown_measure(name: str) -> str:
    """Return what is wrong with a name that no measure has; of a column's heading, the name that it stands for."""
    headed = [measure.name for measure in MEASURES.values() if measure.label.lower() == name.lower()]
    return f"unknown metric '{name}'. Did you mean '{headed[0]}'?" if headed else unknown("metric", name, MEASURES)


def present(names: Sequence[str], records: Iterable[RunRecord]) -> list[Measure]:
    """Return the measures of these names without the optional ones that no record has."""
    known, measures = list(records), [MEASURES[name] for name in names]
    return [
        measure for measure in measures if not measure.is_optional or any(measure.of(run) is not None for run in known)
    ]


# --------------------------------------------------------------------------------------------------------- as text


def head(measure: Measure) -> str:
    """Return the head of the measure's column, with its unit."""
    return measure.label + {"fraction": " (%)", "area": " (%)", "seconds": " (s)"}.get(measure.unit, "")


def shown(value: Estimate | None, unit: Unit, runs: int | None = None) -> str:
    """Return an estimate as the text of a cell: mean ± half-width of the 95 % interval.

    Args:
        value: None gives a dash.
        unit: fractions and areas are shown in percent; bytes and counts with a prefix of their own.
        runs: how many runs the row has. A cell of another number of runs says its own n; so does one of a single
            run, unless it counts what seeds hardly change (weights, bytes).
    """
    if value is None:
        return EMPTY
    scale, suffix, digits = _scale(value.mean, value.half, unit)
    text = _number(value.mean / scale, digits)
    # A cost that was the same in every run has no interval to show; the caption says so.
    if value.half is not None and (value.half > 0 or unit in ("fraction", "area")):
        text += f" ± {_number(value.half / scale, digits)}"
    text += suffix
    certain = unit in ("count", "bytes", "ratio") and value.n == runs
    if (value.n == 1 and not certain) or (runs is not None and value.n != runs):
        text += f" (n={value.n})"
    return text


def amount(value: float, unit: Unit) -> str:
    """Return a bare number as text in its unit, such as "72.4", "89.6 k" or "1.37 MiB"."""
    scale, suffix, digits = _scale(value, None, unit)
    return _number(value / scale, digits) + suffix


def difference(mean: float, low: float | None, high: float | None, unit: Unit) -> str:
    """Return a difference as the text of a cell, "+2.31 [0.84, 3.78]"; without ends, "+2.31".

    Fractions and areas in points of percent, two decimals; bytes and counts with a prefix of their own.
    """
    if unit in ("fraction", "area"):
        scale, suffix, digits = 0.01, "", 2
    else:
        width = 0.0 if low is None or high is None else high - low
        scale, suffix, digits = _scale(max(abs(mean), abs(low or 0), abs(high or 0)), width, unit)
        # Ends that are close to each other are told apart.
        digits = max(digits, min(4, 1 - math.floor(math.log10(width / scale)))) if width else digits
    text = _number(mean / scale, digits)
    text = text if text.startswith("-") or float(text) == 0 else f"+{text}"
    if low is not None and high is not None:
        text += f" [{_number(low / scale, digits)}, {_number(high / scale, digits)}]"
    return text + suffix


def _scale(mean: float, half: float | None, unit: Unit) -> tuple[float, str, int]:
    """Return divisor, suffix and number of decimals for three significant digits (percent: one decimal, areas two)."""
    if unit in ("fraction", "area"):
        return 0.01, "", 1 if unit == "fraction" else 2
    step, names = (1024.0, ("B", "KiB", "MiB", "GiB", "TiB")) if unit == "bytes" else (1000.0, ("", "k", "M", "G", "T"))
    power = 0
    if unit in ("bytes", "count"):
        while abs(mean) / step**power >= 999.5 and power < len(names) - 1:
            power += 1
    scaled = abs(mean) / step**power
    whole = power == 0 and unit in ("bytes", "count") and not half and scaled == int(scaled)
    digits = 0 if whole else max(0, 2 - math.floor(math.log10(scaled))) if scaled >= 0.995 else 2
    return step**power, f" {names[power]}" if names[power] else "", digits


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    # -0.04 rounds to -0.0: a sign that says nothing.
    if float(text) == 0:
        text = text.removeprefix("-")
    return text


def cells(value: Estimate | None) -> tuple[str, str, str, str]:
    """Return mean, low, high and n for a csv file; nothing and n 0 for None."""
    if value is None:
        return "", "", "", "0"
    return exact(value.mean), exact(value.low), exact(value.high), str(value.n)


def exact(value: float | None) -> str:
    """Return a number for a csv file: 12 significant digits, which no machine's rounding changes; "" for none."""
    if value is None or math.isnan(value):
        return ""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    return format(value, ".12g")
