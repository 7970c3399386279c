"""Encode RGB frames into a file of one video stream."""

import errno
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.errors import UsageError
from srdeploy.upscale.video.color import JPEG, SWSCALE_MATRIX, accurate, yuv_from_rgb
from srdeploy.upscale.video.encoding import Encoding
from srdeploy.upscale.video.media import create_media, pyav
from srdeploy.upscale.video.probe import VideoInfo
from srdeploy.upscale.video.reader import Frame

_RGB_MATRIX = 0  # H.273
_OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_MILLISECOND = Fraction(1, 1000)
_LONGEST_REORDERING = 64  # places between decoding and presentation; codecs end at 16 reference frames


class VideoWriter:
    """Encodes frames into a file of one stream.

    Packets are stamped with the number of their frame in the file, in milliseconds: the times of the frames, which
    Matroska would round, are written when the segments are joined.
    """

    def __init__(self, path: Path, info: VideoInfo, encoding: Encoding, size: tuple[int, int]) -> None:
        self._info = info
        self._encoding = encoding
        self._numbers: dict[int, int] = {}
        self._packets = 0
        self._container = create_media(path)
        # The encoder's clock is the input's, so variable frame rates come through.
        stream = self._container.add_stream(encoding.codec, rate=info.frame_rate, options=dict(encoding.options))
        stream.height, stream.width = size
        stream.pix_fmt = encoding.pix_fmt
        stream.time_base = info.time_base
        context = stream.codec_context
        context.time_base = info.time_base
        context.framerate = info.frame_rate
        context.colorspace, context.color_range = self._matrix(), self._range()
        context.color_primaries, context.color_trc = info.primaries, info.transfer
        context.flags |= int(pyav().codec.context.Flags.global_header)
        if info.aspect is not None:
            context.sample_aspect_ratio = info.aspect
        self._stream = stream

    def write(self, frame: Frame) -> None:
        """Encode one frame of RGB, or of RGB and alpha.

        Raises:
            UsageError: the encoder does not take frames of this size, format or rate.
        """
        stored = self._converted(frame.pixels)
        stored.pts = frame.pts
        stored.time_base = self._info.time_base
        stored.colorspace, stored.color_range = self._matrix(), self._range()
        if frame.duration:
            stored.duration = frame.duration
        self._numbers[frame.pts] = len(self._numbers)
        self._mux(stored)

    def close(self) -> None:
        """Flush the encoder and end the file."""
        self._mux(None)
        self._container.close()

    def abort(self) -> None:
        """Close without finishing; the file is discarded."""
        self._container.close()

    def _mux(self, frame: Any) -> None:
        try:
            packets = self._stream.encode(frame)
        except pyav().FFmpegError as error:
            if self._packets or getattr(error, "errno", None) in _OUTPUT_ERRORS:
                raise
            raise UsageError(
                f"{self._encoding.codec} does not encode {self._stream.width}x{self._stream.height} frames of"
                f" {self._encoding.pix_fmt} with a clock of {self._info.time_base} s ({error.strerror})",
                next_step="pass another --codec",
            ) from error
        for packet in packets:
            packet.pts = self._numbers[packet.pts]
            packet.dts = self._packets - _LONGEST_REORDERING
            packet.time_base = _MILLISECOND
            self._packets += 1
            self._container.mux(packet)

    def _converted(self, pixels: NDArray[Any]) -> Any:
        """Return pixels as a frame of the stored format."""
        wide, alpha = pixels.dtype == np.uint16, pixels.shape[2] == 4
        matrix = None if self._encoding.rgb else SWSCALE_MATRIX[self._info.matrix]
        by_hand = not self._encoding.rgb and (wide or self._encoding.bits > 8 or self._range() == JPEG)
        form = ("rgba64le" if wide else "rgba") if alpha else ("rgb48le" if wide else "rgb24")
        made = self._yuv(pixels) if by_hand else pyav().VideoFrame.from_ndarray(pixels, format=form)
        return made.reformat(
            format=self._encoding.pix_fmt,
            src_colorspace=matrix if by_hand else None,
            src_color_range=self._range() if by_hand else JPEG,
            dst_colorspace=matrix,
            dst_color_range=self._range(),
            interpolation=accurate(pyav()),
            threads=1,
        )

    def _yuv(self, pixels: NDArray[Any]) -> Any:
        """Return RGB(A) as a frame of the stored depth with chroma at full resolution."""
        bits = self._encoding.bits
        height, width, channels = pixels.shape
        values = list(yuv_from_rgb(pixels[..., :3], self._info.matrix, full_range=self._range() == JPEG, bits=bits))
        if channels == 4:
            peak = np.float32((2**bits - 1) / np.iinfo(pixels.dtype).max)
            values.append(np.rint(pixels[..., 3] * peak).astype(values[0].dtype))
        name = "yuva444p" if channels == 4 else "yuv444p"
        made = pyav().VideoFrame(width, height, name if bits == 8 else f"{name}{bits}le")
        for plane, rows in zip(made.planes, values, strict=True):
            padded = np.zeros((plane.height, plane.line_size // rows.itemsize), rows.dtype)
            padded[:, :width] = rows
            plane.update(padded)
        return made

    def _matrix(self) -> int:
        return _RGB_MATRIX if self._encoding.rgb else self._info.matrix

    def _range(self) -> int:
        return JPEG if self._encoding.rgb else self._info.range
