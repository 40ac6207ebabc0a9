"""Constant factors and shifts of the tensors in one generated vector, in one copy.

    y_i = g_i x_i + b_i,   dL / dx_i = g_i dL / dy_i,

g and b the same for all elements of a tensor. As vectors they would be two more nets in memory, written and read at
every call. Here the elements of each tensor are multiplied where they stand, in the one copy that is made.

Letters: M elements of x, P of y.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


class Scaling:
    """The map, for the tensors of one target. Holds no tensor.

    Neighbours that have g and b in common are taken as one: a weight and its bias, mostly.

    Args:
        sizes: elements of the tensors, P in all.
        gains: g, one per tensor.
        births: b, one per tensor.
    """

    def __init__(self, sizes: Sequence[int], gains: Sequence[float], births: Sequence[float]) -> None:
        tensors = zip(sizes, gains, births, strict=True)
        runs = [(sum(one[0] for one in same), *key) for key, same in groupby(tensors, lambda tensor: tensor[1:])]
        self.size = sum(sizes)
        self.runs = [size for size, _, _ in runs]
        self.gains = {i: gain for i, (_, gain, _) in enumerate(runs) if gain != 1}
        self.births = {i: birth for i, (_, _, birth) in enumerate(runs) if birth}

    def __call__(self, x: Tensor) -> Tensor:
        """Return the first P of M elements, each times its gain, plus its birth: (..., M) -> (..., P)."""
        if not self.gains and not self.births:
            return x[..., : self.size]
        return cast(Tensor, _Scale.apply(x, self, self.size, True))

    def apply(self, x: Tensor, size: int, shift: bool) -> Tensor:
        """Return x (..., M) cut to `size` elements or filled up with zeros, scaled, and shifted or not; no graph."""
        have = x.shape[-1]
        y = F.pad(x, (0, size - have)) if size > have else x[..., :size].clone(memory_format=torch.contiguous_format)
        parts = torch.split(y[..., : self.size], self.runs, -1)
        if self.gains:
            torch._foreach_mul_([parts[i] for i in self.gains], list(self.gains.values()))
        if self.births and shift:
            torch._foreach_add_([parts[i] for i in self.births], list(self.births.values()))
        return y


class _Scale(torch.autograd.Function):
    """`Scaling.apply` with its gradient, which is of its kind: scaled, not shifted, and filled up where x was cut.

    One node of the graph. In-place operations that autograd records would be one for every tensor.
    """

    @staticmethod
    def forward(x: Tensor, scaling: Scaling, size: int, shift: bool) -> Tensor:
        return scaling.apply(x, size, shift)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Scaling, int, bool], output: Tensor) -> None:
        x, ctx.scaling, _, _ = inputs
        ctx.size = x.shape[-1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Scale.apply(gradient, ctx.scaling, ctx.size, False), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None, None, None], x: Tensor, *same: Any) -> tuple[Tensor, int]:
        return _Scale.apply(x.movedim(in_dims[0], 0), *same), 0
