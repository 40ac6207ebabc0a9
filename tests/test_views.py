"""Pixel maps, normalisation and augmentation, against images small enough to check by eye."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clbench.views import CropFlip, PixelMap, View

IMAGE = torch.tensor([[10, 20], [30, 40]], dtype=torch.uint8)[None, None]
"""1 x 1 x 2 x 2; pixels are numbered 0 1 / 2 3, and 4 shows a zero."""


def pixel_map(source: list[int], shape: tuple[int, int], n_stored: int = 4) -> PixelMap:
    return PixelMap(torch.tensor(source), shape, n_stored in source)


def test_a_permutation_shows_each_input_pixel_its_stored_one() -> None:
    """Input pixel k shows stored pixel p[k], p = 3 1 0 2: 40 20 / 10 30."""
    shown = pixel_map([3, 1, 0, 2], (2, 2))(IMAGE)
    assert shown.tolist() == [[[[40, 20], [10, 30]]]]


def test_padding_shows_zeros() -> None:
    """One column of zeros on either side of 10 20 / 30 40."""
    shown = pixel_map([4, 0, 1, 4, 4, 2, 3, 4], (2, 4))(IMAGE)
    assert shown.tolist() == [[[[0, 10, 20, 0], [0, 30, 40, 0]]]]


def test_every_channel_and_sample_goes_through_the_same_map() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2)
    shown = pixel_map([3, 4, 0, 1], (2, 2))(images)
    for sample in range(2):
        for channel in range(3):
            a, b, _, d = images[sample, channel].flatten().tolist()
            assert shown[sample, channel].flatten().tolist() == [d, 0, a, b]


def test_a_moved_map_maps_alike() -> None:
    moved = pixel_map([3, 4, 0, 1], (2, 2)).to(torch.device("cpu"))
    assert moved(IMAGE).flatten().tolist() == [40, 0, 10, 20]


def test_pixels_alone_are_divided_by_255() -> None:
    x = View(None, None, None)(IMAGE)
    assert x.dtype == torch.float32
    assert torch.equal(x, IMAGE.float() / 255)


def test_normalisation_comes_after_padding() -> None:
    """A padded pixel is black: (0 - 0.5) / 0.25 = -2; 51 is a fifth: (0.2 - 0.5) / 0.25 = -1.2."""
    images = torch.tensor([[[[51]]]], dtype=torch.uint8)
    half, quarter = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.25)
    view = View(pixel_map([1, 0], (1, 2), n_stored=1), half, quarter)
    torch.testing.assert_close(view(images), torch.tensor([[[[-2.0, -1.2]]]]))


def test_each_channel_has_its_own_mean_and_deviation() -> None:
    """255 is 1: (1 - 0.5) / 0.5 = 1 and (1 - 0.2) / 0.4 = 2."""
    images = torch.full((1, 2, 1, 1), 255, dtype=torch.uint8)
    view = View(None, torch.tensor([0.5, 0.2]).view(1, 2, 1, 1), torch.tensor([0.5, 0.4]).view(1, 2, 1, 1))
    torch.testing.assert_close(view(images).flatten(), torch.tensor([1.0, 2.0]))


def test_what_is_seen_and_normalised_later_is_the_input() -> None:
    """A learner that stores `seen` bytes and normalises them when it needs them trains on the very same numbers."""
    view = View(pixel_map([3, 4, 0, 1], (2, 2)), torch.full((1, 1, 1, 1), 0.13), torch.full((1, 1, 1, 1), 0.31))
    seen = view.seen(IMAGE)
    assert seen.dtype == torch.uint8
    assert torch.equal(view.normalise(seen.to(torch.float32)), view(IMAGE))


def test_a_view_leaves_the_stored_images_alone() -> None:
    images = IMAGE.clone()
    View(None, torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.5))(images)
    assert torch.equal(images, IMAGE)


# -------------------------------------------------------------------------------------------------------- augmentation


def crop_and_flip(x: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Crop and flip sample by sample, with slices: the reference. Draws offsets, then flips, as `CropFlip` does."""
    batch, _, height, width = x.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, batch), generator=generator).T.tolist()
    flips = torch.rand(batch, generator=generator) < 0.5
    samples = []
    for sample, (row, column), flip in zip(x, offsets, flips, strict=True):
        padded = torch.nn.functional.pad(sample, (padding, padding, padding, padding))
        crop = padded[:, row : row + height, column : column + width]
        samples.append(crop.flip(2) if flip else crop)
    return torch.stack(samples)


@pytest.mark.parametrize(
    ("shape", "padding"), [((50, 3, 8, 8), 4), ((20, 1, 5, 7), 2), ((1, 2, 4, 3), 1), ((6, 1, 3, 3), 0)]
)
def test_a_batch_is_cropped_and_flipped_as_one_by_one(shape: tuple[int, ...], padding: int) -> None:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    batched = CropFlip(padding).batch(x, torch.Generator().manual_seed(2))
    assert torch.equal(batched, crop_and_flip(x, padding, torch.Generator().manual_seed(2)))


def test_a_crop_without_flips_draws_offsets_alone_and_pads_with_its_border() -> None:
    """Two channels with borders -1 and -2; the reference shifts the image by its border, pads zeros, shifts back."""
    x = torch.rand(40, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    found = CropFlip(2, flip=False, border=(-1.0, -2.0)).batch(x, torch.Generator().manual_seed(2))
    offsets = torch.randint(0, 5, (2, 40), generator=torch.Generator().manual_seed(2)).T.tolist()
    border = torch.tensor([-1.0, -2.0]).view(2, 1, 1)
    for sample, crop, (row, column) in zip(x, found, offsets, strict=True):
        padded = torch.nn.functional.pad(sample - border, (2, 2, 2, 2)) + border
        torch.testing.assert_close(crop, padded[:, row : row + 5, column : column + 4])


def test_one_sample_is_a_batch_of_one() -> None:
    x = torch.rand(3, 8, 8)
    torch.manual_seed(3)
    alone = CropFlip()(x)
    torch.manual_seed(3)
    assert torch.equal(alone, CropFlip().batch(x[None])[0])


def test_augmentation_draws_from_its_generator_alone() -> None:
    before = torch.get_rng_state()
    CropFlip().batch(torch.rand(4, 1, 6, 6, generator=torch.Generator()), torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentations_of_equal_padding_are_equal() -> None:
    """Every task has its own object; a buffer over several tasks still goes through one augmentation."""
    assert CropFlip() == CropFlip(4) != CropFlip(2)
