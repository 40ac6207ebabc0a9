"""What a run would find out first, asked before any run: whether streams, nets and strategies can be built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from clbench.errors import UserError
from clbench.recipes import Experiment
from clbench.runner import check_classes, net_factory
from clbench.specs import tasks_in_all
from clbench.strategies.base import Setup, Strategy
from clbench.strategies.build import build, find_class
from clbench.strategies.foreign import Foreign
from clbench.streams import Stream, make_stream


def preflight(experiments: Sequence[Experiment], data_root: Path | None = None) -> list[str]:
    """Return a line for each stream, net or strategy that cannot be built: what a run would find out first."""
    problems: list[str] = []
    streams: dict[str, Stream | None] = {}
    for experiment in experiments:
        task = experiment.task
        try:
            if task.hash not in streams:
                streams[task.hash] = None
                streams[task.hash] = make_stream(task.stream, 0, torch.device("cpu"), data_root)
            stream = streams[task.hash]
            if stream is not None:
                check_classes(task, stream)
                _try_strategy(experiment, stream)
        except UserError as error:
            problems += [line if "task '" in line else f"task '{task.name}': {line}" for line in error.lines]
    return problems


def _try_strategy(experiment: Experiment, stream: Stream) -> None:
    """Build the strategy once, on the CPU, and throw it away: some settings only a net can show to be wrong.

    What Avalanche's own strategies say of their arguments is a mistake in the recipe as well. Anything else that a
    constructor raises is left to the run, whose record keeps the traceback.
    """
    new_net = net_factory(experiment, stream, 0)
    tasks = tasks_in_all(experiment.task.stream)
    setup = Setup(new_net=new_net, train=experiment.train, device=torch.device("cpu"), seed=0, tasks=tasks)
    strategy: Strategy | Foreign | None = None
    try:
        with torch.random.fork_rng(devices=[]):
            strategy = build(experiment, setup)
    except UserError:
        raise
    except Exception as error:
        module = find_class(experiment.baseline).__module__
        if module.startswith("avalanche.") and isinstance(error, (ValueError, AssertionError)):
            said = str(error).splitlines() or [type(error).__name__]
            raise UserError(f"baseline '{experiment.baseline.name}': {said[0]}") from None
    if isinstance(strategy, Strategy):
        strategy.check_tasks(list(dict.fromkeys(task.task for task in stream.train)))
