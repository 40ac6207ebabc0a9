"""Task streams: which pixels, samples, labels and task names a recipe and a seed give, by hand and as papers do."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.utils
import torch
from PIL import Image
from torch import Tensor

from clbench import data
from clbench.data import DataSet
from clbench.loading import TensorTask, task_index, tasks_in
from clbench.specs import PermutedStream, Pixels, RotatedStream, SplitPart, SplitStream
from clbench.streams import Stream, angles, class_groups, make_stream, permutations
from clbench.views import CropFlip
from data_factory import refusal

CPU = torch.device("cpu")
DIGITS = data.load("digits")
SYNTHETIC = data.load("synthetic")


def permuted(**keys: Any) -> PermutedStream:
    return PermutedStream(**{"kind": "permuted", "dataset": "digits", "n_tasks": 4, "scenario": "domain"} | keys)


def rotated(**keys: Any) -> RotatedStream:
    base = {"kind": "rotated", "dataset": "digits", "n_tasks": 4, "scenario": "domain", "angles": "increasing"}
    return RotatedStream(**base | keys)


def part(**keys: Any) -> SplitPart:
    return SplitPart(**{"dataset": "digits", "n_tasks": 2, "classes_per_task": 2} | keys)


def split(*parts: SplitPart, **keys: Any) -> SplitStream:
    return SplitStream(**{"kind": "split", "parts": list(parts) or [part()], "scenario": "task"} | keys)


def build(spec: PermutedStream | RotatedStream | SplitStream, seed: int = 0) -> Stream:
    return make_stream(spec, seed, CPU)


def shown(task: TensorTask, images: Tensor) -> Tensor:
    """Return what a task shows of images, in uint8."""
    return task.view.seen(images)


def maps(stream: Stream) -> list[list[int]]:
    """Return every task's pixel map."""
    return [task.view.pixels.source.tolist() for task in stream.train if task.view.pixels is not None]


# -------------------------------------------------------------------------------------------------------- permutations


@pytest.mark.parametrize("seed", [0, 3])
def test_gpm_permutations_are_those_of_its_code(seed: int) -> None:
    """The code of GPM shuffles the task numbers with the run's seed, and task i, of number r, with r * 100 + i.

    It shuffles the flattened image itself, so here the image is shuffled too, not the pixel numbers.
    """
    stream = build(permuted(n_tasks=10, permutations="gpm"), seed)
    numbers = sklearn.utils.shuffle(list(range(10)), random_state=seed)
    image = DIGITS.x_train[7:8]
    for i, (r, task) in enumerate(zip(numbers, stream.train, strict=True)):
        expected = sklearn.utils.shuffle(image.flatten().numpy(), random_state=r * 100 + i)
        assert shown(task, image).flatten().tolist() == expected.tolist()


def test_den_permutations_are_successive_calls_after_one_seed() -> None:
    """DEN seeds NumPy's global generator with 1004 once and permutes once a task, the first task included."""
    generator = np.random.RandomState(1004)
    expected = [generator.permutation(64).tolist() for _ in range(4)]
    stream = build(permuted(permutations="sequential", permutation_seed=1004), seed=5)
    assert maps(stream) == expected


def test_hnet_leaves_the_first_task_and_permutes_the_others() -> None:
    """The identity takes no number from the generator: the second task has its first permutation."""
    generator = np.random.RandomState(42)
    expected = [list(range(64)), *(generator.permutation(64).tolist() for _ in range(3))]
    spec = permuted(permutations="sequential", permutation_seed=42, identity_first=True)
    assert maps(build(spec)) == expected


