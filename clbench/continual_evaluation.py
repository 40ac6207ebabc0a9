"""Accuracies within a task: the tasks seen are evaluated after every N-th training iteration, and nothing else changes.

De Lange, van de Ven & Tuytelaars 2023, "Continual evaluation for lifelong learning: identifying the stability gap",
ICLR, arXiv:2205.13452: accuracy on old tasks falls when a new one begins and comes back before it ends, which an
evaluation after each task does not see. N is their evaluation periodicity.

A method answers there and then, as it would if training ended after this iteration without what it does after a task:
iCaRL knows no mean yet of the classes in training, PackNet's task has not been pruned. A training iteration is one step
of the optimiser, in whichever phase of the method.

Everything is left as it was found: modes of modules (and with them running statistics), attributes, all generators. The
optimiser and gradients are not touched, the evaluation itself is the one after a task. A net that merges its weights to
answer, when it is switched by `eval`, is as it was as far as its `train` undoes that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from avalanche.benchmarks.scenarios import DatasetExperience
from torch import Tensor

from clbench import checkpoint
from clbench.flops import StepCounter
from clbench.record_parts import Within
from clbench.strategies.base import Strategy
from clbench.strategies.foreign import Foreign


class ContinualEvaluation:
    """A context about every training step of a strategy; evaluates after every N-th one of a task.

    Args:
        strategy: whose steps it is opened around.
        tests: of all tasks, in the order of the stream.
        every: N.
        phase: opened around each evaluation, to count its seconds and memory apart.
        counter: is told of every step, too, where there is one.
    """

    def __init__(
        self,
        strategy: Strategy | Foreign,
        tests: Sequence[DatasetExperience],
        every: int,
        phase: Callable[[], AbstractContextManager[None]],
        counter: StepCounter | None = None,
    ) -> None:
        self._strategy, self._tests, self._every, self._phase = strategy, tests, every, phase
        self._counter = counter
        self.begin(0)

    def begin(self, task: int) -> None:
        """Begin with a task of the stream, counted from 0."""
        self._task = task
        self._iterations = 0
        self._acc: list[list[float]] = []

    def __call__(self, data: object, x: Tensor) -> ContinualEvaluation:
        """Prepare for a step on inputs `x` (B, ...) of a pass over `data`."""
        if self._counter is not None:
            self._counter(data, x)
        return self

    def __enter__(self) -> None:
        """Begin a step."""
        if self._counter is not None:
            self._counter.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None = None, error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:  # fmt: skip
        """End a step, and evaluate if it is time."""
        if self._counter is not None:
            self._counter.__exit__(kind, error, trace)
        if kind is not None:
            return
        self._iterations += 1
        if self._iterations % self._every == 0:
            with self._phase(), undisturbed(self._strategy):
                tests = self._tests[: self._task + 1]
                self._acc.append([self._strategy.evaluate(test).accuracy for test in tests])

    def close(self) -> None:
        """End a step that an error has cut short, where nobody else does."""
        if self._counter is not None:
            self._counter.close()

    def take(self) -> Within:
        """Return what was found while the task was in training."""
        return Within(every=self._every, iterations=self._iterations, acc=self._acc)


@contextlib.contextmanager
def undisturbed(strategy: Strategy | Foreign) -> Iterator[None]:
    """Leave a strategy in training as it was, whatever is asked of it while the context is open."""
    trained: Any = strategy.strategy if isinstance(strategy, Foreign) else strategy
    own = {} if isinstance(strategy, Foreign) else {"order": strategy.order, "chance": strategy.chance}
    modes = [(module, module.training) for module in trained.model.modules()]
    attributes = dict(vars(trained))
    generators = checkpoint.generator_states(own)
    try:
        yield
    finally:
        for name in vars(trained).keys() - attributes.keys():
            delattr(trained, name)
        vars(trained).update(attributes)
        # By `train` first: a net that does more there than set the mode (keeps or merges weights) has to undo it.
        trained.model.train(dict(modes)[trained.model])
        for module, training in modes:
            module.training = training
        checkpoint.restore_generators(generators, own)
