"""APD: the decomposition bit for bit, its objective by hand, consolidation on numbers that can be followed."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.nets import HeadedNet, MultiHead, build_trunk
from clbench.nets.decomposed import DecomposedNet, k_means
from clbench.recipes import load_task
from clbench.strategies.apd import APD
from clbench.strategies.base import Setup
from strategy_factory import CPU, budget, made, recipe, synthetic, tensor_task, weights

NETS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [9, 7]},
    "zenke": {"channels": (3, 4), "hidden": 8},
    "lenet": {"channels": (3, 4), "hidden": (6, 5)},
}


def plain(kind: str = "mlp", shape: tuple[int, int, int] = (3, 16, 16), **settings: Any) -> HeadedNet:
    torch.manual_seed(0)
    trunk = build_trunk(kind, shape, **(settings or NETS[kind]))
    return HeadedNet(trunk, MultiHead(trunk.out_features, 0))


def scattered(net: DecomposedNet, tasks: int = 3) -> DecomposedNet:
    """Give the net tasks of two classes with random parts, half of every tau zero; in evaluation mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        for task in range(tasks):
            net.observe(task, [0, 1])
            for parameter in net.part(task).parameters():
                parameter.normal_(std=0.2)
            for tau in net.part(task).tau:
                tau.mul_(torch.rand_like(tau) < 0.5)
    return net.eval()


def tiny(sigma: list[float], taus: list[list[float]]) -> DecomposedNet:
    """Return a net with one unit, without bias, whose weights are sigma and whose task i has taus[i]; float64."""
    net = DecomposedNet(plain("mlp", (1, 1, len(sigma)), hidden=[1], bias=False).double(), "zero")
    with torch.no_grad():
        net.trunk.layer(0).weight.copy_(torch.tensor([sigma]))
        for task, tau in enumerate(taus):
            net.observe(task, [0, 1])
            net.part(task).tau[0].copy_(torch.tensor([tau]))
    return net


def taus(net: DecomposedNet) -> list[list[float]]:
    return [cast("list[float]", net.part(task).tau[0][0].tolist()) for task in net.tasks()]


def thetas(net: DecomposedNet, task: int) -> Tensor:
    """Return every weight of a task as one vector, (P,), a copy."""
    return torch.cat([net.theta(i, task).detach().flatten() for i in range(len(net.trunk.chain))])


# ---------------------------------------------------------------------------------------------------- the decomposition


@pytest.mark.parametrize("kind", NETS)
def test_a_task_is_answered_by_the_plain_net_with_weights_theta_to_the_bit(kind: str) -> None:
    """Theta is sigma (*) sigmoid(m) + tau, unit by unit, and the task's biases, put into an ordinary net."""
    net, twin = scattered(DecomposedNet(plain(kind))), plain(kind).eval()
    x = torch.rand(5, 3, 16, 16)
    for task in net.tasks():
        part = net.part(task)
        twin.observe(task, [0, 1])
        for i, name in enumerate(net.trunk.chain):
            layer = cast(Any, twin.trunk.get_submodule(name))
            sigma, mask = net.trunk.layer(i).weight, torch.sigmoid(part.mask[i])
            by_unit = [torch.addcmul(t, s, m) for t, s, m in zip(part.tau[i], sigma, mask, strict=True)]
            layer.weight, layer.bias = nn.Parameter(torch.stack(by_unit)), part.bias[str(i)]
        assert torch.equal(net(x, task), twin(x, task))


@pytest.mark.parametrize("kind", NETS)
def test_a_batch_of_several_tasks_runs_each_sample_through_its_own_weights(kind: str) -> None:
    net, x = scattered(DecomposedNet(plain(kind))), torch.rand(6, 3, 16, 16)
    task = torch.tensor([2, 0, 0, 1, 2, 0])
    each = torch.cat([net(x[n : n + 1], int(t)) for n, t in enumerate(task)])
    torch.testing.assert_close(net(x, task), each)
    assert torch.equal(net(x, torch.full((6,), 1)), net(x, 1))


