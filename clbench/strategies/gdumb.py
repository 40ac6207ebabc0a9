"""GDumb, greedy sampler and dumb learner: keep samples as they come, class by class alike; train on them from scratch.

Paper      Prabhu, Torr & Dokania 2020, "GDumb: a simple approach that questions our progress in continual learning",
           ECCV.
Checked    against results and settings of the authors' repository, drimpossible/GDumb (GPL-3: no code of it is here).
Method     sampler: with n classes seen, a sample of a class that has fewer than buffer / n in the memory is kept. Where
           there is no place left, a random sample of a largest class goes for it. Every other sample is passed over.
           learner: when it is asked (here, after every task), a fresh net is trained on the memory alone, for the
           protocol's budget. Nothing else is learned from the stream.
Departs    A task's samples come shuffled; the authors' code takes the first buffer / n samples of each class as its
           data set lists them, n the number of all classes, and reports the best test accuracy over its passes; here it
           is that of the last pass. With one head per task a sample trains its own task's head, where the code masks
           one head's classes. Domain-incremental streams are refused: the first task's samples have every class's
           share, and none of another task would ever come in.
Stores     up to `buffer` samples, uint8 as the learner sees them, with label and task, and the net that answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field

from clbench.footprint import Holdings
from clbench.loading import tasks_in
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy, new_optimizer
from clbench.strategies.buffer import Buffer


class GDumb(Strategy):
    """A greedy memory, and a net trained on it from scratch after every task."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of GDumb."""

        buffer: Annotated[int, Field(gt=0)]
        """Samples kept in all."""

    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"task", "class"})
    stores: ClassVar[tuple[str, ...]] = ("memory", "observed")
    sized_by: ClassVar[tuple[str, ...]] = ("buffer", "width")

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.memory = Buffer(config.buffer, "greedy", self.chance)
        self.observed: list[tuple[int, list[int]]] = []
        """Task label and classes of every task seen, to give a fresh net its heads."""

    def train_task(self, experience: DatasetExperience) -> None:
        """Let the sampler see the task once, then start a learner on what it kept."""
        self.begin_task(experience)
        self.observed.append((self.task_label, self.task_classes))
        for task in tasks_in(experience.dataset):
            order = torch.randperm(len(task), generator=self.order)
            # A class of one task label has one share, whichever tasks it comes in.
            self.memory.offer(task, order.to(task.rows.device), visit=self.task_label)
        self.model = self.setup.new_net().to(self.device)
        for label, classes in self.observed:
            self.model.observe(label, classes)
        self.optimizer = new_optimizer(self.setup.train, self.model.parameters())
        self.fit(self.memory.beside(0), self.chance)
        self.end_task()

    def holdings(self) -> Holdings:
        """The memory is replay, not auxiliary state."""
        return replace(
            super().holdings(), auxiliary={}, replay=self.memory.state_dict(), replay_samples=len(self.memory)
        )
