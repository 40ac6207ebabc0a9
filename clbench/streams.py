"""Task streams: a `StreamSpec` and a seed to a sequence of tasks, as resident tensors and as an Avalanche benchmark.

Every task is rows of one uint8 tensor seen through a pixel map, so a stream of permutations or rotations stores the
images once. The scenario decides how labels are numbered and whether tasks carry their own label (van de Ven et al.
2022, "Three types of incremental learning"):

    task    labels 0..k-1 inside each task; the task's label is known at test time
    domain  labels 0..k-1 in every task; every task carries label 0
    class   labels in order of appearance over the whole stream; every task carries label 0

Letters: T tasks, C channels, N samples, H x W pixels.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.scenarios import (
    CLScenario,
    benchmark_from_datasets,
    with_classes_timeline,
    with_task_labels,
)
from avalanche.benchmarks.utils import TaskAwareSupervisedClassificationDataset
from avalanche.benchmarks.utils.data_attribute import DataAttribute, TaskLabels
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from numpy.typing import NDArray
from PIL import Image
from sklearn.utils import shuffle as sklearn_shuffle
from torch import Tensor

from clbench import data
from clbench.data import DataSet
from clbench.errors import UserError
from clbench.loading import TensorTask
from clbench.seeds import derive, derive32, seed_of
from clbench.specs import PermutedStream, Pixels, RotatedStream, Selection, SplitPart, SplitStream
from clbench.views import CropFlip, PixelMap, View

Grid = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Stream:
    """A sequence of T tasks, with training, validation and test samples each."""

    train: list[TensorTask]
    validation: list[TensorTask]
    """Empty when the recipe sets no samples aside."""
    test: list[TensorTask]
    benchmark: CLScenario
    """The same as an Avalanche benchmark: streams `train`, `test` and, when set aside, `validation`."""
    outputs: list[list[int]]
    """Per task, the labels it uses, sorted."""
    input_shape: tuple[int, int, int]
    """(C, H, W) of the network's input."""
    fingerprints: dict[str, str]
    """Of every data set used."""

    @property
    def n_tasks(self) -> int:
        """T."""
        return len(self.train)

    @property
    def n_labels(self) -> int:
        """Labels of the whole stream."""
        return 1 + max(max(labels) for labels in self.outputs)


@dataclass(frozen=True, eq=False)
class _Task:
    """One task before it becomes tensors: which samples, their labels, what the eye sees."""

    source: DataSet
    classes: list[int] | None
    """Classes of the data set in the order that numbers them; None takes all as they are."""
    pixels: Grid | None
    """(H', W') index of the stored pixel, H * W for zero; None leaves the image as it is."""


def make_stream(
    spec: PermutedStream | RotatedStream | SplitStream | Selection,
    seed: int,
    device: torch.device,
    root: Path | None = None,
) -> Stream:
    """Build the stream of a recipe for one run seed.

    Args:
        spec: what the recipe says. A `Selection` is built from data sets without their test samples: what it has in
            their place are training samples held out.
        seed: the run's seed; permutations, angles and class orders come from it unless the recipe pins them, and so
            do the choice of validation samples and of samples per task.
        device: where the images lie, once, as uint8.
        root: the data cache; None for the user's.

    Raises:
        UserError: the data set is missing, or the recipe asks for classes that it has not.
    """
    selection = spec if isinstance(spec, Selection) else None
    share = selection.share if selection else None
    load = functools.partial(data.load, root=root, test=selection is None)
    spec = spec.of if isinstance(spec, Selection) else spec
    tasks = _split(spec, seed, load) if isinstance(spec, SplitStream) else _transformed(spec, seed, load)
    tasks = tasks[: selection.n_tasks] if selection else tasks
    shapes = {(*_channels(task), *_size(task, spec.pad)) for task in tasks}
    if len(shapes) > 1:
        raise UserError(f"the data sets of one stream have inputs of different shapes: {sorted(shapes)}")
    images = {
        name: (source.x_train.to(device), source.x_test.to(device))
        for name, source in {task.source.name: task.source for task in tasks}.items()
    }
    built: dict[str, list[TensorTask]] = {"train": [], "validation": [], "test": []}
    outputs = []
    first_label = 0
    for index, task in enumerate(tasks):
        view = _view(task, spec, device)
        numbering, labels = _numbering(task, first_label if spec.scenario == "class" else 0)
        first_label += len(labels)
        outputs.append(labels)
        label = index if spec.scenario == "task" else 0
        chosen = _choose(task, spec, seed, index, share)
        for part, rows in chosen.items():
            from_test = part == "test" and share is None
            raw = task.source.y_test if from_test else task.source.y_train
            built[part].append(
                TensorTask(
                    images[task.source.name][1 if from_test else 0],
                    rows.to(device),
                    numbering[raw[rows]].to(device),
                    label,
                    view,
                    _augmentation(spec, view) if part == "train" else None,
                )
            )
    return Stream(
        train=built["train"],
        validation=built["validation"],
        test=built["test"],
        benchmark=_benchmark(built),
        outputs=outputs,
        input_shape=next(iter(shapes)),
        fingerprints={task.source.name: task.source.fingerprint for task in tasks},
    )


