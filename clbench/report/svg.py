"""Matplotlib's SVG made small enough to stand inside a page: what nothing refers to goes, decimals are cut.

Text stays text, so that a reader can search and copy it. Nothing that is drawn moves by more than 1/200 of a point.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
_NUMBERS = ("d", "x", "y", "width", "height", "transform", "points", "viewBox")
_FAMILY = re.compile(r"font-family:\s*'DejaVu Sans(?: Cut)?'(?:,\s*'DejaVu Sans')?\s*(?:;|$)")
_LINK = "{http://www.w3.org/1999/xlink}href"


def compact(text: str, prefix: str, label: str) -> str:
    """Return the drawing as an `svg` element for HTML, without width and height: the page's style sheet sizes it.

    Args:
        text: a file that matplotlib wrote with `svg.fonttype` none.
        prefix: starts every id, so that those of several drawings on a page differ; letters and digits.
        label: what a screen reader says in its place.
    """
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            if _bare(child.tag) in ("metadata", "style"):
                parent.remove(child)
    names = {name: f"{prefix}-{i}" for i, name in enumerate(_referred(root))}
    for element in root.iter():
        element.tag = _bare(element.tag)
        element.text = element.text.strip() if element.text and element.tag not in ("text", "tspan") else element.text
        element.tail = element.tail if element.tail and element.tail.strip() else None
        _shorten(element, names)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": label})
    _hoist(root)
    _flatten(root)
    return ElementTree.tostring(root, encoding="unicode")


def size(text: str) -> tuple[float, float]:
    """Return width and height of a drawing in points."""
    box = re.search(r'viewBox="\S+ \S+ (\S+) (\S+)"', text)
    assert box is not None, "matplotlib writes a viewBox"
    return float(box[1]), float(box[2])


def _bare(tag: str) -> str:
    return tag.rpartition("}")[2]


def _referred(root: ElementTree.Element) -> Iterator[str]:
    """Yield every id that something refers to, once, in order of definition."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    return (name for element in root.iter() if (name := element.get("id", "")) in used)


def _shorten(element: ElementTree.Element, names: dict[str, str]) -> None:
    """Round, rename and drop attributes in place."""
    link = element.attrib.pop(_LINK, None)
    if link is not None:
        element.set("href", f"#{names[link[1:]]}" if link.startswith("#") else re.sub(r"\s+", "", link))
    name = element.attrib.pop("id", None)
    if name in names:
        element.set("id", names[name])
    clip = element.get("clip-path")
    if clip:
        element.set("clip-path", f"url(#{names[clip[5:-1]]})")
    for key in _NUMBERS:
        value = element.get(key)
        if value is not None:
            element.set(key, _rounded(" ".join(value.split())))
    turn = element.get("transform", "")
    if re.match(r"rotate\(-?0 [^)]*\)$", turn):
        del element.attrib["transform"]
    style = element.get("style")
    if style is not None:
        style = _FAMILY.sub("", style) if element.tag in ("text", "tspan") else style
        style = re.sub(r"\s*([:;])\s*", r"\1", style).strip("; ")
        if style:
            element.set("style", _rounded(style))
        else:
            del element.attrib["style"]


def _rounded(text: str) -> str:
    short = _NUMBER.sub(lambda found: format(round(float(found[0]), 2), "g") if len(found[0]) > 4 else found[0], text)
    # "M 1 2 L 3 4" needs no space after a letter.
    return re.sub(r"(?<=[MLCQz]) ", "", short) if re.match(r"M[ \d-]", short) else short


def _hoist(element: ElementTree.Element) -> None:
    """Say a style that all children of a group share once, on the group."""
    for child in element:
        _hoist(child)
    styles = {child.get("style") for child in element}
    plain = element.tag == "g" and "style" not in element.attrib and len(element) > 1
    if plain and len(styles) == 1 and None not in styles and {child.tag for child in element} == {"use"}:
        element.set("style", str(styles.pop()))
        for child in element:
            del child.attrib["style"]


def _flatten(element: ElementTree.Element) -> None:
    """Replace groups that say nothing by what they hold."""
    kept: list[ElementTree.Element] = []
    for child in list(element):
        _flatten(child)
        kept += list(child) if child.tag == "g" and not child.attrib else [child]
    element[:] = kept
