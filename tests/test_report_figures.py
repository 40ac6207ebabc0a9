"""Figures of one task: their numbers by hand, what is absent is not drawn, names that do not cover each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from clbench.metrics import average_accuracy, forgetting_first_minus_last, learning_accuracy
from clbench.record_parts import Flops
from clbench.records import Footprint, GrowthEvent, Peak, RunRecord, Sharing, TaskShare, TensorUse
from clbench.report import figures
from clbench.report.end_labels import LINE, end_labels, spread
from clbench.report.figures_costs import peak_memory
from clbench.report.figures_growth import growth_events
from clbench.report.figures_marginal import marginal_parameters
from clbench.report.figures_plasticity import joint_reference, stability_plasticity
from clbench.report.figures_sharing import sharing_map
from clbench.report.figures_trade import accuracy_against_bytes, accuracy_against_flops, accuracy_against_time
from clbench.report.front import area_under_front
from clbench.report.select import Block, select
from clbench.report.style import _RC, Plot, looks, save, sheet
from record_factory import make_record


def block_of(folder: Path, records: Sequence[RunRecord]) -> Block:
    for record in records:
        record.save(folder)
    return select(folder).tasks[0].blocks[0]


def named(block: Block) -> dict[str, Plot]:
    return {plot.name: plot for plot in figures.plots(block, looks([group.label for group in block.groups]))}


def table(plot: Plot) -> list[dict[str, str]]:
    return [dict(zip(plot.header, row, strict=True)) for row in plot.rows]


# ------------------------------------------------------------------------------------------------ area under the front


@pytest.mark.parametrize(
    ("points", "area"),
    [
        # One doubling at 0.5, one at 0.8, none after the last point: (0.5 + 0.8) / 2.
        ([(1, 0.5), (2, 0.8), (4, 0.9)], 0.65),
        # Three doublings: 0.5 for one, 0.8 for two; what is beaten changes nothing.
        ([(1, 0.5), (2, 0.8), (4, 0.3), (8, 0.7)], (0.5 + 2 * 0.8) / 3),
        # Two of one cost: the better counts from there.
        ([(1, 0.2), (1, 0.6), (10, 0.9)], 0.6),
        # In other units of cost the same.
        ([(1024, 0.5), (2048, 0.8), (4096, 0.9)], 0.65),
        # No range, no mean over it.
        ([(3, 0.5), (3, 0.7)], None),
        ([], None),
    ],
)
def test_the_area_under_the_front_by_hand(points: list[tuple[float, float]], area: float | None) -> None:
    found = area_under_front(points)
    assert found == (None if area is None else pytest.approx(area))


def test_the_area_is_the_mean_of_the_best_over_log_budgets() -> None:
    """Against a plain sum over 200 000 budgets."""
    rng = np.random.default_rng(0)
    costs, gains = np.exp(rng.uniform(0, 5, 12)), rng.uniform(0.2, 1, 12)
    low, high = np.log(costs.min()), np.log(costs.max())
    budgets = np.exp(low + (np.arange(200_000) + 0.5) / 200_000 * (high - low))
    best = np.array([gains[costs <= budget].max() for budget in budgets[::100]])
    found = area_under_front(list(zip(costs.tolist(), gains.tolist(), strict=True)))
    assert found == pytest.approx(float(best.mean()), abs=1e-3)


def sized(baseline: str, answer: int, keep: int, level: float, seed: int = 0) -> RunRecord:
    """A run that takes `answer` and `keep` bytes; task 1 at `level`, then both tasks at `level`: ACC = AIA = level."""
    record = make_record(baseline=baseline, seed=seed, acc=[[level, 0.1], [level, level]])
    kept = [
        Footprint.model_validate(
            {**found.model_dump(), "answer_bytes": answer, "keep_learning_bytes": keep}
        )
        for found in record.footprints
    ]  # fmt: skip
    return record.model_copy(update={"footprints": kept})


def test_both_memories_have_a_front_and_an_area_of_their_own(tmp_path: Path) -> None:
    """To answer: ewc 1 KiB .5, er 2 KiB .8, den 4 KiB .9, so .65 as above. To go on: er and ewc 2 KiB, den 8: .8.

    joint, the best of all, is a bound: on no front, in no range.
    """
    runs = [
        sized("ewc", 1024, 2048, 0.5), sized("er", 2048, 2048, 0.8), sized("den", 4096, 8192, 0.9),
        sized("joint", 512, 2**20, 1.0),
    ]  # fmt: skip
    plot = accuracy_against_bytes(block_of(tmp_path, runs), looks(["ewc", "er", "den", "joint"]))
    lines = {(line["memory"], line["baseline"]): line for line in table(plot)}
    assert len(lines) == 8
    front = {key for key, line in lines.items() if line["on_front"] == "yes"}
    answer, keep = "answer_bytes", "keep_learning_bytes"
    assert front == {(answer, "ewc"), (answer, "er"), (answer, "den"), (keep, "er"), (keep, "den")}
    areas = {memory: float(lines[memory, "er"]["front_area_last"]) for memory in (answer, keep)}
    assert areas == pytest.approx({answer: 0.65, keep: 0.8})
    ends = {memory: (line["range_low_bytes"], line["range_high_bytes"]) for (memory, _), line in lines.items()}
    assert ends == {answer: ("1024", "4096"), keep: ("2048", "8192")}
    assert {key[1] for key, line in lines.items() if line["role"] == "bound"} == {"joint"}
    assert "bytes to answer for all tasks, 1.00 KiB to 4.00 KiB: 65.0 % (AUC-L) and 65.0 % (AUC-A)" in plot.caption
    assert "2.00 KiB to 8.00 KiB: 80.0 %" in plot.caption


def test_the_area_of_incremental_accuracy_is_another_number(tmp_path: Path) -> None:
    """er: A_1 = 1, A_2 = (0 + 1) / 2, so AIA .75 and ACC .5; it holds over the whole range up to den."""
    runs = [make_record(baseline="er", acc=[[1, 0], [0, 1]]), make_record(baseline="den", acc=[[1, 0], [1, 1]])]
    runs[1] = runs[1].model_copy(update={"footprints": sized("den", 10**7, 10**8, 0.9).footprints})
    line = table(accuracy_against_bytes(block_of(tmp_path, runs), looks(["er", "den"])))[0]
    assert (float(line["front_area_last"]), float(line["front_area_average"])) == (0.5, 0.75)


def counted(baseline: str, answer: int, step: int, level: float) -> RunRecord:
    """A run whose answer and training step take so many operations."""
    work = Flops(step=step, step_samples=32, steps=10, train=10 * step, answer=answer)
    return sized(baseline, 1000, 1000, level).model_copy(update={"flops": [work, work]})


def test_work_has_a_front_for_an_answer_and_one_for_a_step(tmp_path: Path) -> None:
    """An answer: ewc 100 .5, er 100 .8, den 400 .9. A step: ewc 300, er 900 and den 500, so that er is beaten.

    joint is a bound; si was not counted, and is named.
    """
    runs = [
        counted("ewc", 100, 300, 0.5), counted("er", 100, 900, 0.8), counted("den", 400, 500, 0.9),
        counted("joint", 10, 10, 1.0), sized("si", 1000, 1000, 0.7),
    ]  # fmt: skip
    plot = accuracy_against_flops(block_of(tmp_path, runs), looks(["ewc", "er", "den", "joint", "si"]))
    lines = {(line["work"], line["baseline"]): line for line in table(plot)}
    assert len(lines) == 8
    front = {key for key, line in lines.items() if line["on_front"] == "yes"}
    answer, step = "answer_flops", "step_flops"
    assert front == {(answer, "er"), (answer, "den"), (step, "ewc"), (step, "den")}
    assert lines[step, "den"]["flops.mean"] == "500"
    assert plot.caption.endswith("Not counted: si.")
    plot.draw()


def test_work_of_one_baseline_alone_is_not_drawn(tmp_path: Path) -> None:
    runs = [counted("ewc", 100, 300, 0.5), sized("si", 1000, 1000, 0.7)]
    assert accuracy_against_flops(block_of(tmp_path, runs), looks(["ewc", "si"])).rows == ()


# ------------------------------------------------------------------------------------------ stability and plasticity


def test_lines_of_equal_accuracy_are_exact_for_the_forgetting_they_are_drawn_for() -> None:
    """ACC = LA - (T - 1) / T x mean over j < T of (a[j,j] - a[T,j]), since task T has nothing to forget."""
    acc = np.random.default_rng(1).random((5, 5))
    right = learning_accuracy(acc) - 4 / 5 * forgetting_first_minus_last(acc)
    assert average_accuracy(acc) == pytest.approx(right)


def test_stability_and_plasticity_by_hand(tmp_path: Path) -> None:
    """Tasks learned to .9 and .7, LA .8; task 1 falls from .9 to .5, forgetting .4. Joint: .95 and .85.

    Intransigence .05 and .15: mean .1, last .15.
    """
    runs = [
        make_record(baseline="er", acc=[[0.9, 0.1], [0.5, 0.7]]),
        make_record(baseline="joint", acc=[[0.95, 0.1], [0.9, 0.85]]),
    ]
    block = block_of(tmp_path, runs)
    plot = stability_plasticity(block, looks(["er", "joint"]))
    line = next(line for line in table(plot) if line["baseline"] == "er")
    columns = (
        "learning_accuracy", "forgetting.first_minus_last", "forgetting.chaudhry2018", "intransigence_mean",
        "intransigence_last",
    )  # fmt: skip
    values = [float(line[f"{name}.mean"]) for name in columns]
    assert values == pytest.approx([0.8, 0.4, 0.4, 0.1, 0.15])
    assert "90.0 % less LA" in plot.caption
    assert "ACC = LA - (T-1)/T x forgetting" in plot.caption
    found = joint_reference(block)
    assert found is not None
    assert found.tolist() == pytest.approx([0.95, 0.85])


def test_without_a_joint_run_there_is_no_intransigence(tmp_path: Path) -> None:
    plot = stability_plasticity(block_of(tmp_path, [make_record(baseline="er")]), looks(["er"]))
    (line,) = table(plot)
    assert (line["intransigence_mean.mean"], line["intransigence_mean.n"]) == ("", "0")
    assert "ntransigence" not in plot.caption


# -------------------------------------------------------------------------------------------------------------- time


def test_time_is_of_one_machine_alone(tmp_path: Path) -> None:
    """Of er, two runs on One and one on Two; si on One, lwf on Two. Most are on One: er's mean is (10 + 10.2) / 2."""
    runs = [
        make_record(baseline="er", seed=0, seconds=10, device_name="One"),
        make_record(baseline="er", seed=1, seconds=10, device_name="One"),
        make_record(baseline="er", seed=2, seconds=99, device_name="Two"),
        make_record(baseline="si", seed=0, seconds=30, device_name="One"),
        make_record(baseline="lwf", seed=0, seconds=20, device_name="Two"),
    ]
    plot = accuracy_against_time(block_of(tmp_path, runs), looks(["er", "si", "lwf"]))
    found = {line["baseline"]: (float(line["seconds.mean"]), line["seconds.n"]) for line in table(plot)}
    assert found == {"er": (pytest.approx(10.1), "2"), "si": (30, "1")}
    assert {line["device_name"] for line in table(plot)} == {"One"}
    assert "on One alone (n = 1 to 2 a baseline)" in plot.caption
    assert "Without a run there: lwf." in plot.caption


