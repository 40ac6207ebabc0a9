"""APD, additive parameter decomposition: shared weights under a task's mask, plus sparse weights of the task's own.

Paper      Yoon, Kim, Yang & Hwang 2020, "Scalable and order-robust continual learning with additive parameter
           decomposition", ICLR, arXiv:1902.09432.
Checked    against the authors' code, jaehong31/APD at 6b6b67d (it has no licence: read, nothing taken). "The release"
           below. The paper's full text was not at hand: no number of its tables is used, and APD-Fixed, which the
           release does not have, is our reading of it.
Method     theta_i = sigma (*) sigmoid(m_i) + tau_i (clbench/nets/decomposed.py), a head and biases per task. On task
           t, over sigma, m_i and tau_i of every task so far, and the head and biases of t:
               loss(theta_t) + l1 sum_{i <= t} |tau_i|_1 + lam2 sum_{i < t} |theta_i* - theta_i|^2
           theta_i* is theta_i as it was when task t began. The old tasks' tau_i and m_i follow sigma (retroactive
           update). Afterwards every element of a tau of at most `prune` becomes 0: the subgradient of |.|_1 under Adam
           leaves them dithering around zero at about the size of a step. Every `cluster_every` new tasks, per layer,
           k-means over the tau; in each cluster, what its tasks have alike up to `beta` becomes one locally shared
           tau~_g, held fixed until the next time, and 0 in their tau (hierarchical knowledge consolidation).
Variants   APD(2): cluster_every > 0. APD(1): cluster_every = 0. APD-Fixed: also retroactive = false; then old tau_i and
           m_i stay and the last term is lam2 |sigma - sigma*|^2.
As the     theta_i* is taken anew at every task, so drift may add up, and nothing of it is stored. The penalty is half
release    of its approx_hyp: lam2 = 50 for 100. Weight decay, half the square, holds only tau_t and m_t, and sigma
           during the first task; AdamW's is applied to the same. tau_t begins as a copy of sigma. One clustering per
           layer, k = clusters * (tasks so far / cluster_every), tau~_g the middle of the largest and smallest value.
Departs    from the release: masks begin at exactly 1/2 and biases at 0, which it draws from narrow normals; gradients
           are not scaled by ten, which Adam's step does not notice; small elements are pruned for good at the end of a
           task, where it prunes when it answers and trains on with the rest, and tau~_g is not pruned again; k-means
           begins at tasks drawn anew, where it begins at its last centres; the weights of the last epoch stay, where it
           takes the best of the last five by validation.
           A task seen again trains its own tau_t on top of its group's, and the others are its past. The penalties
           enter as gradients, by hand and before clipping; the loss that is checked for NaN is the cross-entropy alone.
           Under plain SGD the drift penalty is stable for lr < 1 / (lam2 (1 + sum of M_i^2 over old tasks)) only.
Stores     sigma once; per task P weights tau, dense though mostly zeros, one mask logit and bias per unit, and a head.
           Counted as stored; `DecomposedNet.sparse_bytes` says what value and 4-byte position of the rest would take.
           While a task trains: 5 P more per other task (gradient, theta*, scratch and, under Adam, two moments).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.nets import CHAINS, HeadedNet
from clbench.nets.decomposed import DecomposedNet, k_means, per_unit
from clbench.sharing import Use
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy


class APD(Strategy):
    """APD(1), APD(2) and APD-Fixed, by settings, on any net that is a chain of layers."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of APD."""

        l1: Annotated[float, Field(ge=0)]
        """Weight of the sum of |tau|, lambda_1."""
        lam2: Annotated[float, Field(ge=0)]
        """Weight of the squared drift of old tasks' theta, lambda_2: without a half."""
        retroactive: bool = True
        """Whether old tasks' tau and masks follow the shared weights; off for APD-Fixed."""
        cluster_every: Annotated[int, Field(ge=0)] = 0
        """Consolidate after every so many new tasks, s; 0 never."""
        clusters: Annotated[int, Field(ge=1)] = 2
        """How many clusters come with every consolidation, k."""
        beta: Annotated[float, Field(ge=0)] = 1e-2
        """Spread up to which elements of a cluster's tau count as alike."""
        prune: Annotated[float, Field(ge=0)] | None = None
        """Elements of tau up to this size become 0 after a task; left out: l1, as the release."""
        begins: Literal["shared", "zero"] = "shared"
        """What a new tau begins as: a copy of the shared weights, or zeros."""

    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"task"})
    model_kinds: ClassVar[frozenset[str] | None] = CHAINS
    sized_by_learning: ClassVar[bool] = True

    def __init__(self, *, setup: Setup, config: Config) -> None:
        self.decay = setup.train.weight_decay
        """Applied by hand, because it holds some of the parameters only."""

        def new_net() -> DecomposedNet:
            return decompose(setup.new_net(), config.begins)

        budget = setup.train.model_copy(update={"weight_decay": 0.0})
        super().__init__(setup=replace(setup, new_net=new_net, train=budget), config=config)
        self.past: _Past | None = None
        """What holds old tasks in place while another trains."""
        self.is_new = False
        """Whether the task in training was never trained before."""

    @property
    def net(self) -> DecomposedNet:
        """The net in training."""
        return cast(DecomposedNet, self.model)

    def begin_task(self, experience: DatasetExperience) -> None:
        """Give the task its parts; note whether it has them already."""
        known = len(self.net.adaptive)
        super().begin_task(experience)
        self.is_new = len(self.net.adaptive) > known

    def before_task(self, experience: DatasetExperience) -> None:
        """Note where the other tasks' weights are now."""
        others = [task for task in self.net.tasks() if task != self.task_label]
        self.past = _Past(self.net, others, self.config.retroactive) if others else None

    # -------------------------------------------------------------------------------------------------------- objective

    def penalty(self) -> Tensor:
        """Return everything that is added to the loss, a 0-dim tensor; training uses its gradient."""
        part = self.net.part(self.task_label)
        held = [*part.tau, *part.mask, *([] if self.past else self._sigma())]
        total: Tensor = self.config.l1 * _sum(tau.abs() for tau in part.tau)
        total = total + self.decay / 2 * _sum(value.square() for value in held)
        if self.past is not None:
            total = total + self.past.penalty(self._sigma(), self.config.l1, self.config.lam2)
        return total

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add the penalty's gradient to that of the loss: by hand, in place, all old tasks of a layer at once."""
        part = self.net.part(self.task_label)
        for tau in part.tau:
            _grad(tau).add_(tau.sign(), alpha=self.config.l1)
        self._decay([*part.tau, *part.mask, *([] if self.past else self._sigma())])
        if self.past is not None:
            self.past.add_gradients(self._sigma(), self.config.l1, self.config.lam2)

    def _decay(self, parameters: Iterable[nn.Parameter]) -> None:
        """Apply the budget's weight decay as its optimiser would: to the gradient, or with AdamW to the weights."""
        if self.decay == 0:
            return
        rate = self.optimizer.param_groups[0]["lr"]
        for parameter in parameters:
            if self.setup.train.optimizer == "adamw":
                parameter.mul_(1 - rate * self.decay)
            else:
                _grad(parameter).add_(parameter, alpha=self.decay)

    def _sigma(self) -> list[nn.Parameter]:
        return [cast(nn.Parameter, layer.weight) for layer in self.net.layers()]

    # --------------------------------------------------------------------------------------------------- after training

    @torch.no_grad()
    def after_task(self, experience: DatasetExperience) -> None:
        """Turn small elements of every tau into zeros, and consolidate when it is time."""
        if self.past is not None:
            self.past.release()
            self.past = None
        threshold = self.config.l1 if self.config.prune is None else self.config.prune
        for task in self.net.tasks():
            for tau in self.net.part(task).tau:
                tau.masked_fill_(tau.abs() <= threshold, 0)
        seen = len(self.net.adaptive)
        if self.is_new and self.config.cluster_every and seen % self.config.cluster_every == 0:
            self.consolidate(self.config.clusters * (seen // self.config.cluster_every))

    def consolidate(self, k: int) -> None:
        """Group the tasks of every layer into up to k clusters, which share what their tau have alike."""
        tasks = self.net.tasks()
        for i in range(len(self.net.trunk.chain)):
            clusters = k_means(torch.stack([self.net.own(i, task) for task in tasks]), k, self.chance)
            self.net.consolidate(i, [[tasks[point] for point in cluster] for cluster in clusters], self.config.beta)
        alive = {id(parameter) for parameter in self.net.parameters()}
        for group in self.optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) in alive]

    def uses(self) -> dict[int, list[Use]]:
        """Return what the base finds, sigma for all and a task's own, but of the groups' tau~ a task's own group's."""
        groups = {id(tau): (i, g) for i, held in enumerate(self.net.local) for g, tau in enumerate(held.parameters())}

        def needs(task: int, held: Tensor) -> bool:
            i, g = groups.get(id(held), (-1, -1))
            return i < 0 or (task in self.net.groups and self.net.groups[task][i] == g)

        return {task: [use for use in found if needs(task, use.tensor)] for task, found in super().uses().items()}


