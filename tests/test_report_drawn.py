"""Figures are drawn again exactly where something that they come of has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from clbench.report import build, drawn
from clbench.report.style import Plot
from record_factory import make_record


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stems of figures that were drawn, in order."""
    names: list[str] = []
    draw = build._rendered

    def counted(named: Iterable[tuple[str, Plot]]) -> dict[str, dict[str, bytes]]:
        asked = list(named)
        names.extend(name for name, _ in asked)
        return draw(asked)

    monkeypatch.setattr(build, "_rendered", counted)
    return names


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two tasks of two runs each."""
    for task in ("left", "right"):
        for seed in (0, 1):
            make_record(task, seed=seed).save(tmp_path / "runs")
    return tmp_path / "runs"


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_second_report_draws_nothing_and_writes_the_same_bytes(runs: Path, tmp_path: Path, made: list[str]) -> None:
    out = tmp_path / "out"
    build.build(runs, out)
    before = files(out)
    assert {f"figures/{name}.png" for name in made} == {name for name in before if name.endswith(".png")}
    made.clear()
    build.build(runs, out)
    assert made == []
    assert files(out) == before


def test_a_record_more_draws_the_figures_of_its_task_alone(runs: Path, tmp_path: Path, made: list[str]) -> None:
    """The result is what a report into an empty folder gives."""
    out = tmp_path / "out"
    build.build(runs, out)
    made.clear()
    make_record("left", seed=2).save(runs)
    build.build(runs, out)
    assert made
    assert all(name.startswith("left-") for name in made)
    made.clear()
    build.build(runs, tmp_path / "fresh")
    assert any(name.startswith("right-") for name in made)
    kept, fresh = files(out), files(tmp_path / "fresh")
    assert {name for name in fresh if kept[name] != fresh[name]} <= {"rebuild.py"}


def test_a_colour_that_moves_draws_the_figures_that_have_it(runs: Path, tmp_path: Path, made: list[str]) -> None:
    """`ewc` alone has the first colour of the palette; `agem`, on the other task, comes before it in the alphabet."""
    out = tmp_path / "out"
    make_record("left", "ewc").save(runs)
    build.build(runs, out)
    made.clear()
    make_record("right", "agem").save(runs)
    build.build(runs, out)
    assert any(name.startswith("left-") for name in made)


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_a_file_that_was_not_drawn_is_told_and_drawn_again(
    runs: Path, tmp_path: Path, made: list[str], kind: str
) -> None:
    out = tmp_path / "out"
    build.build(runs, out)
    before, path = files(out), out / "figures" / f"left-seen.{kind}"
    path.write_bytes(before[f"figures/left-seen.{kind}"] + b" ")
    assert build.check(runs, out) == [f"{path}: not the file that was drawn"]
    made.clear()
    build.build(runs, out)
    assert made == ["left-seen"]
    assert files(out) == before
    assert build.check(runs, out) == []


def test_a_drawing_in_the_page_that_was_not_drawn_is_drawn_again(runs: Path, tmp_path: Path, made: list[str]) -> None:
    out = tmp_path / "out"
    build.build(runs, out)
    before, page = files(out), out / "report.html"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("<path ", '<path class="x" ', 1), encoding="utf-8")
    made.clear()
    build.build(runs, out)
    assert len(made) == 1
    assert files(out) == before


@pytest.mark.parametrize(
    "content", [None, b"", b"figure,inputs\n", b"\xff\xfe", b"figure,inputs,pdf,png,svg\nleft-seen,1\n"]
)
def test_without_a_list_that_can_be_read_everything_is_drawn(
    runs: Path, tmp_path: Path, made: list[str], content: bytes | None
) -> None:
    out = tmp_path / "out"
    build.build(runs, out)
    every, path = list(made), out / "figures" / drawn.FILE
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    made.clear()
    build.build(runs, out)
    assert made == every


def test_other_code_draws_everything(
    runs: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build.build(runs, out)
    every = list(made)
    made.clear()
    monkeypatch.setattr(drawn, "_code", lambda: "other code")
    build.build(runs, out)
    assert made == every


def test_the_digest_of_inputs_is_the_same_in_every_process_and_differs_with_each_value() -> None:
    """What a set holds comes in another order in every process: a value that holds one is refused."""
    program = (
        "from clbench.report import drawn; from record_factory import make_record;"
        "print(drawn.inputs((make_record(), 0.1, None), {'a': 1}))"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    said = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths},
            capture_output=True, text=True, check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert said == {drawn.inputs((make_record(), 0.1, None), {"a": 1})}
    different = [("a", "b"), (("a", "b"),), ("ab",), (1,), (1.0,), ("1",), (True,), (None,), ({"a": 1},), ({"a": 2},)]
    assert len({drawn.inputs(*values) for values in different}) == len(different)
    with pytest.raises(TypeError, match="set: does not say all it holds"):
        drawn.inputs({"a"})
