"""Which task uses which stored value, and what follows from it: what is shared, by how many, and what a task adds.

A strategy says it by `uses()`: for each task, the tensors that its answer needs, or parts of them. `sharing` counts
elements of memory, not tensors: tied weights, views and expanded tensors are the memory that they address, each element
once. Elements are those of parameters, as the footprint's `parameters`; bytes cover buffers and masks, too. Letters: T
tasks, m_e the tasks that use element e.

    parameters_used   elements with m_e > 0; `unused` those with m_e = 0
    shared_by_all     m_e = T > 1;  shared_by_some  1 < m_e < T;  private  m_e = 1
    reuse_ratio       sum over tasks and applications of the elements used, over `parameters_used`
    in_common         sum_e m_e (m_e - 1) / ((T - 1) sum_e m_e): of an element in use by a task, the share of the other
                      tasks that use it too, mean over elements and tasks; None where T = 1
    marginal          of a task: elements, or bytes, that no task before it uses

For example, of three tasks, with 10 weights that all use, 6 that two of them use, 4 of one task each (so 12) and one
that is left over: used 10 + 6 + 12 = 28, unused 1, shared by all 10, by some 6, private 12. The elements used by each
task, added up, are 3 * 10 + 2 * 6 + 12 = 54, so the reuse ratio is 54 / 28 = 1.93; were the 10 weights those of a layer
that is applied twice, it would be 84 / 28 = 3. In common are (10 * 3 * 2 + 6 * 2 * 1) / (2 * 54) = 72 / 108 = 2 / 3. If
tasks 1 and 2 share the 6, the tasks add 10 + 6 + 4 = 20, 4 and 4.

So clones that share a fraction f of their elements have f in common, separate nets 0, and one net for all 1.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clbench.records import Sharing, TaskShare, TensorUse
from clbench.tensors import Region, regions, union


@dataclass(frozen=True)
class Use:
    """One task's use of a tensor when it answers.

    Raises:
        TypeError: the mask is not bool.
        ValueError: the mask has another shape than the tensor.
    """

    tensor: Tensor
    """A parameter or buffer of the model, or a view of one."""
    mask: Tensor | None = None
    """Bool, of the tensor's shape: the elements in use; None for all of them."""
    layers: tuple[str, ...] = ()
    """Names of the layers that the tensor serves, one entry an application: a layer repeated three times has three.
    Empty for the layer it is stored in, applied once."""

    def __post_init__(self) -> None:
        if self.mask is None:
            return
        if self.mask.dtype != torch.bool:
            raise TypeError(f"a mask of type {self.mask.dtype}: it must be bool")
        if self.mask.shape != self.tensor.shape:
            raise ValueError(f"a mask of shape {tuple(self.mask.shape)} for a tensor of {tuple(self.tensor.shape)}")


def uses_by_owner(
    model: nn.Module, own: Mapping[int, Sequence[Tensor]], tasks: int, also: Sequence[Tensor] = ()
) -> dict[int, list[Use]]:
    """Return the uses of a net of which every task needs everything but what is another task's own.

    Args:
        model: its parameters and buffers.
        own: task label -> those of them that are its own, by identity; empty where no task has any.
        tasks: how many were learned; they are numbered from 0 where `own` is empty.
        also: further tensors that every task needs.
    """
    apart = {id(tensor) for tensors in own.values() for tensor in tensors}
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *also)}
    serves = _served(model)
    common = [Use(tensor, layers=serves.get(key, ())) for key, tensor in held.items() if key not in apart]
    if not own:
        return {task: list(common) for task in range(tasks)}
    return {task: [*common, *(Use(tensor) for tensor in tensors)] for task, tensors in own.items()}


