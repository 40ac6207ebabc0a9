"""Nets with timestamps: what grows later changes no earlier answer, and a sub-network is what it was cut from."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets import MLP, HeadedNet, MultiHead, SingleHead, build_trunk
from clbench.nets.expandable import ExpandableNet
from clbench.nets.heads import ABSENT_LOGIT, GrowingLinear, birth_seed

KINDS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "mlp": ((1, 4, 4), {"hidden": [9, 7]}),
    "zenke": ((2, 14, 14), {"channels": (3, 4), "hidden": 6}),  # 4 channels of 2x2 pixels are flattened
    "lenet": ((2, 8, 8), {"channels": (3, 4), "hidden": (7, 5), "response_norm": False}),
}
every_kind = pytest.mark.parametrize("kind", list(KINDS))


def headed(kind: str, seed: int = 0, **settings: Any) -> HeadedNet:
    shape, usual = KINDS[kind]
    torch.manual_seed(seed)
    trunk = build_trunk(kind, shape, **{**usual, **settings})
    return HeadedNet(trunk, MultiHead(trunk.out_features, 5, True, {task: 2 + task for task in range(4)}))


def expandable(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> ExpandableNet:
    """Return a net in evaluation mode that has been taught nothing; task t is to have t + 2 outputs."""
    return ExpandableNet(headed(kind, **settings)).to(dtype).eval()


def images(kind: str, n: int = 5, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(n, *KINDS[kind][0], generator=torch.Generator().manual_seed(seed), dtype=dtype)


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomise(parameters: Sequence[nn.Parameter], density: float = 1.0, seed: int = 7) -> None:
    """Give every entry a normal draw, or, with density below 1, often an exact zero."""
    chance = generator(seed)
    with torch.no_grad():
        for parameter in parameters:
            values = torch.randn(parameter.shape, generator=chance, dtype=torch.float64) * 0.5
            parameter.copy_(values * (torch.rand(parameter.shape, generator=chance) < density))


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def alternate(widths: Sequence[int], first: bool = True) -> list[Tensor]:
    """Return masks that are on and off in turn."""
    return [torch.arange(width) % 2 == (0 if first else 1) for width in widths]


def grow(net: ExpandableNet, task: int, seed: int = 3) -> None:
    """Teach a task to new units alone: trained with weight decay, two of three kept, some units duplicated."""
    net.observe(task, range(task + 2))
    added = net.open_expansion(task, [3] * len(net.names), generator(seed))
    optimizer = torch.optim.AdamW(added, lr=0.05, weight_decay=0.3)
    x = images(next(kind for kind, (shape, _) in KINDS.items() if shape == net.trunk.input_shape), 6).to(added[0])
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x, task), torch.arange(6) % (task + 2)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    net.close_expansion(task, [torch.tensor([True, False, True])] * len(net.names))
    net.duplicate(task, alternate(net.widths()))
    net.close_stage(task)


# ----------------------------------------------------------------------------------------------------------- timestamps


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_later_tasks_add_changes_no_earlier_answer_by_a_bit(kind: str, dtype: torch.dtype) -> None:
    """Also not if what is beyond a task's corner of every weight becomes anything at all."""
    net = expandable(kind, dtype)
    batches = [images(kind, n, dtype) for n in (1, 2, 5, 33)]
    answers: dict[int, list[Tensor]] = {}
    net.observe(0, [0, 1])
    net.close_stage(0)
    answers[0] = [net(x, 0) for x in batches]
    for task in (1, 2):
        grow(net, task)
        assert all(torch.equal(net(x, t), old) for t in answers for x, old in zip(batches, answers[t], strict=True))
        answers[task] = [net(x, task) for x in batches]
    assert net.seen_by(0) < net.seen_by(1) < net.seen_by(2) == net.widths()
    with torch.no_grad():
        for i, layer in enumerate(net.layers()):
            corner = layer.weight[: net.seen_by(1)[i]]
            kept = corner[:, : (net.seen_by(1)[i - 1] * net.features_per_unit[i] if i else None)].clone()
            layer.weight.fill_(1e3)
            layer.weight[: kept.shape[0], : kept.shape[1]] = kept
            layer.bias[kept.shape[0] :] = 1e3  # type: ignore[index]
    for t in (0, 1):
        assert all(torch.equal(net(x, t), old) for x, old in zip(batches, answers[t], strict=True))
    assert not torch.allclose(net(batches[0], 2), answers[2][0])