# ------------------------------------------------------------------------------------------------- permuted and rotated


def _transformed(spec: PermutedStream | RotatedStream, seed: int, load: Callable[[str], DataSet]) -> list[_Task]:
    source = load(spec.dataset)
    grid = _padded(source, spec.pad)
    if isinstance(spec, RotatedStream):
        return [_Task(source, None, rotate(grid, angle, source)) for angle in angles(spec, seed)]
    flat = grid.reshape(-1)
    return [_Task(source, None, flat[order].reshape(grid.shape)) for order in permutations(spec, seed, grid.size)]


def permutations(spec: PermutedStream, seed: int, n_pixels: int) -> list[Grid]:
    """Return T permutations of `n_pixels`, (n_pixels,) each; input pixel k shows stored pixel p[k].

    Source of the `gpm` order: sahagobinda/GPM dataloader/pmnist.py; that code then caches the first run's result on
    disk, so its later runs reuse those permutations in another order. Here every seed gets its own.
    """
    if spec.permutations == "gpm":
        pinned = _legacy(seed_of(seed, "classes") if spec.permutation_seed is None else spec.permutation_seed)
        shuffled = sklearn_shuffle(np.arange(spec.n_tasks), random_state=pinned)
        orders = [
            sklearn_shuffle(np.arange(n_pixels), random_state=int(number) * 100 + index)
            for index, number in enumerate(shuffled)
        ]
    elif spec.permutations == "sequential":
        # Papers pin this one; their code draws from NumPy's legacy global generator, so we draw from the same.
        pinned = derive32(seed, "permutations") if spec.permutation_seed is None else _legacy(spec.permutation_seed)
        # Bit-compatibility with published streams needs the legacy generator.
        generator = np.random.RandomState(pinned)
        skipped = 1 if spec.identity_first else 0
        orders = [np.arange(n_pixels)] * skipped + [
            generator.permutation(n_pixels) for _ in range(spec.n_tasks - skipped)
        ]
    else:
        pinned = seed if spec.permutation_seed is None else spec.permutation_seed
        orders = [
            np.random.default_rng(derive(pinned, "permutation", index)).permutation(n_pixels)
            for index in range(spec.n_tasks)
        ]
    if spec.identity_first:
        orders[0] = np.arange(n_pixels)
    return [np.asarray(order, dtype=np.int64) for order in orders]


def _legacy(seed: int) -> int:
    if seed >= 2**32:
        raise UserError(f"seed {seed}: NumPy's legacy generator, which this stream's papers use, takes less than 2**32")
    return seed


def angles(spec: RotatedStream, seed: int) -> list[float]:
    """Return T angles in degrees, counter-clockwise."""
    pinned = seed if spec.angle_seed is None else spec.angle_seed
    generator = np.random.default_rng(derive(pinned, "angles"))
    step = spec.max_degrees / spec.n_tasks
    if spec.angles == "independent":
        return [float(angle) for angle in generator.uniform(0, spec.max_degrees, spec.n_tasks)]
    if spec.angles == "bins":
        return [float(index * step + generator.uniform(0, step)) for index in range(spec.n_tasks)]
    return [index * step for index in range(spec.n_tasks)]


def rotate(grid: Grid, degrees: float, source: DataSet) -> Grid:
    """Return the pixel map turned counter-clockwise about its centre: nearest pixel, zeros from outside.

    Rotating the map of pixel numbers with Pillow is what Pillow (and so torchvision) does to an image, for every image
    at once.
    """
    zero = source.x_train.shape[2] * source.x_train.shape[3]
    turned = Image.fromarray(grid.astype(np.int32)).rotate(degrees, Image.Resampling.NEAREST, fillcolor=zero)
    return np.asarray(turned).astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------- split


