"""Recipes: what ships loads and resolves, mistakes are named one line each, hashes mean the protocol."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from clbench import recipes
from clbench.errors import UserError
from clbench.recipes import load_baseline, load_task, names, resolve, shipped
from clbench.report.measures import MEASURES
from clbench.spec import content_hash
from clbench.specs import BaselineSpec, LeNetModel, TaskSpec, datasets_of

TASK = """
schema = 1
version = 1
title = "t"
source = "s"

[stream]
kind = "split"
scenario = "class"

[[stream.parts]]
dataset = "digits"
n_tasks = 5
classes_per_task = 2
order = "fixed"

[model]
kind = "mlp"
hidden = [64]

[train]
epochs = 2
batch_size = 32
optimizer = "sgd"
lr = 0.5
"""

BASELINE = """
schema = 1
title = "b"
strategy = "m:C"
family = "f"
paper = "p"

[settings]
lam = 1.0
mode = "separate"

[on.digits_split]
origin = "paper: p"
lam = 2.0

[[on.digits_split.published]]
metric = "average_accuracy"
value = 0.9
where = "Table 1"
verified = "V-text"
"""


def write(folder: Path, text: str, name: str = "mine") -> str:
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def mistakes(path: str, kind: recipes.Kind = "task") -> list[str]:
    """Return the lines a recipe is refused with, without the file's name in front."""
    with pytest.raises(UserError) as caught:
        load_task(path) if kind == "task" else load_baseline(path)
    assert all(line.startswith(f"{path}: ") for line in caught.value.lines)
    return [line.removeprefix(f"{path}: ") for line in caught.value.lines]


@pytest.fixture(scope="module")
def tasks() -> dict[str, TaskSpec]:
    return {name: load_task(name) for name in names("task")}


@pytest.fixture(scope="module")
def baselines() -> dict[str, BaselineSpec]:
    return {name: load_baseline(name) for name in names("baseline")}


# ------------------------------------------------------------------------------------------------------- what ships


def test_every_shipped_baseline_resolves_on_every_shipped_task(
    tasks: dict[str, TaskSpec], baselines: dict[str, BaselineSpec]
) -> None:
    for task in tasks.values():
        for baseline in baselines.values():
            experiment = resolve(task, baseline)
            assert experiment.label == baseline.name
            assert experiment.origin


def test_a_key_that_changes_nothing_is_no_part_of_a_hash(tasks: dict[str, TaskSpec]) -> None:
    """An MLP's initialisation came later than records of MLPs: where it is PyTorch's, their hash is what it was."""
    plain, drawn = tasks["digits_split"], tasks["rotated_mnist_gem"]
    assert "init" not in plain.model.model_dump(mode="json")
    assert drawn.model.model_dump(mode="json")["init"] == "xavier"


def test_no_two_shipped_tasks_are_the_same_protocol(tasks: dict[str, TaskSpec]) -> None:
    assert len({task.hash for task in tasks.values()}) == len(tasks)


def test_settings_for_a_task_name_a_shipped_task_and_say_where_they_come_from(
    tasks: dict[str, TaskSpec], baselines: dict[str, BaselineSpec]
) -> None:
    for baseline in baselines.values():
        for name, on in baseline.on.items():
            assert name in tasks, f"{baseline.name}: [on.{name}]"
            assert re.match(r"(paper|authors' code|ours): ", on.origin), f"{baseline.name}: [on.{name}]: {on.origin}"


def test_published_rows_name_a_metric_that_was_read_somewhere(baselines: dict[str, BaselineSpec]) -> None:
    rows = [row for baseline in baselines.values() for on in baseline.on.values() for row in on.published]
    assert len(rows) > 90
    for row in rows:
        assert row.metric in MEASURES
        assert row.verified.startswith("V-")
        assert row.where
        assert -1 <= row.value <= 1, "fractions, not percent"
        assert row.spread is None or row.spread < 0.1


