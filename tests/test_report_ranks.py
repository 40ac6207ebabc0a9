"""Ranks over streams: Friedman's test, Nemenyi's difference and what they leave out, against published numbers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import friedmanchisquare, rankdata, studentized_range

from clbench.record_parts import Imported
from clbench.report import figures, figures_ranks, ranks
from clbench.report.build import build, check
from clbench.report.select import select
from record_factory import make_record

TIED = [
    [0.90, 0.85, 0.85, 0.60, 0.70],
    [0.80, 0.82, 0.70, 0.55, 0.70],
    [0.75, 0.74, 0.60, 0.50, 0.52],
    [0.95, 0.90, 0.91, 0.80, 0.80],
    [0.66, 0.70, 0.60, 0.61, 0.50],
    [0.99, 0.97, 0.95, 0.90, 0.91],
]
"""Accuracies of 5 methods on 6 streams, with three ties."""
METHODS = ("er", "derpp", "gem", "si", "ewc")


def table(rows: Sequence[Sequence[float]], methods: Sequence[str] = METHODS) -> dict[str, dict[str, float]]:
    return {f"stream_{i}": dict(zip(methods, row, strict=True)) for i, row in enumerate(rows)}


# ----------------------------------------------------------------------------------------------------------- statistics


def test_critical_differences_are_those_of_demsar_2006() -> None:
    """His example: 4 classifiers on 14 data sets, q = 2.569: 2.569 sqrt(4 x 5 / (6 x 14)) = 1.25. Also his table 5a."""
    assert ranks.critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    for k, q in ((2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)):
        assert ranks.critical_difference(k, 1) == pytest.approx(q * math.sqrt(k * (k + 1) / 6), rel=3e-4)


def test_friedmans_statistic_by_hand() -> None:
    """Ranks 1, 2, 3 twice and 2, 1, 3: sums 4, 5, 9, expected 6 each: 12 (4 + 1 + 9) / (3 x 3 x 4) = 4.667."""
    statistic, p_value = ranks.friedman(np.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]]))
    assert statistic == pytest.approx(14 / 3)
    assert p_value == pytest.approx(math.exp(-7 / 3))  # chi squared with 2 degrees of freedom: exp(-x / 2)


def test_the_example_of_scikit_posthocs_gives_its_numbers() -> None:
    """The block design in the documentation of `posthoc_nemenyi_friedman`.

    Its p values were had from scikit-posthocs 0.17.1: `posthoc_nemenyi_friedman(x)`. Nemenyi's difference at the level
    p of a pair is that pair's difference of average ranks: 13/6, 7/6 and 31/12 of the rows' ranks.
    """
    x = [[31, 27, 24], [31, 28, 31], [45, 29, 46], [21, 18, 48], [42, 36, 46], [32, 17, 40]]
    found = np.array([rankdata(row) for row in x])
    assert found.mean(0).tolist() == pytest.approx([2.25, 7 / 6, 31 / 12])
    statistic, p_value = ranks.friedman(found)
    assert (statistic, p_value) == pytest.approx((6.869565217391299, 0.03223241651740552))
    reference = {(0, 1): 0.145534868691, (0, 2): 0.832229218116, (1, 2): 0.03760991482}
    for (i, j), expected in reference.items():
        assert _nemenyi(found, i, j) == pytest.approx(expected, rel=1e-8)


def test_ties_share_their_mean_rank_and_correct_the_statistic() -> None:
    """Ranks and p values of TIED as scikit-posthocs 0.17.1 (`posthoc_nemenyi_friedman` of minus it) and scipy say.

    CD for 5 methods and 6 streams: 2.728 sqrt(5 x 6 / 36) = 2.490. The pairs apart by more are those with p < 0.05.
    """
    found = ranks.rank(table(TIED))
    assert found is not None
    assert found.methods == (*METHODS[:3], "ewc", "si")
    assert found.average == pytest.approx((4 / 3, 23 / 12, 3, 25 / 6, 55 / 12))
    assert found.chi_squared == pytest.approx(19.247863247863247)
    assert found.chi_squared == pytest.approx(friedmanchisquare(*np.array(TIED).T).statistic)
    assert found.p_value == pytest.approx(0.0007025299900403637)
    assert found.difference == pytest.approx(2.490, abs=1e-3)
    reference = {
        ("er", "derpp"): 0.968688998499, ("er", "gem"): 0.358566468131, ("er", "si"): 0.003406759931,
        ("er", "ewc"): 0.016382667142, ("derpp", "gem"): 0.759068128757, ("derpp", "si"): 0.028750181794,
        ("derpp", "ewc"): 0.09873960319, ("gem", "si"): 0.412662394386, ("gem", "ewc"): 0.704809410897,
        ("si", "ewc"): 0.991071011074,
    }  # fmt: skip
    assert len(reference) == len(list(combinations(METHODS, 2)))
    for (one, other), expected in reference.items():
        i, j = found.methods.index(one), found.methods.index(other)
        assert _nemenyi(found.ranks, i, j) == pytest.approx(expected, rel=1e-8)
        assert (abs(found.average[i] - found.average[j]) > found.difference) == (expected < 0.05)
    assert found.cliques() == [(0, 2), (1, 3), (2, 4)]


def _nemenyi(found: np.ndarray[tuple[int, int], np.dtype[np.float64]], i: int, j: int) -> float:
    """Return the p value of a pair: the critical difference at that level is the pair's own."""
    n, k = found.shape
    apart = abs(found[:, i].mean() - found[:, j].mean())
    return float(studentized_range.sf(apart * math.sqrt(2) / math.sqrt(k * (k + 1) / (6 * n)), k, np.inf))


