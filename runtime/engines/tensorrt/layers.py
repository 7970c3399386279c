"""The kernels of a TensorRT engine, read back, and the proof that they compute in the type of the graph's layers.

The detailed build log of TensorRT-RTX has one line per kernel, with the types of its inputs, constants and outputs and
the ONNX nodes it came from; no GPU is needed. For TensorRT, the engine inspector returns the same as JSON. The engine
is proven as built; TensorRT-RTX may choose other kernels of the same types when it compiles them on the GPU.

A type that cannot be read is not proven, which is reported; it is never taken for a wrong type.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srdeploy.core.errors import BuildError
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.onnx_graph import combined_label

_LABELS = {
    "Float": "fp32",
    "FP32": "fp32",
    "Half": "fp16",
    "FP16": "fp16",
    "BFloat16": "bf16",
    "BF16": "bf16",
    "Int8": "int8",
    "INT8": "int8",
    "FP8": "fp8",
    "Fp8": "fp8",
    "E4M3FN": "fp8",
}
_WEIGHTED = (
    "correlation",
    "runtime_fusion",
    "deconv",
    "gemm",
    "dot",
    "convolution",
    "deconvolution",
    "matrixmultiply",
    "fullyconnected",
)
UNKNOWN = "unknown"
"""The type of a tensor that the source does not state. TensorRT 10 prints "N/A due to dynamic shapes" for some."""
_TACTIC_TYPES = (
    # Names of CUTLASS and xmma kernels state input types in pairs: sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_...
    (re.compile(r"_(?:i8i8|i8_i8)_|_imma_|i8816|i16832"), "int8"),
    (re.compile(r"_bf16bf16_|bf1688|bf16816"), "bf16"),
    (re.compile(r"_e4m3e4m3_|_qmma_"), "fp8"),
    (re.compile(r"_f16f16_|h884|h1688|h16816|_hmma_"), "fp16"),
    (re.compile(r"_f32f32_|sgemm|scudnn"), "fp32"),
)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_DATATYPE = re.compile(r"Datatype: ([^,}\s]+)")


@dataclass(frozen=True)
class Kernel:
    """One kernel: its kind, the types of its inputs, constants and outputs ("fp16", ...), the ONNX nodes it covers."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx_layers: tuple[str, ...]
    tactic: str = ""

    @property
    def weighted(self) -> bool:
        """True for a convolution, deconvolution or matrix product, False for a generated kernel."""
        return any(word in self.kind.lower() for word in _WEIGHTED)

    @property
    def types(self) -> set[str]:
        """The types of all inputs and constants."""
        return {*self.inputs, *self.constants}

    @property
    def computes_in(self) -> str:
        """The type of the products: the first input's, else the weights', else what the tactic's name states."""
        stated = next((label for label in (*self.inputs[:1], *self.constants[:1]) if label != UNKNOWN), None)
        if stated:
            return stated
        return next((label for pattern, label in _TACTIC_TYPES if pattern.search(self.tactic)), UNKNOWN)

    @property
    def signature(self) -> str:
        """Kind and types, as counted in the sidecar: "correlation fp16->fp16"."""
        return f"{self.kind} {'/'.join(dict.fromkeys(self.inputs))}->{'/'.join(dict.fromkeys(self.outputs))}"


@dataclass(frozen=True)
class Layers:
    """All kernels of an engine, and its memory in bytes (None if the source does not state it)."""

    kernels: tuple[Kernel, ...]
    activation_bytes: int | None
    weights_bytes: int | None
    read_from: str

    @property
    def convolutions(self) -> dict[str, int]:
        """The number of kernels with weights, by the type they compute in."""
        return dict(sorted(Counter(kernel.computes_in for kernel in self.kernels if kernel.weighted).items()))

    def to_json(self) -> dict[str, Any]:
        """Return counts by kind and type, and memory."""
        return {
            "read_from": self.read_from,
            "kernels": len(self.kernels),
            "convolutions": self.convolutions,
            "operations": dict(sorted(Counter(kernel.signature for kernel in self.kernels).items())),
            "activation_bytes": self.activation_bytes,
            "weights_bytes": self.weights_bytes,
        }


def layers_from_log(messages: Iterable[str]) -> Layers:
    """Read the layer table from the messages of a build with detailed profiling verbosity."""
    kernels: list[Kernel] = []
    activation, weights = None, None
    for message in messages:
        for line in message.splitlines():
            if line.startswith("Name: ") and ", LayerType: " in line:
                kernels.append(_kernel_from_line(line))
            elif "Total Activation Memory:" in line:
                activation = int(line.split(":")[-1].split()[0])
            elif "Total Weights Memory:" in line:
                weights = int(line.split(":")[-1].split()[0])
    return Layers(tuple(kernels), activation, weights, "the builder's detailed log")


