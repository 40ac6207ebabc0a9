"""Binary masks over weights: stored as bits, chosen by scores, and the way gradients pass them.

Letters: n elements of a weight, k of them chosen.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
_IN_NUMPY = (torch.float32, torch.float64)
"""Chosen by numpy where they lie on the CPU: its partition, comparisons and casts of bools take a fraction of the time
of torch's (`n` 78,400: 0.07 ms for a k-th value against 2 ms)."""
_SMALL = 4096
"""Up to so many elements a selection from scratch costs no more than one that remembers."""

# ---------------------------------------------------------------------------------------------------------------- bits


def pack_bits(mask: Tensor) -> Tensor:
    """Return a mask of any shape as (ceil(n / 8),) uint8: element i is bit i % 8 of byte i // 8."""
    flat = mask.flatten().to(torch.uint8)
    padded = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (padded * padded.new_tensor(_POWERS)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the bool mask of `shape` that `pack_bits` was given."""
    powers = bits.new_tensor(_POWERS)
    return (bits[:, None] & powers).ne(0).flatten()[: prod(shape)].view(torch.Size(shape))


def huffman_bits(counts: Iterable[int]) -> int:
    """Return the bits of a text in a Huffman code made for it, without the code's own table.

    Args:
        counts: how often each symbol occurs. A text of one symbol alone takes no bits.
    """
    queue = [count for count in counts if count > 0]
    heapq.heapify(queue)
    total = 0
    while len(queue) > 1:  # every symbol of a merged pair gets one bit longer
        merged = heapq.heappop(queue) + heapq.heappop(queue)
        total += merged
        heapq.heappush(queue, merged)
    return total


def coded_bits(masks: Sequence[Tensor], together: int = 7) -> int:
    """Return the bits of several masks of one weight in a Huffman code, `together` of them making one symbol.

    A symbol is what up to `together` masks say of one element; each group of masks has a code of its own.
    """
    total = 0
    for first in range(0, len(masks), together):
        group = masks[first : first + together]
        symbols = sum(mask.flatten().long() << place for place, mask in enumerate(group))
        total += huffman_bits(torch.bincount(cast(Tensor, symbols)).tolist())
    return total


# ------------------------------------------------------------------------------------------------------------ choosing


def chosen_count(n: int, share: float) -> int:
    """Return how many of n elements a share is: the nearest whole number, at least one."""
    return max(1, round(share * n))


def top_mask(scores: Tensor, share: float) -> Tensor:
    """Return the bool mask of the `chosen_count(n, share)` largest scores; of equal ones the first in memory's order.

    Exact and the same at every call, on every device. Where scores are NaN fewer may be chosen.
    """
    return TopMask(share)(scores)


class TopMask:
    """`top_mask`, called again and again for scores that move a little between calls.

    It looks for the k-th score near the last one, and selects among all of them when it is not there; so its answer
    never depends on earlier calls, its time does.

    Args:
        share: of the elements.
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"a share is from 0 to 1; got {share}")
        self.share = share
        self._cut: float | None = None
        self._drift = 0.0
        self._margin = 0.0
        self._room: list[NDArray[Any]] = []
        """Sizes, and two rows of bools, kept from call to call."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Return the bool mask of the largest scores."""
        flat = scores.detach().reshape(-1)
        k = chosen_count(len(flat), self.share)
        if k >= len(flat):
            return torch.ones_like(scores, dtype=torch.bool)
        if flat.device.type == "cpu" and flat.dtype in _IN_NUMPY:
            mask = torch.from_numpy(self._chosen(flat.numpy(), k))
        else:
            mask = _chosen(flat, k)
        return mask.view(scores.shape)

    def by_size(self, scores: Tensor) -> float | Tensor:
        """Return what `masked` needs to choose the scores of the largest sizes.

        On the CPU that is a bound that exactly the chosen sizes exceed: less to write and to read than a mask, and a
        step on an MLP of 784-100-100 takes about a tenth less. A mask elsewhere, and where equal sizes would have to be
        told apart.
        """
        if scores.device.type != "cpu" or scores.dtype not in _IN_NUMPY:
            return self(scores.detach().abs())
        values = scores.detach().numpy().reshape(-1)
        n = len(values)
        k = chosen_count(n, self.share)
        if k >= n:
            return -1.0
        sizes = np.abs(values, out=self._rooms(values)[0])
        cut, reached = self._kth(sizes, k)
        if reached != k or not cut > 0:
            return torch.from_numpy(self._chosen(sizes, k)).view(scores.shape)
        return float(np.nextafter(cut, cut.dtype.type(0)))

    def _rooms(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        if not self._room or self._room[0].shape != values.shape or self._room[0].dtype != values.dtype:
            self._room = [np.empty_like(values), *np.empty((2, len(values)), np.bool_)]
        return self._room

    def _chosen(self, values: NDArray[Any], k: int) -> NDArray[np.bool_]:
        cut, _ = self._kth(values, k)
        mask: NDArray[np.bool_] = values >= cut
        surplus = int(np.count_nonzero(mask)) - k
        if surplus > 0:
            mask[np.flatnonzero(values == cut)[-surplus:]] = False
        return mask

    def _kth(self, values: NDArray[Any], k: int) -> tuple[Any, int]:
        """Return the k-th largest value, and how many are no smaller."""
        found = self._near(values, k)
        if found is None:
            n = len(values)
            cut = np.partition(values, n - k)[n - k]
            self._margin = max(2 * self._margin, abs(float(cut)) / 64)
            found = cut, int(np.count_nonzero(values >= cut))
        self._drift = 0.0 if self._cut is None else float(found[0]) - self._cut
        self._cut = float(found[0])
        return found

    def _near(self, values: NDArray[Any], k: int) -> tuple[Any, int] | None:
        """Return the same if the k-th value lies within the margin of where it should have moved to, else None."""
        if self._cut is None or len(values) <= _SMALL:
            return None
        guess, kind = self._cut + self._drift, values.dtype.type
        _, above, reached = self._rooms(values)
        np.greater(values, kind(guess + self._margin), out=above)
        np.greater_equal(values, kind(guess - self._margin), out=reached)
        more = int(np.count_nonzero(above))
        np.not_equal(above, reached, out=reached)
        near = values[reached]
        wanted = k - more
        if not 0 < wanted <= len(near):
            return None
        if len(near) > len(values) // 64:
            self._margin /= 2
        cut = np.partition(near, len(near) - wanted)[len(near) - wanted]
        return cut, more + int(np.count_nonzero(near >= cut))


def _chosen(flat: Tensor, k: int) -> Tensor:
    """Return the mask of the k largest of (n,) values by torch alone: nothing waits for the device."""
    cut = flat.topk(k, sorted=False).values.amin()
    above, ties = flat > cut, flat == cut
    return above | (ties & (ties.cumsum(0) <= k - above.sum()))


def leading(scores: Tensor, mask: Tensor) -> Tensor:
    """Return `scores` with their sizes dealt out anew, so that the largest fall to the elements of `mask`.

    Signs stay where they are, and so does the order of sizes within the mask and outside of it: scores whose largest
    sizes are the mask's already are returned as they were.
    """
    sizes = scores.detach().abs().flatten()
    ranked = sizes.argsort(stable=True)
    order = ranked[mask.flatten()[ranked].argsort(stable=True)]
    dealt = torch.empty_like(sizes)
    dealt[order] = sizes[ranked]
    return torch.copysign(dealt.view_as(scores), scores.detach())


# ----------------------------------------------------------------------------------------------------------- gradients


class _Choose(torch.autograd.Function):
    """A mask as numbers; its gradient is passed to the scores as it is (straight-through)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor) -> Tensor:
        return numbers(mask, scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(scores: Tensor, mask: Tensor) -> Tensor:
    """Return `mask` as numbers like `scores`, with the gradient of the identity in the scores (Bengio et al. 2013)."""
    return cast(Tensor, _Choose.apply(scores, mask))


_above = torch.ops.aten.hardshrink_backward
"""(values, scores, bound): the values where a score's size exceeds the bound, else 0, in one pass."""


def _used(values: Tensor, scores: Tensor, by: float | Tensor) -> Tensor:
    """Return values where their scores are chosen, else 0."""
    if isinstance(by, Tensor):
        return values * numbers(by, values.dtype)
    return cast(Tensor, _above(values, scores, by))


class _Masked(torch.autograd.Function):
    """A weight times a mask, with the gradients of weight and scores in as few passes as there are."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, by: float | Tensor, free: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scores, free)
        ctx.by = by
        return _used(weight, scores, by)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, scores, free = ctx.saved_tensors
        of_weight = of_scores = None
        if ctx.needs_input_grad[0]:
            of_weight = _used(gradients[0], scores, ctx.by)
            if free is not None:
                of_weight.mul_(free)
        if ctx.needs_input_grad[1]:
            of_scores = scores.sign().mul_(gradients[0]).mul_(weight)
        return of_weight, of_scores, None, None


def masked(weight: Tensor, scores: Tensor, by: float | Tensor, free: Tensor | None = None) -> Tensor:
    """Return `weight * mask`, where the mask was chosen by the sizes of `scores`.

    With G the gradient of the result, that of the weight is G * mask * free, and that of the scores, straight through
    the choice, G * weight * sign(scores): the same as of `weight * straight_through(scores.abs(), mask)`.

    Args:
        weight: any shape.
        scores: of its shape.
        by: the mask, bool, of its shape; or a bound, the mask being where sizes exceed it (`TopMask.by_size`).
        free: 1 where the weight may learn, 0 where its gradient is to be exactly 0; None for 1 everywhere.
    """
    return cast(Tensor, _Masked.apply(weight, scores, by, free))


def numbers(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool mask as ones and zeros of a floating type."""
    if mask.device.type == "cpu" and dtype == torch.float32:
        return torch.from_numpy(mask.numpy().astype(np.float32))
    return mask.to(dtype)
