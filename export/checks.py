"""Check an exported graph against the network it came from, with a tolerance that does not depend on the processor.

The reference is the network in float64. The eager FP32 network has an error of its own against it, which measures how
this network, with these weights, amplifies roundings. A graph computes the same sums in another order, so its error is
of the same size, on every processor: it may be `MULTIPLE` times as large, plus the rounding of the output itself. A
wrong weight, channel, pixel or border is larger by orders of magnitude (docs/export.md has the measurements).

A size of one pixel reveals wrong padding, sizes that are no multiple of anything reveal fixed sizes, batches of two
and three reveal a fixed batch. Inputs are noise of 8-bit levels: every tap of every kernel counts, nothing is smooth.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from srdeploy.core.contract import INPUT, OUTPUT, ModelContract
from srdeploy.core.errors import REPORT, ExportError
from srdeploy.core.extras import is_installed
from srdeploy.core.ort import cpu_session
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.shapes import Shape, format_shape
from srdeploy.core.tail import merge_tail

GRID = (((1, 1), (1, 2, 3)), ((1, 7), (1, 2, 3)), ((17, 22), (1, 2, 3)), ((64, 48), (1,)))
"""Height and width, and the batches that each size is computed with."""
MULTIPLE = 8.0
"""A graph's error over the eager FP32 network's own: in 300 random configurations of all dialects at most 1.99, and 4.3
with a merged end."""
OUTPUT_ROUNDING = 2.0**-24
"""Half the distance between neighboring FP32 numbers, relative to them: the last rounding of any FP32 output."""

Images = NDArray[np.float32]


@dataclass(frozen=True)
class Expected:
    """What the network gives for the images of one size.

    Attributes:
        images: (N, C, H, W) float32 in [0, 1], as many as the largest batch.
        batches: numbers of images to compute at once.
        output: of the network in float64, (N, C, H', W') on 0..1.
        peak: largest absolute value of `output`.
        network_error: largest absolute difference of the eager FP32 network from `output`.
    """

    images: Images
    batches: tuple[int, ...]
    output: NDArray[np.float64]
    peak: float
    network_error: float


@dataclass(frozen=True)
class Deviation:
    """How far the graph is from the network in float64 on one shape.

    Attributes:
        shape: of the input.
        max_abs: largest absolute difference.
        tolerance: largest allowed difference.
    """

    shape: Shape
    max_abs: float
    tolerance: float


@dataclass(frozen=True)
class GridCheck:
    """The comparison of a graph with its network on the grid of shapes.

    Attributes:
        evaluator: what computed the graph.
        deviations: per shape.
        network_error: the eager FP32 network's own error: the largest on any size, relative to the largest output.
        merged: the same comparison of the form in which engines on the CPU run the graph, with its linear end as one
            convolution (see core/tail.py); None where the end stays as it is.
    """

    evaluator: str
    deviations: tuple[Deviation, ...]
    network_error: float
    merged: "GridCheck | None" = None

    @property
    def max_abs(self) -> float:
        """The largest absolute difference on any shape."""
        return max(deviation.max_abs for deviation in self.deviations)

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return {
            "evaluator": self.evaluator,
            "reference": "the network in float64",
            "max_abs": self.max_abs,
            "network_error": self.network_error,
            "shapes": {format_shape(entry.shape): entry.max_abs for entry in self.deviations},
            "tolerances": {format_shape(entry.shape): entry.tolerance for entry in self.deviations},
            "merged_end_max_abs": None if self.merged is None else self.merged.max_abs,
        }


def check_structure(path: Path) -> None:
    """Run the ONNX checker with strict shape inference on a file.

    Raises:
        ExportError: the graph is not valid ONNX, or its shapes contradict each other.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid: {error}", next_step=REPORT) from error


def check_against_network(
    path: Path, reference: nn.Module, contract: ModelContract, *, progress: Progress = SILENT
) -> GridCheck:
    """Compare a graph, and its form with a merged end, with its network on the grid of sizes and batches.

    Args:
        path: the ONNX file.
        reference: (N, C, H, W) in 0..1 to (N, C, H', W') on 0..1, evaluation mode, FP32.
        contract: what the graph promises: channels, scale, trim, minimum size.
        progress: where to report.

    Raises:
        ExportError: a shape of the output is wrong, a value is not finite, or a difference is above the tolerance.
    """
    expected = expected_of(reference, contract, progress=progress)
    check = check_against_expected(path, expected, contract)
    merged, names = merge_tail(onnx.load(path))
    return replace(check, merged=check_against_expected(merged, expected, contract)) if names else check


