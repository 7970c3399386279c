"""Decibels: how far two images are apart, in the protocol that super-resolution papers report.

Two different numbers carry the name PSNR here, and are never mixed:

- *fidelity*: an engine's output against the eager network's, floats with peak 1, nothing rounded. It needs no ground
  truth and isolates what the deployment changed;
- *Y PSNR against ground truth*: outputs rounded to 8 bits, luma of BT.601 in studio swing kept as floats, `scale`
  pixels shaved from every side, peak 255. It reproduces the published figures of RCAN to the printed digits.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.imaging.colour import y_from_rgb


def psnr_db(first: NDArray[Any], second: NDArray[Any], *, peak: float = 1.0) -> float:
    """Return 10 log10(peak^2 / mean squared difference) in dB: inf when equal, nan when a value is not finite.

    Raises:
        ValueError: the shapes differ or are empty.
    """
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"shapes {first.shape} and {second.shape}; expected two equal shapes that are not empty")
    difference = first.astype(np.float64) - second.astype(np.float64)
    return psnr_of_mse(float(np.mean(np.square(difference))), peak=peak)


def psnr_of_mse(mse: float, *, peak: float = 1.0) -> float:
    """Return the PSNR in dB of a mean squared error: inf for 0, nan for nan or infinity."""
    if not math.isfinite(mse):
        return math.nan
    return math.inf if mse == 0.0 else 10.0 * math.log10(peak * peak / mse)


def luma_255(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the luma in 0..255 as unrounded float64.

    Args:
        image: uint8, (H, W, 3) RGB; or (H, W) or (H, W, 1), which is taken for luma already.
    """
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3))):
        raise ValueError(f"{image.dtype} image of shape {image.shape}; expected uint8 (H, W), (H, W, 1) or (H, W, 3)")
    if image.ndim == 3 and image.shape[2] == 3:
        return y_from_rgb(image.astype(np.float64) / 255.0) * 255.0
    return image.reshape(image.shape[:2]).astype(np.float64)


def shaved(image: NDArray[Any], shave: int) -> NDArray[Any]:
    """Cut `shave` pixels from each side of (H, W, ...).

    Raises:
        ValueError: nothing would be left.
    """
    height, width = image.shape[:2]
    if min(height, width) <= 2 * shave:
        raise ValueError(f"image of {height}x{width} pixels; expected more than {2 * shave} on each axis to shave")
    return image[shave : height - shave, shave : width - shave]


def crop_to_multiple(image: NDArray[Any], multiple: int) -> NDArray[Any]:
    """Cut the bottom and right of (H, W, ...) so that both axes are multiples of `multiple`; the origin stays."""
    height, width = image.shape[:2]
    return image[: height - height % multiple, : width - width % multiple]


def y_psnr_db(output: NDArray[np.uint8], truth: NDArray[np.uint8], *, shave: int) -> float:
    """Return the Y PSNR in dB of an output against the ground truth, as super-resolution papers report it.

    Args:
        output: uint8, (H, W, 3) RGB, or (H, W) or (H, W, 1) luma.
        truth: uint8 of the same height and width, RGB or luma.
        shave: pixels cut from each side, by convention the scale.

    Raises:
        ValueError: another type, sizes that differ, or an image too small to shave.
    """
    return psnr_db(shaved(luma_255(output), shave), shaved(luma_255(truth), shave), peak=255.0)


def rgb_psnr_db(output: NDArray[np.uint8], truth: NDArray[np.uint8], *, shave: int) -> float:
    """Return the PSNR in dB over all three channels of two uint8 (H, W, 3) images.

    It is not comparable with `y_psnr_db`: about 2 dB lower on natural photographs.
    """
    if output.ndim != 3 or output.shape[2] != 3 or output.dtype != np.uint8 or truth.dtype != np.uint8:
        raise ValueError(f"{output.dtype} image of shape {output.shape}; expected uint8 (H, W, 3)")
    return psnr_db(shaved(output, shave), shaved(truth, shave), peak=255.0)


def fidelity_for_drop(psnr_db: float, drop_db: float) -> float:
    """Return the fidelity in dB that an engine needs so that PSNR against ground truth falls by at most `drop_db`.

    It assumes that the engine's error is independent of the network's own error: MSEs then add up, and
    drop = 10 log10(1 + 10^((P - Q) / 10)) for PSNR P and fidelity Q. Noise added to real outputs agrees to 0.01 dB.

    Args:
        psnr_db: PSNR of the reference network against ground truth.
        drop_db: allowed loss, above 0.
    """
    if not drop_db > 0.0:
        raise ValueError(f"drop of {drop_db} dB; expected more than 0")
    return psnr_db - 10.0 * math.log10(10.0 ** (drop_db / 10.0) - 1.0)


def drop_for_fidelity(psnr_db: float, fidelity_db: float) -> float:
    """Return the loss in dB to expect from an engine of a given fidelity: the inverse of `fidelity_for_drop`."""
    return 10.0 * math.log10(1.0 + 10.0 ** ((psnr_db - fidelity_db) / 10.0))
