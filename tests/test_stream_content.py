"""Streams against their data sets, pixel by pixel: which images a task shows for training, validation and test."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from clbench import data
from clbench.loading import TensorTask
from clbench.specs import PermutedStream, SplitPart, SplitStream
from clbench.streams import make_stream, permutations

CPU = torch.device("cpu")
DIGITS = data.load("digits")
HALVES = {"train": (DIGITS.x_train, DIGITS.y_train), "test": (DIGITS.x_test, DIGITS.y_test)}


def pixels(task: TensorTask) -> Tensor:
    """Return what the net is shown of every sample, (N, 64) in 0 to 255."""
    return (task.inputs(torch.arange(len(task))).flatten(1) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("half", ["train", "test"])
def test_a_permuted_task_shows_the_data_sets_own_images_of_its_half(half: str) -> None:
    """Sample n of every task is image n of that half with its 64 pixels in the task's order, and has its label."""
    spec = PermutedStream(kind="permuted", dataset="digits", n_tasks=3, scenario="domain")
    stream = make_stream(spec, 0, CPU)
    images, labels = HALVES[half]
    for index, order in enumerate(permutations(spec, 0, 64)):
        tasks = stream.train if half == "train" else stream.test
        assert torch.equal(pixels(tasks[index]), images.flatten(1)[:, torch.from_numpy(order)])
        assert tasks[index].targets == labels.tolist()
        x, y, *_ = stream.benchmark.streams[half][index].dataset[5]
        assert torch.equal((x.flatten() * 255).round().to(torch.uint8), images[5].flatten()[torch.from_numpy(order)])
        assert y == labels[5]


@pytest.mark.parametrize("half", ["train", "test"])
def test_a_split_task_shows_the_data_sets_own_images_of_its_half(half: str) -> None:
    """Task i holds the digits 2i and 2i + 1, in the data set's order, as labels 0 and 1."""
    part = SplitPart(dataset="digits", n_tasks=5, classes_per_task=2)
    stream = make_stream(SplitStream(kind="split", parts=[part], scenario="task"), 0, CPU)
    images, labels = HALVES[half]
    for index, task in enumerate(stream.train if half == "train" else stream.test):
        mine = labels // 2 == index
        assert torch.equal(pixels(task), images[mine].flatten(1))
        assert task.targets == (labels[mine] - 2 * index).tolist()
        x, y, *_ = stream.benchmark.streams[half][index].dataset[3]
        assert torch.equal((x * 255).round().to(torch.uint8), images[mine][3])
        assert y == labels[mine][3] - 2 * index


def test_validation_images_are_training_images_of_the_data_set() -> None:
    """With the first fifth of 1,000-odd images set aside, the rest trains: together the training half, in order."""
    spec = PermutedStream(kind="permuted", dataset="digits", n_tasks=2, scenario="domain", identity_first=True,
                          validation=0.2, validation_from="first")  # fmt: skip
    stream = make_stream(spec, 0, CPU)
    both = torch.cat([pixels(stream.validation[0]), pixels(stream.train[0])])
    assert torch.equal(both, DIGITS.x_train.flatten(1))
    assert stream.validation[0].targets + stream.train[0].targets == DIGITS.y_train.tolist()


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_every_part_of_a_stream_has_a_class_order_of_its_own(scenario: Literal["task", "class"]) -> None:
    """The same data set twice, one class a task: two of 10! orders, alike once in 3.6 million seeds."""
    parts = [SplitPart(dataset="digits", n_tasks=10, classes_per_task=1, order="shuffled") for _ in range(2)]
    seen = set()
    for seed in range(3):
        stream = make_stream(SplitStream(kind="split", parts=parts, scenario=scenario), seed, CPU)
        classes = [int(np.unique(DIGITS.y_train[task.rows])[0]) for task in stream.train]
        for order in (classes[:10], classes[10:]):
            assert sorted(order) == list(range(10))
            seen.add(tuple(order))
    assert len(seen) == 6
