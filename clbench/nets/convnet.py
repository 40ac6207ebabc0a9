"""Two small convolutional nets: the one of Synaptic Intelligence, and the LeNet-like one of APD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets.trunk import ChainTrunk


class ZenkeNet(ChainTrunk):
    """The conv net of Synaptic Intelligence for CIFAR (Zenke et al. 2017, appendix), also used by HNET.

    Two times (3x3 conv that keeps the size, 3x3 conv that trims one pixel on every side, 2x2 max pool, dropout), then
    one hidden layer with dropout; ReLU after every layer. HNET's code drops whole channels after the pools; here, as
    in the paper's own net, single activations are dropped.

    Initialised as PyTorch does; HNET's command asks for an initialisation of its own (`--custom_network_init`).

    Parameters for 3x32x32: 896 + 9,248 + 18,496 + 36,928 in the convolutions (in * out * 9 + out), and
    64 * 6 * 6 * 512 + 512 = 1,180,160 in the hidden layer: 1,245,728. With six heads of ten classes,
    6 * (512 * 10 + 10) = 30,780 more: the 1,276,508 of HNET's target net.

    Args:
        input_shape: channels, height and width, at least 10x10 pixels.
        channels: of the two pairs of convolutions.
        hidden: width of the hidden layer, `out_features`.
        dropout: share dropped after each pool, and after the hidden layer.

    Raises:
        ValueError: the images are too small.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        channels: tuple[int, int] = (32, 64),
        hidden: int = 512,
        dropout: tuple[float, float] = (0.25, 0.5),
    ) -> None:
        super().__init__(input_shape)
        self._require_side(10)  # 10 -> 8 -> 4 -> 2 -> 1
        first, second = channels
        self.conv1 = nn.Conv2d(self.input_shape[0], first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, first, 3)
        self.conv3 = nn.Conv2d(first, second, 3, padding=1)
        self.conv4 = nn.Conv2d(second, second, 3)
        self.chain = ("conv1", "conv2", "conv3", "conv4", "hidden")
        self.pool = nn.MaxPool2d(2)
        height, width = (((side - 2) // 2 - 2) // 2 for side in self.input_shape[1:])
        self.hidden = nn.Linear(second * height * width, hidden)
        self.dropout_pool = nn.Dropout(dropout[0])
        self.dropout_hidden = nn.Dropout(dropout[1])
        self.out_features = hidden

    def prepare(self, x: Tensor) -> Tensor:
        """Return the images in the convolutions' memory layout."""
        return self._laid_out(x)

    def between(self, i: int, x: Tensor) -> Tensor:
        """Return ReLU, then pool and dropout after a pair of convolutions; maps are rows before the hidden layer."""
        x = F.relu(x)
        if i == 4:
            return self._dropped(self.dropout_hidden, x)
        if i in (1, 3):
            x = self._dropped(self.dropout_pool, self.pool(x))
        return x.flatten(1) if i == 3 else x

    @staticmethod
    def _dropped(dropout: nn.Module, x: Tensor) -> Tensor:
        dropped: Tensor = dropout(x)
        return dropped


class LeNet(ChainTrunk):
    """The LeNet-like net of APD for CIFAR-100 (Yoon et al. 2020), later of GPM and WSN with other widths.

    Two times (5x5 conv that keeps the size, ReLU, local response normalisation, 3x3 max pool with stride 2), then two
    hidden layers with ReLU. The normalisation is that of APD's code: over 9 channels, 1e-3 on the mean square, power
    0.75. The pool pads one pixel on every side, as the PyTorch descendants do; TensorFlow, on even sizes, pads below
    and on the right only.

    Initialised as PyTorch does; APD's code draws from a truncated normal of variance 1 / fan_in.

    Parameters for 3x32x32 and 20-50-800-500: convolutions 3 * 20 * 25 + 20 = 1,520 and 20 * 50 * 25 + 50 = 25,050; maps
    of 50 x 8 x 8 = 3,200 features, so 3,200 * 800 + 800 = 2,560,800 and 800 * 500 + 500 = 400,500: 2,987,870.

    Args:
        input_shape: channels, height and width; any size.
        channels: of the two convolutions.
        hidden: widths of the two hidden layers; the second is `out_features`.
        response_norm: whether to normalise; it makes channels depend on their neighbours, which methods that cut units
            out of a net cannot have.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        channels: tuple[int, int] = (20, 50),
        hidden: tuple[int, int] = (800, 500),
        response_norm: bool = True,
    ) -> None:
        super().__init__(input_shape)
        first, second = channels
        self.conv1 = nn.Conv2d(self.input_shape[0], first, 5, padding=2)
        self.conv2 = nn.Conv2d(first, second, 5, padding=2)
        self.chain = ("conv1", "conv2", "hidden1", "hidden2")
        self.response_norm = response_norm
        self.norm = _ResponseNorm() if response_norm else nn.Identity()
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)  # n -> ceil(n / 2)
        height, width = ((side + 3) // 4 for side in self.input_shape[1:])
        self.hidden1 = nn.Linear(second * height * width, hidden[0])
        self.hidden2 = nn.Linear(hidden[0], hidden[1])
        self.out_features = hidden[1]

    def prepare(self, x: Tensor) -> Tensor:
        """Return the images in the convolutions' memory layout."""
        return self._laid_out(x)

    def between(self, i: int, x: Tensor) -> Tensor:
        """Return ReLU, after a convolution normalised and pooled; maps become rows before the hidden layers."""
        x = F.relu(x)
        if i < 2:
            x = self.pool(self.norm(x))
        return x.flatten(1) if i == 1 else x

    @property
    def mixes_units(self) -> bool:
        """Response normalisation divides a channel by its neighbours' size."""
        return self.response_norm


class _ResponseNorm(nn.Module):
    """`LocalResponseNorm(9, alpha=1e-3, beta=0.75, k=1)`: x / (1 + 1e-3 / 9 * sum of x^2 over 9 channels)^0.75.

    PyTorch's own, by a 3-d pool and a general power, makes a CPU training step of LeNet twice as slow as this one,
    where the sum is a product with a band of ones and the power two roots. The band is no buffer: it is no state.
    """

    def forward(self, x: Tensor) -> Tensor:
        number = torch.arange(x.shape[1], device=x.device)
        band = ((number[:, None] - number).abs() <= 4).to(x.dtype) * (1e-3 / 9)
        root = (1 + (band @ x.square().flatten(2)).view_as(x)).rsqrt()  # u^-1/2; with its own root, u^-3/4
        return x * (root * root.sqrt())
