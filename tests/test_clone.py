"""Clones: what stays shared is one tensor in both, everything else is a copy, ties and links survive."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.footprint import Holdings, footprint
from clbench.nets import HeadedNet, MultiHead, build_trunk
from clbench.nets.shared.aliases import Alias, aliases
from clbench.nets.shared.clone import ClonedNet, chosen, clone_module
from clbench.nets.shared.maps import LowRank

NETS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [9, 7]},
    "zenke": {"channels": (3, 4), "hidden": 8},
    "lenet": {"channels": (3, 4), "hidden": (6, 5)},
    "resnet18": {"width": 2},
    "resnet32": {},
}


def plain(kind: str = "mlp", shape: tuple[int, int, int] = (3, 16, 16), **settings: Any) -> HeadedNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = build_trunk(kind, shape, **(settings or NETS[kind]))
    return HeadedNet(trunk, MultiHead(trunk.out_features, 0))


def shared(a: nn.Module, b: nn.Module) -> set[str]:
    """Return the names of the tensors that are the same object in both."""
    left = [*a.named_parameters(remove_duplicate=False), *a.named_buffers(remove_duplicate=False)]
    right = dict([*b.named_parameters(remove_duplicate=False), *b.named_buffers(remove_duplicate=False)])
    return {name for name, tensor in left if right[name] is tensor}


def parameters(*modules: nn.Module) -> int:
    return footprint(Holdings(model=nn.ModuleList(modules))).parameters


def line() -> Any:
    """Return 3 -> 4 -> 2, in float64: (3 * 4 + 4) + (4 * 2 + 2) = 26 parameters."""
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


# ------------------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(
    ("share", "names", "count"),
    [
        ("none", set(), 52),
        ("all", {"0.weight", "0.bias", "2.weight", "2.bias"}, 26),
        (["0.weight"], {"0.weight"}, 40),
        ("*.bias", {"0.bias", "2.bias"}, 46),
        (["2.*", "0.bias"], {"2.weight", "2.bias", "0.bias"}, 38),
        (lambda name, value: value.ndim > 1, {"0.weight", "2.weight"}, 32),
    ],
)
def test_clone_and_original_count_what_they_share_once(share: Any, names: set[str], count: int) -> None:
    """Twice 26 less what is shared: 12 and 4 of the first layer, 8 and 2 of the second."""
    net = line()
    clone = clone_module(net, share)
    assert shared(net, clone) == names
    assert parameters(net, clone) == count
    assert {alias.kind for alias in aliases(nn.ModuleList([net, clone]))} <= {"same_object"}
    assert torch.equal(clone(torch.ones(1, 3).double()), net(torch.ones(1, 3).double()))


def test_a_name_that_fits_nothing_brings_the_nearest() -> None:
    known = r"Known: 0\.weight, 0\.bias, 2\.weight, 2\.bias"
    with pytest.raises(ValueError, match=rf"no parameter is named '0\.wieght'\. Did you mean '0\.weight'\? {known}$"):
        clone_module(line(), ["0.wieght"])
    with pytest.raises(ValueError, match=r"no parameter is named '2'\. Did you mean '2\.\*'\?"):
        clone_module(line(), ["2"])
    with pytest.raises(ValueError, match=r"no parameter is named 'layers\.\*\.bias'\. Did you mean '2\.bias'\? Known"):
        clone_module(line(), ["*.bias", "layers.*.bias"])
    with pytest.raises(ValueError, match=r"no buffer is named '0\.weight'\. Known: none"):
        clone_module(line(), "all", ["0.weight"])
    with pytest.raises(ValueError, match=r"no parameter is named 'x'\. Known: trunk\.conv\.weight, .* and 52 more$"):
        clone_module(plain("resnet18"), ["x"])


def test_buffers_are_shared_only_when_asked_for() -> None:
    net: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not shared(net, clone_module(net, "all")) & statistics
    assert shared(net, clone_module(net, "none", True)) == statistics
    assert shared(net, clone_module(net, "none", "*mean")) == {"1.running_mean"}
    clone = clone_module(net, "all")
    clone(torch.randn(8, 3))
    assert torch.equal(net[1].running_mean, torch.zeros(4))


# ------------------------------------------------------------------------------------------------------------- learning


def test_the_gradient_of_what_is_shared_is_the_sum_over_both() -> None:
    """L = f(x) + f'(z) with the first weight in common: dL / dW is that of two separate nets, added."""
    torch.manual_seed(0)
    net, x, z = line(), torch.randn(5, 3).double(), torch.randn(4, 3).double()
    apart = clone_module(net, "none")
    clone = clone_module(net, ["0.weight"])
    (net(x).sum() + clone(z).square().sum()).backward()
    got = net[0].weight.grad
    net.zero_grad()
    net(x).sum().backward()
    apart(z).square().sum().backward()
    torch.testing.assert_close(got, net[0].weight.grad + apart[0].weight.grad, rtol=1e-13, atol=0)
    torch.testing.assert_close(clone[0].bias.grad, apart[0].bias.grad, rtol=1e-13, atol=0)


