"""Hypernetworks where tasks have no names at test time: what is learned is the same, and the task is inferred."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from clbench.loading import ResidentLoader
from clbench.strategies.evaluation import least_entropy
from strategy_factory import made, synthetic, weights


@pytest.mark.parametrize("name", ["hypernet", "hypernet_structured", "hypernet_lowrank"])
def test_without_names_it_learns_the_same_and_infers_the_task(name: str) -> None:
    """The class-incremental stream has the same images in the same order.

    After every task the generator and heads are the same bit for bit, and the accuracy is what the named tasks give
    when they are inferred.
    """
    named, stream = made(synthetic("task", n_tasks=3, iterations=15), name)
    nameless, other = made(synthetic("class", n_tasks=3, iterations=15), name)
    pairs = zip(stream.benchmark.train_stream, other.benchmark.train_stream, strict=True)
    for number, (one, same) in enumerate(pairs):
        named.train_task(one)
        nameless.train_task(same)
        assert torch.equal(weights(named), weights(nameless))
        for task in range(number + 1):
            inferred = named.inferred(stream.benchmark.test_stream[task], list(range(number + 1)))
            assert nameless.accuracy(other.benchmark.test_stream[task]) == inferred
    assert nameless.classes == [[0, 1], [2, 3], [4, 5]]


def test_an_answer_has_the_logits_of_the_task_inferred_at_its_own_classes() -> None:
    """Classes of other tasks are absent; unseen ones have no logit. Of unequal tasks, each has as many as its own."""
    given, stream = made(synthetic("class", n_tasks=3, classes=[2, 3, 2], iterations=10), "hypernet")
    given.train(list(stream.benchmark.train_stream)[:2])
    given.model.eval()
    x, seen = torch.cat([next(iter(ResidentLoader([test], 20))).x for test in stream.test[:2]]), set()
    for factor in (1.0, 50.0):  # the second makes task 1 surer of everything
        with torch.no_grad():
            for parameter in given.model.head.heads["1"].parameters():
                parameter.mul_(factor)
            answers, own = given.answer(x, 0), [given.model(x, 0), given.model(x, 1)]
        assert answers.shape == (40, 5)
        chosen = least_entropy(own)
        seen |= set(chosen.tolist())
        for row, task in enumerate(chosen.tolist()):
            columns = [[0, 1], [2, 3, 4]][task]
            assert answers[row, columns].equal(own[task][row])
            assert bool((answers[row, [column for column in range(5) if column not in columns]] == -1e4).all())
    assert seen == {0, 1}


def test_domains_without_names_each_have_all_classes() -> None:
    """The same labels in every task: a head each, over both classes, and an answer has two logits."""
    given, stream = made(synthetic("domain", n_tasks=3, iterations=10), "hypernet")
    given.train(list(stream.benchmark.train_stream))
    assert given.classes == [[0, 1]] * 3
    assert [given.model.head.heads[str(task)].out_features for task in range(3)] == [2, 2, 2]
    given.model.eval()
    with torch.no_grad():
        assert given.answer(torch.rand(5, *stream.input_shape), 0).shape == (5, 2)


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_before_any_task_it_answers_over_all_classes(scenario: Any) -> None:
    given, stream = made(synthetic(scenario, n_tasks=3), "hypernet")
    given.model.eval()
    with torch.no_grad():
        answer = given.answer(torch.rand(5, *stream.input_shape), 0)
    assert answer.shape == (5, 2 if scenario == "domain" else 6)
    assert answer.std() > 0


def test_a_plateau_without_names_looks_at_the_tasks_own_classes() -> None:
    """The validation loss is that of the head in training, on labels as it numbers them."""
    schedule = {"kind": "plateau", "factor": 0.5, "patience": 1, "min_lr": 1e-6}
    task = synthetic("class", n_tasks=2, epochs=4, schedule=schedule)
    given, stream = made(task, "hypernet")
    losses: list[float] = []
    validation_loss = given.validation_loss

    def noted(tasks: Any) -> float:
        losses.append(validation_loss(tasks))
        return losses[-1]

    given.validation_loss = noted
    given.train(list(stream.benchmark.train_stream))
    (batch,) = ResidentLoader([stream.train[1]], len(stream.train[1]))
    given.model.eval()
    with torch.no_grad():
        wanted = float(F.cross_entropy(given.model(batch.x, 1), batch.y - 2))
    assert losses[-1] == pytest.approx(wanted, rel=1e-5)
