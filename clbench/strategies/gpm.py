"""GPM, gradient projection memory: steps orthogonal to what the layers' inputs of earlier tasks span.

Paper      Saha, Garg & Roy 2021, "Gradient projection memory for continual learning", ICLR, arXiv:2103.09762.
Checked    against the authors' code, sahagobinda/GPM (MIT): main_pmnist.py, main_cifar100.py.
Method     a layer's step lies in the span of its inputs, dW = sum_n delta_n x_n^T, and a step orthogonal to an input x
           leaves the layer's answer to it alone: dW x = 0. After task t, R = (x_1 ... x_n) are a layer's inputs for
           some of the task's samples (a convolution's: the patches under its kernel, a column each) and M its
           orthonormal basis so far:
               R' = R - M M^T R,  its left singular vectors by falling singular value           (eq. 8)
               M <- (M, the first k of them),  k the least with
                   |M M^T R|^2 + |R'_k|^2 >= threshold |R|^2,   Frobenius norms                 (eq. 5, 9)
           and later tasks step along  grad - grad M M^T                                        (eq. 6, 7)
           threshold = `threshold` + `rise` * t for t = 0, 1, ...; one number, or one per layer, first to last, at the
           end the head where tasks share one. A head of a task's own is free.
Optimiser  what is projected is the gradient: only plain SGD without weight decay steps where it points, and momentum
           within a task. Adam scales components one by one and so leaves the subspace.
Departs    R enters by R R^T, in double precision, whose eigenvectors are R's left singular vectors: it is never held.
           On the first task the code keeps a vector less than (eq. 5) asks for. The authors' layers have no biases; a
           bias here is one more column of W whose input is always 1, and so falls under the same rule: threshold 0 is
           fine-tuning, bias or none. The code takes fewer samples for convolutions; here all layers see the same.
Stores     M of every layer, (inputs, k). While a task trains, for a layer with k above half its inputs, a basis of
           what is left of them, which is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.loading import ResidentLoader, TensorTask, tasks_in
from clbench.nets import CHAINS
from clbench.nets.trunk import ChainTrunk, bare_chain
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy

Layer = nn.Linear | nn.Conv2d
Share = Annotated[float, Field(ge=0, le=1)]

_CHUNK = 50
"""Samples whose patches are held at once."""
_ROUNDING = 1e-10
"""Share of a squared norm that counts as none: a threshold of 1 is met by all directions that are no noise."""


class GPM(Strategy):
    """Gradient projection memory on nets that are a chain of layers."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of GPM."""

        threshold: Share | list[Share]
        """Share of the squared norm of a layer's inputs that its basis is to hold; one number, or one per layer."""
        rise: Annotated[float, Field(ge=0)] = 0.0
        """Added to the threshold with every task."""
        samples: Annotated[int, Field(gt=0)] = 300
        """Training samples of a task whose layers' inputs are looked at."""

    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"task", "domain"})
    model_kinds: ClassVar[frozenset[str] | None] = CHAINS
    stores: ClassVar[tuple[str, ...]] = ("bases",)
    sized_by_learning: ClassVar[bool] = True

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        try:
            bare_chain(self.model.trunk)
        except ValueError as error:
            rule = "GPM needs a net that is a chain of layers, such as mlp, zenke or lenet"
            raise UserError(f"{rule}: {error}") from None
        layers, asked = list(self.layers()), config.threshold
        if isinstance(asked, list) and len(asked) != len(layers):
            shared = f"tasks share {len(layers)} layers: {', '.join(layers)}"
            raise UserError(f"GPM: threshold has {len(asked)} numbers, but {shared}")
        self.bases: dict[str, Tensor] = {}
        """M, orthonormal columns (inputs, k), by name of the layer."""
        self.projected: list[tuple[Layer, Tensor, bool]] = []
        """While a task trains: a layer, a basis, and whether it spans what is left of the gradient or what is taken."""

    @property
    def trunk(self) -> ChainTrunk:
        """The chain of layers."""
        return cast(ChainTrunk, self.model.trunk)

    def layers(self) -> dict[str, Layer]:
        """Return the layers that all tasks share, by name, first to last."""
        found = {f"trunk.{name}": self.trunk.layer(i) for i, name in enumerate(self.trunk.chain)}
        shared = getattr(self.model.head, "linear", None)
        return found | ({"head.linear": shared} if isinstance(shared, nn.Linear) else {})

    # --------------------------------------------------------------------------------------------------------- training

    def before_task(self, experience: DatasetExperience) -> None:
        """Take each layer's basis, or that of its complement where it is the smaller."""
        for name, layer in self.layers().items():
            basis = self.bases.get(name)
            if basis is None or basis.shape[1] == 0:
                continue
            inputs, k = basis.shape
            if 2 * k <= inputs:
                self.projected.append((layer, basis, False))
            else:
                rest = torch.linalg.qr(basis.double(), mode="complete")[0][:, k:]
                self.projected.append((layer, rest.to(basis.dtype).contiguous(), True))

    @torch.no_grad()
    def after_backward(self) -> None:
        """Take from every shared layer's gradient what lies in its basis."""
        for layer, basis, left in self.projected:
            gradient = joined(layer)
            if gradient is None:
                continue
            part = (gradient @ basis) @ basis.T
            _set(layer, part if left else gradient - part)

    # ----------------------------------------------------------------------------------------------------------- memory

    def after_task(self, experience: DatasetExperience) -> None:
        """Extend every layer's basis by what the task adds."""
        self.projected = []
        for (name, gram), threshold in zip(
            self.second_moments(tasks_in(experience.dataset.eval())).items(), self.thresholds(), strict=True
        ):
            old = self.bases.get(name, gram.new_zeros(len(gram), 0))
            dtype = next(self.model.parameters()).dtype
            self.bases[name] = extended(old.to(gram.dtype), gram, threshold).to(dtype)

    def thresholds(self) -> list[float]:
        """Return this task's threshold of every layer."""
        asked = self.config.threshold
        each = asked if isinstance(asked, list) else [asked] * len(self.layers())
        return [min(1.0, threshold + self.config.rise * self.tasks_seen) for threshold in each]

    @torch.no_grad()
    def second_moments(self, tasks: list[TensorTask]) -> dict[str, Tensor]:
        """Return R R^T, float64 (inputs, inputs), of every shared layer, for some samples of the task."""
        self.model.eval()
        layers = list(self.layers().items())
        total: dict[str, Tensor] = {}
        left = self.config.samples
        for batch in ResidentLoader(tasks, _CHUNK, self.chance):
            x = self.trunk.prepare(batch.x[:left])
            left -= len(x)
            for i, (name, layer) in enumerate(layers):
                seen = inputs_of(layer, x).double()
                total[name] = total.get(name, 0) + seen @ seen.T
                if i < len(self.trunk.chain):
                    x = self.trunk.between(i, layer(x))
            if left <= 0:
                break
        return total


