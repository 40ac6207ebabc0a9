"""Is a published number reproduced? The interval of a difference, the verdict that follows, and the seeds it takes.

Verdict    reproduced     the means over all seeds, ours and the paper's, lie less than a margin apart: the 90 %
                          interval of the difference is inside the margin, which is two one-sided tests at 5 % (TOST:
                          Schuirmann 1987). A difference that is real but inside the margin is reproduced, too.
           differs        else, they are not equal: the 95 % interval leaves 0 out.
           under-powered  neither can be said (the four outcomes of both tests together: Lakens 2017).
           So means a margin apart pass as the same, and equal means as different, about once in twenty times at most.
Interval   for unequal variances: Welch's standard error, with the quantile of Cochran & Cox 1950. Welch's degrees of
           freedom are estimated from the deviations: with 3 runs against 30 they pass equal means as different in 7.6 %
           of the cases, with 2 in 13 %; this quantile does in 4.5 and 5.7 %. The two agree for many runs.
           Where a source states no spread, its runs are taken to scatter as ours do, and one run to be behind it unless
           it says how many: the chance in its number is never left out. That is an assumption, and no test of ours
           can check it: of a source that scatters three times as much, equal means pass as different in a quarter of
           the cases, with 3 runs of ours against one.
Margin     `resolution`: what the source's own experiment, done twice, could show to be absent, but for small ones; see
           `published.margin_of`.
Seeds      how many of ours would decide: the fewest with which a verdict is passed with a chance of 80 %, were our true
           mean and deviation those found so far. The paper's number stays what it is, and its chance stays with it.

Everything that tests use at scale takes arrays as well as numbers. Unit: that of the metric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtri, ndtr, stdtrit

from clbench.report.stats import Estimate

Floats = NDArray[np.float64]
Verdict = Literal["reproduced", "differs", "under-powered", "not comparable"]

LEVEL = 0.05
"""Of the test for a difference, and of each of the two one-sided tests."""
CHANCE = 0.8
"""Of a verdict, at the number of seeds that would decide."""
MOST = 1000
"""Where counting seeds ends."""
_POINTS = (np.arange(400) + 0.5) / 400
"""Probabilities at which the deviation found in a sample is evaluated."""


@dataclass(frozen=True)
class Judgement:
    """A verdict on one difference, with what it rests on."""

    verdict: Verdict
    interval: tuple[float, float] | None = None
    """95 % interval; None when one run of ours has no spread."""
    inner: tuple[float, float] | None = None
    """90 % interval."""
    seeds: int | None = None
    """How many of ours would decide, where the verdict is under-powered: MOST + 1 for more than MOST, None where no
    spread is known."""


def judge(ours: Estimate, paper: Estimate, margin: float) -> Judgement:
    """Return the verdict on `ours.mean - paper.mean`.

    Args:
        ours: mean, deviation and n of our runs.
        paper: of the source's; `std` None where it states none, with n = 1 where it does not say n.
        margin: above 0.
    """
    difference = ours.mean - paper.mean
    if ours.std is None:
        seeds = None if paper.std is None else seeds_to_decide(difference, paper.std, paper.std, paper.n, margin)
        return Judgement("under-powered", seeds=seeds)
    sides = (ours.std, ours.n, paper.std, paper.n)
    halves = float(half_width(LEVEL, *sides)), float(half_width(2 * LEVEL, *sides))
    outer, inner = ((difference - half, difference + half) for half in halves)
    if equivalent(difference, halves[1], margin):
        return Judgement("reproduced", outer, inner)
    if unequal(difference, halves[0]):
        return Judgement("differs", outer, inner)
    return Judgement("under-powered", outer, inner, seeds_to_decide(difference, ours.std, paper.std, paper.n, margin))


def half_width(outside: float, std: ArrayLike, n: ArrayLike, paper_std: ArrayLike | None, paper_n: ArrayLike) -> Floats:
    """Return half the width of the interval of a difference of two means.

    With u = s^2 / n and v = S^2 / N, the error is sqrt(u + v) (Welch 1947), and its factor the mean of both sides'
    Student quantiles, weighted with u and v (Cochran & Cox 1950). Without S, S = s: s sqrt(1 / n + 1 / N), and ours.

    Args:
        outside: share that the interval leaves out, half of it on either side.
        std: s, of our runs.
        n: of our runs, 2 or more.
        paper_std: S; None where unknown.
        paper_n: N; 2 or more where S is known.
    """
    runs, paper_runs = np.asarray(n, dtype=np.float64), np.asarray(paper_n, dtype=np.float64)
    u = np.square(np.asarray(std, dtype=np.float64)) / runs
    quantile = stdtrit(runs - 1, 1 - outside / 2)
    if paper_std is None:
        return np.asarray(quantile * np.sqrt(u * (1 + runs / paper_runs)))
    v = np.square(np.asarray(paper_std, dtype=np.float64)) / paper_runs
    weighted = u * quantile + v * stdtrit(paper_runs - 1, 1 - outside / 2)
    # Without any spread the interval is a point.
    return np.asarray(weighted / np.sqrt(np.where(u + v > 0, u + v, 1.0)))


def equivalent(difference: ArrayLike, half: ArrayLike, margin: ArrayLike) -> NDArray[np.bool_]:
    """Whether the 90 % interval lies inside the margin."""
    return np.less(np.add(np.abs(difference), half), margin)


def unequal(difference: ArrayLike, half: ArrayLike) -> NDArray[np.bool_]:
    """Whether the 95 % interval leaves 0 out."""
    return np.greater(np.abs(difference), half)


def resolution(std: float, n: int) -> float:
    """Return the smallest margin within which two experiments of n runs each, of equal means, pass with CHANCE.

    By the usual formula for two one-sided tests, (t(1 - LEVEL; n - 1) + t((1 + CHANCE) / 2; 2 n - 2)) std sqrt(2 / n):
    2.23 deviations for 5 runs, 1.41 for 10, 0.96 for 20, 0.77 for 30.
    """
    factor = stdtrit(n - 1, 1 - LEVEL) + stdtrit(2 * n - 2, (1 + CHANCE) / 2)
    return float(factor) * std * math.sqrt(2 / n)


def left_open(
    difference: float, std: float, paper_std: float | None, paper_n: int, margin: float
) -> tuple[float, float] | None:
    """Return halves of the intervals that the source's runs alone leave, where no number of ours decides; else None.

    Our runs without number, their mean is certain, and the source's chance is all there is.

    Args:
        difference: our mean less the paper's number.
        std: of our runs, which stands in for `paper_std` where that is None.
        paper_std: of the source's runs.
        paper_n: of the source's runs.
        margin: of the row.

    Returns:
        Of the 90 % interval, which would have to lie in the margin, and of the 95 % one, which would have to hold no 0.
    """
    inner, outer = (float(half_width(outside, std, 10**12, paper_std, paper_n)) for outside in (2 * LEVEL, LEVEL))
    return None if equivalent(difference, inner, margin) or unequal(difference, outer) else (inner, outer)


# --------------------------------------------------------------------------------------------------------------- seeds


def chance_of_verdict(
    difference: float, std: float, n: int, paper_std: float | None, paper_n: int, margin: float
) -> float:
    """Return the chance that n runs of ours decide about a paper's number, one way or the other.

    The mean found is normal about the true one with std / sqrt(n); the deviation found is std sqrt(chi2(n - 1) / (n -
    1)). For a given deviation a difference is left open from the margin less the 90 % half-width to the 95 % one; the
    chance is averaged over deviations.

    Args:
        difference: our true mean less the paper's number.
        std: our true deviation.
        n: of our runs, 2 or more.
        paper_std: that of the source's runs; None for what ours will show.
        paper_n: of the source's runs.
        margin: of the row.
    """
    found = std * np.sqrt(chdtri(n - 1, _POINTS) / (n - 1))
    inside = np.maximum(margin - half_width(2 * LEVEL, found, n, paper_std, paper_n), 0.0)
    outside = np.maximum(half_width(LEVEL, found, n, paper_std, paper_n), inside)
    if std == 0:
        return float((~((inside <= abs(difference)) & (abs(difference) <= outside))).mean())
    ends = [(end - abs(difference)) / std * math.sqrt(n) for end in (inside, outside, -outside, -inside)]
    return 1 - float((ndtr(ends[1]) - ndtr(ends[0]) + ndtr(ends[3]) - ndtr(ends[2])).mean())


def seeds_to_decide(difference: float, std: float, paper_std: float | None, paper_n: int, margin: float) -> int:
    """Return the fewest runs of ours that decide with a chance of CHANCE; MOST + 1 where no number up to MOST does."""

    def enough(n: int) -> bool:
        return chance_of_verdict(difference, std, n, paper_std, paper_n, margin) >= CHANCE

    few, many = 1, 2
    while not enough(many):
        if many == MOST:
            return MOST + 1
        few, many = many, min(2 * many, MOST)
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if enough(middle) else (middle, many)
    return many
