"""What a folder of tables and figures was made from, kept beside them, and the script that makes it again.

`tables/records.csv` has the SHA-256 of every record; `rebuild.py` has what was asked for and the versions. The script
says what differs from then and builds the report: figures are drawn by one program, not by two that may disagree.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from clbench import __version__
from clbench.errors import UserError
from clbench.records import RunRecord
from clbench.report.rebuild import SCRIPT
from clbench.report.writers import to_csv

RECORDS, STYLE = "records.csv", "style.toml"
PACKAGES = ("matplotlib", "numpy", "scipy")
"""What the bytes of a report depend on, besides records and clbench."""
_HEADER = ("record", "task", "baseline", "seed", "device", "status", "sha256")
_VERSIONS = "VERSIONS = "
_SCRIPT = '''"""Makes the tables, figures and page of this folder again, and says what differs from when they were made.

    python {name} [--runs DIR]

Needs clbench, and the records that tables/{records} names. The command that made the folder, from there:

    {command}
"""

from clbench.report.rebuild import rebuild

RUNS = {runs}
CHOICE = {choice}
{versions}

if __name__ == "__main__":
    raise SystemExit(rebuild(__file__, RUNS, CHOICE, VERSIONS))
'''


def records_csv(records: Iterable[RunRecord], runs: Path) -> str:
    """Return a row a record: its path under `runs`, what it is of, and the SHA-256 of its file."""
    rows = []
    for record in records:
        path = record.path(runs)
        what = (record.task.name, record.baseline.label, str(record.seed), record.environment.device, record.status)
        rows.append((path.relative_to(runs).as_posix(), *what, _digest(path)))
    # A result of another tool stands beside ours in every block.
    return to_csv(_HEADER, sorted(set(rows)))


def script(choice: Mapping[str, Sequence[str]], runs: Path, out: Path) -> str:
    """Return the script of a folder.

    Args:
        choice: option of `clbench report` -> its names; "style" is the folder's own copy of the file.
        runs: the records, which the script names relative to the folder.
        out: the folder.
    """
    where = Path(os.path.relpath(runs.resolve(), out.resolve())).as_posix()
    words = [word for option, names in choice.items() for word in (f"--{option}", *names)]
    return _SCRIPT.format(
        name=SCRIPT,
        records=RECORDS,
        command="clbench report " + shlex.join(["--runs", where, "--out", ".", *words]),
        runs=json.dumps(where),
        choice=json.dumps(choice, ensure_ascii=False),
        versions=_VERSIONS + json.dumps(versions()),
    )


def lasting(text: str) -> str:
    """Return a script without what differs from place to place: versions, and where the records lie."""
    passing = ("RUNS = ", _VERSIONS, "    clbench report --runs ")
    return "\n".join(line for line in text.splitlines() if not line.startswith(passing))


def versions() -> dict[str, str]:
    """Return the versions of clbench and `PACKAGES`."""
    return {"clbench": __version__, **{name: version(name) for name in PACKAGES}}


def differences(out: Path, runs: Path, then: Mapping[str, str]) -> list[str]:
    """Return one line for each record and each version that is not what a folder was made with.

    Args:
        out: the folder, with its list of records.
        runs: the records.
        then: versions by package.

    Raises:
        UserError: the list of records cannot be read.
    """
    path = out / "tables" / RECORDS
    try:
        with path.open(encoding="utf-8", newline="") as file:
            known = {row["record"]: row["sha256"] for row in csv.DictReader(file)}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except KeyError as error:
        raise UserError(f"{path}: no column {error}") from None
    lines = []
    for name, digest in known.items():
        if not (runs / name).is_file():
            lines.append(f"{name}: the record is missing")
        elif _digest(runs / name) != digest:
            lines.append(f"{name}: the record is not what it was")
    now = versions()
    changed = [name for name in then if now.get(name) != then[name]]
    return [*lines, *(f"{name}: {now.get(name)} here, {then[name]} then" for name in changed)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