def test_a_step_through_one_moves_the_other() -> None:
    net = line()
    clone = clone_module(net, "*.weight")
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    clone(torch.ones(2, 3).double()).sum().backward()
    torch.optim.SGD(clone.parameters(), lr=0.1).step()
    moved = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"0.weight", "2.weight"}
    assert torch.equal(net[0].bias, before["0.bias"])
    assert not torch.equal(clone[0].bias, before["0.bias"])


def test_gradients_are_not_copied() -> None:
    net = line()
    net(torch.ones(1, 3).double()).sum().backward()
    clone = clone_module(net, ["0.bias"])
    assert {name for name, value in clone.named_parameters() if value.grad is not None} == {"0.bias"}
    assert clone[0].bias.grad is net[0].bias.grad


def test_what_is_frozen_and_the_mode_are_copied() -> None:
    net = line().eval()
    net[2].weight.requires_grad_(False)
    clone = clone_module(net, "none")
    assert not clone.training
    assert [value.requires_grad for value in clone.parameters()] == [True, True, False, True]


def test_hooks_registered_later_belong_to_one_of_the_two() -> None:
    net, heard = line(), []
    net[0].register_forward_hook(lambda *_: heard.append("before"))
    clone = clone_module(net, "all")
    net[0].register_forward_hook(lambda *_: heard.append("after"))
    clone(torch.ones(1, 3).double())
    assert heard == ["before"]


def test_what_is_shared_stays_so_when_the_clone_is_moved() -> None:
    net = line()
    clone = clone_module(net, ["0.weight"]).float()
    assert clone[0].weight is net[0].weight
    assert (net[0].weight.dtype, net[0].bias.dtype) == (torch.float32, torch.float64)


# ------------------------------------------------------------------------------------------------------- ties and links


class Tied(nn.Module):
    """Embedding 7 x 5, a layer 5 x 5 + 5, a decoder on the embedding's weight with a bias of 7: 35 + 30 + 7 = 72."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.layer = nn.Linear(5, 5)
        self.decode = nn.Linear(5, 7)
        self.decode.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.decode(self.layer(self.embed(x)))
        return logits


def test_a_tie_survives_in_the_clone() -> None:
    """Nothing in common: 144 parameters and one tie in each."""
    net = Tied()
    clone = clone_module(net, "none")
    assert aliases(clone) == [Alias("same_object", ("decode.weight", "embed.weight"))]
    assert shared(net, clone) == set()
    assert parameters(net, clone) == 144


@pytest.mark.parametrize("name", ["embed.weight", "decode.weight", "decode.w*"])
def test_one_name_of_a_tie_shares_all_of_it(name: str) -> None:
    """144 less the 35 in common."""
    net = Tied()
    clone = clone_module(net, [name])
    assert shared(net, clone) == {"embed.weight", "decode.weight"}
    assert clone.decode.weight is clone.embed.weight
    assert parameters(net, clone) == 109
    assert sorted(chosen(net, [name])) == ["decode.weight", "embed.weight"]


class Square(nn.Module):
    """A layer whose weight is the square of another's, to which it holds a reference that is no submodule."""

    source: nn.Linear

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        object.__setattr__(self, "source", source)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.source.weight.square())


