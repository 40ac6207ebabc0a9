"""What generating a net's weights costs: hypernets of ResNet-32 against the plain net, and their output regulariser.

    python -m benchmarks.hypernet [--quick] [--device cuda] [--repeats N] [--json FILE]

Everything runs in one process, on one CPU thread, and takes turns, so that a busy machine slows all alike; on the CPU
the clock is the process's own (CPU seconds). Ratios are taken within a turn; the tables show their median over turns,
in brackets the smallest and the largest, and after the bar the ratio of the fastest turns.

    training     a step, optimiser included, with all the weights made anew, against one of the plain net; `plain again`
                 says how far the measurement can be trusted
    evaluation   a batch with weights that are kept, and with weights made anew
    regulariser  its backward pass, task by task, with targets from a snapshot or stored, in training steps of the same
                 hypernet. `one graph` is the sum over all tasks as it is written down, `ahead` looks a step ahead,
                 `a tenth` asks every task for a tenth of its chunks, `at once` makes several tasks' weights in one pass
    memory       what its targets take (`held`), and the most that a backward pass allocates above the level before it,
                 gradients of the generator included; in target sizes, the bytes of the weights that are generated. The
                 bar is of one task at a time (`group = 1`); unless told so, strategies make as many tasks' weights at
                 once as are 2^21 numbers, four of this net's, which is faster and takes more

The generators make their weights in chunks. Of 1,000 weights, from two hidden layers, they are small; of 7,000, without
a hidden layer, they are those of von Oswald et al. 2020 for this target. The others are larger than their target, and
the regulariser, whose cost grows with the generator, is measured on the first two alone. Images are random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.tables import columns, options, table
from benchmarks.timing import finish, machine, seconds, take_turns
from clbench.environment import choose_device
from clbench.memory import Meter
from clbench.nets import HeadedNet, MultiHead, ResNet32
from clbench.nets.hypernet import Chunked, HyperNet, Target
from clbench.nets.hypernet.regulariser import OutputRegulariser, Targets, candidate_step
from clbench.specs import TrainSpec
from clbench.strategies.base import new_optimizer

TRAIN_BARS = {8: 1.50, 64: 1.15}
"""Batch size -> most that a training step may take, in steps of the plain net."""
EVALUATE_BAR = 1.12
"""Most that evaluation with kept weights may take, in the plain net's."""
SAMPLE_BAR = 0.05
"""Most that the regulariser may take for one task drawn, in training steps with batches of `BATCH`."""
MEMORY_BAR = 5.0
"""Most that the regulariser may allocate, in target sizes."""
FLAT = 1.01
"""Most that it may allocate for the most tasks, in that for the fewest."""
BATCH = 32
TASKS = (5, 10, 20, 50)
GROUP = 5
"""Tasks whose weights the regulariser makes in one pass, where it makes several."""
KINDS: tuple[Targets, ...] = ("snapshot", "stored")
SMALL: dict[str, dict[str, Any]] = {
    "chunks of 1000, hidden 50-50": {"chunk": 1_000, "hidden": (50, 50)},
    "chunks of 7000, linear": {"chunk": 7_000},
}
LARGE: dict[str, dict[str, Any]] = {
    "chunks of 8000, hidden 100-100": {"chunk": 8_000, "hidden": (100, 100)},
    "chunks of 32000, hidden 100-100": {"chunk": 32_000, "hidden": (100, 100)},
}
Net = HeadedNet | HyperNet


# ------------------------------------------------------------------------------------------------------------- the nets


def plain(device: torch.device) -> HeadedNet:
    """Return the net with its own weights, and a head of ten classes."""
    torch.manual_seed(0)
    net = HeadedNet(ResNet32((3, 32, 32)), MultiHead(64, 0)).to(device)
    net.observe(0, range(10))
    return net


def hyper(settings: dict[str, Any], tasks: int, device: torch.device, kept_tasks: int = 1) -> HyperNet:
    """Return the net whose weights are generated, which has observed tasks of ten classes."""
    torch.manual_seed(0)
    trunk = ResNet32((3, 32, 32))
    generator = Chunked(Target(trunk), embedding_size=32, chunk_embedding_size=32, **settings)
    net = HyperNet(HeadedNet(trunk, MultiHead(64, 0)), 0, generator, kept_tasks=kept_tasks).to(device)
    for task in range(tasks):
        net.observe(task, range(10))
    return net


def adam(net: Net) -> torch.optim.Optimizer:
    """Return the optimiser of a run."""
    return new_optimizer(TrainSpec(epochs=1, batch_size=1, optimizer="adam", lr=1e-3), net.parameters())


