"""One method against others, run by run: pairs of equal seed on one task, version and device.

Every number is a difference, first less other. A difference comes with its interval, then with p, then with p as
corrected for all comparisons of the same metric. `paired` has the statistics; this file has who is paired with whom.
Results of other tools are paired with nothing: their seeds are numbers that whoever imported them gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

from clbench.budgets import TOLERANCE
from clbench.errors import UserError, unknown
from clbench.recipes import names
from clbench.records import RunRecord
from clbench.report.measures import MEASURES, Measure, amount, chosen, evaluated_every
from clbench.report.paired import Interval, Paired, holm, paired
from clbench.report.select import Block, Group, Selection, conditions, select
from clbench.report.stats import Estimate, estimate
from clbench.report.tables import seeds


@dataclass(frozen=True)
class Pairing:
    """Two groups of one block, and their runs of equal seed."""

    block: Block
    first: Group
    second: Group
    pairs: tuple[tuple[RunRecord, RunRecord], ...]
    """By seed."""

    @property
    def name(self) -> str:
        """What is taken from what."""
        return f"{self.first.label} - {self.second.label}"

    @property
    def left_out(self) -> list[str]:
        """Return a line for the runs of either side that have no partner."""
        paired_seeds = {mine.seed for mine, _ in self.pairs}
        lines = []
        for group, other in ((self.first, self.second), (self.second, self.first)):
            alone = [run for run in group.runs if run.seed not in paired_seeds]
            if alone:
                word = "seeds" if len(alone) > 1 else "seed"
                lines.append(f"{self.name}: {word} {seeds(alone)} of {group.label} left out, {other.label} has none")
        return lines


@dataclass(frozen=True)
class Line:
    """One measure of one pairing."""

    pairing: Pairing
    measure: Measure
    first: Estimate
    """Over the paired runs."""
    second: Estimate
    found: Paired
    seeds: str
    """Of the pairs that have the measure."""
    p_holm: float | None = None
    family: int = 0
    """How many tests p is corrected for."""


@dataclass(frozen=True)
class Compared:
    """What there is to print."""

    lines: tuple[Line, ...]
    """By block, measure and pairing."""
    interval: Interval
    budget: str | None
    """At which the pairs are matched."""
    problems: tuple[str, ...]
    """One line for each run or pairing that is not in it."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every block that has a line."""
        return tuple({id(line.pairing.block): line.pairing.block for line in self.lines}.values())

    def of(self, block: Block) -> list[Line]:
        """Return the lines of a block."""
        return [line for line in self.lines if line.pairing.block is block]


def compare(
    runs: Path,
    first: str,
    others: Sequence[str],
    *,
    tasks: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    interval: Interval = "t",
    matched: str | None = None,
) -> Compared:
    """Compare one method with each of others in everything that is recorded.

    Args:
        runs: folder of records.
        first: label or name of a baseline.
        others: likewise; one or more.
        tasks: names to keep; None keeps all that both sides have.
        metrics: names of measures, in the order wanted; None for the usual ones.
        interval: of a difference.
        matched: a key of `BUDGETS`: instead of plain labels, all variants of the names are taken, and those pairs kept
            that differ by no more than 2 % in it.

    Raises:
        UserError: no such folder, task, baseline or metric; no task in common; nothing paired, or nothing matched.
    """
    wanted = chosen(metrics)
    first, others = _stem(first), [_stem(other) for other in others]
    everything = select(runs, None if tasks is None else [_stem(task) for task in tasks])
    selection = _own(everything)
    _refuse(selection, first, others, {run.baseline.label for run in _finished(everything) if run.imported})
    pairings, problems = _pairings(selection, first, others, matched)
    both = [run for pairing in pairings for pair in pairing.pairs for run in pair]
    measures = wanted if metrics else chosen(None, both)
    found = [
        line
        for block in {id(pairing.block): pairing.block for pairing in pairings}.values()
        for measure in measures
        for pairing in pairings
        if pairing.block is block and (line := _line(pairing, measure, interval)) is not None
    ]
    if not found:
        every = sorted(set(filter(None, map(evaluated_every, both))))
        unlike = len(every) > 1 and any(measure.alike is evaluated_every for measure in measures)
        why = f" of one N: they were evaluated every {', '.join(map(str, every))} iterations" if unlike else ""
        raise UserError(f"no pair of runs has {', '.join(measure.name for measure in measures)}{why}")
    unfinished = [
        f"{run.task.name}/{run.baseline.label} (seed {run.seed}, {run.environment.device}) {run.status}: left out"
        for run in selection.unfinished
        if {run.baseline.label, run.baseline.name} & {first, *others}
    ]
    return Compared(_corrected(found), interval, matched, (*problems, *unfinished, *selection.damaged))


