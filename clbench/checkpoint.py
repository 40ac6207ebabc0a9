"""Save and restore a run between tasks, bit for bit.

A checkpoint is one file of tensors and plain values, read back with `weights_only`: a manipulated file can break a run,
never run code. It is written beside its place and renamed. It holds the strategy's state, the state of every generator
of random numbers, and the record so far; the data are not in it, they come from the stream again.
"""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clbench.records import write_atomic


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` (tensors, numbers, strings, nested in dicts and lists) to `path`, atomically."""
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path, device: torch.device) -> dict[str, Any] | None:
    """Read a checkpoint onto `device`; None where there is none, or none that can be read."""
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        return None
    return content if isinstance(content, dict) else None


def generator_states(own: Mapping[str, torch.Generator]) -> dict[str, Any]:
    """Return the state of every generator: the named ones, and the global ones of torch, CUDA, NumPy and Python."""
    # NumPy's global generator is the legacy one; strategies from elsewhere draw from it.
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    version, numbers, gauss = random.getstate()
    return {
        "own": {key: generator.get_state() for key, generator in own.items()},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(numbers), gauss],
    }


def restore_generators(states: Mapping[str, Any], own: Mapping[str, torch.Generator]) -> None:
    """Put every generator back where `generator_states` found it."""
    for key, generator in own.items():
        generator.set_state(states["own"][key].cpu())
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(  # noqa: NPY002  # the same global generator
        (name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached)
    )
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
