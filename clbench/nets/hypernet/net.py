"""The net whose trunk's weights a generator makes, task by task, from what the task has for itself: its embedding.

The trunk's own parameters are taken out: what the net has is the generator, and per task an embedding, a head and, as
asked, normalisation's affine parameters and running statistics. In training the weights are generated at every call. In
evaluation without gradients they are kept until a tensor they were made of changes.

Letters: B batch, C classes, E embedding, P generated weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from clbench.nets.heads import HeadedNet, birth_seed
from clbench.nets.hypernet.generators import Generator
from clbench.nets.hypernet.target import Template, statistics_of
from clbench.nets.shared.tasknet import TaskNet, Tensors

Statistics = Literal["task", "batch"]
"""Of normalisation in evaluation: running statistics that every task has for itself, or those of the batch at hand."""


class HyperPart(nn.Module):
    """What a task has for itself beside its head.

    Args:
        embedding: (E,).
        own: affine parameters and running statistics of normalisation, by the trunk's names.
    """

    def __init__(self, embedding: Tensor, own: Tensors) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)
        self.own = own


class _Steps:
    """Counts the steps of all optimisers: a fused one changes parameters and not their version."""

    taken = 0

    @classmethod
    def count(cls, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Take note of one."""
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.count)


@dataclass
class _Kept:
    """Weights of a task, and what they were made of."""

    made_of: list[tuple[Tensor, int, int]]
    """Tensor, version, address."""
    steps: int
    """Steps that optimisers had taken."""
    weights: dict[str, Tensor]
    written: tuple[int, ...]
    """Their versions."""


