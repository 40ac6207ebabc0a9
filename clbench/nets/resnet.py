"""Residual nets for small images: ResNet-18 (wide or slim) and the ResNet-32 of He et al. 2016 for CIFAR.

Both begin with a 3x3 convolution of stride 1 and no pool, and end in the mean over pixels. Initialised as PyTorch does.
Batch norm cannot train on a batch of one image whose last feature map is one pixel (ResNet-18 on 8x8 images).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets.trunk import Trunk


class ResNet18(Trunk):
    """ResNet-18 for small images; with width 20 the slim one of GEM (Lopez-Paz & Ranzato 2017).

    Four stages of two blocks, of 1, 2, 4 and 8 times `width` channels, the last three halving the image. Convolutions
    have no bias; where a block changes the shape, its shortcut is a 1x1 convolution with batch norm.

    Parameters for 3 input channels and width w: 3 * 9 w = 27 w in the stem; in the stages' 3x3 convolutions
    9 w^2 (4 + (2 + 12) + (8 + 48) + (32 + 192)) = 2,682 w^2, in the 1x1 ones (2 + 8 + 32) w^2 = 42 w^2; two per channel
    of batch norm, 2 w (1 + 4 + 5 * 2 + 5 * 4 + 5 * 8) = 150 w. Sum 2,724 w^2 + 177 w: 11,168,832 for w = 64 and
    1,093,140 for w = 20.

    Args:
        input_shape: channels, height and width, at least 8x8 pixels.
        width: channels of the first stage; `out_features` is 8 times as many.

    Raises:
        ValueError: the images are too small to be halved three times.
    """

    def __init__(self, input_shape: Sequence[int], width: int = 64) -> None:
        super().__init__(input_shape)
        self._require_side(8)
        self.conv = nn.Conv2d(self.input_shape[0], width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.stages = _stages([width, width, 2 * width, 4 * width, 8 * width], 2, bias=False, projection=True)
        self.out_features = 8 * width

    def forward(self, x: Tensor) -> Tensor:
        """Return the last stage's mean over pixels, (B, C, H, W) -> (B, out_features)."""
        x = self.stages(F.relu(self.norm(self.conv(self._laid_out(x)))))
        return x.mean((2, 3))


class ResNet32(Trunk):
    """The CIFAR ResNet with 32 layers (He et al. 2016, section 4.2): three stages of five blocks, 16, 32, 64 channels.

    Shortcuts have no parameters (option A): where the shape changes they take every second pixel and append zero
    channels (HNET's code puts half of them in front: the same net with its channels renumbered). Convolutions have
    biases, redundant before batch norm, because HNET's target net has them, as its size tells. Initialised as PyTorch
    does; HNET's command asks for an initialisation of its own (`--custom_network_init`).

    Parameters for 3x32x32: 9 * (3 * 16 + 10 * 16^2 + 16 * 32 + 9 * 32^2 + 32 * 64 + 9 * 64^2) = 461,232 weights; one
    bias per channel, 16 + 10 * (16 + 32 + 64) = 1,136; two of batch norm per channel, 2,272: 464,640. With six heads of
    ten classes, 6 * (64 * 10 + 10) = 3,900 more: the 468,540 of HNET's target net.

    Args:
        input_shape: channels, height and width, at least 4x4 pixels.

    Raises:
        ValueError: the images are too small to be halved twice.
    """

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__(input_shape)
        self._require_side(4)
        self.conv = nn.Conv2d(self.input_shape[0], 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.stages = _stages([16, 16, 32, 64], 5, bias=True, projection=False)
        self.out_features = 64

    def forward(self, x: Tensor) -> Tensor:
        """Return the last stage's mean over pixels, (B, C, H, W) -> (B, 64)."""
        x = self.stages(F.relu(self.norm(self.conv(self._laid_out(x)))))
        return x.mean((2, 3))


def _stages(widths: Sequence[int], n_blocks: int, *, bias: bool, projection: bool) -> nn.Sequential:
    """Return one stage per width after the first, which is the stem's; each stage but the first halves the image."""
    stages = []
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        first = _Block(n_in, n_out, stride=1 if i == 0 else 2, bias=bias, projection=projection)
        rest = [_Block(n_out, n_out, stride=1, bias=bias, projection=projection) for _ in range(n_blocks - 1)]
        stages.append(nn.Sequential(first, *rest))
    return nn.Sequential(*stages)


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm, added to a shortcut; ReLU after the first and after the sum."""

    def __init__(self, n_in: int, n_out: int, *, stride: int, bias: bool, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=bias)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=bias)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.shortcut: nn.Module
        if stride == 1 and n_in == n_out:
            self.shortcut = nn.Identity()
        elif projection:
            self.shortcut = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride=stride, bias=bias), nn.BatchNorm2d(n_out))
        else:
            self.shortcut = _PaddedShortcut(stride, n_out - n_in)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class _PaddedShortcut(nn.Module):
    """Option A of He et al. 2016: every `stride`-th pixel, and `extra` channels of zeros behind the others."""

    def __init__(self, stride: int, extra: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
