"""The options of an engine build, and its result."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.core.manifest import Manifest
from srdeploy.core.shapes import ShapeProfile


@dataclass(frozen=True)
class BuildOptions:
    """Options of a build; None and empty mean the default. A family refuses options that it does not have.

    Attributes:
        profiles: shape ranges the engine must accept; required by the TensorRT families.
        compute_capabilities: GPUs to build for, such as ("8.6", "8.9"); TensorRT-RTX only.
        device: "auto" or "cuda:N": the GPU that a TensorRT engine is built on and for.
        workspace_bytes: upper limit of scratch memory. On TensorRT-RTX it limits the activation memory itself, and a
            build that needs more fails: leave it unset there.
        optimization_level: 0 (fast build) to 5 (fast engine); TensorRT only.
        tf32: let FP32 convolutions use TF32 tensor cores (11 bits of mantissa).
        timing_cache: file with kernel timings of earlier builds, read and updated; TensorRT only.
        hardware_compatibility: "ampere_plus" or "same_compute_capability"; TensorRT only.
        version_compatible: let other programs open the engine with a later TensorRT release and the lean runtime of
            this one. The lean runtime is not put into the engine: it would be host code, which srdeploy never runs.
            TensorRT only.
        max_aux_streams: auxiliary streams inside the engine, 0 for minimum memory; TensorRT only.
        memory_bytes: GPU memory that the engine must fit into, checked before the build. None takes the GPU's own; no
            limit without a GPU.
        threads: CPU threads the CPU engines are compiled with.
        use_cache: look in the engine cache before building, and put the engine there afterwards.
        log_path: file for the builder's full log; None puts it next to the cache.
    """

    profiles: tuple[ShapeProfile, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    device: str = "auto"
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    tf32: bool = False
    timing_cache: Path | None = None
    hardware_compatibility: str | None = None
    version_compatible: bool = False
    max_aux_streams: int | None = None
    memory_bytes: int | None = None
    threads: int | None = None
    use_cache: bool = True
    log_path: Path | None = None

    def to_key(self) -> dict[str, Any]:
        """Return the options that change the engine's bytes, as JSON values; the device is in the key's target."""
        return {
            "profiles": [profile_to_json(profile) for profile in self.profiles],
            "compute_capabilities": sorted(self.compute_capabilities),
            "workspace_bytes": self.workspace_bytes,
            "optimization_level": self.optimization_level,
            "tf32": self.tf32,
            "timing_cache": self.timing_cache is not None,
            "hardware_compatibility": self.hardware_compatibility,
            "version_compatible": self.version_compatible,
            "max_aux_streams": self.max_aux_streams,
        }


CPU_REFUSED_OPTIONS: Mapping[str, str] = {
    "profiles": "it accepts every shape",
    "compute_capabilities": "it runs on the CPU",
    "workspace_bytes": "it takes the memory it needs",
    "memory_bytes": "it runs in main memory",
    "optimization_level": "it has one level",
    "tf32": "the CPU has no TF32",
    "timing_cache": "it times no kernels",
    "hardware_compatibility": "it is built for this processor",
    "version_compatible": "it opens with the release that built it",
    "max_aux_streams": "it runs on the CPU",
}
"""Options that the CPU families do not have, each with the reason for the message."""


@dataclass(frozen=True)
class BuiltEngine:
    """The result of a family's builder: the bytes, and what is known about them as JSON values.

    Attributes:
        data: the engine's bytes.
        precision_built: read back from the engine: "fp32", "fp16", ...; a mixture is written "int8+fp16".
        built: layers or kernels by kind and data type, memory, and the source of these numbers.
        versions: of the packages and libraries that built it.
        target: what the engine runs on: GPUs, or the processor's instruction sets.
        notes: warnings for the user.
    """

    data: bytes
    precision_built: str
    built: Mapping[str, Any]
    versions: Mapping[str, str]
    target: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildResult:
    """An engine on disk with its sidecar.

    Attributes:
        path: the engine file.
        manifest: its sidecar, written next to it.
        seconds: wall time of the build; near zero if the engine came from the cache.
        cached: whether it came from the cache.
        cache_reason: why it was found in the cache, or why not.
        notes: warnings for the user.
    """

    path: Path
    manifest: Manifest
    seconds: float
    cached: bool
    cache_reason: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values, with the sidecar's details."""
        return {
            "engine": str(self.path),
            "sha256": self.manifest.sha256,
            "bytes": self.path.stat().st_size,
            "seconds": round(self.seconds, 3),
            "cached": self.cached,
            "cache_reason": self.cache_reason,
            "notes": list(self.notes),
            "details": dict(self.manifest.details),
            "versions": dict(self.manifest.versions),
        }


def profile_to_json(profile: ShapeProfile) -> dict[str, list[int]]:
    """Return a profile as JSON values."""
    return {"min": list(profile.min), "opt": list(profile.opt), "max": list(profile.max)}


def profile_from_json(value: Mapping[str, Any]) -> ShapeProfile:
    """Read a profile back."""
    low, middle, high = (tuple(int(size) for size in value[name]) for name in ("min", "opt", "max"))
    return ShapeProfile(low, middle, high)  # type: ignore[arg-type]  # four sizes each: written by profile_to_json
