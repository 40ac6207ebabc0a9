"""Joint training on all tasks so far: the upper bound that keeps every sample.

Paper      none; "offline", "multitask" or "cumulative" elsewhere.
Departs    papers often train once, on all tasks together; here the net after task i has seen tasks 1 to i, so that the
           accuracy matrix has every row. Its last row is the papers' number.
Stores     every training sample seen, counted as replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from avalanche.benchmarks.scenarios import DatasetExperience

from clbench.footprint import Holdings
from clbench.loading import TensorTask, tasks_in
from clbench.strategies.base import Setup, Strategy


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
        self.observed: list[tuple[int, list[int]]] = []
        """Task label and classes of every task seen, to give a fresh net its heads."""

    def before_task(self, experience: DatasetExperience) -> None:
        """Take the task's samples in; start from a fresh net."""
        self.seen += tasks_in(experience.dataset)
        self.observed.append((self.task_label, self.task_classes))
        if self.config.restart:
            self.model = self.setup.new_net().to(self.device)
            for label, classes in self.observed:
                self.model.observe(label, classes)
            self.refresh_optimizer()

    def training_data(self, experience: DatasetExperience) -> list[TensorTask]:
        """Return every task seen."""
        return self.seen

    def holdings(self) -> Holdings:
        """Count every sample seen as replay."""
        samples = sum(len(task) for task in self.seen)
        size = sum(len(task) * task.bytes_per_sample for task in self.seen)
        return replace(super().holdings(), replay_samples=samples, replay_extra_bytes=size)

    def load_state_dict(self, state: Mapping[str, Any], past: Sequence[DatasetExperience] = ()) -> None:
        """Take up the state; the samples themselves come from the experiences."""
        super().load_state_dict(state, past)
        self.seen = [task for experience in past for task in tasks_in(experience.dataset)]