def test_equal_methods_are_joined_by_one_bar() -> None:
    """Everyone ties everywhere: average rank 2.5, no statistic. And where ranks go round, p = 1."""
    tied = ranks.rank(table([[0.5] * 4] * 5, METHODS[:4]))
    assert tied is not None
    assert tied.average == (2.5,) * 4
    assert math.isnan(tied.chi_squared)
    assert (tied.differs, tied.cliques()) == (False, [(0, 3)])


# ----------------------------------------------------------------------------------------------------- what is compared


def test_fewer_methods_or_streams_are_not_ranked() -> None:
    """Four methods and five streams are just enough."""
    rows = [row[:4] for row in TIED]
    assert ranks.rank(table(rows[:5], METHODS[:4])) is not None
    assert ranks.rank(table(rows[:4], METHODS[:4])) is None
    assert ranks.rank(table([row[:3] for row in rows], METHODS[:3])) is None
    assert ranks.rank({}) is None


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        # 4 methods on 6 streams, 24 combinations, beat 5 on 5 with a sixth stream that lacks one: 25.
        ({"f": "abcd"}, "abcde"),
        # 5 on 6 are 30, more than 5 on 5.
        ({}, "abcdef"),
        # Nothing in common with f: it goes.
        ({"f": "xyz"}, "abcde"),
        # Two streams that lack much: 4 are too few, and with one of them are only 3 methods.
        ({"e": "abc", "f": "abx"}, ""),
    ],
)
def test_streams_are_chosen_so_that_most_combinations_stay(members: Mapping[str, str], expected: str) -> None:
    everything = {stream: set(members.get(stream, "abcde")) for stream in "abcdef"}
    assert ranks.chosen_streams(everything) == list(expected)


# ----------------------------------------------------------------------------------------------------------- the figure


@pytest.fixture(autouse=True)
def one_figure_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of single streams are tested elsewhere."""
    monkeypatch.setattr(figures, "plots", lambda block, looks: [figures.accuracy_of_seen_tasks(block, looks)])


def _records(folder: Path, rows: Sequence[Sequence[float]]) -> Path:
    for i, row in enumerate(rows):
        for method, level in zip(METHODS, row, strict=True):
            for seed, shift in enumerate((-0.01, 0.01)):
                make_record(f"stream_{i}", method, seed, acc=[[level + shift] * 2] * 2).save(folder)
        make_record(f"stream_{i}", "joint", acc=[[1.0] * 2] * 2).save(folder)
    return folder


def test_the_diagram_is_drawn_from_the_records_and_named_everywhere(tmp_path: Path) -> None:
    """Means over the two seeds are TIED; joint, best of all, is a bound and has no rank."""
    runs = _records(tmp_path / "runs", TIED)
    make_record("stream_0", "lwf", acc=[[0.5] * 2] * 2).save(runs)
    built = build(runs, tmp_path / "out")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "figures" / "critical-difference.csv").read_text())))
    average = {line["baseline"]: float(line["average_rank"]) for line in lines}
    assert average == pytest.approx({"er": 4 / 3, "derpp": 23 / 12, "gem": 3, "ewc": 25 / 6, "si": 55 / 12})
    assert [float(line["rank"]) for line in lines if line["baseline"] == "derpp"] == [2.5, 1, 2, 3, 1, 2]
    plot = figures_ranks.critical_difference_diagram(select(runs))
    assert plot is not None
    for part in ("5 baselines over 6 streams", "19.25 with 4", "p = 0.0007", "CD = 2.49", "left out: lwf."):
        assert part in plot.caption
    assert "critical-difference.png" in (tmp_path / "out" / "tables" / "README.md").read_text()
    assert figures_ranks.TITLE in (tmp_path / "out" / "report.html").read_text()
    assert check(runs, built.out) == []


def test_neither_bounds_nor_results_of_other_tools_are_ranked(tmp_path: Path) -> None:
    runs = _records(tmp_path / "runs", TIED[:1])
    told = Imported(tool="a tool", file="a.log", sha256="0" * 64, scale="percent")
    make_record("stream_0", "lwf", acc=[[0.5] * 2] * 2).model_copy(update={"imported": told}).save(runs)
    assert set(ranks.scores(select(runs))["stream_0"]) == set(METHODS)


def test_too_little_has_a_note_and_no_figure(tmp_path: Path) -> None:
    runs = _records(tmp_path / "runs", TIED[:4])
    build(runs, tmp_path / "out")
    assert not list((tmp_path / "out" / "figures").glob("critical-difference*"))
    note = "of 5 baselines on 4 streams, 0 ran on 5"
    assert note in (tmp_path / "out" / "tables" / "README.md").read_text()
    assert figures_ranks.TITLE not in (tmp_path / "out" / "report.html").read_text()