@pytest.mark.parametrize("kind", ["seeded", "sequential", "gpm"])
def test_permutations_follow_the_seed_unless_it_is_pinned(kind: str) -> None:
    free = permuted(permutations=kind)
    first, again, other = (maps(build(free, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert len({tuple(order) for order in first}) == 4
    assert all(sorted(order) == list(range(64)) for order in first)
    pinned = permuted(permutations=kind, permutation_seed=7)
    assert maps(build(pinned, 1)) == maps(build(pinned, 2)) != first


@pytest.mark.parametrize("kind", ["seeded", "gpm"])
def test_the_identity_may_come_first_and_moves_no_other_task(kind: str) -> None:
    with_identity, without = (maps(build(permuted(permutations=kind, identity_first=on))) for on in (True, False))
    assert with_identity[0] == list(range(64)) != without[0]
    assert with_identity[1:] == without[1:]


def test_a_seeded_task_keeps_its_permutation_in_a_longer_stream() -> None:
    assert maps(build(permuted(n_tasks=6)))[:4] == maps(build(permuted(n_tasks=4)))


def test_train_and_test_images_are_permuted_alike() -> None:
    stream = build(permuted())
    for train, test in zip(stream.train, stream.test, strict=True):
        assert train.view is test.view


def test_padding_comes_before_the_permutation() -> None:
    """8 x 8 with two zeros on every side is 12 x 12, and 144 pixels are permuted: border and image mix."""
    stream = build(permuted(pad=2))
    assert stream.input_shape == (1, 12, 12)
    image = DIGITS.x_train[3:4]
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2)).flatten()
    for task, order in zip(stream.train, permutations(permuted(pad=2), 0, 144), strict=True):
        assert torch.equal(shown(task, image).flatten(), padded[torch.from_numpy(order)])


def test_all_tasks_share_one_copy_of_the_images() -> None:
    stream = build(permuted(n_tasks=10, validation=0.1))
    for tasks in (stream.train + stream.validation, stream.test):
        assert len({task.images.data_ptr() for task in tasks}) == 1
    assert stream.train[0].images.dtype == torch.uint8


# ------------------------------------------------------------------------------------------------------------ rotation


@pytest.mark.parametrize("pad", [0, 2])
def test_rotated_images_are_pillow_rotations_to_the_pixel(pad: int) -> None:
    """Angles 0, 45, ..., 315 and, from a third of that, odd ones."""
    images = DIGITS.x_train[:6]
    for n_tasks, max_degrees in ((8, 360.0), (7, 100.0)):
        stream = build(rotated(n_tasks=n_tasks, max_degrees=max_degrees, pad=pad))
        for task, angle in zip(stream.train, angles(rotated(n_tasks=n_tasks, max_degrees=max_degrees), 0), strict=True):
            for image, seen in zip(images, shown(task, images), strict=True):
                padded = np.pad(image[0].numpy(), pad)
                turned = Image.fromarray(padded).rotate(angle, Image.Resampling.NEAREST)
                assert np.array_equal(seen[0].numpy(), np.asarray(turned))


def test_a_quarter_turn_goes_counter_clockwise() -> None:
    """90 degrees: the top right corner comes to the top left."""
    stream = build(rotated(n_tasks=2, max_degrees=180))
    image = DIGITS.x_train[:1]
    assert torch.equal(shown(stream.train[1], image), torch.rot90(image, 1, (2, 3)))


def test_increasing_angles_need_no_chance() -> None:
    assert angles(rotated(n_tasks=4, max_degrees=180), 0) == angles(rotated(n_tasks=4), 9) == [0, 45, 90, 135]


def test_binned_angles_stay_in_their_bins() -> None:
    """Five bins of 36 degrees; the next run's angles are others."""
    for seed in range(20):
        found = angles(rotated(n_tasks=5, angles="bins"), seed)
        assert all(index * 36 <= angle < (index + 1) * 36 for index, angle in enumerate(found))
    assert angles(rotated(angles="bins"), 0) != angles(rotated(angles="bins"), 1)


def test_independent_angles_fill_the_range_in_any_order() -> None:
    found = angles(rotated(n_tasks=200, angles="independent", max_degrees=90), 0)
    assert 0 <= min(found) < 5
    assert 85 < max(found) <= 90
    assert any(one > other for one, other in pairwise(found))


def test_angles_may_be_pinned() -> None:
    pinned = rotated(angles="independent", angle_seed=3)
    assert angles(pinned, 0) == angles(pinned, 1) != angles(rotated(angles="independent"), 0)


# --------------------------------------------------------------------------------------------------------------- split


def originals(task: TensorTask, source: DataSet, test: bool = False) -> list[int]:
    """Return the classes of a task's samples as the data set numbers them."""
    labels: list[int] = (source.y_test if test else source.y_train)[task.rows].tolist()
    return labels


@pytest.mark.parametrize(
    ("scenario", "outputs", "labels"),
    [
        ("task", [[0, 1], [0, 1, 2]], [0, 1]),
        ("domain", [[0, 1], [0, 1, 2]], [0, 0]),
        ("class", [[0, 1], [2, 3, 4]], [0, 0]),
    ],
)
def test_labels_are_numbered_as_the_scenario_says(scenario: str, outputs: list[list[int]], labels: list[int]) -> None:
    """Classes 7, 2 and then 5, 0, 9, in this order. Task: from 0 in each. Class: on and on. Domain: from 0, unnamed."""
    order = [[7, 2], [5, 0, 9]]
    stream = build(split(part(classes_per_task=[2, 3], order=[7, 2, 5, 0, 9]), scenario=scenario))
    assert stream.outputs == outputs
    assert stream.n_labels == 1 + max(outputs[1])
    for tasks, test in ((stream.train, False), (stream.test, True)):
        assert [task.task for task in tasks] == labels
        for task, classes, numbers in zip(tasks, order, outputs, strict=True):
            number_of = dict(zip(classes, numbers, strict=True))
            assert task.targets == [number_of[label] for label in originals(task, DIGITS, test)]
            assert set(originals(task, DIGITS, test)) == set(classes)


def test_a_task_holds_every_sample_of_its_classes() -> None:
    stream = build(split(part(n_tasks=5)))
    assert sorted(torch.cat([task.rows for task in stream.train]).tolist()) == list(range(len(DIGITS.y_train)))
    assert sorted(torch.cat([task.rows for task in stream.test]).tolist()) == list(range(len(DIGITS.y_test)))


def test_shuffled_classes_follow_the_seed_unless_pinned() -> None:
    def orders(seed: int, **keys: Any) -> list[list[int]]:
        stream = build(split(part(n_tasks=5, order="shuffled", **keys)), seed)
        return [sorted(set(originals(task, DIGITS))) for task in stream.train]

    assert orders(0) == orders(0) != orders(1)
    assert orders(0, order_seed=4) == orders(1, order_seed=4)
    assert sorted(label for task in orders(0) for label in task) == list(range(10))


def test_split_images_may_be_padded() -> None:
    """Twelve zeros on every side make 8 x 8 into 32 x 32."""
    stream = build(split(pad=12))
    assert stream.input_shape == (1, 32, 32)
    stored = stream.train[0].stored(torch.arange(3))
    expected = torch.nn.functional.pad(stored.float() / 255, (12, 12, 12, 12))
    assert torch.equal(stream.train[0].inputs(torch.arange(3)), expected)


def test_several_data_sets_follow_one_another() -> None:
    """Two tasks of digits, then one of four synthetic classes: labels go on over the border between them."""
    parts = part(), part(dataset="synthetic", n_tasks=1, classes_per_task=4)
    stream = build(split(*parts, scenario="class"))
    assert stream.outputs == [[0, 1], [2, 3], [4, 5, 6, 7]]
    assert stream.fingerprints == {"digits": DIGITS.fingerprint, "synthetic": SYNTHETIC.fingerprint}
    assert originals(stream.train[2], SYNTHETIC) == [label - 4 for label in stream.train[2].targets]
    image = stream.train[2].stored(torch.tensor([0]))
    assert torch.equal(image[0], SYNTHETIC.x_train[stream.train[2].rows[0]])


def fake(superclasses: tuple[int, ...] | None) -> DataSet:
    images, labels = torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.arange(6)
    names = tuple("abcdef")
    return DataSet("fake", images, labels, images, labels, names, superclasses, ("x", "y", "z"), (0.0,), (1.0,), "")


def test_a_superclass_is_a_task() -> None:
    """Classes 0-5 belong to y, x, z, x, y, z: superclass x holds 1 and 3, y 0 and 4, z 2 and 5."""
    source = fake((1, 0, 2, 0, 1, 2))
    groups = class_groups(part(by="superclass", n_tasks=3), source, 0)
    assert groups == [[1, 3], [0, 4], [2, 5]]
    assert class_groups(part(by="superclass", order=[2, 0]), source, 0) == [[2, 5], [1, 3]]


@pytest.mark.data
def test_superclasses_of_cifar100_are_the_official_ones(data_root: Path) -> None:
    spec = split(part(dataset="cifar100", by="superclass", n_tasks=20, classes_per_task=5, order="shuffled"))
    stream = make_stream(spec, 3, CPU, data_root)
    source = data.load("cifar100", data_root)
    assert source.superclasses is not None
    seen = set()
    for task in stream.train:
        classes = set(originals(task, source))
        (superclass,) = {source.superclasses[label] for label in classes}
        assert len(classes) == 5
        seen.add(superclass)
        if source.superclass_names[superclass] == "trees":
            names = {source.class_names[label] for label in classes}
            assert names == {"maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"}
    assert len(seen) == 20


# ------------------------------------------------------------------------------------------------ samples, validation


def test_samples_per_task_are_drawn_apart_for_every_task() -> None:
    stream = build(permuted(train_samples_per_task=50, test_samples_per_task=20))
    assert [len(task) for task in stream.train + stream.test] == [50] * 4 + [20] * 4
    assert len({tuple(task.rows.tolist()) for task in stream.train}) == 4
    assert all(len(set(task.rows.tolist())) == 50 for task in stream.train)
    assert [task.rows.tolist() for task in build(permuted(train_samples_per_task=50), 1).train] != [
        task.rows.tolist() for task in stream.train
    ]


def test_outputs_do_not_depend_on_which_samples_were_drawn() -> None:
    """Three samples cannot show ten classes; the head needs all ten."""
    assert build(permuted(train_samples_per_task=3)).outputs == [list(range(10))] * 4


@pytest.mark.parametrize("how", ["first", "random"])
def test_validation_and_training_samples_are_disjoint_and_complete(how: str) -> None:
    stream = build(split(part(n_tasks=5), validation=0.2, validation_from=how))
    whole = build(split(part(n_tasks=5)))
    for train, validation, all_samples in zip(stream.train, stream.validation, whole.train, strict=True):
        assert len(validation) == round(0.2 * len(all_samples))
        assert sorted(train.rows.tolist() + validation.rows.tolist()) == all_samples.rows.tolist()
        if how == "first":
            assert validation.rows.tolist() == all_samples.rows.tolist()[: len(validation)]


def test_random_validation_is_another_for_every_task_and_seed() -> None:
    first, second = (build(permuted(validation=0.1), seed).validation for seed in (0, 1))
    assert len({tuple(task.rows.tolist()) for task in first + second}) == 8


def test_samples_per_task_leave_the_validation_samples_alone() -> None:
    stream, whole = build(permuted(validation=0.1, train_samples_per_task=30)), build(permuted(validation=0.1))
    for cut, validation, uncut in zip(stream.train, stream.validation, whole.validation, strict=True):
        assert validation.rows.tolist() == uncut.rows.tolist()
        assert not set(cut.rows.tolist()) & set(validation.rows.tolist())


def test_an_experience_carries_its_validation_samples() -> None:
    stream = build(permuted(validation=0.1))
    for experience, validation in zip(stream.benchmark.train_stream, stream.validation, strict=True):
        assert experience.validation is validation
    assert not any(hasattr(experience, "validation") for experience in build(permuted()).benchmark.train_stream)


def test_only_training_samples_are_augmented() -> None:
    stream = build(split(validation=0.1, augment="crop_flip"))
    assert [task.augment for task in stream.train] == [CropFlip(), CropFlip()]
    assert {task.augment for task in stream.validation + stream.test} == {None}


def test_a_crop_is_padded_with_black_as_the_net_sees_it() -> None:
    """A black pixel is 0 under unit pixels and (0 - 0.5) / 0.25 = -2 under that normalisation."""
    for how, border in (("unit", ()), (Pixels(mean=[0.5], std=[0.25]), (-2.0,))):
        stream = build(split(augment="crop", normalise=how))
        assert [task.augment for task in stream.train] == [CropFlip(flip=False, border=border)] * 2
        assert {task.augment for task in stream.test} == {None}


def test_pixels_are_normalised_as_the_recipe_says() -> None:
    """Unit: pixels / 255. Data set: minus its mean, by its deviation. Own numbers: the same with these."""
    index, plain = torch.arange(5), DIGITS.x_train[:5].float() / 255
    own = Pixels(mean=[0.5], std=[0.25])
    for how, mean, std in (("unit", 0.0, 1.0), ("dataset", DIGITS.mean[0], DIGITS.std[0]), (own, 0.5, 0.25)):
        stream = build(permuted(identity_first=True, normalise=how))
        torch.testing.assert_close(stream.train[0].inputs(index), (plain - mean) / std)


# -------------------------------------------------------------------------------------------------------- independence


def rows(stream: Stream) -> list[list[int]]:
    return [task.rows.tolist() for task in stream.train + stream.validation + stream.test]


@pytest.mark.parametrize(
    ("free", "pinned"),
    [
        (permuted(), permuted(permutation_seed=3)),
        (permuted(), permuted(permutations="gpm")),
        (rotated(angles="independent"), rotated(angles="independent", angle_seed=3)),
    ],
)
def test_pinning_how_images_look_leaves_the_samples_alone(free: Any, pinned: Any) -> None:
    drawn = {"train_samples_per_task": 30, "validation": 0.1, "test_samples_per_task": 10}
    one, other = (build(spec.model_copy(update=drawn)) for spec in (free, pinned))
    assert maps(one) != maps(other)
    assert rows(one) == rows(other)


def test_drawing_samples_leaves_permutations_and_class_orders_alone() -> None:
    assert maps(build(permuted(train_samples_per_task=9))) == maps(build(permuted()))
    orders = [
        [sorted(set(originals(task, DIGITS))) for task in build(split(part(order="shuffled"), validation=share)).train]
        for share in (0.0, 0.5)
    ]
    assert orders[0] == orders[1]


def numpy_state() -> tuple[bytes, int]:
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002 - the global generator is only looked at
    return state["key"].tobytes(), state["pos"]


def test_building_a_stream_draws_nothing_from_the_global_generators() -> None:
    torch_before, numpy_before = torch.get_rng_state(), numpy_state()
    build(permuted(permutations="sequential", validation=0.1, train_samples_per_task=9))
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert numpy_state() == numpy_before


# --------------------------------------------------------------------------------------------------------- experiences


def test_experiences_say_which_task_and_classes_they_are() -> None:
    stream = build(split(part(classes_per_task=[2, 3]), scenario="class", validation=0.1))
    assert sorted(stream.benchmark.streams) == ["test", "train", "validation"]
    for experiences in stream.benchmark.streams.values():
        first, second = experiences
        assert (task_index(first), task_index(second)) == (0, 1)
        assert (first.task_label, second.task_label) == (0, 0)
        assert (first.classes_in_this_experience, second.classes_in_this_experience) == ([0, 1], [2, 3, 4])
        assert (first.previous_classes, second.previous_classes) == ([], [0, 1])
        assert (first.classes_seen_so_far, second.classes_seen_so_far) == ([0, 1], [0, 1, 2, 3, 4])
        assert (first.future_classes, second.future_classes) == ([2, 3, 4], [])


def test_experiences_are_labelled_by_task_only_where_the_task_is_told() -> None:
    for scenario, labels in (("task", [0, 1]), ("domain", [0, 0]), ("class", [0, 0])):
        stream = build(split(scenario=scenario))
        assert [experience.task_label for experience in stream.benchmark.train_stream] == labels
        assert [experience.dataset[0][2] for experience in stream.benchmark.train_stream] == labels


def test_an_experience_is_made_of_its_task() -> None:
    stream = build(permuted(validation=0.1))
    for tasks, name in ((stream.train, "train"), (stream.validation, "validation"), (stream.test, "test")):
        for task, experience in zip(tasks, stream.benchmark.streams[name], strict=True):
            assert tasks_in(experience.dataset) == [task]
            assert list(experience.dataset.targets) == task.targets


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (permuted(dataset="digit"), "Did you mean 'digits'"),
        (split(part(n_tasks=6)), "offers 10 classes, the recipe asks for 12 (6 tasks of 2)"),
        (split(part(classes_per_task=[9, 2])), "offers 10 classes, the recipe asks for 11"),
        (split(part(by="superclass")), "'digits' has no superclasses: split it by class"),
        (split(part(order=[0, 1, 2, 12])), "names [12]: 'digits' classes are numbered 0 to 9"),
        (split(part(order=[0, 1, 1, 2])), "names one twice"),
        (split(part(order=[0, 1, 2])), "offers 3 classes, the recipe asks for 4"),
        (permuted(normalise=Pixels(mean=[0.1] * 3, std=[0.2] * 3)), "'digits' has 1 channels"),
        (permuted(permutations="gpm", permutation_seed=2**32), "takes less than 2**32"),
        (permuted(permutations="sequential", permutation_seed=2**32), "takes less than 2**32"),
        (split(validation=0.001), "stream.validation: 0.001 of the 289 samples of task 0 is none"),
    ],
)
def test_what_a_recipe_cannot_have_is_one_clear_line(spec: Any, message: str) -> None:
    (line,) = refusal(lambda: build(spec))
    assert message in line


def test_more_superclasses_than_there_are_is_one_clear_line() -> None:
    wanted = part(by="superclass", n_tasks=4)
    (line,) = refusal(lambda: class_groups(wanted, fake((1, 0, 2, 0, 1, 2)), 0))
    assert line == "'fake' has 3 superclasses, the recipe asks for 4"


def test_data_sets_of_different_shapes_make_no_stream(tmp_path: Path) -> None:
    images = {f"x_{name}": np.zeros((4, 6, 6), np.uint8) for name in ("train", "test")}
    labels = {f"y_{name}": np.array([0, 1, 0, 1]) for name in ("train", "test")}
    np.savez(tmp_path / "small.npz", allow_pickle=True, **images, **labels)
    data.import_npz("small", tmp_path / "small.npz", tmp_path / "cache")
    spec = split(part(), part(dataset="small", n_tasks=1))
    (line,) = refusal(lambda: make_stream(spec, 0, CPU, tmp_path / "cache"))
    assert "inputs of different shapes: [(1, 6, 6), (1, 8, 8)]" in line
