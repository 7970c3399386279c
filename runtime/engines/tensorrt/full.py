"""TensorRT 10.12 to 11: kernels are timed on the GPU that the engine is built for."""

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from srdeploy.core.artifact import atomic_file
from srdeploy.core.errors import BuildError, CapabilityError, SrdeployError, UsageError
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.precision import Precision
from srdeploy.runtime.engines.gpu import Gpu, find_gpu, why_no_gpu
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.products import Product

REFUSED_OPTIONS: Mapping[str, str] = {
    "compute_capabilities": "it builds for the GPU of this machine (see --hardware-compatibility)",
    "threads": "it runs on the GPU",
}
_OLDEST_GPU = (7, 5)
_HELD: list[Any] = []
"""Timing caches must outlive the build that reads them; a worker process builds once."""
COMPATIBILITY = {"ampere_plus": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}
"""Values of --hardware-compatibility and their names in `HardwareCompatibilityLevel`."""


def check_build(graph: GraphFile, options: BuildOptions) -> None:
    """Refuse options out of range, and machines without a GPU.

    Raises:
        CapabilityError: no NVIDIA GPU can be used here.
        UsageError: an option is out of range.
    """
    reason = why_no_gpu()
    if reason:
        raise CapabilityError(
            f"TensorRT times kernels on the GPU it builds for, and {reason}",
            next_step="build on the machine with the GPU, or use --engine tensorrt-rtx, which needs none",
        )
    if options.hardware_compatibility and options.hardware_compatibility not in COMPATIBILITY:
        raise UsageError(
            f"--hardware-compatibility {options.hardware_compatibility}", expected=" or ".join(COMPATIBILITY)
        )
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise UsageError(f"--optimization-level {options.optimization_level}", expected="0 to 5")


def configure(trt: Any, config: Any, options: BuildOptions) -> None:
    """Set optimization level, streams, compatibility and timing cache."""
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    if options.hardware_compatibility is not None:
        levels = trt.HardwareCompatibilityLevel.__members__
        config.hardware_compatibility_level = levels[COMPATIBILITY[options.hardware_compatibility]]
    if options.version_compatible:
        # The lean runtime inside an engine is host code, which is disabled when an engine is opened: exclude it.
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options.timing_cache is not None:
        before = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
        timings = config.create_timing_cache(before)
        # ignore_mismatch=False: timings of another GPU or release are refused, and replaced by an empty cache.
        if timings is None or not config.set_timing_cache(timings, False):
            timings = config.create_timing_cache(b"")
            if timings is None or not config.set_timing_cache(timings, False):
                raise BuildError("TensorRT could not create a timing cache", next_step="omit --timing-cache")
        _HELD.append(timings)


def finish(trt: Any, config: Any, options: BuildOptions) -> None:
    """Write the kernel timings back. Best effort: a cache that cannot be written never fails the build."""
    if options.timing_cache is None:
        return
    timings = config.get_timing_cache()
    host_memory = timings and timings.serialize()
    if host_memory is None:
        return
    data = bytes(host_memory)
    lock = filelock.FileLock(options.timing_cache.with_name(options.timing_cache.name + ".lock"))
    with contextlib.suppress(OSError, SrdeployError), lock, atomic_file(options.timing_cache, force=True) as path:
        Path(path).write_bytes(data)


def target(options: BuildOptions) -> dict[str, Any]:
    """Return the GPU of this machine, or the compatibility level that was chosen instead."""
    found = find_gpu(options.device)
    if found is None:
        return {"words": "an NVIDIA GPU"}
    level = options.hardware_compatibility
    return {
        "compute_capability": found.capability_text,
        "gpu": found.name if level is None else None,
        "hardware_compatibility": level,
        "words": str(found) if level is None else f"{level} of {found.capability_text}",
    }


def precisions(found: Gpu | None) -> tuple[Precision, ...]:
    """Return FP16 and INT8, and FP8 where the GPU has it."""
    fp8 = (Precision.FP8,) if found is not None and found.capability >= (8, 9) else ()
    return Precision.FP16, Precision.INT8, *fp8


def why_not_run(trt: Any, found: Gpu) -> str | None:
    """Return why TensorRT does not support a GPU; None if it does."""
    return None if found.capability >= _OLDEST_GPU else f"{found} is older than Turing (7.5)"


def check_engine(engine: Engine, here: str) -> None:
    """Refuse an engine of another release.

    A version-compatible engine is no exception: another release opens it only by running the lean runtime of this one.

    Raises:
        CapabilityError: built by another release than the one installed here.
    """
    built_with = engine.manifest.versions.get(FULL.name, "")
    if built_with != here:
        raise CapabilityError(
            f"{engine.path} was built with TensorRT {built_with} for {engine.target.get('words')};"
            f" TensorRT {here} is installed here",
            next_step=f"build it again: srdeploy build MODEL.onnx --engine tensorrt "
            f"{engine.shape_options} -o {engine.path} --force",
        )


def check_gpu(engine: Engine, found: Gpu) -> None:
    """Refuse an engine of another compute capability, and warn about one of another GPU model.

    Raises:
        CapabilityError: built for another GPU.
    """
    wanted = engine.target.get("compute_capability")
    if wanted is None or engine.target.get("hardware_compatibility"):
        return
    if found.capability_text != wanted:
        raise CapabilityError(
            f"{engine.path} was built for {engine.target.get('words')}; this GPU is {found}",
            next_step="build it again on this machine, or with --hardware-compatibility ampere_plus",
        )
    if engine.target.get("gpu") not in (None, found.name):
        warnings.warn(
            f"{engine.path} was built for {engine.target['gpu']}; on {found.name} it runs, but its kernels were timed"
            " for another GPU: build it again here",
            RuntimeWarning,
            stacklevel=2,
        )


class _Settings:
    """Full TensorRT has no settings of its own on a runtime configuration."""

    def configure(self, runtime_config: Any, *, eager: bool) -> None:
        pass

    def close(self) -> None:
        pass


FULL = Product(
    name="tensorrt",
    title="TensorRT",
    modules=("tensorrt", "tensorrt_bindings"),
    oldest=(10, 12),
    refused_options=REFUSED_OPTIONS,
    reads_layers_from_log=False,
    builds_ahead_of_time=False,
    captures_graphs=True,
    distributions=(
        "tensorrt",
        "tensorrt_cu13",
        "tensorrt_cu13_bindings",
        "tensorrt_cu13_libs",
        "tensorrt_cu12",
        "tensorrt_cu12_bindings",
        "tensorrt_cu12_libs",
    ),
    check_build=check_build,
    configure=configure,
    finish=finish,
    target=target,
    precisions=precisions,
    why_not_run=why_not_run,
    check_engine=check_engine,
    check_gpu=check_gpu,
    open_settings=lambda trt, cuda_engine, engine, device, graphs: _Settings(),
)