def inputs_of(layer: Layer, x: Tensor) -> Tensor:
    """Return what meets a layer's weights, a column each, (inputs, columns); with a bias, a last row of ones.

    Args:
        layer: a linear map, whose columns are samples, or a convolution, whose columns are patches.
        x: what it is given: (B, features) or (B, C, H, W).
    """
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        columns = patches.transpose(0, 1).flatten(1)
    else:
        columns = x.T
    return columns if layer.bias is None else torch.cat([columns, columns.new_ones(1, columns.shape[1])])


def extended(basis: Tensor, gram: Tensor, threshold: float) -> Tensor:
    """Return a basis with as many new vectors as hold the threshold, equation 9; (inputs, k) to (inputs, k').

    Args:
        basis: orthonormal columns (inputs, k); k may be 0.
        gram: R R^T, (inputs, inputs).
        threshold: share of |R|^2 that the basis is to hold.
    """
    rest = gram - basis @ (basis.T @ gram)
    rest = rest - (rest @ basis) @ basis.T
    energies, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    energies, vectors = energies.flip(0).clamp_min(0.0), vectors.flip(1)
    total = gram.diagonal().sum()
    # What the basis holds with no vector more, with one, two, ...
    held = total - energies.sum() + torch.cat([energies.new_zeros(1), energies.cumsum(0)])
    more = int((held < (threshold - _ROUNDING) * total).sum())
    room = len(gram) - basis.shape[1]
    new = vectors[:, : min(more, room)]
    # Rounding can leave a small vector leaning on the old ones.
    return torch.cat([basis, torch.linalg.qr(new - basis @ (basis.T @ new))[0]], dim=1)


def joined(layer: Layer) -> Tensor | None:
    """Return the gradient of a layer as one matrix (outputs, inputs), its bias's as the last column; None without."""
    if layer.weight.grad is None:
        return None
    weight = layer.weight.grad.flatten(1)
    if layer.bias is None:
        return weight
    return torch.cat([weight, cast(Tensor, layer.bias.grad)[:, None]], dim=1)


def _set(layer: Layer, gradient: Tensor) -> None:
    inputs = layer.weight[0].numel()
    cast(Tensor, layer.weight.grad).copy_(gradient[:, :inputs].view_as(layer.weight))
    if layer.bias is not None:
        cast(Tensor, layer.bias.grad).copy_(gradient[:, inputs])