def test_one_baseline_a_machine_has_no_time_to_compare(tmp_path: Path) -> None:
    runs = [make_record(baseline=name, device_name=name) for name in ("er", "si", "lwf")]
    assert accuracy_against_time(block_of(tmp_path, runs), looks(["er", "si", "lwf"])).rows == ()


def test_runs_without_seconds_choose_no_machine(tmp_path: Path) -> None:
    """Three runs whose time nobody knows, as of other tools, do not outnumber the two that have one."""
    runs = [make_record(baseline=name, device_name="One") for name in ("er", "si")]
    for seed in range(3):
        record = make_record(baseline="lwf", seed=seed, device_name="")
        runs.append(record.model_copy(update={"timing": record.timing.model_copy(update={"total_seconds": None})}))
    plot = accuracy_against_time(block_of(tmp_path, runs), looks(["er", "si", "lwf"]))
    assert {(line["baseline"], line["device_name"]) for line in table(plot)} == {("er", "One"), ("si", "One")}


# ------------------------------------------------------------------------------------------------------------ growth


def grown(baseline: str, seed: int, added: int) -> RunRecord:
    events = [
        GrowthEvent(after_task=1, layer="fc1", kind="added", units=added),
        GrowthEvent(after_task=1, layer="fc2", kind="added", units=2),
        GrowthEvent(after_task=1, layer="fc1", kind="pruned", units=1),
        GrowthEvent(after_task=2, layer="fc1", kind="split", units=3),
        GrowthEvent(after_task=2, layer="fc1", kind="reused", units=9, born=0),
    ]
    widths = [{"fc1": 10, "fc2": 4}, {"fc1": 9 + added, "fc2": 6}, {"fc1": 12 + added, "fc2": 6}]
    return make_record(baseline=baseline, seed=seed, events=events, widths=widths)


