"""YUV to RGB and back: H.273 matrices and ranges, rounded."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Numbers of the H.273 color tables, as FFmpeg uses them.
BT709, UNSPECIFIED, FCC, BT470BG, SMPTE170M, SMPTE240M, BT2020 = 1, 2, 4, 5, 6, 7, 9
MPEG, JPEG = 1, 2
SWSCALE_MATRIX = {BT709: 1, FCC: 4, BT470BG: 5, SMPTE170M: 5, SMPTE240M: 7, BT2020: 9}
LUMA_WEIGHTS = {
    BT709: (0.2126, 0.0722), FCC: (0.30, 0.11), BT470BG: (0.299, 0.114), SMPTE170M: (0.299, 0.114),
    SMPTE240M: (0.212, 0.087), BT2020: (0.2627, 0.0593),
}  # fmt: skip
"""Red and blue in luma, by matrix."""


def yuv_from_rgb(pixels: NDArray[Any], matrix: int, *, full_range: bool, bits: int) -> NDArray[Any]:
    """Convert RGB to YUV, rounded. swscale is as exact for 8 bits of limited range only.

    It truncates full-range chroma, half a step too low on average, and is off by up to four steps of 10 bits.

    Args:
        pixels: (H, W, 3) uint8 or uint16.
        matrix: H.273 number.
        full_range: Y, U and V use all values.
        bits: of the result.

    Returns:
        (3, H, W) uint8, or uint16 for more than 8 bits.
    """
    rows, offsets = _yuv_arithmetic(matrix, full_range, bits)
    rgb = pixels.reshape(-1, 3).T.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)  # (3, H * W)
    yuv = rows.astype(np.float32) @ rgb + offsets.astype(np.float32)
    planes: NDArray[Any] = np.rint(yuv).clip(0, 2**bits - 1).astype(np.uint8 if bits == 8 else np.uint16)
    return planes.reshape(3, *pixels.shape[:2])


def rgb_from_yuv(planes: NDArray[np.uint16], matrix: int, *, full_range: bool, bits: int) -> NDArray[np.uint16]:
    """Convert YUV of more than 8 bits, (3, H, W), to RGB (H, W, 3) uint16, clamped and rounded."""
    rows, offsets = _yuv_arithmetic(matrix, full_range, bits)
    rgb = np.linalg.inv(rows).astype(np.float32) @ (planes.reshape(3, -1) - offsets.astype(np.float32))
    pixels: NDArray[np.uint16] = np.rint(rgb.clip(0, 1) * np.float32(65535)).astype(np.uint16)
    return np.ascontiguousarray(pixels.T).reshape(*planes.shape[1:], 3)


def _yuv_arithmetic(matrix: int, full_range: bool, bits: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return rows and offsets: YUV in steps of `bits` = rows @ RGB in 0..1 + offsets."""
    red, blue = LUMA_WEIGHTS[matrix]
    luma = np.array([red, 1 - red - blue, blue])
    rows = np.array([luma, ((0, 0, 1) - luma) / (2 * (1 - blue)), ((1, 0, 0) - luma) / (2 * (1 - red))])
    step = 2 ** (bits - 8)
    middle = 128 * step
    if full_range:
        return rows * (2**bits - 1), np.array([[0], [middle], [middle]], np.float64)
    return rows * (step * np.array([[219], [224], [224]])), np.array([[16 * step], [middle], [middle]], np.float64)


def accurate(av: Any) -> int:
    """Return flags of swscale's most exact conversion: bicubic chroma, rounded, the same on every processor."""
    kinds = av.video.reformatter.Interpolation
    return int(kinds.BICUBIC | kinds.ACCURATE_RND | kinds.FULL_CHR_H_INP | kinds.FULL_CHR_H_INT | kinds.BITEXACT)
