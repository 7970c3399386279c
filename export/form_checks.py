"""Check a graph in another form against the plain graph that it was made from and the product's own arithmetic.

What the form adds is computed here as `upscale` computes it: pictures over 255, luma and bicubic chroma of BT.601,
clamping, rounding half to even. The network itself was compared with PyTorch when it was exported.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from srdeploy.core.contract import INPUT, OUTPUT, GraphForm
from srdeploy.core.errors import REPORT, ExportError
from srdeploy.core.imaging.colour import rgb_from_ycbcr, y_from_rgb, ycbcr_from_rgb
from srdeploy.core.imaging.read import quantized
from srdeploy.core.imaging.resize import imresize
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.onnx_graph import DEQUANTIZE, add_outputs
from srdeploy.core.ort import Arithmetic, cpu_session
from srdeploy.core.shapes import Shape, format_shape
from srdeploy.export.forms import LUMA

TOLERANCE = 1e-5
"""Largest difference of float values, relative to the largest output: a 400th of an 8-bit level."""
_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_SIZES = ((1, 1, 7), (2, 17, 22))
"""Batch, height and width of the images that a graph of free sizes is checked on."""


@dataclass(frozen=True)
class FormCheck:
    """The comparison of a graph in another form with its plain graph.

    Attributes:
        max_abs: by shape, the largest absolute difference of the output: of values in 0..1, or in levels for uint8.
        tolerance: largest allowed difference of floats, relative to the largest output; uint8 has to be equal, except
            behind a color wrapper, where a value at the border between two levels may be rounded to the other.
    """

    max_abs: dict[str, float]
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """Return the check as JSON values."""
        return {"reference": "the plain graph", "shapes": dict(self.max_abs), "tolerance": self.tolerance}


def check_against_plain(formed: GraphFile, plain: GraphFile) -> FormCheck:
    """Compute both graphs with ONNX Runtime on noise of 8-bit levels and compare them.

    Raises:
        ExportError: a shape is wrong, or a difference is above the tolerance.
        MissingExtraError: onnxruntime is not installed.
    """
    contract = formed.contract
    inner = [LUMA] if contract.form.color_wrapper else []
    # ONNX Runtime computes half-precision nodes in float32 and drops pairs of casts between them, which ones depends on
    # their neighbors. Where sizes are known it fuses other nodes, and a last-bit difference in front of a quantizer
    # becomes a step. Node by node, as the graphs are written, both compute the same.
    rounds = any(tensor.data_type in _HALF for tensor in plain.initializers.values()) or any(
        node.op_type == DEQUANTIZE for node in plain.model.graph.node
    )
    arithmetic: Arithmetic = "literal" if rounds else "optimized"
    session = cpu_session(add_outputs(formed.model, inner), arithmetic=arithmetic, name=f"a form of {plain.path.name}")
    reference = cpu_session(plain.model, arithmetic=arithmetic, name=str(plain.path))
    random = np.random.default_rng(0)
    found: dict[str, float] = {}
    for shape in _shapes(formed):
        levels = random.integers(0, 256, shape, dtype=np.uint8)
        images = levels.astype(np.float32) / np.float32(255)
        feed = levels if contract.form.io == "uint8" else images
        output, *luma = session.run([OUTPUT, *inner], {INPUT: feed})
        # The network reads the luma of the graph: a quantized network may answer a last-bit difference with a step.
        network_input = _checked_luma(images, luma[0]) if inner else images
        (network_output,) = reference.run([OUTPUT], {INPUT: network_input})
        expected = _expected(images, network_output, contract.form, contract.scale, contract.trim)
        found[format_shape(shape)] = _difference(output, expected, contract.form, format_shape(shape))
    return FormCheck(found, TOLERANCE)


def _shapes(formed: GraphFile) -> tuple[Shape, ...]:
    contract = formed.contract
    if contract.form.shape is not None:
        return (contract.form.shape,)
    low = contract.min_size
    return tuple((batch, contract.channels, max(low, height), max(low, width)) for batch, height, width in _SIZES)


def _checked_luma(images: NDArray[np.float32], luma: NDArray[np.float32]) -> NDArray[np.float32]:
    expected = y_from_rgb(images.transpose(0, 2, 3, 1).astype(np.float64))[:, None]
    if luma.shape != expected.shape or np.abs(luma - expected).max() > TOLERANCE:
        raise ExportError("the graph's luma differs from BT.601", next_step=REPORT)
    return luma


def _expected(
    images: NDArray[np.float32], network_output: NDArray[np.float32], form: GraphForm, scale: int, trim: int
) -> NDArray[Any]:
    """Return what the form is to return: (N, C, H', W'), of its element type."""
    output = network_output
    if form.color_wrapper:
        height, width = (scale * size - trim for size in images.shape[2:])
        pictures = images.transpose(0, 2, 3, 1).astype(np.float64)  # (N, H, W, 3)
        chroma = np.stack([imresize(ycbcr_from_rgb(each)[..., 1:], scale=scale) for each in pictures])
        ycbcr = np.concatenate([output.transpose(0, 2, 3, 1), chroma[:, :height, :width].astype(np.float32)], axis=3)
        output = np.ascontiguousarray(rgb_from_ycbcr(ycbcr).transpose(0, 3, 1, 2))
    if form.io == "uint8":
        return np.stack([quantized(each, np.uint8).transpose(2, 0, 1) for each in output])
    return output


def _difference(output: NDArray[Any], expected: NDArray[Any], form: GraphForm, shape: str) -> float:
    if output.shape != expected.shape or output.dtype != expected.dtype:
        raise ExportError(
            f"the graph returns {output.dtype} {format_shape(output.shape)} on an input of {shape}",
            expected=f"{expected.dtype} {format_shape(expected.shape)}",
            next_step=REPORT,
        )
    difference = float(np.abs(output.astype(np.float64) - expected).max())
    allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if form.io == "uint8":
        allowed = 1.0 if form.color_wrapper else 0.0
    if difference > allowed:
        raise ExportError(
            f"the graph differs from its plain form by {difference:.3g} on an input of {shape}",
            expected=f"at most {allowed:.3g}",
            next_step=REPORT,
        )
    return difference
