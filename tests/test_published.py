"""Ours beside the papers': rows, margins, patterns, what is compared and what is not, and how it is printed."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from clbench.errors import UserError
from clbench.published_row import PublishedRow
from clbench.recipes import resolve
from clbench.records import RunRecord
from clbench.report import published, reproduction
from clbench.report.figures_reproduction import LINES, LOOKS, forest
from clbench.report.published import Comparison, Row
from clbench.report.readme import BEGIN, END, Shown, update
from clbench.report.style import save
from clbench.specs import BaselineSpec, TaskSpec
from record_factory import make_record

TASK = {
    "schema": 1,
    "name": "toy_3",
    "version": 1,
    "title": "Toy",
    "source": "A paper",
    "stream": {"kind": "permuted", "dataset": "digits", "n_tasks": 2, "scenario": "domain"},
    "model": {"kind": "mlp", "hidden": [8]},
    "train": {"epochs": 1, "batch_size": 8, "optimizer": "sgd", "lr": 0.1},
}
SPREAD = {"value": 0.75, "spread": 0.01, "spread_kind": "sem", "n": 4}


def paper(**keys: object) -> PublishedRow:
    """Return a published row; what is not given is made up."""
    usual = {"source": "me2020", "metric": "average_accuracy", "value": 0.75, "where": "Table 1", "verified": "V-text"}
    return PublishedRow.model_validate({**usual, **keys})


def row(**keys: object) -> Row:
    """Return such a row with the experiment that is to meet it."""
    baseline = {"schema": 1, "name": "er", "title": "ER", "strategy": "mine:ER", "family": "replay", "paper": "A paper"}
    return Row(resolve(TaskSpec.model_validate(TASK), BaselineSpec.model_validate(baseline)), paper(**keys))


def ours(made: Row, *levels: float, digest: str | None = None, cuda: bool = False) -> list[RunRecord]:
    """Return one finished run a level, of the row's own experiment."""
    return [
        make_record(
            baseline="er",
            seed=seed,
            acc=[[level, level], [level, level]],
            task_hash=made.experiment.task.hash,
            baseline_hash=digest or made.experiment.hash,
            device="cuda" if cuda else "cpu",
            device_name="Test GPU" if cuda else "Test CPU",
        )
        for seed, level in enumerate(levels)
    ]


def compared(made: Row, *levels: float) -> Comparison:
    ((found,), _) = published.compare(ours(made, *levels), [made])
    return found


# --------------------------------------------------------------------------------------------------------------- rows


def test_a_papers_standard_error_becomes_a_deviation() -> None:
    """SEM .01 of 4 runs is a deviation of .02."""
    assert paper(**SPREAD).std == pytest.approx(0.02)
    assert paper(spread=0.02, spread_kind="std", n=4).std == 0.02
    assert paper(n=4).std is None


@pytest.mark.parametrize(
    ("keys", "margin"),
    [
        ({"value": 0.75}, 0.01),
        ({"value": 0.9964}, 0.0018),
        ({"value": 0.9999}, 0.001),
        ({"value": -0.04, "metric": "bwt.gem"}, 0.01),
        ({"value": 0.75, "spread": 0.001, "spread_kind": "std", "n": 5}, 0.01),
        ({"value": 0.8541, "spread": 0.0088, "spread_kind": "sem", "n": 30}, 0.0373),
        ({"value": 0.8541, "spread": 0.0482, "spread_kind": "std", "n": 5}, 0.05),
        ({"value": 0.75, "margin": 0.03, "margin_reason": "said so"}, 0.03),
    ],
)
def test_the_margin_is_the_rows_own_or_a_point_or_what_the_paper_can_resolve(
    keys: dict[str, object], margin: float
) -> None:
    """99.64 lacks .36 points: .18.

    The None row of the Fisher study: a deviation of .0088 sqrt(30) = .0482, times (t(.95; 29) + t(.9; 58)) sqrt(2 / 30)
    = (1.6991 + 1.2963) x .25820 = .77342, is 3.73 points. Over 5 runs it would be 10.8, more than the 5 there are.
    """
    assert published.margin_of(paper(**keys)) == pytest.approx(margin, abs=5e-5)


