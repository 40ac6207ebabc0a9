"""Where the spread over seeds comes from: what a run begins with, the order of data, what the tasks are made of.

Design     one source of chance at a time. For each source, runs of several seeds with the two others pinned
           (`clbench run --set seeds.order=0 --set seeds.classes=0`: only the initialisation differs), and runs with
           none pinned.
Estimate   the sample variance of each set of runs, s^2. Of a set with two sources pinned it is the variance that the
           third one makes at what the others are pinned to: its own effect, and what it does together with them there.
Rest       the whole less the three. In parts that do not overlap, V = sum V_i + sum V_ij + V_123; mean over pins, the
           set of source i has V_i, its two V_ij and V_123. The three sum to V + sum V_ij + 2 V_123: where effects add
           up, the rest is 0; where sources act together, it is below 0 by that much, since each of their sets has it.
           What else it is, and all that lies above 0, is the choice of pins and the error of four estimates.
Interval   of a deviation, 95 %, by the chi-squared distribution: for normal values. A deviation of few seeds is known
           badly (5 seeds: from 0.60 to 2.87 times), so that sources whose intervals overlap are not told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clbench.errors import UserError
from clbench.recipes import names
from clbench.records import RunRecord
from clbench.report.measures import EMPTY, MEASURES, Measure, amount, unknown_measure
from clbench.report.select import Block, Group, select
from clbench.report.stats import Estimate, deviation_interval
from clbench.report.tables import SCENARIOS, seeds
from clbench.report.writers import Section, TextTable
from clbench.seeds import SOURCES, Source

WORDS: dict[Source | None, str] = {
    None: "all sources",
    "init": "initialisation",
    "order": "order of data",
    "classes": "order of classes",
}
"""classes: permutations or angles where the tasks are made of those."""


@dataclass(frozen=True)
class Component:
    """The runs in which one source of chance differs, or all of them (None)."""

    source: Source | None
    runs: tuple[RunRecord, ...]
    value: Estimate


@dataclass(frozen=True)
class Components:
    """A metric's variance by source, of one baseline on one task, version and device."""

    block: Block
    label: str
    measure: Measure
    pin: int
    """The seed that sources are pinned to."""
    found: tuple[Component, ...]
    """All sources first."""

    @property
    def rest(self) -> float:
        """The whole variance less the sum of the sources': below 0 where they act together, see above."""
        whole, *others = (component.value.std or 0.0 for component in self.found)
        return whole**2 - sum(std**2 for std in others)


def components(runs: Path, baseline: str, task: str, metric: str = "average_accuracy") -> Components:
    """Return a metric's variance by source.

    Args:
        runs: folder of records.
        baseline: by name; its settings but for seeds are those of its recipe.
        task: by name.
        metric: a key of `MEASURES`.

    Raises:
        UserError: an unknown name, or a set of runs that is not there: the commands that make what is missing.
    """
    if metric not in MEASURES:
        raise UserError(unknown_measure(metric))
    baseline, task = (Path(name).stem if name.endswith(".toml") else name for name in (baseline, task))
    selection = select(runs, [task], [baseline])
    best: list[str] = []
    for block in selection.tasks[0].blocks:
        # All sets at one pin: what a source does depends on what the others are.
        for pin in sorted({0, *(seed for group in block.groups for seed in _pins(group).values())}):
            sets = {kind: _chosen(block, baseline, kind, pin) for kind in (None, *SOURCES)}
            missing = [_command(task, baseline, kind, pin) for kind, group in sets.items() if group is None]
            if not missing:
                found = [_component(kind, group, MEASURES[metric]) for kind, group in sets.items() if group is not None]
                return Components(block, baseline, MEASURES[metric], pin, tuple(found))
            best = missing if not best or len(missing) < len(best) else best
    raise UserError(f"'{baseline}' on {task}: to tell sources of chance apart, also run:", *best)


