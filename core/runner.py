"""A Runner computes a network: from named arrays to named arrays, on a given device.

Every engine is one, and so is the eager PyTorch network that all of them are compared with.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT, OUTPUT, ModelContract
from srdeploy.core.shapes import ShapeProfile


@dataclass(frozen=True)
class RunnerInfo:
    """Description of a runner.

    Attributes:
        name: short name for tables, for example "openvino int8".
        engine: "eager", "onnxruntime", "openvino", "tensorrt" or "tensorrt-rtx".
        device: "cpu" or "cuda:0".
        contract: what the graph promises; its precision is what the heavy layers compute in.
        numeric_mode: description of the arithmetic, for example "FP32, inference precision hint f32".
        threads: CPU threads, None on a GPU.
        profiles: the ranges of shapes that the engine accepts; empty when it accepts all.
        versions: of the packages and libraries that compute.
        built: what was read back from the engine: kernels or layers by type and data type, as JSON values.
    """

    name: str
    engine: str
    device: str
    contract: ModelContract
    numeric_mode: str
    threads: int | None = None
    profiles: tuple[ShapeProfile, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    built: Mapping[str, Any] = field(default_factory=dict)

    @property
    def profile(self) -> ShapeProfile | None:
        """The range of shapes with the largest maximum, which tiles and crops are made for; None for all shapes."""
        return max(self.profiles, key=lambda profile: math.prod(profile.max), default=None)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Return True if the engine accepts an input shape (N, C, H, W)."""
        return not self.profiles or any(profile.contains(shape) for profile in self.profiles)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; of the contract, the precision alone."""
        return {
            "name": self.name,
            "engine": self.engine,
            "device": self.device,
            "precision": str(self.contract.precision),
            "numeric_mode": self.numeric_mode,
            "threads": self.threads,
            "profile": " or ".join(map(str, self.profiles)) or None,
            "versions": dict(self.versions),
            "built": dict(self.built),
        }


class Runner(Protocol):
    """An opened engine. Use it as a context manager; leaving the block frees the engine."""

    @property
    def info(self) -> RunnerInfo:
        """Description of this runner."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute all outputs from the named inputs.

        Raises:
            UsageError: an input is missing, unknown, of another type, or its shape is outside the profile.
        """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class TimedRunner(Runner, Protocol):
    """A runner that can compute without moving data, so that the computation is timed without transfers."""

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Put the inputs on the device, allocate the outputs, and return a function that computes once.

        That function returns the milliseconds of the computation alone (wall clock on a CPU, device events on a GPU),
        when the result is complete on the device; it neither converts nor copies inputs or outputs.

        Raises:
            UsageError: as `run`.
        """


@dataclass(frozen=True)
class KernelTime:
    """Time of one kernel of an engine.

    Attributes:
        nodes: names of the ONNX nodes that it computes, or for which it converts.
        ms: milliseconds.
    """

    nodes: tuple[str, ...]
    ms: float


@runtime_checkable
class ProfiledRunner(Runner, Protocol):
    """A runner that knows what each of its kernels takes."""

    def kernel_times(self, feeds: Mapping[str, NDArray[Any]]) -> list[KernelTime]:
        """Return the time of each kernel, measured with an engine of its own that is opened for it.

        Raises:
            UsageError: as `run`; or a built engine, which no longer knows the nodes of the ONNX file.
        """


@runtime_checkable
class MeteredRunner(Runner, Protocol):
    """A runner on a GPU whose own allocator knows what a run took."""

    def run_metered(self, feeds: Mapping[str, NDArray[Any]]) -> int:
        """Compute once as `run`, and return the bytes of GPU memory held at the peak, weights included."""


def run_image(runner: Runner, image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Run one batch: image (N, C, H, W) float32 in [0, 1] to (N, C, H', W') float32, not clamped.

    A graph that takes uint8 is given the nearest levels, and its levels come back over 255.
    """
    if runner.info.contract.form.io == "uint8":
        levels = np.rint(np.clip(image, 0, 1) * np.float32(255)).astype(np.uint8)
        return runner.run({INPUT: levels})[OUTPUT].astype(np.float32) / np.float32(255)
    return runner.run({INPUT: image})[OUTPUT]
