"""The most memory that a process has had so far, for scripts that tests run in processes of their own."""

import os
from pathlib import Path


def environment() -> dict[str, str]:
    """Return the environment of a process that imports this module."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}


def peak_kib() -> int:
    """Return it in KiB. `getrusage` would not do: a process inherits the figure of the one that started it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
