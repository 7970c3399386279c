"""Peak memory of the process while something runs, read from the kernel (Linux)."""

import contextlib
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def run_memory(function: Callable[[], object]) -> int | None:
    """Run a function once and return by how many bytes the peak resident memory rose above the memory before it.

    Memory that was given back to the allocator earlier is used again without showing, so this is a lower bound.

    Returns:
        Bytes; None where the kernel does not offer it (the function is run all the same).
    """
    resettable = _reset_peak()
    before = _status_bytes("VmRSS")
    function()
    peak = _status_bytes("VmHWM")
    if not resettable or before is None or peak is None:
        return None
    return max(0, peak - before)


def peak_memory() -> int | None:
    """Return the peak resident memory of this process in bytes since the last reset, None where unknown."""
    return _status_bytes("VmHWM")


def _reset_peak() -> bool:
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5", encoding="ascii")  # 5: reset the peak resident size, nothing else
        return True
    return False


def _status_bytes(field: str) -> int | None:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None
