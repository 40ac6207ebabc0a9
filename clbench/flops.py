"""Floating-point operations of training steps and answers, counted on the run itself, one step in many.

A step is counted while it runs, by the formulas of `torch.utils.flop_counter`, in a mode that looks at every call of a
kernel and changes none of them: a run is the same to the bit with and without it. Nothing is copied, so that what a
method does in a step (replay, a regulariser over past tasks, one phase of several) is what is counted. Counted is the
first step of each kind, where a kind is a pass over data (a phase), the size of its batch, and how many samples went
through the step; the others of the kind are multiplied. After `MOST` kinds of one pass the rest goes by its number of
samples.

Counted are products of matrices and convolutions, 2 a multiply-add; all else is 0: activations, normalisation, the
optimiser's arithmetic, penalties over weights such as EWC's, products of a matrix and one vector. What happens outside
of steps (importances, projections after a task, validation) is not in it.

Letters: B batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from clbench.record_parts import Flops

MOST = 8
"""Kinds of steps of one pass over data that are counted."""

_Kind = tuple[int, int, int]
"""Number of the pass, B, samples that went through the step."""


@functools.cache
def _is_composite(operation: Any) -> bool:
    """Whether a kernel is a composition of others, which are then counted instead; they come so in inference mode."""
    name = getattr(operation, "name", None)
    key = "CompositeImplicitAutograd"
    return callable(name) and bool(torch._C._dispatch_has_kernel_for_dispatch_key(name(), key))


# torch leaves the methods of its dispatch modes untyped: hence the ignored calls here and below.
class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations while the context is open. A kernel that torch's formulas do not fit never stops a run.

    The formulas are those of torch's `FlopCounterMode`; its own mode takes twice as long, to tell modules apart.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._total = 0
        self.problem = ""
        """What could not be counted; "" where everything could."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a kernel as it would be called, and count it."""
        kwargs = kwargs or {}
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is None and _is_composite(func):
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        out = func(*args, **kwargs)
        if formula is not None:
            try:
                self._total += int(formula(*args, **kwargs, out_val=out))
            # A formula of torch's may raise anything on shapes it was not written for.
            except Exception as error:
                self.problem = f"{func._overloadpacket}: {type(error).__name__}: {_first_line(error)}"
        return out

    @property
    def total(self) -> int | None:
        """Operations; None where some could not be counted."""
        return None if self.problem else self._total


@functools.cache
def _warmed_up() -> None:
    """Count a step once before anything is timed: the first call of a kernel under a mode takes torch milliseconds."""
    first, second = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    optimizers = [torch.optim.SGD([first], 0.1, fused=True), torch.optim.Adam([second], fused=True)]
    with Counting():
        hidden = torch.relu(torch.nn.functional.linear(torch.ones(2, 2), first, torch.ones(2)))
        answer = torch.nn.functional.linear(hidden, second)
        torch.autograd.backward(torch.nn.functional.cross_entropy(answer, torch.zeros(2, dtype=torch.int64)))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


class StepCounter:
    """Counts the training steps of a strategy, one of each kind; a context about every step.

    Args:
        samples: returns how many samples went through training steps so far.
    """

    def __init__(self, samples: Callable[[], int]) -> None:
        _warmed_up()
        self._samples = samples
        self._mode: Counting | None = None
        self._clear()

    def _clear(self) -> None:
        self._data: object = None
        self._passes, self._size, self._before = 0, 0, 0
        self._known: set[tuple[int, int]] = set()
        self._left = MOST
        self._is_new = False
        self._number = 0
        self._steps: dict[_Kind, int] = {}
        self._counted: dict[_Kind, int] = {}
        self._why = ""

    def __call__(self, data: object, x: Tensor) -> StepCounter:
        """Prepare for a step on inputs `x` (B, ...) of a pass over `data`."""
        if data is not self._data:
            self._data, self._left, self._is_new = data, MOST, False
            self._passes += 1
        self._size = len(x)
        return self

    def __enter__(self) -> None:
        """Begin a step."""
        self._before = self._samples()
        place = (self._passes, self._size)
        if (place not in self._known or self._is_new) and self._left > 0:
            self._known.add(place)
            self._left -= 1
            self._mode = Counting()
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None = None, error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:  # fmt: skip
        """End a step; note its kind."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if kind is not None:
            return
        self._number += 1
        step = (self._passes, self._size, self._samples() - self._before)
        self._steps[step] = self._steps.get(step, 0) + 1
        if mode is not None:
            if mode.total is None:
                self._why = mode.problem
            else:
                self._counted[step] = mode.total
        # The memory of a replay method fills: what a step was not counted for is counted at the next of its kind.
        self._is_new = step not in self._counted and not self._why

    @property
    def steps(self) -> int:
        """Steps so far since the last `take`."""
        return self._number

    def close(self) -> None:
        """End a step that an error has cut short, where nobody else does."""
        if self._mode is not None:
            self.__exit__(RuntimeError)

    def take(self, answer: int | None, why: str = "") -> Flops:
        """Return what a task's training took, and begin anew.

        Args:
            answer: operations of one answer.
            why: why there is none.
        """
        steps = self._steps
        usual = max(steps, key=lambda kind: steps[kind]) if steps else (0, 0, 0)
        total: int | None = 0
        for kind, number in steps.items():
            one = self._of(kind)
            total = None if total is None or one is None else total + number * one
        found = Flops(
            step=self._of(usual) if steps else None,
            step_samples=usual[2],
            steps=sum(steps.values()),
            train=total if steps else None,
            answer=answer,
            why="; ".join(filter(None, (self._why, "" if steps else "no training step", why))),
        )
        self._clear()
        return found

    def _of(self, kind: _Kind) -> int | None:
        """Return the operations of a step of a kind, by samples from one of its pass where it was not counted."""
        if self._why:
            return None
        if kind in self._counted:
            return self._counted[kind]
        near = [other for other in self._counted if other[0] == kind[0] and other[2] > 0]
        if not near:
            return None
        other = min(near, key=lambda other: abs(other[2] - kind[2]))
        return round(self._counted[other] * kind[2] / other[2])


class _OneSample:
    """An experience as far as its first sample, for an evaluation that counts."""

    def __init__(self, experience: Any) -> None:
        self._experience = experience
        self.dataset = experience.dataset.eval().subset([0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experience, name)


def of_answer(evaluate: Callable[[Any], object], experience: Any) -> tuple[int | None, str]:
    """Return the operations of one answer to one sample of a task, and why there are none where there are none.

    Args:
        evaluate: answers an experience as evaluation does; draws nothing and leaves everything as it was.
        experience: the task's test samples.
    """
    mode = Counting()
    try:
        with torch.random.fork_rng(devices=[]), mode:
            evaluate(_OneSample(experience))
    # A strategy of another's may look at more than it is given here: that costs a number, not a run.
    except Exception as error:
        return None, f"answer: {type(error).__name__}: {_first_line(error)}"
    return mode.total, mode.problem
