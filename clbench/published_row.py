"""A number as a source states it: what a recipe says of a published result."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import Field, model_validator

from clbench.spec import Spec


class PublishedRow(Spec):
    """One number as a paper (or its authors' code) states it."""

    source: str = ""
    """Short name of where it stands, such as vandeven2018: rows of one source are reproduced and shown together."""
    metric: str
    """A name of `clbench list metrics`."""
    value: float
    """In the metric's own unit: fractions, not percent."""
    spread: float | None = Field(None, ge=0)
    spread_kind: Literal["std", "sem"] | None = None
    n: int | None = Field(None, gt=0)
    """Runs behind the value; None where the source does not say, which counts as one run."""
    where: str
    """Paper and table, or repository and file."""
    verified: Literal["V-repo", "V-text", "V-cite", "V-issue", "V-calc"]
    """How the number was read; an unverified one has no place here."""
    differs: str = ""
    """What differs between the source's protocol and ours; empty when nothing known does."""
    not_comparable: str = ""
    """The difference that decides, in words: both numbers are shown, and no verdict is passed."""
    margin: float | None = Field(None, gt=0)
    """How far apart two means may lie and still be the same, in the metric's unit; None leaves it to the rule of
    `clbench.report.published.margin_of`. Set before our runs are looked at."""
    margin_reason: str = ""
    finding: str = ""
    """Our explanation of a miss, printed beside the verdict."""

    @model_validator(mode="after")
    def _complete(self) -> PublishedRow:
        if not re.fullmatch(r"([a-z][a-z0-9_]*)?", self.source):
            raise ValueError("source is a short name in small letters, such as vandeven2018")
        if (self.spread is None) != (self.spread_kind is None):
            raise ValueError("spread and spread_kind go together")
        if self.spread is not None and (self.n or 0) < 2:
            raise ValueError("a spread needs n, the number of runs behind it, 2 or more")
        if (self.margin is None) != (not self.margin_reason):
            raise ValueError("margin and margin_reason go together")
        return self

    @property
    def std(self) -> float | None:
        """Standard deviation over the source's runs, a standard error times sqrt(n); None where none is stated."""
        if self.spread is None or self.n is None:
            return None
        return self.spread * math.sqrt(self.n) if self.spread_kind == "sem" else self.spread
