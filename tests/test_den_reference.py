"""DEN's released code: the behaviours that decide its numbers, each seen for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.loading import Batch, ResidentLoader, TensorTask
from clbench.nets.expandable import SubNet
from clbench.specs import LeNetModel, MLPModel, ResNet18Model
from clbench.strategies.den_reference import DENReferenceCode
from clbench.strategies.expanding import Phase
from clbench.streams import Stream
from strategy_factory import made, synthetic

SGD = {"optimizer": "sgd", "lr": 0.05}
STEPS, BATCH = 8, 32


def reference(
    n_tasks: int = 2, train: dict[str, Any] | None = None, model: Any = None, **settings: Any
) -> tuple[Any, Stream]:
    """Return the strategy, untrained, on an MLP of 8 and 6 units, and its stream."""
    task = synthetic("task", n_tasks=n_tasks, **{"iterations": STEPS, "batch_size": BATCH, "lr": 0.01, **(train or {})})
    task = task.model_copy(update={"model": model or MLPModel(kind="mlp", hidden=[8, 6])})
    strategy, stream = made(task, "den_reference_code", **{"ex_k": 3, **settings})
    assert isinstance(strategy, DENReferenceCode)
    return strategy, stream


def second_task(**changes: Any) -> tuple[Any, list[TensorTask]]:
    """Return the strategy at the beginning of its second task, and that task's samples."""
    strategy, stream = reference(**changes)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    strategy.begin_task(second)
    strategy.remember()
    tasks = strategy.training_data(second)
    strategy.samples_per_pass = sum(len(task) for task in tasks)
    return strategy, tasks


def phases_of(strategy: Any) -> list[Phase]:
    """Return a list that collects the phases trained from now on."""
    phases: list[Phase] = []
    train = strategy.train_phase

    def spy(tasks: Any, phase: Phase, order: Any = None) -> None:
        phases.append(phase)
        train(tasks, phase, order)

    strategy.train_phase = spy
    return phases


def logged(strategy: Any, kind: str, task: int | None = None) -> int:
    events = [event for event in strategy.growth if event.kind == kind and task in (None, event.after_task)]
    return sum(event.units for event in events)


def shared(strategy: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in strategy.model.trunk.parameters()]


# ----------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_mean_of_one_sigmoids_cross_entropy_an_output() -> None:
    """Logits 0 and ln 3 are sigmoids of 1/2 and 3/4.

    So label 1 costs -(ln 1/2 + ln 3/4) / 2, and label 0 costs -(ln 1/2 + ln 1/4) / 2.
    """
    strategy, _ = reference()
    logits = torch.tensor([[0.0, float(torch.tensor(3.0).log())]])
    half, quarter = 0.5 * float(torch.tensor(2.0).log()), 0.5 * float(torch.tensor(4.0).log())
    three_quarters = quarter - 0.5 * float(torch.tensor(3.0).log())
    assert float(strategy.task_loss(logits, torch.tensor([1]))) == pytest.approx(half + three_quarters, rel=1e-6)
    assert float(strategy.task_loss(logits, torch.tensor([0]))) == pytest.approx(half + quarter, rel=1e-6)
    both = strategy.task_loss(logits.expand(2, 2), torch.tensor([1, 0]))
    assert float(both) == pytest.approx((2 * half + three_quarters + quarter) / 2, rel=1e-6)


def test_logits_are_what_the_auroc_orders_by() -> None:
    strategy, _ = reference()
    logits = torch.randn(3, 4)
    assert torch.equal(strategy.scores(logits), logits)


# ----------------------------------------------------------------------------------------------------------------- step