@pytest.mark.parametrize("share", ["none", "all"])
def test_a_link_leads_to_the_clones_own_source(share: str) -> None:
    """The link of the clone follows the clone's layer: with weight 2 it is 4, whatever the original's is."""
    net: Any = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    net[1] = Square(net[0])
    clone = clone_module(net, share)
    assert clone[1].source is clone[0]
    assert clone[1].source is not net[0]
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        clone[0].weight.fill_(2.0)
    x = torch.ones(1, 2)
    assert torch.equal(clone[1](x), torch.full((1, 2), 8.0))
    assert torch.equal(net[1](x), torch.full((1, 2), 2.0 if share == "none" else 8.0))


def viewed(*views: Tensor) -> nn.Module:
    net = nn.Module()
    for name, view in zip("abc", views, strict=False):
        net.register_parameter(name, nn.Parameter(view))
    return net


@pytest.mark.parametrize("share", [3, None, [0], [torch.zeros(1)]])
def test_a_share_that_names_nothing_is_refused_with_what_it_can_be(share: Any) -> None:
    with pytest.raises(ValueError, match="share is 'all', 'none', names, patterns or a function of name and"):
        clone_module(nn.Linear(2, 2), share)


def test_views_of_common_memory_are_refused_in_one_line() -> None:
    """A copy would have 12 numbers where the original has 8; equal views come apart just so."""
    flat = torch.zeros(8)
    refused = "^a, b are views of the same memory, which a clone pulls apart: share all of them$"
    for net in (viewed(flat[:6], flat[2:]), viewed(flat, flat), viewed(flat.view(2, 4), flat.view(2, 4).t())):
        assert parameters(copy.deepcopy(net)) > parameters(net)
        for share in ("none", ["a"]):
            with pytest.raises(ValueError, match=refused):
                clone_module(net, share)
        assert shared(net, clone_module(net, ["a", "b"])) == {"a", "b"}


def test_columns_that_interleave_are_cloned() -> None:
    whole = torch.arange(6.0).view(2, 3)
    net = viewed(whole[:, ::2], whole[:, 1:2])
    clone = clone_module(net, ["a"])
    assert parameters(net, clone) == 6 + 2


def test_buffers_over_one_storage_stay_so_in_the_clone() -> None:
    """Copies of plain tensors keep their storage in common; with one of the two shared they cannot."""
    net, flat = nn.Module(), torch.zeros(8)
    net.register_buffer("a", flat[:6])
    net.register_buffer("b", flat[2:])
    clone = clone_module(net, "none")
    assert aliases(clone) == aliases(net) == [Alias("overlap", ("a", "b"))]
    with pytest.raises(ValueError, match="a, b are views"):
        clone_module(net, "none", ["a"])


# ----------------------------------------------------------------------------------------------------------- known nets


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("share", ["none", "all", lambda name, value: value.ndim > 1])
def test_the_suites_nets_answer_the_same_as_their_clones(kind: str, share: Any) -> None:
    net = plain(kind).eval()
    net.observe(0, [0, 1])
    clone = clone_module(net, share)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(clone(x, 0), net(x, 0))
    wanted = {name for name, value in net.named_parameters() if share == "all" or (callable(share) and value.ndim > 1)}
    assert shared(net, clone) == wanted


@pytest.mark.parametrize("make", [torchvision.models.resnet18, torchvision.models.mobilenet_v3_small])
def test_nets_of_torchvision_are_cloned(make: Callable[[], nn.Module]) -> None:
    """All but the matrices is the clone's own: as many parameters more as the net has in vectors."""
    net = make()
    clone = clone_module(net, lambda name, value: value.ndim > 1)
    small = sum(value.numel() for value in net.parameters() if value.ndim < 2)
    assert parameters(net, clone) == parameters(net) + small


# ------------------------------------------------------------------------------------------------------- the cloned net


def scattered(net: ClonedNet, tasks: int = 3) -> ClonedNet:
    """Give the net tasks of two classes and move every parameter and statistic; in evaluation mode."""
    torch.manual_seed(1)
    for task in range(tasks):
        net.observe(task, [0, 1])
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            if value.is_floating_point():
                value.add_(torch.rand_like(value), alpha=0.1)
    return net.eval()


