"""What a video file is and says about itself."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from srdeploy.core.extras import import_extra, is_installed
from srdeploy.core.imaging.read import is_picture

SUFFIXES = (".mp4", ".m4v", ".mkv", ".mov", ".webm", ".avi", ".ts", ".m2ts", ".mpg", ".mpeg", ".nut", ".y4m", ".flv")
"""Names that count as videos."""


HD_LINES = 720
FULL_RANGE_FORMATS = {"yuvj420p": "yuv420p", "yuvj422p": "yuv422p", "yuvj444p": "yuv444p"}


@dataclass(frozen=True)
class VideoInfo:
    """What a video stream says about itself.

    Attributes:
        width, height: of a frame.
        pix_fmt: FFmpeg's name of the pixel format, without the old "j" forms.
        bits: per sample, 8 or more.
        rgb: pixels are stored as RGB.
        frame_rate: average frames per second.
        time_base: seconds per tick of the timestamps.
        frames: as the container declares; 0 when it does not.
        matrix, range, primaries, transfer: H.273 numbers, the matrix never unspecified.
        matrix_assumed: whether the stream left the matrix open.
        aspect: of a pixel; None for square or unknown.
        rotation: degrees counter-clockwise that players turn the picture.
    """

    width: int
    height: int
    pix_fmt: str
    bits: int
    rgb: bool
    frame_rate: Fraction
    time_base: Fraction
    frames: int
    matrix: int
    range: int
    primaries: int
    transfer: int
    matrix_assumed: bool
    aspect: Fraction | None
    rotation: int


def is_video(path: Path) -> bool:
    """Tell whether a file is a video: by content where PyAV is installed, else by name. Animated pictures are not."""
    if is_picture(path):
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    if not is_installed("av"):
        return False
    av: Any = import_extra("av", "video")
    try:
        with av.open(str(path)) as container:
            return bool(container.streams.video) and "image2" not in container.format.name
    except (av.FFmpegError, OSError):
        return False
