"""From the cells of a file to an accuracy matrix: numbers, percent or fraction, what was measured and what was not.

A file is first read into `Cell`s, which know their line, so that every mistake can name it.

Letters: T tasks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from clbench.errors import UserError

UNKNOWN = ("", "-", "nan", "null", "none", "n/a")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Cell:
    """One entry as the file has it."""

    value: float
    """NaN where there is none."""
    line: int
    """From 1."""
    is_percent: bool = False
    """Whether it carries a percent sign."""


@dataclass
class Table:
    """What a file says of one run."""

    rows: list[list[Cell]]
    """Row i: after task i; as many columns as the file has."""
    told: dict[str, float] = field(default_factory=dict)
    """The tool's own scores, in the file's scale."""
    init: list[Cell] = field(default_factory=list)
    """(T,): before any training; empty where the file does not have it."""
    notes: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    """(T,): what the file calls the tasks, in the order of the stream; empty where they have no names."""


@dataclass(frozen=True)
class Matrix:
    """An accuracy matrix, fractions; NaN where nothing was measured."""

    acc: list[list[float]]
    """(T, T)."""
    init: list[float]
    """(T,)."""
    scale: str
    """What the file had: "percent" or "fraction"."""
    assumed: str
    """How the scale was guessed; "" where it was said."""
    told: dict[str, float]
    """The tool's own scores, fractions."""
    notes: list[str]


def cell(text: str, line: int, where: str) -> Cell:
    """Read one entry. Raises UserError where it is neither a number nor one of the words for none."""
    bare = text.strip().strip("\"'")
    if bare.lower() in UNKNOWN:
        return Cell(math.nan, line)
    number = bare.removesuffix("%").strip()
    if not _NUMBER.fullmatch(number):
        raise UserError(f"{where}:{line}: '{bare}' is no number")
    return Cell(float(number), line, bare.endswith("%"))


def is_number(text: str) -> bool:
    """Whether an entry can be read by `cell`."""
    bare = text.strip().strip("\"'")
    return bare.lower() in UNKNOWN or bool(_NUMBER.fullmatch(bare.removesuffix("%").strip()))


def natural(label: str) -> tuple[int, ...] | None:
    """Return the numbers in a task's name, by which tasks are sorted: "100-109" after "20-29"; None where none is."""
    found = re.findall(r"\d+", label)
    return tuple(map(int, found)) if found else None


def stream_order(labels: Sequence[str]) -> list[int]:
    """Return the places of the labels in the order of their numbers; as they are where one has no number."""
    keys = [natural(label) for label in labels]
    if any(key is None for key in keys) or len(set(keys)) < len(keys):
        return list(range(len(labels)))
    return sorted(range(len(labels)), key=lambda place: keys[place] or ())


def to_matrix(table: Table, n_tasks: int, where: str, scale: str | None = None) -> Matrix:
    """Return the matrix of a table.

    Args:
        table: a row after every task; a row may end at its own task.
        n_tasks: T, of the task it is imported for.
        where: the file, for messages.
        scale: "percent" or "fraction"; None detects it.

    Raises:
        UserError: a shape that is not (T, T) or its lower triangle, a hole in it, values of no one scale or of either.
    """
    rows = table.rows
    if len(rows) != n_tasks:
        last = f":{rows[-1][0].line}" if rows and rows[-1] else ""
        raise UserError(f"{where}{last}: {len(rows)} rows of accuracies, the task has {n_tasks} tasks")
    full: list[list[Cell]] = []
    for i, row in enumerate(rows):
        line = row[0].line if row else 0
        if len(row) not in (i + 1, n_tasks):
            some = f"{i + 1} (tasks learned) or {n_tasks} (all)" if i + 1 < n_tasks else f"{n_tasks}"
            raise UserError(f"{where}:{line}: {len(row)} accuracies after task {i + 1}; there must be {some}")
        full.append([*row, *[Cell(math.nan, line)] * (n_tasks - len(row))])
    for i, row in enumerate(full):
        for j, one in enumerate(row[: i + 1]):
            if math.isnan(one.value):
                raise UserError(f"{where}:{one.line}: no accuracy on task {j + 1} after task {i + 1}")
    if table.init and len(table.init) != n_tasks:
        raise UserError(f"{where}:{table.init[0].line}: {len(table.init)} accuracies before training, not {n_tasks}")
    notes = list(table.notes)
    above = [full[i][j].value for i in range(n_tasks) for j in range(i + 1, n_tasks)]
    # Tools allocate the whole matrix and fill in what they test. Where nothing was right on any task to come, as with
    # one head whose classes came one after the other, the accuracies were 0 indeed: unknown is then the safe reading.
    if above and all(value == 0 for value in above):
        notes.append("all entries above the diagonal are 0: taken as not measured")
        full = [[*row[: i + 1], *[Cell(math.nan, row[0].line)] * (n_tasks - i - 1)] for i, row in enumerate(full)]
    elif above and all(math.isnan(value) for value in above):
        notes.append("no accuracy on tasks not learned yet: forward transfer is unknown")
    known = [one for row in (*full, table.init) for one in row if not math.isnan(one.value)]
    found, assumed = (scale, "") if scale else _scale(known, [full[i][i] for i in range(n_tasks)], table.told, where)
    top = 100.0 if found == "percent" else 1.0
    for one in known:
        if not 0 <= one.value <= top:
            raise UserError(f"{where}:{one.line}: {one.value:g} lies outside 0 to {top:g} ({found})")
    by = 100.0 if found == "percent" else 1.0
    return Matrix(
        acc=[[one.value / by for one in row] for row in full],
        init=[one.value / by for one in table.init] or [math.nan] * n_tasks,
        scale=found,
        assumed=assumed,
        told={name: value / by for name, value in table.told.items()},
        notes=notes,
    )


def _scale(known: Sequence[Cell], diagonal: Sequence[Cell], told: Mapping[str, float], where: str) -> tuple[str, str]:
    """Return whether numbers are percent or fractions, and what was assumed; "" where percent signs say it.

    Raises UserError where some are one and some the other, and where they could be either.
    """
    signed = [one for one in known if one.is_percent]
    if signed and len(signed) < len(known):
        bare = next(one for one in known if not one.is_percent)
        raise UserError(f"{where}:{bare.line}: mixed, {bare.value:g} has no percent sign and others have one")
    above = [one for one in known if one.value > 1]
    if not signed and not above:
        largest = max((one.value for one in known), default=0.0)
        # A net that learned nothing is right on 1 % of 100 classes, always.
        if all(one.value in (0, 1) for one in known):
            raise UserError(f"{where}: only 0 and 1: percent or fractions? Say which by --scale")
        over = next((name for name, value in told.items() if abs(value) > 1), None)
        if over is not None:
            raise UserError(
                f"{where}: no accuracy above {largest:g}, but its own {over} is {told[over]:g}: percent or fractions? "
                "Say which by --scale"
            )
        return "fraction", f"taken as fractions, none is above 1 (the largest is {largest:g}); else: --scale percent"
    # What was learned a moment ago is hardly below 1 %: there the file has changed its scale.
    odd = [one for one in diagonal if 0 < one.value <= 1]
    if not signed and odd:
        raise UserError(
            f"{where}:{odd[0].line}: mixed, {odd[0].value:g} on a task just learned beside {above[0].value:g} "
            f"(line {above[0].line}): percent or fractions? Say which by --scale"
        )
    if signed:
        return "percent", ""
    return "percent", f"taken as percent, {above[0].value:g} (line {above[0].line}) is no fraction"
