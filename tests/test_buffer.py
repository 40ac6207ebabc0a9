"""The replay memory: who is kept, with which probability, and in which form."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from clbench.loading import TensorTask
from clbench.strategies.buffer import Buffer, Policy
from clbench.views import CropFlip, PixelMap, View
from strategy_factory import tensor_task

POLICIES: tuple[Policy, ...] = ("reservoir", "ring", "class_balanced")
QUOTAS = POLICIES[1:]


def numbered(labels: list[int], first: int = 0, task: int = 0) -> TensorTask:
    """Return a task of one-pixel images that show their own number, from `first` on."""
    return tensor_task(torch.arange(first, first + len(labels)).to(torch.uint8).view(-1, 1, 1, 1), labels, task)


def buffer(room: int, policy: Policy, seed: int = 0) -> Buffer:
    return Buffer(room, policy, torch.Generator().manual_seed(seed))


def feed(memory: Buffer, task: TensorTask, batch: int = 5, visit: int = 0) -> None:
    for index in torch.split(torch.arange(len(task)), batch):
        memory.offer(task, index, visit)


def kept(memory: Buffer) -> list[int]:
    """Return the numbers of the samples in the memory, slot by slot."""
    assert memory.images is not None
    return [int(number) for number in memory.images[: len(memory)].flatten()]


def close_to_uniform(counts: list[int], share: float, runs: int) -> bool:
    """Whether counts of `runs` inclusions with probability `share` each look it.

    The sum of (count - runs * share)^2 / (runs * share * (1 - share)) over n samples is about chi-square with mean n
    and deviation sqrt(2 n), a little narrower where inclusions exclude one another: 6 deviations are a bug, not chance.
    """
    n = len(counts)
    statistic = sum((count - runs * share) ** 2 / (runs * share * (1 - share)) for count in counts)
    return abs(statistic - n) < 6 * math.sqrt(2 * n)


# ------------------------------------------------------------------------------------------------------------ reservoir


def test_the_reservoir_is_algorithm_r() -> None:
    """Vitter 1985, one sample at a time, with the same draws: the n-th goes to place floor(u n) if that is below M."""
    memory, twin = buffer(7, "reservoir", seed=3), torch.Generator().manual_seed(3)
    task = numbered([0] * 200)
    expected: list[int] = []
    for index in torch.split(torch.arange(200), 9):
        memory.offer(task, index)
        draws = torch.rand(len(index), generator=twin, dtype=torch.float64).tolist()
        for number, draw in zip(index.tolist(), draws, strict=True):
            place = int(draw * (number + 1))
            if number < 7:
                expected.append(number)
            elif place < 7:
                expected[place] = number
        assert kept(memory) == expected
    assert memory.seen == 200


def test_the_reservoir_keeps_every_sample_with_the_same_probability() -> None:
    """M / n = 8 / 40, whatever its place in the stream; over 1,500 streams."""
    task, runs, counts = numbered([0] * 40), 1500, Counter[int]()
    memory = buffer(8, "reservoir")
    for _ in range(runs):
        memory.filled = memory.seen = 0
        feed(memory, task, batch=10)
        counts.update(kept(memory))
    assert close_to_uniform([counts[number] for number in range(40)], 8 / 40, runs)


# ----------------------------------------------------------------------------------------------------------------- ring


def test_a_ring_holds_the_latest_of_every_class() -> None:
    """Room 4. Class 0 offers 0..5 and fills it with 2, 3, 4, 5; class 1 has a share of 2 and takes the oldest two.

    Then the latest two of each are kept: 4, 5 and, of class 1's 6, 7, 8, the last two.
    """
    memory = buffer(4, "ring")
    feed(memory, numbered([0] * 6))
    assert sorted(kept(memory)) == [2, 3, 4, 5]
    feed(memory, numbered([1] * 3, first=6))
    assert sorted(kept(memory)) == [4, 5, 7, 8]
    assert memory.labels[torch.tensor(kept(memory)).argsort()].tolist() == [0, 0, 1, 1]


def test_a_slot_written_twice_in_one_batch_holds_the_later_sample() -> None:
    memory = buffer(2, "ring")
    feed(memory, numbered([0] * 50), batch=50)
    assert sorted(kept(memory)) == [48, 49]


@pytest.mark.parametrize("policy", QUOTAS)
def test_tasks_of_the_same_classes_share_the_memory(policy: Policy) -> None:
    """Domain-incremental: three tasks of the labels 0 and 1 have 12 / 6 = 2 samples for each label of each task."""
    memory = buffer(12, policy)
    for visit in range(3):
        feed(memory, numbered([0, 1] * 20, first=40 * visit), visit=visit)
    held = Counter((number // 40, label) for number, label in zip(kept(memory), memory.labels.tolist(), strict=True))
    assert held == {(visit, label): 2 for visit in range(3) for label in (0, 1)}


# ------------------------------------------------------------------------------------------------------- class-balanced


def test_shares_stay_equal_within_one_as_classes_arrive() -> None:
    """After every class of 30 samples: room full, never more, sizes at most one apart, every class there."""
    for room in (8, 13, 30):
        for policy in QUOTAS:
            memory = buffer(room, policy)
            for label in range(8):
                feed(memory, numbered([label] * 30, first=30 * label), batch=7)
                sizes = Counter(memory.labels[: len(memory)].tolist())
                assert len(memory) == room
                assert len(sizes) == label + 1
                assert max(sizes.values()) - min(sizes.values()) <= 1
                assert len(set(kept(memory))) == room


def test_classes_that_come_mixed_get_equal_shares() -> None:
    """Three classes at once and room 10: the tenth place stays with the class that came to it first."""
    for policy in QUOTAS:
        memory = buffer(10, policy)
        feed(memory, numbered([0, 1, 2] * 30))
        assert Counter(memory.labels.tolist()) == {0: 4, 1: 3, 2: 3}


def test_a_class_is_sampled_uniformly_although_others_cut_it_back() -> None:
    """Class 0 offers 20, then class 1 takes half of the 8 places, then 10 more of class 0: 4 of 30, each as likely."""
    early, other = numbered([0] * 20), numbered([1] * 12, first=100)
    late, runs, counts = numbered([0] * 10, first=20), 1500, Counter[int]()
    generator = torch.Generator().manual_seed(0)
    for _ in range(runs):
        memory = Buffer(8, "class_balanced", generator)
        for task in (early, other, late):
            feed(memory, task, batch=10)
        counts.update(kept(memory))
    assert close_to_uniform([counts[number] for number in range(30)], 4 / 30, runs)
    assert close_to_uniform([counts[number] for number in range(100, 112)], 4 / 12, runs)


def test_with_less_room_than_classes_a_random_class_gives_way() -> None:
    """Room 2 and 6 classes of one visit each: in the end every class is kept with a chance, also the first."""
    counts = Counter[int]()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        memory = Buffer(2, "class_balanced", generator)
        for label in range(6):
            feed(memory, numbered([label] * 3))
        assert len(memory) == 2
        counts.update(memory.labels.tolist())
    assert set(counts) == set(range(6))


# ------------------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("policy", POLICIES)
def test_a_restored_memory_goes_on_as_the_first_would(policy: Policy) -> None:
    first, second = buffer(9, policy), buffer(9, policy, seed=99)
    for visit in range(2):
        feed(first, numbered([0, 1] * 15, first=30 * visit, task=visit), visit=visit)
    second.load_state_dict(first.state_dict() | {"images": _copy(first.images), "labels": first.labels.clone()})
    second.tasks, second.views = first.tasks.clone(), first.views.clone()
    second.generator.set_state(first.generator.get_state())
    for memory in (first, second):
        feed(memory, numbered([1, 2] * 20, first=60, task=2), visit=2)
    assert kept(first) == kept(second)
    assert first.labels.tolist() == second.labels.tolist()
    one, two = first.draw(5), second.draw(5)
    assert torch.equal(one.x, two.x)
    assert isinstance(one.t, Tensor)
    assert isinstance(two.t, Tensor)
    assert torch.equal(one.t, two.t)


def _copy(images: Tensor | None) -> Tensor:
    assert images is not None
    return images.clone()


@pytest.mark.parametrize("policy", POLICIES)
def test_samples_are_kept_as_the_learner_sees_them(policy: Policy) -> None:
    """A permuted task's images stay permuted beside the plain ones of the task before; padding stays black."""
    images = torch.randint(1, 256, (6, 1, 2, 2), dtype=torch.uint8)
    swapped = View(PixelMap(torch.tensor([3, 2, 1, 4]), (2, 2), True), None, None)
    plain = tensor_task(images, [0] * 6)
    turned = tensor_task(images, [1] * 6, 1, swapped)
    memory = buffer(12, policy)
    feed(memory, plain)
    feed(memory, turned, visit=1)
    batch = memory.draw(12)
    assert isinstance(batch.t, Tensor)
    flat = images.flatten(1)
    zeros = torch.zeros(6, dtype=torch.uint8)
    seen = {0: flat, 1: torch.stack([flat[:, 3], flat[:, 2], flat[:, 1], zeros], dim=1)}
    for task in (0, 1):
        rows = (batch.x[batch.t == task].flatten(1) * 255).round().to(torch.uint8)
        assert sorted(rows.tolist()) == sorted(seen[task].tolist())
        assert batch.y[batch.t == task].tolist() == [task] * 6


