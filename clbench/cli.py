"""The command `clbench`: parse, call, exit code.

0 all went well, 1 a run failed (or `report --check` found something stale), 2 a mistake of the user's: one line each on
stderr, and nothing written.

Commands import what they need when they are called: torch takes seconds, and `clbench report` needs none of it. They
are imported themselves when `main` is called, so that Ctrl-C is answered from the first moment.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from clbench import __version__
from clbench.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    # avalanche imports wandb, which must neither ask for an account nor reach for the network.
    os.environ.setdefault("WANDB_MODE", "offline")
    try:
        options = _parser().parse_args(arguments)
        code: int = options.call(options)
        return code
    except UserError as error:
        for line in error.lines:
            print(f"clbench: {line}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = _PACKAGES.get((error.name or "").partition(".")[0])
        if package is None:  # of a user's own file, or of ours: whoever wrote it needs the traceback
            raise
        print(f"clbench: the package {package} is not here; try: pip install {package}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clbench: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads us (head, less) has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


_OWN_NAMES = (
    "jinja2", "matplotlib", "numpy", "pandas", "psutil", "pydantic", "quadprog", "scipy", "seaborn", "setuptools",
    "tabulate", "tensorboard", "torch", "torchvision", "tqdm", "wandb",
)  # fmt: skip
_PACKAGES = {name: name for name in _OWN_NAMES} | {
    "avalanche": "avalanche-lib",
    "distutils": "setuptools",
    "fontTools": "fonttools",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
}
"""Module -> package it comes with: all that clbench, and what it asks for, imports of others."""


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, as the rest of the command does."""

    def error(self, message: str) -> Any:
        self.exit(2, f"clbench: {message}; see: {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    from clbench.commands import (
        compare,
        data,
        doctor,
        import_,
        lab,
        new,
        recipe,
        report,
        reproduce,
        run,
        tune,
        variance,
    )  # fmt: skip

    parser = _Parser(
        prog="clbench",
        description="A continual-learning benchmark suite: strategies, task streams, and what each of them costs.",
        epilog="example:  clbench run --task digits_split --baseline finetune joint ewc --seeds 3",
    )
    parser.add_argument("--version", action="version", version=f"clbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # In the order of `--help`.
    for module in (run, report, compare, variance, reproduce, import_, recipe, tune, new, data, lab, doctor):
        module.register(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
