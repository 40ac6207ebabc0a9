"""Naive rehearsal: what a pass goes over, how the room is shared, and where it is finetuning."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from clbench.footprint import footprint
from clbench.specs import Scenario
from clbench.views import CropFlip
from strategy_factory import made, synthetic, weights


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_the_first_task_is_finetunings_to_the_bit(scenario: Scenario) -> None:
    """There is nothing to rehearse yet."""
    found = []
    for baseline in ("finetune", "rehearsal"):
        strategy, stream = made(synthetic(scenario, n_tasks=1, epochs=2), baseline)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    assert torch.equal(*found)


def test_a_pass_holds_the_memory_as_often_as_it_fits_into_the_task() -> None:
    """400 new samples; 32 kept, 12 times in 400, make 784 a pass. A memory of 600 is there once: 800 a pass."""
    for room, kept, times in ((32, 32, 12), (600, 400, 1)):
        strategy, stream = made(synthetic("domain", n_tasks=2), "rehearsal", buffer=room)
        first, second = stream.benchmark.train_stream
        assert sum(map(len, strategy.training_data(first))) == 400
        strategy.train_task(first)
        tasks = strategy.training_data(second)
        assert [len(task) for task in tasks] == [400, kept * times]
        images = Counter(image.numpy().tobytes() for image in tasks[1].stored(torch.arange(len(tasks[1]))))
        assert set(images.values()) == {times}
        assert len(images) == kept


def test_a_task_in_epochs_takes_steps_for_what_is_rehearsed() -> None:
    """3 epochs in batches of 32: 3 * 400 samples for the first task, 3 * (400 + 12 * 32) for the second."""
    strategy, stream = made(synthetic("domain", n_tasks=2, epochs=3), "rehearsal", buffer=32)
    trained = []
    for experience in stream.benchmark.train_stream:
        strategy.train_task(experience)
        trained.append(strategy.samples_trained)
    assert trained == [1200, 1200 + 3 * 784]


def test_old_samples_are_the_very_inputs_and_labels_of_their_tasks() -> None:
    """Task-incremental: a batch of the memory's tasks is, sample by sample, one of the stream's."""
    strategy, stream = made(synthetic("task", n_tasks=3), "rehearsal", buffer=40)
    strategy.train(list(stream.benchmark.train_stream)[:2])
    for task in strategy.training_data(stream.benchmark.train_stream[2])[1:]:
        source = stream.train[task.task]
        rows = torch.arange(len(source))
        known = {(x.numpy().tobytes(), int(y)) for x, y in zip(source.inputs(rows), source.labels, strict=True)}
        index = torch.arange(len(task))
        assert {(x.numpy().tobytes(), int(y)) for x, y in zip(task.inputs(index), task.labels, strict=True)} <= known


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_the_room_is_shared_by_all_tasks_so_far(scenario: Scenario) -> None:
    """24 places: 24 of the first task, 12 and 12, 8 of each of three: 4 of each class of each."""
    strategy, stream = made(synthetic(scenario, n_tasks=3), "rehearsal", buffer=24)
    for done, experience in enumerate(stream.benchmark.train_stream, 1):
        strategy.train_task(experience)
        held = [strategy.memory.labels[places].tolist() for places in strategy.memory.visits().values()]
        assert [sorted(Counter(labels).values()) for labels in held] == [[12 // done] * 2] * done


def test_it_keeps_what_finetuning_forgets() -> None:
    """Class-incremental: without old samples the old classes get no answer any more."""
    first = {}
    for baseline in ("finetune", "rehearsal"):
        strategy, stream = made(synthetic("class", n_tasks=3), baseline)
        strategy.train(list(stream.benchmark.train_stream))
        first[baseline] = strategy.accuracy(stream.benchmark.test_stream[0])
    assert first["finetune"] < 0.2
    assert first["rehearsal"] > 0.7


def test_what_is_kept_is_counted_to_the_byte() -> None:
    strategy, stream = made(synthetic("domain", n_tasks=2), "rehearsal", buffer=32)
    strategy.train(list(stream.benchmark.train_stream))
    counted = footprint(strategy.holdings())
    assert counted.replay_samples == 32
    assert counted.replay_bytes == 32 * (64 + 16 + 1)
    assert counted.keep_learning_bytes == counted.parameter_bytes + counted.replay_bytes


@pytest.mark.parametrize("baseline", ["rehearsal", "icarl"])
def test_old_samples_are_augmented_like_new_ones_also_after_a_restart(baseline: str) -> None:
    """Class-incremental with crops and flips: what is trained on beside the second task goes through them, too."""
    task = synthetic("class", n_tasks=2)
    task = task.model_copy(update={"stream": task.stream.model_copy(update={"augment": "crop_flip"})})
    strategy, stream = made(task, baseline, buffer=40)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    later, _ = made(task, baseline, buffer=40)
    later.load_state_dict(strategy.state_dict(), [first])
    for one in (strategy, later):
        one.begin_task(second)
        one.before_task(second)
        assert [task.augment for task in one.training_data(second)] == [CropFlip(), CropFlip()]
