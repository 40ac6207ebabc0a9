"""HAT, hard attention to the task: units gated by learned embeddings, and what earlier tasks' gates use held in place.

Paper      Serra, Suris, Miron & Karatzoglou 2018, "Overcoming catastrophic forgetting with hard attention to the task",
           ICML, arXiv:1801.01423.
Checked    against the authors' code, joansj/hat at ed35d72 (MIT): approaches/hat.py, networks/mlp_hat.py and
           networks/alexnet_hat.py.
Method     For task t and layer l (`clbench.nets.shared.gated`):
               a_l^t = sigmoid(s e_l^t), times the layer's output                                               (1)
               a_l^{<t} = max over the tasks before of their a_l at s_max                                       (2)
               the step of W_ij of layer l, from unit j to unit i:  times 1 - min(a_{l,i}^{<t}, a_{l-1,j}^{<t}) (3)
               (1 where layer l sees the inputs: times 1 - a_{l,i}; biases likewise)
               s = 1/s_max + (s_max - 1/s_max) (b - 1) / (B - 1) in batch b of the B of an epoch                (4)
               gradient of e: times s_max/s (cosh(s e) + 1) / (cosh(e) + 1), |s e| clamped to 50                (5)
               after the step e is clamped to |e| <= 6                                                          (6)
               loss + lam R,  R = sum of a^t (1 - a^{<t}) / sum of (1 - a^{<t}), over all layers' units         (7)
           e is drawn from a standard normal. A head per task, which nothing gates.
Hard       `hard = true`: after its task a gate is its embedding's sign, as s_max to infinity makes it, kept as one bit
           for good. a^{<t} is then 0 or 1, a weight between two units that other tasks use is put back to the bit after
           every step, and no later task can change an earlier one's logits. Without, gates stay soft and old tasks may
           move a little where they are between 0 and 1: the paper's method, and the default.
Departs    (3) scales the step that the optimiser takes, not the gradient it is given: the same under plain SGD, which
           the paper uses, and the only way that holds under others. Adam divides a gradient by its own size, so a
           scaled one moves a weight as far as before; momentum and weight decay move weights without any gradient.
           Clipping sees the gradient before (3); the authors' bound of 10,000 does nothing either way.
           (4) in a budget of iterations: the budget is cut into as many equal stretches as it has whole epochs, one at
           least, each annealed to its end, so that training never stops at a half-open s. The authors' code goes by
           samples and ends one batch short of s_max.
           (7) is 0 once every unit is used; the formula, and the authors' code, divide 0 by 0.
           `embedding_lr` is ours: Adam undoes (5) too, since it makes every step about as long, and with a small
           learning rate gates stay where they were drawn. With it, embeddings take plain gradient steps of their own.
           (1): a gate of a sigmoid below 1e-33 is 0, for a CPU's sake. A schedule of the learning rate leaves
           `embedding_lr` alone. Weight decay, where the budget has any, holds embeddings as it does weights, unless
           `embedding_lr` is set.
           The authors restore the weights of the best validation loss after a task; here the last ones stay.
A task     seen again: a^{<t} is over all tasks but itself, so what it alone uses learns on. Soft gates learn on too;
again      hard ones stay.
Stores     per task an embedding, one number per unit (hard: one bit), and a head. While a task trains: (3) for every
           weight, and a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, ClassVar, cast

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.loading import Batch, ResidentLoader, TensorTask
from clbench.nets import CHAINS
from clbench.nets.shared.gated import AttentionNet, open_units
from clbench.seeds import derive
from clbench.sharing import Use
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy

LARGEST_EMBEDDING = 6.0
LARGEST_ARGUMENT = 50.0
"""Of the hyperbolic cosine in the compensation; its own value at 89 would not fit a float32."""


class HAT(Strategy):
    """Learned gates per task; `model` is an `AttentionNet`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of HAT."""

        lam: Annotated[float, Field(ge=0)] = 0.75
        """Weight of the regulariser that keeps gates from opening unused units, c in the paper."""
        s_max: Annotated[float, Field(gt=1)] = 400.0
        """Largest scale of the gates' argument."""
        hard: bool = False
        """Whether gates are 0 or 1 after their task, and what they use is frozen to the bit."""
        embedding_lr: Annotated[float, Field(gt=0)] | None = None
        """Step of plain gradient descent for embeddings; left out: the budget's optimiser moves them too."""

    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"task"})
    model_kinds: ClassVar[frozenset[str] | None] = CHAINS

    def __init__(self, *, setup: Setup, config: Config) -> None:
        def new_net() -> AttentionNet:
            try:
                return AttentionNet(setup.new_net(), derive(setup.seed, "attention"), config.s_max)
            except ValueError as error:
                rule = "HAT needs a net that is a chain of layers, such as mlp, zenke or lenet"
                raise UserError(f"{rule}: {error}") from None

        super().__init__(setup=replace(setup, new_net=new_net), config=config)
        self.net.remembers = config.lam > 0
        self.scales: Iterator[float] = iter(())
        """The s of the steps to come."""
        self.price: Tensor | None = None
        """What every gate adds to the loss, opened, (U,), while a task trains; None where there is no other."""
        self.held: _Held | None = None
        """The trunk's weights while a task trains, where there are others."""
        self.compensated: Tensor | None = None
        """Gradient of the embedding, where it takes steps of its own."""

    @property
    def net(self) -> AttentionNet:
        """The net in training."""
        return cast(AttentionNet, self.model)

    @property
    def embedding(self) -> nn.Parameter | None:
        """The embedding in training; None where gates are hard for good."""
        return self.net.attention(self.task_label).embedding

    # ---------------------------------------------------------------------------------------------------- before, after

    def before_task(self, experience: DatasetExperience) -> None:
        """Find out what the other tasks use."""
        others = [self.net.lasting(task) for task in self.net.tasks() if task != self.task_label]
        if not others:
            return
        past = open_units(others)
        self.spare(past)
        used = self.net.over_weights(past)
        names, weights = zip(*self.net.trunk.named_parameters(), strict=True)
        self.held = _Held(list(weights), [used[name].contiguous() for name in names], [*map(torch.empty_like, weights)])

    def after_task(self, experience: DatasetExperience) -> None:
        """Make the gates hard, where they are to be; let go of what only training needs."""
        self.price, self.held, self.compensated = None, None, None
        embedding = self.embedding
        if not self.config.hard or embedding is None:
            return
        self.net.attention(self.task_label).harden()
        self.optimizer.state.pop(embedding, None)
        group = self.optimizer.param_groups[0]
        group["params"] = [parameter for parameter in group["params"] if parameter is not embedding]

    # --------------------------------------------------------------------------------------------------------- training

    def fit(self, tasks: Sequence[TensorTask], order: torch.Generator | None = None) -> None:
        """Train with an s that rises in every epoch, equation 4."""
        budget = self.setup.train
        per_epoch = len(ResidentLoader(tasks, budget.batch_size))
        steps = budget.iterations if budget.iterations is not None else (budget.epochs or 0) * per_epoch
        self.scales = scales(steps, per_epoch, self.config.s_max)
        super().fit(tasks, order)

    def train_step(self, batch: Batch) -> None:
        """One step at this batch's s, taken back as far as other tasks use what it moves; equations 3 and 6."""
        self.net.scale = next(self.scales, self.config.s_max)
        if self.held is not None:
            self.held.keep()
        super().train_step(batch)
        if self.held is not None:
            self.held.take_back()
        embedding = self.embedding
        if embedding is not None:
            with torch.no_grad():
                if self.compensated is not None:
                    embedding.sub_(self.compensated, alpha=self.config.embedding_lr or 0.0)
                embedding.clamp_(-LARGEST_EMBEDDING, LARGEST_EMBEDDING)

    def extra_loss(self) -> Tensor | None:
        """Return lam times the share of the units not used before that the gates open, equation 7."""
        gates = self.net.latest
        return None if gates is None else self.penalty(gates)

    def spare(self, past: Tensor) -> None:
        """Take note of how far other tasks use each unit, (U,)."""
        unused = 1 - past
        total = unused.sum()
        self.price = self.config.lam * unused / torch.where(total > 0, total, 1)

    def penalty(self, gates: Tensor) -> Tensor:
        """Return lam R of equation 7, a 0-dim tensor, for gates (U,)."""
        return self.config.lam * gates.mean() if self.price is None else torch.dot(gates, self.price)

    def after_backward(self) -> None:
        """Undo what annealing does to the embedding's gradient, equation 5."""
        self.net.latest = None  # it holds the graph
        embedding = self.embedding
        if embedding is None or embedding.grad is None:
            return
        embedding.grad.mul_(compensation(embedding.detach(), self.net.scale, self.config.s_max))
        if self.config.embedding_lr is not None:
            self.compensated, embedding.grad = embedding.grad, None

    # ------------------------------------------------------------------------------------------------------------ books

    def uses(self) -> dict[int, list[Use]]:
        """Return what each task uses: weights between two units whose gates are open by more than half, and its own."""
        own = self.model.task_parameters()
        found = {}
        for task in self.net.tasks():
            used = self.net.over_weights(self.net.lasting(task))
            found[task] = [
                Use(parameter, used[name] > 0.5) for name, parameter in self.net.trunk.named_parameters()
            ]
            found[task] += [Use(tensor) for tensor in (*own[task], *self.net.part(task).buffers())]
        return found


