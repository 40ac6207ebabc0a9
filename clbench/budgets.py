"""Budgets at which methods are compared: names, as the metrics have them, and what of a method's costs each is.

answer_bytes         all that is needed to answer for the tasks seen: weights, masks, embeddings. For who deploys.
keep_learning_bytes  all that is needed to go on learning: the same with replay, importances, an optimiser that lasts.
                     For who compares learners; what surveys call model and exemplars.
parameters           weights the model stores, whatever else is kept.
answer_flops         operations of one answer to one sample of the last task, after it, alone in its batch. For who
                     deploys where time or energy is short.
step_flops           operations of one training step of the last task, replay and teachers included, of the kind that
                     there are most of. For who compares learners at equal work; `clbench.flops` says what is counted.

All are after the last task. A budget of another kind is one entry more here; who looks for sizes and who compares need
not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from clbench.record_parts import Flops
from clbench.records import Footprint, RunRecord


@dataclass(frozen=True)
class Costs:
    """What a method costs after the last task."""

    kept: Footprint
    work: Flops | None
    """None where operations were not counted."""

    @staticmethod
    def of(record: RunRecord) -> Costs:
        """Return those of a finished run."""
        return Costs(record.footprints[-1], record.flops[-1] if record.flops else None)


BUDGETS: dict[str, Callable[[Costs], int | None]] = {
    "keep_learning_bytes": lambda costs: costs.kept.keep_learning_bytes,
    "answer_bytes": lambda costs: costs.kept.answer_bytes,
    "parameters": lambda costs: costs.kept.parameters,
    "answer_flops": lambda costs: None if costs.work is None else costs.work.answer,
    "step_flops": lambda costs: None if costs.work is None else costs.work.step,
}
"""By name; the first is taken unless another is asked for. None: unknown, as nothing was counted."""

WORK = frozenset({"answer_flops", "step_flops"})
"""Those of them that may fall where a size grows: what it takes to generate weights goes by how they are cut up."""

DEFAULT = next(iter(BUDGETS))
TOLERANCE = 0.02
"""Budgets that are no further apart, as a share of the one that is matched, are equal."""
