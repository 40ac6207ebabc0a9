"""The files of other tools, each read into `matrix.Table`s, one a run.

csv       a row after every task, a column a task; header and first column may name them. Lines that begin with # are
          comments; "# forgetting: 33.25" in one is the tool's own score.
facil     FACIL's results/acc_taw-<time>.txt or acc_tag-<time>.txt: tabs, fractions, zeros above the diagonal; the
          forg_taw or forg_tag file beside it has its own forgetting.
mammoth   Mammoth's logs.pyd: a Python dict a line, a line a run, accuracy_<j>_task<i> on task j after task i.
clarena   clarena's acc.csv: after_training_task, average_accuracy, test_on_task_<j>.
pycil     the log of PyCIL and PILOT: lines "CNN: {'total': .., '00-09': .., ..}", one after every task.

Sources: the writers of these files in the tools' own repositories (FACIL disk_logger.py, Mammoth utils/loggers.py,
clarena metrics/cl_acc.py, PyCIL trainer.py), read for their formats alone.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from clbench.errors import UserError, unknown
from clbench.importing.matrix import Cell, Table, cell, is_number, natural, stream_order

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_MAMMOTH = re.compile(rf"'accuracy_(\d+)_task(\d+)':\s*(?:[\w.]+\()?({_NUMBER}|nan)")
_MAMMOTH_TOLD = re.compile(rf"'(forgetting|backward_transfer)':\s*(?:[\w.]+\()?({_NUMBER})")
_PYCIL = re.compile(r"\bCNN: (\{.*\})")
_PYCIL_TASK = re.compile(rf"'(\d+-\d+)':\s*(?:[\w.]+\()?({_NUMBER})")
_PYCIL_TOLD = re.compile(rf"\bForgetting \(CNN\): (?:[\w.]+\()?({_NUMBER})")
_TOLD = re.compile(rf"#\s*([A-Za-z][\w .]*?)\s*[:=]\s*({_NUMBER})\s*%?\s*$")
_CLARENA = "after_training_task"
_BEFORE = ("init", "initial", "before", "random")


def read(path: Path, name: str, n_tasks: int, scenario: str) -> tuple[str, list[Table]]:
    """Return the tool that wrote a file and its runs.

    Args:
        path: the file.
        name: of the format; "auto" looks at the file.
        n_tasks: T, of the task it is imported for.
        scenario: of that task.

    Raises:
        UserError: no such file, or not of that format; with the line.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; give a file of it, such as FACIL's acc_taw-<date>.txt")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if name not in (*FORMATS, "auto"):
        raise UserError(unknown("format", name, [*FORMATS, "auto"]))
    if not text.strip():
        raise UserError(f"{path}: is empty")
    chosen = detected(path, text) if name == "auto" else name
    tool, reader = FORMATS[chosen]
    return tool, reader(path, text, n_tasks, scenario)


def detected(path: Path, text: str) -> str:
    """Return the format of a file by its name and its first lines."""
    if path.suffix == ".pyd" or _MAMMOTH.search(text):
        return "mammoth"
    if re.match(r"(acc|forg|w?avg_accs)_ta[wg]", path.name):
        return "facil"
    if _PYCIL.search(text):
        return "pycil"
    return "clarena" if _CLARENA in text.split("\n", 1)[0] else "csv"


# ----------------------------------------------------------------------------------------------------------------- csv


