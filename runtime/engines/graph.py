"""What an ONNX graph says about itself: inputs, outputs, the heavy layers and their types, sizes per pixel.

Precision lives in the graph. So "what was asked for" is read here, and "what was built" is read back from the engine
and compared with it.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from srdeploy.core.contract import INPUT, OUTPUT, ModelContract, corrects_edges
from srdeploy.core.errors import InputError
from srdeploy.runtime.engines.feeds import TensorSpec

HEAVY = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "Gemm", "MatMul")
QUANTIZE = "QuantizeLinear"
DEQUANTIZE = "DequantizeLinear"
_TYPE_LABELS: dict[int, str] = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "fp16",
    TensorProto.BFLOAT16: "bf16",
    TensorProto.INT8: "int8",
    TensorProto.UINT8: "int8",
    TensorProto.FLOAT8E4M3FN: "fp8",
}
_PROBE = 32
"""Height and width at which sizes per pixel are computed; channel attention adds 1x1 maps that vanish beside it."""
_SMALL = 256
"""Initializers of at most so many elements may be shapes or scales that inference reads."""


@dataclass(frozen=True)
class HeavyLayer:
    """A layer with weights: node name, operation, the type it is asked to compute in, multiply-adds per LR pixel."""

    name: str
    op: str
    dtype: str
    macs_per_pixel: float


@dataclass(frozen=True)
class Graph:
    """An ONNX file, read once.

    Attributes:
        path: the file.
        sha256: of the file, or of the file and its external data together.
        model: the graph with its weights.
        contract: what the outside may rely on.
        opset: version of the default operator set.
        inputs: without initializers.
        outputs: of the graph.
    """

    path: Path
    sha256: str
    model: onnx.ModelProto
    contract: ModelContract
    opset: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @functools.cached_property
    def heavy_layers(self) -> tuple[HeavyLayer, ...]:
        """The layers with weights, in graph order."""
        return _heavy_layers(self)

    @functools.cached_property
    def inferred(self) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        """Shapes (for an input of 1 x C x 32 x 32) and element types of all inferable tensors."""
        return inferred_shapes(self.model, self.probe_shape)

    @property
    def probe_shape(self) -> tuple[int, int, int, int]:
        """The shape that sizes per pixel are computed at."""
        return 1, self.contract.channels, _PROBE, _PROBE

    @property
    def quantized(self) -> bool:
        """Whether the graph holds Q/DQ pairs."""
        return any(node.op_type == QUANTIZE for node in self.model.graph.node)

    def layers_by_type(self) -> dict[str, int]:
        """Count the heavy layers by the type they are asked to compute in."""
        return dict(sorted(Counter(layer.dtype for layer in self.heavy_layers).items()))

    def serialized(self, *, extra_outputs: tuple[str, ...] = ()) -> bytes:
        """Return the graph with its weights as one protobuf, with tensors added as outputs if asked.

        Raises:
            InputError: a tensor is not in the graph, or the graph is above protobuf's 2 GB.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        known = {name for node in model.graph.node for name in node.output}
        present = {output.name for output in model.graph.output}
        for name in extra_outputs:
            if name not in known:
                raise InputError(f"{self.path} has no tensor named {name!r}", expected="the output of one of its nodes")
            if name not in present:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
        try:
            return bytes(model.SerializeToString())
        except (ValueError, onnx.checker.ValidationError) as error:
            raise InputError(f"{self.path} is above 2 GB, the limit of one protobuf ({error})") from error


def read_graph(path: Path) -> Graph:
    """Read an ONNX file with its external data and its srdeploy metadata.

    Raises:
        InputError: not an ONNX file, external data missing, or no srdeploy metadata.
    """
    try:
        data = path.read_bytes()
        model = onnx.load_model_from_string(data)
    except OSError as error:
        raise InputError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise InputError(
            f"{path} is not an ONNX file ({error})", expected="a file written by srdeploy export"
        ) from error
    if not model.graph.node:
        raise InputError(f"{path} holds no ONNX graph", expected="a file written by srdeploy export")
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset > onnx.defs.onnx_opset_version():  # TensorRT would take it for the newest that it knows
        raise InputError(
            f"{path} is of ONNX opset {opset}",
            expected=f"at most {onnx.defs.onnx_opset_version()}, the newest that onnx {onnx.__version__} knows",
        )
    _check_names(model.graph, path)
    digest = hashlib.sha256(data)
    _load_external(model, path, digest)
    contract = ModelContract.from_metadata({entry.key: entry.value for entry in model.metadata_props}, name=str(path))
    initializers = {tensor.name for tensor in model.graph.initializer}
    return Graph(
        path=path,
        sha256=digest.hexdigest(),
        model=model,
        contract=contract,
        opset=opset,
        inputs=tuple(_spec(value) for value in model.graph.input if value.name not in initializers),
        outputs=tuple(_spec(value) for value in model.graph.output),
    )


