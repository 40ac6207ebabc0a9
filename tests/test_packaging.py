"""A wheel carries everything a checkout has: recipes, the page's template, the memory counter's source."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_a_wheel_holds_every_recipe_and_every_file_of_the_package(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for kind in ("tasks", "baselines"):
        for path in (ROOT / kind).glob("*.toml"):
            assert f"clbench/_recipes/{kind}/{path.name}" in held
    for path in (ROOT / "clbench").rglob("*"):
        if path.is_file() and path.suffix in (".py", ".typed", ".cpp", ".j2"):
            assert str(path.relative_to(ROOT)) in held


def test_an_installed_wheel_finds_its_recipes(wheel: Path, tmp_path: Path) -> None:
    """Unpacked into a folder that is no checkout, as pip does; the names must be those of the checkout."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from clbench import recipes; print(recipes.shipped('task')); print(*recipes.names('baseline'))"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert said[0] == str(tmp_path / "clbench" / "_recipes" / "tasks")
    assert said[1].split() == sorted(path.stem for path in (ROOT / "baselines").glob("*.toml"))
