"""What a sweep says while it runs: where every run is, and an estimate of the rest from what runs like it took."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from clbench import sweep
from clbench.progress import Beat, Progress, Reporter, Watch, spoken
from clbench.runner import run
from strategy_factory import synthetic


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def three(clock: Clock, workers: int = 1) -> Progress:
    """Two runs of one kind and one of another, of the same task."""
    kinds = {0: ("ewc s0", ("ewc", "task")), 1: ("ewc s1", ("ewc", "task")), 2: ("er s0", ("er", "task"))}
    return Progress(dict(kinds), workers, clock)


def test_what_the_parent_cannot_take_is_dropped_and_holds_up_no_run() -> None:
    """A pipe of 64 KiB fills up when nobody reads; the next message would wait, perhaps for ever."""
    mine, theirs = multiprocessing.Pipe(duplex=False)
    sent = 0
    while sweep.has_room(theirs) and sent < 1000:
        theirs.send_bytes(b"x" * 2000)
        sent += 1
    assert 0 < sent < 1000
    while mine.poll():
        mine.recv_bytes()
    assert sweep.has_room(theirs)


def test_nothing_is_estimated_from_nothing() -> None:
    progress = three(Clock())
    assert progress.seconds_left() is None
    progress.started(0)
    assert progress.line() == "ewc s0: starting"


def test_a_runs_own_pace_tells_before_any_has_ended() -> None:
    """A quarter done after 10 s: it takes 40, so 30 are left; two more like it, one at a time: 30 + 40 + 40."""
    clock = Clock()
    progress = three(clock)
    progress.started(0)
    clock.now = 10.0
    progress.beat(0, Beat(1, 4, "train"))
    assert progress.seconds_left() == pytest.approx(110)
    assert progress.line() == "ewc s0: task 2/4 train; about 2 min left"


def test_runs_of_a_kind_take_what_others_of_it_took() -> None:
    """EWC took 20 s, er (once) 100: of the ewc that began 5 s ago 15 are left, and nothing waits."""
    clock = Clock()
    progress = three(clock)
    for number, seconds in ((0, 20.0), (2, 100.0)):
        progress.started(number)
        clock.now += seconds
        assert progress.ended(number, well=True) == seconds
    assert progress.seconds_left() == pytest.approx(20)
    progress.started(1)
    clock.now += 5
    assert progress.seconds_left() == pytest.approx(15)


def test_workers_share_what_waits_and_a_long_run_is_not_shared() -> None:
    """After 30 s of ewc, two workers: ewc (30) and er (30, by the task) at once take 30."""
    clock = Clock()
    progress = three(clock, workers=2)
    progress.started(0)
    clock.now = 30.0
    progress.ended(0, well=True)
    assert progress.seconds_left() == pytest.approx(30)


def test_a_run_that_failed_says_nothing_of_others() -> None:
    clock = Clock()
    progress = three(clock)
    progress.started(0)
    clock.now = 1.0
    progress.ended(0, well=False)
    assert progress.seconds_left() is None


@pytest.mark.parametrize(
    ("beat", "says", "share"),
    [
        (Beat(0, 5, ""), "task 1/5", 0.0),
        (Beat(1, 5, "train", 25, 10, 10), "task 2/5 epoch 3/10", (1 + 0.95 * 0.25) / 5),
        (Beat(1, 5, "train", 300, 10, 10), "task 2/5 step 300", (1 + 0.95) / 5),
        (Beat(1, 5, "train", 300), "task 2/5 step 300", 1 / 5),
        (Beat(4, 5, "evaluate", 100, 10, 10), "task 5/5 evaluate", (4 + 0.95) / 5),
    ],
)
def test_a_beat_says_task_and_epoch(beat: Beat, says: str, share: float) -> None:
    assert str(beat) == says
    assert beat.share == pytest.approx(share)


def test_a_line_is_no_wider_than_the_terminal() -> None:
    clock = Clock()
    progress = three(clock, workers=3)
    for number in range(3):
        progress.started(number)
    clock.now = 10.0
    for number in range(3):
        progress.beat(number, Beat(1, 2, "train"))
    assert progress.line() == "ewc s0: task 2/2 train; ewc s1: task 2/2 train; er s0: task 2/2 train; about 10 s left"
    assert progress.line(60) == "ewc s0: task 2/2 train; +2 more; about 10 s left"


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (12_000, "3 h 20 min")])
def test_durations_are_spoken(seconds: float, words: str) -> None:
    assert spoken(seconds) == words


def test_a_run_lets_itself_be_watched_and_is_the_same() -> None:
    """Looked at whenever a task is over: the task in training, its epochs, its steps."""
    watch = Watch()
    seen: list[Beat] = []
    task = synthetic("task", n_tasks=2, epochs=3)
    found = run(task, "finetune", 0, watch=watch, progress=lambda done, total: seen.append(watch.beat()))
    told = [(beat.task, beat.tasks, beat.phase, beat.epochs) for beat in seen]
    assert told == [(0, 2, "evaluate", 3), (1, 2, "evaluate", 3)]
    assert seen[0].steps_an_epoch * 3 == found.flops[0].steps
    assert found.acc == run(task, "finetune", 0).acc


def test_a_reporter_tells_what_is_new_and_then_falls_silent() -> None:
    watch = Watch(tasks=3)
    told: list[Beat] = []
    with Reporter(watch, told.append, every=0.01) as _:
        while not told:
            time.sleep(0.01)
        watch.task = 1
        while len(told) < 2:
            time.sleep(0.01)
    watch.task = 2
    assert [beat.task for beat in told] == [0, 1]


def test_without_a_terminal_a_sweep_says_a_line_a_run_and_quietly_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    jobs = sweep.plan(["synthetic_split"], ["finetune"], [0, 1])
    sweep.sweep(jobs[:1], tmp_path, workers=1, show_progress=False)
    assert capfd.readouterr().err == ""
    sweep.sweep(jobs, tmp_path, workers=1)
    said = capfd.readouterr().err
    assert "[2/2] done: synthetic_split/finetune seed 1 in " in said
    assert "\r" not in said
