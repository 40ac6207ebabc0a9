"""Progressive networks: the paper's equations by hand, what is frozen, what a column costs, a task seen again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.nets import ABSENT_LOGIT, MLP, ChainTrunk, HeadedNet, LeNet, MultiHead, ResNet18, ZenkeNet
from clbench.nets.progressive import Adapter, Column, Lateral, ProgressiveNet
from clbench.runner import run
from clbench.specs import TaskSpec
from strategy_factory import made, synthetic, weights

CHAINS: dict[str, Callable[[], ChainTrunk]] = {
    "mlp": lambda: MLP((1, 3, 3), [6, 4, 5]),
    "zenke": lambda: ZenkeNet((2, 12, 10), (4, 6), 5, dropout=(0.0, 0.0)),
    "lenet": lambda: LeNet((1, 7, 6), (4, 3), (6, 4)),
}
LATERALS: tuple[Lateral, ...] = ("adapter", "linear", "none")


def maker(trunk: Callable[[], ChainTrunk], tasks: int = 4, outputs: int = 3) -> Callable[[], HeadedNet]:
    """Return a maker of always the same float64 net."""

    def new_net() -> HeadedNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            made_trunk = trunk()
        head = MultiHead(made_trunk.out_features, 11, expected=dict.fromkeys(range(tasks), outputs))
        return HeadedNet(made_trunk, head).double()

    return new_net


def net_of(kind: str, lateral: Lateral = "adapter", tasks: Sequence[int] = (0, 1, 2), **changes: Any) -> ProgressiveNet:
    """Return a net with a column for each of `tasks`, in evaluation mode."""
    net = ProgressiveNet(maker(CHAINS[kind]), 3, lateral, **changes).eval()
    for task in tasks:
        net.observe(task, range(3))
    return net


def images(net: ProgressiveNet, count: int = 4) -> Tensor:
    shape = net_columns(net)[0].trunk.input_shape
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def net_columns(net: ProgressiveNet) -> list[Column]:
    return list(net)


def stream(**changes: Any) -> TaskSpec:
    """Three tasks of two classes, 25 steps each, a net of two hidden layers."""
    task = synthetic("task", **{"n_tasks": 3, "iterations": 25, "lr": 0.01, **changes})
    return task.model_copy(update={"model": task.model.model_copy(update={"hidden": [16, 12]})})


# ------------------------------------------------------------------------------------------------------- the equations


def by_hand(net: ProgressiveNet, x: Tensor, k: int, task: int) -> Tensor:
    """Return column k's logits, one sum over earlier columns at a time, each with its own U, V and alpha."""
    columns = net_columns(net)
    depth = len(columns[0].units)
    seen: list[list[Tensor]] = []  # seen[j][i]: what layer i of column j gets, and at last the output layer
    for j, column in enumerate(columns[: k + 1]):
        h = column.trunk.prepare(x)
        inputs = [h]
        for i in range(depth):
            y = column.trunk.layer(i)(h)
            if i > 0 and j > 0 and net.lateral != "none":
                y = y + lateral_term(column, column.laterals[i - 1], i, [seen[m][i] for m in range(j)])
            h = column.trunk.between(i, y)
            inputs.append(h)
        seen.append(inputs)
    own = columns[k]
    logits = own.head(seen[k][depth], task)
    if k > 0 and net.lateral != "none":
        assert own.head_lateral is not None
        block = own.head_lateral.get_submodule(f"heads.{task}.blocks.0")
        logits = logits + lateral_term(own, block, depth, [seen[m][depth] for m in range(k)])
    assert isinstance(logits, Tensor)
    return logits


