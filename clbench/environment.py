"""Where a run happens and which code it is: what enters its record besides the method and the numbers."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

from clbench import __version__
from clbench.errors import UserError
from clbench.records import Code, Environment


def choose_device(name: str) -> torch.device:
    """Return the device of a name: "auto", "cpu", "cuda" or "cuda:<n>". Raises UserError when there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise UserError(f"--device {name}: must be auto, cpu, cuda or cuda:<number>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here; use cpu")
    return device


def environment(device: torch.device, threads: int) -> Environment:
    """Return where a run happens."""
    cuda = device.type == "cuda"
    return Environment(
        device="cuda" if cuda else "cpu",
        device_name=torch.cuda.get_device_name(device) if cuda else _processor(),
        threads=threads,
        python=platform.python_version(),
        torch=str(torch.__version__),
        cuda=torch.version.cuda if cuda else None,
        avalanche=importlib.metadata.version("avalanche-lib"),
        platform=f"{platform.system()} {platform.machine()}",
    )


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code_version() -> Code:
    """Return which clbench this is; commit and dirty flag where it runs from a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return Code(version=__version__, commit=None, dirty=None)

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # Records and figures are what runs produce: they do not make the code another one.
    changed = git("status", "--porcelain", "--", ".", ":!results")
    return Code(version=__version__, commit=git("rev-parse", "HEAD"), dirty=None if changed is None else bool(changed))
