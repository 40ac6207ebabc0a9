"""What sharing weights costs in time: linked layers against plain ones, masked training against fine-tuning.

    python -m benchmarks.sharing [--quick] [--device cuda] [--repeats N] [--json FILE]

Everything runs in one process, on one CPU thread, and takes turns, so that a busy machine slows all alike; on the CPU
the clock is the process's own (CPU seconds). Ratios are taken within a turn; the tables show their median over turns,
in brackets the smallest and the largest, and after the bar the ratio of the fastest turns.

    linked layers  forward and backward of a linked layer, the gradient of its source's weight included, against a plain
                   layer of the same shape; `plain again` says how far the measurement can be trusted
    masked steps   the mean training step on a second task, a first one having been learned before, so that held
                   weights, masks and attention are at work; of every phase, retraining included

Each method runs with its recipe's settings for the protocol; batch, net and optimiser are the protocol's, and the
process is set up as a run sets it up.

Small nets and layers miss a bar that larger ones meet: their own work takes so little that a few calls more are a large
share. What no implementation on top of PyTorch's kernels comes below is measured along with the rest, by name:

    bound: a copy          a linked layer whose function copies the weight, the least that yields another one
    bound: optimiser       fine-tuning whose optimiser moves scores, too, as many as there are weights with a fan-in:
                           what every method that trains weights and scores pays (wsn)
    bound: its arithmetic  the same with the passes that make a mask of scores and gradients of both, called one by one
                           on plain tensors: no autograd, no module, no bookkeeping
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.loading import images
from benchmarks.tables import options, table
from benchmarks.timing import Seconds, finish, machine, seconds, take_turns
from clbench.environment import choose_device
from clbench.loading import Batch
from clbench.nets.shared.linked import Link, LinkedConv2d, LinkedLinear
from clbench.nets.shared.maps import Apply, LowRank, Same, Scale, Square
from clbench.nets.shared.masks import TopMask, masked
from clbench.nets.shared.tasknet import matrices
from clbench.process import memory_kept, reproducible
from clbench.recipes import load_baseline, load_task, resolve
from clbench.runner import net_factory
from clbench.specs import PermutedStream, SplitStream, TaskSpec
from clbench.strategies.base import Setup, Strategy
from clbench.strategies.build import build
from clbench.streams import Stream, make_stream

LINK_BAR = 1.10
"""Most that a linked layer may take, in plain ones."""
MASK_BAR = 1.25
"""Most that a masked training step may take, in steps of fine-tuning."""
MASKED = ("wsn", "supsup", "packnet", "hat", "xdg", "batch_ensemble")
OPTIMISER, ARITHMETIC = BOUNDS = ("bound: optimiser", "bound: its arithmetic")


# -------------------------------------------------------------------------------------------------------- linked layers


def layers(kind: str, device: torch.device) -> dict[str, nn.Module]:
    """Return the layers by name; a linked one holds the source that it takes its weight from."""

    def plain() -> nn.Module:
        return (nn.Conv2d(64, 64, 3, padding=1) if kind == "conv" else nn.Linear(64, 64)).to(device)

    def linked(fn: nn.Module) -> nn.Module:
        link = LinkedConv2d if kind == "conv" else LinkedLinear
        return link(plain(), fn.to(device), bias_fn=Same())

    shape = (64, 64, 3, 3) if kind == "conv" else (64, 64)
    return {
        "plain": plain(),
        "plain again": plain(),
        "square": linked(Square()),
        "scale per unit": linked(Scale(64)),
        "low rank 4": linked(LowRank(shape, 4)),
        "bound: a copy": linked(Apply(torch.clone)),
    }


def time_links(shape: tuple[int, ...], steps: int, repeats: int, device: torch.device) -> Seconds:
    """Return what forward and backward of each layer took on inputs of a shape; a first turn is thrown away."""
    sides = layers("conv" if len(shape) == 4 else "linear", device)
    x = torch.randn(shape, device=device, requires_grad=True)

    def run(module: nn.Module) -> None:
        trained = [*module.parameters(), *(module.source.parameters() if isinstance(module, Link) else ()), x]
        for _ in range(steps):
            for value in trained:
                value.grad = None
            torch.autograd.backward(module(x).sum())

    return take_turns({name: partial(seconds, partial(run, module), device) for name, module in sides.items()}, repeats)


# --------------------------------------------------------------------------------------------------------- masked steps


@dataclass(frozen=True)
class Protocol:
    """Two tasks of a shipped protocol, cut to as many steps as are timed."""

    title: str
    task: TaskSpec
    stream: Stream
    source: str


def protocol(title: str, name: str, steps: int, device: torch.device, folder: Path) -> Protocol:
    """Return the protocol `name`, on real data where they are in the cache."""
    task = load_task(name)
    count = steps * task.train.batch_size
    cut = {"train_samples_per_task": count, "test_samples_per_task": 100}
    stream: PermutedStream | SplitStream
    if isinstance(task.stream, PermutedStream):
        data, root, source = images("mnist", (28, 28), 10, folder)
        stream = task.stream.model_copy(update=cut | {"dataset": data, "n_tasks": 2, "validation": 0.0})
    else:
        assert isinstance(task.stream, SplitStream)
        data, root, source = images("cifar100", (32, 32, 3), 20, folder)
        part = task.stream.parts[0].model_copy(update={"dataset": data, "n_tasks": 2})
        stream = task.stream.model_copy(update=cut | {"parts": [part]})
    budget = task.train.model_copy(update={"epochs": 1, "iterations": None})
    task = task.model_copy(update={"stream": stream, "train": budget})
    return Protocol(title, task, make_stream(stream, 0, device, root), source)


def time_steps(protocol: Protocol, side: str, device: torch.device) -> float:
    """Return the mean seconds of a training step on the second task."""
    experiment = resolve(protocol.task, load_baseline("finetune" if side in BOUNDS else side), {})
    new_net = net_factory(experiment, protocol.stream, 0)
    torch.manual_seed(0)
    learner = build(experiment, Setup(new_net, experiment.train, device, 0))
    assert isinstance(learner, Strategy)
    first, second = list(protocol.stream.benchmark.train_stream)
    learner.train_task(first)
    if side in BOUNDS:
        bound(learner, side)
    took: list[float] = []
    step: Callable[[Batch], None] = learner.train_step

    def timed(batch: Batch) -> None:
        took.append(seconds(partial(step, batch), device))

    # The step alone: what a method does around a task is no part of it. mypy wants no method replaced on an object.
    setattr(learner, "train_step", timed)  # noqa: B010
    learner.train_task(second)
    return statistics.fmean(took)


def bound(learner: Strategy, side: str) -> None:
    """Have fine-tuning do what masks cannot do without; its learning is none of a method's."""
    weights = list(matrices(learner.model.trunk).values())
    scores = [nn.Parameter(torch.randn_like(weight)) for weight in weights]
    choices = [TopMask(0.1) for _ in weights]

    def before_task(experience: object) -> None:
        learner.optimizer.param_groups[0]["params"].extend(scores)

    @torch.no_grad()
    def after_backward() -> None:
        for weight, score, choose in zip(weights, scores, choices, strict=True):
            gradient = weight.grad
            assert gradient is not None
            if side == OPTIMISER:
                score.grad = gradient
                continue
            by = choose.by_size(score)
            masked(weight, score, by)
            weight.grad = masked(gradient, score, by)
            score.grad = score.sign().mul_(gradient).mul_(weight)

    setattr(learner, "before_task", before_task)  # noqa: B010 - see time_steps
    setattr(learner, "after_backward", after_backward)  # noqa: B010


