"""GDumb: the greedy sampler by hand, and a learner that knows the memory alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.recipes import load_baseline, resolve
from clbench.specs import Scenario
from clbench.strategies.buffer import Buffer
from clbench.strategies.build import check
from strategy_factory import made, synthetic, tensor_task, weights


def sampler(room: int, seed: int = 0) -> Buffer:
    return Buffer(room, "greedy", torch.Generator().manual_seed(seed))


def feed(memory: Buffer, labels: list[int], first: int = 0) -> None:
    """Offer one-pixel images that show their own number, from `first` on, one at a time."""
    images = torch.arange(first, first + len(labels)).to(torch.uint8).view(-1, 1, 1, 1)
    task = tensor_task(images, labels)
    for number in range(len(labels)):
        memory.offer(task, torch.tensor([number]))


def kept(memory: Buffer) -> dict[int, list[int]]:
    """Return the numbers of the samples kept, by class, sorted."""
    assert memory.images is not None
    found: dict[int, list[int]] = {}
    for image, label in zip(memory.images[: len(memory)], memory.labels[: len(memory)].tolist(), strict=True):
        found.setdefault(label, []).append(int(image))
    return {label: sorted(numbers) for label, numbers in sorted(found.items())}


# ---------------------------------------------------------------------------------------------------------- the sampler


def test_the_first_samples_of_a_class_stay_and_later_ones_are_passed_over() -> None:
    """Room 4, one class: its share is 4, so samples 0 to 3 stay, and no other ever comes in."""
    memory = sampler(4)
    feed(memory, [0] * 9)
    assert kept(memory) == {0: [0, 1, 2, 3]}


def test_a_class_that_comes_late_takes_its_share_from_the_largest() -> None:
    """Room 6. Six of class 0; then class 1 has a share of 3 and takes three random places; its fourth is passed over.

    Then class 2 has a share of 2: two of its three samples come in, for one of class 0 and one of class 1.
    """
    memory = sampler(6)
    feed(memory, [0] * 8)
    assert kept(memory) == {0: [0, 1, 2, 3, 4, 5]}
    feed(memory, [1] * 4, first=10)
    held = kept(memory)
    assert held[1] == [10, 11, 12]
    assert len(held[0]) == 3
    assert set(held[0]) < set(range(6))
    feed(memory, [2] * 3, first=20)
    after = kept(memory)
    assert after[2] == [20, 21]
    assert [len(after[label]) for label in (0, 1)] == [2, 2]
    assert set(after[0]) < set(held[0])
    assert set(after[1]) < set(held[1])


def test_a_share_is_no_whole_number() -> None:
    """Room 10, three classes: 3 < 10 / 3 samples may have a fourth, at a largest class's cost, but 4 no fifth.

    Ten of class 0, then six of class 1 bring 5 and 5. Class 2 takes places in turn: 4, 4 and 2; a third from one of the
    two, 3 and 4; its fourth comes in, too, as 3 < 3.33: the 4 gives one away. Then nobody is below a share.
    """
    memory = sampler(10)
    feed(memory, [0] * 10)
    feed(memory, [1] * 6, first=20)
    assert Counter(memory.labels.tolist()) == {0: 5, 1: 5}
    feed(memory, [2] * 6, first=40)
    assert Counter(memory.labels.tolist()) == {0: 3, 1: 3, 2: 4}
    assert kept(memory)[2] == [40, 41, 42, 43]


def test_places_that_are_free_are_not_for_a_class_with_its_share() -> None:
    """Room 6, two classes from the start: three each. The last two of class 0 find two places free, and no way in."""
    memory = sampler(6)
    feed(memory, [0, 1, 0, 0, 0, 0])
    assert kept(memory) == {0: [0, 2, 3], 1: [1]}
    feed(memory, [1] * 4, first=10)
    assert kept(memory) == {0: [0, 2, 3], 1: [1, 10, 11]}


def test_who_goes_is_random_within_the_largest_class() -> None:
    """Room 4 of class 0, then one of class 1: over 400 runs each of the four goes about 100 times."""
    gone = Counter[int]()
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        memory = Buffer(4, "greedy", generator)
        feed(memory, [0] * 4)
        feed(memory, [1], first=9)
        gone.update({0, 1, 2, 3} - set(kept(memory)[0]))
    assert set(gone) == {0, 1, 2, 3}
    assert min(gone.values()) > 60


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_all_classes_of_all_tasks_have_the_same_share(scenario: Scenario) -> None:
    """24 places after three tasks of two labels: 4 for each of six classes; a task that comes again changes nothing."""
    strategy, stream = made(synthetic(scenario, n_tasks=3), "gdumb", buffer=24)
    strategy.train(list(stream.benchmark.train_stream))
    memory = strategy.memory
    for again in (None, stream.benchmark.train_stream[0]):
        if again is not None:
            strategy.train_task(again)
        held = Counter(zip(memory.tasks.tolist(), memory.labels.tolist(), strict=True))
        assert sorted(held.values()) == [4] * 6


def test_where_no_class_is_new_nothing_would_be_kept_so_it_is_refused() -> None:
    with pytest.raises(UserError, match="is not defined in the domain-incremental"):
        check(resolve(synthetic("domain"), load_baseline("gdumb")))


# ---------------------------------------------------------------------------------------------------------- the learner


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_the_learner_starts_from_scratch_on_the_memory_alone(scenario: Scenario) -> None:
    """After two tasks its weights are those of a net that never saw anything but the memory's samples."""
    strategy, stream = made(synthetic(scenario, n_tasks=2), "gdumb", buffer=40)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    chances: list[torch.Tensor] = []
    fit = strategy.fit

    def noted(tasks: Any, order: torch.Generator) -> None:
        chances.append(order.get_state())
        fit(tasks, order)

    strategy.fit = noted
    strategy.train_task(second)

    fresh, _ = made(synthetic(scenario, n_tasks=2), "finetune")
    for experience in (first, second):
        fresh.model.observe(int(experience.task_label), list(experience.classes_in_this_experience))
    fresh.refresh_optimizer()
    fresh.fit(strategy.memory.beside(0), torch.Generator().set_state(chances[0]))
    assert torch.equal(weights(strategy), weights(fresh))


