"""Video files as RGB frames and back, through PyAV (FFmpeg's libraries inside one wheel; no system ffmpeg).

Colour: YUV becomes RGB with the matrix and range that the stream states. A stream that states no matrix is taken as
players take it, BT.601 below 720 lines and BT.709 from there on; the output then states that matrix, because its own
number of lines would make players guess otherwise. Transfer curve and primaries are passed on as they are.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.extras import import_extra, is_installed
from srdeploy.core.imaging.read import is_picture

SUFFIXES = (".mp4", ".m4v", ".mkv", ".mov", ".webm", ".avi", ".ts", ".m2ts", ".mpg", ".mpeg", ".nut", ".y4m", ".flv")
"""Names that count as videos."""

# Numbers of the H.273 colour tables, as FFmpeg uses them.
_BT709, _UNSPECIFIED, _FCC, _BT470BG, _SMPTE170M, _SMPTE240M, _BT2020 = 1, 2, 4, 5, 6, 7, 9
_MPEG, _JPEG = 1, 2
_SWSCALE_MATRIX = {_BT709: 1, _FCC: 4, _BT470BG: 5, _SMPTE170M: 5, _SMPTE240M: 7, _BT2020: 9}
_LUMA_WEIGHTS = {
    _BT709: (0.2126, 0.0722), _FCC: (0.30, 0.11), _BT470BG: (0.299, 0.114), _SMPTE170M: (0.299, 0.114),
    _SMPTE240M: (0.212, 0.087), _BT2020: (0.2627, 0.0593),
}  # fmt: skip
"""Red and blue in luma, by matrix."""
_HD_LINES = 720
_FULL_RANGE_FORMATS = {"yuvj420p": "yuv420p", "yuvj422p": "yuv422p", "yuvj444p": "yuv444p"}


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


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame: (H, W, 3) uint8 or uint16 RGB, its timestamp in ticks, and its duration (0 when not stated)."""

    pixels: NDArray[Any]
    pts: int
    duration: int = 0


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


