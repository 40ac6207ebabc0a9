"""Factors and shifts of the tensors in one vector: by hand, by finite differences, under transforms."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import pytest
import torch
from torch.func import vmap

from clbench.memory import Meter
from clbench.nets import MLP
from clbench.nets.hypernet import Chunked, Target
from clbench.nets.hypernet.scaling import Scaling

MAP = Scaling([2, 1, 2, 1], [3.0, 3.0, 1.0, 0.5], [0.0, 0.0, 1.0, 1.0])
"""Tensors of 2, 1, 2 and 1 elements; the first two have both numbers in common."""


def test_each_tensor_is_multiplied_and_shifted_and_what_stands_over_is_cut_off() -> None:
    """(1..8) -> 3 * (1, 2), 3 * 3, (4, 5) + 1, 6 / 2 + 1; 7 and 8 stand over. The argument is left as it was."""
    x = torch.arange(1.0, 9.0)
    assert MAP(x).tolist() == [3, 6, 9, 5, 6, 4]
    assert x.equal(torch.arange(1.0, 9.0))


def test_the_gradient_is_multiplied_alone_and_zero_for_what_was_cut_off() -> None:
    x = torch.arange(1.0, 9.0, requires_grad=True)
    torch.autograd.backward(MAP(x), torch.arange(10.0, 16.0))
    assert x.grad is not None
    assert x.grad.tolist() == [30, 33, 36, 13, 14, 7.5, 0, 0]


def test_neighbours_that_are_alike_are_one() -> None:
    assert MAP.runs == [3, 2, 1]
    assert MAP.gains == {0: 3.0, 2: 0.5}
    assert MAP.births == {1: 1.0, 2: 1.0}


def test_derivatives_are_exact_twice_over_and_for_vectors_side_by_side() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: MAP(x).sin(), (x,))
    assert torch.autograd.gradgradcheck(lambda x: MAP(x).sin(), (x,))


def test_it_runs_under_vmap_along_any_dimension() -> None:
    x = torch.randn(3, 8)
    wanted = torch.stack([MAP(row) for row in x])
    assert vmap(MAP)(x).equal(wanted)
    assert vmap(MAP, in_dims=1)(x.t().contiguous()).equal(wanted)
    slopes = vmap(torch.func.grad(lambda row: MAP(row).sum()))(x)
    assert slopes.equal(torch.tensor([3.0, 3, 3, 1, 1, 0.5, 0, 0]).expand(3, 8))


def test_without_factors_and_shifts_nothing_is_copied() -> None:
    x = torch.arange(5.0)
    same = Scaling([3, 1], [1.0, 1.0], [0.0, 0.0])(x)
    assert same.tolist() == [0, 1, 2, 3]
    assert same.data_ptr() == x.data_ptr()


@pytest.mark.skipif(
    sys.platform != "linux" or not any(shutil.which(name) for name in ("g++", "clang++", "c++")),
    reason="the counting allocator needs Linux and a C++ compiler",
)
def test_chunks_are_made_in_twice_the_memory_of_the_weights(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """P = 101,101 and chunks of 100: what the head makes, the weights in its place; hidden numbers are a tenth of P.

    Vectors of factors would be one more P.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = Target(MLP((1, 10, 10), [500, 101]))
    assert target.size == 101 * 500 + 501 * 101
    generator, meter = Chunked(target, 4, 100, 4, (10,)), Meter(torch.device("cpu"), cpu="allocator")
    embedding = torch.randn(4)
    with meter.phase("made"):
        kept = generator(embedding)
    peak = meter.take()[0]["made"].allocated_bytes
    assert peak is not None
    assert 2 * kept.nbytes < peak < 2.3 * kept.nbytes
