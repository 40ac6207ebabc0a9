"""A-GEM: the projection, what it is projected onto, and who is kept."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from clbench.footprint import footprint
from clbench.loading import Batch, ResidentLoader
from clbench.specs import Scenario
from clbench.strategies.agem import AGEM
from clbench.strategies.base import Setup
from clbench.strategies.constrained import by_turns
from strategy_factory import CPU, budget, gradient, linear_net, made, synthetic, tensor_task, weights


def plain() -> AGEM:
    """A-GEM on a linear net of one pixel and two classes: four parameters, w_0, w_1, b_0, b_1."""
    setup = Setup(new_net=linear_net(1, 2, torch.zeros(2, 1), torch.zeros(2)), train=budget(), device=CPU, seed=0)
    return AGEM(setup=setup, config=AGEM.Config(buffer=4, per_task=2, sample=2))


def prepared(scenario: Scenario, **settings: Any) -> tuple[Any, Batch]:
    """Return A-GEM after a first task, about to train the second, and a batch of that."""
    task = synthetic(scenario, n_tasks=2, optimizer="sgd", lr=0.1)
    strategy, stream = made(task, "agem", **settings)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    strategy.begin_task(second)
    strategy.before_task(second)
    return strategy, next(iter(ResidentLoader([stream.train[1]], 16)))


# ------------------------------------------------------------------------------------------------------ the projection


def test_a_gradient_against_the_reference_loses_its_part_along_it() -> None:
    """With g = (1, 0, 2, 0), r = (-1, 1, 0, 0): g . r = -1, r . r = 2, so g + r / 2 = (0.5, 0.5, 2, 0), across r."""
    strategy = plain()
    strategy.set_gradient(torch.tensor([1.0, 0.0, 2.0, 0.0]).double())
    strategy.reference = torch.tensor([-1.0, 1.0, 0.0, 0.0]).double()
    strategy.after_backward()
    assert strategy.gradient().tolist() == [0.5, 0.5, 2.0, 0.0]


def test_a_gradient_along_the_reference_stays_as_it_is() -> None:
    """With g . r = 0.1 and with 0: neither raises the loss on the draw."""
    for last in (0.1, 0.0):
        strategy = plain()
        step = torch.tensor([0.3, 0.0, 2.0, last]).double()
        strategy.set_gradient(step)
        strategy.reference = torch.tensor([0.0, -1.0, 0.0, 1.0]).double()
        strategy.after_backward()
        assert torch.equal(strategy.gradient(), step)


def test_the_projection_is_the_nearest_vector_that_does_not_raise_the_loss() -> None:
    """Of 2,000 random vectors v with v . r >= 0 none is nearer to g than what is found."""
    generator = torch.Generator().manual_seed(0)
    strategy = plain()
    for _ in range(20):
        step, reference = torch.randn(2, 4, generator=generator, dtype=torch.float64)
        if step @ reference > 0:
            reference = -reference
        strategy.set_gradient(step)
        strategy.reference = reference
        strategy.after_backward()
        found = strategy.gradient()
        others = step + torch.randn(2000, 4, generator=generator, dtype=torch.float64) * (found - step).norm()
        others = others[others @ reference >= 0]
        assert abs(float(found @ reference)) < 1e-12
        assert float((others - step).norm(dim=1).min()) >= float((found - step).norm())


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_a_step_is_the_projected_one(scenario: Scenario) -> None:
    """The draw's gradient and the batch's, taken apart; where they disagree the step is g - (g . r / r . r) r."""
    strategy, batch = prepared(scenario, buffer=60, per_task=60, sample=32)
    seen = Counter[bool]()
    for _ in range(40):
        chance = strategy.chance.get_state()
        past = strategy.memory.draw(32)
        strategy.chance.set_state(chance)
        step, reference = gradient(strategy, batch), gradient(strategy, past)
        along = step @ reference
        if along < 0:
            step = step - along / (reference @ reference) * reference
        seen[bool(along < 0)] += 1
        expected = weights(strategy) - 0.1 * step
        strategy.train_step(batch)
        torch.testing.assert_close(weights(strategy), expected, rtol=1e-5, atol=1e-6)
    assert seen[True] > 0, "no step was projected: the test says nothing"


def test_another_tasks_head_moves_only_where_a_step_is_projected() -> None:
    strategy, batch = prepared("task", buffer=60, per_task=60, sample=60)
    for _ in range(40):
        head = torch.cat([parameter.detach().flatten() for parameter in strategy.model.task_parameters()[0]])
        along = gradient(strategy, batch) @ gradient(strategy, strategy.memory.take(torch.arange(60)))
        strategy.train_step(batch)
        now = torch.cat([parameter.detach().flatten() for parameter in strategy.model.task_parameters()[0]])
        assert torch.equal(now, head) == bool(along >= 0)


def test_a_head_without_part_in_a_projected_step_has_no_gradient() -> None:
    """A gradient of zeros is not none: an optimiser with a memory of its own would go on moving the head."""
    strategy, batch = prepared("task")
    parameters = list(strategy.model.parameters())
    strategy.optimizer.zero_grad()
    torch.autograd.backward(strategy.loss_of(batch))
    step = strategy.gradient()
    strategy.set_gradient(step)
    assert [parameter.grad is None for parameter in strategy.model.task_parameters()[0]] == [True, True]
    strategy.set_gradient(step + 1)
    assert all(parameter.grad is not None for parameter in parameters)


# --------------------------------------------------------------------------------------------------------- finetuning


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_the_first_task_is_finetunings_to_the_bit(scenario: Scenario) -> None:
    """There is nothing to project onto yet."""
    found = []
    for baseline in ("finetune", "agem"):
        strategy, stream = made(synthetic(scenario, n_tasks=1), baseline)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    assert torch.equal(*found)


def test_the_second_task_is_not() -> None:
    found = []
    for baseline in ("finetune", "agem"):
        strategy, stream = made(synthetic("domain", n_tasks=2), baseline)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    assert not torch.equal(*found)


def test_it_keeps_more_of_the_past_than_finetuning() -> None:
    """Domain-incremental, plain SGD: the mean accuracy on the first three tasks after the fourth."""
    found = {}
    for baseline in ("finetune", "agem"):
        task = synthetic("domain", n_tasks=4, optimizer="sgd", lr=0.1)
        strategy, stream = made(task, baseline, **({} if baseline == "finetune" else {"buffer": 120, "per_task": 30}))
        strategy.train(list(stream.benchmark.train_stream))
        found[baseline] = sum(strategy.accuracy(test) for test in list(stream.benchmark.test_stream)[:3]) / 3
    assert found["agem"] > found["finetune"] + 0.02


# ---------------------------------------------------------------------------------------------------------- the memory


def test_so_many_of_every_task_are_kept_and_drawn_without_repetition() -> None:
    strategy, stream = made(synthetic("task", n_tasks=4), "agem", buffer=40, per_task=10, sample=25)
    for done, experience in enumerate(stream.benchmark.train_stream, 1):
        strategy.train_task(experience)
        assert Counter(strategy.memory.tasks[: len(strategy.memory)].tolist()) == dict.fromkeys(range(done), 10)
    assert len(strategy.memory.places(25).unique()) == 25


def test_balanced_takes_turns_between_classes() -> None:
    """Six of class 0, two of class 1, in random order: the first four are two of each, whichever."""
    task = tensor_task(torch.zeros(8, 1, 1, 1, dtype=torch.uint8), [0, 0, 0, 1, 0, 0, 1, 0])
    order = torch.tensor([7, 5, 6, 0, 3, 1, 2, 4])
    turns = order[by_turns(task, order)]
    assert turns.tolist() == [7, 6, 5, 3, 0, 1, 2, 4]


def test_balanced_keeps_as_many_of_every_class() -> None:
    strategy, stream = made(synthetic("class", n_tasks=3), "agem", buffer=60, per_task=20, balanced=True)
    strategy.train(list(stream.benchmark.train_stream))
    assert Counter(strategy.memory.labels.tolist()) == dict.fromkeys(range(6), 10)


def test_a_reservoir_gives_early_tasks_all_the_room_until_others_come() -> None:
    """20 places and 15 offered a task: 15 are there after one, 20 of 30 after two."""
    strategy, stream = made(synthetic("task", n_tasks=2), "agem", buffer=20, per_task=15, policy="reservoir")
    sizes = []
    for experience in stream.benchmark.train_stream:
        strategy.train_task(experience)
        sizes.append(len(strategy.memory))
    assert sizes == [15, 20]
    assert strategy.memory.seen == 30


def test_what_is_kept_is_counted_to_the_byte_and_no_gradient_stays() -> None:
    strategy, stream = made(synthetic("domain", n_tasks=2), "agem", buffer=16, per_task=8)
    strategy.train(list(stream.benchmark.train_stream))
    counted = footprint(strategy.holdings())
    assert counted.replay_samples == 16
    assert counted.replay_bytes == 16 * (64 + 16 + 1)
    assert counted.keep_learning_bytes == counted.parameter_bytes + counted.replay_bytes
    assert not strategy.undeclared()
