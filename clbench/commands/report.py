"""`clbench report`: tables, figures and the page, from records."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.commands.common import OUT, RUNS, command

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    report = command(
        commands,
        "report",
        "write tables, figures and one HTML page from records",
        _report,
        "clbench report --runs results/runs --out results",
    )
    report.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="records (default %(default)s)")
    report.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where to write (default %(default)s)")
    report.add_argument("--task", nargs="+", metavar="NAME", help="only these tasks")
    report.add_argument("--baseline", nargs="+", metavar="NAME", help="only these baselines")
    report.add_argument("--family", nargs="+", metavar="NAME", help="only baselines of these families")
    report.add_argument("--metric", nargs="+", metavar="NAME", help="only these columns; see: clbench list metrics")
    report.add_argument("--style", type=Path, metavar="FILE", help="order, names, titles and colours (TOML)")
    report.add_argument(
        "--readme", type=Path, metavar="FILE",
        help="also rewrite the parts of this file between <!-- results:begin TASK... --> (no task: all) and <!-- "
        "results:end -->, or <!-- reproduce:begin PATTERN... --> and <!-- reproduce:end -->",
    )  # fmt: skip
    report.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is stale")


def _report(options: argparse.Namespace) -> int:
    from clbench.report import build
    from clbench.report.choice import Choice
    from clbench.report.readme import update

    readme = options.readme
    choice = Choice(options.task, options.baseline, options.family, options.metric, options.style)
    if options.check:
        stale = build.check(options.runs, options.out, readme, choice)
        for line in stale:
            print(line)
        print(f"{len(stale)} files are not what the records say" if stale else "everything says what the records say")
        return 1 if stale else 0
    built = build.build(options.runs, options.out, choice, jobs=os.cpu_count() or 1)
    if readme is not None:
        update(readme, built.shown)
    for line in (*built.remarks, *built.problems):
        print(f"clbench: {line}", file=sys.stderr)
    print(f"{len(built.paths)} files in {options.out}; open {options.out / 'report.html'}")
    return 0
