"""Decode a video file to RGB frames, each once, in order of presentation, with its time.

Color: YUV becomes RGB with the matrix and range that the stream states. A stream that states no matrix is read as
players read it, BT.601 below 720 lines and BT.709 from there on; the output then states that matrix, because its own
number of lines would make players guess another. Transfer curve and primaries are passed on as they are.
"""

import bisect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.errors import CapabilityError, InputError
from srdeploy.upscale.video.color import JPEG, SWSCALE_MATRIX, accurate, rgb_from_yuv
from srdeploy.upscale.video.cropping import Crop, container_crop
from srdeploy.upscale.video.media import copied_streams, open_video, pyav
from srdeploy.upscale.video.probe import VideoInfo, chroma_of, info_of
from srdeploy.upscale.video.survey import Survey, survey_video
from srdeploy.upscale.video.timestamps import FrameClock, PacketClock, is_broadcast

_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""FFmpeg's own decoders of these ignore the alpha that Matroska stores next to the picture."""

_LEAST_RATE = Fraction(1, 1001)


@dataclass(frozen=True, eq=False)
class Frame:
    """A frame: (H, W, 3) RGB or (H, W, 4) RGBA, uint8 or uint16; timestamp and duration in ticks (0: not stated)."""

    pixels: NDArray[Any]
    pts: int
    duration: int = 0


