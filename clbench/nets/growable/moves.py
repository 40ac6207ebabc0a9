"""Moving slices of a contiguous tensor within its own memory.

Everything here works on the flat elements as whole numbers of the same size: bits move unchanged, whatever the dtype.
What would overlap itself goes through one small buffer. All copies are in the order in which nothing is overwritten
before it has been read.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUNCE_ELEMENTS = 2_000_000
"""The bounce buffer of a move holds at most this many elements, and 1/256 of the tensor's."""

_LEAST_BOUNCE = 16_384
"""Below this a smaller buffer would save nothing and cost many small copies."""

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""A dtype of each item size that every kernel knows: moving bytes asks nothing else of a dtype."""


def as_integers(t: Tensor) -> Tensor:
    """Return contiguous t as whole numbers of the same size: bits move unchanged, whatever the dtype."""
    return t.view(_SAME_SIZE[t.element_size()])


def flat(t: Tensor) -> Tensor:
    """Return contiguous t as one row of whole numbers."""
    return as_integers(t).view(-1)


def bounce(t: Tensor) -> Tensor:
    """Return the buffer through which what would overlap itself is moved; a smaller one where memory is short."""
    elements = max(1, min(BOUNCE_ELEMENTS, t.numel(), max(t.numel() // 256, _LEAST_BOUNCE)))
    while True:
        try:
            return as_integers(torch.empty(elements, dtype=t.dtype, device=t.device))
        except RuntimeError:
            if elements < 4096:
                raise
            elements //= 2


def spread_rows(flat: Tensor, rows: int, old: int, new: int, buffer: Tensor) -> None:
    """Move row r of `rows` from r * old to r * new (old <= new), in place, the last row first.

    What is written lies behind what is still to be read: rows before r0 end at r0 * old <= r0 * new. A stretch of rows
    whose old and new places are apart moves in one copy; since new / old is constant, such stretches form a geometric
    series. What remains near the front moves through the bounce buffer, a row longer than that in pieces.
    """
    if old in (0, new):
        return
    end = rows
    # Row 0 is where it belongs.
    while end > 1:
        apart = end - max(1, -(-end * old // new))
        through_bounce = min(len(buffer) // old, end - 1)
        if apart and apart >= through_bounce:
            start = end - apart
            strided(flat, start, end, old, new).copy_(flat[start * old : end * old].view(apart, old))
        elif through_bounce:
            start = end - through_bounce
            lent = buffer[: through_bounce * old].view(through_bounce, old)
            lent.copy_(flat[start * old : end * old].view(through_bounce, old))
            strided(flat, start, end, old, new).copy_(lent)
        else:
            start = end - 1
            _shift_back(flat, start * old, start * new, old, buffer)
        end = start


def strided(flat: Tensor, start: int, end: int, length: int, pitch: int) -> Tensor:
    """Return rows start .. end - 1 of `length` elements that begin every `pitch` elements."""
    return flat[start * pitch : end * pitch].view(end - start, pitch)[:, :length]


def _shift_back(flat: Tensor, source: int, target: int, length: int, buffer: Tensor) -> None:
    """Move `length` elements to a later place, from their end: pieces longer than the shift through the bounce."""
    shift = target - source
    while length:
        piece = min(length, max(shift, len(buffer)))
        length -= piece
        here, there = flat[source + length :][:piece], flat[target + length :][:piece]
        if piece <= shift:
            there.copy_(here)
        else:
            there.copy_(buffer[:piece].copy_(here))


def gather_rows(flat: Tensor, rows: int, size: int, inner: int, index: Tensor, buffer: Tensor) -> None:
    """Bring the slices `index` of every row (size, inner) together at the front, in place, the first row first.

    Slices only move forward, and in their order, so nothing is overwritten before it has been read.
    """
    count = len(index)
    if count == 0 or inner == 0:
        return
    index = index.to(flat.device)
    per_bounce = len(buffer) // (count * inner)
    if per_bounce:
        for start in range(0, rows, per_bounce):
            n = min(per_bounce, rows - start)
            lent = buffer[: n * count * inner].view(n, count, inner)
            source = flat[start * size * inner : (start + n) * size * inner].view(n, size, inner)
            torch.index_select(source, 1, index, out=lent)
            flat[start * count * inner :][: lent.numel()].copy_(lent.view(-1))
        return
    slices = max(1, len(buffer) // inner)
    for row in range(rows):
        for first in range(0, count, slices):
            chosen = index[first : first + slices]
            begin, target = row * size * inner, (row * count + first) * inner
            if inner > len(buffer):
                _shift_forward(flat, begin + int(index[first]) * inner, target, inner, buffer)
                continue
            lent = buffer[: len(chosen) * inner].view(len(chosen), inner)
            torch.index_select(flat[begin : begin + size * inner].view(size, inner), 0, chosen, out=lent)
            flat[target : target + lent.numel()].copy_(lent.view(-1))


def _shift_forward(flat: Tensor, source: int, target: int, length: int, buffer: Tensor) -> None:
    """Move `length` elements to an earlier place, from their start."""
    done = 0
    while done < length and source != target:
        piece = min(length - done, len(buffer))
        lent = buffer[:piece].copy_(flat[source + done :][:piece])
        flat[target + done :][:piece].copy_(lent)
        done += piece
