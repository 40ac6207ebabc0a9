"""`clbench import`: what other tools wrote comes out as their matrix, is scored by our definitions, and stays apart.

The files in `foreign_results` are made by hand in each tool's format. T=5 is the matrix of the metrics' own tests; T=3
is one whose old tasks all improve, where libraries disagree: forgetting is
    Chaudhry, FACIL    mean(max(.70, .75) - .82, .72 - .80)        = mean(-.07, -.08) = -0.075
    Mammoth, PyCIL     the last row is in the maximum, so           0
    Avalanche          mean(.70 - .82, .72 - .80)                  = -0.10
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from clbench import cli, records
from clbench.errors import UserError
from clbench.importing.formats import FORMATS
from clbench.importing.record import Result, import_files
from clbench.report import build, console
from clbench.report.measures import MEASURES
from clbench.report.select import select
from record_factory import make_record

FILES = Path(__file__).parent / "foreign_results"
T3 = [[0.70, None, None], [0.75, 0.72, None], [0.82, 0.80, 0.90]]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return recipe_of(tmp_path, 3)


def recipe_of(folder: Path, n_tasks: int, scenario: str = "task") -> Path:
    """Write a task recipe of `n_tasks` tasks."""
    path = folder / f"own_{n_tasks}.toml"
    path.write_text(
        f'schema = 1\nversion = 1\ntitle = "Own"\nsource = "ours"\n[stream]\nkind = "permuted"\ndataset = "synthetic"\n'
        f'scenario = "{scenario}"\nn_tasks = {n_tasks}\n[model]\nkind = "mlp"\nhidden = [4]\n'
        '[train]\nepochs = 1\nbatch_size = 8\noptimizer = "sgd"\nlr = 0.1\n'
    )
    return path


def take(file: Path, recipe: Path, **kwargs: object) -> list[Result]:
    keywords: dict[str, object] = {"label": "ewc", "runs": recipe.parent / "runs", **kwargs}
    return import_files([file], task=str(recipe), **keywords)  # type: ignore[arg-type]


def notes_of(result: Result) -> str:
    assert result.record.imported is not None
    return "\n".join(result.record.imported.notes)


def written(folder: Path, text: str, name: str = "a.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def scores(record: records.RunRecord) -> dict[str, float]:
    return {name: float(MEASURES[name].of(record) or 0.0) for name in ("forgetting.chaudhry2018", "bwt.gem", "fwt.gem")}


# ------------------------------------------------------------------------------------------------------------- formats


def test_a_plain_csv_of_fractions_is_the_matrix_it_shows(tmp_path: Path) -> None:
    (found,) = take(FILES / "plain.csv", recipe_of(tmp_path, 5))
    expected = np.loadtxt(FILES / "plain.csv", delimiter=",")
    assert np.array_equal(found.record.matrix, expected)
    assert found.record.imported is not None
    assert found.record.imported.scale == "fraction"
    assert scores(found.record)["forgetting.chaudhry2018"] == pytest.approx(0.34)
    assert scores(found.record)["bwt.gem"] == pytest.approx(-0.3325)


def test_names_percent_and_a_missing_upper_triangle_are_understood(tmp_path: Path) -> None:
    """The same lower triangle in percent: the same scores; its own 33.25 is first minus last, Avalanche's."""
    (found,) = take(FILES / "named.csv", recipe_of(tmp_path, 5))
    expected = np.tril(np.loadtxt(FILES / "plain.csv", delimiter=","))
    assert np.allclose(np.nan_to_num(found.record.matrix), expected, rtol=0, atol=1e-15)
    assert found.record.imported is not None
    assert found.record.imported.scale == "percent"
    assert "its own forgetting 33.25 % is forgetting.first_minus_last" in notes_of(found)
    assert "forward transfer is unknown" in notes_of(found)


def test_forward_transfer_without_an_upper_triangle_is_unknown_and_not_wrong(tmp_path: Path) -> None:
    (lower,) = take(FILES / "named.csv", recipe_of(tmp_path, 5))
    for name in ("fwt.gem", "fwt.diaz_rodriguez2018"):
        assert math.isnan(MEASURES[name].of(lower.record) or 0.0)
        assert MEASURES[name].over([lower.record]) is None