def _pins(group: Group) -> dict[str, int]:
    given = group.baseline.departures
    return {name.removeprefix("seeds."): seed for name, seed in given.items() if name.startswith("seeds.")}


def _chosen(block: Block, baseline: str, kind: Source | None, pin: int) -> Group | None:
    """Return the largest group of two or more runs in which just this source differs, and nothing else is changed."""
    pins = {} if kind is None else {source: pin for source in SOURCES if source != kind}
    own = [group for group in block.groups if not group.imported]
    plain = next((group for group in own if group.baseline.label == baseline), None)
    if plain is None:
        return None
    mine = [
        group
        for group in own
        if group.baseline.name == baseline
        and group.baseline.settings == plain.baseline.settings
        and _pins(group) == pins
        and _own_departures(group) == _own_departures(plain)
        and len(group.runs) > 1
    ]
    return max(mine, key=lambda group: len(group.runs), default=None)


def _own_departures(group: Group) -> dict[str, object]:
    return {name: value for name, value in group.baseline.departures.items() if not name.startswith("seeds.")}


def _component(kind: Source | None, group: Group, measure: Measure) -> Component:
    value = measure.over(group.runs)
    if value is None or value.n < 2:
        raise UserError(f"{group.label}: fewer than two runs have {measure.name}")
    return Component(kind, group.runs, value)


def _command(task: str, baseline: str, kind: Source | None, pin: int) -> str:
    """Return the command that makes the runs in which one source differs."""
    name = baseline if baseline in names("baseline") else f"./{baseline}.toml"
    pins = "" if kind is None else "".join(f" --set seeds.{source}={pin}" for source in SOURCES if source != kind)
    return f"clbench run --task {task} --baseline {name}{pins} --seeds 10"


# -------------------------------------------------------------------------------------------------------------- as text


def table(found: Components) -> TextTable:
    """Return one row a source."""
    unit, whole = found.measure.unit, (found.found[0].value.std or 0.0) ** 2
    rows = []
    for component in found.found:
        value = component.value
        assert value.std is not None
        low, high = deviation_interval(value.std, value.n)
        ends = f"{_size(value.std, unit)} [{_size(low, unit)}, {_size(high, unit)}]"
        row = (WORDS[component.source], str(value.n), amount(value.mean, unit), ends, _share(value.std**2, whole))
        rows.append(row)
    rows.append(("the whole less the three", EMPTY, EMPTY, EMPTY, _share(found.rest, whole)))
    info = found.block.task
    return TextTable(
        label=f"{found.block.stem}-variance-{found.label}",
        title=f"{info.title} ({info.name}): {found.measure.label} of {found.label} by source of chance, on "
        f"{found.block.where}",
        caption=tuple(_caption(found)),
        header=("What differs", "n", f"Mean {found.measure.label}", "Deviation [95 %]", "Variance (%)"),
        sections=(Section("", tuple(rows)),),
    )


def _size(value: float, unit: str) -> str:
    return f"{100 * value:.2f}" if unit in ("fraction", "area") else f"{value:.4g}"


def _share(variance: float, whole: float) -> str:
    return EMPTY if whole == 0 else f"{100 * variance / whole:.0f}"


def _caption(found: Components) -> Sequence[str]:
    info = found.block.task
    return (
        f"{info.title} ({info.name}), {SCENARIOS[info.scenario]}, {info.n_tasks} tasks: {found.label}.",
        f"Sample standard deviation over runs in which one source differs, the others pinned to seed {found.pin}.",
        "[95 %]: chi-squared interval, for normal values. Variance: share of that over runs with none pinned.",
        "The whole less the three: 0 where effects add up; on average below 0 by what sources do together, which each "
        "of their rows has; the rest of it is the choice of pins and the error of the estimates.",
        f"Seeds {'; '.join(f'{WORDS[one.source]}: {seeds(one.runs)}' for one in found.found)}.",
        f"{found.measure.definition}.",
        f"Device: {found.block.where}.",
    )