class VideoReader:
    """Decodes the first video stream of a file. It is read once, from start to end: no file needs to be seekable.

    Attributes:
        path: the file.
        survey: what its packets say.
        info: what its stream and first frame say.
    """

    def __init__(self, path: Path, *, progressive: bool = False, survey: Survey | None = None) -> None:
        """Open a file, read its packets and decode its first frame.

        Args:
            path: a video file.
            progressive: take frames that are marked as interlaced for whole ones.
            survey: what was read from the packets before; None reads them.

        Raises:
            InputError: empty, truncated, damaged, or without a video stream that can be decoded.
            CapabilityError: the stream has alpha, and the decoder that reads it is missing.
            MissingExtraError: PyAV is not installed.
        """
        self.path = path
        self.survey: Survey = survey or survey_video(path)
        self._progressive = progressive
        self._container, self._stream = open_video(path)
        try:
            self._decoded = self._decode()
            self._first = next(self._decoded, None)
            if self._first is None:
                raise InputError(f"{path} holds no frame that can be decoded", expected="a video")
            self._crop = container_crop(path, self._container.format.name, self._stream)
            self.info: VideoInfo = self._with_rate(self._shown(info_of(self._container, self._stream, self._first)))
            self._colors = _stated_colors(self._first), self.info
            self._aspect = self._stream.codec_context.sample_aspect_ratio
        except BaseException:
            self.close()
            raise

    def frames(self, skip: int = 0) -> Iterator[Frame]:
        """Decode all frames in order of presentation; the first `skip` are decoded and not returned. Call it once.

        Raises:
            InputError: damaged, interlaced or changing in size.
        """
        info = self.info
        step = max(1, round(1 / info.frame_rate / info.time_base))
        first, self._first = self._first, None
        clock = FrameClock(step, self._times_in_order(first))
        for number, frame in enumerate(itertools.chain([first], self._decoded)):
            self._check(frame, number)
            duration = int(frame.duration or 0)
            pts = clock.time_of(frame.pts, duration)
            if number >= skip:
                yield Frame(self._cut(self._pixels(frame, number)), pts, duration)

    def can_seek(self) -> bool:
        """Return True if the n-th frame is the one at the n-th time of the survey, and can be decoded from a key frame.

        An assumption about the file: `frames_between` checks it.
        """
        survey = self.survey
        form = self._container.format.name
        plain = not (survey.in_decoding_order or survey.clock_jumps or survey.damaged)
        growing = all(one < other for one, other in itertools.pairwise(survey.times))
        return plain and growing and len(survey.times) > 0 and ("mp4" in form or "matroska" in form)

    def frames_between(self, start: int, stop: int) -> Iterator[Frame]:
        """Decode the frames `start` to `stop` from the last key frame before them. Only if `can_seek`.

        Raises:
            LookupError: they are not where the survey expects them.
            InputError: damaged, interlaced or changing in size.
        """
        times = self.survey.times
        expected = iter(times[start:stop])
        for number, frame in enumerate(self._decoded_from(start, stop - start), start):
            if number == stop:
                break
            if frame.pts != next(expected):
                raise LookupError(number)
            self._check(frame, number)
            yield Frame(self._cut(self._pixels(frame, number)), int(frame.pts), int(frame.duration or 0))
        if next(expected, None) is not None:
            raise LookupError(stop)

    def _decoded_from(self, start: int, step: int) -> Iterator[Any]:
        """Decode from frame `start` on; earlier frames that it needs are decoded and dropped."""
        times, stream = self.survey.times, self._stream
        offset = max(0, -(stream.start_time or 0))  # see PacketClock.of
        for back in (0, step, 8 * step, start):  # some formats find the key frame by another clock
            self._container.seek(times[max(0, start - back)] - offset, stream=stream, backward=True)
            decoded = self._decode()
            first = next(decoded, None)
            if first is not None and first.pts is not None and first.pts <= times[start]:
                frames = itertools.chain([first], decoded)
                yield from (frame for frame in frames if frame.pts is None or frame.pts >= times[start])
                return

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _times_in_order(self, first: Any) -> Sequence[int]:
        """Return the times of the first frame and those that follow if the file states decoding times only, else none.

        A frame in AVI is shown when the decoder gives it back: `dts` is that of the packet at which it does so.
        """
        survey = self.survey
        if not survey.in_decoding_order:
            return ()
        late = self._container.format.name == "avi" and first.dts is not None
        return survey.times[bisect.bisect_left(survey.times, first.dts) if late else 0 :]

    def _size(self, frame: Any) -> tuple[int, int]:
        crop = self._crop
        return frame.width - crop.left - crop.right, frame.height - crop.top - crop.bottom

    def _shown(self, info: VideoInfo) -> VideoInfo:
        """Return the description of what is left when the container's crop is cut off."""
        width, height = self._size(info)
        return replace(info, width=width, height=height)

    def _with_rate(self, info: VideoInfo) -> VideoInfo:
        """Measure the frame rate if the stream states none, as live recordings of browsers, or a wrong one, as DV."""
        times = self.survey.times
        if len(times) < 2 or times[-1] <= times[0]:
            return info
        measured = (len(times) - 1) / ((times[-1] - times[0]) * info.time_base)
        stated = (self._stream.average_rate, self._stream.guessed_rate) if self._stream.average_rate else ()
        plausible = (Fraction(rate) for rate in stated if rate and measured / 2 < rate < measured * 2)
        return replace(info, frame_rate=next(plausible, max(measured.limit_denominator(1001), _LEAST_RATE)))

    def _decode(self) -> Iterator[Any]:
        """Decode packets with corrected timestamps. What comes before the first decodable frame is skipped."""
        decoder = decoder_of(self._stream, self.path)
        clock = PacketClock.of(self._container, self._stream)
        decoded = 0
        packets = self._container.demux([self._stream, *copied_streams(self._container)])
        while True:
            try:
                packet = next(packets)
                clock.correct(packet)
                if packet.stream.index != self._stream.index:
                    continue
                frames = decoder.decode(packet)
            except StopIteration:
                return
            except pyav().FFmpegError as error:
                if not decoded and isinstance(error, pyav().InvalidDataError):
                    continue  # a recording that begins between key frames
                raise InputError(
                    f"{self.path} is damaged after {decoded} frames ({error.strerror})",
                    next_step="download or copy it again",
                ) from error
            yield from frames
            decoded += len(frames)

    def _check(self, frame: Any, number: int) -> None:
        info = self.info
        if frame.is_corrupt:
            raise InputError(f"{self.path}: frame {number} is damaged", next_step="download or copy the file again")
        if self._size(frame) != (info.width, info.height):
            raise InputError(
                f"{self.path} changes its size at frame {number}, to {frame.width}x{frame.height}",
                expected="one size throughout",
                next_step="split it there",
            )
        aspect = self._stream.codec_context.sample_aspect_ratio
        if (aspect or 1) != (self._aspect or 1) and is_broadcast(self._container):  # other containers state one
            raise InputError(
                f"{self.path} changes its pixel aspect at about frame {number}, from {self._aspect} to {aspect}",
                expected="one aspect throughout",
                next_step="split it there",
            )
        if frame.interlaced_frame and not self._progressive:
            raise InputError(
                f"{self.path} is marked as interlaced at frame {number}",
                expected="progressive frames: a network would enlarge the comb of two fields",
                next_step="deinterlace it first, or pass --progressive if the mark is wrong",
            )

    def _info_of(self, frame: Any, number: int) -> VideoInfo:
        """Return what a frame says about its own colors: joined recordings change their matrix or range.

        Raises:
            InputError: the output was begun with fewer bits, less chroma or no alpha, or with the other of RGB and YUV.
        """
        stated, info = self._colors
        if _stated_colors(frame) != stated:
            info = info_of(self._container, self._stream, frame, first=False)
            self._colors = _stated_colors(frame), info
            first = self.info
            more = (info.alpha, info.bits, chroma_of(info.pix_fmt)), (first.alpha, first.bits, chroma_of(first.pix_fmt))
            if info.rgb != first.rgb or any(one > other for one, other in zip(*more, strict=True)):
                raise InputError(
                    f"{self.path} changes its pixels at frame {number}, from {first.pix_fmt} to {info.pix_fmt}",
                    expected="one format throughout",
                    next_step="split it there",
                )
        return info

    def _cut(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Cut off what the container hides."""
        height, width = pixels.shape[:2]
        return pixels if self._crop == Crop() else np.ascontiguousarray(pixels[self._crop.cut(width, height)])

    def _pixels(self, frame: Any, number: int) -> NDArray[Any]:
        info = self._info_of(frame, number)
        wide = self.info.bits > 8
        if wide and not info.rgb:
            return self._from_wide_yuv(frame, info)
        palette = frame.format.has_palette
        form = ("rgba64le" if wide else "rgba") if self.info.alpha or palette else ("rgb48le" if wide else "rgb24")
        converted = frame.reformat(
            format=form,
            src_colorspace=SWSCALE_MATRIX[info.matrix],
            src_color_range=info.range,
            dst_color_range=JPEG,
            interpolation=accurate(pyav()),
            threads=1,
        )
        pixels: NDArray[Any] = converted.to_ndarray()
        if palette:
            if pixels[..., 3].min() < 255:
                raise InputError(
                    f"{self.path} has transparent entries in its palette",
                    expected="an opaque palette, or a format with an alpha channel",
                    next_step="convert it to one, such as PNG in .mov (rgba)",
                )
            pixels = pixels if self.info.alpha else np.ascontiguousarray(pixels[..., :3])
        return pixels

    def _from_wide_yuv(self, frame: Any, info: VideoInfo) -> NDArray[np.uint16]:
        """Convert a frame through YUV planes of the video's depth, more than 8 bits, chroma at full resolution."""
        matrix, bits = SWSCALE_MATRIX[info.matrix], self.info.bits
        converted = frame.reformat(
            format=f"yuva444p{bits}le" if self.info.alpha else f"yuv444p{bits}le",
            src_colorspace=matrix,
            dst_colorspace=matrix,
            src_color_range=info.range,
            dst_color_range=info.range,
            interpolation=accurate(pyav()),
            threads=1,
        )
        planes = np.stack(
            [
                np.frombuffer(plane, np.uint16).reshape(-1, plane.line_size // 2)[: frame.height, : frame.width]
                for plane in converted.planes
            ]
        )
        rgb = rgb_from_yuv(planes[:3], info.matrix, full_range=info.range == JPEG, bits=bits)
        if not self.info.alpha:
            return rgb
        alpha = np.rint(planes[3] * np.float32(65535 / (2**bits - 1))).astype(np.uint16)
        return np.dstack([rgb, alpha])


def _stated_colors(frame: Any) -> tuple[str, int, int]:
    return str(frame.format.name), int(frame.colorspace), int(frame.color_range)


def decoder_of(stream: Any, path: Path) -> Any:
    """Return the decoder for a stream: FFmpeg's own, or the codec's library where only that reads alpha.

    Raises:
        CapabilityError: the stream has alpha, and the decoder that reads it is missing.
    """
    context = stream.codec_context
    if not context.is_open:  # it is after a seek
        _prepare(context)
    mode = next((value for key, value in stream.metadata.items() if key.lower() == "alpha_mode"), "0")
    if mode != "1" or context.name not in _ALPHA_DECODERS:
        return context
    av = pyav()
    name = _ALPHA_DECODERS[context.name]
    try:
        return _prepare(av.CodecContext.create(name, "r"))
    except (av.FFmpegError, ValueError) as error:
        raise CapabilityError(
            f"{path} has an alpha channel, and this PyAV has no decoder {name} that reads it",
            next_step="install PyAV's wheel: pip install --force-reinstall --no-deps av",
        ) from error


def _prepare(context: Any) -> Any:
    """Let a decoder use threads, and cut off all hidden pixels at the left: for alignment FFmpeg leaves some."""
    context.thread_type = "AUTO"
    context.flags |= int(pyav().codec.context.Flags.unaligned)
    return context
