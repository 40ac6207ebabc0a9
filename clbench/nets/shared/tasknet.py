"""Nets whose trunk has other weights for every task: made of what all tasks share and of what a task has for itself.

A `TaskNet` runs the trunk of a `HeadedNet` by a functional call, with the tensors that `weights(part)` returns in place
of the trunk's own, so that any trunk will do. What a task has for itself is a module, its *part*: masks, scores,
factors, biases. A part is born from the net's seed and the task's label alone; a task that was not observed yet is
answered with the part it would be born with, which is not kept.

Letters: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clbench.nets.heads import HeadedNet, birth_seed, by_task
from clbench.nets.shared.aliases import overlaps, views_of


class TaskNet(HeadedNet):
    """Base of the nets whose trunk's weights depend on the task. A subclass defines `new_part` and `weights`.

    Takes `net` apart and is to be used instead of it.

    Args:
        net: gives trunk and head.
        seed: of the parts' birth.

    Raises:
        ValueError: a module with tensors has two places in the trunk, which a functional call does not survive, or two
            parameters see the same memory, where what is replaced in one does not reach the other.
    """

    replaces: ClassVar[bool] = True
    """Whether answers are given by a functional call, whatever the arguments."""
    parts: nn.ModuleDict
    """Task -> what it has for itself."""

    def __init__(self, net: HeadedNet, seed: int) -> None:
        if self.replaces:
            refuse_shared_modules(net.trunk)
            refuse_views(net.trunk)
        super().__init__(net.trunk, net.head)
        self.seed = seed
        self.parts = nn.ModuleDict()

    # ------------------------------------------------------------------------------------------ what a subclass defines

    def new_part(self, generator: torch.Generator) -> nn.Module:
        """Return what a task is born with.

        Args:
            generator: on the CPU, seeded for the task; whatever is drawn is drawn from it.
        """
        raise NotImplementedError

    def weights(self, part: nn.Module) -> dict[str, Tensor]:
        """Return the trunk's tensors for the task that has `part`, by name; those left out are the trunk's own."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------------ tasks

    def tasks(self) -> list[int]:
        """Return the tasks that have a part, in the order of their birth."""
        return [int(task) for task in self.parts]

    def part(self, task: int) -> nn.Module:
        """Return the part of a task, or the one it would be born with."""
        if str(task) in self.parts:
            return self.parts[str(task)]
        return self._born(task)

    def observe(self, task: int, classes: Any) -> None:
        """Give the task its part and the outputs it needs."""
        super().observe(task, classes)
        self._ensure(int(task))

    def _born(self, task: int) -> nn.Module:
        generator = torch.Generator().manual_seed(birth_seed(self.seed, task))
        like = next(self.parameters())  # the trunk's, if it has any of its own
        return self.new_part(generator).to(like.device).train(self.training)

    def _ensure(self, task: int) -> nn.Module:
        if str(task) not in self.parts:
            self.parts[str(task)] = self._born(task)
        return self.parts[str(task)]

    # ---------------------------------------------------------------------------------------------------------- answers

    def forward(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Return the logits (B, C) of each sample by its own task's weights.

        Raises:
            ValueError: no task.
        """
        if task is None:
            raise ValueError(f"{type(self).__name__} answers for a task: give one number, or one per sample")
        return by_task(self.answer, x, task)

    def answer(self, x: Tensor, task: int) -> Tensor:
        """Return the logits of samples that are all of one task."""
        features = functional_call(self.trunk, self.weights(self.part(task)), (x,))
        logits: Tensor = self.head(features, task)
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Refuse: features are a task's."""
        raise NotImplementedError(f"features of a {type(self).__name__} depend on the task")

    # ------------------------------------------------------------------------------------------------------------ books

    def task_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Return the parameters of every task's head and part."""
        found = {task: list(parameters) for task, parameters in super().task_parameters().items()}
        for task, part in self.parts.items():
            found.setdefault(int(task), []).extend(part.parameters())
        return found

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for key in state_dict:  # in the order of birth, which is the order of parameters an optimiser relies on
            if key.startswith(f"{prefix}parts."):
                self._ensure(int(key.removeprefix(f"{prefix}parts.").split(".")[0]))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Tensors(nn.Module):
    """Parameters and buffers under the names that tensors of a trunk have, dots included.

    Args:
        parameters: name -> value; cloned.
        buffers: likewise.
    """

    def __init__(self, parameters: Mapping[str, Tensor] | None = None, buffers: Mapping[str, Tensor] | None = None):
        super().__init__()
        for name, value in (parameters or {}).items():
            self.register_parameter(_key(name), nn.Parameter(value.detach().clone()))
        for name, value in (buffers or {}).items():
            self.register_buffer(_key(name), value.detach().clone())

    def __getitem__(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self, _key(name)))

    def named(self) -> dict[str, Tensor]:
        """Return all of them by the trunk's names."""
        held = {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}
        return {key.replace("/", "."): value for key, value in held.items()}


def _key(name: str) -> str:
    """Return a name that PyTorch lets a tensor have."""
    return name.replace(".", "/")


def refuse_shared_modules(trunk: nn.Module) -> None:
    """Refuse a module in two places: `functional_call` swaps its tensors twice, and puts the wrong ones back.

    Raises:
        ValueError: there is one that has parameters or buffers; both names are given.
    """
    first: dict[int, str] = {}
    for name, module in trunk.named_modules(remove_duplicate=False):
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and first.setdefault(id(module), name) != name:
            raise ValueError(
                f"'{first[id(module)]}' and '{name}' of the {type(trunk).__name__} are one module, whose tensors "
                "cannot be replaced for a task: give each place a layer of its own with the same parameters "
                "(clbench.nets.shared.reuse.tie does)"
            )


def refuse_views(trunk: nn.Module) -> None:
    """Refuse parameters that are not the same and see the same memory: training one moves the other unseen.

    Raises:
        ValueError: there are such; their names are given.
    """
    views = views_of(dict(trunk.named_parameters()))
    for names in (*views.values(), *([views[a][0], views[b][0]] for a, b in overlaps(views))):
        if len(names) > 1:
            raise ValueError(
                f"{', '.join(sorted(names))} of the {type(trunk).__name__} are views of the same memory, whose values "
                "cannot be replaced for a task: make them one parameter, or copies"
            )


def matrices(trunk: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a trunk that methods mask or factorise, by name: those with a fan-in."""
    return {name: parameter for name, parameter in trunk.named_parameters() if parameter.ndim > 1}


def small(trunk: nn.Module, names: Iterable[str] | None = None) -> Tensors:
    """Return a task's own copy of everything else: biases, normalisation's weights and its running statistics.

    Args:
        trunk: they are copied from it as they are now.
        names: these only.
    """
    wanted = None if names is None else set(names)
    parameters = {
        name: value
        for name, value in trunk.named_parameters()
        if value.ndim < 2 and (wanted is None or name in wanted)
    }
    buffers = {name: value for name, value in trunk.named_buffers() if wanted is None or name in wanted}
    return Tensors(parameters, buffers)
