"""L2: every weight is held to where the task found it, all alike.

Paper      the baseline "L2" of Kirkpatrick et al. 2017, PNAS, and of Hsu, Liu, Ramasamy & Kira 2018, "Re-evaluating
           continual learning scenarios", arXiv:1810.12488.
Checked    against the code of the latter, GT-RIPL/Continual-Learning-Benchmark (MIT): agents/regularization.py.
Method     training on task t > 1 minimises  loss + lam * sum_i (theta_i - theta*_i)^2,  theta* the weights as the task
           found them, its newborn outputs included.
Departs    The penalty enters as its gradient, 2 lam (theta - theta*), before clipping. A parameter without a gradient,
           such as the head of another task, does not move at all, where the code lets it go on with Adam's moments.
Stores     nothing between tasks; while one trains, P values: the anchor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor, nn

from clbench.strategies.base import Setup, Strategy


class L2(Strategy):
    """One anchor, every weight as important as any other."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of L2."""

        lam: Annotated[float, Field(ge=0)]
        """Strength of the penalty."""

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.held: list[tuple[nn.Parameter, Tensor]] = []
        """While a task trains: every parameter and its anchor."""

    def before_task(self, experience: DatasetExperience) -> None:
        """Anchor everything, from the second task on."""
        if self.tasks_seen and self.config.lam > 0:
            self.held = [(theta, theta.detach().clone()) for theta in self.model.parameters()]

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add 2 lam (theta - theta*) to the gradient of whatever has one."""
        active = [(theta.grad, theta, anchor) for theta, anchor in self.held if theta.grad is not None]
        if active:
            gradients, thetas, anchors = (list(column) for column in zip(*active, strict=True))
            torch._foreach_add_(gradients, torch._foreach_sub(thetas, anchors), alpha=2 * self.config.lam)

    def after_task(self, experience: DatasetExperience) -> None:
        """Let go of the anchor."""
        self.held = []