@dataclass(frozen=True)
class _Held:
    """The trunk's weights while a task trains; all at once, since on small nets a call costs more than its work."""

    weights: list[Tensor]
    used: list[Tensor]
    """How far other tasks use them, 1 - what equation 3 multiplies a step by."""
    before: list[Tensor]
    """What they were before the step."""

    @torch.no_grad()
    def keep(self) -> None:
        """Note the weights."""
        torch._foreach_copy_(self.before, self.weights)

    @torch.no_grad()
    def take_back(self) -> None:
        """Take their step back as far as they are used; exact at both ends, at 1 to the bit and at 0 not at all."""
        torch._foreach_lerp_(self.weights, self.before, self.used)


def scales(steps: int, per_epoch: int, s_max: float) -> Iterator[float]:
    """Yield the s of every step of a task, equation 4; a stretch of one batch is at s_max.

    Args:
        steps: of the budget, cut into as many stretches as whole epochs fit, one at least, their lengths equal up to
            one.
        per_epoch: batches of an epoch.
        s_max: where each stretch ends; it begins at 1 / s_max.
    """
    stretches = max(1, steps // per_epoch)
    ends = [steps * k // stretches for k in range(stretches + 1)]
    for begin, end in pairwise(ends):
        for b in range(end - begin):
            share = b / (end - begin - 1) if end - begin > 1 else 1.0
            yield 1 / s_max + (s_max - 1 / s_max) * share


def compensation(embedding: Tensor, s: float, s_max: float) -> Tensor:
    """Return the factor of equation 5: the gradient becomes that of s_max sigmoid(e), whatever s is.

    sigmoid'(x) = 1 / (2 (cosh x + 1)), so s sigmoid'(s e) times the factor is s_max sigmoid'(e).
    """
    argument = (s * embedding).clamp_(-LARGEST_ARGUMENT, LARGEST_ARGUMENT)
    return argument.cosh_().add_(1).mul_(s_max / s).div_(torch.cosh(embedding).add_(1))
