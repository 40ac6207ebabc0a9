"""Multimodal: one net of which every task has an input layer of its own.

Paper      Lopez-Paz & Ranzato 2017, "Gradient episodic memory for continual learning", arXiv:1706.08840, section 4.3: a
           baseline of theirs for tasks that differ in what is seen.
Method     the first layer of the net, weights and bias, is the task's; all others are common and go on training. A new
           task's layer begins as the net's did at birth.
Departs    the authors draw every input layer anew. The optimiser is a fresh one for each task. In a domain-incremental
           stream it is told the task it answers for, which the scenario forbids to others.
Stores     the net once, and an input layer per task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

from avalanche.benchmarks.scenarios import DatasetExperience
from torch import nn

from clbench.errors import UserError
from clbench.footprint import Holdings
from clbench.loading import task_index
from clbench.nets import CHAINS, ChainTrunk
from clbench.sharing import Use, uses_by_owner
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy, new_optimizer
from clbench.strategies.evaluation import Evaluation


class Multimodal(Strategy):
    """An input layer per task in front of one net."""

    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"task", "domain"})
    model_kinds: ClassVar[frozenset[str] | None] = CHAINS
    stores: ClassVar[tuple[str, ...]] = ("inputs", "current")
    answers_with: ClassVar[frozenset[str]] = frozenset({"inputs"})

    def __init__(self, *, setup: Setup, config: Any) -> None:
        super().__init__(setup=setup, config=config)
        if not isinstance(self.model.trunk, ChainTrunk):
            raise UserError("an input layer per task needs a net whose layers follow one another")
        self.inputs: dict[int, nn.Module] = {}
        """Task to its input layer."""
        self.current = -1
        """Task whose input layer the net has; -1 before the first."""

    def blank_net(self) -> nn.Module:
        """Return an input layer as it is at birth."""
        return cast(ChainTrunk, self.setup.new_net().to(self.device).trunk).layer(0)

    def _plug_in(self, layer: nn.Module) -> None:
        self.model.trunk.set_submodule(self.model.trunk.chain[0], layer)

    def begin_task(self, experience: DatasetExperience) -> None:
        """Put the task's own input layer in front."""
        self.current = task_index(experience)
        if self.current not in self.inputs:
            self.inputs[self.current] = self.blank_net()
        self._plug_in(self.inputs[self.current])
        self.optimizer = new_optimizer(self.setup.train, self.model.parameters())
        super().begin_task(experience)

    def evaluate(self, experience: DatasetExperience, auroc: bool = False) -> Evaluation:
        """Evaluate with the task's own input layer, one as at birth for a task not learned yet."""
        asked = task_index(experience)
        self._plug_in(self.inputs[asked] if asked in self.inputs else self.blank_net())
        found = super().evaluate(experience, auroc)
        if self.current in self.inputs:
            self._plug_in(self.inputs[self.current])
        return found

    def _by_task(self) -> dict[int, list[nn.Parameter]]:
        """Return what serves one task alone: its input layer, and its head where it has one."""
        heads = self.model.task_parameters()
        return {task: [*layer.parameters(), *heads.get(task, [])] for task, layer in self.inputs.items()}

    def holdings(self) -> Holdings:
        """Every input layer belongs to one task."""
        whole, own = nn.ModuleList([self.model, *self.inputs.values()]), self._by_task()
        return replace(super().holdings(), model=whole, auxiliary={}, answers_with=frozenset(), task_parameters=own)

    def uses(self) -> dict[int, list[Use]]:
        """Return the common layers and the task's own."""
        return uses_by_owner(nn.ModuleList([self.model, *self.inputs.values()]), self._by_task(), self.tasks_seen)

    def load_state_dict(self, state: Mapping[str, Any], past: Sequence[DatasetExperience] = ()) -> None:
        """Take up every input layer; the one in front, which the optimiser has, is among them."""
        super().load_state_dict(state, past)
        if self.current in self.inputs:
            self.inputs[self.current] = self.model.trunk.layer(0)
