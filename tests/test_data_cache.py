"""The cache of data sets: memory maps, safe packing, downloads, damage, and folders that cannot be written."""

from __future__ import annotations

import gc
import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from numpy.typing import NDArray

from clbench import data, data_content
from clbench.errors import UserError
from data_factory import Batch, files_under, refusal, save, toy


def packed(name: str) -> list[str]:
    """Return the files of a cache that holds one data set and nothing else."""
    return sorted([name, f"{name}/meta.json", *(f"{name}/{key}.npy" for key in data_content.KEYS)])


# ----------------------------------------------------------------------------------------------------------- the cache


def test_writing_into_a_tensor_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    data.import_npz("toy", save(tmp_path / "toy.npz", toy()), tmp_path / "cache")
    found = data.load("toy", tmp_path / "cache")
    before = found.x_train[0, 0, 0, 0].item()
    found.x_train.fill_(0 if before else 1)
    assert data.load("toy", tmp_path / "cache").x_train[0, 0, 0, 0].item() == before
    assert data.verify(tmp_path / "cache") == []


def test_the_cache_is_clbench_data_then_xdg_then_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLBENCH_DATA", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data.cache_root() == tmp_path / "own"
    monkeypatch.setenv("CLBENCH_DATA", "~/here")
    assert data.cache_root() == tmp_path / "home" / "here"
    monkeypatch.setenv("CLBENCH_DATA", "")
    assert data.cache_root() == tmp_path / "xdg" / "clbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_root() == tmp_path / "home" / ".cache" / "clbench"


def test_status_tells_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    found = data.import_npz("toy", save(tmp_path / "toy.npz", toy()), tmp_path / "cache")
    by_name = {each.name: each for each in data.status(tmp_path / "cache")}
    assert tuple(by_name) == data.names(tmp_path / "cache")
    assert [by_name[name].present for name in ("digits", "synthetic", "mnist", "toy")] == [True, True, False, True]
    # 12 + 6 images of 20 bytes and 12 + 6 labels of 8.
    assert by_name["toy"] == data.Status(
        "toy", True, (12, 6), (1, 5, 4), 3, found.fingerprint, 18 * 20 + 18 * 8, "import"
    )
    assert by_name["mnist"] == data.Status("mnist", False, (60_000, 10_000), (1, 28, 28), 10, "", 0, "")


def test_importing_again_replaces_the_content(tmp_path: Path) -> None:
    old = data.import_npz("toy", save(tmp_path / "a.npz", toy(1)), tmp_path / "cache")
    new = data.import_npz("toy", save(tmp_path / "b.npz", toy(2)), tmp_path / "cache")
    assert data.load("toy", tmp_path / "cache").fingerprint == new.fingerprint != old.fingerprint
    assert data.fingerprint(old.arrays) == old.fingerprint, "who has the old one open keeps it whole"
    assert files_under(tmp_path / "cache") == packed("toy")


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "cache" / "toy").mkdir(parents=True)
    (tmp_path / "cache" / "toy" / "thesis.tex").write_text("years of work")
    (line,) = refusal(lambda: data.import_npz("toy", save(tmp_path / "a.npz", toy()), tmp_path / "cache"))
    assert "not clbench's" in line
    assert files_under(tmp_path / "cache") == ["toy", "toy/thesis.tex"]


@pytest.mark.parametrize("locking", [True, False])
def test_readers_find_one_whole_data_set_while_writers_exchange_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locking: bool
) -> None:
    """Two writers put two contents in turn; every load must have the fingerprint it claims, and one of the two.

    Without locks (some network file systems have none) renaming alone must keep writers from failing and contents from
    mixing; a reader may then find the place empty for a moment.
    """
    if not locking:
        monkeypatch.setattr(data, "_locked", lambda _root: nullcontext())
    cache = tmp_path / "cache"
    sources = [save(tmp_path / f"{seed}.npz", toy(seed)) for seed in (1, 2)]
    allowed = {data.import_npz("toy", source, cache).fingerprint for source in sources}
    failures: list[BaseException] = []

    def write(source: Path) -> None:
        try:
            for _ in range(25):
                data.import_npz("toy", source, cache)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(source,)) for source in sources]
    n_loads = 0
    gc.disable()  # CPython before 3.11.8: a collection while two threads parse (here .npy headers) ends in SystemError
    try:
        for writer in writers:
            writer.start()
        while any(writer.is_alive() for writer in writers):
            try:
                found = data.load("toy", cache)
            except UserError:
                assert not locking
                continue
            assert found.fingerprint in allowed
            assert data.fingerprint(found.arrays) == found.fingerprint
            n_loads += 1
    finally:
        for writer in writers:
            writer.join()
        gc.enable()
    assert failures == []
    assert n_loads > 0
    assert not [path for path in cache.iterdir() if path.name != "toy"]


