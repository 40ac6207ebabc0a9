"""`clbench tune` as a user types it: it works as printed, goes on where it was, and keeps to its own folder."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from clbench import cli, records

TINY = "tune --task synthetic_split --baseline ewc --grid lam=1,100 --protocol first-2 --seeds 0,1 --quiet --jobs 1"


def call(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run a command line; return exit code, stdout and stderr."""
    try:
        code = cli.main(shlex.split(line))
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_prints_and_writes_the_table_and_runs_nothing_twice(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(TINY, capsys)
    assert code == 0, err
    assert "chosen" in out
    assert "[on.synthetic_split]" in out
    folder = Path("results/tune/synthetic_split@first-2")
    assert (folder / "ewc.md").read_text().startswith("# EWC on synthetic_split")
    assert (folder / "ewc.csv").read_text().count("\n") == 3
    found, problems = records.load_all(Path("results/tune"))
    assert not problems
    assert {record.seed for record in found} == {0, 1}
    assert {record.baseline.settings["lam"] for record in found} == {1.0, 100.0}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("seed*.json")}
    assert len(before) == 4
    assert call(TINY, capsys)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("seed*.json")} == before


def test_runs_of_a_study_stay_out_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    """Even in one folder they are of another task, so that no table has them beside runs on test data."""
    call("run --task synthetic_split --baseline ewc --seeds 2 --quiet", capsys)
    call(f"{TINY} --out results/runs", capsys)
    assert call("report --task synthetic_split", capsys)[0] == 0
    table = Path("results/tables/synthetic_split.md").read_text()
    assert "ewc" in table
    assert "ewc@" not in table


def test_what_is_sized_for_all_tasks_is_sized_as_in_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A compression counts the embeddings of all tasks of the stream, also where two of them are looked at."""
    name, settings = "hypernet", "--set compression=1 task_conditioned=true"
    assert call(f"run --task synthetic_split --baseline {name} {settings} --seeds 1 --quiet --jobs 1", capsys)[0] == 0
    tune = f"tune --task synthetic_split --baseline {name} {settings} --grid beta=0.1,1 --protocol first-2 --seeds 0,"
    assert call(f"{tune} --quiet --jobs 1", capsys)[0] == 0
    runs, studies = (records.load_all(Path("results") / folder)[0] for folder in ("runs", "tune"))
    sizes = [record.generation.sizes for record in (*runs, *studies) if record.generation is not None]
    assert len(sizes) == 3
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_setting_that_diverges_is_left_out_and_the_rest_is_chosen_from(capsys: pytest.CaptureFixture[str]) -> None:
    grid = "finetune --set train.optimizer=sgd --grid train.lr=0.1,1e30"
    code, out, _ = call(TINY.replace("ewc --grid lam=1,100", grid), capsys)
    assert code == 0
    assert "left out: 2 of 2 runs failed" in out
    assert "\ntrain.lr = 0.1\n" in out


def test_where_all_diverge_nothing_is_chosen_and_the_exit_code_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    grid = "finetune --set train.optimizer=sgd --grid train.lr=1e29,1e30"
    code, out, _ = call(TINY.replace("ewc --grid lam=1,100", grid), capsys)
    assert code == 1
    assert "no point can be chosen" in out
    assert "origin" not in out


def test_several_baselines_with_grids_of_their_own_are_several_studies(capsys: pytest.CaptureFixture[str]) -> None:
    for name, lam in (("one", 1.0), ("two", 2.0)):
        text = f'schema = 1\nextends = "ewc"\ntitle = "{name}"\n[tune]\nlam = [{lam}, 30.0]\n'
        Path(f"{name}.toml").write_text(text)
    line = TINY.replace("--grid lam=1,100", "").replace("--baseline ewc", "--baseline ./one.toml ./two.toml")
    code, out, err = call(line, capsys)
    assert code == 0, err
    assert "one on synthetic_split" in out
    assert "two on synthetic_split" in out
    assert "--grid" not in Path("results/tune/synthetic_split@first-2/one.md").read_text()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("tune --task digits_split --baseline ewc --grid lam=1,2", "--protocol"),
        ("tune --task digits_splt --baseline ewc --grid lam=1,2 --protocol first-2", "Did you mean 'digits_split'?"),
        ("tune --task digits_split --baseline ewc --grid lamb=1,2 --protocol first-2", "Did you mean 'lam'?"),
        ("tune --task digits_split --baseline ewc --grid lam --protocol first-2", "must be key=a,b,c"),
        ("tune --task digits_split --baseline finetune --protocol first-2", "give --grid key=a,b,c"),
        ("tune --task digits_split --baseline ewc --grid lam=1,2 --protocol first-5", "is called oracle"),
        ("tune --task digits_split --baseline ewc --grid lam=1,2 --protocol second", "first-<k>"),
        ("tune --task digits_split --baseline ewc --grid lam=1,2 --protocol oracle --validation 2", "a share between"),
        (
            "tune --task digits_split --baseline ewc --grid lam=1,2 --protocol oracle --metric bwt",
            "average_incremental",
        ),
        ("tune --task digits_split --baseline ewc --grid lam=1,2 --protocol oracle --seeds none", "--seeds none"),
        (
            "tune --task digits_split_class --baseline independent --grid train.lr=1 --protocol oracle",
            "clbench: baseline 'independent' is not defined in the class-incremental",
        ),
        ("tune --task digits_split --baseline ewc --grid lam=1,2 --protocol first-2 --validation 0.001", "is none"),
    ],
)
def test_a_mistake_gets_a_clear_line_and_writes_nothing(
    line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(line, capsys)
    assert code == 2
    assert says in err
    assert all(text.startswith("clbench:") for text in err.splitlines())
    assert not list(Path().iterdir())


def test_check_looks_at_grids(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.toml").write_text('schema = 1\nextends = "ewc"\ntitle = "x"\n[tune]\nlamb = [1.0]\n')
    code, _, err = call("check mine.toml", capsys)
    assert code == 2
    assert "[tune]: " in err
    assert "Did you mean 'lam'?" in err
    Path("mine.toml").write_text('schema = 1\nextends = "ewc"\ntitle = "x"\n[tune]\nlam = [1.0, 10.0]\n')
    assert call("check mine.toml", capsys)[0] == 0
