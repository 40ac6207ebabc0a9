"""The report on made-up records: numbers by hand, what stands apart, what is starred, what goes stale."""

from __future__ import annotations

import csv
import io
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from fontTools.ttLib import TTFont
from matplotlib.font_manager import FontProperties, findfont

from clbench.errors import UserError
from clbench.records import RunRecord
from clbench.report import console, figures, fonts, measures, stats, tables, writers
from clbench.report.build import Built, build, check
from clbench.report.front import pareto
from clbench.report.readme import BEGIN, END, update
from clbench.report.select import select
from clbench.report.style import looks, save
from record_factory import make_record

THREE = (0, 1, 2)


def flat(level: float) -> list[list[float]]:
    return [[level, level], [level, level]]


def saved(runs: Path, records: Sequence[RunRecord]) -> Path:
    for record in records:
        record.save(runs)
    return runs


# ----------------------------------------------------------------------------------------------------------- statistics


def test_the_interval_is_students_not_the_normal_one() -> None:
    """1, 2, 3: mean 2, deviation 1, t(2) = 4.303, half-width 4.303 / sqrt(3) = 2.484 (1.96 would say 1.132)."""
    found = stats.estimate([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.mean, found.std, found.n) == (2.0, 1.0, 3)
    assert found.half == pytest.approx(2.4841, abs=1e-4)
    assert found.low == pytest.approx(-0.4841, abs=1e-4)


def test_one_run_has_no_interval_and_none_has_no_estimate() -> None:
    one = stats.estimate([0.5, None, math.nan])
    assert one == stats.Estimate(0.5, None, 1)
    assert one.half is None
    assert stats.estimate([None, math.nan]) is None


def test_equal_runs_have_exactly_no_spread() -> None:
    """0.1 + 0.1 + 0.1 is not 0.3 in floating point; the deviation of three equal numbers is 0 all the same."""
    assert stats.estimate([0.1, 0.1, 0.1]) == stats.Estimate(0.1, 0.0, 3)


# ---------------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize(
    ("value", "unit", "runs", "text"),
    [
        (stats.Estimate(0.7234, 0.01, 3), "fraction", 3, "72.3 ± 2.5"),
        (stats.Estimate(0.7234, None, 1), "fraction", 1, "72.3 (n=1)"),
        (stats.Estimate(0.7234, 0.01, 3), "fraction", 5, "72.3 ± 2.5 (n=3)"),
        (stats.Estimate(-0.0004, 0.0, 3), "fraction", 3, "0.0 ± 0.0"),
        (stats.Estimate(89_610.0, 0.0, 3), "count", 3, "89.6 k"),
        (stats.Estimate(999.0, 0.0, 3), "count", 3, "999"),
        (stats.Estimate(0.0, 0.0, 3), "bytes", 3, "0 B"),
        (stats.Estimate(1.5 * 2**20, 2**17, 3), "bytes", 3, "1.50 ± 0.31 MiB"),
        (stats.Estimate(10.0, 0.0, 3), "ratio", 3, "10.0"),
        (stats.Estimate(15.3, None, 1), "seconds", 1, "15.3 (n=1)"),
        (None, "fraction", 3, "-"),
    ],
)
def test_cells_say_mean_interval_and_n(
    value: stats.Estimate | None, unit: measures.Unit, runs: int, text: str
) -> None:
    """t(2) / sqrt(3) = 2.484: a deviation of .01 gives ± 2.5 points, one of 1/8 MiB gives ± .31 MiB."""
    assert measures.shown(value, unit, runs) == text


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^unknown metric 'acc'. Did you mean 'average_accuracy'\?$"):
        measures.chosen(["acc"])  # as its column is headed
    with pytest.raises(UserError, match=r"Did you mean 'forgetting\.chaudhry2018'"):
        measures.chosen(["forgetting.chaudhry"])


# ---------------------------------------------------------------------------------------------------- what is averaged


