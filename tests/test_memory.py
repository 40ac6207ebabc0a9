"""Peaks and seconds of phases, against sums by hand."""

from __future__ import annotations

import functools
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from clbench import memory
from clbench.memory import Meter
from clbench.records import Peak

CPU = torch.device("cpu")
MB = 1_000_000

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(shutil.which(name) for name in ("g++", "clang++", "c++")),
    reason="the counting allocator needs Linux and a C++ compiler",
)


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this test run alone: the user's is not written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a compiler, and without a counter built before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(memory, "_compiler", lambda: None)
    # Not forgotten but set aside: finding the counter a second time would wrap it a second time.
    found = functools.cache(memory._allocator.__wrapped__)
    monkeypatch.setattr(memory, "_allocator", found)


def allocated(meter: Meter, name: str) -> int | None:
    return meter.take()[0][name].allocated_bytes


# ---------------------------------------------------------------------------------------------------------- allocator


@needs_compiler
def test_an_addition_peaks_at_its_result_and_a_view_at_nothing() -> None:
    """Two inputs of 4 MB before the phase. c = a + b: 4 MB; its view: nothing; d = a + c: 8 MB; c gone, e: 8 MB."""
    a, b = torch.ones(MB), torch.ones(MB)
    meter = Meter(CPU, cpu="allocator")
    with meter.phase("train"):
        c = a + b
        d = a + c.view(-1)
        del c
        e = a + d
        del d, e
    assert allocated(meter, "train") == 8 * MB


@needs_compiler
def test_a_concatenation_peaks_at_its_result() -> None:
    """1,000,000 + 8 + 1,000,000 floats: 8 MB + 32 B."""
    meter = Meter(CPU, cpu="allocator")
    parts = [torch.ones(MB), torch.ones(8), torch.ones(MB)]
    with meter.phase("grow"):
        torch.cat(parts)
    assert allocated(meter, "grow") == 8 * MB + 32


@needs_compiler
def test_scratch_inside_one_operation_is_seen() -> None:
    """The median of 1,000,000 floats works on a copy that no operation returns: at least 4 MB."""
    meter = Meter(CPU, cpu="allocator")
    values = torch.ones(MB)
    with meter.phase("train"):
        values.median()
    peak = allocated(meter, "train")
    assert peak is not None
    assert 4 * MB <= peak < 4 * MB + 1000


@needs_compiler
def test_a_linear_layer_peaks_in_its_backward_pass() -> None:
    """W of 1000 x 1000, batch 64, no bias: y = 64 x 1000 floats = 256,000 B, then dW = 4,000,000 B beside it.

    The gradient of y is given from before, x asks for none, dW is stored as it is computed, without a copy.
    """
    layer, x, g = nn.Linear(1000, 1000, bias=False), torch.ones(64, 1000), torch.ones(64, 1000)
    meter = Meter(CPU, cpu="allocator")
    with meter.phase("train"):
        y = layer(x)
        y.backward(g)
        del y
    assert allocated(meter, "train") == 256_000 + 4_000_000


@needs_compiler
def test_blocks_older_than_the_phase_lower_the_level_when_freed() -> None:
    """4 MB freed, then 3 MB taken: never above the level before. The peak is 0, and known."""
    meter = Meter(CPU, cpu="allocator")
    old = [torch.ones(MB)]
    with meter.phase("consolidate"):
        old.clear()
        torch.ones(3 * MB // 4)
    assert allocated(meter, "consolidate") == 0


@needs_compiler
def test_blocks_older_than_the_counter_are_never_counted() -> None:
    """In a fresh process: 4 MB from before the counter are freed, 4 MB are taken: live is 4 MB, not 0."""
    code = (
        "import torch; old = torch.ones(1_000_000); from clbench import memory; counter = memory._allocator();"
        "before = counter.live(); del old; new = torch.ones(1_000_000); print(counter.live() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 4 * MB


@needs_compiler
def test_the_counter_serves_convolutions_threads_and_forks() -> None:
    """OneDNN takes its scratch raw, loaders fork: both must find a sound allocator, and the counter no leak."""
    meter = Meter(CPU, cpu="allocator")
    with meter.phase("train"):
        net = nn.Conv2d(3, 8, 3)
        net(torch.ones(2, 3, 16, 16)).sum().backward()
        with multiprocessing.get_context("fork").Pool(1) as pool:
            assert pool.map(_sum_of_ones, [7]) == [7.0]
        del net
    counter = memory._allocator()
    assert not isinstance(counter, str)
    before = counter.live()
    with meter.phase("train"):
        torch.ones(MB).add(1)
    assert counter.live() == before


def _sum_of_ones(n: int) -> float:
    return float(torch.ones(n).sum())


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bytes]]:
    """The files that would be loaded and their contents, instead of loading a second counter into this process."""
    files: list[tuple[Path, bytes]] = []

    def ready(library: Path) -> None:
        if not library.stat().st_size:
            memory._Allocator(library)
        files.append((library, library.read_bytes()))

    monkeypatch.setattr(memory, "_ready", ready)
    return files


