"""Sizes of a generator for a wanted compression.

The compression is the parameters of the generator and of the embeddings of T tasks, per weight of the target: at 0.5
all T tasks together are kept in half of what one net takes. Heads, and what of normalisation is a task's own, are on
neither side.

Sizes that are given are kept. Those that are free are the widest of a short list with which the compression can be
met (`HIDDEN`, then `EMBEDDINGS`); then one size is made as large as it may be:

    chunked      the chunk. A chunk so small that the chunks' embeddings outweigh the head, is passed over if a larger
                 one will do
    structured   the last hidden width, for each of some sizes of pieces; the nearest with a width of 8 or more
    full         the last hidden width. Twice the target is the least: one weight and one bias per weight
    lowrank      the last hidden width, for each rank; the nearest with a width of 8 or more. It has the target's
                 matrices in it, so that it is always above 1

Letters: E embedding, h last hidden width, P weights of the target, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import isqrt
from typing import Any

import torch

from clbench.nets.hypernet.generators import Body, Chunked, Full, Generator
from clbench.nets.hypernet.structured import LowRank, Structured, pieces, sides
from clbench.nets.hypernet.target import Target

GENERATORS: dict[str, type[Generator]] = {
    "full": Full,
    "chunked": Chunked,
    "structured": Structured,
    "lowrank": LowRank,
}
"""The generators by name."""

EMBEDDINGS = (32, 16, 8, 4, 2, 1)
"""Sizes of embeddings that are tried, of tasks and chunks alike."""
HIDDEN: tuple[tuple[int, ...], ...] = ((100, 100), (50, 50), (25, 25), (10, 10), ())
"""Hidden layers that are tried for generators made of chunks."""
_WIDE = 8
"""A last hidden width that is wide enough to look for the nearest compression instead of more width."""


@dataclass(frozen=True)
class Fit:
    """A generator of the wanted compression."""

    settings: dict[str, Any]
    """Sizes, by the names of the generator's arguments."""
    parameters: int
    """Of the generator and the tasks' embeddings."""
    ratio: float
    """The same per weight of the target: what was wanted, or a little less."""


