"""What commands have in common: how they are declared, how runs are asked for, and how failed ones are told."""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clbench.errors import UserError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

RUNS, OUT = Path("results/runs"), Path("results")


def command(commands: Commands, name: str, words: str, call: Any, example: str) -> argparse.ArgumentParser:
    """Add a command: its name, what it does in words, the function that does it, and an example that works."""
    made = commands.add_parser(
        name,
        help=words,
        description=words[0].upper() + words[1:] + ".",
        epilog=f"example:  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(call=call)
    return made


def execution(parser: argparse.ArgumentParser, seeds: str) -> None:
    """Add the options of every command that runs."""
    parser.add_argument("--seeds", default=seeds, metavar="N|LIST", help="5 means seeds 0 to 4; or 0,3,7 (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (default %(default)s)")
    parser.add_argument("--jobs", type=positive, metavar="N", help="runs at a time (cores / threads; 1 on a GPU)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads of a run (%(default)s)")
    parser.add_argument("--out", type=Path, default=RUNS, metavar="DIR", help="records (default %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="say nothing while runs go on")


def positive(text: str) -> int:
    """Read a whole number above 0."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not '{text}'")
    return number


def seeds(text: str) -> list[int]:
    """Read "5" as seeds 0 to 4, "0,3,7" as those."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    too_many = "," not in text and numbers and numbers[0] > 1000
    if not numbers or min(numbers) < 0 or max(numbers) >= 2**32 or too_many or (numbers == [0] and "," not in text):
        raise UserError(f"--seeds {text}: give a number of seeds (5; at most 1000) or a list (0,3,7); seed 0 alone: 0,")
    return list(range(numbers[0])) if len(numbers) == 1 and "," not in text else numbers


def overrides(given: Sequence[str]) -> dict[str, Any]:
    """Read key=value pairs; values as TOML writes them, anything else as text."""
    found: dict[str, Any] = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair}: must be key=value, such as lam=100 or train.lr=0.01")
        if key in found:
            raise UserError(f"--set {pair}: {key} is set twice")
        try:
            found[key] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return found


def run_all(jobs: Sequence[Any], options: argparse.Namespace) -> list[Any]:
    """Run what is not recorded, by the options of `execution`; return the outcomes (`clbench.sweep`)."""
    from clbench import sweep

    return sweep.sweep(
        jobs,
        options.out,
        device=options.device,
        workers=options.jobs,
        threads=options.threads,
        show_progress=not options.quiet,
        track=getattr(options, "track", None) or (),
        evaluate_every=getattr(options, "evaluate_every", None),
    )


def explain_failures(outcomes: Sequence[Any]) -> int:
    """Say on stderr what failed; return the exit code."""
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        where = outcome.log or outcome.record
        print(f"clbench: failed: {outcome.job}: {outcome.error} (see {where})", file=sys.stderr)
    return 1 if failed or any(outcome.status == "interrupted" for outcome in outcomes) else 0
