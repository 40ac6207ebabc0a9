"""One layer in several places: as the unrolled net computes it, and stored once."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import prune

from clbench.nets import MLP, HeadedNet, LeNet, ZenkeNet
from clbench.nets.heads import MultiHead
from clbench.nets.shared.linked import LinkedConv2d, LinkedLinear
from clbench.nets.shared.maps import Same, Square
from clbench.nets.shared.reuse import Repeat, RepeatedTrunk, tie
from clbench.nets.shared.tasknet import TaskNet, refuse_shared_modules


def test_a_repeated_layers_gradient_is_the_sum_over_its_applications() -> None:
    """Of y = w (w (w x)) at w = 2, x = 1: dy/dw = 3 w^2 = 12, of each copy of the unrolled net w^2 = 4."""
    repeated, unrolled = Repeat(nn.Linear(1, 1, bias=False), 3, None), [nn.Linear(1, 1, bias=False) for _ in range(3)]
    for parameter in (*repeated.parameters(), *(layer.weight for layer in unrolled)):
        nn.init.constant_(parameter, 2.0)
    x = torch.ones(1, 1)
    torch.autograd.backward(repeated(x).sum())
    torch.autograd.backward(nn.Sequential(*unrolled)(x).sum())
    (weight,) = repeated.parameters()
    slopes = [cast(Tensor, layer.weight.grad).item() for layer in unrolled]
    assert cast(Tensor, weight.grad).item() == 12
    assert slopes == [4, 4, 4]


def test_a_repeated_layer_has_the_gradient_of_finite_differences() -> None:
    """A linear layer with tanh between, and a convolution that trims a pixel, the last time only."""
    torch.manual_seed(0)
    for module, shape in (
        (Repeat(nn.Linear(3, 3), 3, torch.tanh), (2, 3)),
        (Repeat(nn.Conv2d(2, 2, 3), 2, torch.tanh), (2, 2, 4, 4)),
    ):
        module.double()
        names = [name for name, _ in module.named_parameters()]
        held = [parameter.detach().clone().requires_grad_() for parameter in module.parameters()]
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

        def value(x: Tensor, *parameters: Tensor, net: nn.Module = module, names: list[str] = names) -> Tensor:
            return cast(Tensor, functional_call(net, dict(zip(names, parameters, strict=True)), (x,)))

        assert torch.autograd.gradcheck(value, (x, *held))


def test_a_repeated_layer_is_stored_once_under_one_name() -> None:
    """9 + 3, whatever the number of applications."""
    module = Repeat(nn.Linear(3, 3), 5)
    assert list(module.state_dict()) == ["layer.weight", "layer.bias"]
    assert sum(parameter.numel() for parameter in module.parameters()) == 12


def test_a_repeated_trunk_is_the_unrolled_net_with_tied_layers() -> None:
    """784-100-100 with its second layer twice: as 784-100-100-100 with the last two tied; 78,500 + 10,100 parameters.

    The unrolled net has 10,100 more, and its two copies' gradients add up to the tied one's.
    """
    torch.manual_seed(0)
    trunk = MLP((1, 28, 28), [100, 100])
    net, unrolled = RepeatedTrunk(trunk, 1), MLP((1, 28, 28), [100, 100, 100])
    state = trunk.state_dict()
    again = {key.replace("layers.1", "layers.2"): value for key, value in state.items()}
    unrolled.load_state_dict({**state, **again})
    x = torch.rand(4, 1, 28, 28)
    assert torch.equal(net(x), unrolled(x))
    assert net.applications() == {"layers.0": 1, "layers.1": 2}
    assert sum(p.numel() for p in net.parameters()) == 78_500 + 10_100
    assert sum(p.numel() for p in unrolled.parameters()) == 78_500 + 2 * 10_100
    for module in (net, unrolled):
        torch.autograd.backward(module(x).square().sum())
    copies = [cast(Tensor, unrolled.layer(i).weight.grad) for i in (1, 2)]
    torch.testing.assert_close(cast(Tensor, trunk.layer(1).weight.grad), copies[0] + copies[1])


def test_the_last_layers_that_fit_are_repeated() -> None:
    """784-100-100-100: one layer serves twice, or two; of Zenke's net, the second of each pair of convolutions."""
    deep = MLP((1, 28, 28), [100, 100, 100])
    assert list(RepeatedTrunk(deep, 1).applications().values()) == [1, 1, 2]
    assert list(RepeatedTrunk(deep, 2, 3).applications().values()) == [1, 3, 3]
    zenke = ZenkeNet((3, 16, 16), (4, 6), 8)
    assert RepeatedTrunk(zenke, 2).applications() == {"conv1": 1, "conv2": 2, "conv3": 1, "conv4": 2, "hidden": 1}


