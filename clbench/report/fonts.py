"""The font of figures: DejaVu Sans cut to Latin letters and the signs that figures need, once a process.

A PDF embeds a font cut to the letters of its figure. Cut from the whole of DejaVu Sans, with tables for a dozen
scripts, that takes a third of all drawing; cut from what is left here it takes next to nothing. Letters that are left
out come from the whole font, one by one.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from fontTools.subset import Options, Subsetter
from fontTools.ttLib import TTFont
from matplotlib import font_manager

WHOLE, CUT = "DejaVu Sans", "DejaVu Sans Cut"
_RANGES = ((0x20, 0x180), (0x3B1, 0x3CA), (0x2010, 0x2030), (0x2190, 0x2194), (0x2212, 0x2213), (0x2264, 0x2266))
"""Latin, Greek in small letters, dashes and quotes, arrows, minus, at most, at least."""
_FAMILY, _STYLE, _FULL, _POSTSCRIPT = 1, 2, 4, 6
"""Entries of a font's table of names."""


@functools.cache
def family() -> list[str]:
    """Make the cut fonts known to matplotlib; return what `font.family` is to be."""
    folder = Path(tempfile.mkdtemp(prefix="clbench-fonts-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for weight in ("normal", "bold"):
        path = folder / f"{weight}.ttf"
        _cut(font_manager.findfont(font_manager.FontProperties(family=WHOLE, weight=weight)), path, weight)
        font_manager.fontManager.addfont(path)
    return [CUT, WHOLE]


def _cut(source: str, target: Path, weight: str) -> None:
    options = Options(layout_features=[], glyph_names=True, hinting=True, notdef_outline=True, name_IDs=["*"])
    options.drop_tables += ["GSUB", "GPOS", "GDEF", "FFTM", "PfEd", "BDF", "meta"]
    with TTFont(source, recalcTimestamp=False) as font:
        subsetter = Subsetter(options)
        subsetter.populate(unicodes=[letter for first, end in _RANGES for letter in range(first, end)])
        subsetter.subset(font)
        style = "Regular" if weight == "normal" else "Bold"
        full = f"{CUT} {style}"
        names = {_FAMILY: CUT, _STYLE: style, _FULL: full, _POSTSCRIPT: full.replace(" ", "")}
        font["name"].names = [entry for entry in font["name"].names if entry.nameID in names]
        for entry in font["name"].names:
            entry.string = names[entry.nameID]
        font.save(target)
