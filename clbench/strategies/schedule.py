"""The learning rate over the epochs of a task: in steps, on plateaus, in cycles with warm restarts."""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi

import torch

from clbench.specs import PlateauSchedule, RestartSchedule, StepSchedule, TrainSpec


class Schedule:
    """The learning rate over the epochs of one task."""

    def __init__(self, train: TrainSpec, optimizer: torch.optim.Optimizer) -> None:
        self.spec = train.schedule
        self.optimizer = optimizer
        self.lr = train.lr
        self.epoch = 0
        self.best = float("inf")
        self.bad_epochs = 0
        if isinstance(self.spec, RestartSchedule):
            self._set(restart_rate(self.spec, self.lr, 0))

    def step(self, validation_loss: Callable[[], float]) -> bool:
        """Close an epoch; return whether to go on. `validation_loss` is asked only where the schedule needs it."""
        self.epoch += 1
        if isinstance(self.spec, StepSchedule) and self.epoch in self.spec.milestones:
            self._scale(self.spec.gamma)
        if isinstance(self.spec, RestartSchedule):
            self._set(restart_rate(self.spec, self.lr, self.epoch))
        if isinstance(self.spec, PlateauSchedule):
            loss = validation_loss()
            self.bad_epochs = 0 if loss < self.best else self.bad_epochs + 1
            self.best = min(self.best, loss)
            if self.bad_epochs >= self.spec.patience:
                self.bad_epochs = 0
                self._scale(self.spec.factor)
                return bool(self.optimizer.param_groups[0]["lr"] >= self.spec.min_lr)
        return True

    def _scale(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def _set(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr


def restart_rate(spec: RestartSchedule, lr: float, epoch: int) -> float:
    """Return the learning rate of an epoch, the first of which is 0."""
    if epoch < spec.warmup:
        return lr / 10
    # Cycles of 1, 2, 4, ... epochs: before the one of n there were n - 1.
    done = epoch - spec.warmup
    length = 1 << ((done + 1).bit_length() - 1)
    return spec.min_lr + (lr - spec.min_lr) * (1 + cos(pi * (done + 1 - length) / length)) / 2
