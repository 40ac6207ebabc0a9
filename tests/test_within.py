"""Evaluations within a task: they change nothing, and what is made of them, by hand."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clbench import checkpoint, metrics
from clbench.cli import main
from clbench.continual_evaluation import ContinualEvaluation, undisturbed
from clbench.errors import UserError
from clbench.metrics import Matrix
from clbench.metrics_within import lowest, min_acc, wc_acc
from clbench.record_parts import Within
from clbench.records import RunRecord, load
from clbench.report import tables
from clbench.report.compare import compare
from clbench.report.figures_within import within_tasks
from clbench.report.measures import DEFAULT, MEASURES, chosen
from clbench.report.select import Block, arrange
from clbench.report.style import looks, render
from clbench.runner import run
from clbench.specs import Scenario
from clbench.strategies.base import Strategy
from record_factory import make_record
from strategy_factory import AVALANCHES, HOME, made, needs, recipe, synthetic


class Merging(torch.nn.Module):
    """Answers with what it merges when it is switched to evaluation, and takes apart when switched to training."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        """Switch."""
        self.merged = not mode
        super().train(mode)
        return self


def test_a_net_that_does_more_on_a_switch_is_switched_back() -> None:
    """The one module that was evaluating while the rest trained does so again; what was noted meanwhile is gone."""
    strategy, _ = made(synthetic("task", n_tasks=2), "finetune")
    net = strategy.model = Merging(strategy.model.train())
    frozen = next(iter(net.net.children())).eval()
    with undisturbed(strategy):
        net.eval()
        assert net.merged
        strategy.noted = 1
    assert not hasattr(strategy, "noted")
    assert not net.merged
    assert net.training
    assert not frozen.training


def facts(found: RunRecord, *without: str) -> dict[str, Any]:
    return found.model_dump(exclude={"timing", "peaks", *without})


# -------------------------------------------------------------------------------------------- it changes nothing else


def trained(baseline: str, scenario: Scenario, every: int | None, **changes: Any) -> tuple[Any, list[Within]]:
    """Return all that training would go on from after two tasks of 7 steps, evaluated as a run is, and the curves."""
    overrides = needs(baseline, scenario) | changes
    strategy, tasks = made(synthetic(scenario, n_tasks=2, iterations=7, lr=0.01), baseline, **overrides)
    found, tests = [], list(tasks.benchmark.test_stream)
    evaluation = ContinualEvaluation(strategy, tests, every or 1, contextlib.nullcontext)
    if every is not None:
        strategy.around = evaluation
    for number, experience in enumerate(tasks.benchmark.train_stream):
        evaluation.begin(number)
        strategy.train_task(experience)
        found.append(evaluation.take())
        accuracies = [strategy.accuracy(test) for test in tests]
    generators = checkpoint.generator_states({"order": strategy.order, "chance": strategy.chance})
    return [strategy.state_dict(), generators, accuracies], found


def same(one: Any, other: Any) -> bool:
    """Whether nested values are equal to the bit; NaN, which stands for logits that were not stored, is NaN."""
    if isinstance(one, Tensor):
        return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize(("baseline", "scenario"), HOME)
def test_training_is_the_same_to_the_bit_with_and_without(baseline: str, scenario: Scenario) -> None:
    """Weights, buffers, optimiser, what the method stores, and every generator."""
    (plain, _), (evaluated, found) = (trained(baseline, scenario, every) for every in (None, 2))
    assert same(plain, evaluated)
    assert all(len(task.acc) == task.iterations // 2 > 2 for task in found)


def test_running_statistics_of_batch_normalisation_are_the_trainings_own() -> None:
    net = {"model.kind": "normed_mlp", "model.hidden": [9, 7]}
    (plain, _), (evaluated, _) = (trained("finetune", "task", every, **net) for every in (None, 1))
    buffers = [name for name in plain[0]["model"] if "running_mean" in name]
    assert buffers
    assert same(plain, evaluated)


class Draws(Strategy):
    """Answers by chance, and trains by how often it was asked: what no method should do."""

    def answer(self, x: Tensor, t: int | Tensor) -> Tensor:
        self.asked = self.times_asked() + 1
        logits = super().answer(x, t)
        draws = torch.rand(logits.shape, generator=self.chance) + torch.rand(logits.shape)
        return logits + 1e-6 * draws * float(np.random.random())  # noqa: NPY002 - the global one is meant

    def extra_loss(self) -> Tensor:
        strength = torch.rand((), generator=self.chance) + 0.01 * self.times_asked()
        return 0.1 * strength * torch.stack([weight.square().sum() for weight in self.model.parameters()]).sum()

    def times_asked(self) -> int:
        return int(getattr(self, "asked", 0))


def test_even_a_method_that_draws_when_it_answers_trains_the_same() -> None:
    task, draws = synthetic("task", n_tasks=2, iterations=6), recipe(f"{__name__}:Draws", name="draws")
    plain, evaluated = (run(task, draws, 0, evaluate_every=every) for every in (None, 2))
    assert plain.status == "done", plain.traceback
    assert facts(plain, "within") == facts(evaluated, "within")


FOREIGN = [
    AVALANCHES,
    recipe("avalanche.training:Replay", name="avalanches_er", mem_size=20),
    recipe("avalanche.training:EWC", name="avalanches_ewc", ewc_lambda=1.0),
    recipe("avalanche.training:AGEM", name="avalanches_agem", patterns_per_exp=20, sample_size=10),
    recipe("avalanche.training:MAS", name="avalanches_mas"),
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda spec: str(spec.name))
def test_avalanches_own_strategies_are_the_same_with_and_without(foreign: Any) -> None:
    task = synthetic("task", n_tasks=2, iterations=6)
    plain, evaluated = (run(task, foreign, 0, evaluate_every=every) for every in (None, 2))
    assert plain.status == evaluated.status == "done", evaluated.traceback
    assert facts(plain, "within") == facts(evaluated, "within")
    assert [(found.iterations, len(found.acc)) for found in evaluated.within] == [(6, 3), (6, 3)]


# --------------------------------------------------------------------------------------------------- what a run records


def test_a_run_records_the_tasks_seen_at_every_nth_iteration() -> None:
    """7 steps a task, every 3: after 3 and 6; every 7: as the accuracy matrix, since nothing comes after the last."""
    task = synthetic("task", n_tasks=3, iterations=7)
    found = run(task, "finetune", 0, evaluate_every=3).within
    assert [(one.every, one.iterations, list(one.at)) for one in found] == [(3, 7, [3, 6])] * 3
    assert [[len(row) for row in one.acc] for one in found] == [[1, 1], [2, 2], [3, 3]]
    record = run(task, "finetune", 0, evaluate_every=7)
    assert [one.acc for one in record.within] == [[record.acc[i][: i + 1]] for i in range(3)]
    assert [one.acc for one in run(task, "finetune", 0, evaluate_every=8).within] == [[]] * 3
    assert run(task, "finetune", 0).within == []


def test_an_evaluation_is_that_of_a_run_that_ends_there() -> None:
    """After 4 of 8 steps of the first task as after 4 of 4."""
    halfway = run(synthetic("task", n_tasks=1, iterations=8), "finetune", 0, evaluate_every=4).within[0].acc[0]
    assert halfway == run(synthetic("task", n_tasks=1, iterations=4), "finetune", 0).acc[0]


def test_every_phase_of_a_method_counts_its_iterations() -> None:
    """PackNet retrains for half the budget, 6 + 3; DEN's phases are seen as the whole net answers meanwhile."""
    record = run(synthetic("task", n_tasks=2, iterations=6), "packnet", 0, evaluate_every=1)
    assert [one.iterations for one in record.within] == [one.steps for one in record.flops] == [9, 9]
    den = run(synthetic("task", n_tasks=2, iterations=6), "den", 0, evaluate_every=1)
    assert [one.iterations for one in den.within] == [one.steps for one in den.flops]
    assert den.within[1].acc[-1] == den.acc[1]


