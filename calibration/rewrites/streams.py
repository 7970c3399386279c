"""Scales per channel for each reader of a residual stream.

Many convolutions read a residual stream, and each would need its own scales per channel to lose as little as possible
in 8 bits (see equalize.py); equalization can only choose one set for the stream. On engines that multiply while they
quantize, each reader multiplies by its own scales first, at no cost, and its weights are divided by them.
"""

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper, numpy_helper

from srdeploy.core.onnx_graph import Graph, replace_nodes

_OWN = "_own_scales"
_NEXT_TO_NOTHING = 1e-12


def add_reader_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph in which the convolutions that read a residual stream do so through a scale per channel.

    All scales are 1 until `equalize_channels` sets them. A stream is a tensor that an Add writes or reads. Tensors that
    a Concat also reads are unchanged: they are quantized once, with one scale for the whole concatenation.
    """
    graph = Graph(model)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    renamed: dict[tuple[str, str], str] = {}
    for node in model.graph.node:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get((node.name, name), name) for name in node.input]
        nodes.append(copy)
        for name in node.output:
            readers = graph.consumers.get(name, [])
            kinds = {reader.op_type for reader in readers}
            layers = [layer for layer in graph.layers if layer.input == name and layer.role in ("trunk", "last")]
            stream = node.op_type == "Add" or "Add" in kinds
            if not layers or not stream or "Concat" in kinds or not all(graph.is_plain_convolution(x) for x in layers):
                continue
            scaled, scales = f"{name}_scaled", f"{name}{_OWN}"
            ones = np.ones((1, layers[0].channels_in, 1, 1), dtype=np.float32)
            constants.append(numpy_helper.from_array(ones, scales))
            nodes.append(helper.make_node("Mul", [name, scales], [scaled], name=f"{name}/scaled"))
            renamed |= {(layer.node, name): scaled for layer in layers}
    return replace_nodes(model, nodes, constants)


def fold_reader_scales(model: onnx.ModelProto, floats: Collection[str]) -> onnx.ModelProto:
    """Return a graph with readers' scales in the form that engines compute well.

    Layers in `floats`, by name, read streams directly: their weights take the scales up. A product with negative
    factors in front of a pair is computed wrongly by OpenVINO 2026.4, in silence, where it becomes part of the
    FakeQuantize. With an Add of 1e-12 after it, another kernel takes the product: as fast, and correct.
    """
    graph = Graph(model)
    constants: list[onnx.TensorProto] = []
    sources: dict[tuple[str, str], str] = {}
    for layer in graph.layers:
        node = graph.producer.get(layer.input)
        name = reader_scales_of(node) if node is not None else None
        if node is None or name is None or layer.name not in floats:
            continue
        folded = graph.array(layer.weight) * graph.array(name).reshape(1, -1, 1, 1)
        constants.append(numpy_helper.from_array(folded, layer.weight))
        sources[layer.node, layer.input] = node.input[0]
    copies = []
    for node in model.graph.node:
        copies.append(onnx.NodeProto())
        copies[-1].CopyFrom(node)
        copies[-1].input[:] = [sources.get((node.name, name), name) for name in node.input]
    read = {name for node in copies for name in node.input}
    nodes = []
    for node in copies:
        name = reader_scales_of(node)
        if name is not None and node.output[0] not in read:
            continue
        nodes.append(node)
        if name is not None and graph.array(name).min() < 0:
            output, nothing = node.output[0], f"{node.output[0]}_nothing"
            node.output[0] = f"{output}_product"
            nodes.append(helper.make_node("Add", [node.output[0], nothing], [output], name=f"{node.name}_sum"))
            constants.append(numpy_helper.from_array(np.full_like(graph.array(name), _NEXT_TO_NOTHING), nothing))
    return replace_nodes(model, nodes, constants)


def reader_scales_of(node: onnx.NodeProto) -> str | None:
    """Return the constant of a product that `add_reader_scales` wrote, None for any other node."""
    return node.input[1] if node.op_type == "Mul" and node.input[1].endswith(_OWN) else None
