"""One table of text as Markdown, as LaTeX (booktabs) and as console text, and rows of numbers as csv.

Cells are plain text ("72.4 ± 0.8"); each writer escapes what its format needs escaped.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

TEX_PAGE = 465.0
"""Width of a table at most, in points: 6.5 inches, less a little for what the letters' widths are only about."""
TEX_GAP = 7.0
"""Between columns, in points."""
TEX_SIZES = ((r"\small", 9.0), (r"\footnotesize", 8.0), (r"\scriptsize", 7.0))
"""Type and its size in points, the largest first."""
_EM = {" ": 0.38, "±": 0.9, "%": 0.95, "m": 0.88, "w": 0.8, "-": 0.85, ".": 0.33, ",": 0.33, "(": 0.45, ")": 0.45}
"""Widths of letters that differ most from others, in em."""
_LONG, _LONG_SHARE = 45, 0.4
"""Text of more letters is broken into lines, in a column of this share of the page."""
_LONG_COLUMN = f"p{{{_LONG_SHARE}\\linewidth}}"

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
    # After the end of a row, a bracket would be read as its argument.
    "[": "{[}",
    "±": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{MINUS SIGN}": "$-$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\to$",
}


@dataclass(frozen=True)
class Section:
    """Rows under one heading; "" for none."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    group: str | None = None
    """Sections of one group may be sorted into each other, under this heading; None keeps the section apart."""


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
    """Return a `table` environment for `booktabs` that fits a page of 6.5 inches.

    The largest type that fits is taken. Where none does, the columns of numbers come in several rows of tables, each
    with the names again: nothing is scaled down until nobody can read it.
    """
    size, parts = _tex_layout(table)
    lines = [
        r"\begin{table}[t]",
        r"  \centering",
        f"  {size}",
        f"  \\setlength{{\\tabcolsep}}{{{TEX_GAP / 2:g}pt}}",
        f"  \\caption[{{{tex(table.title)}}}]{{{tex(' '.join(table.caption))}}}",
        f"  \\label{{tab:{table.label}}}",
        r"  \smallskip",
    ]
    for i, numbers in enumerate(parts):
        if i:
            lines.append(r"  \par\medskip")
        lines += _tex_tabular(table, [*range(table.left), *numbers])
    if table.notes:
        lines.append("  \\par\\smallskip\\raggedright\\footnotesize")
        lines += [f"  {tex(note)}\\par" for note in table.notes]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def _tex_tabular(table: TextTable, columns: Sequence[int]) -> list[str]:
    kinds = ["r" if i >= table.left else _LONG_COLUMN if _is_long(table, i) else "l" for i in columns]
    lines = [
        f"  \\begin{{tabular}}{{@{{}}{''.join(kinds)}@{{}}}}",
        r"    \toprule",
        "    " + _tex_row(table.header[i] for i in columns),
        r"    \midrule",
    ]
    for i, section in enumerate(table.sections):
        if i:
            lines.append(r"    \addlinespace")
        if section.title:
            lines.append(f"    \\multicolumn{{{len(columns)}}}{{@{{}}l}}{{\\textit{{{tex(section.title)}}}}} \\\\")
        lines += ["    " + _tex_row(row[i] for i in columns) for row in section.rows]
    return [*lines, r"    \bottomrule", r"  \end{tabular}"]


def _tex_layout(table: TextTable) -> tuple[str, list[list[int]]]:
    """Return the size of type and the columns of numbers, part by part."""
    widths = [_tex_width(table, i) for i in range(len(table.header))]
    left, numbers = list(range(table.left)), list(range(table.left, len(table.header)))

    def points(columns: Sequence[int], size: float) -> float:
        return sum(widths[i] * (1 if _is_long(table, i) else size) for i in columns) + TEX_GAP * (len(columns) - 1)

    for name, size in TEX_SIZES:
        if points([*left, *numbers], size) <= TEX_PAGE:
            return name, [numbers]
    name, size = TEX_SIZES[1]
    for count in range(2, len(numbers) + 1):
        splits = []
        for inner in combinations(range(1, len(numbers)), count - 1):
            ends = [0, *inner, len(numbers)]
            splits.append([numbers[a:b] for a, b in pairwise(ends)])
        widest = [max(points([*left, *part], size) for part in split) for split in splits]
        if min(widest) <= TEX_PAGE:
            return name, splits[widest.index(min(widest))]
    return name, [[i] for i in numbers] or [[]]


def _is_long(table: TextTable, i: int) -> bool:
    """Whether a column of text is broken into lines."""
    return i < table.left and max(len(row[i]) for row in _rows(table)) > _LONG


def _tex_width(table: TextTable, i: int) -> float:
    """Return about how wide a column is: in em, and in points where its text is broken into lines."""
    if _is_long(table, i):
        return _LONG_SHARE * TEX_PAGE
    return max(sum(_EM.get(letter, 0.78 if letter.isupper() else 0.57) for letter in row[i]) for row in _rows(table))


def _rows(table: TextTable) -> list[tuple[str, ...]]:
    return [table.header, *(row for section in table.sections for row in section.rows)]


def tex(text: str) -> str:
    """Return text that LaTeX prints as it stands: specials escaped, a minus sign before a number."""
    signed = re.sub(r"(?<![\w.}-])-(?=\d)", "\N{MINUS SIGN}", text)
    return "".join(_TEX.get(letter, letter) for letter in signed)


def _tex_row(cells: Iterable[str]) -> str:
    return " & ".join("--" if cell == "-" else tex(cell) for cell in cells) + r" \\"


# ------------------------------------------------------------------------------------------------------- console, csv


def to_console(table: TextTable) -> str:
    """Return title, header and rows as aligned plain text."""
    rows = _rows(table)
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
