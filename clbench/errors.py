"""Mistakes of a user, told in one line each.

A `UserError` is something the person at the keyboard can mend: a misspelt name, a value out of range, a file that is
missing or damaged. The command prints its lines to stderr and exits with 2, without a traceback. Everything else is a
bug (ours, or in a user's strategy) and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """One or more mistakes, one line each, each naming what is wrong and the nearest right answer."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines: tuple[str, ...] = lines


def nearest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known word, or "" when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """Return the line for a name that does not exist: what it is, the nearest right one, and all of them."""
    names = sorted(known)
    return f"unknown {kind} '{word}'.{nearest(word, names)} Known: {', '.join(names) or 'none'}"
