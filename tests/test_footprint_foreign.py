"""What stock avalanche strategies keep after each of two tasks, against counts by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset

from clbench.footprint import Holdings, footprint, foreign_holdings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from avalanche.benchmarks import nc_benchmark, with_classes_timeline, with_task_labels
    from avalanche.benchmarks.scenarios.dataset_scenario import benchmark_from_datasets
    from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_classification_dataset
    from avalanche.models import MTSimpleMLP
    from avalanche.training import supervised
    from avalanche.training.plugins import EvaluationPlugin, RWalkPlugin
    from avalanche.training.templates import SupervisedTemplate


def two_layers() -> nn.Sequential:
    """Linear(4, 5), Linear(5, 4): 25 + 24 = 49 elements, 196 B."""
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))


MODEL = 196
"""Bytes of `two_layers`, the unit of the figures below."""


class Toy(Dataset[tuple[Tensor, int]]):
    """12 samples of 4 floats (16 B) and a label (8 B); two classes a task."""

    def __init__(self, task: int) -> None:
        self.x = torch.rand(12, 4, generator=torch.Generator().manual_seed(task))
        self.targets = [i % 2 + 2 * task for i in range(12)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


class Packed(Toy):
    """The same, stored as 4 bytes and a label: what it says of itself, whatever its items are."""

    bytes_per_sample = 12


def stream(kind: type[Toy] = Toy) -> Any:
    """Two tasks of two classes each."""
    sets = [
        _make_taskaware_classification_dataset(data, targets=data.targets, task_labels=[task] * 12)
        for task, data in enumerate((kind(0), kind(1)))
    ]
    return with_classes_timeline(with_task_labels(benchmark_from_datasets(train=sets, test=sets))).train_stream


def train(strategy: Any, experiences: Any = None) -> Iterator[Holdings]:
    """Train on two tasks; yield what is held after each."""
    with warnings.catch_warnings(record=True):  # avalanche deprecates itself, past every filter
        warnings.simplefilter("ignore")
        for experience in experiences or stream():
            strategy.train(experience)
            yield foreign_holdings(strategy)


def make(cls: Any, model: nn.Module | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = model or two_layers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            train_mb_size=4,
            evaluator=EvaluationPlugin(loggers=[]),
            **settings,
        )


REGULARISERS: dict[str, tuple[Callable[[], Any], list[dict[str, int]]]] = {
    "ewc": (
        lambda: make(supervised.EWC, ewc_lambda=1.0),
        [{"EWCPlugin.saved_params": k, "EWCPlugin.importances": k} for k in (1, 2)],
    ),
    "online ewc": (
        lambda: make(supervised.EWC, ewc_lambda=1.0, mode="online", decay_factor=0.5),
        [{"EWCPlugin.saved_params": 1, "EWCPlugin.importances": 1}] * 2,
    ),
    "lwf": (lambda: make(supervised.LwF, alpha=1.0, temperature=2.0), [{"LwFPlugin.lwf": 1}] * 2),
    "mas": (
        lambda: make(supervised.MAS, lambda_reg=1.0, alpha=0.5),
        [{"MASPlugin.params": 1, "MASPlugin.importance": 1}] * 2,
    ),
    "si": (
        lambda: make(supervised.SynapticIntelligence, si_lambda=1.0),
        [{"SynapticIntelligencePlugin.ewc_data": 2, "SynapticIntelligencePlugin.syn_data": 3}] * 2,
    ),
    "rwalk": (
        lambda: make(SupervisedTemplate, plugins=[RWalkPlugin(ewc_lambda=1.0)]),
        [
            {
                **{f"RWalkPlugin.checkpoint_{name}": 1 for name in ("params", "loss", "scores")},
                **{f"RWalkPlugin.iter_{name}": 1 for name in ("grad", "importance", "params")},
                **{f"RWalkPlugin.exp_{name}": 1 for name in ("scores", "params", "penalties")},
            }
        ]
        * 2,
    ),
}


@pytest.mark.parametrize("name", REGULARISERS)
def test_a_stock_regulariser_keeps_what_its_method_stores(name: str) -> None:
    """In models of 196 B, after tasks 1 and 2.

    EWC, separate: weights and Fisher of every task: 2, 4. Online: of the last: 2, 2. LwF: the old net: 1. MAS: weights
    and importance: 2.

    SI: the old weights and the importance (2); the gradient, the path integral and its sum (3): 5. Its two further
    copies of the weights are none on the CPU, where `.detach().cpu()` returns the live weights; each copied, as on
    another device, it is 7. (Counted without the model, that one shared storage is a sixth.)

    RWalk: weights, loss and scores at the last checkpoint; gradient, weights and importance at the last iteration;
    weights, scores and penalties at the end of the task: 9. The task's importance is the iteration's, the same object.
    """
    build, expected = REGULARISERS[name]
    for held, sizes in zip(train(build()), expected, strict=True):
        counted = footprint(held)
        assert counted.auxiliary_bytes == {key: size * MODEL for key, size in sizes.items()}
        assert counted.keep_learning_bytes == MODEL * (1 + sum(sizes.values()))
        assert (counted.replay_samples, counted.replay_bytes, counted.answer_bytes) == (0, 0, MODEL)


SAMPLE = 4 * 4 + 8
"""Bytes of a sample of `Toy`."""

REHEARSERS: dict[str, tuple[Callable[[], Any], list[tuple[int, int, int]]]] = {
    "gem": (lambda: make(supervised.GEM, patterns_per_exp=6), [(6, 6 * 32, 0), (12, 12 * 32, MODEL)]),
    "agem": (
        lambda: make(supervised.AGEM, patterns_per_exp=6, sample_size=4),
        [(6, 6 * SAMPLE, 0), (12, 12 * SAMPLE, MODEL)],
    ),
    "replay": (lambda: make(supervised.Replay, mem_size=8), [(8, 8 * SAMPLE, 8 * 4)] * 2),
    "gdumb": (lambda: make(supervised.GDumb, mem_size=8), [(8, 8 * SAMPLE, 8 * 4 + MODEL)] * 2),
    "der": (lambda: make(supervised.DER, mem_size=8, batch_size_mem=4), [(8, 8 * (SAMPLE + 4 * 4), 8 * 4)] * 2),
    "er-ace": (lambda: make(supervised.ER_ACE, mem_size=8, batch_size_mem=4), [(8, 8 * SAMPLE, 8 * 4)] * 2),
    "cumulative": (lambda: make(supervised.Cumulative), [(12, 12 * SAMPLE, 0), (24, 24 * SAMPLE, 0)]),
}


@pytest.mark.parametrize("name", REHEARSERS)
def test_a_stock_rehearser_keeps_its_samples_and_not_the_stream(name: str) -> None:
    """Samples, their bytes, and auxiliary bytes, after tasks 1 and 2. A sample is 16 B and a label of 8 B.

    GEM copies 6 samples a task and their task labels (32 B each), and from task 2 on holds one past task's gradient.
    A-GEM keeps subsets of 6 a task, and from task 2 on its reference gradient. Replay, GDumb, DER and ER-ACE hold 8
    samples in groups and a 4-byte reservoir weight for each; GDumb also its initial net, DER 4 logits a sample.
    Cumulative keeps everything.
    """
    build, expected = REHEARSERS[name]
    for held, (samples, sample_bytes, auxiliary) in zip(train(build()), expected, strict=True):
        counted = footprint(held)
        assert (counted.replay_samples, counted.replay_bytes) == (samples, sample_bytes)
        assert sum(counted.auxiliary_bytes.values()) == auxiliary
        assert counted.keep_learning_bytes == MODEL + auxiliary + sample_bytes


def test_icarl_keeps_exemplars_their_order_class_means_and_the_old_net() -> None:
    """Two classes a task, 2 exemplars each: 4 exemplars x (16 B + label 8 B) after task 1, 8 after task 2.

    The model is an extractor Linear(4, 5) and a classifier Linear(5, 4), 196 B, and means of 5 features for 4 classes
    as a buffer, 80 B, which it keeps a second time in a plain dict: unregistered. Auxiliary: a 4-byte rank for each
    exemplar, the plugin's own copy of the means, 80 B, and a deep copy of it all as the old model: 196 + 80 + 80 B.
    """
    torch.manual_seed(0)
    extractor, classifier = nn.Linear(4, 5), nn.Linear(5, 4)
    optimizer = torch.optim.SGD([*extractor.parameters(), *classifier.parameters()], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sets: ConcatDataset[tuple[Tensor, int]] = ConcatDataset([Toy(0), Toy(1)])
        data = _make_taskaware_classification_dataset(sets, targets=Toy(0).targets + Toy(1).targets)
        benchmark = nc_benchmark(data, data, n_experiences=2, task_labels=False, shuffle=False)
        strategy = supervised.ICaRL(
            feature_extractor=extractor,
            classifier=classifier,
            optimizer=optimizer,
            memory_size=2,
            buffer_transform=None,
            fixed_memory=False,
            train_mb_size=4,
            eval_mb_size=4,
            evaluator=EvaluationPlugin(loggers=[]),
        )
    for held, exemplars in zip(train(strategy, benchmark.train_stream), (4, 8), strict=True):
        counted = footprint(held)
        assert (counted.replay_samples, counted.replay_bytes) == (exemplars, exemplars * SAMPLE)
        assert (counted.parameter_bytes, counted.buffer_bytes) == (MODEL, 80)
        assert counted.auxiliary_bytes == {
            "_ICaRLPlugin.order": exemplars * 4,
            "_ICaRLPlugin.class_means": 80,
            "ICaRLLossPlugin.old_model": 356,
            "unregistered": 80,
        }
        assert counted.answer_bytes == 356


def test_a_data_set_that_knows_the_size_of_its_samples_is_believed() -> None:
    for held in train(make(supervised.Replay, mem_size=8), stream(Packed)):
        assert footprint(held).replay_bytes == 8 * 12


def test_a_sample_in_two_buffers_counts_once() -> None:
    """Samples 0..5 and 3..8 of one data set, the second through a concatenation: nine samples."""
    data = Toy(0)
    strategy = make(supervised.Naive)
    strategy.first = Subset(data, range(6))
    strategy.second = Subset(ConcatDataset([Toy(1), data]), range(15, 21))
    held = foreign_holdings(strategy)
    assert (held.replay_samples, held.replay_extra_bytes) == (9, 9 * SAMPLE)


def test_measuring_a_sample_draws_nothing() -> None:
    """A data set whose items are random: the three global generators stand where they stood."""

    class Noisy(Toy):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            np.random.rand(3)  # noqa: NPY002 - the global generator is what must not move
            return torch.rand(4), int(torch.randint(2, ()))

    strategy = make(supervised.Naive)
    strategy.buffer = Subset(Noisy(0), [1, 2])
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - as above
    assert foreign_holdings(strategy).replay_extra_bytes == 2 * SAMPLE
    drawn = torch.rand(1), np.random.rand()  # noqa: NPY002 - as above
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - as above
    assert drawn == (torch.rand(1), np.random.rand())  # noqa: NPY002 - as above


def test_heads_of_a_multi_head_net_belong_to_their_tasks() -> None:
    """A trunk Linear(4, 5), 25 elements, for all tasks; heads of 2 and 3 units with 5 weights and a bias: 12 + 18."""
    model = MTSimpleMLP(input_size=4, hidden_size=5)
    model.classifier.classifiers["1"] = nn.Linear(5, 3)
    counted = footprint(foreign_holdings(make(supervised.Naive, model)))
    assert (counted.parameters_shared, counted.parameters_per_task) == (25, 12 + 18)


def test_two_plugins_of_one_class_keep_their_names_apart() -> None:
    strategy = make(SupervisedTemplate, plugins=[RWalkPlugin(ewc_lambda=1.0), RWalkPlugin(ewc_lambda=2.0)])
    for held in train(strategy):
        counted = footprint(held)
        assert counted.auxiliary_bytes["RWalkPlugin.exp_params"] == MODEL
        assert counted.auxiliary_bytes["RWalkPlugin.exp_params#2"] == MODEL
