"""The multi-layer perceptron that most MNIST protocols use."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets.trunk import ChainTrunk, Trunk


class MLP(ChainTrunk):
    """Fully connected layers, each followed by ReLU and, if asked for, dropout.

    Parameters: the sum over layers of fan_in * width + width, without the last term where `bias` is off.

    Args:
        input_shape: channels, height and width; flattened.
        hidden: width of each hidden layer; the last is `out_features`.
        bias: whether the layers have biases. GPM's and TRGP's nets have none.
        dropout: share of the units dropped after every hidden layer while training.
        init: "torch", as PyTorch does, or "xavier", as `draw_xavier` does.

    Raises:
        ValueError: `hidden` is empty, or no such initialisation.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        hidden: Sequence[int],
        bias: bool = True,
        dropout: float = 0.0,
        init: str = "torch",
    ) -> None:
        super().__init__(input_shape)
        if not hidden:
            raise ValueError("an MLP needs at least one hidden layer")
        if init not in ("torch", "xavier"):
            raise ValueError(f"unknown initialisation '{init}'. Known: torch, xavier")
        widths = [prod(self.input_shape), *hidden]
        self.layers = nn.ModuleList(
            nn.Linear(fan_in, width, bias=bias) for fan_in, width in pairwise(widths)
        )
        self.chain = tuple(f"layers.{i}" for i in range(len(hidden)))
        self.dropout = nn.Dropout(dropout)
        self.out_features = widths[-1]
        if init == "xavier":
            draw_xavier(self)

    def prepare(self, x: Tensor) -> Tensor:
        """Return the pixels as one row, (B, C, H, W) -> (B, C * H * W)."""
        return x.flatten(1)

    def between(self, i: int, x: Tensor) -> Tensor:
        """Return ReLU and dropout of any layer's output."""
        dropped: Tensor = self.dropout(F.relu(x))
        return dropped


def draw_xavier(net: nn.Module) -> None:
    """Draw every linear layer's weights uniform within sqrt(6 / (inputs + outputs)), biases zero.

    Glorot & Bengio 2010, "Understanding the difficulty of training deep feedforward neural networks", equation 16.
    """
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class NormedMLP(Trunk):
    """Fully connected layers without biases, each followed by batch normalisation and ReLU (GDumb's net for MNIST).

    Batch norm cannot train on a batch of one image. Initialised as PyTorch does.

    Parameters: the sum over layers of fan_in * width + 2 * width.

    Args:
        input_shape: channels, height and width; flattened.
        hidden: width of each hidden layer; the last is `out_features`.

    Raises:
        ValueError: `hidden` is empty.
    """

    def __init__(self, input_shape: Sequence[int], hidden: Sequence[int]) -> None:
        super().__init__(input_shape)
        if not hidden:
            raise ValueError("an MLP needs at least one hidden layer")
        widths = [prod(self.input_shape), *hidden]
        self.layers = nn.ModuleList(nn.Linear(fan_in, width, bias=False) for fan_in, width in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in hidden)
        self.out_features = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (B, C, H, W) -> (B, out_features)."""
        x = x.flatten(1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return x
