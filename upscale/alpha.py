"""Colors under transparent pixels: spread visible colors outward, so that no fringe appears around a cut-out.

Editors leave anything under alpha 0, often black. A network (or any filter) that reads across a mask's edge would
mix it into visible pixels. So before scaling, each fully transparent pixel within `REACH` of a visible one takes the
mean of the visible colors nearest to it; colors farther inside the mask stay as they are. Games call this "alpha
bleeding" or "edge padding".
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.upscale.planes import PixelSource

_LEVELS = 5
REACH = 2**_LEVELS - 1
"""Pixels of the input that visible colors are spread by."""
_BLOCK_ROWS = 64  # rows filled at once: bounds the float32 copies, about 50 bytes per pixel of a block


@dataclass(frozen=True, eq=False)
class SpreadSource:
    """A source of pixels with alpha whose visible colors are spread under the transparent ones."""

    source: PixelSource

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.source.shape

    def rows(self, begin: int, end: int) -> NDArray[Any]:
        """Return rows begin..end; the same whatever the range that a row is part of."""
        height = self.shape[0]
        above, below = max(0, begin - REACH), min(height, end + REACH)
        pixels = self.source.rows(above, below)
        if np.all(pixels[begin - above : end - above, :, -1] > 0):
            return pixels[begin - above : end - above]
        parts = []
        for first in range(begin, end, _BLOCK_ROWS):
            last = min(end, first + _BLOCK_ROWS)
            top, bottom = max(above, first - REACH), min(below, last + REACH)
            filled = spread_colors(pixels[top - above : bottom - above])
            parts.append(filled[first - top : last - top])
        return np.concatenate(parts)


def spread_colors(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return pixels with the colors of fully transparent ones replaced within `REACH` of visible ones.

    Args:
        pixels: (H, W, 2 or 4), gray or RGB, with alpha last; uint8, uint16 or float32. Alpha stays as it is.
    """
    alpha = pixels[..., -1:]
    hidden = alpha[..., 0] == 0
    if not hidden.any() or hidden.all():
        return pixels
    weights = alpha.astype(np.float32)
    weights /= weights.max()
    sums = np.concatenate([pixels[..., :-1] * weights, weights], axis=2)  # (H, W, C): weighted colors, weights
    filled = pixels.copy()
    waiting = hidden
    for level in range(_LEVELS):
        # A window of three taps, 2**level apart, on top of the last one: radius 1, 3, 7, 15, 31.
        sums = _dilated_sum(_dilated_sum(sums, 2**level, axis=0), 2**level, axis=1)
        reached = waiting & (sums[..., -1] > 0)
        colors = sums[reached][:, :-1] / sums[reached][:, -1:]
        filled[reached, :-1] = colors if pixels.dtype.kind == "f" else np.rint(colors)
        waiting = waiting & ~reached
        if not waiting.any():
            break
    return filled


def _dilated_sum(values: NDArray[np.float32], step: int, *, axis: int) -> NDArray[np.float32]:
    """Return each value plus its neighbors `step` before and after it; zero outside."""
    total = values.copy()
    if step < values.shape[axis]:
        before = [slice(None)] * values.ndim
        after = [slice(None)] * values.ndim
        before[axis], after[axis] = slice(None, -step), slice(step, None)
        total[tuple(after)] += values[tuple(before)]
        total[tuple(before)] += values[tuple(after)]
    return total
