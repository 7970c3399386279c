"""Rewrites the linear end of a network, RCAN's upsampler and last convolution, as one convolution at LR resolution.

For RCAN x4 this saves nine tenths of the end's multiply-adds and all its feature maps of the output's size, and 8-bit
graphs round once there instead of three times. Edges are corrected exactly (see tail_map.py) by convolutions of strips
one or two pixels thin. Nothing here changes what the network computes.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from srdeploy.core.contract import EDGE
from srdeploy.core.onnx_graph import Graph, Layer, attribute, replace_nodes
from srdeploy.core.tail_map import SIDES, AffineMap, Link, Tail, compute_tail

NAME = "merged_tail"
"""Of the layer that takes the chain's place."""

_AXES = {"top": 2, "bottom": 2, "left": 3, "right": 3}
_FAR = ("bottom", "right")
_END = 2**62


def merge_tail(model: onnx.ModelProto, *, apart: Collection[str] = ()) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return a graph whose linear end is one layer, named "merged_tail", and the names of the layers that it replaces.

    The graph is returned as it is, with no names, where its end is a single layer, where merging would cost more
    multiply-adds, where a layer of the end is named in `apart`, and where the edges could not be corrected.
    """
    graph = Graph(model)
    layers, removed = _chain(graph)
    if len(layers) < 2 or {layer.name for layer in layers} & set(apart):
        return model, ()
    tail = compute_tail([_link(graph, layer) for layer in layers])
    if tail is None or tail.inner.weight.size >= sum(layer.macs for layer in layers):
        return model, ()
    writer = _Writer(layers[0].input, layers[-1].output, tail)
    writer.write()
    writer.nodes[0].metadata_props.extend(graph.producer[layers[-1].output].metadata_props)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.output[0] == layers[-1].output:
            nodes += writer.nodes
        elif node.output[0] not in removed:
            nodes.append(node)
    result = replace_nodes(model, nodes, writer.constants.values())
    return result, tuple(layer.name for layer in layers)


def _chain(graph: Graph) -> tuple[list[Layer], set[str]]:
    """Return the layers of the linear end, in order, and the tensors that all its nodes write."""
    by_output = {layer.output: layer for layer in graph.layers if _keeps_size(graph, layer)}
    layers: list[Layer] = []
    written: set[str] = set()
    layer = by_output.get(graph.network_output)
    while layer is not None:
        layers.insert(0, layer)
        written.add(layer.output)
        shuffle = graph.producer.get(layer.input)
        if shuffle is None or shuffle.op_type != "DepthToSpace" or graph.only_consumer(layer.input) is None:
            break
        shuffled = layer.input
        layer = by_output.get(shuffle.input[0])
        if layer is not None and graph.only_consumer(layer.output) is not None:
            written.add(shuffled)
        else:
            layer = None
    return layers, written


def _keeps_size(graph: Graph, layer: Layer) -> bool:
    node = graph.producer[layer.output]
    stored = node.input[1] == layer.weight  # not as codes behind a DequantizeLinear
    if not stored or not graph.is_plain_convolution(layer):
        return False
    height, width = graph.initializers[layer.weight].dims[2:]
    plain = attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    still = attribute(node, "strides", [1, 1]) == [1, 1] and attribute(node, "dilations", [1, 1]) == [1, 1]
    same = attribute(node, "pads", [0] * 4) == [height // 2, width // 2] * 2
    return plain and still and same and height % 2 == 1 and width % 2 == 1


def _link(graph: Graph, layer: Layer) -> Link:
    weight = graph.array(layer.weight).astype(np.float64)
    bias = graph.array(layer.bias).astype(np.float64) if layer.bias else np.zeros(layer.channels_out)
    shuffle = graph.only_consumer(layer.output)
    if shuffle is None or layer.output == graph.network_output:
        return Link(weight, bias)
    block = int(attribute(shuffle, "blocksize"))  # type: ignore[call-overload]
    return Link(weight, bias, block, attribute(shuffle, "mode", b"DCR") == b"CRD")


@dataclass
class _Writer:
    """Writes the nodes of a merged tail; methods return the name of the tensor that they made."""

    source: str
    output: str
    tail: Tail
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, onnx.TensorProto] = field(default_factory=dict)

    def write(self) -> None:
        """Write everything: the convolution, the corrections, the pixel shuffle."""
        reach = self.tail.inner.weight.shape[2] // 2
        total = self._convolution(self.source, NAME, self.tail.inner, [reach] * 4, edge=False)
        strips = {side: self._edge(self.source, side, f"{NAME}.{side}") for side in SIDES}
        added = {side: self._strip(strips[side], [side], f"{NAME}.{side}") for side in SIDES}
        for (vertical, horizontal), both in self.tail.corners.items():
            if not both.vanishes(1.0):
                name = f"{NAME}.{vertical}_{horizontal}"
                corner = self._edge(strips[vertical], horizontal, name)
                corner = self._strip(corner, [vertical, horizontal], name)
                corner = self._widened(corner, horizontal, name)
                added[vertical] = self._node("Add", [added[vertical], corner], f"{name}.added")
        for side in SIDES:
            whole = self._widened(added[side], side, f"{NAME}.{side}")
            total = self._node("Add", [total, whole], f"{NAME}.{side}.corrected", edge=False)
        self._node("DepthToSpace", [total], self.output, edge=False, blocksize=self.tail.factor, mode="CRD")

    def _strip(self, source: str, sides: list[str], name: str) -> str:
        """Compute a correction from a strip (one side) or a corner (two sides) of the source, one pixel thin."""
        added = self.tail.sides[sides[0]] if len(sides) == 1 else self.tail.corners[sides[0], sides[1]]
        weight, reach = added.weight, added.weight.shape[2] // 2
        pads = [reach] * 4  # top, left, bottom, right
        for side in sides:
            depth, axis, far = self._depth(side), _AXES[side], side in _FAR
            inwards = slice(reach - depth + 1, reach + 1) if far else slice(reach, reach + depth)
            weight = weight[:, :, inwards] if axis == 2 else weight[..., inwards]
            # The strip may be thicker than the image: beyond it the convolution reads zeros, like those it replaces.
            pads[axis - 2], pads[axis] = (depth - 1, 0) if far else (0, depth - 1)
        result = self._convolution(source, name, AffineMap(weight, added.bias), pads)
        for side in sides:
            if self._depth(side) > 1:
                ends = (-1, _END) if side in _FAR else (0, 1)
                result = self._slice(result, _AXES[side], *ends, f"{name}.{side}_outermost")
        return result

    def _depth(self, side: str) -> int:
        """Return how many rows or columns from the edge inwards a correction depends on."""
        weight = self.tail.sides[side].weight
        taps = np.abs(weight).max(axis=(0, 1, 3) if _AXES[side] == 2 else (0, 1, 2))
        reach = taps.size // 2
        inwards = taps[: reach + 1][::-1] if side in _FAR else taps[reach:]
        return int(np.flatnonzero(inwards).max(initial=0)) + 1

    def _edge(self, source: str, side: str, name: str) -> str:
        ends = (-self._depth(side), _END) if side in _FAR else (0, self._depth(side))
        return self._slice(source, _AXES[side], *ends, f"{name}.edge")

    def _widened(self, strip: str, side: str, name: str) -> str:
        """Put a strip at its side of the image and zeros everywhere else."""
        axis = _AXES[side]
        pads: list[str] = [self._constant("zero", np.zeros(1, dtype=np.int64))] * 8
        pads[axis if side in _FAR else 4 + axis] = self._others(axis)
        amounts = f"{NAME}.{side}.pads"
        if not any(node.output[0] == amounts for node in self.nodes):
            self._node("Concat", pads, amounts, axis=0)
        return self._node("Pad", [strip, amounts], f"{name}.widened")

    def _others(self, axis: int) -> str:
        """Return the image's height (axis 2) or width (axis 3) less one, (1,) int64."""
        name = f"{NAME}.size{axis}"
        if not any(node.output[0] == f"{name}.others" for node in self.nodes):
            shape = self._node("Shape", [self.source], f"{name}.shape", start=axis, end=axis + 1)
            self._node("Sub", [shape, self._constant("one", np.ones(1, dtype=np.int64))], f"{name}.others")
        return f"{name}.others"

    def _convolution(self, source: str, name: str, wanted: AffineMap, pads: list[int], *, edge: bool = True) -> str:
        weight = np.ascontiguousarray(wanted.weight.astype(np.float32))
        inputs = [source, self._constant("weight", weight, name), self._constant("bias", wanted.bias, name)]
        sizes: dict[str, Any] = {"kernel_shape": list(weight.shape[2:]), "strides": [1, 1], "pads": pads}
        return self._node("Conv", inputs, f"{name}/Conv", edge=edge, **sizes)

    def _slice(self, source: str, axis: int, start: int, end: int, output: str) -> str:
        bounds = [self._constant(f"{value}", np.array([value], dtype=np.int64)) for value in (start, end, axis)]
        return self._node("Slice", [source, *bounds], output)

    def _constant(self, name: str, values: NDArray[np.generic], layer: str = f"{NAME}.constant") -> str:
        if values.dtype == np.float64:
            values = values.astype(np.float32)
        full = f"{layer}.{name}"
        self.constants[full] = numpy_helper.from_array(values, full)
        return full

    def _node(self, op: str, inputs: list[str], output: str, *, edge: bool = True, **attributes: Any) -> str:
        node = helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes)
        if edge:
            entry = node.metadata_props.add()
            entry.key, entry.value = EDGE, NAME
        self.nodes.append(node)
        return output
