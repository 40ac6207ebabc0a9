"""Generators that know the target's layers: `Structured`, by layer, and `LowRank`, changes of weights all tasks share.

See `generators.py` for the others, and for the letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from clbench.nets.hypernet.generators import Body, Generator, Joint, Made, require_positive
from clbench.nets.hypernet.init import Init, draw, draw_normal, require_init, variance
from clbench.nets.hypernet.target import Layer, Target


@dataclass(frozen=True)
class Piece:
    """The tensors of one layer of the target, cut into pieces of whole units: rows, filters with their biases."""

    tensors: tuple[Layer, ...]
    """All with the same first dimension, the units."""
    units: int
    """Units of a piece; the last piece may be cut."""

    @property
    def total(self) -> int:
        """Units of the layer."""
        return self.tensors[0].shape[0] if self.tensors[0].shape else 1

    @property
    def rows(self) -> list[int]:
        """Elements that a unit has in each tensor."""
        return [tensor.size // self.total for tensor in self.tensors]

    @property
    def count(self) -> int:
        """Pieces."""
        return -(-self.total // self.units)

    @property
    def size(self) -> int:
        """Elements of a piece."""
        return self.units * sum(self.rows)

    @property
    def key(self) -> tuple[object, ...]:
        """What layers have in common that share a head."""
        pairs = zip(self.tensors, self.rows, strict=True)
        return (self.units, *((tensor.kind, tensor.birth, tensor.fan_in, row) for tensor, row in pairs))


def pieces(target: Target, piece: int | None) -> list[Piece]:
    """Return a target's layers, in pieces of at most so many elements, or of one unit where a unit has more.

    Pieces of a layer are as equal as can be. Tensors of one module are a layer if they have as many units each.
    """
    owners: dict[tuple[str, int], list[Layer]] = {}
    for tensor in target.layers:
        owners.setdefault((tensor.owner, tensor.shape[0] if tensor.shape else 1), []).append(tensor)
    found = []
    for (_, total), tensors in owners.items():
        row = sum(tensor.size for tensor in tensors) // total
        most = total if piece is None else min(total, max(1, piece // row))
        found.append(Piece(tuple(tensors), -(-total // -(-total // most))))
    return found


class Structured(Generator):
    """By layer: a body, a head for all layers of equal shape, and an embedding for every layer.

    Layers that are larger than `piece` are cut into pieces of whole units, each with an embedding of its own and all
    with one head: for a target whose layers differ, as in an MLP, that is what makes the generator smaller than the
    target. A head never sees two layers of different fan-in, so that weights begin as wanted, whatever is cut where.

    Parameters: those of the body with E + c inputs, c for each piece, and for each group of pieces of equal shape
    (elements of a piece) * (h + 1). For an MLP 784-100-100 in pieces of at most 8,000: 100 units of 785 are ten pieces
    of 10 units, 7,850 elements; 100 units of 101 are two pieces of 50, 5,050. With E = c = 8 and one hidden layer of
    5: 5 * 17 + 12 * 8 + 12,900 * 6 = 77,581.

    Args:
        target: what is generated.
        embedding_size: E.
        hidden: widths of the hidden layers; () for linear maps.
        piece: the most elements of a piece; None for whole layers.
        piece_embedding_size: c.
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
        piece: int | None = None,
        piece_embedding_size: int = 8,
        activation: str = "relu",
        init: Init = "torch",
        seed: int = 0,
    ) -> None:
        super().__init__(target, embedding_size)
        require_init(init)
        require_positive("piece", 1 if piece is None else piece)
        require_positive("piece_embedding_size", piece_embedding_size)
        groups: dict[object, list[Piece]] = {}
        for layer in pieces(target, piece):
            groups.setdefault(layer.key, []).append(layer)
        self.groups = list(groups.values())
        """Per head, the layers that it makes."""
        self._counts = [sum(layer.count for layer in group) for group in self.groups]
        self.body = Body(embedding_size, piece_embedding_size, hidden, activation)
        self.heads = nn.ModuleList(self.body.head(group[0].size) for group in self.groups)
        self.piece_embeddings = nn.Parameter(torch.empty(sum(self._counts), piece_embedding_size))
        """(all pieces, c): group by group, layer by layer."""
        generator = torch.Generator().manual_seed(seed)
        draw_normal(self.piece_embeddings, generator)
        self.body.draw(init, generator)
        # By a rule `ALONE`, too: it draws numbers, and the heads are drawn with those after them.
        size = self.body.size_of_output(self.piece_embeddings, generator)
        for head, (layer, *_) in zip(self.heads, self.groups, strict=True):
            assert isinstance(head, Joint)
            rows = zip(layer.tensors, layer.rows, strict=True)
            made = [Made(layer.units * row, variance(tensor, init), tensor.birth) for tensor, row in rows]
            head.begin(init, generator, size, made)

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the weights (..., P)."""
        x, c = self.body(embedding, self.piece_embeddings)
        inputs = (c if c is not None else x).split(self._counts, -2)
        tensors: dict[str, Tensor] = {}
        for head, group, rows in zip(self.heads, self.groups, inputs, strict=True):
            made = head(rows) if c is None else head(x, rows)  # (..., pieces of the group, elements of a piece)
            for layer, part in zip(group, made.split([layer.count for layer in group], -2), strict=True):
                columns = part.split([layer.units * row for row in layer.rows], -1)
                for tensor, values in zip(layer.tensors, columns, strict=True):
                    tensors[tensor.name] = values.flatten(-2)[..., : tensor.size]
        return torch.cat([tensors[name] for name in self.target.names], -1)

    @staticmethod
    def count(
        target: Target,
        tasks: int,
        embedding_size: int,
        hidden: Sequence[int] = (),
        piece: int | None = None,
        piece_embedding_size: int = 8,
    ) -> int:
        """Return what `parameters_with(tasks)` of such a generator is."""
        layers, size = pieces(target, piece), embedding_size + piece_embedding_size
        heads = sum({layer.key: layer.size for layer in layers}.values())
        embeddings = tasks * embedding_size + sum(layer.count for layer in layers) * piece_embedding_size
        return Body.count(size, hidden) + heads * ((hidden[-1] if hidden else size) + 1) + embeddings


class LowRank(Generator):
    """Weights W that tasks share, trained as ever, plus a product of two thin factors per task: W_t = W + A_t B_t.

    A weight (o, i, k, k) is taken as a matrix (o, i k k); A is (o, r), B (r, i k k), r the rank, or the smaller side of
    a matrix that is smaller. Biases and normalisation are generated whole. One net makes all of it from the embedding.

    Parameters: W's elements; those of the body; and M (h + 1), M being r (o + i k k) per matrix and what is generated
    whole. For an MLP 784-100-100, r = 2, E = 8 and one hidden layer of 10: W has 88,400, M is 2 * 884 + 2 * 200 + 200 =
    2,368: 88,400 + 10 * 9 + 2,368 * 11 = 114,538.

    Args:
        target: what is generated.
        embedding_size: E.
        rank: r.
        hidden: widths of the hidden layers; () for a linear map.
        activation: a key of `ACTIVATIONS`.
        init: see `init.py`; A's rows are 0 at birth but by a rule `ALONE`, so that W_t is W.
        seed: of what is drawn.

    Raises:
        ValueError: a size that is not positive, a rank above that of any matrix, no matrix, an unknown activation or
            rule.
    """

    def __init__(
        self,
        target: Target,
        embedding_size: int,
        rank: int,
        hidden: Sequence[int] = (),
        activation: str = "relu",
        init: Init = "torch",
        seed: int = 0,
    ) -> None:
        super().__init__(target, embedding_size)
        require_init(init)
        require_positive("rank", rank)
        self.matrices = [layer for layer in target.layers if layer.kind == "weight"]
        if not self.matrices:
            raise ValueError("nothing to share between tasks: no tensor of the target has a fan-in")
        if rank > (most := max(min(sides(layer)) for layer in self.matrices)):
            raise ValueError(f"rank {rank} is more than any matrix of the target has: at most {most}")
        self.rank = rank
        generator = torch.Generator().manual_seed(seed)
        self.shared = nn.ParameterList(nn.Parameter(torch.empty(layer.shape)) for layer in self.matrices)
        """W, in the order of `matrices`."""
        for layer, weight in zip(self.matrices, self.shared, strict=True):
            draw(weight, variance(layer, init), generator)
        made = factors(target, rank, init)
        self._sizes = [one.count for one in made]
        self.body = Body(embedding_size, 0, hidden, activation)
        self.head = self.body.head(sum(self._sizes))
        self.head.begin(init, generator, self.body.begin(init, generator), made)

    def forward(self, embedding: Tensor) -> Tensor:
        """Return the weights (..., P)."""
        x, _ = self.body(embedding, None)
        made = iter(self.head(x).split(self._sizes, -1))
        shared, flat = iter(self.shared), []
        for layer in self.target.layers:
            if layer.kind == "weight":
                n_out, n_in = sides(layer)
                a, b = next(made).unflatten(-1, (n_out, -1)), next(made).unflatten(-1, (-1, n_in))
                whole = cast(Tensor, next(shared)).view(n_out, n_in)
                changed = torch.addmm(whole, a, b) if embedding.ndim == 1 else torch.baddbmm(whole, a, b)
                flat.append(changed.flatten(-2))
            else:
                flat.append(next(made))
        return torch.cat(flat, -1)

    @staticmethod
    def count(target: Target, tasks: int, embedding_size: int, rank: int, hidden: Sequence[int] = ()) -> int:
        """Return what `parameters_with(tasks)` of such a generator is."""
        shared = sum(layer.size for layer in target.layers if layer.kind == "weight")
        outputs = sum(one.count for one in factors(target, rank))
        made = outputs * ((hidden[-1] if hidden else embedding_size) + 1)
        return shared + Body.count(embedding_size, hidden) + made + tasks * embedding_size


def sides(layer: Layer) -> tuple[int, int]:
    """Return a weight's shape as a matrix: outputs, and all the rest."""
    return layer.shape[0], layer.size // layer.shape[0]


def factors(target: Target, rank: int, init: Init = "torch") -> list[Made]:
    """Return what is generated, in the order of the target: A and B of a matrix, or a whole tensor."""
    found = []
    for layer in target.layers:
        if layer.kind == "weight":
            n_out, n_in = sides(layer)
            least = min(rank, n_out, n_in)
            found += [Made(n_out * least, 0.0, 0.0), Made(least * n_in, variance(layer, init), 0.0)]
        else:
            found.append(Made(layer.size, variance(layer, init), layer.birth))
    return found
