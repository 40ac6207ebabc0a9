"""Differentiable functions from one layer's weight to another's.

Each is a module that maps a weight to a weight, and whose own parameters, if it has any, are learned. A weight is
(out, in) of a linear layer or (out, in / groups, kh, kw) of a convolution; where a function says so, a bias (out,) will
do. Any other callable from tensor to tensor can be used wherever these can.

Every function but `Square` and `QuarterTurns`, and a `Resize` to another shape, is the identity when it is new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor]
"""From weight to weight."""

Channels = Literal["crop", "mix"]
"""How a resize changes units and inputs."""


class Same(nn.Module):
    """The weight itself, or the bias: what links by it is tied."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return what came."""
        return weight


class Square(nn.Module):
    """Every element squared, of a weight or a bias: no element is negative, and none has a gradient at zero."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return w^2."""
        return weight * weight  # the derivative of `square` takes a general power


class Scale(nn.Module):
    """s w, with learned s: one number, or one for each output unit; of a weight or a bias.

    Args:
        units: output units of the weight, each with a factor of its own; None for one factor.
        start: of all factors.

    Raises:
        ValueError: no unit.
    """

    def __init__(self, units: int | None = None, start: float = 1.0) -> None:
        super().__init__()
        if units is not None and units < 1:
            raise ValueError(f"a scale needs at least one unit, got {units}")
        self.factor = nn.Parameter(torch.full(() if units is None else (units,), float(start)))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, its i-th output unit times the i-th factor."""
        factor = self.factor
        if factor.ndim == 0:
            return weight * factor
        if len(factor) != len(weight):
            raise ValueError(f"a scale of {len(factor)} units, a weight of {len(weight)}")
        return weight * factor.view(-1, *(1,) * (weight.ndim - 1))


class QuarterTurns(nn.Module):
    """A convolution's kernels turned by quarters: exact, and nothing is learned.

    Args:
        turns: counter-clockwise, row 0 being at the top; 2 x 3 kernels become 3 x 2 ones by an odd number.
    """

    def __init__(self, turns: int = 1) -> None:
        super().__init__()
        self.turns = turns

    def forward(self, weight: Tensor) -> Tensor:
        """Return the turned kernels."""
        _require_kernels(weight)
        return torch.rot90(weight, self.turns, (2, 3))


class Rotate(nn.Module):
    """A convolution's kernels turned by a learned angle, the same for all, around the kernel's middle.

    Values between the kernel's points are interpolated linearly in both directions, and are 0 outside: the map is the
    product with a (k^2, k^2) matrix of weights max(0, 1 - |dx|) max(0, 1 - |dy|). At a quarter turn or none points meet
    points, where the interpolation has a kink: the gradient in the angle there is the sum of those on both sides.

    Args:
        angle: at the start, radians, counter-clockwise.
    """

    def __init__(self, angle: float = 0.0) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.tensor(float(angle)))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the turned kernels, of the same size."""
        _require_kernels(weight)
        height, width = weight.shape[2:]
        rows = torch.arange(height, dtype=weight.dtype, device=weight.device) - (height - 1) / 2
        columns = torch.arange(width, dtype=weight.dtype, device=weight.device) - (width - 1) / 2
        y, x = (grid.flatten() for grid in torch.meshgrid(rows, columns, indexing="ij"))
        cos, sin = self.angle.cos(), self.angle.sin()
        # Where each point comes from: turned back. y counts downwards.
        from_x, from_y = cos * x - sin * y, sin * x + cos * y
        near_x = (1 - (from_x[:, None] - x).abs()).clamp(min=0)
        near_y = (1 - (from_y[:, None] - y).abs()).clamp(min=0)
        return (weight.flatten(2) @ (near_x * near_y).T).view_as(weight)


