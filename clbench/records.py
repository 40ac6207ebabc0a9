"""The record of one run: what was run, where, what it learned, and what it cost.

One JSON file a run. It is written to a temporary file beside its final place and renamed, so a reader never sees half a
record. Keys come in a fixed order; everything that changes between two identical runs (times of day, seconds, memory
peaks) sits under `timing` and `peaks`, so the rest can be compared byte for byte.

This module needs neither torch nor avalanche: reports are built from records alone.

Letters: T tasks.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator

from clbench.errors import UserError
from clbench.record_checks import problem_of
from clbench.record_parts import Flops, Imported, Part, Within, nan_to_null, null_to_nan

SCHEMA = 1

Status = Literal["done", "failed", "interrupted"]

_LATER = ("auroc", "auroc_init", "inferred", "widths", "units", "sharing", "generation", "imported", "flops", "within")
"""Keys that older files of this schema do not have."""


class TaskInfo(Part):
    """The protocol a run followed: `hash` covers everything that changes numbers."""

    name: str
    version: int
    hash: str
    title: str
    scenario: Literal["task", "domain", "class"]
    n_tasks: int
    train: dict[str, Any]
    """The training budget of the protocol (before a baseline's own changes)."""


class BaselineInfo(Part):
    """The method: `label` is the name in tables, `<name>` or `<name>@<hash>` for a run with overridden settings."""

    name: str
    label: str
    hash: str
    family: str
    strategy: str
    paper: str
    settings: dict[str, Any]
    """The strategy's resolved settings."""
    departures: dict[str, Any] = Field(default_factory=dict)
    """Where the baseline's training budget or model differs from the protocol's, as dotted keys: starred in tables."""
    origin: str = ""
    """Where the settings come from: "paper", "authors' code" or "ours: ..."."""


class Code(Part):
    """Which clbench ran. `commit` is None outside a checkout."""

    version: str
    commit: str | None
    dirty: bool | None


class Environment(Part):
    """Where it ran. Records of different `device` are never averaged together."""

    device: Literal["cpu", "cuda", "unknown"]
    """unknown: of results that another tool made."""
    device_name: str
    threads: int | None
    python: str
    torch: str
    cuda: str | None
    avalanche: str
    platform: str


class Footprint(Part):
    """What a strategy keeps after a task. Elements for parameters, bytes for everything else; each storage once."""

    parameters: int
    """Elements the model stores."""
    parameters_trainable: int
    parameters_shared: int
    """Elements every task uses."""
    parameters_per_task: int
    """Elements that belong to one task alone, summed over the tasks seen."""
    parameters_nonzero: int
    parameter_bytes: int
    buffer_bytes: int
    optimizer_bytes: int
    auxiliary_bytes: dict[str, int]
    """State of the method by name: Fisher, anchors, masks, embeddings, an old network."""
    replay_samples: int
    replay_bytes: int
    answer_bytes: int
    """Bytes needed to answer for all tasks seen."""
    keep_learning_bytes: int
    """Bytes needed to go on learning: the tensors of a checkpoint."""


class Peak(Part):
    """The highest memory of one phase above the level before it, bytes. Unknown is None, never 0."""

    allocated_bytes: int | None
    """CUDA: max_memory_allocated. CPU: the allocator's own peak."""
    reserved_bytes: int | None
    """CUDA only: max_memory_reserved."""
    resident_bytes: int | None
    """Resident set of the process, host memory."""
    meter: str
    """What measured `allocated_bytes`: "cuda", "allocator", "profiler" or "none"."""


class Timing(Part):
    """Wall-clock seconds per task and phase, and how fast training ran."""

    started: str
    """UTC, ISO 8601; empty where nobody knows."""
    seconds: list[dict[str, float]]
    """One entry a task: phase -> seconds."""
    total_seconds: float | None
    train_samples_per_second: float | None


GrowthKind = Literal["added", "pruned", "split", "reused"]


class GrowthEvent(Part):
    """One change of a network's size, or one use of units that were there already."""

    after_task: int
    """Index, from 0, of the task during which it happened."""
    layer: str
    kind: GrowthKind
    """added: new units. pruned: units taken out. split: units copied, the old ones kept for earlier tasks.
    reused: units born for an earlier task that this one builds on."""
    units: int
    born: int | None = None
    """reused: index of the task during which these units were born."""


class TaskShare(Part):
    """What one task uses when it answers. Elements are those of parameters."""

    task: int
    """Its label; its number where all tasks have one label."""
    parameters: int
    marginal_parameters: int
    """Used by no task learned before it."""
    marginal_bytes: int
    """Likewise, masks and buffers included."""


class TensorUse(Part):
    """A row of the sharing map: a parameter, or all parameters that one task alone uses, wholly."""

    name: str
    elements: int
    tensors: int = 1
    """How many parameters the row stands for."""
    layers: list[str]
    """The layers it serves, one entry an application; empty for the one it is stored in."""
    shares: list[float]
    """(T,): share of it that each task uses, in the order of `Sharing.tasks`; six decimals."""


class Sharing(Part):
    """What tasks share, each element of memory once; `clbench.sharing` defines every number."""

    parameters_used: int
    unused: int
    """Elements stored that no task uses."""
    shared_by_all: int
    """Elements every task uses, of two or more."""
    shared_by_some: int
    private: int
    """Elements one task alone uses."""
    shared_by_all_bytes: int
    shared_by_some_bytes: int
    private_bytes: int
    reuse_ratio: float
    """Elements used, over tasks and applications, by elements stored and in use."""
    in_common: float | None
    """In [0, 1]: of what a task uses, the share of the other tasks that use it too; None for one task."""
    tasks: list[TaskShare]
    """In the order they were learned."""
    map: list[TensorUse]


class Generation(Part):
    """What generates a net's weights, and how much of it is generated. Heads are on neither side."""

    target_parameters: int
    """Weights generated for each task: P."""
    generator_parameters: int
    """Elements of the generator, and of all that the tasks learned bring for it (their embeddings)."""
    compression: float
    """The second by the first."""
    sizes: dict[str, Any]
    """Of the generator, as it was built."""


class RunRecord(Part):
    """One run of one baseline on one task stream with one seed."""

    schema_number: int = SCHEMA
    status: Status
    task: TaskInfo
    baseline: BaselineInfo
    seed: int
    code: Code
    environment: Environment
    data: dict[str, str]
    """Fingerprint of every data set used."""
    acc: list[list[float]]
    """(rows so far, T): acc[i][j] = test accuracy on task j after training on task i, fractions in [0, 1]; of imported
    records NaN (null in the file) above the diagonal where nobody measured it."""
    acc_init: list[float]
    """(T,): test accuracy on every task before any training; the reference of forward transfer. Likewise."""
    auroc: list[list[float]] | None = None
    """(rows so far, T), shaped like `acc`: mean one-against-rest area under the ROC curve (`metrics.auroc`), in
    [0, 1]; None where the task's recipe does not ask for it."""
    auroc_init: list[float] | None = None
    """(T,), shaped like `acc_init`."""
    inferred: list[list[float]] | None = None
    """(rows so far, T), shaped like `acc`: accuracy where the task is not named but inferred among those learned, as
    the one whose answer has the lowest entropy; 0 on tasks not learned yet. None where the recipe does not ask."""
    single_task_parameters: int | None
    """Elements of the net that would serve the first task alone: the unit of "x one task's net"."""
    footprints: list[Footprint]
    """One a task."""
    growth: list[GrowthEvent] = Field(default_factory=list)
    """What grew, shrank and was used again, in order."""
    widths: list[dict[str, int]] = Field(default_factory=list)
    """One entry a task learned: layer -> units it has then. Empty for methods whose net keeps its size."""
    units: list[dict[str, list[tuple[int, int]]]] = Field(default_factory=list)
    """Entry t: layer -> half-open ranges of the units that serve task t, as of the last task learned."""
    sharing: Sharing | None = None
    """Of a finished run: which parameters serve which task, and what each task added."""
    generation: Generation | None = None
    """Of methods whose net's weights are generated, after the last task learned."""
    flops: list[Flops] = Field(default_factory=list)
    """One a task; empty where they were not counted."""
    within: list[Within] = Field(default_factory=list)
    """One a task; empty where the run was not asked to evaluate within tasks."""
    imported: Imported | None = None
    """Where another tool's result comes from; None for runs of this suite."""
    error: str | None = None
    """One line; set when status is "failed"."""
    traceback: str | None = None
    peaks: list[dict[str, Peak]]
    """One entry a task: phase (train, grow, consolidate, evaluate) -> peak."""
    timing: Timing

    _read = field_validator("acc", "acc_init", mode="before")(null_to_nan)

    @property
    def matrix(self) -> NDArray[np.float64]:
        """`acc` as a (T, T) array; ValueError unless the run is done."""
        if self.status != "done":
            raise ValueError(f"{self.baseline.label} seed {self.seed} is {self.status}: it has no full accuracy matrix")
        return np.asarray(self.acc, dtype=np.float64)

    def path(self, runs: Path) -> Path:
        """Return where this record lives under the folder `runs`."""
        return record_path(runs, self.task.name, self.baseline.label, self.seed, self.environment.device)

    def dumps(self) -> str:
        """Return the record as JSON text with a fixed order of keys. Raises ValueError on NaN or infinity.

        Keys that came after the first records are left out where they are empty: a file from before them is still, byte
        for byte, what this writes.
        """
        empty = {name for name in _LATER if not getattr(self, name)}
        content = self.model_dump(mode="json", exclude=empty)
        if self.imported is not None:
            content |= {name: nan_to_null(content[name]) for name in ("acc", "acc_init")}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def save(self, runs: Path) -> Path:
        """Write the record under `runs`, atomically; return its path.

        A finished run of another recipe or other settings that has this place is never overwritten: it moves to the
        folder `superseded` beside it, which no report reads.
        """
        path = self.path(runs)
        text = self.dumps()
        with contextlib.suppress(UserError):
            old = load(path)
            if old.status == "done" and (old.task.hash, old.baseline.hash) != (self.task.hash, self.baseline.hash):
                aside = path.parent / "superseded" / f"{path.stem}-{old.task.hash[:6]}-{old.baseline.hash[:6]}.json"
                aside.parent.mkdir(exist_ok=True)
                os.replace(path, aside)
        write_atomic(path, text)
        return path


def _umask() -> int:
    """Return the process's umask; reading it means setting it, so it is read once, at import."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


_UMASK = _umask()


def record_path(runs: Path, task: str, label: str, seed: int, device: str) -> Path:
    """Return `runs/<task>/<label>/seed<k>-<device>.json`."""
    return runs / task / label / f"seed{seed}-{device}.json"


def write_atomic(path: Path, text: str | bytes) -> None:
    """Write `text` to `path` so that a reader, or a crash, finds the old file or the new one and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private; a result is as readable as any other file of its owner.
        os.chmod(temporary, 0o666 & ~_UMASK)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path) -> RunRecord:
    """Read one record.

    Raises:
        UserError: the file is damaged, of another schema, or not a record; the line names the file and the key.
    """
    try:
        raw = json.loads(path.read_bytes(), parse_constant=_no_number)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged record ({_first_line(error)})") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: damaged record (not a JSON object)")
    if raw.get("schema_number") != SCHEMA:
        raise UserError(f"{path}: schema_number is {raw.get('schema_number')!r}, this clbench reads {SCHEMA}")
    try:
        record = RunRecord.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: damaged record ({where}: {first['msg']})") from None
    problem = problem_of(record)
    if problem:
        raise UserError(f"{path}: damaged record ({problem})")
    return record


def _no_number(word: str) -> None:
    """Refuse what Python's reader takes and JSON has not: no record is written with it."""
    raise ValueError(f"{word} is no number")


def load_all(runs: Path) -> tuple[list[RunRecord], list[str]]:
    """Read every record under `runs`, in order of path.

    Returns:
        The readable records, and one line for each file that is damaged; a damaged one never hides the rest.
    """
    records: list[RunRecord] = []
    problems: list[str] = []
    for path in _record_files(runs):
        try:
            record = load(path)
        except UserError as error:
            problems.extend(error.lines)
            continue
        if record.path(runs) == path:
            records.append(record)
        else:
            problems.append(f"{path}: left out, it says it is {record.path(runs)}: a copy?")
    return records, problems


def _record_files(runs: Path) -> Iterator[Path]:
    return iter(sorted(runs.glob("*/*/seed*.json")))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