@pytest.mark.parametrize(("begins", "share"), [("shared", 1.5), ("zero", 0.5)])
def test_an_unseen_task_is_answered_as_it_will_be_born(begins: Any, share: float) -> None:
    """The mask is sigmoid(0) = 1/2 and tau is sigma or 0: theta is 1.5 or 0.5 times sigma, the bias 0."""
    net, x = scattered(DecomposedNet(plain(), begins)), torch.rand(4, 3, 16, 16)
    before = net(x, 7)
    net.observe(7, [0, 1])
    assert torch.equal(net(x, 7), before)
    torch.testing.assert_close(net.theta(0, 7), share * net.trunk.layer(0).weight)


def test_without_a_task_there_is_no_answer() -> None:
    net = scattered(DecomposedNet(plain()))
    with pytest.raises(ValueError, match="give one number, or one per sample"):
        net(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="give its number"):
        net.features(torch.rand(1, 3, 16, 16))


class Beside(nn.Module):
    """A net of another kind: no chain."""

    out_features = 2


def test_a_net_that_is_no_chain_is_refused_in_one_line() -> None:
    def refused(new_net: Any) -> str:
        with pytest.raises(UserError) as caught:
            APD(setup=Setup(new_net=new_net, train=budget(), device=CPU, seed=0), config=APD.Config(l1=0.0, lam2=0.0))
        (line,) = caught.value.lines
        return line

    def widened() -> HeadedNet:
        net = plain()
        net.trunk.scale = nn.Parameter(torch.ones(1))
        return net

    rule = "APD needs a net that is a chain of layers, such as mlp, zenke or lenet: "
    assert refused(lambda: plain("resnet18", width=4)) == rule + "ResNet18 is no chain of layers"
    assert refused(lambda: HeadedNet(Beside(), MultiHead(2, 0))) == rule + "Beside is no chain of layers"
    assert refused(widened) == rule + "MLP has parameters beside its chain: scale"


# -------------------------------------------------------------------------------------------------------- the objective


def apd(**settings: Any) -> APD:
    """Return APD in float64 on 2 x 2 images with three tasks of random parts, the third about to be trained."""
    train = budget(weight_decay=settings.pop("decay", 0.0), optimizer=settings.pop("optimizer", "sgd"))
    new_net = settings.pop("new_net", lambda: plain("mlp", (1, 2, 2), hidden=[3, 2]).double())
    setup = Setup(new_net=new_net, train=train, device=CPU, seed=0)
    strategy = APD(setup=setup, config=APD.Config(**{"l1": 0.1, "lam2": 3.0, **settings}))
    scattered(strategy.net)
    strategy.refresh_optimizer()
    strategy.task_label = 2
    strategy.before_task(cast(Any, None))
    return strategy


