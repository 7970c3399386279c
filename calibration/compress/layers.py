"""What can be done to the layers of a graph, what it saves, and what error theory predicts for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from srdeploy.calibration.compress.factors import Array, reduce_inputs, reduce_outputs, select_channels
from srdeploy.calibration.compress.moments import Moments, is_channelwise
from srdeploy.core.onnx_graph import Graph, Layer, attribute

Form = Literal["inputs", "outputs", "channels"]
"""Kinds of change: a 1x1 layer in front that mixes the input channels down to a few; a 1x1 layer behind that spreads a
few output channels; or output channels that the one reader does without."""

POINTWISE = ("Relu", "LeakyRelu", "PRelu", "Elu", "Clip", "Tanh", "Sigmoid")
"""What may be between a layer and its reader when output channels are removed: each channel on its own."""
MIN_SAVING = 0.1
"""Factors that save less of a layer's multiply-adds are not worth another kernel."""


@dataclass(frozen=True)
class Change:
    """One change of one layer.

    Attributes:
        layer: name of the layer; for "channels" of the one whose output channels are removed.
        form: see `Form`.
        rank: channels between the factors, or output channels that are left.
        error: predicted error power of the layer's outputs (for "channels": of the reader's).
        channels: output channels that are left, for "channels".
        reader: name of the layer that reads them, for "channels".
    """

    layer: str
    form: Form
    rank: int
    error: float
    channels: tuple[int, ...] = ()
    reader: str | None = None

    @property
    def slot(self) -> str:
        """What only one change of a graph can have: the factors of a layer, or its channels."""
        return f"{'channels' if self.form == 'channels' else 'factor'} {self.layer}"

    @property
    def key(self) -> str:
        """Identity in a journal."""
        return f"{self.layer} {self.form} {self.rank}"


def candidates(graph: Graph) -> list[Layer]:
    """Return the layers that can be factored: convolutions and deconvolutions on feature maps, without groups."""
    return [layer for layer in graph.layers if layer.resolution > 0 and _is_plain(graph, layer)]


def readers(graph: Graph) -> Iterator[tuple[Layer, Layer]]:
    """Yield layers with the one layer that reads their output, where output channels can be removed."""
    by_node = {layer.node: layer for layer in candidates(graph)}
    for layer in by_node.values():
        node = graph.only_consumer(layer.output)
        while node is not None and node.op_type in POINTWISE and node.input[0] in graph.producer:
            if node.op_type == "PRelu" and not slopes_can_be_cut(graph, node, layer.channels_out):
                break
            node = graph.only_consumer(node.output[0])
        reader = by_node.get(node.name) if node is not None else None
        if reader is not None and reader.channels_in == layer.channels_out and layer.role != "last":
            yield layer, reader


def slopes_can_be_cut(graph: Graph, node: onnx.NodeProto, channels: int) -> bool:
    """Return True if a PRelu's slopes are one number, or one per channel."""
    if node.input[1] not in graph.initializers:
        return False
    shape = tuple(graph.initializers[node.input[1]].dims)
    return int(np.prod(shape)) == 1 or shape == (channels, 1, 1)


def matrix(graph: Graph, layer: Layer) -> Array:
    """Return a layer's weights as the matrix that its moments belong to.

    (out, in * kh * kw) on windows, or (out * kh * kw, in) on single pixels (`is_channelwise`).
    """
    weights = graph.array(layer.weight).astype(np.float64)
    if layer.op == "ConvTranspose":  # (in, out, kh, kw)
        return weights.transpose(1, 2, 3, 0).reshape(-1, layer.channels_in)
    if is_channelwise(graph, layer):
        return weights.transpose(0, 2, 3, 1).reshape(-1, layer.channels_in)
    return weights.reshape(layer.channels_out, -1)


def channel_view(weights: Array, covariance: Array, taps: int) -> tuple[Array, Array]:
    """Return weights (out, in * taps) as (out * taps, in), and the covariance of the channels, the taps' mean."""
    out, size = weights.shape
    channels = size // taps
    blocks = covariance.reshape(channels, taps, channels, taps)
    together = np.einsum("ctdt->cd", blocks) / taps
    return weights.reshape(out, channels, taps).transpose(0, 2, 1).reshape(-1, channels), together


def factor_changes(graph: Graph, layer: Layer, moments: Moments, multiple: int) -> list[Change]:
    """Return the ways to factor a layer that save multiply-adds, ranks being multiples of a number that engines like.

    Each has a lower error than all that save more.
    """
    weights = matrix(graph, layer)
    pixels_in, pixels_out = pixels_of(graph, layer)
    height, width = graph.initializers[layer.weight].dims[2:]
    taps = height * width
    single = is_channelwise(graph, layer)
    found: list[tuple[float, Change]] = []  # with the multiply-adds
    if taps > 1 or layer.channels_out > multiple:
        view = (weights, moments.covariance) if single else channel_view(weights, moments.covariance, taps)
        errors = reduce_inputs(*view)[2]
        for rank in range(multiple, layer.channels_in, multiple):
            made = rank * layer.channels_in * pixels_in + rank * layer.macs / layer.channels_in
            found.append((made, Change(layer.name, "inputs", rank, float(errors[rank]))))
    if not single and layer.channels_out > multiple:
        errors = reduce_outputs(weights, moments.covariance)[1]
        for rank in range(multiple, layer.channels_out, multiple):
            made = rank * layer.channels_out * pixels_out + rank * layer.macs / layer.channels_out
            found.append((made, Change(layer.name, "outputs", rank, float(errors[rank]))))
    best: list[Change] = []
    for made, change in sorted(found, key=lambda entry: (entry[0], entry[1].error)):
        if made <= (1 - MIN_SAVING) * layer.macs and (not best or change.error < best[-1].error):
            best.append(change)
    return best


def channel_changes(graph: Graph, layer: Layer, reader: Layer, moments: Moments, multiple: int) -> list[Change]:
    """Return the ways to remove output channels of a layer, fewest left first; `moments` are those of the reader."""
    height, width = graph.initializers[reader.weight].dims[2:]
    taps = 1 if is_channelwise(graph, reader) else height * width
    order, errors = select_channels(matrix(graph, reader), moments.covariance, taps)
    found = []
    for left in range(multiple, layer.channels_out, multiple):
        removed = layer.channels_out - left
        kept = tuple(sorted(int(channel) for channel in order[removed:]))
        found.append(Change(layer.name, "channels", left, float(errors[removed - 1]), kept, reader.name))
    return found


def _is_plain(graph: Graph, layer: Layer) -> bool:
    node = graph.producer[layer.output]
    dilations = attribute(node, "dilations", [1, 1])
    strides = attribute(node, "strides", [1, 1])
    if layer.op == "ConvTranspose":
        return attribute(node, "group", 1) == 1 and dilations == [1, 1]
    return graph.is_plain_convolution(layer) and dilations == [1, 1] and strides == [1, 1]


def pixels_of(graph: Graph, layer: Layer) -> tuple[float, float]:
    """Return the pixels of a layer's input and output per LR pixel."""
    return graph.resolution.get(layer.input, 1.0) ** 2, layer.resolution**2
