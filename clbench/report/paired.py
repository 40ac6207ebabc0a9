"""Paired differences of runs: their interval, whether they are none, and what so many seeds can tell.

Paired       two methods with one seed share the order of classes and of data, and where their nets agree the
             initialisation: what a seed does to both of them is not in their difference. n pairs, differences d_i.
Interval     Student's t, mean ± t(0.975; n - 1) s / sqrt(n). On request BCa (Efron 1987): from the differences alone,
             for skewed ones; of few seeds it is too short, because it never leaves what was seen (`BCA_COVERS`).
p            of the paired t-test, two-sided; and of the exact sign-flip test (Fisher 1935): the share of the 2^n ways
             to swap the two methods within pairs whose mean difference is as far from 0. It needs no normal
             differences, and can never go below 2^(1 - n): 0.25 for 3 seeds, 0.0625 for 5.
No spread    differences that are the same for every seed have no t: s = 0 would say p = 0 of three seeds. Of counts and
             bytes the difference is then exact and there is nothing to test. Of anything that chance moves, the
             sign-flip test still holds, and is used: where there is no difference at all, p is 1, and counts in
             its family like any other, so that no family shrinks by what was found.
Family       Holm 1979: of m tests, the k-th smallest p times m - k + 1, made non-decreasing, capped at 1. The chance of
             any false difference among m is then at most 5 %, whatever depends on what.
Detectable   the smallest true difference that n pairs find at 5 % with a chance of 80 %, were its standard deviation
             the one observed: by the noncentral t distribution. An observed s of few seeds is itself uncertain.

Unit: that of the values.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr, stdtr

from clbench.report.stats import LEVEL, estimate, t_quantile

Interval = Literal["t", "bca"]

POWER = 0.8
"""Chance with which a detectable difference is found."""
BCA_COVERS = {2: 0.51, 3: 0.72, 5: 0.84, 10: 0.90}
"""How often an interval "95 %" by BCa holds the mean of n normal values; a test measures it."""
RESAMPLES = 9999
_EXACT_UP_TO = 16
"""Pairs of which all 2^n signs are tried."""
_POINTS = (np.arange(4000) + 0.5) / 4000
"""Probabilities at which a sample's deviation is evaluated."""
_ROUNDING = 1e-12
"""Relative to the values: differences that differ by less are the same, and only rounded otherwise."""


@dataclass(frozen=True)
class Paired:
    """The difference of two methods over pairs of runs: first less second."""

    n: int
    mean: float
    std: float | None
    """Of the differences (n - 1); None of one pair."""
    low: float | None
    """Ends of the 95 % interval; None of one pair, and where all differences are the same."""
    high: float | None
    p: float | None
    """Two-sided, of the test named; None of one pair, and of exact values."""
    test: Literal["t", "sign-flip", "none"]
    p_sign_flip: float | None
    """Of the exact sign-flip test; None of one pair, of exact values, and of more than 16 pairs."""
    detectable: float | None
    """The smallest difference found with a chance of 80 %; None where no spread says."""

    @property
    def constant(self) -> bool:
        """Whether every pair of two or more has the same difference."""
        return self.std == 0.0

    @property
    def decided(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low is not None and self.high is not None and not self.low <= 0.0 <= self.high


def paired(
    first: Sequence[float], second: Sequence[float], *, by_chance: bool = True, interval: Interval = "t"
) -> Paired:
    """Compare two methods.

    Args:
        first: (n,) values of the one, n of 1 or more.
        second: (n,) of the other, pair by pair.
        by_chance: whether seeds move the value; False for counts and bytes, which are exact where they are the same.
        interval: "t" or "bca".

    Raises:
        ValueError: no pair, or sides of different length.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} values are no pairs")
    differences = [one - other for one, other in zip(first, second, strict=True)]
    n, found = len(differences), estimate(differences)
    assert found is not None
    if n == 1:
        return Paired(1, found.mean, None, None, None, None, "none", None, None)
    size = max(abs(value) for value in (*first, *second))
    if max(differences) - min(differences) <= _ROUNDING * size:
        mean = 0.0 if abs(found.mean) <= _ROUNDING * size else found.mean
        p = None if not by_chance else least_sign_flip(n) if mean else 1.0
        return Paired(n, mean, 0.0, None, None, p, "none" if p is None else "sign-flip", p, None)
    assert found.std is not None
    half = t_quantile(n - 1) * found.std / math.sqrt(n)
    low, high = bca(differences) if interval == "bca" else (found.mean - half, found.mean + half)
    p = 2 * float(stdtr(n - 1, -abs(found.mean) / (found.std / math.sqrt(n))))
    return Paired(n, found.mean, found.std, low, high, p, "t", sign_flip(differences), detectable(found.std, n))


def least_sign_flip(n: int) -> float:
    """Return the smallest two-sided p of the sign-flip test of n pairs: all signs the same, or all turned."""
    return float(2.0 ** (1 - n))


def sign_flip(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of the exact sign-flip test; None of more than 16 pairs."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) > _EXACT_UP_TO:
        return None
    # The sign of the first is left as it is: turning all signs changes no distance from 0.
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(values) - 1)))
    sums = np.abs(values[0] + signs @ values[1:])
    observed = abs(math.fsum(differences))
    return float(np.mean(sums >= observed - _ROUNDING * np.abs(values).sum()))


def bca(differences: Sequence[float]) -> tuple[float, float]:
    """Return the BCa bootstrap interval of the mean; the same for the same values, on every machine."""
    found = stats.bootstrap(
        (np.asarray(differences),), np.mean, n_resamples=RESAMPLES, confidence_level=LEVEL, method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def holm(p: Sequence[float]) -> list[float]:
    """Return the p of a family as Holm corrects them, in the same order."""
    corrected, most = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = most
    return corrected


# --------------------------------------------------------------------------------------------------------------- power


def power(difference: float, std: float, n: int) -> float:
    """Return the chance that a paired t-test of n pairs finds a true difference at 5 %.

    The statistic is noncentral t: with noncentrality c = difference sqrt(n) / std and r^2 ~ chi2(n - 1) / (n - 1), |t|
    is beyond its edge q with the chance Phi(c - q r) + Phi(-c - q r), averaged over r.
    """
    edge, shift = t_quantile(n - 1) * np.sqrt(chdtri(n - 1, _POINTS) / (n - 1)), difference / std * math.sqrt(n)
    return float((ndtr(shift - edge) + ndtr(-shift - edge)).mean())


def detectable(std: float, n: int) -> float:
    """Return the smallest true difference that n pairs find with a chance of `POWER`; linear in `std`.

    3.26 standard deviations of 3 pairs, 1.68 of 5, 1.00 of 10.
    """
    return std * _detectable_ratio(n)


@functools.cache
def _detectable_ratio(n: int) -> float:
    most = 8 * t_quantile(n - 1) / math.sqrt(n)
    return float(brentq(lambda ratio: power(ratio, 1.0, n) - POWER, 0.0, most, xtol=1e-9))
