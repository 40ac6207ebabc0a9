"""Masks: bits that come back as they were, choices that are exact wherever they are made, gradients by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clbench.nets.shared.masks import (
    TopMask,
    chosen_count,
    coded_bits,
    huffman_bits,
    leading,
    masked,
    pack_bits,
    straight_through,
    top_mask,
    unpack_bits,
)
from clbench.nets.shared.masks import _chosen as chosen_by_torch  # the way taken on an accelerator

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def by_sorting(scores: Tensor, share: float) -> Tensor:
    """The k largest by a stable sort of (-score, place), in plain Python."""
    values = scores.flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[: max(1, round(share * len(values)))]] = True
    return mask.view(scores.shape)


# ---------------------------------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (2, 3, 4, 5), (0,), ()])
def test_bits_come_back_as_the_mask_they_were(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mask = torch.rand(shape) < 0.4
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8
    assert len(bits) == -(-mask.numel() // 8)
    assert torch.equal(unpack_bits(bits, shape), mask)


def test_element_i_is_bit_i_mod_8_of_byte_i_div_8() -> None:
    """Elements 0, 3 and 9: 1 + 8 in the first byte, 2 in the second."""
    mask = torch.zeros(10, dtype=torch.bool)
    mask[[0, 3, 9]] = True
    assert pack_bits(mask).tolist() == [9, 2]


def test_a_mask_that_lies_in_memory_otherwise_is_packed_by_its_indices() -> None:
    mask = torch.rand(6, 5) < 0.5
    assert torch.equal(pack_bits(mask.t()), pack_bits(mask.t().contiguous()))
    assert torch.equal(unpack_bits(pack_bits(mask[:, ::2]), (6, 3)), mask[:, ::2])


def test_a_huffman_code_by_hand() -> None:
    """Counts 5, 2, 1, 1: 1 + 1 = 2, 2 + 2 = 4, 4 + 5 = 9: code lengths 1, 2, 3, 3, in all 5 + 4 + 3 + 3 = 15."""
    assert huffman_bits([5, 2, 1, 1, 0]) == 15
    assert huffman_bits([9]) == 0
    assert huffman_bits([]) == 0


def test_masks_that_agree_are_coded_once() -> None:
    """Eight elements, two masks. Equal halves: symbols 00 and 11, a bit each, 8. Apart: three symbols, 4 + 2 + 2 bits.

    Eight equal masks are two groups, of seven and of one: 8 bits each.
    """
    half = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool()
    other = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0]).bool()
    assert coded_bits([half, half]) == 8
    assert coded_bits([half, other]) == 4 * 1 + 2 * 2 + 2 * 2
    assert coded_bits([half] * 8) == 16


# ------------------------------------------------------------------------------------------------------------ choosing


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("share", [1e-4, 0.03, 0.1, 0.5, 0.97, 1.0])
def test_a_top_mask_is_what_sorting_gives(device: str, dtype: torch.dtype, share: float) -> None:
    """Half of the scores are rounded, so that many are equal; those that come first are taken."""
    torch.manual_seed(0)
    for n in (1, 2, 7, 333):
        scores = torch.randn(n, 2).to(dtype)
        scores[::2] = (scores[::2] * 3).round()
        mask = top_mask(scores.to(device), share)
        assert mask.device.type == device
        assert torch.equal(mask.cpu(), by_sorting(scores, share))
        assert int(mask.sum()) == chosen_count(2 * n, share)


def test_the_way_of_accelerators_chooses_the_same() -> None:
    torch.manual_seed(0)
    scores = (torch.randn(5000) * 20).round()
    for k in (1, 50, 2500, 4999):
        assert torch.equal(chosen_by_torch(scores, k), top_mask(scores, k / 5000))


def test_equal_scores_are_taken_from_the_front() -> None:
    assert top_mask(torch.zeros(5), 0.4).tolist() == [True, True, False, False, False]
    assert top_mask(torch.tensor([1.0, 2.0, 1.0, 1.0]), 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize("share", [0.03, 0.5])
def test_a_choice_that_remembers_is_the_one_from_scratch_however_scores_move(share: float) -> None:
    """Small steps, as training makes them; then a leap, scores all equal, scores of other size, rounded scores."""
    torch.manual_seed(0)
    scores, choose = torch.rand(6000), TopMask(share)
    moves: list[Callable[[Tensor], Tensor]] = [lambda s: s + 1e-3 * torch.randn_like(s)] * 20
    moves += [lambda s: s + 5, torch.ones_like, torch.zeros_like, lambda s: 1e-6 * torch.rand_like(s)]
    moves += [*[lambda s: (1e7 * s).round()] * 2, *[lambda s: s + torch.randn_like(s)] * 3]
    for move in moves:
        scores = move(scores)
        found = choose(scores)
        assert torch.equal(found, top_mask(scores, share))
        assert int(found.sum()) == chosen_count(6000, share)


def test_a_choice_that_remembers_seldom_selects_among_all() -> None:
    """Of 50 choices under steps of a hundredth of the scores' size, none after the first few misses its margin."""
    torch.manual_seed(0)
    scores, choose = torch.rand(20000), TopMask(0.1)
    choose(scores)
    found = []
    for _ in range(50):
        scores = scores + 1e-3 * torch.randn_like(scores)
        found.append(choose._near(scores.numpy(), 2000) is not None)
        choose(scores)
    assert all(found)


