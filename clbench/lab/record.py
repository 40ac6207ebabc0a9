"""What `clbench lab growth` measured, as JSON, and the limits it is held against.

Every figure carries how often it was measured, the least and the median. Bytes are integers, times are seconds. Unknown
is null, never 0. W stands for the bytes of the weight that grows. Needs no torch: the report reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from clbench.errors import UserError
from clbench.records import Code, Environment, write_atomic

SCHEMA = 1

METHODS = {
    "cat": "cat",
    "resize": "clone + resize_",
    "storage_resize": "storage.resize_ + row move",
    "strided": "strided view of a buffer",
    "helpers": "helper layers",
    "delta": "frozen base + delta",
    "delta_fold": "delta, then folded",
    "in_place": "in place, reserved",
}
"""Ways to grow a weight, in the order of tables, with their names there."""

STEP_METHODS = {
    "dense": "ordinary layer",
    "control": "ordinary layer again",
    "in_place": "grown in place",
    "strided": "strided view of a buffer",
    "helpers": "helper layers",
    "mask": "ordinary layer, gradient mask",
    "delta": "frozen base + delta",
}
"""What a training step is timed with. cat, resize_ and storage.resize_ leave an ordinary layer."""

FROZEN_METHODS = {
    "trained": "all trained",
    "mask": "gradient mask",
    "delta": "frozen base + delta",
}

Layer = Literal["linear", "conv"]
Side = Literal["fan-out", "fan-in"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(_Part):
    """One quantity, measured n times."""

    n: int
    min: float
    median: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Figure | None:
        """Return the figure of the known values; None when one of them is unknown, or there is none."""
        found = list(values)
        known = [value for value in found if value is not None]
        if not known or len(known) < len(found):
            return None
        return cls(n=len(known), min=min(known), median=median(known))


class GrowthPeak(_Part):
    """Peak memory of one growth above the level before it, bytes; each measured in a process of its own."""

    method: str
    layer: Layer
    side: Side
    adam: bool
    """Whether Adam's two moments grew with the weight."""
    growth: int
    """Which growth of the weight's life: the first, or a later one."""
    shape: tuple[int, ...]
    """Of the weight before."""
    weight_bytes: int
    new_bytes: int
    """Of the new rows or columns of the weight; with Adam, of its moments' as well."""
    allocated: Figure | None
    """The allocator's own peak. On the CPU it does not see reserved address space."""
    resident: Figure | None
    """Peak of the resident set, host memory."""
    reserved: Figure | None
    """CUDA: highest reserve of the allocator, absolute."""

    @property
    def peak(self) -> float | None:
        """The worse of the two witnesses, median; on CUDA the allocator's."""
        known = [figure.median for figure in (self.allocated, self.resident) if figure is not None]
        return max(known, default=None)


class GrowthTime(_Part):
    """Time of one growth, measured in turn with the others: CPU time, on a device the wall clock's."""

    method: str
    layer: Layer
    side: Side
    shape: tuple[int, ...]
    seconds: Figure


class StepTime(_Part):
    """Forward and backward through one layer that has grown so often, both sides each time, in turn with the others."""

    method: str
    layer: Layer
    batch: int
    growths: int
    shape: tuple[int, ...]
    """Of the weight after the growths."""
    seconds: Figure
    ratio: Figure
    """To the ordinary layer of the same shape, in the same round."""


class FrozenCost(_Part):
    """What a training step with Adam keeps and needs when the old part shall not learn, bytes."""

    method: str
    layer: Layer
    shape: tuple[int, ...]
    """Of the old part."""
    weight_bytes: int
    """Of the old part."""
    new_bytes: int
    """Of the parameters of the new part."""
    gradient_bytes: int
    state_bytes: int
    peak: Figure | None
    """Allocated in the first step, gradients and state included, above the level before it."""


class Drift(_Part):
    """How far weights moved that were to stay: L2 norm of the change by the norm before."""

    method: str
    optimizer: str
    steps_before: int
    steps_frozen: int
    drift: float


