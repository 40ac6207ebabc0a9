"""The output regulariser: brute force in float64, all subsets of what is sampled, and steps really taken on a copy."""

from __future__ import annotations

import copy
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clbench.memory import Meter
from clbench.nets.hypernet import Chunked, Target
from clbench.nets.hypernet.regulariser import Draw, OutputRegulariser, Targets, candidate_step

OUTPUTS, CHUNK = 10, 4
"""Three chunks, of which the last stands two over the end."""


class Pieces(nn.Module):
    """tanh(V e + chunk's own), times a matrix: chunks (K, 4), cut to 10 outputs."""

    def __init__(self, outputs: int = OUTPUTS, size: int = CHUNK, hidden: int = 5, embedding: int = 3) -> None:
        super().__init__()
        self.outputs, self.chunks = outputs, -(-outputs // size)
        self.first = nn.Linear(embedding, hidden)
        self.each = nn.Parameter(torch.randn(self.chunks, hidden))
        self.last = nn.Linear(hidden, size)

    def chunk(self, embedding: Tensor, numbers: Tensor) -> Tensor:
        made: Tensor = self.last(torch.tanh(self.first(embedding) + self.each[numbers]))
        return made

    def forward(self, embedding: Tensor) -> Tensor:
        return self.chunk(embedding, torch.arange(self.chunks)).flatten()[: self.outputs]


class Case:
    """A generator, embeddings of some tasks, and the generator a little later."""

    def __init__(self, n: int = 4, moved: bool = True, **settings: Any) -> None:
        torch.manual_seed(0)
        self.generator = Pieces().double()
        self.embeddings = {task: torch.randn(3, dtype=torch.float64, requires_grad=True) for task in range(n)}
        self.before = copy.deepcopy(self.generator)
        self.embeddings_before = {task: e.detach().clone() for task, e in self.embeddings.items()}
        self.penalty = OutputRegulariser(
            self.generator, self.embeddings, generator_of_chance=torch.Generator().manual_seed(0), **settings
        )
        if moved:
            self.move()

    def move(self) -> None:
        with torch.no_grad():
            for parameter in self.generator.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def brute(self, generator: nn.Module | None = None) -> Tensor:
        """Return the sum of the definition, output by output."""
        now = self.generator if generator is None else generator
        total = torch.zeros((), dtype=torch.float64)
        for task, embedding in self.embeddings.items():
            was = self.before(self.embeddings_before[task]).detach()
            for place in range(OUTPUTS):
                total = total + (was[place] - now(embedding)[place]) ** 2
        return total / len(self.embeddings)

    def gradients(self, of: Callable[[], Any]) -> list[Tensor | None]:
        """Return what a call adds to the gradients of generator and embeddings, which were none."""
        held = [*self.generator.parameters(), *self.embeddings.values()]
        for tensor in held:
            tensor.grad = None
        of()
        return [None if tensor.grad is None else tensor.grad.clone() for tensor in held]


def agree(found: list[Tensor | None], wanted: list[Tensor | None], room: float = 1e-12) -> bool:
    """Whether gradients are there in the same places and equal."""
    pairs = list(zip(found, wanted, strict=True))
    return all((a is None) == (b is None) for a, b in pairs) and all(
        torch.allclose(a, b, rtol=room, atol=room) for a, b in pairs if a is not None and b is not None
    )


def random_step(generator: nn.Module) -> dict[str, Tensor]:
    return {name: 0.1 * torch.randn_like(parameter) for name, parameter in generator.named_parameters()}


# ------------------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("settings", [{}, {"targets": "stored"}, {"tasks": 2}, {"chunks": 0.5}])
def test_it_is_zero_before_the_first_step_and_so_is_its_gradient(settings: dict[str, Any]) -> None:
    """Theta = Theta*: every difference is 0, and the gradient is twice the difference times something."""
    case = Case(moved=False, **settings)
    assert case.penalty.value().item() == 0
    found = case.gradients(lambda: case.penalty.backward(3.0))
    assert all(gradient is None or not gradient.any() for gradient in found)
    assert case.penalty.backward(3.0) == 0


@pytest.mark.parametrize("targets", ["snapshot", "stored"])
@pytest.mark.parametrize("chunks", [None, 1.0])
def test_it_is_the_sum_over_tasks_and_outputs(targets: Any, chunks: float | None) -> None:
    """All chunks are all outputs: the two that stand over the end count for nothing."""
    case = Case(targets=targets, chunks=chunks)
    assert case.brute() > 0.1
    torch.testing.assert_close(case.penalty.value(), case.brute(), rtol=1e-12, atol=0)


def test_one_task_and_one_output_by_hand() -> None:
    """h(e) = w e. Before: w = 2; now 3; e = 5: (10 - 15)^2 = 25, gradient 2 * 5 * 5 = 50. With beta = 2: 50 and 100.

    One step ahead of -0.5, w = 2.5: (10 - 12.5)^2 = 6.25, times two 12.5; gradient 2 * 2 * 2.5 * 5 = 50.
    """
    generator = nn.Linear(1, 1, bias=False)
    nn.init.constant_(generator.weight, 2.0)
    penalty = OutputRegulariser(generator, {0: torch.tensor([5.0])})
    nn.init.constant_(generator.weight, 3.0)
    assert penalty.value().item() == 25
    assert penalty.backward(2.0) == 50
    assert generator.weight.grad is not None
    assert generator.weight.grad.item() == 100
    generator.weight.grad.zero_()
    assert penalty.backward(2.0, {"weight": torch.tensor([[-0.5]])}) == 12.5
    assert generator.weight.grad.item() == 50


@pytest.mark.parametrize("targets", ["snapshot", "stored"])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_task_by_task_the_gradient_is_that_of_the_whole_sum(targets: Any, ahead: bool, trained: bool) -> None:
    """It is beta times the mean of the tasks' terms, through brute force; embeddings' if asked for.

    Looking ahead, the sum is that of a generator really moved, and its gradient there is the gradient here.
    """
    case = Case(targets=targets, train_embeddings=trained)
    delta = random_step(case.generator) if ahead else None
    moved = copy.deepcopy(case.generator)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.add_(delta[name] if delta else 0.0)
    wanted = case.gradients(lambda: torch.autograd.backward(0.7 * case.brute(moved)))
    generator_part: list[Tensor | None] = [parameter.grad for parameter in moved.parameters()]
    embedding_part = wanted[len(generator_part) :] if trained else [None] * len(case.embeddings)
    found = case.gradients(lambda: case.penalty.backward(0.7, delta))
    assert agree(found, [*generator_part, *embedding_part])
    naive = case.gradients(lambda: torch.autograd.backward(0.7 * case.penalty.value(delta)))
    assert agree(found, naive)
    assert case.penalty.backward(0.7, delta) == pytest.approx(0.7 * case.brute(moved).item(), rel=1e-12)


@pytest.mark.parametrize("targets", ["snapshot", "stored"])
@pytest.mark.parametrize("asked", [None, 3])
@pytest.mark.parametrize("group", [1, 2, 3, 5, 9])
def test_groups_of_tasks_have_the_gradient_of_the_whole_sum(targets: Any, asked: int | None, group: int) -> None:
    """Five tasks in ones, twos, threes and all at once: value, generator and embeddings, with a step ahead, in float64.

    What is asked comes in order with gaps, so that stored targets are picked.
    """
    torch.manual_seed(0)
    generator = Chunked(Target(nn.Linear(5, 4)), 3, 7, 2, (4,), "tanh").double()
    embeddings = {task: torch.randn(3, dtype=torch.float64, requires_grad=True) for task in (4, 0, 7, 2, 1)}
    chance = torch.Generator().manual_seed(1)
    penalty = OutputRegulariser(
        generator, embeddings, targets, asked, generator_of_chance=chance, group=group, train_embeddings=True
    )
    assert penalty.backward(1.0, draw=dict.fromkeys(embeddings)) == 0
    with torch.no_grad():
        for parameter in (*generator.parameters(), *embeddings.values()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    delta, held = random_step(generator), [*generator.parameters(), *embeddings.values()]
    draw = penalty.draw()
    assert len(draw) == (asked or 5)
    value = 2.0 * penalty.value(delta, draw)
    wanted = torch.autograd.grad(value, held, allow_unused=True)
    for tensor in held:
        tensor.grad = None
    assert penalty.backward(2.0, delta, draw) == pytest.approx(float(value.detach()), rel=1e-12)
    assert agree([tensor.grad for tensor in held], list(wanted))


def test_gradients_are_added_to_those_that_are_there() -> None:
    case = Case()
    for delta in (None, random_step(case.generator)):
        alone = case.gradients(partial(case.penalty.backward, 1.0, delta))

        def after_another(delta: Any = delta) -> None:
            for parameter in case.generator.parameters():
                parameter.grad = torch.ones_like(parameter)
            case.penalty.backward(1.0, delta)

        both = case.gradients(after_another)
        assert agree(both, [None if gradient is None else gradient + 1 for gradient in alone])


def test_targets_of_embeddings_in_training_belong_to_where_these_were() -> None:
    """An embedding moves from 5 to 6 under w = 2: (10 - 12)^2 = 4, stored or from a snapshot."""
    kinds: tuple[Targets, ...] = ("snapshot", "stored")
    for targets in kinds:
        generator, e = nn.Linear(1, 1, bias=False), nn.Parameter(torch.tensor([5.0]))
        nn.init.constant_(generator.weight, 2.0)
        penalty = OutputRegulariser(generator, {0: e}, targets, train_embeddings=True)
        nn.init.constant_(e, 6.0)
        assert penalty.backward(1.0) == 4
        assert e.grad is not None
        assert e.grad.item() == 2 * 2 * 2


def test_rebuilt_it_holds_the_new_tasks_where_they_are_now() -> None:
    case = Case(n=2)
    assert case.penalty.value() > 0
    case.embeddings[7] = torch.randn(3, dtype=torch.float64)
    case.penalty.rebuild(case.embeddings)
    assert case.penalty.tasks == [0, 1, 7]
    assert case.penalty.value() == 0
    case.before, case.embeddings_before = copy.deepcopy(case.generator), dict(case.embeddings)
    case.move()
    torch.testing.assert_close(case.penalty.value(), case.brute(), rtol=1e-12, atol=0)


def test_without_earlier_tasks_there_is_no_penalty() -> None:
    case = Case(n=0)
    assert case.penalty.value() == 0
    assert case.gradients(lambda: case.penalty.backward(1.0)) == [None] * 5


# ------------------------------------------------------------------------------------------------------------- sampling


def every_draw(tasks: int | None, chunks: int | None) -> Iterator[Draw]:
    """Yield all that can be drawn of 4 tasks and 3 chunks, each as likely as any other."""
    parts = [torch.tensor(numbers) for numbers in combinations(range(3), chunks)] if chunks else [None]
    for chosen in combinations(range(4), tasks or 4):
        for numbers in product(parts, repeat=len(chosen)):
            yield dict(zip(chosen, numbers, strict=True))


@pytest.mark.parametrize(
    ("settings", "tasks", "chunks"),
    [
        ({"tasks": 1}, 1, None),
        ({"tasks": 3}, 3, None),
        ({"chunks": 0.34}, None, 1),
        ({"chunks": 0.67}, None, 2),
        ({"tasks": 2, "chunks": 0.67}, 2, 2),
        ({"tasks": 2, "chunks": 0.34, "targets": "stored"}, 2, 1),
    ],
)
def test_over_all_that_can_be_drawn_value_and_gradient_are_those_of_the_whole_sum(
    settings: dict[str, Any], tasks: int | None, chunks: int | None
) -> None:
    """A subset of k of n with the factor n / k has the mean of the whole, whatever the tasks' own sizes."""
    case = Case(**settings)
    draws = list(every_draw(tasks, chunks))
    values = [case.penalty.value(draw=draw).item() for draw in draws]
    assert max(values) > 1.01 * min(values)
    assert sum(values) / len(values) == pytest.approx(case.brute().item(), rel=1e-12)
    whole = case.gradients(lambda: torch.autograd.backward(case.brute()))

    def all_of_them() -> None:
        for draw in draws:
            case.penalty.backward(1 / len(draws), draw=draw)

    mean = case.gradients(all_of_them)
    assert agree(mean[:5], whole[:5])


def test_every_subset_is_as_likely_as_any_other() -> None:
    """600 draws of 2 of 4 tasks, each with 1 of 3 chunks: 6 pairs, 100 each, deviation 9; every task's chunks 100."""
    case = Case(chunks=0.34, moved=False)
    case.penalty.n_tasks = 2
    pairs: Counter[tuple[int, ...]] = Counter()
    numbers: Counter[tuple[int, int]] = Counter()
    for _ in range(600):
        draw = case.penalty.draw()
        pairs[tuple(draw)] += 1
        for task, drawn in draw.items():
            assert drawn is not None
            numbers[task, int(drawn)] += 1
    assert set(pairs) == set(combinations(range(4), 2))
    assert len(numbers) == 12
    assert all(60 < count < 140 for count in (*pairs.values(), *numbers.values()))


def test_more_tasks_asked_than_there_are_is_all_of_them() -> None:
    case = Case(n=2)
    case.penalty.n_tasks = 5
    assert case.penalty.draw() == {0: None, 1: None}


# -------------------------------------------------------------------------------------------------------- looking ahead

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda given: torch.optim.SGD(given, lr=0.1),
    "sgd with decay": lambda given: torch.optim.SGD(given, lr=0.1, weight_decay=0.2),
    "momentum": lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.2),
    "nesterov": lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda given: torch.optim.Adam(given, lr=0.1, betas=(0.8, 0.95)),
    "fused adam with decay": lambda given: torch.optim.Adam(given, lr=0.1, weight_decay=0.2, fused=True),
    "adamw": lambda given: torch.optim.AdamW(given, lr=0.1, weight_decay=0.2),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_the_step_ahead_is_the_step_the_optimiser_takes(name: str, steps: int) -> None:
    """First and fourth step: foretold on the net, then taken; telling it changes neither net nor optimiser."""
    torch.manual_seed(1)
    net = Pieces().double()
    optimiser = OPTIMISERS[name](net.parameters())
    for step in range(steps + 1):
        optimiser.zero_grad()
        torch.autograd.backward(net(torch.randn(3, dtype=torch.float64)).square().sum())
        if step < steps:
            optimiser.step()
    before = {key: value.detach().clone() for key, value in net.named_parameters()}
    state = copy.deepcopy(optimiser.state_dict()["state"])
    told = candidate_step(optimiser, net)
    again = candidate_step(optimiser, net)
    assert str(optimiser.state_dict()["state"]) == str(state)
    assert all(torch.equal(value, before[key]) for key, value in net.named_parameters())
    optimiser.step()
    for key, value in net.named_parameters():
        assert torch.equal(told[key], again[key])
        assert not told[key].requires_grad
        torch.testing.assert_close(told[key], value.detach() - before[key], rtol=1e-12, atol=1e-15)


def test_looking_ahead_the_penalty_is_that_of_a_copy_that_took_the_step() -> None:
    """The definition: h at Theta + dTheta, for Adam with a state, on the gradient of a task's loss."""
    case = Case()
    twin = copy.deepcopy(case.generator)
    mine, its = (torch.optim.Adam(net.parameters(), lr=0.05) for net in (case.generator, twin))
    x = torch.randn(3, dtype=torch.float64)
    for step in range(3):
        for net, optimiser in ((case.generator, mine), (twin, its)):
            optimiser.zero_grad()
            torch.autograd.backward(net(x).sin().sum())
            if step < 2 or net is twin:
                optimiser.step()
    value = case.penalty.value(candidate_step(mine, case.generator))
    torch.testing.assert_close(value, case.brute(twin), rtol=1e-12, atol=0)


def test_what_takes_no_step_is_left_out() -> None:
    """The bias has no gradient, the stranger is not of the module."""
    net, stranger = nn.Linear(1, 1), nn.Parameter(torch.ones(1))
    net.weight.grad, stranger.grad = torch.ones(1, 1), torch.ones(1)
    found = candidate_step(torch.optim.SGD([*net.parameters(), stranger], lr=0.5), net)
    assert {name: step.item() for name, step in found.items()} == {"weight": -0.5}


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(
    sys.platform != "linux" or not any(shutil.which(name) for name in ("g++", "clang++", "c++")),
    reason="the counting allocator needs Linux and a C++ compiler",
)
def test_memory_does_not_grow_with_the_tasks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 5 to 50 tasks the backward pass of one task at a time peaks at the same; the sum of all, at ten times it.

    P = 100,000 floats. One task: what is made, its target and their difference; or the difference, over which the
    gradient is written, what was made, and one of them more on the way to the parameters.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    generator, outputs = Pieces(100_000, 1000, hidden=8), 4 * 100_000
    meter = Meter(torch.device("cpu"), cpu="allocator")
    peaks: dict[tuple[int, str], int] = {}
    for tasks in (5, 50):
        penalty = OutputRegulariser(generator, {task: torch.randn(3) for task in range(tasks)})
        for name in ("whole", "by task"):
            generator.zero_grad()
            with meter.phase(name):
                if name == "whole":
                    torch.autograd.backward(penalty.value())
                else:
                    penalty.backward(1.0)
            peak = meter.take()[0][name].allocated_bytes
            assert peak is not None
            peaks[tasks, name] = peak
    assert peaks[50, "by task"] <= 1.01 * peaks[5, "by task"]
    assert peaks[50, "by task"] <= 3.5 * outputs
    assert peaks[50, "whole"] > 5 * peaks[5, "whole"] > 5 * outputs


# ------------------------------------------------------------------------------------------------------------ bad input


class Swapped(Pieces):
    """Its chunks are not its output in pieces: they are scaled."""

    def forward(self, embedding: Tensor) -> Tensor:
        return 2 * super().forward(embedding)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "memory"}, "snapshot or stored, not 'memory'"),
        ({"tasks": 0}, "at least one earlier task"),
        ({"chunks": 0.0}, "a share above 0 and at most 1, not 0.0"),
        ({"chunks": 1.5}, "not 1.5"),
        ({"group": 0}, "group: 0 tasks at once; at least one"),
        ({"tasks": 1, "generator_of_chance": None}, "drawn from generator_of_chance"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OutputRegulariser(Pieces(), {}, **({"generator_of_chance": torch.Generator()} | settings))


def test_chunks_that_are_none_are_refused() -> None:
    chance, e = torch.Generator(), {0: torch.ones(3)}
    with pytest.raises(TypeError, match="Linear has none"):
        OutputRegulariser(nn.Linear(3, 4), e, chunks=0.5, generator_of_chance=chance)
    with pytest.raises(ValueError, match="the chunks of Swapped, one after another and cut to 10, are not its output"):
        OutputRegulariser(Swapped(), e, chunks=0.5, generator_of_chance=chance)
    with pytest.raises(ValueError, match="no share of them was given"):
        OutputRegulariser(Pieces(), e).value(draw={0: torch.tensor([1])})


def test_bad_strengths_and_steps_are_refused() -> None:
    penalty = OutputRegulariser(Pieces(), {0: torch.ones(3)})
    for beta in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="beta is not negative and finite"):
            penalty.backward(beta)
    net = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="not of RMSprop"):
        candidate_step(torch.optim.RMSprop(net.parameters()), net)
    with pytest.raises(ValueError, match="no steps with amsgrad"):
        candidate_step(torch.optim.Adam(net.parameters(), amsgrad=True), net)
