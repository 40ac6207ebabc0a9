"""One network per task: no sharing, no forgetting, a full network's parameters for every task.

Paper      none; "STL" (single-task learning), "separate networks" or "independent" elsewhere.
Departs    nothing. In the domain-incremental scenario it is told the task it answers for, which the scenario forbids
           to others: an oracle, as in Lopez-Paz & Ranzato 2017.
Stores     T networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from avalanche.benchmarks.scenarios import DatasetExperience
from torch import Tensor, nn

from clbench.footprint import Holdings
from clbench.loading import task_index
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy, new_optimizer


class Independent(Strategy):
    """A freshly initialised net for every task; a task seen again goes on with its own."""

    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"task", "domain"})
    stores: ClassVar[tuple[str, ...]] = ("nets",)
    answers_with: ClassVar[frozenset[str]] = frozenset({"nets"})

    def __init__(self, *, setup: Setup, config: Any) -> None:
        super().__init__(setup=setup, config=config)
        self.nets: dict[int, nn.Module] = {}
        """Task to net."""

    def begin_task(self, experience: DatasetExperience) -> None:
        """Turn to the task's own net."""
        task = task_index(experience)
        if task not in self.nets:
            self.nets[task] = self.setup.new_net().to(self.device)
        self.model = self.nets[task]
        self.optimizer = new_optimizer(self.setup.train, self.model.parameters())
        super().begin_task(experience)

    def answer(self, x: Tensor, t: int | Tensor) -> Tensor:
        """Answer with the task's own net, or a fresh one for a task not learned yet."""
        assert self.oracle is not None
        net = self.nets.get(self.oracle)
        if net is None:
            net = self.setup.new_net().to(self.device)
        net.eval()
        logits: Tensor = net(x, t)
        return logits

    def holdings(self) -> Holdings:
        """Every net belongs to one task."""
        return replace(
            super().holdings(),
            model=nn.ModuleList(self.nets.values()),
            auxiliary={},
            answers_with=frozenset(),
            task_parameters={task: list(net.parameters()) for task, net in self.nets.items()},
        )

    def load_state_dict(self, state: Mapping[str, Any], past: Sequence[DatasetExperience] = ()) -> None:
        """Take up every net; the current one is that of the last task."""
        super().load_state_dict(state, past)
        if past:
            self.model = self.nets[task_index(past[-1])]
            self.optimizer = new_optimizer(self.setup.train, self.model.parameters())
