"""What a report is asked for: families, order and names of a style file, and the folder that is made again."""

from __future__ import annotations

import csv
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from clbench.cli import main
from clbench.errors import UserError
from clbench.report import choice, measures, provenance, tables
from clbench.report.build import build, check
from clbench.report.choice import Choice, restyled, styled
from clbench.report.figures_plasticity import joint_reference
from clbench.report.rebuild import rebuild
from clbench.report.select import Selection, select
from clbench.report.style import looks
from record_factory import make_record

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for task in ("toy_3", "a_task"):
        for baseline in ("finetune", "ewc", "si", "er"):
            for seed in (0, 1):
                make_record(task, baseline, seed).save(tmp_path / "runs")
    return tmp_path / "runs"


def shown(runs: Path, text: str) -> Selection:
    """The selection of all records under a style file."""
    path = runs.parent / "paper.toml"
    path.write_text(text)
    selection = select(runs)
    return styled(selection, choice.load(path, selection))


def labels(selection: Selection) -> list[str]:
    return [group.label for group in selection.tasks[0].blocks[0].groups]


# ------------------------------------------------------------------------------------------------------------- families


def test_only_baselines_of_the_named_families_are_reported(runs: Path) -> None:
    assert labels(select(runs, families=["replay", "regularisation"])) == ["ewc", "si", "er"]


def test_an_unknown_family_is_one_line_with_the_nearest(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["report", "--runs", str(runs), "--out", str(runs.parent / "out"), "--family", "regularization"])
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) == (2, 1)
    assert "unknown family 'regularization'. Did you mean 'regularisation'?" in lines[0]
    assert not (runs.parent / "out").exists()


def test_a_task_that_has_a_recipe_and_no_record_says_how_to_get_one(runs: Path) -> None:
    with pytest.raises(UserError, match=r"no record of task 'digits_split' in .*; clbench run --task digits_split"):
        select(runs, tasks=["digits_split"])


# ----------------------------------------------------------------------------------------------------------- style file


def test_a_style_orders_and_names_and_changes_no_number(runs: Path) -> None:
    selection = shown(
        runs,
        """
        title = "Ours"
        tasks = ["toy_3"]
        families = ["regularisation"]
        baselines = ["si"]
        [task.toy_3]
        title = "A toy"
        [baseline.ewc]
        name = "EWC (ours)"
        """,
    )
    assert [task.name for task in selection.tasks] == ["toy_3", "a_task"]
    assert labels(selection) == ["si", "EWC (ours)", "finetune", "er"]
    (before,) = select(runs, tasks=["toy_3"]).tasks
    first, plain = (tables.tables(task, measures.chosen(None))[0] for task in (selection.tasks[0], before))
    assert first.title == "A toy: accuracy"
    rows = {row[0]: row[1:] for section in plain.sections for row in section.rows}
    named = {row[0]: row[1:] for section in first.sections for row in section.rows}
    assert named.pop("EWC (ours)") == rows.pop("ewc")
    assert named == rows


def test_a_new_name_moves_no_colour_and_a_given_one_is_taken(runs: Path) -> None:
    selection = shown(runs, '[baseline.ewc]\nname = "A first"\n[baseline.er]\ncolour = "#123456"\nmarker = "s"\n')
    groups = selection.tasks[0].blocks[0].groups
    before = looks(selection.labels)
    style = choice.load(runs.parent / "paper.toml", selection)
    found = restyled(before, groups, style)
    assert found["A first"] == before["ewc"]
    assert (found["er"].colour, found["er"].marker, found["er"].line) == ("#123456", "s", before["er"].line)


