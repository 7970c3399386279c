"""Encode RGB frames into a file of one video stream."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.extras import import_extra
from srdeploy.upscale.video.color import JPEG, SWSCALE_MATRIX, accurate, yuv_from_rgb
from srdeploy.upscale.video.encoding import Encoding
from srdeploy.upscale.video.probe import VideoInfo
from srdeploy.upscale.video.reader import Frame


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
        matrix = None if rgb_out else SWSCALE_MATRIX[info.matrix]
        by_hand = not rgb_out and (wide or self._range() == JPEG)
        made = (
            self._yuv(frame.pixels)
            if by_hand
            else self._av.VideoFrame.from_ndarray(frame.pixels, format="rgb48le" if wide else "rgb24")
        )
        stored = made.reformat(
            format=self._encoding.pix_fmt,
            src_colorspace=matrix if by_hand else None,
            src_color_range=self._range() if by_hand else JPEG,
            dst_colorspace=matrix,
            dst_color_range=self._range(),
            interpolation=accurate(self._av),
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
        values = yuv_from_rgb(pixels, self._info.matrix, full_range=self._range() == JPEG, bits=bits)
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
        return JPEG if rgb_out else self._info.range
