"""TensorRT and TensorRT-RTX have one API under two module names; a `Product` states what differs.

Version facts, from the bindings of TensorRT 10.16, 11.4 and TensorRT-RTX 1.7.1:

- Precision flags, calibrators and weak typing were removed in 11 and never existed in RTX. A strongly typed network
  built from a typed graph works in all three; 10.x needs the STRONGLY_TYPED flag, which the others accept.
- Numeric values of enumerations change between releases: always use names.
- RTX builds without a GPU for a list of compute capabilities. It has no timing cache, no tactics to time, no
  version or hardware compatibility; its kernels are compiled on the GPU at first use and kept in a runtime cache.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from srdeploy.core.environment import package_versions
from srdeploy.core.errors import CapabilityError, MissingExtraError
from srdeploy.core.extras import is_installed
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.precision import Precision
from srdeploy.runtime.engines.gpu import Gpu, driver_cuda
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.sidecar import Engine

_CUDA = re.compile(r"_cu(\d+)$")
_DRIVERS = {12: 525, 13: 580}
"""The first driver series for each major version of CUDA."""


class RuntimeSettings(Protocol):
    """What one product sets on the execution contexts of an opened engine."""

    def configure(self, runtime_config: Any, *, eager: bool) -> None:
        """Set what only this product has on a runtime configuration.

        Args:
            runtime_config: of the context that is about to be created.
            eager: compile the kernels of a shape before its first run instead of in the background.
        """

    def close(self) -> None:
        """Save and free what belongs to the engine; called once, before the engine is freed."""


@dataclass(frozen=True)
class Product:
    """One of the two TensorRT products.

    Attributes:
        name: "tensorrt" or "tensorrt-rtx", also the name of the extra that installs it.
        title: the product's name for messages.
        modules: import names; the first one installed is used.
        oldest: minimum version, as numbers.
        refused_options: build options that the product does not have, each with the reason.
        reads_layers_from_log: True if the build log lists the kernels; else the engine inspector is used.
        builds_ahead_of_time: True if it builds without the GPU, from the rewritten graph (`tensorrt.rewrites`).
        captures_graphs: True if the runner has to capture CUDA graphs; RTX captures its own.
        distributions: pip packages whose versions are recorded.
        check_build: refuse what this product cannot build, before anything is built.
        configure: set what only this product has on the builder configuration.
        finish: keep what a successful build learned.
        target: what an engine is built for, as JSON values.
        precisions: worth building for a GPU, None for an unknown one.
        why_not_run: the reason why a GPU cannot run this product's engines, None if it can: (bindings, GPU).
        check_engine: refuse an engine whose header or release does not fit: (engine, installed version).
        check_gpu: refuse an engine that was built for another GPU: (engine, GPU).
        open_settings: settings for the contexts of an opened engine: (bindings, engine object, file, device, graphs).
    """

    name: str
    title: str
    modules: tuple[str, ...]
    oldest: tuple[int, ...]
    refused_options: Mapping[str, str]
    reads_layers_from_log: bool
    builds_ahead_of_time: bool
    captures_graphs: bool
    distributions: tuple[str, ...]
    check_build: Callable[[GraphFile, BuildOptions], None]
    configure: Callable[[Any, Any, BuildOptions], None]
    finish: Callable[[Any, Any, BuildOptions], None]
    target: Callable[[BuildOptions], Mapping[str, Any]]
    precisions: Callable[[Gpu | None], tuple[Precision, ...]]
    why_not_run: Callable[[Any, Gpu], str | None]
    check_engine: Callable[[Engine, str], None]
    check_gpu: Callable[[Engine, Gpu], None]
    open_settings: Callable[[Any, Any, Engine, str, bool], RuntimeSettings]

    def load(self) -> Any:
        """Import the bindings.

        Raises:
            MissingExtraError: not installed.
            CapabilityError: installed, but its libraries do not load or it is too old.
        """
        for module in self.modules:
            if not is_installed(module):
                continue
            try:
                trt = importlib.import_module(module)
            except (ImportError, OSError, RuntimeError) as error:
                raise CapabilityError(
                    f"{self.title} is installed but does not load ({error})",
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
        """Return the versions of the installed packages of this product."""
        return package_versions(self.distributions)

    def why_not_driver(self) -> str | None:
        """Return why the NVIDIA driver is too old for the CUDA that this product was built with; None if it is not."""
        driver = driver_cuda()
        needed = max((int(found[1]) for name in self.versions() if (found := _CUDA.search(name))), default=0)
        if driver is None or driver[0] >= needed:
            return None
        series = _DRIVERS.get(needed)
        return f"the NVIDIA driver supports CUDA {driver[0]}.{driver[1]}, and this {self.title} needs CUDA {needed}" + (
            f" (driver {series} or newer)" if series else ""
        )


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