def test_a_row_says_how_many_seeds_it_takes() -> None:
    """Were our mean the paper's, fewer than the paper ran, whose own chance the margin makes room for, too."""
    assert 5 <= (row(spread=0.03, spread_kind="std", n=10).planned or 0) <= 10
    assert row(n=10).planned is None


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"metric": "averge_accuracy"}, "'on.toy_3.published.0.metric': unknown metric 'averge_accuracy'. Did you"),
        ({"value": 75.0}, "'on.toy_3.published.0.value': 75.0 lies outside [0, 1]; fractions, not percent"),
        ({"value": -0.1}, "lies outside [0, 1]"),
        ({"value": -1.5, "metric": "bwt.gem"}, "lies outside [-1, 1]"),
        ({"value": 9e4, "metric": "parameters"}, "'on.toy_3.published.0.margin' is missing: parameters has no usual"),
    ],
)
def test_a_row_that_its_metric_cannot_take_is_one_line_with_file_and_key(keys: dict[str, object], says: str) -> None:
    baseline = row().experiment.baseline
    on = {"toy_3": {"origin": "ours: x", "published": [paper(**keys).model_dump()]}}
    made = BaselineSpec.model_validate({**baseline.model_dump(by_alias=True), "on": on})
    (line,) = published.mistakes(made, "er.toml")
    assert line.startswith("er.toml: ")
    assert says in line


def test_what_ships_has_no_mistakes_and_says_where_it_stands() -> None:
    rows, problems = published.shipped_rows()
    assert problems == []
    assert len(rows) > 120
    nameless = {row.experiment.label for row in rows if not row.paper.source}
    assert not nameless, "give the published rows of these recipes a source (baselines/README.md)"


def test_a_source_is_one_text() -> None:
    """Rows of one source begin their `where` with the same author, so that no short name stands for two papers."""
    heads: dict[str, set[str]] = {}
    for item in published.shipped_rows()[0]:
        heads.setdefault(item.source, set()).add(re.split(r"[ ,:/]", item.paper.where)[0])
    assert all(len(head) == 1 for head in heads.values()), heads


# ------------------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("split_mnist_task/ewc", {"vandeven2018/split_mnist_task/ewc", "vandeven2019/split_mnist_task/ewc"}),
        ("vandeven2019", {f"vandeven2019/split_mnist_{name}/ewc" for name in ("task", "domain", "class")}),
        ("vandeven2019/split_mnist_task", {"vandeven2019/split_mnist_task/ewc"}),
        ("vandeven201?/split_mnist_class/ewc", {f"vandeven{year}/split_mnist_class/ewc" for year in (2018, 2019)}),
        ("hsu2018/*/finetune_sgd", {f"hsu2018/split_mnist_hsu_{n}/finetune_sgd" for n in ("task", "domain", "class")}),
        ("permuted_mnist_henning", {f"henning2021/permuted_mnist_henning/{n}" for n in ("finetune", "independent")}),
    ],
)
def test_patterns_name_rows_by_source_task_and_baseline(pattern: str, found: set[str]) -> None:
    baselines = {"ewc", "finetune", "finetune_sgd", "independent"}
    rows = [item for item in published.shipped_rows()[0] if item.experiment.baseline.name in baselines]
    assert {item.names[-1] for item in published.choose(rows, [pattern])} == found


def test_no_pattern_is_every_row_and_a_wrong_one_names_the_nearest() -> None:
    rows, _ = published.shipped_rows()
    assert published.choose(rows, []) == rows
    with pytest.raises(UserError) as caught:
        published.choose(rows, ["split_mnist_task/ewc", "vandeven2108", "split_mnist_tusk/ewc"])
    assert [line.partition("See")[0] for line in caught.value.lines] == [
        "no published row matches 'vandeven2108'. Did you mean 'vandeven2018'? ",
        "no published row matches 'split_mnist_tusk/ewc'. Did you mean 'split_mnist_task/ewc'? ",
    ]


def test_the_listing_names_every_row_by_its_source() -> None:
    rows, _ = published.shipped_rows()
    lines = published.listing(rows)
    assert len(lines) == len(rows)
    assert any(line.startswith("vandeven2025/split_mnist_task/finetune ") and "margin 0.0373" in line for line in lines)


# --------------------------------------------------------------------------------------------------------- comparisons


