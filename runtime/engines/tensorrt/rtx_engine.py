"""TensorRT-RTX: engines for GeForce and RTX GPUs, built ahead of time on any machine, a GPU is not needed.

Its engines hold a graph that is compiled for the GPU when it is first used; the result is kept in a runtime cache.
FP16 is the quick path; INT8 and FP8 graphs build, yet every quantized convolution writes FP32 and needs a kernel more.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srdeploy.core.errors import BuildError, CapabilityError, InputError, UsageError
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.progress import Progress
from srdeploy.core.runner import Runner
from srdeploy.runtime.engines.options import BuildOptions, BuiltEngine
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.build import build_plan
from srdeploy.runtime.engines.tensorrt.families import Flavour, gpu, parse_capability, refuse_without_gpu, why_no_gpu

REFUSED_OPTIONS: Mapping[str, str] = {
    "optimization_level": "it accepts the level and builds the same engine at each",
    "timing_cache": "it times no kernels when it builds",
    "hardware_compatibility": "name the GPUs with --compute-capability instead",
    "version_compatible": "its engines open with the release that built them, and no other",
    "max_aux_streams": "it compiles one graph on one stream",
    "threads": "it runs on the GPU",
}
_MAGIC = b"vtrt"
_TARGET_BITS = {0x01: "7.5", 0x02: "8.0", 0x04: "8.6", 0x08: "8.9", 0x10: "12.0", 0x20: "12.1"}
"""Observed in engines of 1.7.1, not documented: used for sentences only, never for decisions."""
_PORTABLE = "Ampere and newer (8.0, 8.6, 8.9, 12.0, 12.1)"


def build(graph: GraphFile, options: BuildOptions, progress: Progress) -> BuiltEngine:
    """Build an engine; see `srdeploy.runtime.engines.tensorrt.build.build_plan`."""
    return build_plan(FLAVOUR, graph, options, progress)


def open_built(
    engine: Engine, *, threads: int | None, parity: bool, outputs: Sequence[str] | None, device: str = "cuda:0"
) -> Runner:
    """Open an engine on a GPU.

    Raises:
        CapabilityError: no GPU, another GPU, or another release.
        InputError: the bytes are not a TensorRT-RTX engine.
    """
    trt = FLAVOUR.load()
    check_header(engine, trt.__version__)
    refuse_without_gpu(engine.path, FLAVOUR, _target_words(engine))
    check_target(engine, gpu(device))
    from srdeploy.runtime.engines.tensorrt.rtx_runtime import open_rtx

    return open_rtx(FLAVOUR, trt, engine, device, outputs)


def key_parts(options: BuildOptions) -> dict[str, Any]:
    """Return what decides the engine's bytes besides graph and options."""
    trt = FLAVOUR.load()
    _capabilities(trt, options)
    return {"versions": {FLAVOUR.name: trt.__version__}, "target": _target(options)}


def versions() -> dict[str, str]:
    """Return the versions of what takes part."""
    return FLAVOUR.versions()


def why_not_build() -> str | None:
    """Say why no engine can be built here; None when one can: no GPU is needed."""
    FLAVOUR.load()
    return None


def why_not_run() -> str | None:
    """Say why no engine can run here; None when one can."""
    trt = FLAVOUR.load()
    reason = why_no_gpu()
    if reason:
        return reason
    found = gpu()
    if found and f"SM{found[1][0]}{found[1][1]}" not in trt.ComputeCapability.__members__:
        return f"{found[0]} has compute capability {found[1][0]}.{found[1][1]}; this release supports {_supported(trt)}"
    return None


def describe_header(data: bytes) -> dict[str, Any] | None:
    """Read version and GPUs from the first bytes of an engine; None when they are not TensorRT-RTX's."""
    if len(data) < 64 or data[:4] != _MAGIC:
        return None
    targets = [name for bit, name in _TARGET_BITS.items() if data[32] & bit]
    return {"version": ".".join(str(number) for number in data[24:28]), "compute_capabilities": targets}