def test_growth_events_are_counted_over_layers(tmp_path: Path) -> None:
    """In task 2, 4 + 2 and 6 + 2 units added: mean 7, and 1 pruned; in task 3, 3 split. Reuse is no growth."""
    plot = growth_events(block_of(tmp_path, [grown("den", 0, 4), grown("den", 1, 6), make_record(baseline="er")]))
    found = {(line["task"], line["kind"]): float(line["mean"]) for line in table(plot)}
    assert {line["baseline"] for line in table(plot)} == {"den"}
    assert {key for key in found if found[key]} == {("2", "added"), ("2", "pruned"), ("3", "split")}
    assert (found["2", "added"], found["2", "pruned"], found["3", "split"]) == (7, 1, 3)
    save(plot, tmp_path / "growth")


# ------------------------------------------------------------------------------------------------ what a task adds


def shared(record: RunRecord, added: Sequence[int], in_common: float = 0.5) -> RunRecord:
    tasks = [TaskShare(task=i, parameters=100, marginal_parameters=n, marginal_bytes=n) for i, n in enumerate(added)]
    found = Sharing(
        parameters_used=sum(added), unused=0, shared_by_all=0, shared_by_some=0, private=sum(added),
        shared_by_all_bytes=0, shared_by_some_bytes=0, private_bytes=0, reuse_ratio=1.0, in_common=in_common,
        tasks=tasks, map=[TensorUse(name="fc.weight", elements=90, layers=["fc"], shares=[1.0, 0.5, 0.0])],
    )  # fmt: skip
    return record.model_copy(update={"sharing": found})