def test_a_repeated_convolution_keeps_the_map_until_its_last_application() -> None:
    """conv2 trims a pixel on every side: padded the first time, by hand; the features have their usual number."""
    torch.manual_seed(0)
    trunk = ZenkeNet((3, 16, 16), (4, 6), 8, (0.0, 0.0))
    net = RepeatedTrunk(trunk, 2)
    x = torch.rand(2, 3, 16, 16)
    y = x
    for i, conv in enumerate((trunk.conv1, trunk.conv2, trunk.conv3, trunk.conv4)):
        if i in (1, 3):
            y = F.relu(F.conv2d(y, conv.weight, conv.bias, padding=1))
        y = F.relu(conv(y))
        y = F.max_pool2d(y, 2) if i in (1, 3) else y
    torch.testing.assert_close(net(x), F.relu(trunk.hidden(y.flatten(1))))


def test_without_repetition_nothing_changes() -> None:
    trunk = MLP((1, 4, 4), [5, 5])
    x = torch.rand(3, 1, 4, 4)
    for net in (RepeatedTrunk(trunk, 0), RepeatedTrunk(trunk, 1, times=1)):
        assert torch.equal(net(x), trunk(x))


# ----------------------------------------------------------------------------------------------------------------- ties


def test_tied_layers_are_one_parameter_and_a_names_entry_each_in_the_state() -> None:
    """16 -> 5 -> 5 -> 5: 85 + 30; the state's two entries are the same memory and load into the net without ties."""
    net, plain = MLP((1, 4, 4), [5, 5, 5]), MLP((1, 4, 4), [5, 5, 5])
    tie(net, "layers.1", "layers.2")
    assert net.layer(1).weight is net.layer(2).weight
    assert net.layer(1) is not net.layer(2)
    assert sum(parameter.numel() for parameter in net.parameters()) == 85 + 30
    state = net.state_dict()
    assert state["layers.1.weight"].data_ptr() == state["layers.2.weight"].data_ptr()
    plain.load_state_dict(state)
    x = torch.rand(3, 1, 4, 4)
    assert torch.equal(net(x), plain(x))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.autograd.backward(net(x).sum())
    optimizer.step()
    assert torch.equal(net.layer(1).weight, net.layer(2).weight)


class _Trunk(nn.Sequential):
    out_features = 4


