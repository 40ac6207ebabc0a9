"""From a recipe's words to a strategy: find the class, check its settings, make it.

A class is named `module:Class`, or `file.py:Class` beside its recipe. The suite's own declare their settings in a
`Config` dataclass; for any other class the arguments of its constructor are the schema, up its bases as far as they
pass `**kwargs` on.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from avalanche.training.templates.base_sgd import BaseSGDTemplate
from pydantic import TypeAdapter, ValidationError

from clbench.errors import UserError, nearest
from clbench.imports import load_object
from clbench.recipes import Experiment
from clbench.specs import BaselineSpec, Scenario
from clbench.strategies.base import Setup, Strategy
from clbench.strategies.foreign import Foreign

_TYPE_TAG = re.compile(r"(int|float|str|bool|none|(list|dict|tuple|literal)\[.*\])")
"""What pydantic puts into the place of a mistake in a union: the member that it tried."""

_GIVEN_BY_THE_SUITE = {
    "self",
    "model",
    "optimizer",
    "criterion",
    "train_mb_size",
    "train_epochs",
    "eval_mb_size",
    "device",
    "plugins",
    "evaluator",
    "eval_every",
    "peval_mode",
}


def find_class(baseline: BaselineSpec) -> type:
    """Return the class a recipe names. Raises UserError when it is not there, or is no strategy."""
    where = f"baseline '{baseline.name}': strategy"
    found = load_object(baseline.strategy, baseline.folder, where)
    if not isinstance(found, type):
        raise UserError(f"{where} '{baseline.strategy}' is no class")
    if not issubclass(found, BaseSGDTemplate):
        raise UserError(
            f"{where} '{baseline.strategy}' is no strategy: derive it from clbench.strategies.base:Strategy, or from "
            "Avalanche's SupervisedTemplate"
        )
    if issubclass(found, Strategy) and found.accuracy is not Strategy.accuracy:
        raise UserError(f"{where} '{baseline.strategy}' overrides accuracy, which nothing asks: override evaluate")
    return found


def scenarios(baseline: BaselineSpec) -> frozenset[Scenario]:
    """Return where a baseline is defined: where its recipe and its class say so."""
    return _works_in(baseline, find_class(baseline))


def _works_in(baseline: BaselineSpec, cls: type) -> frozenset[Scenario]:
    told = frozenset(baseline.scenarios)
    return told & cls.scenarios if issubclass(cls, Strategy) else told


def check(experiment: Experiment) -> None:
    """Check that the strategy exists, takes its settings and is defined in the task's scenario; raises UserError."""
    _checked(experiment)


def _checked(experiment: Experiment) -> tuple[type, Any]:
    """Return class and validated settings; the class is looked up once, because a user's file runs every time."""
    cls = find_class(experiment.baseline)
    settings = _settings(cls, experiment)
    scenario = experiment.task.stream.scenario
    _recordable(experiment, settings)
    works_in = _works_in(experiment.baseline, cls)
    if scenario not in works_in:
        raise UserError(
            f"baseline '{experiment.baseline.name}' is not defined in the {scenario}-incremental scenario of task "
            f"'{experiment.task.name}'; it is in: {', '.join(sorted(works_in))}"
        )
    kind = experiment.model.kind
    if issubclass(cls, Strategy) and cls.model_kinds is not None and kind not in cls.model_kinds and kind != "own":
        raise UserError(
            f"baseline '{experiment.baseline.name}' takes apart nets that are a chain of layers; the {kind} of task "
            f"'{experiment.task.name}' is none; --set model.kind=NET can name one: {', '.join(sorted(cls.model_kinds))}"
        )
    return cls, settings


def _recordable(experiment: Experiment, settings: Any) -> None:
    """Refuse settings that a record cannot hold, before anything runs: what a setting was must be written down."""
    try:
        json.dumps(settings if isinstance(settings, dict) else dataclasses.asdict(settings), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"baseline '{experiment.baseline.name}': a setting is no plain number, text, list or table ({error})"
        ) from None


