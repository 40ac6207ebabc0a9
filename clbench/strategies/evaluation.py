"""What one pass over a task's test samples yields: accuracy and, where it is asked for, the area under the ROC curve.

And the accuracy where the task is not named but inferred, as HNET+ENT does (von Oswald et al. 2020, "Continual learning
with hypernetworks", ICLR, arXiv:1906.00695): a sample is answered as if it were of each task learned, and the answer
with the lowest entropy is taken. A wrong task is a wrong answer. The papers' tasks all have as many classes; where they
do not, see `least_entropy`.

Letters: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clbench.metrics import auroc
from clbench.nets.heads import ABSENT_LOGIT


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


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy (B,) of the softmax of logits (B, C), in nats, float64.

    In float32 confident answers would tie. The code of Henning et al. 2021 takes the logarithm of no less than 1e-5,
    which orders answers of two classes alike, and confident ones of more classes a little otherwise.
    """
    found = log_probabilities(logits)
    return -(found.exp() * found).sum(dim=1)


def least_entropy(answers: Sequence[Tensor]) -> Tensor:
    """Return which of several answers (B, C_k) to a batch has the lowest entropy, (B,); the first of equal ones.

    Where answers are over unequal numbers of classes, each entropy is taken as a share of log C_k, the most there is:
    else the task of fewest classes would look surest. An answer over one class says nothing, and counts as unsure.
    """
    found = torch.stack([entropy(logits) for logits in answers])
    classes = torch.stack([(logits > ABSENT_LOGIT).sum(dim=1) for logits in answers])
    if not bool((classes == classes[0]).all()):
        found = torch.where(classes > 1, found / classes.log(), 1.0)
    return found.argmin(dim=0)


def accuracy_by_entropy(
    batches: Iterable[tuple[Any, ...]], answer: Callable[[Tensor, int], Tensor], tasks: Sequence[int], own: int
) -> float:
    """Return the share of a task's samples answered rightly by the task inferred for each.

    Args:
        batches: inputs (B, ...) and labels (B,) of the task first.
        answer: from inputs and a task to logits (B, C).
        tasks: among which it is inferred.
        own: the samples' task; where it is not among them, none is answered rightly.
    """
    right = count = 0
    for x, y, *_ in batches:
        count += len(y)
        if own in tasks:
            answers = [answer(x, task) for task in tasks]
            place = tasks.index(own)
            right += int(((least_entropy(answers) == place) & (answers[place].argmax(dim=1) == y)).sum())
    return right / count
