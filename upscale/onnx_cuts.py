"""An ONNX network as stages (see `srdeploy.upscale.network_cuts`)."""

from dataclasses import dataclass
from typing import Literal

import onnx
from onnx import TensorProto, helper

from srdeploy.core.contract import INPUT, OUTPUT, corrects_edges
from srdeploy.upscale.network_cuts import Cut, Operation, Stage, cut

_POINTWISE = (
    "Add", "Cast", "Clip", "Concat", "DequantizeLinear", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Mul", "PRelu", "QuantizeLinear", "Relu", "Sigmoid", "Softplus", "Sub", "Tanh",
)  # fmt: skip
"""Operations whose output pixel depends on the same pixel of their inputs only."""


def stages_from_onnx(model: onnx.ModelProto) -> list[Stage]:
    """Cut an ONNX network at its poolings.

    Raises:
        UsageError: the graph has an operation that is neither local nor a mean over the whole map.
    """
    graph = _Graph.of(model)
    operations = [_operation(node, graph.constants) for node in graph.model.graph.node]
    maps = {INPUT, *(name for entry in operations if entry.kind == "local" for name in entry.outputs)}
    return [_stage(graph, part, maps) for part in cut(operations)]


@dataclass(frozen=True, eq=False)
class _Graph:
    """A network with its inferred types and its constants by name."""

    model: onnx.ModelProto
    types: dict[str, onnx.ValueInfoProto]
    constants: dict[str, onnx.TensorProto]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> "_Graph":
        inferred = onnx.shape_inference.infer_shapes(model)
        graph = inferred.graph
        values = [*graph.value_info, *graph.input, *graph.output]
        constants = {tensor.name: tensor for tensor in graph.initializer}
        return cls(inferred, {value.name: value for value in values}, constants)

    def channels(self, name: str) -> int:
        """Return the channels of a map, 0 if unknown."""
        shape = self.types[name].type.tensor_type.shape.dim
        return int(shape[1].dim_value) if len(shape) == 4 else 0


def _operation(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> Operation:
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    kind: Literal["local", "pool", "other"] = "other"
    reach, growth = 0, 1
    if node.op_type in _POINTWISE or corrects_edges(node):
        # A correction of the network's outermost pixels also applies to a tile, where they are not the image's border:
        # within the reach of the convolution that it belongs to, so those pixels are not used anyway.
        kind = "local"
    elif node.op_type == "DepthToSpace":
        kind, growth = "local", attributes["blocksize"]
    elif node.op_type == "GlobalAveragePool" or (node.op_type == "ReduceMean" and _over_maps(node, constants)):
        kind = "pool"
    elif node.op_type == "Conv":
        kernel, dilations = attributes.get("kernel_shape", [0, 0]), attributes.get("dilations", [1, 1])
        sides = [(size - 1) // 2 * step for size, step in zip(kernel, dilations, strict=True)]
        odd = all(size % 2 for size in kernel)
        strides, pads = attributes.get("strides", [1, 1]), list(attributes.get("pads", [0] * 4))
        if odd and list(strides) == [1, 1] and pads == sides * 2:
            kind, reach = "local", max(sides)
    return Operation(
        node=node,
        label=f"{node.op_type} ({node.name or node.output[0]})",
        kind=kind,
        inputs=tuple(name for name in node.input if name),
        outputs=tuple(node.output),
        reach=reach,
        growth=growth,
    )


def _over_maps(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    """Return True if a ReduceMean is over height and width and keeps them as 1."""
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    axes = attributes.get("axes")
    if len(node.input) > 1 and node.input[1] in constants:
        axes = onnx.numpy_helper.to_array(constants[node.input[1]]).tolist()
    return axes is not None and sorted(axis % 4 for axis in axes) == [2, 3] and attributes.get("keepdims", 1) == 1


def _stage(graph: _Graph, part: Cut, maps: set[str]) -> Stage:
    nodes, pooled, outputs = [entry.node for entry in part.operations], part.pooled, list(part.maps_out)
    if not nodes:  # the mean of a map that is stored already
        assert pooled is not None
        again = pooled + "_again"
        nodes = [helper.make_node("Identity", [pooled], [again])]
        kind = graph.types[pooled].type.tensor_type.elem_type
        declared = [helper.make_tensor_value_info(again, kind, [1, f"{again}_channels", "h", "w"])]
        pooled = again
    else:
        target = OUTPUT if pooled is None else pooled
        made = {name for node in nodes for name in node.output}
        if target in made and target not in outputs:
            outputs.append(target)
        declared = [_declared(graph, name, maps) for name in outputs]
    taken = {name for node in nodes for name in node.input}
    stage = helper.make_graph(
        nodes,
        "stage",
        [_declared(graph, name, maps) for name in (*part.maps_in, *part.means_in)],
        declared,
        [tensor for name, tensor in graph.constants.items() if name in taken],
    )
    model = helper.make_model(stage, opset_imports=list(graph.model.opset_import), ir_version=graph.model.ir_version)
    channels = max((graph.channels(name) for name in part.maps_out), default=1)
    return Stage(
        model, part.maps_in, part.means_in, part.maps_out, pooled, part.mean, part.radius, channels=channels or 64
    )


def _declared(graph: _Graph, name: str, maps: set[str]) -> onnx.ValueInfoProto:
    """Declare a tensor of the original graph with free height and width."""
    known = graph.types[name].type.tensor_type
    size = ["h", "w"] if name in maps else [1, 1]
    if name == OUTPUT:
        size = ["h_out", "w_out"]
    return helper.make_tensor_value_info(
        name, known.elem_type or TensorProto.FLOAT, [1, graph.channels(name) or f"{name}_channels", *size]
    )