def check_header(engine: Engine, here: str) -> None:
    """Compare an engine's own words with the release that is installed, before the bytes are deserialized.

    Raises:
        InputError: not an engine of TensorRT-RTX.
        CapabilityError: built by another release.
    """
    header = describe_header(engine.data)
    if header is None:
        raise InputError(f"{engine.path} does not begin like a TensorRT-RTX engine", next_step="build it again")
    built_with = engine.manifest.details.get("key", {}).get("versions", {}).get(FLAVOUR.name, header["version"])
    if built_with != here or header["version"] != built_with:
        raise CapabilityError(
            f"{engine.path} was built for TensorRT-RTX {header['version']}, {_target_words(engine)}; here is {here}",
            next_step=f"build it again: srdeploy build MODEL.onnx --engine {FLAVOUR.name} -o {engine.path} --force",
        )


def _target_words(engine: Engine) -> str:
    named = engine.target.get("compute_capabilities") or []
    return "GPUs of compute capability " + ", ".join(named) if named else _PORTABLE


def check_target(engine: Engine, found: tuple[str, tuple[int, int], int] | None) -> None:
    """Compare the GPUs that an engine was built for with the one that is there (see `gpu`).

    Raises:
        CapabilityError: it is another one.
    """
    named = engine.target.get("compute_capabilities") or ["8.0", "8.6", "8.9", "12.0", "12.1"]
    here = f"{found[1][0]}.{found[1][1]}" if found else None
    if found and here not in named:
        raise CapabilityError(
            f"{engine.path} was built for {_target_words(engine)}; this GPU is {found[0]} ({here})",
            next_step=f"build it again with --compute-capability {here}, or use --engine tensorrt",
        )


def _check(graph: GraphFile, options: BuildOptions) -> None:
    _capabilities(FLAVOUR.load(), options)
    for layer in graph.layers:
        dtype = graph.layer_types[layer.node]
        if layer.op == "ConvTranspose" and dtype in ("bf16", "int8", "fp8"):
            raise BuildError(
                f"{graph.path} has a deconvolution {layer.node!r} in {dtype}, which TensorRT-RTX does not have",
                next_step="quantize again with --deconvolution rewrite: an exact convolution and pixel shuffle",
            )


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    capabilities = _capabilities(trt, options)
    if not capabilities:
        return
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if not config.set_compute_capability(capability, index):
            raise BuildError(f"TensorRT-RTX refuses compute capability {capability.name}")


def _finish(trt: Any, config: Any, options: BuildOptions) -> None:
    """Nothing is learned from a build that the next one could use."""


def _capabilities(trt: Any, options: BuildOptions) -> list[Any]:
    members = trt.ComputeCapability.__members__
    found = []
    for text in sorted(set(options.compute_capabilities)):
        try:
            major, minor = parse_capability(text)
        except ValueError as error:
            raise UsageError(f"compute capability {text!r}", expected=f"one of {_supported(trt)}") from error
        name = f"SM{major}{minor}"
        if name not in members:
            more = "; Hopper and data-center GPUs need --engine tensorrt" if major in (9, 10) else ""
            raise UsageError(
                f"TensorRT-RTX {trt.__version__} does not build for compute capability {major}.{minor}",
                expected=f"one of {_supported(trt)}{more}",
            )
        found.append(members[name])
    return found


def _supported(trt: Any) -> str:
    numbers = [name[2:] for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    return ", ".join(f"{digits[:-1]}.{digits[-1]}" for digits in numbers)


def _target(options: BuildOptions) -> dict[str, Any]:
    chosen = sorted({".".join(map(str, parse_capability(text))) for text in options.compute_capabilities})
    return {"compute_capabilities": chosen, "words": ", ".join(chosen) or _PORTABLE}


def runtime_cache_folder() -> Path:
    """Return where compiled kernels are kept between runs."""
    from srdeploy.runtime.engines.cache import default_root

    return default_root().parent / "rtx-kernels"


FLAVOUR = Flavour(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
    oldest=(1, 7),
    check=_check,
    configure=_configure,
    finish=_finish,
    target=_target,
    reads_layers_from_log=True,
    distributions=("tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs"),
)
