"""The heads: births that depend on nothing else, growth that keeps what was there, answers for unseen tasks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets import ABSENT_LOGIT, MLP, GrowingHead, GrowingLinear, Head, HeadedNet, MultiHead, SingleHead

DIGITS = (1, 8, 8)
F_ = 6
"""Features of the nets in this file."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def net_with(head: Head) -> HeadedNet:
    """Return a net whose trunk is the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return HeadedNet(MLP(DIGITS, [F_]), head)


def images(n: int = 5) -> Tensor:
    return torch.rand(n, *DIGITS, generator=torch.Generator().manual_seed(1))


def head_state(net: HeadedNet, task: int) -> dict[str, Tensor]:
    return {name: value for name, value in net.state_dict().items() if f"heads.{task}." in name}


def trained(net: HeadedNet, task: int, classes: range) -> HeadedNet:
    net.observe(task, classes)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(images(), task), torch.tensor([0, 1, 0, 1, 1])))
        optimizer.step()
    return net


# -------------------------------------------------------------------------------------------------------------- births


def test_births_do_not_touch_the_global_generator() -> None:
    before = torch.get_rng_state()
    net = net_with(MultiHead(F_, init_seed=0, expected={1: 2}))
    net.observe(0, range(10))
    net(images(), 1)
    growing = GrowingHead(F_, init_seed=0)
    growing.observe(0, range(10))
    assert torch.equal(torch.get_rng_state(), before)


def test_births_do_not_depend_on_the_global_generator_nor_on_the_order_of_tasks() -> None:
    torch.manual_seed(0)
    forward = net_with(MultiHead(F_, init_seed=7))
    for task in (0, 1, 2):
        forward.observe(task, range(4))
    torch.manual_seed(99)
    backward = net_with(MultiHead(F_, init_seed=7))
    for task in (2, 0, 1):
        trained(backward, task, range(4))  # births after training are still births
        fresh = net_with(MultiHead(F_, init_seed=7))
        fresh.observe(task, range(4))
        for name, value in head_state(fresh, task).items():
            assert torch.equal(value, forward.state_dict()[name])
    late = net_with(MultiHead(F_, init_seed=7))
    trained(late, 0, range(4)).observe(2, range(4))
    for name, value in head_state(late, 2).items():
        assert torch.equal(value, forward.state_dict()[name])


def test_births_differ_between_tasks_and_between_seeds() -> None:
    a, b = MultiHead(F_, init_seed=0), MultiHead(F_, init_seed=1)
    for head in (a, b):
        head.observe(0, range(3))
        head.observe(1, range(3))
    weights = [head.get_parameter(f"heads.{task}.blocks.0.weight") for head in (a, b) for task in (0, 1)]
    assert all(not torch.equal(v, w) for i, v in enumerate(weights) for w in weights[:i])


@pytest.mark.parametrize("bias", [True, False])
def test_an_output_is_born_the_same_in_whatever_block(bias: bool) -> None:
    """Growth 2 + 3 + 1 and growth by 6 at once give the same six outputs, and as_born gives them without growing."""
    stepwise, at_once = GrowingLinear(F_, 5, bias), GrowingLinear(F_, 5, bias)
    for width in (2, 5, 6):
        stepwise.grow(width)
    at_once.grow(6)
    assert [len(p) for p in stepwise.parameters()][:: 1 + bias] == [2, 3, 1]
    stacked = torch.cat([p for name, p in stepwise.named_parameters() if "weight" in name])
    assert torch.equal(stacked, at_once.get_parameter("blocks.0.weight"))
    if bias:
        stacked = torch.cat([p for name, p in stepwise.named_parameters() if "bias" in name])
        assert torch.equal(stacked, at_once.get_parameter("blocks.0.bias"))
    x = torch.rand(4, F_)
    assert torch.equal(GrowingLinear(F_, 5, bias).as_born(x, 6), at_once(x))
    torch.testing.assert_close(stepwise(x), at_once(x))


def test_births_have_the_distribution_of_a_linear_layer() -> None:
    """U(-1/sqrt(F), 1/sqrt(F)): with F = 100 within 0.1, standard deviation 0.1 / sqrt(3) = 0.0577, for bias too."""
    layer = GrowingLinear(100, 0)
    layer.grow(1000)
    reference = nn.Linear(100, 1000)
    for name in ("weight", "bias"):
        birth, usual = layer.get_parameter(f"blocks.0.{name}"), reference.get_parameter(name)
        assert birth.abs().max() <= 0.1
        assert birth.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.05)
        assert usual.std().item() == pytest.approx(birth.std().item(), rel=0.1)
        assert usual.shape == birth.shape
        assert usual.dtype == birth.dtype


# -------------------------------------------------------------------------------------------------------------- growth


def test_growth_keeps_parameters_and_their_optimiser_state() -> None:
    """An Adam moment is keyed by the parameter object: same object, same moment; the old logits do not move."""
    net = net_with(GrowingHead(F_, init_seed=0))
    net.observe(0, [0, 1])
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    torch.autograd.backward(F.cross_entropy(net(images()), torch.tensor([0, 1, 0, 1, 1])))
    optimizer.step()
    old = dict(net.named_parameters())
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in old.items()}
    logits = net(images())

    net.observe(1, [2, 3])
    new = dict(net.named_parameters())
    optimizer.add_param_group({"params": [p for name, p in new.items() if name not in old]})
    assert all(new[name] is p for name, p in old.items())
    assert all(torch.equal(optimizer.state[new[name]]["exp_avg"], moments[name]) for name in old)
    assert set(new) - set(old) == {"head.linear.blocks.1.weight", "head.linear.blocks.1.bias"}
    assert torch.equal(net(images())[:, :2], logits)
    torch.autograd.backward(F.cross_entropy(net(images()), torch.tensor([2, 3, 0, 1, 1])))
    optimizer.step()
    assert optimizer.state[new["head.linear.blocks.1.weight"]]["step"] == 1


@pytest.mark.parametrize("make", [lambda: MultiHead(F_, 0), lambda: GrowingHead(F_, 0), lambda: SingleHead(F_, 9)])
def test_a_task_seen_again_changes_nothing(make: Callable[[], Head]) -> None:
    net = net_with(make())
    net.observe(0, [0, 1, 2])
    before = list(net.parameters())
    net.observe(0, [0, 1, 2])
    net.observe(0, [1])
    after = list(net.parameters())
    assert len(before) == len(after)
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_a_task_seen_again_with_more_classes_widens_its_head_alone() -> None:
    net = net_with(MultiHead(F_, init_seed=0))
    net.observe(0, [0, 1])
    net.observe(1, [0, 1])
    old, other = net(images(), 0), net(images(), 1)
    kept = net.task_parameters()[0]
    net.observe(0, [0, 1, 2])
    assert torch.equal(net(images(), 0)[:, :2], old)
    assert net(images(), 0).shape == (5, 3)
    assert torch.equal(net(images(), 1), other)
    assert all(a is b for a, b in zip(net.task_parameters()[0][:2], kept, strict=True))


def test_a_growing_head_answers_for_the_classes_seen_so_far() -> None:
    net = net_with(GrowingHead(F_, init_seed=0, expected_classes=10))
    for task, seen in enumerate((2, 4, 7)):
        net.observe(task, range(seen))
        assert net(images(), task).shape == net(images()).shape == (5, seen)


def test_wrong_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="task 3 has class 10, the head has 10 outputs"):
        SingleHead(F_, 10).observe(3, [0, 10])
    for head in (SingleHead(F_, 10), GrowingHead(F_, 0), MultiHead(F_, 0)):
        with pytest.raises(ValueError, match="task 2 has no classes"):
            head.observe(2, [])
        with pytest.raises(ValueError, match=r"task 2 has class -1: labels count from 0"):
            head.observe(2, [-1, 3])
        assert not head.task_parameters()


def test_a_head_that_does_not_fit_the_trunk_is_refused() -> None:
    with pytest.raises(ValueError, match="the trunk yields 6 features, the head takes 7"):
        HeadedNet(MLP(DIGITS, [6]), SingleHead(7, 2))
    with pytest.raises(ValueError, match=r"the trunk \(\w+\) has no out_features"):
        HeadedNet(nn.Flatten(), SingleHead(64, 2))


def test_task_parameters_are_those_of_the_heads() -> None:
    net = net_with(MultiHead(F_, init_seed=0))
    for task in (0, 3):
        net.observe(task, range(4))
    private = net.task_parameters()
    assert {task: sum(p.numel() for p in ps) for task, ps in private.items()} == {0: 28, 3: 28}  # 6 * 4 + 4
    shared = {id(p) for p in net.trunk.parameters()}
    assert shared.isdisjoint(id(p) for ps in private.values() for p in ps)
    assert net_with(SingleHead(F_, 4)).task_parameters() == {}
    growing = net_with(GrowingHead(F_, 0))
    growing.observe(0, range(4))
    assert growing.task_parameters() == {}


# ------------------------------------------------------------------------------------------------------- unseen tasks


def test_an_unseen_task_is_answered_by_the_head_it_is_born_with() -> None:
    net = trained(net_with(MultiHead(F_, init_seed=0, expected={0: 2, 1: 5})), 0, range(2))
    future = net(images(), 1)
    assert future.shape == (5, 5)
    assert set(net.task_parameters()) == {0}
    net.observe(1, range(5))
    assert torch.equal(net(images(), 1), future)


def test_without_expected_an_unseen_task_is_as_wide_as_the_widest_head() -> None:
    """And the logits it has in common with its later, narrower head are the same."""
    net = net_with(MultiHead(F_, init_seed=0))
    with pytest.raises(RuntimeError, match="nothing tells how many outputs task 4 has"):
        net(images(), 4)
    net.observe(0, range(3))
    net.observe(1, range(7))
    net.observe(2, range(2))
    future = net(images(), 4)
    assert future.shape == (5, 7)
    net.observe(4, range(3))
    torch.testing.assert_close(net(images(), 4), future[:, :3])


def test_a_growing_head_before_any_class_answers_with_all_expected_ones() -> None:
    fresh = net_with(GrowingHead(F_, init_seed=0, expected_classes=8))
    answer = fresh(images())
    assert answer.shape == (5, 8)
    assert not list(fresh.head.parameters())
    fresh.observe(0, range(8))
    assert torch.equal(fresh(images()), answer)
    with pytest.raises(RuntimeError, match="no class seen yet"):
        net_with(GrowingHead(F_, init_seed=0))(images())


# ------------------------------------------------------------------------------------------------------- mixed batches


def test_a_mixed_batch_gets_each_samples_own_head() -> None:
    """Row by row equal to asking task by task; where a task has no such class, a finite logit that never wins."""
    net = net_with(MultiHead(F_, init_seed=0, expected={9: 2}))
    widths = {0: 2, 3: 5, 1: 3, 9: 2}
    for task in (0, 3, 1):
        net.observe(task, range(widths[task]))
    x, tasks = images(8), torch.tensor([3, 0, 9, 1, 0, 3, 9, 1])
    mixed = net(x, tasks)
    assert mixed.shape == (8, 5)
    for i, task in enumerate(tasks.tolist()):
        torch.testing.assert_close(mixed[i, : widths[task]], net(x, task)[i])
        assert (mixed[i, widths[task] :] == ABSENT_LOGIT).all()
        assert mixed[i].argmax() < widths[task]
    loss = F.cross_entropy(mixed, torch.zeros(8, dtype=torch.int64))
    assert torch.isfinite(loss)
    torch.autograd.backward(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_gradients_of_a_mixed_batch_are_the_sum_of_its_tasks_gradients() -> None:
    net = net_with(MultiHead(F_, init_seed=0))
    for task, width in ((0, 2), (1, 4)):
        net.observe(task, range(width))
    x, y, tasks = images(6), torch.tensor([0, 1, 1, 3, 2, 0]), torch.tensor([0, 0, 0, 1, 1, 1])
    order = torch.tensor([4, 0, 3, 1, 5, 2])
    parameters = list(net.parameters())
    mixed = torch.autograd.grad(F.cross_entropy(net(x[order], tasks[order]), y[order], reduction="sum"), parameters)
    apart = torch.autograd.grad(
        sum((F.cross_entropy(net(x[tasks == t], t), y[tasks == t], reduction="sum") for t in (0, 1)), torch.zeros(())),
        parameters,
    )
    torch.testing.assert_close(mixed, apart)


def test_one_task_for_all_may_be_a_number_or_a_tensor() -> None:
    net = net_with(MultiHead(F_, init_seed=0))
    net.observe(0, range(9))
    net.observe(2, range(3))
    as_number = net(images(), 2)
    assert as_number.shape == (5, 3)
    assert torch.equal(net(images(), torch.full((5,), 2)), as_number)
    assert torch.equal(net(images(), torch.tensor(2)), as_number)
    assert net(images(0), torch.empty(0, dtype=torch.int64)).shape[0] == 0


def test_a_multi_head_needs_tasks_that_fit() -> None:
    net = net_with(MultiHead(F_, init_seed=0))
    net.observe(0, range(2))
    with pytest.raises(ValueError, match="answers for a task"):
        net(images())
    with pytest.raises(ValueError, match=r"shape \(5,\); got \(4,\)"):
        net(images(), torch.zeros(4, dtype=torch.int64))


def test_the_trunk_runs_once_on_a_mixed_batch() -> None:
    net = net_with(MultiHead(F_, init_seed=0, expected=dict.fromkeys(range(3), 2)))
    batches: list[int] = []
    net.trunk.register_forward_hook(lambda module, args, output: batches.append(len(output)))
    net(images(6), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert batches == [6]
