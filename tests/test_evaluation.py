"""What a run's accuracies are of: unseen samples, the net of the moment, as it answers; and what trains it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench import data
from clbench.loading import Batch
from clbench.nets import HeadedNet
from clbench.runner import run
from clbench.seeds import derive
from clbench.specs import MLPModel
from clbench.strategies.base import Strategy, mean_loss
from strategy_factory import made, recipe, synthetic, tensor_task

SYNTHETIC = data.load("synthetic")


class Watched(Strategy):
    """Finetuning that keeps a copy of its net after every task, and what it was trained on."""

    nets: list[HeadedNet]
    trained: list[tuple[Tensor, Tensor]]

    def after_task(self, experience: Any) -> None:
        if self.tasks_seen == 0:
            type(self).nets, type(self).trained = [], []
        samples = [(x, int(y)) for x, y, *_ in experience.dataset]
        self.trained.append((torch.stack([x for x, _ in samples]), torch.tensor([y for _, y in samples])))
        self.nets.append(copy.deepcopy(self.model))


def share(net: HeadedNet, x: Tensor, y: Tensor) -> float:
    """Return the share of samples answered rightly, by a forward pass of nobody else's code."""
    net.eval()
    with torch.no_grad():
        return float((net(x, 0).argmax(dim=1) == y).double().mean())


def test_entry_i_j_is_the_accuracy_of_the_net_after_task_i_on_the_unseen_samples_of_task_j() -> None:
    """Eight samples a task are learned by heart: always right on those, not on the test images of the data set.

    Half of the units are dropped in training, none when the net answers. Task j holds classes 2j and 2j + 1 as 0 and 1.
    """
    task = synthetic("domain", n_tasks=3, iterations=120)
    task = task.model_copy(
        update={
            "stream": task.stream.model_copy(update={"train_samples_per_task": 8}),
            "model": MLPModel(kind="mlp", hidden=[32], dropout=0.5),
        }
    )
    record = run(task, recipe(f"{__name__}:Watched"), 0)
    assert record.status == "done", record.traceback
    expected = []
    for index, net in enumerate(Watched.nets):
        row = []
        for j in range(3):
            mine = SYNTHETIC.y_test // 2 == j
            row.append(share(net, SYNTHETIC.x_test[mine].float() / 255, SYNTHETIC.y_test[mine] - 2 * j))
        expected.append(row)
        x, y = Watched.trained[index]
        assert len(y) == 8
        assert share(net, x, y) == 1.0
    assert record.acc == [pytest.approx(row) for row in expected]
    assert min(expected[index][index] for index in range(3)) < 1.0
    assert len({tuple(row) for row in expected}) == 3


@pytest.mark.parametrize("baseline", ["finetune", "joint", "er", "ewc"])
def test_no_sample_set_aside_is_ever_trained_on(baseline: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every image that goes through a step of 2 epochs, replayed ones included, is among the 300 of 400 left to train.

    The plateau schedule asks for the loss on the other 100, in between: that is all they are for.
    """
    schedule = {"kind": "plateau", "factor": 0.5, "patience": 9, "min_lr": 1e-9}
    task = synthetic("domain", n_tasks=2, epochs=2, schedule=schedule)
    task = task.model_copy(update={"stream": task.stream.model_copy(update={"validation": 0.25})})
    overrides: dict[str, Any] = {"lam": 1.0} if baseline == "ewc" else {}
    strategy, stream = made(task, baseline, **overrides)
    plain: Callable[[Strategy, Batch], Batch] = type(strategy).rehearse
    stepped: set[bytes] = set()

    def rehearse(self: Strategy, batch: Batch) -> Batch:
        joined = plain(self, batch)
        stepped.update(images(joined.x))
        return joined

    monkeypatch.setattr(type(strategy), "rehearse", rehearse)
    strategy.train(list(stream.benchmark.train_stream))
    train, aside = (
        {image for task in tasks for image in images(task.inputs(torch.arange(len(task))))}
        for tasks in (stream.train, stream.validation)
    )
    assert (len(train), len(aside)) == (600, 200)
    assert stepped == train
    assert not stepped & aside


def images(x: Tensor) -> list[bytes]:
    """Return what tells images apart: their pixels."""
    return [image.numpy().tobytes() for image in x]


def test_the_validation_loss_is_that_of_the_net_as_it_answers() -> None:
    """Every input x is 255 / 255 = 1. In training the net's z = (x, 0) has x dropped or doubled.

    As it answers, z = (1, 0), so that label 0 loses log(1 + e^-1) and label 1 log(1 + e): over both, the mean. A second
    call agrees to the bit, and training goes on in training mode where it was, in evaluation mode where that was.
    """

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.frozen = nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, x: Tensor, t: int) -> Tensor:
            kept = self.dropout(x.flatten(1))
            return torch.cat([kept, torch.zeros_like(kept)], dim=1)

    net = Dropping().train()
    net.frozen.eval()
    task = tensor_task(torch.full((50, 1, 1, 1), 255, dtype=torch.uint8), [0, 1] * 25)
    losses = [mean_loss(net, [task], 7) for _ in range(2)]
    e = torch.tensor(1.0).exp()
    assert losses[0] == losses[1] == pytest.approx(float(((1 + 1 / e).log() + (1 + e).log()) / 2))
    assert (net.training, net.dropout.training, net.frozen.training) == (True, True, False)


@pytest.mark.parametrize("seed", [0, 1])
def test_order_and_chance_of_a_strategy_are_seeded_apart(seed: int) -> None:
    """Each from the run's seed by its own name: a method that draws from one learns nothing of the other."""
    strategy, _ = made(synthetic(n_tasks=1), "er", seed)
    order, chance = strategy.order.initial_seed(), strategy.chance.initial_seed()
    assert (order, chance) == (derive(seed, "order"), derive(seed, "strategy"))
    assert order != chance
    shuffles = [torch.randperm(100, generator=generator).tolist() for generator in (strategy.order, strategy.chance)]
    assert shuffles[0] != shuffles[1]
