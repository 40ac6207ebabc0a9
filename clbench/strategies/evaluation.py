"""What one pass over a task's test samples yields: accuracy and, where it is asked for, the area under the ROC curve.

Letters: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from clbench.metrics import auroc


@dataclass(frozen=True)
class Evaluation:
    """How well one task's samples are answered."""

    accuracy: float
    """Share answered rightly, in [0, 1]."""
    auroc: float | None
    """Mean one-against-rest area under the ROC curve (`metrics.auroc`); None where it was not asked for."""


class Tally:
    """Answers of one pass, batch by batch.

    Args:
        scores: turns logits (B, C) into what the AUROC ranks, (B, C); None counts right answers alone.
    """

    def __init__(self, scores: Callable[[Tensor], Tensor] | None) -> None:
        self._scores = scores
        self._right, self._count = 0, 0
        self._ranked: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch: logits (B, C), labels (B,). A label without a logit is never answered rightly."""
        self._right += int((logits.argmax(dim=1) == labels).sum())
        self._count += len(labels)
        if self._scores is not None:
            self._ranked.append(self._scores(logits).detach())
            self._labels.append(labels)

    def result(self) -> Evaluation:
        """Return what all batches give together."""
        area = None
        if self._scores is not None:
            area = auroc(torch.cat(self._ranked).cpu().numpy(), torch.cat(self._labels).cpu().numpy())
        return Evaluation(self._right / self._count, area)


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the log-softmax of logits (B, C), float64: in float32 confident answers would tie."""
    return torch.log_softmax(logits.double(), dim=1)