def moved(strategy: APD) -> None:
    """Move every parameter, as training would: drift appears."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in strategy.net.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.mark.parametrize("retroactive", [True, False])
@pytest.mark.parametrize("others", [True, False])
def test_the_gradient_by_hand_is_that_of_the_objective(retroactive: bool, others: bool) -> None:
    """Autograd differentiates cross-entropy + penalty() in sigma and in tau and mask of every task; float64."""
    strategy = apd(decay=0.2, retroactive=retroactive)
    if not others:
        assert strategy.past is not None
        strategy.past.release()
        strategy.past = None
    moved(strategy)
    past, part = strategy.past, strategy.net.part(2)
    shared = [layer.weight for layer in strategy.net.layers()]
    stacks = [value.requires_grad_() for value in (*past.tau, *past.mask)] if past and retroactive else []
    x, y = torch.rand(5, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])

    def loss() -> Tensor:
        return nn.functional.cross_entropy(strategy.net(x, 2), y)

    wanted = torch.autograd.grad(loss() + strategy.penalty(), [*shared, *part.tau, *part.mask, *stacks])
    for value in stacks:
        value.requires_grad_(False)
    torch.autograd.backward(loss())
    strategy.after_backward()
    got = [parameter.grad for parameter in (*shared, *part.tau, *part.mask)]
    if past and retroactive:
        olds = [strategy.net.part(task) for task in (0, 1)]
        got += [torch.stack([cast(Tensor, old.tau[i].grad) for old in olds]) for i in range(2)]
        got += [torch.stack([cast(Tensor, old.mask[i].grad) for old in olds]) for i in range(2)]
    else:
        assert all(value.grad is None for task in (0, 1) for value in strategy.net.part(task).parameters())
    torch.testing.assert_close(got, list(wanted), rtol=1e-12, atol=1e-14)


def test_one_weights_gradients_are_the_numbers_worked_out_by_hand() -> None:
    """With sigma 2, m 0, so that M = 1/2, and tau 1, theta is 2. theta* = 1 makes the drift 1: g = 2 lam2 d = 6.

    d tau = g + l1 = 6.1;  d sigma = M g = 3;  d m = M (1 - M) sigma g = 1/4 * 2 * 6 = 3.
    """
    strategy = apd(new_net=lambda: plain("mlp", (1, 1, 1), hidden=[1], bias=False).double())
    past, sigma = strategy.past, strategy.net.trunk.layer(0).weight
    assert past is not None
    with torch.no_grad():
        sigma.fill_(2.0)
        past.tau[0].fill_(1.0)
        past.mask[0].zero_()
        past.target[0].copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1))  # the second task has not drifted
    sigma.grad = torch.zeros_like(sigma)
    past.add_gradients([cast(nn.Parameter, sigma)], 0.1, 3.0)
    old, still = strategy.net.part(0), strategy.net.part(1)
    found = [cast(Tensor, value.grad).item() for value in (old.tau[0], sigma, old.mask[0], still.tau[0], still.mask[0])]
    assert found == pytest.approx([6.1, 3.0, 3.0, 0.1, 0.0], rel=1e-14)


def test_decay_under_adamw_shrinks_the_same_weights_instead_of_adding_to_gradients() -> None:
    """At lr 0.1, decay 0.2: times 1 - 0.02 for tau and mask of the task in training; nothing else before the step."""
    strategy = apd(optimizer="adamw", decay=0.2, l1=0.0, lam2=0.0)
    before = {name: value.detach().clone() for name, value in strategy.net.named_parameters()}
    torch.autograd.backward(strategy.net(torch.rand(2, 1, 2, 2).double(), 2).sum())
    strategy.after_backward()
    for name, value in strategy.net.named_parameters():
        held = name.startswith(("adaptive.2.tau", "adaptive.2.mask"))
        torch.testing.assert_close(value.detach(), before[name] * (0.98 if held else 1), rtol=1e-14, atol=0)


def drift(lam2: float, **settings: Any) -> float:
    """Return how far the first task's theta moves while three more are trained by SGD, root of the mean square."""
    task = synthetic(iterations=25, optimizer="sgd", lr=0.05)
    strategy, stream = made(task, "apd", lam2=lam2, cluster_every=0, l1=0.0, **settings)
    first, *rest = stream.benchmark.train_stream
    strategy.train_task(first)
    before = thetas(strategy.net, 0)
    for experience in rest:
        strategy.train_task(experience)
    return float((thetas(strategy.net, 0) - before).square().mean().sqrt())


def test_the_stronger_the_penalty_the_less_an_old_tasks_weights_drift() -> None:
    """SGD at 0.05 is stable for lam2 < 20 / (1 + 3 / 4): masks are near 1/2, old tasks three at most."""
    found = [drift(lam2) for lam2 in (0.0, 0.1, 1.0, 8.0)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0] / 10


def test_apd_fixed_leaves_old_tasks_own_weights_alone_and_holds_the_shared_ones() -> None:
    strategy, stream = made(synthetic(iterations=10), "apd", retroactive=False, cluster_every=0, prune=0.0)
    first, second, *_ = stream.benchmark.train_stream
    strategy.train_task(first)
    before = [parameter.detach().clone() for parameter in strategy.net.part(0).parameters()]
    strategy.train_task(second)
    for old, new in zip(before, strategy.net.part(0).parameters(), strict=True):
        assert torch.equal(old, new)
    assert drift(8.0, retroactive=False) < drift(0.0, retroactive=False) / 4