@every_kind
def test_an_expansion_trains_nothing_old(kind: str) -> None:
    """Neither by gradients nor by weight decay; all that is new does move."""
    net = expandable(kind)
    net.observe(0, [0, 1])
    net.close_stage(0)
    net.observe(1, [0, 1, 2])
    before = weights(net)
    added = net.open_expansion(1, [2] * len(net.names), generator())
    randomise(added)
    born = [parameter.detach().clone() for parameter in added]
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05, weight_decay=0.3)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(net(images(kind, 6), 1), torch.arange(6) % 3).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert all(not torch.equal(parameter, old) for parameter, old in zip(added, born, strict=True))
    net.close_expansion(1, [torch.ones(2, dtype=torch.bool)] * len(net.names))
    for name, parameter in net.named_parameters():
        if name.startswith("heads.0"):
            continue  # not part of the expansion: its optimiser step is the caller's doing
        corner = tuple(slice(n) for n in before[name].shape)
        assert torch.equal(parameter[corner], before[name]), name
        assert parameter.requires_grad


# ------------------------------------------------------------------------------------------------------------ expansion


@every_kind
def test_opening_an_expansion_changes_no_answer_and_closing_it_neither(kind: str) -> None:
    net, x = expandable(kind), images(kind)
    net.observe(0, [0, 1, 2])
    before = net(x, 0)
    added = net.open_expansion(0, range(1, 1 + len(net.names)), generator())
    torch.testing.assert_close(net(x, 0), before, rtol=0, atol=1e-12)
    randomise(added)
    trained = net(x, 0)
    assert not torch.allclose(trained, before)
    net.close_expansion(0, [torch.ones(k + 1, dtype=torch.bool) for k in range(len(net.names))])
    torch.testing.assert_close(net(x, 0), trained, rtol=0, atol=1e-12)
    assert not any(layer.has_delta for layer in [*net.layers(), net.head(0)])


@every_kind
def test_pruned_units_are_those_asked_for(kind: str) -> None:
    """Dropping a unit equals having nobody listen to it; another choice in every layer."""
    net, x = expandable(kind), images(kind)
    net.observe(0, [0, 1, 2])
    old = net.widths()
    randomise(net.open_expansion(0, [3] * len(old), generator()))
    keep = [torch.tensor([i % 3 != unit for unit in range(3)]) for i in range(len(old))]
    keep[-1] = torch.tensor([False, True, False])
    with torch.no_grad():
        for i, listener in enumerate([*net.layers()[1:], net.head(0)]):
            each = net.features_per_unit[i + 1] if i + 1 < len(old) else 1
            gone = (~keep[i]).repeat_interleave(each)
            assert listener.delta_columns is not None
            listener.delta_columns[:, gone] = 0
            if listener.delta_rows is not None:
                listener.delta_rows[:, -len(gone) :][:, gone] = 0
    before = net(x, 0)
    net.close_expansion(0, keep)
    torch.testing.assert_close(net(x, 0), before, rtol=0, atol=1e-12)
    assert net.widths() == [width + int(mask.sum()) for width, mask in zip(old, keep, strict=True)]


def test_a_useless_unit_is_one_that_listens_to_nothing() -> None:
    """One weight, from a new unit, is enough to be of use; a bias is not."""
    net = expandable("mlp")
    net.observe(0, [0, 1])
    net.open_expansion(0, [2, 3], generator())
    first, second = net.layers()
    assert [mask.tolist() for mask in net.useless_units()] == [[False] * 2, [False] * 3]
    with torch.no_grad():
        first.delta_rows[1] = 0  # type: ignore[index]
        second.delta_rows[:2] = 0  # type: ignore[index]
        second.delta_rows[0, -1] = 1e-30  # type: ignore[index]
    assert [mask.tolist() for mask in net.useless_units()] == [[False, True], [False, True, False]]


