"""What batched loading saves: stock Avalanche against clbench against a loop that loads nothing.

    python -m benchmarks.loading [--quick] [--device cuda] [--repeats N] [--json FILE]

Everything runs in one process, on one CPU thread, and takes turns, so that a busy machine slows all alike; on the CPU
the clock is the process's own (CPU seconds), which stands still while others have the core. Ratios are taken within a
turn; the table shows their median over turns, in brackets the smallest and the largest, and after the bar the ratio of
the fastest turns. Timed are one pass over the second task of a stream, consolidation included (a first task was learned
before, so that penalty, memory and teacher are at work), and the evaluation of two test sets.

    stock    Avalanche's strategy on two forms of the same data (benchmarks/stock.py): `classes`, as Avalanche's own
             PermutedMNIST and SplitCIFAR100 make it, and `tensors`, finished float32 images in memory
    clbench  own: the suite's own strategy; fast: Avalanche's, read through `fast_loading`
    ceiling  forward, backward and step on one fixed batch, as many times: what no loading can beat

All use the same net, the same fused optimiser, the same number of steps on the same number of samples, the same
estimator (EWC: gradients of mini-batches) and the same memory (replay: two batches). The conv net's images are cropped
and flipped at random, as SplitCIFAR100 does. Stock nets keep PyTorch's default memory layout; the suite's convolutions
run channels-last on the CPU, ceiling included, and the row `layout` says what that alone is worth. The bars are set
against `classes`, and for fine-tuning to the ceiling.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from avalanche import training as avalanche
from avalanche.benchmarks.scenarios import CLScenario
from numpy.typing import NDArray
from torch import nn

from benchmarks.stock import Stock, permuted_classes, split_classes, tensors
from benchmarks.tables import columns, options
from benchmarks.timing import machine, ratios, seconds, spread
from clbench import data
from clbench.environment import choose_device
from clbench.nets import HeadedNet, build_head, build_trunk
from clbench.specs import PermutedStream, SplitPart, SplitStream, TrainSpec
from clbench.strategies.base import Setup, Strategy, new_optimizer
from clbench.strategies.er import ER
from clbench.strategies.ewc import EWC
from clbench.strategies.finetune import Finetune
from clbench.strategies.foreign import Foreign
from clbench.streams import Stream, make_stream

TEST_SAMPLES = 500
"""Per task, of which there are two."""
CEILING_BAR = 1.20
"""Most that fine-tuning may take, in ceilings."""
STOCKS = ("classes", "tensors")
Learner = Stock | Strategy | Foreign
Streams = tuple[CLScenario, CLScenario]
"""One to learn a first, short task from, and the one that is timed."""


@dataclass(frozen=True)
class Bench:
    """One net on one stream of two tasks."""

    title: str
    bar: float
    """Least that stock Avalanche should take, in clbench's time."""
    source: str
    stream: Stream
    streams: Mapping[str, Streams]
    """By side."""
    setup: Setup
    default: Setup
    """The same, its net in PyTorch's default memory layout."""
    steps: int
    """Timed, per turn."""


@dataclass
class Times:
    """Seconds by turn."""

    train: list[float] = field(default_factory=list)
    evaluate: list[float] = field(default_factory=list)


Sides = dict[str, Times]
"""Of one net and method: "classes", "tensors", "fast", "own"; and for fine-tuning "ceiling" and "layout"."""


# ------------------------------------------------------------------------------------------------------------- benches


def mlp(device: torch.device, steps: int, folder: Path) -> Bench:
    """Permuted MNIST on 784-400-400-10."""
    name, root, source = images("mnist", (28, 28), 10, folder)

    def stream(samples: int) -> Stream:
        spec = PermutedStream(
            kind="permuted", dataset=name, n_tasks=2, scenario="domain", normalise="dataset",
            train_samples_per_task=samples, test_samples_per_task=TEST_SAMPLES,
        )
        return make_stream(spec, 0, device, root)

    budget = TrainSpec(epochs=1, batch_size=128, optimizer="sgd", lr=0.01)
    net = ("mlp", {"hidden": [400, 400]})
    return bench("MLP 784-400-400-10, batch 128", 2.0, source, stream, permuted_classes, net, budget, steps, device)


