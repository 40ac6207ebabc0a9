"""`clbench new`: a strategy of your own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.commands.common import command

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    new = command(commands, "new", "start a strategy of your own", _new, "clbench new strategy my_method")
    new.add_argument("what", choices=["strategy"])
    new.add_argument("name", metavar="NAME", help="a Python name, such as my_method")
    new.add_argument("--from", dest="source", metavar="BASELINE", help="copy this baseline's method")
    new.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)")


def _new(options: argparse.Namespace) -> int:
    from clbench.scaffold import new_strategy

    written = new_strategy(options.name, options.folder, options.source)
    for path in written:
        print(f"wrote {path}")
    recipe = written[1] if written[1].parent != Path() else f"./{written[1]}"
    print(f"try it: clbench run --task digits_split --baseline {recipe}")
    return 0