def cloned(kind: str = "mlp", share: Any = "none", **settings: Any) -> ClonedNet:
    return ClonedNet(lambda: plain(kind), share, 0, **settings)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_task_is_answered_by_a_plain_net_with_its_weights(kind: str, rank: int) -> None:
    """W + B A put into an ordinary net, beside the task's own tensors, gives the same logits."""
    net = scattered(cloned(kind, lambda name, value: value.ndim > 1, rank=rank))
    x = torch.rand(2, 3, 16, 16)
    for task in net.tasks():
        twin, part = plain(kind).eval(), net.part(task)
        twin.observe(task, [0, 1])
        twin.trunk.load_state_dict(part.get_submodule("trunk").state_dict() | net.weights(part))
        twin.head.load_state_dict(net.head.state_dict())
        assert torch.equal(net(x, task), twin(x, task))


def test_a_rank_one_adapter_adds_the_product_worked_out_by_hand() -> None:
    """B = (1, 2)^T, A = (3, 0, 1) make ((3, 0, 1), (6, 0, 2)), on W = 1 everywhere ((4, 1, 2), (7, 1, 3)).

    Parameters: W and its bias 6 + 2, the second task's bias 2, B and A 2 + 3; of both heads 2 * (2 * 1 + 1) = 6: 21.
    """
    net = ClonedNet(lambda: plain("mlp", (1, 1, 3), hidden=[2]), "*.weight", 0, rank=4)
    net.observe(0, [0])
    net.observe(1, [0])
    part = net.part(1)
    assert {name: tuple(value.shape) for name, value in part.get_submodule("adapters").named_parameters()} == {
        "layers/0/weight.up": (2, 2), "layers/0/weight.down": (2, 3)
    }  # fmt: skip  # rank 4 is more than the matrix has

    net = ClonedNet(lambda: plain("mlp", (1, 1, 3), hidden=[2]), "*.weight", 0, rank=1)
    net.observe(0, [0])
    net.observe(1, [0])
    part = net.part(1)
    with torch.no_grad():
        net.trunk.get_parameter("layers.0.weight").fill_(1.0)
        for (_, value), new in zip(
            part.get_submodule("adapters").named_parameters(), ([[1.0], [2.0]], [[3.0, 0.0, 1.0]]), strict=True
        ):
            value.copy_(torch.tensor(new))
    assert net.weights(part)["layers.0.weight"].tolist() == [[4.0, 1.0, 2.0], [7.0, 1.0, 3.0]]
    assert net.weights(net.part(0)) == {}
    assert parameters(net) == 21


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("begins", ["born", "last"])
def test_an_unseen_task_is_answered_as_it_will_be_born(rank: int, begins: Any) -> None:
    net, x = scattered(cloned("resnet18", ["conv.weight"], rank=rank, begins=begins)), torch.rand(3, 3, 16, 16)
    before = net(x, 7)
    assert torch.equal(net(x, 7), before)
    net.observe(7, [0, 1])
    assert torch.equal(net(x, 7), before)
    assert not net._newborn


def test_what_a_task_has_for_itself_begins_at_birth_or_where_the_last_one_is() -> None:
    """The common weight is the first task's in both; the own bias is the newborn net's, or the second task's."""
    born = plain().trunk.get_parameter("layers.0.bias")
    for begins in ("born", "last"):
        net = scattered(cloned("mlp", "*.weight", begins=begins), 2)
        last = net.part(1).get_parameter("trunk.layers.0.bias").detach().clone()
        net.observe(2, [0, 1])
        new = net.part(2).get_submodule("trunk")
        assert new.get_parameter("layers.0.weight") is net.trunk.get_parameter("layers.0.weight")
        assert torch.equal(new.get_parameter("layers.0.bias"), born if begins == "born" else last)


def test_running_statistics_are_common_where_their_norm_is() -> None:
    net = scattered(cloned("resnet18", ["norm.*", "*.conv1.weight"]))
    first, second = (net.part(task).get_submodule("trunk") for task in (0, 1))
    assert {name for name in shared(first, second) if "norm" in name} == {
        "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
    }  # fmt: skip
    assert "norm.running_mean" in cloned("resnet18", "all").shared_buffers
    assert not cloned("resnet18", "none").shared_buffers


