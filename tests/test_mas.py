"""MAS and L2: sensitivities in closed form for a linear net, both ways to them against a loop, the penalties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.errors import UserError
from clbench.loading import ResidentLoader, TensorTask
from clbench.nets import TRUNKS
from clbench.seeds import derive
from clbench.specs import Scenario
from clbench.strategies import sample_gradients
from clbench.strategies.base import Setup
from clbench.strategies.mas import MAS
from strategy_factory import CPU, budget, headed, linear_net, made, recipe, synthetic, tensor_task, weights


def linear_mas(**settings: Any) -> tuple[MAS, TensorTask, Tensor, Tensor]:
    """Return MAS on a linear net of 3 pixels and 4 outputs, a task, its inputs x (7, 3) and its logits F (7, 4)."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    images = torch.randint(0, 256, (7, 1, 1, 3), dtype=torch.uint8, generator=generator)
    task = tensor_task(images, [0] * 7)
    setup = Setup(new_net=linear_net(3, 4, weight, bias), train=budget(), device=CPU, seed=11)
    strategy = MAS(setup=setup, config=MAS.Config(**{"lam": 2.0, **settings}))
    x = (images.flatten(1).to(torch.float32) / 255).double()
    return strategy, task, x, x @ weight.T + bias


# ---------------------------------------------------------------------------------------------------------- importances


def test_the_importance_of_a_linear_nets_weight_is_twice_its_output_times_its_input() -> None:
    """F = W x + b: d|F|^2/dW_jk = 2 F_j x_k and d|F|^2/db_j = 2 F_j, of any sign; Omega is the mean of their sizes."""
    strategy, task, x, f = linear_mas()
    got = strategy.sensitivity([task])
    expected = 2 * torch.einsum("nj,nk->jk", f.abs(), x.abs()) / len(x)
    torch.testing.assert_close(got["head.linear.weight"], expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got["head.linear.bias"], 2 * f.abs().mean(dim=0), rtol=1e-12, atol=1e-15)
    assert (f < 0).any()


def test_labels_do_not_matter() -> None:
    strategy, task, _, _ = linear_mas()
    other = tensor_task(task.images, range(7))
    for left, right in zip(strategy.sensitivity([task]).values(), strategy.sensitivity([other]).values(), strict=True):
        torch.testing.assert_close(left, right)


def test_in_a_batch_signs_cancel() -> None:
    """|mean_n 2 F_nj x_nk| of each batch, averaged over batches: below the mean of sizes where F changes its sign."""
    strategy, task, x, f = linear_mas(batch_size=4)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(derive(11, "strategy")))
    each = [2 * (f[rows].T @ x[rows]).abs() / len(rows) for rows in torch.split(order, 4)]
    got = strategy.sensitivity([task])["head.linear.weight"]
    torch.testing.assert_close(got, torch.stack(each).mean(dim=0), rtol=1e-12, atol=1e-15)
    alone = linear_mas()[0].sensitivity([task])["head.linear.weight"]
    assert (got < 0.9 * alone).any()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_mean_over_outputs_divides_by_their_number(batch_size: int) -> None:
    strategy, task, _, _ = linear_mas(batch_size=batch_size)
    mean = linear_mas(batch_size=batch_size, outputs="mean")[0].sensitivity([task])
    for name, value in strategy.sensitivity([task]).items():
        torch.testing.assert_close(mean[name], value / 4)


def test_as_many_samples_are_used_as_the_settings_ask_for() -> None:
    """The first 3 of the strategy's own permutation."""
    strategy, task, _, f = linear_mas(samples=3)
    rows = torch.randperm(7, generator=torch.Generator().manual_seed(derive(11, "strategy")))[:3]
    torch.testing.assert_close(strategy.sensitivity([task])["head.linear.bias"], 2 * f[rows].abs().mean(dim=0))


@pytest.mark.parametrize("kind", sorted(TRUNKS))
def test_both_ways_to_sizes_of_gradients_are_a_loop_of_backward_passes(kind: str) -> None:
    """For every net of the suite: conv layers, strides, normalisation, heads. The other task's head gets zeros."""
    net = headed(kind)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    expected = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    for n in range(3):
        net.zero_grad()
        net(x[n : n + 1], 0).square().sum().backward()
        for name, parameter in net.named_parameters():
            if parameter.grad is not None:
                expected[name] += parameter.grad.abs()
    assert expected["head.heads.0.blocks.0.weight"].any()

    def norms(logits: Tensor) -> Tensor:
        return logits.square().sum(dim=1)[None]

    for way in (sample_gradients._of_layers, sample_gradients._of_any_net):
        got = way(net, 0, x, norms, torch.ones(1, 3, dtype=torch.float64), torch.abs)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-13)


