"""Limits of an engine's shapes from closed formulas, before minutes are spent on building it.

Two limits grow with the number of LR pixels, N * H * W, of the largest shape:

- no tensor may have 2^31 elements or more: kernels count in 32 bits;
- activation memory: the largest sum of tensors that are alive at the same time. Fused kernels need less, allocators
  round up: TensorRT-RTX 1.7.1 needed 2 to 16 % more for graphs as they are exported, and 9 to 37 % less for the
  rewritten ones that it is given. A margin is added before it is compared with the GPU's memory.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from srdeploy.core.errors import UsageError
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.shapes import Shape, ShapeProfile, elements, format_shape
from srdeploy.core.sizes import format_bytes

MAX_ELEMENTS = 2**31 - 1
MEMORY_MARGIN = 1.2
_ALIASES = ("Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten")
_BYTES: dict[int, int] = {
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.BFLOAT16: 2,
    onnx.TensorProto.INT8: 1,
    onnx.TensorProto.UINT8: 1,
    onnx.TensorProto.FLOAT8E4M3FN: 1,
    onnx.TensorProto.INT64: 8,
}


@dataclass(frozen=True)
class Footprint:
    """Memory of a graph: per LR pixel, and of its weights.

    Attributes:
        largest_tensor: name of the tensor with the most elements.
        elements_per_pixel: its elements per LR pixel.
        activation_bytes_per_pixel: estimate of the activation memory per LR pixel.
        weights_bytes: of all initializers.
    """

    largest_tensor: str
    elements_per_pixel: float
    activation_bytes_per_pixel: float
    weights_bytes: int

    def max_pixels(self, memory_bytes: int | None) -> int:
        """Return the maximum number of LR pixels (N * H * W) within both limits."""
        by_count = int(MAX_ELEMENTS // self.elements_per_pixel)
        if memory_bytes is None:
            return by_count
        free = max(0, memory_bytes - self.weights_bytes)
        return min(by_count, int(free / (self.activation_bytes_per_pixel * MEMORY_MARGIN)))

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON values."""
        return {
            "largest_tensor": self.largest_tensor,
            "elements_per_pixel": round(self.elements_per_pixel, 1),
            "activation_bytes_per_pixel": round(self.activation_bytes_per_pixel, 1),
            "weights_bytes": self.weights_bytes,
        }


def footprint(graph: GraphFile) -> Footprint:
    """Compute the memory of a graph by shape inference and a walk over the lifetimes of its tensors."""
    shapes, types = graph.inferred
    pixels = lr_pixels(graph.probe_shape)
    weights = {tensor.name for tensor in graph.model.graph.initializer}
    produced = {
        name: elements(shapes[name]) for node in graph.model.graph.node for name in node.output if name in shapes
    }
    largest = max(produced, key=lambda name: produced[name], default="")
    peak = _peak_bytes(graph.model.graph, shapes, types)
    return Footprint(
        largest_tensor=largest,
        # Inference may stop at an unknown operation; the contract's figure is a lower bound.
        elements_per_pixel=max(produced.get(largest, 0) / pixels, float(graph.contract.largest_tensor_per_pixel)),
        activation_bytes_per_pixel=peak / pixels,
        weights_bytes=sum(elements(shapes[name]) * _BYTES.get(types[name], 4) for name in weights),
    )


def check_feasible(cost: Footprint, profiles: tuple[ShapeProfile, ...], memory_bytes: int | None) -> None:
    """Refuse profiles whose largest shape cannot be built or run.

    Raises:
        UsageError: names the limit, the number, and the largest shape within the limits.
    """
    for profile in profiles:
        pixels = lr_pixels(profile.max)
        legal = format_shape(largest_legal_shape(cost, profile.max, memory_bytes))
        count = cost.elements_per_pixel * pixels
        if count > MAX_ELEMENTS:
            raise UsageError(
                f"at {format_shape(profile.max)} the tensor {cost.largest_tensor!r} has {count:.3g} elements",
                expected=f"less than 2^31 = {MAX_ELEMENTS + 1:,}",
                next_step=f"the largest legal shape of this kind is {legal}; larger images are tiled",
            )
        needed = cost.activation_bytes_per_pixel * pixels * MEMORY_MARGIN + cost.weights_bytes
        if memory_bytes is not None and needed > memory_bytes:
            raise UsageError(
                f"at {format_shape(profile.max)} the engine needs about {format_bytes(needed)} of GPU memory",
                expected=f"at most {format_bytes(memory_bytes)}",
                next_step=f"the largest legal shape of this kind is {legal}; larger images are tiled",
            )


def largest_legal_shape(cost: Footprint, shape: Shape, memory_bytes: int | None) -> Shape:
    """Return the largest shape with the batch, channels and (nearly) the aspect ratio of a given one.

    Height and width are multiples of 8 if that leaves at least 8; the batch is reduced if even one pixel is too much.
    """
    n, c, h, w = shape
    per_image = cost.max_pixels(memory_bytes) // n
    if per_image < 1:
        return 1, c, 1, 1
    height = max(1, int(math.sqrt(per_image * h / w)))
    width = max(1, per_image // height)
    height, width = (size // 8 * 8 if size >= 8 else size for size in (height, width))
    return n, c, height, width


def lr_pixels(shape: Shape) -> int:
    """Return N * H * W."""
    return shape[0] * shape[2] * shape[3]


def _peak_bytes(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]], types: Mapping[str, int]) -> int:
    """Return the largest sum of tensors that are alive at once, each from its producer to its last consumer.

    Graph inputs and outputs are the caller's memory, and reshapes share the buffer of what they reshape.
    """
    alias = _shared_buffers(graph)
    sizes: dict[str, int] = {}
    last_use: dict[str, int] = {}
    weights = {tensor.name for tensor in graph.initializer}
    outside = {value.name for value in (*graph.input, *graph.output)}
    for index, node in enumerate(graph.node):
        for name in (*node.input, *node.output):
            root = alias.get(name, name)
            last_use[root] = index
            if name in shapes and name not in weights and name not in outside:
                sizes[root] = max(sizes.get(root, 0), elements(shapes[name]) * _BYTES.get(types.get(name, 1), 4))
    ends: dict[int, list[str]] = {}
    for name, index in last_use.items():
        ends.setdefault(index, []).append(name)
    alive, peak, started = 0, 0, set[str]()
    for index, node in enumerate(graph.node):
        for name in node.output:
            root = alias.get(name, name)
            if root not in started:
                started.add(root)
                alive += sizes.get(root, 0)
        peak = max(peak, alive)
        alive -= sum(sizes.get(name, 0) for name in ends.get(index, ()) if name in started)
    return peak


def _shared_buffers(graph: onnx.GraphProto) -> dict[str, str]:
    """Map tensors to the tensor whose buffer they share."""
    alias: dict[str, str] = {}
    for node in graph.node:
        if node.op_type in _ALIASES and node.input and node.output:
            alias[node.output[0]] = alias.get(node.input[0], node.input[0])
    return alias
