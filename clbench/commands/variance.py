"""`clbench variance`: where the spread over seeds comes from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.commands.common import RUNS, command

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    variance = command(
        commands,
        "variance",
        "tell the spread over seeds apart: initialisation, order of data, order of classes; says what runs it takes",
        _variance,
        "clbench variance ewc --task digits_split",
    )
    variance.add_argument("baseline", metavar="BASELINE", help="as recorded")
    variance.add_argument("--task", required=True, metavar="NAME")
    variance.add_argument(
        "--metric", default="average_accuracy", metavar="NAME", help="see: clbench list metrics (default %(default)s)"
    )
    variance.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="records (default %(default)s)")
    variance.add_argument("--out", type=Path, metavar="DIR", help="also write md and tex files here")


def _variance(options: argparse.Namespace) -> int:
    from clbench.records import write_atomic
    from clbench.report.variance import components, table
    from clbench.report.writers import to_console, to_latex, to_markdown

    made = table(components(options.runs, options.baseline, options.task, options.metric))
    written = []
    for suffix, text in (("md", to_markdown(made, "#")), ("tex", to_latex(made))) if options.out is not None else ():
        written.append(options.out / f"{made.label}.{suffix}")
        write_atomic(written[-1], text)
    print("\n".join([to_console(made), *made.caption[1:4], *(f"written: {path}" for path in written)]))
    return 0
