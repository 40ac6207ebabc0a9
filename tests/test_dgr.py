"""Deep generative replay: what is replayed, who answers for it, how much it weighs, and what is kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.loading import Batch, ResidentLoader
from clbench.runner import run
from clbench.specs import Pixels, Scenario
from clbench.strategies.dgr import DGR, Generator
from clbench.streams import Stream
from clbench.views import View
from strategy_factory import made, synthetic, weights

SCENARIOS: tuple[Scenario, ...] = ("task", "domain", "class")


def after(
    tasks: int, scenario: Scenario, baseline: str = "dgr", fixed: bool = False, **settings: Any
) -> tuple[DGR, Stream, Batch]:
    """Return a strategy in the task after `tasks` of them, under plain SGD, its stream, and a batch of that task.

    `fixed` gives it a head of all classes from the start, four in two tasks.
    """
    train: dict[str, Any] = {"iterations": 10, "optimizer": "sgd", "lr": 0.1}
    settings |= {"model.class_head": "fixed"} if fixed else {}
    strategy, stream = made(synthetic(scenario, n_tasks=tasks + 1, **train), baseline, **settings)
    strategy.train(list(stream.benchmark.train_stream)[:tasks])
    strategy.begin_task(stream.benchmark.train_stream[tasks])
    strategy.before_task(stream.benchmark.train_stream[tasks])
    batch = next(iter(ResidentLoader([stream.train[tasks]], 16)))
    strategy.train_step(batch)  # so that the net is no longer what the past net is
    return strategy, stream, batch


def dreamt(strategy: DGR) -> Tensor:
    """Return what the next step will replay, drawing nothing."""
    state = strategy.chance.get_state()
    assert strategy.past_net is not None
    found = strategy.replay(strategy.past_net).x
    strategy.chance.set_state(state)
    return found


# ----------------------------------------------------------------------------------------------------------- the solver


@pytest.mark.parametrize("baseline", ["dgr", "dgr_distill"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_with_nothing_to_replay_it_is_finetuning_to_the_bit(scenario: Scenario, baseline: str) -> None:
    """The first task: the generator learns beside the net, and changes nothing about it."""
    found = []
    for name in ("finetune", baseline):
        strategy, stream = made(synthetic(scenario, n_tasks=2), name)
        strategy.train_task(stream.benchmark.train_stream[0])
        found.append(weights(strategy))
    assert torch.equal(*found)


@pytest.mark.parametrize("scenario", ["domain", "class"])
@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_a_step_weighs_the_new_by_one_over_all_tasks_and_the_replayed_by_the_rest(
    scenario: Scenario, tasks: int
) -> None:
    """In task N = tasks + 1, sample by sample.

    (1/N) mean CE of 16 new ones + (1 - 1/N) mean CE of 8 drawn ones, labelled by the past net.
    """
    strategy, _, batch = after(tasks, scenario, replay_batch_size=8)
    drawn = dreamt(strategy)
    assert strategy.past_net is not None
    pairs = zip(batch.x, batch.y, strict=True)
    new = [torch.nn.functional.cross_entropy(strategy.model(x[None], 0), y[None]) for x, y in pairs]
    old = []
    for x in drawn:
        label = strategy.past_net(x[None], 0).argmax(1)
        old.append(torch.nn.functional.cross_entropy(strategy.model(x[None], 0), label))
    share = 1 / (tasks + 1)
    loss = share * torch.stack(new).mean() + (1 - share) * torch.stack(old).mean()
    gradients = torch.autograd.grad(loss, list(strategy.model.parameters()))
    expected = weights(strategy) - 0.1 * torch.cat([gradient.flatten() for gradient in gradients])
    before = strategy.samples_trained
    strategy.train_step(batch)
    torch.testing.assert_close(weights(strategy), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(strategy.loss, loss)
    assert strategy.samples_trained == before + 16 + 8


@pytest.mark.parametrize("baseline", ["dgr", "dgr_distill"])
def test_every_head_of_the_past_answers_for_every_drawn_sample(baseline: str) -> None:
    """Third of three tasks with a head each: R is the mean over heads 0 and 1 of the mean over the 8 drawn samples.

    hard: CE with the past net's label. soft: -T^2 sum_c p~_c ln p_c at T = 2, class by class.
    """
    strategy, _, batch = after(2, "task", baseline, replay_batch_size=8)
    drawn = dreamt(strategy)
    past = strategy.past_net
    assert past is not None
    terms = []
    for head in (0, 1):
        for x in drawn:
            wanted, found = past(x[None], head)[0], strategy.model(x[None], head)[0]
            if baseline == "dgr":
                terms.append(-torch.log_softmax(found, 0)[wanted.argmax()])
            else:
                p, q = torch.softmax(wanted / 2, 0), torch.softmax(found / 2, 0)
                terms.append(-4 * (p[0] * q[0].log() + p[1] * q[1].log()))
    new = torch.nn.functional.cross_entropy(strategy.model(batch.x, 2), batch.y)
    strategy.train_step(batch)
    torch.testing.assert_close(strategy.loss, new / 3 + 2 / 3 * torch.stack(terms).mean())


@pytest.mark.parametrize("over", ["sum", "mean"])
def test_distillation_by_hand_leaves_nothing_to_new_classes(over: str) -> None:
    """The past net knew two classes, logits (2 ln 3, 0): at T = 2 probabilities 3/4, 1/4.

    The net has three, all logits 0: p = 1/3 each, R = -4 (3/4 + 1/4) ln 1/3 = 4 ln 3; the mean over three outputs a
    third of it. The gradient by a logit is T (p_c - p~_c), where p~ of the new class is 0.
    """
    strategy, _ = made(synthetic("class"), "dgr_distill", over=over)
    logits = torch.zeros(1, 3, requires_grad=True)
    found = strategy.mismatch(logits, torch.tensor([[2 * math.log(3), 0.0]]), [0, 1])
    parts = 3 if over == "mean" else 1
    torch.testing.assert_close(found, torch.tensor(4 * math.log(3) / parts))
    (slope,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(slope, 2 * torch.tensor([[1 / 3 - 3 / 4, 1 / 3 - 1 / 4, 1 / 3]]) / parts)


def test_hard_labels_are_numbered_as_the_nets_outputs() -> None:
    """Known classes 1 and 3 of four: the past net's first answer is output 1, its second output 3."""
    strategy, _ = made(synthetic("class"), "dgr")
    logits = torch.tensor([[0.0, 1.0, 0.0, 2.0]])
    for answer, output in (([5.0, 4.0], 1), ([4.0, 5.0], 3)):
        found = strategy.mismatch(logits, torch.tensor([answer]), [1, 3])
        torch.testing.assert_close(found, -torch.log_softmax(logits, 1)[0, output])