def _csv(path: Path, text: str, n_tasks: int, scenario: str) -> list[Table]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    told = {m[1].strip().lower(): float(m[2]) for _, line in lines if (m := _TOLD.match(line.strip()))}
    lines = [(number, line) for number, line in lines if not line.lstrip().startswith("#")]
    split = _splitter([line for _, line in lines])
    rows = [(number, split(line)) for number, line in lines]
    if not rows:
        raise UserError(f"{path}: no row of accuracies")
    header: list[str] = []
    first = rows[0][1]
    # A row of names; one that is named and then has numbers is a row of accuracies.
    if not all(is_number(part) for part in first[1:] or first) or (len(rows) == n_tasks + 1 and _counts(first)):
        header, rows = first, rows[1:]
    named = _has_names(header, rows, n_tasks)
    names = [parts[0] for _, parts in rows] if named else []
    table = Table([[cell(part, line, str(path)) for part in parts[named:]] for line, parts in rows], told)
    if names and names[0].strip().lower() in _BEFORE:
        table.init, table.rows, names = table.rows[0], table.rows[1:], names[1:]
    columns = header[named:] if len(header) > n_tasks else header
    for kind, labels in (("columns", columns), ("rows", names)):
        order = stream_order(labels) if len(labels) == n_tasks else list(range(len(labels)))
        if order == list(range(len(labels))):
            continue
        table.notes.append(
            f"{kind} stood as {', '.join(labels[:4])}, ...: put in the order of the stream, as numbers and not as text"
        )
        if kind == "rows":
            if len(table.rows) == n_tasks:
                table.rows = [table.rows[place] for place in order]
            continue
        if any(len(row) != n_tasks for row in [*table.rows, *([table.init] if table.init else [])]):
            short = next(row for row in table.rows if len(row) != n_tasks)
            raise UserError(f"{path}:{short[0].line}: columns are not in the stream's order, and a row lacks some")
        table.rows = [[row[place] for place in order] for row in table.rows]
        table.init = [table.init[place] for place in order] if table.init else []
    table.labels = sorted(columns, key=lambda label: natural(label) or ()) if len(columns) == n_tasks else []
    return [table]


def _splitter(lines: Sequence[str]) -> Callable[[str], list[str]]:
    for mark in (";", "\t", ","):
        if any(mark in line for line in lines):
            return lambda line: [part.strip() for part in next(csv.reader([line.rstrip(mark)], delimiter=mark))]
    return str.split


def _counts(parts: Sequence[str]) -> bool:
    """Whether a row counts its columns: 0 1 2 or 1 2 3, after a first cell of any kind."""
    for first in (0, 1):
        for start in (0, 1):
            tail = parts[start:]
            if len(tail) > 1 and tail == [str(first + i) for i in range(len(tail))]:
                return True
    return False


def _has_names(header: Sequence[str], rows: Sequence[tuple[int, list[str]]], n_tasks: int) -> bool:
    """Whether the first column names the rows."""
    firsts = [parts[0] for _, parts in rows]
    if not all(map(is_number, firsts)):
        return True
    wide = len(header) == n_tasks + 1 or all(len(parts) == n_tasks + 1 for _, parts in rows)
    return wide and any(firsts == [str(start + i) for i in range(len(rows))] for start in (0, 1))


# ----------------------------------------------------------------------------------------------------------- the tools


def _facil(path: Path, text: str, n_tasks: int, scenario: str) -> list[Table]:
    kind = re.match(r"(acc|forg|w?avg_accs)_(ta[wg])", path.name)
    if kind and kind[1] != "acc":
        raise UserError(f"{path}: holds {kind[1]}, not the accuracy of every task; give acc_{kind[2]}-*.txt")
    rows = _tabbed(path, text)
    for row in rows:
        if row and all(one.value == 0 for one in row):
            raise UserError(f"{path}:{row[0].line}: a row of zeros: the run had not come so far")
    table = Table(rows)
    if kind:
        named = kind[2] == "taw"
        if named != (scenario == "task"):
            says = "knows" if named else "does not know"
            table.notes.append(f"acc_{kind[2]} {says} a sample's task, the task here is {scenario}-incremental")
        beside = path.with_name(path.name.replace("acc_", "forg_", 1))
        if beside.is_file():
            last = _tabbed(beside, beside.read_text(encoding="utf-8"))[-1]
            if len(last) == n_tasks > 1:
                table.told["forgetting"] = sum(one.value for one in last[:-1]) / (n_tasks - 1)
    return [table]


def _tabbed(path: Path, text: str) -> list[list[Cell]]:
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [[cell(part, number, str(path)) for part in line.split()] for number, line in lines]


