"""Experience replay: what a batch becomes, what the memory is shown, and that nothing else is disturbed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from clbench.footprint import footprint
from clbench.loading import Batch, ResidentLoader
from clbench.specs import Scenario
from strategy_factory import made, synthetic, tensor_task, weights

POLICIES = ("er", "er_ring", "er_balanced")


def test_with_nothing_to_replay_it_is_finetuning() -> None:
    """The very first step finds an empty memory; what it offers afterwards changes no weight."""
    found = []
    for baseline in ("finetune", "er"):
        strategy, stream = made(synthetic(n_tasks=1, iterations=1), baseline)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    assert torch.equal(*found)


@pytest.mark.parametrize("baseline", POLICIES)
def test_the_order_of_the_data_is_finetunings(baseline: str) -> None:
    """The memory draws from a generator of its own: that of the order ends in the same state."""
    states = []
    for name in ("finetune", baseline):
        strategy, stream = made(synthetic(n_tasks=2), name)
        strategy.train(list(stream.benchmark.train_stream))
        states.append(strategy.order.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_a_step_descends_the_mean_loss_over_new_and_old_samples(scenario: Scenario) -> None:
    """16 new and 16 old samples, each through its own task's head: the mean of 32 cross-entropies, one by one."""
    task = synthetic(scenario, n_tasks=2, optimizer="sgd", lr=0.1)
    strategy, stream = made(task, "er", replay_batch_size=16)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    strategy.begin_task(second)
    strategy.before_task(second)
    batch = next(iter(ResidentLoader([stream.train[1]], 16)))
    chance = strategy.chance.get_state()
    past = strategy.memory.draw(16)
    strategy.chance.set_state(chance)
    losses = []
    for part in (batch, past):
        for x, y in zip(part.x, part.y, strict=True):
            label = part.t if isinstance(part.t, int) else 0
            losses.append(torch.nn.functional.cross_entropy(strategy.model(x[None], label), y[None]))
    assert past.t == 0
    parameters = [parameter for parameter in strategy.model.parameters()]
    gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters)
    expected = weights(strategy) - 0.1 * torch.cat([gradient.flatten() for gradient in gradients])
    before = strategy.samples_trained
    strategy.train_step(batch)
    torch.testing.assert_close(weights(strategy), expected, rtol=1e-5, atol=1e-6)
    assert strategy.samples_trained == before + 32


def test_old_samples_go_through_the_heads_of_their_own_tasks() -> None:
    strategy, stream = made(synthetic(n_tasks=3), "er", replay_batch_size=30)
    strategy.train(list(stream.benchmark.train_stream)[:2])
    strategy.begin_task(stream.benchmark.train_stream[2])
    joined = strategy.rehearse(next(iter(ResidentLoader([stream.train[2]], 16))))
    assert isinstance(joined.t, torch.Tensor)
    assert joined.t[:16].tolist() == [2] * 16
    assert set(joined.t[16:].tolist()) == {0, 1}
    logits = strategy.model(joined.x, joined.t)
    for row in (0, 20, 45):
        alone = strategy.model(joined.x[row : row + 1], int(joined.t[row]))
        torch.testing.assert_close(logits[row : row + 1, :2], alone)


@pytest.mark.parametrize("baseline", POLICIES)
def test_every_sample_of_a_task_is_offered_once_whatever_the_budget(baseline: str) -> None:
    """In 3 epochs of 400 samples the memory sees 400 a task; in 5 steps of 32 it sees 160."""
    budgets: tuple[tuple[dict[str, Any], int], ...] = (({"epochs": 3}, 400), ({"iterations": 5}, 160))
    for budget, seen in budgets:
        strategy, stream = made(synthetic(n_tasks=2, **budget), baseline)
        for done, experience in enumerate(stream.benchmark.train_stream, 1):
            strategy.train_task(experience)
            assert strategy.memory.seen == seen * done


@pytest.mark.parametrize("baseline", ["er_ring", "er_balanced"])
def test_tasks_of_the_same_labels_share_the_memory_of_a_run(baseline: str) -> None:
    """Domain-incremental: 48 places after three tasks of labels 0 and 1 are 48 / 6 = 8 for each label of each task.

    Were the tasks not told apart, a ring would hold the 24 latest samples of each label, all of them of the last task.
    """
    strategy, stream = made(synthetic("domain", n_tasks=3), baseline, buffer=48)
    home = {
        image.numpy().tobytes(): number
        for number, task in enumerate(stream.train)
        for image in task.stored(torch.arange(len(task)))
    }
    for done, experience in enumerate(stream.benchmark.train_stream, 1):
        strategy.train_task(experience)
        memory = strategy.memory
        held = Counter(
            (home[image.numpy().tobytes()], label)
            for image, label in zip(memory.images, memory.labels.tolist(), strict=True)
        )
        assert held == {(task, label): 24 // done for task in range(done) for label in (0, 1)}


def test_what_is_kept_is_counted_to_the_byte() -> None:
    """32 places of 8 x 8 bytes, two int64 (label, task) and one byte (normalisation): 32 * (64 + 16 + 1)."""
    strategy, stream = made(synthetic(n_tasks=1), "er", buffer=32)
    strategy.train(list(stream.benchmark.train_stream))
    counted = footprint(strategy.holdings())
    assert counted.replay_samples == 32
    assert counted.replay_bytes == 32 * (64 + 16 + 1)
    assert counted.keep_learning_bytes == counted.parameter_bytes + counted.replay_bytes


def test_replay_keeps_what_finetuning_forgets() -> None:
    """Class-incremental: without old samples the old classes get no answer any more."""
    first = {}
    for baseline in ("finetune", *POLICIES):
        strategy, stream = made(synthetic("class", n_tasks=3), baseline)
        strategy.train(list(stream.benchmark.train_stream))
        first[baseline] = strategy.accuracy(stream.benchmark.test_stream[0])
    assert first["finetune"] < 0.2
    assert min(first[baseline] for baseline in POLICIES) > 0.5


def test_a_batch_of_no_known_source_is_replayed_to_but_not_kept() -> None:
    strategy, stream = made(synthetic(n_tasks=1), "er")
    strategy.before_task(stream.benchmark.train_stream[0])
    task = tensor_task(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), [0, 1, 0, 1])
    strategy.rehearse(Batch(task.inputs(torch.arange(4)), task.labels, 0))
    assert len(strategy.memory) == 0
