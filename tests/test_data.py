"""Data sets: what `load` returns, the digests that say whether two are the same, and the real data where they are."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from clbench import data, data_content
from data_factory import files_under, refusal, save

# ------------------------------------------------------------------------------------------------------------- embedded


def test_digits_are_the_1797_real_ones_scaled_to_bytes_and_split_by_class() -> None:
    """Intensity v in 0..16 becomes round(255 v / 16): 0 -> 0, 8 -> 127.5 -> 128, 16 -> 255.

    A class of n images gives floor(n / 5) test images; the ten classes have 174 to 183 images, so 34 to 36 each.
    """
    digits = data.load("digits")
    assert len(digits.y_train) + len(digits.y_test) == 1797
    assert (len(digits.y_train), len(digits.y_test)) == (1442, 355)
    assert digits.shape == (1, 8, 8)
    assert digits.x_train.dtype == torch.uint8
    assert digits.y_train.dtype == torch.int64
    assert set(digits.x_train.flatten().tolist()) == {(255 * v + 8) // 16 for v in range(17)}
    counts = digits.y_train.bincount() + digits.y_test.bincount()
    assert torch.equal(digits.y_test.bincount(), counts // 5)


@pytest.mark.parametrize(("name", "expected"), [("digits", "bee2a9204b3aee1c"), ("synthetic", "dbd10f5deb3fe778")])
def test_embedded_data_never_change(name: str, expected: str) -> None:
    """Records carry these fingerprints: another value here means that old records can no longer be compared."""
    assert data.load(name).fingerprint == expected


def test_synthetic_is_learnable() -> None:
    """A linear softmax classifier after 60 full-batch steps of Adam answers more than 90 % of the test images."""
    toy_world = data.load("synthetic")
    assert (toy_world.n_classes, toy_world.shape, len(toy_world.y_train), len(toy_world.y_test)) == (
        8, (1, 8, 8), 1600, 400,
    )  # fmt: skip
    train, test = (x.flatten(1).float() / 255 - toy_world.mean[0] for x in (toy_world.x_train, toy_world.x_test))
    weight = torch.zeros(64, 8, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(train @ weight, toy_world.y_train).backward()  # type: ignore[no-untyped-call]  # torch leaves backward untyped
        optimizer.step()
    assert ((test @ weight).argmax(1) == toy_world.y_test).float().mean() > 0.9


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_embedded_mean_and_std_are_those_of_the_training_pixels(name: str) -> None:
    found = data.load(name)
    pixels = found.x_train.double() / 255
    assert found.mean == pytest.approx([pixels.mean().item()], abs=1e-12)
    assert found.std == pytest.approx([pixels.std(correction=0).item()], abs=1e-12)


def test_pixel_moments_by_hand() -> None:
    """Channel 0 holds 0 and 255 equally often: mean 1/2, deviation 1/2. Channel 1 is constant 51 = 255/5: mean 0.2.

    A deviation of 0 is told as 1, so that dividing by it is harmless.
    """
    images = np.zeros((2, 2, 1, 1), np.uint8)
    images[1, 0] = 255
    images[:, 1] = 51
    assert data.pixel_moments(images) == ((0.5, 0.2), (0.5, 1.0))


# -------------------------------------------------------------------------------------------------------------- digests


def test_one_changed_pixel_label_or_shape_changes_both_digests() -> None:
    base = data.load("digits").arrays
    digests = {data.fingerprint(base)}, {data.content_digest(base)}
    for key in data_content.KEYS:
        other: NDArray[Any] = base[key].copy()
        other.flat[3] += 1
        changed = {**base, key: other}
        assert data.fingerprint(changed) not in digests[0]
        assert data.content_digest(changed) not in digests[1]
        digests[0].add(data.fingerprint(changed))
        digests[1].add(data.content_digest(changed))
    wide = {**base, "x_train": base["x_train"].reshape(-1, 1, 4, 16), "x_test": base["x_test"].reshape(-1, 1, 4, 16)}
    assert data.fingerprint(wide) not in digests[0]
    assert data.content_digest(wide) not in digests[1]


def test_the_content_digest_ignores_the_order_of_samples_and_the_fingerprint_does_not() -> None:
    base = data.load("digits").arrays
    order = np.random.default_rng(0).permutation(len(base["y_train"]))
    mixed = {**base, "x_train": base["x_train"][order], "y_train": base["y_train"][order]}
    assert data.content_digest(mixed) == data.content_digest(base)
    assert data.fingerprint(mixed) != data.fingerprint(base)


def test_the_content_digest_sees_swapped_labels_and_swapped_splits() -> None:
    """Same images, same labels, other pairs: every sample is hashed together with its label and its split."""
    base = data.load("digits").arrays
    rolled = {**base, "y_train": np.roll(base["y_train"], 1)}
    exchange = {"x_train": "x_test", "y_train": "y_test", "x_test": "x_train", "y_test": "y_train"}
    swapped = {key: base[other] for key, other in exchange.items()}
    assert len({data.content_digest(each) for each in (base, rolled, swapped)}) == 3


# --------------------------------------------------------------------------------------------------------- superclasses


def test_cifar100_has_20_superclasses_of_five_classes_in_alphabetical_fine_order() -> None:
    """Spot checks from the official lists: apple (0) is a fruit (coarse label 4), worm (99) a non-insect (13)."""
    known = data_content.KNOWN["cifar100"]
    assert known.superclasses is not None
    assert len(known.class_names) == len(set(known.class_names)) == 100
    assert list(known.class_names) == sorted(known.class_names)
    assert [len(group) for group in known.superclasses.values()] == [5] * 20
    names = list(known.superclasses)
    assert (known.class_names[0], known.class_names[99]) == ("apple", "worm")
    assert "apple" in known.superclasses[names[4]]
    assert "worm" in known.superclasses[names[13]]


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.data
@pytest.mark.parametrize("name", ["mnist", "cifar100"])
def test_real_data_have_the_published_size_classes_and_moments(data_root: Path, name: str) -> None:
    """The published mean and deviation have four digits, so the training pixels' own lie within half of the last."""
    known, found = data_content.KNOWN[name], data.load(name, data_root)
    assert (len(found.y_train), len(found.y_test)) == known.samples
    assert found.shape == known.shape
    assert found.class_names == known.class_names
    assert (found.mean, found.std) == (known.mean, known.std)
    mean, std = data.pixel_moments(found.x_train.numpy())
    assert mean == pytest.approx(known.mean, abs=0.5001e-4)
    assert std == pytest.approx(known.std, abs=0.5001e-4)
    assert data.verify(data_root, [name]) == []


