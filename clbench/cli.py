"""The command `clbench`: parse, call, exit code.

0 all went well, 1 a run failed (or `report --check` found something stale), 2 a mistake of the user's: one line each on
stderr, and nothing written.

Commands import what they need when they are called: torch takes seconds, and `clbench report` needs none of it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clbench import __version__, recipes, tuning
from clbench.errors import UserError, unknown

RUNS, OUT = Path("results/runs"), Path("results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    # avalanche imports wandb, which must neither ask for an account nor reach for the network.
    os.environ.setdefault("WANDB_MODE", "offline")
    options = _parser().parse_args(arguments)
    try:
        code: int = options.call(options)
        return code
    except UserError as error:
        for line in error.lines:
            print(f"clbench: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clbench: stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads us (head, less) has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


# ------------------------------------------------------------------------------------------------------------- commands


def _run(options: argparse.Namespace) -> int:
    from clbench import sweep

    started = time.monotonic()
    jobs = sweep.plan(options.task, options.baseline, _seeds(options.seeds), _overrides(options.set))
    outcomes = _sweep(jobs, options)
    _print_table(outcomes)
    kinds = ("done", "skipped", "failed", "interrupted")
    counts = {status: sum(outcome.status == status for outcome in outcomes) for status in kinds}
    stopped = f", {counts['interrupted']} interrupted" if counts["interrupted"] else ""
    print(
        f"{counts['done']} runs done, {counts['skipped']} recorded before, {counts['failed']} failed{stopped} "
        f"in {sweep.seconds_since(started)}. Records: {options.out}"
    )
    return _explain_failures(outcomes)


def _sweep(jobs: Sequence[Any], options: argparse.Namespace) -> list[Any]:
    from clbench import sweep

    return sweep.sweep(
        jobs,
        options.out,
        device=options.device,
        workers=options.jobs,
        threads=options.threads,
        show_progress=not options.quiet,
    )


def _print_table(outcomes: Sequence[Any]) -> None:
    from clbench import records
    from clbench.report import console

    print(console.text(records.load(outcome.record) for outcome in outcomes if outcome.record.is_file()))


def _explain_failures(outcomes: Sequence[Any]) -> int:
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        where = outcome.log or outcome.record
        print(f"clbench: failed: {outcome.job}: {outcome.error} (see {where})", file=sys.stderr)
    return 1 if failed or any(outcome.status == "interrupted" for outcome in outcomes) else 0


def _report(options: argparse.Namespace) -> int:
    from clbench.report import build

    readme = options.readme
    if options.check:
        stale = build.check(options.runs, options.out, readme)
        for line in stale:
            print(line)
        print(f"{len(stale)} files are not what the records say" if stale else "everything says what the records say")
        return 1 if stale else 0
    built = build.build(
        options.runs, options.out, tasks=options.task, baselines=options.baseline, metrics=options.metric
    )
    if readme is not None:
        build.update_readme(readme, built)
    for line in built.problems:
        print(f"clbench: {line}", file=sys.stderr)
    print(f"{len(built.paths)} files in {options.out}; open {options.out / 'report.html'}")
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from clbench.report import build, published, reproduction
    from clbench.report.writers import to_console

    rows, problems = published.shipped_rows()
    if problems:
        raise UserError(*problems)
    chosen = published.choose(rows, options.row)
    outcomes = [] if options.recorded else _sweep(_jobs(chosen, _seeds(options.seeds)), options)
    comparisons, problems = build.build_reproduction(options.out, options.out.parent, rows)
    mine = [item for item in comparisons if any(item.row is row for row in chosen)]
    if mine:
        print("\n".join([to_console(reproduction.table(mine)), *reproduction.CAPTION[1:]]))
    left = len(chosen) - len({id(item.row) for item in mine})
    print(f"{len(mine)} comparisons; {left} of {len(chosen)} rows without a finished run. ", end="")
    print(f"All rows: {options.out.parent / 'tables' / 'reproduction.md'}" if comparisons else "Nothing was written.")
    for line in problems:
        print(f"clbench: {line}", file=sys.stderr)
    return _explain_failures(outcomes)


def _jobs(rows: Sequence[Any], seeds: Sequence[int]) -> list[Any]:
    """Return the runs that published rows need; every mistake of every experiment at once."""
    from clbench import sweep

    jobs: list[Any] = []
    lines: list[str] = []
    for task, baseline in dict.fromkeys((row.task, row.experiment.label) for row in rows):
        try:
            jobs += sweep.plan([task], [baseline], seeds)
        except UserError as error:
            lines += error.lines
    if lines:
        raise UserError(*dict.fromkeys(lines))
    return jobs


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


def _tune(options: argparse.Namespace) -> int:
    from clbench import records, sweep
    from clbench.report.tuning import outcome

    studies = tuning.studies(
        options.task, options.baseline, options.protocol, _seeds(options.seeds),
        grid=options.grid, fixed=_overrides(options.set), share=options.validation,
    )  # fmt: skip
    runs = [records.load(run.record) for run in _sweep(sweep.plan_studies(studies), options) if run.record.is_file()]
    found = [outcome(study, runs, options.metric) for study in studies]
    for one in found:
        print(f"{one.console()}\n\nwritten: {', '.join(map(str, one.write(options.out)))}")
    return 0 if all(one.chosen for one in found) else 1


def _new(options: argparse.Namespace) -> int:
    from clbench.scaffold import new_strategy

    written = new_strategy(options.name, options.folder, options.source)
    for path in written:
        print(f"wrote {path}")
    recipe = written[1] if written[1].parent != Path() else f"./{written[1]}"
    print(f"try it: clbench run --task digits_split --baseline {recipe}")
    return 0


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


def _doctor(options: argparse.Namespace) -> int:
    from clbench.doctor import examine

    well = True
    for good, line in examine():
        print(f"{'ok  ' if good else 'BAD '} {line}")
        well &= good
    return 0 if well else 1


def _lab(options: argparse.Namespace) -> int:
    from clbench.lab.growth import growth
    from clbench.report import lab

    def say(stage: str) -> None:
        print(f"clbench: {stage} ...", file=sys.stderr)

    record = growth(options.device, quick=options.quick, threads=options.threads, say=say)
    path = record.save(options.out)
    print(f"{lab.console_text(record)}\n{record.seconds:.0f} s. Record: {path}; tables and figures: clbench report")
    return 0


# -------------------------------------------------------------------------------------------------------------- parsing


def _seeds(text: str) -> list[int]:
    """Read "5" as seeds 0 to 4, "0,3,7" as those."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    too_many = "," not in text and numbers and numbers[0] > 1000
    if not numbers or min(numbers) < 0 or max(numbers) >= 2**32 or too_many or (numbers == [0] and "," not in text):
        raise UserError(f"--seeds {text}: give a number of seeds (5; at most 1000) or a list (0,3,7); seed 0 alone: 0,")
    return list(range(numbers[0])) if len(numbers) == 1 and "," not in text else numbers


