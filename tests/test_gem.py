"""GEM: its quadratic programme against other solvers and by hand, what a step becomes, and who is kept."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import quadprog
import torch
from avalanche.training.plugins import GEMPlugin
from numpy.typing import NDArray

from clbench.footprint import footprint
from clbench.loading import Batch, ResidentLoader
from clbench.specs import Scenario
from clbench.strategies.gem import RIDGE, dual, projected
from strategy_factory import gradient, made, synthetic, weights

Array = NDArray[Any]


def programme(tasks: int, seed: int, size: int = 12) -> tuple[Array, Array]:
    """Return random references G (tasks, size) and a gradient (size,)."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(tasks, size)), generator.normal(size=size)


def by_search(products: Array, along: Array, strength: float) -> Array:
    """Return the minimum over v >= strength, by trying every set of bounds that may hold."""
    count = len(along)
    matrix = products + RIDGE * np.eye(count)
    best, found = np.inf, np.zeros(count)
    for free in product([False, True], repeat=count):
        inside = np.array(free)
        v = np.full(count, strength)
        if inside.any():
            rest = along[inside] + matrix[np.ix_(inside, ~inside)] @ v[~inside]
            v[inside] = np.linalg.solve(matrix[np.ix_(inside, inside)], -rest)
        value = v @ matrix @ v / 2 + along @ v
        if (v >= strength - 1e-12).all() and value < best:
            best, found = value, v
    return found


# ------------------------------------------------------------------------------------------------------- the programme


def test_two_orthogonal_tasks_by_hand() -> None:
    """G = [e_1, e_2], g = (-1, -2, 3): v_k = -g_k / 1.001 apart, so g~ = (0, 0, 3) up to the ridge.

    With strength 1.5 the first bound holds, v = (1.5, 2 / 1.001): g~ = (0.5, 0, 3), up to the ridge.
    """
    step, references = torch.tensor([-1.0, -2.0, 3.0]).double(), torch.eye(2, 3).double()
    assert dual(np.eye(2), np.array([-1.0, -2.0]), 0.0) == pytest.approx([1 / 1.001, 2 / 1.001])
    torch.testing.assert_close(
        projected(step, references, 0.0), torch.tensor([-1 + 1 / 1.001, -2 + 2 / 1.001, 3.0]).double()
    )
    torch.testing.assert_close(projected(step, references, 1.5), torch.tensor([0.5, -2 + 2 / 1.001, 3.0]).double())


def test_two_tasks_of_which_one_binds_by_hand() -> None:
    """G = [(1, 0), (1, 1)], g = (-2, 1): only the first is violated by much, and projecting onto it settles both.

    g . g_1 = -2, g . g_2 = -1. With v_2 = 0: v_1 = 2 / 1.001, g~ = (-0.002, 1), g~ . g_2 = 0.998 > 0: so it stays 0.
    """
    references = np.array([[1.0, 0.0], [1.0, 1.0]])
    found = dual(references @ references.T, references @ np.array([-2.0, 1.0]), 0.0)
    assert found == pytest.approx([2 / 1.001, 0.0])


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_the_dual_is_the_best_of_all_active_sets_and_quadprogs(tasks: int, strength: float) -> None:
    for seed in range(40):
        references, step = programme(tasks, seed)
        products, along = references @ references.T, references @ step
        found = dual(products, along, strength)
        assert found == pytest.approx(by_search(products, along, strength), abs=1e-9)
        theirs = quadprog.solve_qp(products + RIDGE * np.eye(tasks), -along, np.eye(tasks), np.full(tasks, strength))[0]
        assert found == pytest.approx(theirs, abs=1e-8)


def test_the_step_is_that_of_avalanches_class() -> None:
    """Float32 there; its strength is a lower bound of the dual, too, and its ridge the same."""
    for seed in range(20):
        references, step = programme(4, seed)
        plugin = GEMPlugin(1, 0.5)
        plugin.G = torch.from_numpy(references).float()
        theirs = plugin.solve_quadprog(torch.from_numpy(step).float())
        ours = projected(torch.from_numpy(step), torch.from_numpy(references), 0.5)
        torch.testing.assert_close(ours.float(), theirs, rtol=1e-3, atol=1e-3)


