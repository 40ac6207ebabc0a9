"""`clbench list`, `show` and `check`: what recipes there are."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from clbench import recipes
from clbench.commands.common import command
from clbench.errors import UserError, unknown

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the commands to the parser."""
    listing = command(commands, "list", "list what is there", _list, "clbench list published")
    listing.add_argument(
        "what", nargs="?", default="all", choices=["all", "tasks", "baselines", "published", "metrics"]
    )

    show = command(commands, "show", "print a recipe", _show, "clbench show split_mnist_task")
    show.add_argument("name", metavar="NAME", help="a task, a baseline, or a file")

    check = command(commands, "check", "check recipes: all shipped ones, or the files given", _check, "clbench check")
    check.add_argument("file", nargs="*", metavar="FILE")


def _list(options: argparse.Namespace) -> int:
    if options.what in ("tasks", "all"):
        for name in recipes.names("task"):
            print(f"{name:36} {recipes.load_task(name).title}")
    if options.what in ("baselines", "all"):
        if options.what == "all":
            print()
        for name in recipes.names("baseline"):
            baseline = recipes.load_baseline(name)
            print(f"{name:36} {baseline.family:16} {baseline.title}")
    if options.what == "metrics":
        from clbench.report.measures import MEASURES

        for name, measure in MEASURES.items():
            print(f"{name:36} {measure.definition}")
    if options.what == "published":
        from clbench.report import published

        print("\n".join(published.listing(published.shipped_rows()[0])))
    return 0


def _show(options: argparse.Namespace) -> int:
    tasks, baselines = recipes.names("task"), recipes.names("baseline")
    if options.name.endswith(".toml") or "/" in options.name:
        path = recipes.find("baseline", options.name)
    elif options.name in tasks:
        path = recipes.find("task", options.name)
        task = recipes.load_task(options.name)
        print(f"# task {task.name}, version {task.version}, hash {task.hash}")
    elif options.name in baselines:
        path = recipes.find("baseline", options.name)
        print(f"# baseline {options.name}; settings on a task: [settings], then [on.<task>]")
    else:
        raise UserError(unknown("task or baseline", options.name, [*tasks, *baselines]))
    print(path.read_text(encoding="utf-8"), end="")
    return 0


def _check(options: argparse.Namespace) -> int:
    from clbench.checks import check_recipes

    count, notes, problems = check_recipes(options.file)
    for line in notes:
        print(f"clbench: {line}", file=sys.stderr)
    if problems:
        raise UserError(*problems)
    print(f"{count} recipes are well")
    return 0
