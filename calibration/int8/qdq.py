"""Writes quantize/dequantize pairs into a float graph.

What is written is the explicit form that every engine reads: activations pass a QuantizeLinear/DequantizeLinear pair,
and weights are stored as 8-bit initializers behind a DequantizeLinear. The type of the scales decides in which type the
rest of the graph computes (strong typing): `typed.py` brings scales and everything else to FP16 together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from srdeploy.calibration.int8.arithmetic import FP8_MAX, QuantParams, params_for_range, round_to_e4m3
from srdeploy.core.onnx_graph import Graph

_TYPES = {"int8": TensorProto.INT8, "uint8": TensorProto.UINT8, "float8e4m3fn": TensorProto.FLOAT8E4M3FN}

OUTER_POWER = 0.125
"""Share of a kernel's power that the low half of a split layer may do without: as much as the error that splitting
leaves anyway, which is that of the weights."""


@dataclass(frozen=True)
class Site:
    """One activation that becomes 8-bit.

    Attributes:
        tensor: the float tensor, (N, C, H, W).
        readers: names of the nodes that read the 8-bit value; all other readers keep the float tensor.
        share: sites with the same `share` get one scale.
    """

    tensor: str
    readers: tuple[str, ...]
    share: str


@dataclass(frozen=True)
class QuantWeight:
    """A layer's weights as codes, with one scale per output channel.

    Attributes:
        codes: int8, or float values on the E4M3 grid for FP8; the layout of the float weights.
        scales: (out,) float32.
        axis: the axis of output channels.
        fp8: whether the codes are E4M3 numbers.
    """

    codes: NDArray[np.int8] | NDArray[np.float32]
    scales: NDArray[np.float32]
    axis: int
    fp8: bool = False

    def dequantized(self) -> NDArray[np.float32]:
        """Return the weights that the engine computes with, float32."""
        shape = [1] * self.codes.ndim
        shape[self.axis] = -1
        return (self.codes.astype(np.float32) * self.scales.reshape(shape)).astype(np.float32)


def quantize_weights_fp8(weights: NDArray[np.float32], axis: int) -> QuantWeight:
    """Round weights to E4M3 with one scale per output channel."""
    rows = np.abs(np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1))
    scales = (np.maximum(rows.max(axis=1), 1e-12) / FP8_MAX).astype(np.float32)
    shape = [1] * weights.ndim
    shape[axis] = -1
    return QuantWeight(round_to_e4m3(weights / scales.reshape(shape)).astype(np.float32), scales, axis, fp8=True)


def insert_qdq(
    model: onnx.ModelProto,
    sites: Sequence[Site],
    params: Mapping[str, QuantParams],
    weights: Mapping[str, QuantWeight],
    *,
    splits: Sequence[str] = (),
) -> onnx.ModelProto:
    """Return a copy of a graph with Q/DQ pairs.

    Args:
        model: the float graph.
        sites: activations to quantize.
        params: their parameters, by tensor.
        weights: quantized weights, by initializer name.
        splits: names of convolutions that are computed twice, on the 8-bit activation and on what its rounding left
            over, quantized with a step 256 times finer. Both run on integers; together they see 16-bit activations.
            What is added to such a convolution's result is added to the low half: engines compute a convolution and one
            sum in one pass, so all three are summed without a pass of their own.
    """
    graph = Graph(model)
    positions = {node.name: index for index, node in enumerate(model.graph.node)}
    scale_type = np.float32
    before: dict[str, list[onnx.NodeProto]] = {}
    first: list[onnx.NodeProto] = []
    new: list[onnx.TensorProto] = []
    renamed: dict[tuple[str, str], str] = {}
    for site in sites:
        pair, constants = _make_activation_pair(site.tensor, params[site.tensor], scale_type)
        new += constants
        producer = graph.producer.get(site.tensor)
        (before.setdefault(producer.name, []) if producer is not None else first).extend(pair)
        for reader in site.readers:
            renamed[reader, site.tensor] = pair[1].output[0]
    for name, weight in weights.items():
        node, constants = _make_weight_node(name, weight, scale_type)
        new += constants
        first.append(node)
        for reader in graph.consumers[name]:
            renamed[reader.name, name] = node.output[0]

    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(first)
    for node in model.graph.node:
        copy = result.graph.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [renamed.get((node.name, name), name) for name in node.input]
        if node.name in splits:
            tail, constants = _split_convolution(node, copy, params[node.input[0]], weights[node.input[1]], scale_type)
            new += constants
            following = graph.only_consumer(node.output[0])
            added = _earlier_summand(graph, following, node, positions) if following is not None else None
            if following is not None and added is not None:
                low, total = tail[-2].output[0], tail[-1]
                total.input[:] = [low, renamed.get((following.name, added), added)]
                total.output[:] = [f"{low}_sum"]
                renamed[following.name, added] = copy.output[0]
                renamed[following.name, node.output[0]] = total.output[0]
            result.graph.node.extend(tail)
        result.graph.node.extend(before.get(node.name, []))
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in weights]
    del result.graph.initializer[:]
    result.graph.initializer.extend([*kept, *new])
    return result


def _earlier_summand(
    graph: Graph, reader: onnx.NodeProto, convolution: onnx.NodeProto, positions: Mapping[str, int]
) -> str | None:
    """Return the map, computed before a convolution, that a node adds to its result; None for any other node."""
    others = [name for name in reader.input if name != convolution.output[0] and name in graph.producer]
    if reader.op_type != "Add" or len(others) != 1:
        return None
    return others[0] if positions[graph.producer[others[0]].name] < positions[convolution.name] else None


def _split_convolution(
    node: onnx.NodeProto,
    first: onnx.NodeProto,
    params: QuantParams,
    weight: QuantWeight,
    scale_type: type[np.floating],
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Turn `first`, the quantized copy of `node`, into the high half and return the low half and the sum."""
    output, source = node.output[0], node.input[0]
    high, low, rest = f"{output}_high", f"{output}_low", f"{output}_rest"
    # What rounding leaves over lies within half a step; what clipping leaves over is cut off as before.
    fine = params_for_range(-params.scale / 2, params.scale / 2, params.kind)
    pair, constants = _make_activation_pair(rest, fine, scale_type)
    second = onnx.NodeProto()
    second.CopyFrom(first)
    second.name = f"{node.name}_low"
    second.input[:] = [pair[1].output[0], first.input[1]]
    second.output[:] = [low]
    first.output[:] = [high]
    before = helper.make_node("Sub", [source, first.input[0]], [rest], name=f"{rest}_subtract")
    total = helper.make_node("Add", [high, low], [output], name=f"{output}_sum")
    middle = _middle(weight)
    if middle.codes.shape == weight.codes.shape:
        return [before, *pair, second, total], constants
    weights, more = _make_weight_node(f"{node.input[1]}_middle", middle, scale_type)
    second.input[1] = weights.output[0]
    for entry in second.attribute:
        if entry.name in ("kernel_shape", "pads"):
            size = middle.codes.shape[2:]
            entry.ints[:] = size if entry.name == "kernel_shape" else [side // 2 for side in size] * 2
    return [before, *pair, weights, second, total], [*constants, *more]


def _middle(weight: QuantWeight) -> QuantWeight:
    """Return the taps in the middle of a large kernel that read nearly all of what rounding leaves over.

    The outer taps of a merged end are small: without them its 5x5 kernel costs as much as a 3x3 one.
    """
    power = np.square(weight.dequantized().astype(np.float64))
    total, outer = power.sum(), 0
    while min(power.shape[2:]) > 3 and power[:, :, 1:-1, 1:-1].sum() >= (1 - OUTER_POWER) * total:
        power, outer = power[:, :, 1:-1, 1:-1], outer + 1
    rows, columns = (slice(outer, size - outer) for size in weight.codes.shape[2:])
    return replace(weight, codes=weight.codes[:, :, rows, columns].copy())


def _make_activation_pair(
    tensor: str, params: QuantParams, scale_type: type[np.floating]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    scale, zero, codes, back = (f"{tensor}_{part}" for part in ("scale", "zero_point", "quantized", "dequantized"))
    constants = [
        numpy_helper.from_array(np.array(params.scale, dtype=scale_type), scale),
        helper.make_tensor(zero, _TYPES[params.kind], [], [params.zero_point]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", [tensor, scale, zero], [codes], name=f"{tensor}_quantize"),
        helper.make_node("DequantizeLinear", [codes, scale, zero], [back], name=f"{tensor}_dequantize"),
    ]
    return nodes, constants


def _make_weight_node(
    name: str, weight: QuantWeight, scale_type: type[np.floating]
) -> tuple[onnx.NodeProto, list[onnx.TensorProto]]:
    codes, scale, zero, back = (f"{name}_{part}" for part in ("quantized", "scale", "zero_point", "dequantized"))
    if weight.fp8:
        values = weight.codes.astype(ml_dtypes.float8_e4m3fn)
        zeros = np.zeros(weight.scales.shape, dtype=ml_dtypes.float8_e4m3fn)
    else:
        values, zeros = weight.codes, np.zeros(weight.scales.shape, dtype=np.int8)
    constants = [
        numpy_helper.from_array(values, codes),
        numpy_helper.from_array(weight.scales.astype(scale_type), scale),
        numpy_helper.from_array(zeros, zero),
    ]
    node = helper.make_node(
        "DequantizeLinear", [codes, scale, zero], [back], name=f"{name}_dequantize", axis=weight.axis
    )
    return node, constants
