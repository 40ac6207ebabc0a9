"""From stored uint8 images to a network's input, a batch at a time: pixel maps, normalisation, augmentation.

Letters: B batch, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PixelMap:
    """Which stored pixel each input pixel shows: padding, permutation and rotation alike, and their compositions."""

    source: Tensor
    """(H' * W',) int64 in [0, H * W]; H * W, one past the last stored pixel, shows a zero."""
    shape: tuple[int, int]
    """(H', W') of the input."""
    shows_zeros: bool
    """Whether any entry reaches outside the stored image."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H', W')."""
        batch, channels = x.shape[:2]
        flat = x.reshape(batch, channels, -1)
        if self.shows_zeros:
            flat = torch.cat([flat, flat.new_zeros(batch, channels, 1)], dim=2)
        # On bytes gather takes half the time of index_select.
        return flat.gather(2, self.source.expand(batch, channels, -1)).view(batch, channels, *self.shape)

    def to(self, device: torch.device) -> PixelMap:
        """Return the map with its index on `device`."""
        return PixelMap(self.source.to(device), self.shape, self.shows_zeros)


@dataclass(frozen=True, eq=False)
class View:
    """How stored uint8 images become a network's float input: pixel map, pixels / 255, then (x - mean) / std."""

    pixels: PixelMap | None
    mean: Tensor | None
    """(1, C, 1, 1) on pixels in [0, 1]; None leaves them in [0, 1]."""
    std: Tensor | None

    def __call__(self, images: Tensor) -> Tensor:
        """Turn (B, C, H, W) uint8 into (B, C, H', W') float32."""
        # Bytes are moved before they become floats: a quarter of the memory traffic, the same values.
        return self.normalise(self.seen(images).to(torch.float32))

    def seen(self, images: Tensor) -> Tensor:
        """Turn (B, C, H, W) uint8 into (B, C, H', W') uint8: what a learner that keeps samples has to keep."""
        return images if self.pixels is None else self.pixels(images)

    def normalises_like(self, other: View) -> bool:
        """Return whether both turn pixels into the same input, pixel maps aside."""
        return _same(self.mean, other.mean) and _same(self.std, other.std)

    def normalise(self, x: Tensor) -> Tensor:
        """Turn pixels in [0, 255], float32, into the network's input, in place."""
        x = x.div_(255)
        if self.mean is not None and self.std is not None:
            x = x.sub_(self.mean).div_(self.std)
        return x


@dataclass(frozen=True)
class CropFlip:
    """Random crop after padding by `padding` pixels, then a random horizontal flip, per sample.

    Works on normalised input, so a padded pixel has the data set's mean. Protocols that crop before they normalise pad
    with black instead: `border`.
    """

    padding: int = 4
    flip: bool = True
    border: tuple[float, ...] = ()
    """What a padded pixel is, per channel; left out: zero."""

    def __call__(self, x: Tensor) -> Tensor:
        """Augment one sample (C, H, W)."""
        return self.batch(x[None])[0]

    def batch(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Augment (B, C, H, W), every sample on its own; random numbers from `generator`, on the CPU."""
        batch, channels, height, width = x.shape
        pad = self.padding
        offsets = torch.randint(0, 2 * pad + 1, (2, batch), generator=generator)
        rows = offsets[0][:, None] + torch.arange(height)
        columns = torch.arange(width).expand(batch, width)
        if self.flip:
            turned = torch.rand(batch, generator=generator) < 0.5
            columns = torch.where(turned[:, None], width - 1 - columns, columns)
        columns = columns + offsets[1][:, None]
        pixel = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]
        padded = torch.nn.functional.pad(x, (pad, pad, pad, pad))
        if self.border:
            inside = torch.nn.functional.pad(torch.ones_like(x[:1, :1]), (pad, pad, pad, pad)).bool()
            padded = torch.where(inside, padded, torch.tensor(self.border, device=x.device).view(1, -1, 1, 1))
        source = pixel.view(batch, 1, -1).to(x.device).expand(batch, channels, -1)
        return padded.view(batch, channels, -1).gather(2, source).view_as(x)


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left, right)
