"""SI: the path integral of quadratic losses in closed form, whole tasks against a loop written from the paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.errors import UserError
from clbench.loading import Batch
from clbench.strategies.base import Setup
from clbench.strategies.si import SI
from strategy_factory import CPU, budget, linear_net, made, recipe, synthetic, weights

NOTHING = Batch(torch.zeros(1, 1, 1, 3), torch.zeros(1, dtype=torch.int64), 0)
"""A batch for losses that look at no data."""


class Quadratic(SI):
    """Learns sum_i h_i (theta_i - goal_i)^2 / 2 in place of data."""

    h: Tensor
    goal: Tensor

    def loss_of(self, batch: Batch) -> Tensor:
        theta = torch.cat([parameter.flatten() for parameter in self.model.parameters()])
        return (self.h * (theta - self.goal).square()).sum() / 2

    def learn(self, goal: Tensor, steps: int) -> None:
        """One task."""
        experience: Any = None
        self.goal = goal
        self.before_task(experience)
        for _ in range(steps):
            self.train_step(NOTHING)
        self.after_task(experience)

    def omega(self) -> Tensor:
        """Importances, flat."""
        return torch.cat([self.importance[name].flatten() for name, _ in self.model.named_parameters()])


def quadratic(lr: float, momentum: float = 0.0, **settings: Any) -> Quadratic:
    """Return SI on 8 weights, all 0, float64: 2 outputs of 3 pixels, and biases. The curvatures are 0, 1, ... 7."""
    zero = torch.zeros(2, 3, dtype=torch.float64)
    setup = Setup(linear_net(3, 2, zero, zero[:, 0]), budget(lr=lr, momentum=momentum), CPU, seed=0)
    strategy = Quadratic(setup=setup, config=SI.Config(**{"c": 1.0, **settings}))
    strategy.h = torch.arange(8, dtype=torch.float64)
    return strategy


GOAL = torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0, -1.0, 1.5, 2.5], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- importances


def test_the_path_integral_of_a_quadratic_loss_is_a_geometric_series() -> None:
    """Gradient descent on h e^2 / 2, e = theta - goal, from e_0 = -goal: e_k = q^k e_0, q = 1 - lr h.

    w = -sum_k g_k delta_k = sum_k lr (h e_k)^2 = lr h^2 e_0^2 (1 - q^2n) / (1 - q^2); Delta = (q^n - 1) e_0; Omega =
    w / (Delta^2 + xi). With h = 0 or e_0 = 0 nothing moves: Omega = 0.
    """
    lr, n, xi = 0.05, 7, 0.1
    strategy = quadratic(lr, xi=xi)
    strategy.learn(GOAL, n)
    h, e0, q = strategy.h, GOAL, 1 - lr * strategy.h
    series = torch.where(h > 0, (1 - q ** (2 * n)) / (1 - q.square()).clamp_min(1e-30), 0.0)
    w, moved = lr * h.square() * e0.square() * series, (q**n - 1) * -e0
    torch.testing.assert_close(weights(strategy), moved, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(strategy.omega(), w / (moved.square() + xi), rtol=1e-12, atol=1e-12)


def test_with_small_steps_the_path_integral_is_the_fall_of_the_loss_and_omega_half_the_curvature() -> None:
    """To the end of the way Delta = goal, w -> h goal^2 / 2, and Omega -> (h / 2) goal^2 / (goal^2 + xi)."""
    strategy = quadratic(lr=0.001, xi=1e-6)
    strategy.learn(GOAL, 20_000)
    seen = (strategy.h > 0) & (GOAL != 0)
    torch.testing.assert_close(strategy.omega()[seen], strategy.h[seen] / 2, rtol=5e-3, atol=0.0)


def test_damping_bounds_the_importance_of_a_weight_that_hardly_moved() -> None:
    """Omega = w / (Delta^2 + xi), of one step w = lr g^2 = Delta^2 / lr: never above 1 / lr, and w / xi if small."""
    strategy = quadratic(lr=0.1, xi=10.0)
    strategy.learn(1e-3 * GOAL, 1)
    moved = weights(strategy)
    torch.testing.assert_close(strategy.omega(), moved.square() / 0.1 / 10.0, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("path", "floor", "clip"), [("loss", True, None), ("total", False, 1.0), ("loss", False, 0.5)])
def test_three_tasks_are_those_of_a_loop_written_from_the_paper(
    momentum: float, path: Any, floor: bool, clip: float | None
) -> None:
    """Weights and importances, with the gradient 2 c Omega (theta - theta*) of c sum Omega (theta - theta*)^2."""
    c, xi, lr = 0.7, 0.2, 0.02
    strategy = quadratic(lr, momentum, c=c, xi=xi, path=path, floor=floor, clip=clip)
    h, theta, velocity, omega = strategy.h.clone(), *(torch.zeros(8, dtype=torch.float64) for _ in range(3))
    for goal in (GOAL, -GOAL.flip(0), 2 * GOAL.roll(3)):
        anchor, w = theta.clone(), torch.zeros(8, dtype=torch.float64)
        for _ in range(5):
            own = h * (theta - goal)
            step = own + 2 * c * omega * (theta - anchor)
            step = step if clip is None else step.clamp(-clip, clip)
            velocity = momentum * velocity + step
            w -= (own if path == "loss" else step) * -lr * velocity
            theta = theta - lr * velocity
        omega = omega + w / ((theta - anchor).square() + xi)
        omega = omega.clamp(min=0) if floor else omega
        strategy.learn(goal, 5)
        torch.testing.assert_close(weights(strategy), theta, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(strategy.omega(), omega, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("floor", [True, False])
def test_an_importance_below_zero_counts_as_zero_where_asked(floor: bool) -> None:
    """A weight that was moved uphill: w < 0 and Delta = 0 give Omega = w / xi, or 0."""
    strategy = quadratic(lr=0.1, xi=0.5, floor=floor)
    experience: Any = None
    strategy.before_task(experience)
    for path in strategy.path.values():
        path.fill_(-2.0)
    strategy.after_task(experience)
    torch.testing.assert_close(strategy.omega(), torch.full((8,), 0.0 if floor else -4.0, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------------------- penalty


def test_what_is_added_to_the_gradient_is_the_penaltys_own() -> None:
    """Autograd on c sum Omega (theta - theta*)^2, against the step of plain SGD that a task of no loss takes."""
    strategy = quadratic(lr=0.1, c=3.0)
    strategy.learn(GOAL, 4)
    strategy.h = torch.zeros(8, dtype=torch.float64)
    experience: Any = None
    strategy.before_task(experience)
    for parameter in strategy.model.parameters():
        parameter.data += 0.3
    parts = torch.autograd.grad(strategy.penalty(), list(strategy.model.parameters()))
    expected = weights(strategy) - 0.1 * torch.cat([part.flatten() for part in parts])
    strategy.train_step(NOTHING)
    torch.testing.assert_close(weights(strategy), expected)
    assert float(strategy.penalty().detach()) > 0


@pytest.mark.parametrize("optimizer", [{"optimizer": "adam", "lr": 0.01}, {"optimizer": "sgd", "lr": 0.1}])
def test_only_what_a_task_trains_gains_importance_and_another_tasks_head_stays(optimizer: dict[str, Any]) -> None:
    """Momentum would move an old head if the penalty handed it a gradient of zeros."""
    budget = {**optimizer, "reset_optimizer": False}
    strategy, stream = made(synthetic(**budget), "si")
    experiences = list(stream.benchmark.train_stream)
    strategy.train_task(experiences[0])
    head = "head.heads.0.blocks.0.weight"
    old, before = strategy.model.get_parameter(head).clone(), strategy.importance[head].clone()
    strategy.train_task(experiences[1])
    assert torch.equal(strategy.model.get_parameter(head), old)
    assert torch.equal(strategy.importance[head], before)
    assert bool(strategy.importance["head.heads.1.blocks.0.weight"].any())


def test_strength_damping_and_path_change_the_weights() -> None:
    changes: list[dict[str, Any]] = [{"c": 0.0}, {"c": 0.1}, {"c": 10.0}, {"c": 10.0, "xi": 1.0}]
    changes += [{"c": 10.0, "path": "total"}, {"c": 10.0, "clip": 0.01}]
    found = []
    for settings in changes:
        strategy, stream = made(synthetic("domain", n_tasks=3), "si", **settings)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
    assert all(float((a - b).abs().max()) > 1e-5 for a, b in pairs)


def test_a_strong_anchor_keeps_the_first_task() -> None:
    """With the labels' meaning changing from task to task, finetuning forgets the first; a strong anchor does not."""
    kept = {}
    for c in (0.0, 100.0):
        strategy, stream = made(synthetic("domain", n_tasks=4, lr=0.01), "si", c=c)
        strategy.train(list(stream.benchmark.train_stream))
        kept[c] = strategy.accuracy(stream.benchmark.test_stream[0])
    assert kept[100.0] > kept[0.0]


def test_between_tasks_it_keeps_its_importances_and_nothing_else() -> None:
    """P values: the anchor is the weights themselves."""
    strategy, stream = made(synthetic("domain", n_tasks=2), "si")
    strategy.train(list(stream.benchmark.train_stream))
    kept = strategy.holdings().auxiliary
    assert set(kept) == {"importance"}
    assert sum(value.numel() for value in kept["importance"].values()) == len(weights(strategy))


def test_settings_out_of_range_are_refused() -> None:
    wrongs: list[dict[str, Any]] = [{"c": -1.0}, {"xi": 0.0}, {"path": "both"}, {"clip": 0.0}]
    for wrong in wrongs:
        with pytest.raises(UserError, match=next(iter(wrong))):
            made(synthetic(), recipe("clbench.strategies.si:SI", **{"c": 1.0, **wrong}))
