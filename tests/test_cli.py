"""The command, as a user types it: examples work as printed, mistakes get one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from clbench import cli, recipes
from clbench.published_row import PublishedRow
from clbench.report import build, published


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
    """Commands write into the current folder by default: give each test its own."""
    monkeypatch.chdir(tmp_path)


def test_run_then_report_then_check(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call("run --task synthetic_split --baseline finetune er --seeds 2 --quiet", capsys)
    assert code == 0, err
    assert "finetune" in out
    assert "4 runs done, 0 recorded before, 0 failed" in out
    assert "0 runs done, 4 recorded before" in call(
        "run --task synthetic_split --baseline finetune er --seeds 2 --quiet", capsys
    )[1]
    assert call("report", capsys)[0] == 0
    assert Path("results/report.html").is_file()
    assert Path("results/tables/synthetic_split.md").is_file()
    assert call("report --check", capsys)[0] == 0
    Path("results/tables/synthetic_split.md").write_text("stale")
    code, out, _ = call("report --check", capsys)
    assert code == 1
    assert "synthetic_split.md: stale" in out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("run --task digits_splt --baseline ewc", "Did you mean 'digits_split'?"),
        ("run --task digits_split --baseline ewk", "Did you mean 'ewc'?"),
        ("run --task digits_split --baseline ewc --set lamb=3", "Did you mean 'lam'?"),
        ("run --task digits_split --baseline ewc --set lam=strong", "lam"),
        ("run --task digits_split --baseline ewc --set lam=-1", "greater than or equal to 0"),
        ("run --task digits_split --baseline ewc --set lam", "must be key=value"),
        ("run --task digits_split --baseline ewc --set lam=1 --set lam=2", "--set lam=2: lam is set twice"),
        ("run --task digits_split --baseline ewc --set lam=1 train.lrr=1", "Did you mean 'lr'?"),
        ("run --task digits_split --baseline ewc --set train.lrr=1", "Did you mean 'lr'?"),
        ("run --task digits_split --baseline ewc --set stream.pad=1", "only train.<key>"),
        ("run --task digits_split --baseline ewc --seeds none", "--seeds none"),
        ("run --task digits_split --baseline ewc --seeds 0", "--seeds 0"),
        ("run --task digits_split --baseline ewc --jobs 0", "above 0"),
        ("run --task digits_split --baseline ewc --evaluate-every 0", "above 0, not '0'"),
        ("run --task digits_split --baseline ewc --evaluate-every=-3", "above 0, not '-3'"),
        ("run --task digits_split --baseline ewc --evaluate-every often", "above 0, not 'often'"),
        ("run --task digits_split --baseline ewc --device tpu", "must be auto, cpu"),
        ("run --task digits_split_class --baseline independent", "not defined in the class-incremental"),
        ("run --task digits_split", "--baseline"),
        ("run --task ./nothing.toml --baseline ewc", "no such task recipe file"),
        ("rum", "invalid choice"),
        ("show digitsplit", "Did you mean 'digits_split'?"),
        ("check nothing.toml", "no such baseline recipe file"),
        ("reproduce --recorded", "results/runs: no such folder of records"),
        ("reproduce vandeven208", "Did you mean 'vandeven2018'?"),
        ("reproduce split_mnist_tusk/finetune", "Did you mean 'split_mnist_task/finetune'?"),
        ("report", "results/runs"),
        ("new strategy 1st", "must be a Python name"),
        ("new strategy ewc", "a shipped baseline has that name"),
        ("data prepare mnits", "Did you mean 'mnist'?"),
        ("data import mnist nothing.npz", "nothing.npz"),
    ],
)
def test_a_mistake_gets_a_clear_line_and_writes_nothing(
    line: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(line, capsys)
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert all(text.startswith("clbench:") for text in err.splitlines())
    assert not list(Path().iterdir())


def test_a_class_of_another_library_is_not_copied(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    theirs = tmp_path / "mas.toml"
    theirs.write_text(
        'schema = 1\ntitle = "MAS"\nstrategy = "avalanche.training:MAS"\nfamily = "regularisation"\npaper = "-"\n',
        encoding="utf-8",
    )
    code, _, err = call(f"new strategy mine --from {theirs}", capsys)
    assert code == 2
    assert "its class is not the suite's own" in err
    assert [path.name for path in Path().iterdir()] in ([], ["mas.toml"])


def test_reproduce_runs_what_is_missing_and_says_what_became_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A made-up paper whose number our two seeds cannot have: differs, in the report as on the console."""
    task, baseline = recipes.load_task("synthetic_split"), recipes.load_baseline("finetune")
    paper = PublishedRow(
        source="me2020", metric="average_accuracy", value=0.05, spread=0.01, spread_kind="std", n=5,
        where="Table 1", verified="V-text", finding="our images are made up",
    )  # fmt: skip
    row = published.Row(recipes.resolve(task, baseline), paper)
    monkeypatch.setattr(published, "shipped_rows", lambda: ([row], []))
    code, out, err = call("reproduce me2020/* --seeds 3 --quiet", capsys)
    assert code == 0, err
    assert "differs by" in out
    assert "finding: our images are made up" in out
    assert "1 comparisons; 0 of 1 rows without a finished run" in out
    for name in ("tables/reproduction.md", "tables/reproduction.tex", "figures/reproduction.png"):
        assert Path("results", name).is_file()
    written = Path("results/tables/reproduction.csv").read_bytes()
    assert call("report", capsys)[0] == 0
    assert Path("results/tables/reproduction.csv").read_bytes() == written
    assert "Published numbers" in Path("results/report.html").read_text()
    assert call("report --check", capsys)[0] == 0
    Path("results/figures/reproduction.csv").write_text("stale")
    assert "reproduction.csv: stale" in call("report --check", capsys)[1]
    assert "differs by" in call("reproduce synthetic_split --recorded", capsys)[1]
    assert "0 comparisons; 1 of 1 rows" in call("reproduce --recorded --out results", capsys)[1]