def test_more_memory_is_more_accuracy() -> None:
    found = []
    for room in (6, 200):
        strategy, stream = made(synthetic("class", n_tasks=3), "gdumb", buffer=room)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(sum(strategy.accuracy(test) for test in stream.benchmark.test_stream) / 3)
    assert found[1] > found[0] + 0.05
    assert found[1] > 0.8


def test_only_what_is_in_the_memory_went_through_training() -> None:
    """Two epochs over 24 kept samples after each of two tasks: 96, whatever the tasks' size."""
    strategy, stream = made(synthetic("class", n_tasks=2, epochs=2), "gdumb", buffer=24)
    strategy.train(list(stream.benchmark.train_stream))
    assert strategy.samples_trained == 96


def test_what_is_kept_is_counted_to_the_byte() -> None:
    strategy, stream = made(synthetic("class", n_tasks=2), "gdumb", buffer=32)
    strategy.train(list(stream.benchmark.train_stream))
    counted = footprint(strategy.holdings())
    assert counted.replay_samples == 32
    assert counted.replay_bytes == 32 * (64 + 16 + 1)
    assert counted.keep_learning_bytes == counted.parameter_bytes + counted.replay_bytes


def test_the_learners_optimiser_knows_nothing_of_the_learner_before() -> None:
    """Where a budget lets optimisers live on, as GDumb's own does not: another net has another one."""
    strategy, stream = made(synthetic("class", n_tasks=2, reset_optimizer=False), "gdumb", buffer=40)
    strategy.train(list(stream.benchmark.train_stream))
    optimised = [parameter for group in strategy.optimizer.param_groups for parameter in group["params"]]
    assert list(map(id, optimised)) == list(map(id, strategy.model.parameters()))
