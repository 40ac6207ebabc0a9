"""Every definition against numbers derived by hand, on three matrices where libraries are known to disagree."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clbench import metrics
from clbench.metrics import Matrix, Vector

FIVE = np.array(
    [
        [0.90, 0.12, 0.10, 0.11, 0.10],
        [0.70, 0.88, 0.14, 0.10, 0.12],
        [0.93, 0.60, 0.86, 0.15, 0.10],
        [0.75, 0.72, 0.62, 0.84, 0.16],
        [0.80, 0.55, 0.50, 0.30, 0.90],
    ]
)
TWO = np.array([[0.95, 0.10], [0.40, 0.93]])
IMPROVING = np.array([[0.70, 0.10, 0.10], [0.75, 0.72, 0.10], [0.82, 0.80, 0.90]])
CHANCE = np.full(5, 0.10)


@st.composite
def matrices(draw: st.DrawFn, smallest: int = 2) -> Matrix:
    size = draw(st.integers(smallest, 6))
    values = draw(st.lists(st.floats(0, 1), min_size=size * size, max_size=size * size))
    return np.array(values).reshape(size, size)


# ------------------------------------------------------------------------------------------- where libraries disagree


@pytest.mark.parametrize(
    ("name", "five", "two", "improving"),
    [
        ("forgetting.chaudhry2018", 0.340, 0.550, -0.075),
        ("forgetting.facil", 0.340, 0.550, -0.075),
        ("forgetting.max_with_last", 0.340, 0.550, 0.000),
        ("forgetting.first_minus_last", 0.3325, 0.550, -0.100),
    ],
)
def test_forgetting_is_each_librarys_own_number(name: str, five: float, two: float, improving: float) -> None:
    """T=5, bests before the end .93 .88 .86 .84 against the last row .80 .55 .50 .30: falls .13 .33 .36 .54, mean .34.

    First minus last starts from .90 instead of .93: falls .10 .33 .36 .54, mean .3325.
    T=2: .95 - .40 = .55 by any of them.
    T=3: before the end the bests are .75 and .72, at the end .82 and .80: (-.07 - .08) / 2 = -.075. With the last row
    in the maximum both are 0. First minus last: (.70 - .82 + .72 - .80) / 2 = -.10.
    """
    for acc, expected in ((FIVE, five), (TWO, two), (IMPROVING, improving)):
        assert metrics.compute(name, acc, np.zeros(len(acc))) == pytest.approx(expected, abs=1e-12)


def test_bwt_of_gem_and_of_the_whole_history_differ() -> None:
    """GEM, T=5: (-.10 - .33 - .36 - .54) / 4 = -.3325.

    Whole history, differences to the diagonal below it: task 1: -.20 +.03 -.15 -.10 = -.42; task 2: -.28 -.16 -.33 =
    -.77; task 3: -.24 -.36 = -.60; task 4: -.54. Sum -2.33 over 10 entries = -.233, so REM = .767 and BWT+ = 0.
    """
    assert metrics.bwt_gem(FIVE) == pytest.approx(-0.3325)
    assert metrics.bwt_diaz_rodriguez(FIVE) == pytest.approx(-0.2330)
    assert metrics.remembering(FIVE) == pytest.approx(0.7670)
    assert metrics.bwt_plus(FIVE) == 0.0


def test_backward_improvement_counts_in_bwt_plus_alone() -> None:
    """T=3: (.75 - .70) + (.82 - .70) + (.80 - .72) = .25 over 3 entries."""
    assert metrics.bwt_plus(IMPROVING) == pytest.approx(0.25 / 3)
    assert metrics.remembering(IMPROVING) == 1.0


def test_fwt_has_three_meanings() -> None:
    """GEM: entries just above the diagonal .12 .14 .15 .16, mean .1425, minus b = .10 is .0425.

    Upper triangle: .43 + .36 + .25 + .16 = 1.20 over 10 entries = .12.
    Against independent models at .90 on every task: (.88 + .86 + .84 + .90) / 4 - .90 = -.03.
    """
    assert metrics.fwt_gem(FIVE, CHANCE) == pytest.approx(0.0425)
    assert metrics.fwt_gem(FIVE, np.zeros(5)) == pytest.approx(0.1425)
    assert metrics.fwt_diaz_rodriguez(FIVE) == pytest.approx(0.1200)
    assert metrics.fwt_independent(FIVE, np.full(5, 0.90)) == pytest.approx(-0.03)


def test_the_fwt_of_gem_takes_from_every_task_its_own_accuracy_before_training() -> None:
    """Task 2 scored .4 before it was learned and .1 at birth, task 3 .6 and .2: (.3 + .4) / 2 = .35.

    With the b of the task before each it would be ((.4 - .5) + (.6 - .1)) / 2 = .20; b of task 1 plays no part.
    """
    acc = np.array([[0.9, 0.4, 0.3], [0.8, 0.9, 0.6], [0.7, 0.8, 0.9]])
    assert metrics.fwt_gem(acc, np.array([0.5, 0.1, 0.2])) == pytest.approx(0.35)
    assert metrics.compute("fwt.gem", acc, np.array([0.0, 0.1, 0.2])) == pytest.approx(0.35)


def test_the_maximum_of_chaudhry_includes_rows_before_the_task_was_learned() -> None:
    """Task 2 scored .8 before it was learned, .6 after, .5 at the end: the paper says .3, FACIL (seen tasks) .1.

    Task 1 stays at .9 throughout, so the means are half of these.
    """
    acc = np.array([[0.9, 0.8, 0.1], [0.9, 0.6, 0.1], [0.9, 0.5, 0.7]])
    assert metrics.forgetting_chaudhry2018(acc) == pytest.approx(0.15)
    assert metrics.forgetting_facil(acc) == pytest.approx(0.05)
    assert metrics.forgetting_chaudhry2018(metrics.seen_only(acc)) == pytest.approx(0.05)


def test_forgetting_uses_the_best_not_the_first() -> None:
    """Task 1: .6 -> .9 -> .5 forgot .4 (first minus last: .1); task 2: .8 -> .7 forgot .1. Mean .25; nothing unseen."""
    nan = np.nan
    acc = np.array([[0.6, nan, nan], [0.9, 0.8, nan], [0.5, 0.7, 0.9]])
    assert metrics.forgetting_chaudhry2018(acc) == pytest.approx(0.25)
    assert metrics.forgetting_first_minus_last(acc) == pytest.approx(0.10)
    assert np.isnan(metrics.fwt_gem(acc, np.zeros(3)))


# ----------------------------------------------------------------------------------------------------------- accuracy


def test_accuracies_by_hand() -> None:
    """T=2: ACC (.40 + .93) / 2 = .665; A_1 = .95, so AIA (.95 + .665) / 2; LA (.95 + .93) / 2; triangle 2.28 / 3."""
    assert metrics.average_accuracy(TWO) == pytest.approx(0.665)
    assert metrics.average_incremental_accuracy(TWO) == pytest.approx(0.8075)
    assert metrics.learning_accuracy(TWO) == pytest.approx(0.94)
    assert metrics.accuracy_lower_triangle(TWO) == pytest.approx(0.76)
    np.testing.assert_allclose(metrics.accuracy_of_seen(TWO), [0.95, 0.665])


def test_references_by_hand() -> None:
    """Joint .97, .95 against diagonal .95, .93 is .02 twice; CTrL .93 - .90; Kemker .40 / .8, .665 / .8."""
    np.testing.assert_allclose(metrics.intransigence(TWO, np.array([0.97, 0.95])), [0.02, 0.02])
    assert metrics.transfer_to_last(TWO, 0.90) == pytest.approx(0.03)
    assert metrics.omega_base(TWO, 0.8) == pytest.approx(0.5)
    assert metrics.omega_all(TWO, 0.8) == pytest.approx(0.83125)


# --------------------------------------------------------------------------------------------------------------- costs


def test_model_size_efficiency_rewards_allocating_beforehand() -> None:
    """1 M -> 3 M in equal steps over 10 tasks scores .563, a fixed net 1, a jump to 10 M at the end (9 + .1) / 10."""
    assert metrics.model_size_efficiency(np.linspace(1e6, 3e6, 10).tolist()) == pytest.approx(0.563, abs=5e-4)
    assert metrics.model_size_efficiency([10e6] * 10) == 1.0
    assert metrics.model_size_efficiency([1e6] * 9 + [10e6]) == pytest.approx(0.91)


def test_storage_and_capacity_by_hand() -> None:
    """Replay of 10, 20, 30 of 100 samples: 1 - .2; three nets' worth of weights; 50 weights that make 200."""
    assert metrics.samples_storage_efficiency([10, 20, 30], 100) == pytest.approx(0.8)
    assert metrics.samples_storage_efficiency([500], 100) == 0.0
    assert metrics.relative_capacity(300, 100) == 3.0
    assert metrics.compression_ratio(50, 200) == 0.25


