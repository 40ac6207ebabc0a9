"""Ranks of methods over several streams: Friedman's test and Nemenyi's critical difference, after Demsar (2006).

Streams are the blocks of the test: on each, the methods are ranked by accuracy, 1 the best, ties sharing their mean
rank. Friedman's test asks whether the average ranks could all come from equal methods; Nemenyi's critical difference is
how far two average ranks must lie apart to differ at the level ALPHA, for all pairs at once.

Source: J. Demsar, Statistical comparisons of classifiers over multiple data sets, JMLR 7, 2006; P. Nemenyi, 1963.

Letters: K methods, N streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, rankdata, studentized_range

from clbench.report.measures import MEASURES
from clbench.report.select import Block, Selection

METHODS, STREAMS = 4, 5
"""Fewest methods and streams for which ranks are compared."""
ALPHA = 0.05


@dataclass(frozen=True)
class Ranking:
    """What the average ranks of K methods over N streams say."""

    methods: tuple[str, ...]
    """K labels, best average rank first; of equal ones the first by name."""
    streams: tuple[str, ...]
    """N stems of blocks."""
    average: tuple[float, ...]
    """(K,), in [1, K], in the order of `methods`."""
    ranks: NDArray[np.float64]
    """(N, K)."""
    chi_squared: float
    """Friedman's statistic, corrected for ties; K - 1 degrees of freedom. NaN where all methods tie everywhere."""
    p_value: float
    difference: float
    """Nemenyi's critical difference of average ranks."""

    @property
    def differs(self) -> bool:
        """Whether Friedman's test finds that not all methods are equal; only then does the difference decide a pair."""
        return self.p_value < ALPHA

    def cliques(self) -> list[tuple[int, int]]:
        """Return the longest runs of methods, first and last, whose average ranks differ by less than the difference.

        Where Friedman's test finds nothing, that is all of them.
        """
        last = len(self.methods) - 1
        if not self.differs:
            return [(0, last)]
        found: list[tuple[int, int]] = []
        for first in range(last):
            end = max(j for j in range(first, last + 1) if self.average[j] - self.average[first] < self.difference)
            if end > first and (not found or end > found[-1][1]):
                found.append((first, end))
        return found


def friedman(ranks: NDArray[np.float64]) -> tuple[float, float]:
    """Return Friedman's chi squared, corrected for ties, and its p value with K - 1 degrees of freedom.

    chi^2 = 12 sum_j (R_j - N (K + 1) / 2)^2 / (N K (K + 1) - sum of (t^3 - t) / (K - 1) over ties of t), R_j the sum of
    method j's ranks. NaN and 1 where every stream ties all methods.

    Args:
        ranks: (N, K), each row the ranks of one stream.
    """
    n, k = ranks.shape
    sizes = [int(count) for row in ranks for count in np.unique(row, return_counts=True)[1]]
    spread = n * k * (k + 1) - sum(size**3 - size for size in sizes) / (k - 1)
    if spread <= 0:
        return math.nan, 1.0
    statistic = 12 * float(((ranks.sum(0) - n * (k + 1) / 2) ** 2).sum()) / spread
    return statistic, float(chi2.sf(statistic, k - 1))


def critical_difference(k: int, n: int) -> float:
    """Return q sqrt(K (K + 1) / (6 N)), q the studentized range's quantile (infinite degrees of freedom) / sqrt 2."""
    quantile = float(studentized_range.ppf(1 - ALPHA, k, np.inf)) / math.sqrt(2)
    return quantile * math.sqrt(k * (k + 1) / (6 * n))


def rank(scores: Mapping[str, Mapping[str, float]]) -> Ranking | None:
    """Return the ranking of the methods that all chosen streams have; None for fewer than METHODS or STREAMS.

    Which streams: beginning with all, the one is left out, again and again, whose absence leaves most methods in
    common; of these sets of streams the one with most combinations of method and stream counts.

    Args:
        scores: stream -> method -> score, higher is better.
    """
    streams = chosen_streams({stream: set(methods) for stream, methods in scores.items()})
    methods = sorted(set.intersection(*(set(scores[stream]) for stream in streams))) if streams else []
    if not methods:
        return None
    ranks = np.array([rankdata([-scores[stream][method] for method in methods]) for stream in streams])
    order = sorted(range(len(methods)), key=lambda j: (ranks[:, j].sum(), methods[j]))
    ranks = ranks[:, order]
    statistic, p_value = friedman(ranks)
    average = tuple(math.fsum(column) / len(streams) for column in ranks.T.tolist())
    difference = critical_difference(len(methods), len(streams))
    return Ranking(
        tuple(methods[j] for j in order), tuple(streams), average, ranks, statistic, p_value, difference
    )  # fmt: skip


def chosen_streams(members: Mapping[str, set[str]]) -> list[str]:
    """Return the streams of `rank`, by name; [] where no set of them is enough.

    Args:
        members: stream -> its methods.
    """
    left, best, most = sorted(members), list[str](), 0
    while len(left) >= STREAMS:
        common = len(set.intersection(*(members[stream] for stream in left)))
        if common >= METHODS and common * len(left) > most:
            best, most = list(left), common * len(left)
        left.remove(max(left, key=lambda stream: (_without(members, left, stream), stream)))
    return best


def _without(members: Mapping[str, set[str]], streams: Sequence[str], out: str) -> int:
    return len(set.intersection(*(members[stream] for stream in streams if stream != out))) if len(streams) > 1 else 0


def scores(selection: Selection) -> dict[str, dict[str, float]]:
    """Return average accuracy, mean over seeds, by stream and label: of each task the block with most baselines.

    Bounds are left out, since nobody chooses between them and a method, and so are results of other tools, whose
    protocol was not run here.
    """
    found = {}
    for task in selection.tasks:
        block = max(reversed(task.blocks), key=lambda block: len(_learners(block)))
        if _learners(block):
            found[block.stem] = _learners(block)
    return found


def _learners(block: Block) -> dict[str, float]:
    values = {
        group.label: MEASURES["average_accuracy"].over(group.runs)
        for group in block.groups
        if group.baseline.family != "bounds" and not group.imported
    }
    return {label: value.mean for label, value in values.items() if value is not None}
