"""Clones that keep some of their tensors in common, and a net made of them: one clone of the trunk per task.

`clone_module` copies a module but for the parameters that stay shared, which are the same objects in both: a training
step through one moves them in the other, and their gradient is the sum over both.

Low-rank adapters of a `ClonedNet`: a task's weight is W + B A with W shared, B and A the task's own (`LowRank` of
`clbench.nets.shared.maps`); B is zero when new, so that a new task starts at W. From Hu et al. 2022, "LoRA",
arXiv:2106.09685. Adapters of each task's own around shared filters are older: Rebuffi et al. 2017, "Learning multiple
visual domains with residual adapters", arXiv:1705.08045, in series; parallel in Rebuffi et al. 2018, "Efficient
parametrization of multi-domain deep neural networks", arXiv:1803.10082.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clbench.nets.heads import HeadedNet
from clbench.nets.shared.aliases import overlaps, tensors_by_name, views_of
from clbench.nets.shared.maps import LowRank
from clbench.nets.shared.tasknet import TaskNet, refuse_shared_modules

Share = str | Iterable[str] | Callable[[str, Tensor], bool]
"""Which tensors: "all", "none", names, patterns ("layers.*.bias", where * also stands for dots), or what tells."""

Begins = Literal["born", "last"]
"""Where what a new task has for itself starts: as the net was born, or where the last new task's is now."""

_LISTED = 8
"""Names that a mistake lists."""

Module = TypeVar("Module", bound=nn.Module)


def clone_module(module: Module, share: Share, share_buffers: bool | Share = False) -> Module:
    """Return a copy of a module that shares some of its tensors with it.

    Ties within the module survive in the clone, and so do references of one layer to another of the same module. A
    tensor of several names stays shared under all of them when one is chosen. Nothing else is common: hooks are copied,
    gradients are not. Parameters stay shared when one of the two is moved to another device or type; buffers do not,
    because PyTorch replaces them there: share them after moving. What the module refers to outside of itself is copied.

    Args:
        module: stays as it is.
        share: the parameters that stay shared.
        share_buffers: the buffers that do; True for all of them, False for none.

    Raises:
        ValueError: a name or pattern that fits nothing, or tensors that see the same memory by different views: a copy
            would come apart, unless all of them stay shared.
    """
    if isinstance(share_buffers, bool):
        share_buffers = "all" if share_buffers else "none"
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    kept = {name: parameters[name] for name in chosen(module, share)}
    kept_buffers = {name: buffers[name] for name in chosen(module, share_buffers, "buffer")}
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*kept.values(), *kept_buffers.values())}
    _refuse_views(module, set(memo))
    clone = copy.deepcopy(module, memo)
    for tensor in (*clone.parameters(), *clone.buffers()):
        if id(tensor) not in memo:
            tensor.grad = None
    return clone


def chosen(module: nn.Module, share: Share, kind: Literal["parameter", "buffer"] = "parameter") -> list[str]:
    """Return the names of a module's parameters, or buffers, that `share` means; all names of each.

    Raises:
        ValueError: a name or pattern that fits none.
    """
    named: Mapping[str, Tensor]
    if kind == "parameter":
        named = dict(module.named_parameters(remove_duplicate=False))
    else:
        named = dict(module.named_buffers(remove_duplicate=False))
    if callable(share):
        found = {id(tensor) for name, tensor in named.items() if share(name, tensor)}
    elif share == "all":
        found = {id(tensor) for tensor in named.values()}
    elif share == "none":
        found = set()
    else:
        patterns = [share] if isinstance(share, str) else list(share) if isinstance(share, Iterable) else [share]
        for pattern in patterns:
            if not isinstance(pattern, str):
                kinds = f"'all', 'none', names, patterns or a function of name and {kind}"
                raise ValueError(f"share is {kinds}; got {share!r}")
        found = {id(named[name]) for pattern in patterns for name in _fitting(module, pattern, named, kind)}
    return [name for name, tensor in named.items() if id(tensor) in found]


def _fitting(module: nn.Module, pattern: str, named: Mapping[str, Tensor], kind: str) -> list[str]:
    """Return the names that a name or pattern means."""
    found = [pattern] if pattern in named else [name for name in named if fnmatchcase(name, pattern)]
    if found:
        return found
    modules = {name for name, _ in module.named_modules() if name}
    close = [f"{pattern}.*"] if pattern in modules else difflib.get_close_matches(pattern, named, n=1, cutoff=0.5)
    if not close:
        head, dot, last = pattern.rpartition(".")
        words = difflib.get_close_matches(last, {name.rpartition(".")[2] for name in named}, n=1, cutoff=0.5)
        close = [meant for word in words if any(fnmatchcase(name, meant := f"{head}{dot}{word}") for name in named)]
    hint = f" Did you mean '{close[0]}'?" if close else ""
    known = ", ".join(list(named)[:_LISTED]) + (f" and {len(named) - _LISTED} more" if len(named) > _LISTED else "")
    raise ValueError(f"no {kind} is named '{pattern}'.{hint} Known: {known or 'none'}")


