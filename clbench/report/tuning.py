"""What a study found: a table of the grid, the choice, and the words with which a recipe says where it comes from.

A point is chosen by its mean over the seeds. Points of which a run failed are left out: a setting that diverges for one
seed is none to be recommended. Of points that tie, the one that the grid lists first is taken, and a note says so.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clbench.errors import UserError, unknown
from clbench.records import RunRecord, write_atomic
from clbench.report.measures import MEASURES, Measure, cells, shown
from clbench.report.stats import Estimate
from clbench.report.writers import Section, TextTable, to_console, to_csv, to_markdown
from clbench.tuning import METRICS, Study


@dataclass(frozen=True)
class Point:
    """One point of the grid and its runs."""

    settings: dict[str, Any]
    label: str
    """Of its records."""
    runs: tuple[RunRecord, ...]
    value: Estimate | None
    """Of the validation metric over the finished runs; None where none is."""
    failures: tuple[str, ...]
    """Why runs failed, a line each."""

    @property
    def can_be_chosen(self) -> bool:
        """Whether every run finished and has a value."""
        return self.value is not None and self.value.n == len(self.runs) and not self.failures


@dataclass(frozen=True)
class Outcome:
    """A study with its runs done."""

    study: Study
    measure: Measure
    points: tuple[Point, ...]

    @property
    def chosen(self) -> Point | None:
        """The best point, the first one of the grid where several are; None where no point can be chosen."""
        good = [point for point in self.points if point.can_be_chosen]
        return max(good, key=_mean) if good else None  # max keeps the first of equals

    def write(self, out: Path) -> list[Path]:
        """Write the table as Markdown and csv beside the records; return the files."""
        stem = out / self.study.base.task.name / self.study.base.baseline.name
        texts = {".md": self.markdown(), ".csv": self.csv()}
        paths = [stem.with_name(stem.name + suffix) for suffix in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            write_atomic(path, text)
        return paths

    # ------------------------------------------------------------------------------------------------------- as text

    def console(self) -> str:
        """Return table, choice and what a recipe is to say, as plain text."""
        text = to_console(self.table())
        return f"{text}\n\n{self.recipe()}" if self.chosen else text

    def markdown(self) -> str:
        """Return the same as Markdown."""
        text = to_markdown(self.table(), "#")
        return f"{text}\n```toml\n{self.recipe()}\n```\n" if self.chosen else text

    def table(self) -> TextTable:
        """Return the grid, a row a point."""
        study, chosen = self.study, self.chosen
        task, baseline = study.base.task, study.base.baseline
        rows = []
        for point in self.points:
            settings = [_toml(value) for value in point.settings.values()]
            rows.append((*settings, str(len(point.runs)), shown(point.value, "fraction", len(point.runs)), ""))
            if point is chosen or point.failures:
                rows[-1] = (*rows[-1][:-1], "chosen" if point is chosen else self._failed(point))
        return TextTable(
            label=f"{task.name}-{baseline.name}",
            title=f"{baseline.title} on {study.name}: settings by validation data of {protocol_words(study)}",
            caption=tuple(self._caption()),
            header=(*study.grid, "n", f"Validation {self.measure.label} (%)", "Choice"),
            sections=(Section("", tuple(rows)),),
            notes=tuple(self.notes()),
            left=len(study.grid),
        )

    def _failed(self, point: Point) -> str:
        return f"left out: {len(point.failures)} of {len(self.study.seeds)} runs failed"

    def _caption(self) -> Iterable[str]:
        study = self.study
        if study.is_oracle:
            yield "ORACLE: the choice sees every task of the stream, which no learner can before the last."
        yield f"Protocol {study.protocol}: {study.tasks_seen} of {study.n_tasks} tasks."
        yield f"Validation data: {held_out(study)}. No test sample was read."
        if study.own_validation:
            yield "The recipe's own validation samples: where it has a schedule, training looked at them too."
        runs = [run for point in self.points for run in point.runs]
        yield f"Mean ± half-width of the 95 % Student-t interval over seeds {seeds_of(study)}, n runs."
        yield f"Device: {self._where(runs)}."
        yield f"{self.measure.definition}."
        if study.fixed:
            yield f"At every point: {_pairs(study.fixed)}."

    def _where(self, runs: Sequence[RunRecord]) -> str:
        return "; ".join(sorted({f"{run.environment.device} ({run.environment.device_name})" for run in runs}))

    def notes(self) -> Iterable[str]:
        """Yield what one should know of the choice."""
        for point in self.points:
            if point.failures:
                yield f"{_pairs(point.settings)}: {self._failed(point)}: {point.failures[0]}"
        chosen, good = self.chosen, [point for point in self.points if point.can_be_chosen]
        if chosen is None:
            yield "no point can be chosen: every one has a run that failed"
            return
        tied = [point for point in good if _mean(point) == _mean(chosen)]
        if len(tied) > 1:
            few = "; one task tells nothing of what holds on to earlier ones" if self.study.tasks_seen == 1 else ""
            yield f"{len(tied)} of {len(self.points)} points tie: the first of them is taken{few}"
        assert chosen.value is not None
        if chosen.value.low is None:
            yield "one seed: no interval, so nothing says how far the points lie apart"
        else:
            near = sum(_mean(point) >= chosen.value.low for point in good if point is not chosen)
            if near:
                yield f"{near} more within the interval of the chosen one: these seeds hardly set them apart"
        for key, values in self.study.grid.items():
            if len(values) > 1 and all(_is_number(value) for value in values):
                value = chosen.settings[key]
                if value in (min(values), max(values)):
                    side = "smallest" if value == min(values) else "largest"
                    yield f"{key} = {_toml(value)} is the {side} value tried: a wider grid may hold a better one"

    # ------------------------------------------------------------------------------------------- for the recipe, as csv

    def recipe(self) -> str:
        """Return what a recipe's section is to say of the chosen point."""
        assert self.chosen is not None
        lines = [f"[on.{self.study.name}]", f"origin = {_toml(self.origin())}"]
        lines += [f"{key} = {_toml(value)}" for key, value in self.chosen.settings.items()]
        return "\n".join([*lines, *([f"# at every point: {_pairs(self.study.fixed)}"] if self.study.fixed else [])])

    def origin(self) -> str:
        """Return the words for the recipe's `origin`."""
        study = self.study
        grid = "; ".join(f"{key} {', '.join(map(_toml, values))}" for key, values in study.grid.items())
        return (
            f"ours: selected by {protocol_words(study)}, on validation data ({held_out(study)}), grid {grid}, seeds "
            f"{seeds_of(study)}, {self.measure.name}; {command(study, self.measure)}"
        )

    def csv(self) -> str:
        """Return a row a point, numbers in full."""
        study = self.study
        header = ["task", "protocol", "tasks_seen", "n_tasks", "validation_share", "baseline", *study.grid, "label"]
        header += ["seeds", "failed", *(f"{self.measure.name}.{part}" for part in ("mean", "low", "high", "n"))]
        header += ["chosen"]
        rows = []
        for point in self.points:
            first = [study.name, study.protocol, str(study.tasks_seen), str(study.n_tasks), str(study.share)]
            first += [study.base.baseline.name]
            values = [_toml(value) for value in point.settings.values()]
            last = [point.label, seeds_of(study), str(len(point.failures)), *cells(point.value)]
            rows.append([*first, *values, *last, "1" if point is self.chosen else "0"])
        return to_csv(header, rows)


