"""One layer used several times: its weight is stored once, and its gradient is the sum over its applications.

Two ways. `Repeat` (and `RepeatedTrunk`, a whole net) applies one layer again: the state dict has it under one name.
`tie` gives layers in several places of a net the same parameters: PyTorch's own convention holds, one parameter, and
one entry a place in the state dict, all of them the same memory; so a tied net's state loads into the net without ties
as well. Every place has a module of its own, as by `a.weight = b.weight`: one *module* in two places would not survive
`torch.func.functional_call`, which swaps its tensors twice and puts back what it found the second time.

Letters: B batch, L layers of a chain.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets.shared.linked import Borrower, LinkedConv2d, LinkedLinear
from clbench.nets.trunk import ChainTrunk

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, LinkedConv2d)


class Repeat(nn.Module):
    """A layer applied several times, as `apply_again` does.

    Args:
        layer: takes what it yields; kept as `layer`.
        times: applications, at least 1.
        between: after every application but the last; None for nothing.

    Raises:
        ValueError: no application, or a linear layer or a convolution that cannot take what it yields.
    """

    def __init__(self, layer: nn.Module, times: int, between: Callable[[Tensor], Tensor] | None = F.relu) -> None:
        super().__init__()
        if times < 1:
            raise ValueError(f"a layer is applied at least once, got {times} times")
        if times > 1 and (reason := why_not(layer)):
            raise ValueError(f"the layer cannot be applied to what it yields: {reason}")
        self.layer = layer
        self.times = times
        self.between = between

    def extra_repr(self) -> str:
        """Return how often, for `print(net)`."""
        return f"times={self.times}"

    def forward(self, x: Tensor) -> Tensor:
        """Return what the last application yields."""
        return apply_again(self.layer, self.times, self.between, x)


def apply_again(layer: nn.Module, times: int, between: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    """Return a layer's output after `times` applications, with `between` after all but the last.

    A convolution, linked ones too, pads in all but its last application so that maps keep their size, whatever its own
    padding: the result has the shape that one application yields. The layer itself is called every time, so that hooks
    run, a subclass computes what it computes, and a weight that is computed before each pass is the current one.
    """
    for _ in range(times - 1):
        x = _same_size(layer, x) if isinstance(layer, _CONVOLUTIONS) else layer(x)
        x = x if between is None else between(x)
    return cast(Tensor, layer(x))


def why_not(layer: nn.Module) -> str:
    """Return why a layer cannot take what it yields, "" if it can or nothing is known of it."""
    if isinstance(layer, nn.Linear | LinkedLinear) and layer.in_features != layer.out_features:
        return f"it maps {layer.in_features} features to {layer.out_features}"
    if isinstance(layer, _CONVOLUTIONS):
        if layer.in_channels != layer.out_channels:
            return f"it maps {layer.in_channels} channels to {layer.out_channels}"
        if set(layer.stride) != {1} or any(size % 2 == 0 for size in layer.kernel_size):
            return f"stride {layer.stride} and kernel {layer.kernel_size} do not keep the size of a map"
        if (mode := getattr(layer, "padding_mode", "zeros")) != "zeros":
            return f"its padding_mode is {mode}"
    return ""


def tie(root: nn.Module, name: str, *others: str) -> None:
    """Let the layers in the places `others` have the parameters of the layer called `name`.

    Each place gets a copy of that layer whose parameters are the same objects; buffers, such as running statistics, are
    each place's own from then on, as its inputs are. Either all places are tied or, after an error, none.

    Args:
        root: the net.
        name: of the layer that stays, as in `root.named_modules()`.
        others: of those that are replaced.

    Raises:
        ValueError: no such name, layers whose settings or whose tensors' shapes, types or training differ, both named,
            or a place whose layer is the source of a link elsewhere: the link would go on with the layer removed.
    """
    layers = dict(root.named_modules(remove_duplicate=False))
    for wanted in (name, *others):
        if wanted not in layers:
            raise ValueError(f"no layer '{wanted}' in the {type(root).__name__}")
    layer = layers[name]
    others = tuple(other for other in others if other != name)
    for other in others:
        if (here := _kind(layer)) != (there := _kind(layers[other])):
            raise ValueError(f"'{name}' and '{other}' cannot be one layer: {here} and {there}")
        removed = set(layers[other].modules()) - set(layer.modules())
        for place, module in layers.items():
            if isinstance(module, Borrower) and module.source in removed and module not in removed:
                raise ValueError(f"'{other}' is the source of the link '{place}': tie first, then link to '{name}'")
    for other in others:
        parent, _, last = other.rpartition(".")
        kept: list[object] = [*layer.parameters()]
        kept += [module.source for module in layer.modules() if isinstance(module, Borrower)]
        inside = set(layer.modules())
        memo = {id(item): item for item in kept if item not in inside}
        setattr(root.get_submodule(parent), last, copy.deepcopy(layer, memo))


class RepeatedTrunk(nn.Module):
    """A chain some of whose layers are applied several times, with ReLU between.

    Computes what a chain with `repeated` * (`times` - 1) layers more does whose layers are tied, and has the parameters
    of the chain that it is given. A layer can be repeated if it takes what it yields: a linear layer with as many
    outputs as inputs, a convolution with as many channels, stride 1 and odd kernels (`apply_again` tells how it pads).
    Pools, and dropout, follow the last application only.

    Args:
        trunk: the chain; kept as `trunk`.
        repeated: how many layers: the last ones that can be repeated; from 0 to L.
        times: applications of each.

    Raises:
        ValueError: more layers than can be repeated, a negative number, or no application.
        TypeError: the trunk is no chain.
    """

    def __init__(self, trunk: nn.Module, repeated: int, times: int = 2) -> None:
        super().__init__()
        if not isinstance(trunk, ChainTrunk):
            raise TypeError(f"{type(trunk).__name__} is no chain of layers")
        if times < 1 or repeated < 0:
            raise ValueError(f"{repeated} layers cannot be applied {times} times")
        fit = [i for i in range(len(trunk.chain)) if not why_not(trunk.layer(i))]
        if repeated > len(fit):
            why = [f"{name}: {text}" for i, name in enumerate(trunk.chain) if (text := why_not(trunk.layer(i)))]
            told = "; ".join([", ".join(trunk.chain[i] for i in fit) or "none", *why])
            raise ValueError(f"{repeated} layers are to be repeated, {len(fit)} of {len(trunk.chain)} can be ({told})")
        self.trunk = trunk
        self.out_features = trunk.out_features
        self.times = {i: times if i in fit[len(fit) - repeated :] else 1 for i in range(len(trunk.chain))}
        """Layer's number in the chain -> applications."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the features, (B, C, H, W) -> (B, out_features)."""
        layers = [partial(apply_again, self.trunk.layer(i), times, F.relu) for i, times in self.times.items()]
        return self.trunk.run(x, layers)

    def applications(self) -> dict[str, int]:
        """Return how often each layer of the chain is applied."""
        return {self.trunk.chain[i]: times for i, times in self.times.items()}


def _same_size(conv: nn.Module, x: Tensor) -> Tensor:
    """Return a convolution of stride 1 and odd kernels with zeros around the map, so that it keeps its size."""
    assert isinstance(conv, _CONVOLUTIONS)
    if conv.padding == "same":
        return cast(Tensor, conv(x))
    given = (0,) * len(conv.kernel_size) if isinstance(conv.padding, str) else conv.padding
    wanted = [step * (size - 1) // 2 for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    missing = [want - have for want, have in zip(wanted, given, strict=True)]
    sides = [side for rim in reversed(missing) for side in (rim, rim)]
    before, after = [max(side, 0) for side in sides], [min(side, 0) for side in sides]
    y = cast(Tensor, conv(F.pad(x, before) if any(before) else x))
    return F.pad(y, after) if any(after) else y  # what its own padding adds beyond that lies at the rim of the result


def _kind(layer: nn.Module) -> str:
    """Return what must agree for one layer to stand for another."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return f"{layer!r} of {', '.join(f'{name} {_described(value)}' for name, value in tensors) or 'no tensors'}"


def _described(tensor: Tensor) -> str:
    frozen = " frozen" if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else ""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} {tensor.device}{frozen}"
