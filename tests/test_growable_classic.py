"""The comparators are right: each grows to exactly what `torch.cat` gives, and helpers compute what a whole layer does.

They are written to be measured against; a comparator that is wrong, or wasteful by mistake, would flatter the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets.growable.classic import (
    HelperConv2d,
    HelperLinear,
    StridedCapacity,
    freeze_by_mask,
    grow_by_cat,
    grow_by_resize,
    grow_by_storage_resize,
)
from clbench.nets.growable.errors import GrowthError

FUNCTIONS: list[Callable[..., Tensor]] = [grow_by_cat, grow_by_resize, grow_by_storage_resize]


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 50).to(dtype)


@pytest.mark.parametrize("grow", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(7,), (1, 5), (5, 1), (6, 4), (40, 3), (3, 5, 2, 2), (2, 0, 3)])
@pytest.mark.parametrize("k", [0, 1, 9])
def test_every_way_gives_what_cat_gives(
    grow: Callable[..., Tensor], dtype: torch.dtype, shape: tuple[int, ...], k: int
) -> None:
    """Three growths in a row along each dimension, by values and by a number; equal in every bit."""
    for dim in range(-len(shape), len(shape)):
        t = drawn(shape, dtype)
        for fill in (0.0, 3.0):
            new = drawn(tuple(k if i == dim % len(shape) else size for i, size in enumerate(t.shape)), dtype)
            expected = torch.cat((t, new, torch.full_like(new, fill)), dim)
            t = grow(grow(t, dim, new), dim, k, fill=fill)
            assert torch.equal(t, expected)
            assert t.is_contiguous()


def test_rows_move_in_blocks_and_one_by_one() -> None:
    """From 30 to 31 numbers a row, blocks [ceil(30 r / 31), r): from row 100 down to 31 in blocks, below one by one.

    Both kinds of move are taken, so equality with cat covers both.
    """
    t = drawn((100, 30))
    assert torch.equal(grow_by_storage_resize(t.clone(), 1, 1), grow_by_cat(t, 1, 1))


def test_cat_leaves_its_source_alone_and_the_others_grow_the_object_itself() -> None:
    t = drawn((4, 3))
    before = t.clone()
    assert grow_by_cat(t, 0, 2) is not t
    assert torch.equal(t, before)
    for grow in (grow_by_resize, grow_by_storage_resize):
        t = before.clone()
        assert grow(t, 1, 2) is t
        assert t.shape == (4, 5)


@pytest.mark.parametrize("grow", FUNCTIONS)
def test_a_growth_that_cannot_be_is_refused_and_nothing_changes(grow: Callable[..., Tensor]) -> None:
    t = drawn((4, 3))
    before = t.clone()
    for dim, new, says in [
        (2, 1, "dimension 2"),
        (0, -1, "cannot grow by -1"),
        (0, torch.zeros(2, 4), "new slices of shape"),
        (1, torch.zeros(4), "new slices of shape"),
    ]:
        with pytest.raises(GrowthError, match=says):
            grow(t, dim, new)
        assert torch.equal(t, before)


@pytest.mark.parametrize("grow", [grow_by_resize, grow_by_storage_resize])
def test_what_resize_would_tear_is_refused(grow: Callable[..., Tensor]) -> None:
    with pytest.raises(GrowthError, match="not contiguous"):
        grow(drawn((4, 3)).t(), 0, 1)
    with pytest.raises(GrowthError, match="needs a gradient"):
        grow(nn.Parameter(drawn((4, 3))), 0, 1)
    with pytest.raises(GrowthError, match="part of a larger storage"):
        grow_by_storage_resize(drawn((4, 3))[:2], 0, 1)


def test_a_strided_capacity_grows_without_moving_and_is_not_contiguous() -> None:
    """(3, 2) in a buffer of (5, 4): rows stay 4 apart; two columns and two rows later it is the buffer, contiguous."""
    held = StridedCapacity((3, 2), (5, 4), dtype=torch.float64)
    start = drawn((3, 2))
    held.weight.copy_(start)
    place = held.weight.data_ptr()
    assert held.weight.stride() == (4, 1)
    assert not held.weight.is_contiguous()
    held.grow(1, torch.full((3, 2), 7.0, dtype=torch.float64))
    weight = held.grow(0, 2)
    assert torch.equal(weight, grow_by_cat(grow_by_cat(start, 1, 2, fill=7.0), 0, 2))
    assert weight.data_ptr() == place
    assert weight.is_contiguous()
    with pytest.raises(GrowthError, match=r"a capacity of \[5, 4\] does not hold \[6, 4\]"):
        held.grow(0, 1)
    assert held.weight.shape == (5, 4)
    with pytest.raises(GrowthError, match="does not hold"):
        StridedCapacity((3, 2), (2, 4))


def test_a_mask_stops_plain_sgd_but_not_momentum() -> None:
    """One step of SGD with momentum 0.9 and lr 1 on gradient 1, then a masked one: the old weight moves by 0.9."""
    for momentum, moved in ((0.0, 0.0), (0.9, 0.9)):
        p = nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([p], lr=1.0, momentum=momentum)
        p.grad = torch.ones(2)
        optimizer.step()
        before = p.detach().clone()
        optimizer.zero_grad()
        handle = freeze_by_mask(p, (1,))
        p.sum().backward()  # type: ignore[no-untyped-call]  # torch's own
        optimizer.step()
        assert (before - p.detach()).tolist() == pytest.approx([moved, moved + 1.0])
        handle.remove()
        p.grad = None
        p.sum().backward()  # type: ignore[no-untyped-call]  # torch's own
        assert p.grad is not None
        assert p.grad.tolist() == [1.0, 1.0]


def fill(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


GROWTHS = [(2, 3), (0, 2), (4, 0), (1, 1)]
"""Outputs and inputs added."""


@pytest.mark.parametrize("bias", [True, False])
def test_helpers_of_a_linear_layer_compute_what_the_whole_one_does(bias: bool) -> None:
    """Unequal growths, some of one side alone; weights random everywhere. Shapes (B, I) and (I,)."""
    helpers = HelperLinear(nn.Linear(5, 4, bias=bias, dtype=torch.float64))
    for out, inp in GROWTHS:
        helpers.grow(out, inp)
    fill(helpers)
    weight, b = helpers.whole()
    assert weight.shape == (11, 11) == (helpers.n_out, helpers.n_in)
    assert (b is not None) == bias
    for x in (drawn((3, 11)), drawn((11,))):
        torch.testing.assert_close(helpers(x), F.linear(x, weight, b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "same", "dilation": 2},
        {"kernel_size": 3, "padding": 2, "padding_mode": "circular"},
        {"kernel_size": 1, "bias": False},
    ],
)
def test_the_sum_of_separated_convolutions_is_the_whole_one(settings: dict[str, Any]) -> None:
    """The whole one is an ordinary convolution of the same settings that holds the joined weight."""
    helpers = HelperConv2d(nn.Conv2d(3, 4, dtype=torch.float64, **settings))
    for out, inp in GROWTHS:
        helpers.grow(out, inp)
    fill(helpers)
    whole = nn.Conv2d(9, 11, dtype=torch.float64, **settings)
    weight, bias = helpers.whole()
    assert (bias is None) == (whole.bias is None)
    with torch.no_grad():
        whole.weight.copy_(weight)
        if whole.bias is not None and bias is not None:
            whole.bias.copy_(bias)
    for x in (drawn((2, 9, 8, 7)), drawn((9, 8, 7))):
        torch.testing.assert_close(helpers(x), whole(x), rtol=1e-12, atol=1e-12)


def test_growing_by_helpers_keeps_what_was_computed() -> None:
    """Old outputs see new inputs through zeros: equal to the last bit, whatever the new inputs are."""
    layer = nn.Linear(5, 4, dtype=torch.float64)
    helpers, x = HelperLinear(layer), drawn((3, 8))
    before = helpers(x[:, :5])
    new = helpers.grow(2, 3)
    assert [tuple(parameter.shape) for parameter in new] == [(4, 3), (2, 8), (2,)]
    assert torch.equal(helpers(x)[:, :4], before)


def test_helpers_refuse_what_they_cannot() -> None:
    with pytest.raises(GrowthError, match="2 groups"):
        HelperConv2d(nn.Conv2d(4, 4, 3, groups=2))
    helpers = HelperLinear(nn.Linear(2, 2))
    with pytest.raises(GrowthError, match="cannot grow by -1 outputs"):
        helpers.grow(-1, 2)
    assert not helpers.growths
