"""What the report makes of AUROC and growth logs: columns, table and figures, by hand, and only where there is data."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from clbench.records import GrowthEvent, RunRecord
from clbench.report import console, figures, tables
from clbench.report.build import build, check
from clbench.report.figures_growth import first_served
from clbench.report.growth import growing, over_runs
from clbench.report.measures import MEASURES, chosen
from clbench.report.select import Block, select
from clbench.report.style import looks, save
from record_factory import make_record

AREAS = [[0.9, 0.5, 0.5], [0.8, 0.9, 0.5], [0.7, 0.85, 1.0]]


def grown(seed: int = 0, added: int = 6, baseline: str = "den") -> RunRecord:
    """A layer of 10 units: in task 2 of them 8 are reused, 2 split, `added` added and 1 of these pruned; then idle."""
    width = 10 + added - 1 + 2
    return make_record(
        baseline=baseline,
        seed=seed,
        growth=100,
        events=[
            GrowthEvent(after_task=0, layer="fc1", kind="added", units=10),
            GrowthEvent(after_task=1, layer="fc1", kind="reused", units=5, born=0),
            GrowthEvent(after_task=1, layer="fc1", kind="reused", units=3, born=0),
            GrowthEvent(after_task=1, layer="fc1", kind="added", units=added),
            GrowthEvent(after_task=1, layer="fc1", kind="pruned", units=1),
            GrowthEvent(after_task=1, layer="fc1", kind="split", units=2),
        ],
        widths=[{"fc1": 10, "fc2": 4}, {"fc1": width, "fc2": 4}, {"fc1": width, "fc2": 4}],
        units=[{"fc1": [(0, 10)]}, {"fc1": [(2, 4), (10, width)]}, {"fc1": [(0, 1), (3, 12)]}],
    )


def block_of(tmp_path: Path, records: Sequence[RunRecord]) -> Block:
    for record in records:
        record.save(tmp_path)
    return select(tmp_path).tasks[0].blocks[0]


# ---------------------------------------------------------------------------------------------------------------- AUROC


def test_measures_of_the_auroc_matrix_by_hand() -> None:
    """Last row (.7 + .85 + 1) / 3 = .85; best before the end .9 and .9: forgot .2 and .05, mean .125."""
    record = make_record(auroc=AREAS)
    assert MEASURES["average_auroc"].of(record) == pytest.approx(0.85)
    assert MEASURES["auroc_forgetting"].of(record) == pytest.approx(0.125)
    assert MEASURES["average_auroc"].of(make_record()) is None


def test_the_columns_are_there_where_a_run_of_the_task_has_them(tmp_path: Path) -> None:
    """85.00 for the run that has it, a dash for the one recorded before it was asked for; in percent, two decimals."""
    block_of(tmp_path, [make_record(auroc=AREAS), make_record(baseline="er")])
    (task,) = select(tmp_path).tasks
    columns = chosen(None, task.blocks[0].runs)
    accuracy, costs = tables.tables(task, columns)
    assert accuracy.header[-2:] == ("AUROC (%)", "AUROC forgetting (%)")
    rows = {row[0]: row[-2:] for section in accuracy.sections for row in section.rows}
    assert rows == {"finetune": ("85.00 (n=1)", "12.50 (n=1)"), "er": ("-", "-")}
    assert "one-against-rest" in " ".join(accuracy.caption)
    assert not any("AUROC" in head for head in costs.header)
    line, _ = csv.DictReader(io.StringIO(tables.csv_text(task, columns)))
    assert float(line["average_auroc.mean"]) == pytest.approx(0.85)


def test_a_task_without_areas_has_no_column_of_them_in_the_same_report(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for name, auroc in (("with_3", AREAS), ("without_3", None)):
        make_record(name, auroc=auroc, peak=None).save(runs)
    built = build(runs, tmp_path / "out")
    heads = {name: (built.out / "tables" / f"{name}.csv").read_text() for name in ("with_3", "without_3")}
    assert ["average_auroc.mean" in text for text in heads.values()] == [True, False]
    assert check(runs, built.out) == []


def test_who_asks_for_a_column_gets_it() -> None:
    measures = chosen(["average_accuracy", "average_auroc"])
    assert [measure.name for measure in measures] == ["average_accuracy", "average_auroc"]
    unasked, has = chosen(None), make_record(auroc=AREAS)
    assert not {"average_auroc", "auroc_forgetting"} & {measure.name for measure in unasked}
    assert len(chosen(None, [make_record(), has])) == len(unasked) + 2


def test_the_console_shows_the_area_where_a_run_has_it() -> None:
    assert "AUROC (%)" in console.text([make_record(auroc=AREAS)])
    assert "AUROC" not in console.text([make_record()])


# --------------------------------------------------------------------------------------------------------------- growth


def test_a_layers_growth_by_hand(tmp_path: Path) -> None:
    """Two runs, 6 and 8 units added: widths 17 and 19, mean 18. Reused 8 of 10 in task 2 and none in task 3: mean .4.

    The first net's 10 units, logged as added too, are no growth: they count in their task, not in the total.
    """
    (group,) = block_of(tmp_path, [grown(0, 6), grown(1, 8)]).groups
    assert growing(group) == ["fc1", "fc2"]
    found = over_runs(group, "fc1")
    assert [value and value.mean for value in found.widths] == [10, 18, 18]
    assert [value and value.mean for value in found.counts["added"]] == [10, 7, 0]
    totals = {kind: value and value.mean for kind, value in found.totals.items()}
    assert totals == {"added": 7, "pruned": 1, "split": 2}
    assert [value and value.mean for value in found.reused] == [None, 0.8, 0]
    assert found.mean_reused is not None
    assert found.mean_reused.mean == pytest.approx(0.4)


def test_a_method_that_logs_no_reuse_has_no_share_of_it(tmp_path: Path) -> None:
    record = make_record(baseline="den", widths=[{"fc1": 4}, {"fc1": 5}, {"fc1": 6}])
    (group,) = block_of(tmp_path, [record]).groups
    assert over_runs(group, "fc1").mean_reused is None


def test_the_growth_table_has_a_row_a_layer_of_the_nets_that_grow(tmp_path: Path) -> None:
    """10 + 7 - 1 + 2 = 18 units; t(1) = 12.706 times a deviation of 1.414 over sqrt(2) gives ± 12.7."""
    block_of(tmp_path, [grown(0, 6), grown(1, 8), make_record()])
    (task,) = select(tmp_path).tasks
    *_, table = tables.tables(task, chosen(None))
    assert table.title.endswith("growth")
    assert table.sections[0].title == "expansion"
    assert table.sections[0].rows == (
        ("den", "fc1", "2", "10", "18.0 ± 12.7", "7.00 ± 12.71", "1", "2", "40.0 ± 0.0"),
        ("den", "fc2", "2", "4", "4", "0", "0", "0", "0.0 ± 0.0"),
    )


def test_the_growth_table_stars_who_departs_from_the_protocol(tmp_path: Path) -> None:
    record = grown()
    departing = record.baseline.model_copy(update={"departures": {"train.epochs": 9}})
    block_of(tmp_path, [record.model_copy(update={"baseline": departing})])
    *_, table = tables.tables(select(tmp_path).tasks[0], chosen(None))
    assert [row[0] for row in table.sections[0].rows] == ["den*", "den*"]


def test_a_task_without_growth_has_neither_table_nor_figures_of_it(tmp_path: Path) -> None:
    block = block_of(tmp_path, [make_record(), make_record(baseline="ewc")])
    (task,) = select(tmp_path).tasks
    assert [table.label for table in tables.tables(task, chosen(None))] == ["toy_3-accuracy", "toy_3-costs"]
    names = {plot.name for plot in figures.plots(block, looks(["finetune", "ewc"]))}
    assert names.isdisjoint({"units", "capacity"})
    assert not any(name.startswith("serving") for name in names)


# -------------------------------------------------------------------------------------------------------------- figures


def test_figures_of_growth_hold_what_the_records_say(tmp_path: Path) -> None:
    """The net that keeps its size is on the capacity figure, for comparison; the ranges are those of the first seed."""
    block = block_of(tmp_path, [grown(0), grown(1), make_record(seed=0)])
    plots = {plot.name: plot for plot in figures.plots(block, looks(["den", "finetune"]))}
    assert {"units", "capacity", "serving-den"} <= set(plots)
    assert [row[:4] for row in plots["units"].rows[:3]] == [
        ("den", "fc1", "1", "10"),
        ("den", "fc1", "2", "17"),
        ("den", "fc1", "3", "17"),
    ]
    assert {row[0] for row in plots["units"].rows} == {"den"}
    assert [row[:3] for row in plots["capacity"].rows] == [
        (name, str(task), str(89_610 + step * (task - 1)))
        for name, step in (("finetune", 0), ("den", 100))
        for task in (1, 2, 3)
    ]
    assert plots["serving-den"].rows == (
        ("den", "0", "fc1", "1", "0", "10"),
        ("den", "0", "fc1", "2", "2", "4"),
        ("den", "0", "fc1", "2", "10", "17"),
        ("den", "0", "fc1", "3", "0", "1"),
        ("den", "0", "fc1", "3", "3", "12"),
    )
    assert "seed 0 (n = 1)" in plots["serving-den"].caption
    for name in ("units", "capacity", "serving-den"):
        for path in save(plots[name], tmp_path / name):
            assert path.stat().st_size > 0


def test_the_colour_of_a_unit_is_the_first_task_it_serves() -> None:
    """17 units. Task 2 is served by units 2 and 3, which served task 1 before, and by 10 to 16, which are new."""
    found = first_served(grown(), "fc1")
    nan = np.nan
    expected = [
        [0] * 10 + [nan] * 7,
        [nan, nan, 0, 0, *[nan] * 6, *[1] * 7],
        [0, nan, nan, *[0] * 7, 1, 1, *[nan] * 5],
    ]
    np.testing.assert_array_equal(found, np.array(expected, dtype=float))


def test_one_task_many_layers_and_layers_of_one_method_alone_still_draw(tmp_path: Path) -> None:
    """T = 1, 15 layers (12 are drawn), and a second method whose layers have other names."""
    names = [f"layer{i}" for i in range(15)]
    many = make_record(
        baseline="den", acc=[[0.9]], widths=[dict.fromkeys(names, 3)], units=[{name: [(0, 3)] for name in names}]
    )
    other = make_record(baseline="progressive", acc=[[0.8]], widths=[{"column": 3}], units=[{"column": []}])
    block = block_of(tmp_path, [many, other])
    plots = [plot for plot in figures.plots(block, looks(["den", "progressive"])) if plot.name != "seen"]
    drawn = {plot.name: plot for plot in plots}
    assert "12 of 16 layers are drawn." in drawn["units"].caption
    assert "12 of 15 layers are drawn." in drawn["serving-den"].caption
    assert "serving-progressive" not in drawn
    for name in ("units", "capacity", "serving-den"):
        save(drawn[name], tmp_path / name)
