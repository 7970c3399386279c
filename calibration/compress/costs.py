"""What a graph costs with changed layers: multiply-adds, and values written to and read from memory."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from srdeploy.calibration.compress.layers import Change, pixels_of, readers
from srdeploy.core.onnx_graph import Graph, Layer

BYTE_COST = 8.0
"""Multiply-adds that a processor does in the time of moving a byte of activations (2 cores with AVX-512: about 75e9
multiply-adds and 10e9 bytes per second). In 8 bits both are about four times as fast."""
_BYTES = 8
"""Of an activation: four bytes, written once and read once."""

Selection = Mapping[str, Change]
"""Changes by `Change.slot`: at most one factorization and one removal of channels per layer."""


@dataclass(frozen=True)
class Cost:
    """Per LR pixel.

    Attributes:
        macs: multiply-adds.
        values: activations written.
    """

    macs: float
    values: float

    @property
    def total(self) -> float:
        """Everything in multiply-adds."""
        return self.macs + BYTE_COST * _BYTES * self.values


class Costs:
    """Costs of the layers of a graph under a selection of changes, each seeing the changes around it.

    Attributes:
        total: of the unchanged graph, in multiply-adds per LR pixel.
    """

    def __init__(self, graph: Graph) -> None:
        self._layers = {layer.name: layer for layer in graph.layers}
        self._pixels = {layer.name: pixels_of(graph, layer) for layer in graph.layers}
        self._feeding = {reader.name: layer.name for layer, reader in readers(graph)}
        self.total = sum(self.of_layer(name, {}).total for name in self._layers)

    def saving(self, selection: Selection) -> float:
        """Return the cost that a selection saves, in multiply-adds per LR pixel."""
        touched = {name for change in selection.values() for name in (change.layer, change.reader) if name}
        return self.of_layers(touched, {}) - self.of_layers(touched, selection)

    def of_layers(self, names: Iterable[str], selection: Selection) -> float:
        """Return the cost of some layers; infinite where two changes of a layer exclude each other."""
        return sum(self.of_layer(name, selection).total for name in names)

    def of_layer(self, name: str, selection: Selection) -> Cost:
        """Return the cost of a layer, its factors together."""
        layer, (pixels_in, pixels_out) = self._layers[name], self._pixels[name]
        per_pair = layer.macs / (layer.channels_in * layer.channels_out)
        removed, feeding = selection.get(f"channels {name}"), selection.get(f"channels {self._feeding.get(name)}")
        channels_in = feeding.rank if feeding else layer.channels_in
        channels_out = removed.rank if removed else layer.channels_out
        values = channels_out * pixels_out
        factor = selection.get(f"factor {name}")
        if factor is None:
            return Cost(channels_in * channels_out * per_pair, values)
        rank = factor.rank
        if factor.form == "inputs":
            if rank >= channels_in:
                return Cost(math.inf, values)
            return Cost(rank * (channels_in * pixels_in + channels_out * per_pair), values + rank * pixels_in)
        if rank >= channels_out:
            return Cost(math.inf, values)
        return Cost(rank * (channels_in * per_pair + channels_out * pixels_out), values + rank * pixels_out)

    def layer(self, name: str) -> Layer:
        """Return a layer by its name."""
        return self._layers[name]