def lateral_term(column: Column, u: nn.Module, i: int, earlier: Sequence[Tensor]) -> Tensor:
    """Return U relu(sum_j alpha_j V_j h_j + c), or sum_j U_j h_j, by slices of the matrices."""
    assert isinstance(u, nn.Linear | nn.Conv2d)
    if len(column.adapters):
        adapter = column.adapters[i - 1]
        assert isinstance(adapter, Adapter)
        first, hidden = 0, torch.zeros((), dtype=torch.float64)
        for alpha, units, h in zip(adapter.alpha, adapter.earlier, earlier, strict=True):
            v = adapter.projection.weight[:, first : first + units]
            maps = (alpha * h).reshape(len(h), units, -1)  # a unit's values stand together, as Flatten leaves them
            hidden = hidden + torch.einsum("nu,bup->bnp", v, maps)
            first += units
        hidden = F.relu(hidden + adapter.projection.bias[:, None])
        return apply(u, hidden.reshape(len(hidden), -1, *earlier[0].shape[2:]), u.weight)
    ends = [0, *accumulate(h.shape[1] for h in earlier)]
    terms = [apply(u, h, u.weight[:, a:b]) for h, (a, b) in zip(earlier, pairwise(ends), strict=True)]
    return torch.stack(terms).sum(0)


def apply(layer: nn.Linear | nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    assert layer.bias is None
    if isinstance(layer, nn.Linear):
        return x @ weight.T
    return F.conv2d(x, weight, stride=layer.stride, padding=layer.padding)


@pytest.mark.parametrize("width", [1.0, 0.5])
@pytest.mark.parametrize("lateral", LATERALS)
@pytest.mark.parametrize("kind", CHAINS)
def test_three_columns_are_the_papers_equations(kind: str, lateral: Lateral, width: float) -> None:
    """Every column's logits in float64, dense layers, convolutions, and maps that enter a hidden layer."""
    net = net_of(kind, lateral, width=width, scale=2.0)
    x = images(net)
    for k in range(3):
        torch.testing.assert_close(net(x, k), by_hand(net, x, k, k), rtol=0, atol=1e-12)
    if lateral != "none":
        changed = copy.deepcopy(net)
        with torch.no_grad():
            for parameter in net_columns(changed)[0].parameters():
                parameter.add_(0.5)
        assert not torch.allclose(changed(x, 2), net(x, 2))


def test_lateral_parameters_of_a_net_of_two_two_and_two_units_counted_by_hand() -> None:
    """2 inputs, 2 hidden units, 2 outputs; a column alone has 2 * 2 + 2 in each of two layers, 12.

    adapter: the output layer of column k has k - 1 scalars, V of 2 x 2(k - 1) with 2 biases, U of 2 x 2:
    1 + 6 + 4 = 11 for column 2, 2 + 10 + 4 = 16 for column 3. linear: U of 2 x 2(k - 1), 4 and 8.
    """
    counts: dict[Lateral, list[int]] = {"none": [12, 12, 12], "linear": [12, 16, 20], "adapter": [12, 23, 28]}
    for lateral, expected in counts.items():
        net = ProgressiveNet(maker(lambda: MLP((1, 1, 2), [2]), outputs=2), 0, lateral)
        for task in range(3):
            net.observe(task, range(2))
        assert [sum(p.numel() for p in column.parameters()) for column in net] == expected


def test_adapters_project_maps_by_their_channels() -> None:
    """Zenke 4-4-6-6-5 on 12 x 10 pixels: 6 maps of 1 x 1 reach the hidden layer ((12-2)/2-2)/2 = 1, ((10-2)/2-2)/2 = 1.

    Column 3 sees 2 columns: V of layers 2 to 5 and of the output are 4 x 8, 4 x 8, 6 x 12, 6 x 12, 5 x 10.
    """
    net = net_of("zenke")
    shapes = [tuple(adapter.projection.weight.shape) for adapter in adapters_of(net, 2)]
    assert shapes == [(4, 8), (4, 8), (6, 12), (6, 12), (5, 10)]
    lenet = net_of("lenet")  # maps of ceil(7 / 4) x ceil(6 / 4) = 2 x 2 pixels
    assert [adapter.positions for adapter in adapters_of(lenet, 2)] == [1, 4, 1, 1]


def adapters_of(net: ProgressiveNet, k: int) -> list[Adapter]:
    return [adapter for adapter in net_columns(net)[k].adapters if isinstance(adapter, Adapter)]


def test_narrow_columns_have_their_share_of_units() -> None:
    """Half of 6, 4, 5: 3, 2, and 2 for 2.5 (Python rounds to even); the first column is the net's own."""
    net = net_of("mlp", width=0.5)
    assert [column.units for column in net] == [(6, 4, 5), (3, 2, 2), (3, 2, 2)]
    assert net_of("mlp", width=0.01).columns[1].units == (1, 1, 1)


def test_scalars_start_small_and_positive() -> None:
    net = net_of("mlp", scale=0.01)
    scalars = torch.cat([adapter.alpha.detach() for k in (1, 2) for adapter in adapters_of(net, k)])
    assert 0 < float(scalars.min()) < float(scalars.max()) < 0.01


# -------------------------------------------------------------------------------------------------------------- births


def test_columns_are_drawn_from_the_seed_and_their_number_alone() -> None:
    before = torch.get_rng_state()
    one, other = net_of("mlp", tasks=(0, 1)), net_of("mlp", tasks=(2, 0))
    assert torch.equal(before, torch.get_rng_state())
    trunks = [[column.trunk.layer(0).weight for column in net] for net in (one, other)]
    assert all(map(torch.equal, trunks[0], trunks[1]))
    assert not torch.equal(*trunks[0])
    assert torch.equal(trunks[0][0], maker(CHAINS["mlp"])().trunk.get_parameter("layers.0.weight"))


def test_an_unseen_task_is_answered_by_the_column_it_would_get() -> None:
    net = net_of("mlp", tasks=())
    x = images(net)
    for task in range(3):
        size = footprint_elements(net)
        expected = net(x, task)
        net.forget_newborn()
        assert footprint_elements(net) == size
        net.observe(task, range(3))
        assert torch.equal(net(x, task), expected)


def footprint_elements(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def test_refused_classes_leave_the_net_as_it_was() -> None:
    net = net_of("mlp", tasks=(0,))
    with pytest.raises(ValueError, match="class -1"):
        net.observe(1, [-1, 0])
    assert len(net.columns) == 1
    assert net.column_of(1) is None


def test_tasks_mixed_in_a_batch_are_answered_one_by_one() -> None:
    net = ProgressiveNet(maker(CHAINS["mlp"]), 0)
    for task, outputs in ((0, 2), (1, 3)):
        net.observe(task, range(outputs))
    x = images(net)
    mixed = net(x, torch.tensor([1, 0, 0, 1]))
    torch.testing.assert_close(mixed[[0, 3]], net(x, 1)[[0, 3]])
    torch.testing.assert_close(mixed[1:3, :2], net(x, 0)[1:3])
    assert (mixed[1:3, 2] == ABSENT_LOGIT).all()


@pytest.mark.parametrize("lateral", LATERALS)
def test_a_state_dict_restores_into_a_fresh_net(lateral: Lateral) -> None:
    net = net_of("lenet", lateral, (2, 0, 1), width=0.5)
    fresh = ProgressiveNet(maker(CHAINS["lenet"]), 99, lateral, 0.5).eval()
    fresh.load_state_dict(net.state_dict())
    assert [name for name, _ in fresh.named_parameters()] == [name for name, _ in net.named_parameters()]
    for task in range(3):
        assert torch.equal(fresh(images(net), task), net(images(net), task))


# ------------------------------------------------------------------------------------------------------ what is frozen


@pytest.mark.parametrize("lateral", LATERALS)
def test_the_newest_column_and_its_laterals_learn_and_nothing_else(lateral: Lateral) -> None:
    net = net_of("lenet", lateral).train()
    net(images(net), 2).square().sum().backward()
    *frozen, newest = net
    for column in frozen:
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in column.parameters())
    for name, parameter in newest.named_parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.any()), name