class GrowthRecord(_Part):
    """One whole measurement."""

    schema_number: int = SCHEMA
    command: str
    quick: bool
    """A small run: shows that the machinery works, its figures mean nothing."""
    started: str
    """UTC, ISO 8601."""
    seconds: float
    """Wall clock of all of it."""
    code: Code
    environment: Environment
    share: float
    """Of a side that one growth adds."""
    meter: str
    """What measured allocated bytes."""
    in_place: bool
    """Whether weights grow in place on this device, or by one copy."""
    peaks: list[GrowthPeak]
    times: list[GrowthTime]
    steps: list[StepTime]
    frozen: list[FrozenCost]
    drifts: list[Drift]

    def path(self, folder: Path) -> Path:
        """Return where this record lives in a folder; a quick one never takes a real one's place."""
        return folder / f"{'quick-' if self.quick else ''}growth-{self.environment.device}.json"

    def save(self, folder: Path) -> Path:
        """Write the record into a folder, atomically; return its path. Raises UserError where it cannot be written."""
        path = self.path(folder)
        try:
            write_atomic(path, json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
        return path


def load(path: Path) -> GrowthRecord:
    """Read one record. Raises UserError: damaged, or of another schema."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged record ({str(error).splitlines()[0]})") from None
    schema = raw.get("schema_number") if isinstance(raw, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: schema_number is {schema!r}, this clbench reads {SCHEMA}; run clbench lab growth")
    try:
        return GrowthRecord.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: damaged record ({where}: {first['msg']})") from None


def load_all(folder: Path) -> tuple[list[GrowthRecord], list[str]]:
    """Read the records of a folder, CPU first, without quick ones; with one line for each that is damaged."""
    records: list[GrowthRecord] = []
    problems: list[str] = []
    for path in sorted(folder.glob("growth-*.json")):
        try:
            records.append(load(path))
        except UserError as error:
            problems += error.lines
    return records, problems


# -------------------------------------------------------------------------------------------------------------- limits

JUDGED_WEIGHT = 256 * 10**6
"""Bytes: below it, the resident set is too coarse to judge by."""
PEAK_FACTOR, PEAK_SLACK = 1.2, 16 * 10**6
"""A growth may need this much of its new part, and so many bytes."""
ADAM_LIMIT = 0.12
"""W: a growth of weight and Adam's two moments by 3 %, which adds 0.09 W."""
STEP_LIMIT = 1.02
"""A step of a grown layer, to an ordinary one's."""
ADAM_TENSORS = 3
"""A gradient and two moments for each parameter that learns; the rest of Adam's state is a number a parameter."""
ADAM_SLACK = 64
"""Bytes for those numbers."""


class Verdict(_Part):
    """One limit and what was measured."""

    what: str
    measured: str
    limit: str
    holds: bool | None
    """None: not judged."""

    @property
    def words(self) -> str:
        """yes, no, or not judged."""
        return {True: "yes", False: "NO", None: "not judged"}[self.holds]


def verdicts(record: GrowthRecord) -> list[Verdict]:
    """Return every limit with what was measured, and whether it holds; nothing of a quick run is judged."""
    found = [_peak_verdict(peak) for peak in record.peaks if peak.method == "in_place"]
    found += _step_verdicts(record.steps)
    for cost in record.frozen:
        if cost.method == "delta":
            kept, limit = cost.gradient_bytes + cost.state_bytes, ADAM_TENSORS * cost.new_bytes + ADAM_SLACK
            what = f"frozen base + delta, {cost.layer}: gradients and Adam's state are the delta's alone"
            found.append(_verdict(what, f"{kept:,} B", f"{limit:,} B", kept <= limit))
    still = [drift for drift in record.drifts if drift.method == "delta"]
    if still:
        worst = max(drift.drift for drift in still)
        names = "; ".join(drift.optimizer for drift in still)
        found.append(_verdict(f"frozen base stays bit for bit ({names})", f"{worst:g}", "0", worst == 0))
    return [verdict.model_copy(update={"holds": None}) for verdict in found] if record.quick else found


def _peak_verdict(peak: GrowthPeak) -> Verdict:
    weight, worst = peak.weight_bytes, peak.peak
    if peak.adam:
        limit, text = ADAM_LIMIT * weight, f"{ADAM_LIMIT:g} W"
    else:
        limit = PEAK_FACTOR * peak.new_bytes + PEAK_SLACK
        text = f"{limit / weight:.3f} W = {PEAK_FACTOR:g} x new + {PEAK_SLACK // 10**6} MB"
    state = f" with Adam's state, {'first' if peak.growth == 1 else 'later'} growth" if peak.adam else ""
    what = f"peak of growing in place, {peak.layer} {peak.side}{state}"
    if worst is None:
        return _verdict(what, "unknown", text, None)
    return _verdict(what, f"{worst / weight:.3f} W", text, worst <= limit if weight >= JUDGED_WEIGHT else None)


def _step_verdicts(steps: Sequence[StepTime]) -> list[Verdict]:
    found = []
    for layer in ("linear", "conv"):
        ours, control = (
            [step.ratio.median for step in steps if step.layer == layer and step.method == method]
            for method in ("in_place", "control")
        )
        if ours:
            what = f"step of a layer grown in place, {layer}, worst of {len(ours)} cases"
            worst, noise = max(ours), max(control, default=1.0)
            # Where an ordinary layer exceeds the limit against another, the machine was too restless to tell.
            holds = True if worst <= STEP_LIMIT else False if noise <= STEP_LIMIT else None
            found.append(_verdict(what, f"{worst:.3f} (ordinary again: {noise:.3f})", f"{STEP_LIMIT:g}", holds))
    return found


def _verdict(what: str, measured: str, limit: str, holds: bool | None) -> Verdict:
    return Verdict(what=what, measured=measured, limit=limit, holds=holds)
