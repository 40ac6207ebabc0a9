"""Choosing hyper-parameters: how a grid is said, which point is chosen, and what is told of the choice."""

from __future__ import annotations

import csv
import io
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from clbench import sweep
from clbench.errors import UserError
from clbench.records import RunRecord
from clbench.report.tuning import Outcome, outcome
from clbench.tuning import Study, parse_grid, studies, tasks_of
from record_factory import make_record
from strategy_factory import synthetic

RECIPE = """
schema = 1
title = "EWC of mine"
extends = "ewc"

[tune]
lam = [1.0, 10.0]
train.lr = [0.1, 0.01]

[on.digits_split]
origin = "ours: by hand"
fisher_samples = 5

[on.digits_split.tune]
lam = [2.0, 3.0, 4.0]
"""


def study(*grid: str, protocol: str = "first-2", seeds: Sequence[int] = (0, 1), **more: Any) -> Study:
    (found,) = studies(["digits_split"], ["ewc"], protocol, seeds, grid=grid, **more)
    return found


def refusal(*grid: str, **more: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        sweep.plan_studies([study(*grid, **more)])
    return caught.value.lines


def mine(folder: Path, text: str = RECIPE) -> str:
    (folder / "mine.toml").write_text(text)
    return str(folder / "mine.toml")


# -------------------------------------------------------------------------------------------------------------- grids


def test_a_grid_is_every_combination_the_last_keys_value_changing_fastest() -> None:
    found = study("lam=1,10,100", "train.lr=0.1,0.01")
    assert [tuple(point.values()) for point in found.points] == [
        (1, 0.1), (1, 0.01), (10, 0.1), (10, 0.01), (100, 0.1), (100, 0.01)
    ]  # fmt: skip
    assert [one.settings["lam"] for one in found.experiments] == [1, 1, 10, 10, 100, 100]
    assert [one.train.lr for one in found.experiments] == [0.1, 0.01] * 3
    assert len({one.label for one in found.experiments}) == 6


def test_values_are_read_as_toml_and_else_as_text() -> None:
    """Lists within a list, words with and without quotes, numbers, true and false."""
    assert parse_grid(["a=1,2.5,1e-3", "b=exact,sampled", 'c="x,y","z"', "d=true,false", "e=[64],[64, 32]", "f=7"]) == {
        "a": [1, 2.5, 1e-3], "b": ["exact", "sampled"], "c": ["x,y", "z"], "d": [True, False],
        "e": [[64], [64, 32]], "f": [7],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (["lam"], "must be key=a,b,c"),
        (["lam="], "must be key=a,b,c"),
        (["=1,2"], "must be key=a,b,c"),
        (["lam=1,10", "lam=3"], "lam has a list already"),
        (["lam=1,1.0"], "says a value twice"),
        (["fisher=exact,,sampled"], "nothing between two commas"),
    ],
)
def test_a_grid_that_is_none_is_refused(word: list[str], says: str) -> None:
    with pytest.raises(UserError, match=f"--grid {word[-1]}: .*{says}".replace("[", r"\[")):
        parse_grid(word)


def test_a_recipe_says_a_grid_for_every_task_and_another_for_one(tmp_path: Path) -> None:
    """The task's own takes the place of the general one as a whole; the command line's of both."""
    file = mine(tmp_path)
    given = studies(["digits_split", "digits_permuted"], [file], "first-2", [0])
    assert [one.grid for one in given] == [{"lam": [2.0, 3.0, 4.0]}, {"lam": [1.0, 10.0], "train.lr": [0.1, 0.01]}]
    assert [one.origin for one in given] == [f"{file}: [on.digits_split.tune]", f"{file}: [tune]"]
    (spoken,) = studies(["digits_split"], [file], "first-2", [0], grid=["gamma=0.5,1.0"])
    assert (spoken.grid, spoken.origin) == ({"gamma": [0.5, 1.0]}, "--grid")


