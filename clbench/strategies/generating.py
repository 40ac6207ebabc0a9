"""What methods on a `HyperNet` share: a net whose weights a generator makes, held by the output regulariser.

Per task, in the order of its steps:

    before it   what the generator makes for every other task is noted: Theta*, as targets or as a copy of the generator
    each step   g = gradient of the loss of the task alone; the step the optimiser would take on it is looked at or not;
                the gradient of  beta / n  sum over the n other tasks  || h(e_t, Theta*) - h(e_t, Theta + dTheta) ||^2
                is added, group of tasks by group; then clipping and the step, as the task's budget says
    after it    what was noted is let go

Where tasks are named at test time, the head and the embedding of a task answer for it. Where they are not (domain-,
class-incremental) every task learned still has its own embedding and head, over its own classes; a sample is answered
by every task and the answer of lowest entropy is taken, as HNET+ENT does. A task seen again is then one task more: no
name tells that it is the same.

Letters: B batch, C classes, E embedding, P generated weights, T tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor

from clbench.errors import UserError
from clbench.loading import Batch, TensorTask
from clbench.nets import HeadedNet, MultiHead
from clbench.nets.heads import ABSENT_LOGIT, GrowingHead, Head, SingleHead
from clbench.nets.hypernet import GENERATORS, Generator, HyperNet, Target, fit_sizes
from clbench.nets.hypernet.init import Init
from clbench.nets.hypernet.net import Statistics
from clbench.nets.hypernet.regulariser import OutputRegulariser, candidate_step
from clbench.records import Generation
from clbench.seeds import derive
from clbench.sharing import Use
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy, mean_loss
from clbench.strategies.evaluation import Evaluation, least_entropy

AT_ONCE = 2**21
"""Numbers that the outputs of a group of tasks have together at most, unless one task has more: 8 MiB of float32."""


class Generating(Strategy):
    """Base of the methods whose net's weights are generated; `model` is a `HyperNet`. A subclass defines `given_sizes`.

    Args:
        setup: see `Strategy`.
        config: see `Config`.

    Raises:
        UserError: a trunk whose weights cannot be generated, sizes that cannot be, a compression that cannot be met.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of every method on a `HyperNet`; a subclass adds the sizes of its generator."""

        embedding: Annotated[int, Field(gt=0)] = 32
        """E, numbers in a task's embedding."""
        hidden: list[Annotated[int, Field(gt=0)]] = field(default_factory=list)
        """Widths of the generator's hidden layers. None: it is linear."""
        activation: Literal["relu", "elu", "sigmoid", "tanh", "gelu"] = "relu"
        """After each of them."""
        init: Init = "torch"
        """What generated weights begin like, see `clbench/nets/hypernet/init.py`."""
        compression: Annotated[float, Field(ge=0)] = 0.0
        """Above 0: sizes are found by which generator and embeddings of all tasks have so many numbers for each
        generated weight, or a little fewer; sizes that are set count for nothing."""
        beta: Annotated[float, Field(ge=0)] = 0.01
        """Strength of the output regulariser. 0: nothing holds what earlier tasks need."""
        loss: Literal["mean", "total"] = "mean"
        """Of what the loss is to which beta and clipping are relative: the mean over a batch, or the sum over the
        task's training samples that it stands for."""
        look_ahead: bool = True
        """Whether the regulariser looks at the generator as the optimiser would leave it, or as it is."""
        asked: Annotated[int, Field(ge=0)] = 0
        """How many other tasks, drawn at random, the regulariser asks in a step. 0: all."""
        train_embeddings: bool = False
        """Whether the penalty trains the other tasks' embeddings, too."""
        targets: Literal["stored", "snapshot", "least"] = "least"
        """What is noted of the other tasks: their weights, a copy of the generator, or what is less of the two."""
        group: Annotated[int, Field(ge=0)] = 0
        """How many tasks' weights the regulariser makes in one pass; 1 takes least memory. 0: as many as make up
        `AT_ONCE` numbers."""
        norms: Literal["generated", "own"] = "generated"
        """Affine parameters of normalisation: generated like all others, or a task's own."""
        statistics: Statistics = "task"
        """Of normalisation in evaluation: running ones of the task, or those of the batch at hand."""

    kind: str
    """Of the generator: a key of `GENERATORS`; not needed where `new_generator` is the method's own."""
    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"task", "domain", "class"})
    stores: ClassVar[tuple[str, ...]] = ("classes",)
    sized_by: ClassVar[tuple[str, ...]] = ("compression", "width")

    def __init__(self, *, setup: Setup, config: Any) -> None:
        self.sizes: dict[str, Any] = {}
        """Of the generator, as it is built."""
        self.told = isinstance(setup.new_net().head, MultiHead)
        """Whether tasks have names."""
        seed = derive(setup.seed, "parts")

        def hyper_net() -> HyperNet:
            net = setup.new_net()
            head = net.head if self.told else _own_heads(net.head, derive(setup.seed, "init"))
            try:
                generator = self.new_generator(Target(net.trunk, config.norms == "generated"), setup, config)
                if type(self).new_generator is not Generating.new_generator:
                    _require_generator(generator)
                return HyperNet(HeadedNet(net.trunk, head), seed, generator, config.statistics)
            except ValueError as error:
                raise UserError(f"strategy {type(self).__name__}: {error}") from None

        super().__init__(setup=replace(setup, new_net=hyper_net), config=config)
        if config.compression and not self.sizes:
            name = type(self).__name__
            raise UserError(f"strategy {name}: its generator is its own, and finds no sizes; compression = 0")
        self.classes: list[list[int]] = []
        """Where tasks have no names: the labels of each task begun, in order; their number is the net's name of it."""
        self.regulariser: OutputRegulariser | None = None
        """Of the task in training."""
        self.samples = 0
        """Training samples of the task in training."""

    # ------------------------------------------------------------------------------------------ what a subclass defines

    def given_sizes(self, config: Any) -> dict[str, Any]:
        """Return the sizes of the generator as they are set, by its own names for them."""
        return {"embedding_size": config.embedding, "hidden": tuple(config.hidden)}

    def fixed_sizes(self, config: Any) -> dict[str, Any]:
        """Return what of the generator is as it is set under a compression, too, by `fit_sizes`' names."""
        return {}

    def other_arguments(self, config: Any) -> dict[str, Any]:
        """Return the generator's arguments that are no sizes."""
        return {"activation": config.activation, "init": config.init}

    def chunks_asked(self) -> float | None:
        """Return the share of its chunks that a task is asked for; None for its whole output."""
        return None

    def new_generator(self, target: Target, setup: Setup, config: Any) -> Generator:
        """Return the generator of a net: that of `kind`. A method with a generator of its own makes it here.

        It is asked for one task's weights, from (E,), and for several tasks' in one pass, from (G, E).

        Raises:
            ValueError: sizes that cannot be, a compression that cannot be met.
        """
        sizes = self.given_sizes(config)
        if config.compression:
            if setup.tasks is None:
                raise ValueError("a compression is of all tasks together, and nothing tells how many they are")
            fit = fit_sizes(self.kind, target, config.compression, setup.tasks, **self.fixed_sizes(config))
            sizes = fit.settings
        self.sizes = sizes
        new = cast(Any, GENERATORS[self.kind])
        made: Generator = new(target, seed=derive(setup.seed, "generator"), **sizes, **self.other_arguments(config))
        return made

    # ------------------------------------------------------------------------------------------------------------ tasks

    @property
    def net(self) -> HyperNet:
        """The net in training."""
        return cast(HyperNet, self.model)

    def begin_task(self, experience: DatasetExperience) -> None:
        """Give the task its embedding and head."""
        if not self.told:
            self.classes.append(sorted(experience.classes_in_this_experience))
        super().begin_task(experience)

    def identified(self, experience: DatasetExperience) -> tuple[int, list[int]]:
        """Return the task's label and classes; those of a task without a name are numbered."""
        if self.told:
            return super().identified(experience)
        return len(self.classes) - 1, list(range(len(self.classes[-1])))

    def before_task(self, experience: DatasetExperience) -> None:
        """Note what is generated for the other tasks."""
        config, net = self.config, self.net
        self.samples = sum(len(task) for task in self.training_data(experience))
        others = {task: e for task, e in net.task_embeddings().items() if task != self.task_label}
        if not config.beta or not others:
            return
        generator, size = net.generator, net.generator.target.size
        copy = sum(parameter.numel() for parameter in generator.parameters())
        least: Literal["stored", "snapshot"] = "stored" if len(others) * size <= copy else "snapshot"
        self.regulariser = OutputRegulariser(
            generator,
            others,
            least if config.targets == "least" else config.targets,
            config.asked or None,
            self.chunks_asked(),
            self.chance,
            group=config.group or max(1, AT_ONCE // size),
            train_embeddings=config.train_embeddings,
        )

    def rehearse(self, batch: Batch) -> Batch:
        """Return the batch as the net knows its labels and task."""
        if self.told:
            return batch
        return Batch(batch.x, self._numbered(batch.y), self.task_label)

    def after_backward(self) -> None:
        """Add the penalty's gradient; until then there is the loss's alone, by which one looks ahead."""
        if self.config.loss == "total":
            gradients = [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, float(self.samples))
        if self.regulariser is not None:
            delta = candidate_step(self.optimizer, self.net.generator) if self.config.look_ahead else None
            self.regulariser.backward(self.config.beta, delta)

    def after_task(self, experience: DatasetExperience) -> None:
        """Let go of what was noted."""
        self.regulariser = None

    def end_task(self) -> None:
        """Count the task; weights made for looking at it meanwhile are no state."""
        super().end_task()
        self.net.invalidate()

    def validation_loss(self, tasks: Sequence[TensorTask]) -> float:
        """Mean cross-entropy on the samples set aside, or on `tasks`, as of the task in training."""
        if self.told:
            return super().validation_loss(tasks)
        held = self.validation_data() or tasks
        own = [TensorTask(one.images, one.rows, self._numbered(one.labels), self.task_label, one.view) for one in held]
        return mean_loss(self.model, own, self.setup.train.eval_batch_size)

    def _numbered(self, labels: Tensor) -> Tensor:
        """Return labels as numbers of the outputs of the task in training."""
        return torch.searchsorted(torch.tensor(self.classes[-1], device=labels.device), labels)

    # ---------------------------------------------------------------------------------------------------------- answers

    def answer(self, x: Tensor, t: int | Tensor) -> Tensor:
        """Return logits (B, C) of the task, or of the one inferred for each sample."""
        if self.told:
            return super().answer(x, t)
        if not self.classes:
            return super().answer(x, 0)  # as the first task would be born, over all classes
        answers: list[Tensor] = [self.model(x, task) for task in range(len(self.classes))]
        chosen = least_entropy(answers)
        width = 1 + max(max(labels) for labels in self.classes)
        found = answers[0].new_full((len(x), width), ABSENT_LOGIT)
        for task, (logits, labels) in enumerate(zip(answers, self.classes, strict=True)):
            rows = (chosen == task).nonzero()
            found[rows, torch.tensor(labels, device=x.device)] = logits[rows.squeeze(1)]
        return found

    def evaluate(self, experience: DatasetExperience, auroc: bool = False) -> Evaluation:
        """Answer with weights generated once for each task that is asked, and keep none of them."""
        self.net.kept_tasks = max(1, len(self.classes))
        try:
            return super().evaluate(experience, auroc)
        finally:
            self.net.invalidate()

    def inferred(self, experience: DatasetExperience, tasks: Sequence[int]) -> float:
        """Answer as every task, with weights generated once for each, and keep none of them."""
        self.net.kept_tasks = len(tasks)
        try:
            return super().inferred(experience, tasks)
        finally:
            self.net.invalidate()

    # ------------------------------------------------------------------------------------------------------------ books

    def uses(self) -> dict[int, list[Use]]:
        """Return what each task answers with: all of the generator, and what is its own, statistics included."""
        net, own = self.net, self.net.task_parameters()
        made_by = [*net.generator.parameters(), *net.generator.buffers()]
        return {
            task: [Use(tensor) for tensor in (*made_by, *own[task], *net.part(task).buffers())] for task in net.tasks()
        }

    def generation(self) -> Generation:
        """Return what generates the net's weights, and how much is generated."""
        net = self.net
        return Generation(
            target_parameters=net.generator.target.size,
            generator_parameters=net.generator.parameters_with(len(net.parts)),
            compression=net.compression(),
            sizes={name: list(size) if isinstance(size, tuple) else size for name, size in self.sizes.items()},
        )


@torch.no_grad()
def _require_generator(generator: object) -> None:
    """Refuse what does not generate, before a run is hours old: several tasks' weights are first asked in the third.

    Raises:
        ValueError: no `Generator`, no parameters, or it does not make a (G, P) of a (G, E), and a (P,) of an (E,).
    """
    if not isinstance(generator, Generator):
        raise ValueError(f"new_generator returned a {type(generator).__name__}, not a Generator")
    like, size = next(generator.parameters(), None), generator.target.size
    if like is None:
        raise ValueError(f"its generator ({type(generator).__name__}) has no parameters to train")
    tried = copy.deepcopy(generator).eval()  # normalisation of its own keeps no trace of this
    for leading in ((), (2,)):
        embedding = torch.zeros(*leading, generator.embedding_size, device=like.device, dtype=like.dtype)
        try:
            found: object = tuple(tried(embedding).shape)
        # Whatever it raises here it would raise in the run.
        except Exception as error:
            found = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if found != (*leading, size):
            shape = tuple(embedding.shape)
            raise ValueError(f"its generator makes {(*leading, size)} of embeddings {shape}; found: {found}")


def _own_heads(head: Head, seed: int) -> MultiHead:
    """Return a head per task in place of one for all; before any task the first is answered for, over all classes."""
    if isinstance(head, GrowingHead):
        bias, outputs = head.linear.bias, head.expected_classes
    else:
        assert isinstance(head, SingleHead)
        bias, outputs = head.linear.bias is not None, head.linear.out_features
    return MultiHead(head.in_features, seed, bias, None if outputs is None else {0: outputs})
