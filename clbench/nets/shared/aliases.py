"""Which tensors of a module share memory.

Three kinds, over all names of parameters and buffers, duplicates included:

    same_object    one tensor under several names: a tie, as by `a.weight = b.weight`
    same_view      several tensors that see the same memory the same way: storage, offset, shape, stride and type
    overlap        two views that differ and have at least one byte in common: slices of one buffer, but also the same
                   bytes transposed, or as another type or shape

What has no memory shares none: empty tensors, tensors on "meta", parameters not yet initialised, and absent ones
(`bias=None`), which have no names either. Tensors without an address of their own are told apart as objects alone:
sparse ones, wrappers around other tensors, fake ones, and those whose storage was freed.

Exact to the element: intervals of addresses tell most pairs apart; where they cross, a map of the bytes decides, so
that interleaved views (even and odd columns) are no overlap. An expanded tensor addresses what it repeats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["same_object", "same_view", "overlap"]


@dataclass(frozen=True)
class Alias:
    """Names of tensors that share memory."""

    kind: Kind
    names: tuple[str, ...]
    """Sorted. All of a group; of an overlap two, each view by the first of its names."""


@dataclass(frozen=True)
class View:
    """A way to see memory."""

    memory: str
    """Device."""
    start: int
    """Address of the first element, in bytes."""
    dims: tuple[tuple[int, int], ...]
    """(step in bytes, count) of every dimension that has more than one element, in the tensor's order."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    itemsize: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.start + self.itemsize + sum(step * (count - 1) for step, count in self.dims)

    @property
    def dense(self) -> bool:
        """Whether the view covers every byte from start to end."""
        covered = self.itemsize
        for step, count in sorted(self.dims):
            if step > covered:
                return False
            covered += step * (count - 1)
        return True


def aliases(module: nn.Module) -> list[Alias]:
    """Return what in a module shares memory: ties first, then equal views, then overlaps, each sorted by names.

    A tie that is also seen by another tensor is told twice: as `same_object`, and with the other as `same_view`.
    """
    named = tensors_by_name(module)
    ties: dict[int, list[str]] = {}
    for name, tensor in named.items():
        if _has_memory(tensor):
            ties.setdefault(id(tensor), []).append(name)
    views = views_of(named)
    equal = [names for names in views.values() if len({id(named[name]) for name in names}) > 1]
    found = [_alias("same_object", names) for names in ties.values() if len(names) > 1]
    found += [_alias("same_view", names) for names in equal]
    found += [_alias("overlap", (min(views[a]), min(views[b]))) for a, b in overlaps(views)]
    return sorted(found, key=lambda alias: (get_args(Kind).index(alias.kind), alias.names))


def tensors_by_name(module: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer of a module under all of its names."""
    named: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return {**named, **dict(module.named_buffers(remove_duplicate=False))}


def views_of(named: Mapping[str, Tensor]) -> dict[View, list[str]]:
    """Return the different views of memory that tensors are, each with the names that see it so."""
    views: dict[View, list[str]] = {}
    for name, tensor in named.items():
        if _has_memory(tensor) and tensor.layout == torch.strided and has_address(tensor):
            size, shape = tensor.element_size(), tuple(tensor.shape)
            dims = tuple((step * size, n) for step, n in zip(tensor.stride(), shape, strict=True) if n > 1)
            view = View(str(tensor.device), tensor.data_ptr(), dims, shape, tensor.dtype, size)
            views.setdefault(view, []).append(name)
    return views


def overlaps(views: Iterable[View]) -> Iterator[tuple[View, View]]:
    """Yield every two views that have a byte in common."""
    near: list[View] = []
    for view in sorted(views, key=lambda view: (view.memory, view.start)):
        near = [other for other in near if other.memory == view.memory and other.end > view.start]
        yield from ((other, view) for other in near if _meet(other, view))
        near.append(view)


def _alias(kind: Kind, names: Iterable[str]) -> Alias:
    return Alias(kind, tuple(sorted(names)))


def _has_memory(tensor: Tensor) -> bool:
    return not (nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.numel() == 0)


def has_address(tensor: Tensor) -> bool:
    """Whether a strided tensor's elements lie where it says: not so of wrappers, fake tensors and freed storages."""
    try:
        storage = tensor.untyped_storage()
        return storage.device == tensor.device and storage.nbytes() > 0 and tensor.data_ptr() != 0
    except (NotImplementedError, RuntimeError):  # opaque to torch itself, as in oneDNN's own layout
        return False


def _meet(a: View, b: View) -> bool:
    """Whether two views whose intervals cross have a byte in common."""
    if a.dense and b.dense:
        return True
    start, unit = min(a.start, b.start), gcd(a.itemsize, b.itemsize, a.start - b.start)
    unit = gcd(unit, *(step for view in (a, b) for step, _ in view.dims))
    places = torch.zeros((max(a.end, b.end) - start) // unit, dtype=torch.bool)
    _seen(places, a, start, unit).fill_(True)
    return bool(_seen(places, b, start, unit).any())


def _seen(places: Tensor, view: View, start: int, unit: int) -> Tensor:
    """Return the places of `unit` bytes, counted from the address `start`, that a view addresses; bool."""
    dims = [(step // unit, count) for step, count in view.dims if step]  # without step it is one place again and again
    steps, counts = zip(*dims, (1, view.itemsize // unit), strict=True)
    return places.as_strided(counts, steps, (view.start - start) // unit)
