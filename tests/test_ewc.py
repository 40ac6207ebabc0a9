"""EWC: five estimators of the Fisher diagonal against closed forms, two penalties against brute force."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.errors import UserError
from clbench.loading import ResidentLoader, TensorTask
from clbench.nets import TRUNKS
from clbench.seeds import derive
from clbench.strategies import sample_gradients
from clbench.strategies.base import Setup
from clbench.strategies.ewc import EWC
from strategy_factory import CPU, budget, headed, linear_net, made, recipe, synthetic, tensor_task, weights

SETTINGS: dict[str, Any] = {"lam": 3.0, "fisher": "exact", "mode": "separate"}


def linear_ewc(n_samples: int = 7, **settings: Any) -> tuple[EWC, TensorTask, Tensor, Tensor]:
    """Return EWC on a linear-softmax net of 3 pixels and 4 classes, a task, its inputs x (N, 3) and p (N, 4)."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    images = torch.randint(0, 256, (n_samples, 1, 1, 3), dtype=torch.uint8, generator=generator)
    task = tensor_task(images, torch.randint(0, 4, (n_samples,), generator=generator).tolist())
    setup = Setup(new_net=linear_net(3, 4, weight, bias), train=budget(), device=CPU, seed=11)
    strategy = EWC(setup=setup, config=EWC.Config(**{**SETTINGS, **settings}))
    x = (images.flatten(1).to(torch.float32) / 255).double()
    return strategy, task, x, torch.softmax(x @ weight.T + bias, dim=1)


def drawn(strategy: EWC) -> torch.Generator:
    """Return a twin of the strategy's generator of chance."""
    return torch.Generator().manual_seed(derive(strategy.setup.seed, "strategy"))