def _served(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return the layers of each parameter that serves several, by its id: by a tie, or because a link looks at it.

    A module that looks at tensors of another one says so by a method `borrowed`. How often a forward pass calls a
    module is not known here: a method that repeats a layer says it in its own `uses`.
    """
    found: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        looked_at: Iterable[Tensor] = getattr(module, "borrowed", tuple)()
        for tensor in (*module.parameters(recurse=False), *looked_at):
            found[id(tensor)] = (*found.get(id(tensor), ()), name)
    return {key: names for key, names in found.items() if len(names) > 1}


def sharing(uses: Mapping[int, Sequence[Use]], stored: Mapping[str, Tensor]) -> Sharing:
    """Count what tasks share. The module's text defines every number.

    Memory that is seen under parameters of two element sizes counts in elements of the first; a part of one is one.

    Args:
        uses: task label -> what it uses, in the order the tasks were learned.
        stored: name -> each parameter of the model, in use or not.

    Returns:
        The counts, and the map: a row for each parameter of `stored` that several tasks use, or one uses in part, or
        none; one row a task for all that it alone uses, wholly.

    Raises:
        ValueError: a mask over a tensor that is not strided memory (a sparse one).
    """
    counts = _Counts(len(uses))
    order = list(uses)
    rows: dict[str, _Row] = {}
    for cluster in _clusters(uses, stored, order):
        rows |= cluster.count(counts)
    elements, size = counts.elements, counts.bytes
    n = len(order)
    used = sum(count for m, count in elements.items() if m)
    by_task = sum(m * count for m, count in elements.items())
    pairs = sum(m * (m - 1) * count for m, count in elements.items())
    return Sharing(
        parameters_used=used,
        unused=elements[0],
        shared_by_all=elements[n] if n > 1 else 0,
        shared_by_some=sum(elements[m] for m in range(2, n)),
        private=elements[1],
        shared_by_all_bytes=size[n] if n > 1 else 0,
        shared_by_some_bytes=sum(size[m] for m in range(2, n)),
        private_bytes=size[1],
        reuse_ratio=counts.applied / used if used else 0.0,
        in_common=pairs / ((n - 1) * by_task) if n > 1 and by_task else None,
        tasks=[
            TaskShare(task=task, parameters=own, marginal_parameters=new, marginal_bytes=new_bytes)
            for task, own, new, new_bytes in zip(order, counts.used, counts.new, counts.new_bytes, strict=True)
        ],
        map=_folded([rows[name] for name in stored if name in rows], order),
    )


def _folded(rows: Iterable[_Row], order: Sequence[int]) -> list[TensorUse]:
    """Return the rows with all that one task alone uses, wholly, in one row a task, behind the others."""
    kept: list[TensorUse] = []
    own: dict[int, list[TensorUse]] = {}
    for row in rows:
        if row.alone is None:
            kept.append(row.shown)
        else:
            own.setdefault(row.alone, []).append(row.shown)
    for place in sorted(own):
        alone = own[place]
        if len(alone) > 1:
            name, size = f"task {order[place]}'s own", sum(row.elements for row in alone)
            layers = [layer for row in alone for layer in row.layers]
            alone = [TensorUse(name=name, elements=size, tensors=len(alone), layers=layers, shares=alone[0].shares)]
        kept += alone
    return kept


# ------------------------------------------------------------------------------------------------------------ counting


@dataclass
class _Counts:
    """Sums over clusters; places are those of the tasks, in their order."""

    n_tasks: int
    elements: Counter[int] = field(default_factory=Counter)
    """m -> elements of parameters that m tasks use."""
    bytes: Counter[int] = field(default_factory=Counter)
    """m -> bytes of anything that m tasks use."""
    applied: int = 0
    """Elements of parameters used, over tasks and applications."""

    def __post_init__(self) -> None:
        self.used = [0] * self.n_tasks
        """Elements of parameters, by task."""
        self.new = [0] * self.n_tasks
        self.new_bytes = [0] * self.n_tasks


@dataclass(frozen=True)
class _Row:
    """A row of the map before rows are folded."""

    shown: TensorUse
    alone: int | None
    """Place of the task that alone uses the tensor, and wholly: by the exact counts, as shares are rounded."""


@dataclass(frozen=True)
class _Part:
    """How much of a parameter is in use."""

    elements: int
    cells: int
    """Of memory, of any one size."""
    used: list[int]
    """(T,): of these, those that each task uses."""

    def row(self, name: str, layers: Sequence[str]) -> _Row:
        """Return it as a row of the map."""
        users = [place for place, used in enumerate(self.used) if used]
        whole = len(users) == 1 and self.used[users[0]] == self.cells
        shares = [round(used / self.cells, 6) for used in self.used]
        shown = TensorUse(name=name, elements=self.elements, layers=list(layers), shares=shares)
        return _Row(shown, users[0] if whole else None)


@dataclass(frozen=True)
class _Held:
    """A tensor, by the memory it addresses."""

    tensor: Tensor
    region: Region

    @property
    def is_weight(self) -> bool:
        """Whether it counts in elements."""
        return isinstance(self.tensor, nn.Parameter)


@dataclass(frozen=True)
class _Named(_Held):
    """What the model stores."""

    name: str


@dataclass(frozen=True)
class _Placed(_Held):
    """What a task uses."""

    place: int
    """Of the task, in the order of learning."""
    use: Use


@dataclass
class _Cluster:
    """What is stored and used in one stretch of memory that no other tensor touches."""

    named: list[_Named] = field(default_factory=list)
    placed: list[_Placed] = field(default_factory=list)

    def count(self, counts: _Counts) -> dict[str, _Row]:
        """Add this memory to the counts; return the map's row of each parameter in it."""
        found = {item.region for item in self._held()}
        sizes = [item.tensor.element_size() for item in self._held() if item.is_weight]
        if len(found) == 1 and all(item.use.mask is None for item in self.placed):
            return self._whole(counts, union(found), sizes)
        return self._parted(counts, found, sizes)

    def _whole(self, counts: _Counts, size: int, sizes: list[int]) -> dict[str, _Row]:
        """Count memory that is used as a whole or not at all: no need to look at its elements."""
        elements = size // sizes[0] if sizes else 0
        places = sorted({item.place for item in self.placed})
        counts.elements[len(places)] += elements
        counts.bytes[len(places)] += size
        counts.applied += elements * sum(_applications(item.use) for item in self.placed)
        for place in places:
            counts.used[place] += elements
        if places:
            counts.new[places[0]] += elements
            counts.new_bytes[places[0]] += size
        part = _Part(elements, size, [size * (place in places) for place in range(counts.n_tasks)])
        return self._rows({item.name: part for item in self.named})

    def _parted(self, counts: _Counts, found: Iterable[Region], sizes: list[int]) -> dict[str, _Row]:
        """Count memory element by element: a map of its cells, the largest pieces that no tensor cuts."""
        held = list(found)
        start = min(region.start for region in held)
        steps = [step for region in held for step, _ in region.outer]
        cell = math.gcd(*(region.itemsize for region in held), *(region.start - start for region in held), *steps)
        grid = _Grid(start, cell, (max(region.end for region in held) - start) // cell, self._held()[0].tensor.device)
        weights, stored = grid.blank(), grid.blank()
        for item in self._held():
            grid.fill(stored, item.region)
            if item.is_weight:
                grid.fill(weights, item.region)
        uniform = bool(weights.all()) or not bool(weights.any())

        def elements(cells: Tensor, total: int) -> int:
            """Return how many elements of parameters a map (cells,) with so many cells marked has."""
            if not sizes:
                return 0
            marked = total if uniform else _total(cells & weights)
            return -(-marked * cell // sizes[0])

        times = torch.zeros(grid.cells, dtype=torch.uint8 if counts.n_tasks < 256 else torch.int32, device=grid.device)
        seen, n_seen = grid.blank(), 0
        parts = {item.name: grid.fill(grid.blank(), item.region) for item in self.named if item.is_weight}
        totals = {name: _total(part) for name, part in parts.items()}
        rows = {name: _Part(-(-total * cell // sizes[0]), total, []) for name, total in totals.items()}
        for place in range(counts.n_tasks):
            used, total = grid.blank(), 0
            for placed in (item for item in self.placed if item.place == place):
                marked = grid.mark(placed)
                own = _total(marked)
                counts.applied += elements(marked, own) * _applications(placed.use)
                used, total = (marked, own) if total == 0 else (used | marked, -1)
            total = _total(used) if total < 0 else total
            now = seen | used
            n_now = _total(now)
            counts.used[place] += elements(used, total)
            counts.new[place] += elements(now if uniform else now & ~seen, n_now - n_seen)
            counts.new_bytes[place] += (n_now - n_seen) * cell
            seen, n_seen = now, n_now
            times += used
            for name, part in parts.items():
                rows[name].used.append(total if totals[name] == grid.cells else _total(used & part))
        everything = bool(stored.all())
        for m, cells in enumerate(torch.bincount(times if everything else times[stored]).tolist()):
            counts.bytes[m] += cells * cell
            if uniform and everything and sizes:
                counts.elements[m] += -(-cells * cell // sizes[0])
        if sizes and not (uniform and everything):
            for m, cells in enumerate(torch.bincount(times[weights]).tolist()):
                counts.elements[m] += -(-cells * cell // sizes[0])
        return self._rows(rows)

    def _held(self) -> list[_Held]:
        return [*self.named, *self.placed]

    def _rows(self, found: Mapping[str, _Part]) -> dict[str, _Row]:
        rows = {}
        for item in self.named:
            if item.is_weight:
                same = [placed.use.layers for placed in self.placed if placed.tensor is item.tensor]
                layers = max(same, key=lambda names: len(names), default=())
                rows[item.name] = found[item.name].row(item.name, layers)
        return rows


@dataclass(frozen=True)
class _Grid:
    """Maps (cells,) of a stretch of memory."""

    start: int
    """Address of the first cell."""
    cell: int
    """Bytes of one."""
    cells: int
    device: torch.device

    def blank(self) -> Tensor:
        """Return a map of nothing."""
        return torch.zeros(self.cells, dtype=torch.bool, device=self.device)

    def fill(self, cells: Tensor, region: Region) -> Tensor:
        """Mark what a region addresses; return the map."""
        shape = (*(count for _, count in region.outer), region.run // self.cell)
        steps = (*(step // self.cell for step, _ in region.outer), 1)
        torch.as_strided(cells, shape, steps, (region.start - self.start) // self.cell).fill_(True)
        return cells

    def mark(self, item: _Placed) -> Tensor:
        """Return the map of what a use addresses."""
        tensor, mask = item.tensor, item.use.mask
        if mask is None:
            return self.fill(self.blank(), item.region)
        mask, size = mask.to(self.device), tensor.element_size()
        if tensor.is_contiguous() and tensor.numel() == self.cells and size == self.cell:
            return mask.flatten()
        places = torch.arange(self.cells, device=self.device)
        wide = size // self.cell
        shape, steps = (*tensor.shape, wide), (*(step * wide for step in tensor.stride()), 1)
        first = (item.region.start - self.start) // self.cell
        # By number, because an expanded or overlapping view cannot be written through.
        marked = self.blank()
        marked[torch.as_strided(places, shape, steps, first)[mask]] = True
        return marked


def _applications(use: Use) -> int:
    return max(1, len(use.layers))


def _total(cells: Tensor) -> int:
    return int(torch.count_nonzero(cells))


def _clusters(
    uses: Mapping[int, Sequence[Use]], stored: Mapping[str, Tensor], order: Sequence[int]
) -> Iterator[_Cluster]:
    """Yield what is stored and used, in stretches of memory that no tensor of another touches."""
    known: dict[int, list[Region]] = {}

    def places(tensor: Tensor) -> list[Region]:
        if id(tensor) not in known:
            known[id(tensor)] = regions([tensor])
        return known[id(tensor)]

    items: list[_Named | _Placed] = []
    for name, tensor in stored.items():
        items += [_Named(tensor, region, name) for region in places(tensor)]
    for place, task in enumerate(order):
        for use in uses[task]:
            if use.mask is not None and (use.tensor.layout != torch.strided or len(places(use.tensor)) > 1):
                raise ValueError(f"task {task}: a mask over a tensor of layout {use.tensor.layout}: it must be strided")
            items += [_Placed(use.tensor, region, place, use) for region in places(use.tensor)]
    cluster, memory, end = _Cluster(), "", 0
    for item in sorted(items, key=lambda item: (item.region.memory, item.region.start)):
        if item.region.memory != memory or item.region.start >= end:
            if cluster.named or cluster.placed:
                yield cluster
            cluster, memory, end = _Cluster(), item.region.memory, item.region.end
        end = max(end, item.region.end)
        if isinstance(item, _Named):
            cluster.named.append(item)
        else:
            cluster.placed.append(item)
    if items:
        yield cluster
