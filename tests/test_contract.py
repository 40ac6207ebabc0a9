"""What every shipped baseline has to keep to, whatever its method: learning, randomness, shapes of streams."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from clbench.footprint import footprint
from clbench.recipes import load_baseline
from clbench.records import RunRecord
from clbench.runner import run
from clbench.specs import Scenario, TaskSpec
from clbench.strategies.build import find_class
from clbench.strategies.generating import Generating
from strategy_factory import EVERY, HOME, OWN, defined, made, needs, synthetic, weights


def stream(scenario: Scenario, **changes: Any) -> TaskSpec:
    """Two tasks of two classes, 25 steps each."""
    return synthetic(scenario, **{"n_tasks": 2, "iterations": 25, "lr": 0.01, **changes})


@functools.cache
def record(baseline: str, scenario: Scenario, seed: int = 0) -> RunRecord:
    return run(stream(scenario), baseline, seed, overrides=needs(baseline, scenario))


def facts(found: RunRecord) -> dict[str, Any]:
    """Return a record without what is allowed to differ between two runs: times and peaks."""
    return found.model_dump(exclude={"timing", "peaks"})


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize(("baseline", "scenario"), EVERY)
def test_it_learns_what_it_is_taught(baseline: str, scenario: Scenario) -> None:
    """Every task right after it was trained; chance is a half.

    Some have to be excused from more than chance on the second task: frozen features of the first one; DER on a
    fixed head, whose stored logits take four times the steps to let new classes in; and what infers the task by
    entropy, as the first task's answers to the second's images are, after so few steps, as sure as its own.
    """
    found = record(baseline, scenario)
    if baseline.startswith("der") and scenario == "class":
        found = run(stream(scenario, iterations=100), baseline, 0, overrides=needs(baseline, scenario))
    assert found.status == "done", found.traceback
    assert found.acc[0][0] > 0.9
    infers = scenario != "task" and issubclass(find_class(load_baseline(baseline)), Generating)
    if baseline != "frozen" and not infers:
        assert found.acc[1][1] > 0.7


def test_finetuning_forgets_where_it_must_and_joint_training_does_not() -> None:
    """Class-incremental: the classes of task 1, after the last task."""
    assert record("finetune", "class").acc[-1][0] < 0.2
    assert record("joint", "class").acc[-1][0] > 0.85


# ----------------------------------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize(("baseline", "scenario"), HOME)
def test_the_same_seed_gives_the_same_record_and_another_seed_another(baseline: str, scenario: Scenario) -> None:
    again = run(stream(scenario), baseline, 0, overrides=needs(baseline, scenario))
    assert facts(again) == facts(record(baseline, scenario))
    other = record(baseline, scenario, 1)
    assert (other.acc, other.acc_init) != (again.acc, again.acc_init)


TOGETHER = {"joint", "rehearsal", "rehearsal_4400", "icarl", "gdumb", "gdumb_small"}
"""They train on other samples in the same passes, or on no others: their passes are of another length."""


@pytest.mark.parametrize(("baseline", "scenario"), [pair for pair in OWN if pair[0] not in TOGETHER])
def test_a_methods_own_chance_leaves_the_order_of_the_data_alone(baseline: str, scenario: Scenario) -> None:
    """After the same tasks the generator of the order is where finetuning's is, whatever else was drawn."""
    states = []
    for name in ("finetune", baseline):
        strategy, tasks = made(stream(scenario), name, **needs(name, scenario))
        strategy.train(list(tasks.benchmark.train_stream))
        states.append(strategy.order.get_state())
    assert torch.equal(*states)


WEAK: list[tuple[str, dict[str, Any]]] = [
    ("ewc", {"lam": 0.0, "fisher": fisher}) for fisher in ("exact", "sampled", "predicted", "empirical", "batched")
]
WEAK += [("si", {"c": 0.0}), ("mas", {"lam": 0.0}), ("l2", {"lam": 0.0}), ("lwf", {"alpha": 0.0})]
WEAK += [("gpm", {"threshold": 0.0, "rise": 0.0})]


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
@pytest.mark.parametrize(("baseline", "settings"), WEAK)
def test_without_strength_it_is_finetuning_to_the_bit(
    baseline: str, settings: dict[str, Any], scenario: Scenario
) -> None:
    if not defined(baseline, scenario):
        return
    found = []
    for name, its in (("finetune", {}), (baseline, settings)):
        strategy, tasks = made(stream(scenario, n_tasks=3, iterations=10), name, **its)
        strategy.train(list(tasks.benchmark.train_stream))
        found.append(weights(strategy))
    assert torch.equal(*found)


# ---------------------------------------------------------------------------------------------------- shapes of streams


@pytest.mark.parametrize(("baseline", "scenario"), HOME)
def test_it_works_for_one_task(baseline: str, scenario: Scenario) -> None:
    strategy, tasks = made(stream(scenario, n_tasks=1), baseline, **needs(baseline, scenario))
    strategy.train_task(tasks.benchmark.train_stream[0])
    assert strategy.accuracy(tasks.benchmark.test_stream[0]) > 0.9


@pytest.mark.parametrize(("baseline", "scenario"), [pair for pair in EVERY if pair[1] != "domain"])
def test_it_works_for_tasks_of_unequal_size(baseline: str, scenario: Scenario) -> None:
    """Two classes, then three, then one alone."""
    strategy, tasks = made(stream(scenario, n_tasks=3, classes=[2, 3, 1]), baseline, **needs(baseline, scenario))
    for number, experience in enumerate(tasks.benchmark.train_stream):
        strategy.train_task(experience)
        share = strategy.accuracy(tasks.benchmark.test_stream[number])
        assert number > 0 or share > 0.9


@pytest.mark.parametrize(("baseline", "scenario"), HOME)
def test_the_same_task_twice_in_a_row_is_known_better_not_worse(baseline: str, scenario: Scenario) -> None:
    strategy, tasks = made(stream(scenario), baseline, **needs(baseline, scenario))
    first, test = tasks.benchmark.train_stream[0], tasks.benchmark.test_stream[0]
    for _ in range(2):
        strategy.train_task(first)
    assert strategy.accuracy(test) > 0.95
    footprint(strategy.holdings())
    strategy.train_task(tasks.benchmark.train_stream[1])
    assert strategy.accuracy(tasks.benchmark.test_stream[1]) > 0.6
