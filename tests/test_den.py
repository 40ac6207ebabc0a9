"""DEN: penalties against brute force, every algorithm's claim on a toy stream, and what each threshold decides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.loading import ResidentLoader, TensorTask
from clbench.specs import LeNetModel, MLPModel, ResNet18Model
from clbench.strategies.den import DEN
from clbench.strategies.expanding import Phase, group_threshold_, soft_threshold_
from clbench.streams import Stream
from strategy_factory import made, synthetic, weights

SETTINGS: dict[str, Any] = {
    "l1": 0.01, "l2": 1e-4, "group": 0.1, "loss_threshold": 0.0, "units": 3, "drift_threshold": 0.05,
    "drift_penalty": 0.5,
}  # fmt: skip
NEVER = 1e9
"""A threshold that nothing reaches."""


def den(
    n_tasks: int = 2, model: Any = None, train: dict[str, Any] | None = None, **settings: Any
) -> tuple[Any, Stream]:
    """Return DEN, untrained, on an MLP of 8 and 6 units, and its stream."""
    budget = {"iterations": 8, "lr": 0.01, **(train or {})}
    task = synthetic("task", n_tasks=n_tasks, **budget)
    task = task.model_copy(update={"model": model or MLPModel(kind="mlp", hidden=[8, 6])})
    strategy, stream = made(task, "den", **{**SETTINGS, **settings})
    assert isinstance(strategy, DEN)
    return strategy, stream


def taught(n_tasks: int = 2, **changes: Any) -> tuple[Any, Stream]:
    strategy, stream = den(n_tasks, **changes)
    strategy.train(list(stream.benchmark.train_stream))
    return strategy, stream


def second_task(**changes: Any) -> tuple[Any, list[TensorTask]]:
    """Return DEN at the beginning of its second task, and that task's samples."""
    strategy, stream = den(**changes)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    strategy.begin_task(second)
    strategy.remember()
    return strategy, strategy.training_data(second)


def logged(strategy: Any, kind: str, task: int | None = None) -> int:
    events = [event for event in strategy.growth if event.kind == kind and task in (None, event.after_task)]
    return sum(event.units for event in events)


def corner(parameter: Tensor, before: Tensor) -> Tensor:
    return parameter[tuple(slice(n) for n in before.shape)]


def shared(strategy: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in strategy.model.trunk.parameters()]


# ------------------------------------------------------------------------------------------------------------ penalties


def test_the_soft_threshold_minimises_half_the_squared_distance_plus_the_l1_norm() -> None:
    """Element by element, against every x of a fine grid."""
    weight = torch.tensor([-1.7, -0.3, -0.1, 0.0, 0.05, 0.3, 0.31, 2.0], dtype=torch.float64)
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for threshold in (0.0, 0.1, 0.3, 5.0):
        objective = 0.5 * (grid[:, None] - weight).square() + threshold * grid.abs()[:, None]
        got = weight.clone()
        soft_threshold_(got, threshold)
        torch.testing.assert_close(got, grid[objective.argmin(dim=0)], rtol=0, atol=1e-4)
        assert (got[weight.abs() <= threshold] == 0).all()


def plane() -> Tensor:
    """Return the points of a grid, (N, 2)."""
    line = torch.linspace(-2, 2, 801, dtype=torch.float64)
    return torch.cartesian_prod(line, line)


def test_the_group_threshold_minimises_half_the_squared_distance_plus_the_2_norm() -> None:
    """Each row a group of its own, whatever its shape; rows shorter than the threshold, and zero ones, become zero."""
    weight = torch.tensor([[1.5, -0.8], [0.2, 0.1], [0.0, 0.0], [0.0, -0.6]], dtype=torch.float64)
    points = plane()
    for threshold in (0.0, 0.4, 3.0):
        got = weight.clone().view(4, 1, 2, 1)
        group_threshold_(got, threshold)
        for row, found in zip(weight, got.view(4, 2), strict=True):
            objective = 0.5 * (points - row).square().sum(dim=1) + threshold * points.norm(dim=1)
            torch.testing.assert_close(found, points[objective.argmin()], rtol=0, atol=0.005)
            assert bool(found.any()) == (float(row.norm()) > threshold)


