"""Which figures need no drawing: their files still are what was drawn from the same inputs by the same code.

Drawing is nine tenths of a report's time. `figures/drawn.csv` keeps a digest of all that each figure was drawn from
(records, names, looks, the code of the report, the versions of the libraries) and one of each file that came of it. A
figure is left alone where all of them still hold; its drawing for the page is taken from the page. A record more
draws the figures of its task again, and a change of the code all of them.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from clbench.report.writers import to_csv

FILE = "drawn.csv"
KINDS = ("pdf", "png", "svg")
"""The SVG is not a file, but a part of the page."""
PACKAGES = ("fonttools", "matplotlib", "numpy", "pillow", "scipy", "seaborn")
"""What the bytes of a figure depend on, besides its inputs and the code."""
ROOMS = (
    "report/*.py", "__init__.py", "budgets.py", "errors.py", "lab/__init__.py", "lab/record.py", "metrics.py",
    "metrics_within.py", "published_row.py", "recipes.py", "record_checks.py", "record_parts.py", "records.py",
    "seeds.py", "spec.py", "specs.py", "tuning.py",
)  # fmt: skip
"""The code that figures come of: the report, and all it may import."""
_HEADER = ("figure", "inputs", *KINDS)
_PICTURE = re.compile(r'<div class="plot">(<svg .*?</svg>)</div><figcaption>.*?<code>([^<]*)</code>', re.DOTALL)


def inputs(*values: object) -> str:
    """Return a digest of what figures are drawn from: these values, the code and the libraries' versions.

    Args:
        values: records, other pydantic models, dataclasses and plain data, nested in any way.

    Raises:
        TypeError: a value that does not say all it holds.
    """
    return _digest("\n".join([_code(), *map(_said, values)]).encode())


def kept(out: Path, wanted: Mapping[str, str]) -> dict[str, dict[str, bytes]]:
    """Return the files of each figure that needs no drawing, by kind.

    Args:
        out: folder of a report.
        wanted: stem of a figure's files -> digest of its inputs.
    """
    known = {name: row for name, row in _rows(out).items() if row["inputs"] == wanted.get(name)}
    pictures = _pictures(out / "report.html") if known else {}
    found = {}
    for name, row in known.items():
        paths = {kind: out / "figures" / f"{name}.{kind}" for kind in ("pdf", "png")}
        if name not in pictures or not all(path.is_file() for path in paths.values()):
            continue
        files = {**{kind: path.read_bytes() for kind, path in paths.items()}, "svg": pictures[name]}
        if all(_digest(files[kind]) == row[kind] for kind in KINDS):
            found[name] = files
    return found


def table(wanted: Mapping[str, str], drawn: Mapping[str, Mapping[str, bytes]]) -> str:
    """Return the content of `FILE`: a row a figure.

    Args:
        wanted: stem of a figure's files -> digest of its inputs.
        drawn: stem -> kind -> content.
    """
    return to_csv(_HEADER, [(name, wanted[name], *(_digest(drawn[name][kind]) for kind in KINDS)) for name in wanted])


def altered(out: Path) -> list[str]:
    """Return one line for each pdf and png that is not the file that was drawn."""
    lines = []
    for name, row in _rows(out).items():
        for kind in ("pdf", "png"):
            path = out / "figures" / f"{name}.{kind}"
            if path.is_file() and _digest(path.read_bytes()) != row[kind]:
                lines.append(f"{path}: not the file that was drawn")
    return lines


def _rows(out: Path) -> dict[str, dict[str, str]]:
    """Return the rows of `FILE` by figure; none where there is no such file, or it is damaged."""
    try:
        text = (out / "figures" / FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    reader = csv.DictReader(io.StringIO(text))
    if tuple(reader.fieldnames or ()) != _HEADER:
        return {}
    return {row["figure"]: row for row in reader if all(row[key] for key in _HEADER[1:])}


def _pictures(page: Path) -> dict[str, bytes]:
    """Return the drawings of a page by the stem of their figures."""
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    return {found[2]: found[1].encode() for found in _PICTURE.finditer(text)}


@functools.cache
def _code() -> str:
    package = Path(__file__).resolve().parent.parent
    files = sorted(path for pattern in ROOMS for path in package.glob(pattern))
    digests = [f"{path.relative_to(package).as_posix()} {_digest(path.read_bytes())}" for path in files]
    return "\n".join([*digests, *(f"{name} {version(name)}" for name in PACKAGES)])


def _said(value: Any) -> str:
    """Return a value in words that are the same in every process, and for no other value."""
    if isinstance(value, BaseModel):
        return f"{type(value).__name__}{value.model_dump_json()}"
    if is_dataclass(value):
        held = (f"{field.name}={_said(getattr(value, field.name))}" for field in fields(value))
        return f"{type(value).__name__}({','.join(held)})"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_said(key)}:{_said(held)}" for key, held in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(_said, value)) + "]"
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    raise TypeError(f"{type(value).__name__}: does not say all it holds")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
