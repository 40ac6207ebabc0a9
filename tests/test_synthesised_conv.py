"""Synthesised convolutions as a strategy: what forgets and what does not, what is held, and what is counted."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.nets import HeadedNet, MultiHead, build_trunk
from clbench.nets.hypernet.regulariser import OutputRegulariser
from clbench.sharing import sharing
from clbench.strategies.base import Setup
from clbench.strategies.synthesised_conv import SynthesisedConv
from strategy_factory import CPU, budget, tensor_task

SHAPE = (3, 10, 10)
NETS: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [6]},
    "zenke": {"channels": (2, 3), "hidden": 4, "dropout": (0.0, 0.0)},
    "resnet18": {"width": 1},
}


def strategy(kind: str = "mlp", train: dict[str, Any] | None = None, **settings: Any) -> SynthesisedConv:
    def new_net() -> HeadedNet:
        torch.manual_seed(0)
        trunk = build_trunk(kind, SHAPE, **NETS[kind])
        return HeadedNet(trunk, MultiHead(trunk.out_features, 0))

    setup = Setup(new_net=new_net, train=budget(**{"iterations": 4, **(train or {})}), device=CPU, seed=0)
    return SynthesisedConv(setup=setup, config=SynthesisedConv.Config(**({"embedding": 3} | settings)))


class Experience:
    """As much of an experience as training on eight random images takes."""

    def __init__(self, task: int) -> None:
        generator = torch.Generator().manual_seed(task)
        images = torch.randint(256, (8, *SHAPE), generator=generator, dtype=torch.uint8)
        self.task_label = task
        self.classes_in_this_experience = [0, 1]
        self.data = [tensor_task(images, [n % 2 for n in range(8)], task)]


def learn(given: SynthesisedConv, *tasks: int) -> SynthesisedConv:
    cast(Any, given).training_data = lambda experience: experience.data
    for task in tasks:
        given.train_task(cast(Any, Experience(task)))
    return given


def made(given: SynthesisedConv, task: int) -> Tensor:
    """Return all that a task's embedding makes, (P,)."""
    with torch.no_grad():
        return cast(Tensor, given.net.makers(given.net.embeddings()[task]))


@pytest.mark.parametrize("kind", NETS)
def test_training_a_task_moves_the_weights_of_the_others_but_nothing_they_have_for_themselves(kind: str) -> None:
    """Forgetting is in the makers alone: embedding, biases, normalisation, statistics and head stay to the bit."""
    given = learn(strategy(kind), 0, 1)
    own = [[value.clone() for value in given.net.task_parameters()[task]] for task in (0, 1)]
    statistics = [[value.clone() for value in given.net.statistics(task)] for task in (0, 1)]
    before = [made(given, task) for task in (0, 1)]
    learn(given, 2)
    for task in (0, 1):
        kept = [*given.net.task_parameters()[task], *given.net.statistics(task)]
        assert all(torch.equal(a, b) for a, b in zip(kept, [*own[task], *statistics[task]], strict=True))
        assert not torch.allclose(made(given, task), before[task])


@pytest.mark.parametrize("look_ahead", [True, False])
def test_the_regulariser_keeps_the_weights_of_earlier_tasks_where_they_were(look_ahead: bool) -> None:
    """Under SGD with a small step the other tasks' weights move less than half as far as without it."""
    moved = []
    for beta in (0.0, 30.0):
        given = learn(strategy(train={"iterations": 60, "lr": 0.003}, beta=beta, look_ahead=look_ahead), 0, 1)
        before = [made(given, task) for task in (0, 1)]
        learn(given, 2)
        moved.append(sum(float((made(given, task) - before[task]).norm()) for task in (0, 1)))
    assert moved[1] < 0.5 * moved[0]


