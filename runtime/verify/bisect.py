"""Finds where an engine goes wrong: the first ONNX node whose inputs agree and whose output does not.

Two questions are asked in turn, because their cures differ:

1. *Does the engine compute the graph as it is written?* The engine's tensors are compared with the same graph computed
   node by node without any fusion. A node found here is computed wrongly by the engine. Tensors are probed one at a
   time, by bisection: making a tensor an output keeps the engine from fusing across it, and all at once would make
   many such faults vanish. Only TensorRT's tensors are compared all at once, by Polygraphy: a probe would be a build.
2. *Does the graph compute the network?* The graph's tensors are compared with those of the FP32 graph of the same
   names. A node found here carries wrong weights, a lost value range, or more quantization error than any other.

Agreement is measured as a signal-to-noise ratio in dB: power of the expected tensor over power of the difference.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.errors import UsageError
from srdeploy.core.manifest import read_manifest
from srdeploy.core.onnx_file import GraphFile, read_graph
from srdeploy.core.onnx_graph import DEQUANTIZE, QUANTIZE
from srdeploy.core.precision import Precision
from srdeploy.core.progress import SILENT, Progress
from srdeploy.runtime.engines.literal import literal_tensors
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.runtime.verify.difference import snr_db
from srdeploy.runtime.verify.layerwise import tensorrt_snr

MODULE_KEY = "srdeploy.module"
"""Key of the node metadata in which the exporter keeps the PyTorch module's path."""

SIDE = 48
"""Largest side of the image that is computed, in input pixels: every tensor of it is held in memory."""

AGREEMENT_DB: dict[Precision, float] = {
    # What two correct computations of one graph reach. Quantized tensors differ where a value falls on the edge
    # between two codes: 35 to 45 dB are usual, and a wrong kernel stays below 15.
    Precision.FP32: 70.0,
    Precision.FP16: 35.0,
    Precision.BF16: 20.0,
    Precision.INT8: 24.0,
    Precision.FP8: 18.0,
}

_TENSORRT = ("tensorrt", "tensorrt-rtx")
"""Families whose tensors are compared all at once, by Polygraphy."""
_FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Suspect:
    """One node and how far its output is off.

    Attributes:
        node: name in the ONNX file.
        op: operator.
        module: path of the PyTorch module that it came from; "" for the network itself, None when not recorded.
        tensor: the output that was compared.
        snr_db: agreement of the output; -inf when it is not finite.
        inputs_snr_db: the worst agreement among its inputs; inf when they are exact.
    """

    node: str
    op: str
    module: str | None
    tensor: str
    snr_db: float
    inputs_snr_db: float


@dataclass(frozen=True)
class Bisection:
    """What was found.

    Attributes:
        blame: "engine" (it computes the graph wrongly), "graph" (it differs from the network), or "none".
        engine: whose computation was examined.
        first: the first node that differs; None when none does.
        suspects: the nodes that add most noise of their own relative to their signal, worst first ("graph" only).
        output_snr_db: agreement of the whole output between engine and graph.
        probes: number of tensors that the engine was asked for.
    """

    blame: Literal["engine", "graph", "none"]
    engine: str
    first: Suspect | None
    suspects: tuple[Suspect, ...]
    output_snr_db: float
    probes: int

    @property
    def sentence(self) -> str:
        """The finding as a sentence."""
        if self.first is None:
            return (
                f"{self.engine} computes the graph as it is written, and the graph agrees with the network node by node"
            )
        where = f"{self.first.node} ({self.first.op})"
        if self.first.module:
            where += f", PyTorch module {self.first.module}"
        numbers = f"{self.first.snr_db:.1f} dB signal to error"
        if self.blame == "engine":
            return (
                f"{self.engine} computes {where} wrongly: {numbers}, and its inputs agree; "
                "use another engine or another placement of Q/DQ there"
            )
        inputs = "exact" if self.first.inputs_snr_db == math.inf else f"{self.first.inputs_snr_db:.1f} dB"
        blame = f"{self.engine} computes the graph as it is written; the graph's error arises"
        return f"{blame} at {where}: {numbers}, inputs {inputs}"

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        return {**asdict(self), "sentence": self.sentence}


