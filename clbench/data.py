"""Data sets as uint8 tensors, packed once into a cache and read from there by memory map.

`load` is all a stream needs. `digits` and `synthetic` need no cache. MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 come
through torchvision, which verifies its downloads, or from a file of the user's (`import_`), as does anything else.

The cache is one folder a data set: `x_train.npy`, `y_train.npy`, `x_test.npy`, `y_test.npy` and `meta.json`. It is
packed in a temporary folder beside its place and renamed, under a lock on the cache folder, so a reader finds a whole
data set or none, and of two processes that need the same download one does it and the other waits.

Two digests, two purposes. The `fingerprint` enters every record: the same bytes in the same order. The content digest
ignores the order of samples, so that a file sorted by class is still known for the official data.

Letters: N samples, C channels, H and W pixels.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clbench.data_content import KEYS, KNOWN, Arrays, DataSet, Raw, content_digest, fingerprint, pixel_moments
from clbench.data_sources import Unreachable, digits, download, read_folder, read_npz, synthetic
from clbench.errors import UserError, unknown

if sys.platform != "win32":
    import fcntl

__all__ = [
    "DataSet", "Status", "cache_root", "content_digest", "fingerprint", "import_", "import_folder", "import_npz",
    "load", "names", "pixel_moments", "prepare", "status", "verify",
]

EMBEDDED = {"digits": digits, "synthetic": synthetic}
"""Data sets that are always there, without network or cache."""
FORMAT = 1
"""Number of the cache's layout; a folder of another number is packed anew."""
_META = "meta.json"
_OURS = frozenset({_META, *(f"{key}.npy" for key in KEYS)})
_STAGE = ".partial-"


@dataclass(frozen=True)
class Status:
    """One line of `clbench data list`."""

    name: str
    present: bool
    samples: tuple[int, int] | None
    """Training and test images; None when unknown."""
    shape: tuple[int, int, int] | None
    """C, H, W."""
    classes: int | None
    fingerprint: str
    """Empty when the data are not there."""
    bytes: int
    """Of the four arrays; 0 when they are not there."""
    origin: str
    """"embedded", "download", "import", or "" when the data are not there."""
    problem: str = ""
    """What is wrong with the cached copy, in one line."""


class _Unreadable(Exception):
    """A folder of the cache is missing or damaged; the message is the reason."""


# ----------------------------------------------------------------------------------------------------------------- read


def cache_root() -> Path:
    """Return the cache folder: `CLBENCH_DATA`, else `clbench` in the user's cache directory."""
    own = os.environ.get("CLBENCH_DATA")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "clbench"


def names(root: Path | None = None) -> tuple[str, ...]:
    """Return the names `load` takes: the embedded ones, the published ones, then those imported into the cache."""
    root = root or cache_root()
    fixed = (*EMBEDDED, *KNOWN)
    folders = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    imported = (name for name in folders if name not in fixed and _is_name(name) and _is_packed(root / name))
    return (*fixed, *imported)


def load(name: str, root: Path | None = None, test: bool = True) -> DataSet:
    """Return a data set by name; a published one that is not in the cache is downloaded.

    Nothing is copied: the tensors are views of the files.

    Args:
        name: one of `names(root)`.
        root: the cache folder; by default `cache_root()`.
        test: False leaves the files of test images and labels closed; both are empty then.

    Raises:
        UserError: there is no such data set, it is neither in the cache nor reachable, or its folder is damaged.
    """
    if name in EMBEDDED:
        return _embedded(name) if test else _embedded(name).without_test()
    root = root or cache_root()
    folder = root / name
    if _is_name(name) and folder.is_dir():
        with suppress(_Unreadable):
            return _read(folder, test)
    with _locked(root):  # whoever was exchanging the folder just now has finished
        if _is_name(name) and folder.is_dir():
            try:
                return _read(folder, test)
            except _Unreadable as error:
                raise UserError(_damaged(folder, str(error))) from None
    if name in KNOWN:
        return prepare(name, root) if test else prepare(name, root).without_test()
    raise UserError(f"{unknown('data set', name, names(root))}; bring your own: clbench data import NAME FILE.npz")