@pytest.mark.parametrize(
    ("file", "tool"),
    [("facil/acc_taw-2026-01-31-12-00.txt", "FACIL"), ("logs.pyd", "Mammoth"), ("acc.csv", "clarena")],
)
def test_the_files_of_tools_are_recognised_and_read(recipe: Path, file: str, tool: str) -> None:
    found = take(FILES / file, recipe)[0].record
    assert found.imported is not None
    assert (found.imported.tool, found.imported.file) == (tool, Path(file).name)
    shown = [[None if math.isnan(value) else value for value in row] for row in found.acc]
    for row, expected in zip(shown, T3, strict=True):
        assert row == pytest.approx(expected)
    assert scores(found)["forgetting.chaudhry2018"] == pytest.approx(-0.075)
    assert scores(found)["bwt.gem"] == pytest.approx(0.10)


def test_mammoths_file_holds_a_run_a_line(recipe: Path) -> None:
    """The second run, numpy's own way of writing numbers: forgetting mean(80 - 50, 70 - 65) = 17.5 by all accounts."""
    first, second = take(FILES / "logs.pyd", recipe, seed=4)
    assert [first.record.seed, second.record.seed] == [4, 5]
    assert scores(second.record)["forgetting.chaudhry2018"] == pytest.approx(0.175)
    assert "its own forgetting 17.50 % is ours" in notes_of(second)


def test_forgetting_clipped_at_zero_is_told(recipe: Path) -> None:
    (first, _) = take(FILES / "logs.pyd", recipe)
    said = notes_of(first)
    assert "its own forgetting 0.00 % is forgetting.max_with_last (never negative" in said
    assert "forgetting.chaudhry2018 is -7.50 %" in said
    assert "its own backward_transfer 10.00 % is ours (bwt.gem)" in said
    assert "all entries above the diagonal are 0" in said


def test_facils_own_forgetting_beside_it_is_ours(recipe: Path) -> None:
    (found,) = take(FILES / "facil" / "acc_taw-2026-01-31-12-00.txt", recipe)
    assert "its own forgetting -7.50 % is ours (forgetting.chaudhry2018)" in notes_of(found)


def test_facils_file_of_the_other_scenario_is_remarked(tmp_path: Path) -> None:
    (found,) = take(FILES / "facil" / "acc_taw-2026-01-31-12-00.txt", recipe_of(tmp_path, 3, "domain"))
    assert "acc_taw knows a sample's task, the task here is domain-incremental" in notes_of(found)


def test_a_score_that_is_none_of_ours_is_told(tmp_path: Path) -> None:
    """The package continuum 1.2.7 gives 0.205 on this matrix."""
    path = written(tmp_path, "# forgetting: 0.205\n" + (FILES / "plain.csv").read_text())
    (found,) = take(path, recipe_of(tmp_path, 5))
    assert "its own forgetting 20.50 % is none of ours: forgetting.chaudhry2018 34.00 %" in notes_of(found)


# --------------------------------------------------------------------------------------------- names sorted as strings


def test_past_100_classes_pycils_tasks_come_in_the_order_of_the_stream(tmp_path: Path) -> None:
    """12 tasks x 10 classes; task j (from 0) is learned at 90 - 2 j % and loses 4 points a task: F = mean 4 (11 - j).

    That is 24 %. With names sorted as text ("100-109" before "20-29") the tool's own formula gives 23.45.
    """
    (found,) = take(FILES / "pycil.log", recipe_of(tmp_path, 12))
    expected = [[(90 - 2 * j - 4 * (i - j)) / 100 for j in range(i + 1)] for i in range(12)]
    for row, right in zip(found.record.acc, expected, strict=True):
        assert row[: len(right)] == pytest.approx(right)
    assert scores(found.record)["forgetting.chaudhry2018"] == pytest.approx(0.24)
    assert "names sorted as text, which mixes up its columns; forgetting.chaudhry2018 is 24.00 %" in notes_of(found)


def test_columns_sorted_as_text_are_put_in_order(tmp_path: Path) -> None:
    names = [f"{10 * task:02d}-{10 * task + 9:02d}" for task in range(12)]
    acc = np.arange(144).reshape(12, 12) / 200
    order = sorted(range(12), key=lambda task: names[task])
    assert order != list(range(12))
    lines = [",".join(names[task] for task in order)]
    lines += [",".join(str(acc[i, task]) for task in order) for i in range(12)]
    (found,) = take(written(tmp_path, "\n".join(lines)), recipe_of(tmp_path, 12))
    assert np.array_equal(found.record.matrix, acc)
    assert "put in the order of the stream, as numbers and not as text" in notes_of(found)