def convnet(device: torch.device, steps: int, folder: Path) -> Bench:
    """Two tasks of ten CIFAR-100 classes on a small conv net."""
    name, root, source = images("cifar100", (32, 32, 3), 20, folder)

    def stream(samples: int) -> Stream:
        parts = [SplitPart(dataset=name, n_tasks=2, classes_per_task=10)]
        spec = SplitStream(
            kind="split", parts=parts, scenario="domain", normalise="dataset", augment="crop_flip",
            train_samples_per_task=samples, test_samples_per_task=TEST_SAMPLES,
        )
        return make_stream(spec, 0, device, root)

    budget = TrainSpec(epochs=1, batch_size=64, optimizer="sgd", lr=0.01)
    net = ("zenke", {"channels": (16, 32), "hidden": 256})
    return bench("conv net 16-32-256, batch 64", 1.5, source, stream, split_classes, net, budget, steps, device)


def images(name: str, shape: tuple[int, ...], n_classes: int, folder: Path) -> tuple[str, Path | None, str]:
    """Return name, cache and description of the real data where they are in the cache, else of noise like them."""
    if any(entry.name == name and entry.present for entry in data.status()):
        return name, None, f"{name} from the cache"
    rng = np.random.default_rng(0)
    arrays: dict[str, NDArray[Any]] = {}
    for split, count in (("train", 800 * n_classes), ("test", 100 * n_classes)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % n_classes
    np.savez(folder / "noise.npz", allow_pickle=True, **arrays)
    like = f"noise_like_{name}"
    data.import_npz(like, folder / "noise.npz", folder)
    return like, folder, f"random uint8 images of the shape of {name}, which is not in the cache"


def bench(
    title: str,
    bar: float,
    source: str,
    stream: Callable[[int], Stream],
    classes: Callable[[Stream], CLScenario],
    net: tuple[str, dict[str, Any]],
    budget: TrainSpec,
    steps: int,
    device: torch.device,
) -> Bench:
    """Put streams, net and budget together."""
    first, timed = stream(4 * budget.batch_size), stream(steps * budget.batch_size)
    resident = (first.benchmark, timed.benchmark)
    streams = {
        "classes": (classes(first), classes(timed)),
        "tensors": (tensors(first), tensors(timed)),
        "fast": resident,
        "own": resident,
    }

    def new_net(channels_last: bool) -> HeadedNet:
        torch.manual_seed(0)
        trunk = build_trunk(net[0], timed.input_shape, **net[1])
        trunk.channels_last = channels_last
        return HeadedNet(trunk, build_head("domain", "fixed", trunk.out_features, timed.outputs, 0, True))

    ours, default = (Setup(partial(new_net, layout), budget, device, 0) for layout in (True, False))
    return Bench(title, bar, source, timed, streams, ours, default, steps)


def learners(setup: Setup, default: Setup) -> dict[str, dict[str, Callable[[], Learner]]]:
    """Return how to make each method's learner, by side."""
    batch = setup.train.batch_size
    ewc = EWC.Config(lam=10.0, fisher="batched", mode="separate", fisher_batch_size=batch)
    er = ER.Config(buffer=2 * batch, policy="reservoir", replay_batch_size=batch)

    def theirs(cls: type, **settings: Any) -> dict[str, Callable[[], Learner]]:
        stock: dict[str, Callable[[], Learner]] = dict.fromkeys(STOCKS, lambda: Stock(cls, settings, default))
        return stock | {"fast": lambda: Foreign(cls, settings, setup, "domain")}

    return {
        "finetune": theirs(avalanche.Naive) | {"own": lambda: Finetune(setup=setup, config=Finetune.Config())},
        "ewc": theirs(avalanche.EWC, ewc_lambda=10.0) | {"own": lambda: EWC(setup=setup, config=ewc)},
        "replay": theirs(avalanche.Replay, mem_size=2 * batch) | {"own": lambda: ER(setup=setup, config=er)},
        "lwf": theirs(avalanche.LwF, alpha=1.0, temperature=2.0),
    }


# ----------------------------------------------------------------------------------------------------------- the clock


def time_learner(learner: Learner, streams: Streams, device: torch.device) -> tuple[float, float]:
    """Return seconds of training on the second task, and of evaluating on both."""
    learner.train_task(streams[0].train_stream[0])
    task, tests = streams[1].train_stream[1], list(streams[1].test_stream)
    return (
        seconds(lambda: learner.train_task(task), device),
        seconds(lambda: [learner.accuracy(test) for test in tests], device),
    )


def time_ceiling(bench: Bench, setup: Setup) -> float:
    """Return seconds of as many steps on one fixed batch."""
    net = setup.new_net().to(setup.device).train()
    optimizer = new_optimizer(setup.train, net.parameters())
    index = torch.arange(setup.train.batch_size, device=setup.device)
    x, y = bench.stream.train[1].inputs(index), bench.stream.train[1].labels[index]

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(net(x), y))
            optimizer.step()

    steps(4)
    return seconds(lambda: steps(bench.steps), setup.device)


