"""A net that grows from task to task and remembers which units a task knows: timestamps, sub-networks, expansion.

The chain of a trunk, its layers made growable, with a head per task. Units are only ever appended, so the units that
were there when a task was learned are the first ones of every layer: a task's timestamp is a width per layer, and its
answer is computed from that corner of every weight, whatever later tasks added (Yoon et al. 2018, section 3.3).

Letters: B batch, C classes, L layers of the chain; N_i units of layer i (features of a Linear, channels of a Conv2d).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets.growable import Coupling, GrowConv2d, GrowLinear, append_to_parameter_, split
from clbench.nets.heads import GrowingLinear, HeadedNet, MultiHead, birth_seed, by_task
from clbench.nets.trunk import ChainTrunk


class ExpandableNet(nn.Module):
    """A chain of growing layers under timestamps, and a head per task.

    Between `observe` and `close_stage` a task is in training: it sees every unit there is. From then on it keeps to
    those.

    Args:
        net: a freshly built net of a `ChainTrunk` and a `MultiHead`; its layers are taken over.

    Raises:
        ValueError: the trunk is no chain, has more parameters or buffers than its chain, or its units change each other
            between layers; the head is not one per task.
    """

    def __init__(self, net: HeadedNet) -> None:
        super().__init__()
        trunk, head = net.trunk, net.head
        if not isinstance(trunk, ChainTrunk):
            raise ValueError(f"{type(trunk).__name__} is no chain of layers; mlp, zenke and lenet are")
        if trunk.mixes_units:
            raise ValueError(
                f"{type(trunk).__name__} normalises a channel by its neighbours, so none can be cut out: set "
                "response_norm = false"
            )
        within = {f"{name}.{part}" for name in trunk.chain for part in ("weight", "bias")}
        beside = sorted({name for name, _ in [*trunk.named_parameters(), *trunk.named_buffers()]} - within)
        if beside:
            raise ValueError(f"{type(trunk).__name__} has {', '.join(beside)} beside its chain, which units share")
        layers = [trunk.layer(i) for i in range(len(trunk.chain))]
        if len({layer.bias is None for layer in layers}) > 1:
            raise ValueError(f"{type(trunk).__name__} has layers with a bias and layers without: give all of them one")
        if any(isinstance(layer, nn.Conv2d) and layer.groups > 1 for layer in layers):
            raise ValueError(f"{type(trunk).__name__} has a grouped convolution, out of which no unit can be cut")
        if not isinstance(head, MultiHead):
            raise ValueError("units with timestamps need a head per task, that is a task-incremental stream")
        self.trunk = trunk
        for name in trunk.chain:
            layer = trunk.get_submodule(name)
            growing = GrowConv2d.of(layer) if isinstance(layer, nn.Conv2d) else GrowLinear.of(cast(nn.Linear, layer))
            trunk.set_submodule(name, growing)
        self.names = trunk.chain
        self.newborn = head
        """Knows the birth weights and expected outputs of heads; its own heads stay unused."""
        self.heads = nn.ModuleDict()
        self.stages: list[list[int]] = []
        """(stages, L): N_i at the end of every task trained so far."""
        self.stage_of: dict[int, int] = {}
        """Task to stage; a task in training, and one not seen yet, has none and sees every unit."""
        self.features_per_unit = [
            1 if i == 0 else self.layer(i).weight.shape[1] // self.layer(i - 1).weight.shape[0]
            for i in range(len(self.names))
        ]
        """Inputs of layer i that one unit of layer i - 1 makes: 1, but for maps that were flattened."""

    # ------------------------------------------------------------------------------------------------------------ shape

    def layer(self, i: int) -> GrowLinear | GrowConv2d:
        """Return layer i of the chain."""
        return cast("GrowLinear | GrowConv2d", self.trunk.get_submodule(self.names[i]))

    def layers(self) -> list[GrowLinear | GrowConv2d]:
        """Return the layers of the chain, in order."""
        return [self.layer(i) for i in range(len(self.names))]

    def head(self, task: int) -> GrowLinear:
        """Return the head of a task that was observed."""
        return cast(GrowLinear, self.heads[str(task)])

    def widths(self) -> list[int]:
        """Return N_i of every layer, units of an open expansion included."""
        return [_units(layer) for layer in self.layers()]

    def seen_by(self, task: int) -> list[int]:
        """Return N_i of every layer as a task sees it: its timestamp."""
        stage = self.stage_of.get(task)
        return self.widths() if stage is None else self.stages[stage]

    def inputs(self, i: int, units: Tensor) -> Tensor:
        """Return the numbers of the inputs of layer i that the units of layer i - 1 with these numbers make."""
        each = self.features_per_unit[i]
        return (units[:, None] * each + torch.arange(each, device=units.device)).flatten()

    # ---------------------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        """Return the logits (B, C) of images (B, C, H, W) for one task, or for one task per sample, (B,).

        Raises:
            ValueError: a tensor of tasks that does not fit the batch.
        """
        return by_task(self._answer, x, task)

    def features(self, x: Tensor, widths: Sequence[int] | None = None) -> Tensor:
        """Return the last layer's units, (B, N_L), of the net cut to its first `widths` units; None for all."""
        if widths is None or list(widths) == self.widths():
            return cast(Tensor, self.trunk(x))
        maps: list[Callable[[Tensor], Tensor]] = []
        for i, layer in enumerate(self.layers()):
            weight = layer.weight[: widths[i]]
            if i > 0:
                weight = weight[:, : widths[i - 1] * self.features_per_unit[i]]
            bias = None if layer.bias is None else layer.bias[: widths[i]]
            # A copy, so that a task's weights lie in memory as they did, and its answers stay the same to the bit.
            maps.append(_map(layer, weight.contiguous(), bias))
        return self.trunk.run(x, maps)

    def _answer(self, x: Tensor, task: int) -> Tensor:
        features = self.features(x, self.seen_by(task))
        if str(task) in self.heads:
            logits: Tensor = self.head(task)(features)
            return logits
        return self._birth(task, features.shape[1]).as_born(features, self.newborn.expected_outputs(task))

    # ------------------------------------------------------------------------------------------------------------ tasks

    def observe(self, task: int, classes: Sequence[int]) -> None:
        """Take a task up: it sees every unit from now on, and has outputs for all of `classes`.

        Raises:
            ValueError: negative classes, or none.
        """
        if not len(classes) or min(classes) < 0:
            raise ValueError(f"task {task} has classes {list(classes)}: labels count from 0, and there is one at least")
        outputs, inputs = max(classes) + 1, self.widths()[-1]
        self.stage_of.pop(task, None)
        if str(task) not in self.heads:
            self.heads[str(task)] = GrowLinear.of(self._born(task, inputs, outputs))
            return
        head = self.head(task)
        # The head ignores later units until it is trained again; older hidden units may listen to them at once.
        with torch.no_grad():
            append_to_parameter_(head.weight, 1, inputs - head.in_features)
            head.in_features = inputs
            if outputs > head.out_features:
                block = self._born(task, inputs, outputs)
                append_to_parameter_(head.weight, 0, block.weight[head.out_features :].detach())
                if head.bias is not None:
                    append_to_parameter_(head.bias, 0, block.bias[head.out_features :].detach())
                head.out_features = outputs

    def close_stage(self, task: int) -> None:
        """Stamp a task: from now on it sees the units there are now, and no later ones."""
        self.stages.append(self.widths())
        self.stage_of[task] = len(self.stages) - 1

    def task_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Return the parameters of each task's head."""
        return {int(task): list(head.parameters()) for task, head in self.heads.items()}

    def births(self, i: int) -> Tensor:
        """Return the stage during which each unit of layer i was born, (N_i,): 0 for the first task's."""
        ends = torch.tensor([stages[i] for stages in self.stages], dtype=torch.long)
        return torch.searchsorted(ends, torch.arange(self.widths()[i]), right=True)

    def _birth(self, task: int, inputs: int) -> GrowingLinear:
        """Return the head a task would be born with on this many features, still without outputs."""
        like = self.layer(0).weight
        head = GrowingLinear(inputs, birth_seed(self.newborn.init_seed, task), self.newborn.bias)
        return head.to(device=like.device, dtype=like.dtype)

    def _born(self, task: int, inputs: int, outputs: int) -> nn.Linear:
        """Return the head a task is born with."""
        head = self._birth(task, inputs)
        head.grow(outputs)
        return cast(nn.Linear, head.blocks[0])

    # --------------------------------------------------------------------------------------------------- sub-networks

    def edges(self, i: int) -> Tensor:
        """Return which units of layer i - 1 each unit of layer i listens to: (N_i, N_(i-1)) bool, weights not zero."""
        weight = self.layer(i).weight.detach()
        n_in = weight.shape[1] // self.features_per_unit[i]
        return (weight != 0).view(weight.shape[0], n_in, -1).any(dim=2)

    def reached(self, task: int, outputs: Sequence[int] | None = None) -> list[Tensor]:
        """Return, per layer, which units the task's answer depends on: breadth first from its outputs down.

        Args:
            task: has a head.
            outputs: where the search begins; None for all of the task's.

        Returns:
            One bool mask (N_i,) a layer, over the units that the task sees.
        """
        head, seen = self.head(task).weight.detach(), self.seen_by(task)
        roots = head if outputs is None else head[list(outputs)]
        masks = [(roots != 0).any(dim=0)]
        for i in range(len(self.names) - 1, 0, -1):
            edges = self.edges(i)[: seen[i], : seen[i - 1]]
            masks.insert(0, edges[masks[0]].any(dim=0))
        return masks

    def cut(self, task: int, masks: Sequence[Tensor], outputs: Sequence[int] | None = None) -> SubNet:
        """Return the sub-network of the given units as a net of its own, with copies of their weights."""
        return SubNet(self, task, masks, outputs)

    # -------------------------------------------------------------------------------------------------------- expansion

    def open_expansion(self, task: int, units: Sequence[int], generator: torch.Generator) -> list[nn.Parameter]:
        """Add units to every layer; what is old is frozen until `close_expansion`, only what is new can be trained.

        Weights into new units are drawn as PyTorch does, uniform within 1 / sqrt(fan-in); weights out of them are zero,
        so that the net's answers do not change.

        Args:
            task: in training; its head listens to the new units.
            units: how many, per layer.
            generator: draws the new weights; on the CPU.

        Returns:
            The new parameters.
        """
        added: list[nn.Parameter] = []
        for i, layer in enumerate(self.layers()):
            new_in = 0 if i == 0 else units[i - 1] * self.features_per_unit[i]
            shape = (units[i], layer.weight.shape[1] + new_in, *layer.weight.shape[2:])
            bound = prod(shape[1:]) ** -0.5
            rows = torch.empty(shape).uniform_(-bound, bound, generator=generator).to(layer.weight)
            bias = torch.empty(units[i]).uniform_(-bound, bound, generator=generator).to(layer.weight)
            biased = layer.bias is not None and units[i] > 0
            added += layer.open_delta(
                units[i], new_in, rows=rows if units[i] else None, bias=bias if biased else None
            )
        return added + self.head(task).open_delta(0, units[-1])

    def useless_units(self) -> list[Tensor]:
        """Return, per layer, which units of the open expansion listen to nothing: all weights into them are zero."""
        rows = [layer.weight[:0] if layer.delta_rows is None else layer.delta_rows for layer in self.layers()]
        return [(weight.detach() == 0).flatten(1).all(dim=1) for weight in rows]

    def close_expansion(self, task: int, keep: Sequence[Tensor]) -> None:
        """Make the kept units (bool mask over the new ones, per layer) part of the net and drop the others."""
        nothing = torch.zeros(0, dtype=torch.long, device=self.layer(0).weight.device)
        for i, layer in enumerate(self.layers()):
            before = nothing if i == 0 else self.inputs(i, keep[i - 1].nonzero().squeeze(1))
            layer.prune_delta(keep[i].nonzero().squeeze(1), before)
            layer.fold()
        head = self.head(task)
        head.prune_delta(nothing, keep[-1].nonzero().squeeze(1))
        head.fold()

    def duplicate(self, task: int, units: Sequence[Tensor]) -> None:
        """Append a copy of each of the given units (bool mask, per layer), with the weights into it and out of it.

        Only the head of `task`, which is in training, listens to the copies.
        """
        for i, chosen in enumerate(units):
            listener = self.head(task) if i + 1 == len(units) else self.layer(i + 1)
            if bool(chosen.any()):
                pair = Coupling(producers=(self.layer(i),), consumers=(listener,))
                split(pair, chosen.nonzero().squeeze(1), outgoing="copy")

    # ------------------------------------------------------------------------------------------------------------ state

    def get_extra_state(self) -> dict[str, Any]:
        """Return the timestamps, for the state dict."""
        return {"stages": [list(widths) for widths in self.stages], "stage_of": dict(self.stage_of)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up the timestamps."""
        self.stages = [list(widths) for widths in state["stages"]]
        self.stage_of = dict(state["stage_of"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in state_dict:  # in the order of birth, which is the order of parameters an optimiser relies on
            if key.startswith(f"{prefix}heads.") and key.endswith(".weight"):
                task = key.removeprefix(f"{prefix}heads.").split(".")[0]
                if task not in self.heads:
                    outputs, inputs = state_dict[key].shape
                    self.heads[task] = GrowLinear.of(self._born(int(task), inputs, outputs))
        super()._load_from_state_dict(state_dict, prefix, *args)


class SubNet(nn.Module):
    """Some units of an `ExpandableNet` as a dense net of their own; `put_back` writes what it learned into the whole.

    Where no other unit has a weight into one of these, as after `reached`, its answers are those of the whole net.

    Args:
        net: the whole net.
        task: whose head it answers through.
        masks: per layer, which units; bool (N_i,).
        outputs: outputs of the head that have weights here, at most all of them; None for all. With one, every logit is
            that output's score plus the logit's own bias.
    """

    def __init__(self, net: ExpandableNet, task: int, masks: Sequence[Tensor], outputs: Sequence[int] | None) -> None:
        super().__init__()
        # In a list, so that the whole net's parameters are not this one's.
        self._whole = [net]
        self._task = task
        units = [mask.nonzero().squeeze(1) for mask in masks]
        self._rows = units
        self._columns: list[Tensor | slice] = [slice(None)]
        self._columns += [net.inputs(i, units[i - 1]) for i in range(1, len(units))]
        self._outputs = None if outputs is None else list(outputs)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        with torch.no_grad():
            for i, layer in enumerate(net.layers()):
                self.weights.append(layer.weight[units[i]][:, self._columns[i]].clone())
                if layer.bias is not None:
                    self.biases.append(layer.bias[units[i]].clone())
            head = net.head(task)
            self._n_outputs = head.out_features
            self.head_weight = nn.Parameter(self._head_rows(head.weight)[:, units[-1]].clone())
            self.head_bias = None if head.bias is None else nn.Parameter(head.bias.clone())

    def forward(self, x: Tensor, task: int | Tensor) -> Tensor:
        """Return the logits (B, C) of the task it was cut for."""
        layers, trunk = self._whole[0].layers(), self._whole[0].trunk
        biases: Sequence[Tensor | None] = list(self.biases) or [None] * len(layers)
        # A convolution has one channel at least: where no unit was taken, one that is always 0 stands in.
        empty = [int(not len(rows)) for rows in self._rows]
        maps, before = [], 0
        for i, (layer, weight, bias) in enumerate(zip(layers, self.weights, biases, strict=True)):
            if before or empty[i]:
                around = [0, 0] * (weight.ndim - 2) + [0, before * self._whole[0].features_per_unit[i], 0, empty[i]]
                weight, bias = F.pad(weight, around), None if bias is None else F.pad(bias, (0, empty[i]))
            maps.append(_map(layer, weight, bias))
            before = empty[i]
        head = F.pad(self.head_weight, (0, before)) if before else self.head_weight
        logits = F.linear(trunk.run(x, maps), head)
        return logits.expand(-1, self._n_outputs) if self.head_bias is None else logits + self.head_bias

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the weights into the whole net, where they came from."""
        net = self._whole[0]
        for i, layer in enumerate(net.layers()):
            rows, columns = self._rows[i], self._columns[i]
            if isinstance(columns, Tensor):
                layer.weight[rows[:, None], columns] = self.weights[i]
            else:
                layer.weight[rows] = self.weights[i]
            if layer.bias is not None:
                layer.bias[rows] = self.biases[i]
        head = net.head(self._task)
        for row, output in enumerate(self._outputs or range(len(head.weight))):
            head.weight[output, self._rows[-1]] = self.head_weight[row]
        if self.head_bias is not None and head.bias is not None:
            head.bias.copy_(self.head_bias)

    def _head_rows(self, weight: Tensor) -> Tensor:
        return weight if self._outputs is None else weight[self._outputs]


def _units(layer: nn.Linear | nn.Conv2d) -> int:
    return layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features


def _map(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return what the layer does, with other weights."""
    if isinstance(layer, nn.Linear):
        return partial(F.linear, weight=weight, bias=bias)
    # The layer's own forward pass, which knows its stride, padding, padding mode and dilation.
    return partial(layer._conv_forward, weight=weight, bias=bias)