def _tied() -> Any:
    net = _Trunk(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tie(net, "0", "2")
    return net


def test_a_tied_net_survives_a_functional_call() -> None:
    """With zeros for its one weight and bias it answers 0; afterwards its parameters are the same objects as before."""
    net = _tied()
    weight, value, x = net[0].weight, net[0].weight.detach().clone(), torch.randn(2, 4)
    zeros = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    assert not functional_call(net, zeros, (x,)).any()
    assert net[0].weight is weight
    assert net[2].weight is weight
    assert torch.equal(weight, value)
    assert isinstance(weight, nn.Parameter)
    torch.testing.assert_close(net(x), F.linear(F.relu(F.linear(x, value, net[0].bias)), value, net[0].bias))


def test_a_tied_net_can_be_the_trunk_of_a_net_with_other_weights_for_every_task() -> None:
    """A factor of 2 for the one weight: both places use it, so that without biases the answer is 4 times as large."""
    net = HeadedNet(_tied(), MultiHead(4, 0))

    class Doubled(TaskNet):
        def new_part(self, generator: torch.Generator) -> nn.Module:
            return nn.Module()

        def weights(self, part: nn.Module) -> dict[str, Tensor]:
            return {"0.weight": 2 * self.trunk.get_parameter("0.weight"), "0.bias": torch.zeros(4)}

    torch.nn.init.zeros_(net.trunk.get_parameter("0.bias"))
    doubled: Any = Doubled(net, 0)
    doubled.observe(0, [0, 1])
    x = torch.randn(3, 4)
    head = doubled.head.task_parameters()[0]
    offset = next(parameter for parameter in head if parameter.ndim == 1)
    for _ in range(2):
        torch.testing.assert_close(doubled(x, 0) - offset, 4 * (doubled.head(doubled.trunk(x), 0) - offset))


def test_one_module_in_two_places_is_refused_where_its_weights_are_replaced() -> None:
    """A shared ReLU has nothing to replace, and is no mistake."""
    layer, relu = nn.Linear(4, 4), nn.ReLU()
    refuse_shared_modules(nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu))
    refuse_shared_modules(_tied())
    with pytest.raises(ValueError, match=r"'0' and '2' of the _Trunk are one module, .*shared\.reuse\.tie does"):
        TaskNet(HeadedNet(_Trunk(layer, relu, layer), MultiHead(4, 0)), 0)


def test_two_parameters_over_one_memory_are_refused_where_weights_are_replaced() -> None:
    """Training the one would move the other, which a task has masked, unseen."""
    net: Any = _Trunk(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = nn.Parameter(net[0].weight.data)
    with pytest.raises(ValueError, match=r"0\.weight, 1\.weight of the _Trunk are views of the same memory"):
        TaskNet(HeadedNet(net, MultiHead(4, 0)), 0)
    net[1].weight = nn.Parameter(net[0].weight.data[2:])
    with pytest.raises(ValueError, match=r"0\.weight, 1\.weight of the _Trunk are views of the same memory"):
        TaskNet(HeadedNet(net, MultiHead(4, 0)), 0)


def test_places_that_are_tied_keep_their_own_running_statistics() -> None:
    """One weight, two places: the second sees what the first has normalised, mean 0, not the input's mean 5."""
    net: Any = nn.Sequential(nn.BatchNorm1d(1, momentum=1.0), nn.BatchNorm1d(1, momentum=1.0))
    tie(net, "0", "1")
    net(torch.tensor([[4.0], [6.0]]))
    assert net[0].weight is net[1].weight
    assert net[0].running_mean.item() == 5
    assert abs(net[1].running_mean.item()) < 1e-6


def test_a_link_that_is_tied_keeps_its_source() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Identity(), nn.Identity())
    net[1], net[2] = LinkedLinear(net[0], Square()), LinkedLinear(net[0], Square())
    tie(net, "1", "2")
    assert net[2].source is net[0]


# ------------------------------------------------------------------------------------------------- a layer that is more