def measure(benches: Sequence[Bench], repeats: int) -> dict[tuple[str, str], Sides]:
    """Return what every side took, by net and method; a first turn, cold, is thrown away."""
    found: dict[tuple[str, str], Sides] = {}
    for turn in range(repeats + 1):
        for bench in benches:
            for method, make in learners(bench.setup, bench.default).items():
                took = {}
                # Every other turn the other way round: coming first or last gains nothing.
                for side in list(make) if turn % 2 else list(make)[::-1]:
                    took[side] = time_learner(make[side](), bench.streams[side], bench.setup.device)
                if method == "finetune":
                    took["ceiling"] = time_ceiling(bench, bench.setup), 0.0
                    took["layout"] = time_ceiling(bench, bench.default), 0.0
                sides = found.setdefault((bench.title, method), {})
                for side, (train, evaluate) in took.items() if turn else ():
                    times = sides.setdefault(side, Times())
                    times.train.append(train)
                    times.evaluate.append(evaluate)
    return found


# ----------------------------------------------------------------------------------------------------------- the table


def verdict(method: str, side: str, sides: Sides, bar: float) -> str:
    """Say whether a side meets its bars, which are set for the suite's own strategy where there is one."""
    if side != ("own" if "own" in sides else "fast"):
        return ""
    train = sides[side].train
    missed = [f"under {bar:.1f}"] if statistics.median(ratios(sides["classes"].train, train)) < bar else []
    if method == "finetune" and statistics.median(ratios(train, sides["ceiling"].train)) > CEILING_BAR:
        missed.append(f"over {CEILING_BAR:.2f} ceilings")
    return "missed: " + ", ".join(missed) if missed else f"met ({bar:.1f})"


def table(found: Mapping[str, Sides], bar: float) -> str:
    """Return the methods of one net as plain text."""
    heads = ["method", "side", *(f"train, {name}" for name in STOCKS), *(f"evaluate, {name}" for name in STOCKS)]
    lines = [[*heads, "in ceilings", "bar"]]
    for method, sides in found.items():
        for side in ("own", "fast", "ceiling", "layout"):
            if side not in sides:
                continue
            mine = sides[side]
            train = [spread(sides[stock].train, mine.train) if side != "layout" else "" for stock in STOCKS]
            learns = side in ("own", "fast")
            evaluate = [spread(sides[stock].evaluate, mine.evaluate) if learns else "" for stock in STOCKS]
            compared = method == "finetune" and side != "ceiling"
            ceilings = spread(mine.train, sides["ceiling"].train) if compared else ""
            lines.append([method, side, *train, *evaluate, ceilings, verdict(method, side, sides, bar)])
    return columns(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    chosen = options("loading", __doc__, 7).parse_args(arguments)
    device = choose_device(chosen.device)
    repeats = chosen.repeats or (2 if chosen.quick else 7)
    torch.set_num_threads(1)
    start = time.perf_counter()
    # Avalanche calls what it has itself deprecated, at every update of a buffer.
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True):
        benches = [
            mlp(device, 8 if chosen.quick else 32, Path(folder)),
            convnet(device, 4 if chosen.quick else 10, Path(folder)),
        ]
        found = measure(benches, repeats)
    about = {
        "machine": machine(device),
        "device": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "data": {bench.title: bench.source for bench in benches},
        "steps": {bench.title: bench.steps for bench in benches},
        "seconds": round(time.perf_counter() - start),
    }
    print(f"{about['machine']}, {device.type}, torch {about['torch']}, {about['threads']} CPU thread")
    print(f"stock / clbench: median (smallest-largest) of {repeats} turns | fastest turns; {about['seconds']} s in all")
    for bench in benches:
        print(f"\n{bench.title}; {bench.steps} steps a turn; {bench.source}")
        print(table({method: sides for (title, method), sides in found.items() if title == bench.title}, bench.bar))
    if chosen.json is not None:
        rows = [
            {"net": title, "method": method, "side": side, "seconds": asdict(times)}
            for (title, method), sides in found.items()
            for side, times in sides.items()
        ]
        chosen.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
