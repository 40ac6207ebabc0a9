"""Which records stand together: one block per protocol version and device, one group per baseline in it.

Runs of different devices are never averaged, nor are runs of different versions of a task or a baseline: they stand
side by side, and a note says so. Every model of GPU is a device. Processors are one device, as they are in the names of
records: they round differently, as seeds do, so that accuracies over several are of one distribution. Captions name
them all, and seconds of different ones are not averaged. Runs that failed or were interrupted are listed, not averaged.
Results of other tools stand beside ours in every block of their protocol, in groups of their own, marked with the tool.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from clbench import recipes
from clbench.errors import UserError, unknown
from clbench.records import BaselineInfo, RunRecord, TaskInfo, load_all
from clbench.spec import content_hash

FAMILIES = ("bounds", "regularisation", "projection", "replay", "expansion", "sharing", "hypernetwork")
"""Order of families in tables; others follow by name."""


@dataclass(frozen=True)
class Group:
    """The finished runs of one baseline that may be averaged: same protocol, settings and device."""

    label: str
    """Unique within its block: the baseline's, with the settings' hash where two stand side by side."""
    baseline: BaselineInfo
    runs: tuple[RunRecord, ...]
    """By seed."""
    recorded: str = ""
    """The label by its records, where it is shown under another."""

    @property
    def key(self) -> str:
        """The label by its records."""
        return self.recorded or self.label

    @property
    def imported(self) -> bool:
        """Whether the runs are another tool's: of no known device, and never paired by seed with ours."""
        return self.runs[0].imported is not None

    @property
    def starred(self) -> bool:
        """Whether the baseline departs from the task's training budget or model."""
        return bool(self.baseline.departures)


@dataclass(frozen=True)
class Block:
    """All groups of one task, version and device."""

    task: TaskInfo
    device: str
    device_name: str
    """Of the GPU; of all processors that the runs were made on."""
    groups: tuple[Group, ...]
    """By family, then label."""
    slug: str = ""
    """What sets the block apart from the task's others, for file names; "" for an only one."""

    @property
    def stem(self) -> str:
        """Start of the names of the block's files."""
        return f"{self.task.name}-{self.slug}" if self.slug else self.task.name

    @property
    def where(self) -> str:
        """The device in words."""
        if self.device == "unknown":
            return "a device that nobody knows"
        return f"{self.device} ({self.device_name})" if self.device_name else self.device

    @property
    def title(self) -> str:
        """Version and device in words: what sets the block apart."""
        return f"version {self.task.version} ({self.task.hash}), {self.where}"

    @property
    def runs(self) -> tuple[RunRecord, ...]:
        """Every run of the block."""
        return tuple(run for group in self.groups for run in group.runs)


@dataclass(frozen=True)
class TaskBlocks:
    """Everything that is reported about one task."""

    name: str
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """What a report is made of."""

    tasks: tuple[TaskBlocks, ...]
    unfinished: tuple[RunRecord, ...]
    """Failed and interrupted runs."""
    damaged: tuple[str, ...]
    """One line a file that could not be read."""
    labels: tuple[str, ...]
    """Every baseline label under the runs folder, chosen or not: colours follow from it."""
    task_names: tuple[str, ...] = ()
    """Every task under the runs folder, chosen or not."""
    families: tuple[str, ...] = ()
    """Every family under the runs folder, chosen or not."""
    unmade: tuple[str, ...] = ()
    """One line for each pair of task and baseline that was asked for and has no finished run."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """One line for each thing a reader has to know of what stands in the tables, and for what is not there."""
        return (*(line for task in self.tasks for line in _remarks(task)), *self.unmade)

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each run that is not in the tables."""
        return tuple(_unfinished(run) for run in self.unfinished) + self.damaged


