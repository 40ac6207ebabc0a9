"""How generators begin: so that the weights they generate begin like those of a net that was initialised itself.

The rule is the fan-in rule of Chang, Flokas & Lipson 2020 ("Principled weight initialization for hypernetworks",
hyperfan-in): choose the variance of a generator's last layer so that the *generated* weights have the variance that the
target's own initialisation would give them, whatever the generator's width. With x what the last layer H sees,

    theta_i = H_i . x + b_i,   Var(theta_i) = Var(H_ij) |x|^2,   hence   Var(H_ij) = v_i / E|x|^2,

uniform, with b = 0 and v_i the variance wanted (`variances`). Two things differ from the paper. E|x|^2 is not derived
from the variance of embeddings and an activation's gain: it is the mean over embeddings drawn for this, so that any
activation will do. And v_i is PyTorch's own rule by default, weights and biases alike, not half of He's for each.

    full, by layer   one row of H per element, as above. Normalisation: H_i = 0 and b_i = 1 for its weights, 0 for its
                     biases, which is exact at birth and learns all the same
    chunked          the rows of H are shared by all chunks, and a chunk may cross layers: no H can give two layers two
                     variances. H is drawn for one variance, the mean v of the target's elements, and each generated
                     tensor has a constant factor sqrt(v_i / v) (`gains`): exact for every layer, wherever chunks are
                     cut. The factors are of order 1, so that learning rates mean what they mean without them.
                     Normalisation has the factor 1, and its weights are 1 + what is generated
    low-rank         the shared weights are drawn as the target's own; the rows of H of one of the two factors are 0,
                     so that W_t = W at birth

The released code of von Oswald et al. (2020) has a rule, which its commands do not use, that draws each chunk's
*embedding* with a variance of its own instead, the mean of those of the layers the chunk covers: no factors, but layers
in one chunk are alike, and a layer's variance cannot be smaller than what the task's embedding brings.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clbench.nets.hypernet.target import Layer, Target

Init = Literal["torch", "he", "plain", "xavier"]
"""What generated weights begin like: as PyTorch draws them, variance 1 / (3 fan-in); as He et al. 2015 do, 2 / fan-in;
or as they come out of a generator that is itself drawn like any net, with no thought of its target: as PyTorch draws
linear maps ("plain"), or by the rule of Glorot & Bengio 2010, variance 2 / (fan-in + fan-out) and biases 0 ("xavier":
the commands of von Oswald et al. 2020 and of Henning et al. 2021)."""

ALONE: frozenset[Init] = frozenset({"plain", "xavier"})
"""Rules that look at the generator alone."""


def require_init(init: str) -> None:
    """Refuse a rule there is not.

    Raises:
        ValueError: unknown.
    """
    if init not in get_args(Init):
        raise ValueError(f"generators begin by the rule {', '.join(get_args(Init))}, not {init!r}")


def variance(layer: Layer, init: Init) -> float:
    """Return the variance that a tensor's elements are to begin with.

    Weights: 1 / (3 fan-in), PyTorch's uniform rule, or 2 / fan-in. Biases: 1 / (3 fan-in), PyTorch's, by any rule.
    Normalisation: 0. Rules `ALONE` want nothing of what is generated; what is not, they draw as PyTorch does.
    """
    if layer.kind == "norm":
        return 0.0
    return 2 / layer.fan_in if init == "he" and layer.kind == "weight" else 1 / (3 * layer.fan_in)


def mean_variance(target: Target, init: Init) -> float:
    """Return the mean of the variances of a target's elements; normalisation's, which begin as constants, apart."""
    drawn = [layer for layer in target.layers if layer.kind != "norm"]
    total = sum(layer.size for layer in drawn)
    if not total:
        return 1e-3  # a target of normalisation alone: any small number
    return sum(layer.size * variance(layer, init) for layer in drawn) / total


def gains(target: Target, init: Init) -> list[float]:
    """Return the constant factor of every tensor of a chunked target, sqrt(v_i / v); 1 for all by a rule `ALONE`."""
    if init in ALONE:
        return [1.0] * len(target.layers)
    mean = mean_variance(target, init)
    return [1.0 if layer.kind == "norm" else math.sqrt(variance(layer, init) / mean) for layer in target.layers]


@torch.no_grad()
def draw(parameter: Tensor, variances: float | Tensor, generator: torch.Generator) -> None:
    """Fill a parameter with uniform numbers of mean 0, drawn on the CPU in float32.

    Args:
        parameter: (n, ...); one on "meta" is left alone.
        variances: one for all, or per row (n,).
        generator: on the CPU.
    """
    if parameter.is_meta:
        return
    drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu").uniform_(-1, 1, generator=generator)
    scale = torch.as_tensor(variances, dtype=torch.float32, device="cpu").mul(3).sqrt()
    drawn.mul_(scale.view(-1, *[1] * (parameter.ndim - 1)) if scale.ndim else scale)
    parameter.copy_(drawn)


@torch.no_grad()
def draw_normal(parameter: Tensor, generator: torch.Generator, std: float = 1.0) -> None:
    """Fill a parameter with normal numbers of mean 0, drawn on the CPU in float32; one on "meta" is left alone."""
    if not parameter.is_meta:
        drawn = torch.randn(parameter.shape, dtype=torch.float32, device="cpu", generator=generator)
        parameter.copy_(drawn.mul_(std))


def zero_(*parameters: nn.Parameter | None) -> None:
    """Make parameters zero; None is passed over."""
    for parameter in parameters:
        if parameter is not None:
            nn.init.zeros_(parameter)
