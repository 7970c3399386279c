"""The NVIDIA GPUs of this machine, as PyTorch sees them."""

import ctypes
import warnings
from dataclasses import dataclass

from srdeploy.core.errors import CapabilityError


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU: device ("cuda:0"), name, compute capability (major, minor) and memory in bytes."""

    device: str
    name: str
    capability: tuple[int, int]
    memory_bytes: int

    @property
    def capability_text(self) -> str:
        """The compute capability as NVIDIA writes it: "8.9"."""
        return f"{self.capability[0]}.{self.capability[1]}"

    def __str__(self) -> str:
        return f"{self.name} ({self.capability_text})"

    def free_bytes(self) -> int:
        """Return the memory that is free now, on the whole GPU."""
        import torch

        return int(torch.cuda.mem_get_info(self.device)[0])


def gpus() -> tuple[Gpu, ...]:
    """Return all usable NVIDIA GPUs, in device order; empty without one."""
    import torch

    if not _available():
        return ()
    return tuple(_gpu(index) for index in range(torch.cuda.device_count()))


def find_gpu(device: str = "auto") -> Gpu | None:
    """Return one NVIDIA GPU, or None if there is none at all.

    Args:
        device: "auto" or "cuda" for the first GPU, or "cuda:N".

    Raises:
        CapabilityError: there are GPUs, but not this one.
    """
    found = gpus()
    if not found:
        return None
    index = int(device.partition(":")[2] or 0)
    if index >= len(found):
        raise CapabilityError(f"device {device!r} does not exist", expected=f"cuda:0 to cuda:{len(found) - 1}")
    return found[index]


def why_no_gpu() -> str | None:
    """Return the reason why no NVIDIA GPU can be used here; None if one can."""
    import torch

    if _available():
        return None
    built_for = torch.version.cuda
    if built_for is None:
        return f"no NVIDIA GPU can be used: PyTorch {torch.__version__} was built without CUDA"
    driver = driver_cuda()
    if driver is None:
        return "no NVIDIA GPU can be used: no NVIDIA driver (libcuda.so.1) was found"
    if driver[0] < int(built_for.partition(".")[0]):
        return (
            f"no NVIDIA GPU can be used: the NVIDIA driver supports CUDA {driver[0]}.{driver[1]}, and PyTorch"
            f" {torch.__version__} needs CUDA {built_for}"
        )
    return "no NVIDIA GPU was found: the driver sees none"


def driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA version that the NVIDIA driver supports, as (major, minor); None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        version = ctypes.c_int()
        status = library.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return divmod(version.value // 10, 100) if status == 0 else None


def _available() -> bool:
    """Return True if PyTorch can use a GPU. It warns about a driver that is too old, which `why_no_gpu` explains."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return Gpu(f"cuda:{index}", properties.name, (properties.major, properties.minor), properties.total_memory)
