"""Progressive networks: one column of layers per task, each fed by the frozen columns before it.

Source: Rusu et al. 2016, "Progressive neural networks", arXiv:1606.04671, equations 1 and 2. With h_0 the input, f ReLU
(and whatever else the trunk has between its layers), i the layer, k the column:

    linear    h_i^(k) = f(W_i^(k) h_{i-1}^(k) + sum over j < k of U_i^(k:j) h_{i-1}^(j))
    adapter   h_i^(k) = f(W_i^(k) h_{i-1}^(k) + U_i^(k) relu(V_i^(k) a_i)), where a_i = [alpha_j h_{i-1}^(j) for j < k]
    none      h_i^(k) = f(W_i^(k) h_{i-1}^(k)): columns that know nothing of each other

The output layer is one of the layers, without f. The first one has no lateral inputs: every column sees the input
itself. V projects onto as many units as the column's own layer i - 1 has; for maps it is a 1x1 convolution, also where
they are flattened on their way into a hidden layer. U is a layer of the shape of W_i. V has a bias where W_i has one, U
none, which would be W_i's a second time.

Letters: B batch, C classes, F features, k columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets.heads import HeadedNet, MultiHead, by_task
from clbench.nets.trunk import ChainTrunk

Lateral = Literal["adapter", "linear", "none"]
"""How a column sees the earlier ones."""

Layer = nn.Linear | nn.Conv2d


class Adapter(nn.Module):
    """relu(V (alpha_j h_j, side by side)): the earlier columns' units, scaled each column by itself, then projected.

    Args:
        earlier: units of each earlier column.
        units: to project onto.
        positions: values a unit has in a row of features: pixels of its map where maps were flattened, else 1.
        bias: of the projection.
        scale: every alpha is drawn from (0, scale).
        generator: draws, on the CPU.
    """

    def __init__(
        self, earlier: Sequence[int], units: int, positions: int, bias: bool, scale: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.earlier = tuple(earlier)
        self.positions = positions
        self.alpha = nn.Parameter(torch.rand(len(self.earlier), generator=generator) * scale)
        self.projection = nn.Linear(sum(self.earlier), units, bias=bias, device="meta").to_empty(device="cpu")
        _draw(self.projection, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, units * positions) for features, (B, units, H, W) for maps; x has all earlier units in dim 1."""
        # The scalars go into the matrix, which has fewer elements than a batch of maps.
        scales = torch.cat([alpha.expand(units) for alpha, units in zip(self.alpha, self.earlier, strict=True)])
        weight, bias = self.projection.weight * scales, self.projection.bias
        if x.ndim == 2 and self.positions == 1:
            return F.relu(F.linear(x, weight, bias))
        maps = x if x.ndim == 4 else x.reshape(len(x), weight.shape[1], self.positions, 1)
        projected = F.relu(F.conv2d(maps, weight[:, :, None, None], bias))
        return projected if x.ndim == 4 else projected.flatten(1)


