"""Low-rank hypernetwork: weights that tasks share, and a generator of a thin change of them for every task.

Paper      none of exactly this: ours. Task embeddings and the output regulariser: von Oswald, Henning, Grewe &
           Sacramento 2020, "Continual learning with hypernetworks", ICLR, arXiv:1906.00695. Changes of low rank: Hu et
           al. 2022, "LoRA: low-rank adaptation of large language models", ICLR, arXiv:2106.09685.
Checked    against derivations by hand and brute force (tests/test_hypernet.py, tests/test_hypernet_generators.py).
Method     each matrix of task t is  W_t = W + A_t B_t,  A_t (out, rank) and B_t (rank, in) made with the biases from
           e_t by one generator; W is trained as ever, by all tasks. At birth A_t = 0, so that the first step is that of
           a plain net. The regulariser holds W_t, that is the shared W and the factors together: what a task may change
           of W is what leaves the sum where it was for every other task.
Beside     `batch_ensemble` and `linked`, whose factors every task stores: here a task stores E numbers.
Size       W is all of the target's matrices, so that a compression is always above 1.
Departs    from von Oswald et al.: as `hypernet` does, and in that the shared weights are not made.
A task     seen again trains its own embedding and head further; the penalty holds all other tasks.
again
Stores     as `hypernet`; the shared weights are part of the generator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from clbench.strategies.generating import Generating


class LowRankHypernet(Generating):
    """Generated changes of low rank over shared weights, on any net."""

    kind = "lowrank"

    @dataclass(frozen=True, kw_only=True)
    class Config(Generating.Config):
        """Settings of low-rank hypernetworks."""

        rank: Annotated[int, Field(gt=0)] = 2
        """Of a task's change of a matrix; that of the matrix, where it is smaller."""

    def given_sizes(self, config: Config) -> dict[str, Any]:
        """Return the sizes of the generator as they are set."""
        return super().given_sizes(config) | {"rank": config.rank}
