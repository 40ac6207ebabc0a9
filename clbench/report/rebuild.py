"""What `rebuild.py` calls, the script beside every report: says what differs from then, and builds it again.

What it needs is imported when it is called: it takes seconds, in which Ctrl-C is to be one line like later.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SCRIPT = "rebuild.py"


def rebuild(
    file: str,
    runs: str,
    choice: Mapping[str, Sequence[str]],
    then: Mapping[str, str],
    arguments: Sequence[str] | None = None,
) -> int:
    """Build the folder that a script stands in again; return the exit code.

    Args:
        file: the script.
        runs: the records, from the script's folder.
        choice: option of `clbench report` -> its names.
        then: versions that the folder was made with.
        arguments: of the command line; None takes the process's own.
    """
    try:
        return _rebuild(file, runs, choice, then, arguments)
    except KeyboardInterrupt:
        print(f"{SCRIPT}: stopped; call it again", file=sys.stderr)
        return 130


def _rebuild(
    file: str, runs: str, choice: Mapping[str, Sequence[str]], then: Mapping[str, str], arguments: Sequence[str] | None
) -> int:
    from clbench.errors import UserError
    from clbench.report.build import build
    from clbench.report.choice import Choice
    from clbench.report.provenance import differences

    home = Path(file).resolve().parent
    parser = argparse.ArgumentParser(prog=SCRIPT, description="Make tables, figures and page of this folder again.")
    parser.add_argument("--runs", type=Path, default=home / runs, metavar="DIR", help="records (default %(default)s)")
    where: Path = parser.parse_args(arguments).runs
    try:
        lines = differences(home, where, then)
        built = build(where, home, Choice.of(choice, home), jobs=os.cpu_count() or 1)
    except UserError as error:
        for line in error.lines:
            print(f"{SCRIPT}: {line}", file=sys.stderr)
        return 2
    for line in lines:
        print(f"{SCRIPT}: {line}", file=sys.stderr)
    print(f"{len(built.paths)} files in {home}")
    return 0
