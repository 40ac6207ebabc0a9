"""Independent streams of randomness from one run seed.

Every run draws its initialisation, its order of data, and its order of classes (or permutations, or angles) from
generators that are seeded apart, so that pinning one of them, or a strategy that draws more numbers than another,
leaves the others where they were.

There are three sources of chance: what a run begins with ("init"), what its tasks are made of ("classes": their order,
permutations, angles), and all that is drawn on the way ("order": the order of data, augmentation, a method's own
chance). A run can have one of them from another seed: `Pinned`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, get_args

Source = Literal["init", "order", "classes"]
SOURCES: tuple[Source, ...] = get_args(Source)

_INIT = {
    "init", "parts", "generator", "columns", "adapters", "probes", "gates", "links", "scores", "attention",
}  # fmt: skip
_CLASSES = {"classes", "permutation", "permutations", "angles"}


def source(name: str | int) -> Source:
    """Return the source of chance that a stream of randomness belongs to, by its first name."""
    return "init" if name in _INIT else "classes" if name in _CLASSES else "order"


class Pinned(int):
    """A run's seed that has some sources of chance from other seeds: an int, that of the run, with `pins`."""

    pins: dict[str, int]

    def __new__(cls, seed: int, pins: Mapping[str, int]) -> Pinned:
        """Make one of a seed and the seeds of sources."""
        made = super().__new__(cls, seed)
        made.pins = dict(pins)
        return made

    def __getnewargs__(self) -> tuple[int, dict[str, int]]:  # type: ignore[override]  # int's own has no pins
        """Return what a copy is made of."""
        return int(self), self.pins


def seed_of(seed: int, wanted: Source) -> int:
    """Return the seed that a source of chance has: the run's own, unless it is pinned."""
    return seed.pins.get(wanted, int(seed)) if isinstance(seed, Pinned) else seed


def derive(seed: int, *names: str | int) -> int:
    """Return the seed of the stream called `names` under a run's seed: 63 bits, the same on every machine."""
    root = seed_of(seed, source(names[0])) if names else int(seed)
    text = "/".join(str(part) for part in (root, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive32(seed: int, *names: str | int) -> int:
    """Return the same for generators that take 32 bits (legacy NumPy)."""
    return derive(seed, *names) & 0xFFFF_FFFF
