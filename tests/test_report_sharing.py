"""The ladder of sharing in reports: who is on it, its table by hand, its figures."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clbench.records import RunRecord, Sharing, TaskShare, TensorUse
from clbench.report import figures, sharing
from clbench.report.build import build, check
from clbench.report.figures_sharing import MAPS, ROWS, chosen_maps, overlap, together, write_labels
from clbench.report.select import Block, select
from clbench.report.style import looks, save
from record_factory import make_record

NET = 100


def shares(fraction: float, n_tasks: int = 3, rows: int = 2) -> Sharing:
    """Clones of a net of 100 parameters, of which a fraction is common, in `rows` tensors."""
    common = round(fraction * NET)
    own = NET - common
    used = common + n_tasks * own
    tasks = [
        TaskShare(
            task=task,
            parameters=NET,
            marginal_parameters=own if task else NET,
            marginal_bytes=4 * (own if task else NET) + 1,
        )
        for task in range(n_tasks)
    ]
    held = [
        TensorUse(name=f"trunk.fc{i}.weight", elements=common // rows, layers=["fc1"] * (1 + i), shares=[1.0] * n_tasks)
        for i in range(rows)
    ]
    return Sharing(
        parameters_used=used,
        unused=0,
        shared_by_all=common,
        shared_by_some=0,
        private=n_tasks * own,
        shared_by_all_bytes=4 * common,
        shared_by_some_bytes=0,
        private_bytes=4 * n_tasks * own,
        reuse_ratio=n_tasks * NET / used,
        in_common=common / NET,
        tasks=tasks,
        map=[
            *held,
            *(
                TensorUse(
                    name=f"task {task}'s own",
                    elements=own,
                    tensors=2,
                    layers=[],
                    shares=[float(task == other) for other in range(n_tasks)],
                )
                for task in range(n_tasks)
            ),
        ],
    )


def rung(baseline: str, fraction: float, seed: int = 0, rows: int = 2, growth: int = 0) -> RunRecord:
    record = make_record(baseline=baseline, seed=seed, parameters=NET, growth=growth)
    found = shares(fraction, rows=rows).model_copy(update={"in_common": fraction})
    return record.model_copy(update={"sharing": found})


def ladder_of(tmp_path: Path, *more: RunRecord) -> Block:
    records = (rung("finetune", 0.9), rung("er", 0.5), rung("er", 0.7, seed=1), rung("independent", 0.0), *more)
    for record in records:
        record.save(tmp_path)
    return select(tmp_path).tasks[0].blocks[0]


def test_rungs_come_with_the_most_in_common_first_and_three_make_a_ladder(tmp_path: Path) -> None:
    """Over its two seeds er has (0.5 + 0.7) / 2 = 0.6; ewc, recorded before there was sharing, has no rung."""
    block = ladder_of(tmp_path, make_record(baseline="ewc"))
    assert [group.label for group in sharing.ladder(block)] == ["finetune", "er", "independent"]
    assert sharing.ladder(Block(block.task, block.device, block.device_name, block.groups[:2])) == []


@pytest.mark.parametrize(
    ("fractions", "climbs"),
    [
        ((1.0, 1.0, 1.0, 1.0), False),
        ((1.0, 1.0, 0.0, 0.0), False),
        ((0.9, 0.5004, 0.5, 0.4996), False),
        ((0.9, 0.502, 0.5), True),
        ((1.0, 1.0, 0.5, 0.0), True),
    ],
)
def test_a_ladder_needs_three_different_shares(tmp_path: Path, fractions: tuple[float, ...], climbs: bool) -> None:
    """One net for all tasks gives every method of a domain- or class-incremental task a share of 1: no ladder.

    Of shares closer than 0.001 to the last that counted, none counts: 0.5, 0.5004 and 0.4996 are one.
    """
    for name, fraction in zip(("finetune", "er", "ewc", "independent"), fractions, strict=False):
        rung(name, fraction).save(tmp_path / "runs")
    (task,) = select(tmp_path / "runs").tasks
    assert len(sharing.ladder(task.blocks[0])) == (len(fractions) if climbs else 0)
    assert (sharing.table(task) is not None) is climbs
    names = {plot.name for plot in figures.plots(task.blocks[0], looks(["finetune", "er", "ewc", "independent"]))}
    assert ("sharing-ladder" in names) is climbs
    # A map needs no ladder, only tasks that share some and not all.
    assert ("sharing-map" in names) is any(0 < fraction < 1 for fraction in fractions)


def test_the_table_by_hand(tmp_path: Path) -> None:
    """finetune: 90 of 100 in common; 300 used in 90 + 30 = 120, ratio 2.5; each later task adds 10, 41 bytes."""
    ladder_of(tmp_path)
    table = sharing.table(select(tmp_path).tasks[0])
    assert table is not None
    assert table.header[:4] == ("Baseline", "n", "In common (%)", "Reuse")
    assert table.header[-3:] == ("Task adds", "Last adds", "Bytes added")
    assert sharing.USED in table.caption
    first, second, third = table.sections[0].rows
    # 12.5 s at the 50 000 samples a second of the made-up records.
    assert first[table.header.index("Samples")] == "625 k"
    assert first[:4] == ("finetune", "1", "90.0 (n=1)", "2.50")
    assert first[-3:] == ("10", "10", "41 B")
    # t(1) = 12.706 times a deviation of 0.1414 over sqrt(2), in percent.
    assert second[:3] == ("er", "2", "60.0 ± 127.1")
    assert third[2] == "0.0 (n=1)"
    line = next(csv.DictReader(io.StringIO(sharing.csv_text(select(tmp_path).tasks[0]))))
    assert (line["baseline"], line["in_common.mean"], line["marginal_last_bytes.mean"]) == ("finetune", "0.9", "41")
    assert line["samples.mean"] == "625000"


def test_baselines_recorded_without_sharing_are_named_under_the_ladder(tmp_path: Path) -> None:
    ladder_of(tmp_path / "some", make_record(baseline="ewc"), make_record(baseline="lwf"))
    ladder_of(tmp_path / "all")
    found = {name: sharing.table(select(tmp_path / name).tasks[0]) for name in ("some", "all")}
    said = "Left out, recorded without what their tasks share: "
    assert found["some"] is not None
    assert found["all"] is not None
    assert [line for line in found["some"].caption if line.startswith(said)] == [f"{said}ewc, lwf."]
    assert not [line for line in found["all"].caption if line.startswith(said)]


def test_a_report_has_tables_and_figures_of_the_ladder_and_checks_them(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    ladder_of(runs)
    built = build(runs, out)
    names = {str(path.relative_to(out)) for path in built.paths}
    tables = {f"tables/toy_3-sharing.{kind}" for kind in ("md", "csv", "tex")}
    drawn = {f"figures/toy_3-sharing-{what}.{kind}" for what in ("ladder", "map") for kind in ("pdf", "png", "csv")}
    assert tables | drawn <= names
    assert "toy_3-sharing.md" in (out / "tables" / "README.md").read_text()
    assert "In common (%)" in (out / "report.html").read_text()
    assert check(runs, out) == []


def test_a_report_without_a_ladder_says_nothing_of_one(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    for record in (rung("finetune", 0.9), rung("er", 0.5), make_record(baseline="ewc")):
        record.save(runs)
    built = build(runs, out)
    assert {path.stem for path in built.paths if "sharing" in path.name} == {"toy_3-sharing-map"}
    assert "toy_3-sharing.md" not in (out / "tables" / "README.md").read_text()


def test_the_figures_hold_what_the_records_say(tmp_path: Path) -> None:
    """Tasks count from 1 in figures. A task adds 10 of a net's 100: 0.1."""
    block = ladder_of(tmp_path)
    plots = {plot.name: plot for plot in figures.plots(block, looks(["finetune", "er", "independent"]))}
    steps = plots["sharing-ladder"]
    place = steps.header.index("marginal_relative.mean")
    assert [(row[0], row[1], row[place]) for row in steps.rows] == [
        ("finetune", "0.9", "0.1"), ("er", "0.6", "0.4"), ("independent", "0", "1"),
    ]  # fmt: skip
    assert sharing.USED in plots["sharing-map"].caption
    rows = plots["sharing-map"].rows
    assert rows[3] == ("finetune", "0", "trunk.fc1.weight", "45", "1", "fc1 fc1", "1", "1")
    assert rows[7] == ("finetune", "0", "task 1's own", "10", "2", "", "2", "0")
    for name in ("sharing-ladder", "sharing-map"):
        for path in save(plots[name], tmp_path / name):
            assert path.stat().st_size > 0


