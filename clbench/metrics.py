"""Metrics of continual learning: every definition over one accuracy matrix, each under a name that says whose it is.

Shapes: T tasks. `acc` is (T, T), fractions in [0, 1]: acc[i, j] = test accuracy on task j after training on task i
(both from 0). `acc_init` is (T,): accuracy on every task before any training. An entry with j > i (a task not learned
yet) may be NaN where it was not measured; one with j <= i may not. A metric that needs what is not there (T == 1, an
upper triangle, a first row) returns NaN.

Libraries give different answers under one name; the names here say which answer is meant. `METRICS` holds those that
need one run alone; functions that need a reference model, a footprint or a set of runs follow it; those that need
evaluations within tasks are in `clbench.metrics_within`. `NOT_COMPUTED` says
what is left out and why.

This module needs numpy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
NAN = float("nan")


def _checked(acc: Matrix) -> Matrix:
    """Return `acc` as float64. Raises ValueError unless it is square, complete for j <= i, and within [0, 1]."""
    matrix = np.asarray(acc, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
        raise ValueError(f"an accuracy matrix is (T, T), not {matrix.shape}")
    if np.isnan(matrix[np.tril_indices(len(matrix))]).any():
        raise ValueError("accuracy on a task that was already learned is NaN")
    if ((matrix < 0) | (matrix > 1)).any():
        raise ValueError("an accuracy lies outside [0, 1]")
    return matrix


def _vector(values: Vector, size: int, name: str) -> Vector:
    vector = np.asarray(values, dtype=np.float64)
    if vector.shape != (size,):
        raise ValueError(f"{name} has shape {vector.shape}, the accuracy matrix has {size} tasks")
    return vector


def _mean(values: Vector) -> float:
    return float(values.mean()) if values.size else NAN


def auroc(scores: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Return the mean one-against-rest area under the ROC curve over the classes of `labels`, in [0, 1].

    A class's area is P(score of one of its samples > score of another's) + 1/2 P(the two are equal), exact under ties.
    Classes that no sample has, or every sample, have no area and are left out of the mean; a class that has no column
    in `scores` (it has no output yet) cannot be told apart and counts 0.5.

    Args:
        scores: (N, C), column c higher where class c is likelier; only the order within a column matters.
        labels: (N,), integers from 0; may exceed C - 1.

    Returns:
        NaN where no class has an area (one class alone, no sample) or a score is NaN.

    Raises:
        ValueError: shapes that do not fit, a negative label.

    Source: Hanley & McNeil 1982 (the area as a Mann-Whitney statistic); DEN's code takes this mean over ten outputs.
    """
    table, classes = np.asarray(scores), np.asarray(labels)
    if table.ndim != 2 or classes.shape != table.shape[:1]:
        raise ValueError(f"scores are (N, C) and labels (N,), not {table.shape} and {classes.shape}")
    if classes.size and classes.min() < 0:
        raise ValueError(f"a label is {classes.min()}")
    if np.isnan(table).any():
        return NAN
    areas = []
    for label, count in zip(*np.unique(classes, return_counts=True), strict=True):
        others = len(classes) - int(count)
        if others == 0:
            continue
        if label >= table.shape[1]:
            areas.append(0.5)
            continue
        ordered, own = np.sort(table[:, label]), np.sort(table[classes == label, label])
        # Twice the pairs (own, any) in the right order, ties half: integers, so nothing is rounded. Of the pairs
        # within the class exactly half are in order, by symmetry.
        twice = int(np.searchsorted(ordered, own, "left").sum()) + int(np.searchsorted(ordered, own, "right").sum())
        areas.append((twice - int(count) ** 2) / (2 * int(count) * others))
    return _mean(np.array(areas))


def seen_only(acc: Matrix) -> Matrix:
    """Return a copy of `acc` (T, T) with NaN above the diagonal: what a library sees that tests learned tasks only."""
    matrix = _checked(acc).copy()
    matrix[np.triu_indices(len(matrix), 1)] = NAN
    return matrix


