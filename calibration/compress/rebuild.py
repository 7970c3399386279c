"""Make a graph with changed layers: factors, removed channels, readers fitted to what is left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from srdeploy.calibration.compress.factors import DAMPING, FIT_DAMPING, Array, reduce_inputs, reduce_outputs, refit
from srdeploy.calibration.compress.layers import POINTWISE, Change, channel_view, matrix
from srdeploy.calibration.compress.moments import Moments, is_channelwise
from srdeploy.core.onnx_graph import Graph, Layer, replace_nodes


@dataclass(frozen=True)
class _Fit:
    """New weights of one layer.

    Attributes:
        first, second: factors, in the layout of ONNX weights; `first` is None where the layer stays one.
        bias: (out,).
        spread: whether the 1x1 factor comes after the one with the taps.
    """

    first: NDArray[np.float32] | None
    second: NDArray[np.float32]
    bias: NDArray[np.float32]
    spread: bool = False


def apply_changes(graph: Graph, changes: Sequence[Change], moments: Mapping[str, Moments]) -> onnx.ModelProto:
    """Return the graph with changes made.

    Args:
        graph: the original graph.
        changes: at most one factorization and one removal of channels per layer.
        moments: of the layers that change, and of the readers of removed channels. Where their z has fewer channels
            than x, those of the removed ones are missing.
    """
    factored = {change.layer: change for change in changes if change.form != "channels"}
    removed = {change.layer: change for change in changes if change.form == "channels"}
    read = {change.reader: change for change in removed.values()}
    layers = {layer.node: layer for layer in graph.layers}
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    cut: dict[str, tuple[int, ...]] = {}  # tensors with removed channels
    for node in graph.model.graph.node:
        layer = layers.get(node.name)
        if node.op_type in POINTWISE and node.input[0] in cut:
            nodes.append(_cut_pointwise(graph, node, cut[node.input[0]], constants))
            cut[node.output[0]] = cut[node.input[0]]
        elif layer is None or not {layer.name} & (factored.keys() | removed.keys() | read.keys()):
            nodes.append(node)
        else:
            inputs = read[layer.name].channels if layer.name in read else None
            outputs = removed[layer.name].channels if layer.name in removed else None
            fit = _fit(graph, layer, factored.get(layer.name), inputs, outputs, moments.get(layer.name))
            nodes += _nodes(layer, node, fit, constants)
            if outputs is not None:
                cut[layer.output] = outputs
    result = replace_nodes(graph.model, nodes, constants)
    del result.graph.value_info[:]  # shapes of the original's tensors and weights
    return result


def _fit(
    graph: Graph,
    layer: Layer,
    change: Change | None,
    inputs: tuple[int, ...] | None,
    outputs: tuple[int, ...] | None,
    moments: Moments | None,
) -> _Fit:
    height, width = (int(size) for size in graph.initializers[layer.weight].dims[2:])
    taps = height * width
    single = is_channelwise(graph, layer)
    target = matrix(graph, layer)  # (rows, columns); a row per output channel and, on single pixels, per tap
    per_output, per_input = (taps, 1) if single else (1, taps)
    if outputs is not None:
        target = target[_expanded(outputs, per_output)]
    prior: Array = np.eye(target.shape[1], dtype=np.float64)
    if inputs is not None:
        prior = prior[:, _expanded(inputs, per_input)]
    bias = graph.array(layer.bias).astype(np.float64) if layer.bias else np.zeros(layer.channels_out)
    bias = bias if outputs is None else bias[list(outputs)]
    if moments is None:
        fitted, covariance = target @ prior, np.eye(prior.shape[1])
    else:
        cross, covariance, mean_z = _restricted(moments, prior)
        damping = DAMPING if moments.same else FIT_DAMPING
        exact = moments.same and inputs is None  # it reads what it always read: least squares find the same weights
        fitted = target if exact else refit(target, cross, covariance, prior, damping=damping)
    if change is None:
        first, second = None, fitted
    elif change.form == "outputs":
        directions = reduce_outputs(fitted, covariance)[0][:, : change.rank]
        first, second = directions.T @ fitted, directions
    else:
        first, second = _factor_inputs(fitted, covariance, change.rank, taps, single)
    if moments is not None:
        made = _whole(first, second, change, taps, single)
        bias = bias + (target @ moments.mean_x - made @ mean_z).reshape(-1, per_output).sum(axis=1)
    return _in_layout(first, second, bias, change, layer, (height, width), single)


def _expanded(channels: Sequence[int], times: int) -> NDArray[np.int64]:
    return (np.asarray(channels)[:, None] * times + np.arange(times)).ravel()


def _restricted(moments: Moments, prior: Array) -> tuple[Array, Array, Array]:
    """Return cross moments, covariance and mean of z, without the removed channels if z still has them."""
    if moments.covariance32.shape[0] == prior.shape[1]:
        return moments.cross, moments.covariance, moments.mean_z
    columns = prior.argmax(axis=0)
    return moments.cross[:, columns], moments.covariance[np.ix_(columns, columns)], moments.mean_z[columns]


def _factor_inputs(fitted: Array, covariance: Array, rank: int, taps: int, single: bool) -> tuple[Array, Array]:
    if single:
        projections, basis, _ = reduce_inputs(fitted, covariance)
        return projections[:rank], fitted @ basis[:, :rank]
    projections, basis, _ = reduce_inputs(*channel_view(fitted, covariance, taps))
    first = projections[:rank]  # (rank, in)
    mixed = _at_every_tap(first, taps)
    cross = covariance @ mixed.T
    second = refit(fitted, cross, mixed @ cross, _at_every_tap(basis[:, :rank], taps))
    return first, second


def _at_every_tap(mixture: Array, taps: int) -> Array:
    """Return a matrix on channels as one on windows, (rows * taps, columns * taps): the same at every tap."""
    return np.asarray(np.kron(mixture, np.eye(taps)), dtype=np.float64)


def _whole(first: Array | None, second: Array, change: Change | None, taps: int, single: bool) -> Array:
    """Return what factors compute together, in the layout of the fitted weights."""
    if first is None:
        return second
    assert change is not None
    if change.form == "outputs" or single:
        return second @ first
    return second @ _at_every_tap(first, taps)


def _in_layout(
    first: Array | None,
    second: Array,
    bias: Array,
    change: Change | None,
    layer: Layer,
    kernel: tuple[int, int],
    single: bool,
) -> _Fit:
    def convolution(weights: Array, with_taps: bool) -> NDArray[np.float32]:
        """(out, in * taps) or (out * taps, in) to ONNX's layout."""
        if not with_taps:
            return weights[:, :, None, None].astype(np.float32)
        if single:  # (out, kh, kw, in)
            shaped = weights.reshape(-1, *kernel, weights.shape[1])
            order = (3, 0, 1, 2) if layer.op == "ConvTranspose" else (0, 3, 1, 2)
            return np.ascontiguousarray(shaped.transpose(order), dtype=np.float32)
        return weights.reshape(len(weights), -1, *kernel).astype(np.float32)

    if first is None:
        return _Fit(None, convolution(second, True), bias.astype(np.float32))
    assert change is not None
    if change.form == "outputs":
        return _Fit(convolution(first, True), convolution(second, False), bias.astype(np.float32), spread=True)
    return _Fit(convolution(first, False), convolution(second, True), bias.astype(np.float32))


