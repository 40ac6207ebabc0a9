"""Records to a folder of tables and figures, and the check that what is committed still says what the records say.

- `out/tables/README.md`: index of what there is, what failed, what could not be read
- `out/tables/<task>.md`, `.csv`, `.tex`
- `out/tables/<task>-sharing.*`: the ladder of sharing, where the records have one
- `out/tables/reproduction.*`, `out/figures/reproduction.*`: ours beside published numbers, where there are runs for any
- `out/tables/lab-growth.*`, `out/figures/lab-growth-*`: from `out/lab/growth-<device>.json`, where there is one
- `out/figures/critical-difference.*`: average ranks, where enough baselines ran on enough streams
- `out/figures/<task>-<figure>.pdf`, `.png`, `.csv`
- `out/figures/drawn.csv`: what each figure was drawn from, so that it is drawn again only where that has changed
- `out/report.html`: everything on one page
- `out/rebuild.py`, `out/tables/records.csv`: the script that makes all this again, and the records it was made from
- `out/style.toml`: a copy of the style file, where there is one
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path

from clbench.errors import UserError
from clbench.records import load_all, write_atomic
from clbench.report import (
    drawn,
    figures,
    figures_lab,
    figures_ranks,
    lab,
    provenance,
    published,
    reproduction,
    sharing,
    svg,
    tables,
)
from clbench.report.choice import ALL, Choice, load, restyled, styled
from clbench.report.figures_reproduction import forest
from clbench.report.measures import Measure, chosen
from clbench.report.page import page_html
from clbench.report.published import Comparison, Row
from clbench.report.readme import Shown, filled
from clbench.report.rebuild import SCRIPT
from clbench.report.select import Block, Selection, TaskBlocks, select
from clbench.report.style import Plot, looks, render
from clbench.report.writers import TextTable, grid, to_csv, to_latex, to_markdown

KINDS = ("md", "csv", "tex")
PER_PROCESS = 12
"""Figures that are worth another process: it takes seconds to import what draws."""


@dataclass(frozen=True)
class Built:
    """What a report consists of, and where its files were written."""

    out: Path
    paths: tuple[Path, ...]
    """Every file, in the order of writing."""
    problems: tuple[str, ...]
    """One line for each run that failed, file that is damaged, or recipe that could not be compared."""
    remarks: tuple[str, ...]
    """One line for each thing to know of the runs that are there: several protocols or devices, a single seed."""
    shown: Shown
    """What a README can show of it."""


@dataclass(frozen=True)
class _Report:
    """Everything a report says, before any file is written."""

    selection: Selection
    measures: tuple[Measure, ...]
    tables: dict[str, tuple[TextTable, ...]]
    """Task -> its tables; `reproduction.NAME` -> the comparison, when there is one; `lab.NAME` -> those of the lab."""
    texts: dict[str, str]
    """File name under `tables/` -> content."""
    plots: dict[str, tuple[Plot, ...]]
    """Stem of a block, of a record of the lab, or `reproduction.NAME`, `figures_ranks.NAME` -> its figures."""
    inputs: dict[str, str]
    """Owner of figures, as in `plots` -> digest of all that they are drawn from."""
    comparisons: tuple[Comparison, ...]
    problems: tuple[str, ...]
    title: str
    beside: dict[str, str]
    """File name in the folder itself -> content: the script that makes it again, the style."""


def build(runs: Path, out: Path, choice: Choice = ALL, jobs: int = 1) -> Built:
    """Write tables, figures and the page of the records under `runs` into `out`.

    Args:
        runs: folder of records.
        out: folder to write to; files of the same names are replaced, others left alone.
        choice: what to show of them, and under which names.
        jobs: processes that draw, at most: more than one only in a program that may be imported again. Each reads the
            records itself, so that a few figures are drawn here all the same.

    Raises:
        UserError: a name that is not known, no finished run, a mistake in the style file, or a folder that cannot be
            written.
    """
    report = _compose(runs, out, choice)
    remarks = report.selection.remarks
    wanted = {plot.stem(stem): report.inputs[stem] for stem, plots in report.plots.items() for plot in plots}
    made = _draw(runs, out, choice, report.plots, drawn.kept(out, wanted), jobs)
    try:
        paths, drawings = _write(out, report.texts, report.plots, made)
        paths.append(out / "figures" / drawn.FILE)
        write_atomic(paths[-1], drawn.table(wanted, made))
        page = page_html(
            report.selection, report.tables, report.plots, drawings, report.problems, remarks, report.title
        )
        for name, text in {**report.beside, "report.html": page}.items():
            write_atomic(out / name, text)
            paths.append(out / name)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    return Built(out, tuple(paths), report.problems, remarks, _shown(report, out))


def build_reproduction(runs: Path, out: Path, rows: Sequence[Row]) -> tuple[list[Comparison], list[str]]:
    """Write table and forest plot of published numbers alone, as `build` writes them; return what they compare.

    Args:
        runs: folder of records.
        out: folder to write to.
        rows: of `published.shipped_rows`.

    Returns:
        The comparisons, and one line for each record that is damaged or could not be compared.

    Raises:
        UserError: no such folder of records, or `out` cannot be written.
    """
    if not runs.is_dir():
        raise UserError(f"{runs}: no such folder of records")
    records, damaged = load_all(runs)
    comparisons, mismatched = published.compare(records, rows)
    texts, plots = _reproduction(comparisons)
    try:
        _write(out, texts, plots, _rendered(_named(plots)))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    return comparisons, [*damaged, *mismatched]


def _reproduction(comparisons: Sequence[Comparison]) -> tuple[dict[str, str], dict[str, tuple[Plot, ...]]]:
    """Return the files of a comparison by name and its figure, where there is anything to show."""
    plot = forest(comparisons)
    texts = reproduction.texts(comparisons) if comparisons else {}
    return texts, {reproduction.NAME: (plot,)} if plot.rows else {}


def _draw(
    runs: Path,
    out: Path,
    choice: Choice,
    plots: dict[str, tuple[Plot, ...]],
    kept: dict[str, dict[str, bytes]],
    jobs: int,
) -> dict[str, dict[str, bytes]]:
    """Return every figure in every format, by the stem of its files; drawn by as many processes as is worth it."""
    missing = [(name, plot) for name, plot in _named(plots) if name not in kept]
    count = min(jobs, len(missing) // PER_PROCESS)
    if count < 2:
        return kept | _rendered(missing)
    shares = [(runs, out, choice, {name for name, _ in missing[i::count]}) for i in range(count)]
    before = set(active_children())
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        with _children_deaf():
            futures = [pool.submit(_draw_share, share) for share in shares]
        return kept | {name: files for future in futures for name, files in future.result().items()}
    except BaseException:
        for child in set(active_children()) - before:
            child.terminate()
        raise
    finally:
        pool.shutdown()


@contextlib.contextmanager
def _children_deaf() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started here, for good, and from this one until the end of the block.

    A terminal sends it to all of them: this one is to answer, once.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Unix has it alone
        yield
        return
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _draw_share(share: tuple[Path, Path, Choice, set[str]]) -> dict[str, dict[str, bytes]]:
    """Draw the figures of these names, in a process of its own: a plot cannot be sent there."""
    runs, out, choice, names = share
    return _rendered((name, plot) for name, plot in _named(_compose(runs, out, choice).plots) if name in names)


def _rendered(named: Iterable[tuple[str, Plot]]) -> dict[str, dict[str, bytes]]:
    """Draw figures; return their files by stem and kind, the SVG as it stands in the page."""
    made = {}
    # An axis is full of cycles: collecting garbage all the time takes a sixth of drawing, once a few figures nothing.
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i, (name, plot) in enumerate(named):
            files = render(plot)
            prefix = "f" + hashlib.sha256(name.encode()).hexdigest()[:7]
            made[name] = {**files, "svg": svg.compact(files["svg"].decode(), prefix, plot.caption).encode()}
            if i % PER_PROCESS == PER_PROCESS - 1:
                gc.collect()
    finally:
        if collecting:
            gc.enable()
    return made


def _named(plots: dict[str, tuple[Plot, ...]]) -> list[tuple[str, Plot]]:
    return [(plot.stem(stem), plot) for stem, owned in plots.items() for plot in owned]


def _write(
    out: Path, texts: dict[str, str], plots: dict[str, tuple[Plot, ...]], made: dict[str, dict[str, bytes]]
) -> tuple[list[Path], dict[str, str]]:
    """Write tables and figures; return the paths, and the figures as SVG by the stem of their files."""
    paths, drawings = [], {}
    for name, text in texts.items():
        write_atomic(out / "tables" / name, text)
        paths.append(out / "tables" / name)
    for name, plot in _named(plots):
        files = {**made[name], "csv": to_csv(plot.header, plot.rows).encode()}
        drawings[name] = files.pop("svg").decode()
        for kind, content in files.items():
            paths.append(out / "figures" / f"{name}.{kind}")
            write_atomic(paths[-1], content)
    return paths, drawings


def check(runs: Path, out: Path, readme: Path | None = None, choice: Choice = ALL) -> list[str]:
    """Return one line for each file that no longer says what the records say: stale, missing or orphaned.

    Tables are compared byte for byte. A figure is compared through the csv of what it draws: its pdf and png must be
    the files that were drawn, and the page must be there, but their bytes also depend on the versions of the plotting
    library and its fonts. Nothing is written.

    Args:
        runs: folder of records.
        out: folder that `build` wrote from them.
        readme: a file with a results block, to be checked too.
        choice: what `build` was asked for.
    """
    report = _compose(runs, out, choice)
    texts = {f"tables/{name}": text for name, text in report.texts.items()}
    present = {"report.html", f"figures/{drawn.FILE}"}
    for stem, plots in report.plots.items():
        for plot in plots:
            base = f"figures/{plot.stem(stem)}"
            texts[f"{base}.csv"] = to_csv(plot.header, plot.rows)
            present |= {f"{base}.{suffix}" for suffix in ("pdf", "png")}
    lines = []
    for name in sorted({*texts, *present}):
        path = out / name
        if not path.is_file():
            lines.append(f"{path}: missing")
        elif name in texts and path.read_bytes() != texts[name].encode():
            lines.append(f"{path}: stale")
    lines += drawn.altered(out)
    for name, text in sorted(report.beside.items()):
        path = out / name
        if not path.is_file():
            lines.append(f"{path}: missing")
        elif provenance.lasting(path.read_text()) != provenance.lasting(text):
            lines.append(f"{path}: stale")
    for folder in ("tables", "figures"):
        for path in sorted((out / folder).glob("*")):
            if f"{folder}/{path.name}" not in {*texts, *present} and not path.name.startswith("."):
                lines.append(f"{path}: orphaned, no record makes it")
    if readme is not None:
        old, new = filled(readme, _shown(report, out))
        lines += [f"{readme}: the parts that a report writes are stale"] if old != new else []
    return lines


# ------------------------------------------------------------------------------------------------------------ compose


def _compose(runs: Path, out: Path, choice: Choice) -> _Report:
    measures = tuple(chosen(choice.metrics))
    selection = select(runs, choice.tasks, choice.baselines, choice.families)
    style = load(choice.style, selection)
    selection = styled(selection, style)
    made: dict[str, tuple[TextTable, ...]] = {}
    texts: dict[str, str] = {}
    for task in selection.tasks:
        runs_of = [run for block in task.blocks for run in block.runs]
        columns = chosen(choice.metrics, runs_of)
        made[task.name] = tuple(tables.tables(task, columns))
        texts[f"{task.name}.md"] = _markdown(task, made[task.name])
        texts[f"{task.name}.csv"] = tables.csv_text(task, columns)
        texts[f"{task.name}.tex"] = "\n".join(to_latex(table) for table in made[task.name])
        ladder = sharing.table(task)
        if ladder is not None:
            made[task.name] = (*made[task.name], ladder)
            texts[f"{task.name}-sharing.md"] = to_markdown(ladder, "#")
            texts[f"{task.name}-sharing.csv"] = sharing.csv_text(task)
            texts[f"{task.name}-sharing.tex"] = to_latex(ladder)
    rows, broken = published.shipped_rows()
    finished = [run for block in _blocks(selection) for run in block.runs]
    comparisons, mismatched = published.compare(finished, rows)
    groups = [group for block in _blocks(selection) for group in block.groups]
    found = restyled(looks([*selection.labels, *(group.key for group in groups)]), groups, style)
    plots, inputs = {}, {}
    for block in _blocks(selection):
        own = {group.label: found[group.label] for group in block.groups}
        plots[block.stem], inputs[block.stem] = tuple(figures.plots(block, own)), drawn.inputs(block, own)
    if comparisons:
        made[reproduction.NAME] = (reproduction.table(comparisons),)
    compared, forests = _reproduction(comparisons)
    texts, plots = texts | compared, plots | forests
    # An experiment knows the folder of its recipe, which differs from place to place.
    said = [(item.row.names, item.row.paper, item.device, item.ours, item.seconds) for item in comparisons]
    inputs[reproduction.NAME] = drawn.inputs(said)
    ranks = figures_ranks.critical_difference_diagram(selection)
    if ranks:
        plots[figures_ranks.NAME], inputs[figures_ranks.NAME] = (ranks,), drawn.inputs(selection)
    measured, damaged = lab.load_all(out / "lab")
    if measured:
        made[lab.NAME] = tuple(table for record in measured for table in lab.tables(record))
        texts |= lab.texts(measured)
        plots |= {lab.slug(record): tuple(figures_lab.plots(record)) for record in measured}
        inputs |= {lab.slug(record): drawn.inputs(record) for record in measured}
    problems = (*selection.problems, *broken, *mismatched, *damaged)
    texts["README.md"] = _index(selection, made, plots, problems)
    texts[provenance.RECORDS] = provenance.records_csv([*finished, *selection.unfinished], runs)
    beside = {SCRIPT: provenance.script(choice.options(), runs, out)}
    if choice.style is not None:
        beside[provenance.STYLE] = choice.style.read_text(encoding="utf-8")
    return _Report(
        selection, measures, made, texts, plots, inputs, tuple(comparisons), problems, style.title, beside
    )


def _blocks(selection: Selection) -> list[Block]:
    return [block for task in selection.tasks for block in task.blocks]


def _markdown(task: TaskBlocks, made: Sequence[TextTable]) -> str:
    head = f"# {task.blocks[-1].task.title}\n\nGenerated from records by `clbench report`: edit nothing here.\n"
    return "\n".join([head, *(to_markdown(table) for table in made)])


def _index(
    selection: Selection,
    made: dict[str, tuple[TextTable, ...]],
    plots: dict[str, tuple[Plot, ...]],
    problems: Sequence[str],
) -> str:
    lines = ["# Results", "", "Generated from records by `clbench report`: edit nothing here.", ""]
    for task in selection.tasks:
        runs = len({id(run) for block in task.blocks for run in block.runs})
        count = len({group.label for block in task.blocks for group in block.groups})
        links = ", ".join(f"[{suffix}]({task.name}.{suffix})" for suffix in KINDS)
        lines += [f"## {task.blocks[-1].task.title}", "", f"{count} baselines, {runs} runs. Tables: {links}.", ""]
        if any(table.label == f"{task.name}-sharing" for table in made[task.name]):
            links = ", ".join(f"[{suffix}]({task.name}-sharing.{suffix})" for suffix in KINDS)
            lines += [f"By the share of parameters that tasks have in common: {links}.", ""]
        for block in task.blocks:
            if len(task.blocks) > 1:
                lines += [f"{block.title}:", ""]
            lines += [*_figure_links(block.stem, plots[block.stem]), ""]
    lines += [f"## {figures_ranks.TITLE}", ""]
    drawn = plots.get(figures_ranks.NAME, ())
    lines += [*(_figure_links(figures_ranks.NAME, drawn) or [figures_ranks.why_none(selection)]), ""]
    if reproduction.NAME in made:
        links = ", ".join(f"[{kind}]({reproduction.NAME}.{kind})" for kind in KINDS)
        lines += [f"## {reproduction.TITLE}", "", f"Table: {links}.", ""]
        lines += [*_figure_links(reproduction.NAME, plots.get(reproduction.NAME, ())), ""]
    if lab.NAME in made:
        lines += [f"## {lab.TITLE}", "", f"Tables: {', '.join(f'[{kind}]({lab.NAME}.{kind})' for kind in KINDS)}.", ""]
        lines += [line for stem in lab.stems(plots) for line in _figure_links(stem, plots[stem])]
        lines.append("")
    lines += [f"Made from these records: [csv]({provenance.RECORDS}). `{SCRIPT}` makes all of it again.", ""]
    if selection.remarks:
        lines += ["## To know", "", *(f"- {_quoted(line)}" for line in selection.remarks), ""]
    if problems:
        lines += ["## Not in the tables", "", *(f"- {_quoted(line)}" for line in problems), ""]
    return "\n".join(lines)


def _figure_links(stem: str, plots: Sequence[Plot]) -> list[str]:
    lines = []
    for plot in plots:
        base = f"../figures/{plot.stem(stem)}"
        lines.append(f"- [{plot.name or stem}]({base}.png) ([pdf]({base}.pdf), [data]({base}.csv)): {plot.caption}")
    return lines


def _quoted(line: str) -> str:
    """Return a line as inline code: what a user's exception says must not be read as Markdown."""
    return "`" + line.replace("`", "'") + "`"


# ------------------------------------------------------------------------------------------------------------- readme


def _shown(report: _Report, out: Path) -> Shown:
    sections, lines = {}, {}
    for task in report.selection.tasks:
        title, first = task.blocks[-1].task.title, report.tables[task.name][0]
        parts = [f"### {title}", "", grid(first), "", *_notes(first)]
        for block in task.blocks:
            plot = report.plots[block.stem][0]
            parts += [f"![{plot.caption}]({out.name}/figures/{block.stem}-{plot.name}.png)", ""]
        parts += [f"Definitions, costs and devices: [{task.name}]({out.name}/tables/{task.name}.md).", ""]
        sections[task.name] = "\n".join(parts)
        labels = dict.fromkeys(group.label for block in task.blocks for group in block.groups)
        lines[task.name] = f"- {title}: [{', '.join(labels)}]({out.name}/tables/{task.name}.md)"
    return Shown(out, sections, lines, report.comparisons)


def _notes(table: TextTable) -> list[str]:
    text = to_markdown(table).split("\n\n")[2] if table.notes else ""
    return [text, ""] if text else []