def select(
    runs: Path,
    tasks: Sequence[str] | None = None,
    baselines: Sequence[str] | None = None,
    families: Sequence[str] | None = None,
) -> Selection:
    """Read the records under `runs` and sort them into blocks.

    Args:
        runs: folder of records.
        tasks: names to keep; None keeps all.
        baselines: labels, or names (which keep their overridden variants too); None keeps all.
        families: names to keep; None keeps all.

    Raises:
        UserError: no such folder, a name that no record has, or no finished run.
    """
    if not runs.is_dir():
        raise UserError(f"{runs}: no such folder of records")
    records, damaged = load_all(runs)
    # A damaged file is named relative to the folder: committed tables must not depend on where they were built.
    damaged = [line.removeprefix(f"{runs}/") for line in damaged]
    _refuse_unknown(runs, records, tasks, baselines, families)
    labels = tuple(sorted({record.baseline.label for record in records}))
    kept = [
        record
        for record in records
        if (tasks is None or record.task.name in tasks)
        and (baselines is None or {record.baseline.label, record.baseline.name} & set(baselines))
        and (families is None or record.baseline.family in families)
    ]
    done = [record for record in kept if record.status == "done"]
    unfinished = tuple(record for record in kept if record.status != "done")
    if not done:
        lines = [f"{runs}: no finished run to report ({len(unfinished)} unfinished, {len(damaged)} damaged)"]
        raise UserError(*lines, *map(_unfinished, unfinished), *damaged)
    return Selection(
        tasks=arrange(done),
        unfinished=unfinished,
        damaged=tuple(damaged),
        labels=labels,
        task_names=tuple(sorted({record.task.name for record in records})),
        families=tuple(sorted({record.baseline.family for record in records}, key=family_rank)),
        unmade=tuple(_unmade(done, tasks, baselines)),
    )


def arrange(done: Iterable[RunRecord]) -> tuple[TaskBlocks, ...]:
    """Sort finished runs into tasks, blocks and groups."""
    by_task: dict[str, dict[tuple[int, str, str, str], list[RunRecord]]] = {}
    for record in done:
        key = (record.task.version, record.task.hash, *device_of(record))
        by_task.setdefault(record.task.name, {}).setdefault(key, []).append(record)
    return tuple(_task_blocks(name, by_task[name]) for name in sorted(by_task))


def device_of(record: RunRecord) -> tuple[str, str]:
    """Return what a run's device is told by: its kind and, of a GPU, its model."""
    place = record.environment
    return place.device, "" if place.device == "cpu" else place.device_name


def device_names(runs: Iterable[RunRecord]) -> str:
    """Return the names of what runs were made on, each once."""
    return "; ".join(sorted({run.environment.device_name for run in runs} - {""}))


def _task_blocks(name: str, members: dict[tuple[int, str, str, str], list[RunRecord]]) -> TaskBlocks:
    blocks, notes = [], []
    own = {key[:2] for key in members if key[2] != "unknown"}
    for key in sorted(members):
        if key[2] == "unknown" and key[:2] in own:
            continue  # beside our own, below
        records = members[key]
        foreign = members.get((*key[:2], "unknown", ""), []) if key[2] != "unknown" else []
        groups, more = _groups([*records, *foreign])
        blocks.append(Block(records[0].task, key[2], device_names(records), groups))
        notes += [f"{name}: {note}" for note in more]
    protocols = sorted({(block.task.version, block.task.hash) for block in blocks})
    if len(protocols) > 1:
        named = ", ".join(f"version {version} ({digest})" for version, digest in protocols)
        notes.append(f"{name}: records of {len(protocols)} protocols stand apart and are not comparable: {named}")
    return TaskBlocks(name, tuple(_with_slugs(blocks)), tuple(dict.fromkeys(notes)))


def _groups(records: list[RunRecord]) -> tuple[tuple[Group, ...], list[str]]:
    members: dict[tuple[str, str], list[RunRecord]] = {}
    usual = conditions(records[0])
    for record in records:
        digest = record.baseline.hash
        if conditions(record) != usual:
            digest = content_hash([digest, *conditions(record)])
        members.setdefault((label_of(record), digest), []).append(record)
    counts: dict[str, int] = {}
    for label, _ in members:
        counts[label] = counts.get(label, 0) + 1
    groups = [
        Group(
            label=label if counts[label] == 1 else f"{label} #{digest[:6]}",
            baseline=runs[0].baseline,
            runs=tuple(sorted(runs, key=lambda run: run.seed)),
        )
        for (label, digest), runs in members.items()
    ]
    notes = [
        f"{label}: records of {count} different settings, data or thread counts stand apart (# and a hash)"
        for label, count in sorted(counts.items())
        if count > 1
    ]
    return tuple(sorted(groups, key=lambda group: (family_rank(group.baseline.family), group.label))), notes


