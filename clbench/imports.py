"""Things a recipe names in Python: `module:name`, or `file.py:name` in a folder."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from clbench.errors import UserError, nearest


def load_object(name: str, folder: str | Path, where: str) -> Any:
    """Import what `name` says.

    Args:
        name: `module:name`, or `file.py:name` with a path that is relative to `folder`.
        folder: of the recipe that names it.
        where: how an error begins: the recipe and the key.

    Raises:
        UserError: the name has not the form, or there is no such module, file or name in it.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not attribute:
        raise UserError(f"{where} '{name}' must be 'module:Name' or 'file.py:Name'")
    is_file = module_name.endswith(".py")
    module = _from_file(Path(folder) / module_name, where) if is_file else _named(module_name, where)
    if not hasattr(module, attribute):
        raise UserError(f"{where}: {module_name} has no '{attribute}'.{nearest(attribute, vars(module))}")
    return getattr(module, attribute)


def _named(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that is there but imports a missing one is its author's bug, with its traceback.
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise
        hint = f"a file beside the recipe is '{name}.py:<Name>'"
        raise UserError(f"{where}: there is no module '{name}'; {hint}") from None


def _from_file(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{where}: there is no file {path}")
    name = f"clbench_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None
    # A user's file that cannot be imported is a user's mistake, whatever it raises.
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: importing it fails: {type(error).__name__}: {error}") from None
    return module