def drawn_points(axis: Axes) -> dict[str, list[tuple[float, float]]]:
    """Return the (x, y) of a panel's filled and of its hollow markers, from left to right."""
    marks = [line for line in axis.lines if line.get_marker() not in ("None", None, "|", "_", 2, 3)]
    found: dict[str, list[tuple[float, float]]] = {"filled": [], "hollow": []}
    for line in marks:
        kind = "hollow" if line.get_markerfacecolor() == "white" else "filled"
        found[kind] += [(x, y) for x, y in np.asarray(line.get_xydata(), dtype=float).tolist()]
    return {kind: sorted(points) for kind, points in found.items()}


def test_the_panel_of_bytes_has_those_to_answer_filled_and_those_to_go_on_hollow(tmp_path: Path) -> None:
    """Nets of 100 weights that grow by 0, 50, 100 a task have 100, 200, 300 after three: 400, 800, 1200 bytes.

    To go on takes as much again, for the optimiser: 800, 1600, 2400. Shares 90, 60, 0 %.
    """
    for name, share, growth in (("finetune", 0.9, 0), ("er", 0.6, 50), ("independent", 0.0, 100)):
        rung(name, share, growth=growth).save(tmp_path)
    block = select(tmp_path).tasks[0].blocks[0]
    plot = next(p for p in figures.plots(block, looks(["finetune", "er", "independent"])) if p.name == "sharing-ladder")
    names = ("in_common", "average_accuracy", "forgetting.chaudhry2018", "answer_bytes", "marginal_relative")
    assert plot.header == (
        "baseline",
        *(f"{name}.{end}" for name in (*names, "keep_learning_bytes") for end in ("mean", "low", "high", "n")),
    )
    columns = [plot.header.index(f"{name}.mean") for name in ("in_common", "answer_bytes", "keep_learning_bytes")]
    assert [tuple(row[column] for column in columns) for row in plot.rows] == [
        ("0.9", "400", "800"), ("0.6", "800", "1600"), ("0", "1200", "2400"),
    ]  # fmt: skip
    accuracy, forgetting, size, adds = plot.draw().axes
    assert drawn_points(size) == {
        "filled": [(0, 1200), (60, 800), (90, 400)], "hollow": [(0, 2400), (60, 1600), (90, 800)],
    }  # fmt: skip
    assert size.get_ylabel() == "bytes to answer"
    for axis, name, scale in ((accuracy, names[1], 100), (forgetting, names[2], 100), (adds, names[4], 1)):
        column = plot.header.index(f"{name}.mean")
        levels = [scale * float(row[column]) for row in reversed(plot.rows)]
        assert [y for _, y in drawn_points(axis)["filled"]] == pytest.approx(levels)
        assert drawn_points(axis)["hollow"] == []


