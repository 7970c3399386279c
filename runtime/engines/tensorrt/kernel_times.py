"""Milliseconds of each kernel of a TensorRT engine, from its layer profiler.

Profiled runs are uncaptured and synchronize after each one; events between kernels add to their times. The times
compare kernels with each other. For the latency of an engine, use the runner.

    https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html (profiling layers)
"""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from srdeploy.core.errors import CapabilityError
from srdeploy.core.runner import KernelTime
from srdeploy.core.shapes import Shape, format_shape
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.full import FULL
from srdeploy.runtime.engines.tensorrt.layers import Kernel, layers_from_inspector
from srdeploy.runtime.engines.tensorrt.open import check_opening, deserialized

RUNS, WARM_UP = 20, 5
_REFORMAT = re.compile(r"Reformatting CopyNode for (?:Input|Output) Tensor \d+ to (.*)")


def kernel_times(engine: Engine, shape: Shape, device: str) -> list[KernelTime]:
    """Return the median time of each kernel; a reformat has the nodes of the kernel that needs it.

    Args:
        engine: of full TensorRT; its SHA-256 was checked.
        shape: of the input, within the first profile.
        device: "cuda:N".

    Raises:
        CapabilityError: the engine does not run here, or not with this shape.
        InputError: the bytes are not the engine that the sidecar describes.
    """
    import torch

    trt = FULL.load()
    check_opening(FULL, trt, engine, device)
    with torch.cuda.device(device), torch.inference_mode(False):
        runtime, cuda_engine = deserialized(FULL, trt, engine)
        context = cuda_engine.create_execution_context()
        (source, *_), (result, *_) = engine.inputs, engine.outputs
        if context is None or not context.set_input_shape(source.name, shape):
            raise CapabilityError(f"{engine.path} cannot be profiled with {format_shape(shape)}")
        image = torch.rand(shape, device=device).to(getattr(torch, source.dtype))
        output = torch.empty(
            tuple(context.get_tensor_shape(result.name)), dtype=getattr(torch, result.dtype), device=device
        )
        context.set_tensor_address(source.name, image.data_ptr())
        context.set_tensor_address(result.name, output.data_ptr())
        inspector = cuda_engine.create_engine_inspector()
        inspector.execution_context = context
        document = str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        profiler = _profiler(trt)
        context.profiler = profiler
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        for run in range(WARM_UP + RUNS):
            if run == WARM_UP:
                profiler.times.clear()
            if not context.execute_async_v3(stream.cuda_stream):
                raise CapabilityError(f"{engine.path} cannot be profiled: TensorRT refused to enqueue it")
        stream.synchronize()
        del inspector, context, cuda_engine, runtime  # in this order: each needs the next
    return _with_nodes(layers_from_inspector([document]).kernels, profiler.times)


def _with_nodes(kernels: Sequence[Kernel], times: Mapping[str, Sequence[float]]) -> list[KernelTime]:
    nodes = {kernel.name: kernel.onnx_layers for kernel in kernels}
    found = []
    for name, milliseconds in times.items():
        reformat = _REFORMAT.match(name)
        needed_by = nodes.get(reformat[1], ()) if reformat else ()
        found.append(KernelTime(nodes.get(name) or needed_by, statistics.median(milliseconds)))
    return found


def _profiler(trt: Any) -> Any:
    class Profiler(trt.IProfiler):  # type: ignore[misc]  # the base class is known at run time only
        """Collects the times of each kernel."""

        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms)

    return Profiler()
