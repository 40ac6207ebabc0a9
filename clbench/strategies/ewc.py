"""Elastic weight consolidation (EWC): a quadratic anchor weighted by the diagonal of the Fisher information.

Paper      Kirkpatrick et al. 2017, PNAS 114(13), doi:10.1073/pnas.1611835114; online form: Schwarz et al. 2018,
           "Progress & Compress", arXiv:1805.06370.
Method     after task k, with weights theta*_k,  F_k = E_x E_{y ~ p(y|x)} [ (d log p(y|x) / d theta)^2 ],
           then train on the loss + (lam / 2) * sum_k F_k (theta - theta*_k)^2         (separate)
           or, with F~_k = gamma F~_{k-1} + F_k,  + (lam / 2) * F~ (theta - theta*)^2  (online, theta* the latest).
Estimators of F (van de Ven 2025, "On the computation of the Fisher information in continual learning"; lam means
           something else under each):
           exact      the expectation over labels in full, one sample at a time
           sampled    one label drawn from the model's own prediction
           empirical  the sample's true label
           batched    the squared gradient of a mini-batch's mean loss: not a Fisher, but what Avalanche computes
Departs    separate: the sum of the tasks' quadratics is kept as one, S = sum_k F_k around the F-weighted mean of the
           anchors, which has the same gradient (tests/test_ewc.py) and needs 2 P values whatever the number of tasks.
           A parameter born later (a new head) has no anchor for earlier tasks.
Stores     2 P values: importance and anchor of every parameter of earlier tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from clbench.loading import ResidentLoader, TensorTask, tasks_in
from clbench.nets import MLP
from clbench.strategies.base import Setup, Strategy

Estimator = Literal["exact", "sampled", "empirical", "batched"]
_CHUNK_VALUES = 16_000_000
"""Per-sample gradients held at once, as numbers: 64 MB."""


class EWC(Strategy):
    """EWC with the Fisher estimator of choice, separate or online."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of EWC."""

        lam: Annotated[float, Field(ge=0)]
        """Strength of the penalty; its scale depends on the estimator."""
        fisher: Estimator
        """How the Fisher diagonal is estimated."""
        mode: Literal["separate", "online"]
        """One quadratic per task, or one for all of them."""
        fisher_samples: Annotated[int, Field(ge=0)] = 0
        """Training samples of a task used for its Fisher; 0 uses all."""
        fisher_batch_size: Annotated[int, Field(gt=0)] = 128
        """Mini-batch of the batched estimator."""
        gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
        """Online: how much of the old Fisher survives a task."""

    stores: ClassVar[tuple[str, ...]] = ("importance", "anchor")

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.importance: dict[str, Tensor] = {}
        """Parameter name to S (separate) or F~ (online)."""
        self.anchor: dict[str, Tensor] = {}

    def penalty(self) -> Tensor:
        """Return (lam / 2) * sum of importance * (theta - anchor)^2, a 0-dim tensor; training uses its gradient."""
        terms = [(value * (theta - anchor).square()).sum() for theta, value, anchor in self._anchored()]
        strength: float = self.config.lam
        return strength / 2 * torch.stack(terms).sum() if terms else torch.zeros((), device=self.device)

    @torch.no_grad()
    def after_backward(self) -> None:
        """Add the penalty's gradient, lam * importance * (theta - anchor), to that of the loss.

        By hand, because autograd takes as long for it as for the whole net. A parameter without a gradient, such as the
        head of another task, had no part in the loss: nothing has moved it from its anchor, and nothing shall.
        """
        if self.config.lam == 0:
            return
        active = [(theta.grad, theta, *rest) for theta, *rest in self._anchored() if theta.grad is not None]
        if active:
            gradients, thetas, values, anchors = (list(column) for column in zip(*active, strict=True))
            torch._foreach_addcmul_(gradients, torch._foreach_sub(thetas, anchors), values, value=self.config.lam)

    def _anchored(self) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
        """Return parameter, importance and anchor of everything that earlier tasks care for."""
        named = self.model.named_parameters()
        return [(theta, self.importance[name], self.anchor[name]) for name, theta in named if name in self.importance]

    def after_task(self, experience: DatasetExperience) -> None:
        """Add the task's Fisher to what is known and move the anchor."""
        fisher = self.fisher(tasks_in(experience.dataset.eval()))
        for name, parameter in self.model.named_parameters():
            new, here = fisher[name], parameter.detach().clone()
            old = self.importance.get(name)
            if old is None:
                self.importance[name], self.anchor[name] = new, here
            elif self.config.mode == "online":
                self.importance[name], self.anchor[name] = self.config.gamma * old + new, here
            else:
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
        if self.config.fisher == "batched":
            size = self.config.fisher_batch_size
        elif type(self.model.trunk) is MLP:
            size = 512
        else:
            n_parameters = sum(parameter.numel() for parameter in self.model.parameters())
            size = max(1, min(256, _CHUNK_VALUES // n_parameters))
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
        """Return the sum of the squared gradients of log p(label | x) over a chunk of samples (B, ...)."""
        squares = self._squares_of_linear if type(self.model.trunk) is MLP else self._squares_of_any
        if self.config.fisher == "empirical":
            return squares(x, y[None], torch.ones_like(y, dtype=x.dtype)[None])
        with torch.no_grad():
            probabilities = torch.softmax(self.model(x, self.task_label), dim=1)
        if self.config.fisher == "sampled":
            drawn = torch.multinomial(probabilities.cpu(), 1, generator=self.chance).flatten().to(x.device)
            return squares(x, drawn[None], torch.ones_like(y, dtype=x.dtype)[None])
        every = torch.arange(probabilities.shape[1], device=x.device)[:, None].expand(-1, len(x))
        return squares(x, every, probabilities.T)

    def _squares_of_any(self, x: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return sum_kn weights[k, n] * (d log p(labels[k, n] | x_n) / d theta)^2 per parameter, for any net.

        Args:
            x: (B, ...) inputs.
            labels: (K, B), K labels for each sample.
            weights: (K, B), of each label.
        """
        parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        buffers = dict(self.model.named_buffers())

        def log_likelihood(values: dict[str, Tensor], sample: Tensor, chosen: Tensor) -> Tensor:
            logits = functional_call(self.model, {**values, **buffers}, (sample[None], self.task_label))
            return (chosen * torch.log_softmax(logits[0], dim=0)).sum()

        gradients = vmap(grad(log_likelihood), in_dims=(None, 0, 0))
        with torch.no_grad():
            n_classes = self.model(x[:1], self.task_label).shape[1]
        total = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for label, weight in zip(labels, weights, strict=True):
            chosen = torch.nn.functional.one_hot(label, n_classes).to(x.dtype)
            for name, value in gradients(parameters, x, chosen).items():
                total[name] += torch.tensordot(weight, value.square_(), dims=1)
        return total

    def _squares_of_linear(self, x: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """Return the same for a net whose parameters all belong to linear layers that are asked once.

        There a sample's gradient is an outer product, d (x) a of the gradient d at the layer's output and its input a,
        so the weighted sum of its squares is one matrix product of squares, (w d^2)^T a^2: no gradient per sample.
        """
        asked: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [
            module.register_forward_hook(lambda _, a, out, name=name: asked.update({name: (a[0].detach(), out)}))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        log_p = torch.log_softmax(self.model(x, self.task_label), dim=1)
        for hook in hooks:
            hook.remove()
        outputs = [output for _, output in asked.values()]
        total: dict[str, Tensor] = {}
        for label, weight in zip(labels, weights, strict=True):
            chosen = log_p.gather(1, label[:, None]).sum()
            deltas = torch.autograd.grad(chosen, outputs, retain_graph=True)
            for (name, (a, _)), delta in zip(asked.items(), deltas, strict=True):
                squared = weight[:, None] * delta.square()
                for key, value in ((f"{name}.weight", squared.T @ a.square()), (f"{name}.bias", squared.sum(dim=0))):
                    total[key] = total[key] + value if key in total else value
        return {name: total[name] for name, _ in self.model.named_parameters() if name in total}