def test_only_classes_seen_are_replayed_even_where_the_head_has_more() -> None:
    """A head of four classes from the start, two seen: however likely the past net finds the last, it is no answer."""
    strategy, _, _ = after(1, "class", fixed=True)
    past = strategy.past_net
    assert past is not None
    past.get_parameter("head.linear.bias").data[3] += 100
    found = strategy.replay(past)
    assert list(found.answers) == [0]
    torch.testing.assert_close(found.answers[0], past(found.x, 0)[:, :2])
    assert strategy.known == {0: [0, 1]}


def test_strength_matters() -> None:
    """Labels, probabilities and their mean are three methods: after two tasks three different nets."""
    found = []
    for baseline, over in (("dgr", "sum"), ("dgr_distill", "sum"), ("dgr_distill", "mean")):
        strategy, stream = made(synthetic("class", n_tasks=2), baseline, over=over)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    assert all(float((a - b).abs().max()) > 1e-3 for a, b in zip(found, found[1:] + found[:1], strict=True))


def test_a_task_seen_again_is_known_once_and_counts_twice() -> None:
    strategy, stream = made(synthetic("task", n_tasks=2, iterations=3), "dgr")
    first, second = stream.benchmark.train_stream
    strategy.train([first, second, first])
    assert strategy.known == {0: [0, 1], 1: [0, 1]}
    assert strategy.tasks_seen == 3


