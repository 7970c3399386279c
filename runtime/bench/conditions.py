"""The conditions a measurement was made under: machine, libraries, threads, accelerators and their clocks."""

import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srdeploy.core.environment import machine, package_versions

_DISTRIBUTIONS = (
    "srdeploy",
    "numpy",
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "nncf",
)

_GPU_FIELDS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "temperature.gpu",
    "utilization.gpu",
)


def conditions() -> dict[str, Any]:
    """Return the machine, its load, its accelerators with clocks, and the versions of all that computes."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **machine(),
        "load_average": _load_average(),
        "clock_mhz": _clock_mhz(),
        "gpus": gpus(),
        "versions": package_versions(_DISTRIBUTIONS),
    }


def gpus() -> list[dict[str, str]]:
    """Return one entry per NVIDIA GPU with clocks, power and driver; empty without GPU or driver. Changes nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines() if line.strip()]
    return [dict(zip(_GPU_FIELDS, row, strict=False)) for row in rows]


def _load_average() -> float | None:
    try:
        return float(Path("/proc/loadavg").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _clock_mhz() -> float | None:
    """The first processor's present clock; None where the system does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("cpu mhz"):
                return float(line.split(":")[1])
    except (OSError, ValueError, IndexError):
        return None
    return None