def bisect_path(
    path: Path,
    image: NDArray[np.float32],
    *,
    fp32: Callable[[], Path] | None = None,
    engine: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Bisection:
    """Find the first node that differs.

    Args:
        path: an ONNX file, or a TensorRT engine with its ONNX file next to it.
        image: (1, C, H, W) float32 in [0, 1], one on which the engine was found wrong; the middle of it is used.
        fp32: makes the FP32 ONNX file of the same checkpoint when it is needed; None leaves the second question out.
        engine: family that opens the file; None for onnxruntime.
        device: that the engine runs on: "auto", "cpu" or "cuda:N".
        threads: CPU threads.
        progress: receives a note about every probe.

    Raises:
        UsageError: a built engine that is not TensorRT's, or its ONNX file is not found.
        InputError: the file is not understood.
        CapabilityError: the layers of a TensorRT engine are compared on a GPU, and there is none.
    """
    if path.suffix != ".onnx":
        path, engine = _graph_of_engine(path)
    graph = read_graph(path)
    small = middle(image, SIDE)
    tensors = _comparable(graph)
    name = engine or "onnxruntime"
    expected = literal_tensors(graph, {INPUT: small}, tensors)
    options: dict[str, Any] = {"engine": engine, "device": device, "threads": threads, "parity": True}
    if name in _TENSORRT:
        known = tensorrt_snr(graph, small, tensors, engine=name, device=device)
        tensors = [tensor for tensor in tensors if tensor in known]
        shared = {tensor: expected[tensor] for tensor in tensors}
        search = _EngineSearch(graph, small, shared, options, progress)
        search.found.update(known)
    else:
        search = _EngineSearch(graph, small, expected, options, progress)
    output_snr = search.snr(OUTPUT)
    first = search.first(tensors) if output_snr < search.threshold else None
    if first is not None:
        return Bisection("engine", name, first, (), output_snr, len(search.found))
    if fp32 is not None:
        suspects = _graph_suspects(graph, expected, read_graph(fp32()), small)
        if suspects:
            by_loss = sorted(suspects, key=_added_noise, reverse=True)
            start = suspects[0] if graph.contract.precision is Precision.FP32 else by_loss[0]
            return Bisection("graph", name, start, tuple(by_loss[:5]), output_snr, len(search.found))
    return Bisection("none", name, None, (), output_snr, len(search.found))


def _graph_of_engine(path: Path) -> tuple[Path, str]:
    """Return the ONNX file that a TensorRT engine was built from, and the engine's family.

    Raises:
        UsageError: another engine, or the ONNX file is not next to it (or in the folder above, as in bundles).
    """
    manifest = read_manifest(path)
    family = str(manifest.details.get("engine"))
    source = manifest.sources[0]
    if family in _TENSORRT:
        for folder in (path.parent, path.parent.parent):
            candidate = folder / source.name
            if candidate.is_file() and read_graph(candidate).sha256 == source.sha256:
                return candidate, family
    raise UsageError(
        f"{path} is a built engine without inner tensors",
        expected=f"the ONNX file {source.name} that it was built from"
        + (" next to it" if family in _TENSORRT else f", with --engine {family}"),
    )


def middle(image: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Return the middle of (N, C, H, W), at most `side` pixels per axis."""
    height, width = image.shape[2:]
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return np.ascontiguousarray(image[:1, :, top : top + side, left : left + side])


def channels_fitted(expected: NDArray[np.float32], actual: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `actual` (N, C, ...) with each channel multiplied by the factor that brings it nearest to `expected`."""
    if expected.shape != actual.shape or actual.ndim != 4 or not np.isfinite(actual).all():
        return actual
    axes = (0, 2, 3)
    power = np.square(actual.astype(np.float64)).sum(axis=axes, keepdims=True)
    product = (actual.astype(np.float64) * expected).sum(axis=axes, keepdims=True)
    factors = np.divide(product, power, out=np.ones_like(power), where=power > 0)
    fitted: NDArray[np.float32] = (actual * factors).astype(np.float32)
    return fitted


class _EngineSearch:
    """Asks an engine for single tensors and remembers the answers."""

    def __init__(
        self,
        graph: GraphFile,
        image: NDArray[np.float32],
        expected: Mapping[str, NDArray[np.float32]],
        options: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        self._graph = graph
        self._image = image
        self._expected = expected
        self._options = options
        self._progress = progress
        self.threshold = AGREEMENT_DB[graph.contract.precision]
        self.found: dict[str, float] = {}

    def snr(self, tensor: str) -> float:
        """Return the agreement of one tensor, computed with nothing but it and the output asked for."""
        if tensor not in self.found:
            outputs = None if tensor == OUTPUT else [tensor]
            with ExitStack() as stack:
                runner = stack.enter_context(open_engine(self._graph.path, outputs=outputs, **self._options))
                actual = runner.run({INPUT: self._image})[tensor]
            expected, actual = self._expected[tensor], np.asarray(actual).astype(np.float32)
            if expected.shape == actual.shape:  # values that the graph itself overflows are no error of the engine
                overflowing = ~np.isfinite(expected) & ~np.isfinite(actual)
                expected, actual = (np.where(overflowing, np.float32(0), each) for each in (expected, actual))
            self.found[tensor] = snr_db(expected, actual)
            self._progress.note(f"  {tensor}: {self.found[tensor]:.1f} dB")
        return self.found[tensor]

    def first(self, tensors: Sequence[str]) -> Suspect | None:
        """Find a node whose output differs and whose inputs agree; `tensors` are in the order of the graph."""
        low, high = 0, len(tensors) - 1  # the last one, the output, is known to differ
        while low < high:
            guess = (low + high) // 2
            if self.snr(tensors[guess]) < self.threshold:
                high = guess
            else:
                low = guess + 1
        # Branches may hide a difference from bisection: walk back until all inputs agree.
        makers = {name: node for node in self._graph.model.graph.node for name in node.output}
        tensor = tensors[low]
        while True:
            sources = [name for name in _sources(makers[tensor], makers) if name in self._expected]
            wrong = next((name for name in sources if self.snr(name) < self.threshold), None)
            if wrong is None:
                inputs = min((self.snr(name) for name in sources), default=math.inf)
                return _suspect(makers[tensor], tensor, self.snr(tensor), inputs)
            tensor = wrong


def _comparable(graph: GraphFile) -> list[str]:
    """Return the floating-point tensors that depend on the input, in graph order; without casts and codes of Q/DQ."""
    types = graph.inferred[1]
    reached = {INPUT}
    names = []
    for node in graph.model.graph.node:
        if not reached.intersection(node.input):
            continue
        reached.update(node.output)
        # The output is compared in any case: in FP16 graphs a cast makes it.
        if node.op_type in (QUANTIZE, DEQUANTIZE, "Shape", "Cast") and OUTPUT not in node.output:
            continue
        names += [name for name in node.output if name == OUTPUT or types.get(name) in _FLOATS]
    return names


def _sources(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> list[str]:
    """Return the inputs of a node, looked up through Q, DQ and Cast to the tensors that were compared."""
    names = []
    for name in node.input:
        source = makers.get(name)
        while source is not None and source.op_type in (QUANTIZE, DEQUANTIZE, "Cast"):
            name = source.input[0]
            source = makers.get(name)
        names.append(name)
    return names


def _graph_suspects(
    graph: GraphFile, actual: Mapping[str, NDArray[np.float32]], plain: GraphFile, image: NDArray[np.float32]
) -> list[Suspect]:
    """Return the nodes at which a graph leaves the FP32 graph, in graph order."""
    shared = [name for name in _comparable(plain) if name in actual]
    expected = literal_tensors(plain, {INPUT: image}, shared)
    # Quantized graphs may have factors moved from one layer into the next (channel equalization): such a tensor is the
    # network's up to a factor per channel, and only what no factor explains is an error.
    quantized = graph.contract.precision in (Precision.INT8, Precision.FP8)
    fitted = {name: channels_fitted(expected[name], actual[name]) if quantized else actual[name] for name in shared}
    snr = {name: snr_db(expected[name], fitted[name]) for name in shared}
    makers = {name: node for node in graph.model.graph.node for name in node.output}
    threshold = AGREEMENT_DB[Precision.FP32]
    suspects = []
    for name in shared:
        if snr[name] >= threshold:
            continue
        inputs = min((snr[source] for source in _sources(makers[name], makers) if source in snr), default=math.inf)
        if snr[name] < inputs - 3.0:  # an error that only passes through loses nothing of its own
            suspects.append(_suspect(makers[name], name, snr[name], inputs))
    return suspects


def _added_noise(suspect: Suspect) -> float:
    """Noise power over signal power of the output, less that of the inputs; infinite for what is not finite."""
    if suspect.snr_db == -math.inf:
        return math.inf
    return float(10.0 ** (-suspect.snr_db / 10.0) - 10.0 ** (-suspect.inputs_snr_db / 10.0))


def _suspect(node: onnx.NodeProto, tensor: str, snr: float, inputs: float) -> Suspect:
    module = next((entry.value for entry in node.metadata_props if entry.key == MODULE_KEY), None)
    return Suspect(node.name, node.op_type, module, tensor, snr, inputs)