def test_difference_interval_and_verdict_by_hand() -> None:
    """Ours .80 .82 .84: mean .82, sd .02. Paper .75, SEM .01 of 4 runs: sd .02. Difference .07.

    u = .0004 / 3 and v = .0004 / 4 make an error of .01528; t(.975), 4.3027 for 2 degrees of freedom and 3.1824 for 3,
    is weighted 3.8226: .0584 on either side, which leaves 0 out. The margin is .02 x (t(.95; 3) + t(.9; 6)) x
    sqrt(2 / 4) = .02 x (2.3534 + 1.4398) x .70711 = .0536 but at most .05, less than the difference alone: differs.
    """
    found = compared(row(**SPREAD), 0.80, 0.82, 0.84)
    assert found.difference == pytest.approx(0.07)
    assert found.judgement.interval == pytest.approx((0.07 - 0.0584, 0.07 + 0.0584), abs=2e-4)
    assert found.row.margin == 0.05
    assert found.verdict == "differs"
    assert reproduction.verdict_text(found) == "differs by 7.00"


def test_a_gap_that_the_row_declares_leaves_the_numbers_and_takes_the_verdict() -> None:
    found = compared(row(**SPREAD, not_comparable="another net"), 0.80, 0.82, 0.84)
    assert (found.verdict, found.why_not) == ("not comparable", "another net")
    assert found.judgement.interval is not None
    assert found.judgement.seeds is None


def test_a_metric_that_our_records_lack_is_not_comparable() -> None:
    found = compared(row(metric="average_auroc", value=0.99), 0.8, 0.8)
    assert (found.ours, found.verdict, found.why_not) == (None, "not comparable", "our records do not hold AUROC")
    assert reproduction.table([found]).sections[0].rows[0][2:5] == ("-", "0", "99.00")


def test_records_of_other_settings_are_not_compared() -> None:
    made = row()
    records = [*ours(made, 0.8), *ours(made, 0.1, 0.1, digest="0" * 12)]
    ((found,), problems) = published.compare(records, [made])
    assert found.ours is not None
    assert found.ours.n == 1
    assert problems == ["toy_3/er: 2 records of other settings are not compared with papers"]
    renamed = Row(replace(made.experiment, label="er@1"), made.paper)
    assert published.compare(records, [renamed]) == ([], [])


def test_devices_and_thread_counts_stand_apart() -> None:
    """Two runs on the CPU, one there with two threads, one on a GPU: three comparisons of 2, 1 and 1 runs."""
    made = row()
    records = [*ours(made, 0.8, 0.8, 0.8), *ours(made, 0.6, cuda=True)]
    more = records[2].environment.model_copy(update={"threads": 2})
    records[2] = records[2].model_copy(update={"environment": more})
    found, _ = published.compare(records, [made])
    assert [(item.device, item.ours and item.ours.n) for item in found] == [
        ("cpu (Test CPU), 1 thread", 2),
        ("cpu (Test CPU), 2 threads", 1),
        ("cuda (Test GPU), 1 thread", 1),
    ]


# ----------------------------------------------------------------------------------------------------- table and figure


def test_the_table_says_numbers_verdict_and_reasons() -> None:
    """The interval of .70 and .72 is 12.706 x .01 wide on either side; of the paper t(.975; 3) x 1 = 3.18 points."""
    found = compared(row(**SPREAD, differs="another optimiser", finding="a bug of theirs"), 0.70, 0.72)
    (section,) = reproduction.table([found]).sections
    assert section.title == "me2020/toy_3, cpu (Test CPU), 1 thread"
    name, metric, mine, n, theirs, their_n, difference, margin, verdict, seconds = section.rows[0]
    assert (name, metric, mine, n) == ("er [1]", "ACC", "71.00 ± 12.71", "2")
    assert (theirs, their_n, margin) == ("75.00 ± 3.18", "4", "5.00")
    assert difference.startswith("-4.00 [")
    assert re.fullmatch(r"under-powered: \d+ seeds", verdict)
    assert seconds == "12.6"
    (note,) = reproduction.table([found]).notes
    said, _, why = note.partition("; open: ")
    assert said == "[1] Table 1 (V-text); known differences: another optimiser; finding: a bug of theirs"
    assert why


def test_a_row_without_a_verdict_says_how_many_seeds_are_missing() -> None:
    """Two seeds are there; the verdict names how many it takes. A run takes 12.75 s."""
    found = compared(row(**SPREAD), 0.70, 0.72)
    assert found.judgement.seeds is not None
    missing = found.judgement.seeds - 2
    hours = f"{missing * 12.75 / 3600:.2g}"
    said = f"open: {missing} more of our seeds, some {hours} hours as ours were run, would probably decide"
    assert reproduction.open_text(found) == said


