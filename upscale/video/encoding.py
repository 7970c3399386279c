"""Choose encoder, stored pixel format and quality so that as little as possible changes."""

import os
from dataclasses import dataclass
from pathlib import Path

from srdeploy.core.errors import UsageError
from srdeploy.upscale.video.color import BT709
from srdeploy.upscale.video.media import CannotHoldError, containers_of, pyav
from srdeploy.upscale.video.probe import VideoInfo, chroma_of, has_alpha
from srdeploy.upscale.video.side_data import Mastering

_DEFAULT_CODECS = {".webm": "libvpx-vp9"}
DEFAULT_QUALITY = {"libx264": 16, "libx265": 18, "libvpx-vp9": 24, "libsvtav1": 24, "libaom-av1": 24}
"""Constant-quality numbers (CRF) that are transparent on ordinary material; the scales differ between codecs."""
_DEPTHS = {8: "", 10: "10le", 12: "12le", 16: "16le"}


@dataclass(frozen=True)
class Encoding:
    """How frames are encoded.

    Attributes:
        codec: FFmpeg's name of the encoder.
        pix_fmt: the stored pixel format.
        options: of the encoder, such as {"crf": "17"}.
        notes: lines for the user about what differs from the input.
        segment_suffix: container of the segments: Matroska, or that of the output for codecs that it does not hold.
    """

    codec: str
    pix_fmt: str
    options: dict[str, str]
    notes: tuple[str, ...] = ()
    segment_suffix: str = ".mkv"

    @property
    def rgb(self) -> bool:
        """Whether pixels are stored as RGB."""
        return bool(pyav().VideoFormat(self.pix_fmt).is_rgb)

    @property
    def bits(self) -> int:
        """Stored bits per sample."""
        return max(int(component.bits) for component in pyav().VideoFormat(self.pix_fmt).components)


def choose_encoding(
    info: VideoInfo, output: Path, *, size: tuple[int, int], codec: str | None, quality: int | None
) -> Encoding:
    """Choose encoder, stored format and quality.

    Args:
        info: of the input.
        output: its suffix names the container.
        size: (height, width) of the output frames.
        codec: the user's choice; None for libx264 (libvpx-vp9 in .webm).
        quality: CRF; None for the codec's own in `DEFAULT_QUALITY`, lossless codecs have none.

    Raises:
        UsageError: no such encoder, or it has no CRF.
        CannotHoldError: it cannot store the frames, or the container cannot hold it. Bits, chroma and alpha are never
            reduced.
    """
    name, formats = _encoder(codec or _DEFAULT_CODECS.get(output.suffix.lower(), "libx264"))
    if quality is not None and name not in DEFAULT_QUALITY:
        raise UsageError(
            f"--quality {quality} for {name}", expected="a codec with a CRF: " + ", ".join(DEFAULT_QUALITY)
        )
    if info.alpha and not any(has_alpha(pyav().VideoFormat(form)) for form in formats):
        raise CannotHoldError(f"the input has an alpha channel ({info.pix_fmt}), and {name} stores none", by_codec=True)
    wanted = list(dict.fromkeys(_wanted_formats(info, odd=bool(size[0] % 2 or size[1] % 2))))
    stored = next((form for form in wanted if form in formats), None)
    if stored is None:
        raise CannotHoldError(f"{name} stores none of {', '.join(wanted)}", by_codec=True)
    notes = []
    if stored != info.pix_fmt:
        notes.append(f"pixels are stored as {stored}; the input has {info.pix_fmt}")
    if info.matrix_assumed:
        matrix = "BT.709" if info.matrix == BT709 else "BT.601"
        notes.append(f"the input does not state its color matrix; read and written as {matrix}")
    notes += [f"not kept: {name}" for name in info.not_kept]
    containers = containers_of(name)
    if output.suffix.lower() not in containers:
        raise CannotHoldError(f"{output.suffix} cannot hold {name}")
    suffix = ".mkv" if ".mkv" in containers else output.suffix
    options = _options(name, quality, info.mastering, alpha=info.alpha)
    return Encoding(name, stored, options, tuple(notes), suffix)


def _encoder(codec: str) -> tuple[str, list[str]]:
    """Return an encoder's own name, libx264 for h264, and the pixel formats that it takes."""
    av = pyav()
    try:
        encoder = av.Codec(codec, "w")
        if encoder.type != "video":
            raise ValueError(codec)
        return str(encoder.name), [form.name for form in encoder.video_formats or ()]
    except (av.FFmpegError, ValueError) as error:
        raise UsageError(
            f"video codec {codec!r}", expected="an encoder of this PyAV: libx264, libx265, libsvtav1, libvpx-vp9, ffv1"
        ) from error


def _options(codec: str, quality: int | None, mastering: Mastering | None, *, alpha: bool) -> dict[str, str]:
    options: dict[str, str] = {}
    if codec in DEFAULT_QUALITY:
        options["crf"] = str(DEFAULT_QUALITY[codec] if quality is None else quality)
    if codec in ("libvpx-vp9", "libaom-av1"):
        options |= {"b": "0", "row-mt": "1"}
    if codec == "libvpx-vp9" and alpha:
        options["auto-alt-ref"] = "0"  # libvpx cannot combine hidden frames with alpha
    hdr = _hdr_options(codec, mastering)
    if codec == "libx265":
        options["x265-params"] = ":".join(["log-level=none", *hdr])
    elif hdr:
        options["svtav1-params" if codec == "libsvtav1" else "x264-params"] = ":".join(hdr)
    if codec == "libsvtav1":
        os.environ.setdefault("SVT_LOG", "1")  # its library writes to stderr by itself: errors only
    return options


def _hdr_options(codec: str, mastering: Mastering | None) -> list[str]:
    """Return HDR10 metadata as parameters of the encoders that write it into the stream."""
    if mastering is None or codec not in ("libx264", "libx265", "libsvtav1"):
        return []
    names = {
        "libx264": ("mastering-display", "cll"),
        "libx265": ("master-display", "max-cll"),
        "libsvtav1": ("mastering-display", "content-light"),
    }[codec]
    display = mastering.display(fixed_point=codec != "libsvtav1")
    found = [] if display is None else [f"{names[0]}={display}"]
    if mastering.light is not None:
        found.append(f"{names[1]}={mastering.light[0]},{mastering.light[1]}")
    return found


def _wanted_formats(info: VideoInfo, *, odd: bool) -> list[str]:
    """Return acceptable stored formats, best first: never fewer bits, less chroma or no alpha."""
    depths = [suffix for bits, suffix in _DEPTHS.items() if bits >= min(info.bits, 16)]
    own = [] if info.pix_fmt == "pal8" else [info.pix_fmt]
    if info.alpha:
        planar, packed = "gbrap", ["rgba", "argb", "bgra"] if info.bits <= 8 else ["rgba64le", "rgba64be"]
        yuv = ("yuva420p", "yuva422p", "yuva444p")
    else:
        planar, packed = "gbrp", ["bgr0", "rgb24"] if info.bits <= 8 else ["rgb48le", "rgb48be"]
        yuv = ("yuv420p", "yuv422p", "yuv444p")
    if info.rgb:
        planars = [planar + depth for depth in depths]
        return [*own, planars[0], *packed, *planars[1:], *(yuv[2] + depth for depth in depths)]
    start = chroma_of(info.pix_fmt)
    if odd:  # subsampled chroma needs even sizes
        start = 2
        own = own if info.pix_fmt.startswith(("gray", "ya")) else []
    return [*own, *(form + depth for depth in depths for form in yuv[start:])]
