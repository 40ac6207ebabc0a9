"""One growth in a process of its own: `python -m clbench.lab.worker '<Order as JSON>'` prints its peaks as JSON.

A fresh process, because freed memory that is still resident would hide the next growth's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from clbench.lab.record import Layer
from clbench.lab.ways import Case, Way, way
from clbench.memory import Meter
from clbench.records import Peak

PLACES = 4096
"""Elements of the weight that are marked before the growth and looked at after it."""

BLOCK = 128 * 1024
"""Bytes from which the C library maps a block of its own and returns it when freed. Left alone, it raises the limit."""


class Order(BaseModel):
    """What to measure."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    layer: Layer
    width: int
    dim: Literal[0, 1]
    k: int
    adam: bool
    growth: int
    """Which growth is measured; those before it are not."""
    device: str
    threads: int


def measure(order: Order, timeout: float = 600.0) -> Peak:
    """Return the peaks of one growth, measured in a process of its own.

    Raises:
        RuntimeError: the process failed; the message is what it said last.
    """
    command = [sys.executable, "-m", "clbench.lab.worker", order.model_dump_json()]
    surroundings = {
        **os.environ,
        "OMP_NUM_THREADS": str(order.threads),
        "MALLOC_MMAP_THRESHOLD_": str(BLOCK),
        "MALLOC_TRIM_THRESHOLD_": str(BLOCK),
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=surroundings, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"{order.method}, {order.layer}: the measuring process failed: {said}")
    return Peak.model_validate_json(done.stdout.splitlines()[-1])


def grow_and_look(order: Order, *, fresh: bool) -> Peak:
    """Return the peaks of one growth in this process, after seeing that it kept the weight.

    Args:
        order: what to measure.
        fresh: whether this process has done nothing else; if not, the resident set is unknown.

    Raises:
        RuntimeError: the grown weight is not the old one followed by zeros.
    """
    device = torch.device(order.device)
    meter = Meter(device)
    # A small one first: what is loaded and built at first use is no part of the growth.
    _grown(way(order.method, Case(order.layer, 8), device, order.adam), order.dim, 1, order.growth)
    held = way(order.method, Case(order.layer, order.width), device, order.adam)
    _grown(held, order.dim, order.k, order.growth - 1)
    places = _marked(held)
    shape = list(held.weight().shape)
    with meter.phase("grow"):
        held.grow(order.dim, order.k)
    peaks, _ = meter.take()
    grown = held.weight()
    expected = [size + order.k * (i == order.dim) for i, size in enumerate(shape)]
    new = grown.narrow(order.dim, shape[order.dim], order.k)
    kept = torch.equal(grown[places], torch.arange(1.0, len(places[0]) + 1, device=device))
    if list(grown.shape) != expected or not kept or bool(new.any()):
        raise RuntimeError("the growth did not keep the weight")
    return peaks["grow"] if fresh else peaks["grow"].model_copy(update={"resident_bytes": None})


def _grown(held: Way, dim: int, k: int, times: int) -> None:
    for _ in range(times):
        held.grow(dim, k)


def _marked(held: Way) -> tuple[torch.Tensor, ...]:
    """Write 1, 2, 3, ... at places all over the weight; return the places, an index a dimension."""
    weight = held.weight()
    count = min(PLACES, weight.numel())
    step = weight.numel() // count
    number = torch.arange(count, device=weight.device)
    # 7919 is prime: within each stretch of `step` elements the place differs, so that all columns have their turn.
    places = torch.unravel_index(number * step + number * 7919 % step, weight.shape)
    with torch.no_grad():
        weight[places] = number.to(weight.dtype) + 1
    return places


if __name__ == "__main__":
    asked = Order.model_validate_json(sys.argv[1])
    torch.set_num_threads(asked.threads)
    print(grow_and_look(asked, fresh=True).model_dump_json())
