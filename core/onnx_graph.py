"""One view of ONNX graphs for all stages: producers and consumers of tensors, layers with weights, and their cost.

ONNX does not record three properties of a layer that quantization and engines need: the resolution it works at (as a
multiple of the LR image), the multiply-adds it costs per LR pixel, and its role (first, trunk, attention, last).
They are derived here, once, for float, typed and quantized graphs.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from srdeploy.core.contract import FORM, INPUT, OUTPUT, corrects_edges
from srdeploy.core.shapes import elements

WEIGHTED = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "Gemm", "MatMul")
"""Operators whose multiply-adds are counted."""
GLOBAL_POOLS = ("GlobalAveragePool", "ReduceMean")
QUANTIZE = "QuantizeLinear"
DEQUANTIZE = "DequantizeLinear"

Role = Literal["first", "trunk", "attention", "edge", "last"]

_PASSED_ON_THE_WAY_TO_WEIGHTS = (QUANTIZE, DEQUANTIZE, "Cast")
_TYPE_LABELS: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
}
_PROBE = 32
"""Height and width that shapes are inferred at."""
_SMALL = 256
"""Initializers of at most this many elements may be shapes or scales, whose values shape inference reads."""


@dataclass(frozen=True)
class Layer:
    """One convolution, deconvolution or matrix product with constant weights.

    Attributes:
        name: for display and for `--keep`: the weight's name without ".weight".
        node: the node's name in the graph, or that of its output where it has none.
        op: the ONNX operator.
        input: name of the tensor it reads, (N, C, H, W).
        output: name of the tensor it writes.
        weight: initializer, behind Q/DQ pairs and casts if there are any; (out, in, kh, kw) for Conv,
            (in, out, kh, kw) for ConvTranspose.
        bias: initializer of (out,), or None.
        axis: the axis of `weight` that counts output channels.
        channels_in: channels read.
        channels_out: channels written.
        resolution: output pixels per LR pixel and axis; 0 for a layer that works on pooled 1x1 maps or on strips.
        macs: multiply-adds per LR pixel; 0 for pooled maps and strips, whose cost does not grow with the image's area.
        role: "first" reads the image, "last" writes it, "attention" works on pooled maps, "edge" on strips along the
            image's edges, all others are "trunk".
    """

    name: str
    node: str
    op: str
    input: str
    output: str
    weight: str
    bias: str | None
    axis: int
    channels_in: int
    channels_out: int
    resolution: float
    macs: float
    role: Role


class Graph:
    """A view of an ONNX model; make a new one after editing the model.

    Attributes:
        model: the model, with its weights.
        nodes: by name.
        initializers: by name.
        producer: tensor name to the node that writes it.
        consumers: tensor name to the nodes that read it.
        resolution: tensor name to its pixels per LR pixel and axis; 0 for pooled maps and strips along the edges.
        layers: everything with weights, in graph order.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = {node.name: node for node in model.graph.node}
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producer = {name: node for node in model.graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.resolution = _resolutions(model, self.initializers)
        self.layers = _layers(self)

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return opset_of(self.model)

    @property
    def probe_shape(self) -> tuple[int, int, int, int]:
        """The input shape that `inferred` holds for: a static graph's own, else (1, C, 32, 32)."""
        dims = self.model.graph.input[0].type.tensor_type.shape.dim
        n, c, h, w = (entry.dim_value or free for entry, free in zip(dims, (1, 1, _PROBE, _PROBE), strict=True))
        return n, c, h, w

    @functools.cached_property
    def inferred(self) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """Shapes (for an input of `probe_shape`) and ONNX element types of all inferable tensors."""
        return _inferred(self.model, self.probe_shape)

    @functools.cached_property
    def layer_types(self) -> dict[str, str]:
        """Node name of each layer to the type it is to compute in ("fp32", "int8", ...), in graph order."""
        types = self.inferred[1]
        return {layer.node: _compute_type(self.producer[layer.output], self.producer, types) for layer in self.layers}

    def layers_by_type(self) -> dict[str, int]:
        """Count the layers by the type they are to compute in."""
        return dict(sorted(Counter(self.layer_types.values()).items()))

    @property
    def network_output(self) -> str:
        """The tensor that the network writes: the graph's output, or what the nodes of its form begin with."""
        name = OUTPUT
        while name in self.producer and self.producer[name].name.startswith(FORM):
            name = self.producer[name].input[0]
        return name

    def array(self, name: str) -> NDArray[np.float32]:
        """Return an initializer as a float32 array."""
        return numpy_helper.to_array(self.initializers[name]).astype(np.float32)

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """Return the one reader of a tensor, None when it has several or none or is the graph's output."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name != OUTPUT else None

    def is_plain_convolution(self, layer: Layer) -> bool:
        """Return True if a layer is an ungrouped convolution: each weight meets one input channel, in order."""
        return layer.op == "Conv" and self.initializers[layer.weight].dims[1] == layer.channels_in


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the standard operator set that a model imports; 0 if it imports none."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node without a name, or with one used before, a name of its own."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}"
        taken.add(node.name)


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """Return an attribute's value, or the default where the node does not carry it."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


def replace_nodes(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], constants: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """Return a copy of a model with other nodes and further constants, which replace those of the same name.

    Constants that no node reads are dropped.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:]
    result.graph.node.extend(nodes)
    read = {name for node in result.graph.node for name in node.input}
    latest = {tensor.name: tensor for tensor in (*model.graph.initializer, *constants)}
    result.graph.initializer.extend(tensor for name, tensor in latest.items() if name in read)
    return result


def add_outputs(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """Return a copy of a model that also outputs some of its inner tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    present = {entry.name for entry in (*copy.graph.output, *copy.graph.input)}
    for tensor in dict.fromkeys(tensors):
        if tensor not in present:
            copy.graph.output.append(onnx.ValueInfoProto(name=tensor))
    return copy


def needed_nodes(nodes: Sequence[onnx.NodeProto], tensors: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes that some tensors are computed by, in order."""
    needed, found = set(tensors), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            found.append(node)
            needed.update(node.input)
    return found[::-1]


def up_to(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """Return the part of a model that computes some of its tensors, which become its only outputs."""
    part = replace_nodes(model, needed_nodes(model.graph.node, tensors), [])
    del part.graph.output[:]
    part.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(tensors))
    return part


def type_label(onnx_type: int) -> str:
    """Return "fp32", "fp16", ... for an ONNX element type; others by their ONNX name in lower case."""
    return _TYPE_LABELS.get(onnx_type) or str(TensorProto.DataType.Name(onnx_type)).lower()


def combined_label(by_type: Mapping[str, int]) -> str:
    """Name what layers compute in: "fp16", or a mixture such as "int8+fp16", the most frequent first."""
    return "+".join(sorted(by_type, key=lambda label: (-by_type[label], label))) or "none"


def _resolutions(model: onnx.ModelProto, initializers: Iterable[str]) -> dict[str, float]:
    """Follow the image through the graph: tensor name -> pixels per LR pixel and axis (0: 1x1 maps and strips)."""
    known: dict[str, float] = {INPUT: 1.0}
    constants = set(initializers)
    for node in model.graph.node:
        inputs = [known[name] for name in node.input if name in known and name not in constants]
        if not inputs or node.op_type in ("Shape", "Size"):
            continue
        factor = max(inputs)
        if node.op_type in GLOBAL_POOLS or corrects_edges(node):
            factor = 0.0
        elif node.op_type == "ConvTranspose":
            factor *= _strides(node)
        elif node.op_type in ("Conv", "ConvInteger", "QLinearConv"):
            factor /= _strides(node)
        elif node.op_type == "DepthToSpace":
            factor *= int(attribute(node, "blocksize", 1))  # type: ignore[call-overload]
        elif node.op_type == "SpaceToDepth":
            factor /= int(attribute(node, "blocksize", 1))  # type: ignore[call-overload]
        for name in node.output:
            known[name] = factor
    return known


def _strides(node: onnx.NodeProto) -> int:
    strides = attribute(node, "strides", [1])
    assert isinstance(strides, list)
    return int(strides[0])


def _layers(graph: Graph) -> tuple[Layer, ...]:
    reaches_output = _without_weights_to_output(graph)
    layers = []
    for node in graph.model.graph.node:
        weight = _weight(graph, node)
        if weight is None:
            continue
        shape = tuple(graph.initializers[weight].dims)
        axis = 1 if node.op_type in ("ConvTranspose", "Gemm", "MatMul") else 0
        resolution = graph.resolution.get(node.output[0], 1.0)
        # A deconvolution multiplies each weight once per input pixel, a convolution once per output pixel.
        pixels = (graph.resolution.get(node.input[0], 1.0) if node.op_type == "ConvTranspose" else resolution) ** 2
        role: Role = "trunk"
        if corrects_edges(node):
            role = "edge"
        elif resolution == 0:
            role = "attention"
        elif node.output[0] in reaches_output:
            role = "last"
        elif _reads_image(graph, node.input[0]):
            role = "first"
        group = int(attribute(node, "group", 1))  # type: ignore[call-overload]
        bias = 8 if node.op_type == "QLinearConv" else 2
        layers.append(
            Layer(
                name=weight.removesuffix(".weight"),
                node=node.name or node.output[0],
                op=node.op_type,
                input=node.input[0],
                output=node.output[0],
                weight=weight,
                bias=node.input[bias] if len(node.input) > bias and node.input[bias] else None,
                axis=axis,
                channels_in=int(shape[1 - axis]) * (group if axis == 0 else 1),
                channels_out=int(shape[axis]) * (group if axis == 1 else 1),
                resolution=resolution,
                macs=float(np.prod(shape)) * pixels,
                role=role,
            )
        )
    return tuple(layers)


def _weight(graph: Graph, node: onnx.NodeProto) -> str | None:
    """Return the initializer that holds a node's weights, through Q/DQ pairs and casts; None if it has none."""
    if node.op_type not in WEIGHTED:
        return None
    position = 3 if node.op_type == "QLinearConv" else 1
    name = str(node.input[position]) if len(node.input) > position else ""
    while name in graph.producer and graph.producer[name].op_type in _PASSED_ON_THE_WAY_TO_WEIGHTS:
        name = graph.producer[name].input[0]
    return name if name in graph.initializers and len(graph.initializers[name].dims) > 1 else None


def _reads_image(graph: Graph, name: str) -> bool:
    """Return True if a tensor is the image itself, possibly after element-wise work (the subtracted mean, a pad)."""
    while name != INPUT:
        node = graph.producer.get(name)
        if node is None or not node.input or node.op_type in (*WEIGHTED, "Concat", *GLOBAL_POOLS):
            return False
        name = node.input[0]
    return True


def _without_weights_to_output(graph: Graph) -> set[str]:
    """Return the tensors from which the output is reached without another weighted layer."""
    found: set[str] = set()
    pending = [OUTPUT]
    while pending:
        name = pending.pop()
        if name in found or name in graph.initializers:
            continue
        found.add(name)
        node = graph.producer.get(name)
        if node is not None and node.op_type not in (*WEIGHTED, "Shape"):
            pending.extend(node.input)
    return found


def _compute_type(node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], types: Mapping[str, int]) -> str:
    """Return the type a layer is to compute in: quantized where input and weights both are, else its own."""
    if node.op_type in ("QLinearConv", "ConvInteger"):
        return "int8"
    pair = [producer.get(name) for name in node.input[:2]]
    if all(feeding is not None and feeding.op_type == DEQUANTIZE for feeding in pair):
        return type_label(types.get(pair[0].input[0], TensorProto.UNDEFINED))  # type: ignore[union-attr]  # checked
    return type_label(types.get(node.input[0], TensorProto.UNDEFINED))


def _inferred(model: onnx.ModelProto, shape: tuple[int, ...]) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Infer the shapes and element types of all tensors of a one-input graph for one input shape."""
    skeleton = _without_weights(model)
    for entry, size in zip(skeleton.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        entry.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
    shapes: dict[str, tuple[int, ...]] = {}
    types: dict[str, int] = {}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        tensor = value.type.tensor_type
        types[value.name] = tensor.elem_type
        if tensor.HasField("shape") and all(entry.HasField("dim_value") for entry in tensor.shape.dim):
            shapes[value.name] = tuple(entry.dim_value for entry in tensor.shape.dim)
    for weights in model.graph.initializer:
        shapes[weights.name] = tuple(weights.dims)
        types[weights.name] = weights.data_type
    return shapes, types


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a graph with its large weights turned into inputs: inference only needs their shapes and types."""
    skeleton = onnx.ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    skeleton.graph.name = model.graph.name
    skeleton.graph.node.extend(model.graph.node)
    initializers = {tensor.name for tensor in model.graph.initializer}
    skeleton.graph.input.extend(value for value in model.graph.input if value.name not in initializers)
    for value in model.graph.output:
        skeleton.graph.output.append(onnx.ValueInfoProto(name=value.name))
        skeleton.graph.output[-1].type.tensor_type.elem_type = value.type.tensor_type.elem_type
    for tensor in model.graph.initializer:
        if elements(tuple(tensor.dims)) <= _SMALL:
            skeleton.graph.initializer.append(tensor)
        else:
            skeleton.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tuple(tensor.dims))
            )
    return skeleton
