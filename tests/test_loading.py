"""Avalanche's strategies and loaders get from `fast_loading` what they would have got without, bit for bit."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from avalanche import training as avalanche
from avalanche.benchmarks.utils import AvalancheDataset, as_taskaware_classification_dataset, data_loader
from avalanche.benchmarks.utils.data_attribute import DataAttribute, TaskLabels
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from avalanche.training.plugins import RWalkPlugin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from clbench.loading import TensorTask, View, fast_loading
from clbench.nets import HeadedNet, build_head, build_trunk
from clbench.specs import PermutedStream, Scenario, SplitPart, SplitStream
from clbench.strategies.base import no_metrics
from clbench.strategies.foreign import MultiTaskNet, OneHeadNet
from clbench.streams import Stream, make_stream

CPU = torch.device("cpu")


def seed_everything() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - Avalanche draws from the global generator
    torch.manual_seed(0)


def small_stream(scenario: Scenario, augment: str = "none") -> Stream:
    """Return three tasks of digits with 60 samples each: permuted where labels repeat, split where they do not."""
    common: dict[str, Any] = {
        "scenario": scenario,
        "train_samples_per_task": 60,
        "test_samples_per_task": 20,
        "augment": augment,
        "normalise": "dataset",
    }
    if scenario == "domain":
        return make_stream(PermutedStream(kind="permuted", dataset="digits", n_tasks=3, **common), 0, CPU)
    parts = [SplitPart(dataset="digits", n_tasks=3, classes_per_task=3)]
    return make_stream(SplitStream(kind="split", parts=parts, **common), 0, CPU)


@pytest.fixture
def single_samples(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the rows that were read one by one so far: none where whole batches were loaded."""
    read: list[int] = []
    original = TensorTask.__getitem__

    def noted(self: TensorTask, index: int) -> tuple[Tensor, int]:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(TensorTask, "__getitem__", noted)
    return read


# ---------------------------------------------------------------------------------------------------- whole strategies


REPLAY = {"mem_size": 30}
CASES: dict[str, tuple[str, Scenario, dict[str, Any]]] = {
    "naive": ("Naive", "domain", {}),
    "cumulative": ("Cumulative", "domain", {}),
    "ewc": ("EWC", "domain", {"ewc_lambda": 10.0}),
    "lwf": ("LwF", "class", {"alpha": 1.0, "temperature": 2.0}),
    "si": ("SynapticIntelligence", "domain", {"si_lambda": 1.0}),
    "mas": ("MAS", "domain", {"lambda_reg": 0.1}),
    "rwalk": ("Naive", "domain", {"plugins": lambda: RWalkPlugin(ewc_lambda=0.01, delta_t=2)}),
    "replay": ("Replay", "class", REPLAY),
    "gdumb": ("GDumb", "class", REPLAY),
    "agem": ("AGEM", "domain", {"patterns_per_exp": 20, "sample_size": 10}),
    "gem": ("GEM", "domain", {"patterns_per_exp": 20}),
    "mir": ("MIR", "domain", {"mem_size": 30, "subsample": 20, "batch_size_mem": 10}),
    "der": ("DER", "domain", {"mem_size": 30, "batch_size_mem": 10}),
    "er ace": ("ER_ACE", "class", {"mem_size": 30, "batch_size_mem": 10}),
    "multi-head naive": ("Naive", "task", {}),
    "multi-head ewc": ("EWC", "task", {"ewc_lambda": 10.0}),
    "multi-head lwf": ("LwF", "task", {"alpha": 1.0, "temperature": 2.0}),
    "multi-head replay": ("Replay", "task", REPLAY),
    "multi-head cumulative": ("Cumulative", "task", {}),
}


def net_for(scenario: Scenario, stream: Stream, fixed: bool) -> torch.nn.Module:
    trunk = build_trunk("mlp", (1, 8, 8), hidden=[16])
    head = build_head(scenario, "fixed" if fixed else "growing", 16, stream.outputs, 0, True)
    net = HeadedNet(trunk, head)
    return MultiTaskNet(net) if scenario == "task" else OneHeadNet(net)


