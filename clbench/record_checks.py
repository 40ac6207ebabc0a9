"""Whether what a record says hangs together: shapes, ranges, sums. What the types of its parts cannot say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clbench.record_parts import Within
    from clbench.records import RunRecord, Sharing


def problem_of(record: RunRecord) -> str:
    """Return what is wrong in a few words, with the key; "" for nothing."""
    n_tasks = record.task.n_tasks
    if record.status == "done" and len(record.acc) != n_tasks:
        return f"acc: {len(record.acc)} rows for {n_tasks} tasks"
    if any(len(row) != n_tasks for row in record.acc):
        return f"acc: a row has not {n_tasks} columns"
    if record.status == "done" and len(record.acc_init) != n_tasks:
        return f"acc_init: {len(record.acc_init)} values for {n_tasks} tasks"
    values = [value for row in record.acc for value in row] + list(record.acc_init)
    if record.imported is not None:
        learned = [value for i, row in enumerate(record.acc) for value in row[: i + 1]]
        values = learned + [value for value in values if not math.isnan(value)]
    if any(not math.isfinite(value) or not 0 <= value <= 1 for value in values):
        return "acc: a value outside [0, 1]"
    more = _auroc_problem(record) or _inferred_problem(record) or _units_problem(record)
    return more or _within_problem(record.within, len(record.acc)) or _sharing_problem(record.sharing)


def _auroc_problem(record: RunRecord) -> str:
    if record.auroc is None:
        return ""
    if [len(row) for row in record.auroc] != [len(row) for row in record.acc]:
        return "auroc: its shape is not that of acc"
    if record.auroc_init is None or len(record.auroc_init) != len(record.acc_init):
        return "auroc_init: its shape is not that of acc_init"
    values = [value for row in (*record.auroc, record.auroc_init) for value in row]
    if any(not math.isfinite(value) or not 0 <= value <= 1 for value in values):
        return "auroc: a value outside [0, 1]"
    return ""


def _inferred_problem(record: RunRecord) -> str:
    if record.inferred is None:
        return ""
    if [len(row) for row in record.inferred] != [len(row) for row in record.acc]:
        return "inferred: its shape is not that of acc"
    if any(not math.isfinite(value) or not 0 <= value <= 1 for row in record.inferred for value in row):
        return "inferred: a value outside [0, 1]"
    return ""


def _units_problem(record: RunRecord) -> str:
    if record.widths and len(record.widths) != len(record.acc):
        return f"widths: {len(record.widths)} entries for {len(record.acc)} tasks learned"
    spans = [span for served in record.units for ranges in served.values() for span in ranges]
    if any(not 0 <= start < end for start, end in spans):
        return "units: a range that is none"
    return ""


def _sharing_problem(found: Sharing | None) -> str:
    if found is None:
        return ""
    if found.parameters_used != found.shared_by_all + found.shared_by_some + found.private:
        return "sharing: shared and private are not what is used"
    if any(len(row.shares) != len(found.tasks) for row in found.map):
        return f"sharing: a row of the map has not {len(found.tasks)} shares"
    if found.in_common is not None and not 0 <= found.in_common <= 1:
        return "sharing: in_common outside [0, 1]"
    return ""


def _within_problem(within: Sequence[Within], learned: int) -> str:
    """Return what is wrong with the entries of a run that has learned so many tasks; "" for nothing."""
    if within and len(within) != learned:
        return f"within: {len(within)} entries for {learned} tasks learned"
    for seen, found in enumerate(within, start=1):
        if found.every < 1 or len(found.acc) != len(found.at):
            return f"within: {len(found.acc)} evaluations in {found.iterations} iterations, one every {found.every}"
        if any(len(row) != seen for row in found.acc):
            return f"within: a row of task {seen} has not {seen} columns"
        if any(not math.isfinite(value) or not 0 <= value <= 1 for row in found.acc for value in row):
            return "within: a value outside [0, 1]"
    return ""