def test_a_task_trained_again_has_all_others_as_its_past() -> None:
    strategy, stream = made(synthetic(n_tasks=3, iterations=2), "apd")
    strategy.train(list(stream.benchmark.train_stream))
    strategy.begin_task(stream.benchmark.train_stream[1])
    strategy.before_task(stream.benchmark.train_stream[1])
    assert not strategy.is_new
    parts = [strategy.net.part(task) for task in (0, 2)]
    assert strategy.past.parameters == [value for part in parts for value in (*part.tau, *part.mask)]


# ------------------------------------------------------------------------------------------------------------- sparsity


def test_small_elements_of_every_tau_become_zeros_and_are_not_counted() -> None:
    """Pruned at 0.25, of tau (0.25, -0.1, 0.3, 0) 0.3 alone stays. Without `prune` the threshold is l1."""
    for settings in ({"l1": 0.0, "prune": 0.25}, {"l1": 0.25}):
        strategy = apd(new_net=lambda: plain("mlp", (1, 1, 4), hidden=[1]), **settings)
        with torch.no_grad():
            for task in range(3):
                for parameter in strategy.net.part(task).parameters():
                    parameter.fill_(1.0)
                strategy.net.part(task).tau[0].copy_(torch.tensor([[0.25, -0.1, 0.3, 0.0]]))
        before = footprint(strategy.holdings())
        strategy.after_task(cast(Any, None))
        assert all(strategy.net.part(task).tau[0].count_nonzero() == 1 for task in range(3))
        after = footprint(strategy.holdings())
        assert before.parameters_nonzero - after.parameters_nonzero == 3 * 2
        assert before.parameters == after.parameters


def test_the_bytes_of_a_sparse_store_are_eight_for_each_element_that_is_not_zero() -> None:
    """4 float64 of sigma, 2 masks, 2 heads of (1 + 1) x 2: 80 + 24 = 112 bytes dense; 3 non-zero of tau at 12."""
    net = tiny([1.0, 2.0, 3.0, 4.0], [[1.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 0.0]])
    assert net.sparse_bytes() == 8 * (4 + 2 + 2 * 4) + 12 * 3
    net.consolidate(0, [[0, 1]], 0.0)  # the 1 is stored once
    assert net.sparse_bytes() == 8 * (4 + 2 + 2 * 4) + 12 * 2


def test_a_larger_l1_leaves_fewer_elements() -> None:
    """Adam takes steps of about lr, so that is where pruning cuts in all four."""
    found = []
    for l1 in (0.0, 1e-3, 1e-2, 1e-1):
        strategy, stream = made(synthetic(n_tasks=2, iterations=60, lr=2e-3), "apd", l1=l1, prune=2e-3)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(footprint(strategy.holdings()).parameters_nonzero)
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.7 * found[0]


# -------------------------------------------------------------------------------------------------------- consolidation


TAUS = [[1.0, 5.0, 0.0], [1.0, 6.0, 0.0], [9.0, 0.0, 7.0], [9.5, 0.0, 7.0], [4.0, 4.0, 4.0]]


def test_what_a_cluster_has_alike_is_stored_once_and_no_weight_changes() -> None:
    """At beta 0 tasks 0 and 1 agree on elements 0 and 2: tau~ (1, 0, 0), leaving (0, 5, 0) and (0, 6, 0).

    Tasks 2, 3 agree on 1 and 2: tau~ (0, 0, 7), leaving (9, 0, 0) and (9.5, 0, 0). Task 4 is alone.
    """
    net = tiny([1.0, 2.0, 3.0], TAUS)
    before = [thetas(net, task) for task in net.tasks()]
    net.consolidate(0, [[0, 1], [2, 3], [4]], 0.0)
    assert taus(net) == [[0, 5, 0], [0, 6, 0], [9, 0, 0], [9.5, 0, 0], [4, 4, 4]]
    assert [value[0].tolist() for value in cast(Any, net.local[0])] == [[1, 0, 0], [0, 0, 7]]
    assert net.groups == {0: [0], 1: [0], 2: [1], 3: [1], 4: [-1]}
    for task in net.tasks():
        assert torch.equal(thetas(net, task), before[task])


