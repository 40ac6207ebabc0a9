"""`clbench data`: what is in the cache, and how it gets there."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from clbench.commands.common import command
from clbench.errors import UserError

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    data = command(
        commands, "data", "list, fetch, import and verify data sets", _data, "clbench data import mnist mnist.npz"
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("list", help="what is in the cache")
    prepare = actions.add_parser("prepare", help="download and pack", epilog="example:  clbench data prepare mnist")
    prepare.add_argument("name", nargs="+", metavar="NAME")
    imported = actions.add_parser(
        "import",
        help="pack a .npz file (x_train, y_train, x_test, y_test) or a folder (train/<class>/*.png, test/...)",
        epilog="example:  clbench data import mnist mnist.npz",
    )
    imported.add_argument("name", metavar="NAME")
    imported.add_argument("path", type=Path, metavar="FILE-OR-FOLDER")
    verify = actions.add_parser("verify", help="read every byte again and compare")
    verify.add_argument("name", nargs="*", metavar="NAME")


def _data(options: argparse.Namespace) -> int:
    from clbench import data

    if options.action == "list":
        for entry in data.status():
            state = entry.origin if entry.present else "not here"
            shape = "x".join(map(str, entry.shape)) if entry.shape else "?"
            samples = "{:,} + {:,}".format(*entry.samples) if entry.samples else "?"
            print(f"{entry.name:16} {state:10} {samples:>16}  {shape:>10}  {entry.fingerprint or entry.problem}")
        print(f"cache: {data.cache_root()}")
    elif options.action == "prepare":
        for name in options.name:
            found = data.prepare(name)
            print(f"{name}: {len(found.y_train):,} + {len(found.y_test):,} images, {found.fingerprint}")
    elif options.action == "import":
        found = data.import_(options.name, options.path)
        print(f"{options.name}: {len(found.y_train):,} + {len(found.y_test):,} images, {found.fingerprint}")
    else:
        problems = data.verify(names=options.name or None)
        if problems:
            raise UserError(*problems)
        print("every data set in the cache is what it was")
    return 0
