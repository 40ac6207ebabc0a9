"""What methods with a quadratic anchor share: importances between tasks, anchors while a task trains, their gradient.

Training on a later task minimises, over the parameters i that earlier tasks care for,

    loss + (strength / 2) * sum_i Omega_i (theta_i - theta*_i)^2,

by adding strength * Omega * (theta - theta*) to the gradient of the loss, before clipping: autograd takes as long for
the penalty as for the whole net. The loss that is checked for NaN is that of the data alone.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from torch import Tensor, nn

from clbench.strategies.base import Setup, Strategy


class Anchored(Strategy):
    """Base of the quadratic penalties. A method says `strength`, and sets `importance` in `after_task`.

    Where the anchor is the weights as the task found them, it is a copy while the task trains, and nothing is kept of
    it between tasks.
    """

    stores: ClassVar[tuple[str, ...]] = ("importance",)

    def __init__(self, *, setup: Setup, config: Any) -> None:
        super().__init__(setup=setup, config=config)
        self.importance: dict[str, Tensor] = {}
        """Omega, by name of the parameter; a parameter that no earlier task has trained is missing."""
        self.anchor: dict[str, Tensor] = {}
        """theta*, by name of the parameter."""
        self.held: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        """While a task trains: parameter, importance and anchor of all that earlier tasks care for."""

    def strength(self) -> float:
        """Return the factor of the gradient Omega * (theta - theta*)."""
        raise NotImplementedError

    def before_task(self, experience: DatasetExperience) -> None:
        """Anchor what earlier tasks care for where it is."""
        named = dict(self.model.named_parameters())
        self.anchor = {name: named[name].detach().clone() for name in self.importance}
        self.hold()

    def hold(self) -> None:
        """Hold every parameter that has an importance to its anchor, from now on."""
        named = self.model.named_parameters()
        found = [(theta, self.importance[name], self.anchor[name]) for name, theta in named if name in self.importance]
        self.held = found if self.strength() > 0 else []

    def release(self) -> None:
        """Let go of the anchors."""
        self.anchor, self.held = {}, []

    def penalty(self) -> Tensor:
        """Return (strength / 2) * sum of Omega * (theta - theta*)^2, a 0-dim tensor; training uses its gradient."""
        terms = [(value * (theta - anchor).square()).sum() for theta, value, anchor in self.held]
        return self.strength() / 2 * torch.stack(terms).sum() if terms else torch.zeros((), device=self.device)

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add the penalty's gradient, strength * Omega * (theta - theta*), to that of the loss.

        A parameter without a gradient, such as the head of another task, had no part in the loss: nothing has moved it
        from its anchor, and nothing shall.
        """
        active = [(theta.grad, theta, *rest) for theta, *rest in self.held if theta.grad is not None]
        if active:
            gradients, thetas, values, anchors = (list(column) for column in zip(*active, strict=True))
            torch._foreach_addcmul_(gradients, torch._foreach_sub(thetas, anchors), values, value=self.strength())
