"""Nets whose units are gated by task: every hidden unit's output times a number that the task has for it.

Layer i of a chain puts out, for task t,

    h_i = between_i(a_i^t (*) (W_i h_{i-1} + b_i)),    a_i^t (units,), no number below 0           (1)

The gate acts before what lies between layers, where papers write it after. ReLU and max pool give a non-negative factor
of a channel through, and dropout acts on elements, so the two are the same function. With response normalisation
(`mixes_units`) they are not, and only before is right: a closed unit then adds nothing to what its neighbours are
divided by, so that whatever happens to its weights changes no answer. Gates of convolutions are multiplied into the
weights, which are fewer than the pixels of their maps.

A weight from unit j to unit i is used by a task as far as both are: min(a_i, a_j); the inputs of the first layer count
as open. Letters: B batch, C classes, U hidden units of all layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets.heads import HeadedNet
from clbench.nets.shared.masks import pack_bits, unpack_bits
from clbench.nets.shared.tasknet import TaskNet
from clbench.nets.trunk import ChainTrunk, bare_chain

SHUT = 1e-33
"""Sigmoids up to here are gates of 0. Products with smaller ones are subnormal, and a CPU takes many times as long for
such numbers: a convolutional net's step took 2.5 to 3.2 of fine-tuning's, and without them takes 1.2 to 1.3."""


class GatedNet(TaskNet):
    """Base of the gated nets. A subclass defines `new_part` and `gates`.

    Args:
        net: gives trunk and head; its trunk is a `ChainTrunk` without parameters beside those of its chain.
        seed: of the parts' birth.
        gate_bias: whether a closed unit's bias is closed too. Without, it puts out its bias whatever the gate:
            h_i = between_i(a_i (*) W_i h_{i-1} + b_i).

    Raises:
        ValueError: another trunk, or one with further parameters: no gate would reach them.
    """

    trunk: ChainTrunk

    def __init__(self, net: HeadedNet, seed: int, gate_bias: bool = True) -> None:
        trunk = bare_chain(net.trunk)
        layers = [trunk.layer(i) for i in range(len(trunk.chain))]
        super().__init__(net, seed)
        self.gate_bias = gate_bias
        self.units = [len(layer.weight) for layer in layers]
        """Units of every layer; together U."""

    def gates(self, part: nn.Module) -> Tensor:
        """Return the gates of the task that has `part`, (U,), those of the first layer first."""
        raise NotImplementedError

    def answer(self, x: Tensor, task: int) -> Tensor:
        """Return the logits of samples that are all of one task."""
        gates = torch.split(self.gates(self.part(task)), self.units)
        layers = [self._gated(self.trunk.layer(i), gate) for i, gate in enumerate(gates)]
        logits: Tensor = self.head(self.trunk.run(x, layers), task)
        return logits

    def _gated(self, layer: nn.Linear | nn.Conv2d, gate: Tensor) -> Callable[[Tensor], Tensor]:
        bias = layer.bias
        if isinstance(layer, nn.Conv2d):
            weight = layer.weight * gate.view(-1, 1, 1, 1)
            scaled = bias if bias is None or not self.gate_bias else bias * gate
            return lambda x: layer._conv_forward(x, weight, scaled)
        if self.gate_bias or bias is None:
            return lambda x: layer(x) * gate
        return lambda x: F.linear(x, layer.weight) * gate + bias

    def over_weights(self, units: Tensor) -> dict[str, Tensor]:
        """Return for every parameter of the chain how far it is used where units are used as far as `units` says.

        Args:
            units: (U,), between 0 and 1.

        Returns:
            name within the trunk -> min over the unit a weight comes from and the one it goes to, in the weight's
            shape; for a bias, of its unit alone. Without `gate_bias` every bias is used, and every unit that has one
            is a source.
        """
        found: dict[str, Tensor] = {}
        before: Tensor | None = None
        for i, used in enumerate(torch.split(units, self.units)):
            layer, name = self.trunk.layer(i), self.trunk.chain[i]
            weight = layer.weight
            over = used.view(-1, *(1 for _ in weight.shape[1:]))
            if before is not None:
                # A channel's map is a row of features by the time a linear layer sees it.
                inputs = before.repeat_interleave(weight.shape[1] // len(before))
                over = torch.minimum(over, inputs.view(1, -1, *(1 for _ in weight.shape[2:])))
            found[f"{name}.weight"] = over.expand_as(weight)
            if layer.bias is not None:
                used = used if self.gate_bias else torch.ones_like(used)
                found[f"{name}.bias"] = used
            before = used
        return found


class RandomGates(GatedNet):
    """Every task keeps a random part of the units open, drawn at its birth and kept as bits (XdG, Masse et al. 2018).

    Args:
        net: see `GatedNet`.
        seed: with the task's label, all that the gates depend on.
        gated: share of each layer's units that is closed, X, rounded down to whole units.
        gate_bias: see `GatedNet`.
        convolutions: whether channels are gated too; otherwise they are all open.

    Raises:
        ValueError: see `GatedNet`; a share that leaves no unit open.
    """

    def __init__(
        self, net: HeadedNet, seed: int, gated: float, gate_bias: bool = True, convolutions: bool = True
    ) -> None:
        super().__init__(net, seed, gate_bias)
        if not 0 <= gated < 1:
            raise ValueError(f"gated is the share of units closed, from 0 to below 1; got {gated}")
        self.gated = gated
        self.convolutions = convolutions

    def new_part(self, generator: torch.Generator) -> nn.Module:
        """Draw which units are open, layer by layer; exactly as many in every task."""
        opened = []
        for i, units in enumerate(self.units):
            spared = isinstance(self.trunk.layer(i), nn.Conv2d) and not self.convolutions
            closed = 0 if spared else int(self.gated * units + 1e-9)  # 0.29 * 100 is 28.999...
            order = torch.randperm(units, generator=generator)
            opened.append(torch.ones(units, dtype=torch.bool).index_fill_(0, order[:closed], False))
        part = nn.Module()
        part.register_buffer("bits", pack_bits(torch.cat(opened)))
        return part

    def gates(self, part: nn.Module) -> Tensor:
        """Return 1 for open units, 0 for closed ones."""
        return _unpacked(cast(Tensor, part.bits), self)


class Attention(nn.Module):
    """What a task has for itself in HAT: an embedding (U,) while it is learned, and for hard gates, bits for good."""

    embedding: nn.Parameter | None
    bits: Tensor | None

    def __init__(self, embedding: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)
        self.register_buffer("bits", None)

    def harden(self) -> None:
        """Keep the sign of the embedding alone: the gate is open where sigmoid(s e) > 1/2, whatever s is."""
        if self.embedding is not None:
            self.bits = pack_bits(self.embedding.detach() > 0)
            self.embedding = None


class AttentionNet(GatedNet):
    """Every task learns its gates: a = sigmoid(s e), e an embedding of the task (HAT, Serra et al. 2018).

    Args:
        net: see `GatedNet`.
        seed: of the embeddings, drawn from a standard normal.
        s_max: the s that answers are given with.

    Raises:
        ValueError: see `GatedNet`; an s_max below 1.
    """

    def __init__(self, net: HeadedNet, seed: int, s_max: float) -> None:
        super().__init__(net, seed)
        if s_max < 1:
            raise ValueError(f"s_max is the largest scale of the gates, at least 1; got {s_max}")
        self.s_max = s_max
        self.scale = s_max
        """The s of the step in training; in evaluation mode it is always s_max."""
        self.remembers = False
        """Whether `latest` is kept."""
        self.latest: Tensor | None = None
        """The gates asked last in training, (U,), for a penalty on them. They hold the graph: let go of them."""

    def new_part(self, generator: torch.Generator) -> Attention:
        """Draw the embedding."""
        return Attention(torch.randn(sum(self.units), generator=generator).to(self.trunk.layer(0).weight.dtype))

    def attention(self, task: int) -> Attention:
        """Return the part of a task, or the one it would be born with."""
        return cast(Attention, self.part(task))

    def gates(self, part: nn.Module) -> Tensor:
        """Return sigmoid(s e), or the hard gates."""
        part = cast(Attention, part)
        if part.embedding is None:
            return _unpacked(cast(Tensor, part.bits), self)
        found = _opened(part.embedding, self.scale if self.training else self.s_max)
        if self.training and self.remembers:
            self.latest = found
        return found

    @torch.no_grad()
    def lasting(self, task: int) -> Tensor:
        """Return a task's gates as it is answered with them, (U,): at s_max, or hard."""
        part = self.attention(task)
        if part.embedding is None:
            return _unpacked(cast(Tensor, part.bits), self)
        return _opened(part.embedding, self.s_max)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for key in state_dict:  # in the order of birth
            if key.startswith(f"{prefix}parts."):
                part = cast(Attention, self._ensure(int(key.removeprefix(f"{prefix}parts.").split(".")[0])))
                if key.endswith(".bits"):
                    part.harden()
        super()._load_from_state_dict(state_dict, prefix, *args)


def _opened(embedding: Tensor, scale: float) -> Tensor:
    """Return sigmoid(s e)."""
    return F.threshold(torch.sigmoid(scale * embedding), SHUT, 0.0)


def _unpacked(bits: Tensor, net: GatedNet) -> Tensor:
    """Return bits as gates of a net's dtype, (U,)."""
    return unpack_bits(bits, (sum(net.units),)).to(net.trunk.layer(0).weight.dtype)


def open_units(gates: Sequence[Tensor]) -> Tensor:
    """Return the largest gate of every unit, (U,), from several tasks' gates (U,)."""
    return torch.stack(list(gates)).amax(dim=0)