def test_both_penalties_at_once_are_their_joint_minimum() -> None:
    """The proximal map of a sum is no sum of maps: elements first, then their group; the other order is 0.02 off."""
    weight = nn.Parameter(torch.tensor([[1.0, 0.3]], dtype=torch.float64))
    bias = nn.Parameter(torch.tensor([0.2], dtype=torch.float64))
    phase = Phase(net=lambda x, t: x, parameters=[weight, bias], sparse=[weight], l1=2.5, grouped=[weight], group=5.0)
    phase.shrink(0.1)
    points = plane()
    distance = 0.5 * (points - torch.tensor([1.0, 0.3])).square().sum(dim=1)
    objective = distance + 0.25 * points.abs().sum(dim=1) + 0.5 * points.norm(dim=1)
    torch.testing.assert_close(weight[0].detach(), points[objective.argmin()], rtol=0, atol=0.005)
    assert float(bias.detach()) == 0.2


def test_what_is_added_to_the_gradient_is_the_penalties_own() -> None:
    """Autograd on l2 / 2 ||W||^2 + drift / 2 ||corner - before||^2, on top of what was there."""
    torch.manual_seed(0)
    weight, bias = (nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((4, 3, 2), (4,)))
    idle = nn.Parameter(torch.ones(2, dtype=torch.float64))
    befores = [torch.randn(2, 2, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)]
    anchors = list(zip((weight, bias), befores, strict=True))
    phase = Phase(net=lambda x, t: x, parameters=[weight, bias, idle], l2=0.7, anchors=anchors, drift=1.3)
    penalty = 0.35 * (weight.square().sum() + bias.square().sum())
    penalty = penalty + 0.65 * sum((corner(parameter, old) - old).square().sum() for parameter, old in anchors)
    parts = torch.autograd.grad(penalty, [weight, bias])
    weight.grad, bias.grad = torch.full_like(weight, 2.0), torch.full_like(bias, 3.0)
    phase.add_gradients()
    torch.testing.assert_close(weight.grad, parts[0] + 2.0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bias.grad, parts[1] + 3.0, rtol=1e-12, atol=1e-12)
    assert idle.grad is None


def test_a_step_descends_the_loss_then_shrinks_by_the_learning_rate() -> None:
    """Plain SGD: weights soft(w - lr g, lr l1); biases w - lr g, where g is the loss's gradient plus l2 w."""
    strategy, stream = den(train={"optimizer": "sgd", "lr": 0.05})
    strategy.begin_task(stream.benchmark.train_stream[0])
    trained = strategy.everything()
    sparse = [parameter for parameter in trained if parameter.ndim > 1]
    batch = next(iter(ResidentLoader([stream.train[0]], 16)))
    loss = F.cross_entropy(strategy.model(batch.x, 0), batch.y)
    slopes = torch.autograd.grad(loss, trained)
    expected = []
    for parameter, slope in zip(trained, slopes, strict=True):
        moved = parameter.detach() - 0.05 * (slope + 0.3 * parameter.detach())
        expected.append(F.softshrink(moved, 0.05 * 0.4) if parameter.ndim > 1 else moved)
    strategy.now = Phase(net=strategy.model, parameters=trained, sparse=sparse, l1=0.4, l2=0.3)
    strategy.train_step(batch)
    for parameter, value in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-5, atol=1e-7)
    assert strategy.samples_trained == 16


