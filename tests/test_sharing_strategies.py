"""What strategies say of which task uses what: counted by hand, and in agreement with the footprint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from clbench.footprint import Holdings, footprint
from clbench.nets.shared.masks import pack_bits
from clbench.records import Footprint, Sharing
from clbench.runner import run
from clbench.sharing import Use, sharing
from clbench.specs import BaselineSpec
from strategy_factory import AVALANCHES, made, synthetic


def learned(
    baseline: str | BaselineSpec,
    scenario: Any = "task",
    n_tasks: int = 3,
    order: Sequence[int] | None = None,
    **overrides: Any,
) -> tuple[Any, Sharing, Footprint]:
    """Return a strategy after a few steps on each task, in order or another, what tasks share, and its footprint."""
    strategy, stream = made(synthetic(scenario, n_tasks=n_tasks, iterations=2), baseline, **overrides)
    experiences = list(stream.benchmark.train_stream)
    for i in range(n_tasks) if order is None else order:
        strategy.train_task(experiences[i])
    holdings = strategy.holdings()
    return strategy, sharing(strategy.uses(), dict(holdings.model.named_parameters())), footprint(holdings)


def bytes_of(found: Sharing) -> int:
    return found.shared_by_all_bytes + found.shared_by_some_bytes + found.private_bytes


@pytest.mark.parametrize("baseline", ["finetune", "frozen", "ewc", "er", "joint", "si", AVALANCHES])
def test_one_net_with_a_head_per_task_shares_all_but_the_heads(baseline: str | BaselineSpec) -> None:
    """Trunk for all, heads for one each; of P in the net and H in a head, P / (P + H) in common. All bytes answer."""
    _, found, kept = learned(baseline)
    head = kept.parameters_per_task // 3
    assert (found.shared_by_all, found.shared_by_some, found.private) == (kept.parameters_shared, 0, 3 * head)
    assert found.in_common == pytest.approx(kept.parameters_shared / (kept.parameters_shared + head))
    assert [task.marginal_parameters for task in found.tasks[1:]] == [head, head]
    assert found.unused == 0
    assert bytes_of(found) == kept.answer_bytes


@pytest.mark.parametrize("scenario", ["domain", "class"])
@pytest.mark.parametrize("baseline", ["finetune", "lwf", AVALANCHES])
def test_where_no_task_has_parts_of_its_own_every_task_uses_everything(
    baseline: str | BaselineSpec, scenario: str
) -> None:
    _, found, kept = learned(baseline, scenario)
    assert (found.shared_by_all, found.in_common, found.reuse_ratio) == (kept.parameters, 1, 3)
    assert [task.task for task in found.tasks] == [0, 1, 2]
    assert [task.marginal_parameters for task in found.tasks] == [kept.parameters, 0, 0]


def test_a_net_per_task_shares_nothing() -> None:
    _, found, kept = learned("independent")
    assert (found.private, found.in_common, found.reuse_ratio) == (kept.parameters, 0, 1)
    assert bytes_of(found) == kept.answer_bytes
    assert [row.shares for row in found.map] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("baseline", ["finetune", "independent", "progressive", "packnet"])
def test_tasks_learned_out_of_order_stand_in_the_order_they_were_learned(baseline: str) -> None:
    """Of tasks 2, 0, 1 the second is 2's follower: with the marginals of a run in order, whatever the labels are.

    All tasks have as many classes, so that sizes do not depend on which task it is, only on when it is learned.
    """
    found, usual = learned(baseline, order=(2, 0, 1))[1], learned(baseline)[1]
    assert [task.task for task in usual.tasks] == [0, 1, 2]
    assert [task.task for task in found.tasks] == [2, 0, 1]
    assert [(task.parameters, task.marginal_parameters) for task in found.tasks] == [
        (task.parameters, task.marginal_parameters) for task in usual.tasks
    ]
    own = [row.shares for row in found.map if row.tensors > 1]
    assert own == [row.shares for row in usual.map if row.tensors > 1]


def test_columns_are_read_by_every_later_task_but_for_their_outputs() -> None:
    """Column 1's body serves all 3 tasks, column 2's two; what else there is has one task. Nothing is left over."""
    strategy, found, kept = learned("progressive")
    columns = list(strategy.model)
    bodies = [sum(parameter.numel() for parameter in column.body()) for column in columns]
    assert (found.shared_by_all, found.shared_by_some) == (bodies[0], bodies[1])
    assert found.private == kept.parameters - bodies[0] - bodies[1]
    assert found.private == kept.parameters_per_task
    assert bytes_of(found) == kept.answer_bytes
    apart = learned("progressive", lateral="none")[1]
    assert apart.in_common == 0


def test_sigma_is_for_all_and_what_a_group_shares_for_its_tasks() -> None:
    """Two of three tasks in a group of layer 0: its tau~ serves those two, as big as sigma; another layer has none."""
    strategy, _, _ = learned("apd")
    net = strategy.net
    for i in range(len(net.layers())):
        net.consolidate(i, [], beta=0.0)
    net.consolidate(0, [[0, 2]], beta=1e9)
    found = sharing(strategy.uses(), dict(net.named_parameters()))
    sigma = [layer.weight.numel() for layer in net.layers()]
    assert (found.shared_by_all, found.shared_by_some, found.unused) == (sum(sigma), sigma[0], 0)
    (row,) = [row for row in found.map if row.name.startswith("local")]
    assert row.shares == [1, 0, 1]


def test_a_task_of_an_expanding_net_uses_the_weights_between_units_that_it_reaches() -> None:
    """Task 0's head ignores the last unit that it sees; deeper layers ignore three of the units below them.

    With r units reached of a layer, n inputs reached below it: r n weights and r biases. The first sees all pixels.
    """
    strategy, _, _ = learned("den", n_tasks=2)
    net = strategy.model
    with torch.no_grad():
        for layer in net.layers():
            layer.weight.fill_(1.0)
        net.head(0).weight.fill_(1.0)[:, -1] = 0
        for layer in net.layers()[1:]:
            layer.weight[:, : 3 * layer.weight.shape[1] // net.widths()[0]] = 0
    masks = {id(use.tensor): use.mask for use in strategy.uses()[0]}
    reached = [int(units.sum()) for units in net.reached(0)]
    for i, layer in enumerate(net.layers()):
        columns = layer.weight[0].numel() if i == 0 else reached[i - 1] * (layer.weight.shape[1] // net.widths()[i - 1])
        mask = masks[id(layer.get_parameter("weight"))]
        assert mask is not None
        assert int(mask.sum()) == reached[i] * columns
        bias = masks[id(layer.get_parameter("bias"))]
        assert bias is not None
        assert int(bias.sum()) == reached[i]
    assert reached[-1] < net.widths()[-1]


def test_where_a_tuned_copy_answers_the_net_that_it_was_copied_from_serves_no_task() -> None:
    """Of two nets of P parameters only the copy's are used, and of these what tasks reach: 2 P in all."""
    strategy, found, kept = learned("den_finetune")
    assert kept.parameters == sum(parameter.numel() for parameter in strategy.tuned.parameters())
    assert found.parameters_used + found.unused == 2 * kept.parameters
    assert found.unused >= kept.parameters


