"""What shares memory in a module is found, and nothing else."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from clbench.footprint import Holdings, footprint
from clbench.nets import HeadedNet, MultiHead, build_trunk
from clbench.nets.shared.aliases import Alias, aliases


def holding(**tensors: Tensor | None) -> nn.Module:
    """Return a module with these parameters, and buffers where they are no parameters."""
    module = nn.Module()
    for name, tensor in tensors.items():
        if tensor is None or isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)
    return module


def parameters(module: nn.Module) -> int:
    return footprint(Holdings(model=module)).parameters


def found(module: nn.Module) -> list[tuple[str, ...]]:
    return [(alias.kind, *alias.names) for alias in aliases(module)]


# ----------------------------------------------------------------------------------------------------------------- ties


def test_a_tied_decoder_is_one_object_and_counts_once() -> None:
    """Embedding 7 x 5 = 35, a layer 5 x 5 + 5 = 30, the decoder's bias 7: 72. Counted by name it would be 107."""
    net = nn.ModuleDict({"embed": nn.Embedding(7, 5), "layer": nn.Linear(5, 5), "decode": nn.Linear(5, 7)})
    net["decode"].weight = net["embed"].weight
    assert aliases(net) == [Alias("same_object", ("decode.weight", "embed.weight"))]
    assert parameters(net) == 72
    assert sum(value.numel() for _, value in net.named_parameters(remove_duplicate=False)) == 107


def test_a_layer_applied_three_times_is_a_tie_of_three_names() -> None:
    """4 x 4 + 4 = 20, whatever the number of times."""
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, layer, layer)
    assert found(net) == [
        ("same_object", "0.bias", "1.bias", "2.bias"),
        ("same_object", "0.weight", "1.weight", "2.weight"),
    ]
    assert parameters(net) == 20


def test_ties_survive_a_copy_of_the_whole() -> None:
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    assert aliases(copy.deepcopy(net)) == aliases(net)


# ---------------------------------------------------------------------------------------------------------------- views


def test_two_parameters_over_the_same_memory_are_the_same_view() -> None:
    """Two objects, one memory: 6 elements, not 12. A tie to one of them is told twice."""
    one = nn.Parameter(torch.zeros(2, 3))
    net = holding(a=one, b=nn.Parameter(one.data))
    assert found(net) == [("same_view", "a", "b")]
    assert parameters(net) == 6
    net.register_parameter("c", one)
    assert found(net) == [("same_object", "a", "c"), ("same_view", "a", "b", "c")]


def test_slices_overlap_only_where_they_meet() -> None:
    """Of 10 numbers [0, 6), [4, 10) and [6, 10): the second meets both others, first and third do not meet.

    Together they are the 10 numbers; by name 6 + 6 + 4 = 16.
    """
    flat = torch.zeros(10)
    net = holding(a=nn.Parameter(flat[:6]), b=nn.Parameter(flat[4:]), c=nn.Parameter(flat[6:]))
    assert found(net) == [("overlap", "a", "b"), ("overlap", "b", "c")]
    assert parameters(net) == 10


def test_columns_that_interleave_are_no_overlap() -> None:
    """Even and odd columns of 4 x 6: intervals of addresses cross, elements do not; 12 + 12 = 24 parameters.

    Columns 0 to 2 meet the even ones (0 and 2) and the odd ones (1).
    """
    whole = torch.zeros(4, 6)
    net = holding(even=nn.Parameter(whole[:, ::2]), odd=nn.Parameter(whole[:, 1::2]))
    assert aliases(net) == []
    assert parameters(net) == 24
    net.register_parameter("left", nn.Parameter(whole[:, :3]))
    assert found(net) == [("overlap", "even", "left"), ("overlap", "left", "odd")]
    assert parameters(net) == 24


def test_a_column_and_the_rows_around_a_hole_in_it_are_apart() -> None:
    """Column 0 of 3 x 4 is at 0, 4, 8; the dense run [5, 8) lies between, [5, 9) holds place 8."""
    flat = torch.zeros(12)
    column = nn.Parameter(flat.view(3, 4)[:, 0])
    assert aliases(holding(column=column, run=nn.Parameter(flat[5:8]))) == []
    assert found(holding(column=column, run=nn.Parameter(flat[5:9]))) == [("overlap", "column", "run")]


@pytest.mark.parametrize(
    "see",
    [
        lambda whole: whole.t(),
        lambda whole: whole.view(12),
        lambda whole: whole.view(torch.int32),
        lambda whole: whole.view(torch.int16)[1:2, 3:4],
        lambda whole: whole[None],
    ],
    ids=["transposed", "flat", "other type", "half a number", "one more dimension"],
)
def test_the_same_bytes_seen_otherwise_are_an_overlap(see: Callable[[Tensor], Tensor]) -> None:
    whole = torch.zeros(3, 4)
    assert found(holding(whole=whole, other=see(whole))) == [("overlap", "other", "whole")]