class VideoReader:
    """Decodes the first video stream of a file."""

    def __init__(self, path: Path) -> None:
        """Open a file.

        Raises:
            InputError: empty, truncated beyond reading, or without a video stream that can be decoded.
            MissingExtraError: PyAV is not installed.
        """
        av: Any = import_extra("av", "video")
        self._av = av
        self.path = path
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes)", expected="a video")
        try:
            self.container = av.open(str(path))
        except av.FFmpegError as error:
            raise InputError(
                f"{path} is damaged, truncated or no video ({error.strerror})",
                next_step="copy the file again from where it came from",
            ) from error
        # Cover pictures of music files are video streams too, with this mark.
        films = [
            stream
            for stream in self.container.streams.video
            if not int(stream.disposition) & int(av.stream.Disposition.attached_pic)
        ]
        if not films or films[0].codec_context is None or not films[0].width:
            self.container.close()
            raise InputError(f"{path} holds no video stream that can be decoded", expected="a video")
        self.stream = films[0]
        self.stream.thread_type = "AUTO"
        self.first: Any = None
        self.info = self._info()

    def frames(self, skip: int = 0) -> Iterator[Frame]:
        """Decode all frames in order of presentation; the first `skip` are decoded and passed over.

        Raises:
            InputError: damaged, truncated, interlaced or changing in size.
        """
        number = 0
        for frame in self._decoded():
            self._check(frame, number)
            if number >= skip:
                pts = frame.pts if frame.pts is not None else round(number / self.info.frame_rate / self.info.time_base)
                yield Frame(self._rgb(frame), pts, int(getattr(frame, "duration", 0) or 0))
            number += 1
        if number < self.info.frames:
            raise InputError(
                f"{self.path} ends after {number} of {self.info.frames} frames",
                next_step="the file is truncated: copy it again from where it came from",
            )

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def _decoded(self) -> Iterator[Any]:
        try:
            yield from self.container.decode(self.stream)
        except self._av.FFmpegError as error:
            raise InputError(
                f"{self.path} is damaged or truncated ({error.strerror})",
                next_step="copy the file again from where it came from",
            ) from error

    def _check(self, frame: Any, number: int) -> None:
        info = self.info
        if frame.is_corrupt:
            raise InputError(f"{self.path}: frame {number} is damaged", next_step="copy the file again")
        if (frame.width, frame.height) != (info.width, info.height):
            raise InputError(
                f"{self.path} changes its size at frame {number}, to {frame.width}x{frame.height}",
                expected="one size throughout",
                next_step="split it there",
            )
        if frame.interlaced_frame:
            raise InputError(
                f"{self.path} is interlaced",
                expected="progressive frames: a network would enlarge the comb of two fields",
                next_step="deinterlace it first",
            )

    def _rgb(self, frame: Any) -> NDArray[Any]:
        info = self.info
        wide = info.bits > 8
        if wide and not info.rgb:
            return rgb_from_yuv(self._yuv(frame), info.matrix, full_range=info.range == _JPEG, bits=info.bits)
        converted = frame.reformat(
            format="rgb48le" if wide else "rgb24",
            src_colorspace=_SWSCALE_MATRIX[info.matrix],
            src_color_range=info.range,
            dst_color_range=_JPEG,
            interpolation=_accurate(self._av),
            threads=1,
        )
        pixels: NDArray[Any] = converted.to_ndarray()
        return pixels

    def _yuv(self, frame: Any) -> NDArray[np.uint16]:
        """Return a frame of more than 8 bits as (3, H, W) planes of its own depth, chroma at full resolution."""
        info = self.info
        matrix = _SWSCALE_MATRIX[info.matrix]
        converted = frame.reformat(
            format=f"yuv444p{info.bits}le",
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=info.range,
            dst_color_range=info.range,
            interpolation=_accurate(self._av),
            threads=1,
        )
        planes = [
            np.frombuffer(plane, np.uint16).reshape(-1, plane.line_size // 2)[: info.height, : info.width]
            for plane in converted.planes
        ]
        return np.stack(planes)

    def _info(self) -> VideoInfo:
        stream, context = self.stream, self.stream.codec_context
        name = str(context.pix_fmt)
        form = self._av.VideoFormat(_FULL_RANGE_FORMATS.get(name, name))
        if len(form.components) in (2, 4) and not form.is_rgb and form.name.startswith(("yuva", "ya")):
            raise InputError(f"{self.path} has an alpha channel ({name})", expected="an opaque video")
        matrix = int(context.colorspace)
        assumed = matrix not in _SWSCALE_MATRIX
        if assumed:
            matrix = _BT709 if context.height >= _HD_LINES else _SMPTE170M
        full = name in _FULL_RANGE_FORMATS or int(context.color_range) == _JPEG
        aspect = stream.sample_aspect_ratio
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        return VideoInfo(
            width=context.width,
            height=context.height,
            pix_fmt=form.name,
            bits=max(component.bits for component in form.components),
            rgb=form.is_rgb,
            frame_rate=Fraction(rate),
            time_base=Fraction(stream.time_base),
            frames=int(stream.frames),
            matrix=matrix,
            range=_JPEG if full or form.is_rgb else _MPEG,
            primaries=int(context.color_primaries),
            transfer=int(context.color_trc),
            matrix_assumed=assumed and not form.is_rgb,
            aspect=None if not aspect or aspect == 1 else Fraction(aspect),
            rotation=self._rotation(),
        )

    def _rotation(self) -> int:
        """Return the display rotation; it travels with the first decoded frame."""
        try:
            frame = next(self.container.decode(self.stream), None)
            self.container.seek(0)
        except self._av.FFmpegError as error:
            raise InputError(
                f"{self.path} is damaged or truncated ({error.strerror})",
                next_step="copy the file again from where it came from",
            ) from error
        if frame is None:
            raise InputError(f"{self.path} holds no frame that can be decoded", expected="a video")
        return int(frame.rotation)


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


class VideoWriter:
    """Encodes frames into a file of one stream."""

    def __init__(self, path: Path, info: VideoInfo, encoding: Encoding, size: tuple[int, int]) -> None:
        av: Any = import_extra("av", "video")
        self._av = av
        self._info = info
        self._encoding = encoding
        self._container = av.open(str(path), "w")
        # No rate is given: the encoder's clock is the input's, so variable frame rates come through.
        stream = self._container.add_stream(encoding.codec, rate=info.frame_rate, options=dict(encoding.options))
        stream.height, stream.width = size
        stream.pix_fmt = encoding.pix_fmt
        stream.time_base = info.time_base
        context = stream.codec_context
        context.time_base = info.time_base
        context.framerate = info.frame_rate
        context.colorspace, context.color_range = self._matrix(), self._range()
        context.color_primaries, context.color_trc = info.primaries, info.transfer
        context.flags |= int(av.codec.context.Flags.global_header)
        if info.aspect is not None:
            context.sample_aspect_ratio = info.aspect
        self._stream = stream

    def write(self, frame: Frame) -> None:
        """Encode one frame of RGB."""
        info = self._info
        wide = frame.pixels.dtype == np.uint16
        rgb_out = self._encoding.pix_fmt.startswith(("rgb", "gbr", "bgr"))
        matrix = None if rgb_out else _SWSCALE_MATRIX[info.matrix]
        by_hand = not rgb_out and (wide or self._range() == _JPEG)
        made = (
            self._yuv(frame.pixels)
            if by_hand
            else self._av.VideoFrame.from_ndarray(frame.pixels, format="rgb48le" if wide else "rgb24")
        )
        stored = made.reformat(
            format=self._encoding.pix_fmt,
            src_colorspace=matrix if by_hand else None,
            src_color_range=self._range() if by_hand else _JPEG,
            dst_colorspace=matrix,
            dst_color_range=self._range(),
            interpolation=_accurate(self._av),
            threads=1,
        )
        stored.pts = frame.pts
        stored.time_base = info.time_base
        stored.colorspace, stored.color_range = self._matrix(), self._range()
        if frame.duration:
            stored.duration = frame.duration
        for packet in self._stream.encode(stored):
            self._container.mux(packet)

    def _yuv(self, pixels: NDArray[Any]) -> Any:
        """Return RGB as a frame of the stored depth with chroma at full resolution."""
        form = self._av.VideoFormat(self._encoding.pix_fmt)
        bits = max(component.bits for component in form.components)
        height, width, _ = pixels.shape
        made = self._av.VideoFrame(width, height, "yuv444p" if bits == 8 else f"yuv444p{bits}le")
        values = yuv_from_rgb(pixels, self._info.matrix, full_range=self._range() == _JPEG, bits=bits)
        for plane, rows in zip(made.planes, values, strict=True):
            padded = np.zeros((plane.height, plane.line_size // rows.itemsize), rows.dtype)
            padded[:, :width] = rows
            plane.update(padded)
        return made

    def close(self) -> None:
        """Write what the encoder still holds, and end the file."""
        for packet in self._stream.encode(None):
            self._container.mux(packet)
        self._container.close()

    def abort(self) -> None:
        """Close without finishing; the file is thrown away."""
        self._container.close()

    def _matrix(self) -> int:
        return 0 if self._encoding.pix_fmt.startswith(("rgb", "gbr", "bgr")) else self._info.matrix

    def _range(self) -> int:
        rgb_out = self._encoding.pix_fmt.startswith(("rgb", "gbr", "bgr"))
        return _JPEG if rgb_out else self._info.range


def yuv_from_rgb(pixels: NDArray[Any], matrix: int, *, full_range: bool, bits: int) -> NDArray[Any]:
    """Convert RGB to YUV, rounded. swscale is as exact for limited range in 8 bits, and for nothing else.

    It cuts full-range chroma off, half a step too low on average, and is wrong by up to four steps of 10 bits.

    Args:
        pixels: (H, W, 3) uint8 or uint16.
        matrix: H.273 number.
        full_range: Y, U and V use all values.
        bits: of the result.

    Returns:
        (3, H, W) uint8, or uint16 for more than 8 bits.
    """
    rows, offsets = _yuv_arithmetic(matrix, full_range, bits)
    rgb = pixels.reshape(-1, 3).T.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)  # (3, H * W)
    yuv = rows.astype(np.float32) @ rgb + offsets.astype(np.float32)
    planes: NDArray[Any] = np.rint(yuv).clip(0, 2**bits - 1).astype(np.uint8 if bits == 8 else np.uint16)
    return planes.reshape(3, *pixels.shape[:2])


def rgb_from_yuv(planes: NDArray[np.uint16], matrix: int, *, full_range: bool, bits: int) -> NDArray[np.uint16]:
    """Convert YUV of more than 8 bits, (3, H, W), to RGB (H, W, 3) uint16, clamped and rounded."""
    rows, offsets = _yuv_arithmetic(matrix, full_range, bits)
    rgb = np.linalg.inv(rows).astype(np.float32) @ (planes.reshape(3, -1) - offsets.astype(np.float32))
    pixels: NDArray[np.uint16] = np.rint(rgb.clip(0, 1) * np.float32(65535)).astype(np.uint16)
    return np.ascontiguousarray(pixels.T).reshape(*planes.shape[1:], 3)


def _yuv_arithmetic(matrix: int, full_range: bool, bits: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return rows and offsets: YUV in steps of `bits` = rows @ RGB in 0..1 + offsets."""
    red, blue = _LUMA_WEIGHTS[matrix]
    luma = np.array([red, 1 - red - blue, blue])
    rows = np.array([luma, ((0, 0, 1) - luma) / (2 * (1 - blue)), ((1, 0, 0) - luma) / (2 * (1 - red))])
    step = 2 ** (bits - 8)
    middle = 128 * step
    if full_range:
        return rows * (2**bits - 1), np.array([[0], [middle], [middle]], np.float64)
    return rows * (step * np.array([[219], [224], [224]])), np.array([[16 * step], [middle], [middle]], np.float64)


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
    return "BT.709" if matrix == _BT709 else "BT.601"


def _accurate(av: Any) -> int:
    """Return swscale's most exact road: bicubic chroma at full resolution, rounded, the same on every processor."""
    kinds = av.video.reformatter.Interpolation
    return int(kinds.BICUBIC | kinds.ACCURATE_RND | kinds.FULL_CHR_H_INP | kinds.FULL_CHR_H_INT | kinds.BITEXACT)
