"""The global generators of chance, left as they were by code of others that draws from them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def kept_randomness() -> Iterator[None]:
    """Undo what the body draws from the global generators of Python, numpy and torch: a run must not notice."""
    python = random.getstate()
    # NPY002 wants generators of one's own; here the global one is saved, because packages of others draw from it.
    numpy = np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
