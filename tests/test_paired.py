"""Paired differences: by hand, against scipy's tests, and by simulation of how often intervals and tests are wrong.

Simulated: the differences of two methods of equal means are n normal numbers about 0.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from clbench.report.paired import (
    BCA_COVERS,
    POWER,
    bca,
    detectable,
    holm,
    least_sign_flip,
    paired,
    power,
    sign_flip,
)
from clbench.report.stats import t_quantile

TRIALS = 20_000
ALLOWED = 0.005
"""Of a share of TRIALS draws near 5 %: three standard errors."""
MINE, THEIRS = (0.71, 0.74, 0.69, 0.75, 0.72), (0.70, 0.70, 0.68, 0.71, 0.69)


@functools.cache
def drawn(n: int, seed: int = 0) -> NDArray[np.float64]:
    """Return TRIALS times n normal differences."""
    return np.random.default_rng(seed).normal(size=(TRIALS, n))


def test_a_paired_difference_by_hand() -> None:
    """Differences in points: 1, 4, 1, 4, 3. Mean 13 / 5 = 2.6; squares about it 2.56 + 1.96 + 2.56 + 1.96 + 0.16 = 9.2.

    s = sqrt(9.2 / 4) = 1.516575, s / sqrt 5 = 0.678233; t(0.975; 4) = 2.776445, so the interval is 2.6 ± 1.883076. Of
    32 patterns of signs only "all plus" and "all minus" reach a sum of 13: p = 2 / 32.
    """
    found = paired(MINE, THEIRS)
    assert (found.n, found.test) == (5, "t")
    assert found.mean == pytest.approx(0.026)
    assert found.std == pytest.approx(0.01516575)
    assert (found.low, found.high) == pytest.approx((0.026 - 0.01883076, 0.026 + 0.01883076), abs=1e-8)
    assert found.p_sign_flip == 2 / 32
    assert found.decided


def test_p_is_that_of_scipys_paired_t_test() -> None:
    found, theirs = paired(MINE, THEIRS), stats.ttest_rel(MINE, THEIRS)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


@pytest.mark.parametrize("n", [2, 3, 6, 9])
def test_the_sign_flip_test_is_scipys_exact_permutation_test(n: int) -> None:
    for differences in drawn(n)[:5]:
        theirs = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
        assert sign_flip(differences.tolist()) == pytest.approx(theirs.pvalue)


def test_the_sign_flip_test_cannot_go_below_its_least() -> None:
    """Of 2^n patterns one reaches the sum of n equal signs, and its mirror image; a tie counts as reached."""
    for n, least in ((2, 0.5), (3, 0.25), (5, 0.0625), (6, 0.03125)):
        assert least_sign_flip(n) == least
        assert sign_flip([1e9 + k for k in range(n)]) == least
    assert sign_flip([0.1, 0.2, -0.3]) == 1.0  # a sum of 0 but for rounding
    assert sign_flip([0.0, 0.0, 1.0]) == 1.0  # only one sign changes anything
    assert sign_flip(range(1, 18)) is None


def test_few_seeds_decide_nothing() -> None:
    one = paired([0.8], [0.7])
    assert one.mean == pytest.approx(0.1)
    assert (one.low, one.high, one.p, one.detectable, one.test) == (None, None, None, None, "none")
    assert not one.decided
    with pytest.raises(ValueError, match="no pairs"):
        paired([], [])
    with pytest.raises(ValueError, match="no pairs"):
        paired([1.0], [1.0, 2.0])


def test_the_same_difference_for_every_seed_has_no_t() -> None:
    """0.9 - 0.8 and 0.7 - 0.6 differ by a rounding: their t would be about 1e15, and p = 0 of three seeds.

    Swapping the methods in any pair but all changes the mean: the sign-flip test says 2^(1 - 3) = 0.25.
    """
    found = paired([0.9, 0.7, 0.5], [0.8, 0.6, 0.4])
    assert found.constant
    assert (found.low, found.high, found.detectable) == (None, None, None)
    assert (found.p, found.test) == (0.25, "sign-flip")
    none = paired([0.9, 0.7, 0.3], [0.9, 0.7, 0.3])
    assert (none.mean, none.p, none.test) == (0.0, 1.0, "sign-flip")  # all 2^3 patterns have the same mean
    assert not none.decided
    rounded = paired([0.1 + 0.2, 0.3], [0.3, 0.1 + 0.2])
    assert (rounded.mean, rounded.p) == (0.0, 1.0)


def test_a_count_that_is_always_the_same_is_exact_and_not_tested() -> None:
    found = paired([200.0] * 3, [100.0] * 3, by_chance=False)
    assert (found.mean, found.std, found.p, found.test) == (100.0, 0.0, None, "none")
    moved = paired([200.0, 210.0, 205.0], [100.0] * 3, by_chance=False)
    assert moved.test == "t"


# -------------------------------------------------------------------------------------------------- how often they err


@pytest.mark.parametrize("n", [3, 5, 10])
def test_students_interval_holds_the_true_difference_in_95_percent(n: int) -> None:
    draws = drawn(n)
    half = t_quantile(n - 1) * draws.std(axis=1, ddof=1) / np.sqrt(n)
    assert np.mean(np.abs(draws.mean(axis=1)) <= half) == pytest.approx(0.95, abs=ALLOWED)
    normal = 1.959964 * draws.std(axis=1, ddof=1) / np.sqrt(n)
    assert np.mean(np.abs(draws.mean(axis=1)) <= normal) < 0.93
    for row in draws[:50]:  # what is simulated is what is printed
        found = paired(row.tolist(), [0.0] * n)
        assert found.std is not None
        assert found.low is not None
        assert found.mean - found.low == pytest.approx(t_quantile(n - 1) * row.std(ddof=1) / np.sqrt(n))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_t_test_errs_in_5_percent_and_the_sign_flip_test_in_no_more(n: int) -> None:
    """The sign-flip test of 3 or 5 seeds can never say less than 0.25 or 0.0625, so it never errs at 5 %."""
    draws = drawn(n)
    found = stats.ttest_1samp(draws, 0, axis=1).pvalue
    assert np.mean(found < 0.05) == pytest.approx(0.05, abs=ALLOWED)
    p = [paired(row.tolist(), [0.0] * n).p for row in draws[:50]]
    assert p == pytest.approx(found[:50].tolist())
    flipped = np.array([sign_flip(row.tolist()) for row in draws[:2000]])
    assert np.mean(flipped <= 0.05) <= (0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000) if n == 10 else 0.0)


@pytest.mark.parametrize("n", sorted(BCA_COVERS))
def test_bca_of_few_seeds_holds_the_truth_as_rarely_as_the_caption_says(n: int) -> None:
    """Two standard errors of 2,000 draws are 2 points; 999 resamples here against 9,999 move the ends little."""
    found = stats.bootstrap(
        (drawn(n, 1)[:2000],), np.mean, axis=-1, n_resamples=999, method="BCa", rng=np.random.default_rng(2)
    ).confidence_interval
    assert np.mean((found.low <= 0) & (found.high >= 0)) == pytest.approx(BCA_COVERS[n], abs=0.025)


def test_bca_follows_skew_and_is_the_same_every_time() -> None:
    """One large difference of eight: the interval reaches further on its side, where Student's is symmetric."""
    differences = [0.0, 0.1, 0.2, 0.1, 0.0, 0.2, 0.1, 2.0]
    low, high = bca(differences)
    assert (low, high) == bca(differences)
    mean = np.mean(differences)
    assert high - mean > 1.5 * (mean - low)
    found = paired(differences, [0.0] * 8, interval="bca")
    assert (found.low, found.high) == (low, high)


