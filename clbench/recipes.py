"""Recipes: TOML files to `TaskSpec` and `BaselineSpec`, and the two joined into one `Experiment`.

A name ("ewc") is looked up among the shipped recipes; a path ("./mine.toml") is read as it is. Every mistake in a file
is reported at once, one line each: file, key, what is wrong, the nearest right answer.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from clbench.errors import UserError, nearest, unknown
from clbench.published_row import PublishedRow
from clbench.seeds import SOURCES
from clbench.spec import Spec, content_hash
from clbench.specs import BaselineSpec, ModelSpec, OnTask, TaskSpec, TrainSpec

_S = TypeVar("_S", bound=Spec)
_M = TypeVar("_M", bound=BaseModel)

Kind = Literal["task", "baseline"]
FOLDERS: dict[Kind, str] = {"task": "tasks", "baseline": "baselines"}


def shipped(kind: Kind) -> Path:
    """Return the folder of shipped recipes: the checkout's own, else the copy inside the installed package."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / FOLDERS[kind]
    if checkout.is_dir() and (package.parent / "pyproject.toml").is_file():
        return checkout
    return package / "_recipes" / FOLDERS[kind]


def names(kind: Kind) -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(path.stem for path in shipped(kind).glob("*.toml"))


def find(kind: Kind, name: str) -> Path:
    """Return the file of a recipe, given by shipped name or by path."""
    if name.endswith(".toml") or "/" in name:
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: no such {kind} recipe file")
        return path
    path = shipped(kind) / f"{name}.toml"
    if not path.is_file():
        raise UserError(unknown(kind, name, names(kind)))
    return path


def load_task(name: str) -> TaskSpec:
    """Read a task recipe by shipped name or path. Raises UserError with one line per mistake."""
    path = find("task", name)
    return _validate(TaskSpec, _read(path), path, {"name": path.stem})


def load_baseline(name: str) -> BaselineSpec:
    """Read a baseline recipe by shipped name or path, with everything it extends. Raises UserError."""
    path = find("baseline", name)
    raw = _extended(path, ())
    return _validate(BaselineSpec, raw, path, {"name": path.stem, "folder": str(path.resolve().parent)})


