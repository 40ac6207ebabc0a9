"""One table of text as Markdown, as LaTeX (booktabs) and as console text, and rows of numbers as csv.

Cells are plain text ("72.4 ± 0.8"); each writer escapes what its format needs escaped.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TEX_SIZES = ((70, r"\small"), (95, r"\footnotesize"), (10_000, r"\scriptsize"))
"""Characters across a table, and the type in which a page of about 6.5 inches takes that many."""

_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    "±": r"$\pm$",
}


@dataclass(frozen=True)
class Section:
    """Rows under one heading; "" for none."""

    title: str
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class TextTable:
    """A table ready to be written in any format."""

    label: str
    """For references in LaTeX, after `tab:`."""
    title: str
    caption: tuple[str, ...]
    """Sentences."""
    header: tuple[str, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()
    """Footnotes, a line each."""
    left: int = 1
    """How many columns are text, aligned left; the rest are numbers, aligned right."""


# ------------------------------------------------------------------------------------------------------------ markdown


def to_markdown(table: TextTable, heading: str = "##") -> str:
    """Return the table with its title, caption and notes as GitHub Markdown."""
    parts = [f"{heading} {table.title}", grid(table)]
    if table.notes:
        parts.append("\n".join(f"- {_markdown_text(note)}" for note in table.notes))
    parts.append(_markdown_text(" ".join(table.caption)))
    return "\n\n".join(parts) + "\n"


def grid(table: TextTable) -> str:
    """Return header and rows alone as a Markdown table; headings of sections become bold rows."""
    rows = [[_markdown_text(cell) for cell in table.header]]
    for section in table.sections:
        if section.title:
            rows.append([f"**{_markdown_text(section.title)}**", *[""] * (len(table.header) - 1)])
        rows += [[_markdown_text(cell) for cell in row] for row in section.rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(table.header))]
    lines = [_padded(row, widths, table.left) for row in rows]
    rule = ["-" * width if i < table.left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)


def _padded(row: Sequence[str], widths: Sequence[int], left: int) -> str:
    cells = [
        cell.ljust(width) if i < left else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "| " + " | ".join(cells) + " |"


def _markdown_text(text: str) -> str:
    # An underscore within a word and a "<" before a space are plain text in GitHub's Markdown.
    return re.sub(r"([\\|*`]|<(?=[\w/!]))", r"\\\1", text)


# --------------------------------------------------------------------------------------------------------------- latex


def to_latex(table: TextTable) -> str:
    """Return a `table` environment for `booktabs`, sized so that it fits a page of about 6.5 inches."""
    columns = len(table.header)
    lines = [
        r"\begin{table}[t]",
        r"  \centering",
        f"  {_tex_size(table)}",
        r"  \setlength{\tabcolsep}{3.5pt}",
        f"  \\caption{{{tex(' '.join(table.caption))}}}",
        f"  \\label{{tab:{table.label}}}",
        r"  \smallskip",
        f"  \\begin{{tabular}}{{@{{}}{'l' * table.left}{'r' * (columns - table.left)}@{{}}}}",
        r"    \toprule",
        "    " + _tex_row(table.header),
        r"    \midrule",
    ]
    for i, section in enumerate(table.sections):
        if i:
            lines.append(r"    \addlinespace")
        if section.title:
            lines.append(f"    \\multicolumn{{{columns}}}{{@{{}}l}}{{\\textit{{{tex(section.title)}}}}} \\\\")
        lines += ["    " + _tex_row(row) for row in section.rows]
    lines += [r"    \bottomrule", r"  \end{tabular}"]
    if table.notes:
        lines.append("  \\par\\smallskip\\raggedright\\footnotesize " + r"\\ ".join(tex(note) for note in table.notes))
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def tex(text: str) -> str:
    """Return text that LaTeX prints as it stands: specials escaped, a minus sign before a number."""
    escaped = "".join(_TEX.get(letter, letter) for letter in text)
    return re.sub(r"(?<![\w.}-])-(?=\d)", r"$-$", escaped)


def _tex_row(cells: Iterable[str]) -> str:
    return " & ".join("--" if cell == "-" else tex(cell) for cell in cells) + r" \\"


def _tex_size(table: TextTable) -> str:
    rows = [table.header, *(row for section in table.sections for row in section.rows)]
    across = sum(max(len(row[i]) for row in rows) + 1 for i in range(len(table.header)))
    return next(size for most, size in TEX_SIZES if across <= most)


# ------------------------------------------------------------------------------------------------------- console, csv


def to_console(table: TextTable) -> str:
    """Return title, header and rows as aligned plain text."""
    rows = [table.header, *(row for section in table.sections for row in section.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    lines = [table.title]
    for row in rows:
        cells = [
            cell.ljust(width) if i < table.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join([*lines, *(f"  {note}" for note in table.notes)])


def to_csv(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return rows as csv text; lines end in a bare newline on every system."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
