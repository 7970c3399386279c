"""What a chain of convolutions and pixel shuffles does to the pixels around one LR pixel, as one convolution.

Only convolutions and pixel shuffles are between the last activation of RCAN and its output. Together they are linear:
the s x s output pixels of an LR pixel are a weighted sum of a window of LR pixels, the same sum everywhere, except at
the image's edges. There each convolution of the chain reads zeros where the sum would go on with what the layers before
would have computed beyond the edge. What has to be corrected for that depends on the LR pixels at the edge alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDES = ("top", "bottom", "left", "right")
_TOLERANCE = 1e-9
"""Relative to the largest weight: sums in double precision differ by less, a missing term by far more."""


@dataclass(frozen=True)
class Link:
    """A convolution that keeps the size, and the pixel shuffle behind it.

    Attributes:
        weight: (out, in, kh, kw) float64, kh and kw odd.
        bias: (out,) float64.
        block: of the shuffle; 1 for none.
        crd: the shuffle's order of channels, CRD or DCR.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    block: int = 1
    crd: bool = True


@dataclass(frozen=True)
class AffineMap:
    """One convolution with bias: weight (out, in, 2r + 1, 2r + 1), bias (out,), both float64."""

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    def __sub__(self, other: "AffineMap") -> "AffineMap":
        return AffineMap(self.weight - other.weight, self.bias - other.bias)

    def within(self, edges: Mapping[str, int]) -> "AffineMap":
        """Return the map without the taps that lie beyond the image's edges; see `compute_pixel_map` for `edges`."""
        reach = self.weight.shape[2] // 2
        weight = self.weight.copy()
        _blank(weight, -reach, -reach, 1, edges)
        return AffineMap(weight, self.bias)

    def vanishes(self, scale: float) -> bool:
        """Return True if the map is zero compared with weights of the size `scale`."""
        return bool(max(np.abs(self.weight).max(), np.abs(self.bias).max()) <= _TOLERANCE * scale)


@dataclass(frozen=True)
class Tail:
    """A chain as one convolution and what corrects it at the edges.

    Attributes:
        factor: output pixels per LR pixel and axis.
        inner: the convolution; its output channels are those of a pixel shuffle by `factor` in CRD order.
        sides: what has to be added to an LR pixel at that side of the image.
        corners: what has to be added besides where two sides meet, vertical first.
    """

    factor: int
    inner: AffineMap
    sides: Mapping[str, AffineMap]
    corners: Mapping[tuple[str, str], AffineMap]


def compute_tail(links: Sequence[Link]) -> Tail | None:
    """Return a chain as one convolution; None where more than the outermost LR pixels would need a correction."""
    inner = compute_pixel_map(links, {})
    reach, scale = inner.weight.shape[2] // 2, float(np.abs(inner.weight).max())

    def correction(edges: Mapping[str, int]) -> AffineMap:
        return compute_pixel_map(links, edges, reach) - inner.within(edges)

    sides = {side: correction({side: 0}) for side in SIDES}
    corners = {
        (vertical, horizontal): correction({vertical: 0, horizontal: 0})
        - sides[vertical].within({horizontal: 0})
        - sides[horizontal].within({vertical: 0})
        for vertical in SIDES[:2]
        for horizontal in SIDES[2:]
    }
    # One pixel further in nothing is wrong any more, and opposite sides do not meddle even where they are one pixel.
    exact = all(correction({side: 1}).vanishes(scale) for side in SIDES)
    for one, other in (SIDES[:2], SIDES[2:]):
        both = {one: 0, other: 0}
        left = correction(both) - sides[one].within(both) - sides[other].within(both)
        exact = exact and left.vanishes(scale)
    return Tail(int(np.prod([link.block for link in links])), inner, sides, corners) if exact else None


def compute_pixel_map(links: Sequence[Link], edges: Mapping[str, int], reach: int | None = None) -> AffineMap:
    """Return what a chain computes of one LR pixel from the LR pixels around it.

    Args:
        links: the chain.
        edges: how many LR pixels lie between the pixel and a side of the image, for the sides that are not far away.
        reach: half the size of the map; by default the minimum that holds all taps.
    """
    channels, size = links[-1].weight.shape[0], int(np.prod([link.block for link in links]))
    count = channels * size * size
    # From each output pixel back to what it is made of: (outputs, channels, rows, columns) around the LR pixel.
    parts = np.eye(count).reshape(count, channels, size, size)
    row = column = 0  # of the window's first pixel, in pixels of its level from the LR pixel's first
    scale, bias = size, np.zeros(count)
    for link in reversed(links):
        _blank(parts, row, column, scale, edges)
        parts, row, column = _unshuffled(parts, row, column, link)
        scale //= link.block
        bias += parts.sum(axis=(2, 3)) @ link.bias
        parts = _read(parts, link.weight)
        row, column = row - link.weight.shape[2] // 2, column - link.weight.shape[3] // 2
    _blank(parts, row, column, 1, edges)
    if reach is None:
        reach = max(-row, -column, row + parts.shape[2] - 1, column + parts.shape[3] - 1)
    weight = np.zeros((count, parts.shape[1], 2 * reach + 1, 2 * reach + 1))
    weight[:, :, reach + row :, reach + column :][:, :, : parts.shape[2], : parts.shape[3]] = parts
    return AffineMap(weight, bias)


def _blank(parts: NDArray[np.float64], row: int, column: int, scale: int, edges: Mapping[str, int]) -> None:
    """Blank what lies beyond the image in a window that begins at (row, column) of a level with `scale` pixels."""
    rows, columns = np.arange(parts.shape[2]) + row, np.arange(parts.shape[3]) + column
    for near, far, places, axis in (("top", "bottom", rows, 2), ("left", "right", columns, 3)):
        beyond = np.zeros(places.shape, dtype=bool)
        if near in edges:
            beyond |= places < -edges[near] * scale
        if far in edges:
            beyond |= places >= (edges[far] + 1) * scale
        np.moveaxis(parts, axis, 0)[beyond] = 0


def _unshuffled(parts: NDArray[np.float64], row: int, column: int, link: Link) -> tuple[NDArray[np.float64], int, int]:
    """Return a window, widened to whole pixels, in front of the link's pixel shuffle, and where it begins."""
    block = link.block
    above, before = row % block, column % block
    below, behind = -(above + parts.shape[2]) % block, -(before + parts.shape[3]) % block
    parts = np.pad(parts, ((0, 0), (0, 0), (above, below), (before, behind)))
    count, channels, rows, columns = parts.shape
    parts = parts.reshape(count, channels, rows // block, block, columns // block, block)
    parts = parts.transpose(0, 1, 3, 5, 2, 4) if link.crd else parts.transpose(0, 3, 5, 1, 2, 4)
    parts = parts.reshape(count, channels * block * block, rows // block, columns // block)
    return parts, (row - above) // block, (column - before) // block


def _read(parts: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a convolution reads for a window of its output: kh - 1 rows and kw - 1 columns more."""
    rows, columns = parts.shape[2:]
    height, width = weight.shape[2:]
    read = np.zeros((parts.shape[0], weight.shape[1], rows + height - 1, columns + width - 1))
    for y in range(height):
        for x in range(width):
            read[:, :, y : y + rows, x : x + columns] += np.einsum(
                "koyx,oi->kiyx", parts, weight[:, :, y, x], optimize=True
            )
    return read