def test_a_step_is_down_the_gradient_of_loss_and_penalty_by_hand() -> None:
    """One step of SGD from where task 1 begins, by autograd through the sum looked ahead to.

    The penalty's own gradient is taken at Theta - lr g, g the gradient of the loss at Theta; the step is
    -lr (g + beta * that). Without the look ahead it would be 0: nothing has moved yet.
    """
    lr, beta = 0.1, 2.0
    given = learn(strategy(train={"iterations": 1, "lr": lr, "batch_size": 8}, beta=beta), 0)
    start = copy.deepcopy(given.net.makers)
    old = given.net.embeddings()[0].detach().clone()
    seen: list[dict[str, Tensor]] = []
    after_backward = given.after_backward

    def noted() -> None:
        seen.append({name: cast(Tensor, p.grad).clone() for name, p in given.net.makers.named_parameters()})
        after_backward()

    cast(Any, given).after_backward = noted
    learn(given, 1)
    (gradient,) = seen
    ahead = copy.deepcopy(start)
    with torch.no_grad():
        for name, parameter in ahead.named_parameters():
            parameter.sub_(lr * gradient[name])
    torch.autograd.backward(beta * (ahead(old) - start(old).detach()).square().sum())
    for (name, there), begun in zip(ahead.named_parameters(), start.parameters(), strict=True):
        wanted = begun - lr * (gradient[name] + cast(Tensor, there.grad))
        torch.testing.assert_close(given.net.makers.get_parameter(name), wanted, rtol=1e-5, atol=1e-6)


def test_what_is_noted_is_the_smaller_of_the_ways_and_gone_after_the_task() -> None:
    """Makers hold E + 1 = 3 numbers for each of P: up to three other tasks' weights are stored, then the makers are."""
    given = strategy(beta=1.0, embedding=2)
    found: list[tuple[list[int], str] | None] = []
    before_task = given.before_task

    def noted(experience: Any) -> None:
        before_task(experience)
        held = given.regulariser
        found.append(None if held is None else (held.tasks, held.targets))

    cast(Any, given).before_task = noted
    learn(given, 0, 1, 2, 3, 1, 4)
    some = [([0], "stored"), ([0, 1], "stored"), ([0, 1, 2], "stored"), ([0, 2, 3], "stored")]
    assert found == [None, *some, ([0, 1, 2, 3], "snapshot")]
    assert given.regulariser is None
    assert given.undeclared() == {}


def test_as_many_tasks_are_asked_as_the_setting_says() -> None:
    given = learn(strategy(beta=1.0, asked=1), 0, 1)
    held: list[OutputRegulariser] = []
    before_task = given.before_task

    def noted(experience: Any) -> None:
        before_task(experience)
        assert given.regulariser is not None
        held.append(given.regulariser)

    cast(Any, given).before_task = noted
    learn(given, 2)
    assert {len(held[0].draw()) for _ in range(5)} == {1}


def test_the_counts_by_hand() -> None:
    """MLP 300-6: P = 1,800 weights of E + 1 = 4 numbers; a task has 3 + 6 + head 2 * 7 = 23 for itself.

    Two tasks: 7,200 + 46. Every task uses all makers and its own: in common 7,200 of 7,223.
    """
    given = learn(strategy(), 0, 1)
    kept = footprint(given.holdings())
    assert (kept.parameters, kept.parameters_shared, kept.parameters_per_task) == (7246, 7200, 46)
    found = sharing(given.uses(), dict(given.net.named_parameters()))
    assert (found.shared_by_all, found.private, found.unused) == (7200, 46, 0)
    assert found.in_common == pytest.approx(7200 / 7223)
    told = given.generation()
    assert (told.target_parameters, told.generator_parameters, told.compression) == (1800, 7206, 7206 / 1800)


def test_statistics_are_used_by_their_own_task_alone() -> None:
    """Of a residual net all bytes are some task's: what tasks need to answer is what is kept to answer."""
    given = learn(strategy("resnet18", train={"batch_size": 8}), 0, 1)
    found = sharing(given.uses(), dict(given.net.named_parameters()))
    assert found.unused == 0
    total = found.shared_by_all_bytes + found.shared_by_some_bytes + found.private_bytes
    assert total == footprint(given.holdings()).answer_bytes


def test_a_net_without_weights_is_refused() -> None:
    class Bare(nn.BatchNorm2d):
        out_features = 3

    setup = Setup(new_net=lambda: HeadedNet(Bare(3), MultiHead(3, 0)), train=budget(), device=CPU, seed=0)
    with pytest.raises(UserError, match="strategy SynthesisedConv: Bare has no weights to synthesise"):
        SynthesisedConv(setup=setup, config=SynthesisedConv.Config())