def test_what_a_task_adds_is_a_share_of_one_net(tmp_path: Path) -> None:
    """A net of 200: 200, 10 and 30 added over two runs' (10, 20) and (10, 40): 100 %, 5 % and 15 %."""
    runs = [
        shared(make_record(baseline="wsn", seed=0, parameters=200), (200, 10, 20)),
        shared(make_record(baseline="wsn", seed=1, parameters=200), (200, 10, 40)),
        make_record(baseline="er"),
    ]
    plot = marginal_parameters(block_of(tmp_path, runs))
    found = [(float(line["parameters.mean"]), float(line["of_one_net.mean"])) for line in table(plot)]
    assert found == [(200, 1), (10, pytest.approx(0.05)), (30, pytest.approx(0.15))]
    assert "Recorded without: er." in plot.caption
    save(plot, tmp_path / "marginal")


@pytest.mark.parametrize(("in_common", "drawn"), [(0.5, True), (1.0, False), (0.0, False)])
def test_two_baselines_have_a_map_where_tasks_share_some_and_not_all(
    tmp_path: Path, in_common: float, drawn: bool
) -> None:
    """Too few for a ladder. With one net for all tasks, or one a task, a map says nothing."""
    block = block_of(tmp_path, [shared(make_record(baseline="wsn"), (9, 1, 1), in_common), make_record(baseline="er")])
    assert bool(sharing_map(block).rows) is drawn


# ------------------------------------------------------------------------------------------------------------ memory


def test_peaks_of_phases_stand_side_by_side_and_nothing_adds_them(tmp_path: Path) -> None:
    """Worst task of each phase; a phase that allocated nothing has a row, and a mark only where it has a length."""

    def peaks(train: int, evaluate: int) -> dict[str, Peak]:
        sizes = {"train": train, "grow": 0, "evaluate": evaluate}
        return {
            phase: Peak(allocated_bytes=size, reserved_bytes=None, resident_bytes=None, meter="allocator")
            for phase, size in sizes.items()
        }

    record = make_record().model_copy(update={"peaks": [peaks(5, 7), peaks(9, 2), peaks(1, 1)]})
    plot = peak_memory(block_of(tmp_path, [record]))
    assert {line["phase"]: line["mean"] for line in table(plot)} == {"train": "9", "grow": "0", "evaluate": "7"}
    assert "not to be added" in plot.caption
    (axis,) = plot.draw().axes
    lines = {tuple(np.asarray(line.get_xdata(), float).tolist()) for line in axis.get_lines()}
    assert {(0.0, 9.0), (9.0,), (7.0,)} <= lines
    assert (0.0,) not in lines


# -------------------------------------------------------------------------------------------------------------- work


def working(baseline: str, steps: Sequence[int | None], seed: int = 0) -> RunRecord:
    """A run whose training steps of each task took so many operations."""
    flops = [Flops(step=step, step_samples=1, steps=1, train=step, answer=1) for step in steps]
    return make_record(baseline=baseline, seed=seed).model_copy(update={"flops": flops})


def test_what_a_step_takes_is_drawn_over_tasks_where_it_grows(tmp_path: Path) -> None:
    """Means of 10, 30, of 20, 40, of 30, 50. A run without counts takes no part, a count of half has no line."""
    runs = [working("ewc", [10, 20, 30]), working("ewc", [30, 40, 50], 1), make_record(baseline="ewc", seed=2)]
    runs += [working("finetune", [10, 10, 10]), working("er", [10, None, 30])]
    plot = named(block_of(tmp_path, runs))["step-flops"]
    found = [(line["baseline"], line["task"], line["mean"], line["n"]) for line in table(plot)]
    steady = [("finetune", str(task), "10", "1") for task in (1, 2, 3)]
    assert found == [*steady, ("ewc", "1", "20", "2"), ("ewc", "2", "30", "2"), ("ewc", "3", "40", "2")]
    assert len(plot.draw().axes) == 1