def panel_of(tmp_path: Path, spread: float) -> tuple[str, tuple[float, float]]:
    """Return the ladder's caption and the accuracy panel's range: 90 and 70 without spread, 80 ± 2.484 spread."""
    for name, share, level, off in (("finetune", 1.0, 0.9, 0), ("er", 0.5, 0.8, spread), ("independent", 0.0, 0.7, 0)):
        for seed in (0, 1, 2):
            acc = [[level + off * (seed - 1)] * 3] * 3
            record = make_record(baseline=name, seed=seed, acc=acc, parameters=NET)
            record.model_copy(update={"sharing": shares(share)}).save(tmp_path)
    block = select(tmp_path).tasks[0].blocks[0]
    looked = looks(["finetune", "er", "independent"])
    plot = next(plot for plot in figures.plots(block, looked) if plot.name == "sharing-ladder")
    return plot.caption, plot.draw().axes[0].get_ylim()


def test_intervals_fit_into_their_panel(tmp_path: Path) -> None:
    """Seeds 5 points apart: t(2) / sqrt(3) * 5 = 12.4, so 80 goes from 67.6 to 92.4; the margin is 12 % of 20."""
    caption, found = panel_of(tmp_path, 0.05)
    assert found == pytest.approx((67.58 - 2.4, 92.42 + 2.4), abs=0.02)
    assert sharing.USED in caption
    assert "cut" not in caption


def test_an_interval_that_would_squeeze_the_rest_is_cut_and_the_caption_says_so(tmp_path: Path) -> None:
    """Seeds 15 points apart: ± 37.3. The means span 20, so the panel goes to 50 and, percent, to 102 at most."""
    caption, found = panel_of(tmp_path, 0.15)
    assert found == pytest.approx((50 - 2.4, 102), abs=0.01)
    assert "An interval that leaves its panel is cut at the edge." in caption