def layers_from_inspector(
    documents: Sequence[str], *, activation_bytes: int | None = None, weights_bytes: int | None = None
) -> Layers:
    """Read the layer table from the engine inspector's JSON, one document per profile.

    TensorRT 10 writes type and layout in one string, TensorRT 11 in two.
    """
    layers = [layer for document in documents for layer in json.loads(document).get("Layers", [])]
    # Built without detailed verbosity, an engine has names only.
    kernels = tuple(_kernel_from_json(layer) for layer in layers if isinstance(layer, dict))
    return Layers(kernels, activation_bytes, weights_bytes, "the engine inspector")


@dataclass(frozen=True)
class Proof:
    """What was read back: the label of the types ("fp16", "int8+fp16"), and the layers whose type could not be read."""

    built: str
    unproven: tuple[str, ...]


def prove_precision(layers: Layers, graph: GraphFile) -> Proof:
    """Compare every convolution of an engine with the type of its layers in the graph.

    Raises:
        BuildError: a convolution computes in another type.
    """
    weighted = [kernel for kernel in layers.kernels if kernel.weighted]
    wrong = mismatches(weighted, graph.layer_types) + fused_mismatches(layers.kernels, graph.layer_types)
    if wrong:
        kernel, asked = wrong[0]
        origin = kernel.onnx_layers[0] if kernel.onnx_layers else kernel.name
        raise BuildError(
            f"{len(wrong)} of {len(graph.layer_types)} convolutions were built in another type than the graph's:"
            f" {origin!r} computes in {kernel.computes_in}",
            expected=asked,
            next_step="the engine was discarded; quantize the graph for this engine (srdeploy quantize --target)",
        )
    known = {label: count for label, count in layers.convolutions.items() if label != UNKNOWN}
    unproven = [kernel.name for kernel in weighted if kernel.computes_in == UNKNOWN]
    if not weighted:
        unproven = list(graph.layer_types)
    return Proof(combined_label(known) if known else "not proven", tuple(unproven))


def mismatches(weighted: Sequence[Kernel], expected: Mapping[str, str]) -> list[tuple[Kernel, str]]:
    """Return the kernels that compute in a type that none of their ONNX nodes has, with the expected type.

    `expected` maps the node name of each layer to its type, see `Graph.layer_types`.
    """
    everywhere = set(expected.values())
    wrong = []
    for kernel in weighted:
        if kernel.computes_in == UNKNOWN:
            continue
        wanted = {expected[name] for name in kernel.onnx_layers if name in expected} or everywhere
        if kernel.computes_in not in wanted:
            wrong.append((kernel, " or ".join(sorted(wanted))))
    return wrong


def fused_mismatches(kernels: Sequence[Kernel], expected: Mapping[str, str]) -> list[tuple[Kernel, str]]:
    """Return the same for layers inside generated kernels that read no tensor of the layer's type.

    The 1x1 convolutions of channel attention become such kernels.
    """
    homes: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for name in kernel.onnx_layers:
            homes.setdefault(name, []).append(kernel)
    wrong = []
    for node, dtype in expected.items():
        where = homes.get(node, [])
        fused = where and not any(kernel.weighted for kernel in where)
        if fused and not any({dtype, UNKNOWN} & kernel.types for kernel in where):
            wrong.append((where[0], dtype))
    return wrong


def _kernel_from_line(line: str) -> Kernel:
    head, _, rest = line.partition(", Inputs: [")
    inputs, _, rest = rest.partition("], Constants: [")
    constants, _, rest = rest.partition("], Outputs: [")
    outputs, _, tail = rest.partition("], TacticName:")
    name, _, kind = head.removeprefix("Name: ").partition(", LayerType: ")
    return Kernel(name, kind, _types(inputs), _types(constants), _types(outputs), tuple(_ONNX_LAYER.findall(tail)))


def _types(text: str) -> tuple[str, ...]:
    return tuple(_LABELS.get(found, found.lower()) for found in _DATATYPE.findall(text))


def _kernel_from_json(layer: dict[str, Any]) -> Kernel:
    constants = layer.get("Constants", [])
    weights = layer.get("Weights")
    if isinstance(weights, dict) and "Type" in weights:
        constants = [*constants, {"Datatype": weights["Type"]}]
    return Kernel(
        name=str(layer.get("Name", "")),
        kind=str(layer.get("ParameterType") or layer.get("LayerType", "")),
        inputs=_json_types(layer.get("Inputs", [])),
        constants=_json_types(constants),
        outputs=_json_types(layer.get("Outputs", [])),
        onnx_layers=tuple(_ONNX_LAYER.findall(str(layer.get("Metadata", "")))),
        tactic=str(layer.get("TacticName", "")),
    )


def _json_types(tensors: Sequence[Any]) -> tuple[str, ...]:
    found = []
    for tensor in tensors:
        if not isinstance(tensor, dict):
            continue
        words = str(tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype") or "").split()
        # "Channel major FP16 format where ..." has the type as one word among others.
        found.append(next((_LABELS[word] for word in words if word in _LABELS), UNKNOWN))
    return tuple(found)
