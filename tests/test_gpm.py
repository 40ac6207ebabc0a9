"""GPM: bases by hand and by singular value decomposition, projected gradients, and answers that stay what they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.loading import ResidentLoader
from clbench.recipes import resolve
from clbench.seeds import derive
from clbench.specs import Scenario, TaskSpec
from clbench.strategies.build import check
from clbench.strategies.gpm import GPM, extended, inputs_of, joined
from strategy_factory import made, recipe, synthetic, weights

CLASS = "clbench.strategies.gpm:GPM"
NONE = torch.zeros(3, 0, dtype=torch.float64)


def gpm(
    scenario: Scenario = "task", n_tasks: int = 2, task: TaskSpec | None = None, **settings: Any
) -> tuple[GPM, Any]:
    """GPM under plain SGD."""
    spec = task or synthetic(scenario, n_tasks=n_tasks, optimizer="sgd", lr=0.1)
    strategy, stream = made(spec, recipe(CLASS, **{"threshold": 0.9, **settings}))
    return strategy, stream


def conv() -> TaskSpec:
    """The synthetic stream, a pixel larger on every side, for a small conv net."""
    task = synthetic("task", n_tasks=2, optimizer="sgd", lr=1.0, iterations=60)
    model = resolve(task, recipe(CLASS, threshold=0.9), {"model.kind": "zenke"}).model
    small = model.model_copy(update={"channels": (6, 6), "hidden": 16, "dropout": (0.0, 0.0)})
    return task.model_copy(update={"model": small, "stream": task.stream.model_copy(update={"pad": 1})})


# ---------------------------------------------------------------------------------------------------------------- bases


@pytest.mark.parametrize(("threshold", "k"), [(0.0, 0), (0.5, 1), (0.8, 1), (0.81, 2), (0.95, 2), (0.96, 3), (1.0, 3)])
def test_the_fewest_vectors_that_hold_the_threshold_are_kept(threshold: float, k: int) -> None:
    """R R^T = diag(1.5, 8, 0.5): of |R|^2 = 10 the axes hold 8, 9.5 and 10, the second first."""
    basis = extended(NONE, torch.diag(torch.tensor([1.5, 8.0, 0.5], dtype=torch.float64)), threshold)
    assert basis.shape == (3, k)
    expected = torch.eye(3, dtype=torch.float64)[:, [1, 0, 2][:k]]
    torch.testing.assert_close(basis.abs(), expected)


@pytest.mark.parametrize(("threshold", "k"), [(0.6, 0), (0.61, 1), (0.9, 1), (0.91, 2), (1.0, 2)])
def test_what_the_basis_holds_already_counts(threshold: float, k: int) -> None:
    """The first axis is in it, R R^T = diag(6, 1, 3): held are 6 of 10, with the third axis 9, then 10."""
    axis = torch.eye(3, dtype=torch.float64)[:, :1]
    basis = extended(axis, torch.diag(torch.tensor([6.0, 1.0, 3.0], dtype=torch.float64)), threshold)
    torch.testing.assert_close(basis.abs(), torch.eye(3, dtype=torch.float64)[:, [0, 2, 1][: 1 + k]])


@pytest.mark.parametrize("columns", [6, 40])
def test_the_new_vectors_are_left_singular_vectors_of_what_the_basis_leaves(columns: int) -> None:
    """Equations 8 and 9 in NumPy, on R itself; the same subspace, orthonormal."""
    rng = np.random.default_rng(0)
    old = np.linalg.qr(rng.normal(size=(12, 3)))[0]
    r = rng.normal(size=(12, columns)) * np.linspace(3, 0.1, 12)[:, None]
    left = r - old @ old.T @ r
    u, s, _ = np.linalg.svd(left, full_matrices=False)
    total, held, k = (r**2).sum(), (r**2).sum() - (left**2).sum(), 0
    while held < 0.9 * total:
        held += s[k] ** 2
        k += 1
    got = extended(torch.from_numpy(old), torch.from_numpy(r @ r.T), 0.9).numpy()
    assert got.shape == (12, 3 + k)
    assert 0 < k < 9
    np.testing.assert_allclose(got.T @ got, np.eye(3 + k), atol=1e-12)
    np.testing.assert_allclose(got[:, :3], old)
    np.testing.assert_allclose(got[:, 3:] @ got[:, 3:].T, u[:, :k] @ u[:, :k].T, atol=1e-10)


def test_a_basis_never_outgrows_its_space() -> None:
    gram = torch.diag(torch.tensor([6.0, 1.0, 3.0], dtype=torch.float64))
    assert extended(torch.eye(3, dtype=torch.float64), gram, 1.0).shape == (3, 3)


def test_bases_stay_orthonormal_over_tasks_and_grow() -> None:
    strategy, stream = gpm("domain", 4, threshold=0.8, rise=0.05)
    before = 0
    for experience in stream.benchmark.train_stream:
        strategy.train_task(experience)
        for basis in strategy.bases.values():
            torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5, rtol=0.0)
        assert sum(basis.shape[1] for basis in strategy.bases.values()) > before
        before = sum(basis.shape[1] for basis in strategy.bases.values())


# --------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
def test_a_convolutions_answers_are_its_weights_times_its_inputs(bias: bool, stride: int, padding: int) -> None:
    """As one matrix (outputs, C * 3 * 3) times a patch a column, a bias as the column of ones."""
    layer = nn.Conv2d(2, 5, 3, stride=stride, padding=padding, bias=bias)
    x = torch.randn(4, 2, 7, 7)
    matrix = layer.weight.flatten(1)
    if layer.bias is not None:
        matrix = torch.cat([matrix, layer.bias[:, None]], dim=1)
    answers = layer(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(matrix @ inputs_of(layer, x), answers)


def test_every_layer_is_asked_for_what_it_is_given() -> None:
    """R R^T of 20 samples of the strategy's own choice, against a hook on the layer."""
    strategy, stream = gpm("domain", samples=20)
    seen: dict[str, Tensor] = {}
    for name in ("trunk.layers.0", "head.linear"):
        strategy.model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.__setitem__(name, inputs[0])
        )
    rows = torch.randperm(len(stream.train[0]), generator=torch.Generator().manual_seed(derive(0, "strategy")))[:20]
    got = strategy.second_moments([stream.train[0]])
    strategy.model(stream.train[0].inputs(rows), 0)
    assert list(got) == ["trunk.layers.0", "head.linear"]
    for name, inputs in seen.items():
        with_bias = torch.cat([inputs, torch.ones(20, 1)], dim=1).double()
        torch.testing.assert_close(got[name], with_bias.T @ with_bias, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("threshold", [0.5, 0.999])
def test_the_projected_gradient_is_orthogonal_to_the_basis(threshold: float) -> None:
    """G - G M M^T for every shared layer, with bases below and above half of the space; a task's own head keeps all."""
    strategy, stream = gpm(threshold=threshold)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    strategy.begin_task(second)
    strategy.before_task(second)
    basis = strategy.bases["trunk.layers.0"]
    assert (2 * basis.shape[1] > len(basis)) is (threshold > 0.9)
    batch = next(iter(ResidentLoader([stream.train[1]], 16)))
    torch.autograd.backward(strategy.loss_of(batch))
    layer = strategy.trunk.layer(0)
    whole, head = joined(layer), strategy.model.get_parameter("head.heads.1.blocks.0.weight").grad
    assert whole is not None
    assert head is not None
    whole, head = whole.clone(), head.clone()
    strategy.after_backward()
    got = joined(layer)
    assert got is not None
    torch.testing.assert_close(got, whole - whole @ basis @ basis.T, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got @ basis, torch.zeros(len(got), basis.shape[1]), rtol=0.0, atol=1e-6)
    assert float(got.abs().max()) > 1e-6
    assert torch.equal(strategy.model.get_parameter("head.heads.1.blocks.0.weight").grad, head)


@pytest.mark.parametrize(("kind", "held"), [("mlp", 5), ("conv", 1)])
def test_the_samples_whose_inputs_are_held_in_full_are_answered_as_before(kind: str, held: int) -> None:
    """Threshold 1, of few samples: whatever a later task learns, the old head says the same of those, not of others."""
    strategy, stream = gpm(task=conv() if kind == "conv" else None, threshold=1.0, samples=held)
    first, second = stream.benchmark.train_stream
    order = torch.randperm(len(stream.train[0]), generator=torch.Generator().manual_seed(derive(0, "strategy")))
    strategy.train_task(first)
    x = stream.train[0].inputs(order)
    before = strategy.model.eval()(x, 0).detach()
    strategy.train_task(second)
    moved = (strategy.model.eval()(x, 0).detach() - before).abs().amax(dim=1)
    assert float(moved[:held].max()) < 1e-5
    assert float(moved[held:].max()) > 1e-3


def test_thresholds_change_the_weights_and_zero_holds_nothing() -> None:
    found = []
    for threshold in (0.0, 0.5, 0.9, 1.0):
        strategy, stream = gpm("domain", threshold=threshold)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
        assert (sum(basis.numel() for basis in strategy.bases.values()) == 0) is (threshold == 0)
    pairs = [(a, b) for i, a in enumerate(found) for b in found[i + 1 :]]
    assert all(float((a - b).abs().max()) > 1e-4 for a, b in pairs)


def test_thresholds_rise_with_the_tasks_and_end_at_one() -> None:
    strategy, _ = gpm("domain", threshold=[0.9, 0.99], rise=0.02)
    assert strategy.thresholds() == [0.9, 0.99]
    strategy.tasks_seen = 2
    assert strategy.thresholds() == pytest.approx([0.94, 1.0])


def test_high_thresholds_keep_the_first_task() -> None:
    """With the labels' meaning changing from task to task, finetuning forgets the first."""
    kept = {}
    for threshold in (0.0, 0.99):
        strategy, stream = gpm("domain", 4, threshold=threshold)
        strategy.train(list(stream.benchmark.train_stream))
        kept[threshold] = strategy.accuracy(stream.benchmark.test_stream[0])
    assert kept[0.99] > kept[0.0]


# ------------------------------------------------------------------------------------------------------------- settings


def test_as_many_thresholds_as_shared_layers_are_asked_for() -> None:
    with pytest.raises(UserError, match=r"threshold has 3 numbers, but tasks share 1 layers: trunk\.layers\.0"):
        gpm("task", threshold=[0.9, 0.9, 0.9])
    gpm("domain", threshold=[0.9, 0.9])


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"threshold": 1.5}, {"threshold": [0.9, -1.0]}, {"rise": -0.1}, {"samples": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            gpm(**wrong)
    with pytest.raises(UserError, match="not defined in the class-incremental"):
        check(resolve(synthetic("class"), recipe(CLASS, threshold=0.9)))
