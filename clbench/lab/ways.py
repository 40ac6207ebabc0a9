"""The ways to grow one weight, behind one interface, so that they can be measured side by side.

Each way holds a weight (O, I, *kernel) and, if asked for, Adam's two moments of it; `grow` adds zeros. What a way keeps
is what a user of it would: a tensor, a parameter with its optimiser, or a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Adam

from clbench.lab.record import Layer
from clbench.nets.growable.classic import (
    HelperConv2d,
    HelperLinear,
    StridedCapacity,
    grow_by_cat,
    grow_by_resize,
    grow_by_storage_resize,
)
from clbench.nets.growable.layers import GrowConv2d, GrowLinear
from clbench.nets.growable.optim import append_to_parameter_
from clbench.nets.growable.storage import reserved_empty

CAPACITY = 1.25
"""Of the strided buffer, to the first weight, per side."""


@dataclass(frozen=True)
class Case:
    """One weight to grow: a square one of a linear layer, or of a 3 x 3 convolution."""

    layer: Layer
    width: int
    """Inputs and outputs."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return shape_of(self.layer, self.width, self.width)

    @property
    def bytes(self) -> int:
        """Of the weight, float32."""
        return 4 * prod(self.shape)


def shape_of(layer: Layer, out: int, inp: int) -> tuple[int, ...]:
    """Return the shape of a layer's weight."""
    return (out, inp, 3, 3) if layer == "conv" else (out, inp)


def apply(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    """Return what an ordinary layer without bias gives; convolutions keep height and width."""
    return F.conv2d(x, weight, padding=1) if layer == "conv" else F.linear(x, weight)


def new_layer(layer: Layer, out: int, inp: int, device: torch.device) -> nn.Linear | nn.Conv2d:
    """Return an ordinary layer without bias."""
    if layer == "conv":
        return nn.Conv2d(inp, out, 3, padding=1, bias=False, device=device)
    return nn.Linear(inp, out, bias=False, device=device)


def new_growing(layer: Layer, out: int, inp: int, device: torch.device) -> GrowLinear | GrowConv2d:
    """Return a layer without bias that grows in place."""
    if layer == "conv":
        return GrowConv2d(inp, out, 3, padding=1, bias=False, device=device)
    return GrowLinear(inp, out, bias=False, device=device)


def new_helpers(layer: nn.Linear | nn.Conv2d) -> HelperLinear | HelperConv2d:
    """Return a layer that grows by helpers, from an ordinary one."""
    return HelperConv2d(layer) if isinstance(layer, nn.Conv2d) else HelperLinear(layer)


class Way:
    """A weight, and how it grows."""

    def grow(self, dim: int, k: int) -> None:
        """Add k slices of zeros along dimension 0 (fan-out) or 1 (fan-in)."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """Return the whole weight, (O, I, *kernel); may copy."""
        raise NotImplementedError


class _Parameter(Way):
    """A parameter, with Adam or without, whose tensors each grow by one function."""

    def __init__(self, weight: Tensor, adam: bool) -> None:
        self.parameter = nn.Parameter(weight)
        self.optimizer = _adam(self.parameter) if adam else None

    def weight(self) -> Tensor:
        return self.parameter.detach()


class _Tensors(_Parameter):
    def __init__(self, weight: Tensor, adam: bool, function: Callable[[Tensor, int, int], Tensor]) -> None:
        super().__init__(weight, adam)
        self._function = function

    def grow(self, dim: int, k: int) -> None:
        parameter = self.parameter
        shape = parameter.shape
        parameter.data = self._function(parameter.data, dim, k)
        state = self.optimizer.state[parameter] if self.optimizer is not None else {}
        for name, value in state.items():
            if value.shape == shape:
                # Not through a local name: it would keep the old tensor alive over the next one.
                state[name] = self._function(state[name], dim, k)
            del value


class _InPlace(_Parameter):
    def grow(self, dim: int, k: int) -> None:
        append_to_parameter_(self.parameter, dim, k, [self.optimizer] if self.optimizer is not None else [])


class _Strided(Way):
    def __init__(self, case: Case, device: torch.device) -> None:
        capacity = [int(CAPACITY * case.width), int(CAPACITY * case.width), *case.shape[2:]]
        self._held = StridedCapacity(case.shape, capacity, device=device)

    def grow(self, dim: int, k: int) -> None:
        self._held.grow(dim, k)

    def weight(self) -> Tensor:
        return self._held.weight


class _Helpers(Way):
    def __init__(self, case: Case, device: torch.device) -> None:
        self._layer = new_helpers(new_layer(case.layer, case.width, case.width, device))

    def grow(self, dim: int, k: int) -> None:
        _zero(self._layer.grow(out=k) if dim == 0 else self._layer.grow(inp=k))

    def weight(self) -> Tensor:
        return self._layer.whole()[0]


class _Delta(Way):
    """A growing layer: its base is frozen and a delta is opened; folded at once if asked for."""

    def __init__(self, case: Case, device: torch.device, fold: bool) -> None:
        self._layer, self._fold = new_growing(case.layer, case.width, case.width, device), fold

    def grow(self, dim: int, k: int) -> None:
        _zero(self._layer.open_delta(*((k, 0) if dim == 0 else (0, k))))
        if self._fold:
            self._layer.fold()

    def weight(self) -> Tensor:
        parts = [self._layer.weight.detach()]
        delta = [parameter.detach() for parameter in self._layer.delta_parameters()]
        (dim,) = {0 if part.shape[1:] == parts[0].shape[1:] else 1 for part in delta} or {0}
        return torch.cat([*parts, *delta], dim) if delta else parts[0]


ADAM_METHODS = ("cat", "in_place")
"""Ways whose peak is measured with Adam's state too: those of one parameter whose state grows with it."""

_FUNCTIONS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "cat": grow_by_cat,
    "resize": grow_by_resize,
    "storage_resize": grow_by_storage_resize,
}


def way(method: str, case: Case, device: torch.device, adam: bool = False) -> Way:
    """Return a weight of ones with its way to grow.

    Args:
        method: one of `clbench.lab.record.METHODS`.
        case: the weight.
        device: where it lives.
        adam: with Adam's moments, of one step; for `ADAM_METHODS`.
    """
    made: Way
    if method in _FUNCTIONS:
        made = _Tensors(torch.empty(case.shape, device=device), adam, _FUNCTIONS[method])
    elif method == "in_place":
        made = _InPlace(reserved_empty(case.shape, device=device), adam)
    elif method == "strided":
        made = _Strided(case, device)
    elif method == "helpers":
        made = _Helpers(case, device)
    else:
        made = _Delta(case, device, fold=method == "delta_fold")
    with torch.no_grad():
        made.weight().fill_(1.0)
    return made


def _zero(parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()


def _adam(parameter: nn.Parameter) -> Adam:
    """Return an optimiser that has made one step; one tensor at a time, so that the step itself needs little."""
    optimizer = Adam([parameter], foreach=False)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer
