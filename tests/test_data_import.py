"""Data sets of a user's own: what goes in comes out, and every mistake has its line and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clbench import data, data_sources
from clbench.errors import UserError
from data_factory import Batch, files_under, refusal, save, toy, write_images

# --------------------------------------------------------------------------------------------------------- round trips


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_classes=st.integers(1, 5),
    per_class=st.integers(1, 4),
    colour=st.booleans(),
    trailing=st.booleans(),
    dtype=st.sampled_from(["u1", "i1", "<i4", ">i4", "i8", "u8"]),
    column=st.booleans(),
)
def test_npz_round_trip_gives_equal_arrays(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    n_classes: int,
    per_class: int,
    colour: bool,
    trailing: bool,
    dtype: str,
    column: bool,
) -> None:
    folder = tmp_path_factory.mktemp("npz")
    arrays = toy(seed, n_classes, per_class, colour)
    stored = dict(arrays)
    for split in ("train", "test"):
        stored[f"y_{split}"] = arrays[f"y_{split}"].astype(dtype).reshape((-1, 1) if column else (-1,))
        if trailing and not colour:
            stored[f"x_{split}"] = arrays[f"x_{split}"][..., None]
    imported = data.import_("toy", save(folder / "toy.npz", stored), folder / "cache")
    loaded = data.load("toy", folder / "cache")
    for split in ("train", "test"):
        images = arrays[f"x_{split}"] if colour else arrays[f"x_{split}"][..., None]
        assert torch.equal(getattr(loaded, f"x_{split}"), torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        assert torch.equal(getattr(loaded, f"y_{split}"), torch.from_numpy(arrays[f"y_{split}"]))
    assert loaded.class_names == tuple(map(str, range(n_classes)))
    assert loaded.fingerprint == imported.fingerprint == data.fingerprint(loaded.arrays)
    assert data.verify(folder / "cache") == []


def test_npz_class_names_are_kept_and_foreign_keys_ignored(tmp_path: Path) -> None:
    arrays = {**toy(), "class_names": np.array(["ant", "bee", "cat"]), "notes": np.array([object()])}
    found = data.import_npz("toy", save(tmp_path / "toy.npz", arrays), tmp_path / "cache")
    assert found.class_names == data.load("toy", tmp_path / "cache").class_names == ("ant", "bee", "cat")


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("class_names", [["ant", "bee", "cat"], ["8", "9", "10"]])
def test_folder_of_png_equals_the_same_images_as_npz(tmp_path: Path, colour: bool, class_names: list[str]) -> None:
    """Folders are read class by class, so the order differs and the content does not; "10" counts after "9"."""
    arrays = toy(colour=colour)
    write_images(tmp_path / "images", arrays, class_names)
    from_folder = data.import_("pictures", tmp_path / "images", tmp_path / "cache")
    from_npz = data.import_("numbers", save(tmp_path / "toy.npz", arrays), tmp_path / "cache")
    assert from_folder.class_names == tuple(class_names)
    assert data.content_digest(from_folder.arrays) == data.content_digest(from_npz.arrays)
    assert from_folder.y_train.tolist() == sorted(arrays["y_train"].tolist())


def test_a_grey_png_among_rgb_ones_becomes_rgb(tmp_path: Path) -> None:
    write_images(tmp_path / "images", toy(colour=True), ["a", "b", "c"])
    Image.new("L", (4, 5), 7).save(tmp_path / "images" / "train" / "a" / "000.png")
    found = data.import_folder("mixed", tmp_path / "images", tmp_path / "cache")
    assert found.shape == (3, 5, 4)
    assert set(found.x_train[0].flatten().tolist()) == {7}


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name", ["digits", "synthetic", "My-Data", "", "a/b", ".."])
def test_names_that_may_not_be_imported(name: str, tmp_path: Path) -> None:
    file = save(tmp_path / "a.npz", toy())
    (line,) = refusal(lambda: data.import_(name, file, tmp_path / "cache"))
    assert f"'{name}'" in line


def replaced(**changes: Any) -> Batch:
    return {**toy(), **changes}


LABELS, TESTS = toy()["y_train"], toy()["y_test"]


NO_IMAGES = np.zeros((0, 5, 4), np.uint8)
ZERO_IS_NEGATIVE, TWO_IS_SEVEN = np.where(LABELS == 0, -1, LABELS), np.where(TESTS == 2, 7, TESTS)
MISTAKES: list[tuple[Batch, list[str]]] = [
    ({"X_train": LABELS, "y_train": LABELS}, ["'x_train' is missing. Did you mean 'X_train'?", "'x_test'", "'y_test'"]),
    (replaced(x_train=np.zeros((12, 5, 4), np.float32)), ["x_train: float32 12 x 5 x 4; expected uint8"]),
    (replaced(x_train=np.zeros((12, 20), np.uint8)), ["x_train: uint8 12 x 20; expected N x H x W"]),
    (replaced(x_train=np.zeros((12, 3, 5, 4), np.uint8)), ["x_train: uint8 12 x 3 x 5 x 4; expected N x H x W"]),
    (replaced(x_train=np.array(3, np.uint8)), ["x_train: uint8 scalar", "y_train: 12 labels for 0 images"]),
    (replaced(x_test=np.zeros((6, 4, 4), np.uint8)), ["x_test: images of (1, 4, 4), x_train has (1, 5, 4)"]),
    (replaced(x_test=NO_IMAGES, y_test=TESTS[:0]), ["x_test: uint8 0 x 5 x 4; there is nothing in it"]),
    (replaced(y_train=LABELS.astype(float)), ["y_train: float64 12; expected integer labels"]),
    (replaced(y_train=np.eye(3, dtype=int)[LABELS]), ["y_train: int64 12 x 3; expected labels of shape N or N x 1"]),
    (replaced(y_train=LABELS[:-1]), ["y_train: 11 labels for 12 images"]),
    (replaced(y_train=ZERO_IS_NEGATIVE), ["y_train: label -1 is out of range 0 to 2", "y_train: 2 of 3 classes"]),
    (replaced(y_train=LABELS + 1, y_test=TESTS + 1), ["y_train: 3 of 4 classes; class 0 has no", "y_test: 3 of 4"]),
    (replaced(y_test=TWO_IS_SEVEN), ["y_test: label 7 is out of range 0 to 2", "y_test: 2 of 3 classes; class 2"]),
    (replaced(y_train=np.where(LABELS == 2, 10**12, LABELS)), ["class 2 has no images", "class 3 has no images"]),
    (replaced(class_names=np.array(["a", "b"])), ["y_train: label 2 is out of range 0 to 1", "y_test: label 2"]),
    (replaced(class_names=np.array(["a", "b", "a"])), ["class_names: a name is empty or there twice"]),
    (replaced(class_names=np.array([1, 2, 3])), ["class_names: int64 3; expected a one-dimensional array of text"]),
    (replaced(y_train=np.array([object()] * 12)), ["y_train: holds Python objects"]),
    (replaced(x_train=np.zeros((12, 5, 4)), y_test=TESTS.astype(float)), ["x_train: float64", "y_test: float64"]),
]


@pytest.mark.parametrize(("arrays", "expected"), MISTAKES)
def test_every_mistake_in_an_npz_has_its_line(arrays: Batch, expected: list[str], tmp_path: Path) -> None:
    file = save(tmp_path / "bad.npz", arrays)
    lines = refusal(lambda: data.import_("toy", file, tmp_path / "cache"))
    assert len(lines) == len(expected), lines
    for line, part in zip(lines, expected, strict=True):
        assert part in line
        assert line.startswith(f"{file}: ")
    assert files_under(tmp_path / "cache") == []


def test_wrong_keys_list_what_is_there(tmp_path: Path) -> None:
    file = save(tmp_path / "bad.npz", {"images": np.zeros(3), "labels": np.zeros(3)})
    lines = refusal(lambda: data.import_npz("toy", file, tmp_path / "cache"))
    assert len(lines) == 4
    assert all("There are: images, labels" in line for line in lines)


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, -1])
def test_a_truncated_npz_is_refused(keep: float, tmp_path: Path) -> None:
    whole = save(tmp_path / "toy.npz", toy()).read_bytes()
    cut = tmp_path / "cut.npz"
    cut.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else int(keep)])
    (line,) = refusal(lambda: data.import_("toy", cut, tmp_path / "cache"))
    assert line.startswith(f"{cut}: ")
    assert "truncated" in line or "damaged" in line
    assert files_under(tmp_path / "cache") == []


def outcome(call: Callable[[], data.DataSet]) -> data.DataSet | UserError:
    try:
        return call()
    except UserError as error:
        return error


@settings(max_examples=60, deadline=None)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), compressed=st.booleans())
def test_an_npz_with_one_flipped_bit_is_refused_or_read_unchanged(
    tmp_path_factory: pytest.TempPathFactory, where: float, bit: int, compressed: bool
) -> None:
    """Zip keeps a CRC of every member: a flip is found, unless it falls on a byte without meaning (such as a date)."""
    folder = tmp_path_factory.mktemp("flip")
    file = folder / "toy.npz"
    (np.savez_compressed if compressed else np.savez)(file, allow_pickle=True, **toy())
    intact = data.import_("whole", file, folder / "cache").fingerprint
    content = bytearray(file.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    file.write_bytes(content)
    answer = outcome(lambda: data.import_("toy", file, folder / "cache"))
    if isinstance(answer, UserError):
        assert all(line.startswith(str(file)) and "\n" not in line for line in answer.lines)
        assert "toy" not in data.names(folder / "cache")
    else:
        assert answer.fingerprint == intact


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    for file, expected in [
        ("one.npy", "neither a .npz file nor a folder"),
        ("text.npz", "truncated, or not a .npz archive"),
        ("gone.npz", "no such file"),
        ("gone", "no such file"),
    ]:
        (line,) = refusal(partial(data.import_, "toy", tmp_path / file, tmp_path / "cache"))
        assert line == f"{tmp_path / file}: {line.split(': ', 1)[1]}"
        assert expected in line


def test_a_known_name_with_other_sizes_and_classes_lists_every_difference(tmp_path: Path) -> None:
    file = save(tmp_path / "m.npz", {**toy(), "class_names": np.array(["a", "b", "c"])})
    lines = refusal(lambda: data.import_("mnist", file, tmp_path / "cache"))
    for line, part in zip(
        lines,
        [
            "images of (1, 5, 4), mnist has (1, 28, 28)",
            "x_train: 12 images, mnist has 60,000",
            "x_test: 6 images, mnist has 10,000",
            "class_names: 3 of them, not mnist's 10 classes",
            "y_train: 3 of 10 classes; class 3 has no images",
            "y_test: 3 of 10 classes; class 3 has no images",
        ],
        strict=True,
    ):
        assert part in line


def test_folder_mistakes_each_have_their_line(tmp_path: Path) -> None:
    names = ["ant", "bee", "cat"]

    def lines_of(folder: str) -> tuple[str, ...]:
        return refusal(lambda: data.import_("toy", tmp_path / folder, tmp_path / "cache"))

    (tmp_path / "notest" / "train").mkdir(parents=True)
    assert "has no folder 'test'" in lines_of("notest")[0]
    (tmp_path / "notest" / "test").mkdir(parents=True)
    assert ["has no class folders" in line for line in lines_of("notest")] == [True, True]

    write_images(tmp_path / "empty", toy(), names, skip="test/bee")
    (line,) = lines_of("empty")
    assert line.startswith(f"{tmp_path / 'empty' / 'test' / 'bee'}: empty class folder")

    write_images(tmp_path / "renamed", toy(), names)
    (tmp_path / "renamed" / "test" / "bee").rename(tmp_path / "renamed" / "test" / "beee")
    lines = lines_of("renamed")
    assert "class 'bee' is not in test. Did you mean 'beee'?" in lines[0]
    assert "class 'beee' is not in train. Did you mean 'bee'?" in lines[1]

    write_images(tmp_path / "several", toy(), names)
    cats = tmp_path / "several" / "train" / "cat"
    Image.new("L", (6, 5)).save(cats / "z0.png")
    Image.new("RGBA", (4, 5)).save(cats / "z1.png")
    Image.new("I;16", (4, 5)).save(cats / "z2.png")
    (cats / "z3.png").write_bytes((cats / "z0.png").read_bytes()[:40])
    (cats / "z4.png").write_text("not an image")
    (cats / "ZZ.jpg").touch()
    (cats / ".hidden").touch()
    lines = lines_of("several")
    expected = ["ZZ.jpg: not a .png", "z0.png: 6x5 pixels, the first image has 4x5", "z1.png: mode RGBA"]
    expected += ["z2.png: mode I;16", "z3.png: damaged", "z4.png: damaged"]
    assert len(lines) == len(expected), lines
    assert all(part in line for part, line in zip(expected, lines, strict=True))
    assert files_under(tmp_path / "cache") == []


def test_a_folder_with_many_mistakes_counts_the_rest(tmp_path: Path) -> None:
    write_images(tmp_path / "images", toy(per_class=10), ["a", "b", "c"])
    for file in (tmp_path / "images").rglob("*.png"):
        file.write_bytes(b"")
    lines = refusal(lambda: data.import_folder("toy", tmp_path / "images", tmp_path / "cache"))
    assert len(lines) == data_sources.MAX_LINES + 1
    assert "and 26 more" in lines[-1]  # 3 x (10 + 2) files, ten of them told


def test_a_known_name_wants_its_own_class_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "images", toy(), ["cat", "dog", "airplan"])
    (line,) = refusal(lambda: data.import_folder("cifar10", tmp_path / "images", tmp_path / "cache"))
    assert "'airplan'). Did you mean 'airplane'?" in line
