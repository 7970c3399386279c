"""Exact rewrites: the same numbers from operations that an engine has fast 8-bit or BF16 kernels for."""

from math import ceil, floor

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from srdeploy.core.onnx_graph import Graph, attribute, replace_nodes


def rewrite_deconvolutions(model: onnx.ModelProto, *, phases: bool) -> tuple[onnx.ModelProto, int]:
    """Return a graph whose deconvolutions are convolutions followed by a pixel shuffle, and how many were rewritten.

    A deconvolution of stride s computes each of its s x s output phases from a small window of the input. With `phases`
    every phase is a convolution of its own, of just the taps it has: a 3x3 kernel of stride 2 becomes 1x1, 1x2, 2x1 and
    2x2, nine taps together as before, whose results are concatenated. Without, one convolution with s x s times the
    channels computes all of them: the 3x3 kernel becomes 2x2, of which 7 of 16 taps are zero, so it costs 16/9 of the
    multiply-adds but needs one kernel and no concatenation. DepthToSpace then puts the phases in place.
    Deconvolutions whose output is not exactly s times the input, grouped and dilated ones stay as they are.
    """
    graph = Graph(model)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    count = 0
    moved: set[str] = set()  # ReLUs that were put in front of their pixel shuffle, where they fuse with the convolution
    for node in model.graph.node:
        if node.name in moved:
            continue
        if node.op_type != "ConvTranspose" or not _suits(node, graph):
            nodes.append(node)
            continue
        reader = graph.only_consumer(node.output[0])
        relu = reader if reader is not None and reader.op_type == "Relu" else None
        if relu is not None:
            moved.add(relu.name)
        made, own = (_separate if phases else _together)(node, relu, graph)
        nodes += made
        constants += own
        count += 1
    return replace_nodes(model, nodes, constants), count


