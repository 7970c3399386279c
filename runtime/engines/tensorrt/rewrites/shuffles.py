"""Convolutions of pixel-shuffled maps, computed before the shuffle.

A pixel shuffle by r moves r^2 groups of maps to the r^2 phases of a grid r times as fine. The value of a k x k
convolution on the fine grid at phase (a, b) reads, at offset (y, x), phase ((a + y) mod r, (b + x) mod r) of the coarse
pixel that lies ((a + y) div r, (b + x) div r) away. So one convolution on the coarse grid with r^2 times as many inputs
and outputs, and zeros among its weights, computes the same values before the shuffle, borders included.

For the last layer, from many maps to 1 or 3, that is worth it: TensorRT-RTX 1.7.1 builds a shuffle as a kernel that
reads and writes all maps. Moved behind the last convolution it moves 1 or 3 maps, in the kernel that writes the result.
"""

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from srdeploy.core.onnx_graph import attribute, replace_nodes

MAX_OUTPUTS = 64
"""Of the wide convolution: the kernels of Tensor Cores compute at least that many outputs, wanted or not."""


def convolve_before_shuffles(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Return a graph that convolves before it shuffles where few maps are left, and the number of such convolutions."""
    producer = {name: node for node in model.graph.node for name in node.output}
    reads = [name for node in model.graph.node for name in node.input]
    kept = {entry.name for entry in model.graph.output}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    moved = {
        node.output[0]: producer[node.input[0]]
        for node in model.graph.node
        if _is_small(node, producer, weights) and reads.count(node.input[0]) == 1 and node.input[0] not in kept
    }
    dropped = {shuffle.output[0] for shuffle in moved.values()}
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for node in model.graph.node:
        shuffle = moved.get(node.output[0]) if node.output else None
        if shuffle is None:
            if not dropped & set(node.output):
                nodes.append(node)
            continue
        factor = int(attribute(shuffle, "blocksize"))  # type: ignore[call-overload]
        columns = attribute(shuffle, "mode", b"DCR") == b"CRD"
        wide = onnx.NodeProto()
        wide.CopyFrom(node)
        name = node.output[0]
        weight = before_shuffle(numpy_helper.to_array(weights[node.input[1]]), factor, columns=columns)
        constants.append(numpy_helper.from_array(weight, f"{name}.wide_weight"))
        wide.input[:], wide.output[:] = [shuffle.input[0], constants[-1].name], [f"{name}.before_shuffle"]
        if len(node.input) > 2:
            bias = numpy_helper.to_array(weights[node.input[2]])
            constants.append(numpy_helper.from_array(np.repeat(bias, factor**2), f"{name}.wide_bias"))
            wide.input.append(constants[-1].name)
        for entry in list(wide.attribute):
            if entry.name in ("kernel_shape", "pads"):
                wide.attribute.remove(entry)
        reach = weight.shape[2] // 2
        wide.attribute.append(helper.make_attribute("pads", [reach] * 4))
        nodes.append(wide)
        nodes.append(
            helper.make_node("DepthToSpace", list(wide.output), [name], name=shuffle.name, blocksize=factor, mode="CRD")
        )
    return (replace_nodes(model, nodes, constants), len(moved)) if moved else (model, 0)


def before_shuffle(weight: NDArray[np.generic], factor: int, *, columns: bool) -> NDArray[np.generic]:
    """Return the weights of the convolution before a shuffle.

    Args:
        weight: (O, I, k, k), k odd, of a convolution after the shuffle that keeps the size.
        factor: r of the shuffle.
        columns: the order of the maps before the shuffle: (I, r, r) if True ("CRD", PyTorch's), else (r, r, I).

    Returns:
        (O r^2, I r^2, K, K), outputs in the order of columns=True.
    """
    outputs, inputs, size, _ = weight.shape
    half = size // 2
    reach = -(-half // factor)
    wide = np.zeros((outputs, factor, factor, inputs, factor, factor, 2 * reach + 1, 2 * reach + 1), weight.dtype)
    for a, b, y, x in np.ndindex(factor, factor, size, size):
        down, row = divmod(a + y - half, factor)
        right, column = divmod(b + x - half, factor)
        wide[:, a, b, :, row, column, reach + down, reach + right] = weight[..., y, x]
    if not columns:
        wide = wide.transpose(0, 1, 2, 4, 5, 3, 6, 7)
    return wide.reshape(outputs * factor**2, inputs * factor**2, 2 * reach + 1, 2 * reach + 1)


def _is_small(
    node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], weights: Mapping[str, onnx.TensorProto]
) -> bool:
    """Return True for a convolution of shuffled maps that keeps their size and leaves few of them."""
    shuffle = producer.get(node.input[0]) if node.op_type == "Conv" else None
    if shuffle is None or shuffle.op_type != "DepthToSpace" or any(name not in weights for name in node.input[1:]):
        return False
    outputs, inputs, height, width = weights[node.input[1]].dims
    factor = int(attribute(shuffle, "blocksize"))  # type: ignore[call-overload]
    ones = all(attribute(node, name, [1, 1]) == [1, 1] for name in ("strides", "dilations"))
    same = attribute(node, "pads", [0] * 4) == [height // 2] * 4 and height == width and height % 2 == 1
    plain = attribute(node, "group", 1) == 1 and attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    return ones and same and plain and outputs * factor**2 <= min(inputs, MAX_OUTPUTS)
