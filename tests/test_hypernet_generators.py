"""Generators: gradients by finite differences, counts against the published ones, how generated weights begin."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clbench.nets import MLP, ResNet32, ZenkeNet, build_trunk
from clbench.nets.growable import GrowLinear
from clbench.nets.hypernet import GENERATORS, Chunked, Full, Generator, LowRank, Structured, Target
from clbench.nets.hypernet.generators import Joint
from clbench.nets.hypernet.init import variance
from clbench.nets.shared.linked import LinkedLinear
from clbench.nets.trunk import Trunk


class Small(nn.Module):
    """A convolution, batch norm, a linear layer: P = 2*1*2*2 + 2 + 2 + 2 + 3*2 + 3 = 23."""

    out_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.norm = nn.BatchNorm2d(2)
        self.linear = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.linear(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))
        return features


class WithOutputs(nn.Module):
    """A trunk and the outputs of all tasks, as the target nets of von Oswald et al. 2020 have them."""

    def __init__(self, trunk: Trunk, outputs: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.outputs = nn.Linear(trunk.out_features, outputs)


MADE: dict[str, tuple[type[Generator], dict[str, Any]]] = {
    "full": (Full, {"embedding_size": 3, "hidden": (4,), "activation": "tanh"}),
    "full, linear": (Full, {"embedding_size": 3}),
    "chunked": (
        Chunked,
        {"embedding_size": 3, "chunk": 9, "chunk_embedding_size": 2, "hidden": (4, 3), "activation": "elu"},
    ),
    "chunked, linear": (Chunked, {"embedding_size": 3, "chunk": 9, "chunk_embedding_size": 2}),
    "chunked, a task's own": (
        Chunked,
        {
            "embedding_size": 3, "chunk": 9, "chunk_embedding_size": 2, "hidden": (4,), "activation": "sigmoid",
            "task_conditioned": True,
        },
    ),
    "structured": (Structured, {"embedding_size": 3, "hidden": (4,), "activation": "gelu", "piece_embedding_size": 2}),
    "structured, in pieces": (Structured, {"embedding_size": 3, "piece": 6, "piece_embedding_size": 2}),
    "low-rank": (LowRank, {"embedding_size": 3, "rank": 1, "hidden": (4,), "activation": "tanh"}),
    "low-rank, linear": (LowRank, {"embedding_size": 3, "rank": 2}),
}  # fmt: skip


def made(name: str, target: Target | None = None, **changes: Any) -> Generator:
    """Return a generator, of the small trunk unless said otherwise."""
    kind, settings = MADE[name]
    return kind(target or Target(Small()), **{**settings, **changes})


def scattered(generator: Generator) -> Generator:
    """Give every parameter random values, so that no gradient is zero by construction; float64."""
    torch.manual_seed(0)
    generator.double()
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.normal_()
    return generator


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", MADE)
def test_gradients_reach_embedding_and_every_parameter_of_the_generator(name: str) -> None:
    """Against finite differences, through generator, split and functional call: the chain that a training step has."""
    trunk = Small().double().eval()
    target = Target(trunk)
    generator = scattered(made(name, target))
    names = [key for key, _ in generator.named_parameters()]
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64)

    def answer(embedding: Tensor, *parameters: Tensor) -> Tensor:
        flat: Tensor = functional_call(generator, dict(zip(names, parameters, strict=True)), (embedding,))
        found: Tensor = functional_call(trunk, target.split(flat), (x,))
        return found

    embedding = torch.randn(generator.embedding_size, dtype=torch.float64, requires_grad=True)
    inputs = (embedding, *generator.parameters())
    assert torch.autograd.gradcheck(answer, inputs, fast_mode=True)
    gradients = torch.autograd.grad(answer(*inputs).square().sum(), inputs)
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients)


@pytest.mark.parametrize("name", MADE)
def test_several_embeddings_at_once_are_made_as_one_by_one(name: str) -> None:
    """Weights and gradients, in float64: a row for each embedding, and what reaches the generator is the sum."""
    generator = scattered(made(name))
    many = torch.randn(3, generator.embedding_size, dtype=torch.float64, requires_grad=True)
    at_once, alone = generator(many), torch.stack([generator(one) for one in many])
    torch.testing.assert_close(at_once, alone, rtol=1e-12, atol=1e-12)
    weight, inputs = torch.randn_like(alone), (many, *generator.parameters())
    found = [torch.autograd.grad((each * weight).sum(), inputs) for each in (at_once, alone)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_generator_is_exact_element_by_element_in_the_slow_gradient_check() -> None:
    generator = scattered(made("chunked", Target(nn.Linear(3, 3))))
    embedding = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(generator, (embedding,))
    numbers = torch.tensor([1, 0])
    assert torch.autograd.gradcheck(lambda e: generator.chunk(e, numbers), (embedding,))  # type: ignore[operator]  # a Chunked has it


def test_assigning_a_parameter_breaks_the_graph_and_a_functional_call_does_not() -> None:
    """`nn.Parameter(w)` is a new leaf: the loss has a gradient there, and nothing leads from it to what made w.

    The loss is the same number both times, so that nobody is warned: training goes on, and the generator stands still.
    """
    torch.manual_seed(0)
    make, x = nn.Linear(4, 2 * 1 * 3 * 3), torch.rand(1, 1, 5, 5)
    conv = nn.Conv2d(1, 2, 3, bias=False)
    weight = make(torch.ones(4)).view(2, 1, 3, 3)

    conv.weight = nn.Parameter(weight)
    broken = conv(x).square().sum()
    broken.backward()
    assert conv.weight.grad is not None
    assert make.weight.grad is None

    whole = functional_call(conv, {"weight": weight}, (x,)).square().sum()
    assert whole == broken
    whole.backward()
    assert make.weight.grad is not None
    assert bool(make.weight.grad.abs().sum() > 0)


# ----------------------------------------------------------------------------------------------------------- the target


def test_split_and_flat_are_inverse_and_split_copies_nothing() -> None:
    target = Target(Small())
    flat = torch.arange(23.0)
    tensors = target.split(flat)
    assert target.size == 23
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == target.shapes
    assert all(tensor.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for tensor in tensors.values())
    assert target.flat(tensors).equal(flat)


def test_without_norms_their_affine_parameters_are_left_out() -> None:
    target = Target(Small(), norms=False)
    assert target.left == ("norm.weight", "norm.bias")
    assert target.size == 19


def test_layers_say_fans_and_kinds() -> None:
    """Convolution (2, 1, 2, 2): 4 numbers an output; a pixel goes to 2 channels at 4 places. Linear (3, 2)."""
    layers = {layer.name: layer for layer in Target(Small()).layers}
    assert [(layer.kind, layer.fan_in, layer.fan_out) for layer in layers.values()] == [
        ("weight", 4, 8), ("bias", 4, 8), ("norm", 1, 1), ("norm", 1, 1), ("weight", 2, 3), ("bias", 2, 3),
    ]  # fmt: skip


def shared() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    return net


def overlapping() -> nn.Module:
    net, buffer = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.rand(3, 2)
    net[0].weight, net[1].weight = nn.Parameter(buffer[:2]), nn.Parameter(buffer[1:])
    return net


def linked() -> nn.Module:
    first = nn.Linear(2, 2)
    return nn.Sequential(first, LinkedLinear(first, lambda weight: weight.t()))


@pytest.mark.parametrize(
    ("trunk", "line"),
    [
        (shared(), "0.weight and 1.weight are one parameter"),
        (overlapping(), "0.weight and 1.weight share memory"),
        (nn.Sequential(GrowLinear(2, 2)), "layers that grow, GrowLinear '0'"),
        (linked(), "a link, LinkedLinear '1'"),
        (nn.Sequential(nn.ReLU()), "nothing to generate"),
        (nn.Sequential(nn.LazyLinear(2)), "no shape yet"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_target_that_cannot_be_generated_is_refused_in_one_line(trunk: nn.Module, line: str) -> None:
    with pytest.raises(ValueError, match=line) as refused:
        Target(trunk)
    assert "\n" not in str(refused.value)


# --------------------------------------------------------------------------------------------------------------- chunks


@pytest.mark.parametrize("name", ["chunked", "chunked, linear", "chunked, a task's own"])
def test_chunks_one_after_another_are_the_weights(name: str) -> None:
    """P = 23 in chunks of 9: the third has 5 of its 9 numbers in the target, and 0 in place of the others."""
    generator = scattered(made(name))
    assert isinstance(generator, Chunked)
    embedding = torch.randn(generator.embedding_size, dtype=torch.float64)
    numbers = torch.tensor([2, 0, 1])
    chunks = generator.chunk(embedding, numbers)
    assert chunks.shape == (3, 9)
    torch.testing.assert_close(chunks[[1, 2, 0]].flatten()[:23], generator(embedding), rtol=1e-12, atol=1e-12)
    assert not chunks[0, 5:].any()


def test_a_chunked_generator_is_its_net_run_on_embedding_and_chunk_side_by_side() -> None:
    """[e; c_k] through one matrix [W_e, W_c] per layer, chunk by chunk, cut to P and times the constant factors."""
    generator = scattered(made("chunked"))
    assert isinstance(generator, Chunked)
    assert generator.chunk_embeddings is not None
    embedding = torch.randn(3, dtype=torch.float64)
    rows = []
    for c in generator.chunk_embeddings:
        x = torch.cat([embedding, c])
        for layer in [*generator.body.layers, generator.head]:
            assert isinstance(layer, Joint)
            weight = layer.weight if layer.weight_beside is None else torch.cat([layer.weight, layer.weight_beside], 1)
            x = weight @ x + layer.bias
            x = x if layer is generator.head else F.elu(x)
        rows.append(x)
    gains = generator.target.per_element(generator._gains, embedding)
    births = torch.zeros(23, dtype=torch.float64)
    births[10:12] = 1  # norm.weight, after 8 weights and 2 biases of the convolution
    expected = torch.cat(rows)[:23] * gains + births
    torch.testing.assert_close(generator(embedding), expected, rtol=1e-12, atol=1e-12)


def test_a_task_may_hold_its_own_embeddings_of_the_chunks() -> None:
    """E = 3 and three chunks' embeddings of 2: 9 numbers a task. The fifth to seventh are of the second chunk alone."""
    generator = scattered(made("chunked, a task's own"))
    assert generator.embedding_size == 3 + 3 * 2
    assert all("chunk_embeddings" not in name for name, _ in generator.named_parameters())
    embedding = torch.randn(9, dtype=torch.float64)
    moved = embedding.clone()
    moved[5:7] += 1  # of chunk 1
    changed = (generator(embedding) != generator(moved)).nonzero().flatten().tolist()
    assert changed == list(range(9, 18))


