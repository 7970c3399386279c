"""Reading a super-resolution graph: who writes and reads each tensor, and which layers carry weights.

Quantization needs to know three things of a layer that ONNX does not say: at which resolution it works (as a multiple
of the LR image), how many multiply-adds it costs per LR pixel, and what part it plays (first, trunk, attention, last).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.contract import INPUT, OUTPUT, ModelContract, corrects_edges
from srdeploy.core.errors import InputError

WEIGHTED = ("Conv", "ConvTranspose")
GLOBAL_POOLS = ("GlobalAveragePool", "ReduceMean")
MIN_OPSET = 19
"""Q/DQ with FP16 scales and FP8 types exist from opset 19 on."""

Role = Literal["first", "trunk", "attention", "edge", "last"]


@dataclass(frozen=True)
class Layer:
    """One convolution or deconvolution with constant weights.

    Attributes:
        name: for people and for `--keep`: the weight's name without ".weight".
        node: the node's name in the graph.
        op: "Conv" or "ConvTranspose".
        input: name of the tensor it reads, (N, C, H, W).
        output: name of the tensor it writes.
        weight: initializer; (out, in, kh, kw) for Conv, (in, out, kh, kw) for ConvTranspose.
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
    """A view of an ONNX model; make a new one after editing the model."""

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

    def array(self, name: str) -> NDArray[np.float32]:
        """Return an initializer as a float32 array."""
        return numpy_helper.to_array(self.initializers[name]).astype(np.float32)

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """Return the one reader of a tensor, None when it has several or none or is the graph's output."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name != OUTPUT else None


def read_model(path: Path) -> tuple[onnx.ModelProto, ModelContract, str]:
    """Read an exported FP32 graph, its contract and its SHA-256, with every node named.

    Raises:
        InputError: it is not ONNX, not written by srdeploy, quantized or typed already, or its opset is too old.
    """
    try:
        model = onnx.load(path)
    except Exception as error:  # protobuf raises its own types, which differ between its versions
        raise InputError(f"{path} is not a readable ONNX file", next_step="check that it was copied whole") from error
    if not model.graph.node:
        raise InputError(f"{path} is not a readable ONNX file", next_step="check that it was copied whole")
    contract = ModelContract.from_metadata({entry.key: entry.value for entry in model.metadata_props}, name=str(path))
    _refuse_unsuitable(model, path)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path} is not a valid graph ({reason})", next_step="export it again") from error
    name_nodes(model)
    return model, contract, sha256_of_file(path)


def name_nodes(model: onnx.ModelProto) -> None:
    """Give every node without a name, or with one used before, a name of its own."""
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}"
        taken.add(node.name)


def opset_of(model: onnx.ModelProto) -> int:
    """Return the version of the standard operator set."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """Return an attribute's value, or the default where the node does not carry it."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


def is_plain_convolution(graph: Graph, layer: Layer) -> bool:
    """Tell whether a layer is a convolution that is not grouped: each weight meets one input channel, in order."""
    return layer.op == "Conv" and graph.initializers[layer.weight].dims[1] == layer.channels_in


def with_nodes(
    model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto], constants: Iterable[onnx.TensorProto]
) -> onnx.ModelProto:
    """Return a copy of a model with other nodes and further constants, which replace those of the same name.

    Constants that no node reads are left out.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.initializer[:]
    result.graph.node.extend(nodes)
    read = {name for node in result.graph.node for name in node.input}
    latest = {tensor.name: tensor for tensor in (*model.graph.initializer, *constants)}
    result.graph.initializer.extend(tensor for name, tensor in latest.items() if name in read)
    return result


def _refuse_unsuitable(model: onnx.ModelProto, path: Path) -> None:
    quantized = next(
        (node for node in model.graph.node if "Quantize" in node.op_type or "QLinear" in node.op_type), None
    )
    if quantized is not None:
        raise InputError(
            f"{path} is quantized already (node {quantized.name} is a {quantized.op_type})",
            expected="an FP32 graph",
            next_step="quantize the file that `srdeploy export` wrote",
        )
    half = next((t for t in model.graph.initializer if t.data_type in _NOT_FP32), None)
    if half is not None:
        kind = onnx.TensorProto.DataType.Name(half.data_type)
        raise InputError(f"{path} is typed already ({half.name} is {kind})", expected="an FP32 graph")
    if opset_of(model) < MIN_OPSET:
        raise InputError(
            f"{path} has opset {opset_of(model)}",
            expected=f"opset {MIN_OPSET} or newer",
            next_step="export the checkpoint again with --opset 20",
        )


_NOT_FP32 = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)


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
        elif node.op_type == "Conv":
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
        if node.op_type not in WEIGHTED or node.input[1] not in graph.initializers:
            continue
        shape = tuple(graph.initializers[node.input[1]].dims)
        axis = 0 if node.op_type == "Conv" else 1
        resolution = graph.resolution.get(node.output[0], 1.0)
        # A deconvolution multiplies each weight once per input pixel, a convolution once per output pixel.
        pixels = (graph.resolution.get(node.input[0], 1.0) if axis else resolution) ** 2
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
        layers.append(
            Layer(
                name=node.input[1].removesuffix(".weight"),
                node=node.name,
                op=node.op_type,
                input=node.input[0],
                output=node.output[0],
                weight=node.input[1],
                bias=node.input[2] if len(node.input) > 2 and node.input[2] else None,
                axis=axis,
                channels_in=int(shape[1 - axis]) * (group if axis == 0 else 1),
                channels_out=int(shape[axis]) * (group if axis == 1 else 1),
                resolution=resolution,
                macs=float(np.prod(shape)) * pixels,
                role=role,
            )
        )
    return tuple(layers)


def _reads_image(graph: Graph, name: str) -> bool:
    """Tell whether a tensor is the image itself, possibly after element-wise work (the subtracted mean, a pad)."""
    while name != INPUT:
        node = graph.producer.get(name)
        if node is None or node.op_type in (*WEIGHTED, "Concat", *GLOBAL_POOLS):
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
