"""The best accuracy that memory buys: the Pareto front of methods, and the area under it.

Letters: N methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

DEFINITION = (
    "The area under the front is the mean over budgets b, from the least to the most bytes of a continual learner here "
    "(on a log scale, every doubling weighing the same), of the best accuracy of a learner that takes at most b"
)
"""For captions."""


def pareto(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Return the names that no other point beats: none has at most the cost and at least the gain, and one better.

    Args:
        points: name -> (cost, gain).
    """

    def beaten(name: str) -> bool:
        cost, gain = points[name]
        return any(other[0] <= cost and other[1] >= gain and other != (cost, gain) for other in points.values())

    return {name for name in points if not beaten(name)}


def area_under_front(points: Sequence[tuple[float, float]]) -> float | None:
    """Return 1 / log(B / b0) times the integral from b0 to B of F(b) d(log b), in the unit of the gains.

    F(b) is the highest gain of a point of cost at most b: a step, since nothing was measured between two points. b0 and
    B are the least and the highest cost, so that the number is of these points only: another set of methods has
    another range. It is the hypervolume of the points over log cost, with the reference (B, 0), by the length of the
    range. MEMO (Zhou et al. 2023) and Zhou et al.'s survey call the area of one method's last accuracy at several
    memory budgets AUC-L, and that of its average incremental accuracy AUC-A; here it is that of the best method at
    each budget.

    Args:
        points: (N, 2), costs and gains; costs are positive.

    Returns:
        The area; None where there is no range: fewer than two different costs.
    """
    if len({cost for cost, _ in points}) < 2:
        return None
    by_cost = sorted(points)
    parts, best = [], -math.inf
    for (cost, gain), (following, _) in pairwise(by_cost):
        best = max(best, gain)
        parts.append(best * math.log(following / cost))
    return math.fsum(parts) / math.log(by_cost[-1][0] / by_cost[0][0])
