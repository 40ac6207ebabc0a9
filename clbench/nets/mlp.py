"""The multi-layer perceptron that most MNIST protocols use."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets.trunk import ChainTrunk


class MLP(ChainTrunk):
    """Fully connected layers, each followed by ReLU and, if asked for, dropout. Initialised as PyTorch does.

    Parameters: the sum over layers of fan_in * width + width, without the last term where `bias` is off.

    Args:
        input_shape: channels, height and width; flattened.
        hidden: width of each hidden layer; the last is `out_features`.
        bias: whether the layers have biases. GPM's and TRGP's nets have none.
        dropout: share of the units dropped after every hidden layer while training.

    Raises:
        ValueError: `hidden` is empty.
    """

    def __init__(
        self, input_shape: Sequence[int], hidden: Sequence[int], bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__(input_shape)
        if not hidden:
            raise ValueError("an MLP needs at least one hidden layer")
        widths = [prod(self.input_shape), *hidden]
        self.layers = nn.ModuleList(
            nn.Linear(fan_in, width, bias=bias) for fan_in, width in pairwise(widths)
        )
        self.chain = tuple(f"layers.{i}" for i in range(len(hidden)))
        self.dropout = nn.Dropout(dropout)
        self.out_features = widths[-1]

    def prepare(self, x: Tensor) -> Tensor:
        """Return the pixels as one row, (B, C, H, W) -> (B, C * H * W)."""
        return x.flatten(1)

    def between(self, i: int, x: Tensor) -> Tensor:
        """Return ReLU and dropout of any layer's output."""
        dropped: Tensor = self.dropout(F.relu(x))
        return dropped
