"""The crops of a report as WebP images: lossless except color maps, small enough to be embedded in the page."""

import base64
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from srdeploy.core.artifact import atomic_file
from srdeploy.runtime.verify.crops import Crop
from srdeploy.runtime.verify.parity import VerifyResult

# Anchors of a perceptually uniform ramp from black over violet, red and yellow to near-white; nan is drawn in cyan.
_RAMP = np.array(
    [(0, 0, 4), (50, 10, 94), (120, 28, 109), (188, 55, 84), (237, 105, 37), (251, 180, 26), (252, 255, 164)],
    dtype=np.float64,
)
RAMP_CSS = ", ".join(f"rgb({int(r)} {int(g)} {int(b)})" for r, g, b in _RAMP)


class CropImages:
    """Collects images under names that are safe as file names."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Any]] = {}

    def add(self, name: str, pixels: NDArray[np.uint8], *, lossless: bool = True) -> str:
        """Store (H, W, 3) uint8 and return its key; only color maps, which are noise, may be lossy."""
        safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "picture"
        key, number = safe, 2
        while key in self._entries:
            key, number = f"{safe}-{number}", number + 1
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "WEBP", lossless=lossless, quality=70 if lossless else 90, method=4)
        self._entries[key] = {
            "file": f"crops/{key}.webp",
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "data": base64.b64encode(stream.getvalue()).decode("ascii"),
        }
        return key

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return the images by key; "data" is base64 of a lossless WebP file."""
        return self._entries


def image_entries(verdicts: Sequence[tuple[str, VerifyResult]], pictures: CropImages) -> list[dict[str, Any]]:
    """Return the crops of all engines, grouped by image, and the worst crop of each engine.

    Args:
        verdicts: engine names with their results; their crops of one image show the same part.
        pictures: collects the images.
    """
    names = list(dict.fromkeys(crop.name for _, verdict in verdicts for crop in verdict.crops))
    entries = []
    for name in names:
        crops = [(engine, crop) for engine, verdict in verdicts for crop in verdict.crops if crop.name == name]
        entries.append({"kind": "view", **_entry(name, crops, pictures, prefix=name)})
    for engine, verdict in verdicts:
        if verdict.worst is not None:
            prefix = f"worst-{engine}"
            entries.append(
                {
                    "kind": "worst",
                    "engine": engine,
                    **_entry(verdict.worst.name, [(engine, verdict.worst)], pictures, prefix=prefix),
                }
            )
    return entries


def heat_map(error: NDArray[np.float32], peak: float) -> NDArray[np.uint8]:
    """Color an error map (H, W) linearly from 0 to `peak`; nan is cyan."""
    position = np.clip(np.nan_to_num(error.astype(np.float64) / peak), 0.0, 1.0) * (len(_RAMP) - 1)
    low = np.minimum(position.astype(int), len(_RAMP) - 2)
    share = (position - low)[..., None]
    colors = _RAMP[low] * (1 - share) + _RAMP[low + 1] * share
    colors[~np.isfinite(error)] = (0, 255, 255)
    pixels: NDArray[np.uint8] = np.rint(colors).astype(np.uint8)
    return pixels


def heat_peak(error: NDArray[np.float32]) -> float:
    """Return where the color scale ends: the next power of two of grey levels on 0..1, at least one level."""
    finite = error[np.isfinite(error)]
    levels = float(finite.max()) * 255.0 if finite.size else 0.0
    return 2.0 ** max(0, math.ceil(math.log2(max(levels, 1e-9)))) / 255.0


def _entry(name: str, crops: Sequence[tuple[str, Crop]], pictures: CropImages, *, prefix: str) -> dict[str, Any]:
    first = crops[0][1]
    return {
        **first.box_json(),
        "bicubic": pictures.add(f"{prefix}-bicubic", first.bicubic),
        "reference": pictures.add(f"{prefix}-reference", first.reference),
        "truth": None if first.truth is None else pictures.add(f"{prefix}-truth", first.truth),
        "engines": [_engine(engine, crop, pictures, prefix=prefix) for engine, crop in crops],
    }


def _engine(name: str, crop: Crop, pictures: CropImages, *, prefix: str) -> dict[str, Any]:
    finite = crop.error[np.isfinite(crop.error)]
    peak = heat_peak(crop.error)
    return {
        "name": name,
        "output": pictures.add(f"{prefix}-{name}", crop.candidate),
        "heat": pictures.add(f"{prefix}-{name}-heat", heat_map(crop.error, peak), lossless=False),
        "heat_peak": peak,
        "max_abs": float(finite.max()) if finite.size else float("nan"),
        "mean_abs": float(finite.mean()) if finite.size else float("nan"),
    }


def save_crop(crop: Crop, path: Path) -> None:
    """Save a crop as one PNG: input enlarged, reference, engine, ground truth where there is one, difference.

    Raises:
        OutputError: the file cannot be written.
    """
    panels = [crop.bicubic, crop.reference, crop.candidate]
    panels += [] if crop.truth is None else [crop.truth]
    panels.append(heat_map(crop.error, heat_peak(crop.error)))
    gap = np.full((crop.error.shape[0], 4, 3), 255, np.uint8)
    strip = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
    with atomic_file(path, force=True) as temporary:
        Image.fromarray(strip).save(temporary, "PNG")