def agrees(got: dict[str, Tensor], error: Tensor, x: Tensor) -> None:
    """Check the Fisher of a linear-softmax net against the mean of squared gradients.

    With z = W x + b and log p(y) = z_y - log sum_j exp z_j, the gradient is d/db_j = [j = y] - p_j =: e_j and
    d/dW_jk = e_j x_k; `error` holds E_y[e_j^2], (N, C). So F_jk = mean_n E[e_j^2] x_k^2, and x_k = 1 for the bias.
    """
    torch.testing.assert_close(got["head.linear.weight"], error.T @ x.square() / len(x), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(got["head.linear.bias"], error.mean(dim=0), rtol=1e-12, atol=1e-15)


# --------------------------------------------------------------------------------------------------------------- Fisher


def test_the_exact_fisher_of_a_linear_softmax_net_is_p_times_one_minus_p_times_x_squared() -> None:
    """E_y[e_j^2] = p_j (1 - p_j)^2 + (1 - p_j) p_j^2 = p_j (1 - p_j): label j itself, or any other."""
    strategy, task, x, p = linear_ewc()
    agrees(strategy.fisher([task]), p * (1 - p), x)


def test_the_empirical_fisher_takes_the_true_label() -> None:
    strategy, task, x, p = linear_ewc(fisher="empirical")
    error = torch.nn.functional.one_hot(task.labels, 4) - p
    agrees(strategy.fisher([task]), error.square(), x)


def test_the_sampled_fisher_takes_one_label_from_the_nets_own_prediction() -> None:
    """The same with the labels that the strategy's own generator yields, after the order of the samples."""
    strategy, task, x, p = linear_ewc(fisher="sampled")
    twin = drawn(strategy)
    order = torch.randperm(len(x), generator=twin)
    labels = torch.multinomial(p[order], 1, generator=twin).flatten()
    agrees(strategy.fisher([task]), (torch.nn.functional.one_hot(labels, 4) - p[order]).square(), x[order])


def test_the_sampled_fisher_is_the_exact_one_in_expectation() -> None:
    """Over 4,000 copies of one image the mean of e_j^2 lies within 5 standard errors of p_j (1 - p_j).

    e_j^2 is (1 - p_j)^2 with probability p_j and p_j^2 otherwise: its variance is p_j (1 - p_j) (1 - 2 p_j)^2.
    """
    strategy, task, _, p = linear_ewc(n_samples=1, fisher="sampled")
    n, p = 4000, p[0]
    many = tensor_task(task.images.expand(n, 1, 1, 3), [0] * n)
    error = (p * (1 - p) * (1 - 2 * p).square() / n).sqrt()
    got = strategy.fisher([many])["head.linear.bias"]
    assert ((got - p * (1 - p)).abs() <= 5 * error + 1e-12).all()


def test_the_batched_fisher_squares_the_gradient_of_a_batchs_mean_loss() -> None:
    """d/dW_jk of a batch's mean loss is mean_n (p_j - [j = y]) x_k; its square is averaged over the batches."""
    strategy, task, x, p = linear_ewc(fisher="batched", fisher_batch_size=3)
    order = torch.randperm(len(x), generator=drawn(strategy))
    error = p - torch.nn.functional.one_hot(task.labels, 4)
    batches = [(error[rows].T @ x[rows] / len(rows)).square() for rows in torch.split(order, 3)]
    got = strategy.fisher([task])["head.linear.weight"]
    torch.testing.assert_close(got, torch.stack(batches).mean(dim=0), rtol=1e-12, atol=1e-15)


def test_the_predicted_label_is_the_most_likely_one() -> None:
    strategy, task, x, p = linear_ewc(fisher="predicted")
    error = torch.nn.functional.one_hot(p.argmax(dim=1), 4) - p
    agrees(strategy.fisher([task]), error.square(), x)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_as_many_samples_are_used_as_the_settings_ask_for(estimator: str) -> None:
    """The first 4 of the strategy's own permutation, also when they do not fill a chunk."""
    strategy, task, x, p = linear_ewc(fisher=estimator, fisher_samples=4)
    rows = torch.randperm(len(x), generator=drawn(strategy))[:4]
    error = p * (1 - p)
    if estimator == "empirical":
        error = (torch.nn.functional.one_hot(task.labels, 4) - p).square()
    agrees(strategy.fisher([task]), error[rows], x[rows])


@pytest.mark.parametrize("kind", sorted(TRUNKS))
def test_both_ways_to_squared_gradients_are_a_loop_of_backward_passes(kind: str) -> None:
    """For every net of the suite: conv layers, strides, normalisation, heads. The other task's head gets zeros."""
    net = headed(kind)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    labels, share = torch.tensor([[0, 1, 2], [2, 0, 1]]), torch.rand(2, 3, dtype=torch.float64)
    expected = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    for k in range(2):
        for n in range(3):
            net.zero_grad()
            torch.log_softmax(net(x[n : n + 1], 0), dim=1)[0, labels[k, n]].backward()  # type: ignore[no-untyped-call]
            for name, parameter in net.named_parameters():
                if parameter.grad is not None:
                    expected[name] += share[k, n] * parameter.grad.square()
    assert expected["head.heads.0.blocks.0.weight"].any()

    def log_likelihoods(logits: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, dim=1)
        return torch.stack([log_p[torch.arange(3), label] for label in labels])

    for way in (sample_gradients._of_layers, sample_gradients._of_any_net):
        got = way(net, 0, x, log_likelihoods, share, torch.square)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)
    got = sample_gradients.squared_gradients(net, 0, x, labels, share)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)


def test_a_fisher_agrees_with_finite_differences() -> None:
    """(log p(theta + h) - log p(theta - h)) / 2h, squared, for single weights of the first and last layer."""
    net = headed("mlp")
    x, h = torch.randn(1, 3, 16, 16, dtype=torch.float64), 1e-5
    got = sample_gradients.squared_gradients(net, 0, x, torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.float64))
    for name in ("trunk.layers.0.weight", "trunk.layers.1.bias", "head.heads.0.blocks.0.weight"):
        flat = net.get_parameter(name).data.view(-1)
        at = int(got[name].argmax())
        log_p = []
        for step in (h, -2 * h):
            flat[at] += step
            log_p.append(float(torch.log_softmax(net(x, 0).detach(), dim=1)[0, 1]))
        flat[at] += h
        assert float(got[name].view(-1)[at]) == pytest.approx(((log_p[0] - log_p[1]) / (2 * h)) ** 2, rel=1e-6)