def test_rows_sorted_as_text_are_put_in_order(tmp_path: Path) -> None:
    acc = np.arange(144).reshape(12, 12) / 200
    order = sorted(range(12), key=lambda task: f"task{task + 1}")
    lines = [",".join([f"task{i + 1}", *map(str, acc[i])]) for i in order]
    (found,) = take(written(tmp_path, "\n".join(lines)), recipe_of(tmp_path, 12))
    assert np.array_equal(found.record.matrix, acc)


def test_a_folder_in_place_of_a_file_is_told_what_to_give(recipe: Path) -> None:
    with pytest.raises(UserError, match="a folder; give a file of it, such as FACIL's"):
        take(recipe.parent, recipe)


def test_clarenas_rows_and_columns_may_come_in_any_order(recipe: Path) -> None:
    text = (
        "after_training_task,average_accuracy,test_on_task_2,test_on_task_1,test_on_task_3\n"
        "3,0.84,0.80,0.82,0.90\n1,0.7,,0.70,\n2,0.735,0.72,0.75,\n"
    )
    (found,) = take(written(recipe.parent, text, "acc.csv"), recipe)
    known = [value for row in found.record.acc for value in row if not math.isnan(value)]
    assert known == [0.7, 0.75, 0.72, 0.82, 0.8, 0.9]
    assert found.record.imported is not None
    assert found.record.imported.told == {"average accuracy": 0.84}


# -------------------------------------------------------------------------------------------------------- other shapes


def test_a_row_before_training_gives_forward_transfer(recipe: Path) -> None:
    """FWT = mean(a[1,2] - b[2], a[2,3] - b[3]) = mean(.30 - .25, .40 - .15) = 0.15."""
    text = "init,.2,.25,.15\n1,.7,.3,.1\n2,.6,.7,.4\n3,.5,.6,.7\n"
    (found,) = take(written(recipe.parent, text), recipe)
    assert found.record.acc_init == [0.2, 0.25, 0.15]
    assert scores(found.record)["fwt.gem"] == pytest.approx(0.15)


def test_a_ragged_lower_triangle_and_percent_signs_are_a_matrix(recipe: Path) -> None:
    (found,) = take(written(recipe.parent, "70%\n60% 72%\n0.5% 60% 80%\n"), recipe)
    assert found.record.acc[2] == pytest.approx([0.005, 0.6, 0.8])


