"""Matched budgets: a dry run keeps what a run keeps, and the size found is the one that a run then has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from clbench import cli, recipes
from clbench.budgets import BUDGETS, TOLERANCE, Costs
from clbench.errors import UserError
from clbench.matching import _nearest, _nearest_of_many, dry_costs, match
from clbench.recipes import load_baseline, load_task, resolve
from clbench.records import load_all
from clbench.runner import run
from clbench.strategies.base import Strategy
from clbench.strategies.build import find_class, scenarios
from clbench.streams import make_stream
from record_factory import make_record

CPU = torch.device("cpu")
SHORT = {"train.epochs": 1}


def shipped() -> list[tuple[str, str]]:
    """Return every baseline whose size does not depend on what it learns, with a task that it can learn."""
    found = []
    for name in recipes.names("baseline"):
        spec = load_baseline(name)
        cls = find_class(spec)
        if not (issubclass(cls, Strategy) and cls.sized_by_learning):
            found.append(("synthetic_split" if "task" in scenarios(spec) else "digits_split_class", name))
    return found


# ---------------------------------------------------------------------------------------------------------- the dry run


@pytest.mark.parametrize(("task", "baseline"), shipped())
def test_a_dry_run_costs_what_a_run_costs(task: str, baseline: str) -> None:
    """Bytes and operations, to the last one; but for steps that replay from a memory which fills with the steps."""
    protocol, spec = load_task(task), load_baseline(baseline)
    record = run(protocol, spec, 0, device="cpu", overrides=SHORT)
    assert record.status == "done", record.error
    dry = dry_costs(resolve(protocol, spec, SHORT), make_stream(protocol.stream, 0, CPU))
    cls = find_class(spec)
    for name, of in BUDGETS.items():
        if not (name == "step_flops" and issubclass(cls, Strategy) and cls.work_by_steps):
            assert of(dry) == of(Costs.of(record)) is not None, name


def test_a_memory_that_fills_step_by_step_is_matched_by_its_records(tmp_path: Path) -> None:
    """DER's memory of 500 has 128 drawn from it by the end of a run; after one step a task of 32 it holds 96."""
    task, der = load_task("synthetic_split"), load_baseline("der_500")
    dry = dry_costs(resolve(task, der), make_stream(task.stream, 0, CPU))
    record = run(task, der, 0, device="cpu", overrides={"train.iterations": 8}, out=tmp_path)
    assert dry.work is not None
    assert (dry.work.step_samples, record.flops[-1].step_samples) == (32 + 96, 32 + 128)
    with pytest.raises(UserError, match="its memory fills step by step, and so does the work of a step: others can be"):
        match(task.name, "der_500", "finetune", "step_flops")
    with pytest.raises(UserError, match="run it first: clbench run --task synthetic_split --baseline der_500"):
        match(task.name, "finetune", "der_500", "step_flops")
    found = match(task.name, "finetune", record.baseline.label, "step_flops", runs=tmp_path)
    assert found.wanted == record.flops[-1].step
    assert abs(found.off) <= TOLERANCE
    assert match(task.name, "der_500", "finetune", "answer_flops").changed == {}


def test_a_record_without_operations_gives_no_budget_of_work(tmp_path: Path) -> None:
    task = load_task("synthetic_split")
    make_record(task.name, "er@12345678", 0, n_tasks=task.stream.n_tasks, task_hash=task.hash).save(tmp_path)
    with pytest.raises(UserError) as caught:
        match(task.name, "finetune", "er@12345678", "answer_flops", runs=tmp_path)
    assert caught.value.lines == ("'er@12345678': answer_flops is not known (its runs counted no operations)",)


def test_methods_that_grow_as_they_need_say_so() -> None:
    for name in ("den", "den_reference_code", "apd", "gpm"):
        cls = find_class(load_baseline(name))
        assert issubclass(cls, Strategy)
        assert cls.sized_by_learning