def test_penalties_enter_before_gradients_are_clipped() -> None:
    strategy, stream = den(train={"optimizer": "sgd", "lr": 0.05, "grad_clip": 0.01})
    strategy.begin_task(stream.benchmark.train_stream[0])
    before = weights(strategy)
    strategy.now = Phase(net=strategy.model, parameters=strategy.everything(), l2=100.0)
    strategy.train_step(next(iter(ResidentLoader([stream.train[0]], 16))))
    assert float((weights(strategy) - before).norm()) == pytest.approx(0.05 * 0.01, rel=1e-3)


# ----------------------------------------------------------------------------------------------------------- first task


def test_without_sparsity_the_first_task_is_finetunings_to_the_bit() -> None:
    strategy, stream = den(l1=0.0)
    task = synthetic("task", n_tasks=2, iterations=8, lr=0.01)
    usual, _ = made(task.model_copy(update={"model": MLPModel(kind="mlp", hidden=[8, 6])}), "finetune")
    for learner in (strategy, usual):
        learner.train_task(stream.benchmark.train_stream[0])
    assert torch.equal(weights(strategy), weights(usual))
    for test in stream.benchmark.test_stream:
        assert strategy.evaluate(test, auroc=True) == usual.evaluate(test, auroc=True)


def test_sparsity_makes_zeros_in_weights_alone() -> None:
    strategy, _ = den(n_tasks=1, l1=2.0)
    strategy.train_task(made(synthetic("task", n_tasks=1, iterations=8, lr=0.01), "den")[1].benchmark.train_stream[0])
    for parameter in strategy.everything():
        assert bool((parameter == 0).any()) == (parameter.ndim > 1)
    assert strategy.growth == []


# ------------------------------------------------------------------------------------------------- selective retraining


def test_selective_retraining_trains_the_head_then_what_it_depends_on_and_nothing_else() -> None:
    """Nobody listens to the even units of the first layer: they stay as they are to the bit, and so do all zeros."""
    strategy, tasks = second_task(l1=0.0)
    first, second = strategy.model.layers()
    with torch.no_grad():
        second.weight[:, ::2] = 0
    before, old_head = shared(strategy), weights_of(strategy.model.head(0))
    between: list[list[Tensor]] = []
    fit = strategy.fit

    def spy(*args: Any) -> None:
        fit(*args)
        between.append(shared(strategy))

    strategy.fit = spy
    strategy.selective_retraining(tasks)
    assert len(between) == 2
    for was, now in zip(before, between[0], strict=True):
        assert torch.equal(was, now), "the head alone"
    row = torch.arange(8) % 2 == 1
    assert torch.equal((first.weight != before[0]).any(dim=1), row)
    assert torch.equal(first.bias != before[1], row)
    assert not second.weight[:, ::2].any()
    assert (second.weight != before[2])[:, 1::2].all()
    assert all(map(torch.equal, weights_of(strategy.model.head(0)), old_head))
    reused = [(event.layer, event.units, event.born) for event in strategy.growth if event.kind == "reused"]
    assert reused == [("layers.0", 4, 0), ("layers.1", 6, 0)]


