"""The output regulariser of hypernetworks: what the generator made for earlier tasks, it is to make still.

von Oswald, Henning, Grewe & Sacramento 2020, "Continual learning with hypernetworks", ICLR, arXiv:1906.00695, eq. 2:

    beta / n  *  sum over the n earlier tasks t of  || h(e_t, Theta*) - h(e_t, Theta + dTheta) ||^2

h is the generator, e_t a task's embedding, Theta* the generator's parameters before the task in training began, Theta
those it has now, and dTheta the step that the optimiser would take on the loss of the task alone (`candidate_step`), or
nothing. dTheta is a constant: no gradient flows through it, which is the default of the authors' code too (hypercl,
Apache-2.0). A training step is:

    optimizer.zero_grad()
    loss.backward()                                        # the loss of the task, alone
    delta = candidate_step(optimizer, generator)           # where one looks ahead
    regulariser.backward(beta, delta)                      # adds to the gradients
    optimizer.step()

Sampled forms are unbiased: k of the n tasks, drawn without replacement, stand for all of them with the factor n / k; m
of a task's M chunks with the factor M / m.

Several tasks' outputs may be made in one pass (`group`): fewer, larger products, and the memory of so many tasks.

Letters: E entries of an embedding, P outputs of the generator, K chunks asked for, G tasks asked in one pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

Targets = Literal["snapshot", "stored"]
Draw = dict[int, Tensor | None]
"""Earlier tasks that are asked, each with the numbers of the chunks (K,), or None for all of its outputs."""


class Generates(Protocol):
    """A generator of weights."""

    def __call__(self, embedding: Tensor, /) -> Tensor:
        """Return the weights (P,) made from an embedding (E,); with groups, also (G, P) made from (G, E)."""


@runtime_checkable
class GeneratesChunks(Protocol):
    """A generator that makes its output piece by piece: the chunks one after another, cut to P entries."""

    chunks: int
    """Their number."""

    def __call__(self, embedding: Tensor, /) -> Tensor:
        """Return the weights (P,) made from an embedding (E,)."""

    def chunk(self, embedding: Tensor, numbers: Tensor, /) -> Tensor:
        """Return the chunks of these numbers (K,), counted from 0: (K, size of a chunk)."""


class _Asked(nn.Module):
    """A generator as one call, for its whole output or for chunks, that a functional call can make."""

    def __init__(self, generator: nn.Module) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, embedding: Tensor, numbers: Tensor | None) -> Tensor:
        if numbers is None:
            return cast(Generates, self.generator)(embedding)
        return cast(GeneratesChunks, self.generator).chunk(embedding, numbers)


class OutputRegulariser:
    """Holds the generator's outputs for earlier tasks where they were. See the module's text for the equation.

    Targets are what the generator makes now, at construction; `rebuild` takes them anew when the tasks have changed. A
    snapshot is a copy of the generator and makes each target when it is asked for; stored targets take P numbers a task
    and no second generation. Both have the same values.

    Args:
        generator: an `nn.Module` that is a `Generates`. Its parameters are read at every call.
        embeddings: earlier task -> its embedding (E,). They are held by reference.
        targets: "snapshot" or "stored".
        tasks: how many earlier tasks a step asks; None for all.
        chunks: share of its chunks that a task is asked for, in (0, 1], rounded to at least one chunk; None for the
            whole output in one go. Needs a `GeneratesChunks`.
        generator_of_chance: on the CPU; what is drawn is drawn from it. Needed with `tasks` or `chunks`.
        group: G, how many tasks' whole outputs are made in one pass by `backward`; more than one needs a generator that
            takes several embeddings. Chunks are asked task by task.
        train_embeddings: whether the penalty's gradient reaches the embeddings of earlier tasks. Targets belong to the
            embeddings as they were. Looking ahead moves the generator only: the loss of one task does not move another
            task's embedding.

    Raises:
        ValueError: an unknown word, a number out of range, no generator of chance where one is needed, or chunks that
            are not the generator's output cut in pieces.
        TypeError: `chunks` for a generator that has none.
    """

    def __init__(
        self,
        generator: nn.Module,
        embeddings: Mapping[int, Tensor],
        targets: Targets = "snapshot",
        tasks: int | None = None,
        chunks: float | None = None,
        generator_of_chance: torch.Generator | None = None,
        *,
        group: int = 1,
        train_embeddings: bool = False,
    ) -> None:
        if targets not in ("snapshot", "stored"):
            raise ValueError(f"targets are from a snapshot or stored, not {targets!r}")
        if tasks is not None and tasks < 1:
            raise ValueError(f"tasks: {tasks} of them; ask at least one earlier task a step, or None for all")
        if chunks is not None and not 0 < chunks <= 1:
            raise ValueError(f"chunks: a share above 0 and at most 1, not {chunks}")
        if chunks is not None and not isinstance(generator, GeneratesChunks):
            raise TypeError(f"a share of the chunks needs a generator with chunks; {type(generator).__name__} has none")
        if generator_of_chance is None and (tasks is not None or chunks is not None):
            raise ValueError("a sample of tasks or chunks is drawn from generator_of_chance: give one")
        if group < 1:
            raise ValueError(f"group: {group} tasks at once; at least one")
        self.targets = targets
        self.n_tasks = tasks
        self.share = chunks
        self.chance = generator_of_chance
        self.group = group
        self.train_embeddings = train_embeddings
        self._now = _Asked(generator)
        self.rebuild(embeddings)

    @torch.no_grad()
    def rebuild(self, embeddings: Mapping[int, Tensor]) -> None:
        """Take what the generator makes now for these tasks as the targets, in place of those there were.

        Args:
            embeddings: earlier task -> its embedding (E,).
        """
        self._embeddings = dict(embeddings)
        self._then: _Asked | None = None
        self._anchors: dict[int, Tensor] = {}
        self._places_of: dict[int, int] = {}
        self._stored: Tensor | None = None
        """(tasks, P), in the order of `tasks`."""
        if not embeddings:
            return
        if self.share is not None:
            self._check_chunks(next(iter(embeddings.values())))
        if self.targets == "stored":
            self._places_of = {task: place for place, task in enumerate(embeddings)}
            groups = self._groups(dict.fromkeys(embeddings))
            self._stored = torch.cat([self._now(self._input(tasks), None).view(len(tasks), -1) for tasks in groups])
            return
        self._then = copy.deepcopy(self._now).requires_grad_(False)
        self._anchors = {task: embedding.detach().clone() for task, embedding in embeddings.items()}

    @property
    def tasks(self) -> list[int]:
        """The earlier tasks."""
        return list(self._embeddings)

    # ------------------------------------------------------------------------------------------------------ the penalty

    def draw(self) -> Draw:
        """Return what a step asks: all, or drawn without replacement, every task's chunks apart from the others'."""
        tasks = self.tasks
        if self.n_tasks is not None and self.n_tasks < len(tasks):
            order = torch.randperm(len(tasks), generator=self.chance)[: self.n_tasks]
            tasks = [tasks[i] for i in sorted(order.tolist())]
        if self.share is None:
            return dict.fromkeys(tasks)
        total = self._chunks()
        asked = max(1, round(self.share * total))
        return {task: torch.randperm(total, generator=self.chance)[:asked].sort().values for task in tasks}

    def value(self, delta: Mapping[str, Tensor] | None = None, draw: Draw | None = None) -> Tensor:
        """Return the penalty for beta = 1, a 0-dim tensor with the graph of all tasks at once.

        Args:
            delta: parameter of the generator, by name, -> the step ahead, of its shape; those left out stay.
            draw: what to ask; None to draw it. Chunks can be asked only where a share of them was given.

        Raises:
            ValueError: chunks asked without a share.
        """
        draw = self.draw() if draw is None else draw
        moved = {name: self._parameter(name) + step for name, step in (delta or {}).items()}
        terms = []
        for task in draw:
            numbers = self._numbers(draw, task)
            away, factor = self._away(self._made([task], numbers, moved), self._target([task], numbers), numbers)
            terms.append(away.square().sum() * factor)
        if not terms:
            return next(self._now.parameters()).new_zeros(())
        return torch.stack(terms).sum() / len(terms)

    def backward(self, beta: float, delta: Mapping[str, Tensor] | None = None, draw: Draw | None = None) -> float:
        """Add the gradient of beta times the penalty to what parameters have, group by group; return its value.

        A group's graph is gone before the next one's is made, so that memory does not grow with the tasks. To return a
        number waits for the device, once.

        Args:
            beta: strength, not negative.
            delta: as in `value`.
            draw: as in `value`.

        Raises:
            ValueError: a negative or infinite beta, or chunks asked without a share.
        """
        if not 0 <= beta < float("inf"):
            raise ValueError(f"beta is not negative and finite, not {beta}")
        draw = self.draw() if draw is None else draw
        if not draw or beta == 0:
            return 0.0
        moved = {}
        for name, step in (delta or {}).items():
            here = self._parameter(name)
            moved[name] = (here.detach() + step).requires_grad_(here.requires_grad)
        total = next(self._now.parameters()).new_zeros(())
        for tasks in self._groups(draw):
            total += self._backward(tasks, self._numbers(draw, tasks[0]), beta / len(draw), moved)
        for name, there in moved.items():  # d / d Theta at Theta + dTheta, dTheta constant: the gradient there is it
            here = self._parameter(name)
            if there.grad is not None:
                here.grad = there.grad if here.grad is None else here.grad.add_(there.grad)
        return float(total)

    def _backward(
        self, tasks: Sequence[int], numbers: Tensor | None, weight: float, moved: Mapping[str, Tensor]
    ) -> Tensor:
        """Run one group's term backwards and return its value. What it made is gone when the next group's is made."""
        made = self._made(tasks, numbers, moved)
        with torch.no_grad():  # by hand, as a graph of the square takes as long as the products
            away, factor = self._away(made, self._target(tasks, numbers), numbers)
            scale = weight * factor
            value: Tensor = scale * torch.linalg.vector_norm(away).square()
            away.mul_(2 * scale)
        torch.autograd.backward(made, away)
        return value

    def _groups(self, draw: Draw) -> list[list[int]]:
        """Return the tasks in groups that are asked together: whole outputs G at once, chunks task by task."""
        tasks = list(draw)
        size = self.group if all(numbers is None for numbers in draw.values()) else 1
        return [tasks[first : first + size] for first in range(0, len(tasks), size)]

    def _numbers(self, draw: Draw, task: int) -> Tensor | None:
        """Return the numbers of the chunks (K,) that a task is asked for, where its embedding is; None for all."""
        numbers = draw[task]
        if numbers is not None and self.share is None:
            raise ValueError(f"task {task} is asked for chunks, but no share of them was given")
        return None if numbers is None else numbers.to(self._embeddings[task].device)

    def _input(self, tasks: Sequence[int]) -> Tensor:
        """Return the embedding (E,) of one task, or those of several (G, E)."""
        held = [self._embeddings[task] for task in tasks]
        if not self.train_embeddings:
            held = [embedding.detach() for embedding in held]
        return held[0] if len(held) == 1 else torch.stack(held)

    def _made(self, tasks: Sequence[int], numbers: Tensor | None, moved: Mapping[str, Tensor]) -> Tensor:
        """Return what is made now, with its graph: (P,) or (G, P), or chunks (K, size) of one task."""
        call = {f"generator.{name}": value for name, value in moved.items()}
        asked = (self._input(tasks), numbers)
        made: Tensor = functional_call(self._now, call, asked) if call else self._now(*asked)
        return made

    @torch.no_grad()
    def _target(self, tasks: Sequence[int], numbers: Tensor | None) -> Tensor:
        """Return what was made for tasks at the time of the snapshot, of the shape of `_made`; chunks may be whole."""
        if self._then is not None:
            anchors = [self._anchors[task] for task in tasks]
            target: Tensor = self._then(anchors[0] if len(anchors) == 1 else torch.stack(anchors), numbers)
            return target
        assert self._stored is not None
        places = [self._places_of[task] for task in tasks]
        if len(places) == 1:
            return self._stored[places[0]]
        if places == list(range(places[0], places[0] + len(places))):
            return self._stored[places[0] : places[0] + len(places)]  # no copy
        return self._stored[torch.tensor(places, device=self._stored.device)]

    def _away(self, made: Tensor, target: Tensor, numbers: Tensor | None) -> tuple[Tensor, float]:
        """Return the distance from a target, and the factor by which its square counts: chunks stand for all of them.

        The last chunk may stand over the end of the output: what is cut off counts for nothing.
        """
        if numbers is None:
            return made - target, 1.0
        places = self._places(numbers, made)
        if target.ndim == 1:
            target = target[places.clamp(max=self._size - 1)]
        return (made - target) * (places < self._size), self._chunks() / len(numbers)

    @staticmethod
    def _places(numbers: Tensor, made: Tensor) -> Tensor:
        """Return where in the whole output the entries of chunks `made` (K, size) stand."""
        return numbers[:, None] * made.shape[1] + torch.arange(made.shape[1], device=made.device)

    def _parameter(self, name: str) -> nn.Parameter:
        return self._now.generator.get_parameter(name)

    def _chunks(self) -> int:
        return cast(GeneratesChunks, self._now.generator).chunks

    def _check_chunks(self, embedding: Tensor) -> None:
        """Note P, and refuse chunks that are not the output in pieces: a share of them would stand for another sum."""
        whole: Tensor = self._now(embedding, None)
        pieces: Tensor = self._now(embedding, torch.arange(self._chunks(), device=embedding.device))
        self._size = whole.numel()
        cut = pieces.flatten()[: self._size]
        # Two ways of the same products: equal up to the rounding of sums.
        room = 1e-3 * float(whole.abs().max()) + 1e-12
        if cut.shape != whole.shape or float((cut - whole).abs().max()) > room:
            name = type(self._now.generator).__name__
            raise ValueError(f"the chunks of {name}, one after another and cut to {self._size}, are not its output")


# ---------------------------------------------------------------------------------------------------- looking ahead


@torch.no_grad()
def candidate_step(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return the step that the optimiser would take now, by parameter name of `module`; nothing is changed.

    What `optimizer.step()` would add, with momentum, running averages and weight decay, to the rounding of its
    arithmetic. To be called when gradients are those of the task's loss alone. A parameter without a gradient, or that
    the optimiser does not have, takes no step and is left out. Plain tensors: constants for whoever uses them.

    Args:
        optimizer: SGD, Adam or AdamW.
        module: usually the generator.

    Raises:
        TypeError: another optimiser.
        ValueError: one with `amsgrad` or `maximize`.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if not isinstance(optimizer, torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW):
        raise TypeError(f"looking ahead knows the steps of SGD, Adam and AdamW, not of {type(optimizer).__name__}")
    found = {}
    for group in optimizer.param_groups:
        for word in ("amsgrad", "maximize"):
            if group.get(word):
                raise ValueError(f"looking ahead knows no steps with {word}")
        for parameter in group["params"]:
            if id(parameter) in names and parameter.grad is not None:
                state = optimizer.state.get(parameter, {})
                if isinstance(optimizer, torch.optim.SGD):
                    step = _sgd(parameter, parameter.grad, group, state)
                else:
                    decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
                    step = _adam(parameter, parameter.grad, group, state, decoupled)
                found[names[id(parameter)]] = step
    return found


def _sgd(here: Tensor, gradient: Tensor, group: Mapping[str, float], state: Mapping[str, Tensor]) -> Tensor:
    """Return -lr (g + mu v) or -lr v; v is the gradient g at first, then mu v + (1 - damping) g."""
    if group["weight_decay"]:
        gradient = gradient + group["weight_decay"] * here
    momentum = group["momentum"]
    if not momentum:
        return -group["lr"] * gradient
    velocity = state.get("momentum_buffer")
    velocity = gradient if velocity is None else momentum * velocity + (1 - group["dampening"]) * gradient
    return -group["lr"] * (gradient + momentum * velocity if group["nesterov"] else velocity)


def _adam(
    here: Tensor, gradient: Tensor, group: Mapping[str, float], state: Mapping[str, Tensor], apart: bool
) -> Tensor:
    """Return -lr m^ / (sqrt(v^) + eps), and -lr decay Theta beside it where decay is apart from the gradient."""
    decay = group["weight_decay"]
    if decay and not apart:
        gradient = gradient + decay * here
    beta1, beta2 = cast("tuple[float, float]", group["betas"])
    first, second = (1 - beta1) * gradient, (1 - beta2) * gradient.square()
    steps: Tensor | int = 1
    if state:
        first += beta1 * state["exp_avg"]
        second += beta2 * state["exp_avg_sq"]
        # In float64: as float32 the corrections would be off in the seventh digit.
        steps = torch.as_tensor(state["step"], dtype=torch.float64) + 1
    of_first, of_second = 1 - beta1**steps, 1 - beta2**steps
    step = first.div_(of_first).div_(second.div_(of_second).sqrt_().add_(group["eps"])).mul_(-group["lr"])
    return step.sub_(here, alpha=group["lr"] * decay) if decay and apart else step
