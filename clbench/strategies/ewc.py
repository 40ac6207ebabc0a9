"""Elastic weight consolidation (EWC): a quadratic anchor weighted by the diagonal of the Fisher information.

Paper      Kirkpatrick et al. 2017, PNAS 114(13), doi:10.1073/pnas.1611835114; online form: Schwarz et al. 2018,
           "Progress & Compress", arXiv:1805.06370.
Method     after task k, with weights theta*_k,  F_k = E_x E_{y ~ p(y|x)} [ (d log p(y|x) / d theta)^2 ],
           then train on the loss + (lam / 2) * sum_k F_k (theta - theta*_k)^2         (separate)
           or, with F~_k = gamma F~_{k-1} + F_k,
                               + (lam / 2) * gamma F~ (theta - theta*)^2               (online, theta* the latest)
           or, with the mean instead of the sum,
                               + (lam / 2) * (1 / k) sum_k F_k (theta - theta*)^2      (mean, theta* the latest), as in
           the code of Serrà et al. 2018 (HAT), arXiv:1801.01423.
Estimators of F (van de Ven 2025, "On the computation of the Fisher information in continual learning"; lam means
           something else under each):
           exact      the expectation over labels in full, one sample at a time
           sampled    one label drawn from the model's own prediction
           predicted  the model's most likely label: smaller values, as in the code of van de Ven & Tolias 2018 and 2019
                      and of Hsu et al. 2018
           empirical  the sample's true label
           batched    the squared gradient of a mini-batch's mean loss: not a Fisher, but what Avalanche computes
Departs    separate: the sum of the tasks' quadratics is kept as one, S = sum_k F_k around the F-weighted mean of the
           anchors, which has the same gradient (tests/test_ewc.py) and needs 2 P values whatever the number of tasks.
           A parameter born later (a new head) has no anchor for earlier tasks. The penalty enters as its gradient,
           before clipping; the loss that is checked for NaN is the cross-entropy alone.
Stores     separate: 2 P values, importance and anchor of every parameter of earlier tasks. online, mean: P values, the
           importance; the anchor is the weights themselves until a task trains, and P values more while it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor

from clbench.loading import ResidentLoader, TensorTask, tasks_in
from clbench.strategies.anchored import Anchored
from clbench.strategies.sample_gradients import chunk_size, squared_gradients

Estimator = Literal["exact", "sampled", "predicted", "empirical", "batched"]


class EWC(Anchored):
    """EWC with the Fisher estimator of choice, separate or online."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of EWC."""

        lam: Annotated[float, Field(ge=0)]
        """Strength of the penalty; its scale depends on the estimator."""
        fisher: Estimator
        """How the Fisher diagonal is estimated."""
        mode: Literal["separate", "online", "mean"]
        """One quadratic per task; one for all, of the decayed sum of their Fishers; or one of their mean."""
        fisher_samples: Annotated[int, Field(ge=0)] = 0
        """Training samples of a task used for its Fisher; 0 uses all."""
        fisher_batch_size: Annotated[int, Field(gt=0)] = 128
        """Mini-batch of the batched estimator."""
        gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
        """Online: how much of the old Fisher survives a task."""

    stores: ClassVar[tuple[str, ...]] = ("importance", "anchor")

    def strength(self) -> float:
        """Return lam, times gamma in the online mode: a task is held to the Fisher of its past, already decayed.

        In the mean mode lam over the tasks seen: what is kept is the sum of their Fishers.
        """
        factor = {"separate": 1.0, "online": self.config.gamma, "mean": 1 / max(1, self.tasks_seen)}
        return float(self.config.lam * factor[self.config.mode])

    def before_task(self, experience: DatasetExperience) -> None:
        """Hold what earlier tasks care for to their merged anchor, or to where the last one left it."""
        if self.config.mode == "separate":
            self.hold()
        else:
            super().before_task(experience)

    def after_task(self, experience: DatasetExperience) -> None:
        """Add the task's Fisher to what is known and move the anchor."""
        fisher = self.fisher(tasks_in(experience.dataset.eval()))
        self.held = []
        for name, parameter in self.model.named_parameters():
            if self.config.mode == "separate":
                self._merge(name, fisher[name], parameter.detach().clone())
            else:
                old, kept = self.importance.get(name), self.config.gamma if self.config.mode == "online" else 1.0
                self.importance[name] = fisher[name] if old is None else kept * old + fisher[name]
        if self.config.mode != "separate":
            self.release()

    def _merge(self, name: str, new: Tensor, here: Tensor) -> None:
        """Make one quadratic of a parameter's old one and a new one around `here`."""
        old = self.importance.get(name)
        if old is None:
            self.importance[name], self.anchor[name] = new, here
            return
        total = old + new
        # Where nothing is important any anchor will do: the latest.
        share = torch.where(total > 0, new / total.clamp_min(torch.finfo(total.dtype).tiny), 1.0)
        self.anchor[name] = torch.lerp(self.anchor[name], here, share)
        self.importance[name] = total

    # ----------------------------------------------------------------------------------------------------------- Fisher

    def fisher(self, tasks: list[TensorTask]) -> dict[str, Tensor]:
        """Return the Fisher diagonal on the current weights, one tensor per parameter, in its shape."""
        self.model.eval()
        total = {name: torch.zeros_like(parameter) for name, parameter in self.model.named_parameters()}
        count = 0
        for x, y in self._samples(tasks):
            squares = self._batched(x, y) if self.config.fisher == "batched" else self._per_sample(x, y)
            for name, value in squares.items():
                total[name] += value
            count += 1 if self.config.fisher == "batched" else len(y)
        return {name: value / count for name, value in total.items()}

    def _samples(self, tasks: list[TensorTask]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the task's samples in chunks that fit: shuffled, as many as the settings ask for."""
        size = self.config.fisher_batch_size if self.config.fisher == "batched" else chunk_size(self.model)
        left = self.config.fisher_samples or sum(len(task) for task in tasks)
        for batch in ResidentLoader(tasks, size, self.chance):
            yield batch.x[:left], batch.y[:left]
            left -= len(batch.y)
            if left <= 0:
                return

    def _batched(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        loss = torch.nn.functional.cross_entropy(self.model(x, self.task_label), y)
        named = dict(self.model.named_parameters())
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {name: g.square() for name, g in zip(named, gradients, strict=True) if g is not None}

    def _per_sample(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the sum over a chunk of samples (B, ...) of the squared gradient of log p(label | x)."""
        with torch.no_grad():
            p = torch.softmax(self.model(x, self.task_label), dim=1)
        labels, weights = y[None], torch.ones_like(p[None, :, 0])
        if self.config.fisher == "sampled":
            labels = torch.multinomial(p.cpu(), 1, generator=self.chance).T.to(x.device)
        elif self.config.fisher == "predicted":
            labels = p.argmax(dim=1)[None]
        elif self.config.fisher == "exact":
            labels, weights = torch.arange(p.shape[1], device=x.device)[:, None].expand(-1, len(x)), p.T
        return squared_gradients(self.model, self.task_label, x, labels, weights)