def _extended(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return the raw recipe with its parents' keys merged under its own."""
    if path in seen:
        chain = " -> ".join(step.stem for step in (*seen, path))
        raise UserError(f"{path}: extends goes round in a circle ({chain})")
    raw = _read(path)
    parent = raw.get("extends")
    if not isinstance(parent, str):
        return raw
    beside = path.parent / f"{parent}.toml"
    try:
        file = beside if beside.is_file() else find("baseline", parent)
    except UserError as error:
        raise UserError(*(f"{path}: 'extends': {line}" for line in error.lines)) from None
    base = _extended(file, (*seen, path))
    # A published number belongs to the method that earned it, never to a variant.
    ons = base.get("on")
    for on in ons.values() if isinstance(ons, dict) else ():
        if isinstance(on, dict):
            on.pop("published", None)
    return _merge(base, raw)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


# ---------------------------------------------------------------------------------------------------------- experiment


@dataclass(frozen=True)
class Experiment:
    """One baseline on one task, everything resolved: what a run needs besides its seed and device."""

    task: TaskSpec
    baseline: BaselineSpec
    label: str
    """Name in records and tables: the baseline's, with `@<hash>` when settings were overridden by hand."""
    settings: dict[str, Any]
    train: TrainSpec
    model: ModelSpec
    departures: dict[str, Any]
    """Dotted keys of the task's budget or model that the baseline changes."""
    origin: str
    published: tuple[PublishedRow, ...]
    overrides: dict[str, Any]
    pins: dict[str, int] = field(default_factory=dict)
    """Source of chance -> the seed that it has in every run: `seeds.<source>` of the overrides."""

    @property
    def hash(self) -> str:
        """Covers the method and everything it changes on this task; of a user's own file, its content too."""
        covered: dict[str, Any] = {
            "strategy": self.baseline.strategy,
            "settings": self.settings,
            "train": self.train.model_dump(mode="json"),
            "model": self.model.model_dump(mode="json"),
        }
        if self.pins:
            covered["seeds"] = self.pins
        file = self.baseline.strategy.partition(":")[0]
        if file.endswith(".py"):
            covered["code"] = _digest(Path(self.baseline.folder) / file)
        return content_hash(covered)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def resolve(task: TaskSpec, baseline: BaselineSpec, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Join a task and a baseline.

    Args:
        task: the protocol.
        baseline: the method; its `[settings]` hold everywhere, its `[on.<task>]` on that task.
        overrides: from `--set`: `train.<key>` and `model.<key>` change the budget and the net, other keys the
            strategy's settings; `seeds.init`, `seeds.order` and `seeds.classes` pin a source of chance, see
            `clbench.seeds`. A run with overrides is recorded under `<baseline>@<hash of the overrides>`.

    Raises:
        UserError: a key or value that the task's budget or model does not take.
    """
    overrides = dict(overrides or {})
    on = baseline.on.get(task.name)
    settings = {**baseline.settings, **(on.settings if on else {})}
    by_hand: dict[str, dict[str, Any]] = {"train": {}, "model": {}, "seeds": {}}
    for key, value in overrides.items():
        section, dot, rest = key.partition(".")
        if dot and section in by_hand:
            by_hand[section][rest] = value
        elif dot:
            raise UserError(f"--set {key}: only train.<key>, model.<key>, seeds.<source> or a setting can be set")
        else:
            settings[key] = value
    pins = _pins(by_hand["seeds"])
    train, model = task.train, task.model
    where = Path(baseline.folder or FOLDERS["baseline"], f"{baseline.name}.toml")
    for origin, changes, prefix in (
        (str(where), {"train": on.train, "model": on.model} if on else {}, ("on", task.name)),
        ("--set", by_hand, ()),
    ):
        train = _changed(TrainSpec, train, changes.get("train", {}), origin, (*prefix, "train"))
        model = _changed(ModelSpec, model, changes.get("model", {}), origin, (*prefix, "model"))
    departures = {
        f"{section}.{key}": value
        for section, spec, base in (("train", train, task.train), ("model", model, task.model))
        for key, value in spec.model_dump(mode="json").items()
        if value != base.model_dump(mode="json").get(key)
    }
    departures |= {f"seeds.{name}": seed for name, seed in pins.items()}
    label = f"{baseline.name}@{content_hash(overrides)[:8]}" if overrides else baseline.name
    return Experiment(
        task=task,
        baseline=baseline,
        label=label,
        settings=settings,
        train=train,
        model=model,
        departures=departures,
        origin=on.origin if on else "ours: the baseline's defaults, not tuned on this task",
        published=tuple(on.published) if on and not overrides else (),
        overrides=overrides,
        pins=pins,
    )


def _pins(given: Mapping[str, Any]) -> dict[str, int]:
    """Return the seeds of sources of chance, checked, in one order."""
    lines = [f"--set {unknown('source of chance', f'seeds.{name}', [f'seeds.{known}' for known in SOURCES])}"
             for name in given if name not in SOURCES]  # fmt: skip
    lines += [
        f"--set seeds.{name}={value}: should be a whole number from 0 to {2**32 - 1}"
        for name, value in given.items()
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32
    ]
    if lines:
        raise UserError(*lines)
    return {name: given[name] for name in SOURCES if name in given}


def _changed(annotation: Any, base: _S, changes: Mapping[str, Any], origin: str, section: tuple[str, ...]) -> _S:
    """Return `base` with some keys changed, validated anew."""
    if not changes:
        return base
    raw = base.model_dump(mode="json")
    if "kind" in changes and changes["kind"] != raw.get("kind"):
        raw = {}
    if "epochs" in changes:
        raw.pop("iterations", None)
    if "iterations" in changes:
        raw.pop("epochs", None)
    adapter: TypeAdapter[_S] = TypeAdapter(annotation)
    try:
        return adapter.validate_json(_as_json({**raw, **changes}), strict=True)
    except ValidationError as error:
        raise UserError(*_lines(error, annotation, origin, section)) from None


# -------------------------------------------------------------------------------------------------------------- errors


def _as_json(raw: Mapping[str, Any]) -> str:
    """Return JSON text: there pydantic can be strict about types and still take a list for a tuple."""
    return json.dumps(raw, default=str)


def load_file(model: type[_M], path: Path) -> _M:
    """Return a TOML file of any kind as its model. Raises UserError: a line for each mistake, with the nearest key."""
    return _validate(model, _read(path), path, {})


def _validate(model: type[_M], raw: dict[str, Any], path: Path, given: Mapping[str, str]) -> _M:
    """Return the recipe; `given` are the fields that come from the file's place and no file may set."""
    known = _field_names(model)
    lines = [f"{path}: unknown key '{key}'. Known here: {', '.join(sorted(known))}" for key in given if key in raw]
    try:
        spec = model.model_validate_json(_as_json({**raw, **given}), strict=True)
    except ValidationError as error:
        lines += _lines(error, model, str(path), ())
    if lines:
        raise UserError(*lines)
    return spec


def _lines(error: ValidationError, model: Any, origin: str, prefix: tuple[str, ...]) -> list[str]:
    """Return one line per mistake pydantic found: file, key, what is wrong, nearest right answer."""
    lines = []
    for item, key in _mistakes(error, model):
        where = ".".join((*prefix, *key)) or "(top)"
        kind, context = item["type"], item.get("ctx", {})
        if kind == "extra_forbidden":
            fields = _fields_at(model, item["loc"][:-1])
            known = ", ".join(sorted(fields))
            lines.append(f"{origin}: unknown key '{where}'.{nearest(key[-1], fields)} Known here: {known}")
        elif kind == "missing":
            lines.append(f"{origin}: '{where}' is missing")
        elif kind == "union_tag_not_found":
            kinds = ", ".join(repr(tag) for tag in _tags(_at(model, item["loc"])))
            lines.append(f"{origin}: '{where}.kind' is missing; it is one of {kinds}")
        elif kind == "union_tag_invalid":
            guess = nearest(str(context["tag"]), _tags(_at(model, item["loc"])))
            lines.append(f"{origin}: '{where}.kind': {context['tag']!r} is none of {context['expected_tags']}.{guess}")
        elif kind in _NO_TABLE:
            lines.append(f"{origin}: '{where}': should be a table (got {item['input']!r})")
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
            message = message[0].lower() + message[1:]
            shown = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            guess = ""
            if kind == "literal_error" and isinstance(item["input"], str):
                guess = nearest(item["input"], context["expected"].replace("'", "").replace(" or ", ", ").split(", "))
            lines.append(f"{origin}: '{where}': {message}{shown}{'.' if guess else ''}{guess}")
    return lines


_NO_TABLE = {"dict_type", "model_type", "model_attributes_type"}


def _mistakes(error: ValidationError, model: Any) -> list[tuple[ErrorDetails, tuple[str, ...]]]:
    """Return what pydantic found, each with its key; of two findings that are one mistake, only the telling one."""
    found = [(item, tuple(str(part) for part in _without_tags(list(item["loc"]), model))) for item in error.errors()]
    # A misspelt key is also a missing one.
    meant = set()
    for item, key in found:
        if item["type"] == "extra_forbidden":
            guess = nearest(key[-1], _fields_at(model, item["loc"][:-1]))
            meant |= {(*key[:-1], name) for name in _fields_at(model, item["loc"][:-1]) if f"'{name}'" in guess}
    # A value that fits no member of a union is reported by each member: keep the one of its own type.
    words = {key for item, key in found if item["type"] == "literal_error" and isinstance(item["input"], str)}
    kept = []
    for item, key in found:
        inside = any(other[: len(key)] == key and it is not item for it, other in found)
        if item["type"] == "missing" and key in meant:
            continue
        if key in words and item["type"] in _NO_TABLE | {"list_type"}:
            continue
        if item["type"] == "literal_error" and not isinstance(item["input"], str) and inside:
            continue
        kept.append((item, key))
    return kept


def _without_tags(location: list[Any], model: Any) -> list[Any]:
    """Drop the tags of discriminated unions and of union members, which pydantic puts into a location."""
    kept: list[Any] = []
    current: Any = model
    for part in location:
        member = _member(current, part)
        if member is not None:
            current = member
            continue
        if isinstance(part, str) and not _has_field(current, part) and _is_tag(part):
            continue
        kept.append(part)
        current = _step(current, part)
    return kept


_TYPE_TAGS = {"int", "float", "str", "bool", "list", "literal", "tuple", "dict"}


def _is_tag(part: str) -> bool:
    return any(part == tag or part.startswith(f"{tag}[") for tag in _TYPE_TAGS) or part[:1].isupper()


def _has_field(current: Any, part: str) -> bool:
    return any(part in _field_names(model) for model in _models(current))


def _field_names(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()} - {"name", "folder"}


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Return the pydantic models inside an annotation (through Annotated, unions, lists and dicts)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _member(current: Any, part: Any) -> type[BaseModel] | None:
    """Return the union member that `part` names as a discriminator's tag, if it does."""
    if get_origin(current) not in (Union, UnionType) and len(_models(current)) < 2:
        return None
    for model in _models(current):
        kind = model.model_fields.get("kind")
        if kind is not None and part in get_args(kind.annotation):
            return model
    return None


def _step(current: Any, part: Any) -> Any:
    """Return the annotation one key further in."""
    if isinstance(part, int):
        return current
    for model in _models(current):
        for name, info in model.model_fields.items():
            if part in (name, info.alias):
                return info.annotation
    return current


def _at(model: Any, location: Iterable[Any]) -> Any:
    """Return the annotation at a location."""
    current = model
    for part in location:
        current = _member(current, part) or _step(current, part)
    return current


def _fields_at(model: Any, location: Iterable[Any]) -> set[str]:
    return {name for item in _models(_at(model, location)) for name in _field_names(item)}


def _tags(annotation: Any) -> list[str]:
    """Return the kinds a discriminated union takes."""
    kinds = [item.model_fields["kind"] for item in _models(annotation) if "kind" in item.model_fields]
    return [str(tag) for kind in kinds for tag in get_args(kind.annotation)]


__all__ = [
    "Experiment",
    "OnTask",
    "find",
    "load_baseline",
    "load_task",
    "names",
    "resolve",
    "shipped",
]
