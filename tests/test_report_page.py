"""The page: what its columns are sorted by, drawings made small, the same bytes every time, and without torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from clbench.report import svg
from clbench.report.build import build
from clbench.report.page import number
from clbench.report.style import Plot, render
from record_factory import make_record

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """Reads a page: tags that are not closed, ids, references to them, and the value that each cell is sorted by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.values: list[float] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        self.ids += [given["id"]] if "id" in given else []
        targets = [given.get("href", ""), *re.findall(r"url\((#[^)]+)\)", given.get("clip-path", ""))]
        self.references |= {target[1:] for target in targets if target.startswith("#")}
        self.values += [float(given["data-value"])] if "data-value" in given else []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    for name in ("finetune", "er", "ewc"):
        for seed in range(2):
            make_record(baseline=name, seed=seed).save(folder / "runs")
    make_record(baseline="er", seed=2, device="cuda", device_name="Test GPU").save(folder / "runs")
    build(folder / "runs", folder / "one")
    return folder


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("72.3 ± 2.5", 72.3),
        ("-37.6 ± 3.4", -37.6),
        ("72.3 (n=1)", 72.3),
        ("89.6 k", 89_600),
        ("495 ± 7 k", 495_000),
        ("1.50 ± 0.31 MiB", 1.5 * 2**20),
        ("0 B", 0),
        ("+6.81 [-16.62, 30.23]", 6.81),
        ("773,396 B", 773_396),
        ("-", None),
        ("yes", None),
        ("under-powered: 18 seeds", None),
        ("0.030 W", None),
    ],
)
def test_cells_are_sorted_by_their_mean_in_one_unit(cell: str, value: float | None) -> None:
    assert number(cell) == (None if value is None else pytest.approx(value))


def test_every_id_is_there_once_and_every_reference_leads_somewhere(made: Path) -> None:
    page = Page((made / "one" / "report.html").read_text())
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.references <= set(page.ids)
    assert {"toy_3", "table-toy_3-1", "figures-toy_3-1"} <= page.references
    assert page.values


def test_only_families_of_one_device_are_sorted_into_each_other(made: Path) -> None:
    text = (made / "one" / "report.html").read_text()
    first = text[text.index("<table>") : text.index("</table>")]
    groups = re.findall(r'<tbody data-group="([^"]*)"', first)
    assert [group.rpartition(", ")[2] for group in groups] == ["cpu (Test CPU)"] * 3 + ["cuda (Test GPU)"]
    assert first.count('class="family group" hidden') == 2


def test_the_page_says_everything_without_its_script(made: Path) -> None:
    text = (made / "one" / "report.html").read_text()
    bare = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    for part in ("finetune", "Chaudhry", "Bands: 95 %", '<a href="#table-toy_3-1">', "toy_3-cpu-seen"):
        assert part in bare
    # What is hidden until the script shows it says nothing that is not said elsewhere.
    assert set(re.findall(r"<(\w+)[^>]* hidden", bare)) == {"tr"}


def test_what_users_name_is_text_on_the_page_and_in_drawings(tmp_path: Path) -> None:
    make_record(label="<img src=x onerror=alert(1)>").save(tmp_path / "runs")
    build(tmp_path / "runs", tmp_path / "out")
    assert "<img" not in (tmp_path / "out" / "report.html").read_text()


# ------------------------------------------------------------------------------------------------------------- drawings


def test_a_small_drawing_keeps_what_is_drawn_and_drops_the_rest() -> None:
    """A group that says nothing goes, its path stays; 1.23456 becomes 1.23; of two ids the one in use is renamed."""
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="9pt" height="9pt" '
        'viewBox="0 0 9 9"><metadata>who</metadata><defs><style>*{}</style><path id="m1" d="M 0 0 \nL 1.23456 0 \n"/>'
        '</defs><g id="axes_1"><g><use xlink:href="#m1" x="1.0049" style="fill: #ff0000"/>'
        '<use xlink:href="#m1" x="2" style="fill: #ff0000"/></g><text style="font-size: 6px; font-family: \'DejaVu '
        "Sans'; text-anchor: end\" transform=\"rotate(-0 1 2)\"> a  b</text></g></svg>"
    )
    assert svg.size(text) == (9.0, 9.0)
    assert svg.compact(text, "f0", 'a "figure"') == (
        '<svg viewBox="0 0 9 9" role="img" aria-label="a &quot;figure&quot;"><defs><path d="M0 0 L1.23 0" id="f0-0" />'
        '</defs><g style="fill:#ff0000"><use x="1" href="#f0-0" /><use x="2" href="#f0-0" /></g>'
        '<text style="font-size:6px;text-anchor:end"> a  b</text></svg>'
    )


def test_a_drawing_shrinks_to_less_than_two_thirds_and_stays_well_formed() -> None:
    def draw() -> Figure:
        figure = Figure()
        axes = figure.subplots(1, 2)
        axes[0].plot([i % 7 / 3 for i in range(200)], marker="o")
        axes[1].imshow([[0.1, 0.2], [0.3, 0.4]])
        axes[1].set_title("x & <b>")
        return figure

    full = render(Plot("p", "c", (), (), draw))["svg"].decode()
    small = svg.compact(full, "f1", "c")
    assert len(small) < len(full) * 2 / 3
    root = ElementTree.fromstring(small)
    assert {element.tag for element in root.iter()} >= {"svg", "path", "use", "text", "image", "clipPath"}
    assert len(root.findall(".//use")) == ElementTree.fromstring(full).findall(".//{*}use").__len__()
    assert "&amp; &lt;b&gt;" in small


# ------------------------------------------------------------------------------------------------- every time, anywhere


def test_the_command_writes_the_same_bytes_in_any_number_of_processes_and_without_torch(made: Path) -> None:
    """One folder was written here, by one process; hashes of text, and with them the order of sets, differ there."""
    code = (
        "import os, sys; from clbench.cli import main; from clbench.report import build\n"
        "os.cpu_count, build.PER_PROCESS = (lambda: 2), 2\n"
        "code = main(['report', '--runs', 'runs', '--out', 'two'])\n"
        "loaded = sorted({'torch', 'avalanche', 'torchvision'} & set(sys.modules))\n"
        "sys.exit(f'imported {loaded}' if loaded else code)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    subprocess.run([sys.executable, "-c", code], cwd=made, env=environment, check=True, capture_output=True)
    one, two = (
        {str(path.relative_to(made / name)): path.read_bytes() for path in (made / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert {name.rpartition(".")[2] for name in one} == {"md", "csv", "tex", "pdf", "png", "html", "py"}
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []
