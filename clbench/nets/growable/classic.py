"""The classical ways to grow a weight, as comparators of the ones beside them: `clbench lab growth` measures them all.

What people do when a layer must get wider during training, each written as well as it can be:

- `grow_by_cat`: concatenate old and new into a fresh tensor. Both live at once: about one weight of extra memory.
- `grow_by_resize`: clone, `resize_`, copy back. `resize_` itself allocates anew before it frees: about two weights.
- `grow_by_storage_resize`: `resize_` the storage and move the rows apart inside it, without a clone: about one weight.
- `StridedCapacity`: the weight is the corner of a larger buffer. Nothing moves, but the view is not contiguous: kernels
  copy it behind one's back, fused optimisers on the CPU write outside it, and a checkpoint holds the whole buffer.
- `HelperLinear`, `HelperConv2d`: the old layer stays and every growth adds layers whose outputs are summed and
  concatenated with its own (Progressive Networks, Rusu et al. 2016, write their laterals so). The growth costs what is
  new; every later step costs two kernels more for each growth there has been.
- `freeze_by_mask`: old and new weights in one tensor, the gradient of the old ones set to zero.

W stands for the bytes of the weight. Shapes: O outputs, I inputs, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clbench.nets.growable.errors import GrowthError

L = TypeVar("L", nn.Linear, nn.Conv2d)


# ------------------------------------------------------------------------------------------------------------- tensors


def grow_by_cat(t: Tensor, dim: int, new: Tensor | int, *, fill: float = 0.0) -> Tensor:
    """Return a fresh tensor: the slices of `t` followed by new ones along `dim`.

    Args:
        t: the weight, any shape. Unchanged.
        dim: along which to grow.
        new: the new slices, of t's shape but along `dim`; or how many, filled with `fill`.
        fill: value of the new slices where `new` is a number.

    Raises:
        GrowthError: `dim` is not one of t's, or `new` is negative or of another shape.
    """
    dim, shape = _grown_shape(t, dim, new)
    if isinstance(new, int):
        new = t.new_full(_part(shape, dim, new), fill)
    return torch.cat((t, new.to(t)), dim)


def grow_by_resize(t: Tensor, dim: int, new: Tensor | int, *, fill: float = 0.0) -> Tensor:
    """Grow `t` itself: clone it, `resize_` it, copy the clone back. Returns `t`; arguments as in `grow_by_cat`.

    Raises:
        GrowthError: as in `grow_by_cat`, or `t` is not contiguous or needs a gradient (give `parameter.data`).
    """
    dim, shape = _grown_shape(t, dim, new)
    _must_be_plain(t)
    old, size = t.clone(), t.shape[dim]
    t.resize_(shape)
    t.narrow(dim, 0, size).copy_(old)
    return _write_new(t, dim, size, new, fill)


def grow_by_storage_resize(t: Tensor, dim: int, new: Tensor | int, *, fill: float = 0.0) -> Tensor:
    """Grow `t` itself: resize its storage, then move its rows apart, last first. Returns `t`.

    Resizing a storage allocates anew, copies and frees: the peak is that of `cat`, but it needs no clone.

    Raises:
        GrowthError: as in `grow_by_resize`, or `t` shares its storage with other elements.
    """
    dim, shape = _grown_shape(t, dim, new)
    _must_be_plain(t)
    storage, item = t.untyped_storage(), t.element_size()
    if storage.nbytes() != t.numel() * item:
        raise GrowthError("the tensor is a part of a larger storage, which cannot be resized")
    outer, size = prod(shape[:dim]), t.shape[dim]
    old, wide = prod(t.shape[dim:]), prod(shape[dim:])
    storage.resize_(outer * wide * item)
    # After set_ the version counter and the object are the same, so holders of `t` see the larger one.
    t.set_(storage, 0, torch.Size((outer * wide,)), (1,))
    _spread_rows(t, outer, old, wide)
    t.set_(storage, 0, torch.Size(shape), _strides(shape))
    return _write_new(t, dim, size, new, fill)


def _spread_rows(flat: Tensor, rows: int, old: int, wide: int) -> None:
    """Move row r from r * old to r * wide, last first, so that nothing is overwritten before it has moved.

    A block of rows whose new place begins behind its old end moves in one copy: [r0, r1) with r0 * wide >= r1 * old.
    The blocks shrink geometrically; the first few rows, whose places overlap, go through a copy of one row.
    """
    end = rows
    while end > 1 and old:
        start = -(-end * old // wide)
        if start >= end:
            start = end - 1
            source = flat[start * old : end * old].clone()
        else:
            source = flat[start * old : end * old]
        flat.as_strided((end - start, old), (wide, 1), start * wide).copy_(source.view(end - start, old))
        end = start


def _grown_shape(t: Tensor, dim: int, new: Tensor | int) -> tuple[int, list[int]]:
    """Return `dim` counted from the front, and the shape after growth."""
    if not -t.dim() <= dim < t.dim():
        raise GrowthError(f"dimension {dim} of a tensor of {t.dim()} dimensions")
    dim %= t.dim()
    if isinstance(new, int):
        if new < 0:
            raise GrowthError(f"cannot grow by {new}: give a number of new slices, 0 or more")
        return dim, [size + new * (i == dim) for i, size in enumerate(t.shape)]
    expected = _part(t.shape, dim, new.shape[dim] if new.dim() == t.dim() else -1)
    if list(new.shape) != expected:
        raise GrowthError(f"new slices of shape {list(new.shape)}, not {expected} with any size at dimension {dim}")
    return dim, [size + new.shape[dim] * (i == dim) for i, size in enumerate(t.shape)]


def _part(shape: Sequence[int], dim: int, size: int) -> list[int]:
    return [size if i == dim else other for i, other in enumerate(shape)]


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(reversed(shape[1:]), lambda a, b: a * b, initial=1))[::-1]


def _must_be_plain(t: Tensor) -> None:
    if t.requires_grad:
        raise GrowthError("the tensor needs a gradient: grow parameter.data")
    if not t.is_contiguous():
        raise GrowthError("the tensor is not contiguous")


def _write_new(t: Tensor, dim: int, size: int, new: Tensor | int, fill: float) -> Tensor:
    part = t.narrow(dim, size, t.shape[dim] - size)
    if isinstance(new, int):
        part.fill_(fill)
    else:
        part.copy_(new)
    return t


# ------------------------------------------------------------------------------------------------------------ capacity


class StridedCapacity:
    """A weight that is the corner `[:O, :I]` of a larger buffer, and grows by looking at more of it.

    A comparator, not for use: see the head of this file for what it breaks. Pages that were never written cost nothing
    on the CPU; on CUDA the whole buffer is paid for at once.

    Args:
        shape: of the weight now; any number of dimensions.
        capacity: of the buffer, at least `shape` in each dimension.
        dtype: of the elements; torch's default when None.
        device: where the buffer is.

    Raises:
        GrowthError: `capacity` is smaller than `shape`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        capacity: Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._buffer = torch.empty(tuple(capacity), dtype=dtype, device=device)
        self._shape = list(shape)
        self._check(self._shape)

    @property
    def weight(self) -> Tensor:
        """The live corner: a view, contiguous only when it is the whole buffer or grew along dimension 0 alone."""
        return self._buffer[tuple(slice(size) for size in self._shape)]

    def grow(self, dim: int, new: Tensor | int, *, fill: float = 0.0) -> Tensor:
        """Add slices along `dim`; return the new `weight`. Arguments and errors as in `grow_by_cat`."""
        dim, shape = _grown_shape(self.weight, dim, new)
        self._check(shape)
        size, self._shape = self._shape[dim], shape
        return _write_new(self.weight, dim, size, new, fill)

    def _check(self, shape: Sequence[int]) -> None:
        limits = list(self._buffer.shape)
        if len(shape) != len(limits) or any(size > limit for size, limit in zip(shape, limits, strict=True)):
            raise GrowthError(f"a capacity of {limits} does not hold {list(shape)}")


