"""Task-conditioned hypernetworks (HNET): one generator makes all weights of every task's net, from a task embedding.

Paper      von Oswald, Henning, Grewe & Sacramento 2020, "Continual learning with hypernetworks", ICLR,
           arXiv:1906.00695. Without the look-ahead it is PR-Dirac of Henning et al. 2021, "Posterior meta-replay for
           continual learning", NeurIPS, arXiv:2103.01133.
Checked    against the code of both, chrhenning/hypercl and chrhenning/posterior_replay_cl (Apache-2.0; read for facts),
           and against brute force (tests/test_hypernet.py, tests/test_hypernet_regulariser.py).
Method     Theta_t = h(e_t, Theta), all weights of task t's trunk, h chunked: one small net makes chunk k from e_t and
           an embedding c_k of the chunk, all tasks' or the task's own (`task_conditioned`); or one net with an output
           per weight (`kind = "full"`). Task T trains e_T, its head and Theta on
               L_T(h(e_T, Theta))  +  beta / (T - 1)  sum_{t < T}  || h(e_t, Theta*) - h(e_t, Theta + dTheta) ||^2
           Theta* before task T, dTheta the optimiser's step on L_T alone, a constant, or 0 (`look_ahead = false`).
As the     L is the mean cross-entropy in hypercl, and the *sum over the task's training samples* in
code       posterior_replay_cl: its beta of 250 and its clipping at 1 are relative to that sum (`loss = "total"`), so
           that for 60,000 samples beta is 250 / 60,000 = 0.0042 beside a mean. There the penalty also trains the
           earlier tasks' embeddings (`train_embeddings`). Generators are drawn by Glorot's rule, embeddings with
           deviation 1, those of chunks in posterior_replay_cl with 0.1. An optimiser per task.
ENT        where the task is not named, it is that of the answer with the lowest entropy (strategies/evaluation.py), as
           a share of log C where tasks have unequal numbers C of classes.
Departs    Heads are a task's own and trained, not generated: hypercl and posterior_replay_cl generate the outputs of
           all tasks with every task's weights, and hold only its own. Embeddings of the task in training take no part
           in the look-ahead. The loss that is checked for NaN is the cross-entropy alone.
           Not here: replay (HNET+R) and a net that infers the task (HNET+TIR), which train generative models.
A task     seen again trains its own embedding and head further; the penalty holds all other tasks.
again
Stores     the generator; per task E numbers (and the chunks' embeddings, where they are its own), a head, and what of
           normalisation is its own. While a task trains with a penalty: the other tasks' weights, or a copy of the
           generator (`targets`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from clbench.errors import UserError
from clbench.strategies.base import Setup
from clbench.strategies.generating import Generating


class Hypernet(Generating):
    """A full or chunked hypernetwork on any net."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Generating.Config):
        """Settings of HNET."""

        kind: Literal["chunked", "full"] = "chunked"
        """One small net for every chunk of the weights, or one net with an output per weight."""
        chunk: Annotated[int, Field(gt=0)] = 1000
        """Weights in a chunk. This and what follows: of a chunked generator."""
        chunk_embedding: Annotated[int, Field(gt=0)] = 32
        """Numbers in a chunk's embedding."""
        chunk_embedding_std: Annotated[float, Field(gt=0)] = 1.0
        """Their deviation at birth."""
        task_conditioned: bool = False
        """Whether every task has its own embeddings of the chunks."""
        chunks_asked: Annotated[float, Field(gt=0, le=1)] = 1.0
        """Share of its chunks, drawn at random, that the regulariser asks a task for in a step."""

    def __init__(self, *, setup: Setup, config: Config) -> None:
        if config.kind == "full" and config.chunks_asked < 1:
            raise UserError(
                f"strategy Hypernet: chunks_asked is {config.chunks_asked:g}, and a full generator has no chunks; set "
                "kind = 'chunked', or asked"
            )
        self.kind = config.kind
        super().__init__(setup=setup, config=config)

    def given_sizes(self, config: Config) -> dict[str, Any]:
        """Return the sizes of the generator as they are set."""
        sizes = super().given_sizes(config)
        if config.kind == "chunked":
            sizes |= {"chunk": config.chunk, "chunk_embedding_size": config.chunk_embedding}
            sizes |= self.fixed_sizes(config)
        return sizes

    def fixed_sizes(self, config: Config) -> dict[str, Any]:
        """Return whose the chunks' embeddings are: a compression leaves it as it is set."""
        return {"task_conditioned": config.task_conditioned} if config.kind == "chunked" else {}

    def other_arguments(self, config: Config) -> dict[str, Any]:
        """Return the generator's arguments that are no sizes."""
        others = super().other_arguments(config)
        return others | ({"chunk_embedding_std": config.chunk_embedding_std} if config.kind == "chunked" else {})

    def chunks_asked(self) -> float | None:
        """Return the share of its chunks that a task is asked for; None for its whole output."""
        return self.config.chunks_asked if self.config.chunks_asked < 1 else None
