"""Ours beside the paper's as a table, as csv and as a forest plot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from clbench.report.measures import EMPTY, Unit, amount, exact, shown
from clbench.report.published import POINT, WIDEST, Comparison, seeds_text
from clbench.report.stats import Estimate
from clbench.report.verdicts import CHANCE, MOST
from clbench.report.writers import Section, TextTable, to_console, to_csv, to_latex, to_markdown

NAME = "reproduction"
"""Of the files."""
TITLE = "Ours beside the papers'"
HEADER = ("Baseline", "Metric", "Ours", "n", "Paper", "n", "Difference", "Margin", "Verdict", "s/seed")
CAPTION = (
    "Our runs beside published numbers, by source, task and device (clbench reproduce SOURCE/TASK); fractions in "
    "percent.",
    "Ours, paper: mean ± half-width of the 95 % Student-t interval over n runs; ? is an n that the source does not "
    "state.",
    "Difference: ours minus the paper's, with its 95 % interval for unequal variances; a source without spread is "
    "taken to scatter as ours do.",
    "Verdict: reproduced, the 90 % interval lies inside the margin (two one-sided tests at 5 %); differs, it does not, "
    "and the 95 % interval leaves 0 out; under-powered, neither, with the seeds of ours that would decide in "
    f"{100 * CHANCE:g} % of the cases, were the true difference and the deviations those found.",
    "Margin: what two experiments of the paper's n and deviation could show to be the same, between "
    f"{100 * POINT:g} point (of an accuracy, half of what it lacks to 100 %, where that is less) and "
    f"{100 * WIDEST:g}, or a row's own, with its reason in the note.",
    "s/seed: wall clock of a run, next to whatever else the device was doing.",
)


def table(comparisons: Sequence[Comparison]) -> TextTable:
    """Return the comparisons, a section a source, task and device; sources and reasons are notes, by number."""
    sections: list[Section] = []
    notes: list[str] = []
    for title, group in groupby(comparisons, key=_heading):
        rows = []
        for item in group:
            notes.append(f"[{len(notes) + 1}] {_note(item)}")
            rows.append((f"{item.row.experiment.label} [{len(notes)}]", item.row.measure.label, *_cells(item)))
        sections.append(Section(title, tuple(rows)))
    return TextTable(NAME, TITLE, CAPTION, HEADER, tuple(sections), tuple(notes), left=2)


def texts(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Return file name -> content of the table in every format."""
    made = table(comparisons)
    return {
        f"{NAME}.md": to_markdown(made, "#"),
        f"{NAME}.csv": csv_text(comparisons),
        f"{NAME}.tex": to_latex(made),
    }


def console(comparisons: Sequence[Comparison]) -> str:
    """Return the table as plain text, with what its columns mean."""
    return "\n".join([to_console(table(comparisons)), *CAPTION[1:]])


def _heading(item: Comparison) -> str:
    return f"{item.row.source}/{item.row.task}, {item.device}"


def _unit(item: Comparison) -> Unit:
    """Return the unit to show numbers in: two decimals of a percent, as papers have them."""
    return "area" if item.row.measure.unit == "fraction" else item.row.measure.unit


def _cells(item: Comparison) -> tuple[str, ...]:
    unit, paper, runs = _unit(item), item.row.estimate, item.row.paper.n
    if item.ours is None:
        ours, n, difference = EMPTY, "0", EMPTY
    else:
        ours, n, difference = shown(item.ours, unit, item.ours.n), str(item.ours.n), signed(item)
    theirs = amount(paper.mean, unit) if paper.std is None else shown(paper, unit, paper.n)
    margin = amount(item.row.margin, unit)
    cost = shown(Estimate(item.seconds.mean, None, 1), "seconds", 1).partition(" ")[0]
    return (ours, n, theirs, "?" if runs is None else str(runs), difference, margin, verdict_text(item), cost)


def signed(item: Comparison) -> str:
    """Return the difference with its sign and interval."""
    unit, found = _unit(item), item.judgement
    assert item.difference is not None
    text = amount(item.difference, unit)
    text = text if text.startswith("-") else f"+{text}"
    if found.interval is None:
        return text
    low, high = found.interval
    return f"{text} [{amount(low, unit)}, {amount(high, unit)}]"


