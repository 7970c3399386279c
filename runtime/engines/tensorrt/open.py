"""Opening a TensorRT engine: the bytes become native code only after everything that can be checked was checked."""

from collections.abc import Sequence
from typing import Any

from srdeploy.core.errors import InputError
from srdeploy.core.shapes import ShapeProfile, TensorSpec
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.families import Flavour
from srdeploy.runtime.engines.tensorrt.log import Log, captured, translated


def deserialized(flavour: Flavour, trt: Any, engine: Engine) -> tuple[Any, Any]:
    """Turn verified bytes into a runtime and an engine object, and compare the engine with its sidecar.

    The caller has checked SHA-256, header, release and GPU.

    Raises:
        InputError: TensorRT refuses the bytes, or the engine is not the one that the sidecar describes.
    """
    with captured(trt) as (logger, log):
        runtime = _runtime(flavour, trt, logger, log)
        # Code that travels inside an engine (plugins, lean runtimes) stays shut.
        runtime.engine_host_code_allowed = False
        cuda_engine = runtime.deserialize_cuda_engine(engine.data)
        if cuda_engine is None:
            cause, step = translated(log)
            raise InputError(f"{flavour.title} cannot open {engine.path}: {cause}", next_step=step)
    compare_with_sidecar(trt, cuda_engine, engine)
    return runtime, cuda_engine


def compare_with_sidecar(trt: Any, cuda_engine: Any, engine: Engine) -> None:
    """Compare an engine's name, tensors and profiles with its sidecar.

    Raises:
        InputError: something differs.
    """
    key_graph = str(engine.manifest.details.get("key", {}).get("onnx_sha256", ""))[:16]
    if not key_graph or not cuda_engine.name.endswith(key_graph):
        raise InputError(f"{engine.path} calls itself {cuda_engine.name!r}", expected=f"a name ending in {key_graph}")
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


def inspected_layers(flavour: Flavour, trt: Any, logger: Any, log: Log, data: bytes) -> str:
    """Return the engine inspector's JSON for freshly built bytes; needs a GPU."""
    runtime = _runtime(flavour, trt, logger, log)
    runtime.engine_host_code_allowed = False
    cuda_engine = runtime.deserialize_cuda_engine(data)
    if cuda_engine is None:
        cause, step = translated(log)
        raise InputError(f"{flavour.title} cannot open the engine it has just built: {cause}", next_step=step)
    inspector = cuda_engine.create_engine_inspector()
    document = inspector and inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    if not document:
        cause, step = translated(log)
        raise InputError(f"{flavour.title} cannot inspect the engine it has just built: {cause}", next_step=step)
    return str(document)


def _runtime(flavour: Flavour, trt: Any, logger: Any, log: Log) -> Any:
    try:
        return trt.Runtime(logger)
    except TypeError as error:  # the native factory returned nothing
        cause, step = translated(log)
        raise InputError(f"{flavour.title} cannot start: {cause}", next_step=step) from error


def _tensor(trt: Any, cuda_engine: Any, index: int) -> tuple[TensorSpec, bool]:
    import numpy as np

    name = cuda_engine.get_tensor_name(index)
    native = cuda_engine.get_tensor_dtype(name)
    try:
        dtype = np.dtype(trt.nptype(native)).name
    except TypeError:  # BF16 and narrower ones have no type in numpy; ours are none of them
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
