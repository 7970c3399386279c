"""Quality of an 8-bit output against the ground truth, per image and over a set, in the protocol of the papers.

The luma is BT.601 in studio swing and not rounded, `scale` pixels are shaved from each side, the peak is 255. SSIM is
Wang's of 2004: an 11x11 Gaussian window of sigma 1.5, population covariance, valid region only. scikit-image computes
it so with the options below (its defaults do not: they are off by up to 0.018). A set's figure is the mean of the
per-image values, not the PSNR of a mean error.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.extras import import_extra
from srdeploy.core.imaging.psnr import luma_255, rgb_psnr_db, shaved, y_psnr_db

SSIM_WINDOW = 11


@dataclass(frozen=True)
class Quality:
    """Agreement of one output, or the mean over a set, with the ground truth.

    Attributes:
        psnr_y_db: PSNR of the luma in dB; inf when equal.
        ssim_y: SSIM of the luma; None when the image is smaller than the SSIM window after shaving.
        psnr_rgb_db: PSNR over the three channels in dB, not comparable with `psnr_y_db`; None for luma networks.
    """

    psnr_y_db: float
    ssim_y: float | None
    psnr_rgb_db: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def quality(output: NDArray[np.uint8], truth: NDArray[np.uint8], *, shave: int) -> Quality:
    """Compare an output with the ground truth.

    Args:
        output: uint8, (H, W, 3) RGB or (H, W) luma.
        truth: uint8 of the same height and width.
        shave: pixels cut from each side, by convention the scale.

    Raises:
        ValueError: the sizes differ, or the image is too small to shave.
        MissingExtraError: scikit-image is not installed.
    """
    both_rgb = output.ndim == 3 and truth.ndim == 3 and output.shape[2] == truth.shape[2] == 3
    return Quality(
        psnr_y_db=y_psnr_db(output, truth, shave=shave),
        ssim_y=ssim_y(output, truth, shave=shave),
        psnr_rgb_db=rgb_psnr_db(output, truth, shave=shave) if both_rgb else None,
    )


def ssim_y(output: NDArray[np.uint8], truth: NDArray[np.uint8], *, shave: int) -> float | None:
    """Return the SSIM of the luma, None where the window does not fit; arguments and errors as `quality`."""
    first, second = shaved(luma_255(output), shave), shaved(luma_255(truth), shave)
    if min(first.shape) < SSIM_WINDOW:
        return None
    metrics: Any = import_extra("skimage.metrics", "report")
    value: float = metrics.structural_similarity(
        first, second, data_range=255.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(value)


def mean_quality(values: Sequence[Quality]) -> Quality | None:
    """Return the mean of per-image values, None for no image; a field that an image lacks is averaged over the rest."""
    if not values:
        return None
    return Quality(
        psnr_y_db=math.fsum(value.psnr_y_db for value in values) / len(values),
        ssim_y=_mean([value.ssim_y for value in values if value.ssim_y is not None]),
        psnr_rgb_db=_mean([value.psnr_rgb_db for value in values if value.psnr_rgb_db is not None]),
    )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