def test_a_row_that_no_seeds_decide_says_what_its_source_leaves_open() -> None:
    """One run of a source, taken to scatter as ours do, whose deviation is sqrt((.04^2 + .02^2 + .06^2) / 2) = .052915.

    Our mean known for certain, 1.6449 of these are left, 8.70 points, on either side of -1: more than 1 point. At 95 %
    it is 1.9600 of them, 10.37 points: 0 is not left out.
    """
    found = compared(row(), 0.70, 0.72, 0.80)
    assert found.left_open == pytest.approx((1.6449 * 0.052915, 1.9600 * 0.052915), rel=1e-3)
    assert reproduction.open_text(found) == (
        "open: no number of our seeds decides; the source's 1 run (it says no number), were they to scatter as ours "
        "do, alone leave its number uncertain by 8.70 at 90 % and 10.37 at 95 %, beside a difference of 1.00 and a "
        "margin of 1.00"
    )


def test_other_rows_without_a_verdict_say_what_is_true_of_them() -> None:
    """One run without any spread; so many seeds as decide in 80 % of the cases; more than are counted.

    The last two: a deviation of 5 points over our runs, the difference a fifth of the margin, a source that scatters
    by a hundredth of that. Each of our runs helps; .1 point takes (1.64 x 5 / .1)^2 of them, and more.
    """
    assert "a second says how many it takes" in reproduction.open_text(compared(row(), 0.70))
    exact = {"spread": 0.0005, "spread_kind": "std", "n": 20, "margin_reason": "ours: for the test"}
    wide = compared(row(**exact, margin=0.001), 0.7002, 0.8002)
    assert reproduction.open_text(wide) == "open: it would take more than 1,000 of our seeds"
    near = compared(row(**exact, margin=0.02), 0.74, 0.76, 0.75, 0.77, 0.73, 0.74, 0.76, 0.75, 0.77, 0.79)
    enough = replace(near.judgement, verdict="under-powered", seeds=7)
    near.__dict__["judgement"] = enough
    said = "open: 7 seeds decide in 80 % of the cases, and ours did not: some more would"
    assert reproduction.open_text(near) == said


def test_where_few_seeds_would_decide_it_is_they_that_are_told() -> None:
    """At the limit, 3.49 and t(.95; 1) .42 / sqrt(2) = 1.88 points are above 5.258, and 3.77 at 95 % take in 0.

    Means of few runs lie apart from that difference, mostly on one side of it or the other, where a verdict is passed.
    """
    paper = row(spread=0.0042, spread_kind="std", n=2, margin=0.05258, margin_reason="ours: for the test")
    found = compared(paper, 0.7617, 0.7849, 0.8081)
    assert found.left_open is not None
    assert found.judgement.seeds == 7
    assert reproduction.open_text(found).startswith("open: 4 more of our seeds")


def test_a_row_with_a_verdict_is_not_open() -> None:
    assert reproduction.open_text(compared(row(), 0.75, 0.751)) == ""
    assert reproduction.open_text(compared(row(not_comparable="another net"), 0.7, 0.8)) == ""


def test_a_margin_of_the_rows_own_is_explained_and_a_missing_n_shown() -> None:
    found = compared(row(margin=0.02, margin_reason="ours: two decimals"), 0.75, 0.75)
    table = reproduction.table([found])
    assert table.sections[0].rows[0][4:9] == ("75.00", "?", "+0.00 [0.00, 0.00]", "2.00", "reproduced")
    assert "margin: ours: two decimals" in table.notes[0]


def test_the_csv_holds_everything_in_full() -> None:
    found = compared(row(**SPREAD), 0.80, 0.82, 0.84)
    (line,) = csv.DictReader(io.StringIO(reproduction.csv_text([found])))
    assert (line["source"], line["verdict"], line["paper.std"]) == ("me2020", "differs", "0.02")
    assert float(line["difference"]) == pytest.approx(0.07)
    assert float(line["difference.high"]) == pytest.approx(0.1284, abs=2e-4)
    assert line["seconds_per_seed"] == "12.75"


