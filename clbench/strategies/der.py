"""Dark experience replay (DER and DER++): old samples are held to the logits the net once gave for them.

Paper      Buzzega, Boschini, Porrello, Abati & Calderara 2020, "Dark experience for general continual learning: a
           strong, simple baseline", NeurIPS, arXiv:2004.07211. DER is equation 5, DER++ equation 6.
Checked    against the authors' code, aimagelab/mammoth (MIT licence): models/der.py, models/derpp.py, utils/buffer.py.
Method     every step, on a batch B of the current task and, once there is a memory, two draws M', M'' from it:
               CE(h(B), y)  +  alpha * mean over M' of (h(x') - z')^2  +  beta * CE(h(M''), y'')
           with z' the logits that the net gave for x' when it was put into the memory, by the very forward pass it was
           trained with: from everywhere on the way through the tasks, not from their ends. Then the reservoir is
           offered B with its logits and labels. beta = 0 is DER. The squares are averaged over samples and logits, as
           in the code; the paper writes their sum.
Departs    With one head per task a sample has the logits of its own task's head, and the squares are averaged over
           those; the authors train one head for all classes and mask it to a task's when they test. A class-incremental
           stream needs all classes' logits from the start, as the authors' nets have them (class_head = "fixed"): were
           they born later, nothing would hold old samples back from new classes. A weight of 0 makes no draw.
Stores     up to `buffer` samples, uint8 as the learner sees them, with label, task and C float32 logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.footprint import Holdings
from clbench.loading import Batch, tasks_in
from clbench.nets import GrowingHead
from clbench.strategies.base import Setup, Strategy
from clbench.strategies.buffer import Buffer


class DER(Strategy):
    """DER, and with `beta` DER++."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of DER and DER++."""

        buffer: Annotated[int, Field(gt=0)]
        """Samples kept in all."""
        replay_batch_size: Annotated[int, Field(gt=0)]
        """Samples of each draw from the memory."""
        alpha: Annotated[float, Field(ge=0)]
        """Weight of the logits."""
        beta: Annotated[float, Field(ge=0)] = 0.0
        """Weight of the labels; DER++ has it."""

    stores: ClassVar[tuple[str, ...]] = ("memory",)
    sized_by: ClassVar[tuple[str, ...]] = ("buffer", "width")
    work_by_steps: ClassVar[bool] = True

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        if isinstance(self.model.head, GrowingHead):
            raise UserError("DER keeps logits of all classes: class-incremental, it needs --set model.class_head=fixed")
        self.memory = Buffer(config.buffer, "reservoir", self.chance)
        self.given: Tensor | None = None
        """Logits of the current batch, (B, C), until the memory has been offered it."""

    def before_task(self, experience: DatasetExperience) -> None:
        """Let the memory know how the task's samples are normalised and augmented."""
        for task in tasks_in(experience.dataset):
            self.memory.open(task)

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the loss on the current batch and on both draws from the memory."""
        logits = self.model(batch.x, batch.t)
        self.given = logits.detach()
        loss = F.cross_entropy(logits, batch.y)
        if len(self.memory) and self.config.alpha > 0:
            places = self.memory.places(self.config.replay_batch_size)
            assert self.memory.logits is not None
            loss = loss + self.config.alpha * distance(
                self._answer(self.memory.take(places)), self.memory.logits.index_select(0, places)
            )
        if len(self.memory) and self.config.beta > 0:
            past = self.memory.draw(self.config.replay_batch_size)
            loss = loss + self.config.beta * F.cross_entropy(self._answer(past), past.y)
        return loss

    def _answer(self, past: Batch) -> Tensor:
        """Return the logits of replayed samples, (B, C), and count them."""
        self.samples_trained += len(past.y)
        logits: Tensor = self.model(past.x, past.t)
        return logits

    def train_step(self, batch: Batch) -> None:
        """Take the step, then offer the batch to the memory with the logits it had in it."""
        super().train_step(batch)
        if batch.source is not None and batch.rows is not None:
            self.memory.offer(batch.source, batch.rows, self.tasks_seen, self.given)
        self.given = None

    def holdings(self) -> Holdings:
        """The memory is replay, not auxiliary state."""
        return replace(
            super().holdings(), auxiliary={}, replay=self.memory.state_dict(), replay_samples=len(self.memory)
        )


def distance(logits: Tensor, kept: Tensor) -> Tensor:
    """Return the mean of (logits - kept)^2 over all logits that were kept, a 0-dim tensor.

    Args:
        logits: (B, C), what the net says now.
        kept: (B, C'), what it said; NaN for classes that a sample's task has not. C and C' differ where tasks do: a
            batch of one task is answered by its head alone.
    """
    width = min(logits.shape[1], kept.shape[1])
    known = ~kept[:, :width].isnan()
    gap = torch.where(known, logits[:, :width] - kept[:, :width].nan_to_num(), 0.0)
    return gap.square().sum() / known.sum()
