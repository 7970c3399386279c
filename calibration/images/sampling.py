"""Sampling of crops: deterministic, spread over texture, brightness and saturation, extremes included.

Rare pixels decide ranges. Sixty crops taken at random miss the one saturated red that a later photograph is full of,
and a range that clips it shifts colors visibly. So the blackest, the whitest and the most saturated crop of each hue
are taken first, and the rest is spread evenly over strata.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

_HUES = {
    # Directions in RGB: a crop's reach in one is the largest "wanted channels minus unwanted channels" of its pixels.
    "red": (1.0, -1.0, -1.0),
    "green": (-1.0, 1.0, -1.0),
    "blue": (-1.0, -1.0, 1.0),
    "yellow": (1.0, 1.0, -1.0),
    "cyan": (-1.0, 1.0, 1.0),
    "magenta": (1.0, -1.0, 1.0),
}
MAX_CANDIDATES_PER_IMAGE = 64


@dataclass(frozen=True)
class Crop:
    """A window of an image: the image's index, top left corner, height and width in LR pixels, and why it was taken."""

    image: int
    top: int
    left: int
    height: int
    width: int
    reason: str

    def cut(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the window of (H, W, C) pixels."""
        return pixels[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class Candidate:
    """A window that may become a crop, and what decides about it.

    Attributes:
        crop: the window.
        texture: mean absolute difference of neighboring pixels' luma, 0..1.
        brightness: mean luma, 0..1.
        saturation: mean of largest minus smallest channel, 0..1.
        reach: per extreme (black, white, then the hues) how close the window's closest pixel comes to it, up to 1.
    """

    crop: Crop
    texture: float
    brightness: float
    saturation: float
    reach: tuple[float, ...]


def list_candidates(pixels: NDArray[np.uint8], *, size: int, seed: Sequence[int]) -> list[Candidate]:
    """Return windows of one image, half overlapping, at most MAX_CANDIDATES_PER_IMAGE of them.

    Args:
        pixels: (H, W, 3) uint8, an LR image. Crops refer to it as image 0.
        size: height and width of the windows; a smaller image is one window.
        seed: for the choice among too many windows.
    """
    height, width = pixels.shape[:2]
    tall, wide = min(size, height), min(size, width)
    tops, lefts = (np.arange(0, whole - part + 1, max(part // 2, 1)) for whole, part in ((height, tall), (width, wide)))
    windows = [(int(top), int(left)) for top in tops for left in lefts]
    if len(windows) > MAX_CANDIDATES_PER_IMAGE:
        random = np.random.default_rng(seed)
        picks = np.sort(random.choice(len(windows), MAX_CANDIDATES_PER_IMAGE, replace=False))
        windows = [windows[pick] for pick in picks]
    return [_describe_crop(Crop(0, top, left, tall, wide, "stratum"), pixels) for top, left in windows]


def choose_crops(candidates: Sequence[Candidate], *, count: int, seed: int) -> list[Crop]:
    """Choose crops: first the extremes (blackest, whitest, most saturated of each hue), then evenly over strata.

    Args:
        candidates: windows of all images.
        count: how many crops; fewer are returned when there are fewer candidates.
        seed: decides among equals.
    """
    random = np.random.default_rng(seed)
    chosen: dict[Crop, None] = {}
    for position, name in enumerate(("black", "white", *_HUES)):
        best = max(candidates, key=lambda entry: entry.reach[position])
        key = next((crop for crop in chosen if _same(crop, best.crop)), None)
        if key is None and len(chosen) < count:
            chosen[replace(best.crop, reason=f"extreme: {name}")] = None
    strata = _strata(candidates)
    for members in strata:
        random.shuffle(members)
    while len(chosen) < count and any(strata):
        for members in strata:
            if members and len(chosen) < count:
                crop = members.pop().crop
                if not any(_same(crop, other) for other in chosen):
                    chosen[crop] = None
    return list(chosen)


def measure_coverage(windows: Iterable[NDArray[np.uint8]]) -> dict[str, float]:
    """Return how close some windows come to black, white and each hue: 1 is a fully saturated pixel."""
    figures = dict.fromkeys(("black", "white", *_HUES), 0.0)
    for window in windows:
        for name, value in zip(figures, _reach(window), strict=True):
            figures[name] = max(figures[name], round(float(value), 3))
    return figures


def _describe_crop(crop: Crop, pixels: NDArray[np.uint8]) -> Candidate:
    window = crop.cut(pixels).astype(np.float32) / 255
    luma = window.mean(axis=2)
    texture = (
        float(np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean()) if luma.size > 3 else 0.0
    )
    saturation = float((window.max(axis=2) - window.min(axis=2)).mean())
    return Candidate(crop, texture, float(luma.mean()), saturation, _reach(crop.cut(pixels)))


def _reach(window: NDArray[np.uint8]) -> tuple[float, ...]:
    values = window.reshape(-1, 3).astype(np.float32) / 255
    luma = values.mean(axis=1)
    hues = []
    for direction in _HUES.values():
        wanted = [axis for axis, sign in enumerate(direction) if sign > 0]
        unwanted = [axis for axis, sign in enumerate(direction) if sign < 0]
        hues.append(float((values[:, wanted].min(axis=1) - values[:, unwanted].max(axis=1)).max()))
    return (float(1 - luma.min()), float(luma.max()), *hues)


def _strata(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Split by quartile of texture, and by halves of brightness and saturation: 16 strata."""
    texture, brightness, saturation = (
        np.array([getattr(entry, name) for entry in candidates]) for name in ("texture", "brightness", "saturation")
    )
    place = (
        np.searchsorted(np.quantile(texture, (0.25, 0.5, 0.75)), texture) * 4
        + (brightness > np.median(brightness)) * 2
        + (saturation > np.median(saturation))
    )
    return [
        [entry for entry, where in zip(candidates, place, strict=True) if where == stratum] for stratum in range(16)
    ]


def _same(one: Crop, two: Crop) -> bool:
    return (one.image, one.top, one.left) == (two.image, two.top, two.left)