def test_new_units_are_drawn_as_pytorch_draws_and_listened_to_by_nobody() -> None:
    """Uniform within 1 / sqrt(fan_in), with the new inputs: 16 pixels; 9 old units and 40 new ones."""
    net = expandable("mlp")
    net.observe(0, [0, 1])
    added = net.open_expansion(0, [40, 30], generator())
    first, second, head = *net.layers(), net.head(0)
    for layer, fan_in in ((first, 16), (second, 49)):
        assert layer.delta_rows is not None
        assert layer.delta_rows.shape[1] == fan_in
        for drawn in (layer.delta_rows, layer.delta_bias):
            assert drawn is not None
            assert 0.85 * fan_in**-0.5 < float(drawn.detach().abs().max()) <= fan_in**-0.5
    for listener, shape in ((second, (7, 40)), (head, (2, 30))):
        assert listener.delta_columns is not None
        assert listener.delta_columns.shape == shape
        assert not listener.delta_columns.any()
    assert {id(p) for p in added} == {id(p) for p in net.parameters() if p.requires_grad}
    again = expandable("mlp")
    again.observe(0, [0, 1])
    torch.rand(3)  # the global generator has no say
    for mine, other in zip(added, again.open_expansion(0, [40, 30], generator()), strict=True):
        assert torch.equal(mine, other)


def test_a_layer_may_get_no_new_unit() -> None:
    net, x = expandable("mlp"), images("mlp")
    net.observe(0, [0, 1])
    before = net(x, 0)
    net.open_expansion(0, [0, 2], generator())
    assert [len(mask) for mask in net.useless_units()] == [0, 2]
    net.close_expansion(0, [torch.ones(n, dtype=torch.bool) for n in (0, 2)])
    assert net.widths() == [9, 9]
    torch.testing.assert_close(net(x, 0), before, rtol=0, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- sub-networks


def by_hand() -> ExpandableNet:
    """Return an MLP of 3 and 4 units.

    Output 0 listens to unit 2, output 1 to units 0 and 2, nobody to units 1 and 3. Of the first layer, unit 2 listens
    to unit 0, unit 0 to nobody, unit 3 to all.
    """
    net = expandable("mlp", hidden=[3, 4])
    net.observe(0, [0, 1])
    with torch.no_grad():
        net.head(0).weight.copy_(torch.tensor([[0.0, 0, 1, 0], [-1, 0, 1e-30, 0]]))
        second = torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 1]])
        net.layer(1).weight.copy_(second)
    return net


def lists(masks: Sequence[Tensor]) -> list[list[int]]:
    return [mask.nonzero().flatten().tolist() for mask in masks]


def test_the_search_collects_what_an_answer_depends_on() -> None:
    net = by_hand()
    assert lists(net.reached(0)) == [[0], [0, 2]]
    assert lists(net.reached(0, [0])) == [[0], [2]]
    with torch.no_grad():
        net.layer(1).weight[0, 2] = -1e-300  # any weight but zero
    assert lists(net.reached(0)) == [[0, 2], [0, 2]]
    assert lists(net.reached(0, [0])) == [[0], [2]]
    assert lists(net.reached(0, [1])) == [[0, 2], [0, 2]]


def test_the_search_ends_at_a_tasks_timestamp() -> None:
    net = by_hand()
    net.close_stage(0)
    net.observe(1, [0, 1])
    net.duplicate(1, [torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool)])
    assert [len(mask) for mask in net.reached(0)] == [3, 4]
    assert lists(net.reached(0)) == [[0], [0, 2]]
    with torch.no_grad():
        net.head(1).weight.zero_()
        net.head(1).weight[:, 6] = 1.0  # the copy of unit 2, which listens to unit 0 and to its copy
    assert lists(net.reached(1)) == [[0, 3], [6]]


def test_a_channel_is_listened_to_through_any_of_its_pixels() -> None:
    """4 channels of 2 x 2 pixels: feature 6 is a pixel of channel 1, feature 15 of channel 3."""
    net = expandable("zenke")
    net.observe(0, [0, 1])
    with torch.no_grad():
        for layer in (net.layer(4), net.layer(2)):
            layer.weight.zero_()
        net.head(0).weight.zero_()
        net.head(0).weight[1, 5] = net.head(0).weight[0, 2] = 1.0
        net.layer(4).weight[5, 6] = net.layer(4).weight[2, 15] = net.layer(4).weight[3, 0] = 1.0
        net.layer(3).weight.zero_()
        net.layer(3).weight[1, 2, 1, 0] = net.layer(3).weight[3, 0, 2, 2] = net.layer(3).weight[0, 1, 0, 0] = 1.0
        net.layer(2).weight[2, 1, 0, 2] = 1.0
    assert lists(net.reached(0)[1:]) == [[1], [0, 2], [1, 3], [2, 5]]


