"""Linked layers: gradients by finite differences, functions by hand, and where a link's source is found or missed."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from clbench.nets import shared
from clbench.nets.shared.features import WeightMaps
from clbench.nets.shared.linked import Link, LinkedConv2d, LinkedLinear, check_links, links
from clbench.nets.shared.maps import (
    Compose,
    Function,
    LowRank,
    QuarterTurns,
    Resize,
    Rotate,
    Same,
    Scale,
    Square,
    as_module,
)

CONV, LINEAR = (4, 2, 3, 3), (4, 3)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def tanh(weight: Tensor) -> Tensor:
    return weight.tanh()


MAPS: list[tuple[str, Callable[[tuple[int, ...]], Function], set[int]]] = [
    ("same", lambda shape: Same(), {1, 2, 4}),
    ("square", lambda shape: Square(), {1, 2, 4}),
    ("scale", lambda shape: Scale(start=1.5), {1, 2, 4}),
    ("scale per unit", lambda shape: Scale(shape[0], 0.7), {1, 2, 4}),
    ("quarter turns", lambda shape: QuarterTurns(3), {4}),
    ("rotate", lambda shape: Rotate(0.3), {4}),
    ("low rank", lambda shape: LowRank(shape, 2, generator()), {2, 4}),
    ("crop", lambda shape: Resize(shape, (3, *shape[1:])), {1, 2, 4}),
    ("pad, another kernel", lambda shape: Resize(shape, (5, 1, 2, 5)), {4}),
    ("mix", lambda shape: Resize(shape, (5, 6, *shape[2:])[: len(shape)], "mix"), {1, 2, 4}),
    ("any callable", lambda shape: tanh, {1, 2, 4}),
    ("composed", lambda shape: Compose(Scale(shape[0]), tanh, LowRank(shape, 1, generator())), {2, 4}),
]
CASES = [(name, make, shape) for name, make, dims in MAPS for shape in (CONV, LINEAR, (4,)) if len(shape) in dims]


def stirred(module: nn.Module) -> nn.Module:
    """Move every parameter off its start, so that no gradient is zero by chance; float64."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(), dtype=torch.float64))
    return module


