"""One trunk that tasks share out: every weight has one owner, and a task answers with what it and older ones own.

Letters: n elements of a weight, T tasks, B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from clbench.nets.heads import HeadedNet
from clbench.nets.shared.masks import pack_bits, unpack_bits
from clbench.nets.shared.tasknet import TaskNet, Tensors, matrices, small

Small = Literal["first", "task"]
"""Whose biases and normalisation a task uses: those that the first task learned, or its own."""


class _Part(nn.Module):
    """What a task has for itself: its number, and the small tensors where they are its own."""

    number: Tensor

    def __init__(self, number: int, own: Tensors | None) -> None:
        super().__init__()
        self.register_buffer("number", torch.tensor(number, dtype=torch.int16))
        self.own = own


class _Planes(Tensors):
    """Bit planes by the name of a matrix, as many as the tasks so far need."""

    def __init__(self, shapes: Mapping[str, Tensor]) -> None:
        empty = {
            name: torch.zeros(0, -(-weight.numel() // 8), dtype=torch.uint8, device=weight.device)
            for name, weight in shapes.items()
        }
        super().__init__(buffers=empty)

    def replace(self, name: str, planes: Tensor) -> None:
        """Put other planes in the place of a matrix's."""
        key = next(key for key, held in self.named_buffers() if held is self[name])
        setattr(self, key, planes)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for key, held in list(self.named_buffers()):
            if (stored := state_dict.get(prefix + key)) is not None:
                setattr(self, key, held.new_zeros(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class PackedNet(TaskNet):
    """A net whose trunk's matrices (every parameter with a fan-in) are shared out among tasks, weight by weight.

    Tasks are numbered 0, 1, ... in the order in which they were observed. A weight is free, or owned by one task. Task
    k answers with the weights that tasks 0 to k own; the others are zero for it. The newest task, and one not observed
    yet, is answered with every weight as it is: free ones are zero unless the newest task is in training.

    Who owns what is stored once for all tasks: 0 for free, k + 1 for task k, in as many bit planes as T tasks need,
    ceil(log2(T + 1)), of ceil(n / 8) bytes each. Masks of one bit a task would be T planes.

    Args:
        net: gives trunk and head.
        seed: of the parts' birth; nothing here is drawn.
        small_of: "first": biases, normalisation and its statistics are those of the trunk, which the first task is to
            learn; from the second on, normalisation runs on stored statistics in training as well. "task": the first
            task has the trunk's, every other one a copy of its own, which begins as the first task's are at its birth.

    Raises:
        ValueError: the trunk has no parameter with a fan-in.
    """

    def __init__(self, net: HeadedNet, seed: int, small_of: Small = "first") -> None:
        super().__init__(net, seed)
        self.small_of = small_of
        shapes = matrices(self.trunk)
        if not shapes:
            raise ValueError(f"{type(net.trunk).__name__} has no weights to share out: no parameter with a fan-in")
        self.planes = _Planes(shapes)
        """Name of a matrix -> who owns its elements, (planes, ceil(n / 8)) uint8: plane i holds bit i."""

    # ------------------------------------------------------------------------------------------------------------ tasks

    def new_part(self, generator: torch.Generator) -> nn.Module:
        """Return the next number, and a copy of the first task's small tensors where tasks have their own."""
        number = len(self.parts)
        return _Part(number, small(self.trunk) if self.small_of == "task" and number else None)

    def number(self, task: int) -> int:
        """Return the number of a task, or the one that it would get."""
        return int(cast(_Part, self.parts[str(task)]).number) if str(task) in self.parts else len(self.parts)

    def is_newest(self, task: int) -> bool:
        """Whether no other task was observed after this one, so that none rests on what it owns."""
        return self.number(task) >= len(self.parts) - 1

    def train(self, mode: bool = True) -> PackedNet:
        """Switch between training and evaluation; buffers that several tasks share stay as they are.

        A module that has any, be it normalisation or a spectral norm's vectors, is in evaluation mode from the second
        task on; those within it are not.
        """
        super().train(mode)
        if self.small_of == "first" and len(self.parts) > 1:
            for module in self.trunk.modules():
                if any(True for _ in module.buffers(recurse=False)):
                    module.training = False
        return self

    # ---------------------------------------------------------------------------------------------------- who owns what

    def owners(self, name: str) -> Tensor:
        """Return, int16 of the shape of matrix `name`: 0 where it is free, k + 1 where task number k owns it."""
        shape = self.trunk.get_parameter(name).shape
        planes = self.planes[name]
        found = torch.zeros(shape, dtype=torch.int16, device=planes.device)
        for i, plane in enumerate(planes):
            found += unpack_bits(plane, shape).to(torch.int16) << i
        return found

    def mask(self, name: str, task: int) -> Tensor:
        """Return what a task answers with, a bool tensor of the shape of matrix `name`."""
        return self._up_to(name, self.number(task))

    def _up_to(self, name: str, number: int) -> Tensor:
        """Return which weights tasks 0 to `number` own; bits of codes are compared while eight are in a byte."""
        planes, code = self.planes[name], number + 1
        none = planes.new_zeros(planes.shape[1])
        owned, small_enough = none, ~none
        for i, plane in enumerate(planes):  # from the lowest bit on: a higher one that differs decides
            small_enough = ~plane | small_enough if (code >> i) & 1 else ~plane & small_enough
            owned = owned | plane
        if code >> len(planes):
            small_enough = ~none
        return unpack_bits(owned & small_enough, self.trunk.get_parameter(name).shape)

    @torch.no_grad()
    def claim(self, name: str, chosen: Tensor, task: int) -> None:
        """Give free weights to a task, and make those zero that stay free.

        Args:
            name: of the matrix.
            chosen: bool, of its shape.
            task: has been observed.

        Raises:
            ValueError: some of them are owned already.
        """
        owners = self.owners(name)
        if bool((chosen & (owners > 0)).any()):
            raise ValueError(f"{name}: task {task} claims weights that have an owner")
        code = self.number(task) + 1
        owners[chosen] = code
        count = max(code.bit_length(), len(self.planes[name]))
        self.planes.replace(name, torch.stack([pack_bits((owners >> i) & 1) for i in range(count)]))
        weight = self.trunk.get_parameter(name)
        weight.mul_((owners > 0).to(weight.dtype))

    # ---------------------------------------------------------------------------------------------------------- answers

    def weights(self, part: nn.Module) -> dict[str, Tensor]:
        """Return the matrices with zeros where the task answers with nothing, and its own small tensors.

        Older tasks' answers have no gradient in the matrices: all they consist of is fixed.
        """
        assert isinstance(part, _Part)
        found = part.own.named() if part.own is not None else {}
        number = int(part.number)
        if number < len(self.parts) - 1:
            for name, weight in matrices(self.trunk).items():
                found[name] = weight.detach() * self._up_to(name, number).to(weight.dtype)
        return found

    def answer(self, x: Tensor, task: int) -> Tensor:
        """Return the logits of samples that are all of one task; the trunk itself runs where nothing replaces it."""
        if self.is_newest(task) and cast(_Part, self.part(task)).own is None:
            logits: Tensor = self.head(self.trunk(x), task)
            return logits
        return super().answer(x, task)

    # ------------------------------------------------------------------------------------------------------------ books

    def small_parameters(self, task: int) -> list[nn.Parameter]:
        """Return the biases and normalisation weights that a task answers with."""
        return [parameter for parameter in self._small_of(task).parameters() if parameter.ndim < 2]

    def statistics(self, task: int) -> list[Tensor]:
        """Return the buffers that a task answers with: normalisation's statistics and its number; not the planes."""
        return [*self._small_of(task).buffers(), cast(_Part, self.part(task)).number]

    def _small_of(self, task: int) -> nn.Module:
        own = cast(_Part, self.part(task)).own
        return self.trunk if own is None else own

    def task_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Return the parameters of every task's head, and its small ones where tasks have their own."""
        found = super().task_parameters()
        if self.small_of == "task":
            for task in self.tasks():
                if self.number(task) == 0:
                    found.setdefault(task, []).extend(self.small_parameters(task))
        return found
