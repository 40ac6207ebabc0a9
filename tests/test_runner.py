"""One run: reproducible, independent of what ran before, resumable, and a record even when it fails."""

from __future__ import annotations

import json
import pickle
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench import books
from clbench.environment import choose_device
from clbench.errors import UserError
from clbench.nets import Trunk
from clbench.nets.shared.linked import LinkedLinear
from clbench.nets.shared.maps import Square
from clbench.process import reproducible
from clbench.recipes import load_baseline, load_task
from clbench.records import RunRecord, load
from clbench.runner import run
from clbench.specs import BaselineSpec, OwnModel
from clbench.strategies.base import Strategy
from strategy_factory import AVALANCHES, made, synthetic

SAME = {"timing", "peaks"}
"""What may differ between two runs of the same seed."""


def facts(record: RunRecord) -> dict[str, Any]:
    return record.model_dump(exclude=SAME)


def own(strategy: str, **settings: Any) -> BaselineSpec:
    return BaselineSpec.model_validate(
        {
            "schema": 1,
            "title": "x",
            "strategy": f"{__name__}:{strategy}",
            "family": "own",
            "paper": "none",
            "settings": settings,
            "name": strategy.lower(),
        }
    )


class Raises(Strategy):
    """Fails on its second task."""

    def before_task(self, experience: Any) -> None:
        if self.tasks_seen == 1:
            raise RuntimeError("the second task is too much\nand a second line")


class Diverges(Strategy):
    """Trains into NaN."""

    def extra_loss(self) -> Any:
        return self.model.head.task_parameters()[0][0].sum() * float("nan")


class Exhausts(Strategy):
    """Asks for more memory than there is."""

    def before_task(self, experience: Any) -> None:
        torch.empty(2**60)


class Stops(Strategy):
    """Is interrupted, as by Ctrl-C, on its third task; the switch lets a second try pass."""

    switched_on = True

    def before_task(self, experience: Any) -> None:
        if self.tasks_seen == 2 and Stops.switched_on:
            raise KeyboardInterrupt


def test_the_same_seed_gives_the_same_record() -> None:
    first = run("synthetic_split", "ewc", 3)
    run("synthetic_split", "er", 5)  # whatever ran in between leaves no trace
    torch.rand(7)
    assert facts(run("synthetic_split", "ewc", 3)) == facts(first)
    assert facts(run("synthetic_split", "ewc", 4))["acc"] != facts(first)["acc"]


def test_a_run_leaves_the_process_as_it_found_it() -> None:
    torch.set_num_threads(2)
    try:
        run("synthetic_split", "finetune", 0, threads=1)
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(1)


def test_a_record_says_what_was_run(tmp_path: Path) -> None:
    record = run("synthetic_split", "ewc", 0, overrides={"lam": 7, "train.lr": 0.02}, out=tmp_path)
    task = load_task("synthetic_split")
    assert record.task.hash == task.hash
    assert record.baseline.name == "ewc"
    assert record.baseline.label.startswith("ewc@")
    assert record.baseline.settings["lam"] == 7
    assert record.baseline.departures["train.lr"] == 0.02
    assert set(record.data) == {"synthetic"}
    assert len(record.acc) == len(record.footprints) == len(record.peaks) == task.stream.n_tasks
    assert all({"train", "evaluate"} <= set(seconds) for seconds in record.timing.seconds)
    assert load(record.path(tmp_path)) == record
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["seed0-cpu.json"]
    assert str(Path.home()) not in record.dumps()


@pytest.mark.parametrize(
    ("strategy", "says"), [("Raises", "second task is too much"), ("Diverges", "nan"), ("Exhausts", "memory")]
)
def test_a_run_that_fails_is_a_record_too(strategy: str, says: str, tmp_path: Path) -> None:
    record = run("synthetic_split", own(strategy), 0, out=tmp_path)
    assert record.status == "failed"
    assert record.error is not None
    assert says in record.error
    assert "\n" not in record.error
    assert record.traceback is not None
    assert record.error.partition(":")[0] in record.traceback
    assert load(record.path(tmp_path)) == record


