"""Sharing, counted by hand: which task uses which element of memory, and what follows."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from clbench.footprint import Holdings, footprint
from clbench.nets.shared.linked import LinkedLinear
from clbench.nets.shared.maps import Square
from clbench.nets.shared.masks import pack_bits
from clbench.nets.shared.reuse import tie
from clbench.records import Sharing
from clbench.sharing import Use, sharing, uses_by_owner


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


def first(n: int, of: Tensor) -> Tensor:
    """A mask of the first n elements."""
    return (torch.arange(of.numel()) < n).view(of.shape)


def parts(found: Sharing) -> tuple[int, int, int, int]:
    return found.shared_by_all, found.shared_by_some, found.private, found.unused


def test_the_worked_example_of_the_modules_text() -> None:
    """10 for all, 6 for tasks 1 and 2, 4 for each, 1 unused. Used 28; by tasks 54; in common 72 / 108; 20, 4, 4 new."""
    common, pair, spare = weight(10), weight(6), weight(1)
    own = [weight(4) for _ in range(3)]
    stored = {"common": common, "pair": pair, "spare": spare} | {f"own{i}": held for i, held in enumerate(own)}
    uses = {task: [Use(common), Use(own[task])] + ([Use(pair)] if task < 2 else []) for task in range(3)}
    found = sharing(uses, stored)
    assert parts(found) == (10, 6, 12, 1)
    assert (found.parameters_used, found.shared_by_all_bytes, found.private_bytes) == (28, 40, 48)
    assert found.reuse_ratio == pytest.approx(54 / 28)
    assert found.in_common == pytest.approx(2 / 3)
    assert [(task.parameters, task.marginal_parameters, task.marginal_bytes) for task in found.tasks] == [
        (20, 20, 80), (20, 4, 16), (14, 4, 16),
    ]  # fmt: skip
    assert {row.name: row.shares for row in found.map} == {
        "common": [1, 1, 1], "pair": [1, 1, 0], "spare": [0, 0, 0],
        "own0": [1, 0, 0], "own1": [0, 1, 0], "own2": [0, 0, 1],
    }  # fmt: skip
    twice = {task: [Use(use.tensor, layers=("a", "a") if use.tensor is common else ()) for use in found_uses]
             for task, found_uses in uses.items()}  # fmt: skip
    assert sharing(twice, stored).reuse_ratio == pytest.approx(3)


def test_tied_weights_are_one_memory_and_two_applications() -> None:
    """Two layers on one 3 x 3 tensor, a bias of 3 each: 15 elements; a task applies 9 + 9 + 3 + 3 = 24 of them."""
    one, two = nn.Linear(3, 3), nn.Linear(3, 3)
    two.weight = nn.Parameter(one.weight.detach())  # another parameter over the same memory
    net = nn.Sequential(one, two)
    found = sharing({7: [Use(held) for held in net.parameters()]}, dict(net.named_parameters()))
    assert found.parameters_used == footprint(Holdings(model=net)).parameters == 15
    assert found.reuse_ratio == pytest.approx(24 / 15)
    assert (found.in_common, parts(found)) == (None, (0, 0, 15, 0))
    assert [task.task for task in found.tasks] == [7]


def test_views_share_what_they_overlap_in() -> None:
    """Of a row of 10, task 0 sees 0 to 5 and task 1 sees 4 to 9: 2 in common, 8 private, in_common 2 * 2 / 12."""
    row = weight(10)
    found = sharing({0: [Use(row[:6])], 1: [Use(row[4:])]}, {"row": row})
    assert parts(found) == (2, 0, 8, 0)
    assert found.in_common == pytest.approx(4 / 12)
    assert [task.marginal_parameters for task in found.tasks] == [6, 4]
    assert [row.shares for row in found.map] == [[0.6, 0.6]]


def test_strided_views_and_their_masks_are_counted_by_element() -> None:
    """Columns 0 and 1 of a 3 x 4 matrix for task 0 (6), the diagonal of the transposed left 3 x 3 for task 1 (3).

    The diagonal has (0, 0) and (1, 1) in the first two columns: 2 in common, 4 + 1 private, 5 unused.
    """
    matrix = weight(3, 4)
    uses = {0: [Use(matrix[:, :2])], 1: [Use(matrix.T[:3], torch.eye(3, dtype=torch.bool))]}
    found = sharing(uses, {"matrix": matrix})
    assert parts(found) == (2, 0, 5, 5)


def test_an_expanded_tensor_is_what_it_repeats() -> None:
    """3 elements seen 4 times are 3; through a mask of the rows 0 and 2 of the (3, 4) view they are 2."""
    column = weight(3, 1)
    wide = column.expand(3, 4)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, :] = True
    found = sharing({0: [Use(wide)], 1: [Use(wide, mask)]}, {"column": column})
    assert parts(found) == (2, 0, 1, 0)
    assert found.reuse_ratio == pytest.approx(5 / 3)


def test_masked_weights_and_the_bits_of_their_masks() -> None:
    """20 weights; tasks use the first 5, 10, 10. All: 5; some: 5; unused 10. m: 5 x 3, 5 x 2, so 40 / (2 * 25).

    Each mask is 20 bits, 3 bytes of its task's own. Task 1 adds 5 weights of 4 bytes and its mask: 23; task 2 only 3.
    """
    shared = weight(4, 5)
    masks = [first(n, shared) for n in (5, 10, 10)]
    bits = [pack_bits(mask) for mask in masks]
    uses = {task: [Use(shared, masks[task]), Use(bits[task])] for task in range(3)}
    found = sharing(uses, {"shared": shared})
    assert parts(found) == (5, 5, 0, 10)
    assert (found.shared_by_all_bytes, found.shared_by_some_bytes, found.private_bytes) == (20, 20, 9)
    assert found.in_common == pytest.approx(0.8)
    assert found.reuse_ratio == pytest.approx(2.5)
    assert [task.marginal_bytes for task in found.tasks] == [23, 23, 3]
    assert [row.shares for row in found.map] == [[0.25, 0.5, 0.5]]


@pytest.mark.parametrize(("common", "own"), [(30, 10), (0, 40), (40, 0)])
def test_clones_have_in_common_the_fraction_they_share(common: int, own: int) -> None:
    """Four clones of 40 elements, f = common / 40: all of a task's shared elements are used by all the others."""
    shared, apart = weight(common), [weight(own) for _ in range(4)]
    found = sharing({task: [Use(shared), Use(apart[task])] for task in range(4)}, {"shared": shared})
    assert found.in_common == pytest.approx(common / 40)
    assert found.parameters_used == common + 4 * own