def _overrides(given: Sequence[str]) -> dict[str, Any]:
    """Read key=value pairs; values as TOML writes them, anything else as text."""
    found = {}
    for pair in given:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair}: must be key=value, such as lam=100 or train.lr=0.01")
        try:
            found[key] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return found


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line, as the rest of the command does."""

    def error(self, message: str) -> Any:
        self.exit(2, f"clbench: {message}; see: {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="clbench",
        description="A continual-learning benchmark suite: strategies, task streams, and what each of them costs.",
        epilog="example:  clbench run --task digits_split --baseline finetune joint ewc --seeds 3",
    )
    parser.add_argument("--version", action="version", version=f"clbench {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, words: str, call: Any, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=words,
            description=words[0].upper() + words[1:] + ".",
            epilog=f"example:  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(call=call)
        return made

    run = command(
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
    _execution(run, "3")

    report = command(
        "report",
        "write tables, figures and one HTML page from records",
        _report,
        "clbench report --runs results/runs --out results",
    )
    report.add_argument("--runs", type=Path, default=RUNS, metavar="DIR", help="records (default %(default)s)")
    report.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="where to write (default %(default)s)")
    report.add_argument("--task", nargs="+", metavar="NAME", help="only these tasks")
    report.add_argument("--baseline", nargs="+", metavar="NAME", help="only these baselines")
    report.add_argument("--metric", nargs="+", metavar="NAME", help="only these columns; see: clbench list metrics")
    report.add_argument("--readme", type=Path, metavar="FILE", help="also rewrite the results block of this file")
    report.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is stale")

    reproduce = command(
        "reproduce",
        "run what published rows need and say whether ours agree: reproduced, differs, under-powered, not comparable",
        _reproduce,
        "clbench reproduce split_mnist_task/finetune --seeds 3",
    )
    reproduce.add_argument(
        "row", nargs="*", metavar="PATTERN",
        help="task/baseline, task, source or source/task (such as vandeven2018/split_mnist_task), with * and ?; "
        "without any, every row. See: clbench list published",
    )  # fmt: skip
    reproduce.add_argument("--recorded", action="store_true", help="run nothing: compare what is recorded")
    _execution(reproduce, "3")

    listing = command("list", "list what is there", _list, "clbench list published")
    listing.add_argument(
        "what", nargs="?", default="all", choices=["all", "tasks", "baselines", "published", "metrics"]
    )

    show = command("show", "print a recipe", _show, "clbench show split_mnist_task")
    show.add_argument("name", metavar="NAME", help="a task, a baseline, or a file")

    check = command("check", "check recipes: all shipped ones, or the files given", _check, "clbench check")
    check.add_argument("file", nargs="*", metavar="FILE")

    tune = command(
        "tune",
        "choose hyper-parameters on validation data; test samples stay out of its reach",
        _tune,
        "clbench tune --task digits_split --baseline ewc --grid lam=1,100 --protocol first-2 --seeds 100,101",
    )
    tuning.arguments(tune)
    _execution(tune, tuning.SEEDS)
    tune.set_defaults(out=OUT / "tune")

    new = command("new", "start a strategy of your own", _new, "clbench new strategy my_method")
    new.add_argument("what", choices=["strategy"])
    new.add_argument("name", metavar="NAME", help="a Python name, such as my_method")
    new.add_argument("--from", dest="source", metavar="BASELINE", help="copy this baseline's method")
    new.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="where to write (default: here)")

    data = command("data", "list, fetch, import and verify data sets", _data, "clbench data import mnist mnist.npz")
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

    lab = command("lab", "measure ways of doing one thing side by side", _lab, "clbench lab growth --quick")
    lab.add_argument("what", choices=["growth"], help="growth: peak memory, time and later cost of growing a weight")
    lab.add_argument("--quick", action="store_true", help="small sizes, seconds; its figures mean nothing")
    lab.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:<number> (default %(default)s)")
    lab.add_argument("--threads", type=_positive, default=1, metavar="N", help="CPU threads (default %(default)s)")
    lab.add_argument("--out", type=Path, default=OUT / "lab", metavar="DIR", help="record (default %(default)s)")

    command("doctor", "say what this installation can do", _doctor, "clbench doctor")
    return parser


def _positive(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not '{text}'")
    return number


def _execution(parser: argparse.ArgumentParser, seeds: str) -> None:
    parser.add_argument("--seeds", default=seeds, metavar="N|LIST", help="5 means seeds 0 to 4; or 0,3,7 (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<number> (default %(default)s)")
    parser.add_argument("--jobs", type=_positive, metavar="N", help="runs at a time (cores / threads; 1 on a GPU)")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="CPU threads of a run (%(default)s)")
    parser.add_argument("--out", type=Path, default=RUNS, metavar="DIR", help="records (default %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


if __name__ == "__main__":
    sys.exit(main())