@needs_compiler
def test_the_counter_is_built_once_and_a_damaged_one_anew(
    loaded: list[tuple[Path, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built, then found again and left alone; an empty file in its place does not load, and is replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    memory._installed()
    (built,) = (tmp_path / "clbench").iterdir()
    assert torch.__version__ in built.name
    stamp = built.stat().st_mtime_ns
    memory._installed()
    assert built.stat().st_mtime_ns == stamp
    built.write_bytes(b"")
    memory._installed()
    assert [path for path, _ in loaded] == [built] * 3
    assert all(content.startswith(b"\x7fELF") for _, content in loaded)


@needs_compiler
def test_the_counter_works_without_a_cache_to_write_to(
    loaded: list[tuple[Path, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    memory._installed()
    ((path, content),) = loaded
    assert content.startswith(b"\x7fELF")
    assert not path.exists()


# -------------------------------------------------------------------------------------------------------------- phases

METERS = [pytest.param("allocator", marks=needs_compiler), "profiler"]


@pytest.mark.parametrize("cpu", METERS)
def test_an_inner_phase_pauses_the_outer_one(cpu: memory.CpuMeter) -> None:
    """The outer takes 4 MB; the inner 12 MB and keeps 8; the outer then takes 2 MB above its own 4 and those 8: 14.

    The inner's peak is 12, above the level where it began. Its sleep of 150 ms is not the outer's time.
    """
    meter = Meter(CPU, cpu=cpu)
    for _ in range(2):  # the profiler measures a phase from the second time on
        with meter.phase("train"):
            a = torch.ones(MB)
            with meter.phase("consolidate"):
                b = torch.ones(2 * MB)
                torch.ones(MB)
                time.sleep(0.15)
            c = torch.ones(MB // 2)
        peaks, seconds = meter.take()
        del a, b, c
    assert peaks["consolidate"].allocated_bytes == 12 * MB
    assert peaks["train"].allocated_bytes == 14 * MB
    assert seconds["train"] < 0.15 <= seconds["consolidate"]


@pytest.mark.parametrize("cpu", METERS)
def test_the_peak_of_an_inner_phase_is_not_the_outers(cpu: memory.CpuMeter) -> None:
    meter = Meter(CPU, cpu=cpu)
    for _ in range(2):
        with meter.phase("train"):
            a = torch.ones(MB)
            with meter.phase("evaluate"):
                torch.ones(4 * MB)
            del a
        peaks, _ = meter.take()
    assert peaks["train"].allocated_bytes == 4 * MB
    assert peaks["evaluate"].allocated_bytes == 16 * MB


@needs_compiler
def test_repeated_phases_take_the_highest_peak_and_the_sum_of_seconds() -> None:
    meter = Meter(CPU, cpu="allocator")
    for size in (1, 3, 2):
        with meter.phase("grow"):
            torch.ones(size * MB)
            time.sleep(0.01)
    peaks, seconds = meter.take()
    assert peaks["grow"].allocated_bytes == 12 * MB
    assert seconds["grow"] >= 0.03
    assert meter.take() == ({}, {})


@needs_compiler
def test_a_phase_that_raises_is_recorded_and_closed() -> None:
    """Two nested phases raise; both are recorded, and the next phase measures from its own level."""
    meter = Meter(CPU, cpu="allocator")

    def fail() -> None:
        with meter.phase("train"), meter.phase("consolidate"):
            torch.ones(MB)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with meter.phase("evaluate"):
        torch.ones(MB // 2)
    peaks, seconds = meter.take()
    assert {name: peak.allocated_bytes for name, peak in peaks.items()} == {
        "train": 0,
        "consolidate": 4 * MB,
        "evaluate": 2 * MB,
    }
    assert list(seconds) == ["consolidate", "train", "evaluate"]


def test_every_number_is_an_integer_or_unknown() -> None:
    meter = Meter(CPU)
    with meter.phase("train"):
        torch.ones(10)
    peak = meter.take()[0]["train"]
    assert peak.reserved_bytes is None
    for value in (peak.allocated_bytes, peak.resident_bytes):
        assert value is None or type(value) is int


# ------------------------------------------------------------------------------------------------------------ fallback


def test_without_a_compiler_the_profiler_stands_in_and_says_so(no_compiler: None) -> None:
    assert memory.describe() == (
        "profiler, for phases under 2 s; longer ones have no allocator peak: no C++ compiler (g++, clang++ or c++)"
    )
    meter = Meter(CPU)
    with meter.phase("train"):
        torch.ones(MB)
    assert meter.take()[0]["train"].meter == "profiler"
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        Meter(CPU, cpu="allocator")


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_compiler", lambda: sys.executable)
    with pytest.raises(memory.AllocatorUnavailable, match="failed"):
        memory._compile(tmp_path / "out.so", ["-std=c++20"])


def test_the_profiler_measures_phases_known_to_be_short_and_no_others() -> None:
    """First time: unknown, for it may be long. After a short first time: 4 MB. After a long one: unknown."""
    meter = Meter(CPU, cpu="profiler")
    peaks: list[int | None] = []
    for _ in range(3):
        with meter.phase("train"):
            torch.ones(MB)
        peaks.append(allocated(meter, "train"))
        if len(peaks) == 2:
            meter._lasted["train"] = memory.PROFILED_SECONDS + 1
    assert peaks == [None, 4 * MB, None]


def test_one_unknown_repetition_makes_the_peak_unknown() -> None:
    meter = Meter(CPU, cpu="profiler")
    for _ in range(2):
        with meter.phase("train"):
            torch.ones(MB)
    assert allocated(meter, "train") is None


def test_a_profiler_of_the_users_own_is_left_alone() -> None:
    meter = Meter(CPU, cpu="profiler")
    with meter.phase("train"):
        pass
    meter.take()
    with torch.autograd.profiler.profile() as own, meter.phase("train"):
        torch.ones(MB)
    assert allocated(meter, "train") is None
    assert own.kineto_results is not None


def test_no_meter_says_none_and_never_zero() -> None:
    meter = Meter(CPU, cpu="none")
    with meter.phase("train"):
        torch.ones(MB)
    peak = meter.take()[0]["train"]
    assert (peak.meter, peak.allocated_bytes) == ("none", None)


# ------------------------------------------------------------------------------------------------------------ resident


@pytest.mark.skipif(not memory._reset_watermark(), reason="the kernel does not let its watermark be reset")
def test_the_resident_set_sees_pages_that_were_touched_and_given_back() -> None:
    """A map of 64 MiB, touched and unmapped inside the phase: the peak has it, give or take a megabyte or so."""
    meter = Meter(CPU, cpu="none")
    with meter.phase("train"):
        torch.ones(16 * 2**20)
    resident = meter.take()[0]["train"].resident_bytes
    assert resident is not None
    assert 62 * 2**20 < resident < 80 * 2**20


def test_without_a_watermark_the_resident_set_is_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is still there at the end counts: 64 MiB held; what was given back is missed, but never negative."""
    monkeypatch.setattr(memory, "_reset_watermark", lambda: False)
    meter = Meter(CPU, cpu="none")
    with meter.phase("grow"):
        held = torch.ones(16 * 2**20)
    with meter.phase("train"):
        del held
    peaks, _ = meter.take()
    grown, freed = peaks["grow"].resident_bytes, peaks["train"].resident_bytes
    assert grown is not None
    assert freed == 0
    assert grown > 60 * 2**20


# ---------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_peaks_stand_above_the_level_before() -> None:
    """8 MiB before the phase are not in it; 4 MiB and 4 MiB at once are; the reserve is absolute: at least all 16."""
    device = torch.device("cuda")
    before = torch.ones(2 * 2**20, device=device)
    meter = Meter(device)
    with meter.phase("train"):
        a = torch.ones(2**20, device=device)
        b = a + 1
        with meter.phase("evaluate"):
            torch.ones(3 * 2**20, device=device)
        del a, b
    peaks, _ = meter.take()
    assert isinstance(peaks["train"], Peak)
    assert peaks["train"].meter == "cuda"
    assert peaks["train"].allocated_bytes == 8 * 2**20
    assert peaks["evaluate"].allocated_bytes == 12 * 2**20
    reserved = peaks["train"].reserved_bytes
    assert reserved is not None
    assert reserved >= 16 * 2**20
    del before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_running_out_of_cuda_memory_leaves_a_record() -> None:
    meter = Meter(torch.device("cuda"))
    with pytest.raises(torch.OutOfMemoryError), meter.phase("train"):
        torch.empty(2**50, device="cuda", dtype=torch.uint8)
    assert meter.take()[0]["train"].allocated_bytes == 0