def test_a_step_decays_and_thresholds_every_trained_variable_by_the_whole_mu() -> None:
    """Plain SGD: soft(w - lr (g + mu_2 w), mu), for biases too; mu is not multiplied by the learning rate."""
    strategy, stream = reference(train=SGD, l1_lambda=0.01, l2_lambda=0.3)
    strategy.begin_task(stream.benchmark.train_stream[0])
    trained = strategy.everything()
    batch = next(iter(ResidentLoader([stream.train[0]], 16)))
    targets = torch.eye(2)[batch.y]
    loss = F.binary_cross_entropy(torch.sigmoid(strategy.model(batch.x, 0)), targets)
    slopes = torch.autograd.grad(loss, trained)
    expected = [
        F.softshrink(parameter.detach() - 0.05 * (slope + 0.3 * parameter.detach()), 0.01)
        for parameter, slope in zip(trained, slopes, strict=True)
    ]
    strategy.samples_per_pass, strategy.steps = 10**6, 0
    strategy.now = strategy.phase_of(trained)
    strategy.train_step(batch)
    for parameter, value in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_falls_by_a_twentieth_after_every_pass_and_starts_afresh_with_a_phase() -> None:
    """After as many samples as a pass has, and again; whatever the protocol's schedule."""
    schedule = {"kind": "step", "milestones": [1], "gamma": 0.1}
    strategy, stream = reference(train={"epochs": 3, "schedule": schedule}, loss_thr=1e9)
    rates: list[float] = []
    step = strategy.train_step

    def spy(batch: Batch) -> None:
        step(batch)
        rates.append(strategy.optimizer.param_groups[0]["lr"])

    strategy.train_step = spy
    samples = len(stream.train[0])
    assert samples == len(stream.train[1])
    steps = 3 * -(-samples // BATCH)
    expected = [0.01 * 0.95 ** (number * BATCH // samples) for number in range(steps)]
    assert expected[-1] < 0.01 * 0.95
    strategy.train(list(stream.benchmark.train_stream))
    assert rates == pytest.approx([*expected, 0.01, *expected], rel=1e-12)


# --------------------------------------------------------------------------------------------------------------- phases


def test_a_task_has_a_step_and_three_phases_or_a_step_and_one() -> None:
    """The first task one phase; expanding, others have selection, expansion and all; not expanding, selection alone."""
    for threshold, phases in ((0.01, 3), (1e9, 1)):
        strategy, stream = reference(loss_thr=threshold)
        strategy.train(list(stream.benchmark.train_stream))
        assert strategy.samples_trained == BATCH * (STEPS + 1 + phases * STEPS)
        assert (logged(strategy, "added") > 0) == (phases == 3)


def test_the_new_head_gets_one_step() -> None:
    """By SGD, from its birth: soft(w - lr (g + mu_2 w), mu) on a batch of the strategy's own chance."""
    strategy, tasks = second_task(train=SGD, l1_lambda=0.001, l2_lambda=0.1)
    twin = torch.Generator()
    twin.set_state(strategy.chance.get_state())
    batch = next(iter(ResidentLoader(tasks, BATCH, twin)))
    head, before = strategy.own_head(), shared(strategy)
    slopes = torch.autograd.grad(strategy.task_loss(strategy.model(batch.x, 1), batch.y), head)
    expected = [
        F.softshrink(parameter.detach() - 0.05 * (slope + 0.1 * parameter.detach()), 0.001)
        for parameter, slope in zip(head, slopes, strict=True)
    ]
    trained = strategy.samples_trained
    strategy.model.eval()
    strategy.one_step_on_the_head(tasks)
    assert strategy.model.training
    assert strategy.samples_trained == trained + BATCH
    assert all(map(torch.equal, shared(strategy), before))
    for parameter, value in zip(head, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-4, atol=1e-6)


def selective() -> tuple[Any, list[TensorTask]]:
    """Output 0 listens to unit 2 of the second layer, which listens to unit 5 of the first; output 1 to all others."""
    strategy, tasks = second_task(l1_lambda=0.0)
    head, second = strategy.model.head(1), strategy.model.layer(1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 0, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1]]))
        second.weight[2] = 0
        second.weight[2, 5] = 0.5
        second.bias[2] = 0.1
        strategy.model.layer(0).bias[5] = 1.0
    strategy.remember()
    return strategy, tasks


def test_units_are_selected_from_output_0_alone_and_no_others_are_trained() -> None:
    strategy, tasks = selective()
    strategy.growth.clear()
    before, head = shared(strategy), strategy.model.head(1).weight.detach().clone()
    strategy.retrain_selected(tasks)
    first, second = strategy.model.layers()
    assert (first.weight != before[0]).any(dim=1).nonzero().flatten().tolist() == [5]
    assert (first.bias != before[1]).nonzero().flatten().tolist() == [5]
    assert (second.weight != before[2]).nonzero().tolist() == [[2, 5]]
    assert (strategy.model.head(1).weight != head).nonzero().tolist() == [[0, 2]]
    assert [(event.layer, event.units) for event in strategy.growth] == [("layers.0", 1), ("layers.1", 1)]