class _Best:
    """The nearest so far, and the smallest, which is told when nothing is small enough."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.found: tuple[int, dict[str, Any]] | None = None
        self.least: tuple[int, dict[str, Any]] | None = None

    def see(self, parameters: int, settings: dict[str, Any]) -> None:
        """Look at one."""
        if self.least is None or parameters < self.least[0]:
            self.least = (parameters, settings)
        if parameters <= self.budget and (self.found is None or parameters > self.found[0]):
            self.found = (parameters, settings)


def fit_sizes(
    kind: str,
    target: Target,
    ratio: float,
    tasks: int,
    *,
    embedding_size: int | None = None,
    hidden: Sequence[int] | None = None,
    chunk_embedding_size: int | None = None,
    task_conditioned: bool = False,
) -> Fit:
    """Return sizes with which a generator is as near as possible to a compression, and not above it.

    Args:
        kind: a key of `GENERATORS`.
        target: what is generated.
        ratio: the compression wanted, above 0.
        tasks: T.
        embedding_size: E; None leaves it free.
        hidden: widths of the hidden layers; None leaves them free. Where the last hidden width is what is fitted,
            those before it.
        chunk_embedding_size: of chunks or pieces; None: as E. Not of `full` and `lowrank`.
        task_conditioned: of `chunked`: whether every task has its own embeddings of the chunks.

    Raises:
        ValueError: an unknown kind, a size that is not positive, or a compression that cannot be met; the line tells
            the smallest there is.
    """
    if kind not in GENERATORS:
        raise ValueError(f"unknown generator {kind!r}. Known: {', '.join(sorted(GENERATORS))}")
    given = {"ratio": ratio, "tasks": tasks, "embedding_size": embedding_size}
    given["chunk_embedding_size"] = chunk_embedding_size
    for name, value in given.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}: above 0")
    if any(width < 1 for width in hidden or ()):
        raise ValueError(f"hidden is {tuple(hidden or ())}: widths are at least 1")
    budget = ratio * target.size
    sizes = EMBEDDINGS if embedding_size is None else (embedding_size,)
    before = tuple(hidden or ())
    if kind == "chunked":
        layers = HIDDEN if hidden is None else (before,)
        best = _chunked(target, budget, tasks, sizes, layers, chunk_embedding_size, task_conditioned)
    else:
        best = _by_width(kind, target, budget, tasks, sizes, before, chunk_embedding_size)
    if best.found is None:
        assert best.least is not None
        least, settings = best.least
        # By the names that recipes have for them.
        said = ", ".join(f"{name.removesuffix('_size')} {value}" for name, value in settings.items())
        up = -(-least * 10**4 // target.size) / 10**4
        raise ValueError(
            f"a compression of {ratio:g} cannot be met: the nearest a {kind} generator of these {target.size} weights"
            f" and {tasks} tasks' embeddings can be is {up:g} ({said})"
        )
    parameters, settings = best.found
    return Fit(settings, parameters, parameters / target.size)


def _chunked(
    target: Target,
    budget: float,
    tasks: int,
    sizes: Iterable[int],
    layers: Iterable[tuple[int, ...]],
    beside: int | None,
    conditioned: bool,
) -> _Best:
    """Return the best chunk for the widest sizes with which there is one."""
    best = _Best(budget)
    for hidden, size in product(layers, sizes):
        c = size if beside is None else beside
        width = hidden[-1] if hidden else size + c
        per_chunk = c * (tasks if conditioned else 1)
        # The head alone is above the budget beyond the first term, and the sum has its least at the root.
        most = int(budget) // (width + 1) + isqrt(per_chunk * target.size // (width + 1)) + 2
        chunk = torch.arange(1, min(target.size, most) + 1)
        chunks = -(-target.size // chunk) * per_chunk
        total = chunk * (width + 1) + chunks + Body.count(size + c, hidden) + tasks * size
        settings = {
            "embedding_size": size, "chunk_embedding_size": c, "hidden": hidden, "task_conditioned": conditioned,
        }  # fmt: skip
        smallest = int(total.argmin())
        best.see(int(total[smallest]), {**settings, "chunk": smallest + 1})
        if best.found is None:
            continue
        # From the smallest on the head outweighs the embeddings of chunks; the nearest is looked for on that side.
        room = torch.where(total[smallest:] <= budget, total[smallest:], -1)
        nearest = smallest + int(room.argmax())
        best.see(int(total[nearest]), {**settings, "chunk": nearest + 1})
        return best
    return best


def _by_width(
    kind: str,
    target: Target,
    budget: float,
    tasks: int,
    sizes: Iterable[int],
    before: tuple[int, ...],
    beside: int | None,
) -> _Best:
    """Return the best last hidden width, and size of pieces or rank, for the widest embedding with which it is wide.

    Where it is wide with none, the nearest of all: a net of one hidden unit has little to say.
    """
    best = _Best(budget)
    for size in sizes:
        wide = _Best(budget)
        for settings, count in _candidates(kind, target, tasks, size, beside):
            one, two = count((*before, 1)), count((*before, 2))
            most = max(1, 1 + int(budget - one) // (two - one))  # parameters are linear in the last width
            found = {**settings, "hidden": (*before, most)}
            best.see(count((*before, most)), found)
            if most >= _WIDE:
                wide.see(count((*before, most)), found)
        if wide.found is not None:
            return wide
    return best


def _candidates(
    kind: str, target: Target, tasks: int, size: int, beside: int | None
) -> Iterable[tuple[dict[str, Any], Callable[[tuple[int, ...]], int]]]:
    """Yield settings, and the parameters with them by hidden widths."""
    if kind == "full":
        yield {"embedding_size": size}, partial(Full.count, target, tasks, size)
    elif kind == "lowrank":
        matrices = [layer for layer in target.layers if layer.kind == "weight"]
        if not matrices:
            raise ValueError("nothing to share between tasks: no tensor of the target has a fan-in")
        for rank in range(max(min(sides(layer)) for layer in matrices), 0, -1):
            yield {"embedding_size": size, "rank": rank}, partial(LowRank.count, target, tasks, size, rank)
    else:
        c = size if beside is None else beside
        whole = max(layer.total * sum(layer.rows) for layer in pieces(target, None))
        seen = set()
        for i in range(64):  # from whole layers down, in steps of an eighth of an octave
            piece = max(1, int(whole * 2 ** (-i / 8)))
            cut = tuple(layer.units for layer in pieces(target, piece))
            if cut in seen:
                continue
            seen.add(cut)
            settings = {"embedding_size": size, "piece": piece, "piece_embedding_size": c}
            yield settings, partial(Structured.count, target, tasks, size, piece=piece, piece_embedding_size=c)