def _nodes(layer: Layer, node: onnx.NodeProto, fit: _Fit, constants: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    """Return the nodes of a layer; factors are named after it, "NAME.first" and "NAME.second"."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    if fit.first is None:
        bias = layer.bias or f"{layer.name}.fitted_bias"
        copy.input[:] = [node.input[0], layer.weight, bias]
        constants += [numpy_helper.from_array(fit.second, layer.weight), numpy_helper.from_array(fit.bias, bias)]
        return [copy]
    names = {part: f"{layer.name}.{part}" for part in ("first", "second")}
    constants += [
        numpy_helper.from_array(fit.first, f"{names['first']}.weight"),
        numpy_helper.from_array(fit.second, f"{names['second']}.weight"),
        numpy_helper.from_array(fit.bias, f"{names['second']}.bias"),
    ]
    between = f"{node.output[0]}.compressed"
    second = [between, f"{names['second']}.weight", f"{names['second']}.bias"]
    if fit.spread:
        copy.input[:], copy.output[:], copy.name = (
            [node.input[0], f"{names['first']}.weight"],
            [between],
            f"{node.name}_0",
        )
        return [copy, helper.make_node("Conv", second, [node.output[0]], name=f"{node.name}_1", kernel_shape=[1, 1])]
    mix = helper.make_node(
        "Conv", [node.input[0], f"{names['first']}.weight"], [between], name=f"{node.name}_0", kernel_shape=[1, 1]
    )
    copy.input[:], copy.name = second, f"{node.name}_1"
    return [mix, copy]


def _cut_pointwise(
    graph: Graph, node: onnx.NodeProto, channels: tuple[int, ...], constants: list[onnx.TensorProto]
) -> onnx.NodeProto:
    """Return an activation with the slopes of the channels that are left."""
    if node.op_type != "PRelu" or len(graph.array(node.input[1]).ravel()) == 1:
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[1] = f"{node.input[1]}.cut"
    constants.append(numpy_helper.from_array(graph.array(node.input[1])[list(channels)], copy.input[1]))
    return copy
