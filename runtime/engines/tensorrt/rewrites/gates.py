"""Gates of channel attention: the mean over the image and the first 1x1 convolution, as two sums that fill a GPU.

A gate takes the mean of every map and combines the means by a 1x1 convolution to a few hidden values. TensorRT-RTX
1.7.1 builds the mean of maps in channels-last order as one thread block per map, in which every thread reads 2 bytes of
128; for large images it splits the mean, with one more kernel that clears counters and one that casts. Written as

    hidden[k] = bias[k] + mean over h of (mean over w of (sum over c of weight[k, c] * maps[c, h, w]))

it is two kernels for images of any size: one with a thread block per row and hidden value, in which every thread reads
16 bytes next to its neighbor's, and a small one that adds the bias and applies the activation too. The values are the
same up to the order of the FP32 sums, and the means are not rounded to FP16 in between.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from srdeploy.core.onnx_graph import GLOBAL_POOLS, attribute, needed_nodes, opset_of, replace_nodes

MAX_PRODUCTS = 1024
"""Maps times hidden values: 64 maps and 16 values. Every value reads all maps again, and the kernels count their
products in 32 bits: with 1024 per pixel of the input they have no other limit than the maps of RCAN x4's output."""

_OPSET = 18
"""From here on the axes of a mean are an input, as written here. Exported graphs have a later one."""


def weight_rows(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Return a graph whose 1x1 convolutions of pooled maps are weighted sums, and the number of those convolutions.

    The products keep the names of the convolutions, by which their type is proven.
    """
    if opset_of(model) < _OPSET:
        return model, 0
    producer = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    changed = 0
    for node in model.graph.node:
        pool = _pool(node, producer, weights)
        if pool is None:
            nodes.append(node)
            continue
        written, values = _sums(node, pool.input[0], [weights[name] for name in node.input[1:]])
        nodes += written
        constants += values
        changed += 1
    if not changed:
        return model, 0
    read = needed_nodes(nodes, [entry.name for entry in model.graph.output])
    return replace_nodes(model, read, constants), changed


def _pool(
    node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], weights: Mapping[str, onnx.TensorProto]
) -> onnx.NodeProto | None:
    """Return the mean over the whole image that a small 1x1 convolution reads; None for every other node."""
    if node.op_type != "Conv" or any(name not in weights for name in node.input[1:]):
        return None
    outputs, inputs, *kernel = weights[node.input[1]].dims
    if kernel != [1, 1] or outputs * inputs > MAX_PRODUCTS:
        return None
    if attribute(node, "group", 1) != 1 or attribute(node, "pads", [0] * 4) != [0] * 4:
        return None
    source = producer.get(node.input[0])
    while source is not None and source.op_type == "Cast":
        source = producer.get(source.input[0])
    if source is None or source.op_type not in GLOBAL_POOLS:
        return None
    return source if source.op_type == "GlobalAveragePool" or _means_over_images(source, weights) else None


def _means_over_images(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> bool:
    """Return True for a mean over height and width that keeps its axes."""
    if len(node.input) > 1 and node.input[1] in weights:
        axes = numpy_helper.to_array(weights[node.input[1]]).tolist()
    else:
        axes = list(attribute(node, "axes", ()))  # type: ignore[call-overload]
    return attribute(node, "keepdims", 1) == 1 and sorted(axis % 4 for axis in axes) == [2, 3]


def _sums(
    node: onnx.NodeProto, maps: str, parameters: list[onnx.TensorProto]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return the nodes and constants that compute a convolution of pooled maps from the maps (N, C, H, W)."""
    weight = numpy_helper.to_array(parameters[0]).astype(np.float32)
    hidden, channels = weight.shape[:2]
    dtype = parameters[0].data_type
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(part: str, values: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(values, f"{node.output[0]}.{part}"))
        return constants[-1].name

    def add(op: str, inputs: list[str], part: str, **attributes: Any) -> str:
        name = f"{node.output[0]}.{part}"
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    wide = add("Cast", [maps], "wide", to=TensorProto.FLOAT)
    wide = add("Unsqueeze", [wide, constant("axis", np.array([1]))], "maps")  # (N, 1, C, H, W)
    # A mean over channels as well: times their number, it is their sum.
    weight = (weight * channels).reshape(1, hidden, channels, 1, 1)
    wide = add("Mul", [wide, constant("weight", weight)], "products")  # (N, K, C, H, W)
    nodes[-1].name = node.name
    rows = add("ReduceMean", [wide, constant("row_axes", np.array([2, 4]))], "rows", keepdims=0)  # (N, K, H)
    result = add("ReduceMean", [rows, constant("last_axis", np.array([2]))], "means", keepdims=0)  # (N, K)
    result = add("Cast", [result], "narrow", to=dtype)
    if len(parameters) > 1:
        # The bias comes before the reshape: after it, TensorRT-RTX builds a kernel more.
        bias = onnx.TensorProto()
        bias.CopyFrom(parameters[1])
        bias.name, bias.dims[:] = f"{node.output[0]}.bias", [1, hidden]
        constants.append(bias)
        result = add("Add", [result, bias.name], "biased")
    add("Reshape", [result, constant("shape", np.array([0, hidden, 1, 1]))], "hidden")
    nodes[-1].output[0] = node.output[0]
    return nodes, constants
