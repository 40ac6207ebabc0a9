"""The learning rate over the epochs of one task."""

from __future__ import annotations

from collections.abc import Callable

import torch

from clbench.specs import PlateauSchedule, StepSchedule, TrainSpec


class Schedule:
    """Changes an optimiser's learning rate by a budget's schedule."""

    def __init__(self, train: TrainSpec, optimizer: torch.optim.Optimizer) -> None:
        self.spec = train.schedule
        self.optimizer = optimizer
        self.epoch = 0
        self.best = float("inf")
        self.bad_epochs = 0

    def step(self, validation_loss: Callable[[], float]) -> bool:
        """Close an epoch; return whether to go on. `validation_loss` is asked only where the schedule needs it."""
        self.epoch += 1
        if isinstance(self.spec, StepSchedule) and self.epoch in self.spec.milestones:
            self._scale(self.spec.gamma)
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