# -------------------------------------------------------------------------------------------------------- the generator


def test_the_generator_weighs_new_and_drawn_samples_as_the_net_does() -> None:
    """In task 3: gradient of 1/3 mean over 16 new samples + 2/3 mean over 8 drawn ones of -ELBO / 64 pixels."""
    strategy, _, batch = after(2, "domain", replay_batch_size=8)
    generator = strategy.generator
    assert generator.net is not None
    drawn, state = dreamt(strategy), strategy.chance.get_state()
    torch.randn(8, generator.latent, generator=strategy.chance)  # for the drawn samples
    noise = torch.randn(24, generator.latent, generator=strategy.chance)
    strategy.chance.set_state(state)
    each = [generator.net.loss(x[None], eps[None])[0] / 64 for x, eps in zip([*batch.x, *drawn], noise, strict=True)]
    loss = torch.stack(each[:16]).mean() / 3 + 2 / 3 * torch.stack(each[16:]).mean()
    parameters = list(generator.net.parameters())
    expected = torch.autograd.grad(loss, parameters)
    strategy.train_step(batch)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_the_past_stands_still_while_a_task_is_learned() -> None:
    strategy, _, batch = after(1, "class")
    past, drawn = strategy.past_net, dreamt(strategy)
    assert past is not None
    assert strategy.generator.past is not None
    answers = past(drawn, 0)
    for _ in range(3):
        strategy.train_step(batch)
    assert torch.equal(past(drawn, 0), answers)
    nets = (past, strategy.generator.past)
    still = [parameter for net in nets for parameter in net.parameters()]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in still)
    assert not any(module.training for net in nets for module in net.modules())


