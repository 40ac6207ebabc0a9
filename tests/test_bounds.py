"""The bounds: joint training, one net per task, frozen features. What makes each of them a bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.specs import ResNet18Model, Scenario, TaskSpec
from strategy_factory import made, synthetic, weights


def trained(task: TaskSpec, baseline: str, n_tasks: int | None = None, **overrides: Any) -> tuple[Any, Any]:
    strategy, stream = made(task, baseline, **overrides)
    strategy.train(list(stream.benchmark.train_stream)[:n_tasks])
    return strategy, stream


@pytest.mark.parametrize("baseline", ["joint", "independent", "frozen"])
def test_on_one_task_every_bound_is_finetuning(baseline: str) -> None:
    task = synthetic(n_tasks=1)
    assert torch.equal(weights(trained(task, baseline)[0]), weights(trained(task, "finetune")[0]))


# ---------------------------------------------------------------------------------------------------------------- joint


def test_joint_forgets_nothing_where_finetuning_forgets_all() -> None:
    """Class-incremental: the first of three tasks, after the third."""
    joint, stream = trained(synthetic("class", n_tasks=3), "joint")
    finetune, _ = trained(synthetic("class", n_tasks=3), "finetune")
    assert joint.accuracy(stream.benchmark.test_stream[0]) > 0.9
    assert finetune.accuracy(stream.benchmark.test_stream[0]) < 0.2


def test_joint_counts_every_sample_it_keeps() -> None:
    """400 images a task of 64 bytes and a label of 8; a task that comes again adds none."""
    strategy, stream = made(synthetic(n_tasks=2), "joint")
    first, second = stream.benchmark.train_stream
    for experience, samples in ((first, 400), (second, 800), (first, 800)):
        strategy.train_task(experience)
        counted = footprint(strategy.holdings())
        assert counted.replay_samples == samples
        assert counted.replay_bytes == samples * (64 + 8)


@pytest.mark.parametrize("reset", [True, False])
def test_joint_with_restart_starts_every_task_from_the_first_net(reset: bool) -> None:
    """Nothing of the old net is left, neither weights nor the optimiser's state: both nets are the same at birth."""
    task = synthetic(n_tasks=2, optimizer="sgd", lr=0.1, momentum=0.9, reset_optimizer=reset)
    strategy, stream = made(task, "joint", restart=True)
    first, second = stream.benchmark.train_stream
    strategy.begin_task(first)
    birth = weights(strategy)
    strategy.train_task(first)
    strategy.begin_task(second)
    strategy.before_task(second)
    assert torch.equal(weights(strategy)[: len(birth)], birth)
    assert not strategy.optimizer.state
    own = {id(parameter) for parameter in strategy.model.parameters()}
    assert {id(parameter) for parameter in strategy.optimizer.param_groups[0]["params"]} == own


def test_joint_without_restart_goes_on() -> None:
    strategy, stream = made(synthetic(n_tasks=2), "joint", restart=False)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    before = weights(strategy)
    strategy.begin_task(second)
    strategy.before_task(second)
    assert torch.equal(weights(strategy)[: len(before)], before)


# ---------------------------------------------------------------------------------------------------------- independent


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_an_independent_net_may_begin_as_the_last_one(scenario: Scenario) -> None:
    """What both nets have: all of it under one head, all but the head where every task has one. Then each goes alone.

    The net it was copied from stays what it is.
    """
    strategy, stream = made(synthetic(scenario, n_tasks=2), "independent", begins="previous")
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    last = {name: value.clone() for name, value in strategy.model.state_dict().items()}
    fresh = strategy.setup.new_net().state_dict()
    strategy.begin_task(second)
    begun = {name: value.clone() for name, value in strategy.model.state_dict().items()}
    for name, value in begun.items():
        own_head = scenario == "task" and name.startswith("head")
        assert own_head or torch.equal(value, last[name])
        assert own_head or not torch.equal(value, fresh[name])
    strategy.train_task(second)
    assert not torch.equal(weights(strategy), torch.cat([value.flatten() for value in begun.values()]))
    assert all(torch.equal(value, last[name]) for name, value in strategy.nets[0].state_dict().items())


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_independent_nets_forget_nothing_at_all(scenario: Scenario) -> None:
    """Every column of the accuracy matrix is constant from its own task on, to the bit; the oracle finds the net."""
    strategy, stream = made(synthetic(scenario, n_tasks=3), "independent")
    tests = list(stream.benchmark.test_stream)
    rows = []
    for experience in stream.benchmark.train_stream:
        strategy.train_task(experience)
        rows.append([strategy.accuracy(test) for test in tests])
    for column in range(3):
        assert len({row[column] for row in rows[column:]}) == 1
        assert rows[column][column] > 0.95


