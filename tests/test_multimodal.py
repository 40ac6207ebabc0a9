"""Multimodal nets: whose input layer is whose, and what is common."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.recipes import load_baseline, resolve
from clbench.specs import NormedMLPModel, Scenario
from clbench.strategies.build import check
from strategy_factory import made, synthetic, weights


def layers(strategy: Any) -> dict[int, Tensor]:
    """Return every task's input layer as one vector, a copy."""
    return {
        task: torch.cat([value.detach().flatten().clone() for value in layer.parameters()])
        for task, layer in strategy.inputs.items()
    }


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_on_one_task_it_is_finetuning(scenario: Scenario) -> None:
    found = []
    for baseline in ("finetune", "multimodal"):
        strategy, stream = made(synthetic(scenario, n_tasks=1), baseline)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    assert torch.equal(*found)


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_a_task_trains_its_own_input_layer_and_the_common_ones(scenario: Scenario) -> None:
    strategy, stream = made(synthetic(scenario, n_tasks=2), "multimodal")
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    before, common = layers(strategy), strategy.model.trunk.layer(0)
    assert common is strategy.inputs[0]
    deeper = torch.cat([value.detach().flatten() for value in strategy.model.head.parameters()])
    strategy.train_task(second)
    after = layers(strategy)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], after[0])
    now = torch.cat([value.detach().flatten() for value in strategy.model.head.parameters()])
    assert torch.equal(now[: len(deeper)], deeper) == (scenario == "task"), "a head per task, or one for all"


def test_every_task_is_answered_through_its_own_input_layer() -> None:
    """Domain-incremental: the answer to the first task is that of its layer in front of what is common now."""
    strategy, stream = made(synthetic("domain", n_tasks=2), "multimodal")
    strategy.train(list(stream.benchmark.train_stream))
    test = stream.test[0]
    strategy.model.trunk.set_submodule(strategy.model.trunk.chain[0], strategy.inputs[0])
    strategy.model.eval()
    right = strategy.model(test.inputs(torch.arange(len(test))), 0).argmax(1) == test.labels
    strategy.model.trunk.set_submodule(strategy.model.trunk.chain[0], strategy.inputs[1])
    assert strategy.accuracy(stream.benchmark.test_stream[0]) == pytest.approx(float(right.float().mean()))
    assert strategy.model.trunk.layer(0) is strategy.inputs[1]


def test_each_task_adds_one_input_layer() -> None:
    """64 pixels to 32 units: 64 * 32 + 32 = 2,080 parameters a task."""
    strategy, stream = made(synthetic("domain", n_tasks=3), "multimodal")
    counts = []
    for experience in stream.benchmark.train_stream:
        strategy.train_task(experience)
        counted = footprint(strategy.holdings())
        assert counted.parameters_per_task == 2080 * len(strategy.inputs)
        counts.append(counted.parameters)
    assert [after - before for before, after in pairwise(counts)] == [2080, 2080]


def test_it_keeps_more_of_the_past_than_finetuning() -> None:
    found = {}
    for baseline in ("finetune", "multimodal"):
        strategy, stream = made(synthetic("domain", n_tasks=4), baseline)
        strategy.train(list(stream.benchmark.train_stream))
        found[baseline] = sum(strategy.accuracy(test) for test in list(stream.benchmark.test_stream)[:3]) / 3
    assert found["multimodal"] > found["finetune"]


def test_a_net_that_is_no_chain_is_refused() -> None:
    task = synthetic("domain").model_copy(update={"model": NormedMLPModel(kind="normed_mlp", hidden=[8])})
    with pytest.raises(UserError, match="a chain of layers; the normed_mlp"):
        check(resolve(task, load_baseline("multimodal")))
