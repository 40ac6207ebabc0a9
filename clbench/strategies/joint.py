"""Joint training on all tasks so far: the upper bound that keeps every sample.

Paper      none; "offline", "multitask" or "cumulative" elsewhere.
Departs    papers often train once, on all tasks together; here the net after task i has seen tasks 1 to i, so that the
           accuracy matrix has every row. Its last row is the papers' number. A task that comes again adds nothing: it
           is in the union already.
Stores     every training sample seen, counted as replay; a checkpoint leaves them out, the stream has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from avalanche.benchmarks.scenarios import DatasetExperience

from clbench.footprint import Holdings
from clbench.loading import TensorTask, tasks_in
from clbench.strategies.base import Setup, Strategy, new_optimizer


class Joint(Strategy):
    """Trains on the union of all tasks seen, shuffled."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of joint training."""

        restart: bool = True
        """Start every task from a freshly initialised net; False goes on with the last one."""

    stores: ClassVar[tuple[str, ...]] = ("observed",)

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.seen: list[TensorTask] = []
        self.held_out: list[TensorTask] = []
        """Validation samples of every task seen."""
        self.observed: list[tuple[int, list[int]]] = []
        """Task label and classes of every task seen, to give a fresh net its heads."""

    def before_task(self, experience: DatasetExperience) -> None:
        """Take the task's samples in; start from a fresh net."""
        self._take_in(experience)
        self.observed.append((self.task_label, self.task_classes))
        if self.config.restart:
            self.model = self.setup.new_net().to(self.device)
            for label, classes in self.observed:
                self.model.observe(label, classes)
            # The old net's optimiser state is of no use to a fresh one, whatever the budget says of resets.
            self.optimizer = new_optimizer(self.setup.train, self.model.parameters())

    def training_data(self, experience: DatasetExperience) -> list[TensorTask]:
        """Return every task seen."""
        return self.seen

    def validation_data(self) -> list[TensorTask]:
        """Return the samples set aside of every task seen."""
        return self.held_out

    def holdings(self) -> Holdings:
        """Count every sample seen as replay."""
        samples = sum(len(task) for task in self.seen)
        size = sum(len(task) * task.bytes_per_sample for task in self.seen)
        return replace(super().holdings(), replay_samples=samples, replay_extra_bytes=size)

    def load_state_dict(self, state: Mapping[str, Any], past: Sequence[DatasetExperience] = ()) -> None:
        """Take up the state; the samples themselves come from the experiences."""
        super().load_state_dict(state, past)
        self.seen, self.held_out = [], []
        for experience in past:
            self._take_in(experience)

    def _take_in(self, experience: DatasetExperience) -> None:
        self.seen += [task for task in tasks_in(experience.dataset) if not any(_same(task, old) for old in self.seen)]
        held_out = getattr(experience, "validation", None)
        if held_out is not None and not any(_same(held_out, old) for old in self.held_out):
            self.held_out.append(held_out)


def _same(left: TensorTask, right: TensorTask) -> bool:
    """Whether two tasks are the same samples, seen and labelled the same way."""
    if left.images is not right.images or left.view is not right.view or left.task != right.task:
        return False
    return torch.equal(left.rows, right.rows) and torch.equal(left.labels, right.labels)
