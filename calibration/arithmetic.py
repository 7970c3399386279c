"""The arithmetic of 8-bit numbers, as functions of arrays: nothing here knows about graphs."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["int8", "uint8", "float8e4m3fn"]

FP8_MAX = 448.0
"""Largest finite E4M3 number."""

_LIMITS: dict[str, tuple[int, int]] = {"int8": (-128, 127), "uint8": (0, 255)}


@dataclass(frozen=True)
class QuantParams:
    """How one activation tensor is quantized: q = clip(round(x / scale) + zero_point).

    Attributes:
        kind: the 8-bit type.
        scale: step in units of the tensor.
        zero_point: the code of 0.0; always 0 for symmetric int8 and for FP8.
    """

    kind: Kind
    scale: float
    zero_point: int = 0

    @property
    def low(self) -> float:
        """Smallest value that is represented."""
        return (
            -FP8_MAX * self.scale
            if self.kind == "float8e4m3fn"
            else self.scale * (_LIMITS[self.kind][0] - self.zero_point)
        )

    @property
    def high(self) -> float:
        """Largest value that is represented."""
        return (
            FP8_MAX * self.scale
            if self.kind == "float8e4m3fn"
            else self.scale * (_LIMITS[self.kind][1] - self.zero_point)
        )


def params_for_range(low: float, high: float, kind: Kind) -> QuantParams:
    """Return parameters that cover [low, high] and represent 0.0 exactly (zero padding must stay zero).

    uint8 uses the range as it is; int8 and FP8 are symmetric, the only form that every TensorRT accepts.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    largest = max(-low, high, 1e-12)
    if kind == "float8e4m3fn":
        return QuantParams(kind, float(np.float32(largest / FP8_MAX)))
    if kind == "int8":
        return QuantParams(kind, float(np.float32(largest / 127)))
    scale = float(np.float32(max(high - low, 1e-12) / 255))
    return QuantParams(kind, scale, int(np.clip(round(-low / scale), 0, 255)))


def fake_quantize(values: NDArray[np.floating], params: QuantParams) -> NDArray[np.float64]:
    """Quantize and dequantize: what a Q/DQ pair does to a tensor."""
    scaled = np.asarray(values, dtype=np.float64) / params.scale
    if params.kind == "float8e4m3fn":
        return round_to_e4m3(scaled) * params.scale
    bottom, top = _LIMITS[params.kind]
    codes = np.clip(np.rint(scaled) + params.zero_point, bottom, top)
    return (codes - params.zero_point) * params.scale


def round_to_e4m3(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Round to the nearest E4M3 number (3 bits of mantissa, least normal exponent -6), saturating at 448."""
    values = np.clip(np.asarray(values, dtype=np.float64), -FP8_MAX, FP8_MAX)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-9)))
    step = 2.0 ** (np.maximum(exponent, -6) - 3)
    return np.clip(np.rint(values / step) * step, -FP8_MAX, FP8_MAX)


def weight_scales(weights: NDArray[np.float32], axis: int, *, search: bool = False) -> NDArray[np.float32]:
    """Return one symmetric int8 scale per output channel.

    Args:
        weights: the layer's weights.
        axis: the axis of output channels.
        search: look for the clipping that gives the least squared error, instead of covering the largest weight.

    Returns:
        (out,) float32, all positive.
    """
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1).astype(np.float64)
    largest = np.maximum(np.abs(rows).max(axis=1), 1e-12)
    best = largest / 127
    if not search:
        return best.astype(np.float32)
    least = _row_errors(rows, best)
    for factor in np.linspace(0.98, 0.6, 20):
        scales = largest * factor / 127
        errors = _row_errors(rows, scales)
        better = errors < least
        best, least = np.where(better, scales, best), np.where(better, errors, least)
    return best.astype(np.float32)


def quantize_weights(weights: NDArray[np.float32], scales: NDArray[np.float32], axis: int) -> NDArray[np.int8]:
    """Round weights to int8 codes with one scale per output channel; -128 is not used, so that negation is exact."""
    shape = [1] * weights.ndim
    shape[axis] = -1
    codes = np.rint(weights.astype(np.float64) / scales.astype(np.float64).reshape(shape))
    return np.clip(codes, -127, 127).astype(np.int8)


def _row_errors(rows: NDArray[np.float64], scales: NDArray[np.float64]) -> NDArray[np.float64]:
    steps = scales[:, None]
    rounded = np.clip(np.rint(rows / steps), -127, 127) * steps
    errors: NDArray[np.float64] = ((rows - rounded) ** 2).sum(axis=1)
    return errors