def test_without_strength_no_old_loss_is_raised_and_no_nearer_step_does_that() -> None:
    """g~ . g_k >= -0.001 v_k, the ridge's part; of 500 random vectors that keep all signs none is nearer to g."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        references, step = (torch.from_numpy(array) for array in programme(3, seed, size=4))
        found = projected(step, references, 0.0)
        parts = torch.from_numpy(dual((references @ references.T).numpy(), (references @ step).numpy(), 0.0))
        assert bool((references @ found >= -RIDGE * parts - 1e-9).all())
        distance = (found - step).norm()
        others = step + torch.randn(500, 4, generator=generator, dtype=torch.float64) * distance
        others = others[(others @ references.T >= 0).all(dim=1)]
        assert len(others) == 0 or float((others - step).norm(dim=1).min()) > float(distance) - 1e-2


def test_tasks_whose_gradients_agree_entirely_are_no_hindrance() -> None:
    """Twice the same reference: G G' is singular, the ridge makes the programme solvable, the step is as with one."""
    references, step = (torch.from_numpy(array) for array in programme(1, 3))
    one = references if references @ step < 0 else -references
    both = projected(step, torch.cat([one, one]), 0.0)
    torch.testing.assert_close(both, projected(step, one, 0.0), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------- the step


def prepared(scenario: Scenario, **settings: Any) -> tuple[Any, Batch]:
    """Return GEM after two tasks, about to train the third, and a batch of that."""
    task = synthetic(scenario, n_tasks=3, optimizer="sgd", lr=0.1)
    strategy, stream = made(task, "gem", buffer=60, per_task=20, **settings)
    first, second, third = stream.benchmark.train_stream
    strategy.train([first, second])
    strategy.begin_task(third)
    strategy.before_task(third)
    return strategy, next(iter(ResidentLoader([stream.train[2]], 16)))


@pytest.mark.parametrize("strength", [0.0, 0.5])
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_a_step_is_the_projected_one(scenario: Scenario, strength: float) -> None:
    """Gradients on the samples of each past task, the programme by search, and the step it gives; all of it apart."""
    strategy, batch = prepared(scenario, strength=strength)
    places = list(strategy.memory.visits().values())
    assert [len(one) for one in places] == [20, 20]
    seen = Counter[bool]()
    for _ in range(30):
        step = gradient(strategy, batch).double().numpy()
        references = np.stack([gradient(strategy, strategy.memory.take(one)).double().numpy() for one in places])
        along = references @ step
        if (along < 0).any():
            step = step + by_search(references @ references.T, along, strength) @ references
        seen[bool((along < 0).any())] += 1
        expected = weights(strategy).double().numpy() - 0.1 * step
        before = strategy.samples_trained
        strategy.train_step(batch)
        assert weights(strategy).numpy() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert strategy.samples_trained == before + 16 + 40
    assert seen[True] > 0, "no step was projected: the test says nothing"


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_the_first_task_is_finetunings_to_the_bit(scenario: Scenario) -> None:
    found = []
    for baseline in ("finetune", "gem"):
        strategy, stream = made(synthetic(scenario, n_tasks=1), baseline)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    assert torch.equal(*found)


def test_strength_matters() -> None:
    found = []
    for strength in (0.0, 0.5):
        strategy, stream = made(synthetic("domain", n_tasks=2), "gem", strength=strength)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    assert not torch.equal(*found)


def test_it_keeps_more_of_the_past_than_finetuning() -> None:
    """Domain-incremental, plain SGD: the mean accuracy on the first three tasks after the fourth."""
    found = {}
    for baseline in ("finetune", "gem"):
        task = synthetic("domain", n_tasks=4, optimizer="sgd", lr=0.1)
        strategy, stream = made(task, baseline, **({} if baseline == "finetune" else {"buffer": 120, "per_task": 30}))
        strategy.train(list(stream.benchmark.train_stream))
        found[baseline] = sum(strategy.accuracy(test) for test in list(stream.benchmark.test_stream)[:3]) / 3
    assert found["gem"] > found["finetune"] + 0.02


# ---------------------------------------------------------------------------------------------------------- the memory


def test_with_all_room_shared_every_task_gives_way_to_the_next() -> None:
    """24 places and all samples offered: 24, then 12 and 12, then 8 of each of three."""
    strategy, stream = made(synthetic("task", n_tasks=3), "gem", buffer=24, per_task=0)
    for done, experience in enumerate(stream.benchmark.train_stream, 1):
        strategy.train_task(experience)
        assert Counter(strategy.memory.tasks.tolist()) == dict.fromkeys(range(done), 24 // done)
        assert [len(one) for one in strategy.memory.visits().values()] == [24 // done] * done


def test_replay_trains_on_the_memory_as_often_as_it_fits() -> None:
    """400 new samples and 24 kept, 16 times in 400: 400 + 384 of them make a pass."""
    strategy, stream = made(synthetic("domain", n_tasks=2), "gem", buffer=24, per_task=0, replay=True)
    first, second = stream.benchmark.train_stream
    assert sum(map(len, strategy.training_data(first))) == 400
    strategy.train_task(first)
    assert sum(map(len, strategy.training_data(second))) == 400 + 16 * 24


def test_what_is_kept_is_counted_to_the_byte_and_no_gradient_stays() -> None:
    strategy, stream = made(synthetic("domain", n_tasks=2), "gem", buffer=16, per_task=8)
    strategy.train(list(stream.benchmark.train_stream))
    counted = footprint(strategy.holdings())
    assert counted.replay_samples == 16
    assert counted.replay_bytes == 16 * (64 + 16 + 1)
    assert counted.keep_learning_bytes == counted.parameter_bytes + counted.replay_bytes
    assert not strategy.undeclared()
