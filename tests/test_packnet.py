"""PackNet: who owns which weight by hand, fixed weights to the bit under every optimiser, answers that never change."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.nets import HeadedNet, MultiHead, build_trunk
from clbench.nets.shared.packed import PackedNet
from clbench.nets.shared.tasknet import matrices
from clbench.strategies.base import Setup
from clbench.strategies.packnet import PackNet
from data_factory import refusal
from strategy_factory import CPU, budget, made, synthetic, tensor_task

NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"hidden": [9, 7], "dropout": 0.2}),
    "zenke": ("zenke", {"channels": (3, 4), "hidden": 8}),
    "resnet18": ("resnet18", {"width": 3}),
}


def plain(kind: str = "mlp", shape: tuple[int, int, int] = (1, 2, 3), **settings: Any) -> HeadedNet:
    torch.manual_seed(0)
    trunk = build_trunk(kind, shape, **(settings or {"hidden": [4, 3]}))
    return HeadedNet(trunk, MultiHead(trunk.out_features, 0))


def row(weights: list[float]) -> PackedNet:
    """Return a net with one unit without bias, and these weights."""
    net = PackedNet(plain(shape=(1, 1, len(weights)), hidden=[1], bias=False), 0)
    with torch.no_grad():
        net.trunk.get_parameter("layers.0.weight").copy_(torch.tensor([weights]))
    return net


def packnet(new_net: Any = plain, train: dict[str, Any] | None = None, **settings: Any) -> PackNet:
    setup = Setup(new_net=new_net, train=budget(**(train or {})), device=CPU, seed=0)
    return PackNet(setup=setup, config=PackNet.Config(**{"prune": 0.5, **settings}))


class Experience:
    """As much of an experience as training on random images takes; shapes of images (C, H, W)."""

    def __init__(self, task: int, shape: tuple[int, int, int], samples: int = 8) -> None:
        generator = torch.Generator().manual_seed(task)
        images = torch.randint(256, (samples, *shape), generator=generator, dtype=torch.uint8)
        self.task_label = task
        self.classes_in_this_experience = [0, 1]
        self.data = [tensor_task(images, [n % 2 for n in range(samples)], task)]


def learn(strategy: PackNet, task: int, shape: tuple[int, int, int] = (1, 2, 3)) -> None:
    experience = Experience(task, shape)
    cast(Any, strategy).training_data = lambda given: given.data
    strategy.train_task(cast(Any, experience))


def owners(net: PackedNet) -> dict[str, Tensor]:
    return {name: net.owners(name) for name in matrices(net.trunk)}


# ------------------------------------------------------------------------------------------------------ who owns what


def test_owners_are_kept_in_as_few_bit_planes_as_tell_the_tasks_apart() -> None:
    """11 weights, one claimed by each task: codes 0 to T need bit_length(T) planes, of ceil(11 / 8) = 2 bytes each."""
    net = row([1.0] * 11)
    for task, planes in enumerate([1, 2, 2, 3, 3, 3, 3, 4, 4, 4]):
        net.observe(task, [0, 1])
        chosen = torch.zeros(1, 11, dtype=torch.bool)
        chosen[0, task] = True
        net.claim("layers.0.weight", chosen, task)
        assert net.planes["layers.0.weight"].shape == (planes, 2)
    assert net.owners("layers.0.weight").tolist() == [[*range(1, 11), 0]]
    for task in range(10):  # task k has the first k + 1
        assert net.mask("layers.0.weight", task).tolist() == [[place <= task for place in range(11)]]
    assert net.mask("layers.0.weight", 99).sum() == 10


def test_a_task_answers_with_its_own_and_older_weights_alone() -> None:
    """Tasks 7, 3, 5 in this order own weights 0, 1 and 2 of (1, 2, 3, 4); the 4 is free and made zero by the claim.

    The newest is answered with all there is, an unseen one likewise.
    """
    net = row([1.0, 2.0, 3.0, 4.0])
    for number, task in enumerate([7, 3, 5]):
        net.observe(task, [0, 1])
        with torch.no_grad():
            net.trunk.get_parameter("layers.0.weight")[0, number] = number + 1  # what training makes of a free zero
        net.claim("layers.0.weight", torch.arange(4).view(1, 4) == number, task)
    found = [net.weights(net.part(task)).get("layers.0.weight") for task in (7, 3, 5, 9)]
    assert [value.tolist() for value in found[:2] if value is not None] == [[[1, 0, 0, 0]], [[1, 2, 0, 0]]]
    assert found[2:] == [None, None]
    assert net.trunk.get_parameter("layers.0.weight").tolist() == [[1, 2, 3, 0]]
    assert net.mask("layers.0.weight", 3).tolist() == [[True, True, False, False]]
    assert [net.number(task) for task in (7, 3, 5, 9)] == [0, 1, 2, 3]


def test_what_has_an_owner_cannot_be_claimed_again() -> None:
    net = row([1.0, 2.0])
    for task in (0, 1):
        net.observe(task, [0, 1])
    net.claim("layers.0.weight", torch.tensor([[True, False]]), 0)
    with pytest.raises(ValueError, match="task 1 claims weights that have an owner"):
        net.claim("layers.0.weight", torch.tensor([[True, True]]), 1)


def test_pruning_keeps_the_largest_of_the_free_weights_in_size() -> None:
    """Of (1, -6, 2, -4, 5, 3) half are kept: -6, -4, 5. Of the rest, trained to (9, 0.5, -8), at one half 1.5 = 2."""
    strategy = packnet(lambda: row([1.0, -6.0, 2.0, -4.0, 5.0, 3.0]))
    net, name = strategy.net, "layers.0.weight"
    with torch.no_grad():
        strategy.begin_task(cast(Any, Experience(0, (1, 1, 6))))
        net.trunk.get_parameter(name).copy_(torch.tensor([[1.0, -6.0, 2.0, -4.0, 5.0, 3.0]]))
        strategy.prune({name: strategy.count(name)})
        assert net.trunk.get_parameter(name).tolist() == [[0, -6, 0, -4, 5, 0]]
        strategy.begin_task(cast(Any, Experience(1, (1, 1, 6))))
        net.trunk.get_parameter(name).copy_(torch.tensor([[9.0, -6.0, 0.5, -4.0, 5.0, -8.0]]))
        strategy.prune({name: strategy.count(name)})
    assert net.trunk.get_parameter(name).tolist() == [[9, -6, 0, -4, 5, -8]]
    assert net.owners(name).tolist() == [[2, 1, 0, 1, 1, 2]]


def counts(strategy: PackNet, tasks: int) -> list[int]:
    """Return how many weights of the first layer each task owns."""
    for task in range(tasks):
        learn(strategy, task, (1, 5, 8))
    found = strategy.net.owners("layers.0.weight")
    return [int((found == task + 1).sum()) for task in range(tasks)]


def wide() -> HeadedNet:
    return plain(shape=(1, 5, 8), hidden=[1], bias=False)


def test_shares_of_the_free_weights_shrink_and_shares_of_the_layer_do_not() -> None:
    """40 weights. A quarter of the free: 10, 7.5 = 8 (to even), 22 / 4 = 5.5 = 6. A quarter of the layer: 10 each."""
    assert counts(packnet(wide, prune=0.75), 3) == [10, 8, 6]
    assert counts(packnet(wide, prune=0.75, allot="layer"), 4) == [10, 10, 10, 10]
    assert counts(packnet(wide, prune=0.6, allot="layer"), 3) == [16, 16, 8]  # the last takes what is left


def test_the_share_that_is_left_free_is_that_of_the_published_capacity() -> None:
    """Kang et al. print 96.38 % for 10 tasks and 126.65 % for 20: 1 - S + T / 32 with S = (1 - 1 / T)^T."""
    for tasks, printed in ((10, 0.9638), (20, 1.2665)):
        assert 1 - (1 - 1 / tasks) ** tasks + tasks / 32 == pytest.approx(printed, abs=5e-5)


def test_a_ratio_that_leaves_a_task_nothing_is_one_line_that_names_layer_and_task() -> None:
    """Of 2 free weights 0.9 prunes all (0.2 rounds to 0); of a layer of 40, three times 0.4 leave a fourth nothing."""
    strategy = packnet(lambda: plain(shape=(1, 1, 2), hidden=[1], bias=False), prune=0.9)
    (line,) = refusal(lambda: learn(strategy, 3, (1, 1, 2)))
    assert line == (
        "strategy PackNet: prune 0.9 leaves task 3 (number 1) no weight of layer 'layers.0.weight': 2 of 2 are free. "
        "Prune less or take a wider net"
    )
    strategy = packnet(wide, prune=0.6, allot="layer")
    counts(strategy, 3)
    (line,) = refusal(lambda: learn(strategy, 4, (1, 5, 8)))
    assert "leaves task 4 (number 4) no weight of layer 'layers.0.weight': 0 of 40 are free. Prune more" in line


@pytest.mark.parametrize("allot", ["free", "layer"])
def test_room_that_tasks_will_not_find_is_told_before_the_first_is_trained(allot: str) -> None:
    """One unit's two weights: half of the layer's two is 1 and 1, half of the free ones 1 and then, of one, none.

    So of the layer's weights there is no room for a third task, of the free ones none for a second.
    """
    strategy = packnet(lambda: plain(shape=(1, 1, 2), hidden=[1], bias=False), allot=allot)
    fit = 1 if allot == "free" else 2
    strategy.check_tasks(list(range(fit)))
    with pytest.raises(UserError, match=rf"leaves task {fit} \(number {fit + 1}\) no weight of layer 'layers"):
        strategy.check_tasks(list(range(5)))
    assert strategy.net.tasks() == []


def test_a_net_without_weights_and_settings_out_of_range_are_refused() -> None:
    class Mean(nn.Module):
        out_features = 1

    with pytest.raises(UserError, match="PackNet: Mean has no weights to share out"):
        packnet(lambda: HeadedNet(Mean(), MultiHead(1, 0)))
    with pytest.raises(UserError, match="setting 'prune'"):
        made(synthetic(), "packnet", prune=1.0)


# ------------------------------------------------------------------------------------------------------- what is fixed

OPTIMISERS: dict[str, dict[str, Any]] = {
    "adam that lives on": {"optimizer": "adam", "lr": 0.1, "reset_optimizer": False},
    "momentum that lives on": {"momentum": 0.9, "reset_optimizer": False},
    "adamw with decay": {"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.5, "reset_optimizer": False},
    "sgd with decay": {"weight_decay": 0.1, "grad_clip": 0.1},
}


@pytest.mark.parametrize("train", OPTIMISERS.values(), ids=OPTIMISERS)
def test_what_a_task_owns_never_moves_again_and_what_is_free_is_zero(train: dict[str, Any]) -> None:
    strategy = packnet(train={"iterations": 4, **train})
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    for task in range(3):
        learn(strategy, task)
        for name, owner in owners(strategy.net).items():
            weight = strategy.net.trunk.get_parameter(name).detach()
            if name in kept:
                before, owned = kept[name]
                assert torch.equal(weight[owned > 0], before[owned > 0])
                assert torch.equal(owner[owned > 0], owned[owned > 0])
            assert not bool(weight[owner == 0].any())
            assert bool(weight[owner == task + 1].any())
            kept[name] = (weight.clone(), owner)


def test_without_its_repair_fixed_weights_would_move() -> None:
    """The guard against a test that cannot fail: AdamW's decay alone moves what has no gradient."""
    strategy = packnet(train={"iterations": 4, **OPTIMISERS["adamw with decay"]})
    learn(strategy, 0)
    before = strategy.net.trunk.get_parameter("layers.0.weight").detach().clone()
    cast(Any, strategy).hold = lambda moves: None
    strategy.held = []
    learn(strategy, 1)
    owned = strategy.net.owners("layers.0.weight") == 1
    assert not torch.equal(strategy.net.trunk.get_parameter("layers.0.weight")[owned], before[owned])