def outcome(study: Study, records: Iterable[RunRecord], metric: str = METRICS[0]) -> Outcome:
    """Return what the records of a study say.

    Args:
        study: what was asked for.
        records: of its runs, in any order; others are passed over.
        metric: one of `METRICS`.

    Raises:
        UserError: another metric; or a run of a point has no record, or one that was interrupted.
    """
    if metric not in METRICS:
        raise UserError(unknown("metric to choose by", metric, METRICS))
    mine = {(record.task.name, record.baseline.label, record.seed): record for record in records}
    points = []
    for settings, experiment in zip(study.points, study.experiments, strict=True):
        keys = [(experiment.task.name, experiment.label, seed) for seed in study.seeds]
        runs = [mine[key] for key in keys if key in mine and mine[key].status != "interrupted"]
        if len(runs) < len(keys):
            left = len(keys) - len(runs)
            raise UserError(f"{_pairs(settings)}: {left} of {len(keys)} runs are not done; the same command goes on")
        done = tuple(run for run in runs if run.status == "done")
        failures = tuple(run.error or "failed" for run in runs if run.status != "done")
        points.append(Point(settings, experiment.label, done, MEASURES[metric].over(done), failures))
    return Outcome(study, MEASURES[metric], tuple(points))


# ------------------------------------------------------------------------------------------------------------ in words


def protocol_words(study: Study) -> str:
    """Return what the choice gets to see."""
    if study.protocol == "oracle":
        return f"all {study.n_tasks} tasks (oracle)"
    return "the first task" if study.tasks_seen == 1 else f"the first {study.tasks_seen} tasks"


def held_out(study: Study) -> str:
    """Return which samples the metric is measured on."""
    share = f"{100 * study.share:.3g} % of each task's training samples"
    return f"{share}, set aside by the task" if study.own_validation else f"{share}, as the task sets none aside"


def seeds_of(study: Study) -> str:
    """Return the seeds as short text."""
    return ", ".join(map(str, study.seeds))


def command(study: Study, measure: Measure) -> str:
    """Return the command that makes the study again."""
    words = ["clbench tune", f"--task {study.task}", f"--baseline {study.baseline}"]
    if study.origin == "--grid":
        grid = (f"{key}={','.join(map(_toml, values))}" for key, values in study.grid.items())
        words += [f"--grid {shlex.quote(word)}" for word in grid]
    words += [f"--set {shlex.quote(f'{key}={_toml(value)}')}" for key, value in study.fixed.items()]
    seeds = ",".join(map(str, study.seeds)) + ("," if len(study.seeds) == 1 else "")
    words += [f"--protocol {study.protocol}", f"--seeds {seeds}"]
    words += [] if study.own_validation else [f"--validation {study.share}"]
    words += [] if measure.name == METRICS[0] else [f"--metric {measure.name}"]
    return " ".join(words)


def _mean(point: Point) -> float:
    assert point.value is not None
    return point.value.mean


def _pairs(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {_toml(value)}" for key, value in settings.items())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _toml(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