def _corrected(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Return the lines with p corrected over all tests of one measure: every pairing, on every task."""
    corrected = {}
    for measure in dict.fromkeys(line.measure.name for line in lines):
        family = [line for line in lines if line.measure.name == measure and line.found.p is not None]
        for line, p in zip(family, holm([line.found.p or 0.0 for line in family]), strict=True):
            corrected[id(line)] = replace(line, p_holm=p, family=len(family))
    return tuple(corrected.get(id(line), line) for line in lines)


def _line(pairing: Pairing, measure: Measure, interval: Interval) -> Line | None:
    """Return a measure's difference over the pairs that have it; None where there is none to be compared."""
    values: list[tuple[int, float, float]] = []
    for mine, theirs in pairing.pairs:
        one, other = measure.of(mine), measure.of(theirs)
        if one is not None and other is not None and math.isfinite(one) and math.isfinite(other):
            values.append((mine.seed, one, other))
    if not values or not _comparable(pairing, measure):
        return None
    ones, others = [value[1] for value in values], [value[2] for value in values]
    first, second = estimate(ones), estimate(others)
    assert first is not None
    assert second is not None
    found = paired(ones, others, by_chance=not measure.is_cost or measure.unit == "seconds", interval=interval)
    having = {value[0] for value in values}
    named = seeds(mine for mine, _ in pairing.pairs if mine.seed in having)
    return Line(pairing, measure, first, second, found, named)


def _comparable(pairing: Pairing, measure: Measure) -> bool:
    """Whether the two sides were measured alike: seconds on one machine, peaks by one meter, falls as closely."""
    runs = [run for pair in pairing.pairs for run in pair]
    if measure.unit == "seconds":
        return len({(run.environment.device_name, run.environment.platform) for run in runs}) == 1
    if measure.name == "peak_train_bytes":
        return len({peaks["train"].meter for run in runs for peaks in run.peaks if "train" in peaks}) == 1
    return len({measure.alike(run) for run in runs} - {None}) <= 1


# --------------------------------------------------------------------------------------------- who is paired with whom


def _own(selection: Selection) -> Selection:
    """Return a selection without the results of other tools."""
    tasks = []
    for task in selection.tasks:
        blocks = (replace(block, groups=tuple(g for g in block.groups if not g.imported)) for block in task.blocks)
        tasks.append(replace(task, blocks=tuple(block for block in blocks if block.groups)))
    return replace(selection, tasks=tuple(tasks))


def _finished(selection: Selection) -> Iterable[RunRecord]:
    return (run for task in selection.tasks for block in task.blocks for run in block.runs)


def _refuse(selection: Selection, first: str, others: Sequence[str], imported: Set[str]) -> None:
    """Refuse a name that no record has, in a line each, and a method against itself.

    Args:
        selection: without results of other tools.
        first: as `compare` was given it.
        others: likewise.
        imported: labels of results of other tools.
    """
    groups = [group for task in selection.tasks for block in task.blocks for group in block.groups]
    known = {name for group in groups for name in (group.label, group.baseline.label)}
    unfinished = {run.baseline.label for run in selection.unfinished}
    lines = []
    for name in dict.fromkeys((first, *others)):
        if any(_is(group, name) for group in groups):
            continue
        if name.partition(" (")[0] in imported:
            lines.append(f"'{name}' was imported from another tool: its runs share no seed with any, and are no pairs")
        elif name in unfinished or name in names("baseline"):
            lines.append(f"'{name}' has no finished run here; recorded are: {', '.join(sorted(known)) or 'none'}")
        else:
            lines.append(f"{unknown('baseline', name, known)} (those that are recorded)")
    if not lines and first in others:
        lines.append(f"'{first}' cannot be compared with itself")
    if lines:
        raise UserError(*lines)


def _stem(name: str) -> str:
    """Return the name under which a recipe is recorded, given by name or by file."""
    return Path(name).stem if name.endswith(".toml") else name


def _is(group: Group, name: str) -> bool:
    return name in (group.label, group.baseline.label, group.baseline.name)


def _named(block: Block, name: str, variants: bool) -> list[Group]:
    """Return the groups that a name means: of that label if there is one, else all variants of the baseline."""
    if variants and "@" not in name and "#" not in name:
        return [group for group in block.groups if name == group.baseline.name]
    called = [(group, (group.label, group.baseline.label, group.baseline.name)) for group in block.groups]
    for place in range(3):
        found = [group for group, known in called if known[place] == name]
        if found:
            return found
    return []


def _pairings(
    selection: Selection, first: str, others: Sequence[str], budget: str | None
) -> tuple[list[Pairing], list[str]]:
    """Return every pairing that has a pair, and a line for each that has none."""
    found: list[Pairing] = []
    problems: list[str] = []
    for other in others:
        shared, before = 0, len(found)
        far: list[str] = []
        for block in (block for task in selection.tasks for block in task.blocks):
            mine, theirs = _named(block, first, budget is not None), _named(block, other, budget is not None)
            if mine and theirs and len(mine) > 1 and budget is None:
                known = ", ".join(f"'{group.label}'" for group in mine)
                where = f"{len(mine)} settings on {block.task.name}"
                raise UserError(f"'{first}' has records of {where}: name one of {known}")
            for one in mine:
                for another in theirs:
                    shared += 1
                    pairing = Pairing(block, one, another, _pairs(one, another))
                    if budget is not None and not _equal(pairing, budget):
                        far.append(_distance(pairing, budget))
                    elif pairing.pairs:
                        found.append(pairing)
                    else:
                        problems.append(_nothing_paired(pairing))
        if not shared:
            problems.append(_apart(selection, first, other))
        if len(found) == before:  # of several sizes of a baseline one that is near enough will do
            problems += far
    if not found:
        raise UserError(*problems)
    return found, problems


def _pairs(one: Group, another: Group) -> tuple[tuple[RunRecord, RunRecord], ...]:
    partners = {(run.seed, conditions(run)): run for run in another.runs}
    found = ((run, partners.get((run.seed, conditions(run)))) for run in one.runs)
    return tuple((mine, theirs) for mine, theirs in found if theirs is not None)


def _nothing_paired(pairing: Pairing) -> str:
    one, another = pairing.first, pairing.second
    where = f"{one.label} and {another.label} on {pairing.block.task.name}: nothing is paired"
    common = {run.seed for run in one.runs} & {run.seed for run in another.runs}
    if not common:
        return f"{where}, no seed in common ({one.label}: {seeds(one.runs)}; {another.label}: {seeds(another.runs)})"
    threads = [", ".join(sorted({str(run.environment.threads) for run in g.runs})) for g in (one, another)]
    if threads[0] != threads[1]:
        return f"{where}, other numbers of CPU threads ({threads[0]} against {threads[1]})"
    return f"{where}, other data (fingerprints differ)"


def _apart(selection: Selection, first: str, other: str) -> str:
    """Return why two methods share no block."""
    blocks = [block for task in selection.tasks for block in task.blocks]
    mine = [block for block in blocks if any(_is(group, first) for group in block.groups)]
    theirs = [block for block in blocks if any(_is(group, other) for group in block.groups)]
    both = sorted({block.task.name for block in mine} & {block.task.name for block in theirs})
    if both:
        sides = (f"{name}: {'; '.join(block.title for block in found if block.task.name in both)}"
                 for name, found in ((first, mine), (other, theirs)))  # fmt: skip
        return f"'{first}' and '{other}' share {', '.join(both)}, but no version and device of it ({'; '.join(sides)})"
    sides = (f"{name}: {', '.join(sorted({block.task.name for block in found})) or 'none of these tasks'}"
             for name, found in ((first, mine), (other, theirs)))  # fmt: skip
    return f"'{first}' and '{other}' have no task in common ({'; '.join(sides)})"


# ------------------------------------------------------------------------------------------------------ matched budgets


def _budget(group: Group, budget: str) -> float:
    found = MEASURES[budget].over(group.runs)
    return math.nan if found is None else found.mean


def _equal(pairing: Pairing, budget: str) -> bool:
    mine, theirs = _budget(pairing.first, budget), _budget(pairing.second, budget)
    return abs(mine - theirs) <= TOLERANCE * theirs


def _distance(pairing: Pairing, budget: str) -> str:
    """Return how far two methods are from an equal budget, and the command that matches them."""
    measure = MEASURES[budget]
    groups = pairing.first, pairing.second
    known = {group.label: _budget(group, budget) for group in groups}
    sizes = (f"{key} {'unknown' if math.isnan(size) else amount(size, measure.unit)}" for key, size in known.items())
    name, task = pairing.first.baseline.name, pairing.block.task.name
    name = name if name in names("baseline") else f"./{name}.toml"
    return (
        f"{task}: {measure.name} is not matched ({', '.join(sizes)}); to match it: "
        f"clbench run --task {task} --baseline {name} --match {budget} --to {pairing.second.label}"
    )


def notes(lines: Iterable[Line]) -> list[str]:
    """Return what one should know of the lines of one block: who was left out, and what so few seeds cannot tell."""
    known = list(lines)
    pairings = list({line.pairing.name: line.pairing for line in known}.values())
    said = [line for pairing in pairings for line in pairing.left_out]
    single = [pairing for pairing in pairings if len(pairing.pairs) == 1]
    said += [f"{pairing.name}: one pair of runs: no interval and no test" for pairing in single]
    for pairing in pairings:
        said += _undecided([line for line in known if line.pairing.name == pairing.name])
    for line in known:
        if line.found.test == "sign-flip":
            said.append(
                f"{line.pairing.name}, {line.measure.label}: the same difference for every seed has no t; p is of the "
                "sign-flip test"
            )
    return list(dict.fromkeys(said))


def _undecided(lines: Sequence[Line]) -> list[str]:
    """Return what the seeds of one pairing cannot tell, in a line for each number of seeds."""
    open_ones = [line for line in lines if line.found.detectable is not None and not line.found.decided]
    said = []
    for n in dict.fromkeys(line.found.n for line in open_ones):
        few = [line for line in open_ones if line.found.n == n]
        sizes = [_words(line) for line in few]
        what = f"{n} seeds can detect a difference of"
        if len(few) == 1:
            label = few[0].measure.label
            said.append(f"{few[0].pairing.name}, {label}: not decided, the interval holds 0; {what} {sizes[0]}")
        else:
            each = ", ".join(f"{size} in {line.measure.label}" for size, line in zip(sizes, few, strict=True))
            said.append(f"{few[0].pairing.name}: not decided, the interval holds 0; {what} {each}")
    return said


def _words(line: Line) -> str:
    """Return the difference that a line's seeds can detect, with its unit."""
    unit = line.measure.unit
    assert line.found.detectable is not None
    words = {"fraction": " points", "area": " points", "seconds": " s"}.get(unit, "")
    return amount(line.found.detectable, unit) + words
