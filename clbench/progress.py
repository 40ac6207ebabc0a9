"""What a sweep says while it runs: where every run is, and how long the rest takes.

A run is watched from a thread of its own process, which looks once a second and changes nothing: `Watch` is what it
sees. The parent collects what the threads say in `Progress`, which knows neither processes nor terminals.

How long the rest takes: a run that goes on needs what runs like it took (of the same baseline and task, then of the
same task), less what it has had; without any, its own pace so far says. Letters: T tasks.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Beat:
    """Where a run is."""

    task: int
    """In training, from 0; T when all are learned."""
    tasks: int
    """T."""
    phase: str
    """train, grow, consolidate or evaluate; "" before the first."""
    steps: int = 0
    """Training steps of this task so far, all phases."""
    steps_an_epoch: int = 0
    """Of the task's own samples; 0 where nobody knows."""
    epochs: int = 0
    """Of the budget; 0 where it is a number of steps, or unknown."""

    @property
    def share(self) -> float:
        """How much of the run is done, in [0, 1]; a task whose phases take more than its budget waits at its end."""
        whole = self.steps_an_epoch * self.epochs
        within = 0.0 if not whole else min(1.0, self.steps / whole)
        return min(1.0, (self.task + 0.95 * within) / max(1, self.tasks))

    def __str__(self) -> str:
        text = f"task {min(self.task + 1, self.tasks)}/{self.tasks}"
        if self.phase == "train" and self.steps_an_epoch and self.epochs:
            epoch = self.steps // self.steps_an_epoch + 1
            # More than the budget: a method of several phases, or one that trains on more than the task.
            text += f" epoch {epoch}/{self.epochs}" if epoch <= self.epochs else f" step {self.steps}"
        elif self.phase == "train" and self.steps:
            text += f" step {self.steps}"
        elif self.phase:
            text += f" {self.phase}"
        return text


@dataclass
class Watch:
    """What a run lets others see; the runner writes it, a thread reads it."""

    tasks: int = 1
    task: int = 0
    phase: str = ""
    steps: Callable[[], int] = lambda: 0
    steps_an_epoch: int = 0
    epochs: int = 0
    after_task: Callable[[Any], None] | None = None
    """Told the record so far after every task."""

    def beat(self) -> Beat:
        """Return where the run is now."""
        return Beat(self.task, self.tasks, self.phase, self.steps(), self.steps_an_epoch, self.epochs)


class Reporter:
    """A thread that tells of a watch, while the context is open.

    Args:
        watch: what to look at.
        tell: gets a `Beat` whenever there is something new.
        every: seconds between two looks.
    """

    def __init__(self, watch: Watch, tell: Callable[[Beat], None], every: float = 1.0) -> None:
        self._watch, self._tell, self._every = watch, tell, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        """Begin to look."""
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        """Look no more; nothing is told after this."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        last = None
        while not self._stop.wait(self._every):
            beat = self._watch.beat()
            if beat != last:
                self._tell(beat)
                last = beat


@dataclass
class _Running:
    name: str
    kinds: tuple[object, ...]
    began: float
    beat: Beat | None = None


@dataclass
class Progress:
    """All runs of a sweep.

    Args:
        waiting: number of a run -> its name and its kinds, the most alike first: runs of a kind take alike long.
        workers: processes at a time.
        clock: seconds.
    """

    waiting: dict[int, tuple[str, tuple[object, ...]]]
    workers: int
    clock: Callable[[], float]
    running: dict[int, _Running] = field(default_factory=dict)
    took: dict[object, list[float]] = field(default_factory=dict)

    def started(self, number: int) -> None:
        """Note that a run begins."""
        name, kinds = self.waiting.pop(number)
        self.running[number] = _Running(name, kinds, self.clock())

    def beat(self, number: int, beat: Beat) -> None:
        """Note where a run is."""
        self.running[number].beat = beat

    def ended(self, number: int, well: bool) -> float:
        """Note that a run is over; return its seconds. One that failed says nothing of how long others take."""
        run = self.running.pop(number)
        seconds = self.clock() - run.began
        for kind in run.kinds if well else ():
            self.took.setdefault(kind, []).append(seconds)
        return seconds

    def seconds_left(self) -> float | None:
        """Return about how long the rest takes; None while nothing is known."""
        now = self.clock()
        paces: list[float] = []
        left: list[float] = []
        for run in self.running.values():
            share = run.beat.share if run.beat is not None else 0.0
            so_far = now - run.began
            usual = self._usual(run.kinds)
            if usual is None and share > 0:
                usual = so_far / share
            if usual is not None:
                paces.append(usual)
                left.append(max(usual - so_far, usual * (1 - share) if share > 0 else 0.0))
        known = [seconds for times in self.took.values() for seconds in times] + paces
        if not known:
            return None
        other = math.fsum(known) / len(known)
        left += [other] * (len(self.running) - len(left))
        for _, kinds in self.waiting.values():
            usual = self._usual(kinds)
            left.append(other if usual is None else usual)
        # As long as the longest, and no shorter than all of them shared out.
        return max(max(left, default=0.0), math.fsum(left) / max(1, self.workers))

    def _usual(self, kinds: tuple[object, ...]) -> float | None:
        for kind in kinds:
            if times := self.took.get(kind):
                return math.fsum(times) / len(times)
        return None

    def line(self, width: int = 0) -> str:
        """Return the running ones and the time left in one line, of at most `width` characters where it is given."""
        left = self.seconds_left()
        rest = "" if left is None else f"about {spoken(left)} left"
        parts = [f"{run.name}: {run.beat}" if run.beat else f"{run.name}: starting" for run in self.running.values()]
        shown = len(parts)
        while width and shown > 1 and len(_joined(parts, shown, rest)) > width:
            shown -= 1
        text = _joined(parts, shown, rest)
        return text if not width or len(text) <= width else text[: max(0, width - len(rest) - 5)] + "..., " + rest


def _joined(parts: list[str], shown: int, rest: str) -> str:
    more = f"+{len(parts) - shown} more" if shown < len(parts) else ""
    return "; ".join(filter(None, (*parts[:shown], more, rest)))


def spoken(seconds: float) -> str:
    """Return a duration in words, as exact as an estimate deserves: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
