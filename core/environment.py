"""The machine and the software that a number was measured with: versions, processor, memory, threads.

All of it is read on demand, never at import.
"""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
)
"""CPU flags that decide which INT8 and BF16 kernels exist."""


def package_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Return the versions of the installed ones among some distributions, by name."""
    versions = {}
    for distribution in distributions:
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def cpu_count() -> int:
    """Return the number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cache_folder() -> Path:
    """Return srdeploy's cache folder: $SRDEPLOY_CACHE_DIR if it is set, else the system's cache folder for srdeploy."""
    named = os.environ.get("SRDEPLOY_CACHE_DIR")
    if named:
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("srdeploy")


def machine() -> dict[str, Any]:
    """Return a description of the machine: processor, flags, cores, memory, system, Python, governor."""
    cpuinfo = _read("/proc/cpuinfo")
    pairs = (line.partition(":") for line in cpuinfo.splitlines()[:40])
    entries = {name.strip(): value.strip() for name, _, value in pairs}
    flags = entries.get("flags", "").split()
    return {
        "processor": entries.get("model name", platform.processor() or platform.machine()),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "cpus": cpu_count(),
        "memory_bytes": memory_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
    }


def int8_sums_saturate() -> bool:
    """Return True if this processor's 8-bit convolutions overflow when weights use all 8 bits.

    x86 processors without VNNI multiply uint8 by int8 with VPMADDUBSW, which adds two neighbouring products in 16 bits
    and saturates: 2 * 255 * 127 is twice what fits. ONNX Runtime and OpenVINO use it there without a warning. Weights
    within +-64 cannot overflow it. (Intel SDM, PMADDUBSW; ONNX Runtime's "reduce_range" and NNCF's "overflow_fix" are
    for the same.)
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not {"avx512_vnni", "avx_vnni"}.intersection(machine()["cpu_flags"])


def int8_weights_overflow(bits: int | None) -> bool:
    """Return True if CPU engines here compute INT8 layers with weights of `bits` bits wrongly; None: no INT8 layers."""
    return bits is not None and bits > 7 and int8_sums_saturate()


def memory_bytes() -> int | None:
    """Return the machine's memory in bytes, None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
