"""Sources of chance: pinned one by one in runs, and their part in the spread over seeds."""

from __future__ import annotations

import ast
import copy
import pickle
import shlex
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from clbench import cli
from clbench.errors import UserError
from clbench.recipes import load_baseline, load_task, resolve
from clbench.record_parts import Imported
from clbench.records import RunRecord
from clbench.report.stats import deviation_interval
from clbench.report.variance import components, table
from clbench.runner import run
from clbench.seeds import SOURCES, Pinned, derive, source
from clbench.specs import PermutedStream
from clbench.streams import permutations
from record_factory import make_record

PACKAGE = Path(__file__).resolve().parent.parent / "clbench"


# ---------------------------------------------------------------------------------------------------------------- seeds


def test_a_pinned_source_has_its_own_seed_and_the_others_the_runs() -> None:
    seed = Pinned(7, {"init": 3})
    assert seed == 7
    assert derive(seed, "init") == derive(3, "init")
    assert derive(seed, "parts", 2) == derive(3, "parts", 2)
    for name in ("order", "classes", "strategy"):
        assert derive(seed, name) == derive(7, name)
    assert derive(Pinned(7, {}), "init") == derive(7, "init")
    for same in (copy.deepcopy(seed), pickle.loads(pickle.dumps(seed))):
        assert derive(same, "init") == derive(3, "init")


def test_permutations_by_a_papers_own_generator_are_pinned_as_well() -> None:
    for name in ("permuted_mnist_gpm", "permuted_mnist_den", "permuted_mnist_gem"):
        spec = load_task(name).stream
        assert isinstance(spec, PermutedStream)
        free = spec.model_copy(update={"permutation_seed": None})
        found = [permutations(free, Pinned(seed, {"classes": 5}), 16) for seed in (1, 5)]
        assert all((one == other).all() for one, other in zip(*found, strict=True))
        own = permutations(free, 5, 16)
        assert all((one == other).all() for one, other in zip(found[0], own, strict=True))


def test_every_stream_of_randomness_has_a_source() -> None:
    """Read from the code: what a run begins with, what tasks are made of, and all the rest, listed by hand."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in ("derive", "derive32"):
                continue
            if len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                names.add(str(node.args[1].value))
    on_the_way = {name for name in names if source(name) == "order"}
    assert on_the_way == {"order", "strategy", "global", "finetune"}
    assert {name for name in names if source(name) == "classes"} == {
        "classes", "permutation", "permutations", "angles",
    }  # fmt: skip
    assert "init" in names


# ----------------------------------------------------------------------------------------------------------------- runs


def digits(seed: int, **pins: int) -> RunRecord:
    """Run on digits, whose classes are in another order for every seed."""
    overrides = {"train.epochs": 1, **{f"seeds.{name}": value for name, value in pins.items()}}
    return run("digits_split", "er", seed, device="cpu", overrides=overrides)


def test_with_all_sources_pinned_every_seed_is_that_seeds_run() -> None:
    plain = digits(4)
    pinned = digits(9, init=4, order=4, classes=4)
    assert (pinned.acc, pinned.acc_init, pinned.seed) == (plain.acc, plain.acc_init, 9)


def test_one_source_free_moves_just_what_it_is() -> None:
    """Before training, accuracies tell net and tasks: neither moves with the order of data; after it they do."""
    first, second = (digits(seed, init=0, classes=0) for seed in (1, 2))
    assert first.acc_init == second.acc_init
    assert first.acc != second.acc
    assert digits(1, order=0, classes=0).acc_init != first.acc_init
    assert digits(1, init=0, order=0).acc_init != first.acc_init


def test_pins_are_in_label_hash_and_record() -> None:
    task, ewc = load_task("digits_split"), load_baseline("ewc")
    plain, pinned = resolve(task, ewc), resolve(task, ewc, {"seeds.init": 0})
    assert plain.hash != pinned.hash != resolve(task, ewc, {"seeds.init": 1}).hash
    assert pinned.label.startswith("ewc@")
    assert pinned.departures == {"seeds.init": 0}
    assert not plain.pins


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seeds.inti=0", "unknown source of chance 'seeds.inti'. Did you mean 'seeds.init'?"),
        ("seeds.init=-1", "seeds.init=-1: should be a whole number from 0"),
        ("seeds.init=true", "seeds.init=True: should be a whole number"),
    ],
)
def test_a_pin_that_is_none_is_one_line(override: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(shlex.split(f"run --task synthetic_split --baseline ewc --set {override}")) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------- components


def test_the_interval_of_a_deviation_holds_it_in_95_percent() -> None:
    low, high = deviation_interval(1.0, 5)
    assert (low, high) == pytest.approx((2 / stats.chi2.ppf(0.975, 4) ** 0.5, 2 / stats.chi2.ppf(0.025, 4) ** 0.5))
    assert (low, high) == pytest.approx((0.599, 2.874), abs=1e-3)
    for n in (3, 5, 10):
        found = np.random.default_rng(n).normal(size=(20_000, n)).std(axis=1, ddof=1)
        ends = deviation_interval(1.0, n)
        assert np.mean((found * ends[0] <= 1) & (found * ends[1] >= 1)) == pytest.approx(0.95, abs=0.005)


def save(runs: Path, name: str, values: list[float], **pins: int) -> None:
    """Write runs of one task: then the average accuracy is their one number."""
    for seed, value in enumerate(values):
        make_record(
            "toy", "ewc", seed, acc=[[value]], label=f"ewc@{name}" if pins else "ewc",
            baseline_hash=f"{name:0>12}", departures={f"seeds.{key}": value for key, value in pins.items()},
        ).save(runs)  # fmt: skip


def test_components_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Points 80, 84, 88: variance 16. 80, 82, 84: 4, a quarter. 80, 81, 82: 1. 80, 80, 80: 0. The rest is 11 of 16."""
    save(tmp_path, "all", [0.80, 0.84, 0.88])
    save(tmp_path, "init", [0.80, 0.82, 0.84], order=0, classes=0)
    save(tmp_path, "order", [0.80, 0.81, 0.82], init=0, classes=0)
    with pytest.raises(UserError) as caught:
        components(tmp_path, "ewc", "toy")
    assert caught.value.lines[1:] == (
        "clbench run --task toy --baseline ewc --set seeds.init=0 --set seeds.order=0 --seeds 10",
    )
    save(tmp_path, "classes", [0.80, 0.80, 0.80], init=0, order=0)
    found = components(tmp_path, "ewc", "toy")
    assert [component.source for component in found.found] == [None, *SOURCES]
    assert [component.value.std for component in found.found] == pytest.approx([0.04, 0.02, 0.01, 0.0])
    assert found.rest == pytest.approx(0.0011)
    rows = table(found).sections[0].rows
    assert [row[-1] for row in rows] == ["100", "25", "6", "0", "69"]
    assert rows[1][3] == "2.00 [1.04, 12.57]"
    assert found.pin == 0
    code = cli.main(shlex.split(f"variance ewc --task toy --runs {tmp_path} --out {tmp_path / 'out'}"))
    assert code == 0
    assert "initialisation" in capsys.readouterr().out
    assert (tmp_path / "out" / "toy-variance-ewc.md").is_file()


