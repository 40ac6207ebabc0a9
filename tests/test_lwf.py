"""LwF: distillation by hand, which outputs of which heads it is about in each scenario, how the parts are weighted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.loading import Batch, ResidentLoader
from clbench.specs import Scenario
from clbench.strategies.lwf import LwF
from strategy_factory import made, recipe, synthetic, weights


def lwf(scenario: Scenario = "domain", n_tasks: int = 2, **settings: Any) -> tuple[LwF, Any]:
    strategy, stream = made(synthetic(scenario, n_tasks=n_tasks), "lwf", **settings)
    return strategy, stream


def at_the_last_task(scenario: Scenario, n_tasks: int, **settings: Any) -> tuple[LwF, Batch]:
    """Return a strategy in the middle of its last task, no longer what its teacher is, and a batch of that task."""
    strategy, stream = lwf(scenario, n_tasks, **settings)
    *before, last = stream.benchmark.train_stream
    for experience in before:
        strategy.train_task(experience)
    strategy.begin_task(last)
    strategy.before_task(last)
    for parameter in strategy.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return strategy, next(iter(ResidentLoader([stream.train[n_tasks - 1]], 16)))


def soft(logits: Tensor, t: float = 2.0) -> Tensor:
    return torch.softmax(logits / t, dim=1)


def cross(q: Tensor, logits: Tensor, t: float = 2.0) -> Tensor:
    """Mean over the batch of -sum_c q_c log p_c at temperature t."""
    return -(q * torch.log_softmax(logits / t, dim=1)).sum(dim=1).mean()


# --------------------------------------------------------------------------------------------------------- distillation


def test_distillation_of_two_logits_by_hand() -> None:
    """Teacher (2, 0) and net (0, 4) at T = 2: q = (e, 1) / (e + 1), p = (1, e^2) / (1 + e^2).

    D = -q_1 log p_1 - q_2 log p_2 = log(1 + e^2) - 2 q_2. Times T^2 = 4, over C = 2 outputs, as asked.
    """
    teacher, net = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    d = math.log(1 + math.exp(2)) - 2 / (math.e + 1)
    for settings, factor in (({}, 1.0), ({"t_squared": True}, 4.0), ({"t_squared": True, "classes": "mean"}, 2.0)):
        strategy, _ = lwf(**settings)
        assert strategy.distillation(net, teacher).item() == pytest.approx(factor * d, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_gradient_of_distillation_is_the_difference_of_probabilities_over_t(temperature: float) -> None:
    """D D / d logit_c = (p_c - q_c) / T, mean over the batch; that of a KL divergence is the same."""
    strategy, _ = lwf(temperature=temperature)
    net, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    (got,) = torch.autograd.grad(strategy.distillation(net, teacher), net)
    expected = (soft(net, temperature) - soft(teacher, temperature)) / temperature / 5
    torch.testing.assert_close(got, expected.detach())
    kl = F.kl_div(torch.log_softmax(net / temperature, 1), soft(teacher, temperature), reduction="batchmean")
    torch.testing.assert_close(got, torch.autograd.grad(kl, net)[0])


def test_outputs_that_the_teacher_has_not_are_left_out_or_to_be_zero() -> None:
    """Three logits, a teacher of two: among the first two alone, or q = (q_1, q_2, 0) against all three.

    In between lies -log(p_1 + p_2), the share that the new output takes; averaged over classes it is 2 or 3 of them.
    """
    net, teacher = torch.randn(6, 3), torch.randn(6, 2)
    apart = lwf(new_outputs="apart")[0].distillation(net, teacher)
    zero = lwf(new_outputs="zero")[0].distillation(net, teacher)
    torch.testing.assert_close(apart, cross(soft(teacher), net[:, :2]))
    torch.testing.assert_close(zero - apart, -torch.log(1 - soft(net)[:, 2]).mean())
    for outputs, count, term in (("apart", 2, apart), ("zero", 3, zero)):
        mean = lwf(new_outputs=outputs, classes="mean")[0].distillation(net, teacher)
        torch.testing.assert_close(mean, term / count)


# ------------------------------------------------------------------------------------------------------------ scenarios


def test_one_head_answers_to_the_labels_and_to_the_teacher() -> None:
    """Domain: all outputs, with the logits that the labels judge."""
    strategy, batch = at_the_last_task("domain", 2, alpha=0.5)
    assert strategy.teacher is not None
    logits = strategy.model(batch.x, batch.t)
    expected = F.cross_entropy(logits, batch.y) + 0.5 * cross(soft(strategy.teacher(batch.x)), logits)
    torch.testing.assert_close(strategy.loss_of(batch), expected)


@pytest.mark.parametrize("heads", ["sum", "mean"])
def test_every_old_head_is_distilled_and_the_new_one_is_not(heads: str) -> None:
    """Task: three tasks, so two old heads, on the new task's images."""
    strategy, batch = at_the_last_task("task", 3, alpha=0.5, heads=heads)
    teacher = strategy.teacher
    assert teacher is not None
    terms = [cross(soft(teacher(batch.x, t)), strategy.model(batch.x, t)) for t in (0, 1)]
    expected = F.cross_entropy(strategy.model(batch.x, 2), batch.y)
    expected = expected + 0.5 * torch.stack(terms).sum() / (2 if heads == "mean" else 1)
    torch.testing.assert_close(strategy.loss_of(batch), expected)


