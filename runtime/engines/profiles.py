"""Shape profiles from the images that an engine will really see."""

from collections.abc import Sequence

from srdeploy.core.errors import InputError
from srdeploy.core.shapes import ShapeProfile

GRID = 8
"""Profiles begin and end at multiples of this: room for crops, and kernels like it."""


def proposed_profile(sizes: Sequence[tuple[int, int]], *, channels: int, batch: int, min_size: int = 1) -> ShapeProfile:
    """Propose a profile for images of given (height, width).

    The least and greatest height and width, rounded outwards to multiples of 8, bound it; the commonest size, and among
    equally common ones the largest, is what it is tuned for. Images of both orientations get a profile that takes both.

    Args:
        sizes: of the low-resolution images that go into the engine.
        channels: of the network.
        batch: largest batch; the tuned one is 1.
        min_size: the network's least height and width.

    Raises:
        InputError: no sizes.
    """
    if not sizes:
        raise InputError("no image sizes to make a profile from")
    low_h, low_w = (max(min_size, min(axis) // GRID * GRID, 1) for axis in zip(*sizes, strict=True))
    high_h, high_w = (-(-max(axis) // GRID) * GRID for axis in zip(*sizes, strict=True))
    height, width = max(set(sizes), key=lambda size: (sizes.count(size), size[0] * size[1], size))
    return ShapeProfile(
        (1, channels, low_h, low_w),
        (1, channels, max(height, low_h), max(width, low_w)),
        (batch, channels, high_h, high_w),
    )
