"""`clbench import`: results of other tools beside ours."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.commands.common import RUNS, command

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    parser = command(
        commands,
        "import",
        "take in accuracy matrices of other tools, marked as imported and scored by our definitions",
        _import,
        "clbench import acc_taw-2026-01-31-12-00.txt --task split_cifar100_10x10 --baseline ewc",
    )
    parser.add_argument("file", nargs="+", type=Path, metavar="FILE", help="a run a file; Mammoth's: a run a line")
    parser.add_argument("--task", required=True, metavar="NAME", help="the protocol the runs followed: name or recipe")
    parser.add_argument("--baseline", required=True, metavar="LABEL", help="what to call the method in tables")
    parser.add_argument(
        "--format", default="auto", metavar="NAME",
        help="csv, facil (acc_taw-*.txt, acc_tag-*.txt), mammoth (logs.pyd), clarena (acc.csv), pycil (log) or auto",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="K", help="number of the first run (default 0)")
    parser.add_argument("--scale", choices=["percent", "fraction"], help="of the numbers (default: by looking)")
    parser.add_argument("--out", type=Path, default=RUNS, metavar="DIR", help="records (default %(default)s)")


def _import(options: argparse.Namespace) -> int:
    from clbench.importing.record import import_files
    from clbench.report import console

    results = import_files(
        options.file, task=options.task, label=options.baseline, runs=options.out, seed=options.seed,
        format_name=options.format, scale=options.scale,
    )  # fmt: skip
    guessed = {(str(result.record.imported and result.record.imported.file), result.assumed) for result in results}
    for file, assumed in sorted(guessed):
        if assumed:
            print(f"clbench: {file}: {assumed}", file=sys.stderr)
    for result in results:
        source = result.record.imported
        assert source is not None
        state = "written" if result.is_new else "was there"
        print(f"{source.file}, run {source.run}: {source.tool}, read as {source.scale}; {state}: {result.path}")
        for note in source.notes:
            print(f"  {note}")
    print(console.text(result.record for result in results))
    return 0