def test_every_task_says_how_to_run_it(tasks: dict[str, TaskSpec]) -> None:
    for task in tasks.values():
        text = (shipped("task") / f"{task.name}.toml").read_text(encoding="utf-8")
        head = [line for line in text.splitlines() if line.startswith("#")]
        run = next(line for line in head if line.startswith("# Run:"))
        words = run.split("clbench run ")[1].split()
        assert words[:2] == ["--task", task.name]
        named = words[words.index("--baseline") + 1 : words.index("--seeds")]
        assert set(named) <= set(names("baseline"))


def test_datasets_are_known_by_their_names(tasks: dict[str, TaskSpec]) -> None:
    used = {name for task in tasks.values() for name in datasets_of(task.stream)}
    assert used == {"mnist", "cifar10", "cifar100", "digits", "synthetic"}


@pytest.mark.parametrize(("kind", "load"), [("task", load_task), ("baseline", load_baseline)])
def test_the_readme_example_of_every_key_loads(kind: recipes.Kind, load: Any, tmp_path: Path) -> None:
    readme = (shipped(kind) / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", readme, flags=re.S)
    load(write(tmp_path, example))


@pytest.mark.parametrize("kind", ["task", "baseline"])
def test_the_readme_names_every_shipped_recipe(kind: recipes.Kind) -> None:
    readme = (shipped(kind) / "README.md").read_text(encoding="utf-8")
    quoted = set(re.findall(r"`(\w+)`", readme))
    short = {f"permuted_mnist_vandeven{name}" for name in quoted if name.startswith("_")}
    split = {name for name in names(kind) if name not in quoted | short}
    assert not split


# ------------------------------------------------------------------------------------------------------------ lookup


def test_recipes_are_found_in_a_checkout_and_in_an_installed_wheel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A wheel has no tasks/ beside the package but a copy inside it; a stranger's tasks/ beside it is not ours."""
    assert shipped("task") == Path(recipes.__file__).resolve().parent.parent / "tasks"
    package = tmp_path / "site-packages" / "clbench"
    shutil.copytree(shipped("task"), package / "_recipes" / "tasks")
    (tmp_path / "site-packages" / "tasks").mkdir()
    monkeypatch.setattr(recipes, "__file__", str(package / "recipes.py"))
    assert shipped("task") == package / "_recipes" / "tasks"
    assert load_task("digits_split").name == "digits_split"


def test_an_unknown_name_brings_the_nearest_and_all_others() -> None:
    with pytest.raises(UserError, match=r"unknown task 'digit_split'\. Did you mean 'digits_split'\? Known: .*synth"):
        load_task("digit_split")
    with pytest.raises(UserError, match=r"unknown baseline 'ewcc'\. Did you mean 'ewc'\?"):
        load_baseline("ewcc")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"\./nowhere\.toml: no such task recipe file"):
        load_task("./nowhere.toml")


def test_a_file_is_named_after_its_stem_and_cannot_name_itself(tmp_path: Path) -> None:
    assert load_task(write(tmp_path, TASK, "own")).name == "own"
    assert mistakes(write(tmp_path, 'name = "x"\n' + TASK))[0].startswith("unknown key 'name'.")


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_three_mistakes_are_three_lines_with_the_nearest_right_answers(tmp_path: Path) -> None:
    text = TASK.replace("classes_per_task", "clases_per_task").replace('"sgd"', '"sdg"').replace("0.5", "-0.5")
    known = "Known here: by, classes_per_task, dataset, n_tasks, order, order_seed"
    assert sorted(mistakes(write(tmp_path, text))) == [
        "'train.lr': should be greater than 0 (got -0.5)",
        "'train.optimizer': should be 'sgd', 'adam' or 'adamw' (got 'sdg'). Did you mean 'sgd'?",
        f"unknown key 'stream.parts.0.clases_per_task'. Did you mean 'classes_per_task'? {known}",
    ]


