"""Hypernetworks as strategies: what a step is, what is held, what they equal at zero, and what is counted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.loading import ResidentLoader
from clbench.nets import HeadedNet, MultiHead, build_trunk
from clbench.nets.growable import GrowLinear
from clbench.nets.hypernet import Generator, HyperNet, Target
from clbench.nets.hypernet.generators import Joint
from clbench.seeds import derive
from clbench.sharing import sharing
from clbench.strategies.base import Setup, new_optimizer
from clbench.strategies.finetune import Finetune
from clbench.strategies.generating import Generating
from clbench.strategies.hypernet import Hypernet
from clbench.strategies.hypernet_lowrank import LowRankHypernet
from clbench.strategies.hypernet_structured import StructuredHypernet
from strategy_factory import CPU, budget, made, synthetic, tensor_task, weights

SHAPE = (3, 10, 10)
NETS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [6]},
    "zenke": {"channels": (2, 3), "hidden": 4, "dropout": (0.0, 0.0)},
    "lenet": {"channels": (2, 3), "hidden": (5, 4)},
    "resnet18": {"width": 1},
    "resnet32": {},
}
KINDS: dict[str, tuple[type[Generating], dict[str, Any]]] = {
    "chunked": (Hypernet, {"embedding": 3, "hidden": [4], "activation": "tanh", "chunk": 70, "chunk_embedding": 2}),
    "chunked, a task's own": (
        Hypernet, {"embedding": 3, "chunk": 70, "chunk_embedding": 2, "task_conditioned": True, "init": "xavier"},
    ),
    "full": (Hypernet, {"embedding": 3, "hidden": [4], "kind": "full"}),
    "structured": (StructuredHypernet, {"embedding": 3, "hidden": [4], "piece": 200, "piece_embedding": 2}),
    "low-rank": (LowRankHypernet, {"embedding": 3, "hidden": [4], "rank": 1}),
}  # fmt: skip


def new_net(kind: str = "mlp") -> Callable[[], HeadedNet]:
    def build() -> HeadedNet:
        torch.manual_seed(0)
        trunk = build_trunk(kind, SHAPE, **NETS[kind])
        return HeadedNet(trunk, MultiHead(trunk.out_features, 0))

    return build


def strategy(
    name: str = "chunked",
    net: str = "mlp",
    train: dict[str, Any] | None = None,
    tasks: int | None = None,
    **changes: Any,
) -> Generating:
    cls, settings = KINDS[name]
    spec = budget(**{"iterations": 4, "lr": 0.01, **(train or {})})
    setup = Setup(new_net=new_net(net), train=spec, device=CPU, seed=0, tasks=tasks)
    return cls(setup=setup, config=cls.Config(**(settings | changes)))


class Experience:
    """As much of an experience as training on eight random images takes."""

    def __init__(self, task: int) -> None:
        generator = torch.Generator().manual_seed(task)
        images = torch.randint(256, (8, *SHAPE), generator=generator, dtype=torch.uint8)
        self.task_label = task
        self.classes_in_this_experience = [0, 1]
        self.data = [tensor_task(images, [n % 2 for n in range(8)], task)]


def learn(given: Generating, *tasks: int) -> Generating:
    cast(Any, given).training_data = lambda experience: experience.data
    for task in tasks:
        given.train_task(cast(Any, Experience(task)))
    return given


def generated(given: Generating, task: int) -> Tensor:
    with torch.no_grad():
        return given.net.flat(task).clone()


# ------------------------------------------------------------------------------------------------------ what it equals


@pytest.mark.parametrize("name", KINDS)
def test_without_strength_it_is_a_generator_trained_without_a_regulariser(name: str) -> None:
    """Three tasks and the first again under Adam: bit for bit the weights of a bare loop over the same net."""
    train = {"optimizer": "adam", "lr": 0.01}
    given = strategy(name, train=train, beta=0.0)
    net = given.setup.new_net()
    assert isinstance(net, HyperNet)
    order = torch.Generator().manual_seed(derive(0, "order"))
    for task in (0, 1, 2, 0):
        experience = Experience(task)
        net.observe(task, [0, 1])
        optimizer = new_optimizer(given.setup.train, net.parameters())
        steps = 0
        net.train()
        while steps < 4:
            for batch in ResidentLoader(experience.data, 4, order):
                optimizer.zero_grad()
                torch.autograd.backward(F.cross_entropy(net(batch.x, batch.t), batch.y))
                optimizer.step()
                steps += 1
    learn(given, 0, 1, 2, 0)
    assert torch.equal(weights(given), torch.cat([p.detach().flatten() for p in net.parameters()]))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_linear_generator_of_nothing_but_a_bias_is_fine_tuning(optimizer: str) -> None:
    """Theta = W e + b with W = 0 and e = 0: dW = g e' = 0 and de = W' g = 0, so that b alone learns, as the plain net.

    Bit for bit over three tasks, heads included; it forgets what fine-tuning forgets.
    """
    train = {"optimizer": optimizer, "lr": 0.05 if optimizer == "sgd" else 0.003}
    given = strategy("full", train=train, hidden=[], beta=0.0)
    plain = Finetune(setup=Setup(new_net=new_net(), train=given.setup.train, device=CPU, seed=0), config=None)
    target, head = given.net.generator.target, given.net.generator.head
    assert isinstance(head, Joint)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(target.flat(dict(plain.model.trunk.named_parameters())))
    observe = given.net.observe

    def of_zero(task: int, classes: Any) -> None:
        observe(task, classes)
        with torch.no_grad():
            given.net.embedding(task).zero_()

    cast(Any, given.net).observe = of_zero
    learn(given, 0, 1, 2)
    learn(cast(Any, plain), 0, 1, 2)
    assert generated(given, 1).equal(target.flat(dict(plain.model.trunk.named_parameters())).detach())
    heads = [torch.cat([p.detach().flatten() for p in each.model.head.parameters()]) for each in (given, plain)]
    assert torch.equal(*heads)


@pytest.mark.parametrize("settings", [{}, {"targets": "snapshot"}, {"group": 1}, {"asked": 1}, {"chunks_asked": 0.5}])
def test_without_looking_ahead_the_first_step_feels_no_regulariser(settings: dict[str, Any]) -> None:
    """Nothing has moved: the penalty is 0 and so is its gradient, to the bit. The second step feels it."""
    found = []
    for beta in (0.0, 100.0):
        for steps in (1, 2):
            given = strategy(train={"iterations": 1, "lr": 0.01}, beta=beta, look_ahead=False, **settings)
            learn(given, 0, 1)
            given.setup = replace(given.setup, train=budget(iterations=steps, lr=0.01))
            found.append(weights(learn(given, 2)))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[1], found[3])


# --------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("look_ahead", [True, False])
def test_the_regulariser_keeps_the_weights_of_earlier_tasks_where_they_were(name: str, look_ahead: bool) -> None:
    """Under SGD with a small step the other tasks' weights move less than half as far as without it.

    A chunked generator's head makes 26 chunks: its penalty is the steeper, and one tenth as strong here.
    """
    moved = []
    for beta in (0.0, 1.0 if "chunked" in name else 10.0):
        given = learn(strategy(name, train={"iterations": 60, "lr": 0.003}, beta=beta, look_ahead=look_ahead), 0, 1)
        before = [generated(given, task) for task in (0, 1)]
        learn(given, 2)
        moved.append(sum(float((generated(given, task) - before[task]).norm()) for task in (0, 1)))
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("case", ["", "look ahead", "total", "look ahead, total, embeddings", "clipped"])
def test_a_step_is_down_the_gradient_of_loss_and_penalty(name: str, case: str) -> None:
    """The second step of SGD on task 2, after two tasks, by autograd through the sum itself.

    With L the mean loss times 8, the samples, where it is "total", g its gradient at Theta and Theta' = Theta - lr g
    where one looks ahead, else Theta: the step is -lr (g + beta / 2 sum_t grad || h(e_t, Theta') - h(e_t, Theta*) ||^2)
    after clipping. The embeddings of tasks 0 and 1 move by that sum where they are trained, else not at all.
    """
    total, ahead, embeddings = "total" in case, "ahead" in case, "embeddings" in case
    lr, beta, clip = 0.01, 2.0, 0.05 if case == "clipped" else None
    train = {"iterations": 2, "lr": lr, "batch_size": 8, "grad_clip": clip}
    changes: dict[str, Any] = {"beta": beta, "look_ahead": ahead, "train_embeddings": embeddings}
    changes["loss"] = "total" if total else "mean"
    given = learn(strategy(name, train=train, **changes), 0, 1)
    star = copy.deepcopy(given.net.generator)
    old = {task: given.net.embedding(task).detach().clone() for task in (0, 1)}
    before: list[HyperNet] = []
    train_step = given.train_step

    def noted(batch: Any) -> None:
        before.append(copy.deepcopy(given.net))
        train_step(batch)

    cast(Any, given).train_step = noted
    learn(given, 2)
    net = before[1]
    (batch,) = ResidentLoader(Experience(2).data, 8)
    torch.autograd.backward((8 if total else 1) * F.cross_entropy(net(batch.x, 2), batch.y))
    there = copy.deepcopy(net.generator)
    if ahead:
        with torch.no_grad():
            for one, moved in zip(net.generator.parameters(), there.parameters(), strict=True):
                assert one.grad is not None
                moved.sub_(lr * one.grad)
    for parameter in there.parameters():
        parameter.grad = None
    held = {task: net.embedding(task) if embeddings else old[task] for task in (0, 1)}
    away = [there(held[task]) - star(old[task]).detach() for task in (0, 1)]
    torch.autograd.backward(beta / 2 * torch.stack([each.square().sum() for each in away]).sum())
    for one, moved in zip(net.generator.parameters(), there.parameters(), strict=True):
        one.grad = cast(Tensor, one.grad) + cast(Tensor, moved.grad)
    if clip is not None:
        nn.utils.clip_grad_norm_(net.parameters(), clip)
    for (key, now), begun in zip(given.net.named_parameters(), net.parameters(), strict=True):
        wanted = begun if begun.grad is None else begun - lr * begun.grad
        torch.testing.assert_close(now, wanted, rtol=1e-4, atol=1e-6, msg=key)
    for task in (0, 1):
        assert given.net.embedding(task).equal(old[task]) != embeddings


def test_a_total_loss_is_a_mean_with_everything_else_by_the_samples() -> None:
    """Under SGD: 8 samples, beta and clipping 8 times as large, a learning rate an eighth. Up to rounding the same."""
    found = []
    for loss, factor in (("mean", 1.0), ("total", 8.0)):
        train = {"lr": 0.02 / factor, "grad_clip": 0.1 * factor, "iterations": 6}
        found.append(weights(learn(strategy(train=train, loss=loss, beta=0.5 * factor), 0, 1, 2)))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_groups_and_targets_change_nothing_but_rounding(name: str) -> None:
    found = []
    for settings in ({"group": 1}, {"group": 2}, {"group": 3}, {"targets": "snapshot"}, {"targets": "stored"}):
        found.append(weights(learn(strategy(name, train={"iterations": 3}, beta=1.0, **settings), 0, 1, 2, 3)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", ["asked", "chunks_asked"])
def test_as_much_is_asked_as_the_setting_says(setting: str) -> None:
    """One of three other tasks, or a tenth of the 26 chunks (1,806 weights by 70, rounded: 3) of each."""
    changes: dict[str, Any] = {"asked": 1} if setting == "asked" else {"chunks_asked": 0.1}
    given = learn(strategy(beta=1.0, **changes), 0, 1, 2)
    seen: list[dict[int, Tensor | None]] = []
    before_task = given.before_task

    def noted(experience: Any) -> None:
        before_task(experience)
        assert given.regulariser is not None
        seen.extend(given.regulariser.draw() for _ in range(20))

    cast(Any, given).before_task = noted
    learn(given, 3)
    if setting == "asked":
        assert {len(draw) for draw in seen} == {1}
        assert {task for draw in seen for task in draw} == {0, 1, 2}
    else:
        assert all(list(draw) == [0, 1, 2] for draw in seen)
        assert {len(cast(Tensor, numbers)) for draw in seen for numbers in draw.values()} == {3}


def test_a_task_seen_again_is_free_and_all_others_are_held() -> None:
    given = strategy(beta=1.0)
    held: list[list[int] | None] = []
    before_task = given.before_task

    def noted(experience: Any) -> None:
        before_task(experience)
        held.append(None if given.regulariser is None else given.regulariser.tasks)

    cast(Any, given).before_task = noted
    learn(given, 0, 1, 0, 2)
    assert held == [None, [0], [1], [0, 1]]
    assert given.regulariser is None
    assert given.undeclared() == {}


def test_what_is_noted_is_the_smaller_of_the_two_unless_said_otherwise() -> None:
    """P = 1,806. A chunked generator has 4 * 6 + 70 * 5 + 26 * 2 = 426 numbers: a copy is less than one target."""
    noted = {}
    for targets in ("least", "stored", "snapshot"):
        given = strategy(beta=1.0, targets=targets)
        before_task = given.before_task

        def keep(experience: Any, given: Any = given, targets: str = targets, before: Any = before_task) -> None:
            before(experience)
            if given.regulariser is not None:
                noted[targets] = given.regulariser.targets

        cast(Any, given).before_task = keep
        learn(given, 0, 1)
    assert noted == {"least": "snapshot", "stored": "stored", "snapshot": "snapshot"}


# ------------------------------------------------------------------------------------------------------- nets and norms


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ["chunked", "structured", "low-rank"])
def test_every_net_can_be_generated(name: str, net: str) -> None:
    """Two tasks, by small chunks: weights are finite, both tasks' are held, and both are answered."""
    changes: dict[str, Any] = {"chunk": 3000} if net == "resnet32" and name == "chunked" else {}
    given = learn(strategy(name, net, {"iterations": 2, "batch_size": 8}, beta=0.1, **changes), 0, 1)
    given.model.eval()
    with torch.no_grad():
        for task in (0, 1):
            assert bool(torch.isfinite(given.answer(torch.rand(4, *SHAPE), task)).all())
    assert not generated(given, 0).equal(generated(given, 1))
    assert not [key for key in given.model.state_dict() if key.startswith("trunk.")]


@pytest.mark.parametrize("norms", ["generated", "own"])
@pytest.mark.parametrize("statistics", ["task", "batch"])
def test_normalisation_is_generated_or_a_tasks_own(norms: str, statistics: str) -> None:
    """A ResNet-18 of width 1 has 75 channels in 20 norms: 150 affine parameters, and as many statistics.

    A task has its embedding (3) and head (8 * 2 + 2) for itself, with its own norms 150 more; with its own statistics
    150 numbers and 20 counts in buffers. What tasks need to answer is what is kept to answer.
    """
    changes: dict[str, Any] = {"norms": norms, "statistics": statistics, "beta": 0.1}
    given = learn(strategy("chunked", "resnet18", {"batch_size": 8}, **changes), 0, 1)
    own = {task: sum(p.numel() for p in held) for task, held in given.net.task_parameters().items()}
    each = 3 + 18 + (150 if norms == "own" else 0)
    assert own == {0: each, 1: each}
    buffers = sum(buffer.numel() for buffer in given.net.part(0).buffers())
    assert buffers == (170 if statistics == "task" else 0)
    found = sharing(given.uses(), dict(given.net.named_parameters()))
    assert found.unused == 0
    total = found.shared_by_all_bytes + found.shared_by_some_bytes + found.private_bytes
    assert total == footprint(given.holdings()).answer_bytes


# ------------------------------------------------------------------------------------------------------------ the books


def test_the_counts_by_hand() -> None:
    """MLP 300-6: P = 1,806, 26 chunks of 70. Generator: 4 * (3 + 2 + 1) + 70 * (4 + 1) + 26 * 2 = 426 numbers.

    A task has 3 and a head, 2 * 7 = 14, for itself: 17. Two tasks: 426 + 34 = 460 numbers, 1,840 bytes to answer, and
    under SGD to go on. Compression: (426 + 6) / 1,806. Every task uses the generator and its own: in common 426 / 443.
    """
    given = learn(strategy(beta=1.0), 0, 1)
    kept = footprint(given.holdings())
    assert (kept.parameters, kept.parameters_shared, kept.parameters_per_task) == (460, 426, 34)
    assert (kept.answer_bytes, kept.keep_learning_bytes, kept.auxiliary_bytes) == (1840, 1840, {"classes": 0})
    found = sharing(given.uses(), dict(given.net.named_parameters()))
    assert (found.shared_by_all, found.private, found.unused) == (426, 34, 0)
    assert found.in_common == pytest.approx(426 / 443)
    told = given.generation()
    assert (told.target_parameters, told.generator_parameters) == (1806, 432)
    assert told.compression == 432 / 1806
    sizes = {"embedding_size": 3, "chunk": 70, "chunk_embedding_size": 2, "hidden": [4], "task_conditioned": False}
    assert told.sizes == sizes


def test_weights_kept_in_evaluation_are_gone_after_it_and_are_no_state() -> None:
    """Generated once for each task that is asked, however many batches; afterwards nothing but the net is counted."""
    found, stream = made(synthetic("task", n_tasks=3, iterations=5), "hypernet", **{"train.eval_batch_size": 7})
    found.train(list(stream.benchmark.train_stream))
    calls: list[int] = []
    found.net.generator.register_forward_hook(lambda *_: calls.append(1))
    before = footprint(found.holdings())
    found.accuracy(stream.benchmark.test_stream[1])
    assert len(calls) == 1
    found.inferred(stream.benchmark.test_stream[1], [0, 1, 2])
    assert len(calls) == 4
    assert footprint(found.holdings()) == before
    assert before.keep_learning_bytes == before.parameter_bytes


@pytest.mark.parametrize(
    ("name", "compression"), [("chunked", 0.5), ("chunked, a task's own", 0.8), ("structured", 0.5), ("low-rank", 1.5)]
)
def test_sizes_are_found_for_a_compression_of_all_tasks(name: str, compression: float) -> None:
    """On MLP 300-6, with as many tasks as are to come: not above, and hardly below. Sizes that are set do not count.

    Widths are whole numbers: by layer and of low rank the next one is a seventh or a tenth more.
    """
    given = learn(strategy(name, tasks=3, compression=compression), 0, 1, 2)
    told = given.generation()
    assert (0.99 if "chunked" in name else 0.85) * compression < told.compression <= compression
    assert told.sizes != strategy(name).generation().sizes
    if "chunked" in name:
        assert told.sizes["task_conditioned"] == (name != "chunked")


# --------------------------------------------------------------------------------------------------- a user's generator


class Scales(Generator):
    """One net for all tasks, and a factor of each of its tensors that the embedding makes."""

    def __init__(self, target: Target, embedding_size: int, seed: int) -> None:
        super().__init__(target, embedding_size)
        torch.manual_seed(seed)
        self.shared = nn.Parameter(0.1 * torch.randn(target.size))
        self.head = nn.Linear(embedding_size, len(target.layers))
        self.register_buffer("sizes", torch.tensor([layer.size for layer in target.layers]))

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the weights (..., P)."""
        sizes = cast(Tensor, self.sizes)
        factors: Tensor = 1 + self.head(embedding)
        return self.shared * factors.repeat_interleave(sizes, -1)


class ScaledNet(Generating):
    """The hypernetwork of a user who has a generator of his own."""

    def new_generator(self, target: Target, setup: Setup, config: Any) -> Generator:
        """Return it."""
        return Scales(target, config.embedding, setup.seed)


def own(tasks: int | None = None, **changes: Any) -> ScaledNet:
    spec = budget(iterations=4, lr=0.01)
    setup = Setup(new_net=new_net(), train=spec, device=CPU, seed=0, tasks=tasks)
    return ScaledNet(setup=setup, config=ScaledNet.Config(**({"embedding": 3} | changes)))


def test_a_generator_of_ones_own_is_one_hook_away() -> None:
    """It trains, is held, and is counted: P and E + 1 for each of its tensors, E for each task."""
    moved = []
    for beta in (0.0, 0.5):
        given = learn(own(beta=beta), 0)
        before = generated(given, 0)
        learn(given, 1)
        moved.append(float((generated(given, 0) - before).norm()))
    assert 0 < moved[1] < 0.5 * moved[0]
    found = given.generation()
    tensors = len(given.net.generator.target.layers)
    assert found.generator_parameters == found.target_parameters + 4 * tensors + 3 * 2
    assert found.sizes == {}


class Careless(Scales):
    """Takes one embedding, and not several."""

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the weights (P,)."""
        return self.shared * (self.head.weight @ embedding).repeat_interleave(cast(Tensor, self.sizes))


class Returns(Generating):
    """A hypernetwork that gets its generator from a test."""

    given: Any = None

    def new_generator(self, target: Target, setup: Setup, config: Any) -> Generator:
        """Return it."""
        made: Generator = self.given(target)
        return made


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (lambda target: nn.Linear(3, target.size), "new_generator returned a Linear, not a Generator"),
        (lambda target: Generator(target, 3), r"its generator \(Generator\) has no parameters to train"),
        (lambda target: Careless(target, 3, 0), r"makes \(2, 1806\) of embeddings \(2, 3\); found: RuntimeError: mat1"),
        (lambda target: Scales(Target(nn.Linear(3, 3)), 3, 0), "not the trunk of this target"),
    ],
)
def test_a_generator_that_cannot_be_used_is_refused_before_the_first_task(given: Any, line: str) -> None:
    setup = Setup(new_net=new_net(), train=budget(iterations=4, lr=0.01), device=CPU, seed=0)
    cls: type[Returns] = type("Own", (Returns,), {"given": staticmethod(given)})
    with pytest.raises(UserError, match=line) as caught:
        cls(setup=setup, config=cls.Config(embedding=3))
    assert len(caught.value.lines) == 1


