"""Generators: from an embedding of a task (E,) to all the weights of a target (P,), or from several (G, E) to (G, P).

    Full        a net with one output per weight                               P times its last width, and more
    Chunked     the same small net for every chunk of the weights, told apart by embeddings of the chunks
    Structured  by layer: one body, a head per shape of layer, embeddings of the layers   (`structured.py`)
    LowRank     the weights of all tasks plus a product of two thin factors per task      (`structured.py`)

What they generate flows into the target by `Target.split` and a functional call, so that gradients reach the generator
and the embedding. How they begin: `init.py`. Counts by hand stand with each class; `count` says them without building.

Letters: E embedding, h the last hidden width (that of the input, where there is none), C chunks, c the size of a
chunk's embedding, n the size of a chunk, K some chunks, P generated weights, T tasks, G some tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets.hypernet.init import (
    ALONE,
    Init,
    draw,
    draw_normal,
    gains,
    mean_variance,
    require_init,
    variance,
    zero_,
)
from clbench.nets.hypernet.scaling import Scaling
from clbench.nets.hypernet.target import Target

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "elu": F.elu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
}
"""What may follow a generator's hidden layers, by name."""

_SAMPLES = 64
"""Embeddings drawn to measure how large a body's output is."""


class Generator(nn.Module):
    """Base of the generators.

    Args:
        target: what is generated.
        embedding_size: of what a task brings; all numbers that are its own.
    """

    def __init__(self, target: Target, embedding_size: int) -> None:
        super().__init__()
        require_positive("embedding_size", embedding_size)
        self.target = target
        self.embedding_size = embedding_size

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the weights (P,) of the task with this embedding (E,), or (G, P) of the tasks with these (G, E)."""
        raise NotImplementedError

    def new_embedding(self, generator: torch.Generator) -> Tensor:
        """Return what a task is born with, (E,) float32: standard normal, drawn on the CPU."""
        return torch.randn(self.embedding_size, dtype=torch.float32, device="cpu", generator=generator)

    def parameters_with(self, tasks: int) -> int:
        """Return the parameters of the generator and of the embeddings of so many tasks."""
        return sum(parameter.numel() for parameter in self.parameters()) + tasks * self.embedding_size


@dataclass(frozen=True)
class Made:
    """Neighbouring outputs of a head that are to begin alike."""

    count: int
    variance: float
    birth: float
    """Their mean."""


class Joint(nn.Module):
    """A linear map of what is the same for all rows, x, and of what is a row's own, c: y_k = W_x x + W_c c_k + b.

    That of [x; c_k] in one matrix, without repeating x for every row. Parameters: out * (size + beside + 1).

    Args:
        size: of x.
        beside: of c; 0 for none.
        out: of y.
    """

    def __init__(self, size: int, beside: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, size))
        self.weight_beside = nn.Parameter(torch.empty(out, beside)) if beside else None
        self.bias = nn.Parameter(torch.empty(out))

    @property
    def fan_in(self) -> int:
        """Numbers that an output adds up."""
        return self.weight.shape[1] + (0 if self.weight_beside is None else self.weight_beside.shape[1])

    def forward(self, x: Tensor, c: Tensor | None = None) -> Tensor:
        """Return (K, out) for x (size,) and c (K, beside); without c, (..., out) for x (..., size).

        For x (G, size), and c (K, beside) or (G, K, beside), (G, K, out).
        """
        y = F.linear(x, self.weight, self.bias)
        if c is None:
            return y
        beside = cast(Tensor, self.weight_beside)
        return F.linear(c, beside, y) if x.ndim == 1 else F.linear(c, beside) + y.unsqueeze(-2)

    def draw(self, variances: float | Tensor, generator: torch.Generator) -> None:
        """Draw the weights with these variances, per output or one for all; biases are 0."""
        draw(self.weight, variances, generator)
        if self.weight_beside is not None:
            draw(self.weight_beside, variances, generator)
        zero_(self.bias)

    def draw_alone(self, init: Init, generator: torch.Generator) -> None:
        """Draw by a rule `ALONE`: weights and biases uniform within 1 / sqrt(fan-in), or weights by Glorot's rule."""
        if init == "xavier":
            self.draw(2 / (self.fan_in + self.weight.shape[0]), generator)
            return
        for parameter in (self.weight, self.weight_beside, self.bias):
            if parameter is not None:
                draw(parameter, 1 / (3 * self.fan_in), generator)

    @torch.no_grad()
    def begin(self, init: Init, generator: torch.Generator, size: float, made: Sequence[Made]) -> None:
        """Draw as a head: so that what it makes begins as wanted; or by a rule `ALONE`. Births come on top of either.

        Args:
            init: see `init.py`.
            generator: what is drawn is drawn from it.
            size: the mean of |x|^2 over what the head is given.
            made: in the order of the outputs.
        """
        if init in ALONE:
            self.draw_alone(init, generator)
        else:
            self.draw(torch.cat([torch.full((one.count,), one.variance / size) for one in made]), generator)
        if any(one.birth for one in made):
            # Added, as "plain" draws biases: those of what is born at 0 stay as they were drawn.
            self.bias.add_(torch.cat([torch.full((one.count,), one.birth) for one in made]).to(self.bias))