def test_an_expanded_tensor_addresses_what_it_repeats() -> None:
    """One row of 5 repeated 100 times is 5 numbers: it meets its own row, not the one behind."""
    two = torch.zeros(2, 5)
    net = holding(repeated=two[0].expand(100, 5), row=two[0], behind=two[1])
    assert found(net) == [("overlap", "repeated", "row")]
    assert footprint(Holdings(model=net)).buffer_bytes == 40
    assert parameters(holding(a=nn.Parameter(two[0].expand(100, 5)))) == 5


def test_windows_that_overlap_themselves_are_told_from_others() -> None:
    """Windows of 3 at every second place of 9: all of it; strides (2, 1), rows 4."""
    flat = torch.zeros(12)
    windows = flat.as_strided((4, 3), (2, 1))
    assert found(holding(windows=windows, last=flat[8:9])) == [("overlap", "last", "windows")]
    assert aliases(holding(windows=windows, behind=flat[9:])) == []


# ----------------------------------------------------------------------------------------------------- and nothing else


def test_what_has_no_memory_shares_none() -> None:
    """Empty tensors, also one object under two names; tensors on meta; absent biases; parameters without a shape."""
    empty, meta = torch.empty(0), nn.Parameter(torch.empty(3, device="meta"))
    assert aliases(holding(a=empty, b=empty, c=meta, d=meta, e=None, f=None)) == []
    lazy = nn.LazyLinear(3)
    assert aliases(nn.Sequential(lazy, lazy)) == []


def test_sparse_tensors_are_told_apart_as_objects() -> None:
    sparse = torch.eye(3).to_sparse()
    assert found(holding(a=sparse, b=sparse, c=torch.eye(3).to_sparse())) == [("same_object", "a", "b")]


def test_the_absent_biases_of_a_resnet_50_are_no_sharing() -> None:
    """25,557,032 parameters, as torchvision's own table has it."""
    net = torchvision.models.resnet50()
    assert sum(layer.bias is None for layer in net.modules() if isinstance(layer, nn.Conv2d)) == 53
    assert aliases(net) == []
    assert parameters(net) == 25_557_032


def test_freed_storages_share_nothing() -> None:
    """As fully sharded training leaves them: shapes, and no memory. A tie is still one object."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].bias = net[0].bias
    for parameter in net.parameters():
        parameter.data.untyped_storage().resize_(0)
    assert aliases(net) == [Alias("same_object", ("0.bias", "1.bias"))]


def test_wrappers_and_fake_tensors_share_nothing() -> None:
    """They have no address of their own; of two different ones nothing is in common, and a clone may be made."""
    net = holding(**{name: TwoTensor(torch.ones(3), torch.ones(3)) for name in "ab"})
    assert aliases(net) == []
    with FakeTensorMode():
        assert aliases(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == []


@pytest.mark.parametrize("kind", ["mlp", "zenke", "lenet", "resnet18", "resnet32"])
def test_the_suites_nets_share_nothing(kind: str) -> None:
    trunk = build_trunk(kind, (3, 16, 16), **({"hidden": [4, 4]} if kind == "mlp" else {}))
    net = HeadedNet(trunk, MultiHead(trunk.out_features, 0))
    for task in range(2):
        net.observe(task, [0, 1])
    assert aliases(net) == []


@pytest.mark.parametrize("seed", range(30))
def test_random_views_agree_with_a_list_of_their_elements(seed: int) -> None:
    """Six views of 80 numbers by random offset, counts and strides: two overlap where their sets of places meet."""
    drawn = torch.Generator().manual_seed(seed)
    flat, places, views = torch.zeros(80), torch.arange(80), {}
    for number in range(6):
        a, b, c, d, start = (int(torch.randint(low, 5, (), generator=drawn)) for low in (1, 1, 0, 0, 0))
        views[f"v{number}"] = ((a, b), (c * 3, d), start * 7)
    net = holding(**{name: flat.as_strided(*view) for name, view in views.items()})
    sets = {name: set(places.as_strided(*view).flatten().tolist()) for name, view in views.items()}
    wanted = {(a, b) for a in views for b in views if a < b and sets[a] & sets[b]}
    told = aliases(net)
    equal: dict[str, tuple[str, ...]] = {name: (name,) for name in views}
    equal |= {name: alias.names for alias in told if alias.kind == "same_view" for name in alias.names}
    pairs = [pair for a in told for pair in itertools.product(*(equal[name] for name in (a.names[0], a.names[-1])))]
    assert {tuple(sorted(pair)) for pair in pairs if pair[0] != pair[1]} == wanted