def test_scores_that_are_not_a_number_stop_nothing() -> None:
    assert top_mask(torch.full((4,), float("nan")), 0.5).sum() == 0
    assert TopMask(0.5)(torch.full((9000,), float("nan"))).sum() == 0


@pytest.mark.parametrize("share", [0.03, 0.5, 1.0])
def test_a_bound_chooses_what_the_mask_does_and_equal_sizes_get_a_mask(share: float) -> None:
    """One where all sizes differ is a number; of scores that are all equal, or none, a mask takes the first."""
    torch.manual_seed(0)
    scores, choose = torch.randn(50, 120), TopMask(share)
    for _ in range(5):
        by = choose.by_size(scores)
        assert isinstance(by, float)
        assert torch.equal(masked(torch.ones_like(scores), scores, by), top_mask(scores.abs(), share).float())
        scores = scores + 1e-3 * torch.randn_like(scores)
    for value in (2.0, 0.0, float("nan")):
        equal = torch.full((50, 120), value)
        by = choose.by_size(equal)
        assert by == -1.0 if share == 1 else torch.equal(torch.as_tensor(by), top_mask(equal, share))


def test_dealt_out_sizes_choose_the_mask_and_keep_signs() -> None:
    """Sizes 1 to 4; the mask's elements 0 and 3, of sizes 1 < 4, get 3 and 4; the others, 2 < 3, get 1 and 2."""
    scores = torch.tensor([-1.0, 2.0, -3.0, 4.0])
    mask = torch.tensor([True, False, False, True])
    assert leading(scores, mask).tolist() == [-3.0, 1.0, -2.0, 4.0]
    assert torch.equal(leading(scores, top_mask(scores.abs(), 0.5)), scores)


# ----------------------------------------------------------------------------------------------------------- gradients


def test_gradients_of_a_masked_weight_by_hand() -> None:
    """Loss sum(a * w * m): dw = a * m * free, ds = a * w * sign(s), whether chosen or not.

    w (2, 3, 5), s (-4, 1, 6), a (10, 20, 30), m (1, 0, 1), free (1, 1, 0): dw (10, 0, 0), ds (-20, 60, 150).
    """
    weight, scores = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([-4.0, 1.0, 6.0])
    weight.requires_grad_()
    scores.requires_grad_()
    mask = top_mask(scores.abs(), 2 / 3)
    found = masked(weight, scores, mask, torch.tensor([1.0, 1.0, 0.0]))
    assert found.tolist() == [2.0, 0.0, 5.0]
    torch.autograd.backward((torch.tensor([10.0, 20.0, 30.0]) * found).sum())
    assert weight.grad is not None
    assert scores.grad is not None
    assert weight.grad.tolist() == [10.0, 0.0, 0.0]
    assert scores.grad.tolist() == [-20.0, 60.0, 150.0]


@pytest.mark.parametrize("by_bound", [False, True])
@pytest.mark.parametrize("learns", list(itertools.product([True, False], repeat=2)))
def test_a_masked_weight_is_the_product_with_a_straight_through_mask(
    learns: tuple[bool, bool], by_bound: bool
) -> None:
    torch.manual_seed(0)
    results = []
    start = torch.randn(2, 7, 3, dtype=torch.float64)
    coefficient = torch.randn(7, 3, dtype=torch.float64)
    for written_out in (True, False):
        weight, scores = start[0].clone().requires_grad_(learns[0]), start[1].clone().requires_grad_(learns[1])
        mask = top_mask(scores.abs(), 0.4)
        by = TopMask(0.4).by_size(scores) if by_bound else mask
        out = weight * straight_through(scores.abs(), mask) if written_out else masked(weight, scores, by)
        if any(learns):
            torch.autograd.backward((out.square() * coefficient).sum())
        results.append((out.detach(), weight.grad, scores.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("share", [1.5, -1.0, float("nan")])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(ValueError, match="a share is from 0 to 1"):
        top_mask(torch.zeros(3), share)
