"""What EWC measures its Fisher on: the net as it answers, and the samples as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clbench.loading import tasks_in
from clbench.specs import MLPModel
from clbench.views import CropFlip
from strategy_factory import made, synthetic

ESTIMATORS = ("exact", "sampled", "empirical", "batched")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dropout_has_no_part_in_the_fisher(estimator: str) -> None:
    """With half of the units dropped at random no two Fishers would agree.

    All three are taken on the same weights and with the strategy's own chance in the same state, whatever mode the net
    was left in; the first is the one that training itself kept.
    """
    net = MLPModel(kind="mlp", hidden=[16], dropout=0.5)
    task = synthetic(n_tasks=1, iterations=5).model_copy(update={"model": net})
    strategy, stream = made(task, "ewc", fisher=estimator, lam=1.0)
    (experience,) = stream.benchmark.train_stream
    states = []
    plain = strategy.after_task

    def watched(experience: Any) -> None:
        states.append((strategy.model.training, strategy.chance.get_state()))
        plain(experience)

    strategy.after_task = watched
    strategy.train_task(experience)
    ((left_training, chance),) = states
    assert left_training
    for mode in (True, False):
        strategy.model.train(mode)
        strategy.chance.set_state(chance)
        again = strategy.fisher(tasks_in(experience.dataset.eval()))
        assert all(torch.equal(value, strategy.importance[name]) for name, value in again.items())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_fisher_is_of_the_samples_themselves_not_of_augmented_ones(
    estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crops and flips belong to training: each of the 5 batches has them, and consolidation would raise."""
    task = synthetic(n_tasks=1, iterations=5)
    task = task.model_copy(update={"stream": task.stream.model_copy(update={"augment": "crop_flip"})})
    strategy, stream = made(task, "ewc", fisher=estimator, lam=1.0)
    plain_batch, plain_after = CropFlip.batch, strategy.after_task
    augmented: list[int] = []
    consolidating = False

    def batch(self: CropFlip, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        assert not consolidating, "the Fisher was asked of augmented samples"
        augmented.append(len(x))
        return plain_batch(self, x, generator)

    def after_task(experience: Any) -> None:
        nonlocal consolidating
        consolidating = True
        plain_after(experience)

    monkeypatch.setattr(CropFlip, "batch", batch)
    strategy.after_task = after_task
    strategy.train_task(stream.benchmark.train_stream[0])
    assert augmented == [32] * 5
    assert consolidating
    assert strategy.importance
