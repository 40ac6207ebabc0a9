"""A run's numbers, as it goes on, in TensorBoard's or W&B's files: off unless asked for.

After every task: accuracy on each task, their mean over the tasks seen, seconds by phase, the footprint and, where they
were counted, operations. Written from the record, so that a chart and a table cannot disagree, and not through
Avalanche's loggers, which see nothing of a strategy with a loop of its own. W&B stays offline unless WANDB_MODE says
otherwise; it needs no account. Whatever these packages draw is given back: a run is the same with and without.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clbench.errors import UserError, unknown
from clbench.randomness import kept_randomness
from clbench.records import RunRecord

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
"""What can be asked for -> what it imports."""

Write = Callable[[dict[str, float], int], None]


def check(names: Sequence[str]) -> None:
    """Raise UserError where a tracker is unknown or its package is not here."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track {name}: {unknown('tracker', name, TRACKERS)}")
        try:
            with kept_randomness():
                importlib.import_module(TRACKERS[name])
        except ImportError:
            raise UserError(f"--track {name}: the package is not here; try: pip install {name}") from None


def numbers(record: RunRecord) -> dict[str, float]:
    """Return what there is to chart after the last task of a record, by name."""
    row = record.acc[-1]
    learned = len(record.acc)
    found = {f"accuracy/task_{j + 1}": value for j, value in enumerate(row)}
    found["accuracy/seen"] = sum(row[:learned]) / learned
    found |= {f"seconds/{phase}": seconds for phase, seconds in record.timing.seconds[-1].items()}
    kept = record.footprints[-1]
    for name in ("parameters", "parameters_trainable", "answer_bytes", "keep_learning_bytes", "replay_samples"):
        found[f"footprint/{name}"] = float(getattr(kept, name))
    if record.flops:
        counted = {name: getattr(record.flops[-1], name) for name in ("step", "train", "answer")}
        found |= {f"flops/{name}": float(value) for name, value in counted.items() if value is not None}
    return found


@contextmanager
def tracked(names: Sequence[str], folder: Path, title: str, settings: dict[str, Any]) -> Iterator[Any]:
    """Yield what to call with the record after every task; None where nothing is asked for.

    Args:
        names: of `TRACKERS`.
        folder: of this run's files.
        title: of the run.
        settings: of the run, for W&B.
    """
    if not names:
        yield None
        return
    writers: list[tuple[Write, Callable[[], None]]] = []
    with kept_randomness():
        folder.mkdir(parents=True, exist_ok=True)
        writers += [_OPEN[name](folder, title, settings) for name in names]

    def tell(record: RunRecord) -> None:
        with kept_randomness():
            for write, _ in writers:
                try:
                    write(numbers(record), len(record.acc))
                # A chart that cannot be written (disk full, a service that died) costs the chart and no run.
                except Exception as error:
                    print(f"tracking: {type(error).__name__}: {error}", file=sys.stderr)

    try:
        yield tell
    finally:
        with kept_randomness():
            for _, close in writers:
                close()


def _tensorboard(folder: Path, title: str, settings: dict[str, Any]) -> tuple[Write, Callable[[], None]]:
    writer = importlib.import_module(TRACKERS["tensorboard"]).SummaryWriter(str(folder))

    def write(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return write, writer.close


def _wandb(folder: Path, title: str, settings: dict[str, Any]) -> tuple[Write, Callable[[], None]]:
    os.environ.setdefault("WANDB_SILENT", "true")
    mode = os.environ.get("WANDB_MODE", "offline")
    package: Any = importlib.import_module(TRACKERS["wandb"])
    run = package.init(project="clbench", name=title, dir=str(folder), mode=mode, config=settings)
    return lambda values, step: run.log(values, step=step), run.finish


_OPEN: dict[str, Callable[[Path, str, dict[str, Any]], tuple[Write, Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