class Net(nn.Module):
    """A convolution, one linked to it by a square and a low-rank correction, and two linear layers likewise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 2, 3, padding=1)
        self.again = LinkedConv2d(self.conv, Compose(Square(), Scale(2)), Same())
        self.linear = nn.Linear(8, 8)
        self.linked = LinkedLinear(self.linear, LowRank((8, 8), 2), Square())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linked(self.linear(self.again(self.conv(x)).flatten(1)))
        return out


X = torch.rand(3, 2, 2, 2, generator=generator())


# ------------------------------------------------------------------------------------------------------------ functions


@pytest.mark.parametrize(("name", "make", "shape"), CASES)
def test_every_function_has_the_gradient_of_finite_differences(name: str, make: Any, shape: tuple[int, ...]) -> None:
    fn = stirred(as_module(make(shape)))
    names = [key for key, _ in fn.named_parameters()]
    held = [parameter.detach().clone().requires_grad_() for parameter in fn.parameters()]
    weight = torch.randn(shape, generator=generator(), dtype=torch.float64, requires_grad=True)

    def value(weight: Tensor, *parameters: Tensor) -> Tensor:
        return cast(Tensor, functional_call(fn, dict(zip(names, parameters, strict=True)), (weight,)))

    assert torch.autograd.gradcheck(value, (weight, *held))


@pytest.mark.parametrize(("name", "make", "shape"), CASES)
def test_every_function_maps_a_batch_of_weights_at_once(name: str, make: Any, shape: tuple[int, ...]) -> None:
    fn = stirred(as_module(make(shape)))
    weights = torch.randn(3, *shape, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(vmap(fn)(weights), torch.stack([fn(weight) for weight in weights]))


@pytest.mark.parametrize("name", ["same", "scale", "scale per unit", "low rank"])
def test_new_functions_are_the_identity_to_the_bit(name: str) -> None:
    weight = torch.randn(CONV, generator=generator())
    new = {"same": Same(), "scale": Scale(), "scale per unit": Scale(4), "low rank": LowRank(CONV, 2)}[name]
    assert torch.equal(new(weight), weight)


def test_functions_by_hand() -> None:
    """On W = (1, 2; 3, 4): squares; rows times 2 and -1; W + (1, 2)^T (1, 0); the first row, and a column of zeros."""
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    scale, correction = Scale(2), LowRank((2, 2), 1)
    with torch.no_grad():
        scale.factor.copy_(torch.tensor([2.0, -1.0]))
        correction.up.copy_(torch.tensor([[1.0], [2.0]]))
        correction.down.copy_(torch.tensor([[1.0, 0.0]]))
    assert Square()(weight).tolist() == [[1, 4], [9, 16]]
    assert scale(weight).tolist() == [[2, 4], [-3, -4]]
    assert correction(weight).tolist() == [[2, 2], [5, 4]]
    assert Resize((2, 2), (1, 3))(weight).tolist() == [[1, 2, 0]]
    assert Resize((2, 2), (1, 3), "mix")(weight).tolist() == [[1, 2, 0]]
    assert Compose(Square(), scale)(weight).tolist() == [[2, 8], [-9, -16]]


@pytest.mark.parametrize("shape", [(6, 5), (4, 2, 3, 3)], ids=str)
def test_a_new_correction_is_loras(shape: tuple[int, ...]) -> None:
    """W + B A: B (out, r) is zero, A (r, m) within 1 / sqrt(m), which is Kaiming's uniform with a = sqrt 5.

    With G = dL/dW the first gradients are dL/dB = G A^T, and dL/dA = B^T G = 0. L = <G, f(W)>.
    """
    correction, rank = LowRank(shape, 2, generator()), 2
    out, fan_in = shape[0], math.prod(shape[1:])
    twin = torch.empty(rank, fan_in)
    nn.init.kaiming_uniform_(twin, a=math.sqrt(5), generator=generator())
    torch.testing.assert_close(correction.down.detach(), twin)
    assert torch.equal(correction.up, torch.zeros(out, rank))
    slope = torch.randn(shape, generator=generator())
    torch.autograd.backward((slope * correction(torch.ones(shape))).sum())
    assert correction.up.grad is not None
    assert correction.down.grad is not None
    torch.testing.assert_close(correction.up.grad, slope.flatten(1) @ twin.T)
    assert not bool(correction.down.grad.any())


def test_a_kernel_turned_by_hand() -> None:
    """Counter-clockwise the right column (3, 6, 9), read from the top, becomes the top row."""
    kernel = torch.arange(1.0, 10).view(1, 1, 3, 3)
    turned = torch.tensor([[3.0, 6, 9], [2, 5, 8], [1, 4, 7]])
    assert torch.equal(QuarterTurns()(kernel)[0, 0], turned)
    torch.testing.assert_close(Rotate(math.pi / 2)(kernel)[0, 0].detach(), turned, atol=1e-5, rtol=0)
    torch.testing.assert_close(Rotate(math.pi)(kernel).detach(), kernel.flip(2, 3), atol=1e-5, rtol=0)
    assert torch.equal(Rotate()(kernel), kernel)


def test_an_eighth_turn_by_hand() -> None:
    """A point on the right, (1, 0), goes to (r, r) above it, r = 1 / sqrt(2).

    The corner (1, 1) of the result looks at (cos 45 + sin 45, ..) = (1.414, 0): |dx| to the point 0.414, so it gets
    1 - 0.414; so does no other corner but the one below, which looks at (0, -1.414).
    """
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1, 2] = 1
    turned = Rotate(math.pi / 4)(kernel)[0, 0]
    assert float(turned[0, 2].detach()) == pytest.approx(2 - math.sqrt(2), abs=1e-6)
    assert float(turned[2, 2].detach()) == pytest.approx(0, abs=1e-6)


def test_a_kernel_is_resized_like_an_image() -> None:
    """Two points made three: middles of new ones at -1/6, 1/2, 7/6 of the old, so the ends stay and the middle halves.

    Three made one, at 1: the middle. (0, 4) made four, at -1/4, 1/4, 3/4, 5/4: 0, 1, 3, 4, as `WeightMaps` sees it.
    """
    kernel = torch.tensor([[1.0, 3.0], [5.0, 7.0]]).view(1, 1, 2, 2)
    larger = Resize((1, 1, 2, 2), (1, 1, 3, 3))(kernel)[0, 0]
    torch.testing.assert_close(larger, torch.tensor([[1.0, 2, 3], [3, 4, 5], [5, 6, 7]]))
    assert Resize((1, 1, 3, 3), (1, 1, 1, 1))(torch.arange(9.0).view(1, 1, 3, 3)).item() == 4
    row = torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    source = nn.Conv2d(1, 1, (1, 2))
    source.weight = nn.Parameter(row)
    assert Resize((1, 1, 1, 2), (1, 1, 1, 4))(row).flatten().tolist() == [0, 1, 3, 4]
    assert WeightMaps(source).features((1, 4)).flatten().tolist() == [0, 1, 3, 4]


# --------------------------------------------------------------------------------------------------------------- layers


def test_linked_layers_have_the_gradients_of_finite_differences() -> None:
    """Through input, source, and the functions' own parameters, weight and bias; float64."""
    for source, fn, kind, shape in (
        (nn.Conv2d(2, 4, 3, stride=2, padding=1), LowRank(CONV, 2, generator()), LinkedConv2d, (2, 2, 4, 4)),
        (nn.Linear(3, 4), LowRank(LINEAR, 2, generator()), LinkedLinear, (2, 3)),
    ):
        net = stirred(nn.ModuleDict({"source": source, "link": kind(source, Compose(Square(), fn), Scale(4))}))
        names = [name for name, _ in net.named_parameters()]
        held = [parameter.detach().clone().requires_grad_() for parameter in net.parameters()]
        x = torch.randn(shape, generator=generator(), dtype=torch.float64, requires_grad=True)

        def value(x: Tensor, *parameters: Tensor, net: Any = net, names: list[str] = names) -> Tensor:
            given = {f"root.{name}": p for name, p in zip(names, parameters, strict=True)}
            return cast(Tensor, functional_call(Through(net), given, (x,)))

        assert names[:2] == ["source.weight", "source.bias"]
        assert torch.autograd.gradcheck(value, (x, *held))