def test_a_recipe_without_a_grid_is_told_the_three_ways_to_give_one() -> None:
    with pytest.raises(UserError, match=r"finetune.toml: no \[tune\] nor \[on.digits_split.tune\] .* or give --grid"):
        studies(["digits_split"], ["finetune"], "first-2", [0])


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("lam = 3.0", "'tune.lam': should be a list of values to try, such as [1.0, 10.0] (got 3.0)"),
        ("lam = []", "'tune.lam': should be a list of values to try"),
        ("lam = [1.0, 1]", "'tune.lam': says a value twice"),
        ("train.lr = 0.1", "'tune.train': 'lr' should be a list of values to try"),
        ("fisher.kind = [1, 2]", "'tune.fisher': should be one list of values; only train and model are tables"),
        ("lamb = [1.0]", "[tune]: baseline 'mine' on task 'digits_permuted@first-2': EWC has no setting 'lamb'."),
        ("lamb = [1.0]", "Did you mean 'lam'?"),
        ("lam = [1.0, -1.0]", "[tune]: baseline 'mine' on task 'digits_permuted@first-2': setting 'lam': input should"),
        ("train.lrr = [0.1]", "[tune]: unknown key 'train.lrr'. Did you mean 'lr'?"),
        ("stream.pad = [1, 2]", "'tune.stream': should be one list of values; only train and model are tables"),
    ],
)
def test_a_mistake_in_a_recipes_grid_names_file_key_and_the_right_one(written: str, says: str, tmp_path: Path) -> None:
    file = mine(tmp_path, RECIPE.replace("lam = [1.0, 10.0]\ntrain.lr = [0.1, 0.01]", written))
    with pytest.raises(UserError) as caught:
        sweep.plan_studies(studies(["digits_permuted"], [file], "first-2", [0]))
    (line,) = caught.value.lines
    assert line.startswith(f"{file}: ")
    assert says in line


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (["lamb=1,2"], "--grid: baseline 'ewc' on task 'digits_split@first-2': EWC has no setting 'lamb'. Did you"),
        (["lam=1,strong"], "--grid: baseline 'ewc' on task 'digits_split@first-2': setting 'lam':"),
        (["train.lrr=1"], "--grid: unknown key 'train.lrr'. Did you mean 'lr'?"),
        (["train.lr=0.1,-1"], "--grid: 'train.lr': should be greater than 0 (got -1)"),
        (["stream.pad=1,2"], "--grid: stream.pad: only train.<key>, model.<key>, seeds.<source> or a setting"),
    ],
)
def test_a_mistake_in_a_grid_that_is_spoken_is_told_as_one_of_the_grid(grid: list[str], says: str) -> None:
    (line,) = refusal(*grid)
    assert says in line


def test_a_key_cannot_be_fixed_and_varied() -> None:
    assert refusal("lam=1,2", fixed={"lam": 3}) == (
        "--set lam: the grid has this key too (--grid); a value cannot be fixed and varied",
    )


def test_a_fixed_setting_holds_at_every_point_and_a_wrong_one_is_not_the_grids() -> None:
    found = study("lam=1,2", fixed={"train.epochs": 3})
    assert [one.train.epochs for one in found.experiments] == [3, 3]
    assert refusal("lam=1,2", fixed={"train.epoch": 3})[0].startswith("--set: unknown key 'train.epoch'")


def test_a_recipes_settings_for_the_task_hold_in_a_study() -> None:
    """ER keeps 100 samples on digits_split, 200 elsewhere: the study's other name must not lose that."""
    (found,) = studies(["digits_split"], ["er"], "first-2", [0], grid=["replay_batch_size=8,16"])
    assert [one.settings["buffer"] for one in found.experiments] == [100, 100]
    assert {one.origin for one in found.experiments} == {"a point of a grid, first-2, validation data: clbench tune"}
    assert not any(one.published for one in found.experiments)


def test_mistakes_of_several_recipes_are_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        studies(["digits_splt"], ["ewk", "er"], "first-2", [0], grid=["lam=1"])
    assert len(caught.value.lines) == 2


# ----------------------------------------------------------------------------------------------------------- protocols


def test_protocols_by_what_they_see() -> None:
    task = synthetic(n_tasks=4)
    names = ("first-task", "first-1", "first-3", "oracle")
    assert [tasks_of(name, task) for name in names] == [1, 1, 3, 4]


