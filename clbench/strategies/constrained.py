"""The base of methods that change a step's gradient so that it does not raise the loss on samples of past tasks.

GEM and A-GEM keep some samples of every task when it ends, take gradients on them beside that of the current batch, and
compare them as vectors. What they do with the comparison is their own.

Letters: P parameters, in the order of `model.parameters()`, heads of every task included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from torch import Tensor
from torch.nn import functional as F

from clbench.footprint import Holdings
from clbench.loading import Batch, TensorTask, tasks_in
from clbench.strategies.base import Strategy
from clbench.strategies.buffer import Buffer


class Constrained(Strategy):
    """Keeps samples of past tasks, and has gradients as vectors."""

    memory: Buffer
    stores: ClassVar[tuple[str, ...]] = ("memory",)
    sized_by: ClassVar[tuple[str, ...]] = ("buffer", "width")

    def before_task(self, experience: DatasetExperience) -> None:
        """Let the memory know how the task's samples are normalised and augmented."""
        for task in tasks_in(experience.dataset):
            self.memory.open(task)

    def keep(self, experience: DatasetExperience, count: int, balanced: bool = False) -> None:
        """Offer the memory `count` samples of a task, at random; all of them with 0.

        Args:
            experience: the task.
            count: how many.
            balanced: as many of each class as the count allows, those at random.
        """
        for task in tasks_in(experience.dataset):
            order = torch.randperm(len(task), generator=self.chance)
            if balanced:
                order = order[by_turns(task, order)]
            self.memory.offer(task, order[: count or len(task)].to(task.rows.device), self.tasks_seen)

    def gradient_on(self, past: Batch) -> Tensor:
        """Return the gradient of the mean cross-entropy on a batch, (P,); the parameters' own gradients stay."""
        parameters = list(self.model.parameters())
        loss = F.cross_entropy(self.model(past.x, past.t), past.y)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        self.samples_trained += len(past.y)
        return _as_vector(parameters, found)

    def gradient(self) -> Tensor:
        """Return the gradient of the last backward pass, (P,); zeros for parameters that had no part in it."""
        parameters = list(self.model.parameters())
        return _as_vector(parameters, [parameter.grad for parameter in parameters])

    def set_gradient(self, vector: Tensor) -> None:
        """Put a gradient (P,) in place of that of the last backward pass.

        A parameter that had no part in it, such as another task's head, gets a gradient only where there is one.
        """
        start = 0
        for parameter in self.model.parameters():
            piece = vector[start : start + parameter.numel()].view_as(parameter)
            start += parameter.numel()
            if parameter.grad is not None:
                parameter.grad.copy_(piece)
            elif bool(piece.any()):
                parameter.grad = piece.clone()

    def holdings(self) -> Holdings:
        """The memory is replay, not auxiliary state."""
        return replace(
            super().holdings(), auxiliary={}, replay=self.memory.state_dict(), replay_samples=len(self.memory)
        )


def by_turns(task: TensorTask, order: Tensor) -> Tensor:
    """Return the positions of `order` (N,), samples of a task, so that its classes take turns: (N,) int64.

    The first samples of all classes come first, then the second ones, each time in the order given.
    """
    labels = task.labels.to(order.device)[order]
    turn = torch.zeros_like(labels)
    for label in torch.unique(labels):
        mine = labels == label
        turn[mine] = torch.arange(int(mine.sum()))
    return turn.argsort(stable=True)


def _as_vector(parameters: Sequence[torch.nn.Parameter], gradients: Sequence[Tensor | None]) -> Tensor:
    pairs = zip(parameters, gradients, strict=True)
    return torch.cat([(torch.zeros_like(own) if found is None else found).reshape(-1) for own, found in pairs])
