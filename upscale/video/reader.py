"""Decode a video file to RGB frames, through PyAV (FFmpeg's libraries in one wheel; no system ffmpeg).

Colour: YUV becomes RGB with the matrix and range that the stream states. A stream that states no matrix is taken as
players take it, BT.601 below 720 lines and BT.709 from there on; the output then states that matrix, because its own
number of lines would make players guess otherwise. Transfer curve and primaries are passed on as they are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.errors import InputError
from srdeploy.core.extras import import_extra
from srdeploy.upscale.video.color import BT709, JPEG, MPEG, SMPTE170M, SWSCALE_MATRIX, accurate, rgb_from_yuv
from srdeploy.upscale.video.probe import FULL_RANGE_FORMATS, HD_LINES, VideoInfo


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame: (H, W, 3) uint8 or uint16 RGB, its timestamp in ticks, and its duration (0 when not stated)."""

    pixels: NDArray[Any]
    pts: int
    duration: int = 0


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
            return rgb_from_yuv(self._yuv(frame), info.matrix, full_range=info.range == JPEG, bits=info.bits)
        converted = frame.reformat(
            format="rgb48le" if wide else "rgb24",
            src_colorspace=SWSCALE_MATRIX[info.matrix],
            src_color_range=info.range,
            dst_color_range=JPEG,
            interpolation=accurate(self._av),
            threads=1,
        )
        pixels: NDArray[Any] = converted.to_ndarray()
        return pixels

    def _yuv(self, frame: Any) -> NDArray[np.uint16]:
        """Return a frame of more than 8 bits as (3, H, W) planes of its own depth, chroma at full resolution."""
        info = self.info
        matrix = SWSCALE_MATRIX[info.matrix]
        converted = frame.reformat(
            format=f"yuv444p{info.bits}le",
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=info.range,
            dst_color_range=info.range,
            interpolation=accurate(self._av),
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
        form = self._av.VideoFormat(FULL_RANGE_FORMATS.get(name, name))
        if len(form.components) in (2, 4) and not form.is_rgb and form.name.startswith(("yuva", "ya")):
            raise InputError(f"{self.path} has an alpha channel ({name})", expected="an opaque video")
        matrix = int(context.colorspace)
        assumed = matrix not in SWSCALE_MATRIX
        if assumed:
            matrix = BT709 if context.height >= HD_LINES else SMPTE170M
        full = name in FULL_RANGE_FORMATS or int(context.color_range) == JPEG
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
            range=JPEG if full or form.is_rgb else MPEG,
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
