"""TensorRT-RTX: engines for GeForce and RTX GPUs, built ahead of time on any machine; no GPU is needed.

An engine holds a graph that is compiled for the GPU at first use; the compiled kernels are kept in a runtime cache.
FP16 is the fast path. INT8 and FP8 graphs build, but every quantized convolution writes FP32 and needs one kernel more.
"""

import contextlib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from srdeploy.core.artifact import atomic_file
from srdeploy.core.errors import BuildError, CapabilityError, InputError, SrdeployError, UsageError
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.precision import Precision
from srdeploy.runtime.engines.cache import default_root
from srdeploy.runtime.engines.gpu import Gpu, find_gpu
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.products import Product, parse_capability

REFUSED_OPTIONS: Mapping[str, str] = {
    "device": "it builds for all GPUs of --compute-capability on any machine",
    "optimization_level": "it builds the same engine at every level",
    "timing_cache": "it times no kernels when it builds",
    "hardware_compatibility": "name the GPUs with --compute-capability instead",
    "version_compatible": "its engines open only with the release that built them",
    "max_aux_streams": "it compiles one graph on one stream",
    "threads": "it runs on the GPU",
}
MAX_CACHE_BYTES = 100 * 2**20
"""The runtime cache becomes slow above about this size; a larger one is not kept."""
_MAGIC = b"vtrt"
_TARGET_BITS = {0x01: "7.5", 0x02: "8.0", 0x04: "8.6", 0x08: "8.9", 0x10: "12.0", 0x20: "12.1"}
"""Observed in engines of 1.7.1, not documented: used in messages only, never for decisions."""
_PORTABLE = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities of an engine built without --compute-capability."""


def check_build(graph: GraphFile, options: BuildOptions) -> None:
    """Refuse unknown compute capabilities and deconvolutions in types that do not exist.

    Raises:
        UsageError: a compute capability that this release does not build for.
        BuildError: a BF16, INT8 or FP8 deconvolution.
    """
    _capabilities(RTX.load(), options)
    for layer in graph.layers:
        dtype = graph.layer_types[layer.node]
        if layer.op == "ConvTranspose" and dtype in ("bf16", "int8", "fp8"):
            raise BuildError(
                f"{graph.path} has a deconvolution {layer.node!r} in {dtype}, which TensorRT-RTX does not have",
                next_step="quantize again with --deconvolution rewrite: an exact convolution and pixel shuffle",
            )


def configure(trt: Any, config: Any, options: BuildOptions) -> None:
    """Set the GPUs to build for.

    Raises:
        BuildError: TensorRT-RTX refuses one.
    """
    capabilities = _capabilities(trt, options)
    if not capabilities:
        return
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if not config.set_compute_capability(capability, index):
            raise BuildError(f"TensorRT-RTX refuses compute capability {capability.name}")


def target(options: BuildOptions) -> dict[str, Any]:
    """Return the compute capabilities that were chosen; empty for the portable default.

    Raises:
        UsageError: a compute capability that this release does not build for.
    """
    _capabilities(RTX.load(), options)
    chosen = sorted({".".join(map(str, parse_capability(text))) for text in options.compute_capabilities})
    return {"compute_capabilities": chosen, "words": ", ".join(chosen) or _portable_label()}


def why_not_run(trt: Any, found: Gpu) -> str | None:
    """Return why this release does not support a GPU; None if it does."""
    if f"SM{found.capability[0]}{found.capability[1]}" in trt.ComputeCapability.__members__:
        return None
    return f"{found.name} has compute capability {found.capability_text}; this release supports {_supported(trt)}"


def describe_header(data: bytes) -> dict[str, Any] | None:
    """Return version and compute capabilities from the first bytes of an engine; None if it is not TensorRT-RTX's."""
    if len(data) < 64 or data[:4] != _MAGIC:
        return None
    targets = [name for bit, name in _TARGET_BITS.items() if data[32] & bit]
    return {"version": ".".join(str(number) for number in data[24:28]), "compute_capabilities": targets}


