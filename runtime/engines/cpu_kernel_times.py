"""Milliseconds of each kernel of the engines on the CPU, from their own profilers.

Profiled runs take a little longer than others. The times compare kernels with each other; for the latency of an engine,
use the runner. Each is the shortest of several runs: whatever else the machine does only adds to it.

    https://docs.openvino.ai/2025/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html
    https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html
"""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.runner import KernelTime

Feeds = Mapping[str, NDArray[Any]]

MIN_RUNS, MAX_RUNS, SECONDS = 5, 100, 1.0
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_RENAMED = re.compile(r"(_nchwc|_token_\d+|/duplicated)+$")
"""What ONNX Runtime adds to the name of the last node that a kernel computes, or of the tensor that it writes."""


def openvino_kernel_times(compiled: Any, feeds: Feeds, graph: GraphFile) -> list[KernelTime]:
    """Return the time of each kernel of a model that was compiled with PERF_COUNT.

    Args:
        compiled: the `openvino.CompiledModel`.
        feeds: named inputs.
        graph: that it was compiled from.
    """
    request = compiled.create_infer_request()
    arrays = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
    request.infer(arrays)  # allocates, and chooses kernels
    shortest: dict[str, float] = {}
    for _ in _runs():
        request.infer(arrays)
        spent: Counter[str] = Counter()
        for kernel in request.profiling_info:
            if kernel.status == kernel.Status.EXECUTED:
                spent[kernel.node_name] += 1e3 * kernel.real_time.total_seconds()
        shortest |= {name: min(ms, shortest.get(name, ms)) for name, ms in spent.items()}
    originals = {
        operation.get_friendly_name(): operation.get_rt_info()["originalLayersNames"].astype(str)
        for operation in compiled.get_runtime_model().get_ops()
    }
    names = {node.name for node in graph.model.graph.node}
    # The node that writes an output is named after the output.
    writers = {output: node.name for node in graph.model.graph.node for output in node.output}
    found = []
    for kernel, ms in shortest.items():
        listed = (originals.get(kernel) or kernel).split(",")
        parts = [name.removesuffix("/WithoutBiases") for name in listed]
        nodes = {name if name in names else writers.get(name, "") for name in parts} - {""}
        if not nodes:  # a conversion is named after both its ends, and it is the reader that needs it
            nodes = {max((name for name in names if parts[-1].endswith(name)), key=len, default="")} - {""}
        found.append(KernelTime(tuple(sorted(nodes)), ms))
    return found


def onnxruntime_kernel_times(session: Any, feeds: Feeds, graph: GraphFile) -> list[KernelTime]:
    """Return the time of each kernel of a session that was opened with profiling; this ends the profile.

    Args:
        session: the `onnxruntime.InferenceSession`.
        feeds: named inputs.
        graph: that it was opened from.
    """
    for _ in _runs():
        session.run(None, dict(feeds))
    profile = Path(session.end_profiling())
    try:
        events = json.loads(profile.read_text(encoding="utf-8"))
    finally:
        profile.unlink(missing_ok=True)
    shortest: dict[tuple[str, str], float] = {}
    for event in events:
        name, mark, _ = event["name"].rpartition("_kernel_time")
        if mark and event.get("cat") == "Node":
            key, ms = (_RENAMED.sub("", name), event["args"]["op_name"]), event["dur"] / 1e3
            shortest[key] = min(ms, shortest.get(key, ms))
    nodes = {node.name: node for node in graph.model.graph.node}
    writers = {output: node for node in nodes.values() for output in node.output}

    def computed(name: str, operation: str) -> tuple[str, ...]:
        """Return the node of that name, or that writes it; of a convolution with others fused into it, that alone."""
        named = nodes.get(name) or writers.get(name)
        level = [named] if named else []
        while level and "Conv" in operation:
            found = [node.name for node in level if node.op_type in _CONVOLUTIONS]
            if found:
                return tuple(found)
            level = [writers[tensor] for node in level for tensor in node.input if tensor in writers]
        return tuple(node.name for node in level)

    return [KernelTime(computed(*key), ms) for key, ms in shortest.items()]


def _runs() -> Iterator[int]:
    """Yield for each run to make: some, and more while there is time."""
    end = time.perf_counter() + SECONDS
    for number in range(MAX_RUNS):
        if number >= MIN_RUNS and time.perf_counter() > end:
            break
        yield number
