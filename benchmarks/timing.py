"""What the benchmarks share: clocks, ratios taken turn by turn, and what they were measured on."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

Seconds = dict[str, list[float]]
"""What each side took, by turn."""


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long `work` takes: CPU seconds on the CPU, seconds until the device is done on CUDA."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratios of two sides, turn by turn."""
    return [one / other for one, other in zip(above, below, strict=True)]


def spread(above: Sequence[float], below: Sequence[float], digits: int = 2) -> str:
    """Return median and range of the ratios, and the ratio of the fastest turns."""
    found = ratios(above, below)
    middle, least, most = (f"{value:.{digits}f}" for value in (statistics.median(found), min(found), max(found)))
    return f"{middle:>5} ({least}-{most}) | {min(above) / min(below):.{digits}f}"


def take_turns(sides: Mapping[str, Callable[[], float]], repeats: int) -> Seconds:
    """Return what each side took, by turn; a first turn, cold, is thrown away.

    Args:
        sides: by name, each to be run once a turn; returns the seconds it took. Every other turn runs the other way
            round: coming first or last gains nothing.
        repeats: turns.
    """
    found: Seconds = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name in list(sides) if turn % 2 else list(sides)[::-1]:
            took = sides[name]()
            if turn:
                found[name].append(took)
    return found


def machine(device: torch.device) -> str:
    """Return what the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    described = Path("/proc/cpuinfo")
    for line in described.read_text().splitlines() if described.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def finish(file: Path | None, device: torch.device, repeats: int, began: float, rows: list[dict[str, object]]) -> None:
    """Say how long a benchmark took; write what every turn took to a file, if one is asked for.

    Args:
        file: None writes nothing.
        device: of the benchmark.
        repeats: turns.
        began: `time.perf_counter()` at its start.
        rows: part, side and figures of each side.
    """
    spent = round(time.perf_counter() - began)
    print(f"\n{spent} s in all")
    if file is not None:
        about = {"machine": machine(device), "device": device.type, "torch": torch.__version__, "repeats": repeats}
        file.write_text(json.dumps({**about, "seconds": spent, "rows": rows}, indent=1) + "\n")
