"""What makes two runs the same run: never lose a finished one, never mix two, never count one twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from clbench import records, sweep
from clbench.errors import UserError
from clbench.recipes import load_baseline, load_task, resolve
from clbench.report import select
from clbench.runner import run
from clbench.specs import BaselineSpec
from clbench.strategies.base import Strategy
from record_factory import make_record
from strategy_factory import recipe

CODE = """
from dataclasses import dataclass
from typing import Any
from clbench.strategies.base import Strategy

class Odd:
    pass

class Mine(Strategy):
    @dataclass(frozen=True, kw_only=True)
    class Config:
        lam: float = 1.0
        thing: Any = {thing}
"""

RECIPE = 'schema = 1\ntitle = "x"\nstrategy = "mine.py:Mine"\nfamily = "own"\npaper = "none"\n[settings]\nlam = {lam}\n'


def write(folder: Path, lam: float = 1.0, thing: str = "None", name: str = "mine") -> str:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "mine.py").write_text(CODE.format(thing=thing))
    (folder / f"{name}.toml").write_text(RECIPE.format(lam=lam))
    return str(folder / f"{name}.toml")


def test_an_edited_strategy_is_another_method(tmp_path: Path) -> None:
    recipe = write(tmp_path)
    task = load_task("synthetic_split")
    before = resolve(task, load_baseline(recipe)).hash
    assert resolve(task, load_baseline(recipe)).hash == before
    with (tmp_path / "mine.py").open("a") as file:
        file.write("# edited\n")
    assert resolve(task, load_baseline(recipe)).hash != before


def test_two_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", lam=0.1), write(tmp_path / "b", lam=1.0)
    with pytest.raises(UserError, match="records would mix"):
        sweep.plan(["synthetic_split"], [first, second], [0])


def test_a_shipped_name_cannot_be_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'ewc' is a shipped baseline"):
        sweep.plan(["synthetic_split"], [write(tmp_path, name="ewc")], [0])


def test_a_setting_that_no_record_can_hold_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no plain number"):
        sweep.plan(["synthetic_split"], [write(tmp_path, thing="Odd()"), "finetune"], [0])


def test_a_finished_run_of_another_recipe_is_moved_aside_not_overwritten(tmp_path: Path) -> None:
    old = make_record(task_hash="aaaaaaaaaaaa")
    path = old.save(tmp_path)
    make_record(task_hash="bbbbbbbbbbbb", status="interrupted").save(tmp_path)
    (aside,) = path.parent.glob("superseded/*.json")
    assert records.load(aside) == old
    found, problems = records.load_all(tmp_path)
    assert [record.task.hash for record in found] == ["bbbbbbbbbbbb"]
    assert not problems


def test_a_copied_record_is_not_counted_twice(tmp_path: Path) -> None:
    path = make_record().save(tmp_path)
    shutil.copy(path, path.with_name("seed0-cpu copy.json"))
    found, problems = records.load_all(tmp_path)
    assert len(found) == 1
    assert "a copy?" in problems[0]


def test_runs_on_other_data_are_not_averaged_together() -> None:
    usual, other = make_record(seed=0), make_record(seed=1).model_copy(update={"data": {"toy": "another"}})
    (task,) = select.arrange([usual, other])
    assert [len(group.runs) for group in task.blocks[0].groups] == [1, 1]
    assert "stand apart" in task.notes[0]


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("avalanche.training:LwF", {"alpha": 1.0, "temperature": 2.0}),
        ("avalanche.training:GEM", {"patterns_per_exp": 8, "memory_strength": 0.5}),
        ("avalanche.training:AGEM", {"patterns_per_exp": 8, "sample_size": 16}),
    ],
)
def test_heads_belong_to_their_tasks_in_avalanches_strategies_too(strategy: str, settings: dict[str, Any]) -> None:
    """The same net on the same stream: as many parameters per task and shared as fine-tuning has."""
    plain, theirs = (
        run("synthetic_split", baseline, 0).footprints[-1] for baseline in ("finetune", recipe(strategy, **settings))
    )
    assert plain.parameters_per_task > 0
    assert (theirs.parameters_per_task, theirs.parameters_shared) == (
        plain.parameters_per_task, plain.parameters_shared
    )  # fmt: skip


class Forgetful(Strategy):
    """Keeps a copy of the weights without saying so."""

    def after_task(self, experience: Any) -> None:
        self.kept = [weight.detach().clone() for weight in self.model.parameters()]

    def before_task(self, experience: Any) -> None:
        if self.tasks_seen == 2:
            raise KeyboardInterrupt


def test_undeclared_tensors_are_counted_and_make_no_checkpoint(tmp_path: Path) -> None:
    spec = BaselineSpec.model_validate(
        {"schema": 1, "title": "x", "strategy": f"{__name__}:Forgetful", "family": "own", "paper": "none", "name": "f"}
    )
    with pytest.raises(KeyboardInterrupt):
        run("synthetic_split", spec, 0, out=tmp_path)
    (record,) = records.load_all(tmp_path)[0]
    footprint = record.footprints[-1]
    assert footprint.auxiliary_bytes == {"kept": footprint.parameter_bytes}
    assert footprint.keep_learning_bytes == 2 * footprint.parameter_bytes
    assert not list(tmp_path.rglob("*.checkpoint"))


def test_a_run_leaves_every_generator_where_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run("synthetic_split", "er", 0)
    assert torch.equal(torch.rand(3), expected)
