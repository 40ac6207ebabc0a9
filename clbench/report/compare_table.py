"""A comparison as text: one table a task, version and device, with a caption that says how every number came about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from clbench.budgets import TOLERANCE
from clbench.records import write_atomic
from clbench.report.compare import Compared, Line, notes
from clbench.report.measures import EMPTY, MEASURES, Unit, amount, difference, exact, head
from clbench.report.paired import BCA_COVERS, least_sign_flip
from clbench.report.select import Block, device_names, slug
from clbench.report.tables import SCENARIOS
from clbench.report.writers import Section, TextTable, to_console, to_csv, to_latex, to_markdown

HEAD = ("Metric", "Difference of", "n", "First", "Other", "Difference [95 %]", "p", "p (Holm)", "Detects")
CSV = (
    "task", "version", "task_hash", "scenario", "device", "device_name", "first", "first_hash", "other", "other_hash",
    "metric", "unit", "seeds", "n", "first_mean", "other_mean", "difference", "low", "high", "interval", "std", "test",
    "p", "p_holm", "family", "p_sign_flip", "detectable",
)  # fmt: skip


def console(found: Compared) -> str:
    """Return every table as plain text, with what one should know of it."""
    parts = []
    for block in found.blocks:
        parts.append(to_console(table(found, block)))
    return "\n\n".join([*parts, "\n".join(_how(found, found.lines))])


def write(found: Compared, out: Path) -> list[Path]:
    """Write every table as Markdown, csv and LaTeX; return the files."""
    paths = []
    for block in found.blocks:
        made, lines = table(found, block), found.of(block)
        rows = [_row(line, found.interval) for line in lines]
        texts = {"md": to_markdown(made, "#"), "csv": to_csv(CSV, rows), "tex": to_latex(made)}
        for suffix, text in texts.items():
            paths.append(out / f"{made.label}.{suffix}")
            write_atomic(paths[-1], text)
    return paths


def table(found: Compared, block: Block) -> TextTable:
    """Return the comparisons on one task, version and device."""
    lines = found.of(block)
    first = slug(lines[0].pairing.first.baseline.name)
    kinds = groupby(lines, key=lambda line: "costs" if line.measure.is_cost else "accuracy")
    at_equal = f", at equal {MEASURES[found.budget].label}" if found.budget else ""
    return TextTable(
        label=f"{block.stem}-compare-{first}" + (f"-{slug(found.budget)}" if found.budget else ""),
        title=f"{block.task.title} ({block.task.name}){at_equal}, on {block.where}",
        caption=tuple(_caption(found, block)),
        header=HEAD,
        sections=tuple(Section(kind, tuple(map(_cells, few))) for kind, few in kinds),
        notes=tuple(notes(lines)),
        left=2,
    )


def _cells(line: Line) -> tuple[str, ...]:
    unit, found = line.measure.unit, line.found
    return (
        head(line.measure),
        line.pairing.name,
        str(found.n),
        amount(line.first.mean, unit),
        amount(line.second.mean, unit),
        difference(found.mean, found.low, found.high, unit),
        _chance(found.p) + ("*" if found.test == "sign-flip" else ""),
        _chance(line.p_holm),
        EMPTY if found.detectable is None else _size(found.detectable, unit),
    )


def _size(value: float, unit: Unit) -> str:
    return difference(value, None, None, unit).removeprefix("+")


def _chance(p: float | None) -> str:
    if p is None:
        return EMPTY
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _row(line: Line, interval: str) -> list[str]:
    block, found, pairing = line.pairing.block, line.found, line.pairing
    info = block.task
    names = device_names(run for pair in pairing.pairs for run in pair)
    row = [info.name, str(info.version), info.hash, info.scenario, block.device, names]
    row += [pairing.first.label, pairing.first.baseline.hash, pairing.second.label, pairing.second.baseline.hash]
    row += [line.measure.name, line.measure.unit, line.seeds, str(found.n)]
    row += [exact(value) for value in (line.first.mean, line.second.mean, found.mean, found.low, found.high)]
    row += ["" if found.low is None else interval, exact(found.std), found.test]
    row += [exact(found.p), exact(line.p_holm), str(line.family or "")]
    row += [exact(found.p_sign_flip), exact(found.detectable)]
    return row


# ------------------------------------------------------------------------------------------------------------- in words


def _caption(found: Compared, block: Block) -> Iterable[str]:
    info, lines = block.task, found.of(block)
    yield f"{info.title} ({info.name}): paired differences."
    yield f"{SCENARIOS[info.scenario].capitalize()}, {info.n_tasks} tasks, version {info.version} ({info.hash})."
    if found.budget:
        yield (
            f"Pairs are matched: no further than {TOLERANCE:.0%} apart in {MEASURES[found.budget].label} "
            f"({MEASURES[found.budget].definition.partition(' = ')[2]})."
        )
    yield "Difference = first less other, mean over pairs of runs of the same seed, on the same task and device."
    yield from _how(found, lines)
    yield "Accuracies in percent, their differences in points."
    yield f"{'; '.join(dict.fromkeys(line.measure.definition for line in lines))}."
    yield f"Device: {block.where}."


def _how(found: Compared, lines: Sequence[Line]) -> Iterable[str]:
    """Yield how intervals and p came about, and what they cannot tell."""
    counts = sorted({line.found.n for line in lines if line.found.low is not None})
    if found.interval == "bca":
        held = ", ".join(f"{share:.0%} for {n}" for n, share in BCA_COVERS.items())
        yield (
            "[95 %]: BCa bootstrap interval of the mean difference. With few seeds it is too short: of normal "
            f"differences it holds the true mean in {held} seeds; Student's t in 95 %. "
            "p and Detects go by t all the same."
        )
    else:
        yield "[95 %]: Student-t interval of the mean difference."
    yield "A difference without an interval was the same in every pair, or there is one pair."
    yield f"p: paired t-test, two-sided. p (Holm): corrected for {_family(found)}; intervals are not."
    if counts and counts[0] <= 5:
        yield (
            f"With {counts[0]} seeds an exact sign-flip test cannot go below {least_sign_flip(counts[0]):g}: a smaller "
            "p rests on normal differences."
        )
    yield "Detects: the smallest true difference that so many seeds find at 5 % with a chance of 80 %, at this spread."


def _family(found: Compared) -> str:
    """Return what is corrected for: the comparisons of one metric, over all tasks."""
    sizes = sorted({line.family for line in found.lines if line.family})
    if not sizes:
        return "nothing, as nothing was tested"
    tests = " or ".join(map(str, sizes))
    tasks = len({line.pairing.block.stem for line in found.lines})
    over = f" over {tasks} tasks and devices" if tasks > 1 else ""
    word = "comparison" if sizes == [1] else "comparisons"
    return f"the {tests} {word} of one metric here{over}; each metric is a family of its own"
