"""Metrics of continual evaluation: what happens to old tasks while a later one is in training.

Shapes: T tasks. `acc` is (T, T) as in `clbench.metrics`. `within` has T entries, the i-th of them (K, i + 1), fractions
in [0, 1]: within[i][k, j] = test accuracy on task j <= i at the k-th evaluation during the training of task i; an entry
may have no row (K = 0).

Source of both: De Lange, van de Ven & Tuytelaars 2023, "Continual evaluation for lifelong learning: identifying the
stability gap", ICLR, arXiv:2205.13452. They evaluate after every iteration; with fewer evaluations a fall and recovery
between two of them goes unseen: both metrics are never lower for a multiple of N, mostly higher. Evaluations after a
task count among them: its row of `acc` is what the method answers then, whatever it did after the last iteration.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clbench.metrics import NAN, Matrix, Vector


def lowest(acc: Matrix, within: Sequence[NDArray[np.float64]]) -> Vector:
    """Return, for every task but the last, its lowest accuracy at any evaluation after it was learned, (T - 1,).

    Raises:
        ValueError: `within` is not of this run's tasks.
    """
    matrix = np.asarray(acc, dtype=np.float64)
    if len(within) != len(matrix) or any(rows.shape[1:] != (i + 1,) for i, rows in enumerate(within)):
        raise ValueError(f"within has shapes {[rows.shape for rows in within]} for {len(matrix)} tasks")
    later = range(1, len(matrix))
    seen = [[min([*within[i][:, j], matrix[i, j]]) for i in later if i > j] for j in range(len(matrix) - 1)]
    return np.array([min(values) for values in seen])


def min_acc(acc: Matrix, within: Sequence[NDArray[np.float64]]) -> float:
    """Return min-ACC = mean over j < T-1 of the lowest accuracy on task j after it was learned, in [0, 1].

    NaN for T == 1. The paper's equation for its last iteration.
    """
    values = lowest(acc, within)
    return float(values.mean()) if values.size else NAN


def wc_acc(acc: Matrix, within: Sequence[NDArray[np.float64]]) -> float:
    """Return WC-ACC = 1/T acc[T-1, T-1] + (1 - 1/T) min-ACC, in [0, 1]: never above the average accuracy.

    For T == 1 the accuracy on the only task. The paper's equation for its last iteration.
    """
    size = len(acc)
    current = float(acc[-1, -1])
    return current if size == 1 else current / size + (1 - 1 / size) * min_acc(acc, within)
