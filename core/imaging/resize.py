"""Bicubic resizing with the arithmetic of MATLAB's `imresize`, which every super-resolution benchmark is built on.

Low-resolution test images of the field come from it, and other bicubics (Pillow, PyTorch, OpenCV) differ from it by
several grey levels, which moves a PSNR by more than the differences between networks. What makes the difference:

- Keys' cubic with a = -0.5, widened by the factor when shrinking (antialiasing);
- pixel centres at half-integers, weights normalised for every output pixel;
- beyond the border the edge pixel is repeated;
- the two axes one after the other, the one that shrinks most first, rows on a tie;
- whole-number images are rounded (halves upwards) and clamped between the two passes, not only at the end.

Keys, "Cubic convolution interpolation for digital image processing", IEEE TASSP 29(6), 1981.
"""

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Pixel = TypeVar("Pixel", bound=np.generic)

_KERNEL_WIDTH = 4.0


def imresize(
    image: NDArray[Pixel], *, scale: float | None = None, size: tuple[int, int] | None = None
) -> NDArray[Pixel]:
    """Resize an image bicubically.

    Args:
        image: (H, W) or (H, W, C), uint8, uint16, float32 or float64. Floats may have any range.
        scale: output pixels per input pixel on both axes; the output has ceil(scale * H) x ceil(scale * W) pixels.
        size: (height, width) of the output, instead of `scale`; each axis then has its own factor.

    Returns:
        The resized image, of the input's type. Whole-number types are rounded and clamped after each pass; floats are
        neither rounded nor clamped (cubic interpolation overshoots at edges) and are computed in float64.

    Raises:
        ValueError: the image has another type or number of axes or is empty, or not exactly one of scale and size is
            given, or it is not positive.
    """
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise ValueError(f"image of shape {image.shape}; expected (H, W) or (H, W, C) with at least one pixel")
    if image.dtype not in (np.uint8, np.uint16, np.float32, np.float64):
        raise ValueError(f"image of type {image.dtype}; expected uint8, uint16, float32 or float64")
    lengths, factors = _output_geometry(image.shape[:2], scale, size)
    limit = None if image.dtype.kind == "f" else float(np.iinfo(image.dtype).max)  # type: ignore[type-var]
    result: NDArray[np.float64] = image.astype(np.float64)
    for axis in sorted((0, 1), key=lambda axis: factors[axis]):
        result = _resize_axis(result, axis, lengths[axis], factors[axis])
        if limit is not None:
            result = np.clip(np.floor(result + 0.5), 0.0, limit)
    return result.astype(image.dtype)


def axis_weights(length: int, output_length: int, factor: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return which input samples each output sample of one axis is made of.

    Args:
        length: samples of the input.
        output_length: samples of the output.
        factor: output samples per input sample.

    Returns:
        Indices and weights, both (output_length, taps); the indices lie in 0..length-1, the weights sum to 1 per row.
    """
    shrink = min(factor, 1.0)  # below 1 the kernel widens to cover all the samples it stands for
    width = _KERNEL_WIDTH / shrink
    centre = (np.arange(1, output_length + 1) / factor) + 0.5 * (1.0 - 1.0 / factor)  # counted from 1
    left = np.floor(centre - width / 2.0)
    positions = left[:, None] + np.arange(math.ceil(width) + 2)[None, :]  # (output_length, taps)
    weights = _keys_cubic(shrink * (centre[:, None] - positions))
    weights /= weights.sum(axis=1, keepdims=True)
    indices = np.clip(positions, 1, length).astype(np.int64) - 1
    used = np.any(weights != 0.0, axis=0)
    return indices[:, used], weights[:, used]


def _output_geometry(
    shape: tuple[int, ...], scale: float | None, size: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[float, float]]:
    if (scale is None) == (size is None):
        raise ValueError("give exactly one of scale and size")
    if size is not None:
        if min(size) < 1:
            raise ValueError(f"size {size}; expected at least 1x1")
        return size, (size[0] / shape[0], size[1] / shape[1])
    assert scale is not None
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale {scale}; expected a positive number")
    return (math.ceil(scale * shape[0]), math.ceil(scale * shape[1])), (scale, scale)


def _resize_axis(image: NDArray[np.float64], axis: int, output_length: int, factor: float) -> NDArray[np.float64]:
    indices, weights = axis_weights(image.shape[axis], output_length, factor)
    along = [1] * image.ndim
    along[axis] = output_length
    shape = list(image.shape)
    shape[axis] = output_length
    result = np.zeros(shape, dtype=np.float64)
    for tap in range(weights.shape[1]):  # one tap at a time keeps the memory at two images
        result += np.take(image, indices[:, tap], axis=axis) * weights[:, tap].reshape(along)
    return result


def _keys_cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(distance)
    near = 1.5 * x**3 - 2.5 * x**2 + 1.0
    far = -0.5 * x**3 + 2.5 * x**2 - 4.0 * x + 2.0
    kernel: NDArray[np.float64] = np.where(x <= 1.0, near, np.where(x <= 2.0, far, 0.0))
    return kernel
