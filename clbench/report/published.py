"""Ours beside the paper's: the published rows of all recipes, what matches a pattern, and our runs against each row.

A row is named `source/task/baseline`. Patterns are globs over that name and over its parts: `task/baseline`, `source`,
`source/task`, `task`. Runs of another device, number of threads or data stand apart: a row has a comparison for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import groupby

from clbench import recipes
from clbench.errors import UserError, nearest, unknown
from clbench.published_row import PublishedRow
from clbench.recipes import Experiment
from clbench.records import RunRecord
from clbench.report.measures import EMPTY, MEASURES, Measure
from clbench.report.select import conditions
from clbench.report.stats import Estimate, estimate
from clbench.report.verdicts import MOST, Judgement, Verdict, judge, left_open, resolution, seeds_to_decide
from clbench.specs import BaselineSpec

POINT = 0.01
"""The margin where nothing else is said: one percentage point."""
NARROWEST, WIDEST = 0.001, 0.05
"""Of the margins that follow from a rule: ten images of ten thousand, and what sets whole families of methods apart."""
ACCURACIES = {
    "average_accuracy",
    "average_incremental_accuracy",
    "learning_accuracy",
    "accuracy_lower_triangle",
    "average_auroc",
}
"""Metrics in [0, 1]; the other fractions, forgetting and transfer, lie in [-1, 1]."""


@dataclass(frozen=True)
class Row:
    """One published number and the experiment that is to meet it."""

    experiment: Experiment
    paper: PublishedRow

    @property
    def task(self) -> str:
        """Name of the task."""
        return self.experiment.task.name

    @property
    def source(self) -> str:
        """Short name of the paper or repository; "-" for a row that does not say."""
        return self.paper.source or EMPTY

    @property
    def names(self) -> tuple[str, ...]:
        """What a pattern may name the row by, the full name last."""
        pair = f"{self.task}/{self.experiment.label}"
        return (self.source, self.task, f"{self.source}/{self.task}", pair, f"{self.source}/{pair}")

    @property
    def measure(self) -> Measure:
        """The measure that the row's metric names."""
        return MEASURES[self.paper.metric]

    @property
    def margin(self) -> float:
        """How far apart two means may lie and still be the same."""
        return margin_of(self.paper)

    @property
    def estimate(self) -> Estimate:
        """The paper's side; n = 1 where the source does not say."""
        return Estimate(self.paper.value, self.paper.std, self.paper.n or 1)

    @property
    def planned(self) -> int | None:
        """Seeds that decide if our mean is the paper's and our runs scatter as its do; None without its spread."""
        std = self.paper.std
        return None if std is None else seeds_to_decide(0.0, std, std, self.estimate.n, self.margin)


def margin_of(row: PublishedRow) -> float:
    """Return a row's margin: its own, else the larger of two, up to WIDEST. None of it looks at our runs.

    - What the source's experiment can resolve: the smallest difference whose absence two such experiments, of its n and
      its deviation, would show with a chance of 80 % (`verdicts.resolution`, about three standard errors of their
      difference). Narrower, no repetition of it could succeed; it shrinks with the number of runs the source made.
    - One point; of an accuracy, half the distance to 1 where that is less, so that 99.6 is not met by 98.7.

    A source whose runs scatter so much that it resolves no 5 points is not helped by a wider margin, which would call
    most methods of its table the same: few of our results will be a verdict on it. And the margin is not what a
    difference may be, as the interval about it has to lie inside: at the source's own n, four tenths of it pass.
    """
    if row.margin is not None:
        return row.margin
    room = max(NARROWEST, (1 - row.value) / 2) if row.metric in ACCURACIES else POINT
    found = 0.0 if row.std is None or row.n is None else resolution(row.std, row.n)
    return min(max(min(POINT, room), found), WIDEST)


# ---------------------------------------------------------------------------------------------------------- the rows


def shipped_rows() -> tuple[list[Row], list[str]]:
    """Return every published row that ships, and one line for each mistake in a recipe or row."""
    found: list[Row] = []
    problems: list[str] = []
    for name in recipes.names("baseline"):
        try:
            baseline = recipes.load_baseline(name)
            problems += mistakes(baseline, str(recipes.find("baseline", name)))
            for task, on in baseline.on.items():
                if on.published:
                    experiment = recipes.resolve(recipes.load_task(task), baseline)
                    found += [Row(experiment, row) for row in on.published if row.metric in MEASURES]
        except UserError as error:
            problems += error.lines
    # Named from the folder of recipes, so that what is committed does not say where it was built.
    root = f"{recipes.shipped('baseline').parent}/"
    return found, [line.replace(root, "") for line in problems]


def mistakes(baseline: BaselineSpec, file: str) -> list[str]:
    """Return a line for each published row of a file whose metric is unknown or cannot take its numbers."""
    lines = []
    for task, on in baseline.on.items():
        for number, row in enumerate(on.published):
            key = f"on.{task}.published.{number}"
            measure = MEASURES.get(row.metric)
            if measure is None:
                lines.append(f"{file}: '{key}.metric': {unknown('metric', row.metric, MEASURES)}")
            elif measure.unit in ("fraction", "area"):
                low = 0 if row.metric in ACCURACIES else -1
                if not low <= row.value <= 1:
                    lines.append(f"{file}: '{key}.value': {row.value} lies outside [{low}, 1]; fractions, not percent")
            elif row.margin is None:
                lines.append(f"{file}: '{key}.margin' is missing: {row.metric} has no usual one")
    return lines


