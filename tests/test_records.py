"""Records: one file a run, written whole or not at all, read with one clear line when damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from clbench import records
from clbench.errors import UserError
from record_factory import make_record


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    record = make_record()
    path = record.save(tmp_path)
    assert path == records.record_path(
        tmp_path, record.task.name, record.baseline.label, record.seed, record.environment.device
    )
    assert records.load(path) == record
    assert path.read_text() == record.dumps()


def test_identical_records_are_identical_bytes() -> None:
    """Keys come in the order of the schema, not of construction."""
    record = make_record()
    shuffled = dict(reversed(record.model_dump().items()))
    assert records.RunRecord.model_validate(shuffled).dumps() == record.dumps()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b.json"
    records.write_atomic(path, "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        records.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["b.json"]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "damaged record"),
        (lambda text: "[]", "not a JSON object"),
        (lambda text: text.replace('"schema_number": 1', '"schema_number": 99'), "schema_number is 99"),
        (lambda text: text.replace('"seed": 0', '"seed": "zero"'), "seed"),
        (lambda text: text.replace('"status": "done"', '"status": "perfect"'), "status"),
        (lambda text: text.replace('"total_seconds": ', '"total_seconds": Infinity, "x": '), "Infinity is no number"),
        (lambda text: "", "damaged record"),
        (lambda text: _with_acc(text, lambda acc: acc[:-1]), "rows for"),
        (lambda text: _with_acc(text, lambda acc: [row[:-1] for row in acc]), "columns"),
        (lambda text: _with_acc(text, lambda acc: [[1.5, *acc[0][1:]], *acc[1:]]), r"outside \[0, 1\]"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_named_and_hides_no_other(tmp_path: Path, damage: object, says: str) -> None:
    make_record(seed=1).save(tmp_path)
    path = make_record(seed=0).save(tmp_path)
    assert callable(damage)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=says) as caught:
        records.load(path)
    assert str(path) in str(caught.value)
    good, problems = records.load_all(tmp_path)
    assert [record.seed for record in good] == [1]
    assert len(problems) == 1
    assert str(path) in problems[0]


def _with_acc(text: str, change: object) -> str:
    raw = json.loads(text)
    assert callable(change)
    raw["acc"] = change(raw["acc"])
    return json.dumps(raw)


def test_numbers_that_json_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        make_record(acc=[[float("nan")]]).dumps()


def test_only_a_finished_run_has_a_matrix() -> None:
    assert make_record().matrix.shape == (make_record().task.n_tasks,) * 2
    with pytest.raises(ValueError, match="is failed"):
        _ = make_record(status="failed").matrix


def shared(**changes: object) -> records.Sharing:
    """Two tasks with 6 elements in common and 2 of their own each: 6 * 2 / (2 * 6 + 4) = 0.75."""
    facts: dict[str, object] = {
        "parameters_used": 10, "unused": 0, "shared_by_all": 6, "shared_by_some": 0, "private": 4,
        "shared_by_all_bytes": 24, "shared_by_some_bytes": 0, "private_bytes": 16, "reuse_ratio": 1.6,
        "in_common": 0.75,
        "tasks": [
            {"task": 0, "parameters": 8, "marginal_parameters": 8, "marginal_bytes": 32},
            {"task": 1, "parameters": 8, "marginal_parameters": 2, "marginal_bytes": 8},
        ],
        "map": [{"name": "fc1.weight", "elements": 6, "layers": ["fc1", "fc1"], "shares": [1.0, 1.0]}],
    }  # fmt: skip
    return records.Sharing.model_validate(facts | changes)


def test_what_tasks_share_survives_the_disk_and_is_no_key_of_older_records(tmp_path: Path) -> None:
    assert '"sharing"' not in make_record().dumps()
    record = make_record().model_copy(update={"sharing": shared()})
    assert records.load(record.save(tmp_path)) == record


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"private": 5}, "shared and private are not what is used"),
        ({"in_common": 1.5}, r"in_common outside \[0, 1\]"),
        ({"map": [{"name": "x", "elements": 1, "layers": [], "shares": [1.0]}]}, "has not 2 shares"),
    ],
)
def test_numbers_of_sharing_that_cannot_be_are_damage(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    path = make_record().model_copy(update={"sharing": shared(**changes)}).save(tmp_path)
    with pytest.raises(UserError, match=says):
        records.load(path)
