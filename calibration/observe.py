"""What flows through a graph, in one pass and bounded memory.

The reductions are appended to the graph itself, so that no activation leaves the engine: what comes out per tensor is
its smallest and largest value and its mean per channel, and a sample on a regular grid of pixels that feeds a
histogram. ONNX Runtime frees each activation as soon as its reductions are done, so memory stays that of one plain run.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from srdeploy.core.contract import INPUT
from srdeploy.core.errors import InputError
from srdeploy.core.onnx_graph import Graph, add_outputs
from srdeploy.core.ort import cpu_session
from srdeploy.core.progress import SILENT, Progress

BINS = 8192
"""Bins of a histogram over [-limit, limit]; one that grows merges them in pairs, so half of them are always used."""
SAMPLE_PIXELS = 1024
"""About this many pixels of a tensor and image go into its histogram, all their channels with them."""


@dataclass
class Observation:
    """What was seen of one tensor.

    Attributes:
        low, high: per channel, (C,) float64.
        total: sum over images of the mean per channel, (C,) float64; divide by `images`.
        images: number of images (or crops) seen.
        limit: the histogram covers [-limit, limit], a power of two.
        counts: (BINS,) int64.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    total: NDArray[np.float64]
    images: int = 0
    limit: float = 2.0**-20
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean per channel, (C,)."""
        return self.total / max(self.images, 1)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value of the whole tensor."""
        return float(self.low.min()), float(self.high.max())

    def scaled(self, factors: NDArray[np.float64]) -> "Observation":
        """Return extremes and means of the tensor times a factor per channel, (C,) or (1,); without a histogram."""
        ends = self.low * factors, self.high * factors  # a negative factor swaps them
        return Observation(np.minimum(*ends), np.maximum(*ends), self.total * factors, self.images)

    def add(self, low: NDArray[Any], high: NDArray[Any], mean: NDArray[Any], sample: NDArray[Any]) -> None:
        """Take in one image: its extremes and mean per channel, and a sample of its values."""
        self.low = np.minimum(self.low, low)
        self.high = np.maximum(self.high, high)
        self.total = self.total + mean
        self.images += 1
        largest = max(float(-low.min()), float(high.max()))
        while largest > self.limit:
            self._grow()
        position = (sample.ravel() + self.limit) * (BINS / (2 * self.limit))
        self.counts += np.bincount(np.minimum(position.astype(np.int64), BINS - 1), minlength=BINS)

    def _grow(self) -> None:
        pairs = self.counts.reshape(-1, 2).sum(axis=1)
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.counts[BINS // 4 : 3 * BINS // 4] = pairs
        self.limit *= 2

    def bin_centers(self) -> NDArray[np.float64]:
        """Return the middle of every bin."""
        width = 2 * self.limit / BINS
        middles: NDArray[np.float64] = -self.limit + width * (np.arange(BINS, dtype=np.float64) + 0.5)
        return middles


def observe(
    graph: Graph,
    tensors: Sequence[str],
    batches: Iterable[NDArray[np.float32]],
    *,
    count: int | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, Observation]:
    """Run a float graph over images and return what flowed through some of its tensors.

    Args:
        graph: the FP32 graph.
        tensors: names of activations, each (N, C, H, W).
        batches: images (1, C, H, W) float32 in [0, 1].
        count: how many batches there are, for the progress bar.
        threads: CPU threads; None takes all.
        progress: where to report.

    Raises:
        InputError: a tensor became NaN or infinite; the layer that wrote it is named.
    """
    session = cpu_session(_add_reductions(graph, tensors), threads=threads, arithmetic="float")
    seen: dict[str, Observation] = {}
    with progress.task("collecting activation ranges", total=count) as advance:
        for batch in batches:
            base = max(1, math.isqrt(batch.shape[2] * batch.shape[3] // SAMPLE_PIXELS))
            feeds = {INPUT: batch, "srdeploy_step": np.array([base, base], dtype=np.int64)}
            outputs = session.run(None, feeds)
            for tensor, (low, high, mean, sample) in zip(tensors, _per_tensor(outputs), strict=True):
                if not (np.isfinite(mean).all() and np.isfinite(low).all() and np.isfinite(high).all()):
                    raise InputError(
                        f"activation {tensor} of {_describe_producer(graph, tensor)} is NaN or infinite",
                        expected="finite activations on every calibration image",
                        next_step="check the checkpoint's weights and value range with: srdeploy inspect",
                    )
                if tensor not in seen:
                    seen[tensor] = Observation(low.astype(np.float64), high.astype(np.float64), np.zeros(low.shape))
                seen[tensor].add(low, high, mean, sample)
            advance()
    return seen


def run_outputs(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[NDArray[np.float32]],
    *,
    threads: int | None = None,
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Run a graph over images and yield some of its tensors per image: only for few tensors or small images."""
    session = cpu_session(add_outputs(model, tensors), threads=threads, arithmetic="float")
    for batch in batches:
        yield dict(zip(tensors, session.run(list(tensors), {INPUT: batch}), strict=True))


def _add_reductions(graph: Graph, tensors: Sequence[str]) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.output[:]
    model.graph.input.append(helper.make_tensor_value_info("srdeploy_step", TensorProto.INT64, [2]))
    constants: Mapping[str, list[int]] = {"axes": [0, 2, 3], "starts": [0, 0], "ends": [2**31 - 1] * 2, "image": [2, 3]}
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.int64), f"srdeploy_{name}"))
    steps: dict[float, str] = {}
    nodes = model.graph.node
    for index, tensor in enumerate(tensors):
        resolution = max(1, round(graph.resolution.get(tensor, 1.0)))
        if resolution not in steps:
            steps[resolution] = f"srdeploy_step_{resolution}"
            factor = f"srdeploy_factor_{resolution}"
            model.graph.initializer.append(numpy_helper.from_array(np.array([resolution] * 2, dtype=np.int64), factor))
            nodes.append(helper.make_node("Mul", ["srdeploy_step", factor], [steps[resolution]]))
        for kind in ("Min", "Max", "Mean"):
            name = f"srdeploy_{index}_{kind}"
            nodes.append(helper.make_node(f"Reduce{kind}", [tensor, "srdeploy_axes"], [name], keepdims=0))
            model.graph.output.append(helper.make_empty_tensor_value_info(name))
        name = f"srdeploy_{index}_sample"
        where = ["srdeploy_starts", "srdeploy_ends", "srdeploy_image", steps[resolution]]
        nodes.append(helper.make_node("Slice", [tensor, *where], [name]))
        model.graph.output.append(helper.make_empty_tensor_value_info(name))
    return model


def _per_tensor(outputs: Sequence[NDArray[Any]]) -> Iterator[tuple[NDArray[Any], ...]]:
    # The outputs stand in the order in which _add_reductions appended them: min, max, mean, sample.
    for start in range(0, len(outputs), 4):
        yield tuple(outputs[start : start + 4])


def _describe_producer(graph: Graph, tensor: str) -> str:
    node = graph.producer.get(tensor)
    if node is None:
        return "the input"
    layer = next((layer.name for layer in graph.layers if layer.node == node.name), None)
    return f"layer {layer}" if layer else f"node {node.name} ({node.op_type})"
