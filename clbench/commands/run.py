"""`clbench run`: baselines on task streams."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from clbench import budgets
from clbench.commands.common import command, execution, explain_failures, overrides, positive, run_all, seeds
from clbench.errors import UserError

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
        "--set", action="extend", nargs="+", default=[], metavar="KEY=VALUE",
        help="a setting of the strategy, train.<key> or model.<key>; recorded as <baseline>@<hash>",
    )  # fmt: skip
    run.add_argument(
        "--match", choices=list(budgets.BUDGETS), metavar="BUDGET",
        help="size every baseline so that it costs as much as that of --to, within 2 %%: "
        f"{', '.join(budgets.BUDGETS)}",
    )  # fmt: skip
    run.add_argument("--to", metavar="BASELINE", help="for --match: a name, a recipe file, or a label of records")
    run.add_argument("--by", metavar="SETTING", help="for --match: what to change, a setting or width")
    run.add_argument(
        "--evaluate-every", type=positive, metavar="N",
        help="also evaluate the tasks seen every N training iterations, for within-task curves, min-ACC and WC-ACC; "
        "changes no other number; runs recorded without it, or with another N, are run again",
    )  # fmt: skip
    run.add_argument(
        "--track", nargs="+", default=[], choices=["tensorboard", "wandb"], metavar="TRACKER",
        help="also write charts of every run: tensorboard, wandb (offline); under tracking/ beside the records",
    )  # fmt: skip
    execution(run, "3")


def _run(options: argparse.Namespace) -> int:
    from clbench import sweep

    started = time.monotonic()
    given = overrides(options.set)
    matches = _matches(options, given)
    if matches:
        jobs = [job for found in matches for job in _jobs_of(found, seeds(options.seeds))]
    else:
        jobs = sweep.plan(options.task, options.baseline, seeds(options.seeds), given)
    outcomes = run_all(jobs, options)
    _print_table(outcomes)
    _say_missed(matches, outcomes)
    kinds = ("done", "skipped", "failed", "interrupted")
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in kinds}
    stopped = f", {counts['interrupted']} interrupted" if counts["interrupted"] else ""
    print(
        f"{counts['done']} runs done, {counts['skipped']} recorded before, {counts['failed']} failed{stopped} "
        f"in {sweep.seconds_since(started)}. Records: {options.out}"
    )
    return explain_failures(outcomes)


def _matches(options: argparse.Namespace, given: dict[str, Any]) -> list[Any]:
    """Return the sizes that were asked for, a task and baseline each; every mistake at once."""
    if options.match is None or options.to is None:
        alone = next((name for name in ("match", "to", "by") if getattr(options, name) is not None), None)
        if alone:
            raise UserError(f"--{alone}: a matched run needs --match BUDGET and --to BASELINE")
        return []
    from clbench import sweep
    from clbench.matching import check_match, match

    pairs = [(task, one) for task in dict.fromkeys(options.task) for one in dict.fromkeys(options.baseline)]

    def each(what: Callable[..., Any]) -> list[Any]:
        found: list[Any] = []
        lines: list[str] = []
        for task, one in pairs:
            try:
                found.append(
                    what(task, one, options.to, options.match, by=options.by, overrides=given, runs=options.out)
                )
                if found[-1] is not None:
                    print(found[-1])
            except UserError as error:
                lines += error.lines
        if lines:
            raise UserError(*dict.fromkeys(lines))
        return found

    # What can be wrong is wrong before data are read, and all of it before a size is looked for.
    each(check_match)
    sweep.plan(options.task, options.baseline, seeds(options.seeds), given)
    return each(match)


def _jobs_of(found: Any, numbers: Sequence[int]) -> list[Any]:
    from clbench.sweep import Job

    return [Job(found.experiment, seed) for seed in numbers]


def _say_missed(matches: Sequence[Any], outcomes: Sequence[Any]) -> None:
    """Say on stderr where a run cost more or less than its size promised: its costs depend on what it learns."""
    from clbench import records

    promised = {(found.experiment.task.name, found.experiment.label): found for found in matches}
    for outcome in outcomes:
        found = promised.get((outcome.job.experiment.task.name, outcome.job.experiment.label))
        if found is None or outcome.status not in ("done", "skipped"):
            continue
        cost = budgets.BUDGETS[found.budget](budgets.Costs.of(records.load(outcome.record)))
        if cost is None:  # a record from before operations were counted
            continue
        off = (cost - found.wanted) / found.wanted
        if abs(off) > budgets.TOLERANCE:
            print(
                f"clbench: {outcome.job}: {found.budget} came out {off:+.1%} from {found.to}'s: what this method costs "
                "depends on how it learns",
                file=sys.stderr,
            )


def _print_table(outcomes: Sequence[Any]) -> None:
    from clbench import records
    from clbench.report import console

    print(console.text(records.load(outcome.record) for outcome in outcomes if outcome.record.is_file()))
