"""FP16 and BF16 graphs: every tensor of one type, with named FP32 islands, cast once where the types meet.

Strongly typed engines compute what is written here and nothing else. Outside, the graph keeps FP32 input and output.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from srdeploy.core.errors import PrecisionError
from srdeploy.core.onnx_graph import GLOBAL_POOLS, Graph, opset_of
from srdeploy.core.precision import Precision

FP16_MAX = 65504.0
HEADROOM = 4.0
"""An activation may grow by this factor on images brighter or busier than the calibration images without overflow."""
BF16_OPSET = 22
"""Convolutions take BF16 from this opset on."""

_TYPES = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
_FLOAT = TensorProto.FLOAT


@dataclass(frozen=True)
class Island:
    """One node that stays FP32, and why."""

    node: str
    reason: str


def find_islands(graph: Graph, precision: Precision, largest: Mapping[str, float] | None) -> tuple[Island, ...]:
    """Find the nodes that have to stay FP32.

    Args:
        graph: the FP32 graph.
        precision: FP16 or BF16.
        largest: the largest magnitude of as many tensors as possible; None when no images were given.
    """
    found: dict[str, str] = {}
    for node in graph.model.graph.node:
        if node.op_type in GLOBAL_POOLS:
            found[node.name] = "a mean over the whole image adds up more than 16-bit sums can hold"
    if precision == Precision.FP16:
        for node in graph.model.graph.node:
            reason = _overflow(graph, node, largest or {})
            if reason:
                found.setdefault(node.name, reason)
    return tuple(Island(name, reason) for name, reason in found.items())


def convert_to_half(model: onnx.ModelProto, precision: Precision, islands: Iterable[Island]) -> onnx.ModelProto:
    """Return a copy of a graph that computes in FP16 or BF16.

    Q/DQ pairs may be in it: their scales become FP16 too, which is what makes the rest of an INT8 graph FP16.
    Weights are rounded to the type and never clamped.

    Raises:
        PrecisionError: a weight outside the type's range does not belong to an island.
    """
    kind = _TYPES[precision]
    kept = {island.node for island in islands}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    if precision == Precision.BF16 and opset_of(result) < BF16_OPSET:
        next(entry for entry in result.opset_import if entry.domain in ("", "ai.onnx")).version = BF16_OPSET
        result.ir_version = max(result.ir_version, 10)
    del result.graph.node[:]
    del result.graph.value_info[:]
    typing = _Typing(model, kind)
    for node in model.graph.node:
        result.graph.node.extend(typing.rewritten(node, full=node.name in kept))
    result.graph.node.extend(typing.outputs(model))
    del result.graph.initializer[:]
    result.graph.initializer.extend(typing.initializers())
    return result


def emulate_half(model: onnx.ModelProto, precision: Precision, islands: Iterable[Island]) -> onnx.ModelProto:
    """Return an FP32 graph with the rounding and the overflow of `convert_to_half`.

    CPU engines compute FP16 graphs in FP32 throughout, and so hide overflow, and have no BF16 convolution. Here every
    weight is rounded to the type, and every result passes through it, as on a GPU that sums up in FP32.
    """
    kind = _TYPES[precision]
    kept = {island.node for island in islands}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    del result.graph.value_info[:]
    constants = {tensor.name: tensor for tensor in result.graph.initializer}
    whole = {name for node in model.graph.node if node.name in kept for name in node.input}
    for name, tensor in constants.items():
        if tensor.data_type == _FLOAT and name not in whole:
            rounded = numpy_helper.to_array(_converted(tensor, kind, name)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(rounded, name))
    outputs = {value.name for value in model.graph.output}
    graph = Graph(model)
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        copy = result.graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get(name, name) for name in node.input]
        for name in node.output:
            if node.name in kept or name in outputs or name not in graph.resolution or node.op_type == "QuantizeLinear":
                continue
            renamed[name] = f"{name}_rounded"
            steps = ((name, f"{name}_half", kind), (f"{name}_half", renamed[name], _FLOAT))
            result.graph.node.extend(helper.make_node("Cast", [one], [two], to=to) for one, two, to in steps)
    return result


class _Typing:
    """Keeps, for every tensor, the names under which it exists in FP32 and in the 16-bit type."""

    def __init__(self, model: onnx.ModelProto, kind: int) -> None:
        self._kind = kind
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._used: dict[str, onnx.TensorProto] = {}
        self._names: dict[str, dict[int, str]] = {value.name: {_FLOAT: value.name} for value in model.graph.input}
        self._results = {value.name for value in model.graph.output}

    def rewritten(self, node: onnx.NodeProto, *, full: bool) -> list[onnx.NodeProto]:
        """Return the node in its type, after the casts it needs."""
        wanted = _FLOAT if full else self._kind
        before: list[onnx.NodeProto] = []
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [self._as(name, wanted, before) for name in node.input]
        integers = node.op_type in ("Shape", "Size", "QuantizeLinear")
        for attribute in copy.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _FLOAT:
                attribute.i = wanted
            elif node.op_type in ("Constant", "ConstantOfShape") and attribute.name == "value":
                if attribute.t.data_type == _FLOAT:
                    attribute.t.CopyFrom(_converted(attribute.t, wanted, attribute.t.name))
                else:
                    integers = True
        if not integers:
            for position, name in enumerate(node.output):
                copy.output[position] = f"{name}_typed" if name in self._results else name
                self._names[name] = {wanted: copy.output[position]}
        return [*before, copy]

    def outputs(self, model: onnx.ModelProto) -> list[onnx.NodeProto]:
        """Return the casts back to FP32 in front of the graph's outputs."""
        nodes = []
        for value in model.graph.output:
            names = self._names[value.name]
            source = names.get(self._kind) or names[_FLOAT]
            nodes.append(helper.make_node("Cast", [source], [value.name], name=f"{value.name}_to_fp32", to=_FLOAT))
        return nodes

    def initializers(self) -> list[onnx.TensorProto]:
        """Return the constants in the types they are read in."""
        return list(self._used.values())

    def _as(self, name: str, wanted: int, before: list[onnx.NodeProto]) -> str:
        if name in self._constants:
            return self._constant(name, wanted)
        names = self._names.get(name)
        if names is None:  # an integer tensor, or a missing optional input
            return name
        if wanted not in names:
            names[wanted] = f"{name}_as_{'fp32' if wanted == _FLOAT else 'half'}"
            source = next(iter(names.values()))
            before.append(helper.make_node("Cast", [source], [names[wanted]], name=f"{names[wanted]}_cast", to=wanted))
        return names[wanted]

    def _constant(self, name: str, wanted: int) -> str:
        tensor = self._constants[name]
        if tensor.data_type != _FLOAT:
            self._used[name] = tensor
            return name
        new = f"{name}_fp32" if wanted == _FLOAT else name
        if new not in self._used:
            self._used[new] = _converted(tensor, wanted, new)
        return new