@every_kind
def test_a_sub_network_answers_as_the_whole_net_does(kind: str) -> None:
    """Trained further and put back, it still does; and nothing else has changed."""
    net, x = expandable(kind), images(kind)
    net.observe(0, [0, 1])
    net.observe(1, [0, 1, 2])
    randomise(list(net.parameters()), density=0.3)
    masks = net.reached(1)
    assert any(0 < int(mask.sum()) < len(mask) for mask in masks)
    part = net.cut(1, masks)
    torch.testing.assert_close(part(x, 1), net(x, 1), rtol=0, atol=1e-12)
    before = weights(net)
    part.put_back()
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())
    randomise(list(part.parameters()), seed=11)
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters()), "copies"
    part.put_back()
    torch.testing.assert_close(part(x, 1), net(x, 1), rtol=0, atol=1e-12)
    columns = [torch.ones(KINDS[kind][0][0] if kind != "mlp" else 16, dtype=torch.bool)]
    columns += [mask.repeat_interleave(each) for mask, each in zip(masks, [*net.features_per_unit[1:], 1], strict=True)]
    everything = torch.ones(3, dtype=torch.bool)
    chosen = zip([f"trunk.{name}" for name in net.names] + ["heads.1"], [*masks, everything], columns, strict=True)
    for name, rows, columns_of in chosen:
        now, was = net.get_parameter(f"{name}.weight"), before.pop(f"{name}.weight")
        inside = rows[:, None] & columns_of
        assert (now != was).flatten(2).all(dim=2).equal(inside) if now.ndim > 2 else (now != was).equal(inside)
        assert (net.get_parameter(f"{name}.bias") != before.pop(f"{name}.bias")).equal(rows)
    assert set(before) == {"heads.0.weight", "heads.0.bias"}
    assert all(torch.equal(net.get_parameter(name), value) for name, value in before.items())


@every_kind
def test_where_nothing_is_selected_a_constant_is_left(kind: str) -> None:
    """No output listens: logits are biases. Or the last layer listens to nobody: its units are constants."""
    net, x = expandable(kind), images(kind)
    net.observe(0, [0, 1])
    for emptied in (net.layer(len(net.names) - 1), net.head(0)):
        with torch.no_grad():
            emptied.weight.zero_()
        part = net.cut(0, net.reached(0))
        torch.testing.assert_close(part(x, 0), net(x, 0), rtol=0, atol=1e-12)
        before = weights(net)
        part(x, 0).square().sum().backward()
        torch.optim.Adam(part.parameters(), lr=0.1, fused=True).step()
        part.put_back()
        torch.testing.assert_close(part(x, 0), net(x, 0), rtol=0, atol=1e-12)
        assert torch.equal(net.layer(0).weight, before[f"trunk.{net.names[0]}.weight"])
        assert not torch.equal(net.get_parameter("heads.0.bias"), before["heads.0.bias"])


@pytest.mark.parametrize("bias", [True, False])
def test_with_one_output_all_logits_are_its_score(bias: bool) -> None:
    shape, settings = KINDS["mlp"]
    trunk = build_trunk("mlp", shape, **settings)
    net = ExpandableNet(HeadedNet(trunk, MultiHead(trunk.out_features, 0, bias))).double().eval()
    net.observe(0, [0, 1, 2])
    x = images("mlp")
    head, before = net.head(0), weights(net)
    score = net(x, 0)[:, [1]] - (head.bias[1] if bias else 0)
    part = net.cut(0, net.reached(0, [1]), [1])
    torch.testing.assert_close(part(x, 0), score + head.bias if bias else score.expand(-1, 3), rtol=0, atol=1e-12)
    randomise(list(part.parameters()))
    part.put_back()
    changed = (head.weight != before["heads.0.weight"]).any(dim=1)
    assert changed.tolist() == [False, True, False]


