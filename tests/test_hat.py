"""HAT: its equations by hand, what gates hold in place under every optimiser, the budget's annealing, the books."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.loading import Batch
from clbench.nets import HeadedNet, MultiHead, build_trunk
from clbench.strategies.base import Setup
from clbench.strategies.hat import HAT, compensation, scales
from strategy_factory import CPU, budget, made, synthetic

BUDGETS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "lr": 0.05},
    "momentum that lives on": {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "reset_optimizer": False},
    "adam that lives on": {"lr": 0.01, "reset_optimizer": False},
    "adamw with decay": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "adam with decay and clipping": {"lr": 0.01, "weight_decay": 0.01, "grad_clip": 1.0, "reset_optimizer": False},
}


def tiny(hidden: tuple[int, ...] = (2, 2), train: dict[str, Any] | None = None, **settings: Any) -> HAT:
    """Return HAT in float64 on two pixels with two tasks, the second about to be trained."""

    def new_net() -> HeadedNet:
        torch.manual_seed(0)
        trunk = build_trunk("mlp", (1, 1, 2), hidden=list(hidden))
        return HeadedNet(trunk, MultiHead(trunk.out_features, 0)).double()

    setup = Setup(new_net=new_net, train=budget(**(train or {})), device=CPU, seed=0)
    strategy = HAT(setup=setup, config=HAT.Config(**settings))
    for task in (0, 1):
        strategy.net.observe(task, [0, 1])
    strategy.refresh_optimizer()
    strategy.task_label = 1
    return strategy


def embed(strategy: HAT, task: int, values: list[float]) -> nn.Parameter:
    """Set a task's embedding; return it."""
    embedding = strategy.net.attention(task).embedding
    assert embedding is not None
    with torch.no_grad():
        embedding.copy_(torch.tensor(values))
    return embedding


def logit(share: float) -> float:
    """Return the x with sigmoid(x) = share."""
    return float(torch.logit(torch.tensor(share, dtype=torch.float64)))


def a_batch() -> Batch:
    torch.manual_seed(4)
    return Batch(torch.rand(4, 1, 1, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0]), 1)


# ---------------------------------------------------------------------------------------------------- equations by hand


