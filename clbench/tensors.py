"""Which memory tensors address, and which tensors an object holds.

Bytes are counted as addressed, each once. Tied weights and views count once; of overlapping views, the union; an
expanded tensor (stride 0) has the size of what it repeats; a strided view of a large buffer has its own elements only.
"""

from __future__ import annotations

import functools
import math
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

# ------------------------------------------------------------------------------------------------------- unique bytes


class Region(NamedTuple):
    """The bytes one tensor addresses: runs of `run` bytes, repeated along the dimensions of `outer`."""

    memory: str
    """Device, or a name of its own for a tensor without an address."""
    start: int
    run: int
    outer: tuple[tuple[int, int], ...]
    """(step in bytes, count), by rising step; every step is longer than the run."""
    itemsize: int

    @property
    def end(self) -> int:
        """One past the last byte."""
        return self.start + self.run + sum(step * (count - 1) for step, count in self.outer)


def unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes the tensors address together, each byte of memory once."""
    return union(regions(tensors))


def unique_elements(tensors: Iterable[Tensor]) -> int:
    """Return the elements the tensors store together. Memory seen under two types counts in elements of the first."""
    found = regions(tensors)
    elements, before, sizes = 0, 0, list(dict.fromkeys(region.itemsize for region in found))
    for i, size in enumerate(sizes):
        covered = union(region for region in found if region.itemsize in sizes[: i + 1])
        elements += math.ceil((covered - before) / size)
        before = covered
    return elements


def regions(tensors: Iterable[Tensor]) -> list[Region]:
    """Return the distinct regions, in order. The tensors are held meanwhile, so that no address is used twice."""
    held = list(tensors)
    parts = [part for tensor in held for part in _parts(tensor)]
    return list(dict.fromkeys(region for part in parts if (region := _region(part)) is not None))


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that hold the values of a sparse tensor or of a wrapper."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [part for name in flatten()[0] for part in _parts(getattr(tensor, name))]


def _region(tensor: Tensor) -> Region | None:
    """Return what a plain tensor addresses; None when that is nothing."""
    if nn.parameter.is_lazy(tensor) or tensor.numel() == 0 or tensor.is_meta:
        return None
    size = tensor.element_size()
    try:
        if tensor.untyped_storage().nbytes() == 0:  # freed by resize_(0)
            return None
        memory, start = str(tensor.device), tensor.data_ptr()
        if start == 0:  # a wrapper that does not say what it wraps
            return Region(f"opaque {id(tensor)}", 0, tensor.numel() * size, (), size)
        steps = sorted((stride * size, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
    except (NotImplementedError, RuntimeError):  # opaque to torch itself, as in oneDNN's own layout
        return Region(f"opaque {id(tensor)}", 0, tensor.numel() * size, (), size)
    run, outer = size, list[tuple[int, int]]()
    for step, count in steps:
        if step <= run and not outer:  # side by side, overlapping, or in place (step 0): still one run
            run += step * (count - 1)
        else:
            outer.append((step, count))
    return Region(memory, start, run, tuple(outer), size)


def union(parts: Iterable[Region]) -> int:
    """Return the bytes the regions cover together."""
    total, cluster, end = 0, list[Region](), 0
    for region in sorted(parts, key=lambda region: (region.memory, region.start)):
        if cluster and (region.memory != cluster[0].memory or region.start >= end):
            total += _covered(cluster)
            cluster = []
        end = max(end, region.end) if cluster else region.end
        cluster.append(region)
    return total + _covered(cluster)


def _covered(cluster: list[Region]) -> int:
    """Return the bytes covered by regions whose spans overlap, sorted by start."""
    if not cluster:
        return 0
    start, span = cluster[0].start, max(region.end for region in cluster) - cluster[0].start
    if not any(region.outer for region in cluster):
        return span
    if len(cluster) == 1 and _is_apart(cluster[0]):
        return cluster[0].run * math.prod(count for _, count in cluster[0].outer)
    # Strided views of one buffer interleave: only a map of the bytes tells what they share.
    covered = np.zeros(span, dtype=np.bool_)
    for region in cluster:
        shape, steps = (*(count for _, count in region.outer), region.run), (*(step for step, _ in region.outer), 1)
        np.lib.stride_tricks.as_strided(covered[region.start - start :], shape, steps)[...] = True
    return int(np.count_nonzero(covered))


def _is_apart(region: Region) -> bool:
    """Whether no two runs of the region touch the same byte."""
    extent = region.run
    for step, count in region.outer:
        if step < extent:
            return False
        extent += step * (count - 1)
    return True


def nonzero(parameters: Iterable[Tensor]) -> int:
    """Return how many stored elements are not zero, each once."""
    groups: dict[object, dict[Region, Tensor]] = {}
    for tensor in (part.detach() for parameter in parameters for part in _parts(parameter)):
        if (region := _region(tensor)) is not None:
            groups.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.device), {})[region] = tensor
    counts: list[Tensor] = []
    for group in groups.values():
        tensors = list(group.values())
        if unique_elements(tensors) < sum(tensor.numel() for tensor in tensors):
            tensors = [_addressed(tensors)]
        counts.extend(torch.count_nonzero(tensor) for tensor in tensors)
    return sum(int(count.item()) for count in counts)


def _addressed(tensors: Sequence[Tensor]) -> Tensor:
    """Return the elements (n,) that views of one storage and type address, each once."""
    flat = tensors[0].new_empty(0).set_(tensors[0].untyped_storage())
    places = torch.arange(len(flat), device=flat.device)
    views = [torch.as_strided(places, t.shape, t.stride(), t.storage_offset()).flatten() for t in tensors]
    return flat[torch.unique(torch.cat(views))]


# ---------------------------------------------------------------------------------------------------------- the walk


def is_a(obj: object, *names: str) -> bool:
    """Whether the class of `obj`, or one it inherits from, bears one of the names: for types not imported here."""
    return any(base.__name__ in names for base in type(obj).__mro__)


def is_data(obj: object) -> bool:
    """Whether `obj` is a data set, or a way to read one: its tensors belong to the stream, not to who looks at it."""
    return isinstance(obj, Dataset | DataLoader) or is_a(obj, "AvalancheDataset", "FlatData", "DataAttribute")


def tensors_in(obj: object, *, stop: Callable[[object], bool] = is_data) -> list[Tensor]:
    """Return every tensor reachable from `obj`, each once, in the order found.

    Follows lists, tuples, sets, dicts (keys and values), attributes and slots of objects, modules, arguments of
    partials, attributes of tensors; numpy arrays come as tensors over the same memory. Of an optimiser it finds the
    state, not the parameters. Cycles are fine, depth is unlimited.

    Does not follow classes, functions, Python modules, files, gradients, and what `stop` is true for (but for `obj`
    itself, which is always looked into).
    """
    return walk(obj, stop)[0]


_ATOMS = (str, bytes, bytearray, int, float, complex, type(None), type, range, slice, torch.dtype, torch.device)
_UNFOLLOWED = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    types.GeneratorType,
    torch.Generator,
)


def walk(root: object, stop: Callable[[object], bool]) -> tuple[list[Tensor], list[object]]:
    """Return the tensors reachable from `root`, and the objects at which `stop` ended the walk."""
    tensors, stopped = [], []
    seen: dict[int, object] = {}  # holds what it has seen: an id is good for as long as its object lives
    left: list[object] = [root]
    while left:
        obj = left.pop()
        if isinstance(obj, _ATOMS) or id(obj) in seen:
            continue
        seen[id(obj)] = obj
        if obj is not root and stop(obj):
            stopped.append(obj)
            continue
        if isinstance(obj, Tensor):
            tensors.append(obj)
        elif isinstance(obj, np.ndarray) and not obj.dtype.hasobject:
            tensors.append(_as_tensor(obj))
        elif isinstance(obj, torch.UntypedStorage):
            tensors.append(torch.empty(0, dtype=torch.uint8, device=obj.device).set_(obj))
        left.extend(reversed(list(_children(obj))))
    return tensors, stopped


def _children(obj: object) -> Iterator[object]:
    """Yield what one object holds directly."""
    if isinstance(obj, _UNFOLLOWED):
        return
    if isinstance(obj, functools.partial):
        yield from (obj.args, obj.keywords)
    if isinstance(obj, dict | types.MappingProxyType):
        for key, value in list(obj.items()):
            yield from (key, value)
    elif isinstance(obj, list | tuple | set | frozenset | deque):
        yield from list(obj)
    elif isinstance(obj, np.ndarray) and obj.dtype == np.dtype(object):
        yield from obj.ravel().tolist()
    attributes = getattr(obj, "__dict__", None)
    if isinstance(attributes, dict):
        if isinstance(obj, Optimizer):
            yield list(obj.state.values())
            yield [value for group in obj.param_groups for key, value in group.items() if key != "params"]
            attributes = {k: v for k, v in attributes.items() if k not in ("state", "param_groups")}
        yield attributes
    for cls in type(obj).__mro__:
        for name, member in vars(cls).items():
            if isinstance(member, types.MemberDescriptorType) and name != "__dict__":
                yield getattr(obj, name, None)


def _as_tensor(array: NDArray[Any]) -> Tensor:
    """Return a tensor over the memory of a numpy array of any type."""
    array = array[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in array.strides)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of arrays that must not be written: nothing is written here
        try:
            return torch.from_numpy(array)
        except (TypeError, ValueError):  # a type torch does not have: its bytes
            return torch.from_numpy(array[..., np.newaxis].view(np.uint8))