def weights_of(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def test_units_used_again_are_counted_by_the_task_of_their_birth() -> None:
    """All that the third task's search reaches, over the births of its units."""
    strategy, stream = den(3, drift_threshold=NEVER, group=0.0, l1=0.0)
    for experience in list(stream.benchmark.train_stream)[:2]:
        strategy.train_task(experience)
    strategy.begin_task(stream.benchmark.train_stream[2])
    masks = [torch.arange(width) % 3 > 0 for width in strategy.model.widths()]
    strategy.growth.clear()
    strategy.log_reuse(masks)
    for i, (name, old) in enumerate((("layers.0", 8), ("layers.1", 6))):
        found = {event.born: event.units for event in strategy.growth if event.layer == name}
        assert found == {0: int(masks[i][:old].sum()), 1: int(masks[i][old:].sum())}
    assert {event.after_task for event in strategy.growth} == {2}


# ------------------------------------------------------------------------------------------------------------ expansion


def test_the_loss_that_decides_is_the_tasks_mean_training_loss() -> None:
    strategy, tasks = second_task()
    found = strategy.loss_on(tasks)
    batch = next(iter(ResidentLoader(tasks, 10**6)))
    assert found == pytest.approx(float(F.cross_entropy(strategy.model(batch.x, 1), batch.y).detach()), rel=1e-5)


def test_the_loss_threshold_decides_about_expansion() -> None:
    """At 0 every task but the first expands; at the loss itself none does, nor where the ablation says so."""
    strategy, stream = den(3)
    for number, experience in enumerate(stream.benchmark.train_stream):
        strategy.train_task(experience)
        assert logged(strategy, "added", number) == (0 if number == 0 else 6)
    for settings in ({"loss_threshold": NEVER}, {"expand": False}, {"units": 0}):
        assert logged(taught(**settings)[0], "added") == 0
    strategy, stream = den(loss_threshold=0.25)
    strategy.loss_on = lambda tasks: 0.25
    strategy.train(list(stream.benchmark.train_stream))
    assert logged(strategy, "added") == 0


def test_group_sparsity_decides_how_many_units_stay() -> None:
    """A huge one prunes all, and none leaves them all."""
    for group, stays in ((1e6, 0), (0.0, 3)):
        strategy, _ = taught(group=group, l1=0.0, split=False)
        assert strategy.widths() == {"layers.0": 8 + stays, "layers.1": 6 + stays}
        assert logged(strategy, "pruned") == 2 * (3 - stays)
        assert logged(strategy, "added") == 6


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_expansion_trains_nothing_old(optimizer: str) -> None:
    train = {"optimizer": optimizer, "weight_decay": 0.1, "lr": 0.02}
    strategy, tasks = second_task(train=train, group=0.0, l1=0.0, units=9)
    before = [(parameter, parameter.detach().clone()) for parameter in strategy.model.parameters()]
    strategy.dynamic_expansion(tasks)
    assert all(now > then for now, then in zip(strategy.model.widths(), (8, 6), strict=True))
    for parameter, old in before:
        assert torch.equal(corner(parameter, old), old)
        assert parameter.requires_grad
    assert strategy.model.head(1).weight[:, 6:].any(), "the head listens to what is new"


def test_the_protocols_weight_decay_is_left_out_of_every_phase() -> None:
    """What holds the weights is in eqs. 2 to 6: a decay of the protocol's would be a term more in each of them."""
    plain, decayed = (taught(train={"weight_decay": decay})[0] for decay in (0.0, 0.5))
    assert all(torch.equal(one, other) for one, other in zip(shared(plain), shared(decayed), strict=True))


# ---------------------------------------------------------------------------------------------------------------- split


def test_the_drift_threshold_decides_about_splits() -> None:
    """Nothing reaches a huge one; every old unit, and no new one, is beyond 0; the ablation has neither."""
    for settings, split in (({"drift_threshold": NEVER}, 0), ({"drift_threshold": 0.0}, 14), ({"split": False}, 0)):
        strategy, _ = taught(**settings)
        assert logged(strategy, "split") == split, settings
        assert logged(strategy, "added") == 6
    strategy, tasks = second_task(drift_threshold=0.5)
    strategy.drifts = lambda: [torch.full((8,), 0.5), torch.tensor([0.5, 0.5, 0.75, 0.0, 0.5, 0.5])]
    strategy.network_split(tasks)
    assert strategy.widths() == {"layers.0": 8, "layers.1": 7}, "further than the threshold"


def test_a_split_unit_goes_back_and_its_copy_is_what_it_had_become() -> None:
    """Caught between the two trainings under eq. 6: unit 1 of the first layer and units 0 and 4 of the second."""
    strategy, tasks = second_task()
    first, second = strategy.model.layers()
    train = strategy.train_under_drift_penalty
    seen: list[list[Tensor]] = []

    def spy(given: Sequence[TensorTask]) -> None:
        if not seen:
            train(given)
        seen.append([first.weight.detach().clone(), second.weight.detach().clone(), second.bias.detach().clone()])

    strategy.train_under_drift_penalty = spy
    masks = [torch.arange(8) == 1, (torch.arange(6) == 0) | (torch.arange(6) == 4)]
    strategy.drifts = lambda: [mask.float() for mask in masks]
    strategy.network_split(tasks)
    drifted, now = seen
    (weight0, _), (weight1, bias1) = strategy.before
    assert bias1 is not None
    assert torch.equal(now[0], torch.cat((drifted[0][:1], weight0[[1]], drifted[0][2:], drifted[0][[1]])))
    columns = [*range(8), 1]
    expected = torch.cat((drifted[1], drifted[1][[0, 4]]))[:, columns]
    expected[[0, 4], :8] = weight1[[0, 4]]
    assert torch.equal(now[1], expected)
    assert torch.equal(now[2][[0, 4]], bias1[[0, 4]])
    assert torch.equal(now[2][6:], drifted[2][[0, 4]])
    assert not torch.equal(drifted[1][:6, :8], weight1)


def test_after_splitting_everything_the_old_net_is_back_to_the_bit() -> None:
    strategy, tasks = second_task(drift_threshold=0.0)
    strategy.dynamic_expansion(tasks)
    corners: list[bool] = []
    train = strategy.train_under_drift_penalty

    def spy(given: Sequence[TensorTask]) -> None:
        pairs = strategy.anchors()
        corners.append(all(torch.equal(corner(parameter, old), old) for parameter, old in pairs))
        train(given)
        corners.append(all(torch.equal(corner(parameter, old), old) for parameter, old in pairs))

    strategy.train_under_drift_penalty = spy
    strategy.network_split(tasks)
    assert corners == [True, False, True, False]


def test_a_units_drift_is_that_of_the_weights_into_it_from_older_units() -> None:
    """Biases and what came later do not count."""
    strategy, _ = second_task()
    strategy.model.duplicate(1, [torch.ones(8, dtype=torch.bool), torch.ones(6, dtype=torch.bool)])
    first, second = strategy.model.layers()
    with torch.no_grad():
        first.weight[2, 0] += 3.0
        first.weight[2, 5] -= 4.0
        first.weight[9] += 1.0
        second.weight[1, 8:] += 1.0
        second.bias += 1.0
    drifts = strategy.drifts()
    assert [len(drift) for drift in drifts] == [8, 6]
    torch.testing.assert_close(drifts[0], torch.tensor([0.0, 0, 5, 0, 0, 0, 0, 0]))
    assert not drifts[1].any()


def test_a_stronger_drift_penalty_leaves_smaller_drifts() -> None:
    found = []
    for penalty in (0.0, 0.5, 5.0):
        strategy, tasks = second_task(train={"optimizer": "sgd", "lr": 0.05, "iterations": 20}, drift_penalty=penalty)
        strategy.train_under_drift_penalty(tasks)
        found.append(float(torch.cat(strategy.drifts()).sum()))
    assert found[0] > 1.1 * found[1] > 1.1 * found[2] > 0


def test_the_drift_penalty_has_no_half_before_it() -> None:
    """The gradient of lambda ||W - before||^2 is 2 lambda (W - before), on biases too, and on nothing of the head."""
    strategy, tasks = second_task(drift_penalty=0.7)
    fit = strategy.fit
    strategy.fit = lambda *args: None
    strategy.train_phase(tasks, Phase(net=strategy.model, parameters=strategy.everything()))
    phases: list[Phase] = []
    strategy.train_phase = lambda given, phase, order=None: phases.append(phase)
    strategy.train_under_drift_penalty(tasks)
    strategy.fit = fit
    for parameter in strategy.everything():
        parameter.grad = torch.zeros_like(parameter)
        parameter.data += 0.5
    phases[0].add_gradients()
    for parameter in strategy.model.trunk.parameters():
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 0.7), rtol=1e-5, atol=1e-6)
    assert not any(bool(parameter.grad.any()) for parameter in strategy.own_head() if parameter.grad is not None)