class _Doubling(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("padding", [0, 1, 2, "same", "valid"])
def test_a_repeated_convolution_is_called_whatever_it_is(padding: int | str) -> None:
    """Twice 2 conv(x): of the subclass, padded by 1 the first time, by hand; a hook runs once for each application."""
    torch.manual_seed(0)
    conv, x = _Doubling(3, 3, 3, padding=padding), torch.randn(2, 3, 6, 6)
    calls = list[int]()
    conv.register_forward_hook(lambda *_: calls.append(1))
    first = 2 * F.conv2d(x, conv.weight, conv.bias, padding=1)
    last = 2 * F.conv2d(first, conv.weight, conv.bias, padding=padding)
    torch.testing.assert_close(Repeat(conv, 2, None)(x), last)
    assert len(calls) == 2


def test_a_repeated_convolution_with_a_pruned_weight_trains_more_than_one_step() -> None:
    """The mask is applied before each pass, in the graph of that pass: a stale one would be gone after a step."""
    conv = nn.Conv2d(2, 2, 3)
    prune.l1_unstructured(conv, "weight", 0.5)  # type: ignore[no-untyped-call]
    module = Repeat(conv, 3)
    for _ in range(2):
        torch.autograd.backward(module(torch.randn(1, 2, 5, 5)).sum())


def test_a_repeated_linked_convolution_keeps_the_map_until_its_last_application() -> None:
    """8 x 8 with a kernel of 3: 6 x 6 after two applications, as the plain convolution's."""
    link = LinkedConv2d(nn.Conv2d(3, 3, 3), Same())
    assert Repeat(link, 2)(torch.randn(1, 3, 8, 8)).shape == (1, 3, 6, 6)


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_ties_are_all_made_or_none() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(3, 3))
    with pytest.raises(ValueError, match="'0' and '2' cannot be one layer"):
        tie(net, "0", "1", "2")
    assert net[0].weight is not net[1].weight


def test_layers_that_differ_in_type_or_training_are_not_tied() -> None:
    double, frozen = nn.Linear(2, 2).double(), nn.Linear(2, 2).requires_grad_(False)
    for other, said in ((double, "float64"), (frozen, "frozen")):
        with pytest.raises(ValueError, match=f"'0' and '1' cannot be one layer: .* and .*{said}"):
            tie(nn.Sequential(nn.Linear(2, 2), other), "0", "1")


def test_the_source_of_a_link_elsewhere_is_not_tied_over() -> None:
    source = nn.Linear(4, 4)
    net: Any = nn.Sequential(nn.Linear(4, 4), source, LinkedLinear(source, Square()))
    with pytest.raises(ValueError, match="'1' is the source of the link '2': tie first, then link to '0'"):
        tie(net, "0", "1")
    assert net[1] is source
    tie(net, "1", "0")
    assert net[2].source.weight is net[0].weight


def test_more_repeated_layers_than_fit_are_refused_with_the_reason_of_each() -> None:
    with pytest.raises(
        ValueError, match=r"2 layers .* 1 of 2 can be \(layers.1; layers.0: it maps 784 features to 100\)"
    ):
        RepeatedTrunk(MLP((1, 28, 28), [100, 100]), 2)
    with pytest.raises(ValueError, match=r"0 of 4 can be \(none; conv1: it maps 3 channels to 4; "):
        RepeatedTrunk(LeNet((3, 8, 8), (4, 5), (7, 6)), 1)


def test_what_cannot_be_repeated_or_tied_is_named() -> None:
    with pytest.raises(ValueError, match=r"-1 layers cannot be applied 2 times"):
        RepeatedTrunk(MLP((1, 4, 4), [5]), -1)
    with pytest.raises(TypeError, match="Linear is no chain of layers"):
        RepeatedTrunk(nn.Linear(1, 1), 0)
    with pytest.raises(ValueError, match="at least once, got 0 times"):
        Repeat(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match=r"stride \(2, 2\) and kernel \(3, 3\) do not keep the size"):
        Repeat(nn.Conv2d(2, 2, 3, stride=2), 2)
    with pytest.raises(ValueError, match="its padding_mode is circular"):
        Repeat(nn.Conv2d(2, 2, 3, padding_mode="circular"), 2)
    with pytest.raises(ValueError, match="it maps 3 channels to 4"):
        Repeat(nn.Conv1d(3, 4, 3), 3)
    with pytest.raises(ValueError, match="it maps 3 features to 4"):
        Repeat(LinkedLinear(nn.Linear(3, 4), Same()), 2)
    with pytest.raises(ValueError, match=r"no layer 'layers.7' in the MLP"):
        tie(MLP((1, 4, 4), [5, 5]), "layers.1", "layers.7")
    with pytest.raises(ValueError, match=r"'layers.0' and 'layers.1' cannot be one layer: Linear\(in_features=16"):
        tie(MLP((1, 4, 4), [5, 5]), "layers.0", "layers.1")