def choose(rows: Sequence[Row], patterns: Sequence[str]) -> list[Row]:
    """Return the rows that match a pattern, in their own order; all of them without a pattern.

    Raises:
        UserError: a pattern that nothing matches, with the nearest name.
    """
    wrong = [pattern for pattern in patterns if not any(_matches(row, pattern) for row in rows)]
    if wrong:
        known = [name for row in rows for name in row.names]
        lines = [f"no published row matches '{pattern}'.{nearest(pattern, known)}" for pattern in wrong]
        raise UserError(*(f"{line} See: clbench list published" for line in lines))
    return [row for row in rows if not patterns or any(_matches(row, pattern) for pattern in patterns)]


def _matches(row: Row, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in row.names)


def listing(rows: Iterable[Row]) -> list[str]:
    """Return a line a row, by source and task: name, metric, number, margin, seeds it takes, where it was read."""
    lines = []
    for row in sorted(rows, key=lambda row: (row.source == EMPTY, row.source, row.task)):
        paper = row.paper
        spread = "" if paper.spread is None else f" ± {paper.spread:.4f} {paper.spread_kind}"
        text = f"{paper.value:.4f}{spread}, n = {paper.n or '?'}, margin {row.margin:.4f}"
        if row.planned is not None:
            text += f", {seeds_text(row.planned)}"
        lines.append(f"{row.names[-1]:58} {paper.metric:24} {text}  {paper.where} [{paper.verified}]")
    return lines


def seeds_text(seeds: int) -> str:
    """Return a number of seeds in words."""
    return f"{seeds} seeds" if seeds <= MOST else f"> {MOST:,} seeds"


# ------------------------------------------------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Comparison:
    """One published row and our runs of the same protocol and settings, all in one place."""

    row: Row
    device: str
    """Device and threads, in words."""
    ours: Estimate | None
    """None where our records do not hold the metric."""
    seconds: Estimate
    """Wall clock of a run."""

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's, in the metric's own unit."""
        return None if self.ours is None else self.ours.mean - self.row.paper.value

    @cached_property
    def judgement(self) -> Judgement:
        """The verdict and its interval."""
        if self.ours is None:
            return Judgement("not comparable")
        found = judge(self.ours, self.row.estimate, self.row.margin)
        return replace(found, verdict="not comparable", seeds=None) if self.row.paper.not_comparable else found

    @property
    def verdict(self) -> Verdict:
        """In a word or two."""
        return self.judgement.verdict

    @property
    def why_not(self) -> str:
        """Why the two are not comparable; "" where they are."""
        if self.ours is None:
            return f"our records do not hold {self.row.measure.label}"
        return self.row.paper.not_comparable

    @property
    def left_open(self) -> tuple[float, float] | None:
        """Halves of the intervals that the source's runs alone leave, where no number of ours decides; else None."""
        ours, paper = self.ours, self.row.estimate
        if self.verdict != "under-powered" or ours is None:
            return None
        std = paper.std if ours.std is None else ours.std
        assert self.difference is not None  # as there are runs of ours
        return None if std is None else left_open(self.difference, std, paper.std, paper.n, self.row.margin)


def compare(records: Iterable[RunRecord], rows: Iterable[Row]) -> tuple[list[Comparison], list[str]]:
    """Set the finished runs of each row's experiment beside it.

    Returns:
        Comparisons by source, task, device and then in the order of the rows; and one line for each experiment with
        records that follow another version of the recipe.
    """
    finished = [record for record in records if record.status == "done" and record.imported is None]
    comparisons, problems = [], []
    for row in rows:
        experiment = row.experiment
        mine = [run for run in finished if (run.task.name, run.baseline.label) == (row.task, experiment.label)]
        current = [run for run in mine if (run.task.hash, run.baseline.hash) == (experiment.task.hash, experiment.hash)]
        if len(current) < len(mine):
            left_out = len(mine) - len(current)
            where = f"{row.task}/{experiment.label}"
            problems.append(f"{where}: {left_out} records of other settings are not compared with papers")
        for _, runs in groupby(sorted(current, key=_place), key=_place):
            group = sorted(runs, key=lambda run: run.seed)
            seconds = estimate(run.timing.total_seconds for run in group)
            assert seconds is not None  # every record has its time
            comparisons.append(Comparison(row, _device(group[0]), row.measure.over(group), seconds))
    comparisons.sort(key=lambda item: (item.row.source == EMPTY, item.row.source, item.row.task, item.device))
    return comparisons, list(dict.fromkeys(problems))


def _place(record: RunRecord) -> tuple[str, tuple[str, int | None]]:
    return _device(record), conditions(record)


def _device(record: RunRecord) -> str:
    place = record.environment
    return f"{place.device} ({place.device_name}), {place.threads} thread{'' if place.threads == 1 else 's'}"
