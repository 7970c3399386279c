"""What can be asked of an engine build, and what a build hands back."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.core.manifest import Manifest
from srdeploy.core.shapes import ShapeProfile


@dataclass(frozen=True)
class BuildOptions:
    """Wishes for an engine; None and empty mean "not stated". A family refuses what it does not have.

    Attributes:
        profiles: shape ranges the engine must accept; required by the TensorRT families.
        compute_capabilities: GPUs to build for, such as ("8.6", "8.9"); TensorRT-RTX only.
        workspace_bytes: upper limit of scratch memory. On TensorRT-RTX it caps the activation memory itself, and a
            build that needs more fails: leave it unset there.
        optimization_level: 0 (quick build) to 5 (quick engine); TensorRT only.
        tf32: let FP32 convolutions use TF32 tensor cores (11 bits of mantissa). Off unless asked for.
        timing_cache: file with kernel timings of earlier builds, read and updated; TensorRT only.
        hardware_compatibility: "ampere_plus" or "same_compute_capability"; TensorRT only.
        version_compatible: let other programs open the engine with a later TensorRT release and the lean runtime of
            this one. It is not put into the engine: it would be host code, which srdeploy never runs. TensorRT only.
        max_aux_streams: helper streams inside the engine, 0 for the least memory; TensorRT only.
        memory_bytes: GPU memory the engine must fit in; checked before the build. None takes the GPU's own where there
            is one, and checks nothing where there is none.
        threads: CPU threads the CPU engines are compiled with.
        use_cache: look in the engine cache before building, and put the engine there afterwards.
        log_path: where the builder's full log goes; None puts it beside the cache.
    """

    profiles: tuple[ShapeProfile, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
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
        """Return the options that change the engine's bytes, as JSON values."""
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
"""Options that the CPU families do not have, each with the reason that the refusal gives."""


@dataclass(frozen=True)
class BuiltEngine:
    """What a family's builder returns: the bytes, and everything worth knowing about them (JSON values).

    Attributes:
        data: the engine's bytes, untouched.
        precision_built: what was read back: "fp32", "fp16", ...; a mixture is written "int8+fp16".
        built: layers or kernels by type and data type, memory, where it was read from.
        versions: of the packages and libraries that took part.
        target: what the engine runs on: GPUs, or the processor's instruction sets.
        notes: lines a user should read.
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
        manifest: its sidecar, written beside it.
        seconds: wall time of the build; near zero when the engine came from the cache.
        cached: whether it came from the cache.
        cache_reason: why the cache had it, or had it not.
        notes: lines a user should read.
    """

    path: Path
    manifest: Manifest
    seconds: float
    cached: bool
    cache_reason: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values; the sidecar's details are inside."""
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
