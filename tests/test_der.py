"""DER and DER++: which logits are kept, what a step descends, and that each term has its own draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.loading import Batch, ResidentLoader
from clbench.specs import Scenario
from clbench.strategies.base import Setup
from clbench.strategies.der import DER, distance
from strategy_factory import CPU, budget, linear_net, made, synthetic, tensor_task, weights


def small(weight: Tensor, bias: Tensor, **settings: Any) -> DER:
    """DER on a linear net of two pixels and two classes, lr 0.1."""
    setup = Setup(new_net=linear_net(2, 2, weight, bias), train=budget(), device=CPU, seed=0)
    return DER(setup=setup, config=DER.Config(**{"buffer": 4, "replay_batch_size": 2, "alpha": 0.5, **settings}))


def head(scenario: Scenario) -> dict[str, Any]:
    """DER's stored logits need all classes from the start."""
    return {"model.class_head": "fixed"} if scenario == "class" else {}


def prepared(scenario: Scenario, **settings: Any) -> tuple[Any, Batch]:
    """Return DER++ after a first task, about to train the second, and a batch of that."""
    task = synthetic(scenario, n_tasks=2, optimizer="sgd", lr=0.1)
    strategy, stream = made(task, "derpp", replay_batch_size=16, **settings, **head(scenario))
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    strategy.begin_task(second)
    strategy.before_task(second)
    return strategy, next(iter(ResidentLoader([stream.train[1]], 16)))


# ------------------------------------------------------------------------------------------------------------ strengths


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_without_weights_it_is_finetuning_to_the_bit(scenario: Scenario) -> None:
    found = []
    settings: dict[str, dict[str, Any]] = {"finetune": {}, "derpp": {"alpha": 0.0, "beta": 0.0}}
    for name, changes in settings.items():
        strategy, stream = made(synthetic(scenario, n_tasks=3), name, **changes, **head(scenario))
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    assert torch.equal(*found)


@pytest.mark.parametrize("term", ["alpha", "beta"])
def test_each_weight_changes_the_weights(term: str) -> None:
    found = []
    for strength in (0.5, 1.0):
        settings: dict[str, Any] = {term: strength}
        strategy, stream = made(synthetic("domain", n_tasks=2), "derpp", **settings)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    assert not torch.equal(*found)


def test_logits_of_the_past_keep_what_finetuning_forgets() -> None:
    """Class-incremental, 100 steps a task: without old samples the old classes get no answer any more."""
    first = {}
    for baseline in ("finetune", "der", "derpp"):
        strategy, stream = made(synthetic("class", n_tasks=3, iterations=100), baseline, **head("class"))
        strategy.train(list(stream.benchmark.train_stream))
        first[baseline] = strategy.accuracy(stream.benchmark.test_stream[0])
    assert first["finetune"] < 0.2
    assert min(first["der"], first["derpp"]) > 0.5


# ------------------------------------------------------------------------------------------------------ what is kept


def test_the_logits_kept_are_those_of_the_step_the_sample_was_trained_in() -> None:
    """W = [[1, 0], [0, 2]], b = [0, 0.5], x = (51, 204) / 255 = (0.2, 0.8): logits (0.2, 2.1), from before the step.

    The step itself moves the weights, so that the net says something else afterwards.
    """
    strategy = small(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0.0, 0.5]))
    task = tensor_task(torch.tensor([[[[51, 204]]]], dtype=torch.uint8), [0])
    strategy.train_step(next(iter(ResidentLoader([task], 1))))
    logits = strategy.memory.logits
    assert logits is not None
    torch.testing.assert_close(logits[:1].double(), torch.tensor([[0.2, 2.1]]).double())
    now = strategy.model(strategy.memory.take(torch.tensor([0])).x, 0)
    # lr 0.1, softmax p of (0.2, 2.1): the bias of class 0 alone rises by 0.1 (1 - p_0) = 0.1 * 0.8699.
    assert float((now - logits[:1])[0, 0].detach()) == pytest.approx(0.08699 * (1 + 0.2**2 + 0.8**2), rel=1e-3)


def test_logits_stay_with_their_sample_through_a_long_stream() -> None:
    """Every step's batch is offered, also in later passes: after many, each sample's logits are still those it had."""
    strategy = small(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0.0, 0.5]), alpha=0.3, beta=0.2)
    images = torch.randint(0, 256, (40, 1, 1, 2), generator=torch.Generator().manual_seed(1)).byte()
    task = tensor_task(images, [0, 1] * 20)
    given: dict[tuple[int, ...], list[Tensor]] = {}
    for batch in [*ResidentLoader([task], 5, strategy.order), *ResidentLoader([task], 5, strategy.order)]:
        with torch.no_grad():
            for x, logits in zip(batch.x, strategy.model(batch.x, 0), strict=True):
                given.setdefault(tuple((x * 255).round().int().flatten().tolist()), []).append(logits)
        strategy.train_step(batch)
    assert strategy.memory.seen == 80
    assert strategy.memory.images is not None
    assert strategy.memory.logits is not None
    for image, kept in zip(strategy.memory.images, strategy.memory.logits, strict=True):
        once = torch.stack(given[tuple(image.flatten().tolist())])
        assert bool(torch.isclose(once, kept.to(once)).all(dim=1).any())
        assert len(once) == 2


