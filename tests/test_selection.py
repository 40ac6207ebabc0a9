"""The stream on which settings are chosen: the first tasks as they are, and no way to a test sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from clbench import data
from clbench.errors import UserError
from clbench.loading import TensorTask
from clbench.recipes import find, load_baseline, load_task, resolve
from clbench.runner import run
from clbench.specs import PermutedStream, RotatedStream, Selection, SplitStream, StreamSpec, TaskSpec
from clbench.streams import Stream, make_stream
from clbench.tuning import on_validation
from data_factory import save, toy
from strategy_factory import CPU, synthetic

Spec = PermutedStream | RotatedStream | SplitStream

STREAMS: dict[str, dict[str, Any]] = {
    "permuted": {"kind": "permuted", "dataset": "digits", "n_tasks": 4},
    "permuted, sequential": {"kind": "permuted", "dataset": "digits", "n_tasks": 4, "permutations": "sequential"},
    "permuted, gpm": {"kind": "permuted", "dataset": "digits", "n_tasks": 4, "permutations": "gpm"},
    "rotated, bins": {"kind": "rotated", "dataset": "digits", "n_tasks": 4, "angles": "bins"},
    "rotated, increasing": {"kind": "rotated", "dataset": "digits", "n_tasks": 4, "angles": "increasing"},
    "split": {
        "kind": "split", "parts": [{"dataset": "digits", "n_tasks": 4, "classes_per_task": 2, "order": "shuffled"}]
    },
    "split, two parts": {
        "kind": "split",
        "parts": [
            {"dataset": "digits", "n_tasks": 2, "classes_per_task": 3},
            {"dataset": "synthetic", "n_tasks": 2, "classes_per_task": 2},
        ],
    },
}  # fmt: skip


def spec(name: str, **changes: Any) -> Spec:
    adapter: TypeAdapter[Spec] = TypeAdapter(StreamSpec)
    return adapter.validate_python({"scenario": "class", **STREAMS[name], **changes})


def made(stream: Spec | Selection, seed: int = 3, root: Path | None = None) -> Stream:
    return make_stream(stream, seed, CPU, root)


def inputs(task: TensorTask) -> torch.Tensor:
    return task.inputs(torch.arange(len(task)))


# ------------------------------------------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("name", STREAMS)
def test_it_is_the_first_tasks_with_a_tenth_of_their_training_samples_in_place_of_the_test(name: str) -> None:
    """Same permutations, angles, classes and labels as the whole stream's; every training sample is in one of both."""
    whole, part = made(spec(name)), made(Selection(of=spec(name), n_tasks=2, share=0.1))
    assert (part.n_tasks, part.outputs, part.validation) == (2, whole.outputs[:2], [])
    for number, (train, held_out) in enumerate(zip(part.train, part.test, strict=True)):
        everything = whole.train[number]
        assert len(held_out) == round(0.1 * len(everything))
        rows = torch.cat([train.rows, held_out.rows])
        assert rows.sort().values.tolist() == everything.rows.sort().values.tolist()
        back = rows.argsort()
        assert torch.equal(torch.cat([inputs(train), inputs(held_out)])[back], inputs(everything))
        assert torch.equal(torch.cat([train.labels, held_out.labels])[back], everything.labels)


def test_samples_that_the_recipe_sets_aside_are_the_ones_held_out() -> None:
    """Then training is the whole stream's to the sample, and may look at these as it does there."""
    own = spec("split", validation=0.2)
    whole, part = made(own), made(Selection(of=own, n_tasks=3, share=0.9))
    for number in range(3):
        assert torch.equal(part.train[number].rows, whole.train[number].rows)
        assert torch.equal(part.test[number].rows, whole.validation[number].rows)
        assert torch.equal(part.validation[number].rows, whole.validation[number].rows)
        assert part.benchmark.train_stream[number].validation is part.validation[number]


def test_limits_on_training_samples_hold_and_limits_on_test_samples_have_nothing_to_hold() -> None:
    own = spec("split", train_samples_per_task=50, test_samples_per_task=20)
    part = made(Selection(of=own, n_tasks=1, share=0.25))
    whole = made(spec("split"))
    assert len(part.train[0]) == 50
    assert len(part.test[0]) == round(0.25 * len(whole.train[0]))
    assert not set(part.train[0].rows.tolist()) & set(part.test[0].rows.tolist())


def test_a_share_of_no_sample_is_refused() -> None:
    with pytest.raises(UserError, match=r"share held out: 0\.001 of the \d+ samples of task 0 is none"):
        made(Selection(of=spec("split"), n_tasks=1, share=0.001))


def test_seeds_hold_out_different_samples_and_one_seed_the_same() -> None:
    chosen = [made(Selection(of=spec("permuted"), n_tasks=1, share=0.1), seed).test[0].rows for seed in (1, 1, 2)]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


