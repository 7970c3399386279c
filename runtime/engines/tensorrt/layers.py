"""The kernels of a TensorRT engine, read back, and the proof that they compute in the type that was asked for.

Where no GPU is, the detailed build log of TensorRT-RTX holds one line per kernel, with the types of its inputs,
constants and outputs and the ONNX nodes it came from. Where a GPU is, the engine inspector gives the same as JSON.
What is proven without a GPU is the engine as built; TensorRT-RTX may still pick other kernels when it compiles
them on the GPU, in the same types.
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

    @property
    def weighted(self) -> bool:
        """Whether it is a convolution, deconvolution or matrix product of its own, not part of a generated kernel."""
        return any(word in self.kind.lower() for word in _WEIGHTED)

    @property
    def types(self) -> set[str]:
        """All types that go in."""
        return {*self.inputs, *self.constants}

    @property
    def computes_in(self) -> str:
        """The type of its first input, which is the type that the products are formed in."""
        return self.inputs[0] if self.inputs else "unknown"

    @property
    def signature(self) -> str:
        """Kind and types, as counted in the sidecar: "correlation fp16->fp16"."""
        return f"{self.kind} {'/'.join(dict.fromkeys(self.inputs))}->{'/'.join(dict.fromkeys(self.outputs))}"


@dataclass(frozen=True)
class Layers:
    """All kernels of an engine with its memory in bytes (None where the source does not say)."""

    kernels: tuple[Kernel, ...]
    activation_bytes: int | None
    weights_bytes: int | None
    read_from: str

    @property
    def convolutions(self) -> dict[str, int]:
        """Count the kernels with weights of their own by the type they compute in."""
        return dict(sorted(Counter(kernel.computes_in for kernel in self.kernels if kernel.weighted).items()))

    def to_json(self) -> dict[str, Any]:
        """Return the layer table in short: counts by kind and type, and memory."""
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
    document: str, *, activation_bytes: int | None = None, weights_bytes: int | None = None
) -> Layers:
    """Read the layer table from the engine inspector's JSON; 10.x writes type and layout in one string, 11 in two."""
    kernels = []
    for layer in json.loads(document).get("Layers", []):
        if not isinstance(layer, dict):  # the engine was built without detailed verbosity: names only
            continue
        constants = layer.get("Constants", [])
        weights = layer.get("Weights")
        if isinstance(weights, dict) and "Type" in weights:
            constants = [*constants, {"Datatype": weights["Type"]}]
        kernels.append(
            Kernel(
                name=str(layer.get("Name", "")),
                kind=str(layer.get("ParameterType") or layer.get("LayerType", "")),
                inputs=_json_types(layer.get("Inputs", [])),
                constants=_json_types(constants),
                outputs=_json_types(layer.get("Outputs", [])),
                onnx_layers=tuple(_ONNX_LAYER.findall(str(layer.get("Metadata", "")))),
            )
        )
    return Layers(tuple(kernels), activation_bytes, weights_bytes, "the engine inspector")


def prove_precision(layers: Layers, graph: GraphFile) -> str:
    """Check every convolution of an engine against the type the graph asks for, and name what was built.

    Returns:
        "fp16", or a mixture such as "int8+fp16".

    Raises:
        BuildError: a convolution computes in another type, or the layer table cannot be read at all.
    """
    weighted = [kernel for kernel in layers.kernels if kernel.weighted]
    if not weighted:
        raise BuildError(
            f"the precision of the engine cannot be proven: no convolution was found in {layers.read_from}",
            next_step="this TensorRT release writes its layer table differently; please report it",
        )
    wrong = mismatches(weighted, graph.layer_types) + fused_mismatches(layers.kernels, graph.layer_types)
    if wrong:
        kernel, asked = wrong[0]
        origin = kernel.onnx_layers[0] if kernel.onnx_layers else kernel.name
        raise BuildError(
            f"{len(wrong)} of {len(graph.layer_types)} convolutions were built in another type than the graph"
            f" asks for: {origin!r} computes in {kernel.computes_in}",
            expected=asked,
            next_step="the engine was thrown away; quantize the graph for this engine (srdeploy quantize --target)",
        )
    return combined_label(layers.convolutions)


def mismatches(weighted: Sequence[Kernel], asked: Mapping[str, str]) -> list[tuple[Kernel, str]]:
    """Return the kernels that compute in a type none of their ONNX nodes asks for, with the type asked for.

    `asked` maps the node name of each layer to its type, see `Graph.layer_types`.
    """
    everywhere = set(asked.values())
    wrong = []
    for kernel in weighted:
        wanted = {asked[name] for name in kernel.onnx_layers if name in asked} or everywhere
        if kernel.computes_in not in wanted:
            wrong.append((kernel, " or ".join(sorted(wanted))))
    return wrong


def fused_mismatches(kernels: Sequence[Kernel], asked: Mapping[str, str]) -> list[tuple[Kernel, str]]:
    """Return the same for layers that went into generated kernels: nothing of the type they ask for goes in there.

    The 1x1 convolutions of a channel attention gate end like this.
    """
    homes: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for name in kernel.onnx_layers:
            homes.setdefault(name, []).append(kernel)
    wrong = []
    for node, dtype in asked.items():
        where = homes.get(node, [])
        fused = where and not any(kernel.weighted for kernel in where)
        if fused and not any(dtype in kernel.types for kernel in where):
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


def _json_types(tensors: Sequence[Any]) -> tuple[str, ...]:
    found = []
    for tensor in tensors:
        if not isinstance(tensor, dict):
            continue
        words = str(tensor.get("Datatype") or tensor.get("DataType") or tensor.get("Format/Datatype") or "").split()
        # "Channel major FP16 format where ..." holds the type as one word among others.
        label = next((_LABELS[word] for word in words if word in _LABELS), None)
        found.append(label or "unknown")
    return tuple(found)