def verdict_text(item: Comparison) -> str:
    """Return the verdict in a few words."""
    found = item.judgement
    if found.verdict == "differs" and item.difference is not None:
        return f"differs by {amount(abs(item.difference), _unit(item))}"
    return found.verdict if found.seeds is None else f"{found.verdict}: {seeds_text(found.seeds)}"


def _note(item: Comparison) -> str:
    paper = item.row.paper
    parts = [
        f"{paper.where} ({paper.verified})",
        f"known differences: {paper.differs}" if paper.differs else "",
        f"not comparable: {item.why_not}" if item.why_not else "",
        f"margin: {paper.margin_reason}" if paper.margin_reason else "",
        f"finding: {paper.finding}" if paper.finding else "",
        open_text(item),
    ]
    return "; ".join(part for part in parts if part)


def open_text(item: Comparison) -> str:
    """Return why a row is without a verdict, from what was found; "" for one that has one."""
    if item.verdict != "under-powered" or item.ours is None:
        return ""
    seeds = item.judgement.seeds
    if seeds is None:
        return "open: one run of ours, and no spread of the source's: a second says how many it takes"
    if seeds > MOST:
        if item.left_open is not None:
            return f"open: no number of our seeds decides; {_theirs(item, item.left_open)}"
        return f"open: it would take more than {MOST:,} of our seeds"
    missing = seeds - item.ours.n
    if missing < 1:
        return f"open: {seeds} seeds decide in {100 * CHANCE:g} % of the cases, and ours did not: some more would"
    hours = missing * item.seconds.mean / 3600
    took = f"{hours:.2g}" if hours < 10 else f"{hours:.0f}"
    return f"open: {missing} more of our seeds, some {took} hours as ours were run, would probably decide"


def _theirs(item: Comparison, halves: tuple[float, float]) -> str:
    """Return how uncertain the source's own runs leave its number, beside what would have to be told."""
    row, unit = item.row, _unit(item)
    runs = row.estimate.n
    made = f"{runs} run{'' if runs == 1 else 's'}" + ("" if row.paper.n is not None else " (it says no number)")
    scatter = "" if row.estimate.std is not None else ", were they to scatter as ours do,"
    return (
        f"the source's {made}{scatter} alone leave its number uncertain by {amount(halves[0], unit)} at 90 % and "
        f"{amount(halves[1], unit)} at 95 %, beside a difference of {amount(abs(item.difference or 0.0), unit)} and a "
        f"margin of {amount(row.margin, unit)}"
    )


def csv_text(comparisons: Sequence[Comparison]) -> str:
    """Return the comparisons as csv, numbers in full and in the metric's own unit."""
    header = ["source", "task", "baseline", "device", "metric", "ours.mean", "ours.low", "ours.high", "ours.n"]
    header += ["paper.value", "paper.std", "paper.n", "difference", "difference.low", "difference.high", "margin"]
    header += ["verdict", "seeds_to_decide", "seconds_per_seed", "where", "verified", "differs", "not_comparable"]
    header += ["margin_reason", "finding", "open"]
    rows = []
    for item in comparisons:
        row, paper, ours, found = item.row, item.row.paper, item.ours, item.judgement
        cells = [row.source, row.task, row.experiment.label, item.device, row.measure.name]
        cells += ["", "", "", "0"] if ours is None else [*map(exact, (ours.mean, ours.low, ours.high)), str(ours.n)]
        cells += [exact(paper.value), exact(paper.std), exact(paper.n)]
        cells += [exact(item.difference), *(exact(end) for end in found.interval or (None, None)), exact(row.margin)]
        cells += [found.verdict, exact(found.seeds), exact(item.seconds.mean)]
        cells += [paper.where, paper.verified, paper.differs, item.why_not, paper.margin_reason, paper.finding]
        cells += [open_text(item)]
        rows.append(cells)
    return to_csv(header, rows)
