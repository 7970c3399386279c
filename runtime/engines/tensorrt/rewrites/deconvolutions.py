"""Deconvolutions in the forms that cost TensorRT-RTX 1.7.1 the fewest passes over a network's largest maps."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from srdeploy.core.onnx_graph import attribute, replace_nodes

_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)
"""TensorRT-RTX has no deconvolution of other types."""


def deconvolve_joined_maps(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Return a graph whose 1x1 convolutions of concatenations are 1x1 deconvolutions, and the number of them.

    TensorRT-RTX makes a 1x1 convolution a matrix product, and for that copies the concatenated maps, which were
    written in place. It reads them in place as a convolution of any other size, and as a deconvolution, which for
    1x1 and stride 1 is the same sum.
    """
    producer = {name: node for node in model.graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if _joins(node, producer, weights):
            weight = numpy_helper.to_array(weights[node.input[1]])
            name = f"{node.output[0]}.transposed"
            constants.append(numpy_helper.from_array(np.ascontiguousarray(weight.swapaxes(0, 1)), name))
            nodes[-1] = helper.make_node(
                "ConvTranspose", [node.input[0], name, *node.input[2:]], list(node.output), name=node.name
            )
    return (replace_nodes(model, nodes, constants), len(constants)) if constants else (model, 0)


def add_biases_apart(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Return a graph whose deconvolutions have their biases in nodes of their own, and the number of them.

    With the bias inside, TensorRT-RTX fuses bias and activation into the first of two deconvolutions only. A kernel
    after the second reads and writes maps of the output's size again: SRDenseNet_All x4 in FP16 needs half as much
    activation memory again.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type == "ConvTranspose" and len(node.input) == 3 and node.input[2] in weights:
            output = node.output[0]
            bias = onnx.TensorProto()
            bias.CopyFrom(weights[node.input[2]])
            bias.name, bias.dims[:] = f"{output}.bias", [1, bias.dims[0], 1, 1]
            constants.append(bias)
            nodes[-1] = onnx.NodeProto()
            nodes[-1].CopyFrom(node)
            nodes[-1].input[:], nodes[-1].output[:] = node.input[:2], [f"{output}.before_bias"]
            nodes.append(helper.make_node("Add", [nodes[-1].output[0], bias.name], [output], name=bias.name))
    return (replace_nodes(model, nodes, constants), len(constants)) if constants else (model, 0)


def _joins(
    node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], weights: Mapping[str, onnx.TensorProto]
) -> bool:
    """Return True for an ungrouped 1x1 convolution, stride 1, of a concatenation, with plain weights."""
    source = producer.get(node.input[0]) if node.op_type == "Conv" else None
    if source is None or source.op_type != "Concat" or node.input[1] not in weights:
        return False
    weight = weights[node.input[1]]
    plain = attribute(node, "group", 1) == 1 and attribute(node, "pads", [0] * 4) == [0] * 4
    ones = list(weight.dims[2:]) == [1, 1] == attribute(node, "strides", [1, 1])
    return plain and ones and weight.data_type in _TYPES
