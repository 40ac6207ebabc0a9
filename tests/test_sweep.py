"""Many runs in worker processes: skipping, failing, dying and stopping without losing anything."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clbench import records, sweep
from clbench.errors import UserError

OWN = '''
import os, signal, time
from clbench.strategies.base import Strategy

class Killed(Strategy):
    def before_task(self, experience):
        os.kill(os.getpid(), signal.SIGKILL)

class Slow(Strategy):
    def before_task(self, experience):
        time.sleep(600 if self.tasks_seen == 1 else 0)

class Raises(Strategy):
    def before_task(self, experience):
        print("said before it failed")
        raise RuntimeError("no")
'''

RECIPE = """
schema = 1
title = "{name}"
strategy = "own.py:{name}"
family = "own"
paper = "none"
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    for name in ("Killed", "Slow", "Raises"):
        (tmp_path / f"{name.lower()}.toml").write_text(RECIPE.format(name=name))
    return tmp_path


def test_a_sweep_completes_whatever_happens_to_one_run(own: Path) -> None:
    """One run raises, one is killed by the kernel, one is fine: three records, one log, and the sweep ends."""
    out = own / "runs"
    jobs = sweep.plan(["synthetic_split"], [str(own / "raises.toml"), str(own / "killed.toml"), "finetune"], [0])
    outcomes = sweep.sweep(jobs, out, workers=2, show_progress=False)
    assert [outcome.status for outcome in outcomes] == ["failed", "failed", "done"]
    raised, killed, fine = (records.load(outcome.record) for outcome in outcomes)
    assert raised.error == "RuntimeError: no"
    assert killed.error is not None
    assert "signal 9" in killed.error
    assert fine.status == "done"
    assert outcomes[0].log is not None
    assert "said before it failed" in outcomes[0].log.read_text()
    again = sweep.sweep(jobs, out, workers=2, show_progress=False)
    assert [outcome.status for outcome in again] == ["failed", "failed", "skipped"]


def test_what_is_recorded_under_another_recipe_runs_again(tmp_path: Path) -> None:
    (job,) = sweep.plan(["synthetic_split"], ["finetune"], [0])
    (outcome,) = sweep.sweep([job], tmp_path, show_progress=False)
    old = records.load(outcome.record)
    old.model_copy(update={"task": old.task.model_copy(update={"hash": "another"})}).save(tmp_path)
    (again,) = sweep.sweep([job], tmp_path, show_progress=False)
    assert again.status == "done"
    assert records.load(again.record).task.hash == job.experiment.task.hash


def test_every_mistake_is_told_at_once_and_nothing_is_written(own: Path) -> None:
    bad = own / "bad.toml"
    bad.write_text(RECIPE.format(name="Nowhere") + "[settings]\nx = 1\n")
    with pytest.raises(UserError) as caught:
        sweep.plan(["synthetic_spilt", "synthetic_split"], ["ewcc", str(bad)], [0])
    lines = caught.value.lines
    assert len(lines) == 3
    assert "Did you mean 'synthetic_split'?" in lines[0]
    assert "Did you mean 'ewc'?" in lines[1]
    assert "Nowhere" in lines[2]
    assert not (own / "runs").exists()


def test_missing_data_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLBENCH_DATA", str(tmp_path / "empty"))
    with pytest.raises(UserError) as caught:
        sweep.plan(["split_mnist_task", "split_mnist_class"], ["finetune"], [0])
    assert len(caught.value.lines) == 1
    assert "clbench data prepare mnist" in caught.value.lines[0]
    assert "clbench data import mnist" in caught.value.lines[0]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        sweep.sweep(sweep.plan(["synthetic_split"], ["finetune"], [0]), file / "runs", show_progress=False)


def test_ctrl_c_saves_what_runs_had(own: Path) -> None:
    """The slow run has one task done when the sweep is interrupted: its record says so, its checkpoint is there."""
    command = [
        sys.executable, "-W", "ignore", "-m", "clbench.cli", "run", "--quiet", "--task", "synthetic_split",
        "--baseline", str(own / "slow.toml"), "--seeds", "1", "--out", str(own / "runs"),
    ]  # fmt: skip
    said = own / "stderr.txt"
    with said.open("w") as file:
        process = subprocess.Popen(command, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 240
    while not list((own / "runs").rglob("*.checkpoint")):
        assert time.monotonic() < deadline, "the first task never ended"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers hear it too
    assert process.wait(timeout=240) == 130
    assert "the same command goes on" in said.read_text()
    assert "Traceback" not in said.read_text()
    (record,) = records.load_all(own / "runs")[0]
    assert record.status == "interrupted"
    assert len(record.acc) == 1