def test_what_two_sources_do_together_is_in_both_of_their_rows(tmp_path: Path) -> None:
    """Accuracy 50 points plus a b, a = ±1 by the initialisation and b = ±1 by the order of data, each as often.

    Every set but that of classes is two runs of 49 and two of 51: variance 4/3 points squared. No source has an effect
    of its own, and the rest, 4/3 - 4/3 - 4/3, is minus what the two do together.
    """
    product = [0.51, 0.49, 0.49, 0.51]
    save(tmp_path, "all", product)
    save(tmp_path, "init", product, order=0, classes=0)
    save(tmp_path, "order", product, init=0, classes=0)
    save(tmp_path, "classes", [0.51] * 4, init=0, order=0)
    assert components(tmp_path, "ewc", "toy").rest == pytest.approx(-4 / 3 * 0.01**2)


def test_sets_of_different_pins_are_not_mixed(tmp_path: Path) -> None:
    save(tmp_path, "all", [0.80, 0.84])
    save(tmp_path, "init", [0.80, 0.82], order=0, classes=0)
    save(tmp_path, "order", [0.80, 0.81], init=0, classes=0)
    save(tmp_path, "classes", [0.80, 0.81, 0.82], init=3, order=3)
    with pytest.raises(UserError) as caught:
        components(tmp_path, "ewc", "toy")
    assert caught.value.lines[1:] == (
        "clbench run --task toy --baseline ewc --set seeds.init=0 --set seeds.order=0 --seeds 10",
    )


def test_results_of_another_tool_are_no_component(tmp_path: Path) -> None:
    """They have no settings, as fine-tuning has none, and there are more of them."""
    save(tmp_path, "all", [0.80, 0.84, 0.88])
    save(tmp_path, "init", [0.80, 0.82], order=0, classes=0)
    save(tmp_path, "order", [0.80, 0.81], init=0, classes=0)
    save(tmp_path, "classes", [0.80, 0.80], init=0, order=0)
    told = Imported(tool="FACIL", file="acc.txt", sha256="0" * 64, scale="fraction")
    for seed in range(5):
        record = make_record("toy", "ewc", seed, acc=[[0.1 * seed]], label="ewc", baseline_hash="elsewhere")
        elsewhere = record.environment.model_copy(update={"device": "unknown", "device_name": ""})
        record.model_copy(update={"imported": told, "environment": elsewhere}).save(tmp_path)
    assert components(tmp_path, "ewc", "toy").found[0].value.n == 3
