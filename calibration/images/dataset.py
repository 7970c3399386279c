"""The calibration set: real images, what was taken from them, and what was kept aside to judge the result.

Every fourth image is kept for judging, never for calibrating, so that the decibels that quantization promises are
measured on images whose ranges it has not seen.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.calibration.images.sampling import Crop, choose_crops, coverage
from srdeploy.calibration.images.sources import Photo, read_photos
from srdeploy.core.artifact import atomic_file, sha256_of_bytes
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.imaging.read import network_input
from srdeploy.core.imaging.resize import imresize
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.samples import Sample

MIN_IMAGES = 3
MIN_PIXELS = 2 * 32 * 32
HELD_OUT_EVERY = 4
MAX_HELD_OUT = 8
WHOLE_PIXELS = 256 * 256
"""A whole image is cut to about this many LR pixels in its middle: enough for channel attention, bounded in time."""

HELD_OUT_PIXELS = 160 * 160
"""An image to judge on is cut likewise: a search evaluates many graphs on all of them."""


@dataclass(frozen=True)
class CalibrationSet:
    """Images that a graph is calibrated and evaluated with. Iterating yields the calibration batches.

    Attributes:
        samples: crops and whole images that ranges are taken from.
        held_out: images kept aside to measure the drop on.
        document: what `set.json` says: files with SHA-256, crop recipe, coverage, files passed over.
    """

    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    document: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        return (sample.image for sample in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def sha256(self) -> str:
        """Identity of the set: of its document in canonical JSON."""
        return sha256_of_bytes(json.dumps(self.document, sort_keys=True).encode())

    @property
    def image_hashes(self) -> frozenset[str]:
        """SHA-256 of every file that ranges are taken from, to warn when an evaluation meets one of them."""
        return frozenset(entry["sha256"] for entry in self.document.get("files", ()) if entry["use"] == "calibration")

    def to_json(self) -> dict[str, Any]:
        """Return the document of `set.json`."""
        return dict(self.document)

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write `set.json`."""
        with atomic_file(path, force=force) as temporary:
            temporary.write_text(json.dumps(self.document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def make_calibration_set(
    images: Path,
    *,
    contract: ModelContract,
    hr: bool = False,
    count: int = 64,
    crop: int = 64,
    whole: int = 4,
    seed: int = 0,
    skip_bad: bool = False,
    progress: Progress = SILENT,
) -> CalibrationSet:
    """Make a calibration set from real images.

    Args:
        images: folder, image, pattern, zip, list file or video.
        contract: of the network: scale, colours and least input size.
        hr: the images are high resolution; they are shrunk by the network's scale (MATLAB's bicubic) to be its input,
            and are themselves the truth that a drop in PSNR is measured against.
        count: crops that ranges are taken from.
        crop: their height and width in LR pixels.
        whole: images taken whole besides, since channel attention sees how large its input is.
        seed: for the choice of crops.
        skip_bad: use the rest when some files cannot be used, instead of refusing.
        progress: where to report.

    Raises:
        InputError: no images, too few, unreadable, constant or random ones, or grey ones for a colour network.
        UsageError: a count or size that makes no sense.
    """
    if count < 1 or crop < max(8, contract.min_size) or whole < 0:
        raise UsageError(
            f"{count} crops of {crop}x{crop} and {whole} whole images",
            expected=f"at least one crop, of at least {max(8, contract.min_size)} pixels",
        )
    bad: list[tuple[str, str]] = []
    photos = _read_usable_photos(images, bad, progress)
    _refuse_bad(images, bad, photos, skip_bad)
    if contract.colours == "rgb" and all(_is_grey(photo.pixels) for photo in photos):
        raise InputError(f"{images} holds only grey images", expected="colour images for an RGB network")
    photos = sorted(photos, key=lambda photo: photo.sha256)  # an order that does not depend on names
    lows = [_shrink(photo.pixels, contract.scale) if hr else photo.pixels for photo in photos]
    kept_aside = [index for index in range(len(photos)) if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1][:MAX_HELD_OUT]
    if not kept_aside:
        kept_aside = [len(photos) - 1]
    used = [index for index in range(len(photos)) if index not in kept_aside]
    crops = choose_crops([lows[index] for index in used], count=count, size=crop, seed=seed)
    crops = [Crop(used[c.image], c.top, c.left, c.height, c.width, c.reason) for c in crops]
    crops += [_center_crop(index, lows[index], WHOLE_PIXELS, "whole") for index in used[:whole]]
    held_out = [_center_crop(index, lows[index], HELD_OUT_PIXELS, "judge") for index in kept_aside]
    total = sum(entry.height * entry.width for entry in crops)
    if total < MIN_PIXELS:
        raise InputError(f"{images} gives {total} LR pixels to calibrate with", expected=f"at least {MIN_PIXELS}")
    return CalibrationSet(
        samples=tuple(_sample(entry, photos, lows, contract, hr=False) for entry in crops),
        held_out=tuple(_sample(entry, photos, lows, contract, hr=hr) for entry in held_out),
        document=_document(images, photos, lows, crops, held_out, bad, hr=hr, count=count, crop=crop, seed=seed),
    )


def _read_usable_photos(images: Path, bad: list[tuple[str, str]], progress: Progress) -> list[Photo]:
    photos: dict[str, Photo] = {}
    with progress.task(f"reading images from {images.name}") as advance:
        for photo in read_photos(images, bad=bad):
            reason = _rejection_reason(photo.pixels)
            if reason:
                bad.append((photo.name, reason))
            else:
                photos.setdefault(photo.sha256, photo)  # the same picture twice is one picture
            advance(note=photo.name)
    return list(photos.values())


def _refuse_bad(images: Path, bad: Sequence[tuple[str, str]], photos: Sequence[Photo], skip_bad: bool) -> None:
    if bad and not skip_bad:
        name, reason = bad[0]
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise InputError(
            f"{len(bad)} of {len(bad) + len(photos)} images cannot be used: {name} ({reason}){others}",
            expected="real images",
            next_step="remove them, or let srdeploy quantize use the rest with --skip-bad",
        )
    if len(photos) < MIN_IMAGES:
        raise InputError(
            f"{images} gives {len(photos)} usable images",
            expected=f"at least {MIN_IMAGES} different ones (50 or more give better ranges)",
        )


def _rejection_reason(pixels: NDArray[np.uint8]) -> str | None:
    """Tell why an image says nothing about real activations, None when it looks like a picture."""
    if min(pixels.shape[:2]) < 8:
        return f"{pixels.shape[1]}x{pixels.shape[0]} pixels are too few"
    luma = pixels.astype(np.float32).mean(axis=2)
    if luma.std() < 1.0:
        return "it is constant"
    centred = luma - luma.mean()
    energy = float((centred**2).mean())
    along = float((centred[:, 1:] * centred[:, :-1]).mean()) / energy
    down = float((centred[1:] * centred[:-1]).mean()) / energy
    # Neighbouring pixels of photographs, drawings and text agree (0.8 and more); those of white noise do not.
    return "it is random noise" if max(along, down) < 0.2 else None


def _is_grey(pixels: NDArray[np.uint8]) -> bool:
    return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all())


def _shrink(pixels: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    height, width = (size - size % scale for size in pixels.shape[:2])
    return imresize(pixels[:height, :width], scale=1 / scale)


def _center_crop(index: int, pixels: NDArray[np.uint8], most: int, reason: str) -> Crop:
    height, width = pixels.shape[:2]
    shrink = min(1.0, (most / (height * width)) ** 0.5)
    tall, wide = max(8, int(height * shrink)), max(8, int(width * shrink))
    return Crop(index, (height - tall) // 2, (width - wide) // 2, tall, wide, reason)


def _sample(
    crop: Crop, photos: Sequence[Photo], lows: Sequence[NDArray[np.uint8]], contract: ModelContract, *, hr: bool
) -> Sample:
    truth = None
    if hr:
        scale = contract.scale
        high = Crop(crop.image, crop.top * scale, crop.left * scale, crop.height * scale, crop.width * scale, "")
        truth = high.cut(photos[crop.image].pixels)
    return Sample(photos[crop.image].name, network_input(crop.cut(lows[crop.image]), contract.colours), truth)


def _document(
    images: Path,
    photos: Sequence[Photo],
    lows: Sequence[NDArray[np.uint8]],
    crops: Sequence[Crop],
    held_out: Sequence[Crop],
    bad: Sequence[tuple[str, str]],
    **recipe: Any,
) -> dict[str, Any]:
    kept_aside = {crop.image for crop in held_out}
    return {
        "schema": 1,
        "source": images.name,
        "recipe": recipe,
        "files": [
            {
                "name": photo.name,
                "sha256": photo.sha256,
                "height": int(photo.pixels.shape[0]),
                "width": int(photo.pixels.shape[1]),
                "use": "judging" if index in kept_aside else "calibration",
            }
            for index, photo in enumerate(photos)
        ],
        "passed_over": [{"name": name, "reason": reason} for name, reason in bad],
        "crops": [{**asdict(crop), "image": photos[crop.image].name} for crop in crops],
        "judges": [{**asdict(crop), "image": photos[crop.image].name} for crop in held_out],
        "coverage": coverage(lows, crops),
        "lr_pixels": sum(crop.height * crop.width for crop in crops),
    }
