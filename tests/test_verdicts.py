"""Verdicts on published numbers: by hand, against scipy's tests, and by simulation of papers that are and are not met.

Simulated: our n runs and the paper's N runs are normal, so that a mean is normal about the true one with deviation
sigma / sqrt(n), and a sample's deviation is sigma sqrt(chi2(n - 1) / (n - 1)), apart from each other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from clbench.report.stats import Estimate
from clbench.report.verdicts import (
    CHANCE,
    MOST,
    Floats,
    chance_of_verdict,
    equivalent,
    half_width,
    judge,
    resolution,
    seeds_to_decide,
    unequal,
)

TRIALS = 20_000
SMALL = (3, 5, 10)
ALLOWED = 0.05 + 0.005
"""Of an error at the level of 5 %: three standard errors of a share of TRIALS draws are half a point."""
PAPERS = [(1.0, 5), (1.0, 30), (4.8, 30), (0.2, 5)]
"""Deviation in units of ours, and n: like ours, the None row of the Fisher study, and a paper that hardly scatters."""


@functools.cache
def sampled(sigma: float, n: int, seed: int) -> tuple[Floats, Floats]:
    """Return TRIALS means about 0 and deviations of n normal runs."""
    rng = np.random.default_rng(seed)
    means = rng.normal(0, sigma / np.sqrt(n), TRIALS)
    return means, sigma * np.sqrt(rng.chisquare(max(n - 1, 1), TRIALS) / max(n - 1, 1))


@dataclass(frozen=True)
class Simulated:
    """TRIALS comparisons of equal means; a true difference is added to what they found."""

    found: Floats
    outer: Floats
    """Half of the 95 % interval."""
    inner: Floats
    """Half of the 90 % interval."""
    resolution: Floats | float
    """The margin of a row without one of its own."""

    def rates(self, difference: Floats | float, margin: Floats | float) -> tuple[float, float]:
        """Return the shares of reproduced and of differs."""
        same = equivalent(self.found + difference, self.inner, margin)
        return float(same.mean()), float((~same & unequal(self.found + difference, self.outer)).mean())


@functools.cache
def simulated(sigma: float, n: int, paper_sigma: float, paper_n: int, *, given: bool = False) -> Simulated:
    """Compare n runs of ours with simulated papers; `given`: with one that found its true mean and deviation."""
    (ours, our_std), (theirs, their_std) = sampled(sigma, n, 2), sampled(paper_sigma, paper_n, 1)
    if given:
        theirs, their_std = np.zeros(TRIALS), np.full(TRIALS, paper_sigma)
    outer, inner = (half_width(outside, our_std, n, their_std, paper_n) for outside in (0.05, 0.10))
    return Simulated(ours - theirs, outer, inner, their_std * resolution(1.0, paper_n))


# -------------------------------------------------------------------------------------------------------------- by hand


def test_the_interval_by_hand() -> None:
    """With s = 1 over 4 runs and S = 2 over 8: u = .25, v = .5, the error is sqrt(.75) = .8660.

    t(.975) is 3.1824 for 3 degrees of freedom and 2.3646 for 7, weighted (.25 x 3.1824 + .5 x 2.3646) / .75 = 2.6372:
    2.2839 on either side. For 90 %: (.25 x 2.3534 + .5 x 1.8946) / .75 = 2.0475, 1.7732.
    """
    assert float(half_width(0.05, 1.0, 4, 2.0, 8)) == pytest.approx(2.2839, abs=1e-4)
    assert float(half_width(0.10, 1.0, 4, 2.0, 8)) == pytest.approx(1.7732, abs=1e-4)


def test_a_paper_without_spread_is_taken_to_scatter_as_ours_do() -> None:
    """Deviation 2 over 4 runs against one run: error 2 sqrt(1/4 + 1) = 2.2361, t(.975; 3) = 3.1824: 7.1163."""
    assert float(half_width(0.05, 2.0, 4, None, 1)) == pytest.approx(7.1163, abs=1e-3)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (Estimate(0.855, 0.01, 5), "reproduced"),
        (Estimate(0.832, 0.01, 5), "differs"),
        (Estimate(0.840, 0.02, 5), "under-powered"),
        (Estimate(0.855, None, 1), "under-powered"),
    ],
)
def test_the_verdicts_by_hand(ours: Estimate, verdict: str) -> None:
    """A paper with 85 %, deviation 1 point, 5 runs; margin 2 points.

    Of five runs with the same deviation the error is sqrt(2 / 5) = .632 points, t(.95; 4) = 2.132, t(.975; 4) = 2.776.
    .5 ∓ 1.35 is inside 2: reproduced. -1.8 ∓ 1.35 is not, and -1.8 ∓ 1.76 leaves 0 out: differs. With a deviation of 2
    points the error is 1, and -1 ∓ 2.13 is not inside, -1 ∓ 2.78 holds 0. One run has no spread.
    """
    assert judge(ours, Estimate(0.85, 0.01, 5), 0.02).verdict == verdict


def test_a_real_difference_inside_the_margin_is_reproduced() -> None:
    """.5 points with an error of .03 is not 0, and is less than 1 point."""
    found = judge(Estimate(0.905, 0.0005, 5), Estimate(0.9, 0.0005, 5), 0.01)
    assert found.verdict == "reproduced"
    assert found.interval is not None
    assert found.interval[0] > 0


def test_without_any_spread_the_difference_decides_alone() -> None:
    exact = Estimate(0.5, 0.0, 3)
    assert judge(exact, Estimate(0.505, 0.0, 3), 0.01).verdict == "reproduced"
    assert judge(exact, Estimate(0.51, None, 1), 0.01).verdict == "differs"
    assert judge(exact, Estimate(0.49, 0.0, 3), 0.01).seeds is None


def test_the_resolution_by_hand() -> None:
    """For n = 20: (t(.95; 19) + t(.9; 38)) sqrt(2 / 20) = (1.7291 + 1.3042) x .31623 = .95922 deviations."""
    assert resolution(2.0, 20) == pytest.approx(2 * 0.95922, abs=1e-4)


# ------------------------------------------------------------------------------------------------------- against scipy


def welch_p(shift: float, n: int, paper_std: float, paper_n: int, alternative: str = "two-sided") -> float:
    """Return scipy's p of Welch's test of a difference of `shift`, our deviation being 1."""
    sides = (shift, 1.0, n, 0.0, paper_std, paper_n)
    return float(stats.ttest_ind_from_stats(*sides, equal_var=False, alternative=alternative).pvalue)


@pytest.mark.parametrize("n", [2, *SMALL, 40])
@pytest.mark.parametrize(("paper_std", "paper_n"), [(0.2, 7), (1.0, 7), (5.0, 7), (1.0, 30)])
def test_the_interval_is_never_narrower_than_scipys_welch_test(n: int, paper_std: float, paper_n: int) -> None:
    """At its ends scipy's p is the level or less; so whatever is passed here passes Welch's tests at 5 %, too."""
    for outside, alternative in ((0.05, "two-sided"), (0.10, "greater")):
        end = float(half_width(outside, 1.0, n, paper_std, paper_n))
        assert welch_p(end, n, paper_std, paper_n, alternative) <= 0.05 + 1e-9


def test_for_many_runs_the_interval_is_that_of_scipys_welch_test() -> None:
    end = float(half_width(0.05, 1.0, 400, 2.0, 300))
    assert welch_p(end, 400, 2.0, 300) == pytest.approx(0.05, abs=3e-4)
    inner = float(half_width(0.10, 1.0, 400, 2.0, 300))
    assert welch_p(inner, 400, 2.0, 300, "greater") == pytest.approx(0.05, abs=3e-4)


def test_against_a_paper_of_as_many_runs_the_quantile_is_students() -> None:
    """Both weights have the same t: scipy's own interval of one sample, at the error of the difference."""
    half = stats.t.interval(0.95, 6, scale=np.sqrt(1.0 / 7 + 9.0 / 7))[1]
    assert float(half_width(0.05, 1.0, 7, 3.0, 7)) == pytest.approx(half)


