"""Learning without forgetting (LwF): answer the new data for old tasks as the net did before it saw them.

Paper      Li & Hoiem 2016, "Learning without forgetting", ECCV, arXiv:1606.09282.
Checked    against the code of the published rows, GMvandeVen/continual-learning (MIT): train.py, encoder.py and
           utils.py, before and after its commit 26f00db.
Method     the net as the task found it, the teacher, gives for each image x of the new task and each old head o
               q_o = softmax(teacher_o(x) / T),   the net in training gives   p_o = softmax(net_o(x) / T);
           it minimises   cross-entropy of the new task + alpha * sum_o D_o,   D_o = -sum_c q_o,c log p_o,c,
           mean over the batch. There are no old data, and the old heads learn, too.
Scenarios  task: every old head but the current one's. domain: the one head, all of its outputs: the same logits answer
           to the labels and to the teacher. class: the outputs that the teacher had.
As the     van de Ven & Tolias's rows (task N, from 1) are  (1 / N) cross-entropy + (1 - 1 / N) mean_o T^2 D_o:
codes      `weights = "shares"`, `heads = "mean"`, `t_squared`. In the class scenario p runs over all outputs so far,
           and the teacher says 0 for the new ones: `new_outputs = "zero"` ("apart": the old ones among themselves, as
           Avalanche has it). Until that commit D was averaged, not summed, over the outputs: `classes = "mean"`.
           A KL divergence to the teacher, which other codes write, has the same gradient.
Departs    The paper trains a new head alone first (warm-up) and records the teacher's answers once; here no warm-up, as
           in the published rows, and the teacher answers every batch as it was augmented.
Stores     nothing between tasks: the teacher is the net itself. While a task trains, its copy.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clbench.loading import Batch
from clbench.nets import HeadedNet, MultiHead
from clbench.strategies.base import Setup, Strategy


class LwF(Strategy):
    """Distils the net as the task found it into the net in training, on the task's own images."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of LwF."""

        alpha: Annotated[float, Field(ge=0)] = 1.0
        """Strength of distillation."""
        temperature: Annotated[float, Field(gt=0)] = 2.0
        """T."""
        t_squared: bool = False
        """Whether distillation is multiplied by T^2."""
        weights: Literal["one", "shares"] = "one"
        """one: cross-entropy counts 1, distillation alpha. shares: 1 / N and alpha (1 - 1 / N) on task N."""
        heads: Literal["sum", "mean"] = "sum"
        """What becomes of the old heads' terms."""
        new_outputs: Literal["apart", "zero"] = "apart"
        """Outputs that the teacher has not: left out, or to be 0."""
        classes: Literal["sum", "mean"] = "sum"
        """What becomes of a head's terms, one an output."""

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.teacher: HeadedNet | None = None
        """While a task trains: the net as the task found it."""

    def begin_task(self, experience: DatasetExperience) -> None:
        """Copy the net before it gets the task's outputs."""
        if self.tasks_seen and self.config.alpha > 0:
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        super().begin_task(experience)

    def after_task(self, experience: DatasetExperience) -> None:
        """Let go of the teacher."""
        self.teacher = None

    def loss_of(self, batch: Batch) -> Tensor:
        """Return cross-entropy plus distillation, weighted."""
        if self.teacher is None:
            return super().loss_of(batch)
        features = self.model.features(batch.x)
        logits = self.model.head(features, batch.t)
        loss = F.cross_entropy(logits, batch.y)
        with torch.no_grad():
            before = self.teacher.features(batch.x)
        tasks = self.old_heads()
        if tasks is None:
            terms = [self.distillation(logits, self.teacher.head(before))]
        else:
            terms = [self.distillation(self.model.head(features, t), self.teacher.head(before, t)) for t in tasks]
        if not terms:
            return loss
        new, old = self.share()
        distilled = torch.stack(terms).sum()
        return new * loss + (old / len(terms) if self.config.heads == "mean" else old) * distilled

    def share(self) -> tuple[float, float]:
        """Return what cross-entropy and distillation are multiplied by."""
        if self.config.weights == "one":
            return 1.0, float(self.config.alpha)
        return 1 / (self.tasks_seen + 1), float(self.config.alpha) * (1 - 1 / (self.tasks_seen + 1))

    def old_heads(self) -> list[int] | None:
        """Return the labels of the tasks whose heads are distilled; None where all tasks have one head."""
        assert self.teacher is not None
        head = self.teacher.head
        if not isinstance(head, MultiHead):
            return None
        return [task for task in sorted(head.task_parameters()) if task != self.task_label]

    def distillation(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Return one head's term, a 0-dim tensor, from logits (B, C) and the teacher's (B, C_old)."""
        if self.config.new_outputs == "apart":
            logits = logits[:, : teacher.shape[1]]
        t = self.config.temperature
        wanted = F.pad(torch.softmax(teacher / t, dim=1), (0, logits.shape[1] - teacher.shape[1]))
        term = F.cross_entropy(logits / t, wanted)
        if self.config.classes == "mean":
            term = term / logits.shape[1]
        return term * t**2 if self.config.t_squared else term