def _split(spec: SplitStream, seed: int, load: Callable[[str], DataSet]) -> list[_Task]:
    tasks = []
    for part_number, part in enumerate(spec.parts):
        source = load(part.dataset)
        pixels = _padded(source, spec.pad) if spec.pad else None
        groups = class_groups(part, source, derive(seed, "classes", part_number))
        tasks += [_Task(source, classes, pixels) for classes in groups]
    return tasks


def class_groups(part: SplitPart, source: DataSet, seed: int) -> list[list[int]]:
    """Return the classes of every task of a part, in the order that numbers them.

    Raises:
        UserError: more classes than the data set has, a superclass split of a data set without superclasses, or a
            listed order that names a class twice or one that is not there.
    """
    if part.by == "superclass":
        if source.superclasses is None:
            raise UserError(f"data set '{source.name}' has no superclasses: split it by class")
        groups = [
            [fine for fine, coarse in enumerate(source.superclasses) if coarse == number]
            for number in range(len(source.superclass_names))
        ]
        units = [groups[number] for number in _order(part, len(groups), seed, f"'{source.name}' superclasses")]
        if part.n_tasks > len(units):
            raise UserError(f"'{source.name}' has {len(units)} superclasses, the recipe asks for {part.n_tasks}")
        return units[: part.n_tasks]
    order = _order(part, len(source.class_names), seed, f"'{source.name}' classes")
    sizes = [part.classes_per_task] * part.n_tasks if isinstance(part.classes_per_task, int) else part.classes_per_task
    if sum(sizes) > len(order):
        raise UserError(
            f"data set '{source.name}' offers {len(order)} classes, the recipe asks for {sum(sizes)} "
            f"({part.n_tasks} tasks of {part.classes_per_task})"
        )
    starts = np.cumsum([0, *sizes])
    return [order[start:stop] for start, stop in itertools.pairwise(starts)]


def _order(part: SplitPart, count: int, seed: int, what: str) -> list[int]:
    if part.order == "fixed":
        return list(range(count))
    if part.order == "shuffled":
        pinned = seed if part.order_seed is None else derive(part.order_seed, "classes")
        return [int(number) for number in np.random.default_rng(pinned).permutation(count)]
    wrong = sorted({number for number in part.order if not 0 <= number < count})
    if wrong or len(set(part.order)) < len(part.order):
        reason = f"names {wrong}" if wrong else "names one twice"
        raise UserError(f"stream.parts.order {reason}: {what} are numbered 0 to {count - 1}, each at most once")
    return list(part.order)


# ------------------------------------------------------------------------------------------------------- common details


def _channels(task: _Task) -> tuple[int]:
    return (int(task.source.x_train.shape[1]),)


def _size(task: _Task, pad: int) -> tuple[int, int]:
    height, width = task.source.x_train.shape[2:]
    return (int(height) + 2 * pad, int(width) + 2 * pad)


def _padded(source: DataSet, pad: int) -> Grid:
    """Return the pixel map (H + 2 pad, W + 2 pad) of an image with a zero border."""
    height, width = (int(side) for side in source.x_train.shape[2:])
    inside = np.arange(height * width, dtype=np.int64).reshape(height, width)
    return np.pad(inside, pad, constant_values=height * width)


def _view(task: _Task, spec: PermutedStream | RotatedStream | SplitStream, device: torch.device) -> View:
    mean, std = _normalisation(task.source, spec.normalise)
    pixels = None
    if task.pixels is not None:
        zero = int(np.prod(task.source.x_train.shape[2:]))
        source = torch.from_numpy(np.ascontiguousarray(task.pixels.reshape(-1))).to(device)
        height, width = task.pixels.shape
        pixels = PixelMap(source, (int(height), int(width)), bool((task.pixels == zero).any()))
    return View(
        pixels,
        None if mean is None else torch.tensor(mean, device=device).view(1, -1, 1, 1),
        None if std is None else torch.tensor(std, device=device).view(1, -1, 1, 1),
    )


def _augmentation(spec: PermutedStream | RotatedStream | SplitStream, view: View) -> CropFlip | None:
    if spec.augment != "crop":
        return CropFlip() if spec.augment == "crop_flip" else None
    black = () if view.mean is None or view.std is None else tuple((-view.mean / view.std).flatten().tolist())
    return CropFlip(flip=False, border=black)