def test_overrides_of_a_renamed_baseline_are_still_explained(tmp_path: Path) -> None:
    make_record(baseline="ewc", settings={"lam": 3}).save(tmp_path / "runs")
    make_record(baseline="ewc", label="ewc@12345678", settings={"lam": 100}).save(tmp_path / "runs")
    selection = shown(tmp_path / "runs", '[baseline.ewc]\nname = "EWC"\n')
    assert tables.notes(selection.tasks[0]) == ["ewc@12345678: lam 100 (EWC: 3)"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("titel = 'x'", "unknown key 'titel'. Did you mean 'title'?"),
        ("[baseline.ewc]\ncolor = '#112233'", "unknown key 'baseline.ewc.color'. Did you mean 'colour'?"),
        ("[baseline.ewc]\ncolour = 'blue'", "'baseline.ewc.colour': string should match pattern"),
        ("[baseline.ewc]\nmarker = 'q'", "'baseline.ewc.marker': should be 'o', 's'"),
        ("tasks = ['toy3']", "'tasks': no task 'toy3'. Did you mean 'toy_3'?"),
        ("families = ['replays']", "'families': no family 'replays'. Did you mean 'replay'?"),
        ("[baseline.ewk]\nname = 'x'", "'baseline.ewk': no baseline 'ewk'. Did you mean 'ewc'?"),
        ("[baseline.ewc]\nname = 'er'", "'baseline': er and ewc are both called 'er'"),
        ("tasks = 3", "'tasks': should be a valid"),
        ("tasks = [", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_style_is_one_line_with_file_and_key(runs: Path, text: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        shown(runs, text)
    (said,) = caught.value.lines
    assert said.startswith(f"{runs.parent / 'paper.toml'}: {line}")


def test_a_style_that_is_not_there_is_a_users_mistake(runs: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        build(runs, runs.parent / "out", Choice(style=runs / "none.toml"))


def test_the_example_of_the_documentation_is_right(runs: Path) -> None:
    documented = re.search(r"```toml\n(title = .*?)```", (ROOT / "results" / "README.md").read_text(), flags=re.S)
    assert documented is not None
    assert shown(runs, documented[1]).tasks


# ----------------------------------------------------------------------------------------------- what a reader must k


def test_what_stands_apart_is_a_line_each_on_the_page_and_on_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two protocols, two devices, single seeds, a failed and a damaged run, and a pair that was never run."""
    runs = tmp_path / "runs"
    make_record(baseline="finetune", seed=0).save(runs)
    make_record(baseline="finetune", seed=1, version=2, task_hash="f" * 12).save(runs)
    make_record(baseline="er", seed=0, device="cuda", device_name="Test GPU").save(runs)
    make_record("other", "finetune", seed=0).save(runs)
    make_record("other", "finetune", seed=1).save(runs)
    make_record("toy_3", "er", seed=4, status="failed", error="NaN").save(runs)
    (runs / "toy_3" / "er" / "seed9-cpu.json").write_text('{"schema')
    asked = ["--task", "toy_3", "other", "--baseline", "finetune", "er"]
    assert main(["report", "--runs", str(runs), "--out", str(tmp_path / "out"), *asked]) == 0
    lines = capsys.readouterr().err.splitlines()
    expected = [
        "toy_3: records of 2 protocols stand apart and are not comparable",
        "toy_3: runs of 2 devices stand side by side: cpu (Test CPU), cuda (Test GPU)",
        "toy_3: one seed alone, and so no interval: finetune, er",
        "other: no finished run of er",
        "toy_3/er (seed 4, cpu) failed: NaN",
        "toy_3/er/seed9-cpu.json: damaged record",
    ]
    assert len(lines) == len(expected)
    page = (tmp_path / "out" / "report.html").read_text()
    index = (tmp_path / "out" / "tables" / "README.md").read_text()
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(f"clbench: {start}")
        assert start in page
        assert start in index
    assert (tmp_path / "out" / "tables" / "other.md").is_file()


def test_records_that_need_no_word_get_none(runs: Path) -> None:
    assert select(runs).remarks == ()


def test_an_empty_folder_is_one_line_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    assert main(["report", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no finished run to report" in line
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------- rebuild


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder made with every kind of choice, of records so few that it is made in a second."""
    for baseline in ("finetune", "er", "ewc"):
        make_record(baseline=baseline, acc=[[0.9]], acc_init=[0.1], peak=None).save(tmp_path / "runs")
    (tmp_path / "paper.toml").write_text('[baseline.er]\nname = "Replay"\n')
    asked = Choice(families=["replay"], metrics=["average_accuracy"], style=tmp_path / "paper.toml")
    build(tmp_path / "runs", tmp_path / "out", asked)
    assert check(tmp_path / "runs", tmp_path / "out", choice=asked) == []
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_the_script_makes_the_same_bytes_again(folder: Path) -> None:
    before = contents(folder)
    for name in before:
        if name not in ("rebuild.py", "style.toml", "tables/records.csv"):
            (folder / name).unlink()
    command = [sys.executable, "rebuild.py"]
    done = subprocess.run(
        command, cwd=folder, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert contents(folder) == before
    assert b"Replay" in before["tables/toy_3.md"]
    assert b"finetune" not in before["tables/toy_3.md"]


def test_the_script_says_which_command_made_the_folder(folder: Path) -> None:
    text = (folder / "rebuild.py").read_text()
    assert "clbench report --runs ../runs --out . --family replay --metric average_accuracy --style style.toml" in text


def test_the_script_names_records_and_versions_that_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_record(baseline="er", acc=[[0.8]], acc_init=[0.1], peak=None).save(folder.parent / "runs")
    asked = {"family": ["replay"], "metric": ["average_accuracy"], "style": ["style.toml"]}
    then = {**provenance.versions(), "matplotlib": "0.1"}
    assert rebuild(str(folder / "rebuild.py"), "../runs", asked, then, []) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "rebuild.py: toy_3/er/seed0-cpu.json: the record is not what it was"
    assert lines[1].startswith("rebuild.py: matplotlib: ")
    assert lines[1].endswith(" here, 0.1 then")
    assert rebuild(str(folder / "rebuild.py"), "../none", asked, then, []) == 2


def test_the_script_is_stopped_by_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clbench.report.build.build", stop)
    assert rebuild(str(folder / "rebuild.py"), "../runs", {}, provenance.versions(), []) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "rebuild.py: stopped; call it again"


def test_the_script_works_from_any_folder_and_under_any(folder: Path, tmp_path: Path) -> None:
    """The records lie beside the folder that it stands in, wherever it is called."""
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    before = contents(folder)
    command = [sys.executable, "../out/rebuild.py"]
    done = subprocess.run(
        command, cwd=elsewhere, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    )
    assert done.stderr == ""
    assert contents(folder) == before
    assert not list(elsewhere.iterdir())


def test_the_list_of_records_has_what_is_reported_and_nothing_else(folder: Path) -> None:
    """`sha256sum` of the file gives the same digits."""
    (row,) = csv.DictReader(io.StringIO((folder / "tables" / "records.csv").read_text()))
    assert (row["record"], row["status"]) == ("toy_3/er/seed0-cpu.json", "done")
    done = subprocess.run(
        ["sha256sum", folder.parent / "runs" / row["record"]], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == row["sha256"]


def test_a_new_name_of_joint_training_leaves_it_the_reference_of_intransigence(tmp_path: Path) -> None:
    for baseline in ("joint", "er"):
        make_record("toy_3", baseline).save(tmp_path / "runs")
    block = shown(tmp_path / "runs", '[baseline.joint]\nname = "Upper bound"\n').tasks[0].blocks[0]
    assert "Upper bound" in [group.label for group in block.groups]
    assert joint_reference(block) is not None