def training(net: Net, optimizer: torch.optim.Optimizer, batch: int, device: torch.device) -> Callable[[], None]:
    """Return a training step."""
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x, 0), y))
        optimizer.step()

    return step


def evaluation(net: Net, batch: int, device: torch.device) -> Callable[[], None]:
    """Return an evaluation of one batch."""
    x = torch.randn(batch, 3, 32, 32, device=device)
    net.eval()

    @torch.no_grad()
    def answer() -> None:
        net(x, 0)

    return answer


def mean_seconds(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Return what a piece of work takes on average."""
    return seconds(lambda: [work() for _ in range(times)], device) / times


def is_generated(side: str) -> bool:
    """Whether a side is a hypernet that is to meet the bar."""
    return not side.startswith("plain") and "anew" not in side


# ------------------------------------------------------------------------------------------------------ the regulariser


def regulariser(net: HyperNet, earlier: int, targets: Targets, **settings: Any) -> OutputRegulariser:
    """Return the regulariser of so many earlier tasks."""
    embeddings = {task: net.embedding(task) for task in range(earlier)}
    return OutputRegulariser(
        net.generator, embeddings, targets, generator_of_chance=torch.Generator().manual_seed(0), **settings
    )


def backward_at_once(penalty: OutputRegulariser) -> None:
    """Run the sum over all tasks backwards."""
    torch.autograd.backward(penalty.value())


@torch.no_grad()
def move(net: HyperNet) -> None:
    """Let the generator go a little way, so that there is something to hold."""
    for parameter in net.generator.parameters():
        parameter.add_(1e-3 * torch.randn_like(parameter))


def costs(net: HyperNet, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return training steps and passes of the regulariser by name."""
    optimizer = adam(net)
    sides: dict[str, Callable[[], object]] = {}
    for name in ("training", "training again"):
        sides[name] = training(net, optimizer, BATCH, device)
    for targets in KINDS:
        for tasks in TASKS:
            sides[f"{targets}, {tasks} tasks"] = partial(regulariser(net, tasks, targets).backward, 1.0)
    for targets in KINDS:
        one = regulariser(net, TASKS[-1], targets, tasks=1)
        sides[f"{targets}, one of {TASKS[-1]} tasks drawn"] = partial(one.backward, 1.0)
    tenth = regulariser(net, TASKS[-1], "snapshot", chunks=0.1)
    sides[f"snapshot, {TASKS[-1]} tasks, a tenth of their chunks"] = partial(tenth.backward, 1.0)
    grouped = regulariser(net, TASKS[-1], "snapshot", group=GROUP)
    sides[f"snapshot, {TASKS[-1]} tasks, {GROUP} at once"] = partial(grouped.backward, 1.0)
    few = regulariser(net, TASKS[0], "snapshot")
    sides[f"snapshot, {TASKS[0]} tasks, one graph"] = partial(backward_at_once, few)
    sides[f"snapshot, {TASKS[0]} tasks, ahead"] = lambda: few.backward(1.0, candidate_step(optimizer, net.generator))
    move(net)
    return sides


def peaks(net: HyperNet, device: torch.device) -> dict[tuple[Targets, int], dict[str, int | None]]:
    """Return the bytes that are allocated at most, by targets, tasks and way; None where nothing measures them."""
    meter, optimizer = Meter(device), adam(net)
    found: dict[tuple[Targets, int], dict[str, int | None]] = {}

    def peak(name: str, work: Callable[[], object]) -> int | None:
        for _ in range(2):  # without a compiler only a phase whose length is known is measured
            for parameter in net.generator.parameters():
                parameter.grad = None
            with meter.phase(name):
                work()
            allocated = meter.take()[0][name].allocated_bytes
        return allocated

    training(net, optimizer, 2, device)()
    step = candidate_step(optimizer, net.generator)
    for targets in KINDS:
        for tasks in TASKS:
            every = regulariser(net, tasks, targets)
            one = regulariser(net, tasks, targets, tasks=1)
            tenth = regulariser(net, tasks, targets, chunks=0.1)
            grouped = regulariser(net, tasks, targets, group=GROUP)
            move(net)
            ways: dict[str, Callable[[], object]] = {
                "by task": partial(every.backward, 1.0),
                "one drawn": partial(one.backward, 1.0),
                "a tenth": partial(tenth.backward, 1.0),
                "ahead": partial(every.backward, 1.0, step),
                f"{GROUP} at once": partial(grouped.backward, 1.0),
                "one graph": partial(backward_at_once, every),
            }
            found[targets, tasks] = {name: peak(name, work) for name, work in ways.items()}
    return found


def memory_table(found: dict[tuple[Targets, int], dict[str, int | None]], net: HyperNet) -> str:
    """Return in target sizes, as plain text, what targets take and the peaks, and whether these meet their bars."""
    ways, elements = list(next(iter(found.values()))), net.generator.target.size
    size = elements * next(net.generator.parameters()).element_size()
    lines = [["targets", "tasks", "held", *ways, "bar"]]
    for (targets, tasks), of in found.items():
        # A snapshot is the generator and the tasks' embeddings; stored, a task's target is all of its weights.
        held = tasks if targets == "stored" else net.generator.parameters_with(tasks) / elements
        shown = ["unknown" if bytes_ is None else f"{bytes_ / size:.2f}" for bytes_ in of.values()]
        lines.append([targets, str(tasks), f"{held:.2f}", *shown, ""])
        fewest, most = found[targets, TASKS[0]]["by task"], of["by task"]
        if tasks == TASKS[-1] and fewest is not None and most is not None:
            met = most <= MEMORY_BAR * size and most <= FLAT * fewest
            lines[-1][-1] = f"by task {'met' if met else 'MISSED'} ({MEMORY_BAR:.2f}, {FLAT:.2f} of {TASKS[0]} tasks')"
    return columns(lines)


# ----------------------------------------------------------------------------------------------------------- the tables


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    chosen = options("hypernet", __doc__, 9).parse_args(arguments)
    device = choose_device(chosen.device)
    repeats = chosen.repeats or (2 if chosen.quick else 9)
    torch.set_num_threads(1)
    began = time.perf_counter()
    print(f"{machine(device)}, {device.type}, torch {torch.__version__}, {torch.get_num_threads()} CPU thread")
    print(f"median (smallest-largest) of {repeats} turns | fastest turns")
    rows: list[dict[str, Any]] = []

    def show(
        title: str,
        sides: Mapping[str, Callable[[], object]],
        times: int,
        bar: float,
        judged: Callable[[str], bool],
        digits: int = 2,
    ) -> None:
        times = 1 if chosen.quick else times
        found = take_turns({name: partial(mean_seconds, work, times, device) for name, work in sides.items()}, repeats)
        print(f"\n{title}\n{table(found, 1, bar, judged, digits)}", flush=True)
        rows.extend({"part": title, "side": name, "seconds": took, "steps": times} for name, took in found.items())

    size = Target(plain(torch.device("cpu")).trunk).size
    nets = {}
    for name, settings in (SMALL | LARGE).items():
        net = hyper(settings, 1, device)
        nets[f"{name} ({net.generator.parameters_with(1) / size:.2f})"] = settings
    for batch, bar in TRAIN_BARS.items():
        ours: dict[str, Net] = {name: plain(device) for name in ("plain", "plain again")}
        ours |= {name: hyper(settings, 1, device) for name, settings in nets.items()}
        sides = {name: training(net, adam(net), batch, device) for name, net in ours.items()}
        title = f"training: ResNet-32, batch {batch}; in brackets the generator's parameters per weight generated"
        show(title, sides, 40 // batch or 1, bar, is_generated)
    sides = {name: evaluation(plain(device), 8, device) for name in ("plain", "plain again")}
    for name, settings in nets.items():
        sides[name] = evaluation(hyper(settings, 1, device), 8, device)
        sides[f"{name}, made anew"] = evaluation(hyper(settings, 1, device, kept_tasks=0), 8, device)
    show("evaluation: ResNet-32, batch 8", sides, 10, EVALUATE_BAR, is_generated)
    for name, settings in SMALL.items():
        net = hyper(settings, TASKS[-1], device)
        title = f"regulariser: {name}; in training steps of batch {BATCH}"
        show(title, costs(net, device), 1, SAMPLE_BAR, lambda side: "one of" in side, 3)
    for name, settings in SMALL.items():
        net = hyper(settings, TASKS[-1], device)
        peaked = peaks(net, device)
        title = f"memory: {name}; in target sizes of {size} numbers"
        print(f"\n{title}\n{memory_table(peaked, net)}", flush=True)
        rows.extend(
            {"part": title, "side": f"{targets}, {tasks} tasks, {way}", "peak_bytes": peak}
            for (targets, tasks), of in peaked.items()
            for way, peak in of.items()
        )
    finish(chosen.json, device, repeats, began, rows)


if __name__ == "__main__":
    main()