# -------------------------------------------------------------------------------------------------------------- penalty


def penalised(mode: str, gamma: float = 1.0, n_tasks: int = 3) -> tuple[EWC, list[Tensor], list[Tensor]]:
    """Run `after_task` for tasks with given weights and Fisher diagonals; return the strategy and both, flat."""
    strategy, _, _, _ = linear_ewc(mode=mode, gamma=gamma)
    generator = torch.Generator().manual_seed(2)
    experience = made(synthetic(), "finetune")[1].benchmark.train_stream[0]
    anchors, importances = [], []
    for task in range(n_tasks):
        given = {}
        for name, parameter in strategy.model.named_parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            given[name] = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            given[name].view(-1)[0] = 0.0  # of no importance, ever
            given[name].view(-1)[1] = float(task == 1)  # of importance to one task only
        strategy.fisher = lambda tasks, given=given: given  # type: ignore[method-assign,misc]
        strategy.after_task(experience)
        anchors.append(weights(strategy))
        importances.append(torch.cat([value.flatten() for value in given.values()]))
        strategy.before_task(experience)
    for parameter in strategy.model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return strategy, anchors, importances


def gradient(strategy: EWC) -> Tensor:
    """Return what the strategy adds to a gradient, flat."""
    for parameter in strategy.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    strategy.after_backward()
    return torch.cat([parameter.grad.flatten() for parameter in strategy.model.parameters()])


def test_one_merged_quadratic_has_the_gradient_of_all_tasks_quadratics() -> None:
    """Of S = sum_k F_k around m = sum_k F_k theta_k / S: lam S (theta - m) = lam sum_k F_k (theta - theta_k)."""
    strategy, anchors, importances = penalised("separate")
    theta = weights(strategy)
    expected = sum(value * (theta - anchor) for value, anchor in zip(importances, anchors, strict=True))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(gradient(strategy), 3.0 * expected, rtol=1e-12, atol=1e-12)


def test_the_online_penalty_decays_the_old_fisher_and_moves_the_anchor() -> None:
    """After three tasks gamma F~ = gamma (gamma^2 F_1 + gamma F_2 + F_3) around the weights of the third."""
    strategy, anchors, (first, second, third) = penalised("online", gamma=0.5)
    expected = 3.0 * 0.5 * (0.25 * first + 0.5 * second + third) * (weights(strategy) - anchors[-1])
    torch.testing.assert_close(gradient(strategy), expected, rtol=1e-12, atol=1e-12)


