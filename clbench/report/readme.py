"""The parts of a README that a report writes, between markers that stand each on a line of its own.

<!-- results:begin NAME... -->      tables and first figures of these tasks, a line for each of the others; of all
<!-- results:end -->                tasks where none is named
<!-- reproduce:begin PATTERN... --> what `clbench reproduce PATTERN... --recorded` prints; any number of such parts
<!-- reproduce:end -->
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clbench.errors import UserError, unknown
from clbench.records import write_atomic
from clbench.report import published, reproduction
from clbench.report.published import Comparison

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
_MARKER = re.compile(r"<!-- (results|reproduce):(begin|end)((?: [^\s>]+)*) -->")


@dataclass(frozen=True)
class Shown:
    """What a README can show of a report; links are relative to the parent of the report's folder."""

    out: Path
    """The report's folder."""
    sections: Mapping[str, str]
    """Task -> its title, first table and first figures, as Markdown."""
    lines: Mapping[str, str]
    """Task -> a line of a list, with a link to its tables."""
    comparisons: Sequence[Comparison]


def filled(readme: Path, shown: Shown) -> tuple[str, str]:
    """Return a README's text as it is, and as it is to be.

    Raises:
        UserError: it cannot be read, has no results part or two, markers that are not in pairs, or names a task or a
            row that is not there.
    """
    try:
        old = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{readme}: cannot be read ({error})") from None
    marks = list(_MARKER.finditer(old))
    kinds = [(mark[1], mark[2]) for mark in marks]
    pairs = list(zip(marks[::2], marks[1::2], strict=False))
    paired = all(begin[1] == end[1] and (begin[2], end[2]) == ("begin", "end") for begin, end in pairs)
    if len(marks) % 2 or not paired or kinds.count(("results", "begin")) != 1:
        raise UserError(f"{readme}: needs one line '{BEGIN}' and after it one line '{END}'; see clbench report --help")
    new, done = "", 0
    for begin, end in pairs:
        text = _results(readme, begin, shown) if begin[1] == "results" else _reproduced(begin, shown)
        new += old[done : begin.end()] + "\n" + text
        done = end.start()
    return old, new + old[done:]


def update(readme: Path, shown: Shown) -> bool:
    """Write a README's parts anew; return whether the file changed. Raises UserError, as `filled`."""
    old, new = filled(readme, shown)
    if new != old:
        write_atomic(readme, new)
    return new != old


def _results(readme: Path, begin: re.Match[str], shown: Shown) -> str:
    wanted = begin[3].split() or list(shown.sections)
    wrong = [unknown("task with records", name, shown.sections) for name in wanted if name not in shown.sections]
    if wrong:
        raise UserError(*(f"{readme}: {begin[0]}: {line}" for line in wrong))
    parts = [shown.sections[name] for name in wanted]
    rest = [line for name, line in shown.lines.items() if name not in wanted]
    text = "\n".join([*parts, "### More\n", *rest, ""] if rest else parts)
    relative = Path(os.path.relpath(shown.out.resolve(), readme.resolve().parent)).as_posix()
    return text.replace(f"]({shown.out.name}/", f"]({relative}/")


def _reproduced(begin: re.Match[str], shown: Shown) -> str:
    rows = published.choose([item.row for item in shown.comparisons], begin[3].split())
    kept = [item for item in shown.comparisons if any(item.row is row for row in rows)]
    return f"```text\n{reproduction.console(kept)}\n```\n"
