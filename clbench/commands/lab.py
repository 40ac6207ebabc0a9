"""`clbench lab`: ways of doing one thing, measured side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.commands.common import OUT, command, positive

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    lab = command(commands, "lab", "measure ways of doing one thing side by side", _lab, "clbench lab growth --quick")
    lab.add_argument("what", choices=["growth"], help="growth: peak memory, time and later cost of growing a weight")
    lab.add_argument("--quick", action="store_true", help="small sizes, seconds; its figures mean nothing")
    lab.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:<number> (default %(default)s)")
    lab.add_argument("--threads", type=positive, default=1, metavar="N", help="CPU threads (default %(default)s)")
    lab.add_argument("--out", type=Path, default=OUT / "lab", metavar="DIR", help="record (default %(default)s)")


def _lab(options: argparse.Namespace) -> int:
    from clbench.lab.growth import growth
    from clbench.report import lab

    def say(stage: str) -> None:
        print(f"clbench: {stage} ...", file=sys.stderr)

    record = growth(options.device, quick=options.quick, threads=options.threads, say=say)
    path = record.save(options.out)
    print(f"{lab.console_text(record)}\n{record.seconds:.0f} s. Record: {path}; tables and figures: clbench report")
    return 0
