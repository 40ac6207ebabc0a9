"""Floating-point operations of training steps and answers, counted on the run itself, one step in many.

A step is counted while it runs, by torch's `FlopCounterMode`, which looks at every call of a kernel and changes none of
them: a run is the same to the bit with and without it. Nothing is copied, so that what a method does in a step (replay,
a regulariser over past tasks, one phase of several) is what is counted. Counted is the first step of each kind, where a
kind is a pass over data (a phase), the size of its batch, and how many samples went through the step; the others of the
kind are multiplied. After `MOST` kinds of one pass the rest goes by its number of samples.

Counted are products of matrices and convolutions, 2 a multiply-add; all else is 0: activations, normalisation, the
optimiser's arithmetic, penalties over weights such as EWC's, products of a matrix and one vector. What happens outside
of steps (importances, projections after a task, validation) is not in it.

Letters: B batch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clbench.record_parts import Flops

MOST = 8
"""Kinds of steps of one pass over data that are counted."""

_Kind = tuple[int, int, int]
"""Number of the pass, B, samples that went through the step."""


class _Everything:
    """In the place of torch's tracker of modules, whose hooks warn of modules that are called in odd ways."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Track nothing."""

    def __exit__(self, *_: object) -> None:
        """Track nothing."""


class Counting(FlopCounterMode):
    """Counts operations while the context is open. A kernel that torch's formulas do not fit never stops a run."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker: Any = _Everything()
        self.problem = ""
        """What could not be counted; "" where everything could."""

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super()._count_flops(func_packet, out, args, kwargs)  # type: ignore[no-untyped-call]
        # A formula of torch's may raise anything on shapes it was not written for.
        except Exception as error:
            self.problem = f"{func_packet}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return out

    @property
    def total(self) -> int | None:
        """Operations; None where some could not be counted."""
        return None if self.problem else int(self.get_total_flops())


class StepCounter:
    """Counts the training steps of a strategy, one of each kind; a context about every step.

    Args:
        samples: returns how many samples went through training steps so far.
    """

    def __init__(self, samples: Callable[[], int]) -> None:
        self._samples = samples
        self._mode: Counting | None = None
        self._clear()

    def _clear(self) -> None:
        self._data: object = None
        self._passes, self._size, self._before = 0, 0, 0
        self._known: set[tuple[int, int]] = set()
        self._left = MOST
        self._is_new = False
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
        step = (self._passes, self._size, self._samples() - self._before)
        self._steps[step] = self._steps.get(step, 0) + 1
        if mode is not None:
            if mode.total is None:
                self._why = mode.problem
            else:
                self._counted[step] = mode.total
        # The memory of a replay method fills: what a step was not counted for is counted at the next of its kind.
        self._is_new = step not in self._counted and not self._why

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
        return None, f"answer: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return mode.total, mode.problem