def test_independent_nets_cost_a_net_for_every_task() -> None:
    strategy, stream = made(synthetic(n_tasks=3), "independent")
    one = sum(parameter.numel() for parameter in trained(synthetic(n_tasks=1), "finetune")[0].model.parameters())
    for done, experience in enumerate(stream.benchmark.train_stream, 1):
        strategy.train_task(experience)
        for test in stream.benchmark.test_stream:
            strategy.accuracy(test)
        counted = footprint(strategy.holdings())
        assert (counted.parameters, counted.parameters_shared) == (done * one, 0)
        assert counted.answer_bytes == counted.keep_learning_bytes == done * one * 4


def test_a_task_seen_again_goes_on_with_its_own_net() -> None:
    strategy, stream = made(synthetic(n_tasks=2), "independent")
    first, second = stream.benchmark.train_stream
    strategy.train([first, second])
    other = weights_of(strategy.nets[1])
    strategy.train(first)
    assert len(strategy.nets) == 2
    assert strategy.model is strategy.nets[0]
    assert torch.equal(weights_of(strategy.nets[1]), other)


def weights_of(net: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().clone() for parameter in net.parameters()])


def test_independent_nets_are_refused_where_no_task_is_named() -> None:
    with pytest.raises(UserError, match="not defined in the class-incremental scenario"):
        made(synthetic("class"), "independent")


# --------------------------------------------------------------------------------------------------------------- frozen


def test_frozen_features_stay_as_the_first_task_left_them_to_the_bit() -> None:
    """Weights, and the means and variances of batch normalisation, which training mode alone would move.

    Momentum and weight decay that outlive the task, and the validation pass of a schedule, must not move them either.
    """
    schedule = {"kind": "plateau", "factor": 0.5, "patience": 1, "min_lr": 1e-6}
    task = synthetic(n_tasks=3, epochs=2, batch_size=100, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0.01,
                     reset_optimizer=False, schedule=schedule)  # fmt: skip
    task = task.model_copy(update={"model": ResNet18Model(kind="resnet18", width=2)})
    strategy, stream = made(task, "frozen")
    experiences = list(stream.benchmark.train_stream)
    born = {name: value.clone() for name, value in strategy.model.trunk.state_dict().items()}
    strategy.train_task(experiences[0])
    kept = {name: value.clone() for name, value in strategy.model.trunk.state_dict().items()}
    assert any("running_mean" in name for name in kept)
    assert all(not torch.equal(kept[name], born[name]) for name in kept)
    for experience in experiences[1:]:
        head = strategy.model.head.heads["0"].blocks[0].weight.clone()
        strategy.train_task(experience)
        assert all(torch.equal(value, kept[name]) for name, value in strategy.model.trunk.state_dict().items())
        assert torch.equal(strategy.model.head.heads["0"].blocks[0].weight, head)


def test_frozen_features_are_told_from_trainable_weights() -> None:
    """After task 1 only heads train: 2 outputs on 32 features, 66 weights a task. The optimiser keeps no more."""
    strategy, stream = made(synthetic(n_tasks=3, reset_optimizer=False), "frozen")
    for done, experience in enumerate(stream.benchmark.train_stream, 1):
        strategy.train_task(experience)
        counted = footprint(strategy.holdings())
        assert counted.parameters_trainable == 66 * done
        # Adam: two moments per weight, and a step count for each of the two tensors of a head.
        assert counted.optimizer_bytes == done * (66 * 2 * 4 + 2 * 4)