# ---------------------------------------------------------------------------------------------------------------- whole


def test_every_phase_has_the_whole_budget() -> None:
    """8 steps of 32 samples: one phase at first; then head, selection, expansion and eq. 6, once more after a split."""
    for settings, phases in (({"drift_threshold": NEVER}, 4), ({"drift_threshold": 0.0}, 5), ({"split": False}, 3)):
        strategy, _ = taught(**settings)
        assert strategy.samples_trained == (1 + phases) * 8 * 32


def test_the_books_of_growth_add_up() -> None:
    """Per layer and task: units after = before + added - pruned + split; masks are as long as a task sees."""
    strategy, stream = den(3, units=5, group=7.0, drift_threshold=0.02)
    before = strategy.widths()
    for number, experience in enumerate(stream.benchmark.train_stream):
        strategy.train_task(experience)
        for name, width in strategy.widths().items():
            change = {"added": 1, "pruned": -1, "split": 1, "reused": 0}
            events = [event for event in strategy.growth if event.layer == name and event.after_task == number]
            assert width - before[name] == sum(change[event.kind] * event.units for event in events)
        before = strategy.widths()
        assert list(before.values()) == strategy.model.seen_by(number)
    assert min(logged(strategy, kind) for kind in ("added", "pruned", "split", "reused")) > 0
    serving = strategy.serving()
    for task, masks in enumerate(serving):
        assert [len(mask) for mask in masks.values()] == strategy.model.seen_by(task)
        assert all(mask.any() for mask in masks.values())