def trained_weights(name: str, scenario: Scenario, settings: dict[str, Any], fast: bool) -> dict[str, Tensor]:
    seed_everything()
    stream = small_stream(scenario)
    net = net_for(scenario, stream, fixed=name in ("DER", "ER_ACE"))
    settings = {key: [value()] if key == "plugins" else value for key, value in settings.items()}
    with warnings.catch_warnings(record=True) as heard, fast_loading() if fast else nullcontext():
        # Avalanche calls what it has itself deprecated, and what numpy has.
        warnings.simplefilter("always")
        strategy = getattr(avalanche, name)(
            model=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            criterion=torch.nn.CrossEntropyLoss(),
            train_mb_size=16,
            train_epochs=2,
            eval_mb_size=16,
            evaluator=no_metrics(),
            **settings,
        )
        for experience in stream.benchmark.train_stream:
            strategy.train(experience, eval_streams=[])
            strategy.eval(stream.benchmark.test_stream[: experience.current_experience + 1])
    assert {warning.category for warning in heard} <= {DeprecationWarning}
    return dict(net.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_stock_strategies_end_with_the_same_bits(case: str, single_samples: list[int]) -> None:
    """Same global seeds, 3 tasks x 2 epochs: the weights after sample-by-sample and after batched loading."""
    ordinary = trained_weights(*CASES[case], fast=False)
    assert single_samples
    single_samples.clear()
    fast = trained_weights(*CASES[case], fast=True)
    assert not single_samples
    assert list(ordinary) == list(fast)
    for name, value in ordinary.items():
        assert bool(value.isfinite().all()), name
        assert torch.equal(value, fast[name]), name


# --------------------------------------------------------------------------------------------------------- data sets


class Floats(Dataset[tuple[Tensor, int]]):
    """Sixty random images as they often come: floats, one by one."""

    def __init__(self) -> None:
        self.images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(2))
        self.targets = [label % 3 for label in range(60)]

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


def as_dataset(samples: Floats | TensorTask, **settings: Any) -> AvalancheDataset[Any]:
    attributes = [DataAttribute(samples.targets, "targets"), TaskLabels(ConstantSequence(0, len(samples)))]
    found: AvalancheDataset[Any] = as_taskaware_classification_dataset(
        AvalancheDataset([samples], data_attributes=attributes, **settings)
    )
    return found


def trees(stream: Stream) -> dict[str, AvalancheDataset[Any]]:
    """Return data sets put together in every way Avalanche's buffers do it."""
    first, second, third = (experience.dataset for experience in stream.benchmark.train_stream)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1)).tolist()
    buffer = first.subset(order[:10]).concat(second.subset(order[:15])).concat(third.subset(order[20:30]))
    logits = DataAttribute([torch.full((4,), float(i)) for i in range(60)], "logits", use_in_getitem=True)
    return {
        "whole": first,
        "subset": first.subset([5, 3, 3, 59, 0, 17]),
        "subset of a subset": first.subset(order).subset([1, 2, 30, 31, 7]),
        "concat": first.concat(second),
        "concat with itself": first.concat(first),
        "buffer": buffer,
        "buffer cut back": buffer.subset(list(range(0, len(buffer), 3))),
        "buffer and task": buffer.concat(first),
        "frozen": first.freeze_transforms().concat(second.freeze_transforms()),
        "without transforms": first.remove_current_transform_group(),
        "logits": first.update_data_attribute("logits", logits),
        "floats": first.update_data_attribute("w", DataAttribute(ConstantSequence(0.5, 60), "w", use_in_getitem=True)),
        "bools": first.update_data_attribute("b", DataAttribute([True, False] * 30, "b", use_in_getitem=True)),
    }


