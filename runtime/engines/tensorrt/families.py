"""TensorRT and TensorRT-RTX are one API under two module names; what differs is stated here, once.

Version facts, from the bindings of TensorRT 10.16, 11.4 and TensorRT-RTX 1.7.1:

- Precision flags, calibrators and weak typing are gone from 11 and were never in RTX. A strongly typed network built
  from a typed graph works in all three; 10.x needs the STRONGLY_TYPED flag, which the others accept.
- Numeric values of enumerations move between releases: they are always used by name.
- RTX builds without a GPU for a list of compute capabilities. It has no timing cache, no tactics to time, no
  version or hardware compatibility; its kernels are compiled on the GPU at first use and kept in a runtime cache.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.core.environment import package_versions
from srdeploy.core.errors import CapabilityError, MissingExtraError
from srdeploy.core.extras import is_installed
from srdeploy.core.onnx_file import GraphFile
from srdeploy.runtime.engines.options import BuildOptions


@dataclass(frozen=True)
class Flavour:
    """One of the two TensorRTs.

    Attributes:
        name: "tensorrt" or "tensorrt-rtx", also the name of the extra that brings it.
        title: the product's name in sentences.
        modules: import names, the first that is installed is used.
        oldest: least version, as numbers.
        check: refuse what this flavour cannot build, before anything is built.
        configure: set what only this flavour has on the builder configuration.
        finish: use what a build taught, after it succeeded.
        target: what an engine runs on, as JSON values.
        reads_layers_from_log: whether the build log holds the kernels; else the engine inspector is asked.
        distributions: pip packages whose versions are recorded.
    """

    name: str
    title: str
    modules: tuple[str, ...]
    oldest: tuple[int, ...]
    check: Callable[[GraphFile, BuildOptions], None]
    configure: Callable[[Any, Any, BuildOptions], None]
    finish: Callable[[Any, Any, BuildOptions], None]
    target: Callable[[BuildOptions], Mapping[str, Any]]
    reads_layers_from_log: bool
    distributions: tuple[str, ...]

    def load(self) -> Any:
        """Import the bindings.

        Raises:
            MissingExtraError: not installed.
            CapabilityError: installed, and its libraries do not load or it is too old.
        """
        for module in self.modules:
            if not is_installed(module):
                continue
            try:
                trt = importlib.import_module(module)
            except (ImportError, OSError, RuntimeError) as error:
                raise CapabilityError(
                    f"{self.title} is installed and does not load ({error})",
                    next_step=f"reinstall it with: pip install --force-reinstall 'srdeploy[{self.name}]'",
                ) from error
            if version_numbers(trt.__version__) < self.oldest:
                raise CapabilityError(
                    f"{self.title} {trt.__version__} is installed",
                    expected=f"{'.'.join(map(str, self.oldest))} or newer",
                )
            return trt
        raise MissingExtraError(self.modules[0], self.name)

    def versions(self) -> dict[str, str]:
        """Return the versions of what takes part."""
        return package_versions(self.distributions)


def version_numbers(version: str) -> tuple[int, ...]:
    """Return "10.16.1.11" as (10, 16, 1, 11); letters are ignored."""
    parts = ("".join(letter for letter in part if letter.isdigit()) for part in version.split("."))
    return tuple(int(part) for part in parts if part)


def parse_capability(text: str) -> tuple[int, int]:
    """Return "8.9" or "89" or "12.0" as (major, minor).

    Raises:
        ValueError: not a compute capability.
    """
    digits = text.strip().removeprefix("sm_").removeprefix("SM")
    major, minor = digits.split(".") if "." in digits else (digits[:-1], digits[-1:])
    return int(major), int(minor)


def gpu(device: str = "cuda:0") -> tuple[str, tuple[int, int], int] | None:
    """Return name, compute capability and memory in bytes of an NVIDIA GPU, None without one.

    Raises:
        CapabilityError: there are GPUs, and not this one.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    count = torch.cuda.device_count()
    if (torch.device(device).index or 0) >= count:
        raise CapabilityError(f"device {device!r} was asked for", expected=f"cuda:0 to cuda:{count - 1}")
    properties = torch.cuda.get_device_properties(device)
    return properties.name, (properties.major, properties.minor), properties.total_memory


def why_no_gpu() -> str | None:
    """Say why no NVIDIA GPU can be used here; None when one can."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"no NVIDIA GPU can be used: PyTorch {torch.__version__} was built without CUDA"
    return "no NVIDIA GPU was found: the driver is missing, too old or sees none"


def refuse_without_gpu(path: Path, flavour: Flavour, target: object) -> None:
    """Refuse to open an engine where no GPU is; `target` says in words what it was built for.

    Raises:
        CapabilityError: no NVIDIA GPU can be used here.
    """
    reason = why_no_gpu()
    if reason:
        raise CapabilityError(
            f"{path} is a {flavour.title} engine for {target}, and {reason}",
            next_step="run it on a machine with such a GPU, or build for openvino or onnxruntime to run here",
        )


def flavour_named(name: str) -> Flavour:
    """Return the flavour of a name: "tensorrt" or "tensorrt-rtx"."""
    module = importlib.import_module(_FLAVOURS[name])
    found = module.FLAVOUR
    assert isinstance(found, Flavour)
    return found


_FLAVOURS = {
    "tensorrt": "srdeploy.runtime.engines.tensorrt.full_engine",
    "tensorrt-rtx": "srdeploy.runtime.engines.tensorrt.rtx_engine",
}
