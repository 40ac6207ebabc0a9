"""What every trunk is: a module from images to features, which knows how many features it yields."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Trunk(nn.Module):
    """Base of the nets without their head: `forward` maps images (B, C, H, W) to features (B, out_features).

    A user's own trunk need not inherit from it: a module with the attribute `out_features` will do.

    Args:
        input_shape: channels, height and width of one image.

    Raises:
        ValueError: `input_shape` is not three positive numbers.
    """

    input_shape: tuple[int, int, int]
    out_features: int
    channels_last = True
    """Whether convolutions on the CPU run with the channel as the fastest dimension in memory: the same function, up to
    rounding, in about three quarters of the time (`python -m benchmarks.loading`). Weights keep their layout."""

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__()
        if len(input_shape) != 3 or min(input_shape) < 1:
            raise ValueError(f"input_shape is (channels, height, width), all positive; got {tuple(input_shape)}")
        channels, height, width = input_shape
        self.input_shape = (int(channels), int(height), int(width))

    def _laid_out(self, x: Tensor) -> Tensor:
        """Return images (B, C, H, W) in the memory layout in which this net's convolutions are to run."""
        if not self.channels_last or x.device.type != "cpu":
            return x
        # What x.contiguous(memory_format=torch.channels_last) does, in steps that vmap knows.
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    def _require_side(self, least: int) -> None:
        """Refuse images whose feature maps would have no pixel left."""
        sides = {"height": self.input_shape[1], "width": self.input_shape[2]}
        small = [f"{name} {side}" for name, side in sides.items() if side < least]
        if small:
            needs = f"{type(self).__name__} needs images of at least {least}x{least} pixels"
            raise ValueError(f"{needs}; {' and '.join(small)} is too small")
