"""Naive rehearsal: every task is trained on together with the samples kept of earlier ones, as one data set.

Paper      Hsu, Liu, Ramasamy & Kira 2018, "Re-evaluating continual learning scenarios", arXiv:1810.12488.
Checked    against the authors' code, GT-RIPL/Continual-Learning-Benchmark (MIT licence), agents/exp_replay.py.
Method     a pass goes, shuffled, over the N samples of the task and over the memory as often as all of it fits into N
           (`buffer` = 1100 and N = 12,000: ten times), at least once. After the task the memory's room is shared anew:
           samples of the task come in at random, as many of the others go at random.
Departs    the room is shared equally by the classes of the tasks so far, where the authors share it by tasks. A budget
           in iterations is kept to: a task gets no more steps for what is replayed. Under one in epochs it does.
Stores     up to `buffer` samples, uint8 as the learner sees them, with label and task.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field

from clbench.footprint import Holdings
from clbench.loading import TensorTask, tasks_in
from clbench.strategies.base import Setup, Strategy
from clbench.strategies.buffer import Buffer


class Rehearsal(Strategy):
    """Trains on the task and the memory, shuffled together."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of naive rehearsal."""

        buffer: Annotated[int, Field(gt=0)]
        """Samples kept in all."""

    stores: ClassVar[tuple[str, ...]] = ("memory",)
    sized_by: ClassVar[tuple[str, ...]] = ("buffer", "width")

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.memory = Buffer(config.buffer, "class_balanced", self.chance)

    def before_task(self, experience: DatasetExperience) -> None:
        """Let the memory know how the task's samples are normalised and augmented."""
        for task in tasks_in(experience.dataset):
            self.memory.open(task)

    def training_data(self, experience: DatasetExperience) -> list[TensorTask]:
        """Return the task and the memory, the latter as often as it fits."""
        tasks = tasks_in(experience.dataset)
        return tasks + self.memory.beside(sum(len(task) for task in tasks))

    def after_task(self, experience: DatasetExperience) -> None:
        """Offer the memory every sample of the task, in an order of its own."""
        for task in tasks_in(experience.dataset):
            order = torch.randperm(len(task), generator=self.chance)
            self.memory.offer(task, order.to(task.rows.device), self.tasks_seen)

    def holdings(self) -> Holdings:
        """The memory is replay, not auxiliary state."""
        return replace(
            super().holdings(), auxiliary={}, replay=self.memory.state_dict(), replay_samples=len(self.memory)
        )
