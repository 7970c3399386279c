"""Crops of an image as input, reference, engine and ground truth show it, with the difference: for the report."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.imaging.resize import imresize
from srdeploy.core.samples import Sample
from srdeploy.runtime.verify.difference import eight_bit

DETAIL_SIDE = 384
"""Maximum side of a detailed crop, in output pixels."""

WORST_SIDE = 128
"""Side of the worst crop, in output pixels."""


@dataclass(frozen=True, eq=False)
class Crop:
    """One crop in several versions, all uint8 (h, w, 3) of the same size.

    Attributes:
        name: of the image.
        top: first row of the crop in the output.
        left: first column.
        bicubic: the network's input, enlarged bicubically.
        reference: the reference's output.
        candidate: the engine's output; values that are not finite are shown in magenta.
        truth: the ground truth, None without.
        error: (h, w) float32, largest absolute difference over the channels between engine and reference on 0..1;
            nan where a value is not finite.
    """

    name: str
    top: int
    left: int
    bicubic: NDArray[np.uint8]
    reference: NDArray[np.uint8]
    candidate: NDArray[np.uint8]
    truth: NDArray[np.uint8] | None
    error: NDArray[np.float32]

    def box_json(self) -> dict[str, Any]:
        """Return the position of the crop, in output pixels."""
        height, width = self.error.shape
        return {"image": self.name, "top": self.top, "left": self.left, "height": height, "width": width}


def detailed_crop(sample: Sample, reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> Crop:
    """Return the crop of an image where the reference has most contrast.

    It does not depend on the engine, so the crops of several engines show the same part.

    Args:
        sample: the image.
        reference: (1, C, H, W) float32 output of the reference.
        candidate: the engine's output, of the same shape.
    """
    detail = np.nan_to_num(reference[0].astype(np.float64)).mean(axis=0)
    contrast = np.hypot(*np.gradient(detail)) if min(detail.shape) > 1 else np.zeros_like(detail)
    return _crop(sample, reference, candidate, _best_box(contrast, DETAIL_SIDE))


def worst_crop(sample: Sample, reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> Crop:
    """Return the crop where the engine's squared error against the reference is largest; see `detailed_crop`."""
    gap = (candidate[0].astype(np.float64) - reference[0]) ** 2
    gap = np.where(np.isfinite(gap), gap, 1e6).mean(axis=0)
    return _crop(sample, reference, candidate, _best_box(gap, WORST_SIDE))


def _crop(
    sample: Sample,
    reference: NDArray[np.float32],
    candidate: NDArray[np.float32],
    box: tuple[slice, slice],
) -> Crop:
    error = np.abs(candidate[0].astype(np.float64) - reference[0]).max(axis=0).astype(np.float32)
    error[~np.isfinite(error)] = np.nan
    height, width = reference.shape[2:]
    enlarged = imresize(sample.image[0].transpose(1, 2, 0), size=(height, width))  # (H, W, C)
    truth = None if sample.truth is None else _as_rgb(sample.truth[:height, :width])[box]
    if truth is not None and reference.shape[1] == 1:
        truth = _luma_image(truth)
    return Crop(
        name=sample.name,
        top=box[0].start,
        left=box[1].start,
        bicubic=_as_rgb(eight_bit(enlarged[box])),
        reference=_as_rgb(_visible(reference)[box]),
        candidate=_as_rgb(_visible(candidate)[box]),
        truth=truth,
        error=error[box],
    )


def _best_box(weight: NDArray[np.float64], side: int) -> tuple[slice, slice]:
    """Return the side x side box (or the whole, where smaller) with the largest sum, through an integral image."""
    height, width = (min(side, length) for length in weight.shape)
    sums = np.pad(weight.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    boxes = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    top, left = np.unravel_index(int(np.argmax(boxes)), boxes.shape)
    return slice(int(top), int(top) + height), slice(int(left), int(left) + width)


def _visible(output: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(1, C, H, W) to (H, W, 3), magenta where a value is not finite: it must not look like black."""
    planes = output[0].transpose(1, 2, 0)  # (H, W, C)
    image = _as_rgb(eight_bit(np.nan_to_num(planes, nan=0.0, posinf=0.0, neginf=0.0)))
    image[~np.isfinite(planes).all(axis=2)] = (255, 0, 255)
    return image


def _as_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    return np.array(np.broadcast_to(planes, (*planes.shape[:2], 3)))


def _luma_image(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from srdeploy.core.imaging.psnr import luma_255

    return _as_rgb(np.rint(luma_255(rgb)).astype(np.uint8))
