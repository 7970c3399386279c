"""Convert between pixels and network planes: color, gray and alpha, for networks on RGB and on Y.

A picture becomes one group of planes, or two when it has an alpha channel that is not the same everywhere: color, and
alpha itself. Both go through the network, so both get the same edges. `srdeploy.upscale.alpha` keeps the colors under
transparent pixels from bleeding into visible ones. Y networks see the luma of BT.601; chroma is enlarged
bicubically, as in the papers' protocol.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.errors import UsageError
from srdeploy.core.imaging.colour import rgb_from_ycbcr, y_from_rgb, ycbcr_from_rgb
from srdeploy.core.imaging.read import quantized
from srdeploy.core.imaging.resize import imresize
from srdeploy.upscale.tiles import Planes

Floats = NDArray[np.float32]

_LUMA_BLACK = 16 / 255
_LUMA_SPAN = 219 / 255  # white is 235/255
_BICUBIC_REACH = 3  # input rows that a bicubic output row depends on, on each side, rounded up


class PixelSource(Protocol):
    """Source of pixels, read from top to bottom.

    `shape` is (H, W, C) with C = 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha; `rows` returns (end - begin, W, C) of
    uint8, uint16, or float32 in 0..1. Ranges are requested in increasing order and may overlap earlier ones.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""

    def rows(self, begin: int, end: int) -> NDArray[Any]:
        """Return rows begin..end."""


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Pixels that are in memory: (H, W, C)."""

    pixels: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.pixels.shape
        return height, width, channels

    def rows(self, begin: int, end: int) -> NDArray[Any]:
        """Return rows as they are."""
        return self.pixels[begin:end]


@dataclass(frozen=True)
class Conversion:
    """How pixels of one kind pass through a network.

    Attributes:
        colours: color model of the network's input.
        channels: of the picture, 1 to 4.
        alpha: whether alpha goes through the network; if it is constant, `constant_alpha` is its value.
        scale, trim: of the network.
        uint8: whether the network's graph takes and returns 8-bit levels.
    """

    colours: Literal["rgb", "y"]
    channels: int
    scale: int
    trim: int
    alpha: bool
    constant_alpha: float | None = None
    uint8: bool = False

    @property
    def groups(self) -> int:
        """Groups of planes: 2 with alpha, else 1."""
        return 2 if self.alpha else 1

    def planes(self, pixels: NDArray[Any]) -> Planes:
        """Return network input: (H, W, C) pixels to (G, C, H, W) float32.

        Raises:
            UsageError: the graph takes 8-bit levels, and the planes of these pixels are others.
        """
        if self.uint8 and (pixels.dtype != np.uint8 or self.colours == "y"):
            found = "luma, which has fractions" if pixels.dtype == np.uint8 else f"pixels of {pixels.dtype}"
            raise UsageError(
                f"{found}, for a graph that takes uint8",
                expected="8-bit pictures and a graph that takes RGB",
                next_step="use the float graph that it was made from, or export with --color-wrapper --io uint8",
            )
        values = unit_floats(pixels)
        color = values[..., :-1] if self.channels in (2, 4) else values
        if not self.alpha:
            return self._color_planes(color)[None]
        alpha = values[..., -1:]
        return np.stack([self._color_planes(color), self._color_planes(alpha)])

    def pixels(self, planes: Planes, around: "Chroma") -> Floats:
        """Return finished rows: network output (G, C, rows, W') to (rows, W', channels) float32, not clamped.

        Args:
            planes: the network's output.
            around: the enlarged chroma of the same rows, used by Y networks for color pictures.
        """
        color = self._color(planes[0], around)
        if not self.alpha:
            if self.constant_alpha is None:
                return color
            alpha = np.full((*color.shape[:2], 1), self.constant_alpha, np.float32)
            return np.concatenate([color, alpha], axis=2)
        return np.concatenate([color, self._gray(planes[1]).clip(0, 1)], axis=2)

    def _color_planes(self, color: Floats) -> Floats:
        """(H, W, 1 or 3) to (C, H, W)."""
        if self.colours == "rgb":
            return np.ascontiguousarray(np.broadcast_to(color, (*color.shape[:2], 3)).transpose(2, 0, 1))
        if color.shape[2] == 1:
            luma: Floats = np.float32(_LUMA_BLACK) + np.float32(_LUMA_SPAN) * color.transpose(2, 0, 1)
            return luma
        return y_from_rgb(color.astype(np.float64)).astype(np.float32)[None]

    def _color(self, plane: Floats, around: "Chroma") -> Floats:
        if self.channels <= 2:
            return self._gray(plane)
        if self.colours == "rgb":
            return plane.transpose(1, 2, 0)
        ycbcr = np.concatenate([plane.transpose(1, 2, 0), around.rows(plane.shape[1])], axis=2)
        return rgb_from_ycbcr(ycbcr)

    def _gray(self, plane: Floats) -> Floats:
        """(C, H, W) to (H, W, 1): the mean of three equal-input channels, or luma rescaled to full range."""
        if self.colours == "rgb":
            mean: Floats = plane.mean(axis=0, dtype=np.float32, keepdims=True)
            return mean.transpose(1, 2, 0)
        gray: Floats = ((plane - np.float32(_LUMA_BLACK)) / np.float32(_LUMA_SPAN)).transpose(1, 2, 0)
        return gray


class Chroma:
    """Cb and Cr of a picture, enlarged bicubically a few rows at a time, from top to bottom."""

    def __init__(self, source: PixelSource, conversion: Conversion) -> None:
        self._source = source
        self._conversion = conversion
        self._next = 0  # next output row

    def rows(self, count: int) -> Floats:
        """Return the next `count` output rows: (count, W', 2) float32."""
        scale, trim = self._conversion.scale, self._conversion.trim
        height, width, _ = self._source.shape
        begin, end = self._next, self._next + count
        self._next = end
        first = max(0, begin // scale - _BICUBIC_REACH)
        last = min(height, -(-end // scale) + _BICUBIC_REACH)
        values = unit_floats(self._source.rows(first, last))
        color = values[..., :3].astype(np.float64)
        chroma = imresize(ycbcr_from_rgb(color)[..., 1:], scale=scale)
        return chroma[begin - first * scale : end - first * scale, : scale * width - trim].astype(np.float32)


def unit_floats(pixels: NDArray[Any]) -> Floats:
    """Return pixels as float32: whole numbers divided by their peak, floats as they are."""
    if pixels.dtype.kind == "f":
        return pixels.astype(np.float32, copy=False)
    return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)


def converted(band: Floats, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return finished rows (rows, W', C) as the output's type: rounded whole numbers, or floats as they are."""
    if dtype.kind == "f":
        return band.astype(dtype, copy=False)
    return quantized(band.transpose(2, 0, 1), dtype.type)


def constant_alpha(source: PixelSource) -> float | None:
    """Return the alpha that all pixels share; None without alpha, if it differs, or outside memory."""
    if source.shape[2] not in (2, 4) or not isinstance(source, ArraySource):
        return None
    alpha = source.pixels[..., -1]
    if alpha.min() != alpha.max():
        return None
    peak = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
    return float(alpha.flat[0]) / peak
