"""What methods that grow a net in phases share: training one phase under penalties, drift, and the books of growth.

A phase trains some parameters of an `ExpandableNet`, or of a sub-network cut from it, on the task's loss plus any of

    l1 * ||W||_1                        by a proximal step after the optimiser's: soft-thresholding, exact zeros
    group * sum_g ||W_g||_2             likewise, for a whole group at once; g = the weights into one unit from new ones
    l2 / 2 * ||W||^2                    by its gradient
    drift / 2 * ||W - W_before||^2      by its gradient, on what was there before

for the budget of the protocol. Penalties by gradient enter before clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.loading import Batch, ResidentLoader, TensorTask
from clbench.nets import CHAINS
from clbench.nets.expandable import ExpandableNet, SubNet
from clbench.sharing import Use, uses_by_owner
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy, check_weights, new_optimizer
from clbench.strategies.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What is trained, and under which penalties."""

    net: Callable[[Tensor, int | Tensor], Tensor]
    parameters: Sequence[nn.Parameter]
    sparse: Sequence[nn.Parameter] = ()
    l1: float = 0.0
    """On `sparse`."""
    grouped: Sequence[nn.Parameter] = ()
    group: float = 0.0
    """On `grouped`, one group a row: the weights into one unit."""
    l2: float = 0.0
    """On `parameters`."""
    anchors: Sequence[tuple[nn.Parameter, Tensor]] = field(default_factory=tuple)
    """Parameter and what its first corner was: rows and columns that came later are not held."""
    drift: float = 0.0
    """On `anchors`."""

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradients of the quadratic penalties."""
        if self.l2:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter, alpha=self.l2)
        if self.drift:
            for parameter, before in self.anchors:
                assert parameter.grad is not None
                corner = tuple(slice(n) for n in before.shape)
                parameter.grad[corner].add_(parameter[corner] - before, alpha=self.drift)

    @torch.no_grad()
    def shrink(self, step: float) -> None:
        """Take the proximal step of the penalties that have no gradient at zero, for a step size."""
        if self.l1:
            for parameter in self.sparse:
                soft_threshold_(parameter, step * self.l1)
        if self.group:
            for parameter in self.grouped:
                group_threshold_(parameter, step * self.group)


class Expanding(Strategy):
    """Base of the methods that grow: `train_phase`, and `before`, the weights that the last task left."""

    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"task"})
    model_kinds: ClassVar[frozenset[str] | None] = CHAINS
    sized_by_learning: ClassVar[bool] = True

    scale_by_lr: ClassVar[bool] = True
    """Whether the proximal steps have the learning rate as their step size; else 1."""

    def __init__(self, *, setup: Setup, config: Any) -> None:
        super().__init__(setup=setup, config=config)
        try:
            self.model: ExpandableNet = ExpandableNet(setup.new_net().to(setup.device))
        except ValueError as error:
            raise UserError(f"{type(self).__name__}: {error}") from None
        self.optimizer = new_optimizer(setup.train, self.model.parameters())
        self.before: list[tuple[Tensor, Tensor | None]] = []
        """Weight and bias of every layer before the task; empty between tasks."""
        self.now: Phase | None = None

    def blank_net(self) -> nn.Module:
        """Return an expandable net without heads."""
        return ExpandableNet(self.setup.new_net().to(self.setup.device))

    def end_task(self) -> None:
        """Stamp the task, and leave the next one an optimiser over the whole net."""
        self.model.close_stage(self.task_label)
        self.before, self.now = [], None
        self.optimizer = new_optimizer(self.setup.train, self.model.parameters())
        super().end_task()

    # ------------------------------------------------------------------------------------------------------- one phase

    def train_phase(self, tasks: Sequence[TensorTask], phase: Phase, order: torch.Generator | None = None) -> None:
        """Train one phase for the protocol's budget, with an optimiser of its own.

        Args:
            tasks: the samples.
            phase: what is trained.
            order: of the samples; None for the generator of the order of data.
        """
        self.now = phase
        self.optimizer = self.phase_optimizer(phase)
        self.fit(tasks, order)
        self.put_back()
        check_weights(self.model, self.setup.train)  # after a sub-network's last step, too

    def phase_optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """Return a fresh optimiser for a phase; without the protocol's weight decay, because phases have penalties."""
        return new_optimizer(self.setup.train.model_copy(update={"weight_decay": 0.0}), phase.parameters)

    def train_step(self, batch: Batch) -> None:
        """One step: loss, gradients of the penalties, optimiser, proximal step."""
        assert self.now is not None
        self.optimizer.zero_grad()
        loss = self.task_loss(self.now.net(batch.x, batch.t), batch.y)
        torch.autograd.backward(loss)
        self.loss = loss.detach()  # a graph that lives on would keep the weights from growing
        self.now.add_gradients()
        if self.setup.train.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.now.parameters, self.setup.train.grad_clip)
        self.optimizer.step()
        self.now.shrink(self.optimizer.param_groups[0]["lr"] if self.scale_by_lr else 1.0)
        self.samples_trained += len(batch.y)

    def task_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch, a 0-dim tensor."""
        return F.cross_entropy(logits, labels)

    def put_back(self) -> None:
        """Bring the whole net up to date with the sub-network in training, if one is."""
        if self.now is not None and isinstance(self.now.net, SubNet):
            self.now.net.put_back()

    def evaluate(self, experience: DatasetExperience, auroc: bool = False) -> Evaluation:
        """Answer with the whole net, in the midst of a phase as well."""
        self.put_back()
        return super().evaluate(experience, auroc)

    def validation_loss(self, tasks: Sequence[TensorTask]) -> float:
        """Mean cross-entropy of the whole net, for schedules that ask."""
        self.put_back()
        return super().validation_loss(tasks)

    @torch.no_grad()
    def loss_on(self, tasks: Sequence[TensorTask]) -> float:
        """Return the mean loss of the whole net on all samples of `tasks`, in evaluation mode."""
        self.model.eval()
        total, count = 0.0, 0
        for batch in ResidentLoader(tasks, self.setup.train.eval_batch_size):
            total += float(self.task_loss(self.model(batch.x, batch.t), batch.y)) * len(batch.y)
            count += len(batch.y)
        return total / count

    # ---------------------------------------------------------------------------------------------- what may be trained

    def own_head(self) -> list[nn.Parameter]:
        """Return the parameters of the head of the task in training."""
        return list(self.model.head(self.task_label).parameters())

    def everything(self) -> list[nn.Parameter]:
        """Return all shared parameters and the head of the task in training."""
        return [*self.model.trunk.parameters(), *self.own_head()]

    def head_only(self, x: Tensor, t: int | Tensor) -> Tensor:
        """Return the logits of the task in training, with gradients for its head alone."""
        with torch.no_grad():
            features = self.model.features(x)
        logits: Tensor = self.model.head(self.task_label)(features)
        return logits

    # ------------------------------------------------------------------------------------------------------------ drift

    def remember(self) -> None:
        """Keep the weights as the last task left them."""
        self.before = [
            (layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone())
            for layer in self.model.layers()
        ]

    def anchors(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return what the drift penalty holds: the layers' parameters, as far as they were there before the task."""
        held: list[tuple[nn.Parameter, Tensor]] = []
        for layer, (weight, bias) in zip(self.model.layers(), self.before, strict=True):
            held.append((layer.get_parameter("weight"), weight))
            if bias is not None:
                held.append((layer.get_parameter("bias"), bias))
        return held

    @torch.no_grad()
    def drifts(self) -> list[Tensor]:
        """Return, per layer, ||w_j - w_j before||_2 over the weights into each unit that was there before, (N_i,)."""
        return [
            (layer.weight[tuple(slice(n) for n in weight.shape)] - weight).flatten(1).norm(dim=1)
            for layer, (weight, _) in zip(self.model.layers(), self.before, strict=True)
        ]

    @torch.no_grad()
    def restore(self, units: Sequence[Tensor]) -> None:
        """Give units (bool mask, per layer) the weights back that they had before the task, from older units only."""
        for layer, (weight, bias), chosen in zip(self.model.layers(), self.before, units, strict=True):
            rows = chosen.nonzero().squeeze(1)
            layer.weight[rows, : weight.shape[1]] = weight[rows]
            if layer.bias is not None and bias is not None:
                layer.bias[rows] = bias[rows]

    # -------------------------------------------------------------------------------------------------------- expansion

    def add_units(self, k: int) -> list[nn.Parameter]:
        """Open an expansion of k units a layer; return the new parameters, the only ones that can be trained."""
        with self.phase("grow"):
            return self.model.open_expansion(self.task_label, [k] * len(self.model.names), self.chance)

    def keep_useful_units(self) -> None:
        """Close the expansion: units into which no weight is left are removed, the others are part of the net."""
        useless = self.model.useless_units()
        with self.phase("grow"):
            self.model.close_expansion(self.task_label, [~mask for mask in useless])
        for name, mask in zip(self.model.names, useless, strict=True):
            self.log_growth(name, "added", len(mask))
            self.log_growth(name, "pruned", int(mask.sum()))

    # -------------------------------------------------------------------------------------------------- books of growth

    def log_reuse(self, masks: Sequence[Tensor]) -> None:
        """Note which units of earlier tasks a new one builds on (bool mask, per layer), by the task of their birth."""
        for i, mask in enumerate(masks):
            births = self.model.births(i)[: len(mask)].to(mask.device)
            for born in sorted(set(births.tolist())):
                self.log_growth(self.model.names[i], "reused", int(mask[births == born].sum()), born=born)

    def widths(self) -> dict[str, int]:
        """Return the units of every layer."""
        return dict(zip(self.model.names, self.model.widths(), strict=True))

    def serving(self) -> list[dict[str, Tensor]]:
        """Return, per task and layer, which units its answer depends on."""
        tasks = sorted(self.model.stage_of)
        return [dict(zip(self.model.names, self.model.reached(task), strict=True)) for task in tasks]

    def uses(self) -> dict[int, list[Use]]:
        """Return, of every layer, the weights between units that a task's answer depends on; its head as a whole."""
        return uses_of(self.model, self.tasks_seen)