def build(experiment: Experiment, setup: Setup) -> Strategy | Foreign:
    """Make the strategy of an experiment. Raises UserError as `check` does."""
    cls, settings = _checked(experiment)
    if issubclass(cls, Strategy):
        return cls(setup=setup, config=settings)
    return Foreign(cls, settings, setup, experiment.task.stream.scenario)


def resolved_settings(experiment: Experiment) -> dict[str, Any]:
    """Return every setting with its value, defaults filled in, as plain values for the record."""
    cls = find_class(experiment.baseline)
    settings = _settings(cls, experiment)
    if not isinstance(settings, dict):
        return dataclasses.asdict(settings)
    defaults = {name: parameter.default for name, parameter in foreign_parameters(cls).items()}
    return {name: value for name, value in {**defaults, **settings}.items() if name in settings or _is_toml(value)}


# ------------------------------------------------------------------------------------------------------------- settings


def _settings(cls: type, experiment: Experiment) -> Any:
    """Return the validated `Config` of an own strategy, or the validated arguments of a foreign one."""
    where = f"baseline '{experiment.baseline.name}' on task '{experiment.task.name}'"
    given = experiment.settings
    if issubclass(cls, Strategy):
        fields = {field.name: field for field in dataclasses.fields(cls.Config)}
        required = [
            name
            for name, field in fields.items()
            if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        ]
        _names(where, cls, given, fields, required)
        return _validated(where, TypeAdapter(cls.Config), dict(given))
    parameters = foreign_parameters(cls)
    required = [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty]
    _names(where, cls, given, parameters, required)
    checked = {}
    for name, value in given.items():
        checked[name] = value
        hint = parameters[name].annotation
        if hint is not inspect.Parameter.empty and _is_plain(hint):
            checked[name] = _validated(where, TypeAdapter(hint), value, (name,))
    return checked


def _names(where: str, cls: type, given: Mapping[str, Any], known: Mapping[str, Any], required: list[str]) -> None:
    """Raise UserError listing every unknown and every missing setting."""
    lines = [
        f"{where}: {cls.__name__} has no setting '{name}'.{nearest(name, known)} "
        f"It has: {', '.join(sorted(known)) or 'none'}"
        for name in given
        if name not in known
    ]
    lines += [f"{where}: {cls.__name__} needs the setting '{name}'" for name in required if name not in given]
    lines += [
        f"{where}: setting '{name}': must be finite (got {value!r})"
        for name, value in given.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if lines:
        raise UserError(*lines)


def _validated(where: str, adapter: TypeAdapter[Any], value: Any, prefix: tuple[str, ...] = ()) -> Any:
    try:
        # From JSON pydantic is strict about types and still makes a dataclass of a table.
        return adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        messages: dict[str, list[str]] = {}
        given: dict[str, Any] = {}
        for item in error.errors():
            name = ".".join(part for part in map(str, (*prefix, *item["loc"])) if not _TYPE_TAG.fullmatch(part))
            messages.setdefault(name, []).append(item["msg"][0].lower() + item["msg"][1:])
            given[name] = item["input"]
        # Each member of a union finds a mistake of its own: the one deepest inside is meant.
        raise UserError(
            *(
                f"{where}: setting '{name}': {', or '.join(dict.fromkeys(found))} (got {given[name]!r})"
                for name, found in messages.items()
                if not any(other.startswith(f"{name}.") for other in messages)
            )
        ) from None


def foreign_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return the settings of a class the suite does not know: its constructor's own arguments, and its bases'."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        constructor = inspect.unwrap(base.__init__)  # type: ignore[misc]  # read for its signature, never called
        try:
            hints = get_type_hints(constructor)
        except (NameError, TypeError):
            hints = {}
        signature = inspect.signature(constructor)
        for name, parameter in signature.parameters.items():
            if name in _GIVEN_BY_THE_SUITE or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            found.setdefault(name, parameter.replace(annotation=hints.get(name, parameter.annotation)))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
            break
    return found


def _is_plain(hint: Any) -> bool:
    """Whether values of this type can be written in TOML."""
    return hint in (int, float, str, bool, type(None)) or (bool(get_args(hint)) and all(map(_is_plain, get_args(hint))))


def _is_toml(value: Any) -> bool:
    """Whether TOML can say this value."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_toml, value))
    return isinstance(value, (bool, int, float, str))