def test_of_many_maps_those_that_differ_are_drawn_spread_over_the_ladder(tmp_path: Path) -> None:
    """Ten rungs, ten different maps: six of them, the ends among them, and a map of 40 rows cut to the largest."""
    names = ["ewc", "si", "lwf", "agem", "gem", "derpp", "den"]
    block = ladder_of(tmp_path, *(rung(name, 0.2 + 0.09 * i, rows=40) for i, name in enumerate(names)))
    known = [(group, run, run.sharing) for group in sharing.ladder(block) for run in group.runs[:1] if run.sharing]
    drawn = [group.label for group, _, _ in chosen_maps(known)]
    assert len(drawn) == MAPS
    assert (drawn[0], drawn[-1]) == ("finetune", "independent")
    twins = [known[0], (known[1][0], known[1][1], known[0][2]), known[2]]
    assert [group.label for group, _, _ in chosen_maps(twins)] == [known[0][0].label, known[2][0].label]
    plots = {plot.name: plot for plot in figures.plots(block, looks([group.label for group in block.groups]))}
    assert f"the {ROWS} largest" in plots["sharing-map"].caption
    for name in ("sharing-ladder", "sharing-map"):
        save(plots[name], tmp_path / name)


def test_a_maps_title_has_the_number_of_the_run_that_is_drawn(tmp_path: Path) -> None:
    """Of er the runs have 50 and 70 % in common, 60 in the mean; drawn is seed 0."""
    block = ladder_of(tmp_path)
    plots = {plot.name: plot for plot in figures.plots(block, looks([group.label for group in block.groups]))}
    titles = [axis.get_title() for axis in plots["sharing-map"].draw().axes]
    assert "er: 50.0 % in common" in titles


@pytest.mark.parametrize("at", [(0.5, 0.02), (0.5, 0.98), (0.02, 0.5), (0.98, 0.5)])
def test_a_leader_is_grey_and_dotted_and_ends_at_its_text(at: tuple[float, float]) -> None:
    """Marks all around a point of the panel push its label away; the line to it meets the label's edge, not its inside.

    What looks like an interval is none: intervals are solid and have their baseline's colour.
    """
    figure = Figure((3, 3))
    axis = figure.add_axes((0.05, 0.05, 0.9, 0.9))
    axis.set(xlim=(0, 1), ylim=(0, 1))
    x, y = at
    turns, row = np.linspace(0, 2 * np.pi, 24), [(place, y) for place in np.linspace(0, 1, 30)]
    around = [(x + far * np.cos(turn), y + far * np.sin(turn)) for far in (0.04, 0.08, 0.12) for turn in turns]
    labels = write_labels(axis, {"somebody": at}, [at, *around, *row], [], looks(["somebody"]))
    (box,) = labels.values()
    (leader,) = axis.lines
    assert (leader.get_color(), leader.get_linestyle()) == ("#888888", ":")
    end = axis.transData.transform(np.asarray(leader.get_xydata())[-1]) / figure.dpi
    inner = (box[0] + 0.005, box[1] + 0.005, box[2] - 0.005, box[3] - 0.005)
    start = axis.transData.transform(at) / figure.dpi
    for share in np.linspace(0, 1, 101):
        place = start + share * (end - start)
        assert not (inner[0] < place[0] < inner[2] and inner[1] < place[1] < inner[3])
    assert box[0] - 0.01 <= end[0] <= box[2] + 0.01
    assert box[1] - 0.01 <= end[1] <= box[3] + 0.01


def test_labels_of_points_on_top_of_each_other_stand_together() -> None:
    """From right to left; 0.02 in apart is one place, 0.1 in are two."""
    points = {"a": (0.0, 0.0), "b": (1.0, 1.0), "c": (1.01, 1.02), "d": (1.0, 1.1)}
    assert together(points) == [["c", "b"], ["d"], ["a"]]


@pytest.mark.parametrize(("other", "touch"), [((1, 1, 3, 3), True), ((2, 0, 3, 2), False), ((0.5, 0.5, 1, 1), True)])
def test_boxes_touch_where_they_have_a_place_in_common(other: tuple[float, float, float, float], touch: bool) -> None:
    assert overlap((0, 0, 2, 2), other) is touch