@pytest.mark.parametrize(
    ("protocol", "says"),
    [
        ("first-4", "has 4 tasks; seeing all of them is called oracle"),
        ("first-40", "has 4 tasks"),
        ("first-0", "one of first-task, first-<k>"),
        ("first-k", "one of first-task, first-<k>"),
        ("orakle", "Did you mean 'oracle'?"),
        ("", "one of first-task"),
    ],
)
def test_a_protocol_that_is_none_is_refused(protocol: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        tasks_of(protocol, synthetic(n_tasks=4))


def test_a_share_is_for_tasks_that_set_none_aside() -> None:
    assert study("lam=1,2").share == 0.1
    assert study("lam=1,2", share=0.3).share == 0.3
    (found,) = studies(["permuted_mnist_wsn"], ["ewc"], "first-2", [0], grid=["lam=1,2"])
    assert (found.share, found.own_validation) == (0.1, True)
    with pytest.raises(UserError, match=r"--validation 0.3: task 'permuted_mnist_wsn' sets 0.1 .* aside itself"):
        studies(["permuted_mnist_wsn"], ["ewc"], "first-2", [0], grid=["lam=1,2"], share=0.3)


def test_runs_are_planned_seed_by_seed() -> None:
    """A study that is stopped half-way has whole seeds of every point, not every seed of half the points."""
    jobs = sweep.plan_studies([study("lam=1,2", seeds=(7, 8, 7))])
    assert [(job.seed, job.experiment.settings["lam"]) for job in jobs] == [(7, 1), (7, 2), (8, 1), (8, 2)]


# ---------------------------------------------------------------------------------------------------------- the choice


def results(asked: Study, *values: Sequence[float | str | None]) -> Outcome:
    """Return the outcome where point i has final accuracy values[i][s] on both tasks in its run s.

    A text is the error of a run that failed.
    """
    records: list[RunRecord] = []
    for experiment, row in zip(asked.experiments, values, strict=True):
        for seed, value in zip(asked.seeds, row, strict=True):
            if value is None:
                continue
            failed = isinstance(value, str)
            records.append(
                make_record(
                    experiment.task.name, "ewc", seed, label=experiment.label, n_tasks=2,
                    acc=[] if isinstance(value, str) else [[1.0, 0.5], [value, value]],
                    status="failed" if failed else "done", error=value if isinstance(value, str) else None,
                )
            )  # fmt: skip
    return outcome(asked, records)


def notes(found: Outcome) -> str:
    return "\n".join(found.notes())


def test_the_best_mean_is_chosen() -> None:
    """Means 0.6, 0.75, 0.7."""
    found = results(study("lam=1,10,100"), (0.5, 0.7), (0.7, 0.8), (0.7, 0.7))
    assert found.chosen is not None
    assert found.chosen.settings == {"lam": 10}
    assert [row[-1] for row in found.table().sections[0].rows] == ["", "chosen", ""]
    assert "value tried" not in notes(found)


def test_average_incremental_accuracy_can_be_chosen_by() -> None:
    """Point 1 ends at 0.6 but stood at 0.9 after the first task, (0.9 + 0.6) / 2; point 2 at (0.7 + 0.65) / 2."""
    asked = study("lam=1,10", seeds=(0,))
    records = [
        make_record(experiment.task.name, "ewc", 0, label=experiment.label, acc=[[first, 0.5], [last, last]])
        for experiment, first, last in zip(asked.experiments, (0.9, 0.7), (0.6, 0.65), strict=True)
    ]
    for metric, lam in (("average_accuracy", 10), ("average_incremental_accuracy", 1)):
        chosen = outcome(asked, records, metric).chosen
        assert chosen is not None
        assert chosen.settings == {"lam": lam}
    with pytest.raises(UserError, match=r"unknown metric to choose by 'forgetting.chaudhry2018'"):
        outcome(asked, records, "forgetting.chaudhry2018")


def test_a_point_of_which_a_run_failed_is_left_out_however_good_the_others_were() -> None:
    found = results(study("lam=1,10"), (0.5, 0.6), (0.99, "FloatingPointError: the training loss is nan"))
    assert found.chosen is not None
    assert found.chosen.settings == {"lam": 1}
    assert found.table().sections[0].rows[1][-1] == "left out: 1 of 2 runs failed"
    assert "lam = 10: left out: 1 of 2 runs failed: FloatingPointError: the training loss is nan" in notes(found)


def test_where_every_point_failed_nothing_is_chosen() -> None:
    found = results(study("lam=1,10"), ("out of memory", 0.9), ("no", "no"))
    assert found.chosen is None
    assert notes(found).endswith("no point can be chosen: every one has a run that failed")
    assert "origin" not in found.console() + found.markdown()


def test_of_points_that_tie_the_first_of_the_grid_is_taken_and_it_is_said() -> None:
    found = results(study("lam=100,1,10"), (0.7, 0.8), (0.8, 0.7), (0.5, 0.5))
    assert found.chosen is not None
    assert found.chosen.settings == {"lam": 100}
    assert "2 of 3 points tie: the first of them is taken" in notes(found)
    one_task = results(study("lam=1,10", protocol="first-task"), (0.7, 0.8), (0.7, 0.8))
    assert "one task tells nothing of what holds on to earlier ones" in notes(one_task)


def test_a_choice_at_the_edge_of_its_list_asks_for_a_wider_one() -> None:
    found = results(study("lam=1,10,100"), (0.5, 0.5), (0.6, 0.6), (0.7, 0.7))
    assert "lam = 100 is the largest value tried" in notes(found)
    found = results(study("lam=1,10,100"), (0.9, 0.9), (0.6, 0.6), (0.7, 0.7))
    assert "lam = 1 is the smallest value tried" in notes(found)
    words = results(study("fisher=exact,sampled"), (0.9, 0.9), (0.6, 0.6))
    assert "value tried" not in notes(words)


def test_points_that_the_seeds_do_not_set_apart_are_counted() -> None:
    """Chosen: 0.7 and 0.8, mean 0.75, interval 0.75 +- 12.7 * 0.0707 / sqrt 2 = 0.64, down to 0.11. One seed: none."""
    found = results(study("lam=1,10,100"), (0.1, 0.1), (0.7, 0.8), (0.7, 0.7))
    assert "1 more within the interval of the chosen one" in notes(found)
    alone = results(study("lam=1,10", seeds=(0,)), (0.1,), (0.7,))
    assert "one seed: no interval" in notes(alone)


def test_runs_that_are_missing_or_interrupted_leave_the_choice_open() -> None:
    with pytest.raises(UserError, match="lam = 10: 1 of 2 runs are not done; the same command goes on"):
        results(study("lam=1,10"), (0.5, 0.6), (0.7, None))


# ------------------------------------------------------------------------------------------------------------ in words


def test_what_a_recipe_is_to_say_is_toml_with_protocol_data_grid_seeds_and_command() -> None:
    found = results(study("lam=1,10", "fisher=exact,sampled"), (0.5, 0.5), (0.9, 0.9), (0.6, 0.6), (0.7, 0.7))
    section = tomllib.loads(found.recipe())["on"]["digits_split"]
    assert section["lam"] == 1
    assert section["fisher"] == "sampled"
    assert section["origin"] == (
        "ours: selected by the first 2 tasks, on validation data (10 % of each task's training samples, as the task "
        'sets none aside), grid lam 1, 10; fisher "exact", "sampled", seeds 0, 1, average_accuracy; clbench tune '
        '--task digits_split --baseline ewc --grid lam=1,10 --grid \'fisher="exact","sampled"\' --protocol first-2 '
        "--seeds 0,1 --validation 0.1"
    )


def test_an_oracle_is_called_one_wherever_the_choice_is_told() -> None:
    found = results(study("lam=1,10", protocol="oracle"), (0.5, 0.5), (0.9, 0.9))
    assert "ORACLE: the choice sees every task of the stream" in found.markdown()
    assert "all 5 tasks (oracle)" in found.console()
    assert "selected by all 5 tasks (oracle)" in found.origin()
    assert "ORACLE" not in results(study("lam=1,10"), (0.5, 0.5), (0.9, 0.9)).markdown()


def test_the_caption_says_which_data_and_that_no_test_sample_was_read() -> None:
    text = results(study("lam=1,10"), (0.5, 0.5), (0.9, 0.9)).markdown()
    assert "Protocol first-2: 2 of 5 tasks. Validation data: 10 % of each task's training samples" in text
    assert "No test sample was read." in text


def test_what_was_fixed_is_told_and_not_recommended() -> None:
    found = results(study("lam=1,10", fixed={"train.epochs": 2}), (0.5, 0.5), (0.9, 0.9))
    assert "train" not in tomllib.loads(found.recipe())["on"]["digits_split"]
    assert found.recipe().endswith("# at every point: train.epochs = 2")
    assert "--set train.epochs=2" in found.origin()
    assert "At every point: train.epochs = 2." in found.markdown()


def test_the_csv_has_a_row_a_point_in_full() -> None:
    """0.5 and 0.6: mean 0.55, half width 12.7062 * 0.0707107 / sqrt 2 = 0.635310."""
    found = results(study("lam=1,10"), (0.5, 0.6), (0.9, "no"))
    first, second = csv.DictReader(io.StringIO(found.csv()))
    assert {key: first[key] for key in ("task", "protocol", "tasks_seen", "n_tasks", "baseline", "lam", "chosen")} == {
        "task": "digits_split", "protocol": "first-2", "tasks_seen": "2", "n_tasks": "5", "baseline": "ewc",
        "lam": "1", "chosen": "1",
    }  # fmt: skip
    assert float(first["average_accuracy.mean"]) == pytest.approx(0.55)
    assert float(first["average_accuracy.high"]) == pytest.approx(0.55 + 0.635310, abs=1e-5)
    assert (second["failed"], second["average_accuracy.n"], second["chosen"]) == ("1", "1", "0")