# ---------------------------------------------------------------------------------------------------------- duplication


def test_a_copy_has_its_units_weights_in_and_out() -> None:
    """Units 0 and 2 of 3, then units 1 and 3 of 4: a copied unit listens to the copies below it, as its original."""
    net = by_hand()
    net.close_stage(0)
    net.observe(1, [0, 1])
    randomise(list(net.parameters()))
    before = weights(net)
    net.duplicate(1, [torch.tensor([True, False, True]), torch.tensor([False, True, False, True])])
    assert net.widths() == [5, 6]
    below, above = [0, 1, 2, 0, 2], [0, 1, 2, 3, 1, 3]
    first, second = net.layers()
    assert torch.equal(first.weight, before["trunk.layers.0.weight"][below])
    assert torch.equal(second.weight, before["trunk.layers.1.weight"][above][:, below])
    for i, layer, rows in ((0, first, below), (1, second, above)):
        assert torch.equal(layer.get_parameter("bias"), before[f"trunk.layers.{i}.bias"][rows])
    assert torch.equal(net.head(1).weight, before["heads.1.weight"][:, above])
    assert torch.equal(net.head(1).bias, before["heads.1.bias"])
    assert torch.equal(net.head(0).weight, before["heads.0.weight"]), "only the head in training listens"


def test_a_copied_channel_takes_all_its_pixels_along() -> None:
    """Channel c of conv4 makes features 4 c to 4 c + 3 of the hidden layer."""
    net = expandable("zenke")
    net.observe(0, [0, 1])
    before = weights(net)
    none = [torch.zeros(width, dtype=torch.bool) for width in net.widths()]
    none[3][1] = none[1][2] = True
    net.duplicate(0, none)
    assert net.widths() == [3, 4, 4, 5, 6]
    features = [*range(16), 4, 5, 6, 7]
    assert torch.equal(net.layer(4).weight, before["trunk.hidden.weight"][:, features])
    assert torch.equal(net.layer(3).weight, before["trunk.conv4.weight"][[0, 1, 2, 3, 1]])
    assert torch.equal(net.layer(2).weight, before["trunk.conv3.weight"][:, [0, 1, 2, 2]])
    assert torch.equal(net.layer(1).weight, before["trunk.conv2.weight"][[0, 1, 2, 2]])
    assert torch.equal(net.head(0).weight, before["heads.0.weight"])


# ---------------------------------------------------------------------------------------------------------------- tasks


def test_births_and_timestamps_are_told_by_stage() -> None:
    """3 and 4 units at first; task 1 copies one and two, task 2 none, task 3 all of the first layer's."""
    net = by_hand()
    one = [torch.tensor([True, False, False]), torch.tensor([True, False, False, True])]
    for task, units in ((0, None), (1, one), (2, None), (3, [torch.ones(4, dtype=torch.bool), torch.zeros(6).bool()])):
        net.observe(task, [0, 1])
        assert net.seen_by(task) == net.widths(), "in training it sees all"
        if units:
            net.duplicate(task, units)
            assert net.seen_by(task) == net.widths()
        net.close_stage(task)
    assert [net.seen_by(task) for task in range(5)] == [[3, 4], [4, 6], [4, 6], [8, 6], [8, 6]]
    assert net.births(0).tolist() == [0, 0, 0, 1, 3, 3, 3, 3]
    assert net.births(1).tolist() == [0, 0, 0, 0, 1, 1]


def test_a_task_seen_again_gets_zeros_for_later_units_then_sees_everything() -> None:
    """Its head ignores them at first; an old unit that listens to a later one speaks differently at once."""
    net, x = by_hand(), images("mlp")
    net.close_stage(0)
    before, head = net(x, 0), net.head(0).weight.detach().clone()
    net.observe(1, [0, 1])
    randomise(net.open_expansion(1, [2, 3], generator()))
    net.close_expansion(1, [torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.bool)])
    net.close_stage(1)
    assert torch.equal(net(x, 0), before)
    net.observe(0, [0, 1])
    assert torch.equal(net.head(0).weight, torch.cat((head, torch.zeros(2, 3)), dim=1))
    expected = F.linear(net.features(x)[:, :4], head, net.head(0).bias)
    torch.testing.assert_close(net(x, 0), expected, rtol=0, atol=1e-12)
    net.close_stage(0)
    assert net.seen_by(0) == net.seen_by(1) == [5, 7]
    assert net.stages == [[3, 4], [5, 7], [5, 7]]


