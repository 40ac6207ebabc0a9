"""A structured hypernetwork: it knows the target's layers, and makes each of them by a head of its own.

Paper      none of exactly this: ours. The learning is that of von Oswald, Henning, Grewe & Sacramento 2020, "Continual
           learning with hypernetworks", ICLR, arXiv:1906.00695; that a generator should follow the target's layers, and
           how weights begin: Chang, Flokas & Lipson 2020, "Principled weight initialization for hypernetworks", ICLR.
Checked    against derivations by hand and brute force (tests/test_hypernet.py, tests/test_hypernet_generators.py).
Method     layers are cut into pieces of whole units (rows, filters with their biases), of at most `piece` numbers.
           Piece i has an embedding p_i that all tasks share; one body and, for all pieces of equal shape, one head make
               weights of piece i of task t  =  head_k(body(e_t, p_i)),   k the shape of piece i
           Learned as in `hypernet`: a task trains e_t, its head for classes, the bodies and heads, and the output
           regulariser holds what they make for other tasks.
Beside     a chunked generator: no piece crosses two layers, so that each begins with its own variance and no factor is
           needed; a target of many equal layers (ResNet-32) takes one small head for all of them.
Departs    from von Oswald et al.: structure; and as `hypernet` does.
A task     seen again trains its own embedding and head further; the penalty holds all other tasks.
again
Stores     as `hypernet`; the pieces' embeddings are all tasks'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from clbench.strategies.generating import Generating


class StructuredHypernet(Generating):
    """A hypernetwork by layer on any net."""

    kind = "structured"

    @dataclass(frozen=True, kw_only=True)
    class Config(Generating.Config):
        """Settings of structured hypernetworks."""

        piece: Annotated[int, Field(ge=0)] = 0
        """Numbers in a piece of a layer at most, unless one unit has more. 0: layers are whole."""
        piece_embedding: Annotated[int, Field(gt=0)] = 8
        """Numbers in a piece's embedding."""

    def given_sizes(self, config: Config) -> dict[str, Any]:
        """Return the sizes of the generator as they are set."""
        sizes = super().given_sizes(config)
        return sizes | {"piece": config.piece or None, "piece_embedding_size": config.piece_embedding}