def test_devices_are_never_averaged_together(tmp_path: Path) -> None:
    """0.8 and 0.8 on the CPU, 0.6 on a GPU: rows of 80 (n=2) and 60 (n=1), never 73."""
    records = [make_record(seed=seed, acc=flat(0.8)) for seed in (0, 1)]
    records.append(make_record(seed=0, acc=flat(0.6), device="cuda", device_name="Test GPU"))
    (task,) = select(saved(tmp_path, records)).tasks
    assert [block.slug for block in task.blocks] == ["cpu", "cuda"]
    table = tables.tables(task, measures.chosen(["average_accuracy"]))[0]
    assert [section.rows for section in table.sections] == [
        (("finetune", "2", "80.0 ± 0.0"),),
        (("finetune", "1", "60.0 (n=1)"),),
    ]
    assert "cuda (Test GPU)" in table.sections[1].title


def test_processors_are_one_device_but_their_seconds_are_not_averaged(tmp_path: Path) -> None:
    """0.8, 0.8 and 0.5 on two processors: (0.8 + 0.8 + 0.5) / 3 = 70 %. Of their seconds there is no mean."""
    records = [make_record(seed=seed, acc=flat(0.8), device_name="One") for seed in (0, 1)]
    records.append(make_record(seed=2, acc=flat(0.5), device_name="Another"))
    records += [make_record(baseline="joint", seed=seed, device_name="One") for seed in (0, 1)]
    (task,) = select(saved(tmp_path, records)).tasks
    (block,) = task.blocks
    assert (block.slug, block.where) == ("", "cpu (Another; One)")
    found = tables.tables(task, measures.chosen(["average_accuracy", "seconds"]))
    accuracy, costs = ({row[0]: row[1:] for row in table.sections[0].rows} for table in found)
    assert accuracy["finetune"][0] == "3"
    assert accuracy["finetune"][1].startswith("70.0")
    assert costs["finetune"] == ("3", measures.EMPTY)
    assert costs["joint"][1] != measures.EMPTY
    header, *lines = csv.reader(io.StringIO(tables.csv_text(task, measures.chosen(["seconds"]))))
    names = {line[header.index("baseline")]: line[header.index("device_name")] for line in lines}
    assert names == {"finetune": "Another; One", "joint": "One"}


def test_models_of_gpu_are_devices(tmp_path: Path) -> None:
    records = [
        make_record(seed=seed, device="cuda", device_name=name) for seed, name in enumerate(("Test GPU", "Other GPU"))
    ]
    (task,) = select(saved(tmp_path, records)).tasks
    assert [block.slug for block in task.blocks] == ["other-gpu", "test-gpu"]


def test_versions_of_a_task_stand_apart_with_a_note(tmp_path: Path) -> None:
    records = [make_record(seed=0), make_record(seed=1, version=2, task_hash="f" * 12)]
    (task,) = select(saved(tmp_path, records)).tasks
    assert [block.slug for block in task.blocks] == ["v1", "v2"]
    assert "2 protocols" in task.notes[0]
    assert "version 2 (ffffffffffff)" in task.notes[0]


def test_settings_of_a_baseline_stand_apart_with_a_note(tmp_path: Path) -> None:
    records = [make_record(seed=0), make_record(seed=1, baseline_hash="abcdef012345")]
    (task,) = select(saved(tmp_path, records)).tasks
    assert [group.label for group in task.blocks[0].groups] == ["finetune #abcdef", "finetune #ba9876"]
    assert "2 different settings" in task.notes[0]


def test_baselines_are_grouped_by_family(tmp_path: Path) -> None:
    names = ("er", "mine", "ewc", "joint", "finetune")
    (task,) = select(saved(tmp_path, [make_record(baseline=name) for name in names])).tasks
    sections = tables.tables(task, measures.chosen(None))[0].sections
    assert [section.title for section in sections] == ["bounds", "regularisation", "replay", "other"]
    assert [row[0] for row in sections[0].rows] == ["finetune", "joint"]