# ----------------------------------------------------------------------------------------------------------- simulated


@pytest.mark.parametrize("n", SMALL)
@pytest.mark.parametrize(("paper_sigma", "paper_n"), PAPERS)
def test_the_interval_covers_the_true_difference(n: int, paper_sigma: float, paper_n: int) -> None:
    """In 95 % of the cases or somewhat more: the quantile is on the safe side of unequal deviations."""
    trials = simulated(1.0, n, paper_sigma, paper_n)
    coverage = 1 - float(unequal(trials.found, trials.outer).mean())
    assert 1 - ALLOWED <= coverage <= 0.985


@pytest.mark.parametrize("n", SMALL)
@pytest.mark.parametrize(("paper_sigma", "paper_n"), PAPERS)
def test_means_a_margin_apart_seldom_pass_as_the_same(n: int, paper_sigma: float, paper_n: int) -> None:
    """With a margin of the row's own, and with one that follows from the spread of each simulated paper."""
    trials = simulated(1.0, n, paper_sigma, paper_n)
    for margin in (trials.resolution, 2.0):
        assert trials.rates(margin, margin)[0] <= ALLOWED


@pytest.mark.parametrize("n", SMALL)
@pytest.mark.parametrize(("paper_sigma", "paper_n"), PAPERS)
def test_equal_means_seldom_pass_as_different(n: int, paper_sigma: float, paper_n: int) -> None:
    """Whatever the margin: the narrower it is, the fewer of the wrong ones it takes back."""
    trials = simulated(1.0, n, paper_sigma, paper_n)
    for margin in (trials.resolution, 0.1, 2.0):
        assert trials.rates(0.0, margin)[1] <= ALLOWED