class Through(nn.Module):
    """Runs the link of a net."""

    def __init__(self, root: Any) -> None:
        super().__init__()
        self.root = root

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.root["link"](x)
        return out


def test_a_link_computes_what_a_plain_layer_with_its_weight_does() -> None:
    """Every setting of a convolution is the source's where it is not given."""
    source = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)
    twin = nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2)
    link = LinkedConv2d(source, Square(), Square())
    twin.load_state_dict({name: value.square() for name, value in source.state_dict().items()})
    x = torch.rand(2, 4, 9, 9)
    assert torch.equal(link(x), twin(x))
    wider = LinkedConv2d(source, Resize((6, 2, 3, 3), (8, 4, 5, 5)), in_channels=4, out_channels=8, kernel_size=5,
                         padding="same", stride=1, dilation=1, groups=1)  # fmt: skip
    assert wider(x).shape == (2, 8, 9, 9)
    assert wider.bias is None


def test_a_training_step_moves_source_and_link_together() -> None:
    """The loss (w x)(w^2 x) at w = 2, x = 1: dL/dw = 3 w^2 = 12, both ways together; w becomes 2 - 1.2."""
    source = nn.Linear(1, 1, bias=False)
    link = LinkedLinear(source, Square())
    nn.init.constant_(source.weight, 2.0)
    net = nn.ModuleList([source, link])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    x = torch.ones(1, 1)
    torch.autograd.backward((source(x) * link(x)).sum())
    assert source.weight.grad is not None
    assert source.weight.grad.item() == 12
    optimizer.step()
    assert source.weight.item() == pytest.approx(0.8)
    assert link.weight.item() == pytest.approx(0.64)