def test_den_learns_every_task_and_forgets_less_than_finetuning() -> None:
    """By the first task's loss after the last one: accuracies of this easy stream hardly differ."""
    train: dict[str, Any] = {"iterations": 40, "lr": 0.02}
    task = synthetic("task", n_tasks=3, **train)
    task = task.model_copy(update={"model": MLPModel(kind="mlp", hidden=[8, 6])})
    usual, stream = made(task, "finetune")
    strategy, _ = den(3, train=train, l1=1e-4, drift_penalty=5.0)
    rise = []
    for learner in (strategy, usual):
        losses = []
        for experience in stream.benchmark.train_stream:
            learner.train_task(experience)
            batch = next(iter(ResidentLoader([stream.test[0]], 10**6)))
            losses.append(float(F.cross_entropy(learner.model(batch.x, 0), batch.y).detach()))
        rise.append(losses[-1] - losses[0])
        assert all(learner.accuracy(test) > 0.8 for test in stream.benchmark.test_stream)
    assert rise[0] < 0.5 * rise[1]


def test_between_tasks_nothing_of_the_last_one_is_held() -> None:
    strategy, _ = taught()
    assert strategy.before == []
    assert strategy.now is None
    assert all(parameter.grad is None and parameter.requires_grad for parameter in strategy.model.parameters())
    known = [id(parameter) for parameter in strategy.optimizer.param_groups[0]["params"]]
    assert known == [id(parameter) for parameter in strategy.model.parameters()]
    assert strategy.undeclared() == {}


def test_den_grows_convolutional_nets() -> None:
    """Channels as well as features; the first task's answers stay what its corner of the weights says."""
    model = LeNetModel(kind="lenet", channels=(3, 4), hidden=(6, 5), response_norm=False)
    strategy, stream = taught(model=model, group=0.0, drift_threshold=0.0, train={"iterations": 6})
    assert strategy.widths() == {"conv1": 9, "conv2": 11, "hidden1": 15, "hidden2": 13}
    assert strategy.model.seen_by(0) == [3, 4, 6, 5]
    x = next(iter(ResidentLoader([stream.test[0]], 8))).x
    strategy.model.eval()
    answer = strategy.model(x, 0)
    with torch.no_grad():
        for layer, width in zip(strategy.model.layers(), strategy.model.seen_by(0), strict=True):
            layer.weight[width:] = 100.0
    assert torch.equal(strategy.model(x, 0), answer)