# -------------------------------------------------------------------------------------------------------------- penalty


def test_importances_of_tasks_add_up_and_pull_to_where_the_last_task_ended() -> None:
    """2 lam (Omega_1 + Omega_2) (theta - theta*), the gradient of lam sum Omega (theta - theta*)^2."""
    strategy, stream = made(synthetic("domain", n_tasks=3), "mas", lam=3.0)
    given = [{n: torch.rand_like(p) for n, p in strategy.model.named_parameters()} for _ in range(2)]
    for number, experience in enumerate(list(stream.benchmark.train_stream)[:2]):
        strategy.sensitivity = lambda tasks, number=number: {n: v.clone() for n, v in given[number].items()}
        strategy.train_task(experience)
    last = weights(strategy)
    strategy.before_task(stream.benchmark.train_stream[2])
    for parameter in strategy.model.parameters():
        parameter.data += torch.randn_like(parameter)
        parameter.grad = torch.zeros_like(parameter)
    strategy.after_backward()
    got = torch.cat([parameter.grad.flatten() for parameter in strategy.model.parameters()])
    omega = torch.cat([(given[0][name] + given[1][name]).flatten() for name in given[0]])
    torch.testing.assert_close(got, 2 * 3.0 * omega * (weights(strategy) - last))
    parts = torch.autograd.grad(strategy.penalty(), list(strategy.model.parameters()))
    torch.testing.assert_close(got, torch.cat([part.flatten() for part in parts]))


def test_l2_holds_everything_alike_newborn_outputs_from_their_birth_and_nothing_on_the_first_task() -> None:
    """2 lam (theta - theta*) where the loss has a gradient; the head of another task has none."""
    strategy, stream = made(synthetic(n_tasks=2), "l2", lam=3.0)
    first, second = list(stream.benchmark.train_stream)
    plain, _ = made(synthetic(n_tasks=2), "finetune")
    for each in (strategy, plain):
        each.train_task(first)
    assert torch.equal(weights(strategy), weights(plain))
    strategy.begin_task(second)
    strategy.before_task(second)
    begun = {name: parameter.detach().clone() for name, parameter in strategy.model.named_parameters()}
    assert "head.heads.1.blocks.0.weight" in begun
    for parameter in strategy.model.parameters():
        parameter.data += torch.randn_like(parameter)
    batch = next(iter(ResidentLoader([stream.train[1]], 16)))
    torch.autograd.backward(torch.nn.functional.cross_entropy(strategy.model(batch.x, batch.t), batch.y))
    own = {name: p.grad.clone() for name, p in strategy.model.named_parameters() if p.grad is not None}
    strategy.after_backward()
    for name, parameter in strategy.model.named_parameters():
        if "heads.0" in name:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, own[name] + 6.0 * (parameter.detach() - begun[name]))


@pytest.mark.parametrize(("method", "weak", "strong"), [("mas", 0.01, 1.0), ("l2", 0.01, 1.0)])
def test_strength_changes_the_weights(method: str, weak: float, strong: float) -> None:
    scenarios: tuple[Scenario, ...] = ("task", "domain", "class")
    for scenario in scenarios:
        found = []
        for lam in (0.0, weak, strong):
            strategy, stream = made(synthetic(scenario, n_tasks=2), method, lam=lam)
            strategy.train(list(stream.benchmark.train_stream))
            found.append(weights(strategy))
        for left, right in ((0, 1), (0, 2), (1, 2)):
            assert float((found[left] - found[right]).abs().max()) > 1e-4


@pytest.mark.parametrize(("method", "kept"), [("mas", {"importance"}), ("l2", set())])
def test_between_tasks_no_anchor_is_kept(method: str, kept: set[str]) -> None:
    strategy, stream = made(synthetic("domain", n_tasks=2), method)
    strategy.train(list(stream.benchmark.train_stream))
    assert set(strategy.holdings().auxiliary) == kept


def test_settings_out_of_range_are_refused() -> None:
    wrongs: list[dict[str, Any]] = [{"lam": -1.0}, {"samples": -1}, {"batch_size": 0}, {"outputs": "max"}]
    for wrong in wrongs:
        with pytest.raises(UserError, match=next(iter(wrong))):
            made(synthetic(), recipe("clbench.strategies.mas:MAS", **{"lam": 1.0, **wrong}))
    with pytest.raises(UserError, match="lam"):
        made(synthetic(), recipe("clbench.strategies.l2:L2", lam=-0.5))