def uses_of(net: ExpandableNet, tasks: int) -> dict[int, list[Use]]:
    """Return what each task uses of a net that has learned so many tasks."""
    found = uses_by_owner(net, net.task_parameters(), tasks)
    for task in net.stage_of:
        masks, before = dict[int, Tensor](), None
        for i, (layer, units) in enumerate(zip(net.layers(), net.reached(task), strict=True)):
            weight = layer.get_parameter("weight")
            rows = F.pad(units, (0, len(weight) - len(units)))
            listened = torch.full_like(weight[0], before is None, dtype=torch.bool)
            if before is not None:
                listened[net.inputs(i, before.nonzero().squeeze(1))] = True
            masks[id(weight)] = rows.view(-1, *(1 for _ in listened.shape)) & listened
            if layer.bias is not None:
                masks[id(layer.get_parameter("bias"))] = rows
            before = rows
        found[task] = [replace(use, mask=masks.get(id(use.tensor))) for use in found[task]]
    return found


def soft_threshold_(weight: Tensor, threshold: float) -> None:
    """Move every element towards zero by `threshold`, and no further, in place: the proximal map of the l1 norm."""
    weight.copy_(F.softshrink(weight, threshold))


def group_threshold_(weight: Tensor, threshold: float) -> None:
    """Shorten every row by `threshold` in its 2-norm, and no further than to zero, in place."""
    rows = weight.view(len(weight), -1)
    norms = rows.norm(dim=1, keepdim=True)
    rows.mul_((1 - threshold / norms).clamp_min(0).nan_to_num(0.0))