def test_every_sample_gets_its_own_tasks_normalisation() -> None:
    """Pixel 51 is 0.2: (0.2 - 0.1) / 0.5 = 0.2 by one task's statistics, (0.2 - 0.6) / 0.8 = -0.5 by another's."""
    images = torch.full((4, 1, 1, 1), 51, dtype=torch.uint8)

    def task(number: int, mean: float, std: float) -> TensorTask:
        view = View(None, torch.full((1, 1, 1, 1), mean), torch.full((1, 1, 1, 1), std))
        return tensor_task(images, [number] * 4, 0, view)

    memory = buffer(12, "reservoir")
    for number, (mean, std) in enumerate(((0.1, 0.5), (0.6, 0.8), (0.1, 0.5))):
        feed(memory, task(number, mean, std))
    assert len(memory.state_dict()["normalisations"]) == 2
    batch = memory.draw(12)
    for label, value in ((0, 0.2), (1, -0.5), (2, 0.2)):
        torch.testing.assert_close(batch.x[batch.y == label].flatten(), torch.full((4,), value))


def test_a_draw_never_holds_a_sample_twice_and_uses_all_when_few() -> None:
    memory = buffer(10, "reservoir")
    feed(memory, numbered([0] * 6))
    for count in (3, 6, 50):
        x = (memory.draw(count).x.flatten() * 255).round().int().tolist()
        assert len(x) == len(set(x)) == min(count, 6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [1, 3])
def test_every_kept_sample_is_as_likely_to_be_drawn(policy: Policy, count: int) -> None:
    """In 200 draws of 1 or 3 out of 10, each of the ten shows up 200 * count / 10 times, give or take chance."""
    memory, counts = buffer(10, policy), Counter[int]()
    feed(memory, numbered([0] * 10))
    for _ in range(200):
        counts.update((memory.draw(count).x.flatten() * 255).round().int().tolist())
    assert set(counts) == set(range(10))
    assert close_to_uniform([counts[number] for number in range(10)], count / 10, 200)


def test_replayed_samples_are_augmented_anew() -> None:
    """With crops of 1 pixel an image shows up in several positions over many draws; the memory itself never changes."""
    task = tensor_task(torch.eye(3, dtype=torch.uint8).mul(255).view(1, 1, 3, 3), [0])
    task.augment = CropFlip(1)
    memory = buffer(1, "reservoir")
    feed(memory, task)
    before = _copy(memory.images)
    assert len({tuple(memory.draw(1).x.flatten().tolist()) for _ in range(40)}) > 5
    assert torch.equal(_copy(memory.images), before)
