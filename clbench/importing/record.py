"""A file of another tool's as records, marked as imported.

They lie where our own do, under a device that is no device: `<task>/<label>/seed<k>-unknown.json`. Reports show them in
rows of their own, `<label> (<tool>)`, and never average or pair them with runs of ours.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clbench import __version__, recipes
from clbench.errors import UserError
from clbench.importing.formats import read
from clbench.importing.matrix import Matrix, to_matrix
from clbench.importing.told import remarks
from clbench.record_parts import Imported
from clbench.records import BaselineInfo, Code, Environment, RunRecord, TaskInfo, Timing, load
from clbench.spec import content_hash
from clbench.specs import TaskSpec

_LABEL = "letters, digits and _ . + - @ alone"


@dataclass(frozen=True)
class Result:
    """One run of a file, as a record, and whether it was there already."""

    record: RunRecord
    path: Path
    is_new: bool
    assumed: str
    """What scale its numbers were guessed to have, and why; "" where it was said."""


def import_files(
    files: Sequence[Path],
    *,
    task: str,
    label: str,
    runs: Path,
    seed: int = 0,
    format_name: str = "auto",
    scale: str | None = None,
) -> list[Result]:
    """Write a record for every run in the files; all of them or none.

    Args:
        files: of other tools.
        task: shipped name, or path of a recipe: the protocol that the runs are said to have followed.
        label: of the baseline, for tables.
        runs: folder of records.
        seed: of the first run; the next ones count on.
        format_name: of `formats.FORMATS`, or "auto".
        scale: "percent" or "fraction"; None detects it.

    Raises:
        UserError: every mistake of every file, a line each; another result has a record's place.
    """
    spec = recipes.load_task(task)
    if not label or not all(char.isalnum() or char in "_.+-@" for char in label) or label.startswith("."):
        raise UserError(f"--baseline '{label}': a name of {_LABEL}")
    found: list[tuple[RunRecord, str]] = []
    problems: list[str] = []
    for file in files:
        try:
            found += _records(file, spec, label, seed + len(found), format_name, scale)
        except UserError as error:
            problems += error.lines
    results = []
    if not problems:
        problems += _twice([record for record, _ in found], runs)
    for record, assumed in found if not problems else ():
        path = record.path(runs)
        same = path.is_file() and load(path).imported == record.imported and load(path).task.hash == record.task.hash
        if path.is_file() and not same:
            problems.append(f"{path}: has another result ({_source(load(path))}); give another --seed or --baseline")
        results.append(Result(record, path, not same, assumed))
    if problems:
        raise UserError(*problems)
    for result in results:
        if result.is_new:
            result.record.save(runs)
    return results


def _twice(found: Sequence[RunRecord], runs: Path) -> list[str]:
    """Return a line for every run that would count twice: it is there under another seed, or twice in the files."""
    there: list[tuple[Path, RunRecord]] = []
    for path in sorted(found[0].path(runs).parent.glob("seed*-unknown.json")) if found else ():
        with contextlib.suppress(UserError):  # a damaged record is the report's to tell
            there.append((path, load(path)))
    lines = []
    for record in found:
        path = record.path(runs)
        twin = next(((where, other) for where, other in there if where != path and _is_same(record, other)), None)
        if twin is not None and record.imported is not None:
            lines.append(
                f"{record.imported.file}, run {record.imported.run}: is {_source(twin[1])} again (seed "
                f"{twin[1].seed}): one run is not two seeds"
            )
        there.append((path, record))
    return lines


def _is_same(one: RunRecord, other: RunRecord) -> bool:
    """Whether two records are of one run: of the same bytes, or the same accuracies to the last digit.

    A log that went on, or a copy with a comment, has other bytes. Accuracies of two values at most (all right, all at
    chance) may well be those of two runs.
    """
    if one.imported is None or other.imported is None or one.task.hash != other.task.hash:
        return False
    if (one.imported.sha256, one.imported.run) == (other.imported.sha256, other.imported.run):
        return True
    values = {value for row in one.acc for value in row if not math.isnan(value)}
    return len(values) > 2 and repr(one.acc) == repr(other.acc)


def _records(
    file: Path, task: TaskSpec, label: str, seed: int, format_name: str, scale: str | None
) -> list[tuple[RunRecord, str]]:
    tool, tables = read(file, format_name, task.stream.n_tasks, task.stream.scenario)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    records = []
    for number, table in enumerate(tables, 1):
        matrix = to_matrix(table, task.stream.n_tasks, str(file), scale)
        notes = [*matrix.notes, *remarks(matrix.told, matrix.acc, table.labels)]
        source = Imported(
            tool=tool, file=file.name, sha256=digest, run=number, scale=matrix.scale, told=matrix.told, notes=notes
        )
        records.append((_record(task, label, seed + number - 1, source, matrix), matrix.assumed))
    return records


def _record(task: TaskSpec, label: str, seed: int, source: Imported, matrix: Matrix) -> RunRecord:
    known = recipes.load_baseline(label) if label in recipes.names("baseline") else None
    return RunRecord(
        status="done",
        task=TaskInfo(
            name=task.name,
            version=task.version,
            hash=task.hash,
            title=task.title,
            scenario=task.stream.scenario,
            n_tasks=task.stream.n_tasks,
            train=task.train.model_dump(mode="json"),
        ),
        baseline=BaselineInfo(
            name=label,
            label=label,
            hash=content_hash(["imported", source.tool]),
            family=known.family if known else "imported",
            strategy="",
            paper=known.paper if known else "",
            settings={},
            origin=f"imported from {source.tool}",
        ),
        seed=seed,
        code=Code(version=__version__, commit=None, dirty=None),
        environment=Environment(
            device="unknown",
            device_name="",
            threads=None,
            python="unknown",
            torch="unknown",
            cuda=None,
            avalanche="unknown",
            platform="unknown",
        ),
        data={},
        acc=matrix.acc,
        acc_init=matrix.init,
        single_task_parameters=None,
        footprints=[],
        imported=source,
        peaks=[],
        timing=Timing(started="", seconds=[], total_seconds=None, train_samples_per_second=None),
    )


def _source(record: RunRecord) -> str:
    source = record.imported
    return "of this suite" if source is None else f"run {source.run} of {source.file}"