KINDS = "'mlp', 'normed_mlp', 'zenke', 'lenet', 'resnet18', 'resnet32', 'own'"


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            '"split"',
            '"spilt"',
            "'stream.kind': 'spilt' is none of 'permuted', 'rotated', 'split'. Did you mean 'split'?",
        ),
        ('kind = "mlp"\n', "", f"'model.kind' is missing; it is one of {KINDS}"),
        (
            '"class"',
            '"clas"',
            "'stream.scenario': should be 'task', 'domain' or 'class' (got 'clas'). Did you mean 'class'?",
        ),
        (
            '"fixed"',
            '"fxed"',
            "'stream.parts.0.order': should be 'fixed' or 'shuffled' (got 'fxed'). Did you mean 'fixed'?",
        ),
        ("[64]", "[0]", "'model.hidden.0': should be greater than 0 (got 0)"),
        ("epochs = 2", "epochs = true", "'train.epochs': should be a valid integer (got True)"),
        ("epochs = 2", 'epochs = "2"', "'train.epochs': should be a valid integer (got '2')"),
        ("lr = 0.5", "lr = inf", "'train.lr': should be a finite number (got inf)"),
        ("epochs = 2", "epochs = 2\niterations = 9", "'train': give exactly one of epochs and iterations"),
        ('source = "s"', "", "'source' is missing"),
        ("schema = 1", "schema = 2", "'schema': should be 1 (got 2)"),
    ],
)
def test_a_mistake_in_a_task_is_one_line(old: str, new: str, line: str, tmp_path: Path) -> None:
    assert mistakes(write(tmp_path, TASK.replace(old, new))) == [line]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            'value = 0.9\nwhere = "Table 1"\nverified = "V-text"',
            'value = 0.9\nwhere = "Table 1"\nverified = "memory"',
            "'on.digits_split.published.0.verified': should be 'V-repo', 'V-text', 'V-cite', 'V-issue' or 'V-calc' "
            "(got 'memory')",
        ),
        (
            "value = 0.9",
            "value = 0.9\nspread = 0.1",
            "'on.digits_split.published.0': spread and spread_kind go together",
        ),
        (
            "value = 0.9",
            "value = 0.9\nspread = 0.1\nspread_kind = 'sem'",
            "'on.digits_split.published.0': a spread needs n, the number of runs behind it, 2 or more",
        ),
        (
            "value = 0.9",
            "value = 0.9\nmargin = 0\nmargin_reason = 'r'",
            "'on.digits_split.published.0.margin': should be greater than 0 (got 0)",
        ),
        (
            "value = 0.9",
            "value = 0.9\nmargin = 0.1",
            "'on.digits_split.published.0': margin and margin_reason go together",
        ),
        (
            "value = 0.9",
            "value = 0.9\nsource = 'Van de Ven 2018'",
            "'on.digits_split.published.0': source is a short name in small letters, such as vandeven2018",
        ),
        ('origin = "paper: p"', "", "'on.digits_split.origin' is missing"),
        ("[settings]", "[on.x]\norigin = 'ours: x'\ntrain = 3\n[settings]", "'on.x.train': should be a table (got 3)"),
        ("[settings]", "settings = 3\n[x]", "'settings': should be a table (got 3)"),
    ],
)
def test_a_mistake_in_a_baseline_is_one_line(old: str, new: str, line: str, tmp_path: Path) -> None:
    assert line in mistakes(write(tmp_path, BASELINE.replace(old, new)), "baseline")


def test_a_misspelt_key_is_one_line_and_not_also_missing(tmp_path: Path) -> None:
    (line,) = mistakes(write(tmp_path, BASELINE.replace("family", "famly")), "baseline")
    assert line.startswith("unknown key 'famly'. Did you mean 'family'? Known here: extends, family, note, on, ")


def test_a_file_that_is_not_toml_is_named_with_the_place(tmp_path: Path) -> None:
    (line,) = mistakes(write(tmp_path, "title = \n"))
    assert line.startswith("not valid TOML (Invalid value (at line 1")


# ------------------------------------------------------------------------------------------------------------- extends


def test_extends_merges_key_by_key_and_leaves_published_rows_behind(tmp_path: Path) -> None:
    """The parent's lam stays, the child's mode goes over its own; the published row is the parent's alone."""
    write(tmp_path, BASELINE, "parent")
    child = 'extends = "parent"\ntitle = "c"\n[settings]\nmode = "online"\n[on.digits_split]\ntrain = { lr = 0.1 }\n'
    loaded = load_baseline(write(tmp_path, child))
    assert (loaded.title, loaded.strategy) == ("c", "m:C")
    assert loaded.settings == {"lam": 1.0, "mode": "online"}
    on = loaded.on["digits_split"]
    assert (on.settings, on.train, on.published) == ({"lam": 2.0}, {"lr": 0.1}, [])
    assert load_baseline(str(tmp_path / "parent.toml")).on["digits_split"].published