def _converted(tensor: onnx.TensorProto, kind: int, name: str) -> onnx.TensorProto:
    values = numpy_helper.to_array(tensor)
    if kind == TensorProto.BFLOAT16:
        return numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), name)
    if kind == TensorProto.FLOAT16:
        if np.abs(values).max(initial=0.0) > FP16_MAX:
            raise PrecisionError(
                f"weights {name} reach {np.abs(values).max():.4g}, more than FP16 holds",
                expected=f"at most {FP16_MAX:.0f}",
                next_step="use --precision bf16",
            )
        return numpy_helper.from_array(values.astype(np.float16), name)
    return numpy_helper.from_array(values.astype(np.float32), name)


def _overflow(graph: Graph, node: onnx.NodeProto, largest: Mapping[str, float]) -> str | None:
    for name in (*node.input, *node.output):
        reached = largest.get(name, 0.0)
        if reached * HEADROOM > FP16_MAX:
            what = "reads" if name in node.input else "writes"
            return f"{what} {name}, which reaches {reached:.4g} (FP16 ends at {FP16_MAX:.0f})"
    for name in node.input:
        tensor = graph.initializers.get(name)
        if tensor is not None and tensor.data_type == _FLOAT:
            reached = float(np.abs(graph.array(name)).max(initial=0.0))
            if reached > FP16_MAX:
                return f"weights {name} reach {reached:.4g} (FP16 ends at {FP16_MAX:.0f})"
    return None
