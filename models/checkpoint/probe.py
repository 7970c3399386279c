"""Distinguish candidates by running them on real images.

A super-resolution network that is run as it was trained returns an image whose bicubic reduction is the input again, to
some 40 dB and more. A wrong value range, residual scale or activation breaks that by many decibels. What is measured:
PSNR (peak 1) between the reduced, clamped output and the input, without a border of 2 pixels, averaged over the
images. What limits it: two candidates that both keep the image nearly the same cannot be distinguished, hence the
margin that `srdeploy.models.checkpoint.resolve` requires.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from srdeploy.core.errors import UsageError
from srdeploy.core.imaging.psnr import psnr_db, shaved
from srdeploy.core.imaging.read import network_input, read_image
from srdeploy.core.imaging.resize import imresize
from srdeploy.core.progress import Progress
from srdeploy.models.checkpoint.resolve import Ranked
from srdeploy.models.networks.spec import ModelSpec

CROP = 64
"""Side of the centre crop that is run: large enough for a stable mean, small enough for a full-size RCAN on a CPU."""

MAX_IMAGES = 6
_BORDER = 2


def rank_candidates(
    combinations: Sequence[dict[str, Any]],
    network: Callable[[dict[str, Any]], nn.Module],
    spec: ModelSpec,
    images: Sequence[Path],
    progress: Progress,
) -> list[Ranked]:
    """Run every combination on the images and rank them, best first.

    Args:
        combinations: values by choice.
        network: makes the network (0..1 outside) of a combination.
        spec: of any of them; colors and minimum size are the same for all.
        images: at most `MAX_IMAGES` are used.
        progress: advanced once per combination.

    Raises:
        UsageError: an image is too small.
        InputError: an image cannot be read.
    """
    inputs = [_crop(path, spec) for path in images[:MAX_IMAGES]]
    ranking = []
    with progress.task("trying candidates on real images", total=len(combinations)) as advance:
        for values in combinations:
            candidate = network(values)
            scores = [consistency_db(candidate, image) for image in inputs]
            # A candidate that explodes on one image is wrong, whatever it does on the others.
            ranking.append(Ranked(dict(values), float(np.mean(scores))))
            advance()
    return sorted(ranking, key=lambda entry: -entry.psnr_db)


def consistency_db(network: nn.Module, image: NDArray[np.float32]) -> float:
    """Return the PSNR in dB between the reduced output and the input.

    Args:
        network: (1, C, H, W) in 0..1 to the upscaled image.
        image: (1, C, H, W) float32 in 0..1.
    """
    with torch.inference_mode():
        output = network(torch.from_numpy(image)).clamp(0, 1).numpy()
    if not np.isfinite(output).all():
        return 0.0
    height, width = image.shape[2:]
    reduced = imresize(output[0].transpose(1, 2, 0).astype(np.float64), size=(height, width))
    original = image[0].transpose(1, 2, 0).astype(np.float64)
    return min(psnr_db(shaved(reduced, _BORDER), shaved(original, _BORDER)), 100.0)


def _crop(path: Path, spec: ModelSpec) -> NDArray[np.float32]:
    image = network_input(read_image(path), spec.colours)
    height, width = image.shape[2:]
    if min(height, width) < max(16, spec.min_size):
        raise UsageError(f"probe image {path} is {width}x{height}", expected="at least 16x16 pixels")
    top, left = max(0, (height - CROP) // 2), max(0, (width - CROP) // 2)
    return np.ascontiguousarray(image[:, :, top : top + CROP, left : left + CROP])
