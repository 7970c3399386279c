"""The engines that are worth building on this machine."""

from dataclasses import dataclass

from srdeploy.core.precision import Precision
from srdeploy.runtime.engines.gpu import Gpu, find_gpu
from srdeploy.runtime.engines.registry import CPU_FAMILIES, EngineStatus, engine_status, family

_TENSORRT = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class Recommendation:
    """An engine family and the precisions that are worth building for it here, the first one preferred.

    Attributes:
        engine: the family.
        precisions: see `precisions_of`.
        runs_here: False for engines that are built here for other machines.
    """

    engine: str
    precisions: tuple[Precision, ...]
    runs_here: bool


def recommended(device: str = "auto") -> tuple[Recommendation, ...]:
    """Return what to build on this machine if the user names no engine, the most promising first.

    With an NVIDIA GPU: TensorRT, or TensorRT-RTX if only that can be built and run here, and ONNX Runtime's CUDA
    provider. Without one, or if no family can use it: the CPU engines, and TensorRT-RTX, which builds without a GPU.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        CapabilityError: the GPU does not exist.
    """
    found = None if device == "cpu" else find_gpu(device)
    if found is not None:
        tensorrt = [name for name in _TENSORRT if _usable(engine_status(name, device))][:1]
        names = tensorrt + [name for name in ("onnxruntime-cuda",) if _usable(engine_status(name, device))]
        if names:
            return tuple(Recommendation(name, precisions_of(name, found), True) for name in names)
    # ncnn is for other machines than this one: it is built where it is named.
    names = [name for name in CPU_FAMILIES if family(name).opens_onnx and _usable(engine_status(name))]
    elsewhere = [name for name in ("tensorrt-rtx",) if engine_status(name).why_not_build is None]
    return tuple(Recommendation(name, precisions_of(name, None), name in CPU_FAMILIES) for name in names + elsewhere)


def precisions_of(engine: str, found: Gpu | None) -> tuple[Precision, ...]:
    """Return the precisions that are worth building for an engine family, the preferred one first.

    Args:
        engine: the family.
        found: the GPU that it is for, None if unknown.

    Raises:
        UsageError: there is no such family.
    """
    precisions: tuple[Precision, ...] = family(engine).load().precisions(found)
    return precisions


def _usable(status: EngineStatus) -> bool:
    builds = family(status.name).suffix is None or status.why_not_build is None
    return builds and status.why_not_run is None