def test_a_part_of_a_net_in_training_answers_within_the_whole() -> None:
    """DEN without expansion and split ends in the training of a part, which is put back after its last step."""
    phases = {"expand": False, "split": False, "loss_threshold": 9.0}
    record = run(synthetic("task", n_tasks=2, iterations=5, lr=0.01), "den", 0, overrides=phases, evaluate_every=5)
    after_head, after_part = record.within[1].acc
    assert after_part == record.acc[1] != after_head


def test_seconds_and_memory_are_counted_apart() -> None:
    record = run(synthetic("task", n_tasks=2, iterations=6), "finetune", 0, evaluate_every=1)
    for seconds, peaks in zip(record.timing.seconds, record.peaks, strict=True):
        assert seconds["within"] > 0
        assert "within" in peaks
    others = [value for task in record.timing.seconds for phase, value in task.items() if phase != "within"]
    assert record.timing.total_seconds == pytest.approx(sum(others))


class Stops(Strategy):
    """Is interrupted in the midst of its second task; the switch lets a second try pass."""

    switched_on = True

    def train_step(self, batch: Any) -> None:
        if self.tasks_seen == 1 and self.samples_trained > 33 * 4 and Stops.switched_on:
            raise KeyboardInterrupt
        super().train_step(batch)


@pytest.mark.parametrize("again", [2, 3])
def test_a_resumed_run_has_the_same_curves(again: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for the same, it goes on from its last task; asked for another N, it starts again."""
    task, stops = synthetic("task", n_tasks=3, iterations=6), recipe(f"{__name__}:Stops", name="stops")
    with pytest.raises(KeyboardInterrupt):
        run(task, stops, 0, out=tmp_path, evaluate_every=2)
    stopped = load(next(tmp_path.rglob("*.json")))
    assert (stopped.status, len(stopped.within)) == ("interrupted", 1)
    monkeypatch.setattr(Stops, "switched_on", False)
    resumed = run(task, stops, 0, out=tmp_path, evaluate_every=again)
    assert (resumed.timing.started == stopped.timing.started) or again != 2
    assert facts(resumed) == facts(run(task, stops, 0, evaluate_every=again))


def test_a_recorded_run_is_run_again_for_its_curves_and_for_no_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without, with, with, without, with another N: run, run, known, known, run."""
    command = ["run", "--task", "synthetic_split", "--baseline", "finetune", "--seeds", "1", "--quiet", "--jobs", "1"]
    said = []
    for more in ([], ["--evaluate-every", "20"], ["--evaluate-every", "20"], [], ["--evaluate-every", "10"]):
        assert main([*command, "--out", str(tmp_path), *more]) == 0
        said.append(capsys.readouterr().out.splitlines()[-1][:11])
    assert said == ["1 runs done", "1 runs done", "0 runs done", "0 runs done", "1 runs done"]
    record = load(next(tmp_path.rglob("*.json")))
    assert [len(one.acc) for one in record.within] == [4] * record.task.n_tasks


@pytest.mark.parametrize("every", [0, -1])
def test_a_number_that_is_none_is_refused(every: int) -> None:
    with pytest.raises(UserError, match=f"evaluate_every: must be a whole number above 0, not {every}"):
        run("synthetic_split", "finetune", 0, evaluate_every=every)


# ------------------------------------------------------------------------------------------------------------- records


def seen(every: int, iterations: int, *rows: Sequence[float]) -> Within:
    return Within(every=every, iterations=iterations, acc=[list(row) for row in rows])


ACC = np.array([[0.9, 0.1, 0.1], [0.7, 0.8, 0.1], [0.6, 0.7, 0.9]])
WITHIN = [seen(2, 4, [0.3], [0.9]), seen(2, 5, [0.5, 0.1], [0.6, 0.7]), seen(2, 4, [0.65, 0.2, 0.5], [0.7, 0.6, 0.8])]

RARELY = [seen(4, 4, [0.9]), seen(4, 5, [0.6, 0.7]), seen(4, 4, [0.7, 0.6, 0.8])]


def rows(within: Sequence[Within]) -> list[Matrix]:
    return [np.array(one.acc).reshape(-1, i + 1) for i, one in enumerate(within)]


def test_curves_survive_the_disk_and_are_no_key_of_other_records(tmp_path: Path) -> None:
    record = make_record(acc=ACC, within=WITHIN)
    assert load(record.save(tmp_path)) == record
    text = make_record(acc=ACC).dumps()
    assert "within" not in json.loads(text)
    assert RunRecord.model_validate_json(text).within == []


@pytest.mark.parametrize(
    ("within", "says"),
    [
        (WITHIN[:2], "2 entries for 3 tasks"),
        ([seen(2, 6, [0.3], [0.9]), *WITHIN[1:]], "2 evaluations in 6 iterations, one every 2"),
        ([seen(0, 4), *WITHIN[1:]], "0 evaluations in 4 iterations, one every 0"),
        ([seen(2, 4, [0.3], [0.9, 0.1]), *WITHIN[1:]], "a row of task 1 has not 1 columns"),
        ([seen(2, 4, [0.3], [1.9]), *WITHIN[1:]], "outside"),
    ],
)
def test_curves_that_cannot_be_are_damage(within: Sequence[Within], says: str, tmp_path: Path) -> None:
    path = make_record(acc=ACC, within=within).save(tmp_path)
    with pytest.raises(UserError, match=says):
        load(path)


# ------------------------------------------------------------------------------------------------------------- metrics


def test_min_acc_and_wc_acc_by_hand() -> None:
    """Task 1: .5 .6 .7 in and after task 2, .65 .7 .6 in and after task 3, lowest .5; not the .3 of its own training.

    After tasks alone it would be .6. Task 2: .2 .6 .7 in and after task 3, lowest .2; not the .1 of its own training.
    min-ACC = (.5 + .2) / 2 = .35; WC-ACC = .9 / 3 + 2/3 * .35 = .5333; ACC is (.6 + .7 + .9) / 3 = .7333.
    """
    assert lowest(ACC, rows(WITHIN)).tolist() == [0.5, 0.2]
    assert min_acc(ACC, rows(WITHIN)) == pytest.approx(0.35)
    assert wc_acc(ACC, rows(WITHIN)) == pytest.approx(0.3 + 0.7 / 3)


def test_what_a_method_answers_after_a_task_counts_among_the_evaluations() -> None:
    """Without any within tasks: task 1 .7 and .6, task 2 .7."""
    none = [np.empty((0, i + 1)) for i in range(3)]
    assert lowest(ACC, none).tolist() == [0.6, 0.7]


def test_one_task_has_nothing_to_forget() -> None:
    one = np.array([[0.8]])
    assert np.isnan(min_acc(one, [np.array([[0.2]])]))
    assert wc_acc(one, [np.array([[0.2]])]) == 0.8


def test_curves_of_other_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="for 3 tasks"):
        min_acc(ACC, rows(WITHIN)[:2])
    with pytest.raises(ValueError, match="for 3 tasks"):
        min_acc(ACC, [rows(WITHIN)[1], *rows(WITHIN)[1:]])


