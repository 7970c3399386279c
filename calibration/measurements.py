"""What is measured of one FP32 graph on one calibration set, for all graphs that are made from it.

A search builds dozens of quantized graphs, and `deploy` makes several for one network. All of them need the same passes
over the images: activation ranges, covariances of what layers read, and the FP32 graph's own outputs. They are taken
once and kept here. Pass one `Measurements` to several calls of `quantize` to share them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.int8.placement import RECIPES, list_plain_convolutions, list_quantizable
from srdeploy.calibration.int8.rounding import Covariances, collect_covariances, covariance_bytes
from srdeploy.calibration.journal import Journal
from srdeploy.calibration.observe import Observation, observe
from srdeploy.calibration.rewrites.streams import reader_scales_of
from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.onnx_graph import Graph, Layer
from srdeploy.core.ort import cpu_session
from srdeploy.core.precision import Precision, Target
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.samples import Sample

MAX_COVARIANCE_BYTES = 1 << 30
"""Covariances are kept for other graphs up to this size."""


class Measurements:
    """Results of passes over the images, by what decides them.

    Args:
        targets: the CPU targets that graphs will be made for: one pass then serves all of them.
    """

    def __init__(self, targets: Sequence[Target] = ()) -> None:
        self._targets = tuple(targets)
        self._observations: dict[str, dict[str, Observation]] = {}
        self._covariances: dict[str, dict[str, Covariances]] = {}
        self._outputs: dict[str, NDArray[np.float32]] = {}

    def observations(
        self,
        key: str,
        graph: Graph,
        tensors: Sequence[str],
        calibration: CalibrationSet,
        *,
        precision: Precision,
        journal: Journal | None = None,
        progress: Progress = SILENT,
    ) -> dict[str, Observation]:
        """Return what was observed of tensors of a float graph whose readers' scales are 1.

        Args:
            key: names the source of the graph, its rewrites and the calibration set: tensors of the same name are equal
                in all graphs of one key.
            graph: the float graph.
            tensors: names of activations.
            calibration: the images.
            precision: INT8 or FP8.
            journal: remembers the pass for an interrupted run.
            progress: where to report.

        Raises:
            InputError: an activation is NaN or infinite.
        """
        known = self._observations.setdefault(key, {})
        sources = {tensor: _unscaled(graph, tensor) for tensor in tensors}
        missing = [name for name in dict.fromkeys(sources.values()) if name not in known]
        if missing:
            others = (
                _unscaled(graph, tensor)
                for target in self._targets
                for tensor in list_quantizable(graph, RECIPES[target], precision)
            )
            wanted = [name for name in dict.fromkeys([*missing, *others]) if name not in known]

            def collect() -> dict[str, Observation]:
                return observe(graph, wanted, calibration, count=len(calibration), progress=progress)

            found = journal.observations("0.0", collect) if journal else collect()
            known |= found if set(found).issuperset(wanted) else collect()
        return {tensor: known[source] for tensor, source in sources.items()}

    def covariances(
        self,
        key: str,
        graph: Graph,
        layers: Sequence[Layer],
        batches: Sequence[NDArray[np.float32]],
        *,
        precision: Precision,
        progress: Progress = SILENT,
    ) -> Mapping[str, Covariances]:
        """Return, per tensor and kernel (see `covariance_key`), the covariances of the windows that layers read.

        Args:
            key: as for `observations`.
            graph: a float graph whose readers' scales are 1.
            layers: plain convolutions of it.
            batches: small images (1, C, H, W).
            precision: INT8 or FP8.
            progress: where to report.
        """
        known = self._covariances.setdefault(key, {})
        missing = [layer for layer in layers if _covariance_key(graph, layer) not in known]
        found = dict(known)
        if missing:
            others = [
                layer
                for target in self._targets
                for layer in list_plain_convolutions(graph, RECIPES[target], precision)
                if _covariance_key(graph, layer) not in known
            ]
            distinct = {_covariance_key(graph, layer): layer for layer in [*missing, *others]}
            for layer, covariances in collect_covariances(graph, list(distinct.values()), batches, progress=progress):
                found[_covariance_key(graph, layer)] = covariances
            if covariance_bytes(found.values()) <= MAX_COVARIANCE_BYTES:
                self._covariances[key] = found
        return {layer.name: found[_covariance_key(graph, layer)] for layer in layers}

    def reference_outputs(
        self, key: str, model: onnx.ModelProto, samples: Sequence[Sample]
    ) -> list[NDArray[np.float32]]:
        """Return the float graph's output for each sample.

        Args:
            key: names the network: rewrites are exact, so graphs of one network have one output.
            model: the float graph.
            samples: of one set; `Sample` objects are told apart by name, shape and contents.
        """
        names = [f"{key}:{sample.name}:{sample.image.shape}:{hash(sample.image.tobytes())}" for sample in samples]
        if not all(name in self._outputs for name in names):
            session = cpu_session(model, arithmetic="float")
            for name, sample in zip(names, samples, strict=True):
                if name not in self._outputs:
                    self._outputs[name] = session.run([OUTPUT], {INPUT: sample.image})[0]
        return [self._outputs[name] for name in names]


def _unscaled(graph: Graph, tensor: str) -> str:
    """Return the stream behind a reader's scales: while the scales are 1, the values are the same."""
    node = graph.producer.get(tensor)
    return str(node.input[0]) if node is not None and reader_scales_of(node) is not None else tensor


def _covariance_key(graph: Graph, layer: Layer) -> str:
    height, width = graph.initializers[layer.weight].dims[2:]
    return f"{_unscaled(graph, layer.input)}:{height}x{width}"
