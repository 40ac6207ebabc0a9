"""The tables of one task: accuracy and costs, a row per baseline, grouped by family.

Every cell is a mean with the 95 % Student-t interval over seeds and the n it stands on. A baseline that departs from
the task's training budget or model is starred, and a note says how. Runs of another device or version have rows of
their own under a heading that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import groupby

from clbench.records import RunRecord
from clbench.report.growth import KINDS, growing, over_runs
from clbench.report.measures import Measure, cells, evaluated_every, head, shown
from clbench.report.select import Block, Group, TaskBlocks, device_names
from clbench.report.writers import Section, TextTable, to_csv

SCENARIOS = {"task": "task-incremental", "domain": "domain-incremental", "class": "class-incremental"}
KEYS = ("task", "version", "task_hash", "scenario", "device", "device_name", "family", "baseline", "baseline_hash")


def tables(task: TaskBlocks, measures: Sequence[Measure]) -> list[TextTable]:
    """Return a task's tables of accuracy and of costs, those that have a column, and of growth, if a net grew."""
    accuracy = [measure for measure in measures if not measure.is_cost]
    costs = [measure for measure in measures if measure.is_cost]
    named = (("accuracy", accuracy), ("costs", costs))
    found = [_table(task, kind, columns) for kind, columns in named if columns]
    growth = _growth_table(task)
    return [*found, growth] if growth is not None else found


def _table(task: TaskBlocks, kind: str, measures: Sequence[Measure]) -> TextTable:
    return TextTable(
        label=f"{task.name}-{kind}",
        title=f"{task.blocks[-1].task.title}: {kind}",
        caption=_caption(task, kind, measures),
        header=("Baseline", "n", *(head(measure) for measure in measures)),
        sections=tuple(_sections(task, measures)),
        notes=tuple(notes(task)),
    )


def _sections(task: TaskBlocks, measures: Sequence[Measure]) -> Iterable[Section]:
    for block in task.blocks:
        for family, groups in groupby(block.groups, key=lambda group: group.baseline.family):
            title = family if len(task.blocks) == 1 else f"{family}, {block.title}"
            yield Section(title, tuple(row(group, measures) for group in groups), _apart(task, block))


def _apart(task: TaskBlocks, block: Block) -> str:
    """Return what the rows of a block must not be sorted away from: where there are several, its version and device."""
    return block.title if len(task.blocks) > 1 else ""


def row(group: Group, measures: Sequence[Measure]) -> tuple[str, ...]:
    """Return the cells of one baseline: label (starred where it departs), n, one cell a measure."""
    runs = len(group.runs)
    values = (shown(measure.over(group.runs), measure.unit, runs) for measure in measures)
    return (starred(group), str(runs), *values)


def _growth_table(task: TaskBlocks) -> TextTable | None:
    """Return the table of layers that grew: units, and what the log counts over all tasks; None where none did."""
    sections = []
    for block in task.blocks:
        for family, groups in groupby(block.groups, key=lambda group: group.baseline.family):
            rows = [line for group in groups for line in _growth_rows(group)]
            title = family if len(task.blocks) == 1 else f"{family}, {block.title}"
            sections += [Section(title, tuple(rows), _apart(task, block))] if rows else []
    if not sections:
        return None
    runs = [run for block in task.blocks for group in block.groups if growing(group) for run in group.runs]
    return TextTable(
        label=f"{task.name}-growth",
        title=f"{task.blocks[-1].task.title}: growth",
        caption=(
            *opening(task, "growth", runs),
            "A count without interval was the same in every run.",
            "First, Last = units of the layer after the first and the last task; Added, Pruned, Split = units over the "
            "tasks after the first (split: copied, the old ones kept for earlier tasks); Reused = of the units there "
            "were before a task, the share that it builds on, mean over the tasks after the first.",
            device_line(task),
        ),
        header=("Baseline", "Layer", "n", "First", "Last", "Added", "Pruned", "Split", "Reused (%)"),
        sections=tuple(sections),
        left=2,
    )


def starred(group: Group) -> str:
    """Return the label, with a star where budget or net are not the protocol's own."""
    return group.label + ("*" if group.starred else "")


def _growth_rows(group: Group) -> Iterable[tuple[str, ...]]:
    runs = len(group.runs)
    for layer in growing(group):
        found = over_runs(group, layer)
        counts = (found.widths[0], found.widths[-1], *(found.totals[kind] for kind in KINDS))
        texts = [shown(value, "count", runs) for value in counts]
        yield (starred(group), layer, str(runs), *texts, shown(found.mean_reused, "fraction", runs))


def opening(task: TaskBlocks, kind: str, runs: Sequence[RunRecord]) -> list[str]:
    """Return the first sentences of a caption: what it is a table of, and what its cells are."""
    info = task.blocks[-1].task
    several = len(task.blocks) > 1
    return [
        f"{info.title} ({task.name}): {kind}.",
        f"{SCENARIOS[info.scenario].capitalize()}, {info.n_tasks} tasks"
        + ("." if several else f", version {info.version} ({info.hash})."),
        f"Mean ± half-width of the 95 % Student-t interval over seeds {seeds(runs)}, n runs.",
    ]