def read(loader: Callable[[], Iterable[Any]], fast: bool, limit: int = 20) -> list[list[Tensor]]:
    seed_everything()
    with fast_loading() if fast else nullcontext():
        return [list(batch) for batch in islice(loader(), limit)]


def assert_same_batches(loader: Callable[[], Iterable[Any]]) -> None:
    ordinary, fast = read(loader, fast=False), read(loader, fast=True)
    assert len(ordinary) == len(fast) > 0
    for one, other in zip(ordinary, fast, strict=True):
        assert len(one) == len(other) >= 3
        for left, right in zip(one, other, strict=True):
            assert left.dtype == right.dtype
            assert torch.equal(left, right)


@pytest.mark.parametrize("scenario", ["domain", "task", "class"])
@pytest.mark.parametrize("tree", trees(small_stream("domain")))
def test_every_tree_of_data_sets_gives_the_same_batches(
    tree: str, scenario: Scenario, single_samples: list[int]
) -> None:
    dataset = trees(small_stream(scenario))[tree]
    assert_same_batches(lambda: DataLoader(dataset, batch_size=7, shuffle=True, collate_fn=dataset.collate_fn))
    single_samples.clear()
    read(lambda: DataLoader(dataset, batch_size=7), fast=True)
    assert not single_samples


def test_loaders_of_several_data_sets_give_the_same_batches(single_samples: list[int]) -> None:
    found = trees(small_stream("task"))
    groups = [found["whole"], found["buffer"], found["subset"]]
    loaders: dict[str, Callable[[], Iterable[Any]]] = {
        "task": lambda: data_loader.TaskBalancedDataLoader(found["concat"], batch_size=8, shuffle=True),
        "group": lambda: data_loader.GroupBalancedDataLoader(groups, batch_size=9, shuffle=True),
        "endless": lambda: data_loader.GroupBalancedInfiniteDataLoader(groups, batch_size=9, shuffle=True),
        "replay": lambda: data_loader.ReplayDataLoader(
            found["whole"], found["buffer"], batch_size=8, batch_size_mem=6, oversample_small_tasks=True, shuffle=True
        ),
    }
    for loader in loaders.values():
        assert_same_batches(loader)
        single_samples.clear()
        read(loader, fast=True)
        assert not single_samples


def test_a_copy_at_the_address_of_a_dead_data_set_is_looked_at_anew() -> None:
    """Data sets are remembered by identity, and identities are used again: five hundred short lives, all different."""
    first = small_stream("domain").benchmark.train_stream[0].dataset
    with fast_loading():
        for size in range(1, 60):
            for _ in range(8):
                subset = first.subset(list(range(size)))
                (batch,) = DataLoader(subset, batch_size=60)
                assert len(batch[1]) == size


# -------------------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("tree", trees(small_stream("domain")))
def test_augmented_data_sets_read_for_evaluation_are_equal(tree: str) -> None:
    dataset = trees(small_stream("task", "crop_flip"))[tree].eval()
    assert_same_batches(lambda: DataLoader(dataset, batch_size=7, shuffle=True))


def test_augmented_tasks_in_a_row_are_loaded_in_batches(single_samples: list[int]) -> None:
    buffer = trees(small_stream("task", "crop_flip"))["buffer"]
    assert len(read(lambda: DataLoader(buffer, batch_size=7), fast=True)) == 5
    assert not single_samples