def test_a_step_is_scaled_by_what_earlier_tasks_leave_free() -> None:
    """Equations 2 and 3 under plain SGD, where a scaled step is a scaled gradient.

    Earlier gates 0.25 and 1 in the first layer, 0.5 and 0 in the second. Free is 1 - min(out, in), inputs being 1:
    first layer's rows 0.75 and 0; second: row of 0.5 has 1 - min(0.5, 0.25) = 0.75 and 1 - min(0.5, 1) = 0.5, row of 0
    has 1, 1. Biases 0.75, 0 and 0.5, 1.
    """
    strategy = tiny(s_max=2.0, lam=0.0)
    embed(strategy, 0, [logit(0.25) / 2, 6.0e2, logit(0.5), -6.0e2])
    embed(strategy, 1, [1.0, 1.0, 1.0, 1.0])
    strategy.net.train()
    strategy.scales = iter([2.0])
    strategy.before_task(cast(Any, None))
    trunk, batch = strategy.net.trunk, a_batch()
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.abs_()  # no unit is dead
    loss = nn.functional.cross_entropy(strategy.net(batch.x, 1), batch.y)
    parameters = list(trunk.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    strategy.train_step(batch)
    free = [[[0.75], [0.0]], [0.75, 0.0], [[0.75, 0.5], [1.0, 1.0]], [0.5, 1.0]]
    for parameter, old, gradient, share in zip(parameters, before, gradients, free, strict=True):
        wanted = old - 0.1 * gradient * torch.tensor(share, dtype=torch.float64)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-9, atol=1e-11)
    assert all(bool(gradient.any()) for gradient in gradients)
    assert torch.equal(parameters[0][1], before[0][1])


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_under_adam_too_a_half_used_weight_moves_half_as_far(optimizer: str) -> None:
    """Adam's first step is lr long whatever the gradient's size: 0.1 where free, 0.05 where the gate was a half."""
    moves = []
    for past in (-6.0e2, 0.0):
        strategy = tiny((1,), {"optimizer": optimizer, "lr": 0.1}, s_max=2.0, lam=0.0)
        embed(strategy, 0, [past])
        embed(strategy, 1, [6.0])
        weight = strategy.net.trunk.layer(0).weight
        with torch.no_grad():
            for parameter in strategy.net.trunk.parameters():
                parameter.fill_(1.0)
        strategy.net.train()
        strategy.before_task(cast(Any, None))
        strategy.train_step(a_batch())
        moves.append((weight.detach() - 1).abs())
    torch.testing.assert_close(moves[0], torch.full((1, 2), 0.1, dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(moves[1], moves[0] / 2)


@pytest.mark.parametrize("s", [0.01, 1.0, 7.0])
def test_compensation_makes_the_gradient_that_of_an_unannealed_gate(s: float) -> None:
    """Equation 5: s sigmoid'(s e) c = s_max sigmoid'(e). With s 2, s_max 8, e 0 the factor c is 8 / 2 * 2 / 2 = 4."""
    assert compensation(torch.zeros(1), 2.0, 8.0).tolist() == [4.0]
    e = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    (annealed,) = torch.autograd.grad(torch.sigmoid(s * e).sum(), e)
    (plain,) = torch.autograd.grad(8.0 * torch.sigmoid(e).sum(), e)
    torch.testing.assert_close(annealed * compensation(e.detach(), s, 8.0), plain)


def test_compensation_stays_finite_because_its_argument_is_held_at_fifty() -> None:
    """(cosh 50 + 1) / (cosh 6 + 1) is about e^44 / (1 + 2 e^-6) = 1.279e19; cosh(2400) would not fit a float."""
    found = compensation(torch.tensor([6.0, -6.0]), 400.0, 400.0)
    assert bool(torch.isfinite(found).all())
    assert found.tolist() == pytest.approx([1.279e19, 1.279e19], rel=1e-3)


def test_the_regulariser_is_the_share_of_unused_units_that_open() -> None:
    """Equation 7. Gates 1, 0.5, 0.25; used before 1, 0.5, 0: (0.25 + 0.25) / (0.5 + 1) = 1/3; before any, 1.75/3.

    The penalty is lam, 2, times that.
    """
    strategy = tiny((3,), lam=2.0)
    gates = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    assert float(strategy.penalty(gates)) == pytest.approx(1.75 / 3 * 2)
    strategy.spare(torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64))
    assert float(strategy.penalty(gates)) == pytest.approx(1 / 3 * 2)
    strategy.spare(torch.ones(3, dtype=torch.float64))
    assert float(strategy.penalty(gates)) == 0.0, "nothing is unused"


def test_the_embeddings_step_is_compensated_and_held_within_six() -> None:
    """Moved by lam 2 alone: of two units, R = mean sigmoid(s e), its gradient at e = 0, compensated, is s_max / 4 / 2.

    SGD 0.1, s_max 8: 0 - 0.1 * 2 * 8 / 8 = -0.2 from any s; -5.99 is clamped at -6 wherever it goes.
    """
    either: list[dict[str, Any]] = [{}, {"embedding_lr": 0.1}]
    for settings in either:
        strategy = tiny((2,), s_max=8.0, lam=2.0, **settings)
        strategy.net.parts.pop("0")
        embedding = embed(strategy, 1, [0.0, 0.0])
        strategy.net.train()
        strategy.scales = iter([0.5, 0.5])
        strategy.before_task(cast(Any, None))
        with torch.no_grad():
            for parameter in (*strategy.net.trunk.parameters(), *strategy.net.head.parameters()):
                parameter.zero_()
        strategy.train_step(a_batch())
        assert embedding.tolist() == pytest.approx([-0.2, -0.2], rel=1e-12)
        embed(strategy, 1, [-9.0, 9.0])
        strategy.train_step(a_batch())
        assert embedding.tolist() == [-6.0, 6.0]


def test_s_rises_from_its_inverse_to_its_largest_in_every_epoch() -> None:
    """Equation 4: three batches an epoch and s_max 4 are 0.25, 2.125, 4; eight steps are two stretches of four."""
    assert list(scales(6, 3, 4.0)) == [0.25, 2.125, 4.0] * 2
    assert list(scales(8, 3, 4.0)) == [0.25, 1.5, 2.75, 4.0] * 2
    assert list(scales(2, 3, 4.0)) == [0.25, 4.0]
    assert list(scales(3, 1, 4.0)) == [4.0] * 3
    long = list(scales(5000, 469, 400.0))
    assert (len(long), long.count(400.0), long[-1]) == (5000, 10, 400.0)


def test_training_ends_at_the_largest_scale_whatever_cuts_the_budget() -> None:
    either: list[dict[str, Any]] = [{"iterations": 5}, {"epochs": 2}]
    for budget_of in either:
        strategy, stream = made(synthetic(n_tasks=1, **budget_of), "hat")
        strategy.train_task(stream.benchmark.train_stream[0])
        assert strategy.net.scale == strategy.config.s_max
        assert next(strategy.scales, None) is None


# ----------------------------------------------------------------------------------------------------- what it promises


def probes(strategy: HAT, tasks: int) -> list[Tensor]:
    strategy.net.eval()
    torch.manual_seed(9)
    x = torch.rand(16, *strategy.net.trunk.input_shape)
    with torch.no_grad():
        return [strategy.net(x, task) for task in range(tasks)]


@pytest.mark.parametrize("name", BUDGETS)
def test_with_hard_gates_no_later_task_changes_an_earlier_ones_logits_by_a_bit(name: str) -> None:
    strategy, stream = made(synthetic(n_tasks=3, iterations=12, **BUDGETS[name]), "hat", hard=True, lam=0.1)
    seen: list[Tensor] = []
    for experience in stream.benchmark.train_stream:
        weights = [parameter.detach().clone() for parameter in strategy.net.trunk.parameters()]
        strategy.train_task(experience)
        moved = [not torch.equal(*pair) for pair in zip(weights, strategy.net.trunk.parameters(), strict=True)]
        assert any(moved), "there was room left"
        now = probes(strategy, len(seen) + 1)
        assert all(torch.equal(old, new) for old, new in zip(seen, now[:-1], strict=True))
        seen = now


@pytest.mark.parametrize("kind", ["zenke", "lenet"])
def test_hard_gates_hold_in_convolutions_too(kind: str) -> None:
    """With LeNet's response normalisation, where neighbouring channels meet."""

    def new_net() -> HeadedNet:
        torch.manual_seed(0)
        hidden: Any = 8 if kind == "zenke" else (8, 8)
        trunk = build_trunk(kind, (1, 12, 12), channels=(4, 6), hidden=hidden)
        return HeadedNet(trunk, MultiHead(trunk.out_features, 0))

    train = budget(optimizer="adam", lr=0.01, reset_optimizer=False)
    setup = Setup(new_net=new_net, train=train, device=CPU, seed=0)
    strategy = HAT(setup=setup, config=HAT.Config(hard=True))
    seen: list[Tensor] = []
    for task in (0, 1):
        strategy.net.observe(task, [0, 1])
        strategy.task_label = task
        strategy.refresh_optimizer()
        strategy.before_task(cast(Any, None))
        strategy.net.train()
        before = [parameter.detach().clone() for parameter in strategy.net.trunk.parameters()]
        for _ in range(3):
            strategy.train_step(Batch(torch.rand(4, 1, 12, 12), torch.tensor([0, 1, 1, 0]), task))
        strategy.after_task(cast(Any, None))
        assert any(not torch.equal(*pair) for pair in zip(before, strategy.net.trunk.parameters(), strict=True))
        seen.append(probes(strategy, 1)[0])
    assert torch.equal(*seen)


def test_a_task_seen_again_moves_what_it_alone_uses_and_nothing_of_the_others() -> None:
    strategy, stream = made(synthetic(n_tasks=2, iterations=12), "hat", hard=True)
    first, second = stream.benchmark.train_stream
    for experience in (first, second):
        strategy.train_task(experience)
    before, gates = probes(strategy, 2), strategy.net.lasting(0)
    strategy.train_task(first)
    after = probes(strategy, 2)
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[0], before[0])
    assert torch.equal(strategy.net.lasting(0), gates)


