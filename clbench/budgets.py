"""Budgets at which methods are compared: names, as the metrics have them, and what of a footprint each is.

answer_bytes         all that is needed to answer for the tasks seen: weights, masks, embeddings. For who deploys.
keep_learning_bytes  all that is needed to go on learning: the same with replay, importances, an optimiser that lasts.
                     For who compares learners; what surveys call model and exemplars.
parameters           weights the model stores, whatever else is kept.

A budget of another kind (work) is one entry more here, with what it is of; who looks for sizes and who compares need
not change.
"""

from __future__ import annotations

from collections.abc import Callable

from clbench.records import Footprint

BUDGETS: dict[str, Callable[[Footprint], int]] = {
    "keep_learning_bytes": lambda found: found.keep_learning_bytes,
    "answer_bytes": lambda found: found.answer_bytes,
    "parameters": lambda found: found.parameters,
}
"""By name; the first is taken unless another is asked for."""

DEFAULT = next(iter(BUDGETS))
TOLERANCE = 0.02
"""Budgets that are no further apart, as a share of the one that is matched, are equal."""