def _normalisation(source: DataSet, how: str | Pixels) -> tuple[Sequence[float] | None, Sequence[float] | None]:
    if isinstance(how, Pixels):
        channels = int(source.x_train.shape[1])
        if len(how.mean) != channels or len(how.std) != channels:
            raise UserError(f"stream.normalise: '{source.name}' has {channels} channels, mean and std list others")
        return how.mean, how.std
    return (None, None) if how == "unit" else (source.mean, source.std)


def _numbering(task: _Task, first: int) -> tuple[Tensor, list[int]]:
    """Return a table from the data set's class to the scenario's label, and the task's labels."""
    n_classes = len(task.source.class_names)
    classes = list(range(n_classes)) if task.classes is None else task.classes
    table = torch.full((n_classes,), -1, dtype=torch.int64)
    labels = list(range(first, first + len(classes)))
    table[torch.tensor(classes)] = torch.tensor(labels)
    return table, labels


def _choose(
    task: _Task, spec: PermutedStream | RotatedStream | SplitStream, seed: int, index: int, share: float | None
) -> dict[str, Tensor]:
    """Return the rows of the task's training, validation and test samples.

    With a `share` there are no test samples to choose: the task is tested on training samples that are held out, those
    the recipe sets aside for validation or, where it sets none aside, this share of them.
    """

    def rows(labels: Tensor) -> Tensor:
        if task.classes is None:
            return torch.arange(len(labels))
        return torch.isin(labels, torch.tensor(task.classes)).nonzero().flatten()

    def drawn(candidates: Tensor, count: int, purpose: str) -> Tensor:
        generator = torch.Generator().manual_seed(derive(seed, "order", purpose, index))
        return torch.randperm(len(candidates), generator=generator)[:count].sort().values

    train, test = rows(task.source.y_train), rows(task.source.y_test)
    chosen = {}
    held_out = spec.validation or share or 0.0
    n_validation = round(len(train) * held_out)
    if held_out:
        if n_validation == 0:
            what = "stream.validation" if spec.validation else "share held out"
            raise UserError(f"{what}: {held_out} of the {len(train)} samples of task {index} is none")
        if spec.validation_from == "first":
            aside = torch.arange(n_validation)
        else:
            aside = drawn(train, n_validation, "validation")
        keep = torch.ones(len(train), dtype=torch.bool)
        keep[aside] = False
        if spec.validation:
            chosen["validation"] = train[aside]
        if share is not None:
            test = train[aside]
        train = train[keep]
    n_test = spec.test_samples_per_task if share is None else None
    for split, asked, there in (
        ("train", spec.train_samples_per_task, len(train)),
        ("test", n_test, len(test)),
    ):
        if asked is not None and asked > there:
            raise UserError(
                f"stream.{split}_samples_per_task is {asked}: task {index + 1} has {there} "
                f"samples of '{task.source.name}'"
            )
    if spec.train_samples_per_task is not None:
        train = train[drawn(train, spec.train_samples_per_task, "samples")]
    if n_test is not None:
        test = test[drawn(test, n_test, "test samples")]
    return {"train": train, **chosen, "test": test}


def _benchmark(built: dict[str, list[TensorTask]]) -> CLScenario:
    datasets = {name: [_dataset(task) for task in tasks] for name, tasks in built.items() if tasks}
    scenario = with_classes_timeline(with_task_labels(benchmark_from_datasets(**datasets)))
    for stream in scenario.streams.values():
        for index, experience in enumerate(stream):
            # Avalanche's heads index with these; sets break them.
            for name in ("classes_in_this_experience", "previous_classes", "classes_seen_so_far", "future_classes"):
                setattr(experience, name, sorted(getattr(experience, name)))
            experience.task_index = index
    for experience, validation in zip(scenario.train_stream, built["validation"], strict=False):
        experience.validation = validation
    return scenario


def _dataset(task: TensorTask) -> Any:
    groups: dict[str, Callable[[Tensor], Tensor] | None] | None = None
    if task.augment is not None:
        groups = {"train": task.augment, "eval": None}
    return TaskAwareSupervisedClassificationDataset(
        [task],
        data_attributes=[
            DataAttribute(task.targets, "targets"),
            TaskLabels(ConstantSequence(task.task, len(task))),
        ],
        transform_groups=groups,
    )