def test_cl_score_weighs_criteria_that_sum_to_one() -> None:
    """.5 x .8 + .5 x .4 = .6; deviations .1 and .3 leave 1 - .2."""
    weights = {"A": 0.5, "MS": 0.5}
    assert metrics.cl_score({"A": 0.8, "MS": 0.4}, weights) == pytest.approx(0.6)
    assert metrics.cl_stability({"A": 0.1, "MS": 0.3}, weights) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="sum to"):
        metrics.cl_score({"A": 0.8}, {"A": 0.7})
    with pytest.raises(ValueError, match="differ"):
        metrics.cl_score({"A": 0.8}, {"MS": 1.0})


# ---------------------------------------------------------------------------------------------------------- properties


@given(st.floats(0, 1), st.integers(2, 6))
def test_a_constant_matrix_forgets_and_transfers_nothing(level: float, size: int) -> None:
    acc = np.full((size, size), level)
    for name in metrics.METRICS:
        value = metrics.compute(name, acc, np.full(size, level))
        if name.startswith("forgetting") or name in ("bwt.gem", "bwt.diaz_rodriguez2018", "bwt.plus", "fwt.gem"):
            assert value == pytest.approx(0, abs=1e-12)
        elif name == "bwt.remembering":
            assert value == pytest.approx(1)
        else:
            assert value == pytest.approx(level)