def status(root: Path | None = None) -> list[Status]:
    """Return one entry for every name, in the order of `names`, without reading or hashing the images."""
    root = root or cache_root()
    return [_status(name, root) for name in names(root)]


def _status(name: str, root: Path) -> Status:
    known = KNOWN.get(name)
    problem = ""
    if name in EMBEDDED or (root / name).is_dir():
        try:
            found = _embedded(name) if name in EMBEDDED else _read(root / name)
        except _Unreadable as error:
            problem = _damaged(root / name, str(error))
        else:
            size = sum(array.nbytes for array in found.arrays.values())
            origin = "embedded" if name in EMBEDDED else str(_meta(root / name)["origin"])
            samples = (len(found.y_train), len(found.y_test))
            return Status(name, True, samples, found.shape, found.n_classes, found.fingerprint, size, origin)
    if known is None:
        return Status(name, False, None, None, None, "", 0, "", problem)
    return Status(name, False, known.samples, known.shape, len(known.class_names), "", 0, "", problem)


def verify(root: Path | None = None, names: Iterable[str] | None = None) -> list[str]:
    """Read every byte again and compare: with the stored fingerprint, and with the published content where it is known.

    The content of MNIST and CIFAR-100 is known. For Fashion-MNIST and CIFAR-10 the md5 that torchvision verified at the
    download was the check, and the stored fingerprint says that nothing has changed since.

    Args:
        root: the cache folder; by default `cache_root()`.
        names: which ones; by default every one that is there.

    Returns:
        One line for each problem; none when all is well.
    """
    root = root or cache_root()
    problems = []
    wanted = _all_names(root) if names is None else tuple(names)
    for name in wanted:
        if name in EMBEDDED:
            continue
        folder = root / name
        if not (_is_name(name) and folder.is_dir()):
            if name in KNOWN and names is not None:
                problems.append(_missing(name, root, "not tried"))
            elif names is not None:
                problems.append(unknown("data set", name, _all_names(root)))
            continue
        try:
            found = _read(folder)
        except _Unreadable as error:
            problems.append(_damaged(folder, str(error)))
            continue
        arrays = found.arrays
        if fingerprint(arrays) != found.fingerprint:
            problems.append(_damaged(folder, "its content has changed since it was packed"))
        elif name in KNOWN and KNOWN[name].content not in (None, content_digest(arrays)):
            problems.append(_damaged(folder, f"it is not the official {name}"))
    if names is None and root.is_dir():
        left = sorted(path for path in root.iterdir() if path.name.startswith(_STAGE))
        problems += [f"{path}: left over from an interrupted download or import; it can be deleted" for path in left]
    return problems


_all_names = names  # `verify` has an argument of that name


# ---------------------------------------------------------------------------------------------------------------- write


def prepare(name: str, root: Path | None = None) -> DataSet:
    """Download a published data set, unless it is in the cache whole, and pack it.

    Raises:
        UserError: there is no such data set, it cannot be reached, or the cache folder cannot be written.
    """
    root = root or cache_root()
    if name not in KNOWN:
        return load(name, root)
    folder = root / name
    if _is_whole(folder):
        return _read(folder)
    with _staging(root) as stage:
        if _is_whole(folder):  # packed by another process while this one waited
            return _read(folder)
        try:
            raw = download(name, stage / "download")
        except Unreachable as error:
            raise UserError(_missing(name, root, str(error))) from None
        return _install(stage, folder, raw, "download")


def import_(name: str, path: Path, root: Path | None = None) -> DataSet:
    """Pack a .npz file (`import_npz`) or a folder of images (`import_folder`) under a name."""
    if path.is_dir():
        return import_folder(name, path, root)
    if path.suffix.lower() != ".npz" and path.exists():
        raise UserError(f"{path}: neither a .npz file nor a folder with train/<class>/*.png and test/<class>/*.png")
    return import_npz(name, path, root)


