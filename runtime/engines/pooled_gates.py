"""1x1 convolutions of globally pooled maps as matrix products, which saves TensorRT-RTX a kernel each.

In channel attention a mean over the image, computed in FP32, is cast to FP16 for a 1x1 convolution of a 1x1 map. As a
convolution, TensorRT-RTX 1.7.1 casts in a kernel of its own; as a matrix product it casts inside the mean's kernel.
RCAN x4 in FP16 has 1020 kernels instead of 1220: per block two convolutions, the mean, the product, and one kernel for
the rest of the gate, which is also the minimum that was reached by any form of the gate. The values are the same.
"""

import numpy as np
import onnx
from onnx import helper, numpy_helper

_POOLS = ("ReduceMean", "GlobalAveragePool")


def multiply_pooled_maps(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """Return a graph whose 1x1 convolutions of pooled maps are matrix products, and the number of changed nodes.

    The products keep the names of the convolutions.
    """
    rewritten = onnx.ModelProto()
    rewritten.CopyFrom(model)
    graph = rewritten.graph
    producer = {name: node for node in graph.node for name in node.output}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    changed = 0
    for node in graph.node:
        if not _is_product(node, producer, weights):
            nodes.append(node)
            continue
        weight = numpy_helper.to_array(weights[node.input[1]])
        outputs, inputs = weight.shape[:2]
        names = {part: f"{node.output[0]}.{part}" for part in ("flat", "weight", "product", "shape_in", "shape_out")}
        graph.initializer.extend(
            [
                numpy_helper.from_array(weight.reshape(outputs, inputs), names["weight"]),
                numpy_helper.from_array(np.array([0, inputs], np.int64), names["shape_in"]),
                numpy_helper.from_array(np.array([0, outputs, 1, 1], np.int64), names["shape_out"]),
            ]
        )
        nodes += [
            helper.make_node("Reshape", [node.input[0], names["shape_in"]], [names["flat"]]),  # (N, C)
            helper.make_node(
                "Gemm", [names["flat"], names["weight"], *node.input[2:]], [names["product"]], name=node.name, transB=1
            ),
            helper.make_node("Reshape", [names["product"], names["shape_out"]], list(node.output)),  # (N, C', 1, 1)
        ]
        changed += 1
    del graph.node[:]
    graph.node.extend(nodes)
    return rewritten, changed


def _is_product(
    node: onnx.NodeProto, producer: dict[str, onnx.NodeProto], weights: dict[str, onnx.TensorProto]
) -> bool:
    """Return True for a 1x1 convolution with plain weights whose input is pooled over the whole image."""
    if node.op_type != "Conv" or node.input[1] not in weights or weights[node.input[1]].dims[2:] != [1, 1]:
        return False
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if attributes.get("group", 1) != 1 or any(attributes.get("pads", [])):
        return False
    source = producer.get(node.input[0])
    while source is not None and source.op_type == "Cast":
        source = producer.get(source.input[0])
    if source is None or source.op_type not in _POOLS:
        return False
    return source.op_type == "GlobalAveragePool" or _means_over_images(source, weights)


def _means_over_images(node: onnx.NodeProto, weights: dict[str, onnx.TensorProto]) -> bool:
    """Return True for a mean over height and width that keeps its axes."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if len(node.input) > 1 and node.input[1] in weights:
        axes = numpy_helper.to_array(weights[node.input[1]]).tolist()
    else:
        axes = list(attributes.get("axes", []))
    return attributes.get("keepdims", 1) == 1 and sorted(axis % 4 for axis in axes) == [2, 3]
