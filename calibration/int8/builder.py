"""Quantized graphs made from one FP32 graph, for given decisions.

A search tries dozens of quantized graphs. They share the expensive part, what was seen on the calibration images, and
differ in a few decisions, so the observations live here and a graph for given decisions takes a second.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.images.effort import select_rounding_windows
from srdeploy.calibration.int8.arithmetic import (
    WEIGHT_TOPS,
    Kind,
    QuantParams,
    params_for_range,
    quantize_weights,
    weight_scales,
)
from srdeploy.calibration.int8.placement import Placement, Recipe, list_plain_convolutions, list_quantizable, place
from srdeploy.calibration.int8.qdq import QuantWeight, insert_qdq, quantize_weights_fp8
from srdeploy.calibration.int8.ranges import Method, Ranges, compute_range
from srdeploy.calibration.int8.rounding import round_with_compensation, scale_covariances
from srdeploy.calibration.journal import Journal
from srdeploy.calibration.measurements import Measurements
from srdeploy.calibration.observe import Observation
from srdeploy.calibration.rewrites.equalize import equalize_channels
from srdeploy.calibration.rewrites.streams import fold_reader_scales
from srdeploy.core.blas import map_small
from srdeploy.core.contract import INPUT
from srdeploy.core.onnx_graph import Graph, Layer
from srdeploy.core.precision import Precision
from srdeploy.core.progress import SILENT, Progress


@dataclass(frozen=True)
class Decisions:
    """What distinguishes one quantized graph from another.

    Attributes:
        strength: of channel equalization, 0 to 1.
        method: how ranges are clipped.
        compensate: round weights so that their errors cancel, instead of each to nearest; INT8 only.
        correct_bias: move the mean error of rounded weights into the bias.
        share: one scale for all that meets in a concatenation.
        keep: layers left float: name -> reason.
        splits: layers that see 16-bit activations, as two 8-bit convolutions.
    """

    strength: float = 0.5
    method: Method = "minmax"
    compensate: bool = False
    correct_bias: bool = True
    share: bool = True
    keep: Mapping[str, str] = field(default_factory=dict)
    splits: tuple[str, ...] = ()

    def keeping(self, keep: Mapping[str, str]) -> "Decisions":
        """Return the same decisions with these layers left float."""
        return replace(self, keep=dict(keep))


class GraphBuilder:
    """Makes quantized graphs from one FP32 graph.

    Args:
        model: the FP32 graph.
        recipe: of the target.
        precision: INT8 or FP8.
        calibration: images that ranges are taken from.
        progress: where the passes over the images report.
        stored: ranges of this graph from an earlier run: no pass over the images is made.
        journal: remembers passes over the images.
        measurements: shared with graphs for other targets; None measures for this graph alone.
        key: names the network, its rewrites and the calibration set among `measurements`.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        recipe: Recipe,
        precision: Precision,
        calibration: CalibrationSet,
        progress: Progress = SILENT,
        stored: Ranges | None = None,
        journal: Journal | None = None,
        measurements: Measurements | None = None,
        key: str = "",
    ) -> None:
        self.graph = Graph(model)
        self.recipe = recipe
        self.precision = precision
        self._calibration = calibration
        self._progress = progress
        self.stored = stored
        self._journal = journal
        self.measurements = measurements or Measurements()
        self.key = key
        self._equalized: dict[float, tuple[Graph, dict[str, NDArray[np.float64]]]] = {}
        self._ranges: dict[tuple[float, Method], dict[str, tuple[float, float]]] = {}
        self._codes: dict[tuple[float, str], QuantWeight] = {}
        self._compensated: dict[tuple[float, Method], dict[str, QuantWeight]] = {}

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The activations that may become 8-bit: inputs of layers, and the features behind concatenations."""
        return list_quantizable(self.graph, self.recipe, self.precision)

    @cached_property
    def seen(self) -> dict[str, Observation]:
        """What was observed of `tensors` in the graph as it was given: one pass over the images."""
        if self.stored is not None:
            return self._remembered()
        return self.measurements.observations(
            self.key,
            self.graph,
            self.tensors,
            self._calibration,
            precision=self.precision,
            journal=self._journal,
            progress=self._progress,
        )

    def equalized(self, strength: float) -> tuple[Graph, dict[str, NDArray[np.float64]]]:
        """Return the equalized graph, and the factor of each channel by tensor."""
        if strength not in self._equalized:
            if strength == 0.0:
                self._equalized[strength] = (self.graph, {})
            else:
                model, factors = equalize_channels(self.graph, self.seen, self.tensors, strength)
                self._equalized[strength] = (Graph(model), factors)
        return self._equalized[strength]

    def build(self, decisions: Decisions) -> tuple[onnx.ModelProto, Placement]:
        """Return the graph with Q/DQ pairs in FP32, and where they are."""
        graph, _ = self.equalized(decisions.strength)
        placement = place(
            graph,
            self.recipe,
            precision=self.precision,
            keep=decisions.keep,
            share=decisions.share,
            splits=decisions.splits,
        )
        weights = {
            layer.weight: self._weight(decisions, layer.weight, layer.axis)
            for layer in graph.layers
            if layer.name in placement.layers
        }
        base = self._with_corrected_biases(graph, weights, decisions) if decisions.correct_bias else graph.model
        splits = [
            layer.node for layer in graph.layers if layer.name in decisions.splits and layer.name in placement.layers
        ]
        if self.recipe.reader_scales:
            base = fold_reader_scales(base, placement.floats)
        model = insert_qdq(base, placement.sites, self.params(placement, decisions), weights, splits=splits)
        return model, placement

    def params(self, placement: Placement, decisions: Decisions) -> dict[str, QuantParams]:
        """Return the parameters of every quantized activation; sites that share a scale get the union's."""
        groups: dict[str, list[tuple[float, float]]] = {}
        for site in placement.sites:
            groups.setdefault(site.share, []).append(self._range(site.tensor, decisions))
        params = {}
        for site in placement.sites:
            low = min(pair[0] for pair in groups[site.share])
            high = max(pair[1] for pair in groups[site.share])
            # An image has 8 bits itself: with the range 0..1 its codes are exact.
            kind = self._kind(site.tensor)
            if site.tensor == INPUT and kind == "uint8":
                low, high = 0.0, 1.0
            params[site.tensor] = params_for_range(low, high, kind)
        return {
            name: replace(value, scale=float(self._representable(np.array(value.scale, dtype=np.float32))))
            for name, value in params.items()
        }

    def ranges(self, decisions: Decisions, *, model_sha256: str) -> Ranges:
        """Return the chosen ranges as an artifact."""
        return Ranges(
            model_sha256=model_sha256,
            set_sha256=self._calibration.sha256,
            method=decisions.method,
            strength=decisions.strength,
            ranges={tensor: self._range(tensor, decisions) for tensor in self.tensors},
            channels={
                tensor: {"low": seen.low.tolist(), "high": seen.high.tolist(), "mean": seen.mean.tolist()}
                for tensor, seen in self.seen.items()
            },
        )

    def observation(self, tensor: str, strength: float) -> Observation:
        """Return what would be observed in the equalized graph, as it follows from the graph as given."""
        return self.seen[tensor].scaled(self.equalized(strength)[1].get(tensor, np.ones(1)))

    def magnitudes(self, strength: float) -> dict[str, float]:
        """Return the largest magnitude of each of `tensors` in the equalized graph."""
        ranges = {tensor: self.observation(tensor, strength).range for tensor in self.seen}
        return {tensor: max(-low, high) for tensor, (low, high) in ranges.items()}

    def _remembered(self) -> dict[str, Observation]:
        assert self.stored is not None
        table = {}
        for tensor, values in self.stored.channels.items():
            low, high, mean = (np.array(values[name], dtype=np.float64) for name in ("low", "high", "mean"))
            table[tensor] = Observation(low, high, mean, images=1)
        return table

    def _range(self, tensor: str, decisions: Decisions) -> tuple[float, float]:
        if self._is_concat(tensor):
            graph, _ = self.equalized(decisions.strength)
            pairs = [self._range(name, decisions) for name in graph.producer[tensor].input]
            return min(pair[0] for pair in pairs), max(pair[1] for pair in pairs)
        stored = self.stored
        if stored is not None and (stored.strength, stored.method) == (decisions.strength, decisions.method):
            return stored.ranges[tensor]
        table = self._ranges.setdefault((decisions.strength, decisions.method), {})
        if tensor not in table:
            observation = self.observation(tensor, decisions.strength)
            table[tensor] = compute_range(observation, decisions.method, self._kind(tensor))
        return table[tensor]

    def mean(self, tensor: str, strength: float) -> NDArray[np.float64] | None:
        """Return the mean per channel of a tensor of the equalized graph, (C,); None where it was not observed."""
        if self._is_concat(tensor):
            parts = [self.mean(name, strength) for name in self.graph.producer[tensor].input]
            known = [part for part in parts if part is not None]
            return np.concatenate(known) if len(known) == len(parts) else None
        if tensor not in self.seen:
            return None
        return self.observation(tensor, strength).mean

    def _weight(self, decisions: Decisions, name: str, axis: int) -> QuantWeight:
        if decisions.compensate:
            key = (decisions.strength, decisions.method)
            if key not in self._compensated:
                self._compensated[key] = dict(self._compensating(decisions))
            if name in self._compensated[key]:
                return self._compensated[key][name]
        nearest = (decisions.strength, name)
        if nearest not in self._codes:
            weights = self.equalized(decisions.strength)[0].array(name)
            if self.precision == Precision.FP8:
                self._codes[nearest] = quantize_weights_fp8(weights, axis)
            else:
                scales = self._representable(weight_scales(weights, axis, self.recipe.weight_bits))
                self._codes[nearest] = QuantWeight(quantize_weights(weights, scales, axis), scales, axis)
        return self._codes[nearest]

    def _compensating(self, decisions: Decisions) -> Iterator[tuple[str, QuantWeight]]:
        """Round the weights of all layers that may become 8-bit so that errors cancel; deconvolutions are excluded."""
        graph, _ = self.equalized(decisions.strength)
        layers = list_plain_convolutions(graph, self.recipe, self.precision, share=decisions.share)
        macs = sum(layer.macs for layer in graph.layers)
        batches = [sample.image for sample in select_rounding_windows(self._calibration.samples, macs)]
        top = WEIGHT_TOPS[self.recipe.weight_bits]
        covariances = self.measurements.covariances(
            self.key, self.graph, layers, batches, precision=self.precision, progress=self._progress
        )
        factors = self.equalized(decisions.strength)[1]

        def rounded(layer: Layer) -> tuple[str, QuantWeight]:
            # The activation's own rounding is noise that no weight can compensate.
            step = params_for_range(*self._range(layer.input, decisions), self._kind(layer.input)).scale
            scaled = scale_covariances(covariances[layer.name], factors.get(layer.input, np.ones(1)))
            noisy = [covariance + np.eye(len(covariance)) * step**2 / 12 for covariance in scaled]
            weights = graph.array(layer.weight)
            scales = weight_scales(weights, layer.axis, self.recipe.weight_bits)
            codes, scales = round_with_compensation(weights, scales, noisy, top, self._representable)
            return layer.weight, QuantWeight(codes, scales, layer.axis)

        yield from map_small(rounded, layers)

    def _representable(self, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return scales as the graph can hold them, before anything is computed with them."""
        return _round_scales_to_half(scales) if self.recipe.half else scales

    def _with_corrected_biases(
        self, graph: Graph, weights: Mapping[str, QuantWeight], decisions: Decisions
    ) -> onnx.ModelProto:
        """Return the graph with biases that undo the mean error of rounded weights on the images seen."""
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        corrected: dict[str, NDArray[np.float32]] = {}
        for layer in graph.layers:
            mean = self.mean(layer.input, decisions.strength)
            if layer.weight not in weights or layer.bias is None or mean is None:
                continue
            error = weights[layer.weight].dequantized().astype(np.float64) - graph.array(layer.weight)
            rows = np.moveaxis(error, layer.axis, 0).sum(axis=(2, 3))  # (out, in)
            if rows.shape[1] == mean.size:
                # A deconvolution spreads its taps over stride x stride output phases; each meets its share of them.
                phases = _phases(graph, layer.node)
                corrected[layer.bias] = (graph.array(layer.bias) - rows @ mean / phases).astype(np.float32)
        for tensor in model.graph.initializer:
            if tensor.name in corrected:
                tensor.CopyFrom(numpy_helper.from_array(corrected[tensor.name], tensor.name))
        return model

    def _kind(self, tensor: str) -> Kind:
        """Return the type of an activation's codes.

        OpenVINO computes a deconvolution of codes with an offset in FP32, and one of signed codes on integers.
        """
        if self.precision == Precision.FP8:
            return "float8e4m3fn"
        readers = {node.op_type for node in self.graph.consumers.get(tensor, [])}
        if readers == {"ConvTranspose"} and tensor in self.seen and self.seen[tensor].low.min() < 0:
            return "int8"
        return self.recipe.kind

    def _is_concat(self, tensor: str) -> bool:
        node = self.graph.producer.get(tensor)
        return node is not None and node.op_type == "Concat"


def _phases(graph: Graph, node: str) -> float:
    entry = graph.nodes[node]
    if entry.op_type != "ConvTranspose":
        return 1.0
    strides: Sequence[int] = next((a.ints for a in entry.attribute if a.name == "strides"), [1, 1])
    return float(np.prod(strides))


def _round_scales_to_half(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round scales to FP16 before anything is computed with them, so that the graph and its codes agree."""
    return np.maximum(scales.astype(np.float16), np.float16(2.0**-20)).astype(np.float32)