def test_a_record_has_what_the_tasks_share_after_the_last() -> None:
    record = run(synthetic(n_tasks=3, iterations=2), "finetune")
    assert record.sharing is not None
    assert [task.task for task in record.sharing.tasks] == [0, 1, 2]
    assert record.sharing.parameters_used == record.footprints[-1].parameters


# --------------------------------------------------------------------------------------------------- and the footprint


class Tied(nn.Module):
    """Two layers on one weight, a view of a third, and the bits of a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.b.weight = self.a.weight
        self.view = nn.Parameter(self.c.weight.detach()[:2])
        self.register_buffer("bits", pack_bits(torch.ones(4, 5, dtype=torch.bool)))


def test_the_footprint_of_tied_viewed_and_masked_nets_is_exact_in_all_its_parts() -> None:
    """a, c: 16 + 4 each; b: its bias, 4; view: nothing new. 44 elements, 176 bytes; bits: 20 in 3 bytes.

    Task 0 alone has b's bias, task 1 alone c's: shared 36, 4 each. Sharing says the same of elements and bytes.
    """
    net = Tied()
    own = {0: [net.b.get_parameter("bias")], 1: [net.c.get_parameter("bias")]}
    kept = footprint(Holdings(model=net, task_parameters=own))
    assert (kept.parameters, kept.parameters_shared, kept.parameters_per_task) == (44, 36, 8)
    assert (kept.parameter_bytes, kept.buffer_bytes, kept.answer_bytes) == (176, 3, 179)
    common = [held for held in (*net.parameters(), *net.buffers()) if all(held is not one for (one,) in own.values())]
    found = sharing({task: [Use(held) for held in (*common, *own[task])] for task in own}, dict(net.named_parameters()))
    assert (found.shared_by_all, found.shared_by_some, found.private) == (36, 0, 8)
    assert (found.shared_by_all_bytes, found.private_bytes) == (36 * 4 + 3, 32)
