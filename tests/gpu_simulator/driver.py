"""The NVIDIA driver: the version that libcuda states, and nvidia-smi."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gpu_simulator.cuda import Gpu

LIBRARY = "libcuda.so.1"
_REAL = ctypes.CDLL


def install(version: tuple[int, int]) -> None:
    """Make libcuda a library that states the newest CUDA version that it supports."""

    def get_version(pointer: Any) -> int:
        pointer._obj.value = 1000 * version[0] + 10 * version[1]
        return 0

    class Library(_REAL):  # type: ignore[misc, valid-type]  # a class, as others may inherit from it
        def __new__(cls, name: Any = None, *_: Any, **__: Any) -> Any:
            if name == LIBRARY:
                return SimpleNamespace(cuDriverGetVersion=get_version)
            return super().__new__(cls)

    ctypes.CDLL = Library  # type: ignore[misc]


def uninstall() -> None:
    """Restore ctypes."""
    ctypes.CDLL = _REAL  # type: ignore[misc]


def write_nvidia_smi(folder: Path, gpus: Sequence[Gpu], version: tuple[int, int]) -> None:
    """Write a program that answers nvidia-smi --query-gpu; what it does not know is [N/A], as there."""
    known = [
        {
            "name": gpu.name,
            "driver_version": {13: "580.65.06", 12: "550.54.14"}.get(version[0], "535.54.03"),
            "memory.total": f"{gpu.memory_bytes // 2**20} MiB",
        }
        for gpu in gpus
    ]
    program = folder / "nvidia-smi"
    program.write_text(
        "#!/usr/bin/env python3\nimport sys\n"
        "fields = next(a for a in sys.argv if a.startswith('--query-gpu=')).partition('=')[2].split(',')\n"
        f"for gpu in {known!r}:\n"
        "    print(', '.join(gpu.get(field, '[N/A]') for field in fields))\n",
        encoding="utf-8",
    )
    program.chmod(0o755)
