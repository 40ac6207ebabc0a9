"""What a run asks of its process while it lasts: reproducibility, stopping in good order, memory that is kept."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import sys
import threading
from collections.abc import Iterator

import numpy as np
import torch

from clbench import checkpoint
from clbench.seeds import derive, derive32

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # their numbers in malloc.h


@contextlib.contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Fix everything a run's numbers depend on besides its seed, and put torch's and the generators' state back.

    On one thread of the CPU, numbers too small for a normal float (1e-38) count as zero meanwhile. The moments of
    weights that no gradient reaches any more, those outside of a mask, decay to such numbers: Adam then takes fifty
    times as long. With more threads they stay: the processor's mode is a thread's own, and torch's pool keeps its own.
    """
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), _flushes()
    generators = checkpoint.generator_states({})
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_flush_denormal(threads == 1)
    random.seed(derive(seed, "global"))
    # Strategies from elsewhere draw from NumPy's global generator.
    np.random.seed(derive32(seed, "global"))  # noqa: NPY002
    torch.manual_seed(derive(seed, "global"))
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.set_flush_denormal(before[2])
        checkpoint.restore_generators(generators, {})


def _flushes() -> bool:
    """Whether this thread takes denormal numbers for zero; torch does not tell."""
    return bool((torch.full((1,), 1e-36) / 1000 == 0).item())


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Have glibc keep freed memory for the next allocation; on leaving, what is free then goes back to the system.

    By itself it gives the end of its heap back as soon as twice its largest block is free there. Where a training step
    frees and allocates that much (gradients, masked weights), that is at every step or never, by chance of what lies
    behind; at every step it costs a page fault for each 4 KiB, in a net of 300,000 weights a fifth of the time. How
    glibc sets its limits by itself cannot be brought back: later on the process keeps up to 2 GiB. Other C libraries go
    on as they are.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):  # musl has none
        yield
        return
    assert library is not None
    library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most it takes; larger blocks are mapped one by one
    library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        library.malloc_trim(0)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let a termination signal end a run as Ctrl-C does: with a record that says so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        # Once is enough: a second signal must not break off the saving of the record.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
