"""The ladder of sharing: baselines of a task by the share of parameters that their tasks have in common.

A block has one where its baselines recorded RUNGS or more different shares (`clbench.records.Sharing`) of more than one
task: where all methods have one net for all tasks, there is nothing to climb. Letters: T tasks.
"""

from __future__ import annotations

from clbench.report.measures import MEASURES, cells, head, shown
from clbench.report.select import Block, Group, TaskBlocks, device_names
from clbench.report.tables import KEYS, device_line, notes, opening, seeds, starred
from clbench.report.writers import Section, TextTable, to_csv

RUNGS = 3
"""Fewest different shares in common that make a ladder."""
APART = 1e-3
"""How far two shares lie apart, at least, to be different."""
USED = (
    "A task uses what is read when it answers: a gate between 0 and 1 counts as open above one half, and fixed random "
    "weights count too, though nothing in them was learned. A head counts whole, closed units' weights in it included."
)
"""For captions."""


IN_COMMON, MARGINAL_RELATIVE = MEASURES["in_common"], MEASURES["marginal_relative"]
COLUMNS = (
    IN_COMMON,
    MEASURES["reuse_ratio"],
    MEASURES["average_accuracy"],
    MEASURES["forgetting.chaudhry2018"],
    MEASURES["answer_bytes"],
    MEASURES["keep_learning_bytes"],
    MEASURES["samples"],
    MEASURES["parameters"],
    MEASURES["marginal_parameters"],
    MEASURES["marginal_last"],
    MEASURES["marginal_last_bytes"],
)


def ladder(block: Block) -> list[Group]:
    """Return the baselines with a share in common, most first, then by label; [] without RUNGS different shares."""
    found = [(value.mean, group) for group in block.groups if (value := IN_COMMON.over(group.runs)) is not None]
    found.sort(key=lambda pair: (-pair[0], pair[1].label))
    different: list[float] = []
    for share, _ in found:
        if not different or different[-1] - share >= APART:
            different.append(share)
    return [group for _, group in found] if len(different) >= RUNGS else []


def mapped(block: Block) -> list[Group]:
    """Return the baselines worth a map: the ladder's; without one, where tasks of any share some but not all, all."""
    found = [(value.mean, group) for group in block.groups if (value := IN_COMMON.over(group.runs)) is not None]
    found.sort(key=lambda pair: (-pair[0], pair[1].label))
    partly = any(0 < share < 1 for share, _ in found)
    return ladder(block) or ([group for _, group in found] if partly else [])


def left_out(block: Block) -> list[str]:
    """Return the labels that a block's ladder lacks: their runs were recorded without sharing; [] without a ladder."""
    rungs = {group.label for group in ladder(block)}
    return [group.label for group in block.groups if group.label not in rungs] if rungs else []


def table(task: TaskBlocks) -> TextTable | None:
    """Return the ladder as a table, a section a block; None where no block has one."""
    sections = []
    for block in task.blocks:
        rows = [_row(group) for group in ladder(block)]
        title = block.title if len(task.blocks) > 1 else ""
        sections += [Section(title, tuple(rows))] if rows else []
    if not sections:
        return None
    runs = [run for block in task.blocks for group in ladder(block) for run in group.runs]
    sentences = [
        *opening(task, "sharing", runs),
        "By share in common. A cost without interval was the same in every run.",
        USED,
        f"{'; '.join(measure.definition for measure in COLUMNS)}.",
        device_line(task),
    ]
    out = dict.fromkeys(label for block in task.blocks for label in left_out(block))
    if out:
        sentences.append(f"Left out, recorded without what their tasks share: {', '.join(out)}.")
    if any(group.starred for block in task.blocks for group in ladder(block)):
        sentences.append("* departs from the protocol's training budget or model, see the notes.")
    return TextTable(
        label=f"{task.name}-sharing",
        title=f"{task.blocks[-1].task.title}: sharing",
        caption=tuple(sentences),
        header=("Baseline", "n", *(head(measure) for measure in COLUMNS)),
        sections=tuple(sections),
        notes=tuple(notes(task)),
    )


def _row(group: Group) -> tuple[str, ...]:
    runs = len(group.runs)
    return (
        starred(group), str(runs), *(shown(measure.over(group.runs), measure.unit, runs) for measure in COLUMNS)
    )  # fmt: skip


def csv_text(task: TaskBlocks) -> str:
    """Return the ladder's numbers in full: a row a baseline, for each column mean, low, high and n in its own unit."""
    header = [*KEYS, "seeds", "n"]
    header += [f"{measure.name}.{end}" for measure in COLUMNS for end in ("mean", "low", "high", "n")]
    rows = []
    for block in task.blocks:
        for group in ladder(block):
            info, method = block.task, group.baseline
            line = [task.name, str(info.version), info.hash, info.scenario, block.device, device_names(group.runs)]
            line += [method.family, group.label, method.hash, seeds(group.runs), str(len(group.runs))]
            line += [cell for measure in COLUMNS for cell in cells(measure.over(group.runs))]
            rows.append(line)
    return to_csv(header, rows)