def test_clipping_sees_the_gradient_of_what_trains_alone() -> None:
    """Of two weights one is owned: of the gradient (3, 4) only the free one's entry is left for the norm."""
    strategy = packnet(lambda: plain(shape=(1, 1, 2), hidden=[1], bias=False), train={"grad_clip": 1e-3})
    learn(strategy, 0, (1, 1, 2))
    strategy.hold(lambda owners: owners == 0)
    weight = strategy.net.trunk.get_parameter("layers.0.weight")
    weight.grad = torch.tensor([[3.0, 4.0]])
    strategy.after_backward()
    free = (strategy.net.owners("layers.0.weight") == 0).float()
    assert int(free.sum()) == 1
    assert weight.grad.tolist() == (torch.tensor([[3.0, 4.0]]) * free).tolist()


def test_retraining_has_its_share_of_the_budget_and_a_draw_of_its_own() -> None:
    """10 steps of 4 samples, then half as many at a tenth of the rate; of 5 epochs half are 2 (2.5, to even)."""
    strategy = packnet(train={"iterations": 10})
    rates: list[float] = []
    step = strategy.train_step

    def watched(batch: Any) -> None:
        rates.append(strategy.optimizer.param_groups[0]["lr"])
        step(batch)

    cast(Any, strategy).train_step = watched
    learn(strategy, 0)
    assert rates == [0.1] * 10 + [pytest.approx(0.01)] * 5
    assert strategy.samples_trained == 60
    assert strategy.setup.train.lr == 0.1
    strategy = packnet(train={"iterations": None, "epochs": 5})
    learn(strategy, 0)
    assert strategy.samples_trained == 8 * (5 + 2)
    strategy = packnet(train={"iterations": 10}, retrain=0.0)
    learn(strategy, 0)
    assert strategy.samples_trained == 40


