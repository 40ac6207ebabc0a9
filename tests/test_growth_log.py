"""The growth log: what a strategy says of its layers' sizes gets into the record, whole, also after an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from clbench import checkpoint, records
from clbench.books import ranges
from clbench.errors import UserError
from clbench.records import GrowthEvent, RunRecord
from clbench.runner import run
from clbench.strategies.base import Strategy
from record_factory import make_record
from strategy_factory import CPU, made, recipe, synthetic


class Grows(Strategy):
    """Says that its layer gets two units more with every task; a task is served by all that were there, but for one."""

    stores: ClassVar[tuple[str, ...]] = ("sizes",)

    def __init__(self, *, setup: Any, config: Any) -> None:
        super().__init__(setup=setup, config=config)
        self.sizes: list[int] = []

    def after_task(self, experience: Any) -> None:
        before = self.sizes[-1] if self.sizes else 0
        if before:
            self.log_growth("fc1", "reused", before - 1, born=self.tasks_seen - 1)
        self.log_growth("fc1", "added", 2)
        self.log_growth("fc1", "pruned", 0)
        self.sizes.append(before + 2)

    def widths(self) -> dict[str, int]:
        return {"fc1": self.sizes[-1]}

    def serving(self) -> list[dict[str, Tensor]]:
        width = self.sizes[-1]
        mask = torch.arange(width)
        return [{"fc1": (mask < size) & (mask != 1)} for size in self.sizes]


def grown(**changes: Any) -> RunRecord:
    return run(synthetic("task", n_tasks=3, iterations=5), recipe(f"{__name__}:Grows"), 0, **changes)


def test_the_record_holds_log_widths_and_the_units_of_every_task() -> None:
    """Widths 2, 4, 6; at the end unit 1 serves nobody, so the six units of task 3 are 0 and 2 to 5."""
    found = grown()
    assert found.growth == [
        GrowthEvent(after_task=0, layer="fc1", kind="added", units=2),
        GrowthEvent(after_task=1, layer="fc1", kind="reused", units=1, born=0),
        GrowthEvent(after_task=1, layer="fc1", kind="added", units=2),
        GrowthEvent(after_task=2, layer="fc1", kind="reused", units=3, born=1),
        GrowthEvent(after_task=2, layer="fc1", kind="added", units=2),
    ]
    assert found.widths == [{"fc1": 2}, {"fc1": 4}, {"fc1": 6}]
    assert found.units == [{"fc1": [(0, 1)]}, {"fc1": [(0, 1), (2, 4)]}, {"fc1": [(0, 1), (2, 6)]}]


def test_a_resumed_run_has_the_log_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def interrupt(done: int, _: int) -> None:
        raise KeyboardInterrupt

    for tasks in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            grown(out=tmp_path, progress=interrupt)
        partial = records.load(next(tmp_path.rglob("*.json")))
        assert len(partial.widths) == len(partial.units) == tasks
    assert grown(out=tmp_path).model_dump(exclude={"timing", "peaks"}) == grown().model_dump(
        exclude={"timing", "peaks"}
    )


def test_the_log_is_part_of_a_strategys_state_and_may_be_absent_from_an_old_one(tmp_path: Path) -> None:
    task = synthetic("task", n_tasks=2, iterations=5)
    strategy, stream = made(task, recipe(f"{__name__}:Grows"))
    strategy.train_task(stream.benchmark.train_stream[0])
    checkpoint.save(tmp_path / "state", strategy.state_dict())
    state: Mapping[str, Any] | None = checkpoint.load(tmp_path / "state", CPU)
    assert state is not None
    later, _ = made(task, recipe(f"{__name__}:Grows"))
    later.load_state_dict(state)
    assert later.growth == strategy.growth != []
    later.load_state_dict({key: value for key, value in state.items() if key != "growth"})
    assert later.growth == []


def test_a_net_that_keeps_its_size_says_nothing() -> None:
    found = run(synthetic("task", n_tasks=2, iterations=5), "finetune", 0)
    assert (found.growth, found.widths, found.units) == ([], [], [])


def test_a_negative_number_of_units_is_refused() -> None:
    strategy, _ = made(synthetic("task", n_tasks=2), "finetune")
    with pytest.raises(ValueError, match="fc1: -1 units added"):
        strategy.log_growth("fc1", "added", -1)
    assert strategy.growth == []


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([], []),
        ([0, 0], []),
        ([1, 1, 1], [(0, 3)]),
        ([1, 0, 1, 1, 0], [(0, 1), (2, 4)]),
        ([0, 1], [(1, 2)]),
    ],
)
def test_a_mask_becomes_half_open_ranges(mask: Sequence[int], expected: list[tuple[int, int]]) -> None:
    assert ranges(torch.tensor(mask, dtype=torch.bool)) == expected


def test_a_record_with_a_growth_log_survives_the_disk(tmp_path: Path) -> None:
    record = grown(out=tmp_path)
    assert records.load(record.path(tmp_path)) == record


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("widths", [{"fc1": 3}], "widths: 1 entries for 3 tasks"),
        ("units", [{"fc1": [[3, 3]]}], "units: a range"),
        ("units", [{"fc1": [[-1, 3]]}], "units: a range"),
        ("units", [{"fc1": [[1]]}], "units"),
    ],
)
def test_a_damaged_growth_log_is_named(tmp_path: Path, key: str, value: Any, says: str) -> None:
    path = make_record().save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=says):
        records.load(path)
