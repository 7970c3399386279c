"""RGB and YCbCr of BT.601 in studio swing: the luma that super-resolution is trained and evaluated on.

Here Y' runs from 16/255 to 235/255 and Cb, Cr from 16/255 to 240/255 when R, G, B run from 0 to 1. It is not the luma
of JPEG (0.299, 0.587, 0.114 without offset): a PSNR on that one is about 1.3 dB lower.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Float = TypeVar("Float", np.float32, np.float64)

_Y = (65.481, 128.553, 24.966)
_CB = (-37.797, -74.203, 112.0)
_CR = (112.0, -93.786, -18.214)
_OFFSET = (16.0, 128.0, 128.0)


def y_from_rgb(rgb: NDArray[Float]) -> NDArray[Float]:
    """Return the luma of an RGB image.

    Args:
        rgb: (..., 3) floats in [0, 1], channels last.

    Returns:
        (...) of the same type, Y in 16/255..235/255. Not rounded.
    """
    _check(rgb)
    dtype = rgb.dtype.type
    red, green, blue = (dtype(weight / 255.0) for weight in _Y)
    luma: NDArray[Float] = rgb[..., 0] * red + rgb[..., 1] * green + rgb[..., 2] * blue + dtype(_OFFSET[0] / 255.0)
    return luma


def ycbcr_from_rgb(rgb: NDArray[Float]) -> NDArray[Float]:
    """Convert (..., 3) RGB floats in [0, 1] to Y, Cb, Cr in studio swing over 255, channels last, not clamped."""
    _check(rgb)
    matrix = np.array([_Y, _CB, _CR]) / 255.0
    result: NDArray[Float] = rgb @ matrix.T.astype(rgb.dtype) + (np.array(_OFFSET) / 255.0).astype(rgb.dtype)
    return result


def rgb_from_ycbcr(ycbcr: NDArray[Float]) -> NDArray[Float]:
    """Convert back: the inverse of `ycbcr_from_rgb`, not clamped (some YCbCr triples lie outside RGB)."""
    _check(ycbcr)
    inverse = np.linalg.inv(np.array([_Y, _CB, _CR]) / 255.0)
    offset = (np.array(_OFFSET) / 255.0).astype(ycbcr.dtype)
    result: NDArray[Float] = (ycbcr - offset) @ inverse.T.astype(ycbcr.dtype)
    return result


def _check(image: NDArray[Float]) -> None:
    if image.dtype not in (np.float32, np.float64) or image.ndim < 1 or image.shape[-1] != 3:
        raise ValueError(f"{image.dtype} image of shape {image.shape}; expected floats of shape (..., 3)")
