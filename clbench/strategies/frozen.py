"""Frozen features: learn the trunk on the first task, then train heads only.

Paper      none; "feature extraction" in Li & Hoiem 2016 (LwF). The bound for what later tasks gain from plasticity.
Departs    nothing. With a head shared by all tasks (domain-incremental) that head still forgets.
Stores     nothing.
"""

from __future__ import annotations

from avalanche.benchmarks.scenarios import DatasetExperience

from clbench.loading import Batch
from clbench.strategies.base import Strategy


class Frozen(Strategy):
    """Freezes the trunk, its normalisation statistics included, after the first task."""

    def after_task(self, experience: DatasetExperience) -> None:
        """Freeze everything below the head; an optimiser that lives on forgets it."""
        for parameter in self.model.trunk.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
            self.optimizer.state.pop(parameter, None)

    def train_step(self, batch: Batch) -> None:
        """Keep a frozen trunk in evaluation mode: batch statistics and dropout are part of the features."""
        if self.tasks_seen and self.model.trunk.training:
            self.model.trunk.eval()
        super().train_step(batch)