def test_a_layer_repeated_three_times_counts_three_times_and_is_in_the_map() -> None:
    """Two tasks, 8 elements applied three times and 2 once: 2 * (24 + 2) / 10 = 5.2."""
    again, once = weight(8), weight(2)
    task = [Use(again, layers=("block", "block", "block")), Use(once)]
    found = sharing({0: task, 1: task}, {"again": again, "once": once})
    assert found.reuse_ratio == pytest.approx(5.2)
    assert [row.layers for row in found.map] == [["block"] * 3, []]


def test_what_one_task_alone_uses_is_one_row_of_the_map() -> None:
    """Two own tensors of task 3, 5 + 2 elements; the shared one keeps its row and stands first."""
    shared, a, b = weight(4), weight(5), weight(2)
    uses = {3: [Use(a), Use(shared), Use(b)], 8: [Use(shared)]}
    found = sharing(uses, {"a": a, "shared": shared, "b": b})
    assert [(row.name, row.elements, row.tensors, row.shares) for row in found.map] == [
        ("shared", 4, 1, [1, 1]), ("task 3's own", 7, 2, [1, 0]),
    ]  # fmt: skip


def test_rows_are_folded_by_exact_counts_not_by_rounded_shares() -> None:
    """Of 4 M elements task 1 uses one, 2.5e-7 of them, or task 0 all but one: rounded, task 0 has all and 1 none.

    Only what task 0 has alone and wholly is its own: "alone" and "mine".
    """
    large, lacking, alone, mine = weight(4_000_000), weight(4_000_000), weight(3), weight(2)
    uses = {
        0: [Use(large), Use(lacking, first(3_999_999, lacking)), Use(alone, first(3, alone)), Use(mine)],
        1: [Use(large, first(1, large))],
    }
    found = sharing(uses, {"large": large, "lacking": lacking, "alone": alone, "mine": mine})
    assert [(row.name, row.elements, row.shares) for row in found.map] == [
        ("large", 4_000_000, [1, 0]), ("lacking", 4_000_000, [1, 0]), ("task 0's own", 5, [1, 0]),
    ]  # fmt: skip
    assert (found.shared_by_all, found.unused) == (1, 1)