@given(st.integers(2, 5), st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_the_worst_case_is_no_better_than_the_end(size: int, count: int, seed: int) -> None:
    """WC-ACC <= ACC, min-ACC is no more than the old tasks' mean at the end, and more evaluations only lower them."""
    rng = np.random.default_rng(seed)
    acc, within = rng.random((size, size)), [rng.random((count, i + 1)) for i in range(size)]
    assert wc_acc(acc, within) <= metrics.average_accuracy(acc) + 1e-12
    assert min_acc(acc, within) <= acc[-1, :-1].mean() + 1e-12
    assert min_acc(acc, within) <= min_acc(acc, [found[1:] for found in within]) + 1e-12


# -------------------------------------------------------------------------------------------------------------- report


def block_of(*records: RunRecord) -> Block:
    return arrange(records)[0].blocks[0]


def test_tables_have_them_where_a_run_has_them_and_nothing_elsewhere() -> None:
    """A run without has no such number: neither zero nor the number at task ends."""
    with_them, without = make_record(acc=ACC, within=WITHIN), make_record(baseline="ewc", acc=ACC)
    assert MEASURES["min_acc"].of(with_them) == pytest.approx(0.35)
    assert MEASURES["wc_acc"].of(with_them) == pytest.approx(0.3 + 0.7 / 3)
    assert MEASURES["min_acc"].of(without) is None
    assert {"min_acc", "wc_acc"} <= set(DEFAULT)
    names = [measure.name for measure in chosen(None, [with_them, without])]
    assert "min_acc" in names
    assert "min_acc" not in [measure.name for measure in chosen(None, [without])]
    assert [measure.name for measure in chosen(["wc_acc"])] == ["wc_acc"]


def test_runs_that_were_looked_at_more_or_less_closely_are_not_averaged() -> None:
    often = make_record(acc=ACC, within=WITHIN)
    rarely = make_record(seed=1, acc=ACC, within=RARELY)
    never = make_record(seed=2, acc=ACC)
    measure = MEASURES["min_acc"]
    assert measure.over([often, rarely]) is None
    found = measure.over([often, never])
    assert found is not None
    assert found.n == 1
    assert found.mean == pytest.approx(0.35)


@pytest.mark.parametrize(("other", "compared"), [(WITHIN, True), (RARELY, False)])
def test_runs_that_were_looked_at_more_or_less_closely_are_not_compared(
    other: Sequence[Within], compared: bool, tmp_path: Path
) -> None:
    for seed in (0, 1):
        make_record(baseline="ewc", seed=seed, acc=ACC, within=WITHIN).save(tmp_path)
        make_record(baseline="er", seed=seed, acc=ACC - 0.05 * (ACC > 0.5), within=other).save(tmp_path)
    if compared:
        found = {line.measure.name: line.found.mean for line in compare(tmp_path, "ewc", ["er"]).lines}
        assert found["wc_acc"] == pytest.approx(0.05 / 3)
    else:
        with pytest.raises(UserError, match="no pair of runs has wc_acc of one N: they were evaluated every 2, "):
            compare(tmp_path, "ewc", ["er"], metrics=["wc_acc"])


def test_a_task_shorter_than_n_has_no_lowest_within_it() -> None:
    """What is seen at task ends alone is no continual evaluation."""
    blind = [Within(every=100, iterations=4, acc=[]) for _ in WITHIN]
    assert MEASURES["min_acc"].of(make_record(acc=ACC, within=blind)) is None


def test_a_tables_caption_says_how_often_each_baseline_was_evaluated() -> None:
    ewc, er = make_record(baseline="ewc", acc=ACC, within=WITHIN), make_record(baseline="er", acc=ACC, within=RARELY)
    for records, said in (
        ([ewc], "Evaluated within tasks every 2 iterations."),
        ([ewc, er], "every 2 (ewc), 4 (er) iterations: what was evaluated more rarely may come out higher"),
    ):
        (found,) = arrange(records)
        (made,) = tables.tables(found, chosen(["min_acc"]))
        assert any(said in sentence for sentence in made.caption)
    (found,) = arrange([ewc, er])
    (made,) = tables.tables(found, chosen(["average_accuracy"]))
    assert not any("Evaluated" in sentence for sentence in made.caption)


def table(*records: RunRecord) -> list[dict[str, str]]:
    plot = within_tasks(block_of(*records), looks([record.baseline.label for record in records]))
    return [dict(zip(plot.header, row, strict=True)) for row in plot.rows]


def test_the_figures_numbers_by_hand() -> None:
    """Task 1 begins at 0, task 2 at 4, task 3 at 9, and it ends at 13. In task 2 after step 2: (.5 + .1) / 2."""
    lines = table(make_record(acc=ACC, within=WITHIN))
    places = [(line["task"], line["iteration"], line["iteration_of_stream"], line["after_task"]) for line in lines]
    assert places == [
        ("1", "2", "2", "no"), ("1", "4", "4", "no"), ("1", "4", "4", "yes"),
        ("2", "2", "6", "no"), ("2", "4", "8", "no"), ("2", "5", "9", "yes"),
        ("3", "2", "11", "no"), ("3", "4", "13", "no"), ("3", "4", "13", "yes"),
    ]  # fmt: skip
    first = [float(line["first_task.mean"]) for line in lines]
    assert first == [0.3, 0.9, 0.9, 0.5, 0.6, 0.7, 0.65, 0.7, 0.6]
    assert float(lines[3]["seen.mean"]) == pytest.approx(0.3)
    assert float(lines[-1]["seen.mean"]) == pytest.approx(2.2 / 3)


def test_runs_are_averaged_where_all_of_them_were_evaluated() -> None:
    """Every 2 of 4 and every 1 of 3 iterations have 2 in common; the first task ends after 3.5 on average."""
    one = make_record(acc=[[0.8]], within=[seen(2, 4, [0.4], [0.8])])
    other = make_record(seed=1, acc=[[0.6]], within=[seen(1, 3, [0.1], [0.5], [0.6])])
    without = make_record(seed=2, acc=[[0.1]])
    lines = table(one, other, without)
    assert [(line["iteration"], line["first_task.mean"], line["first_task.n"]) for line in lines] == [
        ("2", "0.45", "2"), ("3.5", "0.7", "2"),
    ]  # fmt: skip


def test_it_is_drawn_where_runs_have_it_and_says_how_often() -> None:
    records = [
        make_record(baseline=name, seed=seed, acc=ACC, within=WITHIN)
        for name in ("finetune", "ewc", "er", "lwf", "den")
        for seed in (0, 1)
    ]
    block = block_of(*records, make_record(baseline="si", acc=ACC))
    plot = within_tasks(block, looks([group.label for group in block.groups]))
    assert {row[0] for row in plot.rows} == {"finetune", "ewc", "er", "lwf", "den"}
    assert "every 2 iterations" in plot.caption
    assert "n = 2 a baseline" in plot.caption
    assert render(plot) == render(plot)
    assert not within_tasks(block_of(make_record(acc=ACC)), looks(["finetune"])).rows
