"""How many pixels calibration looks at: bounded by memory, and for expensive networks by multiply-adds.

A window's activations have to fit in memory, and the time of every pass over the images is proportional to pixels times
multiply-adds per pixel. Small networks see everything that the options ask for. RCAN of full size (16 million
multiply-adds per pixel) sees fewer and smaller windows: a pass over them takes about half a minute on two cores, where
the full set would take three minutes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import CapabilityError
from srdeploy.core.memory import bytes_per_pixel
from srdeploy.core.samples import Sample, windows_of
from srdeploy.core.sizes import format_bytes, format_minimum

MAX_CROPS = 64
WHOLE_PIXELS = 256 * 256
"""LR pixels of an image taken whole: more cost time and change no range."""
HELD_OUT_PIXELS = 160 * 160
"""LR pixels of an image to evaluate on: a search evaluates many graphs on all of them."""

RANGE_MACS = 0.9e12
"""Multiply-adds of all crops in one pass, and of all whole images in one pass."""
HELD_OUT_MACS = 1.0e12
"""Multiply-adds of all held-out images in one evaluation."""
HALF_MACS = 6e11
"""Multiply-adds of the images on which overflow of FP16 is looked for; a factor of four is allowed for others."""
HALF_EVALUATION_MACS = 3e11
"""Multiply-adds of the held-out images on which FP16 and BF16 are evaluated; all images agree within a decibel."""
TUNING_MACS = 1.2e11
"""Multiply-adds of the windows on which ways to quantize are compared, a dozen times."""
ROUNDING_MACS = 4e11
"""Multiply-adds of the windows that covariances are taken from."""
_MIN_CROPS = 12
"""The extremes (black, white, six hues) and some of the strata."""
_HELD_OUT_IMAGES = 8
_TUNING_WINDOWS = 8
_ROUNDING_WINDOWS = 16
_WINDOW_SIDE = 64
_MIN_WINDOW_SIDE = 32
_MIN_ROUNDING_WINDOWS = 6

BASE_BYTES = 400 << 20
"""The interpreter, numpy, ONNX Runtime and OpenVINO."""
_BYTES_PER_WEIGHT = 32
"""A weight exists in the model, in edited copies of it, and in each engine's own layout."""
_COPIES = 2.0
"""Rounding to 16 bits and quantizing write every tensor again."""
_DECODED_BYTES = 100
"""Per pixel of an image that is decoded and shrunk: MATLAB's bicubic computes in float64."""


@dataclass(frozen=True)
class WindowPlan:
    """Sizes of the windows that calibration and evaluation use, in LR pixels.

    Attributes:
        memory_bytes: the budget.
        count: number of crops.
        whole_pixels: largest window of an image taken whole.
        held_out_pixels: largest window of a held-out image.
        image_pixels: largest window of a decoded image, in its own pixels.
        limited: the options ask for more than the network's cost per pixel allows.
    """

    memory_bytes: int
    count: int
    whole_pixels: int
    held_out_pixels: int
    image_pixels: int
    limited: bool

    def summary(self) -> str:
        """Return one line for people."""
        line = f"memory budget {format_bytes(self.memory_bytes)}"
        if self.limited:
            line += (
                f": {self.count} crops, windows of {self.whole_pixels:,} pixels for ranges and of "
                f"{self.held_out_pixels:,} for evaluation"
            )
        return line

    def image_window(self, height: int, width: int, multiple: int) -> tuple[int, int, int, int]:
        """Return the part of an image that is used, (top, left, height, width): all of it or its center.

        Args:
            height, width: of the image.
            multiple: all four numbers are multiples of this.
        """
        shrink = min(1.0, (self.image_pixels / (height * width)) ** 0.5)
        tall, wide = int(height * shrink), int(width * shrink)
        tall, wide = tall - tall % multiple, wide - wide % multiple
        top, left = (height - tall) // 2 if shrink < 1 else 0, (width - wide) // 2 if shrink < 1 else 0
        return top - top % multiple, left - left % multiple, tall, wide