def test_taking_a_task_up_again_changes_no_answer_of_a_single_layer() -> None:
    net, x = expandable("mlp", hidden=[4]), images("mlp")
    net.observe(0, [0, 1])
    net.close_stage(0)
    before = net(x, 0)
    grow(net, 1)
    net.observe(0, [0, 1])
    torch.testing.assert_close(net(x, 0), before, rtol=0, atol=1e-12)


def test_more_classes_are_born_as_if_they_had_been_there() -> None:
    """The head grows in both directions; the rows that come later are those of a head born now."""
    net = expandable("mlp")
    net.observe(0, [0, 1])
    old = net.head(0).weight.detach().clone(), net.head(0).bias.detach().clone()
    parameters = net.task_parameters()[0]
    net.close_stage(0)
    grow(net, 1)
    net.observe(0, [3])
    width = net.widths()[-1]
    born = GrowingLinear(width, birth_seed(5, 0)).double()
    born.grow(4)
    block = born.blocks[0]
    assert isinstance(block, nn.Linear)
    assert torch.equal(net.head(0).weight[2:], block.weight[2:])
    assert torch.equal(net.head(0).bias, torch.cat((old[1], block.bias[2:])))
    assert torch.equal(net.head(0).weight[:2], torch.cat((old[0], torch.zeros(2, width - 7)), dim=1))
    assert all(mine is other for mine, other in zip(net.task_parameters()[0], parameters, strict=True))
    assert net(images("mlp"), 0).shape == (5, 4)
    net.observe(0, [0])
    assert net.head(0).out_features == 4


@every_kind
def test_an_unseen_task_is_answered_by_the_head_it_will_be_born_with(kind: str) -> None:
    """At the first size that is the head of a net that does not grow."""
    usual, x = headed(kind).eval(), images(kind, dtype=torch.float32)
    expected = {task: usual(x, task) for task in range(3)}
    net = ExpandableNet(headed(kind)).eval()
    for task in range(3):
        before = net(x, task)
        assert before.shape == (5, task + 2)
        if task == 0:
            assert all(torch.equal(net(x, other), expected[other]) for other in expected)
        net.observe(task, range(task + 2))
        assert torch.equal(net(x, task), before)
        grow(net, task)
    assert len(net.newborn.heads) == 0


@pytest.mark.parametrize("classes", [[], [-1, 0]])
def test_a_task_needs_classes_that_count_from_0(classes: list[int]) -> None:
    net = expandable("mlp")
    with pytest.raises(ValueError, match=r"task 3 has classes .* labels count from 0"):
        net.observe(3, classes)
    assert not net.heads


def test_a_batch_may_mix_tasks() -> None:
    """Every sample by its own task's units; classes that a task does not have are absent."""
    net, x = expandable("mlp"), images("mlp", 6)
    for task in range(2):
        net.observe(task, range(task + 2))
        net.close_stage(task)
    grow(net, 2)
    tasks = torch.tensor([2, 0, 1, 0, 2, 0])
    answer = net(x, tasks)
    assert answer.shape == (6, 4)
    for row, task in enumerate(tasks.tolist()):
        single = net(x[[row]], task)[0]
        torch.testing.assert_close(answer[row, : task + 2], single, rtol=0, atol=1e-12)
        assert (answer[row, task + 2 :] == ABSENT_LOGIT).all()
    assert torch.equal(net(x, torch.full((6,), 1)), net(x, 1))
    assert torch.equal(net(x, torch.tensor(1)), net(x, 1))
    assert net(x[:0], torch.zeros(0, dtype=torch.long)).shape == (0, 0)
    with pytest.raises(ValueError, match=r"one per sample, shape \(6,\); got \(5,\)"):
        net(x, tasks[:5])


# ---------------------------------------------------------------------------------------------------------------- state