def test_with_nothing_pruned_and_no_retraining_the_first_task_is_plain_training() -> None:
    """To the bit, under Adam."""
    found = []
    methods: dict[str, dict[str, Any]] = {"finetune": {}, "packnet": {"prune": 0.0, "retrain": 0.0}}
    for name, settings in methods.items():
        strategy, stream = made(synthetic(iterations=5), name, **settings)
        strategy.train_task(stream.benchmark.train_stream[0])
        found.append(torch.cat([value.detach().flatten() for value in strategy.model.parameters()]))
    assert torch.equal(*found)


# ------------------------------------------------------------------------------------------------- nothing is forgotten


@pytest.mark.parametrize("small", ["first", "task"])
@pytest.mark.parametrize("kind", NETS)
def test_a_tasks_logits_are_the_same_to_the_bit_whatever_is_learned_later(kind: str, small: Any) -> None:
    """In evaluation mode, for every task after each later one, the first one trained again among them."""
    shape = (3, 16, 16)
    name, settings = NETS[kind]
    train = {"iterations": 3, "optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "reset_optimizer": False}
    strategy = packnet(lambda: plain(name, shape, **settings), train=train, small=small)
    x = torch.rand(5, *shape)
    before: dict[int, Tensor] = {}
    for task in (0, 1, 2, 0, 3):
        learn(strategy, task, shape)
        strategy.net.eval()
        for old, logits in before.items():
            if old != task:
                assert torch.equal(strategy.net(x, old), logits)
        before[task] = strategy.net(x, task).detach()


@pytest.mark.parametrize("small", ["first", "task"])
def test_running_statistics_belong_to_the_first_task_or_to_each(small: Any) -> None:
    """First: unchanged by the second task, which learns under them. Task: the second has others."""
    shape = (3, 16, 16)
    strategy = packnet(lambda: plain("resnet18", shape, width=3), train={"iterations": 3}, small=small)
    learn(strategy, 0, shape)
    first = [value.clone() for value in strategy.net.statistics(0)]
    bias = [value.detach().clone() for value in strategy.net.small_parameters(0)]
    learn(strategy, 1, shape)
    assert all(map(torch.equal, first, strategy.net.statistics(0)))
    assert all(map(torch.equal, bias, strategy.net.small_parameters(0)))
    same = all(map(torch.equal, bias, strategy.net.small_parameters(1)))
    assert same == (small == "first")
    pairs = list(zip(strategy.net.statistics(0), strategy.net.statistics(1), strict=True))
    assert all(one is other for one, other in pairs[:-1]) == (small == "first")  # the last is the task's number


def test_a_spectral_norm_of_the_first_task_stays_as_it_learned_it() -> None:
    """Its power iteration moves two vectors in each training pass, and with them what older tasks answer."""

    def new_net() -> HeadedNet:
        net = plain(shape=(1, 2, 3), hidden=[4])
        spectral_norm(net.trunk.get_submodule("layers.0"))
        return net

    strategy = packnet(new_net)
    learn(strategy, 0)
    vectors = {name: buffer.clone() for name, buffer in strategy.net.trunk.named_buffers()}
    x = torch.rand(5, 1, 2, 3)
    before = strategy.net.eval()(x, 0)
    learn(strategy, 1)
    assert len(vectors) == 2
    assert all(torch.equal(buffer, vectors[name]) for name, buffer in strategy.net.trunk.named_buffers())
    assert torch.equal(strategy.net.eval()(x, 0), before)


def test_a_module_that_holds_one_with_statistics_still_trains() -> None:
    """Dropout beside them, and within a module that has a buffer of its own, is not switched off."""
    net = PackedNet(plain(), 0)
    outer = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    outer.register_buffer("scale", torch.ones(1))
    net.trunk.add_module("extra", outer)
    net.observe(0, [0, 1])
    net.observe(1, [0, 1])
    net.train()
    assert [module.training for module in (outer, outer[0], outer[1])] == [False, True, False]


def test_the_newest_task_seen_again_trains_what_it_owns_and_no_more() -> None:
    strategy = packnet(train={"iterations": 4})
    for task in (0, 1):
        learn(strategy, task)
    owned = owners(strategy.net)
    before = {name: strategy.net.trunk.get_parameter(name).detach().clone() for name in owned}
    learn(strategy, 1)
    for name, owner in owners(strategy.net).items():
        moved = strategy.net.trunk.get_parameter(name) != before[name]
        assert torch.equal(owner, owned[name])
        assert not bool(moved[owner != 2].any())
    assert bool((strategy.net.trunk.get_parameter("layers.0.weight") != before["layers.0.weight"]).any())


def test_an_older_task_seen_again_trains_its_head_and_small_parameters_of_its_own_alone() -> None:
    for small, moves in (("first", 0), ("task", 2)):
        strategy = packnet(train={"iterations": 4, "weight_decay": 0.1}, small=small)
        for task in (0, 1, 2):
            learn(strategy, task)
        head = list(strategy.net.head.task_parameters()[1])
        watched = [*matrices(strategy.net.trunk).values(), *strategy.net.small_parameters(1), *head]
        before = [value.detach().clone() for value in watched]
        learn(strategy, 1)
        changed = [not torch.equal(old, new) for old, new in zip(before, watched, strict=True)]
        assert sum(changed[:-2]) == moves
        assert all(changed[-2:])


# --------------------------------------------------------------------------------------------------------------- books


def test_uses_and_bytes_by_hand() -> None:
    """MLP 6-4-3 with biases: matrices of 24 and 12. Half of the free each: 12 and 6, then 6 and 3.

    Owners of two tasks are 2 planes of 3 and 2 bytes, 10 in all; every task has its number in 2 bytes. Parameters:
    24 + 4 + 12 + 3 = 43 in the trunk, 3 * 2 + 2 = 8 a head.
    """
    strategy = packnet()
    for task in (4, 2):
        learn(strategy, task)
    uses = strategy.uses()
    assert list(uses) == [4, 2]
    masked = {task: [int(use.mask.sum()) for use in found if use.mask is not None] for task, found in uses.items()}
    assert masked == {4: [12, 6], 2: [18, 9]}
    whole = {task: sum(use.tensor.numel() for use in found if isinstance(use.tensor, nn.Parameter) and use.mask is None)
             for task, found in uses.items()}
    assert whole == {4: 7 + 8, 2: 7 + 8}
    found = footprint(strategy.holdings())
    assert found.buffer_bytes == 10 + 2 * 2
    assert (found.parameters, found.parameters_shared) == (43 + 16, 43)
    assert strategy.undeclared() == {}


def test_small_parameters_of_its_own_are_a_tasks_in_the_books() -> None:
    """The first task has the trunk's 7 biases, the second a copy: only the 36 weights are shared."""
    strategy = packnet(small="task")
    for task in (4, 2):
        learn(strategy, task)
    found = footprint(strategy.holdings())
    assert (found.parameters, found.parameters_shared) == (43 + 7 + 16, 36)


def test_an_unseen_task_is_answered_as_it_will_be_born() -> None:
    for small in ("first", "task"):
        strategy = packnet(small=small)
        learn(strategy, 0)
        net, x = strategy.net.eval(), torch.rand(3, 1, 2, 3)
        before = net(x, 9)
        net.observe(9, [0, 1])
        assert torch.equal(net(x, 9), before)
