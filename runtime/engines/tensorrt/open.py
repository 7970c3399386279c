"""Opening a TensorRT engine: everything that can be checked is checked before the bytes become native code."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from srdeploy.core.errors import CapabilityError, GpuMemoryError, InputError, SrdeployError, UsageError
from srdeploy.core.shapes import ShapeProfile, TensorSpec
from srdeploy.core.sizes import format_bytes
from srdeploy.runtime.engines.gpu import Gpu, find_gpu, why_no_gpu
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.log import MEMORY_FULL, Log, runtime_log, translated
from srdeploy.runtime.engines.tensorrt.products import Product

if TYPE_CHECKING:
    from srdeploy.runtime.engines.tensorrt.runner import TensorRtRunner

_HELD: list[Any] = []
"""Contexts of the build process, which must not be freed: its logger is written in Python (see `log`)."""


def open_plan(
    product: Product, engine: Engine, device: str, outputs: Sequence[str] | None, *, graphs: bool = True
) -> "TensorRtRunner":
    """Open a verified engine file on a GPU.

    Args:
        product: TensorRT or TensorRT-RTX.
        engine: the file; its SHA-256 was checked.
        device: "cuda:N".
        outputs: must be None: a built engine has no inner tensors.
        graphs: use CUDA graphs.

    Raises:
        CapabilityError: no GPU, another GPU, another release, or not enough GPU memory.
        InputError: the bytes are not an engine, or not the one that the sidecar describes.
        UsageError: inner tensors were requested.
    """
    trt = product.load()
    found = check_opening(product, trt, engine, device)
    if outputs is not None:
        raise UsageError("a built engine has no inner tensors to return", next_step="open the ONNX file for that")
    import torch

    from srdeploy.runtime.engines.tensorrt.runner import TensorRtRunner

    if found.free_bytes() < len(engine.data):
        raise GpuMemoryError(f"{engine.path} needs more than {format_bytes(len(engine.data))} of it")
    with torch.cuda.device(device):
        native = deserialized(product, trt, engine)
        settings = product.open_settings(trt, native[1], engine, device, graphs)
    return TensorRtRunner(product, trt, engine, native, device, settings=settings, graphs=graphs)


def check_opening(product: Product, trt: Any, engine: Engine, device: str) -> Gpu:
    """Return the GPU that an engine is opened on.

    Raises:
        CapabilityError: no GPU, another GPU, another release, or a driver that is too old.
    """
    product.check_engine(engine, trt.__version__)
    found = find_gpu(device)
    if found is None:
        raise CapabilityError(
            f"{engine.path} is a {product.title} engine for {engine.target.get('words')}, and {why_no_gpu()}",
            next_step="run it on a machine with such a GPU, or build for openvino or onnxruntime to run here",
        )
    reason = product.why_not_driver() or product.why_not_run(trt, found)
    if reason:
        raise CapabilityError(f"{engine.path} cannot run here: {reason}")
    product.check_gpu(engine, found)
    return found


def deserialized(product: Product, trt: Any, engine: Engine) -> tuple[Any, Any]:
    """Turn verified bytes into a runtime and an engine object, and compare the engine with its sidecar.

    Raises:
        CapabilityError: the driver or the GPU does not fit.
        InputError: TensorRT refuses the bytes, or the engine is not the one that the sidecar describes.
    """
    with runtime_log(trt) as (logger, log):
        runtime = _runtime(trt, logger)
        cuda_engine = runtime and runtime.deserialize_cuda_engine(engine.data)
    if cuda_engine is None:
        raise _refused(log, f"{product.title} cannot open {engine.path}")
    compare_with_sidecar(trt, cuda_engine, engine)
    return runtime, cuda_engine


def compare_with_sidecar(trt: Any, cuda_engine: Any, engine: Engine) -> None:
    """Compare an engine's name, tensors and profiles with its sidecar.

    Raises:
        InputError: something differs.
    """
    key_graph = str(engine.manifest.details.get("key", {}).get("onnx_sha256", ""))[:16]
    if not key_graph or not cuda_engine.name.endswith(key_graph):
        raise InputError(f"{engine.path} has the name {cuda_engine.name!r}", expected=f"a name ending in {key_graph}")
    found = [_tensor(trt, cuda_engine, index) for index in range(cuda_engine.num_io_tensors)]
    inputs = tuple(spec for spec, is_input in found if is_input)
    outputs = tuple(spec for spec, is_input in found if not is_input)
    _same(engine, "inputs", [(spec.name, spec.dtype) for spec in inputs], engine.inputs)
    _same(engine, "outputs", [(spec.name, spec.dtype) for spec in outputs], engine.outputs)
    profiles = tuple(
        _profile(cuda_engine, inputs[0].name, index) for index in range(cuda_engine.num_optimization_profiles)
    )
    if profiles != engine.profiles:
        raise InputError(
            f"{engine.path} was built for {', '.join(map(str, profiles))}",
            expected=", ".join(map(str, engine.profiles)) + " as its sidecar says",
        )


def inspected_layers(product: Product, trt: Any, logger: Any, log: Log, data: bytes) -> list[str]:
    """Return the engine inspector's JSON for freshly built bytes, one document per profile; needs a GPU.

    Without an execution context the inspector prints "N/A due to dynamic shapes" in place of types, so every profile is
    inspected through a context that has its opt shape.
    """
    import torch

    runtime = _runtime(trt, logger)
    cuda_engine = runtime and runtime.deserialize_cuda_engine(data)
    if cuda_engine is None:
        raise _refused(log, f"{product.title} cannot open the engine it has just built")
    inspector = cuda_engine.create_engine_inspector()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    # USER_MANAGED: a context for inspection needs no activation memory.
    context = cuda_engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    _HELD.extend([runtime, cuda_engine, inspector, context])
    if inspector is None or context is None:
        raise _refused(log, f"{product.title} cannot inspect the engine it has just built")
    names = [cuda_engine.get_tensor_name(index) for index in range(cuda_engine.num_io_tensors)]
    name = next(name for name in names if cuda_engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT)
    documents = []
    for index in range(cuda_engine.num_optimization_profiles):
        opt = _profile(cuda_engine, name, index).opt
        try:
            selected = context.set_optimization_profile_async(index, stream.cuda_stream)
        except RuntimeError:
            selected = False
        stream.synchronize()
        if not selected or not context.set_input_shape(name, opt):
            raise _refused(log, f"{product.title} cannot inspect profile {index} of the engine it has just built")
        inspector.execution_context = context
        documents.append(str(inspector.get_engine_information(trt.LayerInformationFormat.JSON)))
    return documents


def _runtime(trt: Any, logger: Any) -> Any:
    """Return a runtime, None if TensorRT cannot create one."""
    try:
        runtime = trt.Runtime(logger)
    except TypeError:  # the native factory returned nothing
        return None
    # Code inside an engine (plugins, lean runtimes) is never run.
    runtime.engine_host_code_allowed = False
    return runtime


def _refused(log: Log, what: str) -> SrdeployError:
    """Return the error for a None of TensorRT: the machine's fault where the log says so, else the file's."""
    cause, step = translated(log)
    if cause == MEMORY_FULL:
        return GpuMemoryError(what)
    machine = any(word in cause for word in ("driver", "GPU"))
    return (CapabilityError if machine else InputError)(f"{what}: {cause}", next_step=step)


def _tensor(trt: Any, cuda_engine: Any, index: int) -> tuple[TensorSpec, bool]:
    import numpy as np

    name = cuda_engine.get_tensor_name(index)
    native = cuda_engine.get_tensor_dtype(name)
    try:
        dtype = np.dtype(trt.nptype(native)).name
    except TypeError:  # BF16 and narrower types do not exist in numpy; our inputs and outputs have none of them
        dtype = str(native.name).lower()
    is_input = cuda_engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
    return TensorSpec(name, dtype, tuple(cuda_engine.get_tensor_shape(name))), is_input


def _profile(cuda_engine: Any, name: str, index: int) -> ShapeProfile:
    low, middle, high = (tuple(shape) for shape in cuda_engine.get_tensor_profile_shape(name, index))
    return ShapeProfile(low, middle, high)


def _same(engine: Engine, what: str, found: Sequence[tuple[str, str]], stated: Sequence[TensorSpec]) -> None:
    expected = [(spec.name, spec.dtype) for spec in stated]
    if list(found) != expected:
        raise InputError(f"{engine.path} has {what} {list(found)}", expected=f"{expected} as its sidecar says")