def expected_of(reference: nn.Module, contract: ModelContract, *, progress: Progress = SILENT) -> tuple[Expected, ...]:
    """Compute a network on the grid of sizes, in float64 and in FP32.

    Raises:
        ExportError: an output has the wrong shape, or values that are not finite.
    """
    random = np.random.default_rng(0)
    minimum = contract.min_size
    sizes = {(max(height, minimum), max(width, minimum)): batches for (height, width), batches in GRID}
    exact = copy.deepcopy(reference).double()
    expected = []
    with progress.task("computing the network in float64", total=len(sizes)) as advance, torch.inference_mode():
        for (height, width), batches in sizes.items():
            # The images of a batch do not see each other in an evaluated network: one pass serves every batch.
            images = (random.integers(0, 256, (max(batches), contract.channels, height, width)) / 255).astype(
                np.float32
            )
            tensor = torch.from_numpy(images)
            eager, output = reference(tensor).numpy(), exact(tensor.double()).numpy()
            _check_output(eager, images.shape, contract, "network")
            error = float(np.abs(eager - output).max())
            expected.append(Expected(images, batches, output, float(np.abs(output).max()), error))
            advance(note=format_shape(images.shape))
    return tuple(expected)


def check_against_expected(
    graph: Path | onnx.ModelProto, expected: tuple[Expected, ...], contract: ModelContract
) -> GridCheck:
    """Compare a graph, a file or in memory, with what its network gave, see `check_against_network`."""
    evaluator, evaluate = _evaluator(graph)
    # One figure for the whole grid: a size of a few pixels has too few outputs to show the largest rounding.
    network_error = max(entry.network_error / entry.peak if entry.peak else 0.0 for entry in expected)
    deviations = []
    for entry in expected:
        tolerance = (MULTIPLE * network_error + OUTPUT_ROUNDING) * entry.peak
        for batch in entry.batches:
            deviations.append(_deviation(evaluate, entry.images[:batch], entry.output[:batch], tolerance, contract))
    return GridCheck(evaluator, tuple(deviations), network_error)


def _deviation(
    evaluate: Callable[[Images], Images],
    images: Images,
    expected: NDArray[np.float64],
    tolerance: float,
    contract: ModelContract,
) -> Deviation:
    n, c, h, w = images.shape
    where = f"on an input of {format_shape(images.shape)}"
    try:
        actual = evaluate(images)
    except Exception as error:  # whatever the evaluator raises: the graph does not run
        raise ExportError(f"the exported graph fails {where}: {error}", next_step=REPORT) from error
    _check_output(actual, images.shape, contract, "graph")
    max_abs = float(np.abs(actual - expected).max())
    if max_abs > tolerance:
        raise ExportError(
            f"the exported graph differs from the network by {max_abs:.3g} {where}",
            expected=f"at most {tolerance:.3g}, {MULTIPLE:g} times the FP32 network's own error against float64",
            next_step=REPORT,
        )
    return Deviation((n, c, h, w), max_abs, tolerance)


def _check_output(output: NDArray[Any], shape: tuple[int, ...], contract: ModelContract, name: str) -> None:
    where = f"on an input of {format_shape(shape)}"
    promised = contract.output_shape(shape)
    if output.shape != promised:
        raise ExportError(f"the {name} gives {format_shape(output.shape)} {where}", expected=format_shape(promised))
    if not np.isfinite(output).all():
        raise ExportError(
            f"the {name} gives values that are not finite {where}",
            next_step="check the weights with: srdeploy inspect CHECKPOINT",
        )


def _evaluator(graph: Path | onnx.ModelProto) -> tuple[str, Callable[[Images], Images]]:
    """Return what computes the graph: ONNX Runtime, or ONNX's own slow reference if that is not installed."""
    if is_installed("onnxruntime"):
        import onnxruntime

        session = cpu_session(graph)
        return f"onnxruntime {onnxruntime.__version__}", lambda images: session.run([OUTPUT], {INPUT: images})[0]
    from onnx.reference import ReferenceEvaluator

    reference = ReferenceEvaluator(str(graph) if isinstance(graph, Path) else graph)

    def evaluate(images: Images) -> Images:
        outputs = reference.run([OUTPUT], {INPUT: images})
        assert isinstance(outputs, list)
        return np.asarray(outputs[0], dtype=np.float32)

    return f"onnx.reference {onnx.__version__}", evaluate
