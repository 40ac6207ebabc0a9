"""PackNet: train on the weights that are free, prune most of them, retrain those that stay, and fix them for good.

Paper      Mallya & Lazebnik 2018, "PackNet: adding multiple tasks to a single network by iterative pruning", CVPR,
           arXiv:1711.05769.
Checked    the phases' lengths and learning rates against the scripts of arunmallya/packnet at de4ff7e (it has no
           licence: read for these facts, nothing taken). The paper's full text was not at hand.
Method     task t, in every layer on its own:
           train     all free weights, with those of tasks < t in the forward pass and fixed
           prune     of the weights just trained keep the share 1 - `prune` that is largest in size; the others become
                     zero and stay free
           retrain   the kept ones, for a shorter time at a lower learning rate; then they are fixed, owned by t
           Task t answers with the weights of tasks <= t: later ones are zero for it. Layers are the trunk's; every
           task has a head, which is not pruned. Biases and normalisation are learned by the first task and then
           fixed, statistics included (`small = "first"`, the paper's), or each task has its own (`small = "task"`).
           The retraining comes on top of the protocol's budget, as in the paper, where it is half as long: 10 epochs
           after 20, at a tenth of the learning rate.
WSN's      Kang et al. 2022 (WSN) do not say how much PackNet prunes. Their capacities tell: (1 - S) + T / 32 with S
setting    the share left free and one mask bit a task is 96.38 % for T = 10 if S = 0.9^10, and 126.65 % for T = 20 if
           S = 0.95^20, as they print. So a task keeps 1 / T of the free weights, `prune` = 1 - 1 / T: our inference.
Departs    the paper begins with a net trained on ImageNet, here the first task's is random. It prunes nothing after the
           last task; a strategy does not know which one that is, so every task is pruned. No schedule in retraining.
           `allot = "layer"` is ours: every task keeps the same number of weights, 1 - `prune` of the layer.
A task     seen again prunes nothing. While it is the newest, the weights that it owns train on, for the whole budget.
again      Else later tasks rest on them, so the trunk stays, and its head (and biases of its own) alone trains.
Stores     who owns each weight, in ceil(log2(T + 1)) bit planes a layer: 4 bits a weight for T = 10, where a mask per
           task would take 10. They are buffers, and needed to answer. While a task trains: two numbers a weight more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.loading import Batch, TensorTask
from clbench.nets.shared.packed import PackedNet
from clbench.nets.shared.tasknet import matrices
from clbench.seeds import derive
from clbench.sharing import Use
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy


class PackNet(Strategy):
    """Iterative pruning on any net; `model` is a `PackedNet`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of PackNet."""

        prune: Annotated[float, Field(ge=0, lt=1)]
        """Share of the weights just trained that a task gives back, in every layer."""
        allot: Literal["free", "layer"] = "free"
        """What 1 - prune is a share of: the layer's free weights, so that later tasks get fewer, or all it has."""
        retrain: Annotated[float, Field(ge=0)] = 0.5
        """Length of retraining as a share of the task's budget, which it comes on top of."""
        retrain_lr: Annotated[float, Field(gt=0)] = 0.1
        """Learning rate of retraining as a share of the budget's."""
        small: Literal["first", "task"] = "first"
        """Whose biases and normalisation a task uses: those of the first task, or its own."""

    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"task"})

    def __init__(self, *, setup: Setup, config: Config) -> None:
        seed, new_net = derive(setup.seed, "parts"), setup.new_net

        def packed_net() -> PackedNet:
            try:
                return PackedNet(new_net(), seed, config.small)
            except ValueError as error:
                raise UserError(f"strategy PackNet: {error}") from None

        super().__init__(setup=replace(setup, new_net=packed_net), config=config)
        self.is_new = False
        """Whether the task in training was never trained before."""
        self.held: list[_Held] = []
        """The matrices of which a part is fixed in the phase in training."""

    @property
    def net(self) -> PackedNet:
        """The net in training."""
        return cast(PackedNet, self.model)

    # --------------------------------------------------------------------------------------------------------- one task

    def begin_task(self, experience: DatasetExperience) -> None:
        """Give the task its number; from the second task on, fix what the first one learned for all."""
        self.is_new = int(experience.task_label) not in self.net.tasks()
        super().begin_task(experience)
        if self.config.small == "first" and len(self.net.tasks()) > 1:
            for parameter in self.net.small_parameters(self.task_label):
                parameter.requires_grad_(False)
                self.optimizer.state.pop(parameter, None)

    def train_task(self, experience: DatasetExperience) -> None:
        """Train, prune, retrain."""
        self.begin_task(experience)
        tasks = self.training_data(experience)
        code = self.net.number(self.task_label) + 1
        if self.is_new:
            counts = {name: self.count(name) for name in matrices(self.net.trunk)}
            self.hold(lambda owners: owners == 0)
            self.fit(tasks)
            with self.phase("consolidate"):
                self.prune(counts)
            self.hold(lambda owners: owners == code)
            self.retrain(tasks)
        else:
            # Where another task rests on this one, the matrices get no gradient and nothing has to be held.
            self.hold(lambda owners: owners == code if self.net.is_newest(self.task_label) else owners >= 0)
            self.fit(tasks)
        self.held = []
        self.end_task()

    def check_tasks(self, tasks: Sequence[int]) -> None:
        """Refuse a `prune` that leaves one of the tasks nothing: it follows from the sizes of the layers alone."""
        for name, weight in matrices(self.net.trunk).items():
            free = weight.numel()
            for number, task in enumerate(tasks):
                free -= self._kept(name, free, task, number)

    def count(self, name: str) -> int:
        """Return how many weights of matrix `name` the task in training is to keep. Raises UserError when none."""
        free = int((self.net.owners(name) == 0).sum())
        return self._kept(name, free, self.task_label, self.net.number(self.task_label))

    def _kept(self, name: str, free: int, task: int, number: int) -> int:
        """Return the same for a task, the `number`-th from 0 on, that finds so many weights free."""
        every = self.net.trunk.get_parameter(name).numel()
        size = free if self.config.allot == "free" else every
        kept: int = min(round((1 - self.config.prune) * size), free)
        if kept < 1:
            raise UserError(
                f"strategy PackNet: prune {self.config.prune} leaves task {task} (number "
                f"{number + 1}) no weight of layer '{name}': {free} of "
                f"{every} are free. Prune "
                + ("less" if size == free and free else "more, so that earlier tasks leave some,")
                + " or take a wider net"
            )
        return kept

    @torch.no_grad()
    def prune(self, counts: dict[str, int]) -> None:
        """Give the task the largest free weights, so many of each matrix; the other free ones become zero."""
        for name, count in counts.items():
            free = self.net.owners(name) == 0
            size = self.net.trunk.get_parameter(name).abs().masked_fill(~free, -1.0).flatten()
            chosen = torch.zeros_like(size, dtype=torch.bool)
            chosen[size.topk(count).indices] = True
            self.net.claim(name, chosen.view_as(free), self.task_label)

    def retrain(self, tasks: Sequence[TensorTask]) -> None:
        """Train what the task kept, for a part of the budget, at a constant learning rate."""
        if self.config.retrain == 0:
            return
        setup, budget = self.setup, self.setup.train
        length = {
            key: max(1, round(self.config.retrain * value))
            for key, value in (("epochs", budget.epochs), ("iterations", budget.iterations))
            if value is not None
        }
        changes: dict[str, Any] = {**length, "lr": self.config.retrain_lr * budget.lr, "schedule": None}
        self.setup = replace(setup, train=budget.model_copy(update=changes))
        try:
            self.refresh_optimizer()
            self.fit(tasks, self.chance)
        finally:
            self.setup = setup

    # ---------------------------------------------------------------------------------------------------- what is fixed

    @torch.no_grad()
    def hold(self, moves: Callable[[Tensor], Tensor]) -> None:
        """Fix all weights but those whose owners (int16, of a matrix's shape) `moves` says may be trained."""
        self.held = []
        for name, weight in matrices(self.net.trunk).items():
            free = moves(self.net.owners(name))
            if not bool(free.all()):
                self.held.append(_Held(weight, free.to(weight.dtype)))

    def after_backward(self) -> None:
        """Take fixed weights out of the gradient, so that neither clipping nor the optimiser's state sees them."""
        for held in self.held:
            if held.weight.grad is not None:
                held.weight.grad.mul_(held.free)

    def train_step(self, batch: Batch) -> None:
        """One step; what is fixed is put back, because decay and momentum move weights without a gradient, too."""
        super().train_step(batch)
        with torch.no_grad():
            for held in self.held:
                torch.addcmul(held.values, held.weight, held.free, out=held.weight)

    # ---------------------------------------------------------------------------------------------------------- sharing

    def uses(self) -> dict[int, list[Use]]:
        """Return what each task answers with: its own and older tasks' weights, and who owns which.

        The newest task runs the matrices as they are: free weights, which it reads too, are zero.
        """
        net, heads = self.net, self.net.head.task_parameters()
        found: dict[int, list[Use]] = {}
        for task in net.tasks():
            rest = [*net.small_parameters(task), *net.statistics(task), *net.planes.buffers()]
            masked = [Use(weight, net.mask(name, task)) for name, weight in matrices(net.trunk).items()]
            found[task] = [*masked, *(Use(tensor) for tensor in (*rest, *heads.get(task, [])))]
        return found


class _Held:
    """A matrix of which a part is fixed."""

    def __init__(self, weight: nn.Parameter, free: Tensor) -> None:
        self.weight = weight
        self.free = free
        """1 where it trains, 0 where it is fixed: numbers, because choosing by a bool mask takes ten times as long."""
        self.values = weight.detach() * (1 - free)
        """What is fixed; 0 elsewhere."""