def test_common_buffers_stay_common_when_the_net_is_moved() -> None:
    net = scattered(cloned("resnet18", "all")).double()
    first, second = (net.part(task).get_submodule("trunk") for task in (0, 1))
    assert len(shared(first, second)) == len(first.state_dict())
    assert first is net.trunk


def test_freezing_stops_what_is_common_and_its_statistics() -> None:
    """Whole trunk: all of it in evaluation mode. In part: norms that are shared; their neighbours train on."""
    net = scattered(cloned("resnet18", ["norm.*"])).train()
    assert not net.frozen
    assert [tuple(value.shape) for value in net.freeze()] == [(2,), (2,)]
    assert net.frozen
    trunks = [net.part(task).get_submodule("trunk") for task in net.tasks()]
    assert all(not trunk.get_submodule("norm").training for trunk in trunks)
    assert all(trunk.get_submodule("stages.0.0.norm1").training for trunk in trunks)
    whole = scattered(cloned("resnet18", "all")).train()
    whole.freeze()
    assert not any(module.training for module in whole.trunk.modules())
    nothing = scattered(cloned("mlp", "none")).train()
    assert nothing.freeze() == []
    assert not nothing.frozen
    assert nothing.trunk.training


def test_the_books_say_whose_each_tensor_is() -> None:
    """MLP 768-9-7 in two tasks: weights 768 * 9 + 9 * 7 = 6,975 common; own are biases 16 and a head 7 * 2 + 2 = 16."""
    net = scattered(cloned("mlp", "*.weight"), 2)
    own = {task: sum(value.numel() for value in values) for task, values in net.task_parameters().items()}
    assert own == {0: 32, 1: 32}
    counted = footprint(Holdings(model=net, task_parameters=net.task_parameters()))
    assert (counted.parameters, counted.parameters_shared, counted.parameters_per_task) == (7039, 6975, 64)
    norms = scattered(cloned("resnet18", lambda name, value: value.ndim > 1), 2)
    buffers = [value for value in norms.task_tensors()[1] if not isinstance(value, nn.Parameter)]
    assert len(buffers) == 3 * sum(isinstance(module, nn.BatchNorm2d) for module in norms.trunk.modules())


def test_new_adapters_are_loras_low_rank_corrections() -> None:
    """MLP 768-9-7: task 1 is what the base is when new, B (9, 2) and A (2, 768) of the first layer; task 0 has none.

    With G = dL/dW the first gradients are dL/dB = G A^T and dL/dA = B^T G = 0, and dL/dW = G is the base's own.
    """
    net = scattered(cloned("mlp", "*.weight", rank=2), 1)
    net.observe(1, [0, 1])
    (adapter, _) = net.part(1).get_submodule("adapters").children()
    assert isinstance(adapter, LowRank)
    assert not list(net.part(0).get_submodule("adapters").children())
    weight = net.trunk.get_parameter("layers.0.weight")
    assert torch.equal(net.weights(net.part(1))["layers.0.weight"], weight)
    assert adapter.down.shape == (2, 768)
    torch.autograd.backward(net(torch.rand(2, 3, 16, 16), 1).square().sum())
    assert weight.grad is not None
    assert adapter.up.grad is not None
    assert adapter.down.grad is not None
    assert bool(weight.grad.any())
    torch.testing.assert_close(adapter.up.grad, weight.grad @ adapter.down.T)
    assert not bool(adapter.down.grad.any())
    assert [name for name in net.state_dict() if "adapters" in name] == [
        f"parts.1.adapters.layers/{layer}/weight.{half}" for layer in (0, 1) for half in ("up", "down")
    ]


def test_adapters_need_a_matrix_in_common() -> None:
    with pytest.raises(ValueError, match="adapters are added to shared matrices, and none is shared"):
        cloned("mlp", "*.bias", rank=1)


def test_a_state_goes_into_a_fresh_net() -> None:
    net, x = scattered(cloned("resnet18", ["*conv1.weight"], rank=1)), torch.rand(2, 3, 16, 16)
    twin = cloned("resnet18", ["*conv1.weight"], rank=1)
    twin.load_state_dict(net.state_dict())
    assert all(torch.equal(net(x, task), twin.eval()(x, task)) for task in net.tasks())
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in net.named_parameters()]
