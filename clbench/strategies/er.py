"""Experience replay (ER): train on the current batch and a batch from a small memory of the past, as one.

Paper      Chaudhry et al. 2019, "On tiny episodic memories in continual learning", arXiv:1902.10486 (reservoir, ring);
           Vitter 1985 for the reservoir.
Method     for each batch of the current task: draw a batch from the memory, take one step on the mean loss over both,
           then offer the current batch to the memory (once: in the task's first pass over its data).
Departs    reservoir: nothing. ring: the paper knows the number of classes ahead and leaves room for those to come; here
           those seen so far share all of it. class_balanced is not in the paper: a ring's shares, random within a
           class. With more than one pass over the data the paper says nothing: only the first one fills the memory.
Stores     up to `buffer` samples, uint8 as the learner sees them, with label and task.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor

from clbench.footprint import Holdings
from clbench.loading import Batch, tasks_in
from clbench.strategies.base import Setup, Strategy
from clbench.strategies.buffer import Buffer, Policy


class ER(Strategy):
    """Experience replay with one of three memories."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of experience replay."""

        buffer: Annotated[int, Field(gt=0)]
        """Samples kept in all."""
        policy: Policy
        """How the memory is filled."""
        replay_batch_size: Annotated[int, Field(gt=0)]
        """Samples drawn from the memory for each batch."""

    stores: ClassVar[tuple[str, ...]] = ("memory",)
    sized_by: ClassVar[tuple[str, ...]] = ("buffer", "width")

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.memory = Buffer(config.buffer, config.policy, self.chance)
        self._to_offer = 0
        """Samples of the current task that the memory has not seen."""

    def before_task(self, experience: DatasetExperience) -> None:
        """Open the memory to the task."""
        tasks = tasks_in(experience.dataset)
        self.memory.open(tasks[0])
        if len(tasks) > 1:
            raise NotImplementedError("ER takes tasks from one data set each, this one strings several together")
        self._to_offer = len(tasks[0])

    def rehearse(self, batch: Batch) -> Batch:
        """Add samples from the memory, then offer it the current ones."""
        joined = _joined(batch, self.memory.draw(self.config.replay_batch_size)) if len(self.memory) else batch
        if self._to_offer > 0 and batch.source is not None and batch.rows is not None:
            self.memory.offer(batch.source, batch.rows, self.tasks_seen)
            self._to_offer -= len(batch.y)
        return joined

    def holdings(self) -> Holdings:
        """The memory is replay, not auxiliary state."""
        return replace(
            super().holdings(), auxiliary={}, replay=self.memory.state_dict(), replay_samples=len(self.memory)
        )


def _joined(current: Batch, past: Batch) -> Batch:
    """Return both batches as one; the task stays one number where both agree on it (one pass through one head)."""
    x, y = torch.cat([current.x, past.x]), torch.cat([current.y, past.y])
    if isinstance(current.t, int) and isinstance(past.t, int) and current.t == past.t:
        return Batch(x, y, current.t)
    return Batch(x, y, torch.cat([_task_column(current), _task_column(past)]))


def _task_column(batch: Batch) -> Tensor:
    return torch.full_like(batch.y, batch.t) if isinstance(batch.t, int) else batch.t