def test_a_variants_own_published_rows_stay(tmp_path: Path) -> None:
    write(tmp_path, BASELINE, "parent")
    row = '[[on.digits_split.published]]\nmetric = "bwt.gem"\nvalue = -0.1\nwhere = "w"\nverified = "V-cite"\n'
    (kept,) = load_baseline(write(tmp_path, 'extends = "parent"\n' + row)).on["digits_split"].published
    assert kept.metric == "bwt.gem"


def test_extends_in_a_circle_is_refused_with_the_circle(tmp_path: Path) -> None:
    write(tmp_path, 'extends = "b"\n', "a")
    write(tmp_path, 'extends = "a"\n', "b")
    with pytest.raises(UserError, match=r"circle \(a -> b -> a\)"):
        load_baseline(str(tmp_path / "a.toml"))


def test_extending_nothing_known_names_file_and_key(tmp_path: Path) -> None:
    (line,) = mistakes(write(tmp_path, 'extends = "ewcc"\n'), "baseline")
    assert line.startswith("'extends': unknown baseline 'ewcc'. Did you mean 'ewc'?")


# -------------------------------------------------------------------------------------------------------------- hashes


def test_a_key_that_came_later_counts_only_where_it_says_something_else() -> None:
    net = load_task("split_cifar100_superclass").model
    assert isinstance(net, LeNetModel)
    assert "response_norm" not in net.model_dump(mode="json")
    assert net.model_copy(update={"response_norm": False}).model_dump(mode="json")["response_norm"] is False
    assert load_task("split_cifar100_superclass").hash == "8fd045f5f4ae"  # of records made before the key


def test_a_hash_depends_on_the_content_alone() -> None:
    assert content_hash({"a": 400, "b": [1.0, "x"]}) == content_hash({"b": (1, "x"), "a": 400.0})
    assert content_hash({"a": 400}) != content_hash({"a": 400.5})
    assert content_hash({"a": True}) != content_hash({"a": "True"})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('scenario = "class"', 'scenario = "task"'),
        ('scenario = "class"', 'scenario = "class"\npad = 2'),
        ('scenario = "class"', 'scenario = "class"\nnormalise = "dataset"'),
        ('scenario = "class"', 'scenario = "class"\naugment = "crop_flip"'),
        ('scenario = "class"', 'scenario = "class"\ntrain_samples_per_task = 10'),
        ('scenario = "class"', 'scenario = "class"\ntest_samples_per_task = 10'),
        ('scenario = "class"', 'scenario = "class"\nvalidation = 0.1'),
        ('scenario = "class"', 'scenario = "class"\nvalidation_from = "first"'),
        ("digits", "mnist"),
        ("n_tasks = 5", "n_tasks = 4"),
        ("per_task = 2", "per_task = 1"),
        ('order = "fixed"', 'order = "shuffled"'),
        ('order = "fixed"', 'order = "fixed"\norder_seed = 1'),
        ("[64]", "[65]"),
        ("[64]", "[64]\nbias = false"),
        ("[64]", "[64]\ndropout = 0.5"),
        ("[64]", '[64]\nclass_head = "fixed"'),
        ("epochs = 2", "iterations = 2"),
        ("epochs = 2", "epochs = 3"),
        ("= 32", "= 31"),
        ('"sgd"', '"adam"'),
        ("0.5", "0.4"),
        ("lr = 0.5", "lr = 0.5\nmomentum = 0.9"),
        ("lr = 0.5", "lr = 0.5\nbetas = [0.5, 0.999]"),
        ("lr = 0.5", "lr = 0.5\nweight_decay = 0.1"),
        ("lr = 0.5", "lr = 0.5\nreset_optimizer = false"),
        ("lr = 0.5", "lr = 0.5\ngrad_clip = 1.0"),
        ("lr = 0.5", 'lr = 0.5\nschedule = { kind = "step", milestones = [1], gamma = 0.1 }'),
        ("version = 1", "version = 2"),
    ],
)
def test_the_hash_of_a_task_changes_with_everything_that_changes_numbers(old: str, new: str, tmp_path: Path) -> None:
    assert old in TASK
    assert load_task(write(tmp_path, TASK)).hash != load_task(write(tmp_path, TASK.replace(old, new), "other")).hash


