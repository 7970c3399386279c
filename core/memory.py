"""Memory budgets: how much of the machine's memory a job may use, and how much a run of a network needs."""

from pathlib import Path

from srdeploy.core.contract import ModelContract

LIVE_TENSORS = 5.0
"""Tensors of the largest size alive at once, at the peak of a run, rounded up: measured 3.2 for RCAN and 4.5 for
SRDenseNet (its deconvolutions need columns) with ONNX Runtime, 3.3 and 2.6 with OpenVINO."""
_DEFAULT_SHARE = 0.5
_MIN_BYTES = 256 << 20
_FLOAT32_BYTES = 4
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def default_memory() -> int:
    """Return half of the memory that is free now in bytes, within the container's limit if there is one."""
    import psutil

    free: int = psutil.virtual_memory().available
    for limit, used in _CGROUP_FILES:
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such control group, or "max": no limit
            continue
    return max(int(free * _DEFAULT_SHARE), _MIN_BYTES)


def bytes_per_pixel(contract: ModelContract) -> float:
    """Return the memory that a run in FP32 needs at its peak, in bytes per LR pixel, weights excluded."""
    return LIVE_TENSORS * contract.largest_tensor_per_pixel * _FLOAT32_BYTES