def test_two_processes_may_pack_the_same_data_set_at_once(tmp_path: Path) -> None:
    file = save(tmp_path / "toy.npz", toy(per_class=300))
    script = (
        "import pathlib, sys, time\n"
        "from clbench import data\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "(here / f'ready{sys.argv[2]}').touch()\n"
        "while not (here / 'go').exists(): time.sleep(0.001)\n"
        "print({data.import_npz('toy', here / 'toy.npz', here / 'cache').fingerprint for _ in range(5)})\n"
    )
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(data.__file__).parents[1])}
    children = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for i in range(2)
    ]
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"ready{i}").exists() for i in range(2)) and time.monotonic() < deadline:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    answers = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], answers
    expected = data.load("toy", tmp_path / "cache").fingerprint
    assert [out for out, _ in answers] == [f"{ {expected} }\n"] * 2
    assert data.verify(tmp_path / "cache") == []
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["toy"], file


# ------------------------------------------------------------------------------------------------------------- download


class FakeCIFAR10:
    """Stands in for `torchvision.datasets.CIFAR10`: writes a file, then yields arrays or fails as asked."""

    failure: BaseException | None = None
    samples = (20, 10)
    calls = 0

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert download
        type(self).calls += 1
        Path(root).mkdir(parents=True, exist_ok=True)
        (Path(root) / "half.tar.gz").write_bytes(b"half")
        if self.failure is not None:
            raise self.failure
        n = self.samples[0 if train else 1]
        self.data = np.full((n, 32, 32, 3), 7 if train else 9, np.uint8)
        self.targets = [i % 10 for i in range(n)]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeCIFAR10]:
    """A CIFAR-10 of 20 + 10 images, in place of torchvision's and of the published size."""
    known = data_content.KNOWN["cifar10"]
    small = data_content.Known(
        known.torchvision_class, known.class_names, known.shape, (20, 10), known.mean, known.std
    )
    monkeypatch.setitem(data_content.KNOWN, "cifar10", small)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    monkeypatch.setattr(FakeCIFAR10, "failure", None)
    monkeypatch.setattr(FakeCIFAR10, "samples", (20, 10))
    monkeypatch.setattr(FakeCIFAR10, "calls", 0)
    return FakeCIFAR10


def test_load_downloads_once_packs_and_leaves_no_archive(fake: type[FakeCIFAR10], tmp_path: Path) -> None:
    first = data.load("cifar10", tmp_path / "cache")
    second = data.load("cifar10", tmp_path / "cache")
    data.prepare("cifar10", tmp_path / "cache")
    assert fake.calls == 2  # train and test, once
    assert first.fingerprint == second.fingerprint
    assert second.shape == (3, 32, 32)
    assert second.mean == (0.4914, 0.4822, 0.4465)
    assert set(second.x_test.flatten().tolist()) == {9}
    assert files_under(tmp_path / "cache") == packed("cifar10")
    assert {each.name: each.origin for each in data.status(tmp_path / "cache")}["cifar10"] == "download"


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("no route to host"),
        urllib.error.HTTPError("http://x", 503, "busy", None, None),  # type: ignore[arg-type]  # no headers needed here
        RuntimeError("File not found or corrupted."),
        TimeoutError("timed out"),
        ConnectionResetError("reset\nby peer"),
        http.client.IncompleteRead(b"half", 100),
        EOFError(),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_failed_download_is_one_line_with_both_ways_out_and_leaves_nothing(
    fake: type[FakeCIFAR10], failure: BaseException, tmp_path: Path
) -> None:
    fake.failure = failure
    for call in (data.load, data.prepare):
        (line,) = refusal(partial(call, "cifar10", tmp_path / "cache"))
        assert "clbench data prepare cifar10" in line
        assert "clbench data import cifar10 FILE.npz" in line
        assert str(tmp_path / "cache") in line
    assert not (tmp_path / "cache").exists()


def test_without_network_torchvision_itself_ends_in_the_same_line(tmp_path: Path) -> None:
    (line,) = refusal(lambda: data.load("fashion_mnist", tmp_path / "cache"))
    assert "neither in the cache" in line
    assert "clbench data import fashion_mnist FILE.npz" in line
    assert not (tmp_path / "cache").exists()


def test_a_download_of_the_wrong_size_is_refused(fake: type[FakeCIFAR10], tmp_path: Path) -> None:
    fake.samples = (20, 20)
    (line,) = refusal(lambda: data.prepare("cifar10", tmp_path / "cache"))
    assert "20 images, cifar10 has 10" in line


def test_a_full_disk_is_told_as_such(fake: type[FakeCIFAR10], tmp_path: Path) -> None:
    fake.failure = OSError(28, "No space left on device")
    (line,) = refusal(lambda: data.prepare("cifar10", tmp_path / "cache"))
    assert "No space left on device" in line
    assert "CLBENCH_DATA" in line
    assert not (tmp_path / "cache").exists()


