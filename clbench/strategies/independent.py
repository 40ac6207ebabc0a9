"""One network per task: no sharing, no forgetting, a full network's parameters for every task.

Paper      none; "STL" (single-task learning), "separate networks" or "independent" elsewhere. Lopez-Paz & Ranzato 2017
           let a net begin as the one trained last, of another task (`begins`).
Departs    nothing. In the domain-incremental scenario it is told the task it answers for, which the scenario forbids
           to others: an oracle, as in Lopez-Paz & Ranzato 2017.
Stores     T networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from avalanche.benchmarks.scenarios import DatasetExperience
from torch import Tensor, nn

from clbench.footprint import Holdings
from clbench.loading import task_index
from clbench.sharing import Use
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy, new_optimizer
from clbench.strategies.evaluation import Evaluation


class Independent(Strategy):
    """A freshly initialised net for every task; a task seen again goes on with its own."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of independent nets."""

        begins: Literal["fresh", "previous"] = "fresh"
        """previous: a new net begins as the one trained last; a head of its own begins fresh all the same."""

    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"task", "domain"})
    stores: ClassVar[tuple[str, ...]] = ("nets", "current")
    answers_with: ClassVar[frozenset[str]] = frozenset({"nets"})

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.nets: dict[int, nn.Module] = {}
        """Task to net."""
        self.current = -1
        """Task whose net is `model`; -1 before the first."""
        self._newborn: nn.Module | None = None
        """What answers for a task not learned yet; made when asked, kept for one evaluation."""

    def begin_task(self, experience: DatasetExperience) -> None:
        """Turn to the task's own net."""
        last, self.current = self.nets.get(self.current), task_index(experience)
        if self.current not in self.nets:
            net = self.setup.new_net().to(self.device)
            if last is not None and self.config.begins == "previous":
                common = net.state_dict().keys() & last.state_dict().keys()
                net.load_state_dict({name: last.state_dict()[name] for name in common}, strict=False)
            self.nets[self.current] = net
        self.model = self.nets[self.current]
        self.optimizer = new_optimizer(self.setup.train, self.model.parameters())
        super().begin_task(experience)

    def answer(self, x: Tensor, t: int | Tensor) -> Tensor:
        """Answer with the task's own net, or a fresh one for a task not learned yet."""
        assert self.oracle is not None
        net = self.nets.get(self.oracle)
        if net is None:
            if self._newborn is None:
                self._newborn = self.setup.new_net().to(self.device)
            net = self._newborn
        net.eval()
        logits: Tensor = net(x, t)
        return logits

    def evaluate(self, experience: DatasetExperience, auroc: bool = False) -> Evaluation:
        """Evaluate the task's own net, or one that is thrown away again."""
        found = super().evaluate(experience, auroc)
        self._newborn = None
        return found

    def holdings(self) -> Holdings:
        """Every net belongs to one task."""
        return replace(
            super().holdings(),
            model=nn.ModuleList(self.nets.values()),
            auxiliary={},
            answers_with=frozenset(),
            task_parameters={task: list(net.parameters()) for task, net in self.nets.items()},
        )

    def uses(self) -> dict[int, list[Use]]:
        """Return each task's own net."""
        return {task: [Use(held) for held in (*net.parameters(), *net.buffers())] for task, net in self.nets.items()}

    def load_state_dict(self, state: Mapping[str, Any], past: Sequence[DatasetExperience] = ()) -> None:
        """Take up every net; the one last trained, whose parameters the optimiser has, is among them."""
        super().load_state_dict(state, past)
        if self.current in self.nets:
            self.nets[self.current] = self.model
