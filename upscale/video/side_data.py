"""Side data of frames: display matrix, HDR10 metadata, and what cannot be kept."""

import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from srdeploy.upscale.video.media import pyav

_ONE = 1 << 16  # of the display matrix, 16.16 fixed point
_IDENTITY = (_ONE, 0, 0, 0, _ONE, 0, 0, 0, 1 << 30)
_NOT_KEPT = {
    "A53_CC": "closed captions inside the video stream",
    "DYNAMIC_HDR_PLUS": "HDR10+ metadata",
    "DYNAMIC_HDR_VIVID": "HDR Vivid metadata",
    "DOVI_METADATA": "Dolby Vision metadata",
    "STEREO3D": "the stereoscopic (3D) layout",
    "SPHERICAL": "the spherical (360 degree) projection",
    "S12M_TIMECODE": "time codes inside the video stream",
    "ICC_PROFILE": "the ICC profile",
    "AMBIENT_VIEWING_ENVIRONMENT": "the ambient viewing environment",
    "EXIF": "EXIF metadata inside the video stream",
    "LCEVC": "the LCEVC enhancement layer",
    "VIEW_ID": "the second view of a stereoscopic (3D) video",
}
_NEWER_KINDS = {28: "LCEVC", 29: "VIEW_ID", 31: "EXIF"}
"""AVFrameSideDataType of FFmpeg 8 for which PyAV 18 has no name."""


@dataclass(frozen=True)
class Mastering:
    """SMPTE ST 2086 mastering display and content light level of HDR10; parts that are not stated are None.

    Attributes:
        primaries: CIE 1931 (x, y) of red, green, blue and white.
        luminance: minimum and maximum in cd/m2.
        light: maximum content and frame-average light level (MaxCLL, MaxFALL) in cd/m2.
    """

    primaries: tuple[tuple[Fraction, Fraction], ...] | None = None
    luminance: tuple[Fraction, Fraction] | None = None
    light: tuple[int, int] | None = None

    def equals(self, other: "Mastering | None") -> bool:
        """Return True if both state the same, up to the rounding of codecs (0.0001, and 1 % of the minimum)."""

        def close(one: Any, two: Any) -> bool:
            if isinstance(one, tuple) and isinstance(two, tuple):
                return len(one) == len(two) and all(close(*pair) for pair in zip(one, two, strict=True))
            return one == two or (None not in (one, two) and abs(one - two) <= max(Fraction(1, 10_000), one / 100))

        return other is not None and all(
            close(getattr(self, name), getattr(other, name)) for name in ("primaries", "luminance", "light")
        )

    def display(self, *, fixed_point: bool) -> str | None:
        """Return the mastering display as encoders take it, G()B()R()WP()L(max, min); None if it is incomplete.

        Args:
            fixed_point: chromaticities in 0.00002 and luminance in 0.0001 cd/m2 (x264, x265), not decimals (SVT-AV1).
        """
        if self.primaries is None or self.luminance is None:
            return None
        red, green, blue, white = self.primaries
        low, high = self.luminance

        def pair(values: tuple[Fraction, Fraction], unit: int) -> str:
            return "({},{})".format(*(round(v * unit) if fixed_point else f"{float(v):.5f}" for v in values))

        points = zip(["G", "B", "R", "WP"], (green, blue, red, white), strict=True)
        return "".join(name + pair(point, 50_000) for name, point in points) + "L" + pair((high, low), 10_000)


def display_matrix(frame: Any) -> tuple[int, ...] | None:
    """Return the nine numbers that players transform the picture by, in FFmpeg's layout; None for the identity."""
    data = _find(frame, "DISPLAYMATRIX")
    if data is None or len(data) < 36:
        return None
    matrix = struct.unpack("<9i", data[:36])
    return None if matrix == _IDENTITY else matrix


def scaled_matrix(matrix: tuple[int, ...], scale: Fraction) -> tuple[int, ...]:
    """Return a display matrix for a picture enlarged by `scale`: translations are in pixels."""
    moved = (max(-(1 << 31), min(round(value * scale), (1 << 31) - 1)) for value in matrix[6:8])
    return (*matrix[:6], *moved, matrix[8])


def same_orientation(one: tuple[int, ...] | None, other: tuple[int, ...] | None) -> bool:
    """Return True if two display matrices turn and mirror alike (to 1 %); their translations are not compared."""
    places = (0, 1, 3, 4)
    return all(abs((one or _IDENTITY)[place] - (other or _IDENTITY)[place]) < _ONE / 100 for place in places)


def mastering(frame: Any) -> Mastering | None:
    """Return a frame's HDR10 metadata; None when it has none."""
    display, light = _find(frame, "MASTERING_DISPLAY_METADATA"), _find(frame, "CONTENT_LIGHT_LEVEL")
    primaries = luminance = None
    if display is not None and len(display) >= 88:  # AVMasteringDisplayMetadata: ten AVRational, two flags
        numbers = struct.unpack("<22i", display[:88])
        values = [Fraction(n, d) if d else Fraction(0) for n, d in zip(numbers[0:20:2], numbers[1:20:2], strict=True)]
        if numbers[20]:
            primaries = tuple((values[place], values[place + 1]) for place in (0, 2, 4, 6))
        if numbers[21]:
            luminance = (values[8], values[9])
    levels = struct.unpack("<2I", light[:8]) if light is not None and len(light) >= 8 else None
    found = Mastering(primaries, luminance, levels if levels != (0, 0) else None)
    return None if found == Mastering() else found


def not_kept(frame: Any) -> tuple[str, ...]:
    """Return a description of each kind of side data that has no place in the output."""
    found = (_NOT_KEPT.get(kind) for kind, _ in _items(frame))
    return tuple(sorted({name for name in found if name is not None}))


def _find(frame: Any, name: str) -> bytes | None:
    return next((data for kind, data in _items(frame) if kind == name), None)


def _items(frame: Any) -> Iterator[tuple[str, bytes]]:
    _name_all_kinds()
    for side in frame.side_data.keys():  # noqa: SIM118 - the container's keys are the entries themselves
        yield side.type.name, bytes(side)


@functools.cache
def _name_all_kinds() -> None:
    """Let PyAV read frames whose side data has a number that its enumeration lacks: it would raise ValueError."""

    def missing(cls: Any, value: int) -> Any:
        member = object.__new__(cls)
        member._name_, member._value_ = _NEWER_KINDS.get(value, f"KIND_{value}"), value
        return cls._value2member_map_.setdefault(value, member)

    pyav().sidedata.sidedata.Type._missing_ = classmethod(missing)