def test_prepare_mends_a_damaged_download(fake: type[FakeCIFAR10], tmp_path: Path) -> None:
    data.prepare("cifar10", tmp_path / "cache")
    with (tmp_path / "cache" / "cifar10" / "x_train.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    (line,) = data.verify(tmp_path / "cache")
    assert "has changed since it was packed" in line
    assert "clbench data prepare cifar10" in line
    data.prepare("cifar10", tmp_path / "cache")
    assert data.verify(tmp_path / "cache") == []


def test_a_known_set_of_the_right_size_may_come_from_a_file(fake: type[FakeCIFAR10], tmp_path: Path) -> None:
    del fake
    arrays: Batch = {
        "x_train": np.zeros((20, 32, 32, 3), np.uint8), "y_train": np.arange(20) % 10,
        "x_test": np.zeros((10, 32, 32, 3), np.uint8), "y_test": np.arange(10),
    }  # fmt: skip
    found = data.import_("cifar10", save(tmp_path / "c.npz", arrays), tmp_path / "cache")
    assert found.class_names[3] == "cat"


# --------------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_data_set_names_the_nearest_and_the_way_to_bring_ones_own(tmp_path: Path) -> None:
    for call in (data.load, data.prepare):
        (line,) = refusal(partial(call, "fashon_mnist", tmp_path / "cache"))
        assert "Did you mean 'fashion_mnist'?" in line
        assert "clbench data import" in line
    (line,) = refusal(lambda: data.load("../secrets", tmp_path / "cache"))
    assert line.startswith("unknown data set '../secrets'")
    assert data.verify(tmp_path / "cache", ["fashon_mnist"])[0].startswith("unknown data set")
    assert "clbench data prepare mnist" in data.verify(tmp_path / "cache", ["mnist"])[0]


def test_an_unwritable_cache_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    source = save(tmp_path / "toy.npz", toy())
    (line,) = refusal(lambda: data.import_npz("toy", source, tmp_path / "file" / "cache"))
    assert line.startswith(f"{tmp_path / 'file' / 'cache'}: the cache folder cannot be written")
    assert "CLBENCH_DATA" in line
    (line,) = refusal(lambda: data.load("mnist", tmp_path / "file"))
    assert "cannot be written" in line
    assert data.names(tmp_path / "file") == data.names(tmp_path / "nowhere")


def test_a_disk_that_fills_while_packing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "toy.npz", toy())

    def full(file: Path, array: NDArray[Any]) -> None:
        del array
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    (line,) = refusal(lambda: data.import_npz("toy", source, tmp_path / "cache"))
    assert "No space left on device" in line
    assert not (tmp_path / "cache").exists()


def _drop(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).unlink()


def _shorten(file: str, by: int) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / file, max(0, (folder / file).stat().st_size - by))


def _append(file: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes() + b"!")


def _meta(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        file = folder / "meta.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_drop("meta.json"), "meta.json is missing"),
        (_drop("y_test.npy"), "y_test.npy is missing"),
        (_shorten("x_train.npy", 1), "x_train.npy"),
        (_shorten("x_train.npy", 10**9), "x_train.npy"),
        (_append("x_test.npy"), "x_test.npy has the wrong length"),
        (_shorten("meta.json", 5), "meta.json"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "meta.json is not of format"),
        (_meta(format=0), "meta.json is not of format"),
        (_meta(arrays={}), "meta.json: KeyError"),
        (_meta(mean=["x"]), "meta.json: ValueError"),
        (lambda folder: np.save(folder / "y_train.npy", np.zeros(12, np.int32)), "y_train.npy is not the array"),
    ],
)  # fmt: skip
def test_a_damaged_cache_names_the_folder_and_what_mends_it(
    harm: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    source = save(tmp_path / "toy.npz", toy())
    data.import_npz("toy", source, cache)
    harm(cache / "toy")
    (line,) = refusal(lambda: data.load("toy", cache))
    assert line.startswith(f"{cache / 'toy'}: damaged data set: {reason}")
    assert line.endswith("mend it with: clbench data import toy FILE.npz")
    assert data.verify(cache) == [line]
    assert [each.problem for each in data.status(cache) if each.name == "toy"] == [line]
    data.import_npz("toy", source, cache)
    assert data.verify(cache) == []


def test_what_a_killed_import_left_is_named_by_verify_and_harms_nothing(tmp_path: Path) -> None:
    (tmp_path / ".partial-abc").mkdir()
    (line,) = data.verify(tmp_path)
    assert line.startswith(f"{tmp_path / '.partial-abc'}: left over")
    assert data.names(tmp_path) == ("digits", "synthetic", *data_content.KNOWN)