def freeze_by_mask(parameter: Tensor, corner: Sequence[int]) -> RemovableHandle:
    """Set the gradient of the corner `[:corner[0], :corner[1], ...]` to zero after every backward pass.

    It does not freeze: momentum, Adam's moments and weight decay go on moving weights whose gradient is zero. And it
    saves nothing: gradient and optimiser state stay those of the whole weight. No mask is stored.

    Args:
        parameter: a leaf.
        corner: sizes of the old part, one for each leading dimension.

    Returns:
        A handle whose `remove()` ends it.
    """
    old = tuple(slice(size) for size in corner)

    def hook(leaf: Tensor) -> None:
        if leaf.grad is not None:
            leaf.grad[old] = 0.0

    # torch leaves this method untyped.
    return cast("RemovableHandle", cast("Any", parameter).register_post_accumulate_grad_hook(hook))


# ------------------------------------------------------------------------------------------------------------- helpers


class _Growth(nn.Module, Generic[L]):
    """What one growth added; None where it added nothing."""

    columns: L | None
    rows: L | None

    def __init__(self, columns: L | None, rows: L | None) -> None:
        super().__init__()
        self.columns, self.rows = columns, rows


class _Helpers(nn.Module, Generic[L]):
    """A layer and what later growths added to it.

    Growth g adds up to two layers: `columns`, from the new inputs to all older outputs, summed with them, and `rows`,
    from all inputs to the new outputs, concatenated after them.
    """

    _dim: int
    """Of the features, from the end."""
    base: L

    def __init__(self, base: L) -> None:
        super().__init__()
        self.base = base
        self._growths = nn.ModuleList()
        self.n_in, self.n_out = base.weight.shape[1], base.weight.shape[0]

    def grow(self, out: int = 0, inp: int = 0) -> list[nn.Parameter]:
        """Add `out` outputs and `inp` inputs; return the new parameters.

        The new outputs are initialised as PyTorch does; the weights from new inputs to old outputs are zero, so what
        the layer computed does not change.

        Raises:
            GrowthError: a negative number.
        """
        if out < 0 or inp < 0:
            raise GrowthError(f"cannot grow by {out} outputs and {inp} inputs: give numbers of 0 or more")
        columns = self._like(inp, self.n_out, bias=False) if inp else None
        if columns is not None:
            nn.init.zeros_(columns.weight)
        rows = self._like(self.n_in + inp, out, bias=self.base.bias is not None) if out else None
        growth = _Growth(columns, rows)
        self._growths.append(growth)
        self.n_in, self.n_out = self.n_in + inp, self.n_out + out
        return list(growth.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """Return what the whole layer gives.

        Args:
            x: linear (..., I), convolution (B, I, height, width) or without B.
        """
        seen = self.base.weight.shape[1]
        y: Tensor = self.base(x.narrow(self._dim, 0, seen))
        for growth in self.growths:
            if growth.columns is not None:
                width = growth.columns.weight.shape[1]
                y = y + growth.columns(x.narrow(self._dim, seen, width))
                seen += width
            if growth.rows is not None:
                y = torch.cat((y, growth.rows(x.narrow(self._dim, 0, seen))), self._dim)
        return y

    @property
    def growths(self) -> list[_Growth[L]]:
        """One entry a growth, oldest first."""
        return cast("list[_Growth[L]]", list(self._growths))

    def whole(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (O, I, ...) and bias (O,) of the one layer that computes the same."""
        weight = self.base.weight.detach()
        biases = [self.base.bias]
        for growth in self.growths:
            if growth.columns is not None:
                weight = torch.cat((weight, growth.columns.weight.detach()), 1)
            if growth.rows is not None:
                weight = torch.cat((weight, growth.rows.weight.detach()))
                biases.append(growth.rows.bias)
        known = [bias.detach() for bias in biases if bias is not None]
        return weight, torch.cat(known) if known else None

    def _like(self, n_in: int, n_out: int, bias: bool) -> L:
        raise NotImplementedError


class HelperLinear(_Helpers[nn.Linear]):
    """A linear layer that grows by helper layers.

    Args:
        base: the layer to begin with; stays as it is.
    """

    _dim = -1

    def _like(self, n_in: int, n_out: int, bias: bool) -> nn.Linear:
        weight = self.base.weight
        return nn.Linear(n_in, n_out, bias, device=weight.device, dtype=weight.dtype)


class HelperConv2d(_Helpers[nn.Conv2d]):
    """A convolution that grows by helper convolutions: the separated convolution whose sum equals the whole one.

    Stride, padding and dilation are those of `base`, whatever they are: a convolution is linear in its weight, so the
    part of the new inputs can be computed apart and added.

    Args:
        base: the layer to begin with; stays as it is.

    Raises:
        GrowthError: a grouped convolution, whose groups would change with every growth.
    """

    _dim = -3

    def __init__(self, base: nn.Conv2d) -> None:
        if base.groups != 1:
            raise GrowthError(f"a convolution of {base.groups} groups cannot grow by helpers")
        super().__init__(base)

    def _like(self, n_in: int, n_out: int, bias: bool) -> nn.Conv2d:
        base = self.base
        # Any pair, or "same"; torch's stubs know the stored form only as what the constructor takes.
        return nn.Conv2d(
            n_in,
            n_out,
            cast("tuple[int, int]", base.kernel_size),
            cast("tuple[int, int]", base.stride),
            cast("tuple[int, int]", base.padding),
            cast("tuple[int, int]", base.dilation),
            bias=bias,
            padding_mode=base.padding_mode,
            device=base.weight.device,
            dtype=base.weight.dtype,
        )
