"""A compact table of a set of records as plain text, to be printed after a run."""

from __future__ import annotations

from collections.abc import Iterable

from clbench.records import RunRecord
from clbench.report.measures import head, present
from clbench.report.select import arrange
from clbench.report.tables import row
from clbench.report.writers import Section, TextTable, to_console

COLUMNS = (
    "average_accuracy",
    "average_accuracy_entropy",
    "average_auroc",
    "forgetting.chaudhry2018",
    "relative_size",
    "answer_bytes",
    "keep_learning_bytes",
    "peak_train_bytes",
    "seconds",
)


def text(records: Iterable[RunRecord]) -> str:
    """Return one table a task, version and device: mean ± 95 % half-width over the finished runs; the rest by name."""
    everything = list(records)
    parts = []
    for task in arrange(record for record in everything if record.status == "done"):
        for block in task.blocks:
            measures = present(COLUMNS, block.runs)
            starred = any(group.starred for group in block.groups)
            table = TextTable(
                label=block.stem,
                title=f"{task.name}  {block.task.title}, on {block.where}",
                caption=(),
                header=("baseline", "n", *(head(measure) for measure in measures)),
                sections=(Section("", tuple(row(group, measures) for group in block.groups)),),
                notes=("* other training budget or model than the task's",) if starred else (),
            )
            parts.append(to_console(table))
    for record in everything:
        if record.status != "done":
            what = f"{record.task.name} {record.baseline.label} seed {record.seed}"
            parts.append(f"{record.status}: {what}" + (f" ({record.error})" if record.error else ""))
    return "\n".join(parts)