def test_sections_are_sources_tasks_and_devices_in_order() -> None:
    made = [row(source="b2020"), row(source="a2020"), row(source="")]
    found, _ = published.compare(ours(made[0], 0.8, 0.8), made)
    titles = [section.title.partition(",")[0] for section in reproduction.table(found).sections]
    assert titles == ["a2020/toy_3", "b2020/toy_3", "-/toy_3"]


def test_the_forest_plot_draws_every_verdict_in_one_panel_or_two(tmp_path: Path) -> None:
    levels = {"reproduced": (0.75, 0.751), "differs": (0.85, 0.851), "under-powered": (0.70, 0.80)}
    items = [compared(row(), *pair) for pair in levels.values()]
    items.append(compared(row(not_comparable="another net"), 0.8, 0.8))
    assert [item.verdict for item in items] == list(LOOKS)
    plot = forest(items)
    assert [line[-1] for line in plot.rows] == list(LOOKS)
    assert plot.stem("reproduction") == "reproduction"
    assert len(plot.draw().axes) == 1
    many = [compared(row(source=f"me{year}"), 0.75, 0.76) for year in range(LINES // 2 + 1)]
    assert len(forest(many).draw().axes) == 2
    assert all(path.stat().st_size > 0 for path in save(plot, tmp_path / "one"))
    costs = compared(row(metric="parameters", value=9e4, margin=1e3, margin_reason="said so"), 0.8, 0.8)
    assert forest([costs]).rows == ()


def test_markers_of_verdicts_differ_without_colour() -> None:
    assert len({(marker, filled) for marker, _, filled in LOOKS.values()}) == len(LOOKS)


# ------------------------------------------------------------------------------------------------------------- readmes


def shown(*comparisons: Comparison) -> Shown:
    """Return what a README can show of two tasks and some comparisons."""
    sections = {name: f"### {name}\n\n![x](results/figures/{name}.png)\n" for name in ("one", "two")}
    lines = {name: f"- {name}: [a](results/{name}.md)" for name in sections}
    return Shown(Path("results"), sections, lines, comparisons)


def readme(folder: Path, *lines: str) -> Path:
    path = folder / "README.md"
    path.write_text("\n".join([*lines, ""]))
    return path


def test_a_readme_shows_the_tasks_it_names_and_lists_the_others(tmp_path: Path) -> None:
    path = readme(tmp_path, "head", "<!-- results:begin two -->", "old", "<!-- results:end -->", "tail")
    made = replace(shown(), out=tmp_path / "results")
    assert update(path, made)
    assert path.read_text().splitlines() == [
        "head", "<!-- results:begin two -->", "### two", "", "![x](results/figures/two.png)", "", "### More", "",
        "- one: [a](results/one.md)", "<!-- results:end -->", "tail",
    ]  # fmt: skip
    assert not update(path, made)


def test_a_readme_shows_what_reproduce_prints(tmp_path: Path) -> None:
    """Word for word, and only the rows that the pattern chooses."""
    mine = compared(row(**SPREAD), 0.74, 0.75, 0.76)
    other = compared(row(source="you2021", **SPREAD), 0.6, 0.61, 0.62)
    begin = "<!-- reproduce:begin me2020/toy_3 -->"
    path = readme(tmp_path, BEGIN, END, begin, "<!-- reproduce:end -->")
    update(path, shown(mine, other))
    between = path.read_text().partition(begin)[2].partition("<!-- reproduce:end -->")[0]
    assert between == f"\n```text\n{reproduction.console([mine])}\n```\n"


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["nothing"], "needs one line"),
        ([BEGIN, END, BEGIN, END], "needs one line"),
        ([END, BEGIN], "needs one line"),
        ([BEGIN, "<!-- reproduce:end -->"], "needs one line"),
        (["<!-- results:begin tow -->", END], "Did you mean 'two'"),
        ([BEGIN, END, "<!-- reproduce:begin mee2020 -->", "<!-- reproduce:end -->"], "row matches 'mee2020'"),
    ],
)
def test_markers_that_do_not_fit_are_one_line_and_the_file_stays(tmp_path: Path, lines: list[str], says: str) -> None:
    path = readme(tmp_path, *lines)
    before = path.read_text()
    with pytest.raises(UserError, match=says):
        update(path, shown(compared(row(**SPREAD), 0.74, 0.75)))
    assert path.read_text() == before
