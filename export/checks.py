"""Prove an exported graph against the network it came from, on sizes that catch what an example input hides.

A size of one pixel shows wrong padding, sizes that are no multiple of anything show fixed sizes, batches of two and
three show a fixed batch. Inputs are noise of 8-bit levels: every tap of every kernel counts, and nothing is smooth.

The tolerance is 1e-5 on 0..1, four hundred times below one 8-bit level: FP32 engines add in other orders, which costs
about 1e-6. A network that leaves 0..1 (one with random weights) has larger numbers and so larger roundings; there the
tolerance is 1e-5 of the largest absolute value that the network gives for that input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from srdeploy.core.contract import INPUT, OUTPUT, ModelContract
from srdeploy.core.errors import ExportError
from srdeploy.core.extras import is_installed
from srdeploy.core.ort import cpu_session
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.shapes import Shape, format_shape

SIZES = ((1, 1), (1, 7), (17, 22), (64, 48))
BATCHES = (1, 2, 3)
TOLERANCE = 1e-5

Images = NDArray[np.float32]


@dataclass(frozen=True)
class Deviation:
    """How far the graph is from the network on one shape.

    Attributes:
        shape: of the input.
        max_abs: largest absolute difference.
        tolerance: what was allowed.
    """

    shape: Shape
    max_abs: float
    tolerance: float


@dataclass(frozen=True)
class GridCheck:
    """The comparison of a graph with its network on the grid of shapes."""

    evaluator: str
    deviations: tuple[Deviation, ...]

    @property
    def max_abs(self) -> float:
        """The largest absolute difference on any shape."""
        return max(deviation.max_abs for deviation in self.deviations)

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return {
            "evaluator": self.evaluator,
            "max_abs": self.max_abs,
            "shapes": {format_shape(entry.shape): entry.max_abs for entry in self.deviations},
        }


def check_structure(path: Path) -> None:
    """Run the ONNX checker with strict shape inference on a file.

    Raises:
        ExportError: the graph is not valid ONNX, or its shapes contradict each other.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported graph is not valid: {error}", next_step="please report this") from error


def check_against_network(
    path: Path, reference: nn.Module, contract: ModelContract, *, progress: Progress = SILENT
) -> GridCheck:
    """Compare a graph with its network on the grid of sizes and batches.

    Args:
        path: the ONNX file.
        reference: (N, C, H, W) in 0..1 to (N, C, H', W') on 0..1, evaluation mode.
        contract: what the graph promises: channels, scale, trim, least size.
        progress: where to report.

    Raises:
        ExportError: a shape of the output is wrong, a value is not finite, or a difference is above the tolerance.
    """
    evaluator, evaluate = _evaluator(path)
    random = np.random.default_rng(0)
    deviations = []
    least = contract.min_size
    sizes = list(dict.fromkeys((max(height, least), max(width, least)) for height, width in SIZES))
    with progress.task("comparing the graph with the network", total=len(sizes) * len(BATCHES)) as advance:
        for height, width in sizes:
            shape = (max(BATCHES), contract.channels, height, width)
            images = (random.integers(0, 256, shape) / 255).astype(np.float32)
            # The images of a batch do not see each other in an evaluated network: one pass serves every batch.
            with torch.inference_mode():
                expected = reference(torch.from_numpy(images)).numpy()
            for batch in BATCHES:
                deviations.append(_deviation(evaluate, images[:batch], expected[:batch], contract))
                advance(note=format_shape(deviations[-1].shape))
    return GridCheck(evaluator, tuple(deviations))


def _deviation(
    evaluate: Callable[[Images], Images], images: Images, expected: Images, contract: ModelContract
) -> Deviation:
    n, c, h, w = images.shape
    where = f"on an input of {format_shape((n, c, h, w))}"
    try:
        actual = evaluate(images)
    except Exception as error:  # whatever the evaluator raises: the graph does not run
        raise ExportError(f"the exported graph fails {where}: {error}", next_step="please report this") from error
    wanted = contract.output_shape(images.shape)
    for name, output in (("graph", actual), ("network", expected)):
        if output.shape != wanted:
            raise ExportError(f"the {name} gives {format_shape(output.shape)} {where}", expected=format_shape(wanted))
        if not np.isfinite(output).all():
            raise ExportError(
                f"the {name} gives values that are not finite {where}", next_step="check the weights with inspect"
            )
    tolerance = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    max_abs = float(np.abs(actual - expected).max())
    if max_abs > tolerance:
        raise ExportError(
            f"the exported graph differs from the network by {max_abs:.3g} {where}",
            expected=f"at most {tolerance:.3g}",
            next_step="please report this with the checkpoint's family",
        )
    return Deviation((n, c, h, w), max_abs, tolerance)


def _evaluator(path: Path) -> tuple[str, Callable[[Images], Images]]:
    """Return what computes the graph: ONNX Runtime, or ONNX's own slow reference where that is not installed."""
    if is_installed("onnxruntime"):
        import onnxruntime

        session = cpu_session(path)
        return f"onnxruntime {onnxruntime.__version__}", lambda images: session.run([OUTPUT], {INPUT: images})[0]
    from onnx.reference import ReferenceEvaluator

    reference = ReferenceEvaluator(str(path))

    def evaluate(images: Images) -> Images:
        outputs = reference.run([OUTPUT], {INPUT: images})
        assert isinstance(outputs, list)
        return np.asarray(outputs[0], dtype=np.float32)

    return f"onnx.reference {onnx.__version__}", evaluate
