"""Cloned nets: a clone of the net for every task, some of whose tensors are common to all; which ones is a setting.

Paper      none for the frame: between fine-tuning and one net per task. Own norms and biases on a shared base are used
           by Bilen & Vedaldi 2017, "Universal representations", arXiv:1701.07275 (batch normalisation per domain).
           Adapters: low-rank as in Hu et al. 2022, "LoRA", arXiv:2106.09685; residual ones for shared filters are
           from Rebuffi et al. 2017 (in series) and 2018 (parallel), arXiv:1705.08045 and 1803.10082.
Checked    against the suite's own extremes, to the bit: share "all" is fine-tuning (with a frozen base, frozen
           features), share "none" is one net per task.
Method     task t has the trunk theta_t = (s, o_t) and a head; s is common, o_t its own. Training on t moves s, o_t and
           the head. base "frozen": s is trained with the first task and never again. With adapters, each later task's
           matrix is W + B_t A_t for every W in s, B_t (out, r) 0 when new, A_t (r, fan-in) uniform within
           1 / sqrt(fan-in), r = min(`adapter`, out, fan-in).
Departs    from LoRA: the base is learned on the first task, which has no adapter, and not on far more data; all common
           matrices are adapted, not a transformer's attention alone, and a convolution's kernels count as fan-in; B A
           has no factor alpha / r; with share "matrices" biases and norms are trained beside the adapters. base
           "trains" moves W under the adapters of earlier tasks. Weight decay acts on W, A and B, not on their sum.
           From Bilen & Vedaldi: their domains are learned at once, ours one after the other. From Rebuffi et al.: they
           adapt by 1x1 convolutions of full rank, on a base learned elsewhere.
A task     seen again goes on with its own clone. A frozen base stays frozen then, also for the first task, so that no
again      task's answers are ever changed by training on another.
Stores     nothing but the net: the common part, and per task what it has for itself: tensors, running statistics of
           norms whose weights are its own, adapters, head. Needed to answer, all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from clbench.errors import UserError, nearest
from clbench.nets.shared.clone import Begins, Share
from clbench.nets.shared.tasknet import matrices
from clbench.strategies.base import Setup
from clbench.strategies.cloning import Cloning


def early(trunk: nn.Module) -> list[str]:
    """Return the first half of a trunk's layers, rounded up: the parameters before the first matrix of the others."""
    names = [name for name, _ in trunk.named_parameters()]
    layers = list(matrices(trunk))
    last = ceil(len(layers) / 2)
    return names[: names.index(layers[last])] if last < len(layers) else names


RUNGS: dict[str, Callable[[nn.Module], Share]] = {
    "none": lambda trunk: "none",
    "early": early,
    "matrices": lambda trunk: list(matrices(trunk)),
    "all": lambda trunk: "all",
}
"""From the name of a rung of the ladder to what of a trunk is common there."""


class Cloned(Cloning):
    """A clone per task; `model` is a `ClonedNet`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of cloned nets."""

        share: str | list[str] = "matrices"
        """What is common to all tasks: "none"; "early", the first half of the layers; "matrices", everything with a
        fan-in, so that biases, norms and their statistics are a task's own; "all" but the heads; or names of the
        trunk's parameters and patterns of them, as in ["layers.*.bias"]."""
        base: Literal["trains", "frozen"] = "frozen"
        """Whether what is common learns with every task, or with the first alone."""
        adapter: Annotated[int, Field(ge=0)] = 0
        """Rank of what later tasks add to every common matrix; 0 for nothing."""
        begins: Begins = "born"
        """Where a new task's own tensors start: as the net was born, or where the last new task's are now."""

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config, begins=config.begins, rank=config.adapter)

    def share(self, trunk: nn.Module) -> Share:
        """Return which of the trunk's parameters are common."""
        told = self.config.share
        if not isinstance(told, str):
            return list(told)
        if told not in RUNGS:
            choice = f"It is {', '.join(RUNGS)}, or a list of parameters' names and patterns"
            raise UserError(f"strategy Cloned: setting 'share': no rung '{told}'.{nearest(told, RUNGS)} {choice}")
        return RUNGS[told](trunk)