def inferred_shapes(
    model: onnx.ModelProto, shape: tuple[int, ...]
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
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
        if _product(tuple(tensor.dims)) <= _SMALL:
            skeleton.graph.initializer.append(tensor)
        else:
            skeleton.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tuple(tensor.dims))
            )
    return skeleton


def type_label(onnx_type: int) -> str:
    """Return "fp32", "fp16", ... for an ONNX element type; others by their ONNX name in lower case."""
    return _TYPE_LABELS.get(onnx_type) or str(TensorProto.DataType.Name(onnx_type)).lower()


def combined_label(by_type: Mapping[str, int]) -> str:
    """Name what heavy layers compute in: "fp16", or a mixture such as "int8+fp16", the commonest first."""
    return "+".join(sorted(by_type, key=lambda label: (-by_type[label], label))) or "none"


def _heavy_layers(graph: Graph) -> tuple[HeavyLayer, ...]:
    nodes = graph.model.graph.node
    producer = {name: node for node in nodes for name in node.output}
    shapes, types = graph.inferred
    pixels = _PROBE * _PROBE
    layers = []
    for node in nodes:
        if node.op_type not in HEAVY:
            continue
        weights = shapes.get(_weights_name(node, producer), ())
        # Strips along the edges cost nothing per pixel, however small the probe makes the image.
        macs = 0.0 if corrects_edges(node) else _macs(node, shapes, weights)
        layers.append(
            HeavyLayer(node.name or node.output[0], node.op_type, _asked(node, producer, types), macs / pixels)
        )
    return tuple(layers)


def _weights_name(node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto]) -> str:
    """Follow the second input through Q/DQ and casts to the initializer."""
    name = node.input[3] if node.op_type == "QLinearConv" else node.input[1]
    while name in producer and producer[name].op_type in (DEQUANTIZE, QUANTIZE, "Cast"):
        name = producer[name].input[0]
    return str(name)


def _asked(node: onnx.NodeProto, producer: Mapping[str, onnx.NodeProto], types: Mapping[str, int]) -> str:
    """Return the type a layer is asked to compute in: quantized where input and weights both are, else its own."""
    if node.op_type in ("QLinearConv", "ConvInteger"):
        return "int8"
    pair = [producer.get(name) for name in node.input[:2]]
    if all(feeding is not None and feeding.op_type == DEQUANTIZE for feeding in pair):
        return type_label(types.get(pair[0].input[0], TensorProto.UNDEFINED))  # type: ignore[union-attr]  # checked
    return type_label(types.get(node.input[0], TensorProto.UNDEFINED))


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]], weights: tuple[int, ...]) -> float:
    """Return multiply-adds at the probe shape; 0 where a shape is unknown."""
    source, result = shapes.get(node.input[0]), shapes.get(node.output[0])
    if not weights or source is None or result is None:
        return 0.0
    if node.op_type == "ConvTranspose":  # every input element meets (Cout / groups) x kH x kW weights
        return float(_product(source) * _product(weights[1:]))
    if node.op_type in ("Gemm", "MatMul"):
        return float(_product(result) * source[-1])
    return float(_product(result) * _product(weights[1:]))


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _check_names(graph: onnx.GraphProto, path: Path) -> None:
    initializers = {tensor.name for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in initializers]
    outputs = [value.name for value in graph.output]
    if inputs != [INPUT] or OUTPUT not in outputs:
        raise InputError(f"{path} has inputs {inputs} and outputs {outputs}", expected=f"[{INPUT!r}] and [{OUTPUT!r}]")


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(entry.dim_value if entry.HasField("dim_value") else -1 for entry in tensor.shape.dim)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    return TensorSpec(value.name, dtype, shape)


def _load_external(model: onnx.ModelProto, path: Path, digest: Any) -> None:
    """Bring external weights into the model and their bytes into the digest."""
    external = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    if not external:
        return
    names = sorted({entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"})
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
        for name in names:
            with (path.parent / name).open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    except Exception as error:
        raise InputError(
            f"{path} refers to external weights {', '.join(names)} that cannot be read ({error})",
            next_step="copy the weights file beside the ONNX file",
        ) from error