def time_masks(protocol: Protocol, repeats: int, device: torch.device) -> Seconds:
    """Return what a step of each method took, by turn; a first turn, cold, is thrown away."""
    sides = ["finetune", *MASKED, *BOUNDS]
    return take_turns({side: partial(time_steps, protocol, side, device) for side in sides}, repeats)


# ----------------------------------------------------------------------------------------------------------- the tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    chosen = options("sharing", __doc__, 9).parse_args(arguments)
    device = choose_device(chosen.device)
    repeats = chosen.repeats or (2 if chosen.quick else 9)
    torch.set_num_threads(1)
    began = time.perf_counter()
    few = 5 if chosen.quick else 100
    print(f"{machine(device)}, {device.type}, torch {torch.__version__}, {torch.get_num_threads()} CPU thread")
    print(f"median (smallest-largest) of {repeats} turns | fastest turns")
    rows: list[dict[str, Any]] = []

    def show(title: str, found: Seconds, per: int, bar: float, judged: Callable[[str], bool]) -> None:
        print(f"\n{title}\n{table(found, per, bar, judged)}", flush=True)
        rows.extend({"part": title, "side": name, "seconds": took, "steps": per} for name, took in found.items())

    linked = ("square", "scale per unit", "low rank 4")
    for words, shape, steps in (
        ("conv 64-64, 3x3, on 8x8 images, batch 4", (4, 64, 8, 8), few),
        ("conv 64-64, 3x3, on 16x16 images, batch 32", (32, 64, 16, 16), max(2, few // 10)),
        ("linear 64-64, batch 256", (256, 64), few),
    ):
        found = time_links(shape, steps, repeats, device)
        show(f"linked layers: {words}; forward and backward", found, steps, LINK_BAR, linked.__contains__)
    with tempfile.TemporaryDirectory() as folder, reproducible(0, 1), memory_kept():
        for title, name, steps in (
            ("MLP 784-100-100, batch 10", "permuted_mnist_wsn", 2 * few),
            ("MLP 784-100-100, batch 128", "permuted_mnist_henning", few),
            ("conv net 16-32-256, batch 32", "split_cifar100_10x10_cpu", max(5, few // 5)),
        ):
            one = protocol(title, name, steps, device, Path(folder))
            found = time_masks(one, repeats, device)
            show(f"masked steps: {title}; {one.source}", found, 1, MASK_BAR, MASKED.__contains__)
    finish(chosen.json, device, repeats, began, rows)


if __name__ == "__main__":
    main()