def test_a_structured_generator_shares_heads_between_layers_of_equal_shape() -> None:
    """ResNet-32 has 30 3x3 convolutions between channels in five shapes, a stem, and norms of three widths."""
    target = Target(ResNet32((3, 32, 32)))
    generator = Structured(target, 4, (5,), piece_embedding_size=2)
    shapes = sorted(group[0].size for group in generator.groups)
    convolutions = [9 * 16 * 16 + 16, 9 * 16 * 32 + 32, 9 * 32 * 32 + 32, 9 * 32 * 64 + 64, 9 * 64 * 64 + 64]
    assert shapes == sorted([*convolutions, 9 * 3 * 16 + 16, 2 * 16, 2 * 32, 2 * 64])
    assert len(generator.piece_embeddings) == 31 + 31
    assert generator(torch.randn(4)).shape == (target.size,)


def test_low_rank_weights_are_the_shared_ones_plus_a_product_of_rank_r() -> None:
    target = Target(MLP((1, 3, 3), [7, 6]))
    generator = scattered(LowRank(target, 3, 2))
    assert isinstance(generator, LowRank)
    weights = target.split(generator(torch.randn(3, dtype=torch.float64)))
    for layer, shared_weight in zip(generator.matrices, generator.shared, strict=True):
        assert torch.linalg.matrix_rank(weights[layer.name] - shared_weight) == 2


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda t: Chunked(t, 3, 24, 2), "a chunk of 24 is larger than the target's 23 weights"),
        (lambda t: Chunked(t, 3, 0, 2), "chunk is 0"),
        (lambda t: Full(t, 0), "embedding_size is 0"),
        (lambda t: Full(t, 3, (0,)), "a hidden width is 0"),
        (lambda t: Full(t, 3, (2,), "relo"), "unknown activation 'relo'"),
        (lambda t: Full(t, 3, init=cast(Any, "orthogonal")), "not 'orthogonal'"),
        (lambda t: LowRank(t, 3, 9), "rank 9 is more than any matrix of the target has: at most 2"),
        (lambda t: Structured(t, 3, piece=0), "piece is 0"),
        (lambda t: Chunked(t, 3, 4, 2, chunk_embedding_std=0.0), "chunk_embedding_std is 0.0: above 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        make(Target(Small()))


# --------------------------------------------------------------------------------------------------------------- counts

PUBLISHED: dict[str, tuple[Any, int, dict[str, Any], int, int]] = {
    "permuted MNIST-10": (
        lambda: MLP((1, 32, 32), [1000, 1000, 100]),
        2_126_100,
        {"embedding_size": 24, "chunk": 78_000, "chunk_embedding_size": 8, "hidden": (25, 25)},
        10,
        2_029_939,
    ),
    "permuted MNIST-100": (
        lambda: MLP((1, 32, 32), [1000, 1000, 1000]),
        3_026_000 + 1_000,
        {"embedding_size": 128, "chunk": 7_500, "chunk_embedding_size": 12, "hidden": (200, 250, 350)},
        100,
        2_816_448,
    ),
    "split MNIST": (
        lambda: MLP((1, 28, 28), [400, 400, 10]),
        478_410,
        {"embedding_size": 96, "chunk": 42_000, "chunk_embedding_size": 96, "hidden": (10, 10)},
        5,
        465_672,
    ),
    "ResNet-32": (
        lambda: WithOutputs(ResNet32((3, 32, 32)), 60),
        468_540,
        {"embedding_size": 32, "chunk": 7_000, "chunk_embedding_size": 32},
        6,
        457_336,
    ),
    "Zenke": (
        lambda: WithOutputs(ZenkeNet((3, 32, 32)), 60),
        1_276_508,
        {"embedding_size": 48, "chunk": 5_500, "chunk_embedding_size": 80, "hidden": (100, 150, 200)},
        6,
        1_182_678,
    ),
    "small permuted MNIST-10": (
        lambda: MLP((1, 32, 32), [100, 100, 100]),
        122_700,
        {"embedding_size": 64, "chunk": 2_000, "chunk_embedding_size": 12, "hidden": (100, 75, 50)},
        10,
        122_459,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_hypernetworks_have_the_parameters_published(name: str) -> None:
    """Those of hypercl's commands: the target has the outputs of all tasks, and every task's embedding is counted.

    For split MNIST, by hand: P = 478,410, hence ceil(P / 42,000) = 12 chunks; (96 + 96) * 10 + 10 and 10 * 10 + 10 in
    the hidden layers, 10 * 42,000 + 42,000 in the head, 12 * 96 and 5 * 96 embeddings: 465,672.
    """
    trunk, size, settings, tasks, parameters = PUBLISHED[name]
    with torch.device("meta"):
        target = Target(trunk())
        generator = Chunked(target, **settings)
    assert target.size == size
    assert generator.parameters_with(tasks) == parameters
    assert Chunked.count(target, tasks, **settings) == parameters


@pytest.mark.parametrize("name", MADE)
def test_counts_without_building_are_those_of_what_is_built(name: str) -> None:
    kind, settings = MADE[name]
    target = Target(Small())
    sizes = {key: value for key, value in settings.items() if key != "activation"}
    assert kind.count(target, 7, **sizes) == made(name, target).parameters_with(7)  # type: ignore[attr-defined]  # every generator's own


def test_the_counts_in_the_docstrings_are_right() -> None:
    with torch.device("meta"):
        target = Target(MLP((1, 28, 28), [100, 100]))
    assert Full.count(target, 0, 8, (10,)) == 974_690
    assert Structured.count(target, 0, 8, (5,), 8_000, 8) == 77_581
    assert LowRank.count(target, 0, 8, 2, (10,)) == 114_538


# ------------------------------------------------------------------------------------------------------- how they begin

BEGIN: dict[str, tuple[Any, dict[str, Any]]] = {
    "full": (Full, {"embedding_size": 16, "hidden": (20,)}),
    "full, sigmoid": (Full, {"embedding_size": 16, "hidden": (20,), "activation": "sigmoid"}),
    "chunked": (Chunked, {"embedding_size": 16, "chunk": 501, "chunk_embedding_size": 16, "hidden": (30, 20)}),
    "chunked, linear": (Chunked, {"embedding_size": 16, "chunk": 501, "chunk_embedding_size": 16}),
    "structured": (Structured, {"embedding_size": 16, "hidden": (20,), "piece": 700, "piece_embedding_size": 16}),
    "low-rank": (LowRank, {"embedding_size": 16, "rank": 2}),
}


@pytest.mark.parametrize("init", ["torch", "he"])
@pytest.mark.parametrize("name", BEGIN)
def test_generated_weights_begin_with_the_variance_of_their_layer(name: str, init: Any) -> None:
    """1 / (3 fan-in) or 2 / fan-in, biases 1 / (3 fan-in): the mean square over 60 seeds and tasks, within a quarter.

    Fan-ins 75, 144 and 30 in chunks of 501: the 1,200 weights of the first convolution, its biases, the 2,304 of the
    second and those of the linear layer meet in the same chunks.
    """
    kind, settings = BEGIN[name]
    trunk = nn.Sequential(nn.Conv2d(3, 16, 5), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(30, 40))
    target = Target(trunk)
    found = torch.zeros(len(target.layers))
    for seed in range(60):
        generator = kind(target, **settings, init=init, seed=seed)
        chance = torch.Generator().manual_seed(1000 + seed)
        with torch.no_grad():
            weights = target.split(generator(torch.randn(generator.embedding_size, generator=chance)))
        found += torch.stack([weight.square().mean() for weight in weights.values()]) / 60
    wanted = torch.tensor([variance(layer, init) for layer in target.layers])
    ratio = found / wanted
    assert ratio.min() > 0.75, ratio
    assert ratio.max() < 1.25, ratio


@pytest.mark.parametrize("name", BEGIN)
def test_a_generator_drawn_by_glorots_rule_has_its_variances_and_no_thought_of_the_target(name: str) -> None:
    """2 / (fan-in + fan-out) for every map, the two parts of a joint one alike; biases 0; uniform.

    Shared weights of the low-rank generator are the target's own, drawn as PyTorch does.
    """
    kind, settings = BEGIN[name]
    target = Target(nn.Sequential(nn.Conv2d(3, 16, 5), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(30, 40)))
    generator = kind(target, **settings, init="xavier")
    maps = [module for module in generator.modules() if isinstance(module, Joint)]
    assert len(maps) >= 1
    for each in maps:
        drawn = torch.cat([p.detach().flatten() for p in (each.weight, each.weight_beside) if p is not None])
        wanted = 2 / (each.fan_in + each.weight.shape[0])
        room = 0.05 + 3 / drawn.numel() ** 0.5
        assert float(drawn.square().mean()) == pytest.approx(wanted, rel=room)
        assert float(drawn.abs().max()) <= (3 * wanted) ** 0.5
        assert not each.bias.any()


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("init", ["torch", "xavier"])
def test_embeddings_of_chunks_may_begin_smaller(conditioned: bool, init: Any) -> None:
    """Those of the task keep deviation 1. By PyTorch's rule the weights still have the variance wanted, on average."""
    target = Target(nn.Linear(400, 100))
    generator = Chunked(target, 50, 100, 16, task_conditioned=conditioned, init=init, chunk_embedding_std=0.1)
    chance = torch.Generator().manual_seed(0)
    born = generator.new_embedding(chance)
    assert float(born[:50].std()) == pytest.approx(1.0, rel=0.3)
    own = born[50:] if conditioned else generator.chunk_embeddings
    assert own is not None
    assert own.numel() == 401 * 16
    assert float(own.detach().std()) == pytest.approx(0.1, rel=0.05)
    if init == "torch":
        with torch.no_grad():
            made = torch.stack([generator(generator.new_embedding(chance)) for _ in range(40)])
        assert float(made.square().mean()) == pytest.approx(1 / 1200, rel=0.2)


@pytest.mark.parametrize("name", ["full", "structured", "low-rank"])
def test_normalisation_begins_as_ones_and_zeros(name: str) -> None:
    kind, settings = BEGIN[name]
    target = Target(Small())
    weights = target.split(kind(target, **settings)(torch.randn(16)))
    assert bool((weights["norm.weight"] == 1).all())
    assert bool((weights["norm.bias"] == 0).all())


@pytest.mark.parametrize("kind", ["chunked", "structured", "lowrank"])
def test_activations_of_resnet32_neither_vanish_nor_explode(kind: str) -> None:
    """Every map before a norm, and the features, are within a factor of 2.5 of those of the net as PyTorch draws it.

    Measured as the root mean square over a batch; batch norm in training mode hides nothing, as the maps are looked at
    before it.
    """
    torch.manual_seed(0)
    trunk = build_trunk("resnet32", (3, 16, 16))
    target, x = Target(trunk), torch.randn(8, 3, 16, 16)
    settings: dict[str, dict[str, Any]] = {
        "chunked": {"embedding_size": 32, "chunk": 1000, "chunk_embedding_size": 32, "hidden": (20, 20)},
        "structured": {"embedding_size": 32, "hidden": (10,)},
        "lowrank": {"embedding_size": 32, "rank": 2},
    }
    generator = GENERATORS[kind](target, **settings[kind])
    sizes: list[list[float]] = [[], []]
    now = sizes[0]
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, i, y: now.append(float(y.square().mean().sqrt())))
    with torch.no_grad():
        features = trunk(x)
        now = sizes[1]
        generated = functional_call(trunk, target.split(generator(torch.randn(32))), (x,))
    ratios = [b / a for a, b in zip(*sizes, strict=True)] + [float(generated.norm() / features.norm())]
    assert len(ratios) == 32
    assert max(abs(math.log(ratio)) for ratio in ratios) < math.log(2.5), ratios


def test_a_generator_depends_on_its_seed_alone() -> None:
    target = Target(Small())
    state = torch.get_rng_state()
    one, same, other = (made("chunked", target, seed=seed) for seed in (1, 1, 2))
    assert torch.get_rng_state().equal(state)
    e = torch.ones(3)
    assert one(e).equal(same(e))
    assert not one(e).equal(other(e))
    assert copy.deepcopy(one)(e).equal(one(e))


@pytest.mark.parametrize("init", ["torch", "plain"])
def test_embeddings_of_chunks_are_drawn_first_then_the_body_what_measures_it_and_the_head(init: Any) -> None:
    """All from one generator of numbers, by hand.

    Weights are uniform within sqrt(3 v), v = 2 / fan-in in the body and 1 / 12 / |x|^2 in the head, with the mean of
    |x|^2 over 64 embeddings drawn; or, plainly, within 1 / sqrt(fan-in), with nothing to measure.
    """
    trunk = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))  # 12 weights and 3 biases of fan-in 4; 6 of the norm
    target = Target(trunk)
    generator = Chunked(target, 2, 5, 3, (7,), init=init, seed=11)
    chance = torch.Generator().manual_seed(11)

    def uniform(bound: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-1, 1, generator=chance) * bound

    chunks = torch.randn(5, 3, generator=chance)  # 21 weights in chunks of 5
    bound = math.sqrt(1 / 5 if init == "plain" else 3 * 2 / 5)
    first, beside = uniform(bound, 7, 2), uniform(bound, 7, 3)
    bias = uniform(bound, 7) if init == "plain" else torch.zeros(7)
    if init == "plain":
        bound = math.sqrt(1 / 7)
    else:
        sizes = []
        for i in range(64):
            e, _ = torch.randn(2, generator=chance), torch.randn(1, 3, generator=chance)
            sizes.append(F.relu(first @ e + beside @ chunks[i % 5]).square().sum())
        bound = math.sqrt(3 * (1 / 12) / float(torch.stack(sizes).mean()))
    last = uniform(bound, 5, 7)
    wanted = {
        "chunk_embeddings": chunks, "body.layers.0.weight": first, "body.layers.0.weight_beside": beside,
        "body.layers.0.bias": bias, "head.weight": last,
        "head.bias": uniform(bound, 5) if init == "plain" else torch.zeros(5),
    }  # fmt: skip
    found = generator.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["full", "structured", "lowrank"])
def test_births_come_on_top_of_biases_that_are_drawn(kind: str) -> None:
    """By the rule "plain" a head's biases are drawn like its weights, within 1 / sqrt(4) here, whatever they make.

    The biases of all outputs are drawn, so none is 0. The two of the norm's weight, and they alone, have 1 added: they
    lie within 1/2 of 1, the others within 1/2 of 0.
    """
    sizes: dict[str, dict[str, Any]] = {"full": {}, "structured": {}, "lowrank": {"rank": 1}}
    generator = GENERATORS[kind](Target(Small()), embedding_size=3, hidden=(4,), init="plain", **sizes[kind])  # type: ignore[call-arg]
    heads = [module for name, module in generator.named_modules() if "head" in name and isinstance(module, Joint)]
    biases = torch.cat([head.bias.detach() for head in heads])
    assert (biases != 0).all()
    assert len(set(biases.tolist())) == len(biases)
    assert int((biases > 0.5).sum()) == 2
    assert (biases.abs() <= 1.5).all()
