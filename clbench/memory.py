"""Peak memory and seconds of each phase of a run.

A peak is the highest level inside the phase above the level at its start, in bytes. Three meters stand behind it:

- CUDA: `max_memory_allocated` after a reset, and `max_memory_reserved` as it is, because what runs out is the reserve;
- CPU: the allocator's own peak, through a counter around torch's CPU allocator (memory_cpu.cpp, compiled on demand in
  about a second and kept in the user's cache). It sees kernels' scratch and what is freed again inside one operation;
- CPU without a compiler: torch's profiler, for short phases only.

The resident set of the process stands beside them. Watermarks belong to the process: one meter at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import psutil
import torch

from clbench.records import Peak

CpuMeter = Literal["auto", "allocator", "profiler", "none"]

PROFILED_SECONDS = 2.0
"""The profiler keeps every event in memory: it measures only phases expected to be shorter than this."""

_SOURCE = Path(__file__).with_name("memory_cpu.cpp")


class Reading(NamedTuple):
    """One stretch of time, bytes above the level at its start."""

    net: int
    """Level at the end."""
    peak: int


class Source(Protocol):
    """Measures one stretch at a time. Never raises: a run must not end because its meter failed."""

    def start(self, seconds: float | None) -> None:
        """Begin a stretch of a phase that took `seconds` the last time; None when it never ran."""

    def settle(self) -> None:
        """Wait for the work of the stretch to end."""

    def stop(self) -> Reading | None:
        """End the stretch. None when it could not be measured."""


# ---------------------------------------------------------------------------------------------------------- allocator


class AllocatorUnavailable(Exception):
    """Why the counting allocator cannot be used, in one line."""


class _Allocator:
    """The counters of memory_cpu.cpp; the library stays loaded for the life of the process."""

    def __init__(self, library: Path) -> None:
        try:
            # PyDLL keeps Python's lock: a counter is read faster than the lock changes hands.
            self._library = ctypes.PyDLL(str(library))
            self._install = self._library.clbench_install
            self._live, self._peak = self._library.clbench_live, self._library.clbench_peak
            self._reset = self._library.clbench_reset_peak
        except (OSError, AttributeError) as error:
            raise AllocatorUnavailable(f"the compiled counter does not load ({_first_line(error)})") from None
        self._live.restype = self._peak.restype = ctypes.c_int64
        self._reset.restype = None

    def install(self) -> None:
        """Put the counter in place, once, and see that it counts. Raises AllocatorUnavailable."""
        if self._install() != 0:
            raise AllocatorUnavailable("torch's CPU allocator has been replaced by one that cannot be counted")
        before = self.live()
        block = torch.empty(4096, dtype=torch.uint8)
        # At least: another thread may be at work.
        if self.live() < before + block.numel():
            raise AllocatorUnavailable("torch's allocations do not reach the counter")

    def live(self) -> int:
        return int(self._live())

    def peak(self) -> int:
        return int(self._peak())

    def reset(self) -> None:
        self._reset()


@functools.cache
def _allocator() -> _Allocator | str:
    """Return the installed counter, or the reason there is none. Found out once a process."""
    try:
        return _installed()
    except AllocatorUnavailable as reason:
        return str(reason)


def _installed() -> _Allocator:
    if sys.platform != "linux":
        raise AllocatorUnavailable(f"the counter is built on Linux only, this is {sys.platform}")
    abi = int(torch.compiled_with_cxx11_abi())
    flags = ["-std=c++20", "-O2", "-shared", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"]
    known = "\0".join([torch.__version__, platform.machine(), *flags]).encode() + _SOURCE.read_bytes()
    name = f"memory_cpu-torch{torch.__version__}-abi{abi}-{hashlib.sha256(known).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clbench"
    if (cache / name).is_file():
        # A damaged one is built anew.
        with contextlib.suppress(AllocatorUnavailable):
            return _ready(cache / name)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=cache)
    except OSError:
        # No home to write to: build for this process alone. A loaded library needs its file no longer.
        folder = tempfile.TemporaryDirectory()
    with folder as scratch:
        built = _compile(Path(scratch) / name, flags)
        with contextlib.suppress(OSError):
            # In one step: several processes may build at once, each finds a whole file or none.
            built = built.replace(cache / name)
        return _ready(built)


def _ready(library: Path) -> _Allocator:
    allocator = _Allocator(library)
    allocator.install()
    return allocator


def _compiler() -> str | None:
    """Return the C++ compiler to use: $CXX, else g++, clang++ or c++."""
    candidates = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def _compile(target: Path, flags: list[str]) -> Path:
    compiler = _compiler()
    if compiler is None:
        raise AllocatorUnavailable("no C++ compiler (g++, clang++ or c++)")
    root = Path(torch.__file__).parent
    places = [f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    command = [compiler, *flags, *places, str(_SOURCE), "-o", str(target), "-lc10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AllocatorUnavailable(f"{compiler} failed ({_first_line(error)})") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise AllocatorUnavailable(f"{compiler} failed ({lines[0] if lines else f'exit code {done.returncode}'})")
    return target


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def describe() -> str:
    """Return one line: which meter measures CPU memory here, and why. Compiles the counter if need be."""
    found = _allocator()
    if isinstance(found, str):
        return f"profiler, for phases under {PROFILED_SECONDS:g} s; longer ones have no allocator peak: {found}"
    return "allocator: a counter around torch's CPU allocator"


# ------------------------------------------------------------------------------------------------------------ sources


class _NoSource:
    def start(self, seconds: float | None) -> None:
        pass

    def settle(self) -> None:
        pass

    def stop(self) -> Reading | None:
        return None


class _AllocatorSource(_NoSource):
    def __init__(self, allocator: _Allocator) -> None:
        self._allocator = allocator
        self._level = 0

    def start(self, seconds: float | None) -> None:
        self._level = self._allocator.live()
        self._allocator.reset()

    def stop(self) -> Reading | None:
        return Reading(self._allocator.live() - self._level, self._allocator.peak() - self._level)


class _CudaSource:
    """Also keeps `reserved`, the highest reserve of the stretch, which is absolute.

    A device that has failed cannot be read. The error is not lost: the next operation on the device raises it again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._level: int | None = None
        self.reserved: int | None = None

    def start(self, seconds: float | None) -> None:
        self._level = self.reserved = None
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._level = torch.cuda.memory_allocated(self._device)

    def settle(self) -> None:
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self._device)

    def stop(self) -> Reading | None:
        if self._level is None:
            return None
        try:
            self.reserved = torch.cuda.max_memory_reserved(self._device)
            now, peak = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        except RuntimeError:
            return None
        return Reading(now - self._level, peak - self._level)