def test_a_bias_needs_a_function_and_a_source_that_has_one() -> None:
    """`Same` takes the source's over: it is the same tensor."""
    source = nn.Linear(3, 4)
    assert LinkedLinear(nn.Linear(3, 4, bias=False), Same(), Square()).bias is None
    assert LinkedLinear(source, Same()).bias is None
    assert LinkedLinear(source, Same(), Same()).bias is source.bias


def test_two_links_learn_one_function_that_moves_to_the_sources_type() -> None:
    """The module is taken, not copied. L = the sums of s W over both links, W of 6 ones: dL/ds = 12."""
    scale, source = Scale(), nn.Linear(3, 2, bias=False).double()
    nn.init.ones_(source.weight)
    links = [LinkedLinear(source, scale), LinkedLinear(source, scale)]
    assert all(link.fn is scale for link in links)
    assert scale.factor.dtype == torch.float64
    torch.autograd.backward(torch.stack([link.weight.sum() for link in links]).sum())
    assert scale.factor.grad is not None
    assert scale.factor.grad.item() == 12


def test_a_link_can_be_a_source() -> None:
    """((w^2)^2) at w = 3 is 81, with derivative 4 w^3 = 108."""
    source = nn.Linear(1, 1, bias=False)
    nn.init.constant_(source.weight, 3.0)
    twice = LinkedLinear(LinkedLinear(source, Square()), Square())
    assert twice.weight.item() == 81
    (slope,) = torch.autograd.grad(twice.weight.sum(), source.weight)
    assert slope.item() == 108


# ------------------------------------------------------------------------------------------------- a net that has links


def test_a_net_counts_and_saves_the_source_and_the_functions_own_parameters_alone() -> None:
    """36 + 2 of the convolution, 2 factors; 64 + 8 of the linear layer, 2 * (8 + 8) of the correction: 144."""
    net = Net()
    assert sum(parameter.numel() for parameter in net.parameters()) == 36 + 2 + 2 + 64 + 8 + 32
    assert list(net.state_dict()) == [
        "conv.weight", "conv.bias", "again.fn.steps.1.factor",
        "linear.weight", "linear.bias", "linked.fn.up", "linked.fn.down",
    ]  # fmt: skip
    other = Net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(X), net(X))


def test_parametrising_would_keep_a_tensor_that_nothing_trains() -> None:
    """The reason for layers of our own: 64 weights of the original, counted and saved, without a gradient."""
    source, layer = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    class Linked(nn.Module):
        def forward(self, original: Tensor) -> Tensor:
            return source.weight.square()

    nn.utils.parametrize.register_parametrization(layer, "weight", Linked())
    torch.autograd.backward(layer(torch.rand(2, 8)).sum())
    (phantom,) = layer.parameters()
    assert phantom.numel() == 64
    assert phantom.grad is None
    assert source.weight.grad is not None
    assert list(LinkedLinear(source, Square()).parameters()) == []


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_net_has_links_to_its_own_sources(how: str) -> None:
    net = Net()
    if how == "deepcopy":
        twin = copy.deepcopy(net)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    check_links(twin)
    assert twin.again.source is twin.conv
    assert twin.linked.source is twin.linear
    assert torch.equal(twin(X), net(X))
    with torch.no_grad():
        twin.conv.weight.zero_()
    assert torch.equal(twin.again.weight, torch.zeros_like(twin.again.weight))
    assert float(net.again.weight.detach().abs().sum()) > 0


