"""One self-contained HTML page: tables, figures, and what is not in them. No script, no network, light and dark."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from clbench.report import figures_ranks, lab, reproduction
from clbench.report.select import Selection
from clbench.report.style import DPI, Plot
from clbench.report.writers import TextTable

TEMPLATE = "page.html.j2"


def page_html(
    selection: Selection,
    tables: Mapping[str, Sequence[TextTable]],
    plots: Mapping[str, Sequence[Plot]],
    pictures: Mapping[str, bytes],
    problems: Sequence[str],
) -> str:
    """Return the page as HTML.

    Args:
        selection: tasks and their blocks, in order.
        tables: task -> its tables; `reproduction.NAME` -> the comparison with papers, when there is one; the lab's.
        plots: stem of a block, or of a record of the lab -> its figures.
        pictures: `<stem>-<figure>` -> PNG.
        problems: one line for each run or file that is not in the tables.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    sections = [
        {
            "name": task.name,
            "title": task.blocks[-1].task.title,
            "tables": tables[task.name],
            "blocks": [
                {
                    "title": block.title if len(task.blocks) > 1 else "",
                    "figures": [
                        _picture(plot.caption, pictures[plot.stem(block.stem)]) for plot in plots[block.stem]
                    ],
                }
                for block in task.blocks
            ],
        }
        for task in selection.tasks
    ]
    if figures_ranks.NAME in plots:
        name = figures_ranks.NAME
        pairs = [_picture(plot.caption, pictures[plot.stem(name)]) for plot in plots[name]]
        blocks = [{"title": "", "figures": pairs}]
        sections.append({"name": name, "title": figures_ranks.TITLE, "tables": (), "blocks": blocks})
    if lab.NAME in tables:
        drawn = [(stem, plot) for stem in lab.stems(plots) for plot in plots[stem]]
        pairs = [_picture(plot.caption, pictures[plot.stem(stem)]) for stem, plot in drawn]
        blocks = [{"title": "", "figures": pairs}]
        sections.append({"name": lab.NAME, "title": lab.TITLE, "tables": tables[lab.NAME], "blocks": blocks})
    name = reproduction.NAME
    if name in tables:
        pairs = [_picture(plot.caption, pictures[plot.stem(name)]) for plot in plots.get(name, ())]
        blocks = [{"title": "", "figures": pairs}]
        sections.append({"name": name, "title": "Published numbers", "tables": tables[name], "blocks": blocks})
    text = environment.get_template(TEMPLATE).render(sections=sections, problems=problems)
    return text + "\n"


def _picture(caption: str, png: bytes) -> dict[str, str | int]:
    """Return a figure for the template: its width is that of print, a little enlarged for a screen."""
    across: int = struct.unpack(">I", png[16:20])[0]
    source = f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
    return {"caption": caption, "source": source, "width": round(across / DPI * 120)}
