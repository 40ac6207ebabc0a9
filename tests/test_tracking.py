"""Charts of runs: what they say is what the record says, and a run is the same with and without."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from typing import Any

import pytest

from clbench import cli, sweep, tracking
from clbench.errors import UserError
from clbench.progress import Watch
from clbench.record_parts import Flops
from clbench.runner import run
from record_factory import make_record
from strategy_factory import synthetic


def read_back(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return name -> (step, value) of TensorBoard's files in a folder."""
    module: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(folder))
    found.Reload()
    return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_says_what_the_record_says_and_the_run_is_the_same(tmp_path: Path) -> None:
    task = synthetic("task", n_tasks=2, iterations=3)
    watch = Watch()
    with tracking.tracked(["tensorboard"], tmp_path, "x", {}) as watch.after_task:
        found = run(task, "finetune", 0, watch=watch)
    charts = read_back(tmp_path)
    for j in range(2):
        steps, values = zip(*charts[f"accuracy/task_{j + 1}"], strict=True)
        assert steps == (1, 2)
        assert values == pytest.approx([found.acc[i][j] for i in range(2)])
    assert charts["accuracy/seen"][-1][1] == pytest.approx(sum(found.acc[1]) / 2)
    assert charts["footprint/parameters"][0] == (1, float(found.footprints[0].parameters))
    assert charts["flops/train"][0] == (1, float(found.flops[0].train or 0))
    assert "seconds/train" in charts
    plain = run(task, "finetune", 0)
    assert plain.model_dump(exclude={"timing", "peaks"}) == found.model_dump(exclude={"timing", "peaks"})


def test_numbers_that_nobody_knows_are_left_out() -> None:
    one = Flops(step=None, step_samples=0, steps=0, train=None, answer=7, why="x")
    found = tracking.numbers(make_record().model_copy(update={"flops": [one] * 3}))
    assert found["flops/answer"] == 7.0
    assert "flops/train" not in found


def test_what_a_tracker_draws_is_given_back_and_its_failure_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        def write(*_: Any) -> None:
            random.random()
            raise OSError("disk full")

        return write, lambda: None

    monkeypatch.setitem(tracking._OPEN, "tensorboard", broken)
    before = random.getstate()
    with tracking.tracked(["tensorboard"], tmp_path, "x", {}) as tell:
        tell(make_record())
    assert random.getstate() == before
    assert "tracking: OSError: disk full" in capsys.readouterr().err


def test_wandb_leaves_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No account, no network: `wandb sync` can send the folder later."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracking.tracked(["wandb"], tmp_path, "x", {"seed": 0}) as tell:
        tell(make_record())
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_a_tracker_that_is_not_here_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.TRACKERS, "wandb", "no_such_package_anywhere")
    with pytest.raises(UserError, match=r"--track wandb: the package is not here; try: pip install wandb"):
        tracking.check(["wandb"])
    with pytest.raises(UserError, match=r"unknown tracker 'tensorbord'\. Did you mean 'tensorboard'"):
        tracking.check(["tensorbord"])


def test_nothing_is_tracked_unless_asked(tmp_path: Path) -> None:
    with tracking.tracked((), tmp_path / "t", "x", {}) as tell:
        assert tell is None
    assert not (tmp_path / "t").exists()


def test_the_command_passes_on_what_to_track(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def caught(jobs: Any, out: Path, **kwargs: Any) -> list[Any]:
        asked.append(kwargs["track"])
        return []

    monkeypatch.setattr(sweep, "sweep", caught)
    words = ["run", "--task", "synthetic_split", "--baseline", "finetune", "--seeds", "1", "--out", str(tmp_path)]
    assert cli.main([*words, "--track", "tensorboard"]) == 0
    assert cli.main(words) == 0
    assert [list(one) for one in asked] == [["tensorboard"], []]