@pytest.mark.parametrize("new_outputs", ["apart", "zero"])
def test_a_growing_head_is_distilled_on_the_outputs_it_had(new_outputs: str) -> None:
    """Class: the third task's net has six outputs, its teacher four."""
    strategy, batch = at_the_last_task("class", 3, alpha=0.5, new_outputs=new_outputs)
    assert strategy.teacher is not None
    old, logits = soft(strategy.teacher(batch.x)), strategy.model(batch.x)
    assert (old.shape[1], logits.shape[1]) == (4, 6)
    term = cross(old, logits[:, :4]) if new_outputs == "apart" else cross(F.pad(old, (0, 2)), logits)
    torch.testing.assert_close(strategy.loss_of(batch), F.cross_entropy(logits, batch.y) + 0.5 * term)


def test_shares_weigh_the_tasks_alike() -> None:
    """(1 / N) cross-entropy + (1 - 1 / N) distillation, on the third task 1/3 and 2/3."""
    plain, batch = at_the_last_task("domain", 3)
    shared, _ = at_the_last_task("domain", 3)
    object.__setattr__(shared.config, "weights", "shares")
    logits = plain.model(batch.x)
    shared.model.load_state_dict(plain.model.state_dict())
    shared.teacher = plain.teacher
    new = F.cross_entropy(logits, batch.y)
    old = plain.loss_of(batch) - new
    torch.testing.assert_close(shared.loss_of(batch), new / 3 + 2 * old / 3)


def test_a_task_seen_again_is_not_its_own_teacher() -> None:
    """Of two heads the other one alone is distilled; with one head alone there is none."""
    strategy, stream = lwf("task", 2)
    first, second = stream.benchmark.train_stream
    for experience in (first, first, second):
        strategy.train_task(experience)
    strategy.begin_task(first)
    assert strategy.old_heads() == [1]


# -------------------------------------------------------------------------------------------------------------- teacher


def test_the_teacher_is_the_net_as_the_task_found_it_and_learns_nothing() -> None:
    strategy, stream = lwf("task", 2)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    assert strategy.teacher is None
    assert strategy.holdings().auxiliary == {}
    found = weights(strategy)
    strategy.begin_task(second)
    strategy.before_task(second)
    teacher = strategy.teacher
    assert teacher is not None
    strategy.fit([stream.train[1]])
    kept = torch.cat([parameter.detach().flatten() for parameter in teacher.parameters()])
    assert torch.equal(kept, found)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_strength_and_temperature_change_the_weights(scenario: Scenario) -> None:
    found = []
    changes: tuple[dict[str, Any], ...]
    changes = ({"alpha": 0.0}, {"alpha": 0.5}, {"alpha": 5.0}, {"alpha": 5.0, "temperature": 10.0})
    for settings in changes:
        strategy, stream = lwf(scenario, **settings)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
    assert all(float((a - b).abs().max()) > 1e-4 for a, b in pairs)


def test_a_strong_teacher_keeps_the_old_heads_answers() -> None:
    """Closer to what the net said before, on the images it was taught with."""
    apart = {}
    for alpha in (0.0, 10.0):
        strategy, stream = lwf("task", 2, alpha=alpha)
        first, second = stream.benchmark.train_stream
        strategy.train_task(first)
        x = stream.train[1].inputs(torch.arange(len(stream.train[1])))
        before = soft(strategy.model.eval()(x, 0))
        strategy.train_task(second)
        apart[alpha] = (soft(strategy.model.eval()(x, 0)) - before).abs().mean().item()
    assert apart[10.0] < 0.5 * apart[0.0]


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"alpha": -1.0}, {"temperature": 0.0}, {"weights": "all"}, {"heads": "first"}, {"classes": "max"}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            made(synthetic(), recipe("clbench.strategies.lwf:LwF", **wrong))
