"""One self-contained HTML page: tables, figures, and what is not in them. No network, light and dark.

Everything is there without JavaScript; with it, a click on a column's head sorts, and one on a figure enlarges it. The
figures are inline SVG, not the PNG files: a third of the bytes, sharp at any size, and their text can be searched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from clbench.report import figures_ranks, lab, reproduction, svg
from clbench.report.select import Selection
from clbench.report.style import Plot
from clbench.report.writers import TextTable

TEMPLATE = "page.html.j2"
PER_POINT = 120 / 72
"""Pixels of the page for each point of print: a figure of a column's width is as wide as a phone."""
_CELL = re.compile(r"[+<>]? ?(-?[\d,]+(?:\.\d+)?)(?: ± [\d.]+)?(?: ([kMGT]|B|[KMGT]iB))?(?=$| [(\[])")
_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def page_html(
    selection: Selection,
    tables: Mapping[str, Sequence[TextTable]],
    plots: Mapping[str, Sequence[Plot]],
    drawings: Mapping[str, str],
    problems: Sequence[str],
    remarks: Sequence[str],
    title: str,
) -> str:
    """Return the page as HTML.

    Args:
        selection: tasks and their blocks, in order.
        tables: task -> its tables; `reproduction.NAME` -> the comparison with papers, when there is one; the lab's.
        plots: stem of a block, or of a record of the lab -> its figures.
        drawings: `<stem>-<figure>` -> SVG as `svg.compact` makes it, no two with the same ids.
        problems: one line for each run or file that is not in the tables.
        remarks: one line for each thing a reader has to know of the runs that are.
        title: of the page.
    """
    def pictures(stem: str) -> list[dict[str, object]]:
        return [_picture(plot, plot.stem(stem), drawings[plot.stem(stem)]) for plot in plots[stem]]

    def section(name: str, title: str, blocks: list[dict[str, object]]) -> dict[str, object]:
        return {"name": name, "title": title, "tables": tables.get(name, ()), "blocks": blocks}

    sections = []
    for task in selection.tasks:
        several = len(task.blocks) > 1
        blocks: list[dict[str, object]] = [
            {"title": block.title if several else "", "figures": pictures(block.stem)} for block in task.blocks
        ]
        sections.append(section(task.name, task.blocks[-1].task.title, blocks))
    if figures_ranks.NAME in plots:
        drawn = pictures(figures_ranks.NAME)
        sections.append(section(figures_ranks.NAME, figures_ranks.TITLE, [{"title": "", "figures": drawn}]))
    if lab.NAME in tables:
        drawn = [picture for stem in lab.stems(plots) for picture in pictures(stem)]
        sections.append(section(lab.NAME, lab.TITLE, [{"title": "", "figures": drawn}]))
    if reproduction.NAME in tables:
        drawn = pictures(reproduction.NAME) if reproduction.NAME in plots else []
        sections.append(section(reproduction.NAME, "Published numbers", [{"title": "", "figures": drawn}]))
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals |= {"number": number, "heading": _heading}
    page = environment.get_template(TEMPLATE)
    return page.render(title=title, sections=sections, problems=problems, remarks=remarks) + "\n"


def number(cell: str) -> float | None:
    """Return what a cell is sorted by: "1.50 ± 0.31 MiB" is 1,572,864; None for text and for what is missing."""
    found = _CELL.match(cell)
    if found is None:
        return None
    return float(found[1].replace(",", "")) * _UNITS.get(found[2] or "", 1)


def _heading(table: str, section: str) -> str:
    """Return a table's title without that of the section it stands in."""
    short = table.removeprefix(f"{section}: ")
    return short[:1].upper() + short[1:]


def _picture(plot: Plot, name: str, drawing: str) -> dict[str, object]:
    """Return a figure for the template: its width is that of print, a little enlarged for a screen."""
    width = round(svg.size(drawing)[0] * PER_POINT)
    return {"name": name, "caption": plot.caption, "drawing": drawing, "width": width}
