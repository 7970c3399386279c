"""What a simulated engine holds: the ONNX graph, profiles and target; its layers, memory and results follow from these.

The bytes of a full TensorRT engine are a header and the graph. An engine of TensorRT-RTX is the one that the real
ahead-of-time compiler built, with the same appended.
"""

import functools
import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

_MAGIC = b"simulated TensorRT engine\n"
_HEAVY = {"Conv": "Convolution", "ConvTranspose": "Deconvolution", "Gemm": "MatrixMultiply", "MatMul": "MatrixMultiply"}
_FUSED = ("Relu", "LeakyRelu", "PRelu", "Sigmoid", "Clip", "HardSigmoid")
_INVISIBLE = ("QuantizeLinear", "DequantizeLinear", "Identity", "Constant")
TYPE_NAMES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT64",
    TensorProto.BOOL: "BOOL",
}
_BYTES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "UINT8": 1, "FP8": 1, "INT32": 4, "INT64": 8, "BOOL": 1}
_MACS_PER_MS = {"FLOAT": 2e10, "HALF": 8e10, "BF16": 8e10, "INT8": 16e10, "FP8": 16e10}
"""Multiply-adds per millisecond of the simulated GPU's clock."""
_BYTES_PER_MS = 5e8
_ONNX_NAMES = {name: TensorProto.DataType.Name(kind) for kind, name in TYPE_NAMES.items()}


@dataclass(frozen=True)
class Header:
    """Everything about an engine but its graph."""

    version: str
    name: str
    profiles: tuple[dict[str, tuple[tuple[int, ...], ...]], ...]
    capability: tuple[int, int] | None
    gpu: str | None
    compatibility: str = "NONE"
    verbosity: str = "LAYER_NAMES_ONLY"
    resizes_activations: bool = False
    flags: tuple[str, ...] = ()


@dataclass
class Layer:
    """One kernel: the ONNX nodes in it and the types it reads and writes, by TensorRT's names."""

    name: str
    kind: str
    parameter: str
    nodes: list[str]
    inputs: list[str]
    outputs: list[str]
    reads: str
    writes: str
    weights: str | None
    weight_count: int = 0
    macs_per_pixel: float = 0.0
    tactic: str = ""