@given(matrices())
def test_metrics_keep_to_their_ranges(acc: Matrix) -> None:
    start: Vector = np.zeros(len(acc))
    values = {name: metrics.compute(name, acc, start) for name in metrics.METRICS}
    signed = {"forgetting.chaudhry2018", "forgetting.facil", "forgetting.first_minus_last", "bwt.gem"}
    signed |= {"bwt.diaz_rodriguez2018", "fwt.gem"}
    for name, value in values.items():
        assert (-1 if name in signed else 0) - 1e-12 <= value <= 1 + 1e-12, name


@given(matrices())
def test_definitions_of_forgetting_are_ordered(acc: Matrix) -> None:
    """A larger set of rows to take the best from can only forget more; the first one alone is the smallest set."""
    start = np.zeros(len(acc))
    first, facil, chaudhry, largest = (
        metrics.compute(f"forgetting.{name}", acc, start)
        for name in ("first_minus_last", "facil", "chaudhry2018", "max_with_last")
    )
    assert first <= facil + 1e-12
    assert facil <= chaudhry + 1e-12
    assert chaudhry <= largest + 1e-12
    assert first == pytest.approx(-metrics.compute("bwt.gem", acc, start))


@given(matrices())
def test_metrics_of_learned_tasks_ignore_the_upper_triangle(acc: Matrix) -> None:
    blank, start = metrics.seen_only(acc), np.zeros(len(acc))
    for name in metrics.METRICS:
        if name.startswith(("average", "learning", "accuracy", "bwt", "forgetting.f")):
            assert metrics.compute(name, blank, start) == metrics.compute(name, acc, start), name


# -------------------------------------------------------------------------------------------------------------- edges


def test_one_task_has_accuracy_but_no_forgetting_or_transfer() -> None:
    for name in metrics.METRICS:
        value = metrics.compute(name, np.array([[0.7]]), np.array([0.1]))
        assert value == pytest.approx(0.7) if "accuracy" in name else np.isnan(value), name


@pytest.mark.parametrize(
    ("acc", "message"),
    [
        (np.zeros((2, 3)), r"\(T, T\)"),
        (np.zeros((0, 0)), r"\(T, T\)"),
        (np.array([[0.5, 0.1], [np.nan, 0.5]]), "NaN"),
        (np.array([[50.0, 10.0], [40.0, 50.0]]), "outside"),
    ],
)
def test_a_malformed_matrix_is_refused(acc: Matrix, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.average_accuracy(acc)


def test_a_wrong_name_or_a_short_vector_is_refused() -> None:
    with pytest.raises(KeyError, match=r"forgetting\.chaudhry2018"):
        metrics.compute("forgetting", TWO, np.zeros(2))
    with pytest.raises(ValueError, match="acc_init"):
        metrics.compute("fwt.gem", TWO, np.zeros(3))


def test_the_registry_names_itself_and_leaves_nothing_unexplained() -> None:
    for name, metric in metrics.METRICS.items():
        assert metric.name == name
        assert metric.definition
        assert metric.source
    assert all(metrics.NOT_COMPUTED.values())


def test_metrics_import_numpy_alone() -> None:
    code = "import sys; import clbench.metrics; print([m for m in ('torch', 'scipy', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
