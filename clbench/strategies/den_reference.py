"""DEN as its released code runs it, which is not the paper's algorithm (`den.py`) where it matters.

Paper      Yoon, Yang, Lee & Hwang 2018, ICLR, arXiv:1708.01547; code: jaehong31/DEN at 52ebb5d (DEN.py, DEN_run.py,
           ops.py), as read. Nothing of it is copied: its licence does not say that it may be.
Method     L is the mean cross-entropy of C sigmoids. Every phase adds mu_2 / 2 ||W||^2 over what it trains and ends
           every step with a soft threshold mu on every trained variable, biases too, not scaled by the learning rate;
           that is multiplied by 0.95 after every pass over the data, whatever the protocol's schedule.
           task 1      train everything
           task t > 1  1 head         one step on the new head: an l1 that acts once leaves practically no zero in it
                       2 selection    from output 0 alone, breadth first, units over weights other than zero; train them
                                      with a head of which only output 0's weights are left: all C logits share one
                                      score, and differ by their biases. Drift penalty lambda / 2 on hidden weights.
                       3 expansion    if the last mini-batch's loss is at least tau, as the shared score sees to at
                                      every task: k units a layer; they and the new head are trained, group threshold
                                      gamma on new weights, not scaled either; units into which no weight is left are
                                      removed
                       4 splitting    inside 3 only: of the units that drifted by more than sigma in 2, the k that
                                      drifted least get a copy. Whether units are split or not, every hidden weight and
                                      bias that was there before the task is put back to what it was (the script edits
                                      two names of one array): of 2 only the choice of units and the head remain. So a
                                      copy is a copy of the old unit; its bias is from U(0, 1)
                       5 all          after 3 only: train every shared weight and the head, drift penalty lambda / 2
           timestamp   task t answers with the units that were there when it had been learned.
Against    the paper: 1 (it solves eq. 3), 2 (it searches from all outputs, trains all of them, decays by l2 alone),
the paper  3 (it asks the task's loss; here tau decides nothing), 4 (it splits whether or not it expanded, every unit
           above sigma, measures drift under eq. 6, keeps what retraining gave the others, and the copy is what the
           unit had become).
Departs    PyTorch's initialisation instead of Glorot's, and zeros for the weights out of new units, which the script
           draws; a copy takes its unit's weights into the head along, which the script draws too; batches in shuffled
           passes instead of draws; heads ignore later units instead of having zeros for them; one group per unit over
           all its new weights instead of one per block of them; the l1 threshold before the group's, whose order the
           script leaves to chance; no early stopping on a window of validation losses, which seldom stops anything.
           The protocol's weight decay, schedule and reset_optimizer = false are not heeded: phases have their own.
Stores     the net with a head per task, and a width per layer and task (the timestamps).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.loading import Batch, ResidentLoader, TensorTask
from clbench.strategies.expanding import Expanding, Phase

_ROOT = [0]
"""The output from which units are selected."""


class DENReferenceCode(Expanding):
    """The released script's behaviour, phase by phase."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings, by the names of the released script's flags; its defaults."""

        l1_lambda: Annotated[float, Field(ge=0)] = 1e-5
        """mu: soft threshold of every trained variable, every step."""
        l2_lambda: Annotated[float, Field(ge=0)] = 1e-4
        """mu_2: on half the squared norm of every trained variable."""
        gl_lambda: Annotated[float, Field(ge=0)] = 1e-3
        """gamma: group threshold of new weights, every step."""
        regular_lambda: Annotated[float, Field(ge=0)] = 0.5
        """lambda: on half the squared distance of hidden weights from the last task's."""
        ex_k: Annotated[int, Field(ge=0)] = 10
        """k: units added to every layer at an expansion; 0 never expands."""
        loss_thr: Annotated[float, Field(ge=0)] = 0.01
        """tau: on the last mini-batch's loss of phase 2."""
        spl_thr: Annotated[float, Field(ge=0)] = 0.05
        """sigma: split units that drifted further, at most `ex_k` a layer and task."""
        lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.95
        """Learning rate times this after every pass over the data."""

    scale_by_lr = False

    def train_task(self, experience: DatasetExperience) -> None:
        """The released script's loop, one task."""
        self.begin_task(experience)
        tasks = self.training_data(experience)
        self.samples_per_pass = sum(len(task) for task in tasks)
        if self.tasks_seen == 0:
            self.train_on(tasks, self.phase_of(self.everything()), self.order)
        else:
            self.remember()
            self.one_step_on_the_head(tasks)
            self.retrain_selected(tasks)
            if float(self.loss.detach()) >= self.config.loss_thr and self.config.ex_k:
                self.expand(tasks)
                self.split()
                phase = self.phase_of(self.everything(), self.anchors())
                self.train_on(tasks, phase, self.chance)
        self.end_task()

    def one_step_on_the_head(self, tasks: Sequence[TensorTask]) -> None:
        """Phase 1."""
        self.now = self.phase_of(self.own_head(), net=self.head_only)
        self.optimizer = self.phase_optimizer(self.now)
        self.steps = 0
        self.model.train()
        batch = next(iter(ResidentLoader(tasks, self.setup.train.batch_size, self.chance)))
        with self.around(batch, batch.x):
            self.train_step(batch)

    def retrain_selected(self, tasks: Sequence[TensorTask]) -> None:
        """Phase 2; the hidden weights are at this point what the last task left."""
        selected = self.model.reached(self.task_label, _ROOT)
        self.log_reuse(selected)
        part = self.model.cut(self.task_label, selected, _ROOT)
        anchors = [(weight, weight.detach().clone()) for weight in [*part.weights, *part.biases]]
        self.train_on(tasks, self.phase_of(list(part.parameters()), anchors, part), self.order)

    def expand(self, tasks: Sequence[TensorTask]) -> None:
        """Phase 3."""
        head = self.own_head()
        added = self.add_units(self.config.ex_k)
        for parameter in head:
            parameter.requires_grad_(True)
        layers = self.model.layers()
        blocks = [block for layer in layers for block in (layer.delta_rows, layer.delta_columns) if block is not None]
        phase = self.phase_of([*added, *head], grouped=blocks)
        self.train_on(tasks, phase, self.chance)
        self.keep_useful_units()

    @torch.no_grad()
    def split(self) -> None:
        """Phase 4."""
        chosen = []
        for drift in self.drifts():
            mask = drift > self.config.spl_thr
            least = drift.where(mask, torch.inf).argsort()[: min(self.config.ex_k, int(mask.sum()))]
            chosen.append(torch.zeros_like(mask).index_fill_(0, least, True))
        with self.phase("grow"):
            self.restore([torch.ones_like(mask) for mask in chosen])
            self.model.duplicate(self.task_label, chosen)
        for layer, name, mask in zip(self.model.layers(), self.model.names, chosen, strict=True):
            copies = int(mask.sum())
            if copies and layer.bias is not None:
                layer.bias[-copies:] = torch.rand(copies, generator=self.chance).to(layer.bias)
            self.log_growth(name, "split", copies)

    # ------------------------------------------------------------------------------------------------------ one phase

    def phase_of(
        self,
        parameters: Sequence[nn.Parameter],
        anchors: Sequence[tuple[nn.Parameter, Tensor]] = (),
        net: Callable[[Tensor, int | Tensor], Tensor] | None = None,
        grouped: Sequence[nn.Parameter] = (),
    ) -> Phase:
        """Return a phase with the script's penalties."""
        return Phase(
            net=self.model if net is None else net,
            parameters=parameters,
            sparse=parameters,
            l1=self.config.l1_lambda,
            l2=self.config.l2_lambda,
            grouped=grouped,
            group=self.config.gl_lambda,
            anchors=anchors,
            drift=self.config.regular_lambda,
        )

    def train_on(self, tasks: Sequence[TensorTask], phase: Phase, order: torch.Generator) -> None:
        """Train a phase from the full learning rate."""
        self.steps = 0
        self.train_phase(tasks, phase, order)

    def train_step(self, batch: Batch) -> None:
        """One step, the learning rate lower after every pass."""
        passes = self.steps * self.setup.train.batch_size // self.samples_per_pass
        for group in self.optimizer.param_groups:
            group["lr"] = self.setup.train.lr * self.config.lr_decay**passes
        super().train_step(batch)
        self.steps += 1

    def task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of one sigmoid an output, mean over outputs and samples."""
        targets = F.one_hot(labels, logits.shape[1]).to(logits)
        return F.binary_cross_entropy_with_logits(logits, targets)

    def scores(self, logits: Tensor) -> Tensor:
        """Return what AUROC orders samples by: a sigmoid's order is its logit's."""
        return logits
