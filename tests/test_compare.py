"""Who is compared with whom, and what the comparison says in words, tables and files."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from clbench import cli
from clbench.errors import UserError
from clbench.record_parts import Flops, Imported
from clbench.report.compare import Compared, compare
from clbench.report.compare_table import CSV, console, table, write
from clbench.report.measures import difference
from clbench.report.stats import t_quantile
from clbench.report.writers import to_latex
from record_factory import make_record

MINE = (0.90, 0.92, 0.95)
EWC = (0.80, 0.85, 0.81)


def save(runs: Path, baseline: str, accuracies: Sequence[float], first_seed: int = 0, **others: Any) -> None:
    """Write a run of one task a seed: then the average accuracy is its one number."""
    for seed, accuracy in enumerate(accuracies, first_seed):
        make_record("toy", baseline, seed, acc=[[accuracy]], **others).save(runs)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    save(folder, "mine", MINE)
    save(folder, "ewc", EWC)
    return folder


def test_runs_of_a_seed_are_paired(runs: Path) -> None:
    """Differences 10, 7 and 14 points: mean 31 / 3, s = sqrt((1/9 + 100/9 + 121/9) / 2) = sqrt(37 / 3) = 3.511885."""
    found = compare(runs, "mine", ["ewc"], metrics=["average_accuracy"])
    (line,) = found.lines
    assert (line.found.n, line.seeds, line.family) == (3, "0-2", 1)
    assert line.found.mean == pytest.approx(0.31 / 3)
    half = t_quantile(2) * 0.03511885 / 3**0.5
    assert (line.found.low, line.found.high) == pytest.approx((0.31 / 3 - half, 0.31 / 3 + half), abs=1e-7)
    assert line.p_holm == line.found.p


def test_shuffled_seeds_are_still_paired_and_loners_are_told(runs: Path) -> None:
    save(runs, "mine", [0.1], first_seed=7)
    save(runs, "ewc", [0.2, 0.2], first_seed=8)
    found = compare(runs, "mine", ["ewc"], metrics=["average_accuracy"])
    assert found.lines[0].found.mean == pytest.approx(0.31 / 3)
    notes = table(found, found.blocks[0]).notes
    assert "mine - ewc: seed 7 of mine left out, ewc has none" in notes
    assert "mine - ewc: seeds 8-9 of ewc left out, mine has none" in notes


def test_another_device_is_no_partner(runs: Path) -> None:
    save(runs, "ewc", [0.1, 0.1, 0.1], device="cuda", device_name="Some GPU")
    found = compare(runs, "mine", ["ewc"], metrics=["average_accuracy"])
    assert len(found.lines) == 1
    assert found.lines[0].found.mean == pytest.approx(0.31 / 3)


def test_holm_is_over_the_comparisons_of_one_metric_on_all_tasks(runs: Path) -> None:
    save(runs, "si", (0.89, 0.92, 0.93))
    for seed, (one, other) in enumerate(zip(MINE, EWC, strict=True)):
        make_record("toy2", "mine", seed, acc=[[one]]).save(runs)
        make_record("toy2", "ewc", seed, acc=[[other]]).save(runs)
    found = compare(runs, "mine", ["ewc", "si"], metrics=["average_accuracy", "learning_accuracy"])
    assert len(found.lines) == 6
    assert {line.family for line in found.lines} == {3}
    on_toy = {line.pairing.second.label: line for line in found.of(found.blocks[0]) if "average" in line.measure.name}
    p = on_toy["ewc"].found.p
    assert p is not None
    assert on_toy["ewc"].p_holm == pytest.approx(3 * p)
    assert "the 3 comparisons of one metric here over 2 tasks" in console(found)


def test_costs_that_never_move_are_exact(runs: Path) -> None:
    found = compare(runs, "mine", ["ewc"], metrics=["parameters", "keep_learning_bytes", "seconds"])
    cells = {row[0]: row for section in table(found, found.blocks[0]).sections for row in section.rows}
    assert cells["Params"][5:8] == ("0", "-", "-")
    assert cells["To go on"][5:8] == ("-350 KiB", "-", "-")  # the Fisher: 89,610 elements of 4 bytes
    assert cells["Time (s)"][5] == "0.00"


def test_the_same_gain_for_every_seed_is_not_proof(runs: Path) -> None:
    save(runs, "si", [accuracy - 0.1 for accuracy in MINE])
    found = compare(runs, "mine", ["si"], metrics=["average_accuracy"])
    assert found.lines[0].found.p == 0.25
    made = table(found, found.blocks[0])
    assert made.sections[0].rows[0][5:7] == ("+10.00", "0.250*")
    assert any("the same difference for every seed has no t" in note for note in made.notes)


def test_what_seeds_cannot_tell_is_said(runs: Path) -> None:
    """Differences 1, -2 and 3 points: s = 2.516611, of which 3 seeds can detect 3.264044 times as much: 8.21 points."""
    save(runs, "si", (0.89, 0.94, 0.92))
    found = compare(runs, "mine", ["si"], metrics=["average_accuracy"])
    assert found.lines[0].found.detectable == pytest.approx(0.02516611 * 3.264044, rel=1e-4)
    said = console(found)
    assert "mine - si, ACC: not decided, the interval holds 0; 3 seeds can detect a difference of 8.2 points" in said
    assert "With 3 seeds an exact sign-flip test cannot go below 0.25" in said


def test_every_metric_says_what_its_seeds_cannot_tell_in_its_own_unit(runs: Path) -> None:
    """Seconds 10, 40 and 20 against 20 each: differences -10, 20 and 0, s = 15.275, times 3.264044: 49.86 seconds."""
    for seed, accuracy in enumerate((0.89, 0.94, 0.92)):
        slower = 1 + 0.02 * seed  # as the factory makes later seeds
        make_record("toy", "si", seed, acc=[[accuracy]], seconds=(10.0, 40.0, 20.0)[seed] / slower).save(runs)
        make_record("toy", "lwf", seed, acc=[[MINE[seed]]], seconds=20.0 / slower).save(runs)
    found = compare(runs, "si", ["mine"], metrics=["average_accuracy", "learning_accuracy"])
    said = console(found)
    assert (
        "si - mine: not decided, the interval holds 0; 3 seeds can detect a difference of 8.2 points in ACC, "
        "8.2 points in LA"
    ) in said
    said = console(compare(runs, "si", ["lwf"], metrics=["seconds"]))
    assert "si - lwf, Time: not decided, the interval holds 0; 3 seeds can detect a difference of 49.9 s" in said


def test_bca_says_that_p_and_detects_go_by_t(runs: Path) -> None:
    words = "p and Detects go by t all the same"
    for interval in ("t", "bca"):
        found = compare(runs, "mine", ["ewc"], metrics=["average_accuracy"], interval=interval)
        assert (words in console(found)) == (interval == "bca")
        assert (words in " ".join(table(found, found.blocks[0]).caption)) == (interval == "bca")


def test_one_pair_has_no_interval(runs: Path) -> None:
    save(runs, "si", [0.8])
    found = compare(runs, "mine", ["si"], metrics=["average_accuracy"])
    made = table(found, found.blocks[0])
    assert made.sections[0].rows[0][5:] == ("+10.00", "-", "-", "-")
    assert "mine - si: one pair of runs: no interval and no test" in made.notes
    assert "corrected for nothing, as nothing was tested" in console(found)


def test_seconds_are_compared_on_one_machine_alone(runs: Path) -> None:
    save(runs, "si", MINE, device_name="Another CPU")
    with pytest.raises(UserError, match="no pair of runs has seconds"):
        compare(runs, "mine", ["si"], metrics=["seconds"])
    assert compare(runs, "mine", ["ewc"], metrics=["seconds"]).lines


def test_runs_on_other_data_or_threads_are_no_partners(runs: Path) -> None:
    for seed, accuracy in enumerate(MINE):
        record = make_record("toy", "si", seed, acc=[[accuracy]])
        threaded = record.environment.model_copy(update={"threads": 4})
        record.model_copy(update={"environment": threaded}).save(runs)
        make_record("toy", "lwf", seed, acc=[[accuracy]]).model_copy(update={"data": {"synthetic": "beef"}}).save(runs)
    with pytest.raises(UserError, match=r"nothing is paired, other numbers of CPU threads \(1 against 4\)"):
        compare(runs, "mine", ["si"])
    with pytest.raises(UserError, match="nothing is paired, other data"):
        compare(runs, "mine", ["lwf"])
    found = compare(runs, "mine", ["si", "ewc"], metrics=["average_accuracy"])
    assert {line.pairing.second.label for line in found.lines} == {"ewc"}
    assert len(found.problems) == 1


def test_results_of_other_tools_are_not_paired_not_even_with_each_other(runs: Path) -> None:
    """Their seeds are numbers that whoever imported them gave: the same number says nothing."""
    told = Imported(tool="FACIL", file="acc.txt", sha256="0" * 64, scale="fraction")
    for label in ("ewc", "lwf", "si"):
        for seed, accuracy in enumerate(MINE):
            record = make_record("toy", label, seed, acc=[[accuracy]], baseline_hash="elsewhere")
            elsewhere = record.environment.model_copy(update={"device": "unknown", "device_name": ""})
            record.model_copy(update={"imported": told, "environment": elsewhere}).save(runs)
    for first, other in (("lwf", "si"), ("mine", "lwf"), ("mine", "ewc (FACIL)")):
        with pytest.raises(UserError, match="was imported from another tool: its runs share no seed"):
            compare(runs, first, [other])
    (line,) = compare(runs, "mine", ["ewc"], metrics=["average_accuracy"]).lines
    assert line.found.mean == pytest.approx(0.31 / 3)


def test_peaks_of_different_meters_are_not_compared(runs: Path) -> None:
    for seed, accuracy in enumerate(MINE):
        record = make_record("toy", "si", seed, acc=[[accuracy]])
        peaks = [{"train": record.peaks[0]["train"].model_copy(update={"meter": "profiler"})}]
        record.model_copy(update={"peaks": peaks}).save(runs)
    assert "peak_train_bytes" not in {line.measure.name for line in compare(runs, "mine", ["si"]).lines}
    assert "peak_train_bytes" in {line.measure.name for line in compare(runs, "mine", ["ewc"]).lines}


def test_optional_columns_come_where_both_have_them(runs: Path) -> None:
    save(runs, "si", MINE, auroc=[[0.9]])
    found = compare(runs, "mine", ["si"])
    assert "average_auroc" not in {line.measure.name for line in found.lines}


def test_bca_is_named_with_what_it_covers(runs: Path) -> None:
    found = compare(runs, "mine", ["ewc"], metrics=["average_accuracy"], interval="bca")
    assert found.lines[0].found.low != compare(runs, "mine", ["ewc"], metrics=["average_accuracy"]).lines[0].found.low
    assert "72% for 3" in console(found)


# ---------------------------------------------------------------------------------------------------------------- files


def test_files_are_written_the_same_every_time(runs: Path, tmp_path: Path) -> None:
    found = compare(runs, "mine", ["ewc"])
    paths = write(found, tmp_path / "out")
    assert [path.name for path in paths] == [f"toy-compare-mine.{suffix}" for suffix in ("md", "csv", "tex")]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write(compare(runs, "mine", ["ewc"]), tmp_path / "out")] == before
    with paths[1].open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(CSV)
    row = next(row for row in rows if row["metric"] == "average_accuracy")
    assert float(row["difference"]) == pytest.approx(0.31 / 3)
    assert (row["p_sign_flip"], row["interval"], row["seeds"], row["family"]) == ("0.25", "t", "0-2", "1")
    caption = paths[0].read_text()
    assert "Difference = first less other, mean over pairs of runs of the same seed" in caption
    assert "p (Holm): corrected for the 1 comparison of one metric here" in caption


def test_latex_prints_signs_and_intervals(runs: Path) -> None:
    found = compare(runs, "ewc", ["mine"], metrics=["average_accuracy"])
    assert "$-$10.33 {[}$-$19.06, $-$1.61]" in to_latex(table(found, found.blocks[0]))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0.0231, 0.0084, 0.0378, "fraction"), "+2.31 [0.84, 3.78]"),
        ((-0.0231, None, None, "fraction"), "-2.31"),
        ((0.0, -0.01, 0.01, "fraction"), "0.00 [-1.00, 1.00]"),
        ((0.0, None, None, "bytes"), "0 B"),
        ((2048.0, 1024.0, 3072.0, "bytes"), "+2.00 [1.00, 3.00] KiB"),
        ((31_457_280.0, 31_447_280.0, 31_467_280.0, "bytes"), "+30.000 [29.990, 30.010] MiB"),
        ((-1500.0, None, None, "count"), "-1.50 k"),
    ],
)
def test_a_difference_as_text(arguments: Any, text: str) -> None:
    assert difference(*arguments) == text


# ------------------------------------------------------------------------------------------------------ matched budgets


def matched(runs: Path) -> Compared:
    return compare(runs, "mine", ["ewc"], metrics=["average_accuracy", "answer_bytes"], matched="answer_bytes")


def test_matched_pairs_are_found_among_all_settings(tmp_path: Path) -> None:
    """Bytes to answer are 4 a parameter. Of 1,000, 500 against 990 and 400 only 1,000 / 990 is within 2 % of 990."""
    for label, size in (("mine", 1000), ("mine@a", 500)):
        save(tmp_path, "mine", MINE, label=label, parameters=size, baseline_hash=f"{size:012}")
    for label, size in (("ewc", 400), ("ewc@b", 990)):
        save(tmp_path, "ewc", EWC, label=label, parameters=size, baseline_hash=f"{size:012}")
    found = matched(tmp_path)
    assert {line.pairing.name for line in found.lines} == {"mine - ewc@b"}
    assert "at equal To answer" in console(found)
    (made,) = (table(found, block) for block in found.blocks)
    assert "no further than 2% apart in To answer" in " ".join(made.caption)
    assert made.label == "toy-compare-mine-answer-bytes"


def test_a_baseline_that_is_nowhere_near_is_named_beside_one_that_is(tmp_path: Path) -> None:
    save(tmp_path, "mine", MINE, parameters=1000)
    save(tmp_path, "ewc", EWC, parameters=1001)
    save(tmp_path, "si", EWC, parameters=1080)
    found = compare(tmp_path, "mine", ["ewc", "si"], metrics=["average_accuracy"], matched="answer_bytes")
    assert {line.pairing.name for line in found.lines} == {"mine - ewc"}
    assert any("si" in line and "answer_bytes is not matched" in line for line in found.problems)


def test_work_is_a_budget_and_unknown_where_it_was_not_counted(tmp_path: Path) -> None:
    """Operations of an answer 1000, 1010 and unknown: the first two are 1 % apart."""
    for label, answer in (("mine", 1000), ("ewc", 1010), ("si", None)):
        for seed, accuracy in enumerate(MINE):
            record = make_record("toy", label, seed, acc=[[accuracy - 0.01 * seed * (label == "ewc")]])
            work = [] if answer is None else [Flops(step=5, step_samples=1, steps=1, train=5, answer=answer)]
            record.model_copy(update={"flops": work}).save(tmp_path)
    found = compare(tmp_path, "mine", ["ewc", "si"], metrics=["average_accuracy"], matched="answer_flops")
    assert {line.pairing.name for line in found.lines} == {"mine - ewc"}
    assert "at equal FLOPs/answer" in console(found)
    with pytest.raises(UserError) as caught:
        compare(tmp_path, "mine", ["si"], matched="answer_flops")
    assert "answer_flops is not matched (mine 1.00 k, si unknown); to match it: clbench run" in caught.value.lines[0]


def test_nothing_matched_names_the_command_that_matches(tmp_path: Path) -> None:
    save(tmp_path, "mine", MINE, parameters=1000)
    save(tmp_path, "ewc", EWC, parameters=1021)
    with pytest.raises(UserError) as caught:
        matched(tmp_path)
    (line,) = caught.value.lines
    assert "clbench run --task toy --baseline ./mine.toml --match answer_bytes --to ewc" in line


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("compare mine ewk", "unknown baseline 'ewk'. Did you mean 'ewc'? Known: elsewhere, ewc, gpu"),
        ("compare mine joint", "'joint' has no finished run here; recorded are: elsewhere, ewc, gpu"),
        ("compare mine failed", "'failed' has no finished run here"),
        ("compare mine mine", "'mine' cannot be compared with itself"),
        ("compare mine", "compare 'mine' with what?"),
        ("compare mine ewc --task toys", "unknown task 'toys'. Did you mean 'toy'?"),
        ("compare mine ewc --metric acc", "unknown metric 'acc'"),
        ("compare mine elsewhere", "have no task in common (mine: toy; elsewhere: other)"),
        ("compare mine gpu", "share toy, but no version and device of it"),
        ("compare mine later", "nothing is paired, no seed in common (mine: 0-2; later: 5-6)"),
        ("compare mine ewc --runs nowhere", "nowhere: no such folder of records"),
        ("compare mine ewc --interval z", "invalid choice: 'z'"),
    ],
)
def test_a_mistake_is_one_line(
    runs: Path, line: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_record("other", "elsewhere", 0).save(runs)
    save(runs, "gpu", [0.1], device="cuda")
    save(runs, "later", [0.1, 0.2], first_seed=5)
    make_record("toy", "failed", 0, status="failed", error="boom").save(runs)
    monkeypatch.chdir(runs.parent)
    arguments = shlex.split(line)
    if "--runs" not in arguments:
        arguments += ["--runs", "runs"]
    try:
        code = cli.main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    assert code == 2
    assert says in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_two_settings_under_one_name_are_not_mixed(runs: Path) -> None:
    for seed in (3, 4):
        make_record("toy", "mine", seed, acc=[[0.5]], baseline_hash="another").save(runs)
    with pytest.raises(UserError, match="records of 2 settings on toy: name one of 'mine #"):
        compare(runs, "mine", ["ewc"])


def test_the_command_prints_and_writes(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_record("toy", "ewc", 3, acc=[[0.5]], status="failed", error="boom").save(runs)
    out = runs.parent / "out"
    code = cli.main(["compare", "./mine.toml", "--against", "ewc", "--runs", str(runs), "--out", str(out)])
    said = capsys.readouterr()
    assert code == 0
    assert "mine - ewc" in said.out
    assert "+10.33 [1.61, 19.06]" in said.out
    assert f"written: {out}/toy-compare-mine.md" in said.out
    assert "toy/ewc (seed 3, cpu) failed: left out" in said.err