def _mammoth(path: Path, text: str, n_tasks: int, scenario: str) -> list[Table]:
    tables = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found: dict[int, dict[int, Cell]] = {}
        for task, after, value in _MAMMOTH.findall(line):
            found.setdefault(int(after), {})[int(task)] = cell(value, number, str(path))
        if not found:
            means = "'accmean_task" in line
            why = "means over tasks alone (Mammoth keeps the accuracy of each for class-il)" if means else "no run"
            raise UserError(f"{path}:{number}: {why}: no accuracy_<task>_task<after>")
        table = Table(_by_task(found, path, number))
        table.told = {name: float(value) for name, value in _MAMMOTH_TOLD.findall(line)}
        tables.append(table)
    return tables


def _by_task(found: dict[int, dict[int, Cell]], path: Path, number: int) -> list[list[Cell]]:
    rows = []
    for place, after in enumerate(sorted(found), 1):
        tasks = sorted(found[after])
        if after != place or tasks != list(range(1, len(tasks) + 1)):
            raise UserError(f"{path}:{number}: accuracies after task {after} are of tasks {tasks}: some are missing")
        rows.append([found[after][task] for task in tasks])
    return rows


def _clarena(path: Path, text: str, n_tasks: int, scenario: str) -> list[Table]:
    reader = csv.DictReader(io.StringIO(text))
    fields = reader.fieldnames or []
    columns = [name for name in fields if re.fullmatch(r"test_on_task_\d+", name)]
    if _CLARENA not in fields or not columns:
        raise UserError(f"{path}:1: no columns {_CLARENA} and test_on_task_<task>: not clarena's acc.csv")
    # Columns come in the order of the names that a user's configuration lists.
    columns.sort(key=lambda name: natural(name) or ())
    rows: dict[int, list[Cell]] = {}
    averages: dict[int, str] = {}
    for line in reader:
        number = reader.line_num
        if not (line[_CLARENA] or "").isdecimal():
            raise UserError(f"{path}:{number}: {_CLARENA} is '{line[_CLARENA]}', no number of a task")
        after = int(line[_CLARENA])
        if after in rows:
            raise UserError(f"{path}:{number}: a second row after task {after}")
        rows[after] = [cell(line[name] or "", number, str(path)) for name in columns]
        averages[after] = line.get("average_accuracy") or ""
    table = Table([rows[after] for after in sorted(rows)])
    average = averages[max(averages)] if averages else ""  # lines may come in the order of numbers as text
    if average and is_number(average):
        table.told["average accuracy"] = float(average)
    return [table]


def _pycil(path: Path, text: str, n_tasks: int, scenario: str) -> list[Table]:
    rows: list[list[Cell]] = []
    labels: list[str] = []
    told: dict[str, float] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if (found := _PYCIL.search(line)) is not None:
            named = dict(_PYCIL_TASK.findall(found[1]))
            labels = sorted(named, key=lambda label: natural(label) or ())
            if len(labels) == 1 and rows:
                raise UserError(f"{path}:{number}: a second run begins; give a file a run")
            rows.append([cell(named[label], number, str(path)) for label in labels])
        elif (score := _PYCIL_TOLD.search(line)) is not None:
            told["forgetting"] = float(score[1])
    if not rows:
        raise UserError(f"{path}: no line 'CNN: {{..}}': no log of PyCIL's")
    table = Table(rows, told, labels=labels)
    if "NME: {" in text:
        table.notes.append("the log also has answers by nearest class means (NME): those of the net (CNN) are taken")
    return [table]


_Reader = Callable[[Path, str, int, str], list[Table]]

FORMATS: dict[str, tuple[str, _Reader]] = {
    "csv": ("csv", _csv),
    "facil": ("FACIL", _facil),
    "mammoth": ("Mammoth", _mammoth),
    "clarena": ("clarena", _clarena),
    "pycil": ("PyCIL", _pycil),
}
"""Name of the format -> the tool, and what reads its files."""
