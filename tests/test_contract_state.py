"""Every strategy of the suite can be stopped between two tasks, and counts what it would need to go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clbench import checkpoint
from clbench.footprint import footprint, tensors_in
from clbench.records import RunRecord
from clbench.runner import run
from clbench.specs import Scenario, TaskSpec
from clbench.strategies.base import Strategy
from strategy_factory import CPU, HOME, OWN, made, needs, synthetic, weights

BUDGETS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adam that lives on": {"reset_optimizer": False},
    "sgd with momentum that lives on": {
        "reset_optimizer": False, "optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3
    },
}  # fmt: skip
SAME_CODE = {"den_no_expansion", "den_no_split", "dgr_distill", "er_500", "ewc_batched", "ewc_empirical"}
SAME_CODE |= {"hypernet_sampled", "hypernet_small"}
SAME_CODE |= {"agem_500", "der", "der_500", "derpp_500", "gdumb_small", "gem_500", "rehearsal_4400"}
SAME_CODE |= {"cloned_trains", "linked_scale", "shared_trunk_half_frozen", "wsn_3", "wsn_5", "wsn_30", "wsn_50"}
"""Differ from others in settings that touch no state: seen once are enough."""
DISTINCT = [pair for pair in OWN if pair[0] not in SAME_CODE]
CASES = [(*pair, "adam that lives on") for pair in DISTINCT]
CASES += [(*pair, "adam") for pair in HOME if pair in OWN]
CASES += [(*pair, "sgd with momentum that lives on") for pair in HOME if pair in DISTINCT]
"""Every strategy, in every scenario, under every budget."""


def stream(scenario: Scenario, **changes: Any) -> TaskSpec:
    """Two tasks of two classes, 25 steps each."""
    return synthetic(scenario, **{"n_tasks": 2, "iterations": 25, "lr": 0.01, **changes})


def facts(found: RunRecord) -> dict[str, Any]:
    """Return a record without what is allowed to differ between two runs: times and peaks."""
    return found.model_dump(exclude={"timing", "peaks"})


def through_a_file(strategy: Strategy, path: Path) -> Any:
    """Write a strategy's state as a run does; return what is read back."""
    own = {"order": strategy.order, "chance": strategy.chance}
    checkpoint.save(path, {"strategy": strategy.state_dict(), "generators": checkpoint.generator_states(own)})
    return checkpoint.load(path, CPU)


@pytest.mark.parametrize(("baseline", "scenario", "budget"), CASES)
def test_a_strategy_goes_on_from_its_state_to_the_bit(
    baseline: str, scenario: Scenario, budget: str, tmp_path: Path
) -> None:
    """Stopped after each of the first two tasks, with the third task the first one again.

    The one that never stopped and those that did agree in every weight, answer and byte kept.
    """
    task = stream(scenario, **{"n_tasks": 3, "iterations": 6, **BUDGETS[budget]})
    whole, tasks = made(task, baseline, **needs(baseline, scenario))
    train, tests = list(tasks.benchmark.train_stream), list(tasks.benchmark.test_stream)
    order = [train[0], train[1], train[0], train[2]]
    states = []
    for number, experience in enumerate(order):
        whole.train_task(experience)
        if number < 3:
            states.append(through_a_file(whole, tmp_path / f"{number}.checkpoint"))
    for number, state in enumerate(states):
        later, _ = made(task, baseline, **needs(baseline, scenario))
        later.load_state_dict(state["strategy"], order[: number + 1])
        checkpoint.restore_generators(state["generators"], {"order": later.order, "chance": later.chance})
        for experience in order[number + 1 :]:
            later.train_task(experience)
        assert torch.equal(weights(later), weights(whole))
        assert [later.accuracy(test) for test in tests] == [whole.accuracy(test) for test in tests]
        assert footprint(later.holdings()) == footprint(whole.holdings())
        assert later.samples_trained == whole.samples_trained
        assert torch.equal(later.order.get_state(), whole.order.get_state())


@pytest.mark.parametrize(("baseline", "scenario"), [pair for pair in HOME if pair in DISTINCT])
def test_a_run_goes_on_from_its_checkpoint_to_the_same_record(
    baseline: str, scenario: Scenario, tmp_path: Path
) -> None:
    """Interrupted after the first of two tasks, as Ctrl-C does it, then started again."""

    def interrupt(done: int, _: int) -> None:
        raise KeyboardInterrupt

    settings = needs(baseline, scenario)
    task = stream(scenario)
    with pytest.raises(KeyboardInterrupt):
        run(task, baseline, 0, out=tmp_path, overrides=settings, progress=interrupt)
    rest: list[int] = []
    found = run(task, baseline, 0, out=tmp_path, overrides=settings, progress=lambda done, _: rest.append(done))
    assert rest == [2]
    assert facts(found) == facts(run(task, baseline, 0, overrides=settings))


@pytest.mark.parametrize(("baseline", "scenario", "budget"), CASES)
def test_what_is_kept_is_what_the_checkpoint_holds(baseline: str, scenario: Scenario, budget: str) -> None:
    """Bytes needed to go on learning = bytes of every tensor in the state, each storage once.

    Joint training and DEN-Finetune keep data sets besides, which a checkpoint leaves to the stream: their bytes are
    taken off.
    """
    task = stream(scenario, **{"iterations": 6, **BUDGETS[budget]})
    strategy, tasks = made(task, baseline, **needs(baseline, scenario))
    for experience in tasks.benchmark.train_stream:
        strategy.train_task(experience)
        counted = footprint(strategy.holdings())
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in tensors_in(strategy.state_dict())
        }
        data = counted.replay_bytes if baseline in ("joint", "den_finetune") else 0
        assert counted.keep_learning_bytes - data == sum(storages.values())
