"""`clbench compare`: one method against others, seed by seed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clbench import budgets
from clbench.commands.common import RUNS, command

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    compare = command(
        commands,
        "compare",
        "compare a baseline with others, seed by seed: differences with intervals, p, and what the seeds cannot tell",
        _compare,
        "clbench compare ewc finetune joint --task digits_split",
    )
    compare.add_argument("first", metavar="BASELINE", help="what is compared, as recorded: name or label")
    compare.add_argument("others", nargs="*", metavar="OTHER", help="what with")
    compare.add_argument("--against", nargs="+", default=[], metavar="OTHER", help="more of them")
    compare.add_argument("--task", nargs="+", metavar="NAME", help="only these tasks")
    compare.add_argument("--metric", nargs="+", metavar="NAME", help="only these; see: clbench list metrics")
    compare.add_argument(
        "--interval", choices=["t", "bca"], default="t",
        help="Student's t, or BCa bootstrap, which few seeds make too short (default %(default)s)",
    )  # fmt: skip
    compare.add_argument(
        "--matched", nargs="?", const=budgets.DEFAULT, choices=list(budgets.BUDGETS), metavar="BUDGET",
        help="among all recorded settings of these baselines, the pairs within 2 %% of each other in "
        f"{', '.join(budgets.BUDGETS)} (default {budgets.DEFAULT})",
    )  # fmt: skip
    compare.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="records (default %(default)s)")
    compare.add_argument("--out", type=Path, metavar="DIR", help="also write md, csv and tex files here")


def _compare(options: argparse.Namespace) -> int:
    from clbench.errors import UserError
    from clbench.report.compare import compare
    from clbench.report.compare_table import console, write

    others = list(dict.fromkeys([*options.others, *options.against]))
    if not others:
        raise UserError(f"compare '{options.first}' with what? Name one more baseline: clbench compare NAME OTHER")
    found = compare(
        options.runs, options.first, others,
        tasks=options.task, metrics=options.metric, interval=options.interval, matched=options.matched,
    )  # fmt: skip
    # Whoever reads only the first lines (head) still wants the files.
    written = write(found, options.out) if options.out is not None else []
    for line in found.problems:
        print(f"clbench: {line}", file=sys.stderr)
    print(console(found))
    if written:
        print(f"written: {', '.join(map(str, written))}")
    return 0
