"""The arithmetic of 8-bit numbers, as functions of arrays: nothing here knows about graphs."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["int8", "uint8", "float8e4m3fn"]

FP8_MAX = 448.0
"""Largest finite E4M3 number."""

WEIGHT_TOPS = {8: 127, 7: 64}
"""Largest code of a weight by its bits. Two products of a uint8 activation and a 7-bit weight fit in 16 bits together
(2 * 255 * 64 = 32640), which is what processors without VNNI add them in."""

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
        return np.asarray(round_to_e4m3(scaled) * params.scale, dtype=np.float64)
    bottom, top = _LIMITS[params.kind]
    codes = np.clip(np.rint(scaled) + params.zero_point, bottom, top)
    result: NDArray[np.float64] = (codes - params.zero_point) * params.scale
    return result


def round_to_e4m3(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Round to the nearest E4M3 number (3 bits of mantissa, least normal exponent -6), saturating at 448."""
    values = np.clip(np.asarray(values, dtype=np.float64), -FP8_MAX, FP8_MAX)
    exponent = np.floor(np.log2(np.maximum(np.abs(values), 2.0**-9)))
    step = 2.0 ** (np.maximum(exponent, -6) - 3)
    result: NDArray[np.float64] = np.clip(np.rint(values / step) * step, -FP8_MAX, FP8_MAX)
    return result


def weight_scales(weights: NDArray[np.float32], axis: int, bits: int = 8) -> NDArray[np.float32]:
    """Return one symmetric scale per output channel, (out,), such that its largest weight is code 127 (7 bits: 64).

    Clipping weights for the least squared error was tried and changed nothing at 8 bits (docs/quantization.md).
    """
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    scales: NDArray[np.float32] = (np.maximum(np.abs(rows).max(axis=1), 1e-12) / WEIGHT_TOPS[bits]).astype(np.float32)
    return scales


def quantize_weights(weights: NDArray[np.float32], scales: NDArray[np.float32], axis: int) -> NDArray[np.int8]:
    """Round weights to int8 codes with one scale per output channel; -128 is not used, so that negation is exact."""
    shape = [1] * weights.ndim
    shape[axis] = -1
    codes = np.rint(weights.astype(np.float64) / scales.astype(np.float64).reshape(shape))
    return np.clip(codes, -127, 127).astype(np.int8)