@pytest.mark.data
def test_cifar100_classes_have_500_training_images_and_superclasses_2500(data_root: Path) -> None:
    found = data.load("cifar100", data_root)
    assert found.superclasses is not None
    assert found.y_train.bincount().tolist() == [500] * 100
    assert torch.tensor(found.superclasses)[found.y_train].bincount().tolist() == [2500] * 20
    assert found.superclass_names[found.superclasses[found.class_names.index("whale")]] == "aquatic_mammals"


@pytest.mark.data
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_cifar100_maps_its_files_and_reads_none_of_the_images(data_root: Path) -> None:
    """The 154 MB of training images must lie inside the mapping of their file, and must not become resident."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    data.load("synthetic")
    before = resident()
    found = data.load("cifar100", data_root)
    assert resident() - before < 8 * 2**20
    address = found.x_train.data_ptr()
    file = str((data_root / "cifar100" / "x_train.npy").resolve())
    ranges = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(file)]
    assert any(int(low, 16) <= address < int(high, 16) for low, high in (each.split("-") for each in ranges))


@pytest.mark.data
def test_mnist_with_one_pixel_changed_is_refused_as_not_the_official_data(data_root: Path, tmp_path: Path) -> None:
    arrays = {key: array.copy() for key, array in data.load("mnist", data_root).arrays.items()}
    arrays["x_train"] = arrays["x_train"][:, 0]
    arrays["x_test"] = arrays["x_test"][:, 0]
    arrays["x_test"][0, 0, 0] ^= 1
    file = save(tmp_path / "mnist.npz", arrays)
    (line,) = refusal(lambda: data.import_("mnist", file, tmp_path / "cache"))
    assert "not the official mnist" in line
    assert files_under(tmp_path / "cache") == []