def check_engine(engine: Engine, here: str) -> None:
    """Refuse an engine of another release by its header, before the bytes are deserialized.

    Raises:
        InputError: not an engine of TensorRT-RTX.
        CapabilityError: built by another release than the one installed here.
    """
    header = describe_header(engine.data)
    if header is None:
        raise InputError(f"{engine.path} does not begin like a TensorRT-RTX engine", next_step="build it again")
    built_with = engine.manifest.details.get("key", {}).get("versions", {}).get(RTX.name, header["version"])
    if built_with != here or header["version"] != built_with:
        raise CapabilityError(
            f"{engine.path} was built with TensorRT-RTX {header['version']} for {target_label(engine)};"
            f" TensorRT-RTX {here} is installed here",
            next_step=f"build it again: srdeploy build MODEL.onnx --engine {RTX.name} "
            f"{engine.shape_options} -o {engine.path} --force",
        )


def check_gpu(engine: Engine, found: Gpu) -> None:
    """Refuse an engine of other compute capabilities.

    Raises:
        CapabilityError: built for other GPUs.
    """
    if found.capability_text not in (engine.target.get("compute_capabilities") or _PORTABLE):
        raise CapabilityError(
            f"{engine.path} was built for {target_label(engine)}; this GPU is {found}",
            next_step=f"build it again with --compute-capability {found.capability_text}, or use --engine tensorrt",
        )


def target_label(engine: Engine) -> str:
    """Return what an engine was built for, for messages."""
    named = engine.target.get("compute_capabilities") or []
    return "GPUs of compute capability " + ", ".join(named) if named else _portable_label()


def runtime_cache_folder() -> Path:
    """Return the folder where compiled kernels are kept between runs."""
    return default_root().parent / "rtx-kernels"


class _Settings:
    """The compiled kernels of one engine, shared by all its contexts, and CUDA graphs of TensorRT-RTX's own.

    TensorRT-RTX checks that a cache fits the GPU, driver and release, and ignores it otherwise. Its graph strategy
    replaces fallback kernels by specialized ones inside the captured graph, which a capture from outside could not.
    """

    def __init__(self, trt: Any, cuda_engine: Any, path: Path, graphs: bool) -> None:
        self._trt = trt
        self._path = path
        self._graphs = graphs
        runtime_config = cuda_engine.create_runtime_config()
        self.cache: Any = runtime_config.create_runtime_cache() if runtime_config is not None else None
        if self.cache is None:
            raise CapabilityError("TensorRT-RTX could not create a runtime cache")
        self._before = b""
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            # False: the cache belongs to another GPU, driver or release. It is rewritten at the end.
            if self.cache.deserialize(data):
                self._before = data

    def configure(self, runtime_config: Any, *, eager: bool) -> None:
        trt = self._trt
        runtime_config.cuda_graph_strategy = (
            trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if self._graphs else trt.CudaGraphStrategy.DISABLED
        )
        runtime_config.dynamic_shapes_kernel_specialization_strategy = (
            trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if eager
            else trt.DynamicShapesKernelSpecializationStrategy.LAZY
        )
        if not runtime_config.set_runtime_cache(self.cache):
            raise CapabilityError("TensorRT-RTX refuses its runtime cache")

    def close(self) -> None:
        """Write the kernels if there are new ones, and free them: they must not outlive the engine. Best effort."""
        host_memory = self.cache.serialize()
        data = bytes(host_memory) if host_memory is not None else self._before
        self.cache = None
        if data == self._before or len(data) > MAX_CACHE_BYTES:
            return
        with contextlib.suppress(OSError, SrdeployError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with filelock.FileLock(self._path.with_suffix(".lock")), atomic_file(self._path, force=True) as path:
                path.write_bytes(data)


def _open_settings(trt: Any, cuda_engine: Any, engine: Engine, device: str, graphs: bool) -> _Settings:
    import torch

    found = find_gpu(device)
    key = f"{found and found.name}|{torch.version.cuda}|{engine.manifest.sha256}"
    path = runtime_cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.bin"
    return _Settings(trt, cuda_engine, path, graphs)


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


def _portable_label() -> str:
    return f"Ampere and newer ({', '.join(_PORTABLE)})"


RTX = Product(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    modules=("tensorrt_rtx", "tensorrt_rtx_bindings"),
    oldest=(1, 7),
    refused_options=REFUSED_OPTIONS,
    reads_layers_from_log=True,
    builds_ahead_of_time=True,
    captures_graphs=False,
    distributions=("tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs"),
    check_build=check_build,
    configure=configure,
    finish=lambda trt, config, options: None,
    target=target,
    precisions=lambda found: (Precision.FP16,),  # INT8 convolutions write FP32 and need one kernel more
    why_not_run=why_not_run,
    check_engine=check_engine,
    check_gpu=check_gpu,
    open_settings=_open_settings,
)