# ------------------------------------------------------------------------------------------------------------ accuracy


def average_accuracy(acc: Matrix) -> float:
    """Return ACC = 1/T sum_j acc[T-1, j], in [0, 1]. Source: Lopez-Paz & Ranzato 2017 (GEM)."""
    return _mean(_checked(acc)[-1])


def accuracy_of_seen(acc: Matrix) -> Vector:
    """Return A (T,): A[i] = mean over j <= i of acc[i, j], every task weighing the same."""
    matrix = _checked(acc)
    return np.array([matrix[i, : i + 1].mean() for i in range(len(matrix))])


def average_incremental_accuracy(acc: Matrix) -> float:
    """Return AIA = 1/T sum_i A_i, A_i = mean over the tasks j <= i of acc[i, j], in [0, 1].

    This is the per-task mean. With tasks of unequal size the per-sample mean, usual in class-incremental papers,
    differs. Source: Rebuffi et al. 2017 (iCaRL).
    """
    return _mean(accuracy_of_seen(acc))


def learning_accuracy(acc: Matrix) -> float:
    """Return LA = 1/T sum_j acc[j, j], accuracy just after learning a task. Attributed to Riemer et al. 2019 (MER)."""
    return _mean(np.diag(_checked(acc)))


def accuracy_lower_triangle(acc: Matrix) -> float:
    """Return A = sum_{i >= j} acc[i, j] / (T (T + 1) / 2), in [0, 1]. Source: Diaz-Rodriguez et al. 2018."""
    matrix = _checked(acc)
    return _mean(matrix[np.tril_indices(len(matrix))])


# ---------------------------------------------------------------------------------------------------------- forgetting


def forgetting_chaudhry2018(acc: Matrix) -> float:
    """Return F = mean over j < T-1 of max_{l <= T-2} acc[l, j] - acc[T-1, j], in [-1, 1]; positive means forgot.

    The maximum runs over every row before the last, as in the paper: rows before the task was learned count where they
    were measured (not NaN). FACIL and Renate see learned tasks only: that number is `forgetting_facil`. NaN for T == 1.

    Source: Chaudhry et al. 2018 (RWalk). On T=5 of the tests: falls .93-.80, .88-.55, .86-.50, .84-.30, mean 0.34.
    """
    matrix = _checked(acc)
    if len(matrix) == 1:
        return NAN
    return _mean(np.nanmax(matrix[:-1, :-1], axis=0) - matrix[-1, :-1])


def forgetting_facil(acc: Matrix) -> float:
    """Return Chaudhry's F with the maximum over rows j <= l <= T-2 alone, in [-1, 1]; positive means forgot.

    The number that FACIL and Renate print, since they test no task before it is learned. NaN for T == 1.
    """
    return forgetting_chaudhry2018(seen_only(acc))


def forgetting_max_with_last(acc: Matrix) -> float:
    """Return the mean over j < T-1 of max_l acc[l, j] - acc[T-1, j] with the last row in the maximum, in [0, 1].

    Mammoth's, PyCIL's and CL-Gym's number, never negative: a task that improved counts as 0. Those libraries test
    learned tasks only, so pass `seen_only(acc)` to repeat them where an unlearned task scored higher. NaN for T == 1.
    """
    matrix = _checked(acc)
    if len(matrix) == 1:
        return NAN
    return _mean(np.nanmax(matrix[:, :-1], axis=0) - matrix[-1, :-1])


def forgetting_first_minus_last(acc: Matrix) -> float:
    """Return the mean over j < T-1 of acc[j, j] - acc[T-1, j], in [-1, 1]: minus GEM's BWT.

    Avalanche's number: it takes no notice of a later best. On T=5 of the tests: .10, .33, .36, .54, mean 0.3325.
    """
    return -bwt_gem(acc)


# ------------------------------------------------------------------------------------------------------------ transfer