def test_with_a_tolerance_a_weight_moves_to_the_middle_by_half_of_it_at_most() -> None:
    """At beta 1, 5 and 6 become 5.5, 9 and 9.5 become 9.25; at 0.75 only the latter."""
    for beta, expected in ((1.0, [[1, 5.5, 0], [9.25, 0, 7]]), (0.75, [[1, 0, 0], [9.25, 0, 7]])):
        net = tiny([1.0, 2.0, 3.0], TAUS)
        before = [thetas(net, task) for task in net.tasks()]
        net.consolidate(0, [[0, 1], [2, 3], [4]], beta)
        assert [value[0].tolist() for value in cast(Any, net.local[0])] == expected
        assert max(float((thetas(net, task) - before[task]).abs().max()) for task in net.tasks()) <= beta / 2


def test_consolidating_again_begins_with_whole_weights() -> None:
    """What {0, 1} shared goes back to them before {0, 4} are compared: 5 and 4 are alike at beta 1, nothing else."""
    net = tiny([0.0, 0.0, 0.0], TAUS)
    net.consolidate(0, [[0, 1], [2, 3]], 0.0)
    net.consolidate(0, [[0, 4], [1], [2], [3]], 1.0)
    assert taus(net) == [[1, 0, 0], *TAUS[1:4], [4, 0, 4]]
    assert [value[0].tolist() for value in cast(Any, net.local[0])] == [[0, 4.5, 0]]
    assert net.groups == {0: [0], 1: [-1], 2: [-1], 3: [-1], 4: [0]}


@pytest.mark.parametrize("seed", range(5))
def test_k_means_finds_groups_that_lie_apart_wherever_it_begins(seed: int) -> None:
    """Two groups 100 apart, of spread 2: from any two points the centres end in the groups' means.

    Begun inside one group, the far points all go to one centre, whose mean then lets the nearer ones go.
    """
    points = torch.tensor([[0.0], [1.0], [2.0], [100.0], [101.0]])
    found = k_means(points, 2, torch.Generator().manual_seed(seed))
    assert sorted(found) == [[0, 1, 2], [3, 4]]


def test_k_means_of_as_many_clusters_as_points_and_of_equal_points() -> None:
    generator = torch.Generator().manual_seed(0)
    assert sorted(k_means(torch.arange(4.0).view(4, 1), 9, generator)) == [[0], [1], [2], [3]]
    assert k_means(torch.ones(4, 2), 3, generator) == [[0, 1, 2, 3]]
    assert k_means(torch.ones(1, 2), 1, generator) == [[0]]


def test_clustering_is_due_after_every_so_many_new_tasks_and_brings_k_clusters_each_time() -> None:
    """Every 2 tasks, k = 1: one cluster after tasks 2 and 3 (task 1 came again between), two after task 4."""
    asked: list[tuple[int, int]] = []
    strategy, stream = made(synthetic(iterations=2), "apd", cluster_every=2, clusters=1)
    consolidate = strategy.consolidate

    def watched(k: int) -> None:
        asked.append((len(strategy.net.adaptive), k))
        consolidate(k)

    strategy.consolidate = watched
    train = stream.benchmark.train_stream
    for number in (0, 1, 1, 2, 0, 3):
        strategy.train_task(train[number])
    assert asked == [(2, 1), (4, 2)]
    assert sorted({group for groups in strategy.net.groups.values() for group in groups} - {-1}) in ([0], [0, 1])


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_a_stream_is_learned_and_not_forgotten_where_finetuning_forgets() -> None:
    """Permuted digits, a head per task: the pixels of three tasks contend for one layer.

    Forgetting: the mean over the first two tasks of the accuracy right after training minus that at the end.
    """
    digits = load_task("digits_permuted")
    stream_of_three = digits.stream.model_copy(update={"scenario": "task", "n_tasks": 3})
    lost, right = {}, {}
    for name in ("finetune", "apd"):
        strategy, stream = made(digits.model_copy(update={"stream": stream_of_three}), name)
        tests, after = list(stream.benchmark.test_stream), []
        for number, experience in enumerate(stream.benchmark.train_stream):
            strategy.train_task(experience)
            after.append(strategy.accuracy(tests[number]))
        end = [strategy.accuracy(test) for test in tests]
        lost[name] = sum(a - b for a, b in zip(after, end, strict=True)) / 2
        right[name] = sum(end) / 3
    assert abs(lost["apd"]) < 0.01 < 0.05 < lost["finetune"]
    assert right["apd"] > max(right["finetune"], 0.93)


