"""Independent streams of randomness from one run seed.

Every run draws its initialisation, its order of data, and its order of classes (or permutations, or angles) from
generators that are seeded apart, so that pinning one of them, or a strategy that draws more numbers than another,
leaves the others where they were.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """Return the seed of the stream called `names` under a run's seed: 63 bits, the same on every machine."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive32(seed: int, *names: str | int) -> int:
    """Return the same for generators that take 32 bits (legacy NumPy)."""
    return derive(seed, *names) & 0xFFFF_FFFF