def grown(kind: str) -> ExpandableNet:
    """Return a net after three tasks, taught in another order than that of their numbers."""
    net = expandable(kind)
    for task in (2, 0, 1):
        grow(net, task, seed=task)
    return net


@every_kind
def test_a_net_of_the_first_size_takes_up_a_grown_ones_state(kind: str) -> None:
    """Weights, timestamps, answers, and the order of parameters; without a draw from the global generator."""
    net, x = grown(kind), images(kind)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    fresh = expandable(kind, seed=1)
    random = torch.get_rng_state()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(torch.get_rng_state(), random)
    same(net, fresh, x)
    assert list(fresh.heads) == ["2", "0", "1"]
    for other in (net, fresh):
        grow(other, 3)
    same(net, fresh, x)
    net.observe(1, [0, 1])  # the state is no view of the original's
    assert fresh.stage_of == {2: 0, 0: 1, 1: 2, 3: 3}


@every_kind
def test_a_copy_is_a_net_of_its_own(kind: str) -> None:
    net, x = grown(kind), images(kind)
    before = [net(x, task) for task in range(3)]
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        same(net, other, x)
        grow(other, 3)
        randomise(list(other.parameters()))
        assert all(torch.equal(net(x, task), old) for task, old in enumerate(before))
        assert net.widths() == net.stages[-1] < other.widths()


def same(one: ExpandableNet, other: ExpandableNet, x: Tensor) -> None:
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in other.named_parameters()]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.parameters(), other.parameters(), strict=True))
    assert (one.stages, one.stage_of, one.widths()) == (other.stages, other.stage_of, other.widths())
    assert all(torch.equal(one(x, task), other(x, task)) for task in one.stage_of)
    assert [layer.extra_repr() for layer in one.layers()] == [layer.extra_repr() for layer in other.layers()]


# ------------------------------------------------------------------------------------------------------------- refusals


def test_nets_whose_units_cannot_be_cut_out_are_refused() -> None:
    resnet = build_trunk("resnet18", (3, 8, 8), width=4)
    with pytest.raises(ValueError, match=r"^ResNet18 is no chain of layers; mlp, zenke and lenet are$"):
        ExpandableNet(HeadedNet(resnet, MultiHead(resnet.out_features, 0)))
    with pytest.raises(ValueError, match=r"^LeNet normalises .* set response_norm = false$"):
        ExpandableNet(headed("lenet", response_norm=True))
    mlp = build_trunk("mlp", (1, 4, 4), hidden=[3])
    with pytest.raises(ValueError, match=r"^units with timestamps need a head per task"):
        ExpandableNet(HeadedNet(mlp, SingleHead(3, 2)))


class Own(MLP):
    """A chain of a user's own, one of two that would break if units were cut out of it."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__((1, 4, 4), [5, 3])
        if norm:
            self.norm = nn.LayerNorm(3)
        else:
            self.layers[0] = nn.Linear(16, 5, bias=False)


def test_chains_with_more_than_layers_and_chains_with_some_biases_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^Own has norm\.bias, norm\.weight beside its chain"):
        ExpandableNet(HeadedNet(Own(norm=True), MultiHead(3, 0)))
    with pytest.raises(ValueError, match=r"^Own has layers with a bias and layers without"):
        ExpandableNet(HeadedNet(Own(norm=False), MultiHead(3, 0)))


def test_a_convolution_pads_as_it_did_when_units_are_cut_out_or_later_ones_left_out() -> None:
    """Circular padding: a corner of the weights, or some units, compute what the layer computes."""
    plain = headed("lenet")
    old = plain.trunk.get_submodule("conv2")
    assert isinstance(old, nn.Conv2d)
    circular = nn.Conv2d(old.in_channels, old.out_channels, 5, padding=2, padding_mode="circular")
    plain.trunk.set_submodule("conv2", circular)
    net, x = ExpandableNet(plain.double()).eval(), images("lenet")
    net.observe(0, range(3))
    net.close_stage(0)
    before = net(x, 0)
    net.observe(1, range(3))
    grow(net, 1)
    net.close_stage(1)
    assert torch.equal(net(x, 0), before)
    torch.testing.assert_close(net.cut(1, net.reached(1))(x, 1), net(x, 1), rtol=0, atol=1e-12)
