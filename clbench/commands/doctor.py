"""`clbench doctor`: what this installation can do."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from clbench.commands.common import command

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    command(commands, "doctor", "say what this installation can do", _doctor, "clbench doctor")


def _doctor(options: argparse.Namespace) -> int:
    from clbench.doctor import examine

    well = True
    for good, line in examine():
        print(f"{'ok  ' if good else 'BAD '} {line}")
        well &= good
    return 0 if well else 1
