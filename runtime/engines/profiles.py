"""Shape profiles from the images that an engine will be used on."""

from collections.abc import Sequence

from srdeploy.core.errors import InputError
from srdeploy.core.shapes import ShapeProfile

GRID = 8
"""Profiles begin and end at multiples of this: it leaves room for crops, and kernels prefer it."""


def proposed_profile(sizes: Sequence[tuple[int, int]], *, channels: int, batch: int, min_size: int = 1) -> ShapeProfile:
    """Propose a profile for images of given (height, width).

    Its bounds are the minimum and maximum height and width, rounded outwards to multiples of 8. It is tuned for the
    most common size, and among equally common sizes for the largest. Images of both orientations share one profile.

    Args:
        sizes: of the low-resolution images that go into the engine.
        channels: of the network.
        batch: maximum batch; the tuned batch is 1.
        min_size: the network's minimum height and width.

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
