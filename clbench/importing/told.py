"""A tool's own score beside ours: which of our definitions it is, if any.

Libraries give different numbers under one name (`clbench.metrics` says whose is whose). Mammoth and PyCIL clip
forgetting at zero, task by task; Avalanche takes the first accuracy for the best; PyCIL sorts the names of its tasks as
text, so that past 100 classes its columns are those of other tasks.

Letters: T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from clbench.metrics import Matrix, compute, forgetting_facil

OURS = "forgetting.chaudhry2018"
TOLERANCE = 6e-4
"""As fractions: what two decimals of a percent, or three of a fraction, may be off, with a little to spare."""

_CANDIDATES: dict[str, tuple[str, ...]] = {
    "forgetting": (OURS, "forgetting.max_with_last", "forgetting.first_minus_last"),
    "bwt": ("bwt.gem", "bwt.diaz_rodriguez2018"),
    "accuracy": ("average_accuracy", "average_incremental_accuracy", "accuracy_lower_triangle"),
}
_SAYS = {
    "forgetting.max_with_last": "never negative, a task that improved counts as 0",
    "forgetting.first_minus_last": "first minus last, a later best does not count",
}


def remarks(told: Mapping[str, float], acc: Sequence[Sequence[float]], labels: Sequence[str] = ()) -> list[str]:
    """Return a line for each of a tool's own scores: ours of the same name, and which definition agrees.

    Args:
        told: by the tool's own names, fractions.
        acc: (T, T), fractions; NaN above the diagonal where nothing was measured.
        labels: what the file calls the tasks, in the order of the stream.
    """
    matrix = np.asarray(acc, dtype=np.float64)
    lines = []
    for name, value in told.items():
        kind = _kind(name)
        if kind is None:
            lines.append(f"its own '{name}' ({_percent(value)}) is no score of ours")
            continue
        found = {key: compute(key, matrix, np.full(len(matrix), math.nan)) for key in _CANDIDATES[kind]}
        usual = _CANDIDATES[kind][0]
        agree = [key for key, ours in found.items() if abs(ours - value) <= TOLERANCE]
        if kind == "forgetting" and not agree:
            if abs(forgetting_facil(matrix) - value) <= TOLERANCE:
                agree = [f"{usual} over learned tasks alone"]
            elif abs(_sorted_as_text(matrix, labels) - value) <= TOLERANCE:
                agree = ["forgetting.max_with_last with the tasks' names sorted as text, which mixes up its columns"]
        start = f"its own {name} {_percent(value)}"
        if usual in agree:
            lines.append(f"{start} is ours ({usual})")
        elif agree:
            what = f" ({_SAYS[agree[0]]})" if agree[0] in _SAYS else ""
            lines.append(f"{start} is {agree[0]}{what}; {usual} is {_percent(found[usual])}")
        else:
            ours = ", ".join(f"{key} {_percent(score)}" for key, score in found.items())
            lines.append(f"{start} is none of ours: {ours}")
    return lines


def _kind(name: str) -> str | None:
    plain = name.lower().replace("_", " ")
    if "forgetting" in plain:
        return "forgetting"
    if plain in ("bwt", "backward transfer"):
        return "bwt"
    return "accuracy" if plain in ("average accuracy", "acc", "accuracy") else None


def _sorted_as_text(matrix: Matrix, labels: Sequence[str]) -> float:
    """Return `forgetting.max_with_last` as it comes out when every row is sorted by its tasks' names as text."""
    size = len(matrix)
    if len(labels) != size or size == 1:
        return math.nan
    rows = np.zeros_like(matrix)
    for i in range(size):
        order = sorted(range(i + 1), key=lambda j: labels[j])
        rows[i, : i + 1] = matrix[i, order]
    # As PyCIL does: what is not there counts as 0.
    return float((rows.max(axis=0) - rows[-1])[:-1].mean())


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