def test_tasks_stand_in_the_order_they_were_learned() -> None:
    """Tasks 2, 0, 1 use the first 6, 8, 3 of 10, and 1, 2, 4 of their own: 7 new, then 2 + 2, then 4 alone.

    By label it would be task 0 to add 10, then 4 and 1.
    """
    shared, own = weight(10), {2: weight(1), 0: weight(2), 1: weight(4)}
    uses = {task: [Use(shared, first(n, shared)), Use(own[task])] for task, n in ((2, 6), (0, 8), (1, 3))}
    found = sharing(uses, {"shared": shared} | {f"own{task}": held for task, held in sorted(own.items())})
    assert [(task.task, task.parameters, task.marginal_parameters, task.marginal_bytes) for task in found.tasks] == [
        (2, 7, 7, 28), (0, 10, 4, 16), (1, 7, 4, 16),
    ]  # fmt: skip
    assert [(row.name, row.shares) for row in found.map] == [
        ("shared", [0.6, 0.8, 0.3]), ("own2", [1, 0, 0]), ("own0", [0, 1, 0]), ("own1", [0, 0, 1]),
    ]  # fmt: skip


def test_memory_under_two_types_counts_in_elements_of_the_parameter() -> None:
    """8 floats, the first four also seen as 16 bytes: task 0 uses those bytes, task 1 all; 4 shared, 16 bytes."""
    held = weight(8)
    seen = held.detach()[:4].view(torch.uint8)
    found = sharing({0: [Use(seen)], 1: [Use(held)]}, {"held": held})
    assert parts(found) == (4, 0, 4, 0)
    assert (found.shared_by_all_bytes, found.private_bytes) == (16, 16)


def test_buffers_count_in_bytes_only() -> None:
    """A batch norm of 3: 6 elements, 24 bytes; statistics 24 bytes and a count of 8."""
    net = nn.BatchNorm1d(3)
    found = sharing(uses_by_owner(net, {}, tasks=2), dict(net.named_parameters()))
    assert (found.parameters_used, found.in_common) == (6, 1)
    assert (found.shared_by_all_bytes, found.private_bytes) == (56, 0)


def test_uses_by_owner_leave_out_what_is_another_tasks() -> None:
    net = nn.ModuleDict({"trunk": nn.Linear(2, 2), "a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    own = {5: list(net["a"].parameters()), 2: list(net["b"].parameters())}
    uses = uses_by_owner(net, own, tasks=2)
    assert list(uses) == [5, 2]
    found = sharing(uses, dict(net.named_parameters()))
    assert parts(found) == (6, 0, 6, 0)


def test_a_tied_layer_and_a_linked_one_count_once_more_where_a_net_is_its_users_own() -> None:
    """Layers a, b (tied to a) and c (linked to a's weight, without a bias) of 3 x 3 + 3, and d of 3 + 1.

    Stored 9 + 3 + 3 + 1 = 16; a's weight is applied three times and its bias twice: 3 * 9 + 2 * 3 + 4 = 37.
    """
    a, d = nn.Linear(3, 3), nn.Linear(3, 1)
    net = nn.Sequential(OrderedDict(a=a, b=copy.deepcopy(a), c=LinkedLinear(a, Square()), d=d))
    tie(net, "a", "b")
    found = sharing(uses_by_owner(net, {}, 2), dict(net.named_parameters()))
    assert found.parameters_used == 16
    assert found.reuse_ratio == pytest.approx(2 * 37 / 16)
    assert {row.name: row.layers for row in found.map}["a.weight"] == ["a", "b", "c"]
    assert {row.name: row.layers for row in found.map}["d.weight"] == []


def test_no_parameter_at_all_and_none_in_use() -> None:
    """Nothing shared by nobody has no share in common, and no division by zero."""
    nothing = sharing({}, {})
    assert (nothing.parameters_used, nothing.reuse_ratio, nothing.in_common, nothing.map) == (0, 0, None, [])
    unused = sharing({0: [], 1: []}, {"spare": weight(3)})
    assert (unused.unused, unused.in_common) == (3, None)


def test_masks_that_do_not_fit_are_refused() -> None:
    held = weight(3)
    with pytest.raises(TypeError, match="must be bool"):
        Use(held, torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(2,\) for a tensor of \(3,\)"):
        Use(held, torch.ones(2, dtype=torch.bool))
    sparse = torch.eye(3).to_sparse()
    with pytest.raises(ValueError, match="must be strided"):
        sharing({0: [Use(sparse, torch.eye(3, dtype=torch.bool))]}, {})


def test_twenty_masked_tasks_on_millions_of_weights_take_little_time() -> None:
    """2 M weights under 20 masks, about 0.1 s of one core; the limit is loose, for a busy machine."""
    held = [weight(500, 1000) for _ in range(4)]
    masks = [torch.rand(500, 1000) < 0.3 for _ in range(20)]
    uses = {task: [Use(tensor, masks[task]) for tensor in held] for task in range(20)}
    began = time.process_time()
    found = sharing(uses, {str(i): tensor for i, tensor in enumerate(held)})
    assert time.process_time() - began < 1.5
    assert found.in_common == pytest.approx(0.3, abs=0.01)
