"""Choose encoder, stored pixel format and quality of a video."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.core.errors import UsageError
from srdeploy.core.extras import import_extra
from srdeploy.upscale.video.color import BT709
from srdeploy.upscale.video.probe import VideoInfo


@dataclass(frozen=True)
class Encoding:
    """How frames are encoded.

    Attributes:
        codec: FFmpeg's name of the encoder.
        pix_fmt: what it stores.
        options: of the encoder, such as {"crf": "17"}.
        notes: lines for the user about what differs from the input.
    """

    codec: str
    pix_fmt: str
    options: dict[str, str]
    notes: tuple[str, ...] = ()


_DEFAULT_CODECS = {".webm": "libvpx-vp9"}
_DEFAULT_QUALITY = {"libx264": 16, "libx265": 18, "libvpx-vp9": 24, "libsvtav1": 24, "libaom-av1": 24}
"""Constant-quality numbers (CRF) that are transparent on ordinary material; the scales differ between codecs."""


def choose_encoding(
    info: VideoInfo, output: Path, *, size: tuple[int, int], codec: str | None, quality: int | None
) -> Encoding:
    """Choose encoder, stored format and quality so that as little as possible changes.

    Args:
        info: of the input.
        output: its suffix names the container.
        size: (height, width) of the output frames.
        codec: the user's choice; None for libx264 (libvpx-vp9 in .webm).
        quality: CRF; None for the codec's own in this table, lossless codecs have none.

    Raises:
        UsageError: no such encoder, or it cannot store the frames.
    """
    av: Any = import_extra("av", "video")
    name = codec or _DEFAULT_CODECS.get(output.suffix.lower(), "libx264")
    try:
        formats = [form.name for form in av.Codec(name, "w").video_formats or ()]
    except (av.FFmpegError, ValueError) as error:
        raise UsageError(
            f"video codec {name!r}", expected="an encoder of this PyAV: libx264, libx265, libsvtav1, libvpx-vp9, ffv1"
        ) from error
    if quality is not None and name not in _DEFAULT_QUALITY:
        raise UsageError(
            f"--quality {quality} for {name}", expected="a codec with a CRF: " + ", ".join(_DEFAULT_QUALITY)
        )
    wanted = _wanted_formats(info, odd=bool(size[0] % 2 or size[1] % 2))
    stored = next((name for name in wanted if name in formats), None)
    if stored is None:
        raise UsageError(
            f"{name} stores none of {', '.join(wanted)}", expected="another --codec", next_step="ffv1 stores all"
        )
    notes = []
    if stored != info.pix_fmt:
        notes.append(f"pixels are stored as {stored}; the input has {info.pix_fmt}")
    if info.matrix_assumed:
        notes.append(f"the input states no colour matrix; taken and written as {_matrix_name(info.matrix)}")
    options = {"crf": str(_DEFAULT_QUALITY[name] if quality is None else quality)} if name in _DEFAULT_QUALITY else {}
    if name in ("libvpx-vp9", "libaom-av1"):
        options |= {"b": "0", "row-mt": "1"}
    if name == "libx265":
        options |= {"x265-params": "log-level=none"}
    if name == "libsvtav1":
        os.environ.setdefault("SVT_LOG", "1")  # its library writes to stderr by itself: errors only
    return Encoding(name, stored, options, tuple(notes))


def _wanted_formats(info: VideoInfo, *, odd: bool) -> list[str]:
    """Return acceptable stored formats, best first: never fewer bits or less chroma than the input has."""
    depth = "" if info.bits <= 8 else "10le" if info.bits <= 10 else "12le" if info.bits <= 12 else "16le"
    if info.rgb:
        return [info.pix_fmt, f"gbrp{depth}", "bgr0", "rgb24", f"yuv444p{depth}"]
    order = [f"yuv420p{depth}", f"yuv422p{depth}", f"yuv444p{depth}"]
    start = next((place for place, name in enumerate(order) if info.pix_fmt.startswith(name[:7])), 0)
    if info.pix_fmt.startswith("gray"):
        return [info.pix_fmt, *(order[2:] if odd else order)]
    if odd:  # subsampled chroma needs even sizes
        return order[2:]
    return [info.pix_fmt, *order[start:]]


def _matrix_name(matrix: int) -> str:
    return "BT.709" if matrix == BT709 else "BT.601"
