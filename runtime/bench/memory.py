"""Peak memory of a process and of a GPU while something runs (Linux).

Measured in two ways, because a process that holds several engines cannot attribute memory to one of them:

- *in a process of its own* (`process_memory`): what opening an engine and running it once adds to a process that had
  only Python and numpy. Its libraries count. On a GPU it is by how much the free memory of the GPU fell, from the CUDA
  context, which is not counted, to the lowest value seen: weights, kernels, activations, workspaces and what allocators
  keep. Another process that allocates or frees GPU memory meanwhile falsifies it.
- *in the measuring process* (`run_memory`): by how much the process's peak rose in one run, a lower bound; and on a GPU
  what PyTorch's allocator held at its peak (`srdeploy.runtime.engines.eager.allocator_peak`).
"""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from srdeploy.core.shapes import Shape

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")

OWN_PROCESS = "peak of a process of its own that opens the engine and runs it once"
LOWER_BOUND = "rise of the measuring process's peak in the first run, a lower bound"
OWN_DEVICE = "fall of the GPU's free memory in a process of its own, CUDA context not counted"
ALLOCATOR = "peak of PyTorch's CUDA allocator in the first run, weights counted"
ON_CPU = "computes on the CPU"


@dataclass(frozen=True)
class Memory:
    """Peak memory of one runner.

    Attributes:
        process_bytes: of the process; None where it is not known.
        process_note: what `process_bytes` is, or why it is None.
        device_bytes: of the GPU; None where it is not known, and on a CPU.
        device_note: what `device_bytes` is, or why it is None.
    """

    process_bytes: int | None
    process_note: str
    device_bytes: int | None = None
    device_note: str = ON_CPU

    def to_json(self) -> dict[str, Any]:
        """Return the fields of a report's bench row."""
        return {
            "memory_bytes": self.process_bytes,
            "memory_note": self.process_note,
            "device_memory_bytes": self.device_bytes,
            "device_memory_note": self.device_note,
        }


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


class LowestFree:
    """Watch an amount of free memory from entering on, in a thread of its own, and keep the lowest value.

    Allocators and engines keep what they took until they are closed, so a look before closing sees the peak too; the
    thread is for what is given back earlier.
    """

    def __init__(self, free: Callable[[], int], *, interval_seconds: float = 0.002) -> None:
        self._free = free
        self._interval = interval_seconds
        self._before = self._lowest = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def taken(self) -> int:
        """By how many bytes the free memory fell at most."""
        return max(0, self._before - self._lowest)

    def look(self) -> None:
        """Look once."""
        with self._lock:
            self._lowest = min(self._lowest, self._free())

    def __enter__(self) -> Self:
        self._before = self._lowest = self._free()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self._interval):
            self.look()


def process_memory(
    path: Path, shape: Shape, *, engine: str | None = None, device: str = "cpu", threads: int | None = None
) -> Memory:
    """Return the peak memory of a process of its own that opens an engine and runs it once.

    Args:
        path: an ONNX file or engine.
        shape: (N, C, H, W) of the run.
        engine: family that opens an ONNX file; None for the default.
        device: "cpu" or "cuda:N".
        threads: CPU threads.

    Returns:
        Bytes, with the reason where the process failed or the system does not report it.
    """
    arguments = {"path": str(path), "shape": shape, "engine": engine, "device": device, "threads": threads}
    command = [
        sys.executable,
        "-c",
        f"from srdeploy.runtime.bench.memory import probe; probe({json.dumps(arguments)!r})",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return memory_from_probe(done.returncode, done.stdout, done.stderr, on_gpu=device != "cpu")


def memory_from_probe(code: int, out: str, err: str, *, on_gpu: bool) -> Memory:
    """Return the memory from the exit status and the two streams of a process that ran `probe`."""
    answer: dict[str, Any] = {}
    with contextlib.suppress(ValueError, IndexError):
        answer = json.loads(out.strip().splitlines()[-1])
    if code != 0 or not answer:
        lines = err.strip().splitlines()
        reason = f"the measuring process failed: {lines[-1] if lines else f'exit status {code}'}"
        return Memory(None, reason, None, reason if on_gpu else ON_CPU)
    process, device = answer["process"], answer["device"]
    return Memory(
        process,
        OWN_PROCESS if process is not None else "the system does not report it",
        device,
        OWN_DEVICE if on_gpu else ON_CPU,
    )


def probe(arguments: str) -> None:
    """Open and run an engine in this process, and print by how many bytes memory rose at its peak, as JSON."""
    options = json.loads(arguments)
    path, shape, device = Path(options.pop("path")), tuple(options.pop("shape")), options["device"]
    before = _status_bytes("VmRSS")
    from srdeploy.core.runner import run_image
    from srdeploy.runtime.bench.inputs import bench_image
    from srdeploy.runtime.engines.registry import open_engine

    with contextlib.ExitStack() as stack:
        watch = None if device == "cpu" else stack.enter_context(LowestFree(_free_on(device)))
        runner = stack.enter_context(open_engine(path, **options))
        run_image(runner, bench_image(shape))
        if watch is not None:
            watch.look()
    peak = _status_bytes("VmHWM")
    process = None if before is None or peak is None else peak - before
    print(json.dumps({"process": process, "device": None if watch is None else watch.taken}))


def _free_on(device: str) -> Callable[[], int]:
    """Return a function that reads the free bytes of a GPU; creates the CUDA context, so that it is not counted."""
    import torch

    def free() -> int:
        return int(torch.cuda.mem_get_info(device)[0])

    free()
    return free


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
