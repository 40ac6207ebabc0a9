"""What a report is asked to show, and under which names: the options of `clbench report`, and the file of `--style`.

A style file is TOML; every key may be left out. Order and names change what a reader sees, never a number, and a file
selects nothing: tasks and baselines that it does not name follow those that it does.

    title = "Growing and sharing"              # of the page
    tasks = ["split_mnist_task"]               # in this order; others follow
    families = ["sharing", "bounds"]
    baselines = ["ewc", "finetune"]            # within their family

    [task.split_mnist_task]
    title = "Split MNIST"

    [baseline.ewc]
    name = "EWC (ours)"
    colour = "#0173b2"
    marker = "s"                               # o s ^ D v P X < > p h * d
    line = "--"                                # - -- -. :
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from clbench import recipes
from clbench.errors import UserError, nearest
from clbench.report.provenance import STYLE
from clbench.report.select import FAMILIES, Block, Group, Selection, TaskBlocks, family_rank
from clbench.report.style import Look
from clbench.spec import Spec

Text = Annotated[str, Field(min_length=1)]


class TaskStyle(Spec):
    """How a task is shown."""

    title: Text | None = None


class BaselineStyle(Spec):
    """How a baseline is shown, in tables and in figures."""

    name: Text | None = None
    colour: Annotated[str, Field(pattern="^#[0-9a-fA-F]{6}$")] | None = None
    marker: Literal["o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d"] | None = None
    line: Literal["-", "--", "-.", ":"] | None = None


class Style(Spec):
    """A style file."""

    title: Text = "Continual-learning results"
    tasks: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    task: dict[str, TaskStyle] = Field(default_factory=dict)
    baseline: dict[str, BaselineStyle] = Field(default_factory=dict)


_OPTIONS = {"task": "tasks", "baseline": "baselines", "family": "families", "metric": "metrics"}
"""Option of `clbench report` -> field of `Choice`."""


@dataclass(frozen=True)
class Choice:
    """What to report; None is everything, or the usual."""

    tasks: Sequence[str] | None = None
    baselines: Sequence[str] | None = None
    families: Sequence[str] | None = None
    metrics: Sequence[str] | None = None
    style: Path | None = None

    @classmethod
    def of(cls, options: Mapping[str, Sequence[str]], folder: Path) -> Choice:
        """Return what `options` said, for the folder that the style file lies in."""
        given = {name: options.get(option) for option, name in _OPTIONS.items()}
        return cls(**given, style=folder / options["style"][0] if "style" in options else None)

    def options(self) -> dict[str, list[str]]:
        """Return the options of `clbench report` that say the same: the style file under the name of its copy."""
        named = {option: getattr(self, name) for option, name in _OPTIONS.items()}
        given = {option: list(names) for option, names in named.items() if names is not None}
        return given if self.style is None else {**given, "style": [STYLE]}


ALL = Choice()


def load(path: Path | None, selection: Selection) -> Style:
    """Return a style file, or the usual style for None.

    Args:
        path: of the file.
        selection: what its names are checked against, together with the shipped recipes.

    Raises:
        UserError: the file cannot be read, has a key or value it must not have, or a name nobody knows; a line each.
    """
    if path is None:
        return Style()
    style = recipes.load_file(Style, path)
    known = {
        "tasks": {*selection.task_names, *recipes.names("task")},
        "families": {*selection.families, *FAMILIES},
        "baselines": {*selection.labels, *recipes.names("baseline")},
    }
    given: list[tuple[str, str, str]] = [
        *(("tasks", "tasks", name) for name in style.tasks),
        *(("families", "families", name) for name in style.families),
        *(("baselines", "baselines", name) for name in style.baselines),
        *(("tasks", f"task.{name}", name) for name in style.task),
        *(("baselines", f"baseline.{name}", name) for name in style.baseline),
    ]
    one = {"tasks": "task", "families": "family", "baselines": "baseline"}
    lines = [
        f"{path}: '{key}': no {one[kind]} '{name}'.{nearest(name, known[kind])}"
        for kind, key, name in given
        if name not in known[kind]
    ]
    shown: dict[str, str] = {}
    for label in sorted({*selection.labels, *style.baseline}):
        name = _name(style, label)
        if name in shown:
            lines.append(f"{path}: 'baseline': {shown[name]} and {label} are both called '{name}'")
        shown[name] = label
    if lines:
        raise UserError(*lines)
    return style


def styled(selection: Selection, style: Style) -> Selection:
    """Return a selection in the order and under the names of a style."""
    order = _order(style.tasks, [task.name for task in selection.tasks])
    tasks = sorted(selection.tasks, key=lambda task: order[task.name])
    return replace(selection, tasks=tuple(_task(task, style) for task in tasks))


def restyled(looks: Mapping[str, Look], groups: Iterable[Group], style: Style) -> dict[str, Look]:
    """Return the look of every group by the label it is shown under.

    Args:
        looks: by recorded label, as `style.looks` gives them: a new name moves no colour.
        groups: to be shown.
        style: names and what it says of looks.
    """
    found = {}
    for group in groups:
        own = style.baseline.get(group.baseline.label, BaselineStyle())
        given = {"colour": own.colour, "marker": own.marker, "line": own.line}
        found[group.label] = replace(looks[group.key], **{key: value for key, value in given.items() if value})
    return found


def _task(task: TaskBlocks, style: Style) -> TaskBlocks:
    own = style.task.get(task.name, TaskStyle())
    return replace(task, blocks=tuple(_block(block, style, own.title) for block in task.blocks))


def _block(block: Block, style: Style, title: str | None) -> Block:
    families = _order(style.families, sorted({group.baseline.family for group in block.groups}, key=family_rank))
    labels = _order(style.baselines, [group.baseline.label for group in block.groups])
    groups = sorted(block.groups, key=lambda group: (families[group.baseline.family], labels[group.baseline.label]))
    named = []
    for group in groups:
        label = _name(style, group.baseline.label) + group.label.removeprefix(group.baseline.label)
        named.append(replace(group, label=label, recorded=group.label))
    info = block.task if title is None else block.task.model_copy(update={"title": title})
    return replace(block, task=info, groups=tuple(named))


def _name(style: Style, label: str) -> str:
    return style.baseline.get(label, BaselineStyle()).name or label


def _order(first: Sequence[str], usual: Sequence[str]) -> dict[str, int]:
    """Return the place of each name: those of the style, then the others as they are."""
    return {name: i for i, name in enumerate(dict.fromkeys([*first, *usual]))}
