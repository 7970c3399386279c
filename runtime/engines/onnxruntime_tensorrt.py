"""ONNX Runtime's TensorRT provider, which links TensorRT 10, as an engine family."""

from collections.abc import Sequence

from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.runner import Runner
from srdeploy.runtime.engines import onnxruntime_gpu

NAME = "onnxruntime-tensorrt"


def why_not_run() -> str | None:
    """Say why nothing can run here; None when it can."""
    return onnxruntime_gpu.why_not_on(NAME)


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return onnxruntime_gpu.versions()


def open_onnx(
    graph: GraphFile, *, threads: int | None, parity: bool, outputs: Sequence[str] | None, device: str = "cuda:0"
) -> Runner:
    """Open an ONNX file on a GPU; see `srdeploy.runtime.engines.onnxruntime_gpu.open_gpu`."""
    return onnxruntime_gpu.open_gpu(graph, engine=NAME, threads=threads, parity=parity, outputs=outputs, device=device)