def test_a_failed_run_keeps_the_rows_it_had() -> None:
    record = run("synthetic_split", own("Raises"), 0)
    assert len(record.acc) == 1
    with pytest.raises(ValueError, match="is failed"):
        _ = record.matrix


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks done, then Ctrl-C; the second call must train only the rest, and end as if nothing had happened."""
    trained: list[int] = []
    plain_train = Stops.train_task

    def counted(self: Stops, experience: Any) -> None:
        trained.append(self.tasks_seen)
        plain_train(self, experience)

    monkeypatch.setattr(Stops, "train_task", counted)
    with pytest.raises(KeyboardInterrupt):
        run("synthetic_split", own("Stops"), 0, out=tmp_path)
    partial = load(next(tmp_path.rglob("*.json")))
    assert partial.status == "interrupted"
    assert len(partial.acc) == 2
    monkeypatch.setattr(Stops, "switched_on", False)
    trained.clear()
    resumed = run("synthetic_split", own("Stops"), 0, out=tmp_path)
    assert trained == [2, 3]
    assert not list(tmp_path.rglob("*.checkpoint"))
    assert facts(resumed) == facts(run("synthetic_split", own("Stops"), 0))


def test_a_run_interrupted_again_at_once_loses_nothing_of_its_books(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tries end in task 3. Start, times, peaks and throughput are those of the first: nothing was added.

    40 steps of batches of 32 of 400 samples are three epochs and one batch, 1,232 samples; of two tasks, 2,464.
    """
    days = iter(range(1, 9))
    clock = type("Clock", (), {"now": staticmethod(lambda zone: datetime(2030, 1, next(days), tzinfo=zone))})
    monkeypatch.setattr(books, "datetime", clock)
    records = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run("synthetic_split", own("Stops"), 0, out=tmp_path)
        records.append(load(next(tmp_path.rglob("*.json"))))
    assert records[0] == records[1]
    timing = records[1].timing
    assert timing.started.startswith("2030-01-01")
    assert timing.train_samples_per_second is not None
    trained = sum(seconds["train"] for seconds in timing.seconds)
    assert timing.train_samples_per_second * trained == pytest.approx(2464)
    monkeypatch.setattr(Stops, "switched_on", False)
    assert run("synthetic_split", own("Stops"), 0, out=tmp_path).timing.started == timing.started


def test_a_checkpoint_of_another_recipe_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("synthetic_split", own("Stops"), 0, out=tmp_path)
    monkeypatch.setattr(Stops, "switched_on", False)
    task = load_task("synthetic_split")
    longer = task.model_copy(update={"train": task.train.model_copy(update={"lr": task.train.lr / 2})})
    assert facts(run(longer, own("Stops"), 0, out=tmp_path)) == facts(run(longer, own("Stops"), 0))


def test_a_damaged_checkpoint_means_starting_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("synthetic_split", own("Stops"), 0, out=tmp_path)
    path = next(tmp_path.rglob("*.checkpoint"))
    path.write_bytes(path.read_bytes()[:100])
    monkeypatch.setattr(Stops, "switched_on", False)
    assert run("synthetic_split", own("Stops"), 0, out=tmp_path).status == "done"


def test_the_first_net_does_not_depend_on_the_strategy() -> None:
    """Same seed, same birth: accuracies before training and the unit of size agree for every method."""
    records = [run("digits_split", name, 2) for name in ("finetune", "er", AVALANCHES)]
    assert len({json.dumps(record.acc_init) for record in records}) == 1
    assert len({record.single_task_parameters for record in records}) == 1


def test_devices_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="must be auto, cpu, cuda"):
        choose_device("gpu")
    with pytest.raises(UserError, match="CUDA devices here"):
        choose_device("cuda:99")


def test_a_model_that_does_not_fit_the_images_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="model"):
        run("digits_split", "finetune", 0, overrides={"model.kind": "zenke"})


