"""Gradient episodic memory (GEM): a step may not raise the loss on the samples of any past task.

Paper      Lopez-Paz & Ranzato 2017, "Gradient episodic memory for continual learning", NeurIPS, arXiv:1706.08840,
           equations 7, 8 and 11.
Checked    against quadprog, a search over all active sets and Avalanche's class (tests/test_gem.py), and the settings
           of the authors' repository, facebookresearch/GradientEpisodicMemory (CC BY-NC: no code of it is here).
Method     g is the gradient on the current batch, g_k that on all samples kept of past task k, at every step. Where
           some g . g_k < 0, the step takes the vector nearest to g that has g~ . g_k >= 0 for every k. In the dual,
           with the g_k as rows of G, one number per past task:
               v = argmin 1/2 v' (G G' + 0.001 I) v + (G g)' v   over  v >= strength,      g~ = g + G' v
           strength 0 is that projection; above it every past task has a part in g~ whether it was violated or not,
           which helps old tasks to get better. When a task ends, `per_task` of its samples are kept.
Departs    from the paper, with the code: the strength bounds v from below, where the paper adds it to the solution, and
           0.001 I makes the programme's matrix definite. Samples are a task's at random, not its last ones: the stream
           is shuffled. The QP is solved as non-negative least squares by scipy. `replay` (Hsu et al. 2018,
           arXiv:1810.12488, GT-RIPL/Continual-Learning-Benchmark, MIT licence) also trains on what is kept: beside N
           new samples every old one is in each pass as often as the memory fits into N. Where the memory is full, its
           room is shared by the classes of the tasks so far; those authors share it by tasks.
Stores     up to `buffer` samples, uint8 as the learner sees them, with label and task. While a task trains: k + 1
           gradients of P values at the k-th task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from numpy.typing import NDArray
from pydantic import Field
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import nnls
from torch import Tensor

from clbench.loading import Batch, TensorTask
from clbench.strategies.base import Setup
from clbench.strategies.buffer import Buffer
from clbench.strategies.constrained import Constrained

RIDGE = 1e-3
"""Added to the diagonal of G G', as the authors' code does."""


class GEM(Constrained):
    """GEM; with `replay` it trains on the memory, too."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of GEM."""

        buffer: Annotated[int, Field(gt=0)]
        """Samples kept in all."""
        per_task: Annotated[int, Field(ge=0)]
        """Samples kept of each task, as long as there is room; 0 shares all of it by those so far."""
        strength: Annotated[float, Field(ge=0)]
        """Least weight of every past task's gradient in a step that is changed."""
        replay: bool = False
        """Also train on the samples kept."""

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.memory = Buffer(config.buffer, "class_balanced", self.chance)
        self.past: list[Tensor] = []
        """While a task trains: where the samples of every past task lie."""
        self.references: Tensor | None = None
        """G, (past tasks, P), from the forward pass of a step to its end."""

    def before_task(self, experience: DatasetExperience) -> None:
        """Look up the samples of every past task."""
        super().before_task(experience)
        self.past = list(self.memory.visits().values())

    def training_data(self, experience: DatasetExperience) -> list[TensorTask]:
        """Return the task and, where it is replayed, the memory."""
        tasks = super().training_data(experience)
        return tasks + (self.memory.beside(sum(map(len, tasks))) if self.config.replay else [])

    def rehearse(self, batch: Batch) -> Batch:
        """Take the gradient on each past task's samples."""
        if self.past:
            self.references = torch.stack([self.gradient_on(self.memory.take(places)) for places in self.past])
        return batch

    @torch.no_grad()
    def after_backward(self) -> None:
        """Project the gradient where it would raise the loss on some past task's samples."""
        if self.references is not None:
            gradient = self.gradient()
            if bool((self.references @ gradient < 0).any()):
                self.set_gradient(projected(gradient, self.references, self.config.strength))
        self.references = None

    def after_task(self, experience: DatasetExperience) -> None:
        """Keep some of the task's samples."""
        self.past = []
        self.keep(experience, self.config.per_task)


def projected(gradient: Tensor, references: Tensor, strength: float) -> Tensor:
    """Return GEM's step g~, (P,).

    Args:
        gradient: g, (P,).
        references: G, (T, P), a row per past task.
        strength: lower bound of the dual variables.
    """
    weights = dual(
        (references @ references.T).double().cpu().numpy(), (references @ gradient).double().cpu().numpy(), strength
    )
    return gradient + torch.from_numpy(weights).to(references) @ references


def dual(products: NDArray[Any], along: NDArray[Any], strength: float) -> NDArray[Any]:
    """Return v, (T,): the minimum of 1/2 v' (products + 0.001 I) v + along' v over v >= strength.

    With u = v - strength >= 0 and products + 0.001 I = L L' that is, up to a constant, non-negative least squares:
    1/2 |L' u + c|^2 with c = L^-1 (along + L L' strength).

    Args:
        products: G G', (T, T) float64.
        along: G g, (T,) float64.
        strength: lower bound.
    """
    matrix = products + RIDGE * np.eye(len(products))
    lower = cholesky(matrix, lower=True)
    slope = along + matrix @ np.full(len(products), strength)
    above: NDArray[Any] = nnls(lower.T, -solve_triangular(lower, slope, lower=True))[0]
    return above + strength