def label_of(record: RunRecord) -> str:
    """Return what a run is called in tables and figures: its label, and the tool where that is another."""
    return record.baseline.label + (f" ({record.imported.tool})" if record.imported else "")


def conditions(record: RunRecord) -> tuple[str, int | None]:
    """Return what numbers depend on besides recipe, seed and device: the data and the number of threads."""
    return content_hash(record.data), record.environment.threads


def family_rank(family: str) -> tuple[int, str]:
    """Return the place of a family in tables."""
    return (FAMILIES.index(family) if family in FAMILIES else len(FAMILIES), family)


def _with_slugs(blocks: list[Block]) -> list[Block]:
    """Give each block the shortest words that set it apart from the others of its task."""
    if len(blocks) == 1:
        return blocks
    tasks = {(block.task.version, block.task.hash) for block in blocks}
    versions = {version for version, _ in tasks}
    named = []
    for block in blocks:
        parts = []
        if len(tasks) > 1:
            parts.append(f"v{block.task.version}" + (f"-{block.task.hash[:6]}" if len(versions) < len(tasks) else ""))
        if len({other.device for other in blocks}) > 1:
            parts.append(block.device)
        if len({other.device_name for other in blocks if other.device == block.device != "cpu"}) > 1:
            parts.append(slug(block.device_name))
        named.append(replace(block, slug="-".join(parts)))
    return named


def slug(text: str) -> str:
    """Return a text as a part of a file name: lower case, everything odd a hyphen."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _refuse_unknown(
    runs: Path,
    records: list[RunRecord],
    tasks: Sequence[str] | None,
    baselines: Sequence[str] | None,
    families: Sequence[str] | None,
) -> None:
    known = {
        "task": {record.task.name for record in records},
        "baseline": {name for record in records for name in (record.baseline.label, record.baseline.name)},
        "family": {record.baseline.family for record in records},
    }
    recipe: dict[str, Sequence[str]] = {"task": recipes.names("task"), "baseline": recipes.names("baseline")}
    lines = []
    for kind, names in (("task", tasks), ("baseline", baselines), ("family", families)):
        for name in dict.fromkeys(names or ()):
            if name in known[kind]:
                continue
            if name in recipe.get(kind, ()):
                made = f"clbench run --{kind} {name} ... makes some"
                lines.append(f"no record of {kind} '{name}' in {runs}; {made}")
            else:
                lines.append(unknown(kind, name, known[kind]))
    if lines:
        raise UserError(*lines)


def _remarks(task: TaskBlocks) -> list[str]:
    """Return what a reader has to know of a task's runs, a line each."""
    lines = list(task.notes)
    places = dict.fromkeys(block.where for block in task.blocks)
    if len(places) > 1:
        lines.append(f"{task.name}: runs of {len(places)} devices stand side by side: {', '.join(places)}")
    single = dict.fromkeys(group.label for block in task.blocks for group in block.groups if len(group.runs) == 1)
    if single:
        lines.append(f"{task.name}: one seed alone, and so no interval: {', '.join(single)}")
    return lines


def _unmade(
    done: Sequence[RunRecord], tasks: Sequence[str] | None, baselines: Sequence[str] | None
) -> Iterable[str]:
    """Yield a line for each task, or pair of task and baseline, that was named and has no finished run."""
    made = {(run.task.name, name) for run in done for name in (run.baseline.label, run.baseline.name)}
    reported = {task for task, _ in made}
    for task in dict.fromkeys(tasks or sorted(reported)):
        if task not in reported:
            yield f"{task}: no finished run of what was asked for"
            continue
        for baseline in dict.fromkeys(baselines or ()):
            if (task, baseline) not in made:
                yield f"{task}: no finished run of {baseline}"


def _unfinished(run: RunRecord) -> str:
    what = f": {run.error}" if run.error else ""
    where = f"seed {run.seed}, {run.environment.device}"
    return f"{run.task.name}/{run.baseline.label} ({where}) {run.status}{what}"