# --------------------------------------------------------------------------------------------------------------- family


def test_holm_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06 (not below the one before), 0.06."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_holm_keeps_a_family_to_5_percent_and_single_tests_do_not() -> None:
    """One method against four of the same mean: its own seeds are in every difference, so that the tests depend."""
    rng = np.random.default_rng(3)
    mine, others = rng.normal(size=(4000, 1, 5)), rng.normal(size=(4000, 4, 5))
    p = stats.ttest_1samp(mine - others, 0, axis=-1).pvalue
    any_single = np.mean((p < 0.05).any(axis=1))
    any_holm = np.mean([min(holm(row.tolist())) < 0.05 for row in p])
    error = 3 * np.sqrt(0.05 * 0.95 / 4000)
    assert any_holm <= 0.05 + error
    assert any_single > 0.10


# --------------------------------------------------------------------------------------------------------------- power


@pytest.mark.parametrize("n", [3, 5, 10, 30])
def test_power_is_that_of_the_noncentral_t(n: int) -> None:
    edge = stats.t.ppf(0.975, n - 1)
    for ratio in (0.2, 0.5, 1.0, 1.5):
        shift = ratio * np.sqrt(n)
        theirs = stats.nct.sf(edge, n - 1, shift) + stats.nct.cdf(-edge, n - 1, shift)
        assert power(ratio * 2.0, 2.0, n) == pytest.approx(theirs, abs=2e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_a_detectable_difference_is_found_in_80_percent(n: int) -> None:
    difference = detectable(1.0, n)
    p = stats.ttest_1samp(drawn(n, 4) + difference, 0, axis=1).pvalue
    assert np.mean(p < 0.05) == pytest.approx(POWER, abs=0.009)  # three standard errors
    assert detectable(3.0, n) == pytest.approx(3 * difference)


def test_without_a_difference_power_is_the_level() -> None:
    assert power(0.0, 1.0, 5) == pytest.approx(0.05, abs=1e-4)