def test_a_frozen_column_drops_nothing_out() -> None:
    """With dropout, the learning column's output changes from pass to pass; what the frozen one passes on does not."""
    net = ProgressiveNet(maker(lambda: MLP((1, 3, 3), [6, 4], dropout=0.5)), 0)
    for task in range(2):
        net.observe(task, range(3))
    net.train()
    x = images(net)
    first, second = net_columns(net)
    assert (first.trunk.training, second.trunk.training) == (False, True)
    assert not torch.equal(net(x, 1), net(x, 1))
    assert torch.equal(net(x, 0), net(x, 0))


@pytest.mark.parametrize("lateral", LATERALS)
def test_training_later_columns_leaves_the_function_of_the_first_bit_identical(lateral: Lateral) -> None:
    strategy, tasks = made(stream(), "progressive", lateral=lateral)
    train = list(tasks.benchmark.train_stream)
    x = torch.rand(9, *net_columns(strategy.model)[0].trunk.input_shape)
    answers: list[Tensor] = []
    for task, experience in enumerate(train):
        strategy.train_task(experience)
        strategy.model.eval()
        answers.append(strategy.model(x, task))
        assert all(torch.equal(strategy.model(x, t), answer) for t, answer in enumerate(answers))


@pytest.mark.parametrize("lateral", LATERALS)
def test_nothing_is_forgotten_and_every_task_is_learned(lateral: Lateral) -> None:
    found = run(stream(), "progressive", 0, overrides={"lateral": lateral})
    assert found.status == "done", found.traceback
    for i in range(3):
        assert [row[i] for row in found.acc[i:]] == [found.acc[i][i]] * (3 - i)
        assert found.acc[i][i] > 0.9