def _refuse_views(module: nn.Module, shared: set[int]) -> None:
    """Refuse tensors over common memory that a copy would pull apart; `shared` are the ids of what is not copied."""
    named = tensors_by_name(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    views = views_of(named)
    groups = [*views.values(), *([*views[a], *views[b]] for a, b in overlaps(views))]
    for names in groups:
        members = {id(named[name]) for name in names}
        # A copy of buffers alone keeps their storage in common; one of parameters does not.
        apart = bool(members & shared) or any(name in parameters for name in names)
        if len(members) > 1 and not members <= shared and apart:
            listed = ", ".join(sorted(names))
            raise ValueError(f"{listed} are views of the same memory, which a clone pulls apart: share all of them")


# ------------------------------------------------------------------------------------------------ a clone for each task


class Clone(nn.Module):
    """What a task has for itself.

    Args:
        trunk: a clone of the net's.
        adapters: name of a matrix of the trunk -> what is made of it; none at all for no adapters.
    """

    def __init__(self, trunk: nn.Module, adapters: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.adapters = nn.ModuleDict({name.replace(".", "/"): adapter for name, adapter in adapters.items()})

    def adapted(self) -> dict[str, Tensor]:
        """Return the matrices that the adapters make, by the trunk's names."""
        named = {key.replace("/", "."): adapter for key, adapter in self.adapters.items()}
        return {name: adapter(self.trunk.get_parameter(name)) for name, adapter in named.items()}


class ClonedNet(TaskNet):
    """A clone of the trunk for every task, some parameters common to all; the first task's is the net's own trunk.

    A module's buffers, such as running statistics, are common where all of its parameters are, or where all parameters
    of the trunk are.

    Args:
        new_net: returns the net as it is born, always the same one.
        share: which parameters of the trunk are common, see `clone_module`.
        seed: of the adapters.
        begins: where a new task's own parameters and buffers start.
        rank: of the adapters that each task but the first has for every common matrix (n outputs, m inputs of each);
            at most min(n, m). 0 for none.

    Raises:
        ValueError: as `clone_module`; adapters where no matrix is common, or where one module has two places.
    """

    replaces: ClassVar[bool] = False

    def __init__(
        self, new_net: Callable[[], HeadedNet], share: Share, seed: int, begins: Begins = "born", rank: int = 0
    ) -> None:
        super().__init__(new_net(), seed)
        if rank:
            refuse_shared_modules(self.trunk)
        self.new_net = new_net
        self.begins = begins
        self.rank = rank
        self.shared = frozenset(chosen(self.trunk, share))
        """Names of the trunk's parameters that are common to all tasks."""
        self.shared_buffers = self._buffers_of(self.shared)
        common = dict(self.trunk.named_parameters())
        self.matrices = [name for name, value in common.items() if name in self.shared and value.ndim > 1]
        if rank and not self.matrices:
            raise ValueError("adapters are added to shared matrices, and none is shared")
        self._newborn: dict[int, nn.Module] = {}
        """What answers for a task not seen yet; in a dict of Python's, as it is no part of the net."""
        clone_module(self.trunk, self.shared, self.shared_buffers)  # refuses what later tasks could not have

    # ------------------------------------------------------------------------------------------------------------ tasks

    def new_part(self, generator: torch.Generator) -> Clone:
        """Return a task's clone; the first task's holds the trunk itself, without adapters."""
        parts = [cast(Clone, part) for part in self.parts.values()]
        if not parts:
            return Clone(self.trunk, {})
        source = parts[-1].trunk if self.begins == "last" else self.trunk
        trunk = clone_module(source, self.shared, self.shared_buffers)
        if self.begins == "born":
            own, common = tensors_by_name(trunk), self.shared | self.shared_buffers
            with torch.no_grad():
                for name, born in tensors_by_name(self.new_net().trunk).items():
                    if name not in common:
                        own[name].copy_(born)
        return Clone(trunk, self._new_adapters(generator) if self.rank else {})

    def part(self, task: int) -> nn.Module:
        """Return the clone of a task, or the one it would be born with, which `forget_newborn` throws away."""
        if str(task) in self.parts:
            return self.parts[str(task)]
        if task not in self._newborn:
            self._newborn[task] = self._born(task)
        return self._newborn[task]

    def observe(self, task: int, classes: Any) -> None:
        """Give the task its clone and the outputs it needs."""
        self.forget_newborn()
        super().observe(task, classes)

    def forget_newborn(self) -> None:
        """Throw away what answered for tasks not seen yet."""
        self._newborn.clear()

    def _new_adapters(self, generator: torch.Generator) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for name in self.matrices:
            weight = self.trunk.get_parameter(name)
            rank = min(self.rank, *weight.flatten(1).shape)
            found[name] = LowRank(weight.shape, rank, generator).to(device=weight.device, dtype=weight.dtype)
        return found

    # ----------------------------------------------------------------------------------------------------------- answer

    def answer(self, x: Tensor, task: int) -> Tensor:
        """Return the logits of samples that are all of one task."""
        part = cast(Clone, self.part(task))
        features = functional_call(part.trunk, self.weights(part), (x,)) if part.adapters else part.trunk(x)
        logits: Tensor = self.head(features, task)
        return logits

    def weights(self, part: nn.Module) -> dict[str, Tensor]:
        """Return the matrices W + B A of a task with adapters, by name; {} without."""
        return cast(Clone, part).adapted()

    # ----------------------------------------------------------------------------------------------------------- frozen

    @property
    def frozen(self) -> bool:
        """Whether what is common no longer learns."""
        return bool(self.shared) and not any(self.trunk.get_parameter(name).requires_grad for name in self.shared)

    def freeze(self) -> list[nn.Parameter]:
        """Let what is common learn no more, common running statistics included; return those parameters."""
        common = [self.trunk.get_parameter(name) for name in sorted(self.shared)]
        for parameter in common:
            parameter.requires_grad_(False)
            parameter.grad = None
        self.train(self.training)
        return common

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what is common and frozen stays in evaluation mode.

        That is the whole trunk, dropout included, where all of its parameters are common; else the modules whose
        buffers are.
        """
        super().train(mode)
        if mode and self.frozen:
            whole = all(name in self.shared for name, _ in self.trunk.named_parameters())
            holders = {""} if whole else {name.rpartition(".")[0] for name in self.shared_buffers}
            for trunk in self._trunks():
                for holder in holders:
                    trunk.get_submodule(holder).eval()
        return self

    # ------------------------------------------------------------------------------------------------------------ books

    def task_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Return every task's head, what its clone does not share, and its adapters."""
        found = {task: list(parameters) for task, parameters in self.head.task_parameters().items()}
        for task, tensors in self._own().items():
            found.setdefault(task, []).extend(value for value in tensors if isinstance(value, nn.Parameter))
        return found

    def task_tensors(self) -> dict[int, list[Tensor]]:
        """Return the same with the buffers that are a task's own."""
        found: dict[int, list[Tensor]] = {task: list(own) for task, own in self.head.task_parameters().items()}
        for task, tensors in self._own().items():
            found.setdefault(task, []).extend(tensors)
        return found

    def _own(self) -> dict[int, list[Tensor]]:
        shared = self.shared | self.shared_buffers
        common = {id(value) for name, value in tensors_by_name(self.trunk).items() if name in shared}
        return {
            int(task): [value for value in (*part.parameters(), *part.buffers()) if id(value) not in common]
            for task, part in self.parts.items()
        }

    def _buffers_of(self, shared: frozenset[str]) -> frozenset[str]:
        """Return the names of the buffers of the modules that are shared whole."""
        whole = all(name in shared for name, _ in self.trunk.named_parameters())
        found = set()
        for name, _ in self.trunk.named_buffers(remove_duplicate=False):
            place = name.rpartition(".")[0]
            beside = [own for own, _ in self.trunk.get_submodule(place).named_parameters(place, recurse=False)]
            if whole or (beside and shared.issuperset(beside)):
                found.add(name)
        return frozenset(found)

    def _trunks(self) -> list[nn.Module]:
        return [self.trunk, *(cast(Clone, part).trunk for part in self.parts.values())]

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move the net; PyTorch replaces buffers when it does, so the common ones are made common again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # PyTorch's own has no types
        for name in self.shared_buffers:
            place, _, key = name.rpartition(".")
            for trunk in self._trunks():
                trunk.get_submodule(place)._buffers[key] = self.trunk.get_submodule(place)._buffers[key]
        return self
