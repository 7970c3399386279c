"""Pictures of a report: without loss (colour maps excepted), small enough to travel inside one page, with a scale."""

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
from srdeploy.runtime.verify.parity import VerifyResult
from srdeploy.runtime.verify.views import View

# Anchors of a perceptually even ramp from black over violet, red and yellow to near-white; nan is drawn in cyan.
_RAMP = np.array(
    [(0, 0, 4), (50, 10, 94), (120, 28, 109), (188, 55, 84), (237, 105, 37), (251, 180, 26), (252, 255, 164)],
    dtype=np.float64,
)
RAMP_CSS = ", ".join(f"rgb({int(r)} {int(g)} {int(b)})" for r, g, b in _RAMP)


class Pictures:
    """Collects pictures under names that are safe as file names."""

    def __init__(self) -> None:
        self._entries: dict[str, dict[str, Any]] = {}

    def add(self, name: str, pixels: NDArray[np.uint8], *, lossless: bool = True) -> str:
        """Store (H, W, 3) uint8 and return its key; only colour maps, which are noise, may be stored with loss."""
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
        """Return the pictures by key; "data" is base64 of a lossless WebP file."""
        return self._entries


def image_entries(verdicts: Sequence[tuple[str, VerifyResult]], pictures: Pictures) -> list[dict[str, Any]]:
    """Return the views of all engines, grouped by image, and the worst crop of each engine.

    Args:
        verdicts: engine names with their verdicts; their views of one image show the same crop.
        pictures: where the pictures go.
    """
    names = list(dict.fromkeys(view.name for _, verdict in verdicts for view in verdict.views))
    entries = []
    for name in names:
        views = [(engine, view) for engine, verdict in verdicts for view in verdict.views if view.name == name]
        entries.append({"kind": "view", **_entry(name, views, pictures, prefix=name)})
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
    """Colour an error map (H, W) linearly from 0 to `peak`; nan is cyan."""
    position = np.clip(np.nan_to_num(error.astype(np.float64) / peak), 0.0, 1.0) * (len(_RAMP) - 1)
    low = np.minimum(position.astype(int), len(_RAMP) - 2)
    share = (position - low)[..., None]
    colours = _RAMP[low] * (1 - share) + _RAMP[low + 1] * share
    colours[~np.isfinite(error)] = (0, 255, 255)
    pixels: NDArray[np.uint8] = np.rint(colours).astype(np.uint8)
    return pixels


def heat_peak(error: NDArray[np.float32]) -> float:
    """Return where the colours end: the next power of two of grey levels on 0..1, at least one level."""
    finite = error[np.isfinite(error)]
    levels = float(finite.max()) * 255.0 if finite.size else 0.0
    return 2.0 ** max(0, math.ceil(math.log2(max(levels, 1e-9)))) / 255.0


def _entry(name: str, views: Sequence[tuple[str, View]], pictures: Pictures, *, prefix: str) -> dict[str, Any]:
    first = views[0][1]
    return {
        **first.box_json(),
        "bicubic": pictures.add(f"{prefix}-bicubic", first.bicubic),
        "reference": pictures.add(f"{prefix}-reference", first.reference),
        "truth": None if first.truth is None else pictures.add(f"{prefix}-truth", first.truth),
        "engines": [_engine(engine, view, pictures, prefix=prefix) for engine, view in views],
    }


def _engine(name: str, view: View, pictures: Pictures, *, prefix: str) -> dict[str, Any]:
    finite = view.error[np.isfinite(view.error)]
    peak = heat_peak(view.error)
    return {
        "name": name,
        "output": pictures.add(f"{prefix}-{name}", view.candidate),
        "heat": pictures.add(f"{prefix}-{name}-heat", heat_map(view.error, peak), lossless=False),
        "heat_peak": peak,
        "max_abs": float(finite.max()) if finite.size else float("nan"),
        "mean_abs": float(finite.mean()) if finite.size else float("nan"),
    }


def save_strip(view: View, path: Path) -> None:
    """Save a crop as one PNG: input enlarged, reference, engine, ground truth where there is one, difference.

    Raises:
        OutputError: the file cannot be written.
    """
    panels = [view.bicubic, view.reference, view.candidate]
    panels += [] if view.truth is None else [view.truth]
    panels.append(heat_map(view.error, heat_peak(view.error)))
    gap = np.full((view.error.shape[0], 4, 3), 255, np.uint8)
    strip = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
    with atomic_file(path, force=True) as temporary:
        Image.fromarray(strip).save(temporary, "PNG")
