"""TensorRT 10.12 to 11 on NVIDIA GPUs: kernels are timed on the GPU that the engine is built for.

Everything here needs the full TensorRT libraries and an NVIDIA GPU; the shared code path is exercised through
TensorRT-RTX on machines without one.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from srdeploy.core.artifact import atomic_file
from srdeploy.core.errors import BuildError, CapabilityError, SrdeployError, UsageError
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.progress import Progress
from srdeploy.core.runner import Runner
from srdeploy.runtime.engines.options import BuildOptions, BuiltEngine
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.build import build_plan
from srdeploy.runtime.engines.tensorrt.families import Flavour, gpu, refuse_without_gpu, why_no_gpu

REFUSED_OPTIONS: Mapping[str, str] = {
    "compute_capabilities": "it builds for the GPU of this machine (see --hardware-compatibility)",
    "threads": "it runs on the GPU",
}
_HELD: list[Any] = []
"""Timing caches must outlive the build that reads them; a worker process builds once."""
_COMPATIBILITY = {"ampere_plus": "AMPERE_PLUS", "same_compute_capability": "SAME_COMPUTE_CAPABILITY"}


def build(graph: GraphFile, options: BuildOptions, progress: Progress) -> BuiltEngine:
    """Build an engine; see `srdeploy.runtime.engines.tensorrt.build.build_plan`."""
    return build_plan(FLAVOUR, graph, options, progress)


def open_built(
    engine: Engine, *, threads: int | None, parity: bool, outputs: Sequence[str] | None, device: str = "cuda:0"
) -> Runner:
    """Open an engine on a GPU.

    Raises:
        CapabilityError: no GPU, another GPU, or another release.
        InputError: the bytes are not an engine.
    """
    trt = FLAVOUR.load()
    check_release(engine, trt.__version__)
    refuse_without_gpu(engine.path, FLAVOUR, engine.target.get("words"))
    check_target(engine, gpu(device))
    from srdeploy.runtime.engines.tensorrt.full_runtime import open_full

    return open_full(FLAVOUR, trt, engine, device, outputs)


def key_parts(options: BuildOptions) -> dict[str, Any]:
    """Return what decides the engine's bytes besides graph and options."""
    trt = FLAVOUR.load()
    return {"versions": {FLAVOUR.name: trt.__version__}, "target": _target(options)}


def versions() -> dict[str, str]:
    """Return the versions of what takes part."""
    return FLAVOUR.versions()


def why_not_build() -> str | None:
    """Say why no engine can be built here; None when one can."""
    FLAVOUR.load()
    return why_no_gpu()


def why_not_run() -> str | None:
    """Say why no engine can run here; None when one can."""
    return why_not_build()


def check_release(engine: Engine, here: str) -> None:
    """Compare the release that built an engine with the one that is installed.

    A version-compatible engine is no exception: another release opens it only by running the lean runtime of this one.

    Raises:
        CapabilityError: it is another one.
    """
    built_with = engine.manifest.versions.get(FLAVOUR.name, "")
    if built_with != here:
        raise CapabilityError(
            f"{engine.path} was built for TensorRT {built_with}, {engine.target.get('words')}; here is {here}",
            next_step=f"build it again: srdeploy build MODEL.onnx --engine tensorrt -o {engine.path} --force",
        )


def check_target(engine: Engine, found: tuple[str, tuple[int, int], int] | None) -> None:
    """Compare the GPU that an engine was built for with the one that is there (see `gpu`).

    Raises:
        CapabilityError: it is another one.
    """
    wanted = engine.target.get("compute_capability")
    if found is None or wanted is None or engine.target.get("hardware_compatibility"):
        return
    here = f"{found[1][0]}.{found[1][1]}"
    if here != wanted:
        raise CapabilityError(
            f"{engine.path} was built for {engine.target.get('words')}; this GPU is {found[0]} ({here})",
            next_step="build it again on this machine, or with --hardware-compatibility ampere_plus",
        )


def _check(graph: GraphFile, options: BuildOptions) -> None:
    reason = why_no_gpu()
    if reason:
        raise CapabilityError(
            f"TensorRT times kernels on the GPU it builds for, and {reason}",
            next_step="build on the machine with the GPU, or use --engine tensorrt-rtx, which needs none",
        )
    if options.hardware_compatibility and options.hardware_compatibility not in _COMPATIBILITY:
        raise UsageError(
            f"--hardware-compatibility {options.hardware_compatibility}", expected=" or ".join(_COMPATIBILITY)
        )
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise UsageError(f"--optimization-level {options.optimization_level}", expected="0 to 5")


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.max_aux_streams is not None:
        config.max_aux_streams = options.max_aux_streams
    if options.hardware_compatibility is not None:
        levels = trt.HardwareCompatibilityLevel.__members__
        config.hardware_compatibility_level = levels[_COMPATIBILITY[options.hardware_compatibility]]
    if options.version_compatible:
        # The lean runtime inside an engine is host code, which stays shut when an engine is opened; so it stays out.
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options.timing_cache is not None:
        before = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
        timings = config.create_timing_cache(before)
        # False, the answer and the argument: timings of another GPU or release are refused. Then begin anew.
        if timings is None or not config.set_timing_cache(timings, False):
            timings = config.create_timing_cache(b"")
            if timings is None or not config.set_timing_cache(timings, False):
                raise BuildError("TensorRT gives no timing cache", next_step="leave --timing-cache out")
        _HELD.append(timings)


def _finish(trt: Any, config: Any, options: BuildOptions) -> None:
    """Write the kernel timings back; a cache that cannot be written is no failure of the build."""
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


def _target(options: BuildOptions) -> dict[str, Any]:
    found = gpu()
    if found is None:
        return {"words": "an NVIDIA GPU"}
    name, capability, _ = found
    number = f"{capability[0]}.{capability[1]}"
    level = options.hardware_compatibility
    words = f"{name} ({number})" if level is None else f"{level} of {number}"
    return {
        "compute_capability": number,
        "gpu": name if level is None else None,
        "hardware_compatibility": level,
        "words": words,
    }


FLAVOUR = Flavour(
    name="tensorrt",
    title="TensorRT",
    modules=("tensorrt", "tensorrt_bindings"),
    oldest=(10, 12),
    check=_check,
    configure=_configure,
    finish=_finish,
    target=_target,
    reads_layers_from_log=False,
    distributions=(
        "tensorrt",
        "tensorrt_cu13",
        "tensorrt_cu13_bindings",
        "tensorrt_cu13_libs",
        "tensorrt_cu12",
        "tensorrt_cu12_bindings",
        "tensorrt_cu12_libs",
    ),
)