def test_scale_can_be_said(recipe: Path) -> None:
    """0.9 % right, as nobody would guess."""
    (found,) = take(written(recipe.parent, ".9\n.8 .7\n.6 .5 .4"), recipe, scale="percent")
    assert found.record.acc[0][0] == pytest.approx(0.009)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a.csv: is empty"),
        (".7,.1,.1\n.6,.7,.1\n", "a.csv:2: 2 rows of accuracies, the task has 3 tasks"),
        (".7,.1,.1\n.6,.7\n.5,.6\n", "a.csv:3: 2 accuracies after task 3; there must be 3"),
        (".7,.1,.1,.2\n.6,.7,.1,.2\n.5,.6,.7,.2", "a.csv:1: 4 accuracies after task 1; there must be 1"),
        ("70,10,10\n60,.7,10\n50,60,70\n", "a.csv:2: mixed, 0.7 on a task just learned beside 70 (line 1)"),
        ("70%,1%,1%\n60%,70,1%\n5%,6%,7%\n", "a.csv:2: mixed, 70 has no percent sign"),
        ("70,10,10\n60,107,10\n50,60,70\n", "a.csv:2: 107 lies outside 0 to 100 (percent)"),
        (".7,.1,.1\n.6,.7,.1\n-.5,.6,.7\n", "a.csv:3: -0.5 lies outside 0 to 1 (fraction)"),
        (".7,.1,.1\n,.7,.1\n.5,.6,.7\n", "a.csv:2: no accuracy on task 1 after task 2"),
        (".7,.1,.1\n.6,x7,.1\n.5,.6,.7\n", "a.csv:2: 'x7' is no number"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_with_its_line(recipe: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        take(written(recipe.parent, text), recipe)
    assert len(caught.value.lines) == 1
    assert says in caught.value.lines[0]
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("forg_taw-1.txt", "0\t0\t0\n", "holds forg, not the accuracy of every task; give acc_taw-*.txt"),
        ("acc_tag-1.txt", ".7\t0\t0\n.6\t.7\t0\n0\t0\t0\n", "acc_tag-1.txt:3: a row of zeros: the run had not come"),
        ("logs.pyd", "{'accmean_task1': 7.0}\n", "logs.pyd:1: means over tasks alone"),
        ("logs.pyd", "{'accuracy_1_task1': 7.0, 'accuracy_2_task2': 7.0}\n", "logs.pyd:1: accuracies after task 2"),
        ("acc.csv", "after_training_task,average_accuracy\n1,.5\n", "acc.csv:1: no columns"),
        ("acc.csv", "after_training_task,test_on_task_1\n1,.5\n1,.5\n", "acc.csv:3: a second row after task 1"),
    ],
)
def test_what_is_wrong_with_a_tools_file_is_one_line(recipe: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(UserError, match=r".") as caught:
        take(written(recipe.parent, text, name), recipe)
    assert says in caught.value.lines[0]


def test_every_format_refuses_a_file_of_none(recipe: Path) -> None:
    for name in FORMATS:
        with pytest.raises(UserError):
            take(written(recipe.parent, "no accuracies in here\n", "x.txt"), recipe, format_name=name)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            ".7,.1,.1\n.6,.7,.1\n.5,.6,.7\n",
            "taken as fractions, none is above 1 (the largest is 0.7); else: --scale percent",
        ),
        ("70,.1,.1\n60,70,.1\n.5,60,70\n", "taken as percent, 70 (line 1) is no fraction"),
        ("70%,1%,1%\n60%,70%,1%\n5%,6%,7%\n", ""),
    ],
)
def test_a_guessed_scale_is_told(recipe: Path, text: str, says: str) -> None:
    file = written(recipe.parent, text)
    (found,) = take(file, recipe)
    assert found.assumed == says
    assert take(file, recipe, scale="percent", label="said")[0].assumed == ""


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "1,0,0\n1,1,0\n1,1,1\n", "a.csv: only 0 and 1: percent or fractions? Say which by --scale"),
        (
            "logs.pyd",
            "{'accuracy_1_task1': 0.9, 'accuracy_1_task2': 0.8, 'accuracy_2_task2': 0.9, 'accuracy_1_task3': 0.7, "
            "'accuracy_2_task3': 0.7, 'accuracy_3_task3': 0.9, 'forgetting': 12.5}\n",
            "no accuracy above 0.9, but its own forgetting is 12.5: percent or fractions? Say which by --scale",
        ),
    ],
)
def test_numbers_of_either_scale_are_refused_until_it_is_said(recipe: Path, name: str, text: str, says: str) -> None:
    """A net that learned nothing is right on 1 % of 100 classes: percent, and no matrix of perfect accuracies."""
    file = written(recipe.parent, text, name)
    with pytest.raises(UserError) as caught:
        take(file, recipe)
    (line,) = caught.value.lines
    assert says in line
    for scale, by in (("percent", 100), ("fraction", 1)) if name == "a.csv" else (("percent", 100),):
        (found,) = take(file, recipe, scale=scale, label=scale)
        assert found.record.acc[0][0] == (1 if name == "a.csv" else 0.9) / by


# -------------------------------------------------------------------------------------------------- records and reports


def test_an_imported_record_survives_the_disk_and_has_no_costs(recipe: Path) -> None:
    (found,) = take(FILES / "acc.csv", recipe)
    raw = json.loads(found.path.read_text())
    assert found.path.name == "seed0-unknown.json"
    assert raw["acc"][0] == [0.7, None, None]
    assert raw["acc_init"] == [None] * 3
    loaded = records.load(found.path)
    assert loaded.dumps() == found.path.read_text()
    for name, measure in MEASURES.items():
        if measure.is_cost:
            assert measure.of(loaded) is None, name


def test_only_imported_records_may_have_holes() -> None:
    record = make_record()
    hole = record.model_copy(update={"acc": [[math.nan, *row[1:]] for row in record.acc]})
    with pytest.raises(ValueError, match="Out of range"):
        hole.dumps()


def test_a_hole_among_learned_tasks_is_damage(recipe: Path) -> None:
    (found,) = take(FILES / "acc.csv", recipe)
    found.path.write_text(found.path.read_text().replace("0.75,", "null,", 1))
    with pytest.raises(UserError, match=r"outside \[0, 1\]"):
        records.load(found.path)


