"""Cloned nets: the extremes are fine-tuning, frozen features and one net per task; a frozen base forgets nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.nets import build_trunk
from clbench.specs import MLPModel, ResNet18Model, TaskSpec
from clbench.strategies.cloned import early
from strategy_factory import made, synthetic

SETTLED: dict[str, Any] = {
    "optimizer": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "reset_optimizer": False
}  # fmt: skip
"""Momentum and decay that outlive a task move whatever still has a gradient."""


def stream(net: str = "mlp", **changes: Any) -> TaskSpec:
    task = synthetic(**{"n_tasks": 3, "iterations": 4 if net == "mlp" else 2, "batch_size": 16, **changes})
    model = MLPModel(kind="mlp", hidden=[8, 6]) if net == "mlp" else ResNet18Model(kind="resnet18", width=2)
    return task.model_copy(update={"model": model})


def logits(strategy: Any, tasks: Any, number: int) -> Tensor:
    """Return the logits of the first 16 test images of a task; the strategy is as it was, but in evaluation mode."""
    dataset = tasks.benchmark.test_stream[number].dataset
    x = torch.stack([dataset[i][0] for i in range(16)])
    strategy.model.eval()
    strategy.oracle = number
    with torch.no_grad():
        found: Tensor = strategy.answer(x, number)
    return found


def rows(task: TaskSpec, baseline: str, again: bool = True, **settings: Any) -> list[list[Tensor]]:
    """Return the logits of every task after each task, with the first task once more at the end."""
    strategy, tasks = made(task, baseline, **settings)
    train = list(tasks.benchmark.train_stream)
    found = []
    for experience in [*train, train[0]] if again else train:
        strategy.train_task(experience)
        found.append([logits(strategy, tasks, number) for number in range(len(train))])
        if hasattr(strategy.model, "forget_newborn"):
            strategy.model.forget_newborn()
    return found


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    return all(torch.equal(x, y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


# ------------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("net", ["mlp", "resnet18"])
@pytest.mark.parametrize("budget", [{}, SETTLED], ids=["adam", "sgd that lives on"])
def test_all_in_common_is_finetuning_to_the_bit(net: str, budget: dict[str, Any]) -> None:
    """Running statistics included: they belong to norms that are common."""
    task = stream(net, **budget)
    assert same(rows(task, "cloned", share="all", base="trains"), rows(task, "finetune"))


@pytest.mark.parametrize("net", ["mlp", "resnet18"])
def test_all_in_common_and_frozen_is_frozen_features_to_the_bit(net: str) -> None:
    task = stream(net, **SETTLED)
    assert same(rows(task, "cloned", share="all", base="frozen"), rows(task, "frozen"))


@pytest.mark.parametrize("net", ["mlp", "resnet18"])
@pytest.mark.parametrize("base", ["trains", "frozen"])
def test_nothing_in_common_is_one_net_per_task_to_the_bit(net: str, base: str) -> None:
    task = stream(net)
    assert same(rows(task, "cloned", share="none", base=base), rows(task, "independent"))


def test_nothing_in_common_begun_at_the_last_forgets_nothing_and_begins_as_finetuning() -> None:
    """Two tasks: the first is answered as after itself, the second as fine-tuning answers it; trunks are copies."""
    task = stream("resnet18", n_tasks=2)
    own = rows(task, "cloned", again=False, share="none", begins="last")
    tuned = rows(task, "finetune", again=False)
    assert torch.equal(own[1][0], own[0][0])
    assert torch.equal(own[1][1], tuned[1][1])


# ------------------------------------------------------------------------------------------------------ zero forgetting


@pytest.mark.parametrize("net", ["mlp", "resnet18"])
@pytest.mark.parametrize(
    ("share", "adapter"), [("early", 0), ("matrices", 0), ("matrices", 2), ("all", 2), (["*.bias"], 0)], ids=str
)
def test_with_a_frozen_base_no_answer_changes_to_the_bit(net: str, share: Any, adapter: int) -> None:
    """Task k's logits after task k are those after every later task, under momentum and decay that live on.

    The first task seen again changes its own answers alone.
    """
    found = rows(stream(net, **SETTLED), "cloned", share=share, adapter=adapter)
    for k in range(3):
        assert all(torch.equal(row[k], found[k][k]) for row in (found[k:] if k else found[:3]))
    assert not torch.equal(found[3][0], found[2][0])


def test_a_base_that_trains_forgets() -> None:
    found = rows(stream(**SETTLED), "cloned", share="matrices", base="trains")
    assert not torch.equal(found[2][0], found[0][0])


def test_a_frozen_base_has_no_gradient_and_no_state_in_the_optimiser() -> None:
    """Common are the two matrices; what learns is each task's biases, adapters and head."""
    strategy, tasks = made(stream(**SETTLED), "cloned", adapter=2)
    strategy.train(list(tasks.benchmark.train_stream))
    names = {"trunk.layers.0.weight", "trunk.layers.1.weight"}
    assert {name for name, value in strategy.model.named_parameters() if not value.requires_grad} == names
    held = {id(value) for value in strategy.optimizer.state}
    assert not held & {id(strategy.model.get_parameter(name)) for name in names}