def _together(
    node: onnx.NodeProto, relu: onnx.NodeProto | None, graph: Graph
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """One convolution for all phases, under the names of the deconvolution."""
    stride, begin = _pair(node, "strides", [1, 1])[0], _pair(node, "pads", [0, 0, 0, 0])[0]
    kernel, first, last = phase_kernel(graph.array(node.input[1]), stride, begin)
    constants = [numpy_helper.from_array(np.ascontiguousarray(kernel), node.input[1])]
    if len(node.input) > 2 and node.input[2]:
        constants.append(numpy_helper.from_array(np.repeat(graph.array(node.input[2]), stride**2), node.input[2]))
    pads = [-first, -first, last, last]
    made, source = _convolution(list(node.input), node.name, f"{node.output[0]}_phases", kernel, pads, relu)
    return [*made, _shuffle(source, node, relu, stride, "CRD")], constants


def _separate(
    node: onnx.NodeProto, relu: onnx.NodeProto | None, graph: Graph
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """One convolution for every phase, named after the deconvolution's weights."""
    stride, begin = _pair(node, "strides", [1, 1])[0], _pair(node, "pads", [0, 0, 0, 0])[0]
    weights = graph.array(node.input[1])  # (in, out, k, k)
    size = weights.shape[2]
    # An output pixel of phase a lies over the input pixels y with a tap at a + begin - stride * y.
    rows = [[y for y in range(-size, size + 1) if 0 <= a + begin - stride * y < size] for a in range(stride)]
    made: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    sources = []
    for a in range(stride):
        for b in range(stride):
            name = f"{node.input[1].removesuffix('.weight')}.phase{a}{b}"
            taps = [[weights[:, :, a + begin - stride * y, b + begin - stride * x].T for x in rows[b]] for y in rows[a]]
            kernel = np.ascontiguousarray(np.array(taps, dtype=np.float32).transpose(2, 3, 0, 1))  # (out, in, t, t)
            inputs = [node.input[0], f"{name}.weight"]
            constants.append(numpy_helper.from_array(kernel, f"{name}.weight"))
            if len(node.input) > 2 and node.input[2]:
                inputs.append(f"{name}.bias")
                constants.append(numpy_helper.from_array(graph.array(node.input[2]), f"{name}.bias"))
            pads = [-rows[a][0], -rows[b][0], rows[a][-1], rows[b][-1]]
            nodes, source = _convolution(inputs, name, f"{node.output[0]}_phase{a}{b}", kernel, pads, relu)
            made += nodes
            sources.append(source)
    joined = f"{node.output[0]}_phases"
    made.append(helper.make_node("Concat", sources, [joined], name=f"{node.name}_concat", axis=1))
    return [*made, _shuffle(joined, node, relu, stride, "DCR")], constants


def _convolution(
    inputs: list[str],
    name: str,
    output: str,
    kernel: NDArray[np.float32],
    pads: list[int],
    relu: onnx.NodeProto | None,
) -> tuple[list[onnx.NodeProto], str]:
    """Return a convolution, with a ReLU where the deconvolution had one, and what they write."""
    size = list(kernel.shape[2:])
    made = [helper.make_node("Conv", inputs, [output], name=name, pads=pads, kernel_shape=size, strides=[1, 1])]
    if relu is None:
        return made, output
    return [*made, helper.make_node("Relu", [output], [f"{output}_relu"], name=f"{name}_relu")], f"{output}_relu"


def _shuffle(source: str, node: onnx.NodeProto, relu: onnx.NodeProto | None, stride: int, mode: str) -> onnx.NodeProto:
    output = (relu or node).output[0]
    return helper.make_node(
        "DepthToSpace", [source], [output], name=f"{node.name}_shuffle", blocksize=stride, mode=mode
    )


def phase_kernel(weights: NDArray[np.float32], stride: int, begin: int) -> tuple[NDArray[np.float32], int, int]:
    """Return the convolution that computes all phases of a deconvolution.

    Args:
        weights: (in, out, k, k) of the deconvolution.
        stride: on both axes.
        begin: its padding at the top and left.

    Returns:
        (out * stride^2, in, t, t), channel c * stride^2 + stride * a + b being phase (a, b) of channel c, and the
        offsets of the first and last input pixel that an output pixel needs.
    """
    channels_in, channels_out, size, _ = weights.shape
    first = min(ceil((phase + begin - size + 1) / stride) for phase in range(stride))
    last = max(floor((phase + begin) / stride) for phase in range(stride))
    taps = last - first + 1
    kernel = np.zeros((channels_out, stride, stride, channels_in, taps, taps), dtype=np.float32)
    for a in range(stride):
        for b in range(stride):
            for y in range(first, last + 1):
                for x in range(first, last + 1):
                    row, column = a + begin - stride * y, b + begin - stride * x
                    if 0 <= row < size and 0 <= column < size:
                        kernel[:, a, b, :, y - first, x - first] = weights[:, :, row, column].T
    return kernel.reshape(channels_out * stride * stride, channels_in, taps, taps), first, last


def _suits(node: onnx.NodeProto, graph: Graph) -> bool:
    if node.input[1] not in graph.initializers:
        return False
    dims = graph.initializers[node.input[1]].dims
    strides, pads = _pair(node, "strides", [1, 1]), _pair(node, "pads", [0, 0, 0, 0])
    extra, dilations = _pair(node, "output_padding", [0, 0]), _pair(node, "dilations", [1, 1])
    square = len(set(strides)) == 1 and len(set(pads)) == 1 and len(set(extra)) == 1 and dims[2] == dims[3]
    plain = attribute(node, "group", 1) == 1 and dilations == [1, 1]
    exact = dims[2] + extra[0] - 2 * pads[0] == strides[0]
    shared = len(graph.consumers[node.input[1]]) > 1
    # Every phase has a tap, and none lies wholly beyond the pixel that it starts at.
    tapped = dims[2] >= strides[0] and extra[0] <= pads[0]
    return square and plain and exact and tapped and not shared


def _pair(node: onnx.NodeProto, name: str, default: list[int]) -> list[int]:
    value = attribute(node, name, default)
    assert isinstance(value, list)
    return [int(entry) for entry in value]
