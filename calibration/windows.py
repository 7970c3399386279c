"""Windows of feature maps at random places: what a convolution's weights are multiplied with."""

import numpy as np
from numpy.typing import NDArray


def random_places(
    values: NDArray[np.float32], kernel: tuple[int, int], count: int, random: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows and columns of the corners of at most `count` windows of a map (C, H, W), none twice."""
    rows, columns = (max(1, side - size + 1) for side, size in zip(values.shape[1:], kernel, strict=True))
    places = random.choice(rows * columns, min(count, rows * columns), replace=False)
    return places // columns, places % columns


def windows_at(
    values: NDArray[np.float32], kernel: tuple[int, int], places: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> NDArray[np.float32]:
    """Return windows of a map (C, H, W), (n, C * kh * kw); a map smaller than the kernel is padded with zeros."""
    short = [max(0, size - side) for size, side in zip(kernel, values.shape[1:], strict=True)]
    values = np.pad(values, ((0, 0), (0, short[0]), (0, short[1])))
    row, column = places
    taps = [values[:, row + y, column + x] for y in range(kernel[0]) for x in range(kernel[1])]
    return np.stack(taps, axis=1).reshape(-1, row.size).T