def test_all_logits_of_the_selected_net_share_one_score() -> None:
    """They differ by the same amounts for every input: by biases, before training and after it."""
    strategy, tasks = selective()
    phases = phases_of(strategy)
    strategy.retrain_selected(tasks)
    (phase,) = phases
    logits = phase.net(next(iter(ResidentLoader(tasks, 16))).x, 1).detach()
    assert float(logits[:, 0].std()) > 1e-4
    biases = strategy.model.head(1).bias.detach()
    expected = (biases[1] - biases[0]).expand(16)
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], expected, rtol=0, atol=1e-5)


def test_the_selected_net_is_held_to_the_last_task_but_for_its_head() -> None:
    """By lambda / 2, weights and biases: moved by 1, each has a gradient of 0.5 plus mu_2 times itself."""
    strategy, tasks = second_task(l2_lambda=0.1)
    phases: list[Phase] = []
    strategy.train_phase = lambda given, phase, order=None: phases.append(phase)
    strategy.retrain_selected(tasks)
    (phase,) = phases
    part = phase.net
    assert isinstance(part, SubNet)
    assert len(phase.parameters) == 6
    for parameter in phase.parameters:
        parameter.data += 1.0
        parameter.grad = torch.zeros_like(parameter)
    phase.add_gradients()
    for parameter in phase.parameters:
        held = 0.0 if any(parameter is other for other in (part.head_weight, part.head_bias)) else 0.5
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, 0.1 * parameter.detach() + held, rtol=1e-5, atol=1e-6)


def test_the_last_mini_batchs_loss_decides_about_expansion_and_all_that_follows() -> None:
    for last, expands in ((0.24, False), (0.25, True)):
        strategy, stream = reference(loss_thr=0.25, spl_thr=0.0)

        def pretend(tasks: Any, strategy: Any = strategy, last: float = last) -> None:
            strategy.loss = torch.tensor(last)

        strategy.retrain_selected = pretend
        strategy.drifts = lambda: [torch.ones(8), torch.ones(6)]
        strategy.train(list(stream.benchmark.train_stream))
        assert (logged(strategy, "added"), logged(strategy, "split")) == ((6, 6) if expands else (0, 0))


def test_the_loss_asked_is_that_of_the_selected_nets_last_step() -> None:
    strategy, tasks = second_task()
    losses: list[float] = []
    step = strategy.train_step

    def spy(batch: Batch) -> None:
        step(batch)
        losses.append(float(strategy.loss))

    strategy.train_step = spy
    strategy.one_step_on_the_head(tasks)
    strategy.retrain_selected(tasks)
    assert len(losses) == 1 + STEPS
    assert float(strategy.loss) == losses[-1]


def test_by_its_own_settings_every_task_but_the_first_expands() -> None:
    """The shared score keeps the loss far above 0.01."""
    strategy, stream = reference(3)
    strategy.train(list(stream.benchmark.train_stream))
    assert [logged(strategy, "added", number) for number in range(3)] == [0, 6, 6]


def test_an_expansion_trains_what_is_new_and_the_whole_new_head() -> None:
    """Group thresholds, not scaled by the learning rate either, are for new weights of the layers: in and out."""
    strategy, tasks = second_task(l1_lambda=0.0)
    phases, before = phases_of(strategy), shared(strategy)
    head = strategy.model.head(1).weight.detach().clone()
    strategy.expand(tasks)
    for parameter, old in zip(strategy.model.trunk.parameters(), before, strict=True):
        assert torch.equal(parameter[tuple(slice(n) for n in old.shape)], old)
    assert (strategy.model.head(1).weight[:, :6] != head).all()
    (phase,) = phases
    assert [tuple(block.shape) for block in phase.grouped] == [(3, before[0].shape[1]), (3, 11), (6, 3)]
    block = phase.grouped[1]
    with torch.no_grad():
        block.fill_(0.0)
        block[0, :2] = torch.tensor([3.0, 4.0])
    phase.shrink(1.0)
    torch.testing.assert_close(block[0, :2].detach(), torch.tensor([3.0, 4.0]) * (1 - 1e-3 / 5))