def test_the_first_column_is_finetuning_to_the_bit() -> None:
    found = []
    for baseline in ("finetune", "progressive"):
        strategy, tasks = made(stream(n_tasks=1), baseline)
        strategy.train(list(tasks.benchmark.train_stream))
        found.append(weights(strategy))
    assert torch.equal(*found)


@pytest.mark.parametrize("changes", [{}, {"reset_optimizer": False}, {"optimizer": "sgd", "momentum": 0.9}])
def test_without_laterals_columns_are_independent_nets_to_the_bit(changes: dict[str, Any]) -> None:
    """Independent nets that start as the columns do; the first task comes back at the end."""
    untrained, tasks = made(stream(**changes), "progressive", lateral="none")
    train = list(tasks.benchmark.train_stream)
    for task, experience in enumerate(train):
        untrained.model.observe(task, experience.classes_in_this_experience)
    births = iter([HeadedNet(column.trunk, column.head).requires_grad_(True) for column in untrained.model])
    order = [*train, train[0]]
    independent, _ = made(stream(**changes), "independent")
    independent.setup = dataclasses.replace(independent.setup, new_net=lambda: next(births))
    progressive, _ = made(stream(**changes), "progressive", lateral="none")
    for strategy in (independent, progressive):
        strategy.train(order)
    for task, column in enumerate(progressive.model):
        pairs = zip(column.parameters(), independent.nets[task].parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


# ------------------------------------------------------------------------------------------------------- a task twice


def test_a_task_seen_again_goes_on_in_its_column_while_it_is_the_newest() -> None:
    strategy, tasks = made(stream(), "progressive")
    first = tasks.benchmark.train_stream[0]
    strategy.train_task(first)
    once = weights(strategy)
    strategy.train_task(first)
    assert len(strategy.model.columns) == 1
    assert bool((weights(strategy) != once).any())


@pytest.mark.parametrize("reset", [True, False])
def test_a_task_seen_again_under_later_columns_changes_its_output_layer_alone(reset: bool) -> None:
    strategy, tasks = made(stream(reset_optimizer=reset), "progressive")
    train = list(tasks.benchmark.train_stream)
    for experience in train:
        strategy.train_task(experience)
    before = copy.deepcopy(strategy.model)
    strategy.train_task(train[1])
    for k, (now, then) in enumerate(zip(strategy.model, before, strict=True)):
        assert all(torch.equal(*pair) for pair in zip(now.body(), then.body(), strict=True))
        moved = [not torch.equal(*pair) for pair in zip(now.output(), then.output(), strict=True)]
        assert all(moved) if k == 1 else not any(moved)
    trained = {id(parameter) for parameter in strategy.optimizer.state}
    assert trained == (set() if reset else {id(parameter) for parameter in net_columns(strategy.model)[1].output()})
    x = torch.rand(9, *net_columns(before)[0].trunk.input_shape)
    assert torch.equal(strategy.model.eval()(x, 2), before.eval()(x, 2))


# ----------------------------------------------------------------------------------------------------- costs and logs


def test_what_serves_one_task_alone_is_its_output_layer_and_the_newest_column() -> None:
    """With three columns, all of the third, and the outputs of the first two; with no laterals, everything."""
    strategy, tasks = made(stream(), "progressive")
    strategy.train(list(tasks.benchmark.train_stream))
    columns = net_columns(strategy.model)
    sizes = [sum(p.numel() for p in column.parameters()) for column in columns]
    outputs = [sum(p.numel() for p in column.output()) for column in columns]
    found = footprint(strategy.holdings())
    assert found.parameters == sum(sizes)
    assert found.parameters_per_task == outputs[0] + outputs[1] + sizes[2]
    assert found.parameters_trainable == sizes[2]
    assert found.answer_bytes == 4 * sum(sizes)
    alone, _ = made(stream(), "progressive", lateral="none")
    alone.train(list(tasks.benchmark.train_stream))
    assert footprint(alone.holdings()).parameters_shared == 0


def test_an_optimiser_that_lives_on_keeps_no_state_for_what_is_frozen() -> None:
    strategy, tasks = made(stream(reset_optimizer=False), "progressive")
    strategy.train(list(tasks.benchmark.train_stream))
    newest = {id(parameter) for parameter in net_columns(strategy.model)[-1].parameters()}
    assert {id(parameter) for parameter in strategy.optimizer.state} == newest


def test_the_growth_log_tells_what_was_added_and_what_used_again() -> None:
    """Columns of 16 and 12 units: task 1 adds one and sees the first, task 2 adds one and sees two."""
    found = run(stream(), "progressive", 0)
    events = [(event.after_task, event.layer, event.kind, event.units, event.born) for event in found.growth]
    layers = (("layers.0", 16), ("layers.1", 12))
    expected: list[tuple[int, str, str, int, int | None]] = []
    for task in (1, 2):
        expected += [(task, layer, "added", units, None) for layer, units in layers]
        expected += [(task, layer, "reused", units, born) for born in range(task) for layer, units in layers]
    assert events == expected
    assert found.widths == [{"layers.0": 16 * n, "layers.1": 12 * n} for n in (1, 2, 3)]
    assert found.units == [{"layers.0": [(0, 16 * n)], "layers.1": [(0, 12 * n)]} for n in (1, 2, 3)]
    apart = run(stream(), "progressive", 0, overrides={"lateral": "none"})
    assert {event.kind for event in apart.growth} == {"added"}
    assert [units["layers.0"] for units in apart.units] == [[(0, 16)], [(16, 32)], [(32, 48)]]


# ----------------------------------------------------------------------------------------------------------- bad input


def test_a_net_that_is_no_chain_is_refused_in_one_line() -> None:
    resnet: dict[str, Any] = {"model.kind": "resnet18", "model.width": 4}
    with pytest.raises(UserError) as caught:
        made(synthetic("task"), "progressive", **resnet)
    assert len(caught.value.lines) == 1
    assert "resnet18" in caught.value.lines[0]
    assert "lenet, mlp, zenke" in caught.value.lines[0]


def test_a_chain_with_more_than_layers_keeps_its_width() -> None:
    class Normed(MLP):
        def __init__(self) -> None:
            super().__init__((1, 3, 3), [4])
            self.norm = nn.LayerNorm(4)

    with pytest.raises(ValueError, match=r"another width, because of norm\.weight, norm\.bias"):
        ProgressiveNet(maker(Normed), 0, width=0.5)
    ProgressiveNet(maker(Normed), 0).observe(0, range(2))


def test_layers_that_do_not_follow_each_other_are_refused() -> None:
    class Summed(MLP):
        def __init__(self) -> None:
            super().__init__((1, 3, 3), [4, 4])
            self.layers[1] = nn.Linear(6, 4)

    with pytest.raises(ValueError, match=r"layers\.0 has 4 units, what follows it takes 6 inputs"):
        ProgressiveNet(maker(Summed), 0)
    with pytest.raises(TypeError, match="ResNet18 is none"):
        ProgressiveNet(lambda: HeadedNet(trunk := ResNet18((1, 8, 8), 2), MultiHead(trunk.out_features, 0)), 0)


def test_no_task_or_tasks_of_another_length_are_refused() -> None:
    net = net_of("mlp")
    with pytest.raises(ValueError, match="answers for a task"):
        net(images(net))
    with pytest.raises(ValueError, match=r"one per sample, shape \(4,\)"):
        net(images(net), torch.tensor([0, 1]))