def bwt_gem(acc: Matrix) -> float:
    """Return BWT = 1/(T-1) sum_{j < T-1} (acc[T-1, j] - acc[j, j]), in [-1, 1]; negative means forgot.

    Source: Lopez-Paz & Ranzato 2017 (GEM). NaN for T == 1.
    """
    matrix = _checked(acc)
    return _mean((matrix[-1] - np.diag(matrix))[:-1])


def bwt_diaz_rodriguez(acc: Matrix) -> float:
    """Return BWT over the whole history: sum_{i > j} (acc[i, j] - acc[j, j]) / (T (T-1) / 2), in [-1, 1].

    Source: Diaz-Rodriguez et al. 2018. NaN for T == 1.
    """
    matrix = _checked(acc)
    return _mean((matrix - np.diag(matrix))[np.tril_indices(len(matrix), -1)])


def remembering(acc: Matrix) -> float:
    """Return REM = 1 - |min(BWT, 0)| of Diaz-Rodriguez's BWT, in [0, 1]; 1 means nothing was forgotten."""
    bwt = bwt_diaz_rodriguez(acc)
    return bwt if np.isnan(bwt) else 1.0 - abs(min(bwt, 0.0))


def bwt_plus(acc: Matrix) -> float:
    """Return BWT+ = max(BWT, 0) of Diaz-Rodriguez's BWT, in [0, 1]: backward improvement alone."""
    bwt = bwt_diaz_rodriguez(acc)
    return bwt if np.isnan(bwt) else max(bwt, 0.0)


def fwt_gem(acc: Matrix, acc_init: Vector) -> float:
    """Return FWT = 1/(T-1) sum_{j >= 1} (acc[j-1, j] - acc_init[j]), in [-1, 1].

    Source: Lopez-Paz & Ranzato 2017 (GEM); with `acc_init` of zeros, the number of continuum's repository. NaN for
    T == 1 or where acc[j-1, j] was not measured.
    """
    matrix = _checked(acc)
    start = _vector(acc_init, len(matrix), "acc_init")
    return _mean(np.diag(matrix, 1) - start[1:])


def fwt_diaz_rodriguez(acc: Matrix) -> float:
    """Return FWT = sum_{i < j} acc[i, j] / (T (T-1) / 2), the mean of the upper triangle, in [0, 1].

    Source: Diaz-Rodriguez et al. 2018. Not a difference: chance scores above 0. NaN for T == 1.
    """
    matrix = _checked(acc)
    return _mean(matrix[np.triu_indices(len(matrix), 1)])


def fwt_independent(acc: Matrix, independent: Vector) -> float:
    """Return FWT = 1/(T-1) sum_{j >= 1} (acc[j, j] - independent[j]), in [-1, 1].

    Args:
        acc: (T, T).
        independent: (T,), accuracy on task j of a model trained on task j alone. The first entry is not used.
    """
    matrix = _checked(acc)
    return _mean((np.diag(matrix) - _vector(independent, len(matrix), "independent"))[1:])


def transfer_to_last(acc: Matrix, alone: float) -> float:
    """Return acc[T-1, T-1] - alone, `alone` = accuracy on the last task of a model trained on it alone.

    Source: Veniat et al. 2021 (CTrL). In [-1, 1].
    """
    return float(_checked(acc)[-1, -1]) - alone


def intransigence(acc: Matrix, reference: Vector) -> Vector:
    """Return I (T,): I[k] = reference[k] - acc[k, k], in [-1, 1]; positive means that task k was learned less well.

    Args:
        acc: (T, T).
        reference: (T,), accuracy on task k of a model trained on tasks 0..k together (the diagonal of a joint run).

    Source: Chaudhry et al. 2018 (RWalk); the paper reports the last entry.
    """
    matrix = _checked(acc)
    return np.asarray(_vector(reference, len(matrix), "reference") - np.diag(matrix))