def decompose(net: HeadedNet, begins: Literal["shared", "zero"]) -> DecomposedNet:
    """Return the net with decomposed weights. Raises UserError when it is no chain of layers."""
    try:
        return DecomposedNet(net, begins)
    except ValueError as error:
        raise UserError(f"APD needs a net that is a chain of layers, such as mlp, zenke or lenet: {error}") from None


class _Past:
    """The other tasks while one trains: tau and masks of all of them in one tensor per layer, and what holds them.

    The parameters become rows of these tensors until `release`, so that a step takes a few passes over each layer,
    whatever the number of tasks. Letters: N the other tasks; a layer's weight is (out, ...).
    """

    def __init__(self, net: DecomposedNet, tasks: list[int], retroactive: bool) -> None:
        sigma = [layer.weight.detach() for layer in net.layers()]
        self.retroactive = retroactive
        self.start = [weight.clone() for weight in sigma]
        if not retroactive:
            return
        parts = [net.part(task) for task in tasks]
        self.parameters = [parameter for part in parts for parameter in (*part.tau, *part.mask)]
        self.tau = [_stacked([part.tau[i] for part in parts]) for i in range(len(sigma))]
        """Per layer, (N, out, ...)."""
        self.mask = [_stacked([part.mask[i] for part in parts]) for i in range(len(sigma))]
        """Per layer, logits (N, out)."""
        # theta* without what the task's group adds, which is in theta as well and does not move.
        self.target = [
            torch.addcmul(tau, weight, per_unit(torch.sigmoid(mask), weight))
            for tau, mask, weight in zip(self.tau, self.mask, sigma, strict=True)
        ]
        self.slope = [torch.empty_like(tau) for tau in self.tau]
        """Gradient of tau."""
        self.slope_mask = [torch.empty_like(mask) for mask in self.mask]
        self.scratch = torch.empty(max(tau.numel() for tau in self.tau), device=sigma[0].device, dtype=sigma[0].dtype)
        self.rows = [
            (part.tau[i], self.slope[i][n], part.mask[i], self.slope_mask[i][n])
            for n, part in enumerate(parts)
            for i in range(len(sigma))
        ]

    def penalty(self, sigma: list[nn.Parameter], l1: float, lam2: float) -> Tensor:
        """Return the old tasks' part of the objective; differentiable in sigma, and in `tau` and `mask` as stacked."""
        if not self.retroactive:
            return lam2 * _sum((weight - start).square() for weight, start in zip(sigma, self.start, strict=True))
        drift = [
            tau + weight * per_unit(torch.sigmoid(mask), weight) - target
            for tau, mask, weight, target in zip(self.tau, self.mask, sigma, self.target, strict=True)
        ]
        return lam2 * _sum(d.square() for d in drift) + l1 * _sum(tau.abs() for tau in self.tau)

    def add_gradients(self, sigma: list[nn.Parameter], l1: float, lam2: float) -> None:
        """Set the gradients of the old tasks' tau and masks, and add theirs to sigma's.

        With d = theta - theta*, M = sigmoid(m) and g = 2 lam2 d:  d tau = g + l1 sign(tau),  d sigma = sum_n M_n g_n,
        d m = M (1 - M) sum over fan-in of sigma g.
        """
        for i, weight in enumerate(sigma):
            if not self.retroactive:
                _grad(weight).add_(weight - self.start[i], alpha=2 * lam2)
                continue
            value, shared = weight.detach(), torch.sigmoid(self.mask[i])
            slope, scratch = self.slope[i], self.scratch[: self.tau[i].numel()].view_as(self.tau[i])
            torch.addcmul(self.tau[i], value, per_unit(shared, value), out=slope)
            slope.sub_(self.target[i]).mul_(2 * lam2)
            torch.mul(slope, value, out=scratch)
            torch.sum(scratch.flatten(2), dim=2, out=self.slope_mask[i])
            self.slope_mask[i].mul_(shared * (1 - shared))
            torch.mul(slope, per_unit(shared, value), out=scratch)
            _grad(weight).add_(scratch.sum(dim=0))
            slope.add_(torch.sign(self.tau[i], out=scratch), alpha=l1)
        if self.retroactive:
            for tau, slope, mask, slope_mask in self.rows:
                tau.grad, mask.grad = slope, slope_mask

    def release(self) -> None:
        """Give every parameter memory of its own again."""
        if self.retroactive:
            for parameter in self.parameters:
                parameter.data = parameter.data.clone()
                parameter.grad = None


def _stacked(parameters: list[Any]) -> Tensor:
    """Return the parameters as one tensor, (N, ...), whose rows they become."""
    stack = torch.stack([parameter.detach() for parameter in parameters])
    for parameter, row in zip(parameters, stack, strict=True):
        parameter.data = row
    return stack


def _grad(parameter: nn.Parameter) -> Tensor:
    """Return the gradient of a parameter that had a part in the loss."""
    assert parameter.grad is not None
    return parameter.grad


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return torch.stack([term.sum() for term in terms]).sum()