def test_departures_are_starred_and_overrides_explained(tmp_path: Path) -> None:
    records = [
        make_record(baseline="lwf", departures={"train.epochs": 10, "model.hidden": [8]}),
        make_record(baseline="ewc", settings={"lam": 3}),
        make_record(baseline="ewc", label="ewc@12345678", settings={"lam": 100}),
    ]
    (task,) = select(saved(tmp_path, records)).tasks
    table = tables.tables(task, measures.chosen(None))[0]
    assert [row[0] for row in table.sections[0].rows] == ["ewc", "ewc@12345678", "lwf*"]
    assert "lwf*: train.epochs 10 (protocol: 5), model.hidden [8]" in table.notes
    assert "ewc@12345678: lam 100 (ewc: 3)" in table.notes
    assert "* departs" in " ".join(table.caption)


def test_csv_holds_every_statistic_in_full(tmp_path: Path) -> None:
    """ACC .8 and .6: mean .7, deviation .1414, half-width 12.706 x .1 = 1.2706; stored weights raw, not "89.6 k"."""
    records = [make_record(seed=seed, acc=flat(level)) for seed, level in ((0, 0.8), (1, 0.6))]
    (task,) = select(saved(tmp_path, records)).tasks
    text = tables.csv_text(task, measures.chosen(None))
    (line,) = csv.DictReader(io.StringIO(text))
    assert float(line["average_accuracy.mean"]) == pytest.approx(0.7)
    assert float(line["average_accuracy.high"]) == pytest.approx(0.7 + 1.27062, abs=1e-5)
    assert line["average_accuracy.n"] == "2"
    assert line["parameters.mean"] == "89610"
    assert line["seeds"] == "0-1"


def test_peak_memory_that_was_not_measured_is_empty_not_zero(tmp_path: Path) -> None:
    (task,) = select(saved(tmp_path, [make_record(peak=None)])).tasks
    table = tables.tables(task, measures.chosen(["peak_train_bytes"]))[0]
    assert table.sections[0].rows[0][2] == "-"
    (line,) = csv.DictReader(io.StringIO(tables.csv_text(task, measures.chosen(["peak_train_bytes"]))))
    assert line["peak_train_bytes.mean"] == ""


# -------------------------------------------------------------------------------------------------------------- writers


def test_latex_escapes_what_users_name() -> None:
    assert writers.tex("a_b & 50 % #1 < 2, -3.5 ± 1") == r"a\_b \& 50 \% \#1 $<$ 2, $-$3.5 $\pm$ 1"
    assert writers.tex("Student-t, seeds 0-2") == "Student-t, seeds 0-2"


def test_latex_is_a_booktabs_table(tmp_path: Path) -> None:
    (task,) = select(saved(tmp_path, [make_record("my_task", seed=seed) for seed in THREE])).tasks
    text = writers.to_latex(tables.tables(task, measures.chosen(None))[0])
    for part in (r"\toprule", r"\bottomrule", r"\label{tab:my_task-accuracy}", r"seeds 0-2", r"$\pm$", "Chaudhry"):
        assert part in text
    assert text.count("{") == text.count("}")
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    assert {line.count("&") for line in body.splitlines() if " & " in line} == {7}


def test_markdown_rows_have_as_many_cells_as_the_head(tmp_path: Path) -> None:
    record = make_record(label="odd|name*")
    (task,) = select(saved(tmp_path, [record])).tasks
    lines = writers.grid(tables.tables(task, measures.chosen(None))[1]).splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {12}


# -------------------------------------------------------------------------------------------------- bad input, failures


def test_failed_and_damaged_runs_are_named_and_the_rest_is_reported(tmp_path: Path) -> None:
    saved(tmp_path, [make_record(), make_record(baseline="er", status="failed", error="MemoryError: too big")])
    (tmp_path / "toy_3" / "finetune" / "seed9-cpu.json").write_text('{"schema')
    selection = select(tmp_path)
    assert selection.problems[0] == "toy_3/er (seed 0, cpu) failed: MemoryError: too big"
    assert selection.problems[1].startswith("toy_3/finetune/seed9-cpu.json: damaged record")
    assert [group.label for group in selection.tasks[0].blocks[0].groups] == ["finetune"]


def test_wrong_names_are_all_told_at_once(tmp_path: Path) -> None:
    saved(tmp_path, [make_record()])
    with pytest.raises(UserError) as caught:
        select(tmp_path, tasks=["toy3"], baselines=["fine"])
    assert [line.split(".")[0] for line in caught.value.lines] == ["unknown task 'toy3'", "unknown baseline 'fine'"]
    assert "'toy_3'" in caught.value.lines[0]