class Body(nn.Module):
    """The hidden layers of a generator, and the input of its heads where there are none.

    Parameters: the sum over hidden layers of width * (fan-in + 1), the first fan-in being size + beside.

    Args:
        size: of a task's embedding, as far as it goes through here.
        beside: of the embedding of a chunk or layer; 0 for none.
        hidden: widths.
        activation: a key of `ACTIVATIONS`.

    Raises:
        ValueError: a width that is not positive, or an unknown activation.
    """

    def __init__(self, size: int, beside: int, hidden: Sequence[int], activation: str) -> None:
        super().__init__()
        for width in hidden:
            require_positive("a hidden width", width)
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}. Known: {', '.join(sorted(ACTIVATIONS))}")
        self.size, self.beside, self.hidden, self.activation = size, beside, tuple(hidden), activation
        widths = [(size, beside, hidden[0])] if hidden else []
        widths += [(fan_in, 0, width) for fan_in, width in pairwise(hidden)]
        self.layers = nn.ModuleList(Joint(*width) for width in widths)

    def forward(self, x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what a head takes: (hidden (..., K, h), None), or (x, c) as they are where nothing is hidden."""
        if not len(self.layers):
            return x, c
        act = ACTIVATIONS[self.activation]
        x = act(self.layers[0](x, c))
        for layer in list(self.layers)[1:]:
            x = act(layer(x))
        return x, None

    def head(self, out: int) -> Joint:
        """Return a new head for this body, not drawn yet."""
        return Joint(self.hidden[-1], 0, out) if self.hidden else Joint(self.size, self.beside, out)

    def begin(
        self, init: Init, generator: torch.Generator, beside: Tensor | None = None, std: float = 1.0
    ) -> float:
        """Draw the layers; return the size of what heads are given, which those by a rule `ALONE` do not ask for: 1."""
        self.draw(init, generator)
        return 1.0 if init in ALONE else self.size_of_output(beside, generator, std)

    @torch.no_grad()
    def draw(self, init: Init, generator: torch.Generator) -> None:
        """Draw the layers: by He's rule, variance 2 / fan-in and biases 0, or by a rule `ALONE`."""
        for layer in self.layers:
            assert isinstance(layer, Joint)
            if init in ALONE:
                layer.draw_alone(init, generator)
            else:
                layer.draw(2 / layer.fan_in, generator)

    @torch.no_grad()
    def size_of_output(self, beside: Tensor | None, generator: torch.Generator, std: float = 1.0) -> float:
        """Return the mean of |x|^2 over what a head is given, for standard normal embeddings of tasks.

        Args:
            beside: embeddings of chunks (C, c), of which some are asked; None for normal ones.
            generator: draws them.
            std: deviation of the chunks' embeddings.
        """
        if not self.hidden or self.layers[0].weight.is_meta:
            return float(self.hidden[-1] if self.hidden else self.size + self.beside * std**2)
        like, total = cast(Tensor, self.layers[0].weight), 0.0
        for i in range(_SAMPLES):
            x = torch.randn(self.size, device="cpu", generator=generator).to(like)
            c = None
            if self.beside:
                drawn = torch.randn(1, self.beside, device="cpu", generator=generator).mul_(std).to(like)
                c = drawn if beside is None else beside[i % len(beside)].view(1, -1)
            total += float(self(x, c)[0].square().sum())
        return max(total / _SAMPLES, 1e-12)

    @staticmethod
    def count(size: int, hidden: Sequence[int]) -> int:
        """Return the parameters of a body whose first layer has so many inputs."""
        return sum(width * (fan_in + 1) for fan_in, width in pairwise([size, *hidden]))


class Full(Generator):
    """One net, from the embedding to all P weights.

    Parameters: those of the body, and P (h + 1). For an MLP 784-100-100 (P = 88,600), E = 8 and one hidden layer of
    10: 10 * 9 + 88,600 * 11 = 974,690.

    Args:
        target: what is generated.
        embedding_size: E.
        hidden: widths of the hidden layers; () for a linear map.
        activation: a key of `ACTIVATIONS`.
        init: see `init.py`.
        seed: of what is drawn.

    Raises:
        ValueError: a size that is not positive, an unknown activation or rule.
    """

    def __init__(
        self,
        target: Target,
        embedding_size: int,
        hidden: Sequence[int] = (),
        activation: str = "relu",
        init: Init = "torch",
        seed: int = 0,
    ) -> None:
        super().__init__(target, embedding_size)
        require_init(init)
        self.body = Body(embedding_size, 0, hidden, activation)
        self.head = self.body.head(target.size)
        generator = torch.Generator().manual_seed(seed)
        made = [Made(layer.size, variance(layer, init), layer.birth) for layer in target.layers]
        self.head.begin(init, generator, self.body.begin(init, generator), made)

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the weights (..., P)."""
        x, _ = self.body(embedding, None)
        weights: Tensor = self.head(x)
        return weights

    @staticmethod
    def count(target: Target, tasks: int, embedding_size: int, hidden: Sequence[int] = ()) -> int:
        """Return what `parameters_with(tasks)` of such a generator is."""
        width = hidden[-1] if hidden else embedding_size
        return Body.count(embedding_size, hidden) + target.size * (width + 1) + tasks * embedding_size


class Chunked(Generator):
    """One small net for every chunk of n weights, told apart by an embedding of each of the C = ceil(P / n) chunks.

    The weights in the order of `Target` are cut into chunks wherever they may fall; the last is generated whole, and
    what stands over is cut off. All chunks are made in one batched pass.

    Chunks' embeddings are shared by all tasks, as in von Oswald et al. 2020, or a task has its own set of them, as in
    Henning et al. 2021: then they are part of the task's embedding, E + C c numbers, the task's E in front.

    Parameters: those of the body with E + c inputs, n (h + 1) for the head, C c for the chunks. The ResNet-32 of von
    Oswald et al. with its six heads has P = 468,540; with n = 7,000 there are 67 chunks; without a hidden layer and
    with E = c = 32 that is 7,000 * 65 + 67 * 32 = 457,144, and six tasks' embeddings, 192, make it 457,336.

    Args:
        target: what is generated.
        embedding_size: E, without the chunks' embeddings. The attribute of this name counts what a task has for itself.
        chunk: n.
        chunk_embedding_size: c.
        hidden: widths of the hidden layers; () for a linear map.
        activation: a key of `ACTIVATIONS`.
        task_conditioned: whether a task has its own embeddings of the chunks.
        init: see `init.py`.
        seed: of what is drawn.
        chunk_embedding_std: deviation of the chunks' embeddings at birth; those of tasks have 1.

    Raises:
        ValueError: a size or deviation that is not positive, a chunk larger than the target, an unknown activation or
            rule.
    """

    chunks: int
    """C."""
    chunk_embeddings: nn.Parameter | None
    """(C, c), where tasks share them."""

    def __init__(
        self,
        target: Target,
        embedding_size: int,
        chunk: int,
        chunk_embedding_size: int,
        hidden: Sequence[int] = (),
        activation: str = "relu",
        task_conditioned: bool = False,
        init: Init = "torch",
        seed: int = 0,
        chunk_embedding_std: float = 1.0,
    ) -> None:
        require_positive("chunk", chunk)
        require_positive("chunk_embedding_size", chunk_embedding_size)
        require_positive("embedding_size", embedding_size)
        if chunk > target.size:
            raise ValueError(f"a chunk of {chunk} is larger than the target's {target.size} weights: it can be as many")
        if not 0 < chunk_embedding_std < float("inf"):
            raise ValueError(f"chunk_embedding_std is {chunk_embedding_std}: above 0")
        require_init(init)
        self_chunks = -(-target.size // chunk)
        own = self_chunks * chunk_embedding_size if task_conditioned else 0
        super().__init__(target, embedding_size + own)
        self.chunks, self.chunk_size, self._task_size = self_chunks, chunk, embedding_size
        self._std = chunk_embedding_std
        self.body = Body(embedding_size, chunk_embedding_size, hidden, activation)
        self.head = self.body.head(chunk)
        self.chunk_embeddings = None
        if not task_conditioned:
            self.chunk_embeddings = nn.Parameter(torch.empty(self.chunks, chunk_embedding_size))
        self._gains = gains(target, init)
        self._births = [layer.birth for layer in target.layers]
        self._scaling = Scaling([layer.size for layer in target.layers], self._gains, self._births)
        generator = torch.Generator().manual_seed(seed)
        if self.chunk_embeddings is not None:
            draw_normal(self.chunk_embeddings, generator, self._std)
        size = self.body.begin(init, generator, self.chunk_embeddings, self._std)
        self.head.begin(init, generator, size, [Made(chunk, mean_variance(target, init), 0.0)])

    def new_embedding(self, generator: torch.Generator) -> Tensor:
        """Return what a task is born with, embeddings of the chunks included where it has its own."""
        born = super().new_embedding(generator)
        born[self._task_size :] *= self._std
        return born

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the weights (..., P)."""
        return self._scaling(self._raw(embedding, None).flatten(-2))

    def chunk(self, embedding: Tensor, numbers: Tensor) -> Tensor:
        """Return some chunks (K, n), the same numbers as in `forward`; 0 beyond the end of the last.

        Args:
            embedding: (E,).
            numbers: (K,) integers, counted from 0.
        """
        made = self._raw(embedding, numbers)
        places = numbers[:, None] * self.chunk_size + torch.arange(self.chunk_size, device=numbers.device)
        ends = torch.tensor([layer.size for layer in self.target.layers], device=numbers.device).cumsum(0)
        tensor = torch.bucketize(places, ends, right=True)  # the number of the tensor; one too many beyond the end
        if any(gain != 1 for gain in self._gains) or self.target.size % self.chunk_size:
            made = made * made.new_tensor([*self._gains, 0.0])[tensor]
        if any(self._births):
            made = made + made.new_tensor([*self._births, 0.0])[tensor]
        return made

    def _raw(self, embedding: Tensor, numbers: Tensor | None) -> Tensor:
        """Return chunks (..., K, n) as the head makes them; all of them for None."""
        if self.chunk_embeddings is None:
            task, chunks = self.split_embedding(embedding)
        else:
            task, chunks = embedding, cast(Tensor, self.chunk_embeddings)
        if numbers is not None:
            chunks = chunks.index_select(-2, numbers)
        made: Tensor = self.head(*self.body(task, chunks))
        return made

    def split_embedding(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parts of an embedding that has chunks' embeddings of its own: (..., E) and (..., C, c)."""
        task, chunks = torch.split(embedding, [self._task_size, self.embedding_size - self._task_size], -1)
        return task, chunks.view(*chunks.shape[:-1], self.chunks, -1)

    @staticmethod
    def count(
        target: Target,
        tasks: int,
        embedding_size: int,
        chunk: int,
        chunk_embedding_size: int,
        hidden: Sequence[int] = (),
        task_conditioned: bool = False,
    ) -> int:
        """Return what `parameters_with(tasks)` of such a generator is."""
        size = embedding_size + chunk_embedding_size
        sets = tasks if task_conditioned else 1
        embeddings = tasks * embedding_size + sets * -(-target.size // chunk) * chunk_embedding_size
        return Body.count(size, hidden) + chunk * ((hidden[-1] if hidden else size) + 1) + embeddings


def require_positive(name: str, value: int) -> None:
    """Refuse a size below 1.

    Raises:
        ValueError: it is.
    """
    if value < 1:
        raise ValueError(f"{name} is {value}: at least 1")