def test_welchs_own_degrees_of_freedom_would_pass_too_much() -> None:
    """Why the quantile is another one: 3 runs against 30 of the same deviation, 7.6 % in 200,000 draws."""
    (ours, std), (theirs, their_std) = sampled(1.0, 3, 2), sampled(1.0, 30, 1)
    test = stats.ttest_ind_from_stats(ours, std, 3, theirs, their_std, 30, equal_var=False)
    assert float((test.pvalue < 0.05).mean()) == pytest.approx(0.076, abs=0.007)


@pytest.mark.parametrize("n", SMALL)
def test_a_single_published_run_is_judged_with_its_own_scatter(n: int) -> None:
    """One run of the paper, without spread.

    A bare t interval about its value leaves that run's chance out, and passes equal means as different three times as
    often as it should, or more.
    """
    paper, (ours, std) = sampled(1.0, 1, 3)[0], sampled(1.0, n, 4)
    wrong = unequal(ours - paper, half_width(0.05, std, n, None, 1))
    assert float(wrong.mean()) == pytest.approx(0.05, abs=0.005)
    bare = unequal(ours - paper, stats.t.ppf(0.975, n - 1) * std / np.sqrt(n))
    assert float(bare.mean()) > 0.15


def test_a_source_without_spread_that_scatters_more_than_ours_differs_too_often() -> None:
    """3 runs of ours, one of a source that scatters k times as much, means equal.

    The difference has deviation sqrt(1/3 + k^2), its half-width is s t sqrt(1/3 + 1) with t of 2 degrees of freedom: so
    0 is left out with the chance that Student's t exceeds t sqrt((1/3 + 1) / (1/3 + k^2)): 5 % for k = 1, 24.5 % for 3.
    """
    for k, said in ((1.0, 0.05), (3.0, 0.245)):
        exact = 2 * stats.t.sf(stats.t.ppf(0.975, 2) * np.sqrt((1 / 3 + 1) / (1 / 3 + k**2)), 2)
        assert exact == pytest.approx(said, abs=0.001)
        (ours, our_std), (theirs, _) = sampled(1.0, 3, 2), sampled(k, 1, 1)
        share = unequal(ours - theirs, half_width(0.05, our_std, 3, None, 1)).mean()
        assert share == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("n", [5, 10, 20, 30])
def test_as_many_seeds_as_the_papers_show_equal_means_to_be_equal(n: int) -> None:
    """The resolution is the margin for which that chance is 80 %."""
    assert simulated(1.0, n, 1.0, n).rates(0.0, resolution(1.0, n))[0] == pytest.approx(CHANCE, abs=0.02)


@pytest.mark.parametrize(
    ("difference", "sigma", "paper_sigma", "paper_n", "margin"),
    [
        (0.0, 1.0, 1.0, 20, 1.0),
        (0.3, 1.0, 0.5, 20, 1.0),
        (2.0, 1.0, 1.0, 5, 1.0),
        (1.6, 1.0, 0.2, 5, 1.0),
        (0.0, 0.4, 0.3, 10, 0.4),
    ],
)
def test_the_seeds_that_would_decide_do_so_with_the_chance_promised(
    difference: float, sigma: float, paper_sigma: float, paper_n: int, margin: float
) -> None:
    """The simulated rate of a verdict is the computed one within a point; it is 80 % or more first at that number."""
    n = seeds_to_decide(difference, sigma, paper_sigma, paper_n, margin)
    assert 2 < n < 60
    for count in (n - 1, n):
        chance = chance_of_verdict(difference, sigma, count, paper_sigma, paper_n, margin)
        assert (chance >= CHANCE) == (count == n)
        trials = simulated(sigma, count, paper_sigma, paper_n, given=True)
        assert sum(trials.rates(difference, margin)) == pytest.approx(chance, abs=0.01)


def test_no_number_of_seeds_makes_up_for_a_single_published_run() -> None:
    """With many seeds of ours the error is that of the paper's run, 5: 4 is neither below 3 - 8.2 nor above 9.8."""
    assert seeds_to_decide(4.0, 5.0, None, 1, 3.0) == MOST + 1
    assert judge(Estimate(4.0, 5.0, 10), Estimate(0.0, None, 1), 3.0).seeds == MOST + 1


def test_one_run_of_ours_borrows_the_papers_spread_to_say_how_many_more() -> None:
    found = judge(Estimate(0.9, None, 1), Estimate(0.9, 0.01, 10), 0.01)
    assert found.interval is None
    assert found.seeds == seeds_to_decide(0.0, 0.01, 0.01, 10, 0.01)
    assert judge(Estimate(0.9, None, 1), Estimate(0.9, None, 1), 0.01).seeds is None
