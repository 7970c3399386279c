"""What a video file is, and what it says about itself."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from srdeploy.core.errors import InputError
from srdeploy.core.extras import is_installed
from srdeploy.core.imaging.files import is_picture
from srdeploy.upscale.video.color import BT709, JPEG, MPEG, SMPTE170M, SWSCALE_MATRIX
from srdeploy.upscale.video.media import is_cover, open_media, pyav
from srdeploy.upscale.video.side_data import Mastering, display_matrix, mastering, not_kept

SUFFIXES = (
    ".mp4", ".m4v", ".mkv", ".mov", ".webm", ".avi", ".ts", ".m2ts", ".mts", ".mpg", ".mpeg", ".vob", ".nut", ".y4m",
    ".flv", ".wmv", ".3gp", ".ogv", ".mxf", ".h264", ".264", ".h265", ".hevc", ".265", ".obu", ".ivf",
)  # fmt: skip
"""Names that count as videos."""

_HD_LINES = 720
_FULL_RANGE_FORMATS = {"yuvj420p": "yuv420p", "yuvj422p": "yuv422p", "yuvj444p": "yuv444p"}
_SQUARE = Fraction(1)
_OTHER_MATRICES = {
    8: "YCgCo", 10: "BT.2020 with constant luminance", 11: "Y'D'zD'x", 12: "derived from the primaries",
    13: "derived from the primaries, with constant luminance", 14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-Re",
    17: "YCgCo-Ro",
}  # fmt: skip
"""By H.273 number; read as BT.601 or BT.709, colors would be wrong."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video stream says about itself.

    Attributes:
        width, height: of a frame.
        pix_fmt: FFmpeg's name of the pixel format, without the old "j" forms.
        bits: per sample, 8 or more.
        rgb: pixels are stored as RGB.
        alpha: pixels have an alpha channel.
        frame_rate: average frames per second.
        time_base: seconds per tick of the timestamps.
        matrix, range, primaries, transfer: H.273 numbers, the matrix never unspecified.
        matrix_assumed: the stream does not state its matrix.
        aspect: of a pixel; None for square or unknown.
        display_matrix: nine numbers in FFmpeg's layout; None for a picture that is shown as stored.
        mastering: HDR10 metadata; None when there is none.
        not_kept: descriptions of what the output will not have.
    """

    width: int
    height: int
    pix_fmt: str
    bits: int
    rgb: bool
    alpha: bool
    frame_rate: Fraction
    time_base: Fraction
    matrix: int
    range: int
    primaries: int
    transfer: int
    matrix_assumed: bool
    aspect: Fraction | None
    display_matrix: tuple[int, ...] | None
    mastering: Mastering | None
    not_kept: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """Channels of a decoded frame: 3 (RGB) or 4 (RGB and alpha)."""
        return 4 if self.alpha else 3


def is_video(path: Path) -> bool:
    """Return True if a file is a video: by content where PyAV is installed, else by name. Pictures never are."""
    if is_picture(path):
        return False
    if path.suffix.lower() in SUFFIXES:
        return True
    if not is_installed("av"):
        return False
    try:
        with open_media(path) as container:
            return bool(container.streams.video) and "image2" not in container.format.name
    except (pyav().FFmpegError, OSError):
        return False


def info_of(container: Any, stream: Any, frame: Any, *, first: bool = True) -> VideoInfo:
    """Describe a stream by what a decoded frame, its codec and it say; of a later frame only what itself says of color.

    Raises:
        InputError: pixels that cannot be converted to RGB: of a Bayer sensor, CIE XYZ, floating-point, or with a matrix
            other than BT.601, BT.709, BT.2020 and their relatives.
    """
    context = stream.codec_context
    name = str(frame.format.name)
    form = pyav().VideoFormat(_FULL_RANGE_FORMATS.get(name, name))
    if form.is_bayer or name.startswith("xyz") or "f32" in name or "f16" in name:
        raise InputError(
            f"{container.name.removeprefix('file:')} holds {name}: raw sensor data, CIE XYZ or floating-point pixels",
            expected="RGB, YUV or gray in whole numbers",
            next_step="convert it first",
        )
    rgb = form.is_rgb or form.has_palette
    sources = (frame, context) if first else (frame,)
    matrix = _stated_matrix(container, (int(source.colorspace) for source in sources))
    assumed = not matrix
    if assumed:
        matrix = BT709 if frame.height >= _HD_LINES else SMPTE170M
    full = name in _FULL_RANGE_FORMATS or next(filter(None, (int(s.color_range) for s in sources)), MPEG) == JPEG
    aspect = stream.sample_aspect_ratio
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    return VideoInfo(
        width=frame.width,
        height=frame.height,
        pix_fmt=form.name,
        bits=max(component.bits for component in form.components),
        rgb=rgb,
        alpha=has_alpha(form),
        frame_rate=Fraction(rate),
        time_base=Fraction(stream.time_base),
        matrix=matrix,
        range=JPEG if full or rgb else MPEG,
        primaries=int(context.color_primaries),
        transfer=int(context.color_trc),
        matrix_assumed=assumed and not rgb,
        aspect=None if not aspect or aspect == _SQUARE else Fraction(aspect),
        display_matrix=display_matrix(frame),
        mastering=mastering(frame),
        not_kept=(*not_kept(frame), *_other_streams(container, stream)),
    )


def _stated_matrix(container: Any, stated: Iterable[int]) -> int:
    """Return the first stated matrix that can be converted; 0 if none is stated.

    Raises:
        InputError: the stated one cannot.
    """
    for matrix in stated:
        if matrix in SWSCALE_MATRIX:
            return matrix
        if matrix in _OTHER_MATRICES:
            raise InputError(
                f"{container.name.removeprefix('file:')} has the color matrix {_OTHER_MATRICES[matrix]}",
                expected="BT.601, BT.709 or BT.2020 (non-constant luminance)",
                next_step="convert it to one of these first",
            )
    return 0


def chroma_of(pix_fmt: str) -> int:
    """Return which of 4:2:0, 4:2:2 and 4:4:4 (0, 1, 2) keeps all chroma samples of a YUV format."""
    form = pyav().VideoFormat(pix_fmt, 8, 8)
    if len(form.components) < 3:
        return 0
    if form.chroma_width(8) == 8:
        return 2
    return 1 if form.chroma_height(8) == 8 else 0


def has_alpha(form: Any) -> bool:
    """Return True if a pixel format has an alpha channel. Palettes may have one: see `VideoReader`."""
    return len(form.components) in (2, 4) and not form.is_bayer


def _other_streams(container: Any, video: Any) -> list[str]:
    """Return a description of each stream that is neither upscaled nor copied."""
    films = [s for s in container.streams.video if s.index != video.index and not is_cover(s)]
    found = [f"{len(films)} further video streams" if len(films) > 1 else "the other video stream"] if films else []
    # Chapters of MP4 are a stream of texts that FFmpeg discards after reading them.
    data = [
        s for s in container.streams.data if "timecode" not in s.metadata and s.discard != pyav().stream.Discard.all
    ]
    if data:
        found.append("data streams (such as sensor data)" if len(data) > 1 else "the data stream")
    return found