# ----------------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize(
    ("cost", "wanted", "size"),
    [
        (lambda k: 100 + 7 * k, 450.0, 50),  # 450 at 50
        (lambda k: k * k, 90.0, 9),  # 81 and 100: 9 off and 10 off
        (lambda k: k * k, 91.0, 10),
        (lambda k: k * k, 90.5, 9),  # as far from both: the smaller
        (lambda k: k * k, 10.0**9, 31623),  # 31622.78 squared
        (lambda k: 5 * (k // 10), 50.0, 100),  # steps: the first of them
        (lambda k: 100 + k, 3.0, 1),  # not below the least
        (lambda k: k if k >= 30 else None, 20.0, 30),  # nothing below 30
        (lambda k: k if k >= 30 else None, 45.0, 45),
        (lambda k: k if k <= 5000 else None, 9000.0, 5000),  # nothing above 5000
        (lambda k: k if k <= 5000 else None, 4500.0, 4500),
    ],
)
@pytest.mark.parametrize("begin", [1, 17, 4000])
def test_the_nearest_size_is_found(cost: Callable[[int], int | None], wanted: float, size: int, begin: int) -> None:
    tried: set[int] = set()

    def counted(k: int) -> int | None:
        tried.add(k)
        return cost(k)

    assert _nearest(counted, begin, wanted) == size
    assert len(tried) <= 40


@pytest.mark.parametrize(
    ("cost", "wanted", "size"),
    [
        (lambda k: (k % 50) * 100 + k, 4520.0, 95),  # a saw: 45 * 100 + 95 = 4595, 4494 at 94, 4545 at 45, 4645 at 145
        (lambda k: 1000 - k, 777.0, 223),  # falls
        (lambda k: None if k < 60 else 2 * k, 130.0, 65),
    ],
)
def test_the_nearest_is_found_where_a_cost_rises_and_falls(
    cost: Callable[[int], int | None], wanted: float, size: int
) -> None:
    found = _nearest_of_many(cost, 64, wanted)
    value, best = cost(found), cost(size)
    assert value is not None
    assert best is not None
    assert abs(value - wanted) <= abs(best - wanted)


# ----------------------------------------------------------------------------------------------- really run, on digits


@pytest.mark.parametrize(
    ("baseline", "budget", "key"),
    [
        ("er", "keep_learning_bytes", "buffer"),
        ("er", "answer_bytes", "model.hidden"),  # a buffer is not needed to answer
        ("hypernet", "answer_bytes", "compression"),
        ("finetune", "parameters", "model.hidden"),
        ("hypernet", "answer_flops", "compression"),
        ("er", "step_flops", "model.hidden"),  # a larger buffer has no larger batch drawn from it
    ],
)
def test_the_run_has_the_size_that_was_found(baseline: str, budget: str, key: str) -> None:
    """Against independent nets: 5 x (64 h + h + h 2 + 2) numbers with h hidden units, whatever is matched to them."""
    target = "layer_reuse" if baseline == "hypernet" and budget == "answer_flops" else "independent"
    found = match("digits_split", baseline, target, budget, overrides=SHORT)
    record = run("digits_split", baseline, 0, device="cpu", overrides=found.experiment.overrides)
    other = run("digits_split", target, 0, device="cpu", overrides=SHORT)
    kept, wanted = (BUDGETS[budget](Costs.of(one)) or 0 for one in (record, other))
    assert (found.reached, found.wanted) == (kept, wanted)
    assert abs(kept - wanted) <= TOLERANCE * wanted
    assert list(found.changed) == [key]
    assert record.baseline.label == found.experiment.label != baseline
    nearby = dict(found.changed)
    if key == "buffer":  # one sample more or less is further off
        for step in (-1, 1):
            nearby[key] = found.changed[key] + step
            spec = resolve(load_task("digits_split"), load_baseline(baseline), {**SHORT, **nearby})
            off = dry_costs(spec, make_stream(spec.task.stream, 0, CPU)).kept.keep_learning_bytes - wanted
            assert abs(off) >= abs(kept - wanted)


def test_what_is_as_large_already_is_left_as_it_is() -> None:
    """EWC's importances are not needed to answer: its net is fine-tuning's."""
    found = match("synthetic_split", "ewc", "finetune", "answer_bytes")
    assert found.changed == {}
    assert found.experiment.label == "ewc"


# --------------------------------------------------------------------------------------------- sizes that learning sets


def test_a_method_that_grows_is_matched_by_its_records(tmp_path: Path) -> None:
    task = load_task("synthetic_split")
    with pytest.raises(UserError, match="run it first: clbench run --task synthetic_split --baseline den"):
        match("synthetic_split", "finetune", "den", "parameters", runs=tmp_path)
    den = resolve(task, load_baseline("den"))
    for seed, size in enumerate((20_000, 21_000)):
        record = make_record(
            task.name, "den", seed, n_tasks=task.stream.n_tasks, task_hash=task.hash, baseline_hash=den.hash,
            parameters=size,
        )  # fmt: skip
        record.save(tmp_path)
    found = match("synthetic_split", "finetune", "den", "parameters", runs=tmp_path)
    assert found.wanted == 20_500
    assert abs(found.off) <= TOLERANCE
    with pytest.raises(UserError, match="its size depends on what it learns: others can be matched to it"):
        match("synthetic_split", "den", "finetune", "parameters")


@pytest.mark.parametrize(
    ("baseline", "to", "budget", "by", "says"),
    [
        ("er", "ewc", "keep_learning_bytes", "bufer", "unknown setting to size by 'bufer'. Did you mean 'buffer'?"),
        ("er", "ewc", "keep_learning_bytes", "policy", "policy is no number"),
        ("er", "ewc", "answer_bytes", "buffer", "buffer does not change answer_bytes"),
        ("er", "ewk", "answer_bytes", None, "unknown baseline 'ewk'. Did you mean 'ewc'?"),
        ("er", "ewc@12345678", "answer_bytes", None, "unknown baseline 'ewc@12345678'"),
        ("er", "ewc", "bytes", None, "unknown budget 'bytes'"),
    ],
)
def test_a_mistake_is_one_line(baseline: str, to: str, budget: str, by: str | None, says: str) -> None:
    with pytest.raises(UserError) as caught:
        match("synthetic_split", baseline, to, budget, by=by)
    (line,) = caught.value.lines
    assert says in line


def test_the_nearest_possible_is_told_with_the_size_that_gives_it() -> None:
    """One net of 64 hidden units with 5 heads: 64 x 64 + 64 + 5 (2 x 64 + 2) = 4,810 numbers of 4 bytes, 19,240 bytes.

    Five nets of h units: 5 (64 h + h + 2 h + 2) numbers, for h = 14 and 15: 18,800 and 20,140 bytes; -2.3 % is nearer.
    """
    with pytest.raises(UserError) as caught:
        match("digits_split", "independent", "finetune", "answer_bytes")
    (line,) = caught.value.lines
    assert "answer_bytes of 'finetune' is 19,240; the nearest it can be is 18,800 (-2.3%)" in line
    assert line.endswith("with model.hidden = [14]")


# ---------------------------------------------------------------------------------------------------------- the command


def test_matched_runs_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    task = "--task synthetic_split --seeds 2 --quiet --device cpu"
    assert cli.main(f"run {task} --baseline ewc".split()) == 0
    assert cli.main(f"run {task} --baseline er --match keep_learning_bytes --to ewc".split()) == 0
    said = capsys.readouterr()
    assert "er@" in said.out
    assert "buffer" in said.out
    assert not said.err
    assert cli.main(["compare", "er", "ewc", "--matched", "--metric", "average_accuracy"]) == 0
    (label,) = {run.baseline.label for run in load_all(Path("results/runs"))[0]} - {"ewc"}
    assert f"{label} - ewc" in capsys.readouterr().out
    assert cli.main(["run", "--task", "synthetic_split", "--baseline", "er", "--match", "parameters"]) == 2
    assert "--match: a matched run needs --match BUDGET and --to BASELINE" in capsys.readouterr().err


def test_a_name_that_is_not_known_is_refused_before_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for all tasks and baselines; likewise where a target has no records, or a setting is not one."""
    for name in ("matching.make_stream", "data.load"):
        monkeypatch.setattr(f"clbench.{name}", lambda *_, **__: pytest.fail("data were read"))
    out = f"--seeds 1 --quiet --device cpu --out {tmp_path}"
    many = f"run --task synthetic_split digits_split --baseline er finetune {out}"
    for words, says in (
        ("--match answer_bytes --to indepndent", "unknown baseline 'indepndent'. Did you mean 'independent'?"),
        ("--match step_flops --to ewc --by widht", "unknown setting to size by 'widht'. Did you mean 'width'?"),
    ):
        assert cli.main([*many.split(), *words.split()]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert all(line.startswith(f"clbench: {says}") for line in lines)
        assert len(lines) == (1 if "--to i" in words else 2)  # settings are each method's own
    assert cli.main(f"run --task synthetic_split --baseline er {out} --match parameters --to den".split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'den': its size depends on what it learns, and there is no finished run of it on synthetic_split" in line
