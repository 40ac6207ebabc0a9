"""`clbench reproduce`: ours beside published numbers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clbench.commands.common import command, execution, explain_failures, run_all, seeds
from clbench.errors import UserError

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    reproduce = command(
        commands,
        "reproduce",
        "run what published rows need and say whether ours agree: reproduced, differs, under-powered, not comparable",
        _reproduce,
        "clbench reproduce split_mnist_task/finetune --seeds 3",
    )
    reproduce.add_argument(
        "row", nargs="*", metavar="PATTERN",
        help="task/baseline, task, source or source/task (such as vandeven2018/split_mnist_task), with * and ?; "
        "without any, every row. See: clbench list published",
    )  # fmt: skip
    reproduce.add_argument("--recorded", action="store_true", help="run nothing: compare what is recorded")
    execution(reproduce, "3")


def _reproduce(options: argparse.Namespace) -> int:
    from clbench.report import build, published, reproduction

    rows, problems = published.shipped_rows()
    if problems:
        raise UserError(*problems)
    chosen = published.choose(rows, options.row)
    outcomes = [] if options.recorded else run_all(_jobs(chosen, seeds(options.seeds)), options)
    comparisons, problems = build.build_reproduction(options.out, options.out.parent, rows)
    mine = [item for item in comparisons if any(item.row is row for row in chosen)]
    if mine:
        print(reproduction.console(mine))
    left = len(chosen) - len({id(item.row) for item in mine})
    print(f"{len(mine)} comparisons; {left} of {len(chosen)} rows without a finished run. ", end="")
    print(f"All rows: {options.out.parent / 'tables' / 'reproduction.md'}" if comparisons else "Nothing was written.")
    for line in problems:
        print(f"clbench: {line}", file=sys.stderr)
    return explain_failures(outcomes)


def _jobs(rows: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
    """Return the runs that published rows need; every mistake of every experiment at once."""
    from clbench import sweep

    jobs: list[Any] = []
    lines: list[str] = []
    for task, baseline in dict.fromkeys((row.task, row.experiment.label) for row in rows):
        try:
            jobs += sweep.plan([task], [baseline], seeds)
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(*dict.fromkeys(lines))
    return jobs