def test_group_sparsity_prunes_units_into_which_no_weight_is_left() -> None:
    strategy, stream = reference(gl_lambda=10.0)
    strategy.train(list(stream.benchmark.train_stream))
    assert strategy.widths() == {"layers.0": 8, "layers.1": 6}
    assert logged(strategy, "pruned") == logged(strategy, "added") == 6


# ---------------------------------------------------------------------------------------------------------------- split


def test_of_those_that_drifted_the_least_are_split_and_copies_are_what_they_were() -> None:
    """Two of the four beyond 0.05: units 4 and 2. All old weights go back, split or not; copies' biases: U(0, 1)."""
    strategy, _ = second_task(ex_k=2)
    with torch.no_grad():
        for layer in strategy.model.layers():
            layer.weight += 0.2
            layer.bias -= 7.0
    moved = torch.tensor([0.05, 0.9, 0.07, 0.01, 0.06, 0.08, 0.0, 0.04])
    strategy.drifts = lambda: [moved, torch.zeros(6)]
    strategy.split()
    (weight, bias), (above, _) = strategy.before
    first, second = strategy.model.layers()
    assert strategy.widths() == {"layers.0": 10, "layers.1": 6}
    assert torch.equal(first.weight[:8], weight)
    assert torch.equal(first.weight[8:], weight[[2, 4]])
    assert bias is not None
    assert torch.equal(first.bias[:8], bias)
    assert ((first.bias[8:] > 0) & (first.bias[8:] < 1)).all()
    assert float(first.bias[8].detach()) != float(first.bias[9].detach())
    assert torch.equal(second.weight, above[:, [*range(8), 2, 4]])
    assert [(event.layer, event.kind, event.units) for event in strategy.growth][-1] == ("layers.0", "split", 2)


def test_at_most_k_are_split_and_none_at_the_threshold() -> None:
    for drift, split in ((0.06, 10), (0.05, 0)):
        strategy, _ = second_task(ex_k=10, model=MLPModel(kind="mlp", hidden=[14]))
        strategy.drifts = lambda drift=drift: [torch.full((14,), drift)]
        strategy.split()
        assert logged(strategy, "split") == split


def test_the_last_phase_trains_everything_held_to_the_last_task() -> None:
    strategy, stream = reference()
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    before = shared(strategy)
    phases = phases_of(strategy)
    strategy.train_task(second)
    last = phases[-1]
    assert len(phases) == 3
    assert [id(parameter) for parameter in last.parameters] == [id(parameter) for parameter in strategy.everything()]
    assert [id(parameter) for parameter, _ in last.anchors] == [id(p) for p in strategy.model.trunk.parameters()]
    assert all(torch.equal(value, old) for (_, value), old in zip(last.anchors, before, strict=True))
    assert last.drift == 0.5
    assert last.net is strategy.model


# ---------------------------------------------------------------------------------------------------------------- whole


def test_the_books_of_growth_add_up_and_every_task_is_learned() -> None:
    strategy, stream = reference(3, train={"iterations": 40, "lr": 0.02}, spl_thr=0.3)
    before = strategy.widths()
    for number, experience in enumerate(stream.benchmark.train_stream):
        strategy.train_task(experience)
        for name, width in strategy.widths().items():
            sign = {"added": 1, "pruned": -1, "split": 1, "reused": 0}
            events = [event for event in strategy.growth if event.layer == name and event.after_task == number]
            assert width - before[name] == sum(sign[event.kind] * event.units for event in events)
        before = strategy.widths()
        assert strategy.accuracy(stream.benchmark.test_stream[number]) > 0.8


def test_nets_that_cannot_be_taken_apart_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^[^\n]*a chain of layers; the resnet18 of task [^\n]*$"):
        reference(model=ResNet18Model(kind="resnet18", width=4))
    with pytest.raises(UserError, match=r"^DENReferenceCode: LeNet normalises [^\n]*: set response_norm = false$"):
        reference(model=LeNetModel(kind="lenet", channels=(3, 4), hidden=(6, 5)))