def test_soft_gates_keep_an_old_task_nearly_where_it_was() -> None:
    """Under Adam, which would undo a scaled gradient: logits move by far less than without any protection."""
    moved = []
    for held in (True, False):
        strategy, stream = made(synthetic(n_tasks=2, iterations=25, lr=0.01), "hat")
        first, second = stream.benchmark.train_stream
        strategy.train_task(first)
        (before,) = probes(strategy, 1)
        if not held:
            strategy.before_task = lambda experience: None
        strategy.train_task(second)
        moved.append(float((probes(strategy, 1)[0] - before).abs().max()))
    assert moved[0] < moved[1] / 100


def test_a_stronger_regulariser_opens_fewer_gates() -> None:
    opened = []
    for lam in (0.0, 1.0, 30.0):
        strategy, stream = made(synthetic(n_tasks=1, iterations=25), "hat", lam=lam, embedding_lr=0.05)
        strategy.train_task(stream.benchmark.train_stream[0])
        opened.append(float(strategy.net.lasting(0).sum()))
    assert opened == sorted(opened, reverse=True)
    assert opened[-1] < opened[0]


# ------------------------------------------------------------------------------------------------------------ the books


def test_what_a_task_keeps_is_a_number_a_unit_or_with_hard_gates_a_bit() -> None:
    """32 units on 64 pixels, two tasks of two classes, optimiser afresh: trunk 32 * 65 and heads 2 * 66 floats.

    Gates: 2 * 32 floats, 256 bytes; hard 2 * 4 bytes.
    """
    for hard, gates in ((False, 256), (True, 8)):
        strategy, stream = made(synthetic(n_tasks=2, iterations=3), "hat", hard=hard)
        for experience in stream.benchmark.train_stream:
            strategy.train_task(experience)
        counted = footprint(strategy.holdings())
        assert counted.keep_learning_bytes == counted.answer_bytes == 4 * (32 * 65 + 2 * 66) + gates


def test_a_task_uses_the_weights_between_its_open_units() -> None:
    strategy, stream = made(synthetic(n_tasks=2, iterations=3), "hat", hard=True)
    for experience in stream.benchmark.train_stream:
        strategy.train_task(experience)
    for task, uses in strategy.uses().items():
        opened = int(strategy.net.lasting(task).sum())
        weight, bias, *own = uses
        assert weight.mask is not None
        assert bias.mask is not None
        assert (int(weight.mask.sum()), int(bias.mask.sum())) == (64 * opened, opened)
        assert sorted(tuple(use.tensor.shape) for use in own) == [(2,), (2, 32), (4,)]


def test_a_net_that_is_no_chain_is_refused_in_one_line() -> None:
    def new_net() -> HeadedNet:
        trunk = build_trunk("resnet18", (3, 16, 16), width=4)
        return HeadedNet(trunk, MultiHead(trunk.out_features, 0))

    with pytest.raises(UserError) as caught:
        HAT(setup=Setup(new_net=new_net, train=budget(), device=CPU, seed=0), config=HAT.Config())
    (line,) = caught.value.lines
    rule = "HAT needs a net that is a chain of layers, such as mlp, zenke or lenet: "
    assert line == rule + "ResNet18 is no chain of layers"