class LowRank(nn.Module):
    """W + B A of a learned B (out, rank), zero when new, and A (rank, fan-in), uniform within 1 / sqrt(fan-in).

    As in LoRA (Hu et al. 2022, arXiv:2106.09685), whose letters these are, but without its factor alpha / rank. The
    first gradient is B's alone. A convolution's kernels count as fan-in.

    B is kept as `up`, A as `down`.

    Args:
        shape: of the weight.
        rank: of the correction, at least 1 and at most the weight's own.
        generator: of A, on the CPU; None for the global one.

    Raises:
        ValueError: no weight's shape, or no such rank.
    """

    def __init__(self, shape: Sequence[int], rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if len(shape) < 2:
            raise ValueError(f"a low-rank correction is of a weight (out, in, ...), not of shape {tuple(shape)}")
        out, fan_in = shape[0], prod(shape[1:])
        if not isinstance(rank, int) or not 1 <= rank <= min(out, fan_in):
            raise ValueError(f"rank {rank!r}: of a weight {tuple(shape)} it is from 1 to {min(out, fan_in)}")
        bound = fan_in**-0.5  # Kaiming's uniform with a = sqrt 5
        self.up = nn.Parameter(torch.zeros(out, rank))
        self.down = nn.Parameter(torch.empty(rank, fan_in).uniform_(-bound, bound, generator=generator))

    def forward(self, weight: Tensor) -> Tensor:
        """Return W + B A."""
        up, down = self.up, self.down
        flat = weight if weight.ndim == 2 else weight.reshape(len(weight), -1)
        if flat.shape != (len(up), down.shape[1]):
            made_for = (len(up), down.shape[1])
            raise ValueError(f"a correction of {made_for} (out, fan-in), a weight of {tuple(weight.shape)}")
        found = torch.addmm(flat, up, down)
        return found.view_as(weight) if found.shape != weight.shape else found


class Resize(nn.Module):
    """A weight of another shape: other units, other inputs, another kernel; or a bias of another length.

    Kernels are resized first, like images and as `WeightMaps` does: by linear interpolation, every point being a pixel,
    so that a kernel's middle stays its middle. Then units and inputs: "crop" leaves the last ones out, or adds zeros
    behind them; "mix" multiplies by learned matrices, M W N^T, which are what "crop" does when new.

    Args:
        source: shape of the weight that comes.
        shape: what it becomes.
        channels: how units and inputs change.

    Raises:
        ValueError: shapes of different kinds, or without elements, or another word for `channels`.
    """

    def __init__(self, source: Sequence[int], shape: Sequence[int], channels: Channels = "crop") -> None:
        super().__init__()
        if len(source) != len(shape) or len(shape) not in (1, 2, 4) or min(*source, *shape) < 1:
            raise ValueError(f"no weight of shape {tuple(source)} can be resized to {tuple(shape)}")
        if channels not in get_args(Channels):
            raise ValueError(f"channels are one of {', '.join(get_args(Channels))}; got {channels!r}")
        self.source, self.shape = tuple(source), tuple(shape)
        mixed = list(zip(source[:2], shape[:2], strict=True)) if channels == "mix" else []
        self.mix = nn.ParameterList(torch.eye(new, old) for old, new in mixed)
        """Empty, or (units, source's units), and (inputs, source's inputs) but for a bias."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight in the new shape."""
        if weight.shape != self.source:
            raise ValueError(f"a resize of {self.source}, a weight of {tuple(weight.shape)}")
        if self.source[2:] != self.shape[2:]:
            weight = F.interpolate(weight, self.shape[2:], mode="bilinear", align_corners=False)
        if len(self.mix):
            weight = torch.tensordot(self.mix[0], weight, dims=([1], [0]))
            if len(self.mix) > 1:
                weight = torch.tensordot(weight, self.mix[1], dims=([1], [1])).movedim(-1, 1)
            return weight
        for dim, size in enumerate(self.shape[:2]):
            if size < weight.shape[dim]:
                weight = weight.narrow(dim, 0, size)
            elif size > weight.shape[dim]:
                after = (0, 0) * (weight.ndim - 1 - dim)
                weight = F.pad(weight, (*after, 0, size - weight.shape[dim]))
        return weight


class Compose(nn.Module):
    """One function after another; those that are modules are held as such.

    Args:
        functions: the first is applied first; none at all is the identity.
    """

    def __init__(self, *functions: Function) -> None:
        super().__init__()
        self.steps = nn.ModuleList(as_module(function) for function in functions)

    def forward(self, weight: Tensor) -> Tensor:
        """Return what the last function makes of it."""
        for step in self.steps:
            weight = step(weight)
        return weight


class Apply(nn.Module):
    """Any callable as a module. A pickled net needs one that pickles: a function of a module, not a lambda.

    Args:
        function: from tensor to tensor. Tensors that it holds are not seen by PyTorch: make it a module to move, save
            and learn them.
    """

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, weight: Tensor) -> Tensor:
        """Return what the callable makes of it."""
        return self.function(weight)


def as_module(function: Function) -> nn.Module:
    """Return the function as a module; one that is a module already as it is."""
    return function if isinstance(function, nn.Module) else Apply(function)


def _require_kernels(weight: Tensor) -> None:
    if weight.ndim != 4:
        raise ValueError(f"only a convolution's weight has kernels to turn, not one of shape {tuple(weight.shape)}")