class HyperNet(TaskNet):
    """A `TaskNet` whose part is an embedding, and whose weights a generator makes of it.

    Embeddings are born as the generator says, standard normal. A task that was not observed is answered with the
    embedding it would be born with. What is generated is found by `generate` and `flat`; the trunk alone has no weights
    and does not run.

    Weights kept in evaluation are those of the last `kept_tasks` tasks asked. They are made anew when any parameter or
    buffer of the generator, or the embedding, is another object, has another version (every write that autograd knows
    of: `load_state_dict`, `copy_`, most optimisers) or another address, and after any optimiser's step: fused ones
    write behind autograd's back; and when they were written into themselves. Nobody sees a write into `.data` or
    through `.numpy()`, nor what of a generator is no tensor, such as its activation: call `invalidate`. Copies, pickles
    and `train()` keep none.

    Args:
        net: gives trunk and head, and is used up.
        seed: of the embeddings' birth.
        generator: made for a `Target` of this net's trunk.
        statistics: see `Statistics`.
        kept_tasks: of how many tasks generated weights are kept in evaluation; P numbers each.

    Raises:
        ValueError: a generator for another trunk, or an unknown word.
    """

    generator: Generator

    def __init__(
        self, net: HeadedNet, seed: int, generator: Generator, statistics: Statistics = "task", kept_tasks: int = 1
    ) -> None:
        super().__init__(net, seed)
        if statistics not in get_args(Statistics):
            raise ValueError(f"statistics are by {' or by '.join(get_args(Statistics))}, not {statistics!r}")
        if kept_tasks < 0:
            raise ValueError(f"kept_tasks is {kept_tasks}: 0 for none, or more")
        generator.target.require_fits(self.trunk)
        like = next(self.trunk.parameters())
        self.generator = generator.to(device=like.device, dtype=like.dtype)
        self.statistics = statistics
        self.kept_tasks = kept_tasks
        running = statistics_of(self.trunk)
        self._own = {name: tuple(self.trunk.get_parameter(name).shape) for name in generator.target.left}
        self._running = {name: tuple(self.trunk.get_buffer(name).shape) for name in running}
        self._template = Template(self.trunk, [*generator.target.names, *self._own, *self._running])
        if statistics == "batch":
            self._template.forget_statistics()
            self._running = {}
        self._newborn: dict[int, nn.Module] = {}
        """The task asked last without having been observed; a dict, so that it is no module of the net."""
        self._kept: list[_Kept] = []

    # ------------------------------------------------------------------------------------------------------------ tasks

    def new_part(self, generator: torch.Generator) -> HyperPart:
        """Return the embedding drawn, and normalisation as PyTorch begins it: weights and variances 1, others 0."""
        like = next(self.generator.parameters())
        embedding = self.generator.new_embedding(generator)
        own = {name: torch.full(shape, _birth(name), dtype=like.dtype) for name, shape in self._own.items()}
        running = {
            name: torch.full(shape, _birth(name), dtype=like.dtype if shape else torch.int64)
            for name, shape in self._running.items()
        }
        return HyperPart(embedding.to(like.dtype), Tensors(own, running))

    def part(self, task: int) -> HyperPart:
        """Return the part of a task, or the one it would be born with, which is remembered for the next call."""
        if str(task) in self.parts:
            return cast(HyperPart, self.parts[str(task)])
        if task not in self._newborn:
            self._newborn = {task: self._born(task)}
        return cast(HyperPart, self._newborn[task])

    def embedding(self, task: int) -> nn.Parameter:
        """Return the embedding (E,) of a task, or the one it would be born with."""
        return self.part(task).embedding

    def _born(self, task: int) -> nn.Module:
        generator = torch.Generator().manual_seed(birth_seed(self.seed, task))
        return self.new_part(generator).to(next(self.generator.parameters()).device).train(self.training)

    # ---------------------------------------------------------------------------------------------------------- weights

    def flat(self, task: int) -> Tensor:
        """Return the generated weights of a task as one vector (P,), with their graph, made now."""
        weights: Tensor = self.generator(self.part(task).embedding)
        return weights

    def generate(self, task: int) -> dict[str, Tensor]:
        """Return the generated tensors of a task by the trunk's names, with their graph, made now."""
        return self.generator.target.split(self.flat(task))

    def weights(self, part: nn.Module) -> dict[str, Tensor]:
        """Return all the trunk's tensors for the task that has `part`: generated, and its own."""
        assert isinstance(part, HyperPart)
        return {**self._generated(part), **part.own.named()}

    def answer(self, x: Tensor, task: int) -> Tensor:
        """Return the logits (B, C) of samples that are all of one task."""
        with self._template.filled(self.weights(self.part(task))):
            features = self.trunk(x)
        logits: Tensor = self.head(features, task)
        return logits

    def _generated(self, part: HyperPart) -> dict[str, Tensor]:
        target = self.generator.target
        if self.training or torch.is_grad_enabled() or not self.kept_tasks:
            return target.split(self.generator(part.embedding))
        made_of = [*self.generator.parameters(), *self.generator.buffers(), part.embedding]
        if any(tensor.is_inference() for tensor in made_of):  # they have no version
            return target.split(self.generator(part.embedding))
        marks, steps = [(tensor, tensor._version, tensor.data_ptr()) for tensor in made_of], _Steps.taken
        # Of one generator at one version: what was made by another goes, and what was written into.
        self._kept = [
            kept
            for kept in self._kept
            if kept.steps == steps
            and _same(kept.made_of[:-1], marks[:-1])
            and kept.written == _versions(kept.weights)
        ]
        for kept in self._kept:
            if _same(kept.made_of[-1:], marks[-1:]):
                return kept.weights
        weights = target.split(self.generator(part.embedding))
        kept = _Kept(marks, steps, weights, _versions(weights))
        self._kept = [*self._kept, kept][-self.kept_tasks :]
        return kept.weights

    def invalidate(self) -> None:
        """Drop the weights that evaluation keeps, and the part of a task asked without having been observed."""
        self._kept, self._newborn = [], {}

    def train(self, mode: bool = True) -> HyperNet:
        """Switch between training and evaluation; training keeps no weights."""
        if mode:
            self.invalidate()
        super().train(mode)
        return self

    # ------------------------------------------------------------------------------------------------------------ books

    def task_embeddings(self) -> dict[int, nn.Parameter]:
        """Return the embedding of every task observed."""
        return {task: self.part(task).embedding for task in self.tasks()}

    def compression(self) -> float:
        """Return the parameters of generator and embeddings of the tasks observed, per generated weight."""
        return self.generator.parameters_with(len(self.parts)) / self.generator.target.size

    def observe(self, task: int, classes: Any) -> None:
        """Give the task its part and the outputs it needs."""
        super().observe(task, classes)
        self._newborn = {}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> HyperNet:
        self.invalidate()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # PyTorch's own has no types
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": [], "_newborn": {}}


def _same(one: list[tuple[Tensor, int, int]], other: list[tuple[Tensor, int, int]]) -> bool:
    """Whether tensors are the same objects, at the same version and address."""
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in pairs)


def _versions(weights: dict[str, Tensor]) -> tuple[int, ...]:
    """Return how often each was written into; tensors made in inference mode do not tell."""
    return tuple(0 if tensor.is_inference() else tensor._version for tensor in weights.values())


def _birth(name: str) -> float:
    """Return what a normalisation's tensor begins as."""
    return 1.0 if name.rpartition(".")[2] in ("weight", "running_var") else 0.0