def test_nothing_to_report_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        build(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="no finished run"):
        build(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written_is_a_users_mistake(tmp_path: Path) -> None:
    runs = saved(tmp_path / "runs", [make_record()])
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be written"):
        build(runs, tmp_path / "file")


# ----------------------------------------------------------------------------------------------------- build and check


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Built]:
    runs = tmp_path_factory.mktemp("report") / "runs"
    names = ("finetune", "joint", "er")
    records = [make_record(baseline=name, seed=seed) for name in names for seed in THREE]
    saved(runs, [*records, make_record(baseline="ewc", status="failed", error="RuntimeError: <b>bad</b> loss")])
    return runs, build(runs, runs.parent / "results")


def test_build_writes_tables_figures_and_page(made: tuple[Path, Built]) -> None:
    _, built = made
    names = {path.relative_to(built.out).as_posix() for path in built.paths}
    assert {f"tables/toy_3.{suffix}" for suffix in ("md", "csv", "tex")} <= names
    drawn = ("seen", "per-task", "matrix", "forgetting", "parameters", "accuracy-bytes", "accuracy-time", "peak-memory")
    for figure in drawn:
        assert {f"figures/toy_3-{figure}.{suffix}" for suffix in ("pdf", "png", "csv")} <= names
    assert all(path.is_file() and path.stat().st_size > 0 for path in built.paths)
    assert built.problems == ("toy_3/ewc (seed 0, cpu) failed: RuntimeError: <b>bad</b> loss",)


def test_the_page_is_one_file_that_asks_for_nothing(made: tuple[Path, Built]) -> None:
    page = (made[1].out / "report.html").read_text()
    assert page.count("<figure ") == page.count('<svg viewBox="') == 10
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "default-src 'none'" in page
    assert "&lt;b&gt;bad&lt;/b&gt;" in page
    assert "prefers-color-scheme: dark" in page


def test_a_fresh_report_is_not_stale(made: tuple[Path, Built]) -> None:
    runs, built = made
    assert check(runs, built.out) == []


def test_check_names_stale_missing_and_orphaned_files(made: tuple[Path, Built], tmp_path: Path) -> None:
    runs, built = made
    out = tmp_path / "results"
    for path in built.paths:
        target = out / path.relative_to(built.out)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    table = out / "tables" / "toy_3.md"
    table.write_text(table.read_text().replace("±", "+-"))
    (out / "figures" / "toy_3-seen.pdf").unlink()
    (out / "figures" / "old_task-seen.png").write_bytes(b"")
    data = out / "figures" / "toy_3-matrix.csv"
    data.write_text(data.read_text() + "\n")
    found = [line.removeprefix(f"{out}/") for line in check(runs, out)]
    assert found == [
        "figures/toy_3-matrix.csv: stale",
        "figures/toy_3-seen.pdf: missing",
        "tables/toy_3.md: stale",
        "figures/old_task-seen.png: orphaned, no record makes it",
    ]