def _caption(task: TaskBlocks, kind: str, measures: Sequence[Measure]) -> tuple[str, ...]:
    runs = [run for block in task.blocks for run in block.runs]
    sentences = opening(task, kind, runs)
    if any(measure.unit == "fraction" for measure in measures):
        sentences.append("Accuracies in percent.")
    if any(measure.unit == "area" for measure in measures):
        sentences.append("Areas in percent of the largest possible, 1.")
    if any(measure.is_cost for measure in measures):
        sentences.append("A cost without interval was the same in every run.")
    sentences.append(f"{'; '.join(measure.definition for measure in measures)}.")
    sentences += _evaluated(task) if any(measure.alike is evaluated_every for measure in measures) else ()
    sentences.append(device_line(task))
    if any(measure.name == "peak_train_bytes" for measure in measures):
        meters = sorted({peaks["train"].meter for run in runs for peaks in run.peaks if "train" in peaks})
        sentences.append(f"Peak memory measured by: {', '.join(meters) or 'nothing'}.")
    if any(group.starred for block in task.blocks for group in block.groups):
        sentences.append("* departs from the protocol's training budget or model, see the notes.")
    return tuple(sentences)


def _evaluated(task: TaskBlocks) -> tuple[str, ...]:
    """Return how often baselines were evaluated within tasks, as a sentence: metrics of several N are not of a kind."""
    every: dict[int, dict[str, None]] = {}
    for group in (group for block in task.blocks for group in block.groups):
        for number in filter(None, map(evaluated_every, group.runs)):
            every.setdefault(number, {})[group.label] = None
    if len(every) < 2:
        return tuple(f"Evaluated within tasks every {number} iterations." for number in every)
    said = ", ".join(f"{number} ({', '.join(labels)})" for number, labels in sorted(every.items()))
    return (f"Evaluated within tasks every {said} iterations: what was evaluated more rarely may come out higher.",)


def device_line(task: TaskBlocks) -> str:
    """Return the devices of a task's runs as a sentence."""
    return f"Device: {'; '.join(dict.fromkeys(block.where for block in task.blocks))}."


def seeds(runs: Iterable[RunRecord]) -> str:
    """Return the seeds of runs as short text, such as "0-2, 7"."""
    numbers = sorted({run.seed for run in runs})
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)


def notes(task: TaskBlocks) -> list[str]:
    """Return a line for each starred or overridden baseline, then the notes on what stands apart."""
    lines = []
    for block in task.blocks:
        plain = {group.key: group for group in block.groups}
        for group in block.groups:
            if group.starred:
                changes = ", ".join(_departure(block, key, value) for key, value in group.baseline.departures.items())
                lines.append(f"{group.label}*: {changes}")
            if group.imported:
                lines.append(_imported(group))
                continue
            base = plain.get(group.baseline.name)
            if base is not None and group.baseline.label != group.baseline.name:
                changes = _overridden(group, base)
                if changes:
                    lines.append(f"{group.label}: {changes}")
    return [*dict.fromkeys(lines), *task.notes]


def _imported(group: Group) -> str:
    """Return where the results of another tool are from, and what was to be said of its files."""
    sources = [run.imported for run in group.runs if run.imported is not None]
    files = ", ".join(dict.fromkeys(f"{source.file} (sha256 {source.sha256[:12]})" for source in sources))
    said = dict.fromkeys(note for source in sources for note in source.notes)
    start = f"{group.label}: imported from {files}; not run here, scored here; device, settings and costs unknown"
    return "; ".join([start, *said])


def _departure(block: Block, key: str, value: object) -> str:
    section, _, name = key.partition(".")
    if section == "train" and name in block.task.train:
        return f"{key} {_shown(value)} (protocol: {_shown(block.task.train[name])})"
    return f"{key} {_shown(value)}"


def _overridden(group: Group, base: Group) -> str:
    settings = group.baseline.settings
    before = base.baseline.settings
    return ", ".join(
        f"{key} {_shown(settings.get(key))} ({base.label}: {_shown(before.get(key))})"
        for key in sorted({*settings, *before})
        if settings.get(key) != before.get(key)
    )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def csv_text(task: TaskBlocks, measures: Sequence[Measure]) -> str:
    """Return a task's numbers in full: a row a group, for each measure mean, low, high and n in its own unit."""
    statistics = ("mean", "low", "high", "n")
    header = [*KEYS, "departures", "seeds", "n"]
    header += [f"{measure.name}.{statistic}" for measure in measures for statistic in statistics]
    rows = []
    for block in task.blocks:
        for group in block.groups:
            info, method = block.task, group.baseline
            line = [task.name, str(info.version), info.hash, info.scenario, block.device, device_names(group.runs)]
            line += [method.family, group.label, method.hash]
            line += [json.dumps(method.departures, sort_keys=True) if method.departures else ""]
            line += [seeds(group.runs), str(len(group.runs))]
            for measure in measures:
                line += cells(measure.over(group.runs))
            rows.append(line)
    return to_csv(header, rows)
