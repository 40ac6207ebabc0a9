"""Where images come from: torchvision, a user's .npz or folder of .png files, scikit-learn's digits, blobs of our own.

Every reader returns a `Raw`: checked arrays in memory, images as N x C x H x W bytes, labels from 0 without gaps.
Nothing here knows about the cache; `clbench.data` packs a `Raw` and reads it back.

Letters: N samples, C channels of an image (classes where labels are meant), H and W pixels.
"""

from __future__ import annotations

import errno
import math
import socket
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torchvision
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from clbench.data_content import DIGIT_NAMES, KEYS, KNOWN, SPLITS, Known, Raw
from clbench.errors import UserError, nearest

MAX_LINES = 10
"""Mistakes of one kind told in full before the rest is counted."""
NETWORK_TIMEOUT = 15.0
"""Seconds without a byte before a download counts as failed."""


# URLError and timeouts are OSErrors; a wrong md5 is a RuntimeError; the rest are transfers that broke off.
_TRANSFER_ERRORS = (OSError, RuntimeError, HTTPException, EOFError, ValueError, tarfile.TarError, zlib.error)
# What NumPy and zipfile raise on damaged archives, according to which byte is hit.
_ARCHIVE_ERRORS = (
    *(OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


class Unreachable(Exception):
    """A download failed; the message is the reason in one short line."""


# ---------------------------------------------------------------------------------------------------------- torchvision


def download(name: str, folder: Path) -> Raw:
    """Download one of `KNOWN` into `folder` through torchvision, which verifies the md5 of every file.

    Raises:
        Unreachable: no network, a timeout, a broken transfer, or a file whose md5 is wrong.
        OSError: `folder` cannot be written (disk full, no permission).
        UserError: what came is not of the published size.
    """
    known = KNOWN[name]
    dataset_class = getattr(torchvision.datasets, known.torchvision_class)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)  # torchvision sets none: a silent host would hang it for good
    try:
        with warnings.catch_warnings():
            # CIFAR's pickles were written by an old NumPy, which today's reports as deprecated.
            warnings.simplefilter("ignore")
            parts = [dataset_class(str(folder), train=split == "train", download=True) for split in SPLITS]
    except _TRANSFER_ERRORS as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        raise Unreachable(reason if len(reason) <= 160 else reason[:157] + "...") from error
    finally:
        socket.setdefaulttimeout(timeout)
    arrays = {}
    for split, part in zip(SPLITS, parts, strict=True):
        arrays[f"x_{split}"] = np.asarray(part.data)
        arrays[f"y_{split}"] = np.asarray(part.targets)
    return _checked(f"torchvision's {known.torchvision_class}", arrays, known.class_names, name)


# ------------------------------------------------------------------------------------------------------------------ npz


def read_npz(file: Path, name: str) -> Raw:
    """Read a .npz with the Keras keys `x_train`, `y_train`, `x_test`, `y_test`, and `class_names` if it is there.

    Images: uint8, N x H x W, N x H x W x 1 or N x H x W x 3. Labels: any integer type, (N,) or (N, 1), from 0.

    Args:
        file: the archive.
        name: the data set it is to become; one of `KNOWN` must have that set's size and classes.

    Raises:
        UserError: one line for each thing that is wrong with the file.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if not zipfile.is_zipfile(file):
        raise UserError(f"{file}: truncated, or not a .npz archive")
    arrays: dict[str, NDArray[np.generic]] = {}
    key = "archive"
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as archive:
            there = list(archive.files)
            problems = [_missing_key(file, wanted, there) for wanted in KEYS if wanted not in there]
            if problems:
                raise UserError(*problems)
            for key in (*KEYS, "class_names"):
                if key in there:
                    arrays[key] = archive[key]
    except _ARCHIVE_ERRORS as error:
        if "Object arrays" in str(error):
            raise UserError(f"{file}: {key}: holds Python objects; save it as an array of numbers or text") from None
        raise UserError(f"{file}: {key}: damaged ({' '.join(str(error).split())})") from None
    class_names = arrays.pop("class_names", None)
    if class_names is None:
        return _checked(str(file), arrays, None, name)
    if class_names.ndim != 1 or class_names.dtype.kind != "U":
        raise UserError(f"{file}: class_names: {_says(class_names)}; expected a one-dimensional array of text")
    return _checked(str(file), arrays, tuple(str(each) for each in class_names), name)


def _missing_key(file: Path, wanted: str, there: Sequence[str]) -> str:
    candidates = [key for key in there if key not in KEYS]
    return f"{file}: key '{wanted}' is missing.{nearest(wanted, candidates)} There are: {', '.join(there) or 'none'}"


# --------------------------------------------------------------------------------------------------------------- folder


def read_folder(folder: Path, name: str) -> Raw:
    """Read `train/<class>/*.png` and `test/<class>/*.png`, grey or RGB with 8 bits a channel, all of one size.

    Classes are numbered by name in sorted order, or by number when all names are numbers; those of one of `KNOWN` by
    their official order. Files are taken in sorted order. If one image is RGB, grey ones become RGB too (lossless).

    Raises:
        UserError: one line for each thing that is wrong, at most `MAX_LINES` of them and a count of the rest.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    missing = [split for split in SPLITS if not (folder / split).is_dir()]
    if missing:
        layout = "expected train/<class>/*.png and test/<class>/*.png"
        raise UserError(*(f"{folder}: has no folder '{split}'; {layout}" for split in missing))
    class_names = _class_folders(folder, name)
    problems: list[str] = []
    images: dict[str, list[Image.Image]] = {}
    arrays: dict[str, NDArray[np.generic]] = {}
    size: tuple[int, int] | None = None
    for split in SPLITS:
        images[split], labels = [], []
        for label, class_name in enumerate(class_names):
            files = _png_files(folder / split / class_name, problems)
            for file in files:
                image = _open_png(file, size, problems)
                if image is not None:
                    size = image.size
                    images[split].append(image)
                    labels.append(label)
        arrays[f"y_{split}"] = np.asarray(labels, dtype=np.int64)
    if problems:
        rest = len(problems) - MAX_LINES
        more = [f"{folder}: and {rest} more like these"] if rest > 0 else []
        raise UserError(*problems[:MAX_LINES], *more)
    mode = "RGB" if any(image.mode == "RGB" for split in SPLITS for image in images[split]) else "L"
    for split in SPLITS:
        arrays[f"x_{split}"] = np.stack([np.asarray(image.convert(mode)) for image in images[split]])
    official = KNOWN[name].class_names if name in KNOWN else class_names
    return _checked(str(folder), arrays, official, name)


def _class_folders(folder: Path, name: str) -> tuple[str, ...]:
    """Return the names of the class folders in the order of their labels."""
    found = {
        split: {path.name for path in (folder / split).iterdir() if path.is_dir() and not path.name.startswith(".")}
        for split in SPLITS
    }
    problems = [f"{folder / split}: has no class folders" for split in SPLITS if not found[split]]
    if problems:
        raise UserError(*problems)
    for here, there in (SPLITS, SPLITS[::-1]):
        for each in sorted(found[here] - found[there])[:MAX_LINES]:
            line = f"{folder / here / each}: class '{each}' is not in {there}."
            problems.append(line + nearest(each, found[there] - found[here]))
    if problems:
        raise UserError(*problems)
    names = found["train"]
    numbered = all(each.isascii() and each.isdecimal() for each in names)
    if name in KNOWN:
        official = KNOWN[name].class_names
        if names == set(official):
            return official
        if not (numbered and sorted(map(int, names)) == list(range(len(official)))):
            odd = sorted(names - set(official))
            line = f"{folder}: {len(names)} class folders are not {name}'s {len(official)} classes"
            example = f" (such as '{odd[0]}').{nearest(odd[0], official)}" if odd else "."
            raise UserError(f"{line}{example} Name them as {name} does, or 0 to {len(official) - 1}")
    return tuple(sorted(names, key=int)) if numbered else tuple(sorted(names))


def _png_files(folder: Path, problems: list[str]) -> list[Path]:
    visible = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    files = [path for path in visible if path.suffix.lower() == ".png"]
    others = Image.registered_extensions().keys() - {".png"}
    foreign = [path for path in visible if path.suffix.lower() in others]
    if foreign:
        problems.append(f"{foreign[0]}: not a .png ({len(foreign)} such in its folder); convert them, or take them out")
    elif not files:
        problems.append(f"{folder}: empty class folder; every class needs at least one .png in train and in test")
    return files


def _open_png(file: Path, size: tuple[int, int] | None, problems: list[str]) -> Image.Image | None:
    """Return the image as grey ("L") or "RGB"; on a mistake note it and return None."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            if size is not None and image.size != size:
                problems.append(f"{file}: {_pixels(image.size)} pixels, the first image has {_pixels(size)}")
                return None
            if image.mode not in ("1", "L", "P", "RGB") or "transparency" in image.info:
                problems.append(f"{file}: mode {image.mode}; expected grey or RGB, 8 bits a channel, no transparency")
                return None
            return image.convert("RGB" if image.mode in ("P", "RGB") else "L")
    except (OSError, SyntaxError, ValueError, EOFError, zlib.error, Image.DecompressionBombError):
        problems.append(f"{file}: damaged, or not a PNG image")
        return None


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


# ------------------------------------------------------------------------------------------------------------- built in


def digits() -> Raw:
    """Return scikit-learn's 1,797 real 8 x 8 digits (Alpaydin and Kaynak 1998), 10 classes.

    Intensities 0 to 16 become 0 to 255, rounded to the nearest. The split is fixed and stratified: of every class, in
    the order of the source, each fifth image is a test image: 1,442 for training and 355 for testing.
    """
    bunch = load_digits()
    images = ((bunch.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    rank = np.zeros(len(labels), dtype=np.int64)  # how many of its class came before
    for label in range(10):
        mine = labels == label
        rank[mine] = np.arange(mine.sum())
    test = rank % 5 == 4
    arrays = {"x_train": images[~test], "y_train": labels[~test], "x_test": images[test], "y_test": labels[test]}
    return Raw(arrays, DIGIT_NAMES)


def synthetic() -> Raw:
    """Return 1,600 + 400 made-up 1 x 8 x 8 images in 8 classes: two round blobs a class, under noise.

    Class c has its blobs on a ring, at c and c + 3 eighths of a turn. Each image draws how bright either blob is, and
    adds noise (the sum of four uniform draws, near Gaussian). Every draw comes from the raw output of one PCG64
    generator, the part of NumPy's random numbers that is promised never to change.
    """
    n_train, n_test, n_classes, side = 1600, 400, 8, 8
    n = n_train + n_test
    raw = np.random.PCG64(1).random_raw(n * (2 + 4 * side * side)).reshape(n, -1)
    draws = (raw >> np.uint64(56)).astype(np.int64)  # uniform in 0..255
    noise = draws[:, 2:].reshape(n, 4, side, side).sum(axis=1) - 510  # mean 0, deviation 148
    labels = np.arange(n, dtype=np.int64) % n_classes
    rows, columns = np.mgrid[0:side, 0:side]
    images = 40 + noise // 4
    for blob, turn in enumerate((0, 3)):
        angle = (labels + turn) * (2 * math.pi / n_classes)
        row, column = (3.5 + 2.4 * wave(angle)[:, None, None] for wave in (np.sin, np.cos))
        shape = np.rint(256 * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 2)).astype(np.int64)
        images += (60 + draws[:, blob] // 2)[:, None, None] * shape // 256
    images = np.clip(images, 0, 255).astype(np.uint8)[:, None]
    arrays = {
        "x_train": images[:n_train],
        "y_train": labels[:n_train],
        "x_test": images[n_train:],
        "y_test": labels[n_train:],
    }
    return Raw(arrays, tuple(f"blob{label}" for label in range(n_classes)))


# --------------------------------------------------------------------------------------------------------------- checks


def _says(array: NDArray[np.generic]) -> str:
    return f"{array.dtype} {' x '.join(map(str, array.shape)) or 'scalar'}"


def _image_problem(array: NDArray[np.generic]) -> str:
    if array.dtype != np.uint8:
        return f"{_says(array)}; expected uint8 images with pixels 0 to 255"
    if array.ndim not in (3, 4) or (array.ndim == 4 and array.shape[3] not in (1, 3)):
        return f"{_says(array)}; expected N x H x W, N x H x W x 1 or N x H x W x 3"
    return f"{_says(array)}; there is nothing in it" if array.size == 0 else ""


def _label_problem(array: NDArray[np.generic], n_images: int) -> str:
    if array.dtype.kind not in "iu":
        return f"{_says(array)}; expected integer labels"
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] != 1):
        return f"{_says(array)}; expected labels of shape N or N x 1"
    return f"{len(array)} labels for {n_images} images" if len(array) != n_images else ""


def _checked(
    where: str, arrays: dict[str, NDArray[np.generic]], class_names: tuple[str, ...] | None, name: str
) -> Raw:
    """Return `arrays` (channels last) as a `Raw`, or raise UserError with one line for each mistake in them."""
    known = KNOWN.get(name)
    problems = []
    for split in SPLITS:
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        problems += [f"{where}: x_{split}: {line}" for line in [_image_problem(images)] if line]
        n_images = len(images) if images.ndim else 0
        problems += [f"{where}: y_{split}: {line}" for line in [_label_problem(labels, n_images)] if line]
    if problems:
        raise UserError(*problems)
    shapes = {split: _shape(arrays[f"x_{split}"]) for split in SPLITS}
    if shapes["train"] != shapes["test"]:
        problems.append(f"{where}: x_test: images of {shapes['test']}, x_train has {shapes['train']} (C, H, W)")
    if known is not None:
        problems += _against(where, name, known, arrays, shapes["train"], class_names)
        class_names = known.class_names
    problems += _class_problems(where, arrays, class_names)
    if problems:
        raise UserError(*problems)
    n_classes = len(class_names) if class_names else int(arrays["y_train"].max()) + 1
    ready: dict[str, NDArray[np.generic]] = {}
    for split in SPLITS:
        images = arrays[f"x_{split}"]
        channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        ready[f"x_{split}"] = np.ascontiguousarray(channels_first)
        ready[f"y_{split}"] = np.ascontiguousarray(arrays[f"y_{split}"].reshape(-1), dtype=np.int64)
    return Raw(ready, class_names or tuple(str(label) for label in range(n_classes)))


def _shape(images: NDArray[np.generic]) -> tuple[int, int, int]:
    """Return C, H, W of images with their channels last or left out."""
    return (1 if images.ndim == 3 else images.shape[3], images.shape[1], images.shape[2])


def _against(
    where: str,
    name: str,
    known: Known,
    arrays: dict[str, NDArray[np.generic]],
    shape: tuple[int, int, int],
    class_names: tuple[str, ...] | None,
) -> list[str]:
    """Return how the data differ from the published set in size and classes, one line each."""
    problems = []
    if shape != known.shape:
        problems.append(f"{where}: x_train: images of {shape}, {name} has {known.shape} (C, H, W)")
    for split, count in zip(SPLITS, known.samples, strict=True):
        if len(arrays[f"x_{split}"]) != count:
            problems.append(f"{where}: x_{split}: {len(arrays[f'x_{split}']):,} images, {name} has {count:,}")
    if class_names is not None and class_names != known.class_names:
        said = f"{len(class_names)} of them" if len(class_names) != len(known.class_names) else "other names or order"
        problems.append(f"{where}: class_names: {said}, not {name}'s {len(known.class_names)} classes in their order")
    return problems


def _class_problems(
    where: str, arrays: dict[str, NDArray[np.generic]], class_names: tuple[str, ...] | None
) -> list[str]:
    """Return what is wrong with the values of the labels; without names the training labels say how many classes."""
    problems = []
    if class_names is not None and (len(set(class_names)) != len(class_names) or not all(class_names)):
        problems.append(f"{where}: class_names: a name is empty or there twice")
    found = {split: [int(label) for label in np.unique(arrays[f"y_{split}"])] for split in SPLITS}
    n_classes = len(class_names) if class_names is not None else max(found["train"]) + 1
    for split in SPLITS:
        outside = [label for label in found[split] if not 0 <= label < n_classes]
        # Counted, not listed: a stray label of a billion must not make a billion classes.
        inside = len(found[split]) - len(outside)
        if outside:
            problems.append(f"{where}: y_{split}: label {outside[0]} is out of range 0 to {n_classes - 1}")
        if inside < n_classes:
            there = [label for label in found[split] if label not in outside]
            first = next(label for label, seen in enumerate([*there, -1]) if label != seen)
            problems.append(f"{where}: y_{split}: {inside} of {n_classes} classes; class {first} has no images")
    return problems