def test_augmentation_has_the_same_distribution() -> None:
    """One image, 3,240 times: 9 x 9 crops x 2 flips are 162 outcomes, 20 of each expected.

    Outcomes are told apart by random pixels, so that no two crops look alike. Chi-square over 162 cells has mean 161
    and deviation sqrt(2 * 161) = 18; four deviations above is 233.
    """
    image = torch.randint(0, 256, (1, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    padded = torch.nn.functional.pad(image[0, 0].float() / 255, (4, 4, 4, 4))
    crops = [padded[row : row + 8, column : column + 8] for row in range(9) for column in range(9)]
    outcomes = {crop.numpy().tobytes(): 0 for image in crops for crop in (image, image.flip(1))}
    assert len(outcomes) == 162
    augment = small_stream("domain", "crop_flip").train[0].augment
    count = 20 * 162
    zeros = torch.zeros(count, dtype=torch.int64)
    task = TensorTask(image, zeros, zeros, 0, View(None, None, None), augment)
    dataset = as_dataset(task, transform_groups={"train": augment, "eval": None})
    for fast in (False, True):
        seen = dict(outcomes)
        for batch in read(lambda: DataLoader(dataset, batch_size=360), fast):
            for sample in batch[0]:
                seen[sample[0].contiguous().numpy().tobytes()] += 1
        assert sum((n - 20) ** 2 / 20 for n in seen.values()) < 233


# ------------------------------------------------------------------------------------------- data that is not resident


def doubling(batch: Any) -> list[Tensor]:
    x, y, t = default_collate(batch)
    return [2 * x, y, t]


def darker(x: Tensor) -> Tensor:
    return x / 2


def not_ours() -> dict[str, AvalancheDataset[Any]]:
    """Return data sets that only Avalanche's own path can read."""
    ours = small_stream("domain").benchmark.train_stream[0].dataset
    collated = ours.subset(list(range(60)))
    collated.collate_fn = doubling
    return {
        "other data": as_dataset(Floats()),
        "other data among ours": ours.concat(as_dataset(Floats())),
        "another transform": ours.replace_current_transform_group(darker),
        "two transforms": ours.replace_current_transform_group((darker, lambda y: y + 1)),
        "a collate function of its own": collated,
    }


@pytest.mark.parametrize("name", not_ours())
def test_data_sets_of_another_kind_load_as_ever(name: str) -> None:
    dataset = not_ours()[name]
    assert_same_batches(lambda: DataLoader(dataset, batch_size=7, shuffle=True, collate_fn=dataset.collate_fn))
    assert_same_batches(lambda: data_loader.TaskBalancedDataLoader(dataset, batch_size=8, shuffle=True))


def test_resident_and_other_data_share_a_loader() -> None:
    ours = small_stream("domain").benchmark.train_stream[0].dataset
    floats = as_dataset(Floats())
    assert_same_batches(lambda: data_loader.ReplayDataLoader(ours, floats, batch_size=8, batch_size_mem=8))


# ------------------------------------------------------------------------------------------------------------- context


def state_of_avalanche() -> tuple[Any, ...]:
    return (
        AvalancheDataset.__dict__.get("__getitems__"),
        data_loader.ConcatDataset,
        data_loader.has_ffcv_support,
        dict(default_collate_fn_map),
    )


def test_everything_is_put_back_on_exit() -> None:
    before = state_of_avalanche()
    with fast_loading():
        assert all(now is not then for now, then in zip(state_of_avalanche(), before, strict=True))
    assert state_of_avalanche() == before


def test_everything_is_put_back_after_an_exception() -> None:
    before = state_of_avalanche()
    with pytest.raises(ZeroDivisionError), fast_loading(), fast_loading():
        raise ZeroDivisionError
    assert state_of_avalanche() == before


def test_contexts_nest_and_the_outermost_puts_back() -> None:
    before = state_of_avalanche()
    with fast_loading():
        inside = state_of_avalanche()
        with fast_loading():
            assert state_of_avalanche() == inside
        assert state_of_avalanche() == inside
    assert state_of_avalanche() == before


def test_nothing_is_left_on_a_data_set() -> None:
    dataset = small_stream("domain").benchmark.train_stream[0].dataset
    before = set(vars(dataset)), set(vars(dataset._flat_data)), set(vars(dataset.targets_task_labels))
    read(lambda: DataLoader(dataset, batch_size=7), fast=True)
    assert (set(vars(dataset)), set(vars(dataset._flat_data)), set(vars(dataset.targets_task_labels))) == before
