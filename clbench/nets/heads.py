"""Heads, and nets that have one: which logits exist, for which task, and when they are born.

A trunk yields features (B, F); a head turns them into logits (B, C). `HeadedNet.observe(task, classes)` is called
before training on a task and adds the outputs that the head lacks; what was there stays the same parameter object, so
that an optimiser keeps its state.

An output that is born later starts from weights that depend on nothing but the head's seed, the task and the output's
number: not on the global generator, not on the order of tasks, not on how many outputs are added at once. The
distribution is that of `torch.nn.Linear`, uniform within 1 / sqrt(F), for weights and bias alike. Hence an unseen task
can be answered before it is trained on, with the head it would be born with, as forward transfer needs it.

A state dict restores into a fresh net: heads and outputs that it holds and the net lacks are added first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ABSENT_LOGIT = -1e4
"""Stands for a class a task does not have, where a batch mixes tasks of unequal size: finite, and never the largest."""


class _Placed(nn.Module):
    """A module that knows its device and dtype even while it has no parameters."""

    anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.empty(0), persistent=False)


class GrowingLinear(_Placed):
    """A linear map whose outputs are added in blocks, one `torch.nn.Linear` each; `forward` (B, F) -> (B, C).

    Args:
        in_features: F.
        seed: of the outputs' birth weights.
        bias: whether outputs have a bias.
    """

    def __init__(self, in_features: int, seed: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.seed = seed
        self.bias = bias
        self.blocks = nn.ModuleList()

    @property
    def out_features(self) -> int:
        """C, the outputs there are now."""
        return sum(cast(nn.Linear, block).out_features for block in self.blocks)

    def grow(self, out_features: int) -> None:
        """Add one block that brings the outputs to `out_features`; nothing if there are as many already."""
        have = self.out_features
        if out_features <= have:
            return
        # On "meta", because a Linear's own initialisation would draw from the global generator.
        block = nn.Linear(self.in_features, out_features - have, bias=self.bias, device="meta")
        weight, bias = self._birth(have, out_features)
        block.weight = nn.Parameter(weight)
        if bias is not None:
            block.bias = nn.Parameter(bias)
        self.blocks.append(block)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the outputs there are."""
        if not len(self.blocks):
            return x.new_zeros(len(x), 0)
        logits = [block(x) for block in self.blocks]
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    def as_born(self, x: Tensor, out_features: int) -> Tensor:
        """Return the logits that `out_features` untrained outputs would have, adding none."""
        weight, bias = self._birth(0, out_features)
        return F.linear(x, weight, bias)

    def _birth(self, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """Return the birth weights (last - first, F) and biases of outputs `first` to `last` - 1.

        Outputs are drawn in order from one generator, so that an output's weights do not depend on the block it is in;
        always in float32 on the CPU, so that they do not depend on the device.
        """
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        bound = self.in_features**-0.5
        rows = torch.empty(last, self.in_features + self.bias, dtype=torch.float32, device="cpu")
        rows = rows.uniform_(-bound, bound, generator=generator)[first:]
        rows = rows.to(device=self.anchor.device, dtype=self.anchor.dtype)
        weight = rows[:, : self.in_features].clone(memory_format=torch.contiguous_format)
        return weight, rows[:, self.in_features].clone(memory_format=torch.contiguous_format) if self.bias else None

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        while (weight := state_dict.get(f"{prefix}blocks.{len(self.blocks)}.weight")) is not None:
            self.grow(self.out_features + len(weight))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Head(_Placed):
    """Base of the heads: from features (B, F) and, where it matters, tasks to logits (B, C)."""

    in_features: int

    def forward(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Return the logits of features `x`; `task` is one number for the batch or one per sample, (B,)."""
        raise NotImplementedError

    def observe(self, task: int, classes: Sequence[int]) -> None:
        """Add the outputs that training on `task` with labels `classes` needs; nothing when they are there."""
        raise NotImplementedError

    def task_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Return the parameters that serve one task alone, by task."""
        return {}


class SingleHead(Head):
    """All logits from the start, shared by all tasks: domain-incremental, or class-incremental with fixed outputs.

    Args:
        in_features: F.
        n_classes: C.
        bias: whether outputs have a bias.
    """

    def __init__(self, in_features: int, n_classes: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.linear = nn.Linear(in_features, n_classes, bias=bias)

    def forward(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Return the logits (B, C), whatever the task."""
        logits: Tensor = self.linear(x)
        return logits

    def observe(self, task: int, classes: Sequence[int]) -> None:
        """Check that every class has its output.

        Raises:
            ValueError: a class beyond the outputs, negative classes, or none.
        """
        if (needed := _outputs_for(task, classes)) > self.linear.out_features:
            raise ValueError(f"task {task} has class {needed - 1}, the head has {self.linear.out_features} outputs")


class GrowingHead(Head):
    """Class-incremental: one logit per class seen so far, one block of outputs per growth.

    Args:
        in_features: F.
        init_seed: of the birth weights.
        bias: whether outputs have a bias.
        expected_classes: the outputs to answer with, as they would be born, before any class was seen (the reference
            of forward transfer is a net like this). Without it, asking so early is an error. From the first class on,
            classes not seen yet have no logit.
    """

    def __init__(
        self, in_features: int, init_seed: int, bias: bool = True, expected_classes: int | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.expected_classes = expected_classes
        self.linear = GrowingLinear(in_features, birth_seed(init_seed, 0), bias)

    def forward(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Return the logits (B, C) of the C classes seen so far, whatever the task.

        Raises:
            RuntimeError: no class was seen yet and none is expected.
        """
        if self.linear.out_features == 0:
            if self.expected_classes is None:
                raise RuntimeError("no class seen yet: call observe first, or give expected_classes")
            return self.linear.as_born(x, self.expected_classes)
        logits: Tensor = self.linear(x)
        return logits

    def observe(self, task: int, classes: Sequence[int]) -> None:
        """Add outputs up to the largest of `classes`.

        Raises:
            ValueError: negative classes, or none.
        """
        self.linear.grow(_outputs_for(task, classes))


class MultiHead(Head):
    """Task-incremental: every task has outputs of its own, and the task is known when it is asked.

    A task that was not observed yet is answered by the head it would be born with, which is not kept.

    Args:
        in_features: F.
        init_seed: of the birth weights; each task draws from its own generator.
        bias: whether outputs have a bias.
        expected: number of outputs by task, for tasks not observed yet; tasks it does not name are taken to be as
            wide as the widest head there is.
    """

    def __init__(
        self, in_features: int, init_seed: int, bias: bool = True, expected: Mapping[int, int] | None = None
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.init_seed = init_seed
        self.bias = bias
        self.expected = dict(expected or {})
        self.heads = nn.ModuleDict()

    def forward(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Return each sample's logits from its own task's head.

        Args:
            x: features (B, F).
            task: one task for all samples, or one per sample, (B,) integers.

        Returns:
            (B, C), C the outputs of the widest head asked; classes a sample's task does not have are `ABSENT_LOGIT`.

        Raises:
            ValueError: no task, or a tensor of tasks that does not fit the batch.
            RuntimeError: an unseen task whose number of outputs nothing tells.
        """
        if task is None:
            raise ValueError("a multi-head net answers for a task: give one number, or one per sample")
        return by_task(self._answer, x, task)

    def observe(self, task: int, classes: Sequence[int]) -> None:
        """Give the task a head with outputs up to the largest of `classes`, or widen the one it has.

        Raises:
            ValueError: negative classes, or none.
        """
        outputs = _outputs_for(task, classes)
        self._ensure(int(task)).grow(outputs)

    def task_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Return the parameters of each task's head."""
        return {int(task): list(head.parameters()) for task, head in self.heads.items()}

    def _answer(self, x: Tensor, task: int) -> Tensor:
        if str(task) not in self.heads:
            return self._new(task).as_born(x, self.expected_outputs(task))
        logits: Tensor = self.heads[str(task)](x)
        return logits

    def expected_outputs(self, task: int) -> int:
        """Return how many outputs a task is to have that was not observed yet.

        Raises:
            RuntimeError: nothing tells.
        """
        if task in self.expected:
            return self.expected[task]
        if not len(self.heads):
            raise RuntimeError(f"nothing tells how many outputs task {task} has: call observe first, or give expected")
        return max(cast(GrowingLinear, head).out_features for head in self.heads.values())

    def _new(self, task: int) -> GrowingLinear:
        new = GrowingLinear(self.in_features, birth_seed(self.init_seed, task), self.bias)
        return new.to(device=self.anchor.device, dtype=self.anchor.dtype).train(self.training)

    def _ensure(self, task: int) -> GrowingLinear:
        if str(task) not in self.heads:
            self.heads[str(task)] = self._new(task)
        return cast(GrowingLinear, self.heads[str(task)])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        for key in state_dict:  # in the order of birth, which is the order of parameters an optimiser relies on
            if key.startswith(f"{prefix}heads."):
                self._ensure(int(key.removeprefix(f"{prefix}heads.").split(".")[0]))
        super()._load_from_state_dict(state_dict, prefix, *args)


class HeadedNet(nn.Module):
    """A trunk and a head: images (B, C, H, W) to logits.

    The head is moved to the trunk's device and dtype; afterwards both move together, outputs born later included.

    Args:
        trunk: maps images to features (B, F) and has `out_features`, F.
        head: takes F features.

    Raises:
        ValueError: the trunk does not say how many features it yields, or the head takes another number.
    """

    trunk: nn.Module
    head: Head

    def __init__(self, trunk: nn.Module, head: Head) -> None:
        super().__init__()
        out_features = getattr(trunk, "out_features", None)
        if out_features is None:
            raise ValueError(f"the trunk ({type(trunk).__name__}) has no out_features, the number of its features")
        if out_features != head.in_features:
            raise ValueError(f"the trunk yields {out_features} features, the head takes {head.in_features}")
        like = next(trunk.parameters(), None)
        self.trunk = trunk
        self.head = head if like is None else head.to(device=like.device, dtype=like.dtype)

    def forward(self, x: Tensor, task: int | Tensor | None = None) -> Tensor:
        """Return the logits; the trunk runs once on the whole batch, tasks mixed or not."""
        logits: Tensor = self.head(self.features(x), task)
        return logits

    def features(self, x: Tensor) -> Tensor:
        """Return what the head sees, (B, F)."""
        features: Tensor = self.trunk(x)
        return features

    def observe(self, task: int, classes: Sequence[int]) -> None:
        """Add the outputs that training on `task` with labels `classes` needs; to be called before it.

        A task seen again changes nothing, or, with more classes, widens. The optimiser is to be told of the new
        parameters; the old ones stay the same objects.

        Raises:
            ValueError: classes that the head cannot have.
        """
        self.head.observe(task, classes)

    def task_parameters(self) -> dict[int, list[nn.Parameter]]:
        """Return the parameters that serve one task alone, by task; empty where all are shared."""
        return self.head.task_parameters()


def _outputs_for(task: int, classes: Sequence[int]) -> int:
    """Return how many outputs hold these labels: the largest plus one."""
    if not len(classes):
        raise ValueError(f"task {task} has no classes")
    if min(classes) < 0:
        raise ValueError(f"task {task} has class {min(classes)}: labels count from 0")
    return int(max(classes)) + 1


def by_task(answer: Callable[[Tensor, int], Tensor], x: Tensor, task: int | Tensor) -> Tensor:
    """Return what `answer(x, task)` says of a batch that may mix tasks: each task is asked once, about its samples.

    Args:
        answer: from samples of one task, and the task, to logits.
        x: (B, ...).
        task: one task for all samples, or one per sample, (B,) integers.

    Returns:
        (B, C), C the outputs of the widest answer; what others lack is `ABSENT_LOGIT`.

    Raises:
        ValueError: a tensor of tasks that does not fit the batch.
    """
    if not isinstance(task, Tensor) or task.ndim == 0:
        return answer(x, int(task))
    if task.shape != (len(x),):
        raise ValueError(f"tasks are one per sample, shape ({len(x)},); got {tuple(task.shape)}")
    tasks = [int(t) for t in torch.unique(task).tolist()]
    if len(tasks) < 2:
        return answer(x, tasks[0]) if tasks else x.new_zeros(0, 0)
    rows = [(task == t).nonzero().squeeze(1).to(x.device) for t in tasks]
    answers = [answer(x.index_select(0, row), t) for row, t in zip(rows, tasks, strict=True)]
    width = max(logits.shape[1] for logits in answers)
    padded = [F.pad(logits, (0, width - logits.shape[1]), value=ABSENT_LOGIT) for logits in answers]
    return torch.cat(padded).index_select(0, torch.cat(rows).argsort())


def birth_seed(init_seed: int, task: int) -> int:
    """Return a seed per head; hashed, because neighbouring seeds of one generator may be correlated."""
    return int.from_bytes(hashlib.sha256(f"head/{init_seed}/{task}".encode()).digest()[:8], "big") >> 1
