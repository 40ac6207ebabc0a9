"""The streams of `benchmarks.loading` as users of stock Avalanche have them.

`classes` is what Avalanche's own `PermutedMNIST` and `SplitCIFAR100` make: the same calls, transforms and data set
classes, on images that are here already. `tensors` is the fastest ordinary way: one `TensorDataset` of finished float32
images for each task, behind no transform but the augmentation, which cannot be prepared.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.classic.cmnist import PixelsPermutation
from avalanche.benchmarks.scenarios import (
    CLScenario,
    benchmark_from_datasets,
    with_classes_timeline,
    with_task_labels,
)
from avalanche.benchmarks.utils import (
    DefaultTransformGroups,
    TaskAwareSupervisedClassificationDataset,
    _make_taskaware_classification_dataset,
    make_avalanche_dataset,
)
from avalanche.benchmarks.utils.data_attribute import DataAttribute, TaskLabels
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision import transforms

from clbench.loading import TensorTask
from clbench.strategies.base import Setup, new_optimizer, no_metrics
from clbench.strategies.foreign import OneHeadNet
from clbench.streams import Stream


class Stock:
    """A strategy of Avalanche's, as it comes."""

    def __init__(self, cls: type, settings: dict[str, Any], setup: Setup) -> None:
        net = OneHeadNet(setup.new_net().to(setup.device))
        self.strategy = cls(
            model=net,
            optimizer=new_optimizer(setup.train, net.parameters()),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=setup.train.batch_size,
            train_epochs=setup.train.epochs,
            eval_mb_size=setup.train.eval_batch_size,
            device=setup.device,
            evaluator=no_metrics(),
            **settings,
        )

    def train_task(self, experience: Any) -> None:
        """Learn one task."""
        self.strategy.train(experience, eval_streams=[])

    def accuracy(self, experience: Any) -> None:
        """Evaluate one test set."""
        self.strategy.eval(experience)


# ------------------------------------------------------------------------------------------------------------- tensors


def tensors(stream: Stream) -> CLScenario:
    """Return a stream's samples as finished float32 images in memory."""

    def dataset(task: TensorTask) -> Any:
        x = task.inputs(torch.arange(len(task), device=task.rows.device)).cpu()
        crop, flip = transforms.RandomCrop(x.shape[-1], padding=4), transforms.RandomHorizontalFlip()
        return TaskAwareSupervisedClassificationDataset(
            [TensorDataset(x, task.labels.cpu())],
            data_attributes=[DataAttribute(task.targets, "targets"), TaskLabels(ConstantSequence(0, len(task)))],
            transform_groups=task.augment and {"train": transforms.Compose([crop, flip]), "eval": None},
        )

    train, test = ([dataset(task) for task in tasks] for tasks in (stream.train, stream.test))
    return with_classes_timeline(with_task_labels(benchmark_from_datasets(train=train, test=test)))


# ------------------------------------------------------------------------------------------------------------- classes


class _TensorImages(Dataset[tuple[Tensor, int]]):
    """As Avalanche's `TensorMNIST` reads: one float image."""

    def __init__(self, data: Tensor, targets: list[int]) -> None:
        self.data, self.targets = data, targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.data[index].float().unsqueeze(0) / 255.0, int(self.targets[index])


class _PILImages(Dataset[tuple[Any, int]]):
    """As torchvision's `CIFAR100` reads: one PIL image."""

    def __init__(self, data: Tensor, targets: list[int]) -> None:
        self.data, self.targets = data.permute(0, 2, 3, 1).contiguous().numpy(), targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return Image.fromarray(self.data[index]), self.targets[index]


def _images(task: TensorTask) -> Tensor:
    return task.images[task.rows].cpu()


def _normalise(task: TensorTask) -> Any:
    assert task.view.mean is not None
    assert task.view.std is not None
    return transforms.Normalize(task.view.mean.flatten().tolist(), task.view.std.flatten().tolist())


def permuted_classes(stream: Stream) -> CLScenario:
    """Return what `PermutedMNIST` makes, on a stream's samples and permutations."""

    def dataset(task: TensorTask) -> Any:
        assert task.view.pixels is not None
        permutation = PixelsPermutation(task.view.pixels.source.cpu())
        return make_avalanche_dataset(
            _make_taskaware_classification_dataset(_TensorImages(_images(task)[:, 0], task.targets)),
            frozen_transform_groups=DefaultTransformGroups((permutation, None)),
        )

    normalise = transforms.Compose([_normalise(stream.train[0])])
    return nc_benchmark(
        [dataset(task) for task in stream.train],
        [dataset(task) for task in stream.test],
        n_experiences=stream.n_tasks,
        task_labels=False,
        shuffle=False,
        class_ids_from_zero_in_each_exp=True,
        one_dataset_per_exp=True,
        train_transform=normalise,
        eval_transform=normalise,
    )


def split_classes(stream: Stream) -> CLScenario:
    """Return what `SplitCIFAR100` makes, augmentation included, on a stream's samples."""

    def dataset(tasks: list[TensorTask]) -> _PILImages:
        first = 0
        targets: list[int] = []
        for task, labels in zip(tasks, stream.outputs, strict=True):
            targets += [first + label for label in task.targets]
            first += len(labels)
        return _PILImages(torch.cat([_images(task) for task in tasks]), targets)

    last = [transforms.ToTensor(), _normalise(stream.train[0])]
    first = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    return nc_benchmark(
        dataset(stream.train),
        dataset(stream.test),
        n_experiences=stream.n_tasks,
        task_labels=False,
        fixed_class_order=list(range(sum(len(labels) for labels in stream.outputs))),
        class_ids_from_zero_in_each_exp=True,
        train_transform=transforms.Compose(first + last),
        eval_transform=transforms.Compose(last),
    )