class Column(nn.Module):
    """A trunk and its head, with the lateral connections into both.

    Args:
        trunk: of the column's own.
        head: without outputs.
        earlier: units per layer of each earlier column that it is to see.
        lateral: how.
        scale: of the adapters' scalars.
        generator: draws what is lateral.
    """

    head_lateral: MultiHead | None

    def __init__(
        self,
        trunk: ChainTrunk,
        head: MultiHead,
        earlier: Sequence[Sequence[int]],
        lateral: Lateral,
        scale: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.units = tuple(_units(trunk.layer(i)) for i in range(len(trunk.chain)))
        """Of each layer."""
        self.adapters = nn.ModuleList()
        """Into every layer but the first, and into the output; empty without adapters."""
        self.laterals = nn.ModuleList()
        """U of every layer but the first; empty without earlier columns."""
        self.head_lateral = None
        """U of the output."""
        if not earlier or lateral == "none":
            return
        layers: list[Layer | None] = [*(trunk.layer(i) for i in range(1, len(trunk.chain))), None]
        for i, layer in enumerate(layers):
            seen, own = [units[i] for units in earlier], self.units[i]
            fan_in = trunk.out_features if layer is None else _fan_in(layer)
            positions = fan_in // own
            units = own if lateral == "adapter" else sum(seen)
            if lateral == "adapter":
                bias = head.bias if layer is None else layer.bias is not None
                self.adapters.append(Adapter(seen, own, positions, bias, scale, generator))
            if layer is not None:
                self.laterals.append(_like(layer, units * positions, units=_units(layer), generator=generator))
            else:
                seed = int(torch.randint(2**62, (), generator=generator))
                self.head_lateral = MultiHead(units * positions, seed, bias=False, expected=head.expected)

    def step(self, i: int, x: Tensor, earlier: Tensor | None) -> Tensor:
        """Return what layer i + 1 sees: x from this column's layer i - 1, `earlier` from all columns before it."""
        y: Tensor = self.trunk.layer(i)(x)
        if earlier is not None and i > 0:
            y = y + self.laterals[i - 1](self._adapted(i - 1, earlier))
        return self.trunk.between(i, y)

    def logits(self, x: Tensor, earlier: Tensor | None, task: int) -> Tensor:
        """Return (B, C) from this column's features and those of all columns before it."""
        y: Tensor = self.head(x, task)
        if earlier is not None and self.head_lateral is not None:
            y = y + self.head_lateral(self._adapted(len(self.units) - 1, earlier), task)
        return y

    def observe(self, task: int, classes: Sequence[int]) -> None:
        """Give the column the outputs of its task, or further ones."""
        self.head.observe(task, classes)
        if self.head_lateral is not None:
            self.head_lateral.observe(task, classes)

    def output(self) -> list[nn.Parameter]:
        """Return the parameters of the output layer, its lateral ones among them: no other column reads it."""
        parts = [self.head, *self.adapters[-1:], *([] if self.head_lateral is None else [self.head_lateral])]
        return [parameter for part in parts for parameter in part.parameters()]

    def body(self) -> list[nn.Parameter]:
        """Return the parameters below the output: those that later columns rest on."""
        top = {id(parameter) for parameter in self.output()}
        return [parameter for parameter in self.parameters() if id(parameter) not in top]

    def _adapted(self, place: int, earlier: Tensor) -> Tensor:
        adapted: Tensor = self.adapters[place](earlier) if len(self.adapters) else earlier
        return adapted


class ProgressiveNet(nn.Module):
    """A net that answers for a task with the task's own column: images (B, C, H, W) and a task to logits.

    `observe` gives a task its column and freezes what is not to change any more. Frozen columns run without gradients
    and in evaluation mode: what they drop out while learning is no part of the features that they pass on.

    The first column is the net of `new_net`, unchanged. Later ones are drawn as PyTorch draws layers, from `seed` and
    the column's number alone, so that a task not seen yet can be answered by the column that it would get next.

    A state dict restores into a fresh net: columns that it holds and the net lacks are added first.

    Args:
        new_net: makes nets of a chain trunk and a multi-head, always the same one.
        seed: of later columns and all that is lateral.
        lateral: how columns see the earlier ones.
        width: units of each layer of later columns, as a share of the first one's; rounded, at least one.
        scale: the adapters' scalars are drawn from (0, scale).

    Raises:
        TypeError: the net is no chain with a head per task.
        ValueError: a chain whose layers do not fit each other's units, or that `width` cannot be applied to.
    """

    def __init__(
        self,
        new_net: Callable[[], HeadedNet],
        seed: int,
        lateral: Lateral = "adapter",
        width: float = 1.0,
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.new_net = new_net
        self.seed = seed
        self.lateral: Lateral = lateral
        self.width = width
        self.scale = scale
        self.columns = nn.ModuleList()
        self._newborn: list[Column] = []
        """What answers for a task not seen yet; in a list, as it is no part of the net."""
        self.columns.append(self._born())

    def __iter__(self) -> Iterator[Column]:
        """Yield the columns in the order of their birth."""
        return (cast(Column, column) for column in self.columns)

    def forward(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Return each sample's logits from its own task's column.

        Args:
            x: images (B, channels, height, width).
            task: one task for all samples, or one per sample, (B,) integers.

        Returns:
            (B, C), C the outputs of the widest head asked; classes a sample's task does not have are `ABSENT_LOGIT`.

        Raises:
            ValueError: no task, or a tensor of tasks that does not fit the batch.
            RuntimeError: an unseen task whose number of outputs nothing tells.
        """
        if task is None:
            raise ValueError("a progressive net answers for a task: give one number, or one per sample")
        return by_task(self._answer, x, task)

    def observe(self, task: int, classes: Sequence[int]) -> None:
        """Turn to a task before training on it: its column, or the last one to be born, learns; all else is frozen.

        A task seen again has its column already. If that is the newest, it learns on. If later columns rest on it, only
        its output layer does, which no other column reads; without lateral connections nothing rests on it.

        Raises:
            ValueError: negative classes, or none; nothing has changed then.
        """
        self.forget_newborn()
        column = self.column_of(task)
        if column is None:
            column = self._next()
            column.observe(task, classes)
            if column not in self.columns:
                self.columns.append(column)
        else:
            column.observe(task, classes)
        newest = column is self.columns[-1]
        for other in self:
            _learning(other.body(), other is column and (newest or self.lateral == "none"))
            _learning(other.output(), other is column)
        self.train(self.training)

    def column_of(self, task: int) -> Column | None:
        """Return a task's column; None for a task not seen yet."""
        return next((column for column in self if str(task) in column.head.heads), None)

    def task_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Return the parameters that one task alone uses, by task.

        They are every column's output layer and, of the newest column, all the rest too: no other task reads it yet.
        Earlier columns serve their own task and every later one. Without lateral connections all columns are private.
        """
        private = {column for column in self if self.lateral == "none" or column is self.columns[-1]}
        return {
            int(task): list(column.parameters()) if column in private else column.output()
            for column in self
            for task in column.head.heads
        }

    def train(self, mode: bool = True) -> ProgressiveNet:
        """Set the mode of the column that learns; frozen ones stay in evaluation mode."""
        super().train(mode)
        for column in self:
            if not any(parameter.requires_grad for parameter in column.body()):
                column.eval()
        return self

    def forget_newborn(self) -> None:
        """Throw away the column that answered for tasks not seen yet."""
        self._newborn.clear()

    # ---------------------------------------------------------------------------------------------------------- answer

    def _answer(self, x: Tensor, task: int) -> Tensor:
        column = self.column_of(task)
        if column is None:
            if not self._newborn:
                self._newborn.append(self._next().train(self.training))
            column = self._newborn[0]
        before: list[Column] = []
        if self.lateral != "none":
            for other in self:
                if other is column:
                    break
                before.append(other)
        with torch.no_grad():
            hidden = [other.trunk.prepare(x) for other in before]
        own = column.trunk.prepare(x)
        for i in range(len(column.units)):
            # All earlier columns see the input; from the second layer on, each sees those before it: a prefix.
            earlier = _side_by_side(hidden) if i > 0 else None
            with torch.no_grad():
                hidden = [
                    other.step(i, x_j, prefix)
                    for other, x_j, prefix in zip(before, hidden, _prefixes(earlier, hidden), strict=True)
                ]
            own = column.step(i, own, earlier)
        return column.logits(own, _side_by_side(hidden), task)

    # ----------------------------------------------------------------------------------------------------------- birth

    def _next(self) -> Column:
        """Return the column of the next new task: the first, while it has none, or one that is not added yet."""
        first = next(iter(self))
        return self._born() if len(first.head.heads) else first

    def _born(self) -> Column:
        """Return the column that comes after those there are."""
        number = len(self.columns)
        net = self.new_net()
        trunk, head = net.trunk, net.head
        if not isinstance(trunk, ChainTrunk) or not isinstance(head, MultiHead):
            wrong = trunk if isinstance(head, MultiHead) else head
            raise TypeError(f"columns are chains of layers with a head per task, {type(wrong).__name__} is none")
        _check_chain(trunk, self.width)
        generator = torch.Generator().manual_seed(_column_seed(self.seed, number))
        if number > 0:
            _redraw(trunk, self.width, generator)
        head = MultiHead(trunk.out_features, head.init_seed, head.bias, head.expected)
        column = Column(trunk, head, [other.units for other in self], self.lateral, self.scale, generator)
        like = next(net.parameters() if number == 0 else self.parameters())
        return column.to(device=like.device, dtype=like.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        mine = f"{prefix}columns."
        numbers = {int(key.removeprefix(mine).split(".")[0]) for key in state_dict if key.startswith(mine)}
        while len(self.columns) <= max(numbers, default=0):
            self.columns.append(self._born())
        self.forget_newborn()
        super()._load_from_state_dict(state_dict, prefix, *args)


# --------------------------------------------------------------------------------------------------------------- parts


def _units(layer: Layer) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _fan_in(layer: Layer) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _check_chain(trunk: ChainTrunk, width: float) -> None:
    """Refuse chains whose layers do not take the units of the layer before, and parts that cannot be made narrower."""
    sizes = [*(_fan_in(trunk.layer(i)) for i in range(1, len(trunk.chain))), trunk.out_features]
    for i, fan_in in enumerate(sizes):
        units = _units(trunk.layer(i))
        follows_conv = i + 1 < len(trunk.chain) and isinstance(trunk.layer(i + 1), nn.Conv2d)
        if fan_in % units or (follows_conv and fan_in != units):
            raise ValueError(f"{trunk.chain[i]} has {units} units, what follows it takes {fan_in} inputs")
    layers = [trunk.layer(i) for i in range(len(trunk.chain))]
    own = {id(tensor) for layer in layers for tensor in layer.parameters()}
    fixed = [name for name, tensor in chain(trunk.named_parameters(), trunk.named_buffers()) if id(tensor) not in own]
    fixed += [name for name, layer in zip(trunk.chain, layers, strict=True) if getattr(layer, "groups", 1) != 1]
    if width != 1 and fixed:
        raise ValueError(f"{type(trunk).__name__} cannot have another width, because of {', '.join(fixed)}")


def _like(layer: Layer, fan_in: int, *, units: int, generator: torch.Generator, bias: bool = False) -> Layer:
    """Return a layer of the shape of another with other inputs and units, drawn afresh; a convolution is dense."""
    # On "meta", because a layer's own initialisation would draw from the global generator.
    new: Layer
    if isinstance(layer, nn.Linear):
        new = nn.Linear(fan_in, units, bias=bias, device="meta")
    else:
        new = nn.Conv2d(
            fan_in, units, cast(tuple[int, int], layer.kernel_size), cast(tuple[int, int], layer.stride),
            cast("str | tuple[int, int]", layer.padding), cast(tuple[int, int], layer.dilation), bias=bias,
            padding_mode=layer.padding_mode, device="meta",
        )  # fmt: skip
    new.to_empty(device="cpu")
    _draw(new, generator)
    return new


def _redraw(trunk: ChainTrunk, width: float, generator: torch.Generator) -> None:
    """Give a trunk's layers new weights and `width` times their units."""
    layers = [trunk.layer(i) for i in range(len(trunk.chain))]
    if width == 1:
        for layer in layers:
            _draw(layer, generator)
        return
    fan_in = _fan_in(layers[0])
    sizes = [*(_fan_in(layer) for layer in layers[1:]), trunk.out_features]
    for name, layer, size in zip(trunk.chain, layers, sizes, strict=True):
        units = max(1, round(width * _units(layer)))
        parent, _, leaf = name.rpartition(".")
        new = _like(layer, fan_in, units=units, generator=generator, bias=layer.bias is not None)
        setattr(trunk.get_submodule(parent), leaf, new)
        fan_in = units * (size // _units(layer))
    trunk.out_features = fan_in


@torch.no_grad()
def _draw(layer: Layer, generator: torch.Generator) -> None:
    """Draw weights and bias as PyTorch's layers do: uniform within 1 / sqrt(fan-in)."""
    bound = layer.weight[0].numel() ** -0.5
    for parameter in layer.parameters():
        parameter.uniform_(-bound, bound, generator=generator)


def _column_seed(seed: int, number: int) -> int:
    """Return a seed per column; hashed, because neighbouring seeds of one generator may be correlated."""
    return int.from_bytes(hashlib.sha256(f"column/{seed}/{number}".encode()).digest()[:8], "big") >> 1


def _learning(parameters: Iterable[nn.Parameter], learns: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(learns)
        if not learns:
            parameter.grad = None


def _side_by_side(hidden: Sequence[Tensor]) -> Tensor | None:
    if len(hidden) < 2:
        return hidden[0] if hidden else None
    return torch.cat(list(hidden), dim=1)


def _prefixes(joined: Tensor | None, parts: Sequence[Tensor]) -> Iterator[Tensor | None]:
    """Yield, for each part, all parts before it side by side, not copied; None for the first, or without `joined`."""
    end = 0
    for part in parts:
        yield joined[:, :end] if joined is not None and end else None
        end += part.shape[1]
