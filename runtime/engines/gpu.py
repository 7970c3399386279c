"""The NVIDIA GPUs of this machine, as PyTorch sees them."""

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

    if not torch.cuda.is_available():
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

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"no NVIDIA GPU can be used: PyTorch {torch.__version__} was built without CUDA"
    return "no NVIDIA GPU was found: the driver is missing, too old or sees none"


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return Gpu(f"cuda:{index}", properties.name, (properties.major, properties.minor), properties.total_memory)