@pytest.mark.parametrize("reset", [True, False])
def test_consolidated_twice_and_stopped_anywhere_it_goes_on_to_the_bit(reset: bool) -> None:
    """Four tasks, consolidated after the second and the fourth, stopped after each of the first three."""
    task = synthetic(iterations=5, reset_optimizer=reset)
    whole, stream = made(task, "apd", clusters=1, beta=0.1)
    train, states = list(stream.benchmark.train_stream), []
    for experience in train:
        whole.train_task(experience)
        states.append((copy.deepcopy(whole.state_dict()), whole.order.get_state(), whole.chance.get_state()))
    assert any(len(cast(nn.ParameterList, block)) for block in whole.net.local)
    for number, (state, order, chance) in enumerate(states[:3]):
        later, _ = made(task, "apd", clusters=1, beta=0.1)
        later.load_state_dict(state)
        later.order.set_state(order)
        later.chance.set_state(chance)
        for experience in train[number + 1 :]:
            later.train_task(experience)
        assert later.net.groups == whole.net.groups
        assert torch.equal(weights(later), weights(whole))


def test_locally_shared_weights_are_shared_frozen_and_needed_to_answer() -> None:
    strategy, stream = made(synthetic(n_tasks=2, iterations=3), "apd", clusters=1, beta=1.0, prune=0.0)
    for experience in stream.benchmark.train_stream:
        strategy.train_task(experience)
    (local,) = cast(Any, strategy.net.local[0])
    found = footprint(strategy.holdings())
    sigma = strategy.net.trunk.layer(0).weight
    assert not local.requires_grad
    assert found.parameters_shared == sigma.numel() + local.numel()
    assert found.answer_bytes == found.parameter_bytes + found.buffer_bytes


def test_nothing_is_left_of_a_tasks_training_but_the_net() -> None:
    """Parameters are rows of one tensor while another task trains; afterwards each has exactly its own memory."""
    strategy, stream = made(synthetic(n_tasks=3, iterations=2), "apd")
    strategy.train(list(stream.benchmark.train_stream))
    assert strategy.past is None
    assert strategy.undeclared() == {}
    for parameter in strategy.net.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert parameter.grad is None


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(UserError, match="setting 'begins'"):
        made(synthetic(), recipe("clbench.strategies.apd:APD", l1=0.0, lam2=0.0, begins="sigma"))
    with pytest.raises(UserError, match="setting 'l1'"):
        made(synthetic(), recipe("clbench.strategies.apd:APD", l1=-1.0, lam2=0.0))


def test_a_training_step_reads_the_data_it_is_given() -> None:
    """One step of SGD by hand: at logits 0, p = (1/2, 1/2), and the head's bias moves by lr (onehot - p)."""
    strategy = apd(new_net=lambda: plain("mlp", (1, 1, 1), hidden=[1]), l1=0.0, lam2=0.0)
    part, head = strategy.net.part(2), cast(Any, strategy.net.head).heads["2"].blocks[0]
    with torch.no_grad():
        for parameter in (*part.parameters(), *head.parameters()):
            parameter.zero_()
    strategy.fit([tensor_task(torch.full((4, 1, 1, 1), 255, dtype=torch.uint8), [1] * 4, task=2)])
    torch.testing.assert_close(head.bias.detach(), torch.tensor([-0.05, 0.05]))
