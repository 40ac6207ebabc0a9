"""Ours beside the paper's: every published row of a recipe for which there are records.

A comparison states both numbers, their spread and n, and the difference; it judges nothing. A paper's standard error
is turned into a standard deviation (times the square root of n) before it is shown or used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from clbench import recipes
from clbench.errors import UserError
from clbench.recipes import Experiment
from clbench.records import RunRecord
from clbench.report.measures import MEASURES, Measure, amount, exact, shown
from clbench.report.stats import Estimate, welch
from clbench.report.writers import Section, TextTable, to_csv
from clbench.specs import PublishedRow

HEADER = ("Task", "Baseline", "Metric", "Ours", "n", "Paper", "n", "Difference")


@dataclass(frozen=True)
class Comparison:
    """One published row and our runs of the same protocol and settings on one device."""

    task: str
    baseline: str
    device: str
    measure: Measure
    ours: Estimate
    paper: PublishedRow

    @property
    def paper_std(self) -> float | None:
        """Standard deviation over the paper's runs; None where the source states none."""
        spread, n = self.paper.spread, self.paper.n
        if spread is None or self.paper.spread_kind == "std":
            return spread
        return None if n is None else spread * math.sqrt(n)

    @property
    def difference(self) -> float:
        """Ours minus the paper's, in the metric's own unit."""
        return self.ours.mean - self.paper.value

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the difference (Welch); None unless both sides have a spread over at least two runs."""
        if self.paper_std is None or self.paper.n is None:
            return None
        return welch(self.ours, self.paper.value, self.paper_std, self.paper.n)


def shipped_experiments() -> tuple[list[Experiment], list[str]]:
    """Return every shipped (task, baseline) with published rows, and one line for each recipe that cannot be read."""
    found: list[Experiment] = []
    problems: list[str] = []
    for name in recipes.names("baseline"):
        try:
            baseline = recipes.load_baseline(name)
            for task, on in baseline.on.items():
                if on.published:
                    found.append(recipes.resolve(recipes.load_task(task), baseline))
        except UserError as error:
            # Named from the folder of recipes, so that what is committed does not say where it was built.
            root = f"{recipes.shipped('baseline').parent}/"
            problems += [line.replace(root, "") for line in error.lines]
    return found, problems


def compare(records: Iterable[RunRecord], experiments: Iterable[Experiment]) -> tuple[list[Comparison], list[str]]:
    """Set the finished runs of each experiment beside its published rows.

    Returns:
        Comparisons in the order of the experiments, one a row and device; and one line for each row that names an
        unknown metric, and for each experiment whose records all follow another version of the recipe.
    """
    finished = [record for record in records if record.status == "done"]
    comparisons, problems = [], []
    for experiment in experiments:
        mine = [
            record
            for record in finished
            if record.task.name == experiment.task.name and record.baseline.label == experiment.label
        ]
        current = [
            record
            for record in mine
            if record.task.hash == experiment.task.hash and record.baseline.hash == experiment.hash
        ]
        where = f"{experiment.task.name}/{experiment.label}"
        if experiment.published and len(current) < len(mine):
            left_out = len(mine) - len(current)
            problems.append(f"{where}: {left_out} records of other settings are not compared with papers")
        for device, runs in groupby(sorted(current, key=_device), key=_device):
            group = sorted(runs, key=lambda run: run.seed)
            for row in experiment.published:
                measure = MEASURES.get(row.metric)
                if measure is None:
                    problems.append(f"{where}: a published row names the unknown metric '{row.metric}'")
                    continue
                ours = measure.over(group)
                if ours is not None:
                    names = (experiment.task.name, experiment.label, device)
                    comparisons.append(Comparison(*names, measure, ours, row))
    return comparisons, list(dict.fromkeys(problems))


def _device(record: RunRecord) -> str:
    return f"{record.environment.device} ({record.environment.device_name})"


# --------------------------------------------------------------------------------------------------------- as a table


def table(comparisons: Iterable[Comparison]) -> TextTable:
    """Return the comparisons as one table; sources and what differs are notes, by number."""
    rows, notes = [], []
    chosen = list(comparisons)
    several = len({item.device for item in chosen}) > 1
    for number, item in enumerate(chosen, 1):
        label = f"{item.baseline}, {item.device}" if several else item.baseline
        rows.append((item.task, f"{label} [{number}]", item.measure.label, *_cells(item)))
        differs = f"; differs: {item.paper.differs}" if item.paper.differs else ""
        notes.append(f"[{number}] {item.paper.where} ({item.paper.verified}){differs}")
    caption = (
        "Our runs beside published numbers; fractions in percent.",
        "Ours: mean ± half-width of the 95 % Student-t interval; paper: value, sd = standard deviation over its n runs"
        " (a stated standard error times the square root of n).",
        "Difference: ours minus the paper's, with Welch's 95 % interval where both sides have a spread.",
        *(f"Device: {device}." for device in sorted({item.device for item in chosen}) if not several),
    )
    return TextTable(
        label="reproduction",
        title="Ours beside the papers'",
        caption=caption,
        header=HEADER,
        sections=(Section("", tuple(rows)),),
        notes=tuple(notes),
        left=3,
    )


def _cells(item: Comparison) -> tuple[str, ...]:
    unit = item.measure.unit
    paper = amount(item.paper.value, unit)
    if item.paper_std is not None:
        paper += f" (sd {amount(item.paper_std, unit)})"
    difference = amount(item.difference, unit)
    if not difference.startswith("-"):
        difference = f"+{difference}"
    if item.interval is not None:
        low, high = item.interval
        difference += f" [{amount(low, unit)}, {amount(high, unit)}]"
    paper_n = "-" if item.paper.n is None else str(item.paper.n)
    return (shown(item.ours, unit, item.ours.n), str(item.ours.n), paper, paper_n, difference)


def csv_text(comparisons: Iterable[Comparison]) -> str:
    """Return the comparisons as csv, numbers in full and in the metric's own unit."""
    header = ["task", "baseline", "device", "metric", "ours.mean", "ours.low", "ours.high", "ours.n", "paper.value"]
    header += ["paper.std", "paper.n", "difference", "difference.low", "difference.high", "tolerance"]
    header += ["where", "verified", "differs"]
    rows = []
    for item in comparisons:
        low, high = item.interval or (None, None)
        ours, paper = item.ours, item.paper
        cells = [item.task, item.baseline, item.device, item.measure.name]
        cells += [exact(ours.mean), exact(ours.low), exact(ours.high), str(ours.n)]
        cells += [exact(paper.value), exact(item.paper_std), "" if paper.n is None else str(paper.n)]
        cells += [exact(item.difference), exact(low), exact(high), exact(paper.tolerance)]
        cells += [paper.where, paper.verified, paper.differs]
        rows.append(cells)
    return to_csv(header, rows)
