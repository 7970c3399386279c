"""Peak memory of the process while something runs, read from the kernel (Linux)."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from srdeploy.core.shapes import Shape

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def run_memory(function: Callable[[], object]) -> int | None:
    """Run a function once and return by how many bytes the peak resident memory rose above the memory before it.

    Memory that was given back to the allocator earlier is used again without showing, so this is a lower bound.

    Returns:
        Bytes; None where nothing shows or the kernel does not offer it (the function is run all the same).
    """
    resettable = _reset_peak()
    before = _status_bytes("VmRSS")
    function()
    peak = _status_bytes("VmHWM")
    if not resettable or before is None or peak is None:
        return None
    return peak - before if peak > before else None


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


def process_memory(path: Path, shape: Shape, *, engine: str | None = None, threads: int | None = None) -> int | None:
    """Return the peak memory of a process of its own that opens an engine and runs it once.

    What the process took before opening (Python, numpy) is subtracted; the engine's libraries, which are loaded when it
    opens, count.

    Args:
        path: an ONNX file or engine.
        shape: (N, C, H, W) of the run.
        engine: family that opens an ONNX file; None for the default.
        threads: CPU threads.

    Returns:
        Bytes; None where the process failed or the system does not say.
    """
    arguments = {"path": str(path), "shape": shape, "engine": engine, "threads": threads}
    command = [sys.executable, "-c", f"from srdeploy.runtime.memory import probe; probe({json.dumps(arguments)!r})"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:]
    return int(last[0]) if done.returncode == 0 and last and last[0].isdecimal() else None


def probe(arguments: str) -> None:
    """Open and run an engine in this process, and print by how many bytes the peak memory rose."""
    stated = json.loads(arguments)
    path, shape = Path(stated.pop("path")), tuple(stated.pop("shape"))
    before = _status_bytes("VmRSS")
    from srdeploy.core.runner import run_image
    from srdeploy.runtime.engines.registry import open_engine
    from srdeploy.runtime.latency import bench_image

    with open_engine(path, **stated) as runner:
        run_image(runner, bench_image(shape))
    peak = _status_bytes("VmHWM")
    print("unknown" if before is None or peak is None else peak - before)