def test_a_link_follows_its_source_to_another_type_and_by_functional_call() -> None:
    """Source's weight replaced by ones: a square of ones times the factors, 1."""
    net = Net().double()
    assert net(X.double()).dtype == torch.float64
    assert net.again.weight.dtype == net.linked.weight.dtype == torch.float64
    ones = {"conv.weight": torch.ones_like(net.conv.weight), "conv.bias": torch.zeros(2).double()}
    manual = copy.deepcopy(net)
    manual.load_state_dict({**manual.state_dict(), **ones})
    assert torch.equal(functional_call(net, ones, (X.double(),)), manual(X.double()))
    net.to("meta")
    assert net.again.weight.is_meta


def test_nets_with_links_run_side_by_side_under_vmap() -> None:
    nets = [Net() for _ in range(3)]
    for i, net in enumerate(nets):
        with torch.no_grad():
            net.conv.weight.mul_(i + 1)
    stacked, _ = torch.func.stack_module_state(cast(Any, nets))
    together = vmap(lambda parameters: functional_call(nets[0], parameters, (X,)))(stacked)
    torch.testing.assert_close(together, torch.stack([net(X) for net in nets]))


def test_the_links_of_a_net_are_listed_with_their_sources_and_seen_when_it_is_printed() -> None:
    net = Net()
    assert links(net) == {"again": "conv", "linked": "linear"}
    assert "(linked): LinkedLinear(\n    source=Linear of weight (8, 8)" in repr(net)


def test_the_example_of_the_package_runs_as_printed() -> None:
    """The first weight is shared with the twin and looked at by the link; Repeat says how often."""
    code = "\n".join(line[4:] for line in (shared.__doc__ or "").splitlines() if line.startswith("    "))
    names: dict[str, Any] = {}
    exec(code, names)
    assert links(names["net"]) == {"1": "0"}
    assert names["twin"][0].weight is names["net"][0].weight
    assert "times=3" in repr(names["net"])


def test_a_link_borrows_what_its_functions_look_at() -> None:
    """A link to a link looks at the first layer's; a bias only where the link has one of its own making."""
    layer = nn.Linear(4, 4)
    plain, biased = LinkedLinear(layer, Square()), LinkedLinear(layer, Square(), Same())
    assert [id(found) for found in plain.borrowed()] == [id(layer.weight)]
    assert [id(found) for found in biased.borrowed()] == [id(layer.weight), id(layer.bias)]
    twice = LinkedLinear(biased, Same(), Same())
    assert [id(found) for found in twice.borrowed()] == [id(layer.weight), id(layer.bias)]


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_a_link_to_a_layer_outside_the_network_is_named_with_its_source() -> None:
    net = Net()
    check_links(net)
    net.linked = LinkedLinear(nn.Linear(8, 8), Same())
    with pytest.raises(ValueError, match=r"link 'linked': its source, a Linear of weight \(8, 8\), is outside the Net"):
        check_links(net)