@dataclass(eq=False)
class EngineFile:
    """A deserialized engine."""

    header: Header
    onnx_bytes: bytes
    lock: threading.Lock = field(default_factory=threading.Lock)
    _inferred: dict[tuple[int, ...], Any] = field(default_factory=dict)
    _sessions: dict[frozenset[str], Any] = field(default_factory=dict)

    def appended_to(self, real: bytes) -> bytes:
        """Return the bytes of the engine; `real` is what stands before it."""
        header = json.dumps(asdict(self.header)).encode()
        sizes = len(header).to_bytes(8, "little") + len(self.onnx_bytes).to_bytes(8, "little")
        return real + header + self.onnx_bytes + sizes + _MAGIC

    @functools.cached_property
    def model(self) -> onnx.ModelProto:
        """The graph."""
        return onnx.load_model_from_string(self.onnx_bytes)

    @functools.cached_property
    def weights_bytes(self) -> int:
        """Size of all initializers."""
        return sum(
            int(np.prod(tensor.dims)) * _BYTES.get(TYPE_NAMES.get(tensor.data_type, "FLOAT"), 4)
            for tensor in self.model.graph.initializer
        )

    @functools.cached_property
    def tensors(self) -> dict[str, tuple[bool, str, tuple[int, ...]]]:
        """Inputs and outputs: name -> (is input, type, shape with -1)."""
        graph = self.model.graph
        constants = {tensor.name for tensor in graph.initializer}
        found = {}
        for values, is_input in ((graph.input, True), (graph.output, False)):
            for value in values:
                if value.name not in constants:
                    found[value.name] = (is_input, TYPE_NAMES[value.type.tensor_type.elem_type], shape_of(value))
        return found

    @property
    def input_name(self) -> str:
        """The only input."""
        return next(name for name, (is_input, *_) in self.tensors.items() if is_input)

    def inferred(self, shape: tuple[int, ...]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Return shapes and types of all tensors for an input shape."""
        if shape not in self._inferred:
            self._inferred[shape] = self._infer(shape)
        return self._inferred[shape]

    def _infer(self, shape: tuple[int, ...]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for entry, size in zip(model.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
            entry.dim_value = size
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        done = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        shapes, kinds = {}, {}
        for value in (*done.value_info, *done.input, *done.output):
            kinds[value.name] = TYPE_NAMES.get(value.type.tensor_type.elem_type, "FLOAT")
            shapes[value.name] = tuple(entry.dim_value for entry in value.type.tensor_type.shape.dim)
        for tensor in done.initializer:
            kinds[tensor.name], shapes[tensor.name] = TYPE_NAMES.get(tensor.data_type, "FLOAT"), tuple(tensor.dims)
        return shapes, kinds

    def activation_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the memory that kernels share for an input shape: twice the largest inner tensor."""
        shapes, kinds = self.inferred(shape)
        constants = {tensor.name for tensor in self.model.graph.initializer}
        sizes = [
            int(np.prod(size)) * _BYTES.get(kinds[name], 4)
            for name, size in shapes.items()
            if name not in self.tensors and name not in constants
        ]
        return -(-2 * max(sizes, default=0) // 512) * 512

    def output_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of an output for an input shape."""
        return self.inferred(shape)[0][name]

    @functools.cached_property
    def layers(self) -> list[Layer]:
        """The kernels: one per weighted layer with the activation behind it, one per other operation."""
        return _layers(self)

    def layer_ms(self, layer: Layer, shape: tuple[int, ...]) -> float:
        """Return the virtual time of one kernel."""
        pixels = shape[0] * shape[2] * shape[3]
        shapes, kinds = self.inferred(shape)
        moved = sum(
            int(np.prod(shapes.get(name, ()))) * _BYTES.get(kinds.get(name, "FLOAT"), 4) for name in layer.outputs
        )
        return 0.002 + layer.macs_per_pixel * pixels / _MACS_PER_MS.get(layer.reads, 2e10) + moved / _BYTES_PER_MS

    def run(self, image: np.ndarray, faulty: frozenset[str] = frozenset()) -> dict[str, np.ndarray]:
        """Compute with ONNX Runtime on the CPU; the outputs of faulty nodes come out wrong."""
        with self.lock:
            names = [name for name, (is_input, *_) in self.tensors.items() if not is_input]
            if faulty not in self._sessions:
                self._sessions[faulty] = cpu_session(with_faults(self.onnx_bytes, faulty))
            return dict(zip(names, self._sessions[faulty].run(names, {self.input_name: image}), strict=True))


def shape_of(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Return the shape of a graph's input or output, with -1 for what varies."""
    return tuple(entry.dim_value if entry.HasField("dim_value") else -1 for entry in value.type.tensor_type.shape.dim)


def tensor_types(model: onnx.ModelProto) -> dict[str, str]:
    """Return the types of all tensors."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {tensor.name: TYPE_NAMES.get(tensor.data_type, "FLOAT") for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        found[value.name] = TYPE_NAMES.get(value.type.tensor_type.elem_type, "FLOAT")
    return found


def with_outputs(onnx_bytes: bytes, names: Sequence[str]) -> bytes:
    """Return a graph with other outputs; inner tensors come with as many varying sizes as they have axes."""
    model = onnx.load_model_from_string(onnx_bytes)
    if [value.name for value in model.graph.output] == list(names):
        return onnx_bytes
    graph = onnx.shape_inference.infer_shapes(model).graph
    known = {value.name: value for value in (*graph.value_info, *graph.output)}
    del model.graph.output[:]
    model.graph.output.extend(known[name] for name in names)
    return bytes(model.SerializeToString())


def with_faults(onnx_bytes: bytes, faulty: Iterable[str]) -> bytes:
    """Return a graph in which the outputs of some nodes, by name, are four times too large."""
    model = onnx.load_model_from_string(onnx_bytes)
    kinds = {name: getattr(TensorProto, _ONNX_NAMES[kind]) for name, kind in tensor_types(model).items()}
    for index, node in reversed(list(enumerate(model.graph.node))):
        if node.name in faulty:
            wrong = node.output[0]
            node.output[0] = f"{wrong}/right"
            model.graph.initializer.append(onnx.helper.make_tensor(f"{wrong}/factor", kinds[wrong], [], [4.0]))
            fault = onnx.helper.make_node(
                "Mul", [node.output[0], f"{wrong}/factor"], [wrong], name=f"{node.name}/fault"
            )
            model.graph.node.insert(index + 1, fault)
    return bytes(model.SerializeToString()) if faulty else onnx_bytes


def cpu_session(onnx_bytes: bytes) -> Any:
    """Open a graph on the CPU, exactly as it is written; BF16, which the CPU lacks, is computed in FP32."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # It breaks graphs with FP16 scales: a bias scale underflows.
    off = ["WeightBiasQuantization"]
    try:
        return onnxruntime.InferenceSession(
            onnx_bytes, options, providers=["CPUExecutionProvider"], disabled_optimizers=off
        )
    except Exception as error:
        if "NOT_IMPLEMENTED" not in str(error) and "bfloat16" not in str(error):
            raise
        data = _as_fp32(onnx_bytes)
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"], disabled_optimizers=off)


def _as_fp32(onnx_bytes: bytes) -> bytes:
    model = onnx.load_model_from_string(onnx_bytes)
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.data_type == TensorProto.BFLOAT16:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            model.graph.initializer[index].CopyFrom(numpy_helper.from_array(values, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    del model.graph.value_info[:]
    return bytes(model.SerializeToString())


def read(data: bytes) -> EngineFile | None:
    """Read the bytes of an engine; None when they are no simulated engine."""
    data = bytes(data)
    if not data.endswith(_MAGIC):
        return None
    end = len(data) - len(_MAGIC) - 16
    header_size = int.from_bytes(data[end : end + 8], "little")
    onnx_size = int.from_bytes(data[end + 8 : end + 16], "little")
    begin = end - onnx_size - header_size
    values = json.loads(data[begin : begin + header_size])
    values["profiles"] = tuple(
        {name: tuple(map(tuple, shapes)) for name, shapes in profile.items()} for profile in values["profiles"]
    )
    values["flags"] = tuple(values["flags"])
    values["capability"] = tuple(values["capability"]) if values["capability"] else None
    return EngineFile(Header(**values), data[begin + header_size : end])


def _layers(engine: EngineFile) -> list[Layer]:
    graph = engine.model.graph
    low = engine.header.profiles[0][engine.input_name][0]
    shapes, kinds = engine.inferred(low)
    pixels = low[0] * low[2] * low[3]
    producers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    layers: list[Layer] = []
    fused: set[str] = set()
    for node in graph.node:
        if node.op_type in _INVISIBLE or node.output[0] in fused:
            continue
        if all(name in constants for name in node.input if name):
            continue
        reads = _stored_type(node.input[0], producers, kinds)
        made = Layer(
            name=node.name,
            kind="kgen",
            parameter="",
            nodes=[node.name],
            inputs=[name for name in node.input if name and name not in constants],
            outputs=[node.output[0]],
            reads=reads,
            writes=_read_type(node.output[0], readers, kinds),
            weights=None,
        )
        if node.op_type in _HEAVY:
            _make_heavy(made, node, producers, constants, shapes, kinds, pixels)
            follow = readers.get(node.output[0], [])
            while len(follow) == 1 and follow[0].op_type in _FUSED and made.outputs[0] not in engine.tensors:
                made.nodes.append(follow[0].name)
                made.name += " + " + follow[0].name
                fused.add(follow[0].output[0])
                made.outputs = [follow[0].output[0]]
                made.writes = _read_type(follow[0].output[0], readers, kinds)
                follow = readers.get(follow[0].output[0], [])
        layers += [*_conversion(made, node, producers, constants, readers, kinds), made]
    return layers


def _conversion(made: Layer, node: Any, producers: Any, constants: Any, readers: Any, kinds: Any) -> list[Layer]:
    """Return the kernel that quantizes a layer's input, where no kernel before it writes the layer's type."""
    source = node.input[0]
    while (producer := producers.get(source)) is not None and producer.op_type in (
        "DequantizeLinear",
        "QuantizeLinear",
    ):
        source = producer.input[0]
    if node.op_type not in _HEAVY or source == node.input[0] or _read_type(source, readers, kinds) == made.reads:
        return []
    name = f"Reformatting CopyNode for Input Tensor 0 to {made.name}"
    kind = str(kinds.get(source, "FLOAT"))
    return [Layer(name, "Reformat", "", [], [source], [node.input[0]], reads=kind, writes=made.reads, weights=None)]


def _make_heavy(made: Layer, node: Any, producers: Any, constants: Any, shapes: Any, kinds: Any, pixels: int) -> None:
    made.parameter = _HEAVY[node.op_type]
    made.kind = "CaskDeconvolutionV2" if node.op_type == "ConvTranspose" else "CaskConvolution"
    weight = node.input[1]
    while weight not in constants:
        weight = producers[weight].input[0]
    made.weights = TYPE_NAMES[constants[weight].data_type] if made.reads in ("INT8", "FP8") else made.reads
    size = shapes.get(node.input[1]) or tuple(constants[weight].dims)
    made.weight_count = int(np.prod(size))
    where = node.input[0] if node.op_type == "ConvTranspose" else node.output[0]
    made.macs_per_pixel = made.weight_count * float(np.prod(shapes[where][2:])) * shapes[where][0] / pixels
    short = {"FLOAT": "f32", "HALF": "f16", "BF16": "bf16", "INT8": "i8", "FP8": "e4m3"}[made.reads]
    sums = "i32" if short == "i8" else "f32"
    made.tactic = f"sm89_xmma_fprop_implicit_gemm_{short}{short}_{short}{sums}_{sums}_nhwckrsc_nhwc_simulated"


def _stored_type(name: str, producers: Any, kinds: Any) -> str:
    """Return the type in which a tensor is read: before a dequantization, not after it."""
    producer = producers.get(name)
    while producer is not None and producer.op_type in ("DequantizeLinear", "Identity"):
        name = producer.input[0]
        producer = producers.get(name)
    return str(kinds.get(name, "FLOAT"))


def _read_type(name: str, readers: Any, kinds: Any) -> str:
    """Return the type in which a tensor is written: after a quantization where all readers quantize."""
    follow = readers.get(name, [])
    if follow and all(node.op_type == "QuantizeLinear" for node in follow):
        return str(kinds.get(follow[0].output[0], "INT8"))
    return str(kinds.get(name, "FLOAT"))


def unsupported_node(model: onnx.ModelProto) -> Any:
    """Return a node that no TensorRT reads, None without one: of a domain of its own."""
    return next((node for node in model.graph.node if node.domain not in ("", "ai.onnx")), None)