# --------------------------------------------------------------------------------------------------------- DEN-Finetune


def test_the_tuned_copy_answers_and_den_goes_on_without_it() -> None:
    """To the bit: weights, growth, generators."""
    plain, stream = taught(3)
    tuning, _ = taught(3, finetune=True)
    assert torch.equal(weights(tuning), weights(plain))
    assert tuning.growth == plain.growth
    assert torch.equal(tuning.order.get_state(), plain.order.get_state())
    assert torch.equal(tuning.chance.get_state(), plain.chance.get_state())
    assert tuning.tuned is not None
    assert tuning.tuned.stage_of == tuning.model.stage_of
    for task, test in enumerate(stream.test):
        x = next(iter(ResidentLoader([test], 8))).x
        tuned = tuning.answer(x, task)
        assert torch.equal(tuned, tuning.tuned(x, task))
        assert not torch.equal(tuned, plain.answer(x, task))
    assert tuning.samples_trained == plain.samples_trained + 3 * 8 * 32
    assert tuning.holdings().replay_samples == sum(len(task) for task in stream.train)
    assert plain.holdings().replay_samples == 0


def test_a_task_that_the_tuned_copy_does_not_know_is_answered_by_den() -> None:
    tuning, stream = den(finetune=True)
    x = next(iter(ResidentLoader([stream.test[1]], 8))).x
    assert torch.equal(tuning.answer(x, 1), tuning.model.eval()(x, 1))
    tuning.train_task(stream.benchmark.train_stream[0])
    assert torch.equal(tuning.answer(x, 1), tuning.model.eval()(x, 1))
    assert torch.equal(tuning.answer(x, torch.ones(8, dtype=torch.long)), tuning.answer(x, 1))


def test_den_finetune_resumes_to_the_same_answers() -> None:
    whole, stream = taught(3, finetune=True)
    half, _ = den(3, finetune=True)
    experiences = list(stream.benchmark.train_stream)
    half.train(experiences[:2])
    later, _ = den(3, finetune=True)
    later.load_state_dict(half.state_dict(), experiences[:2])
    for name in ("order", "chance"):
        getattr(later, name).set_state(getattr(half, name).get_state())
    later.train_task(experiences[2])
    assert torch.equal(weights(later), weights(whole))
    assert later.growth == whole.growth
    for one, other in product([whole.tuned], [later.tuned]):
        assert one is not None
        assert other is not None
        assert all(map(torch.equal, one.parameters(), other.parameters()))


# ------------------------------------------------------------------------------------------------------------- refusals


def test_nets_that_cannot_be_taken_apart_are_refused_in_one_line() -> None:
    for model, words in (
        (ResNet18Model(kind="resnet18", width=4), "a chain of layers; the resnet18 of task"),
        (LeNetModel(kind="lenet", channels=(3, 4), hidden=(6, 5)), "set response_norm = false"),
    ):
        with pytest.raises(UserError) as caught:
            den(model=model)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value).strip()


def test_streams_that_do_not_tell_the_task_and_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="is not defined in the domain-incremental scenario"):
        made(synthetic("domain"), "den")
    for key in SETTINGS:
        wrong: dict[str, Any] = {key: -1}
        with pytest.raises(UserError, match=key):
            den(**wrong)


def test_weights_that_a_sub_networks_last_step_spoils_are_noticed() -> None:
    strategy, tasks = second_task(split=False, expand=False)
    step = strategy.train_step
    strategy.steps_done = 0

    def spoil(batch: Any) -> None:
        step(batch)
        strategy.steps_done += 1
        if strategy.steps_done == 16:
            assert strategy.now is not None
            strategy.now.parameters[0].data.fill_(float("nan"))

    strategy.train_step = spoil
    with pytest.raises(FloatingPointError, match="weights that are not finite"):
        strategy.selective_retraining(tasks)