def test_the_generator_begins_the_same_whatever_was_drawn_before() -> None:
    """Its weights depend on the run's seed alone; another seed makes others."""
    found = []
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        strategy, stream = made(synthetic(n_tasks=1), "dgr", seed)
        torch.manual_seed(global_seed)
        strategy.before_task(stream.benchmark.train_stream[0])
        found.append(torch.cat([value.flatten() for value in strategy.generator.net.state_dict().values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_pixels_are_painted_in_their_own_scale_and_shown_in_the_nets() -> None:
    """Normalised by mean 0.2 and deviation 0.5: the net sees (p - 0.2) / 0.5, the generator learns p itself."""
    task = synthetic("domain", n_tasks=2, iterations=3)
    normalise = Pixels(mean=[0.2], std=[0.5])
    task = task.model_copy(update={"stream": task.stream.model_copy(update={"normalise": normalise})})
    strategy, stream = made(task, "dgr")
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    past = strategy.generator.past
    state = strategy.chance.get_state()
    pixels = past.sample(torch.randn(32, past.latent, generator=strategy.chance))
    strategy.chance.set_state(state)
    torch.testing.assert_close(dreamt(strategy), (pixels - 0.2) / 0.5)
    shown: list[Tensor] = []
    strategy.generator.net.encoder.register_forward_pre_hook(lambda _, given: shown.append(given[0]))
    strategy.begin_task(second)
    strategy.before_task(second)
    batch = next(iter(ResidentLoader([stream.train[1]], 16)))
    strategy.train_step(batch)
    torch.testing.assert_close(shown[0][:16], (batch.x * 0.5 + 0.2).flatten(1))
    assert float(shown[0].min()) >= 0
    assert float(shown[0].max()) <= 1


def test_tasks_of_different_normalisation_are_refused() -> None:
    """A drawn image would have to be shown to the net one way or the other."""
    setup = made(synthetic(n_tasks=1), "dgr")[0].setup
    generator = Generator([4], 2, 1e-3, setup)
    own = [View(None, torch.full((1, 1, 1, 1), mean), torch.ones(1, 1, 1, 1)) for mean in (0.1, 0.2)]
    generator.open([own[0]], (1, 2, 2))
    generator.open([own[0]], (1, 2, 2))
    for other in (own[1], View(None, None, None)):
        with pytest.raises(UserError, match="one normalisation of pixels for all tasks"):
            generator.open([other], (1, 2, 2))


def test_a_generator_that_diverges_fails_the_run_and_says_so() -> None:
    record = run(synthetic(n_tasks=2), "dgr", 0, overrides={"generator_lr": 1e9})
    assert record.status == "failed"
    assert record.error is not None
    assert "the generator's loss is" in record.error


@pytest.mark.parametrize("reset", [True, False])
def test_the_generators_optimiser_starts_afresh_where_the_budgets_does(reset: bool) -> None:
    strategy, stream = made(synthetic(n_tasks=1, iterations=3, reset_optimizer=reset), "dgr")
    strategy.train_task(stream.benchmark.train_stream[0])
    assert bool(strategy.generator.optimizer.state) is not reset


# ------------------------------------------------------------------------------------------------------------ the whole


def test_what_is_kept_is_counted_to_the_byte() -> None:
    """Images of 64 pixels, generator 64-6-4: encoder 64*6+6, two maps 6*4+4, decoder 4*6+6 and 6*64+64, 900 floats.

    Net 64-32-2: 64*32+32 + 32*2+2 = 2146. Kept: both, and copies of both. Nothing of it is needed to answer.
    """
    strategy, stream = made(synthetic(n_tasks=1, iterations=3), "dgr", hidden=[6], latent=4)
    strategy.train_task(stream.benchmark.train_stream[0])
    counted = footprint(strategy.holdings())
    generator, net = 4 * (64 * 6 + 6 + 2 * (6 * 4 + 4) + 4 * 6 + 6 + 6 * 64 + 64), 4 * (64 * 32 + 32 + 32 * 2 + 2)
    assert counted.auxiliary_bytes == {"generator": generator, "past_generator": generator, "past_net": net}
    assert (counted.answer_bytes, counted.replay_bytes, counted.replay_samples) == (net, 0, 0)
    assert counted.keep_learning_bytes == 2 * (generator + net)


def test_the_optimiser_of_the_generator_is_counted_with_the_others() -> None:
    """Adam that lives on: two moments and one count (4 bytes) a tensor; the generator 64-6-4 has ten tensors."""
    strategy, stream = made(
        synthetic(n_tasks=1, iterations=3, reset_optimizer=False, optimizer="sgd"), "dgr", hidden=[6], latent=4
    )
    strategy.train_task(stream.benchmark.train_stream[0])
    counted = footprint(strategy.holdings())
    assert counted.optimizer_bytes == 2 * counted.auxiliary_bytes["generator"] + 10 * 4


def test_generative_replay_keeps_what_finetuning_forgets() -> None:
    """Class-incremental, three tasks: fine-tuning is left with the last one, a third.

    What is drawn between two images gets one label or the other under hard targets, and a share of both under soft
    ones, which here makes the difference.
    """
    task = synthetic("class", n_tasks=3, iterations=150)
    generator: dict[str, Any] = {"hidden": [128], "latent": 16, "generator_lr": 5e-3}
    found = {}
    for name in ("finetune", "dgr", "dgr_distill"):
        strategy, stream = made(task, name, **({} if name == "finetune" else generator))
        strategy.train(list(stream.benchmark.train_stream))
        found[name] = sum(strategy.accuracy(test) for test in stream.benchmark.test_stream) / 3
    assert found["finetune"] < 0.4
    assert found["dgr"] > 0.75
    assert found["dgr_distill"] > 0.95


def test_settings_that_make_no_generator_are_refused() -> None:
    for settings, key in (({"hidden": []}, "hidden"), ({"latent": 0}, "latent"), ({"targets": "soft-ish"}, "targets")):
        with pytest.raises(UserError, match=f"setting '{key}"):
            made(synthetic(), "dgr", **settings)