def omega_base(acc: Matrix, offline: float) -> float:
    """Return 1/(T-1) sum_{i >= 1} acc[i, 0] / offline: how much of the first task is kept.

    `offline` is the accuracy of a model trained on everything at once. Attributed to Kemker et al. 2018.
    """
    return _mean(_checked(acc)[1:, 0] / offline)


def omega_all(acc: Matrix, offline: float) -> float:
    """Return 1/(T-1) sum_{i >= 1} A_i / offline, A_i = mean accuracy of the tasks seen. See `omega_base`."""
    return _mean(accuracy_of_seen(acc)[1:] / offline)


# ---------------------------------------------------------------------------------------------------------------- cost


def model_size_efficiency(sizes: Sequence[float]) -> float:
    """Return MS = min(1, 1/T sum_i sizes[0] / sizes[i]), in (0, 1]; `sizes` (T,) of the model after each task.

    It rewards allocating everything beforehand: a fixed net of any size scores 1. Never show it without the sizes.
    Source: Diaz-Rodriguez et al. 2018.
    """
    values = np.asarray(sizes, dtype=np.float64)
    return min(1.0, _mean(values[:1] / values))


def samples_storage_efficiency(stored: Sequence[float], dataset: float) -> float:
    """Return SSS = 1 - min(1, 1/T sum_i stored[i] / dataset), in [0, 1]; 1 means that no sample is kept.

    `stored` (T,) is the size of the replay memory after each task, `dataset` that of all training data, in one unit.
    Source: Diaz-Rodriguez et al. 2018.
    """
    return 1.0 - min(1.0, _mean(np.asarray(stored, dtype=np.float64) / dataset))


def relative_capacity(parameters: float, single_task: float) -> float:
    """Return parameters after the last task / those of one task's net, as a ratio. Source: Yoon et al. 2018 (DEN)."""
    return parameters / single_task if single_task else NAN


def compression_ratio(kept: float, target: float) -> float:
    """Return (weights of a hypernetwork and its task embeddings) / (weights it generates). Source: von Oswald 2020."""
    return kept / target if target else NAN


