"""What every test shares: no network, and the folder of real data where there is one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: pytest-xdist starts a worker a core, so a second thread in each only gets in the way; and on
# some processors oneDNN's backward convolution of a wide ResNet ends a two-threaded process under pytest.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection beyond this machine, at once; sockets between our own processes stay open."""
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests may not use the network (connection to {address[0]})")
        connect(self, address)

    def guarded_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in (None, "", "127.0.0.1", "::1", "localhost", socket.gethostname()):
            raise OSError(f"tests may not use the network (look-up of {host})")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_resolve)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The cache folder with the real MNIST and CIFAR-100; skips where CLBENCH_DATA does not name one."""
    folder = os.environ.get("CLBENCH_DATA")
    if not folder:
        pytest.skip("CLBENCH_DATA is not set: no real data")
    missing = [name for name in ("mnist", "cifar100") if not (Path(folder) / name / "meta.json").is_file()]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not in CLBENCH_DATA ({folder}): clbench data import NAME FILE.npz")
    return Path(folder)
