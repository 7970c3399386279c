"""The input that latency is measured on."""

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.shapes import Shape


def bench_image(shape: Shape) -> NDArray[np.float32]:
    """Return (N, C, H, W) float32 in [0, 1]: smooth random data, the same for the same shape.

    White noise would excite the saturation of quantized layers and denormal numbers differently from photographs.
    """
    n, c, h, w = shape
    generator = np.random.default_rng(0)
    coarse = generator.random((n, c, h // 8 + 2, w // 8 + 2), dtype=np.float32)
    rows = np.linspace(0, coarse.shape[2] - 1.001, h)
    columns = np.linspace(0, coarse.shape[3] - 1.001, w)
    top, left = rows.astype(int), columns.astype(int)
    down, right = (rows - top)[:, None].astype(np.float32), (columns - left)[None, :].astype(np.float32)

    def corner(dy: int, dx: int) -> NDArray[np.float32]:
        return coarse[:, :, top[:, None] + dy, left[None, :] + dx]

    upper = corner(0, 0) * (1 - right) + corner(0, 1) * right
    lower = corner(1, 0) * (1 - right) + corner(1, 1) * right
    return np.ascontiguousarray(upper * (1 - down) + lower * down)
