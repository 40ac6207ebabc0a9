"""Sizes for a compression: as near as can be and not above; what cannot be met is told in one line."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from clbench.nets import MLP, ResNet32
from clbench.nets.hypernet import GENERATORS, Chunked, Structured, Target, fit_sizes


def target() -> Target:
    with torch.device("meta"):
        return Target(MLP((1, 28, 28), [100, 100]))


@pytest.mark.parametrize(
    ("kind", "ratio", "near"),
    [
        ("chunked", 0.95, 0.005),
        ("chunked", 0.5, 0.005),
        ("chunked", 0.05, 0.005),
        ("structured", 0.5, 0.01),
        ("structured", 0.15, 0.02),
        ("lowrank", 1.5, 0.02),
        ("full", 11.5, 1.0),
    ],
)
def test_the_generator_built_is_as_small_as_asked_and_hardly_smaller(kind: str, ratio: float, near: float) -> None:
    """A full generator has P more parameters with every unit of its last layer: it is within 1 of what was asked."""
    fit = fit_sizes(kind, target(), ratio, 10)
    with torch.device("meta"):
        generator = GENERATORS[kind](target(), **fit.settings)
    assert generator.parameters_with(10) == fit.parameters
    assert ratio - near <= fit.parameters / target().size == fit.ratio <= ratio


def test_no_chunk_is_nearer_than_the_one_found() -> None:
    """Every chunk of a small target, by the closed count; P = 9 * 12 + 12 + 12 * 12 + 12 = 276."""
    small = Target(MLP((1, 3, 3), [12, 12]))
    sizes: dict[str, Any] = {"embedding_size": 2, "hidden": (3,), "chunk_embedding_size": 1}
    for ratio, conditioned in itertools.product((0.8, 1.5, 2.9), (False, True)):
        fit = fit_sizes("chunked", small, ratio, 2, **sizes, task_conditioned=conditioned)
        counts = [Chunked.count(small, 2, chunk=n, **sizes, task_conditioned=conditioned) for n in range(1, 277)]
        allowed = [count for count in counts[fit.settings["chunk"] - 1 :] if count <= ratio * 276]
        assert fit.parameters == counts[fit.settings["chunk"] - 1] == max(allowed)


@pytest.mark.parametrize(("kind", "ratio"), [("structured", 0.5), ("lowrank", 1.5)])
def test_a_narrower_embedding_comes_before_a_generator_of_one_unit(kind: str, ratio: float) -> None:
    """P = 64 * 64 + 64 = 4,160. With the widest embeddings the tasks' own numbers leave room for one hidden unit."""
    small = Target(MLP((1, 8, 8), [64]))
    fit = fit_sizes(kind, small, ratio, 5)
    assert fit.settings["embedding_size"] < 32
    assert fit.settings["hidden"][-1] >= 8
    assert fit.ratio > 0.9 * ratio


def test_sizes_that_are_given_are_kept() -> None:
    fit = fit_sizes("chunked", target(), 0.5, 5, embedding_size=12, hidden=(20, 30), chunk_embedding_size=7)
    kept = {key: fit.settings[key] for key in ("embedding_size", "hidden", "chunk_embedding_size")}
    assert kept == {"embedding_size": 12, "hidden": (20, 30), "chunk_embedding_size": 7}
    by_layer = fit_sizes("structured", target(), 0.5, 5, embedding_size=6, hidden=(11,))
    assert by_layer.settings["embedding_size"] == 6
    assert by_layer.settings["hidden"][0] == 11
    assert len(by_layer.settings["hidden"]) == 2


def test_more_tasks_leave_less_for_the_generator() -> None:
    few, many = (fit_sizes("chunked", target(), 0.5, tasks, embedding_size=32, hidden=(50,)) for tasks in (5, 500))
    assert few.settings["chunk"] > many.settings["chunk"]
    assert many.ratio <= 0.5


def test_a_large_target_takes_no_time() -> None:
    """ResNet-32: the search looks at chunks up to what the head may have, not at all of them."""
    with torch.device("meta"):
        resnet = Target(ResNet32((3, 32, 32)))
    fit = fit_sizes("chunked", resnet, 0.15, 10)
    assert 0.149 < fit.ratio <= 0.15
    assert Structured.count(resnet, 10, **fit_sizes("structured", resnet, 0.5, 10).settings) <= 0.5 * resnet.size


@pytest.mark.parametrize(
    ("kind", "ratio", "line"),
    [
        ("chunked", 0.001, r"a compression of 0.001 cannot be met: the nearest a chunked .* can be is 0\.01"),
        ("structured", 0.001, "the nearest a structured"),
        ("full", 1.5, r"can be is 2\.00"),
        ("lowrank", 0.5, r"can be is 1\.0"),
        ("full", -1, "ratio is -1: above 0"),
        ("fulll", 1, "unknown generator 'fulll'. Known: chunked, full, lowrank, structured"),
    ],
)
def test_what_cannot_be_met_is_told_in_one_line_with_the_nearest(kind: str, ratio: float, line: str) -> None:
    with pytest.raises(ValueError, match=line) as refused:
        fit_sizes(kind, target(), ratio, 10)
    assert "\n" not in str(refused.value)


def test_the_nearest_that_is_told_can_be_met() -> None:
    for kind in GENERATORS:
        with pytest.raises(ValueError, match="can be is") as refused:
            fit_sizes(kind, target(), 1e-6, 10)
        nearest = float(str(refused.value).split("can be is ")[1].split(" ")[0])
        assert fit_sizes(kind, target(), nearest, 10).ratio <= nearest
