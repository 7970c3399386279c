"""Statistics of the activations of a graph, in one pass and bounded memory.

The reductions are part of the graph, each directly behind the tensor that it reads, so no activation leaves the engine:
the outputs per tensor are its minimum, maximum and mean per channel, and a sample on a regular grid of pixels that
feeds histograms. Nodes run in the order of the graph, and ONNX Runtime frees each tensor after its last reader, so
memory stays that of one plain run.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from srdeploy.core.contract import INPUT
from srdeploy.core.errors import InputError
from srdeploy.core.onnx_graph import Graph, up_to
from srdeploy.core.ort import cpu_session
from srdeploy.core.progress import SILENT, Progress

BINS = 8192
"""Bins of a tensor's histogram over [-limit, limit]."""
CHANNEL_BINS = 512
"""Bins of a channel's histogram over [-limit, limit]; one that grows merges them in pairs, so half are always used."""
SAMPLE_PIXELS = 1024
"""About this many pixels of a tensor and image go into its histograms, all their channels with them."""
_START = 2.0**-20
_STEP = "srdeploy_step"
_ENDS = ("Min", "Max")
_NOT_ENLARGING = ("Relu", "Identity", "DepthToSpace", "SpaceToDepth", "Slice")


@dataclass
class Observation:
    """What was observed of one tensor.

    Attributes:
        low, high: per channel, (C,) float64.
        total: sum over images of the mean per channel, (C,) float64; divide by `images`.
        images: number of images (or crops) observed.
        limit: per channel, (C,): its histogram covers [-limit, limit].
        counts: (C, CHANNEL_BINS) uint32, without exact zeros; None when only extremes are known.
        zeros: exact zeros in the samples: what ReLU writes, and what is exact in every 8-bit format.
    """

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    total: NDArray[np.float64]
    images: int = 0
    limit: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    counts: NDArray[np.uint32] | None = None
    zeros: int = 0

    @classmethod
    def empty(cls, channels: int) -> "Observation":
        """Return an observation of no image."""
        return cls(
            low=np.full(channels, np.inf),
            high=np.full(channels, -np.inf),
            total=np.zeros(channels),
            limit=np.full(channels, _START),
            counts=np.zeros((channels, CHANNEL_BINS), dtype=np.uint32),
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean per channel, (C,)."""
        return self.total / max(self.images, 1)

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value of the whole tensor."""
        return float(self.low.min()), float(self.high.max())

    def scaled(self, factors: NDArray[np.float64]) -> "Observation":
        """Return what would have been observed of the tensor times a factor per channel, (C,) or (1,)."""
        ends = self.low * factors, self.high * factors  # a negative factor swaps them
        result = replace(self, low=np.minimum(*ends), high=np.maximum(*ends), total=self.total * factors)
        if self.counts is not None:
            result.limit = self.limit * np.abs(factors)
            result.counts = np.where((factors < 0).reshape(-1, 1), self.counts[:, ::-1], self.counts)
        return result

    def add(self, low: NDArray[Any], high: NDArray[Any], mean: NDArray[Any], sample: NDArray[Any]) -> None:
        """Add one image: its extremes and mean per channel, (C,), and a sample of its values, (1, C, h, w)."""
        assert self.counts is not None
        self.low = np.minimum(self.low, low)
        self.high = np.maximum(self.high, high)
        self.total = self.total + mean
        self.images += 1
        largest = np.maximum(-low, high)
        while (outside := largest > self.limit).any():
            self._widen(outside)
        channels = self.counts.shape[0]
        values = sample.reshape(channels, -1)
        scale = (CHANNEL_BINS / (2 * self.limit)).astype(np.float32)[:, None]
        bins = ((values + self.limit.astype(np.float32)[:, None]) * scale).astype(np.int32)
        np.clip(bins, 0, CHANNEL_BINS - 1, out=bins)
        bins += (np.arange(channels, dtype=np.int32) * CHANNEL_BINS)[:, None]
        self.counts += np.bincount(bins.ravel(), minlength=self.counts.size).reshape(channels, -1).astype(np.uint32)
        zeros = (values == 0).sum(axis=1, dtype=np.uint32)
        self.counts[:, CHANNEL_BINS // 2] -= zeros
        self.zeros += int(zeros.sum())

    def _widen(self, channels: NDArray[np.bool_]) -> None:
        assert self.counts is not None
        pairs = self.counts[channels].reshape(-1, CHANNEL_BINS // 2, 2).sum(axis=2)
        self.counts[channels] = 0
        self.counts[channels, CHANNEL_BINS // 4 : 3 * CHANNEL_BINS // 4] = pairs
        self.limit[channels] *= 2

    def histogram(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the histogram of all channels together: centers of the bins that are not empty, and their counts.

        The values of a channel's bin are taken to be spread evenly over it.
        """
        assert self.counts is not None
        limit = float(self.limit.max())
        edges = np.linspace(-limit, limit, BINS + 1)
        below = np.zeros(BINS + 1)
        steps = np.linspace(-1.0, 1.0, CHANNEL_BINS + 1)
        for own, counts in zip(self.limit, self.counts, strict=True):
            total = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
            below += np.interp(edges, steps * own, total)
        centers = (edges[:-1] + edges[1:]) / 2
        counted = np.diff(below)
        middle = BINS // 2  # the first bin above zero
        values, counts = np.insert(centers, middle, 0.0), np.insert(counted, middle, float(self.zeros))
        filled = counts > 1e-6
        return values[filled], counts[filled]


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
            outputs = session.run(None, {INPUT: batch, _STEP: np.array([base, base], dtype=np.int64)})
            for tensor, (low, high, mean, sample) in zip(tensors, _per_tensor(outputs), strict=True):
                _check_finite(graph, tensor, low, high, mean)
                if tensor not in seen:
                    seen[tensor] = Observation.empty(low.size)
                seen[tensor].add(low, high, mean, sample)
            advance()
    return seen


def observe_magnitudes(
    graph: Graph,
    batches: Iterable[NDArray[np.float32]],
    *,
    count: int | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> dict[str, float]:
    """Run a float graph over images and return the largest magnitude of every tensor at the image's resolution.

    Tensors that an operator can only make smaller (ReLU, a gate behind a sigmoid) or only rearranges are not looked at:
    they get their input's magnitude.

    Args:
        graph: the FP32 graph.
        batches: images (1, C, H, W) float32 in [0, 1].
        count: how many batches there are, for the progress bar.
        threads: CPU threads; None uses all.
        progress: where to report.

    Raises:
        InputError: a tensor became NaN or infinite; the layer that wrote it is named.
    """
    names = [name for node in graph.model.graph.node for name in node.output if graph.resolution.get(name, 0.0) > 0.0]
    bounded = {name: bounding for name in names if (bounding := _bounding_input(graph, name)) is not None}
    measured = [name for name in names if name not in bounded]
    session = cpu_session(_add_extremes(graph, measured), threads=threads, arithmetic="float")
    largest = {INPUT: 0.0}
    with progress.task("looking for large activations", total=count) as advance:
        for batch in batches:
            largest[INPUT] = max(largest[INPUT], float(np.abs(batch).max()))
            outputs = session.run(None, {INPUT: batch})
            for tensor, low, high in zip(measured, outputs[::2], outputs[1::2], strict=True):
                _check_finite(graph, tensor, low, high)
                largest[tensor] = max(largest.get(tensor, 0.0), float(-low), float(high))
            advance()
    for name in names:  # in graph order, so what bounds a tensor is known before it
        if name in bounded and bounded[name] in largest:
            largest[name] = largest[bounded[name]]
    return largest


def run_outputs(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    batches: Iterable[NDArray[np.float32]],
    *,
    threads: int | None = None,
) -> Iterator[dict[str, NDArray[np.float32]]]:
    """Run a graph over images and yield some of its tensors per image: only for few tensors or small images."""
    if not tensors:
        yield from ({} for _ in batches)
        return
    session = cpu_session(up_to(model, tensors), threads=threads, arithmetic="float")
    for batch in batches:
        yield dict(zip(tensors, session.run(list(tensors), {INPUT: batch}), strict=True))


def _add_reductions(graph: Graph, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return a graph that outputs, per tensor, minimum, maximum and mean per channel, and a sample on a grid."""
    constants: Mapping[str, list[int]] = {"axes": [0, 2, 3], "starts": [0, 0], "ends": [2**31 - 1] * 2, "image": [2, 3]}
    arrays = {f"srdeploy_{name}": np.array(value, dtype=np.int64) for name, value in constants.items()}
    first: list[onnx.NodeProto] = []
    after: dict[str, list[onnx.NodeProto]] = {}
    outputs: list[str] = []
    steps: dict[int, str] = {}
    for index, tensor in enumerate(tensors):
        resolution = max(1, round(graph.resolution.get(tensor, 1.0)))
        if resolution not in steps:
            steps[resolution] = f"{_STEP}_{resolution}"
            arrays[f"srdeploy_factor_{resolution}"] = np.array([resolution] * 2, dtype=np.int64)
            first.append(helper.make_node("Mul", [_STEP, f"srdeploy_factor_{resolution}"], [steps[resolution]]))
        names = [f"srdeploy_{index}_{kind}" for kind in ("Min", "Max", "Mean", "sample")]
        after[tensor] = [
            helper.make_node(f"Reduce{kind}", [tensor, "srdeploy_axes"], [name], keepdims=0)
            for kind, name in zip(("Min", "Max", "Mean"), names[:3], strict=True)
        ]
        where = ["srdeploy_starts", "srdeploy_ends", "srdeploy_image", steps[resolution]]
        after[tensor].append(helper.make_node("Slice", [tensor, *where], [names[3]]))
        outputs += names
    model = _add_nodes(graph.model, first, after, outputs)
    model.graph.input.append(helper.make_tensor_value_info(_STEP, TensorProto.INT64, [2]))
    model.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in arrays.items())
    return model


def _add_extremes(graph: Graph, tensors: Sequence[str]) -> onnx.ModelProto:
    """Return a graph that outputs the minimum and the maximum of every tensor."""
    after = {
        tensor: [
            helper.make_node(f"Reduce{kind}", [tensor], [f"srdeploy_{index}_{kind}"], keepdims=0) for kind in _ENDS
        ]
        for index, tensor in enumerate(tensors)
    }
    outputs = [node.output[0] for nodes in after.values() for node in nodes]
    return _add_nodes(graph.model, [], after, outputs)


def _add_nodes(
    source: onnx.ModelProto,
    first: Sequence[onnx.NodeProto],
    after: Mapping[str, Sequence[onnx.NodeProto]],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """Return a graph with other outputs and further nodes, each directly behind the tensor that it reads."""
    model = onnx.ModelProto()
    model.CopyFrom(source)
    del model.graph.output[:], model.graph.node[:]
    model.graph.node.extend([*first, *after.get(INPUT, [])])
    for node in source.graph.node:
        model.graph.node.append(node)
        for name in node.output:
            model.graph.node.extend(after.get(name, []))
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    return model


def _bounding_input(graph: Graph, name: str) -> str | None:
    """Return the tensor whose magnitude bounds that of `name`, None where no one tensor does."""
    node = graph.producer[name]
    if node.op_type in _NOT_ENLARGING:
        return str(node.input[0])
    if node.op_type == "Mul":
        gates = [tensor for tensor in node.input if _is_gate(graph, tensor)]
        others = [tensor for tensor in node.input if tensor not in gates]
        return others[0] if len(gates) == 1 and len(others) == 1 else None
    return None


def _is_gate(graph: Graph, tensor: str) -> bool:
    node = graph.producer.get(tensor)
    return node is not None and node.op_type == "Sigmoid"


def _check_finite(graph: Graph, tensor: str, *values: NDArray[Any]) -> None:
    if not all(np.isfinite(value).all() for value in values):
        raise InputError(
            f"activation {tensor} of {_describe_producer(graph, tensor)} is NaN or infinite",
            expected="finite activations on every calibration image",
            next_step="check the checkpoint's weights and value range with: srdeploy inspect CHECKPOINT",
        )


def _per_tensor(outputs: Sequence[NDArray[Any]]) -> Iterator[tuple[NDArray[Any], ...]]:
    # The outputs are in the order in which _add_reductions appended them: min, max, mean, sample.
    for start in range(0, len(outputs), 4):
        yield tuple(outputs[start : start + 4])


def _describe_producer(graph: Graph, tensor: str) -> str:
    node = graph.producer.get(tensor)
    if node is None:
        return "the input"
    layer = next((layer.name for layer in graph.layers if layer.node == node.name), None)
    return f"layer {layer}" if layer else f"node {node.name} ({node.op_type})"