def test_a_wrong_setting_stops_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lam"):
        run("synthetic_split", "ewc", 0, overrides={"lamb": 1}, out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("baseline", ["finetune", "ewc", "er", "lwf", "si", "gpm"])
def test_a_run_on_a_gpu_is_reproducible_and_measured(baseline: str) -> None:
    first, second = (run("synthetic_split", baseline, 0, device="cuda") for _ in range(2))
    assert first.status == "done", first.traceback
    assert facts(first) == facts(second)
    assert first.environment.device == "cuda"
    assert all(peak["train"].meter == "cuda" and peak["train"].allocated_bytes for peak in first.peaks)


def test_every_shipped_baseline_resolves_on_the_demo_streams() -> None:
    for task in ("digits_split", "digits_split_class", "digits_permuted"):
        assert load_task(task).stream.n_tasks >= 5
    assert load_baseline("ewc").family == "regularisation"


def test_numbers_too_small_for_a_normal_float_are_zero_while_a_run_on_one_thread_lasts() -> None:
    """The smallest normal float32 is 1.2e-38; 1e-36 / 1000 is denormal, and slow to reckon with."""
    small = torch.full((64,), 1e-36)

    def vanish() -> bool:
        return bool((small / 1000 == 0).all())

    assert not vanish()
    with reproducible(0, 2):  # the pool's threads would keep a mode of their own
        assert not vanish()
    with reproducible(0, 1):
        assert vanish()
        with reproducible(0, 1):
            assert vanish()
        assert vanish()
    assert not vanish()


class Borrowing(Trunk):
    """A trunk with a layer linked to one that is not in it."""

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__(input_shape)
        self.link = LinkedLinear(nn.Linear(prod(self.input_shape), 5), Square())
        self.out_features = 5

    def forward(self, x: Tensor) -> Tensor:
        """Return five features."""
        features: Tensor = self.link(x.flatten(1))
        return features


def test_a_users_net_with_a_link_to_a_layer_outside_of_it_is_refused_before_it_runs() -> None:
    """It would train nothing, count as nothing and not be saved."""
    task = load_task("synthetic_split")
    net = OwnModel(kind="own", factory=f"{__name__}:Borrowing")
    with pytest.raises(UserError, match=r"model: link 'trunk.link': its source, a Linear .* is outside the HeadedNet"):
        run(task.model_copy(update={"model": net}), "finetune", 0)


class Bare(Trunk):
    """A trunk without weights: a linear probe of the pixels."""

    def __init__(self, input_shape: Sequence[int]) -> None:
        super().__init__(input_shape)
        self.out_features = prod(self.input_shape)

    def forward(self, x: Tensor) -> Tensor:
        """Return the pixels."""
        return x.flatten(1)


@pytest.mark.parametrize("baseline", ["finetune", "ewc", "independent"])
def test_a_trunk_without_weights_trains_its_heads(baseline: str) -> None:
    """64 pixels, 2 outputs and 2 biases a head: nothing else is there to be trained when the optimiser is born."""
    task = load_task("synthetic_split")
    record = run(task.model_copy(update={"model": OwnModel(kind="own", factory=f"{__name__}:Bare")}), baseline, 0)
    assert record.error is None
    assert record.footprints[-1].parameters == len(record.acc) * (prod(made(task, "finetune")[1].input_shape) + 1) * 2
    assert record.matrix.diagonal().mean() > record.acc_init[0]


@pytest.mark.parametrize("baseline", ["cloned", "shared_trunk_half", "independent"])
def test_nets_pickle_and_answer_the_same(baseline: str) -> None:
    """Those that make nets later on, too."""
    learner, stream = made(synthetic(n_tasks=2), baseline)
    for experience in stream.benchmark.train_stream:
        learner.train_task(experience)
    twin = pickle.loads(pickle.dumps(learner.model))
    x, task = torch.rand(3, *stream.input_shape), torch.ones(3, dtype=torch.long)
    assert torch.equal(learner.model.eval()(x, task), twin.eval()(x, task))


CHURN = """
import resource, torch
from clbench.process import memory_kept

def faults_of(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        blocks = [torch.empty(2**19).fill_(1) for _ in range(8)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with memory_kept():
    faults_of(1)
    inside = faults_of(10)
print(inside, faults_of(1))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's")
def test_memory_that_a_step_frees_is_there_for_the_next_without_page_faults() -> None:
    """Ten times 8 blocks of 2 MiB, 4,096 pages: 40,960 faults where the system gets them back each time.

    On leaving it gets back what is free: the next 8 blocks are 4,096 faults.
    """
    done = subprocess.run([sys.executable, "-c", CHURN], capture_output=True, text=True, check=True)
    inside, afterwards = (int(count) for count in done.stdout.split())
    assert inside < 5_000
    assert afterwards > 3_000