def test_a_head_that_grows_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"--set model\.class_head=fixed"):
        made(synthetic("class"), "derpp")


def test_a_class_that_a_task_has_not_has_no_part_in_the_distance() -> None:
    """Squares (1 - 3)^2, (2 - 2)^2 of a sample of two logits, (1 - 0)^2, 0, (5 - 2)^2 of one of three: 14 / 5."""
    now = torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 5.0]])
    kept = torch.tensor([[3.0, 2.0, float("nan")], [0.0, 2.0, 2.0]])
    assert float(distance(now, kept)) == pytest.approx(14 / 5)
    assert float(distance(now[:1, :2], kept[:1])) == pytest.approx(4 / 2)


def test_the_distance_under_a_fixed_head_is_the_mean_square_and_finite_in_its_gradient() -> None:
    now = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(distance(now, kept), F.mse_loss(now, kept))
    (whole,) = torch.autograd.grad(distance(now, kept), now)
    torch.testing.assert_close(whole, 2 * (now.detach() - kept) / 20)
    kept[0] = float("nan")
    (part,) = torch.autograd.grad(distance(now, kept), now)
    assert torch.equal(part[0], torch.zeros(4))
    assert bool(part.isfinite().all())


def test_heads_of_unequal_width_keep_their_own_logits() -> None:
    """Task-incremental, two, three and one class: NaN beyond a sample's own head, and nothing else."""
    strategy, stream = made(synthetic("task", n_tasks=3, classes=[2, 3, 1]), "derpp", buffer=60)
    strategy.train(list(stream.benchmark.train_stream))
    known = (~strategy.memory.logits.isnan()).sum(1)
    width = torch.tensor([2, 3, 1])
    assert set(strategy.memory.tasks.tolist()) == {0, 1, 2}
    assert torch.equal(known, width[strategy.memory.tasks])


def test_what_is_kept_is_counted_to_the_byte() -> None:
    """32 places of 8 x 8 bytes, two int64, one byte, and two float32 logits: 32 * (64 + 16 + 1 + 8)."""
    strategy, stream = made(synthetic("domain", n_tasks=1), "derpp", buffer=32)
    strategy.train(list(stream.benchmark.train_stream))
    counted = footprint(strategy.holdings())
    assert counted.replay_samples == 32
    assert counted.replay_bytes == 32 * (64 + 16 + 1 + 8)
    assert counted.keep_learning_bytes == counted.parameter_bytes + counted.replay_bytes


# ------------------------------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_a_step_descends_the_loss_and_both_terms(scenario: Scenario) -> None:
    """CE(new) + 0.3 * mean square of 16 old ones + 0.7 * CE of 16 others, each sample through its own task's head."""
    strategy, batch = prepared(scenario, alpha=0.3, beta=0.7)
    chance = strategy.chance.get_state()
    places = strategy.memory.places(16)
    held, labelled = strategy.memory.take(places), strategy.memory.draw(16)
    strategy.chance.set_state(chance)
    assert held.t == labelled.t == 0
    kept = strategy.memory.logits[places]
    assert kept.shape == (16, 4 if scenario == "class" else 2)
    squares = F.mse_loss(strategy.model(held.x, 0), kept)
    loss = (
        F.cross_entropy(strategy.model(batch.x, batch.t), batch.y)
        + 0.3 * squares
        + 0.7 * F.cross_entropy(strategy.model(labelled.x, 0), labelled.y)
    )
    parameters = list(strategy.model.parameters())
    slopes = torch.autograd.grad(loss, parameters)
    expected = weights(strategy) - 0.1 * torch.cat([slope.flatten() for slope in slopes])
    before = strategy.samples_trained
    strategy.train_step(batch)
    torch.testing.assert_close(weights(strategy), expected, rtol=1e-5, atol=1e-6)
    assert strategy.samples_trained == before + 48


def test_the_two_draws_are_independent() -> None:
    """Of 200 samples kept, two draws of 16 share 16 * 16 / 200 = 1.28 on average; over 60 steps that is 77, not 960."""
    strategy, batch = prepared("domain", buffer=200)
    drawn: list[Tensor] = []
    take = strategy.memory.take

    def noted(places: Tensor) -> Batch:
        drawn.append(places)
        found: Batch = take(places)
        return found

    strategy.memory.take = noted
    for _ in range(60):
        strategy.train_step(batch)
    shared = sum(len(set(one.tolist()) & set(two.tolist())) for one, two in zip(drawn[::2], drawn[1::2], strict=True))
    assert len(drawn) == 120
    assert 40 < shared < 130


def test_der_makes_no_second_draw() -> None:
    strategy, batch = prepared("domain", beta=0.0)
    before = strategy.samples_trained
    strategy.train_step(batch)
    assert strategy.samples_trained == before + 32


def test_a_batch_of_no_known_source_is_trained_on_but_not_kept() -> None:
    strategy = small(torch.eye(2), torch.zeros(2))
    strategy.train_step(Batch(torch.rand(3, 1, 1, 2), torch.tensor([0, 1, 0]), 0))
    assert len(strategy.memory) == 0
    assert strategy.samples_trained == 3
