"""Parts of a record that came after the first ones: origin of a foreign result, operations, accuracies within a task.

Letters: T tasks.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """Base of every part of a record: fixed, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Imported(Part):
    """Where a record comes from that another tool made: its accuracies are that tool's, its scores are ours."""

    tool: str
    file: str
    """Name, without folders."""
    sha256: str
    """Of the file's bytes."""
    run: int = 1
    """Which of the file's runs, from 1."""
    scale: str
    """What the file's numbers were: "percent" or "fraction"."""
    told: dict[str, float] = Field(default_factory=dict)
    """The file's own scores by its own names, as fractions."""
    notes: list[str] = Field(default_factory=list)
    """What there was to say of the file, a line each."""


class Flops(Part):
    """Floating-point operations after one task; `clbench.flops` says what is counted. Unknown is None, never 0."""

    step: int | None
    """Of one training step, of the kind that there were most of."""
    step_samples: int
    """Samples that went through it, replayed ones included."""
    steps: int
    """Training steps of the task, all phases."""
    train: int | None
    """Of all of them."""
    answer: int | None
    """Of one answer to one sample of the task, alone in its batch, after the task was learned."""
    why: str = ""
    """Why something is None."""


class Within(Part):
    """Accuracies while one task was in training, on the test samples of `acc`."""

    every: int
    """Training iterations between two evaluations, N."""
    iterations: int
    """Of the task, all phases."""
    acc: list[list[float]]
    """(K, tasks seen): acc[k][j] = accuracy on task j after iteration (k + 1) N of the task, in [0, 1]."""

    @property
    def at(self) -> range:
        """The iterations of the task after which it was evaluated, (K,)."""
        return range(self.every, self.iterations + 1, self.every)


def null_to_nan(value: Any) -> Any:
    """Return numbers in nested lists with NaN for None: JSON has no NaN."""
    if isinstance(value, list):
        return [null_to_nan(item) for item in value]
    return math.nan if value is None else value


def nan_to_null(value: Any) -> Any:
    """Return numbers in nested lists with None for NaN."""
    if isinstance(value, list):
        return [nan_to_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