def test_the_same_file_again_changes_nothing_and_another_takes_no_ones_place(recipe: Path) -> None:
    (first,) = take(FILES / "acc.csv", recipe)
    (again,) = take(FILES / "acc.csv", recipe)
    assert (first.is_new, again.is_new) == (True, False)
    with pytest.raises(UserError, match=r"has another result \(run 1 of acc.csv\)"):
        take(FILES / "facil" / "acc_taw-2026-01-31-12-00.txt", recipe)


def test_one_run_is_not_two_seeds(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same file twice, under another seed, copied with a comment, or in a log that went on; nothing is written."""
    runs = recipe.parent / "runs"
    file, other = FILES / "acc.csv", FILES / "facil" / "acc_taw-2026-01-31-12-00.txt"
    words = ["import", "--task", str(recipe), "--baseline", "ewc", "--out", str(runs)]
    assert cli.main([*words, str(file), str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "clbench: acc.csv, run 1: is run 1 of acc.csv again (seed 0): one run is not two seeds"
    assert not runs.exists()
    (first,) = take(file, recipe)
    copy = written(recipe.parent, file.read_text() + "\n", "copy.csv")
    for again in (file, copy):
        with pytest.raises(UserError, match=r"run 1: is run 1 of acc.csv again \(seed 0\)"):
            take(again, recipe, seed=3)
    assert [path.name for path in sorted(runs.rglob("*.json"))] == [first.path.name]
    assert take(file, recipe, label="another")[0].is_new
    with pytest.raises(UserError, match="one run is not two seeds"):  # the same matrix by another tool
        take(other, recipe, seed=1)


def test_runs_that_learned_nothing_may_be_alike(recipe: Path) -> None:
    for seed, end in enumerate(("", "\n")):
        file = written(recipe.parent, "50\n50 50\n50 50 50" + end)
        assert take(file, recipe, seed=seed)[0].is_new


def test_reports_show_imported_results_apart_from_ours_and_with_their_source(recipe: Path, tmp_path: Path) -> None:
    """Ours and theirs under one label, one seed and one protocol: two rows of one run each, no average of both."""
    (found,) = take(FILES / "acc.csv", recipe)
    runs, task = tmp_path / "runs", found.record.task
    make_record(task.name, "ewc", 0, n_tasks=3).model_copy(update={"task": task}).save(runs)
    (blocks,) = select(runs).tasks
    (block,) = blocks.blocks
    assert [(group.label, group.imported, len(group.runs)) for group in block.groups] == [
        ("ewc", False, 1), ("ewc (clarena)", True, 1),
    ]  # fmt: skip
    built = build.build(runs, tmp_path / "out")
    assert build.check(runs, tmp_path / "out") == []
    table = (tmp_path / "out" / "tables" / f"{task.name}.md").read_text()
    assert "ewc (clarena): imported from acc.csv (sha256 " in table
    assert "not run here, scored here" in table
    seen = (tmp_path / "out" / "figures" / f"{task.name}-seen.csv").read_text()
    assert "ewc (clarena),3,0.84," in seen
    matrix = (tmp_path / "out" / "figures" / f"{task.name}-matrix.csv").read_text()
    assert "ewc (clarena),1,2,,,,0" in matrix
    assert not built.problems


def test_imported_results_alone_make_a_report(recipe: Path, tmp_path: Path) -> None:
    (found,) = take(FILES / "acc.csv", recipe)
    build.build(tmp_path / "runs", tmp_path / "out")
    assert "a device that nobody knows" in (tmp_path / "out" / "tables" / f"{found.record.task.name}.md").read_text()
    assert "ewc (clarena)" in console.text([found.record])


def test_the_command_imports_and_says_what_it_found(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", str(FILES / "acc.csv"), "--task", str(recipe), "--baseline", "PODNet"]
    words += ["--out", str(tmp_path / "r")]
    assert cli.main(words) == 0
    found = capsys.readouterr()
    said = found.out
    assert found.err.startswith("clbench: acc.csv: taken as fractions, none is above 1 (the largest is 0.9")
    assert "acc.csv, run 1: clarena, read as fraction; written:" in said
    assert "PODNet (clarena)" in said
    assert cli.main([*words[:3], "no_such_task", *words[4:]]) == 2
    assert "unknown task 'no_such_task'" in capsys.readouterr().err
