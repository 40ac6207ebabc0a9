"""Synaptic intelligence (SI): every weight counts, as it learns, how much of the fall of the loss is its own.

Paper      Zenke, Poole & Ganguli 2017, "Continual learning through synaptic intelligence", ICML, arXiv:1703.04200.
Checked    against the authors' code, ganguli-lab/pathint (MIT): protocols.py, optimizers.py, regularizers.py; and that
           of the published rows: GMvandeVen/continual-learning (train.py, continual_learner.py), aimagelab/mammoth
           (models/si.py at tag neurips2020), GT-RIPL/Continual-Learning-Benchmark (agents/regularization.py), all MIT.
Method     while task t trains, with g the gradient of its loss at a step and delta what the step does to a weight,
               w_i <- w_i - g_i delta_i                       the path integral, w_i its share of the loss's fall
           after it, with Delta_i what the whole task did to the weight,
               Omega_i <- Omega_i + w_i / (Delta_i^2 + xi)    xi, the damping, bounds what a still weight can have
           and later tasks minimise
               loss + c * sum_i Omega_i (theta_i - theta*_i)^2,  theta* the weights as the task found them.
           For a quadratic loss and small steps w_i -> h_i Delta_i^2 / 2 along a diagonal Hessian h, so Omega -> h / 2.
As the     `path = "loss"`: g is that of the loss alone (the authors, Hsu et al.). "total": that of the whole step,
codes      penalty and clipping included (van de Ven & Tolias, Avalanche, mammoth: its lr * g^2 is -g delta under SGD).
           `floor`: an Omega below zero counts as zero (the authors); the others let it pull weights away.
           `clip`: every component of the step's gradient is cut to [-clip, clip] (mammoth: 1).
Departs    The penalty enters as its gradient, 2 c Omega (theta - theta*). A parameter without a gradient, such as the
           head of another task, neither counts nor moves; where codes hand it zeros, Adam's moments move it on.
Stores     P values: Omega. While a task trains, 4 P more: path, weights at the task's and the step's beginning, and the
           step's gradient (not for "total").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor, nn

from clbench.loading import Batch
from clbench.strategies.anchored import Anchored
from clbench.strategies.base import Setup


class SI(Anchored):
    """Path integrals as importances."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of SI."""

        c: Annotated[float, Field(ge=0)]
        """Strength of the penalty."""
        xi: Annotated[float, Field(gt=0)] = 0.1
        """Damping."""
        path: Literal["loss", "total"] = "loss"
        """Whose gradient the path integral takes: the loss's, or the whole step's."""
        floor: bool = True
        """Whether an importance below zero counts as zero."""
        clip: Annotated[float, Field(gt=0)] | None = None
        """Largest size of a component of the step's gradient."""

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.path: dict[str, Tensor] = {}
        """While a task trains: w, by name of the parameter."""
        self.moving: list[tuple[nn.Parameter, Tensor]] = []
        """While a task trains: every parameter and its w."""
        self.steps: list[tuple[nn.Parameter, Tensor, Tensor, Tensor]] = []
        """While a step is taken: what moves, its w, where it was and the gradient it counts."""

    def strength(self) -> float:
        """Return 2 c, the factor of Omega (theta - theta*)."""
        return 2.0 * float(self.config.c)

    def before_task(self, experience: DatasetExperience) -> None:
        """Note where every weight begins, newborn ones included."""
        named = dict(self.model.named_parameters())
        self.anchor = {name: theta.detach().clone() for name, theta in named.items()}
        self.path = {name: torch.zeros_like(theta) for name, theta in named.items()}
        self.moving = [(theta, self.path[name]) for name, theta in named.items()]
        self.hold()

    @torch.no_grad()
    def after_backward(self) -> None:
        """Note weights and gradients before the step; then add the penalty's."""
        own = self.config.path == "loss"
        self.steps = [
            (theta, path, theta.detach().clone(), theta.grad.clone() if own else theta.grad)
            for theta, path in self.moving
            if theta.grad is not None
        ]
        super().after_backward()
        if self.config.clip is not None:
            nn.utils.clip_grad_value_([theta for theta, *_ in self.steps], self.config.clip)

    def train_step(self, batch: Batch) -> None:
        """One step, and what each weight had of it."""
        super().train_step(batch)
        thetas, paths, before, gradients = (list(column) for column in zip(*self.steps, strict=True))
        with torch.no_grad():
            torch._foreach_addcmul_(paths, gradients, torch._foreach_sub(thetas, before), value=-1.0)
        self.steps = []

    @torch.no_grad()
    def after_task(self, experience: DatasetExperience) -> None:
        """Turn the path integrals into importances."""
        for name, theta in self.model.named_parameters():
            omega = self.path[name] / ((theta - self.anchor[name]).square() + self.config.xi)
            if name in self.importance:
                omega += self.importance[name]
            self.importance[name] = omega.clamp_min_(0.0) if self.config.floor else omega
        self.path, self.moving = {}, []
        self.release()