def test_the_hash_of_a_task_does_not_change_with_words_or_spelt_out_defaults(tmp_path: Path) -> None:
    same = TASK.replace('"t"', '"other words"').replace('"s"', '"elsewhere"')
    same = same.replace("version = 1", 'version = 1\nnote = "n"')
    same = same.replace("[train]", "[train]\nmomentum = 0").replace("[64]", "[64]\nbias = true")
    assert load_task(write(tmp_path, TASK)).hash == load_task(write(tmp_path, same, "renamed")).hash


# ---------------------------------------------------------------------------------------------------------- resolving


def test_settings_on_a_task_go_over_the_general_ones_and_departures_are_listed(tmp_path: Path) -> None:
    text = BASELINE.replace("lam = 2.0", "lam = 2.0\ntrain = { lr = 0.1 }\nmodel = { hidden = [8] }")
    baseline = load_baseline(write(tmp_path, text))
    here, elsewhere = (resolve(load_task(name), baseline) for name in ("digits_split", "digits_permuted"))
    assert here.settings == {"lam": 2.0, "mode": "separate"}
    assert here.departures == {"train.lr": 0.1, "model.hidden": [8]}
    assert (here.origin, len(here.published)) == ("paper: p", 1)
    assert (elsewhere.settings["lam"], elsewhere.departures, elsewhere.published) == (1.0, {}, ())
    assert elsewhere.origin.startswith("ours: ")


def test_overrides_by_hand_change_label_hash_and_lose_the_published_rows(tmp_path: Path) -> None:
    task, baseline = load_task("digits_split"), load_baseline(write(tmp_path, BASELINE))
    plain = resolve(task, baseline)
    by_hand = resolve(task, baseline, {"lam": 3.0, "train.iterations": 7, "model.hidden": [9]})
    assert re.fullmatch(r"mine@[0-9a-f]{8}", by_hand.label)
    assert by_hand.label == resolve(task, baseline, {"train.iterations": 7, "model.hidden": [9], "lam": 3}).label
    assert (by_hand.settings["lam"], by_hand.train.iterations, by_hand.train.epochs) == (3.0, 7, None)
    assert plain.published
    assert not by_hand.published
    assert by_hand.hash != plain.hash


def test_another_kind_of_net_starts_from_its_own_defaults() -> None:
    experiment = resolve(load_task("digits_split"), load_baseline("finetune"), {"model.kind": "lenet"})
    assert experiment.model.model_dump()["hidden"] == (800, 500)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"train.lrr": 1}, "--set: unknown key 'train.lrr'. Did you mean 'lr'? Known here: batch_size, "),
        ({"model.hidden": []}, "--set: 'model.hidden': list should have at least 1 item"),
        ({"model.kind": "mpl"}, f"--set: 'model.kind': 'mpl' is none of {KINDS}. Did you mean 'mlp'?"),
        ({"stream.pad": 2}, "--set stream.pad: only train.<key>, model.<key>, seeds.<source> or a setting"),
    ],
)
def test_a_wrong_override_is_told_as_the_command_lines(overrides: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(load_task("digits_split"), load_baseline("finetune"), overrides)
    assert str(caught.value).startswith(line)


def test_a_wrong_change_to_the_budget_names_the_baselines_file_and_section(tmp_path: Path) -> None:
    path = write(tmp_path, BASELINE.replace("lam = 2.0", "train = { lrr = 0.1, epochs = 0 }"))
    with pytest.raises(UserError) as caught:
        resolve(load_task("digits_split"), load_baseline(path))
    first, second = sorted(caught.value.lines)
    assert first == f"{path}: 'on.digits_split.train.epochs': should be greater than 0 (got 0)"
    assert second.startswith(f"{path}: unknown key 'on.digits_split.train.lrr'. Did you mean 'lr'?")
