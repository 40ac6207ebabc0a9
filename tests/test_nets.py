"""The trunks: their sizes by hand, their shapes, and what they refuse."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import clbench.nets
from clbench.nets import (
    MLP,
    HeadedNet,
    LeNet,
    MultiHead,
    NormedMLP,
    ResNet18,
    ResNet32,
    SingleHead,
    Trunk,
    ZenkeNet,
    build_head,
    build_trunk,
)

DIGITS, MNIST, CIFAR = (1, 8, 8), (1, 28, 28), (3, 32, 32)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def six_heads_of_ten(trunk: Trunk) -> HeadedNet:
    net = HeadedNet(trunk, MultiHead(trunk.out_features, init_seed=0))
    for task in range(6):
        net.observe(task, range(10))
    return net


# -------------------------------------------------------------------------------------------------------------- sizes


def test_mlp_400_400_has_478410_parameters() -> None:
    """784 * 400 + 400 = 314,000; 400 * 400 + 400 = 160,400; 400 * 10 + 10 = 4,010. Sum 478,410.

    Five heads of two (HNET's Split MNIST; 400 * 2 + 2 = 802 each) come to the same 4,010.
    """
    trunk = MLP(MNIST, [400, 400])
    assert n_parameters(HeadedNet(trunk, SingleHead(400, 10))) == 314_000 + 160_400 + 4_010 == 478_410
    split = HeadedNet(trunk, MultiHead(400, init_seed=0))
    for task in range(5):
        split.observe(task, [0, 1])
    assert n_parameters(split) == 478_410


def test_mlp_without_bias_has_no_bias_anywhere() -> None:
    """784 * 100 + 100 * 100 + 100 * 10 = 78,400 + 10,000 + 1,000 = 89,400 (GPM's net for Permuted MNIST)."""
    net = HeadedNet(MLP(MNIST, [100, 100], bias=False), SingleHead(100, 10, bias=False))
    assert n_parameters(net) == 89_400
    assert not [name for name, _ in net.named_parameters() if "bias" in name]


def test_hnet_mlp_1000_1000_on_padded_mnist_has_2126100_parameters() -> None:
    """1024 * 1000 + 1000 = 1,025,000; 1000 * 1000 + 1000 = 1,001,000; ten heads of 10,010. Sum 2,126,100."""
    net = HeadedNet(MLP((1, 32, 32), [1000, 1000]), MultiHead(1000, init_seed=0))
    for task in range(10):
        net.observe(task, range(10))
    assert n_parameters(net) == 1_025_000 + 1_001_000 + 100_100 == 2_126_100


def test_zenke_net_with_six_heads_has_the_1276508_parameters_of_hnet() -> None:
    """Convolutions, in * out * 9 + out: 3 -> 32 896, 32 -> 32 9,248, 32 -> 64 18,496, 64 -> 64 36,928.

    Sizes 32 -> 30 (trimmed) -> 15 (pool) -> 13 (trimmed) -> 6 (pool): 64 * 36 = 2,304 features, 2,304 * 512 + 512 =
    1,180,160. Trunk 1,245,728; six heads of 512 * 10 + 10 = 5,130 make 30,780.
    """
    trunk = ZenkeNet(CIFAR)
    assert n_parameters(trunk) == 896 + 9_248 + 18_496 + 36_928 + 1_180_160 == 1_245_728
    assert n_parameters(six_heads_of_ten(trunk)) == 1_276_508


def test_resnet32_with_six_heads_has_the_468540_parameters_of_hnet() -> None:
    """Weights / 9: stem 3 * 16; stages ten 16 * 16; 16 * 32 and nine 32 * 32; 32 * 64 and nine 64 * 64.

    That is 48 + 2,560 + 9,728 + 38,912 = 51,248, times 9 = 461,232. The six heads have 6 * 650 = 3,900. What is missing
    to 468,540 is 3,408 = 3 * 1,136, and 16 + 10 * (16 + 32 + 64) = 1,136 is the number of channels: one bias of the
    convolution and two parameters of batch norm each, and nothing left for shortcuts (projections would have 16 * 32 +
    32 * 64 = 2,560 weights).
    """
    trunk = ResNet32(CIFAR)
    assert n_parameters(trunk) == 461_232 + 1_136 + 2 * 1_136
    assert n_parameters(six_heads_of_ten(trunk)) == 468_540
    assert not [name for name, _ in trunk.named_parameters() if "shortcut" in name]


def test_resnet32_has_32_layers() -> None:
    """31 convolutions (stem and 3 stages * 5 blocks * 2) and the head."""
    assert sum(isinstance(module, nn.Conv2d) for module in ResNet32(CIFAR).modules()) == 31


@pytest.mark.parametrize(("width", "trunk_size", "head_size"), [(64, 11_168_832, 5_130), (20, 1_093_140, 1_610)])
def test_resnet18_size_is_2724_w2_plus_177_w(width: int, trunk_size: int, head_size: int) -> None:
    """Per w^2: 3x3 convolutions 9 * (4 * 1; 2 + 3 * 4; 8 + 3 * 16; 32 + 3 * 64) = 9 * 298 = 2,682; 1x1 2 + 8 + 32 = 42.

    Per w: stem 27; batch norm 2 * (1 + 4 + 5 * 2 + 5 * 4 + 5 * 8) = 150 (five norms where a stage has a projection).
    Width 64: 2,724 * 4,096 + 177 * 64 = 11,168,832; with ten outputs (512 * 10 + 10) the well-known 11,173,962.
    Width 20: 2,724 * 400 + 177 * 20 = 1,093,140; with ten outputs (160 * 10 + 10) 1,094,750.
    """
    trunk = ResNet18(CIFAR, width)
    assert n_parameters(trunk) == 2724 * width**2 + 177 * width == trunk_size
    net = HeadedNet(trunk, SingleHead(8 * width, 10))
    assert n_parameters(net) - trunk_size == head_size
    assert sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 17 + 3


def test_lenet_has_about_three_million_parameters() -> None:
    """3 * 20 * 25 + 20 = 1,520; 20 * 50 * 25 + 50 = 25,050; 32 -> 16 -> 8, so 50 * 64 = 3,200 features.

    3,200 * 800 + 800 = 2,560,800; 800 * 500 + 500 = 400,500. Sum 2,987,870 ("3.0M").
    """
    assert n_parameters(LeNet(CIFAR)) == 1_520 + 25_050 + 2_560_800 + 400_500 == 2_987_870


def test_widths_are_settings() -> None:
    """64-128-2500-1500, WSN's Superclass net: 64 * 75 + 64 = 4,864; 128 * 1,600 + 128 = 204,928.

    128 * 64 * 2,500 + 2,500 = 20,482,500; 2,500 * 1,500 + 1,500 = 3,751,500.
    """
    trunk = LeNet(CIFAR, channels=(64, 128), hidden=(2500, 1500))
    assert n_parameters(trunk) == 4_864 + 204_928 + 20_482_500 + 3_751_500
    assert trunk.out_features == 1500
    assert ZenkeNet(CIFAR, channels=(4, 8), hidden=16).out_features == 16


# ------------------------------------------------------------------------------------------------------------- shapes

EVERY: list[tuple[str, dict[str, Any]]] = [
    ("mlp", {"hidden": [30, 20]}),
    ("normed_mlp", {"hidden": [30, 20]}),
    ("zenke", {"channels": (4, 8), "hidden": 16}),
    ("lenet", {"channels": (4, 8), "hidden": (32, 16)}),
    ("resnet18", {"width": 4}),
    ("resnet32", {}),
]


@pytest.mark.parametrize(
    ("kind", "settings", "shape"),
    [
        (kind, settings, shape)
        for kind, settings in EVERY
        for shape in (DIGITS, MNIST, CIFAR)
        if (kind, shape) != ("zenke", DIGITS)  # its pools leave nothing of 8x8
    ],
)
def test_a_trunk_maps_images_to_out_features(kind: str, settings: dict[str, Any], shape: tuple[int, int, int]) -> None:
    trunk = build_trunk(kind, shape, **settings)
    features = trunk(torch.rand(3, *shape))
    assert features.shape == (3, trunk.out_features)
    features.square().sum().backward()
    assert all(p.grad is not None for p in trunk.parameters())


@pytest.mark.parametrize("side", range(10, 17))
def test_odd_and_even_images_fit_the_hidden_layers(side: int) -> None:
    for kind, settings in EVERY:
        trunk = build_trunk(kind, (2, side, 26 - side), **settings)
        assert trunk(torch.rand(2, 2, side, 26 - side)).shape == (2, trunk.out_features)


@pytest.mark.parametrize(
    ("kind", "shape", "least", "told"),
    [
        ("zenke", (1, 8, 8), 10, "height 8 and width 8"),
        ("zenke", (3, 32, 9), 10, "width 9"),
        ("resnet18", (1, 7, 28), 8, "height 7"),
        ("resnet32", (1, 4, 3), 4, "width 3"),
    ],
)
def test_images_too_small_are_refused_with_the_size(
    kind: str, shape: tuple[int, int, int], least: int, told: str
) -> None:
    with pytest.raises(ValueError, match=f"at least {least}x{least} pixels; {told} is too small"):
        build_trunk(kind, shape)


@pytest.mark.parametrize(("kind", "shape"), [("zenke", (1, 10, 10)), ("resnet18", (1, 8, 8)), ("resnet32", (1, 4, 4))])
def test_the_least_size_told_is_enough(kind: str, shape: tuple[int, int, int]) -> None:
    trunk = build_trunk(kind, shape)
    assert trunk(torch.rand(2, *shape)).shape == (2, trunk.out_features)


def test_wrong_requests_are_refused() -> None:
    known = "lenet, mlp, normed_mlp, resnet18, resnet32, zenke"
    with pytest.raises(ValueError, match=f"unknown net 'mlpp'. Known: {known}"):
        build_trunk("mlpp", MNIST)
    with pytest.raises(ValueError, match="unknown initialisation 'glorot'"):
        build_trunk("mlp", MNIST, hidden=[5], init="glorot")
    with pytest.raises(ValueError, match="at least one hidden layer"):
        build_trunk("mlp", MNIST, hidden=[])
    with pytest.raises(ValueError, match=r"input_shape is \(channels, height, width\)"):
        build_trunk("mlp", [784], hidden=[10])
    with pytest.raises(TypeError, match="widht"):
        build_trunk("resnet18", CIFAR, widht=20)


# ----------------------------------------------------------------------------------------------------------- functions


def test_normed_mlp_400_400_has_475200_parameters() -> None:
    """GDumb's net without its head: 784 * 400 + 400 * 400 weights, and 2 * (400 + 400) of batch normalisation."""
    assert sum(parameter.numel() for parameter in NormedMLP(MNIST, [400, 400]).parameters()) == 475_200


def test_a_normed_mlp_is_its_equation() -> None:
    """ReLU of (x W' - mean) / sqrt(variance + 1e-5) scale + shift, twice; mean and biased variance of the batch."""
    torch.manual_seed(0)
    trunk = NormedMLP(DIGITS, [7, 5])
    x = torch.rand(6, *DIGITS)
    expected = x.flatten(1)
    for layer, norm in zip(trunk.layers, trunk.norms, strict=True):
        assert isinstance(norm, nn.BatchNorm1d)
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
        y = expected @ layer.weight.T
        y = (y - y.mean(0)) / (y.var(0, correction=0) + 1e-5).sqrt() * norm.weight + norm.bias
        expected = y.clamp(min=0)
    torch.testing.assert_close(trunk(x), expected)


def test_xavier_draws_within_the_bound_of_both_fans_and_zero_biases() -> None:
    """Of 784 inputs and 100 outputs: uniform within sqrt(6 / 884) = 0.0824, a variance of 2 / 884. Head, too."""
    torch.manual_seed(0)
    outputs = [list(range(10))] * 3
    head = build_head("domain", "growing", 100, outputs, 0, True, "xavier")
    net = HeadedNet(MLP(MNIST, [100, 100], init="xavier"), head)
    for layer, fans in zip([m for m in net.modules() if isinstance(m, nn.Linear)], (884, 200, 110), strict=True):
        bound = (6 / fans) ** 0.5
        assert 0.97 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.weight.detach().var()) == pytest.approx(2 / fans, rel=0.1)
        assert not bool(layer.bias.any())


@pytest.mark.parametrize(("scenario", "class_head"), [("task", "growing"), ("class", "growing")])
def test_xavier_is_refused_for_a_head_whose_outputs_are_born_later(scenario: str, class_head: str) -> None:
    with pytest.raises(ValueError, match="init 'xavier' needs one head with all outputs"):
        build_head(scenario, class_head, 5, [[0, 1], [2, 3]], 0, True, "xavier")


def test_an_mlp_is_its_equation() -> None:
    """h2 = relu(W2 relu(W1 x + b1) + b2), with x the pixels in rows."""
    trunk = MLP(DIGITS, [7, 5])
    x = torch.rand(4, *DIGITS)
    w1, b1, w2, b2 = trunk.parameters()
    torch.testing.assert_close(trunk(x), F.relu(F.relu(x.reshape(4, 64) @ w1.T + b1) @ w2.T + b2))


@pytest.mark.parametrize("trunk", [MLP(DIGITS, [50], dropout=0.5), ZenkeNet((1, 12, 12))])
def test_dropout_acts_in_training_only(trunk: Trunk) -> None:
    x = torch.rand(2, *trunk.input_shape)
    assert not torch.equal(trunk(x), trunk(x))
    trunk.eval()
    assert torch.equal(trunk(x), trunk(x))


def test_dropout_follows_every_hidden_layer() -> None:
    """Two hidden layers, two calls on their widths; a feature is then zero at least about half of the time."""
    trunk = MLP(DIGITS, [50, 40], dropout=0.5)
    widths: list[int] = []
    trunk.dropout.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    features = trunk(torch.rand(200, *DIGITS))
    assert widths == [50, 40]
    assert (features == 0).float().mean(0).min() > 0.3


def test_a_resnet32_shortcut_keeps_every_second_pixel_and_appends_zeros() -> None:
    """With its second norm scaled to zero a block returns relu(shortcut)."""
    block = ResNet32(CIFAR).stages.get_submodule("1.0")
    nn.init.zeros_(block.get_parameter("norm2.weight"))
    x = torch.rand(2, 16, 6, 6)
    y = block(x)
    assert y.shape == (2, 32, 3, 3)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert not y[:, 16:].any()


def test_the_bias_before_a_batch_norm_does_nothing_in_training() -> None:
    """Batch norm subtracts the mean over the batch, and a constant with it."""
    trunk = ResNet32((1, 8, 8))
    x = torch.rand(4, 1, 8, 8)
    before = trunk(x)
    with torch.no_grad():
        trunk.conv.get_parameter("bias").add_(3.0)
    torch.testing.assert_close(trunk(x), before, rtol=1e-3, atol=1e-4)


def test_lenet_normalises_over_nine_channels() -> None:
    """With ones in all 20 channels, channel 9 sees nine: 1 / (1 + 1e-3 * 9 / 9)^0.75; channel 0 sees five.

    And on anything it is PyTorch's own LocalResponseNorm, gradient included.
    """
    norm = LeNet(CIFAR).norm
    y = norm(torch.ones(1, 20, 2, 2))
    torch.testing.assert_close(y[0, 9, 0, 0].item(), 1.001**-0.75)
    torch.testing.assert_close(y[0, 0, 0, 0].item(), (1 + 1e-3 * 5 / 9) ** -0.75)
    x = (30 * torch.rand(3, 20, 5, 7)).requires_grad_()
    usual = nn.LocalResponseNorm(9, alpha=1e-3, beta=0.75, k=1.0)(x)
    torch.testing.assert_close(norm(x), usual)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x) for y in (norm(x), usual))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("kind", "settings"), EVERY)
def test_a_trunk_runs_on_weights_from_outside(kind: str, settings: dict[str, Any]) -> None:
    """As hypernetworks need it: the function of other weights, gradients to them."""
    torch.manual_seed(0)
    a, b = (build_trunk(kind, MNIST, **settings).eval() for _ in range(2))
    x = torch.rand(2, *MNIST)
    weights = {name: p.detach().clone().requires_grad_() for name, p in b.named_parameters()}
    answer = functional_call(a, weights, (x,))
    torch.testing.assert_close(answer, b(x))
    answer.square().sum().backward()
    assert all(weight.grad is not None for weight in weights.values())
    assert all(p.grad is None for p in a.parameters())


def test_the_nets_need_torch_alone() -> None:
    """Read from the imports: the standard library, torch, and one another."""
    allowed = {"__future__", "collections", "hashlib", "itertools", "math", "typing", "torch"}
    for file in Path(clbench.nets.__file__).parent.glob("[!_]*.py"):
        names = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
        if file.stem in {"trunk", "mlp", "convnet", "resnet", "build", "heads"}:
            assert all(n.split(".")[0] in allowed or n.startswith("clbench.nets.") for n in names), (file.name, names)
