"""Per-channel scales moved between layers without changing the function.

ReLU and its kin are positively homogeneous, and sums, concatenations, pixel shuffles and gates keep channels apart.
So a channel may leave its producer multiplied by s and enter its readers divided by s. With s chosen such that all
channels of a tensor span a similar range, one scale per tensor wastes no codes on quiet channels: activations are
quantized per channel for free (Nagel et al. 2019, "Data-free quantization through weight equalization and bias
correction"; the migration strength between activations and weights is that of Xiao et al. 2023, "SmoothQuant").

All that meets in a residual stream shares its scales, although every reader would need others. Where an engine
multiplies while it quantizes, each reader gets scales of its own: see streams.py.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from srdeploy.calibration.observe import Observation
from srdeploy.calibration.rewrites.streams import reader_scales_of
from srdeploy.core.contract import INPUT, OUTPUT, corrects_edges
from srdeploy.core.onnx_graph import GLOBAL_POOLS, Graph, attribute

_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Identity", *GLOBAL_POOLS)
STRONGEST = 64.0
"""Scales stay within a factor of this, so that no weight leaves the comfortable range of FP16."""


class ChannelClasses:
    """Which channels of which tensors must share one scale; class 0 is pinned to scale 1."""

    def __init__(self, graph: Graph) -> None:
        self._parent = [0]
        shape = graph.model.graph.input[0].type.tensor_type.shape.dim
        self.of: dict[str, NDArray[np.int64]] = {INPUT: np.zeros(shape[1].dim_value, dtype=np.int64)}
        channels = {layer.output: layer.channels_out for layer in graph.layers}
        for node in graph.model.graph.node:
            self._visit(node, graph, channels)
        self._pin(OUTPUT)

    @property
    def count(self) -> int:
        """Number of classes ever made; class numbers are below it."""
        return len(self._parent)

    def find(self, index: int) -> int:
        """Return the representative of a class."""
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index

    def roots(self, tensor: str) -> NDArray[np.int64]:
        """Return the class of every channel of a tensor, (C,)."""
        return np.array([self.find(int(index)) for index in self.of[tensor]], dtype=np.int64)

    def _new(self, count: int) -> NDArray[np.int64]:
        start = len(self._parent)
        self._parent.extend(range(start, start + count))
        return np.arange(start, start + count)

    def _unite(self, first: int, second: int) -> None:
        one, two = sorted((self.find(first), self.find(second)))
        self._parent[two] = one  # the smaller index wins, so that the pinned class 0 stays its own root

    def _pin(self, tensor: str) -> None:
        for index in self.of.get(tensor, ()):
            self._unite(0, int(index))

    def _visit(self, node: onnx.NodeProto, graph: Graph, channels: Mapping[str, int]) -> None:
        data = [name for name in node.input if name in self.of]
        result = node.output[0]
        if node.op_type in ("Conv", "ConvTranspose") and result in channels:
            if int(attribute(node, "group", 1)) != 1:  # type: ignore[call-overload]
                self._pin(node.input[0])
            self.of[result] = self._new(channels[result])
            if int(attribute(node, "group", 1)) != 1:  # type: ignore[call-overload]
                self._pin(result)
        elif node.op_type in _HOMOGENEOUS and len(data) == 1:
            self.of[result] = self.of[data[0]]
        elif node.op_type == "Concat" and len(data) == len(node.input) and attribute(node, "axis") == 1:
            self.of[result] = np.concatenate([self.of[name] for name in node.input])
        elif node.op_type == "Add" and len(data) == 2 and self.of[data[0]].size == self.of[data[1]].size:
            for one, two in zip(self.of[data[0]], self.of[data[1]], strict=True):
                self._unite(int(one), int(two))
            self.of[result] = self.of[data[0]]
        elif node.op_type == "Mul" and (image := self._gated(node, graph)) is not None:
            for name in data:
                if name != image:
                    self._pin(name)
            self.of[result] = self.of[image]
        elif node.op_type == "Mul" and len(data) == 1 and self._scalar(node, graph):
            self.of[result] = self.of[data[0]]
        elif reader_scales_of(node) is not None and data:
            self.of[result] = self._new(self.of[data[0]].size)
        elif node.op_type == "DepthToSpace" and data:
            self._shuffle(node, data[0], result)
        elif node.op_type == "Slice" and corrects_edges(node):
            self.of[result] = self.of[data[0]]
        elif node.op_type == "Shape":
            pass  # sizes do not change with scales
        else:
            # Not known to keep channels apart: what goes in keeps its scale, what comes out is not followed.
            for name in data:
                self._pin(name)

    def _gated(self, node: onnx.NodeProto, graph: Graph) -> str | None:
        """Return the followed image that a product scales by pooled 1x1 maps; None for any other product."""
        pooled = [name for name in node.input if graph.resolution.get(name, 1.0) == 0]
        images = [name for name in node.input if name not in pooled]
        return images[0] if len(pooled) == 1 and len(images) == 1 and images[0] in self.of else None

    def _scalar(self, node: onnx.NodeProto, graph: Graph) -> bool:
        sizes = [int(np.prod(graph.initializers[name].dims)) for name in node.input if name in graph.initializers]
        return sizes == [1]

    def _shuffle(self, node: onnx.NodeProto, source: str, result: str) -> None:
        block = int(attribute(node, "blocksize")) ** 2  # type: ignore[call-overload]
        ids = self.of[source]
        crd = attribute(node, "mode", b"DCR") == b"CRD"
        groups = ids.reshape(-1, block) if crd else ids.reshape(block, -1).T
        for group in groups:
            for other in group[1:]:
                self._unite(int(group[0]), int(other))
        self.of[result] = groups[:, 0].copy()


def equalize_channels(
    graph: Graph, seen: Mapping[str, Observation], tensors: Sequence[str], strength: float
) -> tuple[onnx.ModelProto, dict[str, NDArray[np.float64]]]:
    """Return a graph of the same function whose channels span similar ranges.

    Args:
        graph: the float graph.
        seen: what flowed through `tensors` of that graph.
        tensors: the activations that will be quantized.
        strength: 0 leaves the graph as it is, 1 makes the ranges of all channels of a tensor equal at the expense of
            the weights; between them the burden is shared.

    Returns:
        The graph, and per tensor the factor of each channel, (C,): by it the observations of the new graph follow.
    """
    classes = ChannelClasses(graph)
    factors = _factors(graph, classes, seen, tensors, strength) * _signs(graph, classes, seen)
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    arrays = {layer.weight: graph.array(layer.weight).astype(np.float64) for layer in graph.layers}
    arrays |= {layer.bias: graph.array(layer.bias).astype(np.float64) for layer in graph.layers if layer.bias}
    for layer in graph.layers:
        weight = np.moveaxis(arrays[layer.weight], layer.axis, 0)  # (out, in, kh, kw)
        out = factors[classes.roots(layer.output)]
        weight *= out[:, None, None, None]
        if layer.input in classes.of and weight.shape[1] == layer.channels_in:  # grouped ones are pinned
            weight /= factors[classes.roots(layer.input)][None, :, None, None]
        if layer.bias:
            arrays[layer.bias] *= out
    for node in model.graph.node:
        name = reader_scales_of(node)
        if name is not None and node.output[0] in classes.of:
            factor = factors[classes.roots(node.output[0])] / factors[classes.roots(node.input[0])]
            arrays[name] = graph.array(name).astype(np.float64) * factor.reshape(1, -1, 1, 1)
    for tensor in model.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name].astype(np.float32), tensor.name))
    return model, {name: factors[classes.roots(name)] for name in classes.of}


def _signs(graph: Graph, classes: ChannelClasses, seen: Mapping[str, Observation]) -> NDArray[np.float64]:
    """Return -1 for the channels with scales of their own that reach further down than up, 1 for all others.

    Turned over, all channels of a tensor reach further up than down, and codes with a zero point need not cover twice
    the larger side. No other channels can be turned: ReLU and the network's sums are in their way.
    """
    signs = np.ones(classes.count)
    for node in graph.model.graph.node:
        name = node.output[0]
        if reader_scales_of(node) is not None and name in classes.of and name in seen:
            signs[classes.roots(name)] = np.where(-seen[name].low > seen[name].high, -1.0, 1.0)
    signs[0] = 1.0
    return signs


def _factors(
    graph: Graph, classes: ChannelClasses, seen: Mapping[str, Observation], tensors: Sequence[str], strength: float
) -> NDArray[np.float64]:
    count = classes.count
    activation = np.zeros(count)
    for name in tensors:
        if name in classes.of and name in seen:
            reach = np.maximum(np.abs(seen[name].low), np.abs(seen[name].high))
            np.maximum.at(activation, classes.roots(name), reach)
    weight = np.zeros(count)
    for layer in graph.layers:
        if layer.input in classes.of and layer.role not in ("attention", "edge"):
            column = np.abs(np.moveaxis(graph.array(layer.weight), layer.axis, 0))
            row = column.reshape(column.shape[0], -1).max(axis=1)
            relative = (column / np.maximum(row, 1e-12)[:, None, None, None]).max(axis=(0, 2, 3))
            np.maximum.at(weight, classes.roots(layer.input), relative)
    factors = np.ones(count)
    known = (activation > 0) & (weight > 0)
    typical = float(np.exp(np.log(activation[known]).mean())) if known.any() else 1.0
    factors[known] = (
        (typical / activation[known]) ** strength * np.maximum(weight[known], 1e-3) ** (1 - strength)
        if strength
        else 1.0
    )
    factors[0] = 1.0
    return np.clip(factors, 1 / STRONGEST, STRONGEST)
