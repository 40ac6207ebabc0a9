"""What the benchmarks share: their options, and tables of sides measured turn by turn."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.timing import ratios, spread

FEW = 5
"""Fewer turns than these do not tell whether a bar is met: on a busy machine single ones are far out."""

def options(name: str, text: str | None, turns: int) -> argparse.ArgumentParser:
    """Return the parser of a benchmark's options.

    Args:
        name: of its module.
        text: the module's; the first line is shown.
        turns: how many there are by default.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=(text or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few steps, two turns: to see that it runs")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    parser.add_argument("--repeats", type=int, default=None, help=f"turns (default {turns}; 2 with --quick)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the seconds of all turns there")
    return parser


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as plain text, column under column."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def table(
    found: Mapping[str, Sequence[float]], per: int, bar: float, judged: Callable[[str], bool], digits: int = 2
) -> str:
    """Return sides as plain text: microseconds of a step, ratio to the first side, and whether it meets its bar.

    Args:
        found: seconds by side and turn.
        per: steps in a turn.
        bar: most that a side may take, in the first one's time.
        judged: whether a side, by its name, is to meet the bar.
        digits: of the ratios.
    """
    base, *_ = found
    lines = [["side", "us", f"in {base}", "bar"]]
    for name, took in found.items():
        ratio = statistics.median(ratios(took, found[base]))
        verdict = f"{'met' if ratio <= bar else 'MISSED'} ({bar:.2f})" if judged(name) else ""
        if verdict and len(took) < FEW:
            verdict += f", too few turns to tell: {len(took)}"
        lines.append([name, f"{1e6 * statistics.median(took) / per:.0f}", spread(took, found[base], digits), verdict])
    return columns(lines)