def test_the_mean_penalty_weighs_every_task_alike_around_the_latest_weights() -> None:
    """Task 4 has lam (F_1 + F_2 + F_3) / 3 around the weights of the third: the mean of tasks, gamma has no part."""
    strategy, anchors, (first, second, third) = penalised("mean", gamma=0.5)
    strategy.tasks_seen = 3
    expected = 3.0 * (first + second + third) / 3 * (weights(strategy) - anchors[-1])
    torch.testing.assert_close(gradient(strategy), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", ["separate", "online", "mean"])
def test_what_is_added_to_the_gradient_is_the_penaltys_own(mode: str) -> None:
    """Autograd on (lam / 2) * sum of importance * (theta - anchor)^2."""
    strategy, _, _ = penalised(mode)
    parts = torch.autograd.grad(strategy.penalty(), list(strategy.model.parameters()))
    torch.testing.assert_close(gradient(strategy), torch.cat([part.flatten() for part in parts]))


def test_a_training_step_descends_loss_plus_penalty() -> None:
    """One step of plain SGD: theta - lr * d/dtheta (cross-entropy + penalty), from a penalty that is not zero."""
    strategy, stream = made(synthetic("domain", optimizer="sgd", lr=0.1), "ewc", lam=50.0)
    first, second = list(stream.benchmark.train_stream)[:2]
    strategy.train_task(first)
    strategy.begin_task(second)
    strategy.before_task(second)
    batch = next(iter(ResidentLoader([stream.train[1]], 16)))
    for parameter in strategy.model.parameters():
        parameter.data += 0.01
    loss = torch.nn.functional.cross_entropy(strategy.model(batch.x, batch.t), batch.y) + strategy.penalty()
    parts = torch.autograd.grad(loss, list(strategy.model.parameters()))
    expected = weights(strategy) - 0.1 * torch.cat([part.flatten() for part in parts])
    strategy.train_step(batch)
    torch.testing.assert_close(weights(strategy), expected, rtol=1e-5, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize("mode", ["separate", "online", "mean"])
def test_a_new_head_has_no_anchor_and_an_old_one_stays_where_it_is(mode: str) -> None:
    """Momentum and weight decay would move an old head if the penalty handed it a gradient of zeros."""
    task = synthetic(optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=0.1, reset_optimizer=False)
    strategy, stream = made(task, "ewc", mode=mode)
    experiences = list(stream.benchmark.train_stream)
    strategy.train_task(experiences[0])
    assert set(strategy.importance) == {name for name, _ in strategy.model.named_parameters()}
    old = strategy.model.head.heads["0"].blocks[0].weight.clone()
    strategy.begin_task(experiences[1])
    assert "head.heads.1.blocks.0.weight" not in strategy.importance
    strategy.train_task(experiences[1])
    assert torch.equal(strategy.model.head.heads["0"].blocks[0].weight, old)
    assert "head.heads.1.blocks.0.weight" in strategy.importance


def test_over_a_run_the_mean_is_the_sum_by_the_number_of_tasks() -> None:
    """On the third task lam = 8 with the mean is lam = 4 with the sum, from the same weights and Fishers."""
    found = []
    for mode, lam in (("online", 4.0), ("mean", 8.0)):
        strategy, stream = made(synthetic("domain", n_tasks=3), "ewc", lam=0.0, mode=mode, fisher="exact")
        first, second, third = list(stream.benchmark.train_stream)
        strategy.train_task(first)
        strategy.train_task(second)
        strategy.config = replace(strategy.config, lam=lam)
        strategy.train_task(third)
        found.append(weights(strategy))
    torch.testing.assert_close(*found)


def test_strength_and_estimator_change_the_weights() -> None:
    found = {}
    for lam, estimator in ((0.0, "exact"), (1.0, "exact"), (1000.0, "exact"), (1000.0, "batched")):
        strategy, stream = made(synthetic("domain", n_tasks=2), "ewc", lam=lam, fisher=estimator)
        strategy.train(list(stream.benchmark.train_stream))
        found[lam, estimator] = weights(strategy)
    pairs = [(a, b) for i, a in enumerate(found.values()) for b in list(found.values())[i + 1 :]]
    assert all(float((a - b).abs().max()) > 1e-4 for a, b in pairs)


def test_a_strong_anchor_keeps_the_first_task() -> None:
    """With the labels' meaning changing from task to task, finetuning forgets the first; a strong anchor does not."""
    kept = {}
    for lam in (0.0, 1e4):
        strategy, stream = made(synthetic("domain", n_tasks=4, lr=0.01), "ewc", lam=lam)
        strategy.train(list(stream.benchmark.train_stream))
        kept[lam] = strategy.accuracy(stream.benchmark.test_stream[0])
    assert kept[1e4] > kept[0.0]


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"lam": -1.0}, {"fisher": "exakt"}, {"mode": "both"}, {"gamma": 1.5}, {"fisher_samples": -1}):
        baseline = recipe("clbench.strategies.ewc:EWC", **{**SETTINGS, **wrong})
        with pytest.raises(UserError, match=next(iter(wrong))):
            made(synthetic(), baseline)
