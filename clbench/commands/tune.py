"""`clbench tune`: settings chosen on validation data."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from clbench import tuning
from clbench.commands.common import OUT, command, execution, overrides, run_all, seeds

if TYPE_CHECKING:
    from clbench.commands.common import Commands


def register(commands: Commands) -> None:
    """Add the command to the parser."""
    tune = command(
        commands,
        "tune",
        "choose hyper-parameters on validation data; test samples stay out of its reach",
        _tune,
        "clbench tune --task digits_split --baseline ewc --grid lam=1,100 --protocol first-2 --seeds 100,101",
    )
    tuning.arguments(tune)
    execution(tune, tuning.SEEDS)
    tune.set_defaults(out=OUT / "tune")


def _tune(options: argparse.Namespace) -> int:
    from clbench import records, sweep
    from clbench.report.tuning import outcome

    studies = tuning.studies(
        options.task, options.baseline, options.protocol, seeds(options.seeds),
        grid=options.grid, fixed=overrides(options.set), share=options.validation,
    )  # fmt: skip
    runs = [records.load(run.record) for run in run_all(sweep.plan_studies(studies), options) if run.record.is_file()]
    found = [outcome(study, runs, options.metric) for study in studies]
    for one in found:
        print(f"{one.console()}\n\nwritten: {', '.join(map(str, one.write(options.out)))}")
    return 0 if all(one.chosen for one in found) else 1