def plan_windows(contract: ModelContract, *, memory_bytes: int, count: int | None, crop: int, whole: int) -> WindowPlan:
    """Choose window sizes for a network.

    Args:
        contract: of the network: its multiply-adds and its memory per pixel.
        memory_bytes: the budget.
        count: crops; None takes as many as the network's cost allows, at most MAX_CROPS.
        crop: height and width of the crops.
        whole: number of images taken whole.

    Raises:
        CapabilityError: one crop does not fit.
    """
    macs = max(contract.macs_per_pixel, 1.0)
    base = BASE_BYTES + _BYTES_PER_WEIGHT * macs
    per_pixel = _COPIES * bytes_per_pixel(contract)
    fitting = int((memory_bytes - base) / per_pixel)
    if fitting < crop * crop:
        raise CapabilityError(
            f"a memory budget of {format_bytes(memory_bytes)}",
            expected=f"at least {format_minimum(base + per_pixel * crop * crop)} for crops of {crop}x{crop}",
            next_step="free memory, allow more of it with --memory, or use srdeploy quantize --crop-size",
        )
    wanted = count or MAX_CROPS
    affordable = max(_MIN_CROPS, int(RANGE_MACS / (macs * crop * crop)))
    chosen = count or min(wanted, affordable)
    whole_pixels = min(WHOLE_PIXELS, fitting, max(crop * crop, int(RANGE_MACS / (macs * max(whole, 1)))))
    held_out = min(HELD_OUT_PIXELS, fitting, max(crop * crop, int(HELD_OUT_MACS / (macs * _HELD_OUT_IMAGES))))
    limited = (chosen, whole_pixels, held_out) != (wanted, WHOLE_PIXELS, HELD_OUT_PIXELS)
    return WindowPlan(memory_bytes, chosen, whole_pixels, held_out, memory_bytes // _DECODED_BYTES, limited)


def select_tuning_windows(samples: Sequence[Sample], macs_per_pixel: float) -> list[Sample]:
    """Return small windows of the calibration samples, to compare ways to quantize on."""
    side = math.isqrt(int(TUNING_MACS / (_TUNING_WINDOWS * max(macs_per_pixel, 1.0))))
    return windows_of(samples, _TUNING_WINDOWS, min(_WINDOW_SIDE, max(_MIN_WINDOW_SIDE, side)))


def select_rounding_windows(samples: Sequence[Sample], macs_per_pixel: float) -> list[Sample]:
    """Return small windows of the calibration samples, to take covariances of what layers read from."""
    affordable = int(ROUNDING_MACS / (_WINDOW_SIDE**2 * max(macs_per_pixel, 1.0)))
    return windows_of(samples, min(_ROUNDING_WINDOWS, max(_MIN_ROUNDING_WINDOWS, affordable)), _WINDOW_SIDE)


def select_overflow_samples(samples: Sequence[Sample], macs_per_pixel: float) -> list[Sample]:
    """Return the samples on which overflow is looked for: the largest, then the crops, the extreme ones first."""
    largest = max(samples, key=lambda sample: sample.image.size)
    return _affordable([largest, *(entry for entry in samples if entry is not largest)], macs_per_pixel, HALF_MACS)


def select_half_held_out(samples: Sequence[Sample], macs_per_pixel: float) -> list[Sample]:
    """Return the held-out images on which an FP16 or BF16 graph is evaluated."""
    return _affordable(samples, macs_per_pixel, HALF_EVALUATION_MACS)


def _affordable(samples: Sequence[Sample], macs_per_pixel: float, macs: float) -> list[Sample]:
    """Return as many of the first samples as a number of multiply-adds pays for, at least one."""
    chosen: list[Sample] = []
    for sample in samples:
        macs -= sample.image.shape[2] * sample.image.shape[3] * macs_per_pixel
        if chosen and macs < 0:
            break
        chosen.append(sample)
    return chosen
