"""The stages of a video that are the same for a whole one and for a segment: decoding and computing, and their time."""

import time
from collections import Counter
from collections.abc import Iterator

import numpy as np

from srdeploy.upscale.upscaler import Upscaler
from srdeploy.upscale.video.reader import Frame


def decoded(frames: Iterator[Frame], seconds: dict[str, float]) -> Iterator[Frame]:
    """Yield frames, and add the time that each takes to `seconds["decode"]`."""
    while True:
        started = time.monotonic()
        frame = next(frames, None)
        seconds["decode"] += time.monotonic() - started
        if frame is None:
            return
        yield frame


def computed(up: Upscaler, frame: Frame, seconds: dict[str, float], repaired: Counter[str]) -> Frame:
    """Return the upscaled frame; add the time to `seconds["compute"]`, and the tiles that were run again to `repaired`.

    Raises:
        GateError: the frame is broken and no fallback repaired it.
    """
    started = time.monotonic()
    pixels, report = up.upscale(frame.pixels)
    repaired.update(report.tally.repaired)
    seconds["compute"] += time.monotonic() - started
    return Frame(np.ascontiguousarray(pixels), frame.pts, frame.duration)
