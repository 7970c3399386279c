"""Rewrites a last convolution of few output channels such that it computes several neighboring pixels at once.

Engines compute 16 output channels together, whether a layer has them or not: SRDenseNet's last layer, 3x3 from 256
channels to one at the output's resolution, does 16 times its multiply-adds. As a convolution with a stride that writes
a tile of t x t pixels as channels, with a kernel of (k + t - 1) x (k + t - 1) and a pixel shuffle behind it, it fills
them: 36 x 16 instead of 9 x 16 x 16 multiply-adds per channel and 16 pixels.

Nothing changes but the order of sums, and nothing at all where they are integers: graphs with Q/DQ pairs are rewritten
as well, code by code.
"""

from collections.abc import Iterator
from math import ceil

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from srdeploy.core.onnx_graph import DEQUANTIZE, Graph, Layer, attribute, replace_nodes

LANES = 16
"""Output channels that engines on the CPU compute together."""
_TYPES = (np.dtype(np.float32), np.dtype(np.int8))


def widen_last(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Return a graph whose last convolution computes tiles of pixels, and the side of the tiles.

    The graph is returned as it is, with 1, where the last layer is no plain convolution (or the sum of two, as where an
    8-bit layer is split), where it does not work at a multiple of the LR image's resolution at every size, and where
    its output channels fill the lanes better as they are.
    """
    graph = Graph(model)
    layers = list(_last(graph, graph.network_output))
    if not layers or not all(_is_suitable(graph, layer) for layer in layers):
        return model, 1
    side = min(_sides(graph, layers[0]), key=lambda side: _lanes(graph, layers[0], side))
    if side == 1 or any(_size(graph, layer) != _size(graph, layers[0]) for layer in layers):
        return model, 1
    constants: dict[str, onnx.TensorProto] = {}
    for layer in layers:
        constants |= _widened_weights(graph, layer, side)
    final = f"{graph.network_output}_tiles"
    nodes: list[onnx.NodeProto] = []
    rewritten = {layer.output: layer for layer in layers}
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.output[0] in rewritten:
            _stride(copy, _size(graph, rewritten[node.output[0]]), side)
        if node.output[0] == graph.network_output:
            copy.output[0] = final
            shuffle = helper.make_node(
                "DepthToSpace", [final], [node.output[0]], name=f"{final}_shuffle", blocksize=side, mode="CRD"
            )
            nodes += [copy, shuffle]
        else:
            nodes.append(copy)
    return replace_nodes(model, nodes, constants.values()), side


def _last(graph: Graph, tensor: str) -> Iterator[Layer]:
    """Yield the layer that writes a tensor, or the two whose sum it is; none where anything else does."""
    by_output = {layer.output: layer for layer in graph.layers}
    node = graph.producer.get(tensor)
    parts = node.input if node is not None and node.op_type == "Add" else []
    if tensor in by_output:
        yield by_output[tensor]
    elif all(name in by_output and graph.only_consumer(name) is node for name in parts):
        yield from (by_output[name] for name in parts)


def _is_suitable(graph: Graph, layer: Layer) -> bool:
    node = graph.producer[layer.output]
    if not graph.is_plain_convolution(layer) or layer.resolution <= 1:
        return False
    size = _size(graph, layer)
    plain = attribute(node, "auto_pad", b"NOTSET") == b"NOTSET" and attribute(node, "dilations", [1, 1]) == [1, 1]
    same = attribute(node, "strides", [1, 1]) == [1, 1] and attribute(node, "pads", [0] * 4) == [size // 2] * 4
    square = list(graph.initializers[layer.weight].dims[2:]) == [size, size]
    height, width = graph.probe_shape[2:]
    whole = graph.inferred[0].get(layer.input, ())[2:] == (height * layer.resolution, width * layer.resolution)
    return plain and same and square and size % 2 == 1 and whole and _has_plain_weights(graph, layer)


def _has_plain_weights(graph: Graph, layer: Layer) -> bool:
    """Return True if weights and bias are stored: as floats, or as codes without an offset behind one node."""
    node = graph.producer[layer.output]
    if numpy_helper.to_array(graph.initializers[layer.weight]).dtype not in _TYPES:
        return False
    if layer.bias is not None and layer.bias not in graph.initializers:
        return False
    if node.input[1] == layer.weight:
        return True
    dequantize = graph.producer[node.input[1]]
    stored = all(name in graph.initializers for name in dequantize.input)
    behind = dequantize.op_type == DEQUANTIZE and dequantize.input[0] == layer.weight
    per_channel = attribute(dequantize, "axis", 1) == 0 or graph.array(dequantize.input[1]).ndim == 0
    return (
        behind and stored and per_channel and not (len(dequantize.input) > 2 and graph.array(dequantize.input[2]).any())
    )


def _size(graph: Graph, layer: Layer) -> int:
    return int(graph.initializers[layer.weight].dims[2])


def _sides(graph: Graph, layer: Layer) -> list[int]:
    """Return the tiles that divide every output: their sides divide the resolution."""
    factor = round(layer.resolution)
    return [side for side in range(1, factor + 1) if factor % side == 0]


def _lanes(graph: Graph, layer: Layer, side: int) -> float:
    """Return the multiply-adds per input channel and output pixel, with those of empty lanes."""
    filled = LANES * ceil(layer.channels_out * side * side / LANES)
    return filled * (_size(graph, layer) + side - 1) ** 2 / side**2


def _widened_weights(graph: Graph, layer: Layer, side: int) -> dict[str, onnx.TensorProto]:
    """Return the constants of a layer for tiles, by name."""
    weights = numpy_helper.to_array(graph.initializers[layer.weight])
    found = {layer.weight: _tiled(weights, side)}
    if layer.bias is not None:
        found[layer.bias] = _repeated(graph, layer.bias, side)
    node = graph.producer[layer.output]
    if node.input[1] != layer.weight:
        for name in graph.producer[node.input[1]].input[1:]:
            if graph.initializers[name].dims:
                found[name] = _repeated(graph, name, side)
    return {name: numpy_helper.from_array(np.ascontiguousarray(values), name) for name, values in found.items()}


def _repeated(graph: Graph, name: str, side: int) -> NDArray[np.generic]:
    return np.repeat(numpy_helper.to_array(graph.initializers[name]), side * side, axis=0)


def _tiled(weights: NDArray[np.generic], side: int) -> NDArray[np.generic]:
    """(out, in, k, k) to (out * side^2, in, k + side - 1, k + side - 1): shifted copies, in the order of CRD."""
    out, channels, size, _ = weights.shape
    wide = size + side - 1
    tiled = np.zeros((out, side, side, channels, wide, wide), dtype=weights.dtype)
    for row in range(side):
        for column in range(side):
            tiled[:, row, column, :, row : row + size, column : column + size] = weights
    return tiled.reshape(out * side * side, channels, wide, wide)


def _stride(node: onnx.NodeProto, size: int, side: int) -> None:
    kept = [entry for entry in node.attribute if entry.name not in ("strides", "kernel_shape")]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.append(helper.make_attribute("strides", [side, side]))
    node.attribute.append(helper.make_attribute("kernel_shape", [size + side - 1] * 2))
