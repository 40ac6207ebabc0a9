"""Tables in LaTeX: nothing wider than a page, nothing that stops a document, nothing lost where a table is broken."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from clbench.report import measures, tables, writers
from clbench.report.select import select
from clbench.report.writers import Section, TextTable
from record_factory import make_record


def table(columns: int, left: str = "finetune", title: str = "T") -> TextTable:
    """A table of so many columns of numbers, each "100.0 ± 10.0": about 12 letters, 6 em."""
    cells = tuple(f"{100 + i}.0 ± 10.0" for i in range(columns))
    header = ("Baseline", *(f"M{i}" for i in range(columns)))
    return TextTable("t", title, ("Caption.",), header, (Section("", ((left, *cells),)),), ("[1] a note", "[2] b"))


def test_the_largest_type_that_fits_is_taken() -> None:
    """A page has 465 points. Five columns fit at 9 points; nine, of 6 em and more each, need 7."""
    assert r"\small" in writers.to_latex(table(4)).splitlines()[2]
    assert r"\scriptsize" in writers.to_latex(table(8)).splitlines()[2]


def test_a_table_too_wide_for_the_page_comes_in_parts_with_the_names_again() -> None:
    text = writers.to_latex(table(14))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert text.count("finetune") == 2
    assert re.findall(r"M\d+", text) == [f"M{i}" for i in range(14)]
    assert [int(cell) - 100 for cell in re.findall(r"(\d+)\.0 \$\\pm\$", text)] == list(range(14))
    assert text.count(r"\caption") == text.count(r"\label") == 1


def test_long_names_are_broken_into_lines() -> None:
    text = writers.to_latex(table(3, left="a limit that takes a whole sentence, and more, to say"))
    assert r"\begin{tabular}{@{}p{0.4\linewidth}rrr@{}}" in text


def test_a_bracket_after_the_end_of_a_line_is_no_argument() -> None:
    r"""`\\ [1]` asks for a space of "1": LaTeX stops with "illegal unit of measure"."""
    text = writers.to_latex(table(2, left="[x] name"))
    assert not re.search(r"\\\\\s*\[", text)
    assert "{[}x] name" in text


def test_the_caption_says_protocol_seeds_definition_and_device(tmp_path: Path) -> None:
    for seed in range(3):
        make_record("my_task", seed=seed).save(tmp_path)
    (task,) = select(tmp_path).tasks
    text = writers.to_latex(tables.tables(task, measures.chosen(None))[0])
    caption = next(line for line in text.splitlines() if r"\caption" in line)
    for part in ("my\\_task", "Domain-incremental, 3 tasks, version 1 (0123456789ab)", "seeds 0-2", "n runs"):
        assert part in caption
    for part in (r"ACC = 1/T sum\_j a{[}T,j]", "Chaudhry et al. 2018", "Device: cpu (Test CPU)", r"95 \% Student-t"):
        assert part in caption


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_a_document_with_odd_names_compiles_without_overfull_lines(tmp_path: Path) -> None:
    odd = r"a_b & 50 % #1 $x$ {y} ~z ^w \c < > | [q] ± ≤"
    made = [table(20, odd, title="odd [title]"), table(3, odd * 3), table(1)]
    body = "\n".join(map(writers.to_latex, made))
    head = "\\documentclass{article}\n\\usepackage[letterpaper,margin=1in]{geometry}\n\\usepackage{booktabs}\n"
    (tmp_path / "t.tex").write_text(f"{head}\\begin{{document}}\n\\listoftables\n{body}\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in (tmp_path / "t.log").read_text(errors="replace")
