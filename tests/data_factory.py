"""Small made-up data sets in the forms a user brings, and the catching of refusals: for the tests of `clbench.data`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clbench.errors import UserError

Batch = dict[str, NDArray[Any]]


def toy(seed: int = 0, n_classes: int = 3, per_class: int = 4, colour: bool = False) -> Batch:
    """Return small Keras-like arrays: `per_class` training and 2 test images a class, 5 x 4 pixels, in mixed order."""
    rng = np.random.default_rng(seed)
    arrays: Batch = {}
    for split, count in (("train", per_class), ("test", 2)):
        n = n_classes * count
        shape = (n, 5, 4, 3) if colour else (n, 5, 4)
        arrays[f"x_{split}"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"y_{split}"] = rng.permutation(np.arange(n) % n_classes)
    return arrays


def save(file: Path, arrays: Batch) -> Path:
    """Write `arrays` as an uncompressed .npz; return the file."""
    np.savez(file, allow_pickle=True, **arrays)
    return file


def refusal(call: Callable[[], object]) -> tuple[str, ...]:
    """Return the lines of the UserError that `call` must raise; none of them may itself be broken over lines."""
    with pytest.raises(UserError) as caught:
        call()
    assert caught.value.lines
    assert all(line and "\n" not in line for line in caught.value.lines)
    return caught.value.lines


def files_under(folder: Path) -> list[str]:
    """Return all that lies in `folder`, as sorted relative paths; nothing when there is no such folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def write_images(folder: Path, arrays: Batch, class_names: list[str], skip: str = "") -> None:
    """Write `train/<class>/*.png` and `test/<class>/*.png`; the folder named by `skip` stays empty."""
    for split in ("train", "test"):
        for label, class_name in enumerate(class_names):
            target = folder / split / class_name
            target.mkdir(parents=True)
            for i in np.flatnonzero(arrays[f"y_{split}"] == label):
                if f"{split}/{class_name}" != skip:
                    Image.fromarray(arrays[f"x_{split}"][i]).save(target / f"{i:03}.png")