class _ProfilerSource(_NoSource):
    """Sums the allocation events of torch's profiler, for stretches of phases known to be short.

    The profiler does not tell of blocks freed in the stretch but allocated before it, so a peak may come out too high.
    """

    def __init__(self) -> None:
        self._profile: torch.profiler.profile | None = None

    def start(self, seconds: float | None) -> None:
        self._profile = None
        # A profiler of the user's own would be cancelled by a second one.
        if seconds is None or seconds > PROFILED_SECONDS or torch.autograd.profiler._is_profiler_enabled:
            return
        with contextlib.suppress(RuntimeError):
            profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            profile.start()
            self._profile = profile

    def stop(self) -> Reading | None:
        running, self._profile = self._profile, None
        if running is None:
            return None
        running.stop()
        results = running.profiler.kineto_results if running.profiler is not None else None
        if results is None:
            return None
        # Any: torch's stubs leave out `nbytes`, which every memory event has.
        events: list[Any] = [event for event in results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        levels = list(itertools.accumulate((event.nbytes() for event in events), initial=0))
        return Reading(levels[-1], max(levels))


class _ResidentSource:
    """The resident set of this process: the kernel's own watermark on Linux, else the level at the end."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._level = 0
        self._watermark = False

    def start(self) -> None:
        self._watermark = _reset_watermark()
        self._level = self._process.memory_info().rss

    def stop(self) -> Reading | None:
        try:
            net = self._process.memory_info().rss - self._level
            peak = _watermark() - self._level if self._watermark else net
        except (OSError, psutil.Error):
            return None
        # The kernel keeps these counts loosely: a peak may seem to lie a few pages under either end.
        return Reading(net, max(peak, net, 0))


def _reset_watermark() -> bool:
    """Set the peak of the resident set to its level; False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _watermark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


# -------------------------------------------------------------------------------------------------------------- meter


@dataclass
class _Track:
    """One quantity over the stretches of one phase; None once a stretch is unknown."""

    offset: int | None = 0
    """Level now, above the level at the phase's start."""
    peak: int | None = 0

    def add(self, reading: Reading | None, *, own: bool) -> None:
        """Append a stretch, the phase's own or one of a phase inside it, which moves the level and not the peak."""
        if reading is None or self.offset is None:
            self.offset = self.peak = None
            return
        if own and self.peak is not None:
            self.peak = max(self.peak, self.offset + reading.peak)
        self.offset += reading.net


@dataclass
class _Phase:
    name: str
    seconds: float = 0.0
    allocated: _Track = field(default_factory=_Track)
    resident: _Track = field(default_factory=_Track)
    reserved: int | None = None


class Meter:
    """Measures phases: peak memory above the level before each, and seconds.

    Args:
        device: where the run computes. On CUDA the device's allocator is measured, else the CPU's.
        cpu: how to measure the CPU: "auto" takes the counting allocator, or the profiler where that cannot be built;
            "none" measures no allocations. Ignored on CUDA.

    Raises:
        RuntimeError: `cpu` is "allocator" and it cannot be built; the message says why.
    """

    def __init__(self, device: torch.device, *, cpu: CpuMeter = "auto") -> None:
        self.name, self._source = _source(torch.device(device), cpu)
        self._resident = _ResidentSource()
        self._open: list[_Phase] = []
        self._peaks: dict[str, Peak] = {}
        self._seconds: dict[str, float] = {}
        self._lasted: dict[str, float] = {}
        self._began = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the body as a phase.

        A phase inside a phase pauses the outer one: neither its seconds nor its peak are the outer's. What it leaves
        allocated is: the outer's level is the one at the outer's start. A phase that raises is recorded as well.
        """
        if self._open:
            self._halt()
        phase = _Phase(name)
        self._open.append(phase)
        self._go()
        try:
            yield
        finally:
            self._halt()
            self._open.pop()
            self._record(phase)
            if self._open:
                self._go()

    def take(self) -> tuple[dict[str, Peak], dict[str, float]]:
        """Return peaks and seconds of the phases ended since the last take, by name, and forget them.

        A name that came more than once has the highest of its peaks (unknown if one of them is) and the sum of its
        seconds.
        """
        taken = self._peaks, self._seconds
        self._peaks, self._seconds = {}, {}
        return taken

    def _go(self) -> None:
        """Start a stretch of the innermost phase. The meters' own work stays outside its seconds."""
        self._resident.start()
        self._source.start(self._lasted.get(self._open[-1].name))
        self._began = time.perf_counter()

    def _halt(self) -> None:
        """End the stretch of the innermost phase, and move the levels of the phases around it."""
        inner = self._open[-1]
        self._source.settle()
        inner.seconds += time.perf_counter() - self._began
        allocated, resident = self._source.stop(), self._resident.stop()
        if isinstance(self._source, _CudaSource) and self._source.reserved is not None:
            inner.reserved = max(inner.reserved or 0, self._source.reserved)
        for phase in self._open:
            phase.allocated.add(allocated, own=phase is inner)
            phase.resident.add(resident, own=phase is inner)

    def _record(self, phase: _Phase) -> None:
        now = Peak(
            allocated_bytes=phase.allocated.peak,
            reserved_bytes=phase.reserved,
            resident_bytes=phase.resident.peak,
            meter=self.name,
        )
        before = self._peaks.get(phase.name)
        self._peaks[phase.name] = now if before is None else _higher(before, now)
        self._seconds[phase.name] = self._seconds.get(phase.name, 0.0) + phase.seconds
        self._lasted[phase.name] = phase.seconds


def _source(device: torch.device, cpu: CpuMeter) -> tuple[str, Source]:
    """Return the name and the source that measure allocations."""
    if device.type == "cuda":
        return "cuda", _CudaSource(device)
    if cpu == "none":
        return "none", _NoSource()
    if cpu in ("auto", "allocator"):
        found = _allocator()
        if not isinstance(found, str):
            return "allocator", _AllocatorSource(found)
        if cpu == "allocator":
            raise RuntimeError(f"CPU memory cannot be measured at the allocator: {found}")
    return "profiler", _ProfilerSource()


def _higher(a: Peak, b: Peak) -> Peak:
    def highest(x: int | None, y: int | None) -> int | None:
        return None if x is None or y is None else max(x, y)

    return Peak(
        allocated_bytes=highest(a.allocated_bytes, b.allocated_bytes),
        reserved_bytes=highest(a.reserved_bytes, b.reserved_bytes),
        resident_bytes=highest(a.resident_bytes, b.resident_bytes),
        meter=a.meter,
    )