def import_npz(name: str, file: Path, root: Path | None = None) -> DataSet:
    """Pack a .npz with the keys `x_train, y_train, x_test, y_test` (`read_npz` says what they may hold) under a name.

    Args:
        name: lower-case letters, digits and underscores. Under a published name the content must be the published one.
        file: the archive.
        root: the cache folder; by default `cache_root()`.

    Raises:
        UserError: one line for each thing that is wrong; nothing is written then.
    """
    _may_import(name)
    return _import(name, file, read_npz(file, name), root)


def import_folder(name: str, folder: Path, root: Path | None = None) -> DataSet:
    """Pack `train/<class>/*.png` and `test/<class>/*.png` (`read_folder`) under a name; else like `import_npz`."""
    _may_import(name)
    return _import(name, folder, read_folder(folder, name), root)


def _may_import(name: str) -> None:
    if name in EMBEDDED:
        raise UserError(f"'{name}' is embedded and needs no import; choose another name")
    if not _is_name(name):
        raise UserError(f"'{name}' cannot name a data set; use lower-case letters, digits and underscores")


def _import(name: str, source: Path, raw: Raw, root: Path | None) -> DataSet:
    root = root or cache_root()
    if name in KNOWN and KNOWN[name].content not in (None, content_digest(raw.arrays)):
        raise UserError(f"{source}: its content is not the official {name}; import it under a name of your own")
    with _staging(root) as stage:
        return _install(stage, root / name, raw, "import")


# ---------------------------------------------------------------------------------------------------------------- cache


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[a-z0-9_]+", name) is not None


def _is_packed(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _OURS)


def _embedded(name: str) -> DataSet:
    raw = EMBEDDED[name]()
    mean, std = pixel_moments(raw.arrays["x_train"])
    return _dataset(name, raw.arrays, raw.class_names, mean, std, fingerprint(raw.arrays))