def cl_score(criteria: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return sum_i w_i c_i over criteria in [0, 1]; ValueError unless the weights name them all and sum to 1.

    Source: Diaz-Rodriguez et al. 2018.
    """
    if set(criteria) != set(weights):
        raise ValueError(f"criteria {sorted(criteria)} and weights {sorted(weights)} differ")
    if not np.isclose(sum(weights.values()), 1.0):
        raise ValueError(f"weights sum to {sum(weights.values())}, not 1")
    return float(sum(weights[name] * criteria[name] for name in criteria))


def cl_stability(deviations: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """Return 1 - sum_i w_i sd(c_i), standard deviations of the criteria over runs. See `cl_score`."""
    return 1.0 - cl_score(deviations, weights)


# ------------------------------------------------------------------------------------------------------------ registry


@dataclass(frozen=True)
class Metric:
    """One number per run, from its accuracy matrix and its accuracies before training."""

    name: str
    """Public dotted name; recipes' published rows use it."""
    label: str
    """Head of a table's column."""
    function: Callable[..., float]
    """Of `acc`, or of `acc` and `acc_init` where `needs_init`."""
    higher_is_better: bool
    definition: str
    """One sentence with the formula, for captions. a = acc counted from 1, b = acc_init."""
    source: str
    needs_init: bool = False
    unit: str = "fraction"

    def __call__(self, acc: Matrix, acc_init: Vector) -> float:
        """Return the metric of one run; `acc` (T, T), `acc_init` (T,)."""
        return self.function(acc, acc_init) if self.needs_init else self.function(acc)


_GEM = "GEM, Lopez-Paz & Ranzato 2017"
_DIAZ = "Diaz-Rodriguez et al. 2018"

_ALL = (
    Metric(
        "average_accuracy", "ACC", average_accuracy, True,
        "ACC = 1/T sum_j a[T,j], accuracy after the last task", _GEM,
    ),
    Metric(
        "average_incremental_accuracy", "AIA", average_incremental_accuracy, True,
        "AIA = 1/T sum_i A_i, A_i = mean accuracy of the tasks seen after task i, each weighing the same",
        "iCaRL, Rebuffi et al. 2017",
    ),
    Metric(
        "learning_accuracy", "LA", learning_accuracy, True,
        "LA = 1/T sum_j a[j,j], accuracy just after learning a task", "attributed to MER, Riemer et al. 2019",
    ),
    Metric(
        "accuracy_lower_triangle", "A (lower)", accuracy_lower_triangle, True,
        "A = mean of a[i,j] over i >= j", _DIAZ,
    ),
    Metric(
        "forgetting.chaudhry2018", "Forgetting", forgetting_chaudhry2018, False,
        "forgetting = mean over j < T of (max over l < T of a[l,j]) - a[T,j]", "RWalk, Chaudhry et al. 2018",
    ),
    Metric(
        "forgetting.facil", "Forgetting (seen)", forgetting_facil, False,
        "forgetting = mean over j < T of (max over j <= l < T of a[l,j]) - a[T,j]", "FACIL, Renate",
    ),
    Metric(
        "forgetting.max_with_last", "Forgetting (max)", forgetting_max_with_last, False,
        "forgetting = mean over j < T of (max over l <= T of a[l,j]) - a[T,j], never negative",
        "Mammoth, PyCIL, CL-Gym",
    ),
    Metric(
        "forgetting.first_minus_last", "Forgetting (first)", forgetting_first_minus_last, False,
        "forgetting = mean over j < T of a[j,j] - a[T,j]", "Avalanche",
    ),
    Metric(
        "bwt.gem", "BWT", bwt_gem, True,
        "BWT = mean over j < T of a[T,j] - a[j,j]", _GEM,
    ),
    Metric(
        "bwt.diaz_rodriguez2018", "BWT (history)", bwt_diaz_rodriguez, True,
        "BWT = mean over i > j of a[i,j] - a[j,j]", _DIAZ,
    ),
    Metric("bwt.remembering", "REM", remembering, True, "REM = 1 - |min(BWT, 0)|, BWT over the whole history", _DIAZ),
    Metric("bwt.plus", "BWT+", bwt_plus, True, "BWT+ = max(BWT, 0), BWT over the whole history", _DIAZ),
    Metric(
        "fwt.gem", "FWT", fwt_gem, True,
        "FWT = mean over j > 1 of a[j-1,j] - b[j], b = accuracy before any training", _GEM, needs_init=True,
    ),
    Metric(
        "fwt.diaz_rodriguez2018", "FWT (upper)", fwt_diaz_rodriguez, True,
        "FWT = mean over i < j of a[i,j]", _DIAZ,
    ),
)

METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}

NOT_COMPUTED: dict[str, str] = {
    "LCA": "learning-curve area: needs accuracy after every batch of a task",
    "anytime accuracy": "accounts differ on which evaluations; at task ends it is average_incremental_accuracy",
    "CE": "computational efficiency: needs the operations of every task's training",
    "AUC-A, AUC-L": "need one method at several memory budgets",
    "omega_new": "accounts differ on whether it is divided by the offline accuracy",
}


def compute(name: str, acc: Matrix, acc_init: Vector) -> float:
    """Return the metric called `name` of one run.

    Args:
        name: a key of `METRICS`.
        acc: (T, T), fractions.
        acc_init: (T,), fractions.

    Returns:
        The value in the metric's own unit (fractions, not percent); NaN where it is undefined, such as for T == 1.

    Raises:
        KeyError: no such metric.
        ValueError: `acc` or `acc_init` is malformed.
    """
    if name not in METRICS:
        raise KeyError(f"unknown metric '{name}'. Known: {', '.join(sorted(METRICS))}")
    return METRICS[name](acc, acc_init)
