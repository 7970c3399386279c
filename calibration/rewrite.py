"""Exact rewrites: the same numbers from operations that an engine has fast 8-bit or BF16 kernels for."""

from math import ceil, floor

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from srdeploy.calibration.graph import Graph, attribute


def deconvolutions_rewritten(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Return a graph whose deconvolutions are convolutions followed by a pixel shuffle, and how many were rewritten.

    A deconvolution of stride s computes each of its s x s output phases from a small window of the input: that is a
    convolution with s x s times the channels, and DepthToSpace puts the phases in place. A 3x3 kernel of stride 2
    becomes 2x2 with four times the channels, of which 7 of 16 taps are zero, so it costs 16/9 of the multiply-adds.
    Deconvolutions whose output is not exactly s times the input, grouped and dilated ones stay as they are.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = Graph(result)
    del result.graph.node[:]
    count = 0
    moved: set[str] = set()  # ReLUs that were put in front of their pixel shuffle, where they fuse with the convolution
    for node in model.graph.node:
        if node.name in moved:
            continue
        if node.op_type != "ConvTranspose" or not _suits(node, graph):
            result.graph.node.add().CopyFrom(node)
            continue
        stride, begin = _pair(node, "strides", [1, 1])[0], _pair(node, "pads", [0, 0, 0, 0])[0]
        kernel, first, last = phase_kernel(graph.array(node.input[1]), stride, begin)
        _replace(result, node.input[1], kernel)
        if len(node.input) > 2 and node.input[2]:
            _replace(result, node.input[2], np.repeat(graph.array(node.input[2]), stride * stride))
        reader = graph.only_consumer(node.output[0])
        relu = reader if reader is not None and reader.op_type == "Relu" else None
        shuffled = (relu or node).output[0]
        phases = f"{node.output[0]}_phases"
        made = [
            helper.make_node(
                "Conv",
                node.input,
                [phases],
                name=node.name,
                pads=[-first, -first, last, last],
                kernel_shape=list(kernel.shape[2:]),
                strides=[1, 1],
            )
        ]
        if relu is not None:
            moved.add(relu.name)
            made.append(helper.make_node("Relu", [phases], [f"{phases}_relu"], name=relu.name))
        shuffle = f"{node.name}_shuffle"
        source = made[-1].output[0]
        made.append(helper.make_node("DepthToSpace", [source], [shuffled], name=shuffle, blocksize=stride, mode="CRD"))
        result.graph.node.extend(made)
        count += 1
    return result, count


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
    return square and plain and exact and not shared and ceil((pads[0] - dims[2] + 1) / strides[0]) <= 0


def _pair(node: onnx.NodeProto, name: str, default: list[int]) -> list[int]:
    value = attribute(node, name, default)
    assert isinstance(value, list)
    return [int(entry) for entry in value]


def _replace(model: onnx.ModelProto, name: str, values: NDArray[np.float32]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), name))
