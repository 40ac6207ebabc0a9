"""Nets with heads as state: state dicts into fresh nets, copies, pickles, devices, dtypes, weights from outside."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clbench.nets import MLP, GrowingHead, Head, HeadedNet, MultiHead, ResNet18, SingleHead

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


def trained(net: HeadedNet, task: int, classes: range) -> HeadedNet:
    net.observe(task, classes)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(images(), task), torch.tensor([0, 1, 0, 1, 1])))
        optimizer.step()
    return net


def multi() -> HeadedNet:
    return net_with(MultiHead(F_, init_seed=0))


def grown_multi() -> HeadedNet:
    net = trained(trained(multi(), 4, range(2)), 1, range(3))
    return trained(net, 4, range(6))


def growing() -> HeadedNet:
    return net_with(GrowingHead(F_, init_seed=0))


def grown_growing() -> HeadedNet:
    return trained(trained(trained(growing(), 0, range(2)), 1, range(5)), 2, range(12))


def single() -> HeadedNet:
    return net_with(SingleHead(F_, 5))


def trained_single() -> HeadedNet:
    return trained(single(), 0, range(2))


PAIRS = [(multi, grown_multi), (growing, grown_growing), (single, trained_single)]


@pytest.mark.parametrize(("fresh", "grown"), PAIRS)
def test_a_state_dict_restores_into_a_fresh_net_bit_by_bit(
    fresh: Callable[[], HeadedNet], grown: Callable[[], HeadedNet]
) -> None:
    """Same keys in the same order (optimisers number parameters by it), same values, same answers, same next birth."""
    source, target = grown(), fresh()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    assert list(target.state_dict()) == list(source.state_dict())
    assert [name for name, _ in target.named_parameters()] == [name for name, _ in source.named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), source.parameters(), strict=True))
    for net in (source, target):
        net.observe(1, range(5))
    assert torch.equal(target(images(), 1), source(images(), 1))
    assert not {id(p) for p in target.parameters()} & {id(p) for p in source.parameters()}


def test_more_than_ten_blocks_and_tasks_restore_in_the_order_of_birth() -> None:
    source = net_with(MultiHead(F_, init_seed=0))
    for task in (11, 2, 10, 1):
        for width in range(1, 13):
            source.observe(task, range(width))
    target = multi()
    target.load_state_dict(source.state_dict())
    assert list(target.task_parameters()) == [11, 2, 10, 1]
    for task in (11, 2, 10, 1):
        assert torch.equal(target(images(), task), source(images(), task))


def test_a_state_that_lacks_a_head_is_refused_by_name() -> None:
    net = grown_multi()
    net.observe(8, range(2))
    with pytest.raises(RuntimeError, match=r"Missing key.*heads\.8\.blocks\.0\.weight"):
        net.load_state_dict(grown_multi().state_dict())


def test_a_net_inside_a_larger_module_restores_too() -> None:
    source, target = nn.ModuleDict({"net": grown_multi()}), nn.ModuleDict({"net": multi()})
    target.load_state_dict(source.state_dict(), assign=True)
    assert list(target.state_dict()) == list(source.state_dict())


def test_the_anchor_of_an_empty_head_is_no_state() -> None:
    assert not [key for key in grown_multi().state_dict() if "anchor" in key]
    assert sum(b.numel() for b in grown_multi().buffers()) == 0


@pytest.mark.parametrize(("fresh", "grown"), PAIRS)
def test_copies_and_pickles_are_independent_and_equal(
    fresh: Callable[[], HeadedNet], grown: Callable[[], HeadedNet]
) -> None:
    net = grown()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(images(), 1), net(images(), 1))
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not torch.equal(next(other.parameters()), next(net.parameters()))
    original = fresh()
    empty = copy.deepcopy(original)
    for one in (original, empty):
        one.observe(1, range(3))
    assert torch.equal(empty(images(), 1), original(images(), 1))


@pytest.mark.parametrize("make", [lambda: MultiHead(F_, 0, expected={7: 3}), lambda: GrowingHead(F_, 0)])
def test_outputs_are_born_in_the_dtype_the_net_was_moved_to(make: Callable[[], Head]) -> None:
    """In float64 the weights are those of float32, exactly: they are drawn before they are moved."""
    usual, moved = net_with(make()), net_with(make()).to(torch.float64)
    for net in (usual, moved):
        net.observe(0, range(3))
    assert {p.dtype for p in moved.parameters()} == {torch.float64}
    born, cast = (next(iter(net.head.parameters())) for net in (usual, moved))
    assert torch.equal(born.double(), cast)
    assert moved(images().double(), 0).dtype == torch.float64
    moved.to(torch.bfloat16).observe(0, range(6))
    assert {p.dtype for p in moved.parameters()} == {torch.bfloat16}


def test_a_head_takes_over_the_dtype_of_its_trunk() -> None:
    net = HeadedNet(MLP(DIGITS, [F_]).double(), MultiHead(F_, init_seed=0, expected={1: 2}))
    net.observe(0, range(2))
    assert net(images().double(), torch.tensor([0, 1, 0, 1, 1])).dtype == torch.float64
    restored = HeadedNet(MLP(DIGITS, [F_]).double(), MultiHead(F_, init_seed=0))
    restored.load_state_dict(net.state_dict())
    assert {p.dtype for p in restored.parameters()} == {torch.float64}


def test_mixed_batches_work_in_mixed_precision() -> None:
    net = net_with(MultiHead(F_, init_seed=0, expected={2: 4}))
    net.observe(0, range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = net(images(4), torch.tensor([0, 2, 0, 2]))
    assert logits.shape == (4, 4)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize(("fresh", "grown"), PAIRS)
def test_a_net_runs_on_weights_from_outside(fresh: Callable[[], HeadedNet], grown: Callable[[], HeadedNet]) -> None:
    net = grown()
    doubled = {name: (2 * p).detach().requires_grad_() for name, p in net.named_parameters()}
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    answer = functional_call(net, doubled, (images(), 1))
    torch.testing.assert_close(answer, other(images(), 1))
    (gradient,) = torch.autograd.grad(answer.sum(), doubled["trunk.layers.0.weight"])
    assert gradient.any()


def test_a_frozen_net_gives_birth_to_trainable_outputs() -> None:
    net = net_with(MultiHead(F_, init_seed=0))
    net.observe(0, range(2))
    net.requires_grad_(False)
    net.observe(1, range(2))
    assert [p.requires_grad for ps in net.task_parameters().values() for p in ps] == [False, False, True, True]


def test_evaluating_a_future_task_leaves_batch_norm_alone() -> None:
    net = HeadedNet(ResNet18(DIGITS, 4), MultiHead(32, init_seed=0, expected={1: 3})).eval()
    net.observe(0, range(2))
    before = copy.deepcopy(net.state_dict())
    net(images(), 1)
    net(images(), torch.tensor([0, 1, 0, 1, 1]))
    assert list(before) == list(net.state_dict())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_outputs_are_born_on_the_device_the_net_was_moved_to() -> None:
    net, here = (net_with(MultiHead(F_, init_seed=0, expected={2: 4})) for _ in range(2))
    net.to("cuda")
    for one in (net, here):
        one.observe(0, range(3))
    assert {p.device.type for p in net.parameters()} == {"cuda"}
    assert torch.equal(net.task_parameters()[0][0].cpu(), here.task_parameters()[0][0])
    tasks = torch.tensor([0, 2, 0, 2, 0])
    expected = here(images(), tasks)
    for where in ("cpu", "cuda"):
        torch.testing.assert_close(net(images().cuda(), tasks.to(where)).cpu(), expected, rtol=1e-3, atol=1e-4)
    restored = multi().to("cuda")
    restored.load_state_dict(here.state_dict())
    assert {p.device.type for p in restored.parameters()} == {"cuda"}
