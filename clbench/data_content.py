"""What a data set is made of, digests that say whether two are the same, and the facts of the published ones.

Letters: N samples, C channels, H and W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

KEYS = ("x_train", "y_train", "x_test", "y_test")
SPLITS = ("train", "test")
Arrays = Mapping[str, NDArray[np.generic]]
"""The arrays of a data set by the names in `KEYS`."""


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set in its own order, on the CPU. Writing into a tensor never reaches the cache.

    Attributes:
        name: what recipes call it.
        x_train: (N, C, H, W) uint8, memory-mapped unless embedded.
        y_train: (N,) int64.
        x_test: (N, C, H, W) uint8.
        y_test: (N,) int64.
        class_names: one a class.
        superclasses: for every class the index of its superclass (CIFAR-100's coarse label), or None.
        superclass_names: in the official order; empty without superclasses.
        mean: per channel on pixels in [0, 1]: the usual published values, else those of the training images.
        std: likewise; 1 for a channel that never changes.
        fingerprint: the first 16 hex digits of the SHA-256 over dtype, shape and bytes of the four arrays.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    class_names: tuple[str, ...]
    superclasses: tuple[int, ...] | None
    superclass_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W of one image."""
        channels, height, width = self.x_train.shape[1:]
        return channels, height, width

    def without_test(self) -> DataSet:
        """Return the data set without its test images and labels: both are empty."""
        return replace(self, x_test=self.x_train[:0], y_test=self.y_train[:0])

    @property
    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The four tensors as NumPy arrays on the same memory, by the names of `KEYS`."""
        return {key: getattr(self, key).numpy() for key in KEYS}


@dataclass(frozen=True, eq=False)
class Raw:
    """A data set in memory, checked.

    Attributes:
        arrays: by the names in `KEYS`: images (N, C, H, W) uint8 and labels (N,) int64, all contiguous.
        class_names: one name a class.
    """

    arrays: dict[str, NDArray[np.generic]]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Known:
    """What is known of a published data set before its first byte is here.

    Attributes:
        torchvision_class: name in `torchvision.datasets`.
        shape: C, H, W.
        samples: images in the training and in the test set.
        mean: per channel, on pixels in [0, 1]: the usual published values.
        std: likewise.
        content: digest of the samples whatever their order (`content_digest`). None for Fashion-MNIST and
            CIFAR-10: there the md5 that torchvision verifies at download is the only check of content.
        superclasses: superclass name -> its classes, in the official order; empty where there are none.
    """

    torchvision_class: str
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    samples: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    content: str | None = None
    superclasses: dict[str, tuple[str, ...]] | None = None


# The 20 superclasses in the order of CIFAR-100's coarse labels (Krizhevsky 2009), five fine classes each.
_CIFAR100 = {
    line.split(": ")[0]: tuple(line.split(": ")[1].split())
    for line in (
        "aquatic_mammals: beaver dolphin otter seal whale",
        "fish: aquarium_fish flatfish ray shark trout",
        "flowers: orchid poppy rose sunflower tulip",
        "food_containers: bottle bowl can cup plate",
        "fruit_and_vegetables: apple mushroom orange pear sweet_pepper",
        "household_electrical_devices: clock keyboard lamp telephone television",
        "household_furniture: bed chair couch table wardrobe",
        "insects: bee beetle butterfly caterpillar cockroach",
        "large_carnivores: bear leopard lion tiger wolf",
        "large_man-made_outdoor_things: bridge castle house road skyscraper",
        "large_natural_outdoor_scenes: cloud forest mountain plain sea",
        "large_omnivores_and_herbivores: camel cattle chimpanzee elephant kangaroo",
        "medium_mammals: fox porcupine possum raccoon skunk",
        "non-insect_invertebrates: crab lobster snail spider worm",
        "people: baby boy girl man woman",
        "reptiles: crocodile dinosaur lizard snake turtle",
        "small_mammals: hamster mouse rabbit shrew squirrel",
        "trees: maple_tree oak_tree palm_tree pine_tree willow_tree",
        "vehicles_1: bicycle bus motorcycle pickup_truck train",
        "vehicles_2: lawn_mower rocket streetcar tank tractor",
    )
}

DIGIT_NAMES = tuple(str(digit) for digit in range(10))

KNOWN: dict[str, Known] = {
    "mnist": Known(
        torchvision_class="MNIST",
        class_names=DIGIT_NAMES,
        shape=(1, 28, 28),
        samples=(60_000, 10_000),
        mean=(0.1307,),
        std=(0.3081,),
        content="a6c45e4618302a08ffca385cd30c1032",
    ),
    "fashion_mnist": Known(
        torchvision_class="FashionMNIST",
        class_names=(
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
        shape=(1, 28, 28),
        samples=(60_000, 10_000),
        mean=(0.2860,),
        std=(0.3530,),
    ),
    "cifar10": Known(
        torchvision_class="CIFAR10",
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        shape=(3, 32, 32),
        samples=(50_000, 10_000),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Known(
        torchvision_class="CIFAR100",
        # Fine labels count through the names in alphabetical order.
        class_names=tuple(sorted(name for group in _CIFAR100.values() for name in group)),
        shape=(3, 32, 32),
        samples=(50_000, 10_000),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        content="a272fcdca6515afb491a6f859c620beb",
        superclasses=_CIFAR100,
    ),
}


# -------------------------------------------------------------------------------------------------------------- digests


def fingerprint(arrays: Arrays) -> str:
    """Return the first 16 hex digits of the SHA-256 over name, dtype, shape and bytes of the arrays in `KEYS`."""
    digest = hashlib.sha256()
    for key in KEYS:
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]


def content_digest(arrays: Arrays) -> str:
    """Return 32 hex digits that name the samples of both splits whatever their order.

    Every sample (pixels, then label) has a BLAKE2b hash of its own; these are sorted and hashed once more, with the
    shape of an image and the name of the split.
    """
    digest = hashlib.blake2b(digest_size=16)
    for split in SPLITS:
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"].astype("<i8")
        digest.update(f"{split} {images.dtype.str} {images.shape[1:]}\n".encode())
        hashes = []
        for image, label in zip(images, labels, strict=True):
            one = hashlib.blake2b(image.tobytes(), digest_size=16)
            one.update(label.tobytes())
            hashes.append(one.digest())
        digest.update(b"".join(sorted(hashes)))
    return digest.hexdigest()


def pixel_moments(images: NDArray[np.generic]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel of (N, C, H, W) uint8 images, on pixels in [0, 1].

    Computed from integer histograms, so the result does not depend on the order of samples or on the machine.
    """
    levels = np.arange(256, dtype=np.int64)
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(images), 1000):  # bincount widens its input eightfold
            counts += np.bincount(images[start : start + 1000, channel].ravel(), minlength=256)
        n, first, second = (int((counts * levels**power).sum()) for power in (0, 1, 2))
        means.append(first / n / 255)
        variance = (n * second - first**2) / n**2
        deviations.append(variance**0.5 / 255 if variance > 0 else 1.0)
    return tuple(means), tuple(deviations)