# ------------------------------------------------------------------------------------------------- no way to the test


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_an_embedded_data_set_comes_without_its_test_samples(name: str) -> None:
    found, whole = data.load(name, test=False), data.load(name)
    assert found.x_test.shape == (0, *whole.x_test.shape[1:])
    assert found.y_test.shape == (0,)
    assert torch.equal(found.x_train, whole.x_train)
    assert found.fingerprint == whole.fingerprint


def own_task() -> TaskSpec:
    """Return three tasks of two classes from the data set 'toy', which lies in a cache."""
    task = synthetic("class", n_tasks=3, iterations=5)
    assert isinstance(task.stream, SplitStream)
    part = task.stream.parts[0].model_copy(update={"dataset": "toy"})
    return task.model_copy(update={"stream": task.stream.model_copy(update={"parts": [part]}), "name": "toys"})


def cache(folder: Path) -> Path:
    data.import_npz("toy", save(folder / "toy.npz", toy(n_classes=6, per_class=40)), folder / "cache")
    return folder / "cache"


def facts(task: TaskSpec, root: Path) -> dict[str, Any]:
    record = run(task, "er", 0, data_root=root)
    assert record.status == "done", record.traceback
    return record.model_dump(exclude={"timing", "peaks"})


@pytest.mark.parametrize("poison", ["other samples", "no array at all", "gone", "a folder"])
def test_whatever_the_test_files_hold_a_selection_is_the_same(poison: str, tmp_path: Path) -> None:
    """Test images and labels are exchanged, destroyed or taken away: every number of the run stays.

    The fingerprint, which covers all four arrays, is a line of text beside them. A run of the task itself notices.
    """
    root, task = cache(tmp_path), own_task()
    selection = on_validation(task, "first-2", 0.2)
    before, whole = facts(selection, root), facts(task, root)
    for key in ("x_test", "y_test"):
        file = root / "toy" / f"{key}.npy"
        if poison == "other samples":
            array = np.load(file)
            np.save(file, array[::-1] ^ 1)
        elif poison == "no array at all":
            file.write_bytes(b"poison")
        else:
            file.unlink()
            if poison == "a folder":
                file.mkdir()
    assert facts(selection, root) == before
    if poison == "other samples":
        assert facts(task, root)["acc"] != whole["acc"]
    else:
        with pytest.raises(UserError, match="damaged data set"):
            run(task, "er", 0, data_root=root)


def test_the_test_files_are_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, opened = cache(tmp_path), list[str]()
    read = np.load

    def watched(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(file).name)
        return read(file, *args, **kwargs)

    monkeypatch.setattr(np, "load", watched)
    facts(on_validation(own_task(), "oracle"), root)
    assert set(opened) == {"x_train.npy", "y_train.npy"}


def test_a_test_sample_asked_for_all_the_same_is_not_there(tmp_path: Path) -> None:
    """The data set under a selection has no row that a strategy or a stream could index."""
    found = data.load("toy", cache(tmp_path), test=False)
    with pytest.raises(IndexError):
        found.x_test[0]


# -------------------------------------------------------------------------------------------------------- the protocol


def test_a_selection_is_another_protocol_with_another_hash_and_name() -> None:
    """So that its records are never taken, or averaged, for runs of the task itself."""
    task = load_task("digits_split")
    specs = [task, *(on_validation(task, name) for name in ("first-task", "first-2", "oracle"))]
    specs.append(on_validation(task, "first-2", 0.2))
    assert len({one.hash for one in specs}) == 5
    assert [one.name for one in specs[1:4]] == [f"digits_split@{name}" for name in ("first-task", "first-2", "oracle")]
    assert specs[2].title.endswith("validation data of the first 2 of 5 tasks")
    assert specs[3].title.endswith("validation data of all tasks")
    assert [one.stream.n_tasks for one in specs[1:4]] == [1, 2, 5]
    assert {one.stream.scenario for one in specs} == {"task"}


def test_a_selections_record_says_so() -> None:
    record = run(on_validation(synthetic(n_tasks=3, iterations=5), "first-2"), "finetune", 0)
    assert (record.task.name, record.task.n_tasks) == ("synthetic_split@first-2", 2)
    assert np.shape(record.acc) == (2, 2)
    assert json.loads(record.dumps())["task"]["title"].endswith("validation data of the first 2 of 3 tasks")


def test_no_recipe_can_be_a_selection(tmp_path: Path) -> None:
    """A file that would pass validation data off as a test is refused."""
    text = find("task", "digits_split").read_text().replace('kind = "split"', 'kind = "selection"')
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match="'selection' is none of 'permuted', 'rotated', 'split'"):
        load_task(str(tmp_path / "mine.toml"))


def test_the_task_itself_is_left_as_it_was() -> None:
    task = load_task("digits_split")
    before = task.hash
    on_validation(task, "first-2")
    assert task.hash == before
    assert resolve(task, load_baseline("er")).settings["buffer"] == 100