def _dataset(
    name: str,
    arrays: Arrays,
    class_names: tuple[str, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    digest: str,
) -> DataSet:
    groups = (KNOWN[name].superclasses or {}) if name in KNOWN else {}
    above = {fine: index for index, fines in enumerate(groups.values()) for fine in fines}
    superclasses = tuple(above[fine] for fine in class_names) if groups else None
    return DataSet(
        name=name,
        **{key: torch.from_numpy(arrays[key]) for key in KEYS},
        class_names=class_names,
        superclasses=superclasses,
        superclass_names=tuple(groups),
        mean=mean,
        std=std,
        fingerprint=digest,
    )


def _meta(folder: Path) -> dict[str, Any]:
    """Return the parsed `meta.json`. Raises _Unreadable."""
    try:
        meta = json.loads((folder / _META).read_bytes())
    except FileNotFoundError:
        raise _Unreadable(f"{_META} is missing") from None
    except (OSError, ValueError) as error:
        raise _Unreadable(f"{_META}: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise _Unreadable(f"{_META} is not of format {FORMAT}")
    return meta


def _read(folder: Path, test: bool = True) -> DataSet:
    """Return what lies in a folder of the cache, without reading the images. Raises _Unreadable."""
    meta = _meta(folder)
    try:
        arrays = {key: _map(folder / f"{key}.npy", meta["arrays"][key]) for key in KEYS if test or "train" in key}
        arrays |= {key: arrays[key.replace("test", "train")][:0] for key in KEYS if key not in arrays}
        class_names = tuple(map(str, meta["class_names"]))
        mean, std = (tuple(map(float, meta[key])) for key in ("mean", "std"))
        found = _dataset(folder.name, arrays, class_names, mean, std, str(meta["fingerprint"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _Unreadable(f"{_META}: {type(error).__name__} {error}") from None
    if _meta(folder) != meta:  # else the arrays may come from two packings
        raise _Unreadable("it was exchanged while being read")
    return found


def _map(file: Path, described: list[Any]) -> NDArray[np.generic]:
    """Map one array; copy-on-write, so that torch gets writable memory and the file is never changed."""
    try:
        array = np.load(file, mmap_mode="c", allow_pickle=False)
        expected = file.stat().st_size
    except FileNotFoundError:
        raise _Unreadable(f"{file.name} is missing") from None
    except (OSError, ValueError, EOFError) as error:
        raise _Unreadable(f"{file.name}: {error}") from None
    if not isinstance(array, np.memmap) or [array.dtype.str, list(array.shape)] != described:
        raise _Unreadable(f"{file.name} is not the array {_META} describes")
    if array.offset + array.nbytes != expected:
        raise _Unreadable(f"{file.name} has the wrong length")
    return array


def _is_whole(folder: Path) -> bool:
    if folder.is_dir():
        with suppress(_Unreadable):
            found = _read(folder)
            return fingerprint(found.arrays) == found.fingerprint
    return False


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Hold the cache folder's lock. Where there is no lock to be had, renaming alone keeps readers safe."""
    handle = None
    if sys.platform != "win32":
        with suppress(OSError):  # no such folder yet, or a file system without locks
            handle = os.open(root, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """Give a temporary folder inside the locked cache folder; it goes away, as does a cache folder left empty."""
    made = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=_STAGE, dir=root))
    except OSError as error:
        raise UserError(_unwritable(root, error)) from None
    try:
        with _locked(root):
            yield stage
    except OSError as error:
        raise UserError(_unwritable(root, error)) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made:
            with suppress(OSError):
                root.rmdir()


def _install(stage: Path, target: Path, raw: Raw, origin: str) -> DataSet:
    """Pack `raw` inside `stage` and move it to `target`, in place of what is there."""
    mean, std = pixel_moments(raw.arrays["x_train"])
    if target.name in KNOWN:
        mean, std = KNOWN[target.name].mean, KNOWN[target.name].std
    packed = stage / "packed" / target.name
    packed.mkdir(parents=True)
    for key in KEYS:
        np.save(packed / f"{key}.npy", raw.arrays[key])
    meta = {
        "format": FORMAT,
        "name": target.name,
        "origin": origin,
        "pack": secrets.token_hex(8),  # tells this packing from an earlier one of the same content
        "fingerprint": fingerprint(raw.arrays),
        "class_names": raw.class_names,
        "mean": mean,
        "std": std,
        "arrays": {key: [raw.arrays[key].dtype.str, raw.arrays[key].shape] for key in KEYS},
    }
    (packed / _META).write_text(json.dumps(meta, indent=1) + "\n")
    found = _read(packed)  # its files stay mapped wherever they move
    for attempt in range(10):
        with suppress(FileNotFoundError):  # nothing there; or, without a lock, another writer is as far as this
            if target.exists():
                if not target.is_dir() or any(path.name not in _OURS for path in target.iterdir()):
                    raise UserError(f"{target}: holds files that are not clbench's; move it away, or set CLBENCH_DATA")
                target.rename(stage / f"old{attempt}")
        try:
            packed.rename(target)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 9:
                raise
    return found


def _missing(name: str, root: Path, reason: str) -> str:
    ways = f"with network: clbench data prepare {name}; without: clbench data import {name} FILE.npz"
    return f"data set '{name}' is neither in the cache ({root}) nor reachable ({reason}); {ways}"


def _damaged(folder: Path, reason: str) -> str:
    name = folder.name
    again = f"clbench data import {name} FILE.npz"
    mend = f"clbench data prepare {name} (or {again})" if name in KNOWN else again
    return f"{folder}: damaged data set: {reason}; mend it with: {mend}"


def _unwritable(root: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{root}: the cache folder cannot be written ({reason}); set CLBENCH_DATA to a folder that can"
