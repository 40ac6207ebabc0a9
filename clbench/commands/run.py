"""`clbench run`: baselines on task streams."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clbench.commands.common import command, execution, explain_failures, overrides, run_all, seeds

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    run = command(
        commands,
        "run",
        "run baselines on task streams; what is recorded is skipped, what was interrupted goes on",
        _run,
        "clbench run --task digits_split --baseline finetune joint ewc --seeds 3",
    )
    run.add_argument("--task", nargs="+", required=True, metavar="NAME", help="shipped names or recipe files")
    run.add_argument("--baseline", nargs="+", required=True, metavar="NAME", help="shipped names or recipe files")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of the strategy, train.<key> or model.<key>; recorded as <baseline>@<hash>",
    )  # fmt: skip
    execution(run, "3")


def _run(options: argparse.Namespace) -> int:
    from clbench import sweep

    started = time.monotonic()
    jobs = sweep.plan(options.task, options.baseline, seeds(options.seeds), overrides(options.set))
    outcomes = run_all(jobs, options)
    _print_table(outcomes)
    kinds = ("done", "skipped", "failed", "interrupted")
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in kinds}
    stopped = f", {counts['interrupted']} interrupted" if counts["interrupted"] else ""
    print(
        f"{counts['done']} runs done, {counts['skipped']} recorded before, {counts['failed']} failed{stopped} "
        f"in {sweep.seconds_since(started)}. Records: {options.out}"
    )
    return explain_failures(outcomes)


def _print_table(outcomes: Sequence[Any]) -> None:
    from clbench import records
    from clbench.report import console

    print(console.text(records.load(outcome.record) for outcome in outcomes if outcome.record.is_file()))