def test_a_copy_of_a_link_alone_is_told_apart_from_one_of_the_net() -> None:
    """A deepcopy takes a copy of the source along, which belongs to nothing."""
    alone = copy.deepcopy(Net().again)
    with pytest.raises(ValueError, match=r"the link: its source, a Conv2d .* copy or save the net, not the link alone"):
        check_links(alone)
    net = Net()
    net.again = alone
    with pytest.raises(ValueError, match="link 'again'"):
        check_links(net)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: LinkedLinear(nn.Linear(3, 4), Square(), out_features=5),
         r"LinkedLinear: the source's weight is \(4, 3\), this layer's \(5, 3\), and Square yields \(4, 3\)"),
        (lambda: LinkedLinear(nn.Linear(3, 4), torch.t), r"the source's weight is \(4, 3\), .* and t yields \(3, 4\)"),
        (lambda: LinkedLinear(nn.Linear(3, 4), Scale(5)),
         r"weight is \(4, 3\), this layer's \(4, 3\), and Scale does not map one to the other: a scale of 5 units"),
        (lambda: LinkedLinear(nn.Linear(3, 4), Same(), Resize((4,), (5,))),
         r"the source's bias is \(4,\), this layer's \(4,\), and Resize yields \(5,\)"),
        (lambda: LinkedLinear(nn.Linear(3, 4), Rotate(0.1)), "only a convolution's weight has kernels to turn"),
        (lambda: LinkedConv2d(nn.Conv2d(2, 4, 3), Same(), in_channels=3, groups=2), "2 groups do not divide 3 and 4"),
        (lambda: LinkedConv2d(nn.Conv2d(2, 4, (2, 3)), QuarterTurns()),
         r"this layer's \(4, 2, 2, 3\), and QuarterTurns yields \(4, 2, 3, 2\)"),
        (lambda: LinkedConv2d(nn.Conv2d(2, 4, 3, padding_mode="circular"), Same()), "padding_mode is circular"),
        (lambda: LinkedConv2d(nn.Linear(2, 4), Same()), "give in_channels: the source, a Linear, has none"),
        (lambda: LowRank((4, 3), 0), r"rank 0: of a weight \(4, 3\) it is from 1 to 3"),
        (lambda: LowRank((4, 3), 4), r"rank 4: of a weight \(4, 3\) it is from 1 to 3"),
        (lambda: LowRank((4,), 1), r"not of shape \(4,\)"),
        (lambda: LinkedLinear(nn.Linear(3, 4), LowRank((3, 3), 1)), r"a correction of \(3, 3\) \(out, fan-in\)"),
        (lambda: Scale(0), "at least one unit, got 0"),
        (lambda: Resize((4, 3), (4, 3, 3, 3)), r"no weight of shape \(4, 3\) can be resized to \(4, 3, 3, 3\)"),
        (lambda: LinkedLinear(nn.Linear(5, 4), Resize((4, 3), (4, 5))), r"a resize of \(4, 3\), a weight of \(4, 5\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_linked_is_told_in_a_line(make: Callable[[], Any], line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: LinkedLinear(nn.Linear(4, 4), lambda w: w.mul_(2)), "<lambda> changes the source's weight in place"),
        (lambda: LinkedLinear(nn.Linear(4, 4), cast(Any, lambda w: None)), "float32, and <lambda> yields NoneType"),
        (lambda: LinkedLinear(nn.Linear(4, 4), lambda w: w.long()), "and <lambda> yields torch.int64"),
        (lambda: LinkedLinear(nn.LazyLinear(4), Square(), in_features=3, out_features=4), "run the source once before"),
        (lambda: LinkedConv2d(nn.Conv1d(3, 3, 3), Square()), r"two dimensions; its kernel_size is \(3,\)"),
        (lambda: LinkedConv2d(nn.Conv2d(3, 3, 3), Square(), kernel_size=cast(Any, (3, 3, 3))),
         r"its kernel_size is \(3, 3, 3\)"),
        (lambda: LinkedConv2d(nn.Conv2d(3, 3, 3), Square(), groups=0), "0 groups do not divide 3 and 3 channels"),
        (lambda: LowRank((4, 4), cast(Any, 1.5)), "rank 1.5: of a weight"),
        (lambda: LowRank((4, 4), cast(Any, "2")), "rank '2': of a weight"),
        (lambda: Resize((4, 4), (5, 5), cast(Any, "mxi")), "channels are one of crop, mix; got 'mxi'"),
    ],
)  # fmt: skip
def test_a_link_that_cannot_be_is_refused_in_one_line(make: Callable[..., Any], line: str) -> None:
    with pytest.raises(ValueError, match=line) as told:
        make()
    assert "\n" not in str(told.value)


def test_building_a_link_leaves_its_source_as_it_is() -> None:
    """Even by a function that would double it in place, which is refused."""
    source = nn.Linear(4, 4)
    weight = source.weight.detach().clone()
    with pytest.raises(ValueError, match="in place"):
        LinkedLinear(source, lambda w: w.mul_(2))
    assert torch.equal(source.weight, weight)


def test_a_source_without_a_weight_is_refused() -> None:
    with pytest.raises(TypeError, match="the source of a Link has a weight; a ReLU has none"):
        Link(nn.ReLU(), Same(), None, (1, 1))