def test_steps_that_cost_the_same_in_every_task_are_not_drawn(tmp_path: Path) -> None:
    assert "step-flops" not in named(block_of(tmp_path, [working("ewc", [100, 103, 105])]))


# ------------------------------------------------------------------------------------------------------------ absence


def test_what_records_lack_is_not_drawn(tmp_path: Path) -> None:
    block = block_of(tmp_path, [make_record(acc=[[0.9]], acc_init=[0.1], peak=None)])
    assert set(named(block)) == {"seen", "per-task", "matrix", "accuracy-bytes", "accuracy-parameters", "parameters"}


def test_captions_say_n_interval_and_device(tmp_path: Path) -> None:
    runs = [make_record(seed=seed) for seed in range(3)] + [make_record(baseline="er", seed=seed) for seed in range(2)]
    for name, plot in named(block_of(tmp_path, runs)).items():
        assert "Device: cpu (Test CPU)." in plot.caption, name
        assert "n = 2 to 3 a baseline" in plot.caption, name
        assert "interval" in plot.caption or name == "parameters", name


def test_twenty_baselines_draw_every_figure(tmp_path: Path) -> None:
    """No warning of a figure whose names or panels do not fit: warnings are errors here."""
    records = [grown(f"method_number_{i}", 0, 1 + i) for i in range(20)]
    runs = [shared(record, (9, i, i), i / 20) for i, record in enumerate(records)]
    plots = named(block_of(tmp_path / "runs", runs))
    assert {"growth-events", "marginal-parameters", "stability-plasticity", "accuracy-time"} <= set(plots)
    for name in ("seen", "growth-events", "marginal-parameters", "stability-plasticity", "accuracy-time"):
        save(plots[name], tmp_path / name)


# ---------------------------------------------------------------------------------------------------- names of lines


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        ([1.0, 3.0], [1.0, 3.0]),
        # Two at one place part evenly.
        ([2.0, 2.0], [1.5, 2.5]),
        # Three in a row begin at the mean of 2, 2 - 1 and 2.4 - 2, which is 17 / 15.
        ([2.0, 2.0, 2.4], [17 / 15, 32 / 15, 47 / 15]),
        # Kept in the panel, from 0 to 4.
        ([-3.0, 4.0], [0.0, 4.0]),
        ([4.0, 4.0], [3.0, 4.0]),
        # More than fit go on above it.
        ([0.0] * 6, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
    ],
)
def test_names_keep_apart_and_near_their_lines(wanted: list[float], places: list[float]) -> None:
    assert spread(wanted, 1.0, 0.0, 4.0) == pytest.approx(places)


def test_names_at_the_ends_of_lines_do_not_touch() -> None:
    """Twenty lines, ten of which end at one height: neighbours are LINE apart and in the order of the ends."""
    names = [f"m{i}" for i in range(20)]
    ends = {name: (1.0, 0.5 if i < 10 else i / 20) for i, name in enumerate(names)}
    _, (axis,), _ = sheet(3.4, 2.1, right=1.0)
    axis.set_ylim(0, 1)
    found = end_labels(axis, ends, looks(names))
    order = sorted(found, key=lambda name: found[name])
    assert all(found[above] - found[below] > LINE - 1e-9 for below, above in pairwise(order))
    assert all(ends[below][1] <= ends[above][1] for below, above in pairwise(order))
    assert not math.isnan(sum(found.values()))


def test_ticks_of_five_characters_push_no_label_out_of_the_figure(tmp_path: Path) -> None:
    """From 82.5 to 100.0 in steps of 2.5: the label beside them once lost half of its letters."""
    records = []
    for baseline, last in (("finetune", 0.82), ("joint", 0.999)):
        acc = [[0.999] * 3, [(0.999 + last) / 2] * 3, [last] * 3]
        records += [make_record(baseline=baseline, seed=seed, acc=acc) for seed in (0, 1)]
    drawn = named(block_of(tmp_path, records))
    for name in ("seen", "accuracy-bytes", "accuracy-time"):
        with mpl.rc_context(_RC):
            figure = drawn[name].draw()
            assert "100.0" in {text.get_text() for text in figure.axes[0].get_yticklabels()}
            assert figure.get_tightbbox().x0 >= 0, name