# ------------------------------------------------------------------------------------------------------------- settings


def test_the_early_layers_are_the_first_half_rounded_up() -> None:
    assert early(build_trunk("mlp", (1, 8, 8), hidden=[4, 4])) == ["layers.0.weight", "layers.0.bias"]
    assert early(build_trunk("mlp", (1, 8, 8), hidden=[4])) == ["layers.0.weight", "layers.0.bias"]
    zenke = early(build_trunk("zenke", (3, 16, 16), channels=(2, 2), hidden=4))
    assert [name for name in zenke if name.endswith("weight")] == ["conv1.weight", "conv2.weight", "conv3.weight"]


@pytest.mark.parametrize(
    ("share", "adapter", "common"),
    [
        ("none", 0, 0),
        ("early", 0, 520),
        ("matrices", 0, 560),
        ("matrices", 2, 560),
        ("all", 0, 574),
        (["layers.0.weight"], 0, 512),
    ],
    ids=str,
)
def test_every_rung_costs_what_it_says(share: Any, adapter: int, common: int) -> None:
    """MLP 64-8-6 with heads of 2: 64 * 8 + 8 = 520, 8 * 6 + 6 = 54, and a head 6 * 2 + 2 = 14, 588 in all.

    Matrices 512 + 48 = 560. A task's own are 588 less what is common, its head among them. Adapters of rank 2 for the
    second and third task: 2 * (64 + 8) + 2 * (8 + 6) = 172 each.
    """
    strategy, tasks = made(stream(iterations=1), "cloned", share=share, adapter=adapter)
    strategy.train(list(tasks.benchmark.train_stream))
    counted = footprint(strategy.holdings())
    assert counted.parameters_shared == common
    assert counted.parameters_per_task == 3 * (588 - common) + (344 if adapter else 0)
    assert counted.answer_bytes == counted.keep_learning_bytes == 4 * counted.parameters


def test_the_uses_say_that_running_statistics_are_each_tasks_own() -> None:
    strategy, tasks = made(stream("resnet18", iterations=1), "cloned")
    strategy.train(list(tasks.benchmark.train_stream))
    model, uses = strategy.model, strategy.uses()
    assert sorted(uses) == [0, 1, 2]
    for task, used in uses.items():
        held = {id(use.tensor) for use in used}
        assert id(model.trunk.get_parameter("conv.weight")) in held
        for other in uses:
            mean = model.part(other).get_submodule("trunk").get_buffer("norm.running_mean")
            assert (id(mean) in held) == (task == other)


def test_what_a_new_task_draws_depends_on_the_seed_and_the_task_alone() -> None:
    """Adapters of task 2 are the same whether or not task 1 came between."""
    found = []
    for order in ([0, 1, 2], [0, 2]):
        strategy, tasks = made(stream(), "cloned", adapter=1)
        train = list(tasks.benchmark.train_stream)
        strategy.train([train[number] for number in order[:-1]])
        strategy.begin_task(train[2])
        found.append(strategy.model.part(2).get_submodule("adapters").state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"share": "matrix"}, "strategy Cloned: setting 'share': no rung 'matrix'. Did you mean 'matrices'? It is "),
        ({"share": ["layer.0.bias"]}, "strategy Cloned: no parameter is named 'layer.0.bias'. Did you mean 'layers.0."),
        ({"share": "none", "adapter": 1}, "strategy Cloned: adapters are added to shared matrices, and none is shared"),
        ({"adapter": -1}, "baseline 'cloned' on task 'synthetic_split': setting 'adapter': input should be greater"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        made(stream(), "cloned", **settings)
    (told,) = caught.value.lines
    assert told.startswith(line)


def test_a_net_with_views_is_refused_before_anything_is_trained() -> None:
    strategy, _ = made(stream(), "cloned")
    build = strategy.setup.new_net

    def viewed() -> Any:
        net = build()
        net.trunk.layers[1].bias = nn.Parameter(net.trunk.layers[0].bias.data[:6])
        return net

    object.__setattr__(strategy.setup, "new_net", viewed)
    with pytest.raises(UserError, match=r"strategy Cloned: layers\.0\.bias, layers\.1\.bias are views of the same"):
        type(strategy)(setup=strategy.setup, config=strategy.config)
