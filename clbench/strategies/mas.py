"""Memory aware synapses (MAS): a weight matters as much as the net's output depends on it, whatever the labels.

Paper      Aljundi, Babiloni, Elhoseiny, Rohrbach & Tuytelaars 2018, "Memory aware synapses: learning what (not) to
           forget", ECCV, arXiv:1711.09601.
Checked    against the code of the published rows, GT-RIPL/Continual-Learning-Benchmark (MIT), agents/regularization.py.
           And read for facts: rahafaljundi/MAS-Memory-Aware-Synapses at c3e6a85 (for research purposes: nothing taken).
Method     after a task, with F the logits for the task's samples x_n,
               Omega_i <- Omega_i + (1 / N) sum_n | d ||F(x_n)||^2 / d theta_i |
           and later tasks minimise
               loss + lam * sum_i Omega_i (theta_i - theta*_i)^2,  theta* the weights as the task found them.
As the     `batch_size` b > 1: gradients are averaged over a batch before their sign is dropped, as codes do for speed
codes      (the authors' 200, Hsu et al.'s 128): signs cancel within a batch, values are smaller.
           `outputs = "mean"`: ||F||^2 is divided by the number of logits (Hsu et al.).
Departs    The paper may use any data, unlabelled too; here the task's training samples. The penalty enters as its
           gradient, 2 lam Omega (theta - theta*). A parameter without a gradient, such as the head of another task,
           does not move. Avalanche averages old and new importances; here they add up, as in the authors' code.
Stores     P values: Omega; while a task trains P more, the anchor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor

from clbench.loading import ResidentLoader, TensorTask, tasks_in
from clbench.strategies.anchored import Anchored
from clbench.strategies.sample_gradients import chunk_size, summed_gradients


class MAS(Anchored):
    """Sensitivities of the output as importances."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of MAS."""

        lam: Annotated[float, Field(ge=0)]
        """Strength of the penalty."""
        samples: Annotated[int, Field(ge=0)] = 0
        """Training samples of a task used for its importances; 0 uses all."""
        batch_size: Annotated[int, Field(gt=0)] = 1
        """Samples whose gradients are averaged before their sign is dropped."""
        outputs: Literal["sum", "mean"] = "sum"
        """What becomes of the squares of the logits."""

    def strength(self) -> float:
        """Return 2 lam, the factor of Omega (theta - theta*)."""
        return 2.0 * float(self.config.lam)

    def after_task(self, experience: DatasetExperience) -> None:
        """Add the task's importances to what is known."""
        for name, value in self.sensitivity(tasks_in(experience.dataset.eval())).items():
            old = self.importance.get(name)
            self.importance[name] = value if old is None else old + value
        self.release()

    def sensitivity(self, tasks: list[TensorTask]) -> dict[str, Tensor]:
        """Return (1 / N) sum_n |d ||F(x_n)||^2 / d theta| on the current weights, one tensor per parameter."""
        self.model.eval()
        alone = self.config.batch_size == 1
        total = {name: torch.zeros_like(parameter) for name, parameter in self.model.named_parameters()}
        left, count = self.config.samples or sum(len(task) for task in tasks), 0
        for batch in ResidentLoader(tasks, chunk_size(self.model) if alone else self.config.batch_size, self.chance):
            x = batch.x[:left]
            for name, value in (self._alone(x) if alone else self._together(x)).items():
                total[name] += value
            count += len(x) if alone else 1
            left -= len(x)
            if left <= 0:
                break
        return {name: value / count for name, value in total.items()}

    def _alone(self, x: Tensor) -> dict[str, Tensor]:
        """Return the sum of the samples' own |d ||F||^2 / d theta|."""
        once = next(self.model.parameters()).new_ones(1, len(x))
        return summed_gradients(
            self.model, self.task_label, x, lambda logits: self._norms(logits)[None], once, torch.abs
        )

    def _together(self, x: Tensor) -> dict[str, Tensor]:
        """Return |d mean_n ||F(x_n)||^2 / d theta|."""
        norm = self._norms(self.model(x, self.task_label)).mean()
        named = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(norm, list(named.values()), allow_unused=True)
        return {name: g.abs() for name, g in zip(named, gradients, strict=True) if g is not None}

    def _norms(self, logits: Tensor) -> Tensor:
        """Return the samples' ||F||^2, (B,), from (B, C)."""
        squares = logits.square()
        return squares.mean(dim=1) if self.config.outputs == "mean" else squares.sum(dim=1)