def test_the_readme_block_is_replaced_and_checked(made: tuple[Path, Built], tmp_path: Path) -> None:
    runs, built = made
    readme = built.out.parent / "README.md"
    readme.write_text(f"# Mine\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert check(runs, built.out, readme) == [f"{readme}: the parts that a report writes are stale"]
    assert update(readme, built.shown)
    text = readme.read_text()
    assert text.startswith(f"# Mine\n\n{BEGIN}\n### Toy 3")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "(results/figures/toy_3-seen.png)" in text
    assert check(runs, built.out, readme) == []
    assert not update(readme, built.shown)
    bare = tmp_path / "README.md"
    bare.write_text("no markers")
    with pytest.raises(UserError, match="results:begin"):
        update(bare, built.shown)


def test_links_of_a_readme_elsewhere_are_relative_to_it(made: tuple[Path, Built]) -> None:
    _, built = made
    readme = built.out.parent / "docs" / "page.md"
    readme.parent.mkdir()
    readme.write_text(f"{BEGIN}\n{END}\n")
    update(readme, built.shown)
    assert "(../results/figures/toy_3-seen.png)" in readme.read_text()


# -------------------------------------------------------------------------------------------------------------- figures


def test_the_fonts_of_figures_hold_what_captions_and_axes_say_and_little_else() -> None:
    """The cut font has Latin letters and the signs of axes, and the widths of the whole one."""
    assert fonts.family() == [fonts.CUT, fonts.WHOLE]
    cut, whole = (TTFont(findfont(FontProperties(family=name))) for name in (fonts.CUT, fonts.WHOLE))
    letters = cut.getBestCmap()
    assert all(ord(sign) in letters for sign in "aZ09 ±→≤≥…é\N{MINUS SIGN}\N{MULTIPLICATION SIGN}")
    assert 0x0416 not in letters  # a Cyrillic letter: from the whole font
    assert not {"GSUB", "GPOS"} & set(cut.keys())
    advance = {font: [font["hmtx"][font.getBestCmap()[ord(sign)]][0] for sign in "aZ±"] for font in (cut, whole)}
    assert advance[cut] == advance[whole]


def test_figures_come_out_the_same_twice(made: tuple[Path, Built], tmp_path: Path) -> None:
    runs, built = made
    selection = select(runs)
    block = selection.tasks[0].blocks[0]
    plot = figures.plots(block, looks(selection.labels))[0]
    for path in save(plot, tmp_path / "again"):
        assert path.read_bytes() == (built.out / "figures" / f"toy_3-seen{path.suffix}").read_bytes()
    # Type 3 fonts, which many publishers refuse, are what matplotlib embeds by default.
    assert b"/Type3" not in (tmp_path / "again.pdf").read_bytes()


def test_one_task_and_one_run_still_draw(tmp_path: Path) -> None:
    """T = 1 has no forgetting to draw; everything else is a single point."""
    record = make_record(acc=[[0.9]], acc_init=[0.1], peak=None)
    selection = select(saved(tmp_path / "runs", [record]))
    plots = figures.plots(selection.tasks[0].blocks[0], looks(selection.labels))
    assert {plot.name for plot in plots}.isdisjoint({"forgetting", "peak-memory"})
    for plot in plots:
        save(plot, tmp_path / plot.name)


def test_looks_tell_twenty_baselines_apart_and_trying_a_variant_moves_none() -> None:
    names = [f"method{i}" for i in range(20)] + ["finetune", "joint"]
    before = looks(names)
    assert len(set(before.values())) == len(names)
    after = looks([*names, "method3@12345678"])
    assert all(after[name] == before[name] for name in names)


def test_the_pareto_front_keeps_what_nothing_beats() -> None:
    """(cost, gain): cheap (1, .5) and dear (9, .9) stay, (5, .4) is beaten by cheap, (9, .8) by dear; a twin stays."""
    points = {"cheap": (1.0, 0.5), "bad": (5.0, 0.4), "dear": (9.0, 0.9), "worse": (9.0, 0.8), "twin": (1.0, 0.5)}
    assert pareto(points) == {"cheap", "dear", "twin"}


# -------------------------------------------------------------------------------------------------------------- console


def test_the_console_prints_a_line_a_baseline_and_names_what_failed() -> None:
    records = [make_record(seed=seed, acc=flat(0.8)) for seed in THREE]
    records.append(make_record(baseline="er", status="failed", error="ValueError: no"))
    text = console.text(records)
    assert re.search(r"finetune +3 +80\.0 ± 0\.0 +0\.0 ± 0\.0 +1\.00 +350 KiB +700 KiB", text)
    assert text.splitlines()[-1] == "failed: toy_3 er seed 0 (ValueError: no)"


# -------------------------------------------------------------------------------------------------------------- imports


def test_the_report_needs_neither_torch_nor_avalanche() -> None:
    code = (
        "import sys, pkgutil, importlib, clbench.report as r\n"
        "[importlib.import_module(m.name) for m in pkgutil.iter_modules(r.__path__, 'clbench.report.')]\n"
        "print([m for m in ('torch', 'avalanche', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