def test_an_unknown_metric_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    call("run --task synthetic_split --baseline finetune --seeds 1 --quiet", capsys)
    code, _, err = call("report --metric averge_accuracy", capsys)
    assert code == 2
    assert "Did you mean 'average_accuracy'?" in err


def test_a_recipe_with_three_mistakes_lists_all_three(capsys: pytest.CaptureFixture[str]) -> None:
    text = recipes.find("task", "digits_split").read_text()
    bad = text.replace("epochs =", "epoch =").replace('scenario = "task"', 'scenario = "tusk"').replace("lr =", "rl =")
    Path("bad.toml").write_text(bad)
    code, _, err = call("check bad.toml", capsys)
    assert code == 2
    for word in ("epoch", "tusk", "rl"):
        assert word in err


def test_damaged_records_are_named_and_the_rest_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    call("run --task synthetic_split --baseline finetune --seeds 2 --quiet", capsys)
    Path("results/runs/synthetic_split/finetune/seed1-cpu.json").write_text("{")
    code, _, err = call("report", capsys)
    assert code == 0
    assert "seed1-cpu.json: damaged record" in err
    assert "finetune" in Path("results/tables/synthetic_split.md").read_text()


def test_a_new_strategy_runs_beside_the_built_in_ones(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call("new strategy my_method", capsys)
    assert code == 0
    assert "wrote my_method.py" in out
    assert len(Path("my_method.py").read_text().splitlines()) <= 40
    code, out, err = call("run --task synthetic_split --baseline ./my_method.toml finetune --seeds 1 --quiet", capsys)
    assert code == 0, err
    assert "my_method" in out
    assert call("report", capsys)[0] == 0
    assert "my_method" in Path("results/tables/synthetic_split.md").read_text()
    code, _, err = call("new strategy my_method", capsys)
    assert code == 2
    assert "is there already" in err


@pytest.mark.parametrize("source", ["finetune", "ewc", "er", "joint", "independent", "frozen"])
def test_a_copied_strategy_gives_the_numbers_of_its_source(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(f"new strategy copy --from {source}", capsys)[0] == 0
    code, _, err = call(f"run --task synthetic_split --baseline ./copy.toml {source} --seeds 1 --quiet", capsys)
    assert code == 0, err
    from clbench import records

    ours, theirs = (
        records.load(Path(f"results/runs/synthetic_split/{name}/seed0-cpu.json")) for name in ("copy", source)
    )
    assert ours.acc == theirs.acc or theirs.baseline.origin != ours.baseline.origin


def test_avalanche_strategies_run_from_a_recipe_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("gss.toml").write_text(
        'schema = 1\ntitle = "MAS"\nstrategy = "avalanche.training:MAS"\nfamily = "regularisation"\n'
        'paper = "Aljundi et al. 2018"\n[settings]\nlambda_reg = 1.0\nalpha = 0.5\n'
    )
    code, out, err = call("run --task synthetic_split --baseline ./gss.toml --seeds 1 --quiet", capsys)
    assert code == 0, err
    assert "gss" in out


@pytest.mark.parametrize("what", ["", "tasks", "baselines", "published", "metrics"])
def test_lists(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(f"list {what}", capsys)
    assert code == 0
    assert len(out.splitlines()) > 5


def test_show_prints_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call("show digits_split", capsys)
    assert code == 0
    assert recipes.find("task", "digits_split").read_text() in out
    assert "[settings]" in call("show ewc", capsys)[1]


def test_shipped_recipes_are_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", capsys)[0] == 0


def test_check_tries_a_recipe_where_its_method_is_defined(capsys: pytest.CaptureFixture[str]) -> None:
    """WSN is task-incremental; a misspelt task beside it is told of, too."""
    head = 'schema = 1\ntitle = "x"\nfamily = "own"\npaper = "none"\nstrategy = "clbench.strategies.wsn:WSN"\n'
    settings = 'scenarios = ["task"]\n[settings]\nshare = 0.3\n'
    Path("mine.toml").write_text(f'{head}{settings}[on.digits_splt]\norigin = "ours"\n')
    code, out, err = call("check mine.toml", capsys)
    assert code == 0, err
    assert "1 recipes are well" in out
    assert "[on.digits_splt] is no shipped task. Did you mean 'digits_split'?" in err


@pytest.mark.parametrize("source", ["linked", "wsn", "weights_as_features", "layer_reuse", "shared_trunk_half"])
def test_what_is_copied_from_a_shipped_baseline_is_well_and_runs(
    source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its lists, its scenarios, and the deeper net that it needs on the demonstration tasks."""
    assert call(f"new strategy mine --from {source}", capsys)[0] == 0
    assert call("check mine.toml", capsys)[0] == 0
    copied, shipped = recipes.load_baseline("./mine.toml"), recipes.load_baseline(source)
    assert copied.settings == shipped.settings
    assert copied.on["digits_split"].model == shipped.on["digits_split"].model
    code, _, err = call("run --task synthetic_split --baseline ./mine.toml --seeds 1 --quiet", capsys)
    assert code == 0, err


def test_a_copy_names_the_authors_code_as_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    call("new strategy wsnb --from wsn", capsys)
    text = Path("wsnb.py").read_text()
    assert "class Wsnb(" in text
    assert "ihaeyong/WSN " in text


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("linked --set rank=65", "clbench: task 'synthetic_split': strategy Linked: "),
        ("packnet --set prune=0", "clbench: task 'synthetic_split': strategy PackNet: prune 0.0 leaves task 1 "),
        ("cloned --set share=x", "clbench: task 'synthetic_split': strategy Cloned: setting 'share': no rung 'x'"),
        (
            "cloned --set share=0",
            "clbench: baseline 'cloned' on task 'synthetic_split': setting 'share': input should be a valid string, or "
            "input should be a valid array (got 0)",
        ),
        ("cloned --set share=[1]", "clbench: baseline 'cloned' on task 'synthetic_split': setting 'share.0': "),
        ("""cloned --set 'share=["*.bais"]'""", "Did you mean '*.bias'?"),
    ],
)
def test_a_setting_that_the_net_shows_to_be_wrong_is_one_line_and_nothing_is_written(
    setting: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(f"run --task synthetic_split --baseline {setting} --seeds 2", capsys)
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert not Path("results").exists()


def test_the_doctor_has_something_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call("doctor", capsys)
    assert code == 0, out
    assert "torch" in out
    assert "recipes" in out


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for made in action.choices.values():
                yield from parsers(made)


EXAMPLES = [
    parser.epilog.partition("clbench ")[2]
    for parser in parsers(cli._parser())
    if parser.epilog and "example:" in parser.epilog
]


def test_every_command_shows_an_example() -> None:
    assert len(EXAMPLES) >= 10


LONG = ("reproduce", "data", "run", "compare", "variance", "import")
"""They have tests of their own."""


@pytest.mark.parametrize("line", [line for line in EXAMPLES if not line.startswith(LONG)])
def test_examples_work_as_printed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    call("run --task synthetic_split --baseline finetune --seeds 1 --quiet", capsys)
    code, _, err = call(line, capsys)
    assert code == 0, err


@pytest.mark.slow
def test_the_run_example_works_as_printed_and_then_the_compare_example(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = {line for line in EXAMPLES if line.startswith("run")}
    code, out, err = call(f"{line} --quiet", capsys)
    assert code == 0, err
    assert "9 runs done" in out
    (line,) = {line for line in EXAMPLES if line.startswith("compare")}
    code, out, err = call(line, capsys)
    assert code == 0, err
    assert "ewc - finetune" in out
    (line,) = {line for line in EXAMPLES if line.startswith("variance")}
    code, _, err = call(line, capsys)
    assert code == 2
    assert "clbench run --task digits_split --baseline ewc --set seeds.order=0 --set seeds.classes=0" in err


def test_the_import_example_works_on_a_file_of_that_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten tasks, as the protocol has: 0.9 on the diagonal, 0.8 below it."""
    (line,) = {line for line in EXAMPLES if line.startswith("import")}
    rows = (["0.8"] * task + ["0.9"] + ["0.0"] * (9 - task) for task in range(10))
    Path(line.split()[1]).write_text("".join("\t".join(row) + "\n" for row in rows))
    code, out, err = call(line, capsys)
    assert code == 0, err
    assert "ewc" in out


@pytest.mark.data
def test_the_data_example_works_as_printed(
    data_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made into the .npz a user would have; imported under the example's own words into a fresh cache."""
    import numpy as np

    arrays = {key: np.load(data_root / "mnist" / f"{key}.npy") for key in ("x_train", "y_train", "x_test", "y_test")}
    np.savez("mnist.npz", **{key: value[:, 0] if key.startswith("x") else value for key, value in arrays.items()})
    monkeypatch.setenv("CLBENCH_DATA", str(Path("cache").resolve()))
    code, out, err = call("data import mnist mnist.npz", capsys)
    assert code == 0, err
    assert "60,000 + 10,000" in out
    assert call("data verify", capsys)[0] == 0
    shutil.rmtree("cache")


# ----------------------------------------------------------------------------------------------- stopped, or incomplete


def test_ctrl_c_is_one_line_from_the_first_moment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while the commands themselves are imported: the module of the command line takes nothing heavy with it."""
    code = (
        "import sys, clbench.cli, clbench.report.rebuild; "
        "print({'pydantic', 'numpy', 'matplotlib', 'torch'} & set(sys.modules), 'clbench.commands' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set() False\n"

    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", stop)
    assert call("run", capsys) == (130, "", "clbench: stopped; the same command goes on where it was\n")


def test_a_package_that_is_not_here_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where tensorboard is missing, which avalanche needs to be imported; by the name that pip knows.

    Of a module of ours, or that a user's file wants, its author is shown where.
    """

    def lacking(name: str) -> None:
        def stop() -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(cli, "_parser", stop)

    for name, package in (("tensorboard.compat", "tensorboard"), ("avalanche", "avalanche-lib")):
        lacking(name)
        said = f"clbench: the package {package} is not here; try: pip install {package}\n"
        assert call("run", capsys) == (2, "", said)
    for name in ("clbench.no_such_thing", "no_such_thing"):
        lacking(name)
        with pytest.raises(ModuleNotFoundError):
            call("run", capsys)


def test_every_package_that_is_asked_for_can_be_named() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    asked = {re.split("[<>=]", line)[0] for line in project["dependencies"]}
    assert asked <= set(cli._PACKAGES.values())


def test_processes_that_draw_leave_ctrl_c_to_the_one_that_waits() -> None:
    code = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    command = [sys.executable, "-c", code]
    with build._children_deaf():
        deaf = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert deaf == "True\n"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
    with pytest.raises(KeyboardInterrupt), build._children_deaf():  # it is only put off
        os.kill(os.getpid(), signal.SIGINT)