def test_a_generator_of_ones_own_takes_no_compression() -> None:
    with pytest.raises(UserError, match="strategy ScaledNet: its generator is its own, and finds no sizes"):
        own(compression=0.5, tasks=2)


# ------------------------------------------------------------------------------------------------------------- mistakes


class Shared(nn.Module):
    """One weight in two places."""

    out_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.other = nn.Linear(3, 3)
        self.other.weight = self.one.weight


class Grown(nn.Module):
    """A layer that grows."""

    out_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.one = GrowLinear(3, 3)


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("chunked", {"chunk": 1807}, "a chunk of 1807 is larger than the target's 1806 weights"),
        ("chunked", {"compression": 0.001, "tasks": 2}, "a compression of 0.001 cannot be met: the nearest a chunked"),
        ("full", {"compression": 0.5, "tasks": 2}, "a compression of 0.5 cannot be met: the nearest a full generator"),
        ("low-rank", {"compression": 0.9, "tasks": 2}, "a compression of 0.9 cannot be met: the nearest a lowrank"),
        ("low-rank", {"rank": 7}, "rank 7 is more than any matrix of the target has: at most 6"),
        ("chunked", {"compression": 0.5}, "nothing tells how many they are"),
        ("full", {"chunks_asked": 0.5}, "chunks_asked is 0.5, and a full generator has no chunks"),
    ],
)
def test_sizes_that_cannot_be_are_one_line(name: str, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        strategy(name, **changes)
    (told,) = caught.value.lines
    assert told.startswith(f"strategy {KINDS[name][0].__name__}: ")
    assert line in told


@pytest.mark.parametrize("name", ["chunked", "structured", "low-rank"])
@pytest.mark.parametrize(
    ("trunk", "line"),
    [(Shared, "one.weight and other.weight are one parameter"), (Grown, "has layers that grow, GrowLinear 'one'")],
)
def test_a_net_that_cannot_be_generated_is_one_line(name: str, trunk: type[nn.Module], line: str) -> None:
    cls, settings = KINDS[name]
    setup = Setup(new_net=lambda: HeadedNet(trunk(), MultiHead(3, 0)), train=budget(), device=CPU, seed=0)
    with pytest.raises(UserError) as caught:
        cls(setup=setup, config=cls.Config(**settings))
    (told,) = caught.value.lines
    assert told.startswith(f"strategy {cls.__name__}: the target")
    assert line in told
