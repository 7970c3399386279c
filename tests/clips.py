"""Small clips whose frames carry their number, in every shape that people's files have."""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

av = pytest.importorskip("av")
WIDTH, HEIGHT = 64, 48
_BAR = WIDTH // 8


def numbered(number: int) -> NDArray[np.uint8]:
    """Draw a frame with its number written in six bright or dark bars."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    pixels = np.dstack([40 + x * 120 // WIDTH, 60 + y * 100 // HEIGHT, np.full_like(x, 90)]).astype(np.uint8)
    for bit in range(6):
        bar = slice((bit + 1) * _BAR, (bit + 2) * _BAR)
        pixels[HEIGHT // 4 : 3 * HEIGHT // 4, bar] = 230 if number >> bit & 1 else 16
    return pixels


def number_of(pixels: NDArray[Any]) -> int:
    """Read the number of a frame of any size."""
    height, bar = pixels.shape[0], pixels.shape[1] // 8
    middle = pixels[3 * height // 8 : 5 * height // 8, ..., :3]
    bars = (middle[:, (bit + 1) * bar + bar // 4 : (bit + 2) * bar - bar // 4] for bit in range(6))
    return sum(1 << bit for bit, values in enumerate(bars) if values.mean() > 120)


def boxes_of(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield name and content of the boxes of an MP4 file or box."""
    while data:
        length = int.from_bytes(data[:4], "big")
        yield data[4:8], data[8:length]
        data = data[length:]


def box(name: bytes, content: bytes) -> bytes:
    """Return a box of MP4."""
    return struct.pack(">I4s", len(content) + 8, name) + content


@dataclass(frozen=True)
class Shown:
    """What a player shows: the number and the time in seconds of each frame."""

    numbers: list[int]
    times: list[Fraction]

    @property
    def steps(self) -> list[Fraction]:
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


class Clips:
    """Makes clips and reads them."""

    def make(
        self,
        path: Path,
        numbers: Iterable[int] = range(10),
        *,
        codec: str = "libx264",
        pix_fmt: str = "yuv420p",
        options: dict[str, str] | None = None,
        pts: Sequence[int] | None = None,
        time_base: Fraction = Fraction(1, 25),
        rate: int | Fraction = 25,
        form: str | None = None,
        container: dict[str, str] | None = None,
        alpha: bool = False,
        sound: bool = False,
        size: tuple[int, int] = (WIDTH, HEIGHT),
        prepare: Callable[[Any, Any], object] = lambda file, stream: None,
    ) -> Path:
        """`prepare` is called with the opened container and its stream before the first frame."""
        with av.open(f"file:{path}", "w", format=form, options=container or {}) as file:
            options = options or ({"crf": "10"} if codec == "libx264" else {})
            stream = file.add_stream(codec, rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
            stream.codec_context.time_base = time_base
            audio = file.add_stream("mp2", rate=48000, layout="mono") if sound else None
            prepare(file, stream)
            packets = []
            for place, number in enumerate(numbers):
                frame = self.frame(number, pix_fmt, alpha=alpha, size=size)
                frame.pts, frame.time_base = pts[place] if pts else place, time_base
                packets += stream.encode(frame)
            packets += stream.encode(None)
            if audio is not None:
                packets += _tone(audio, seconds=(place + 1) * time_base)
            for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
                file.mux(packet)
        return path

    def frame(self, number: int, pix_fmt: str, *, alpha: bool = False, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Any:
        pixels = numbered(number)
        if alpha:
            opacity = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
            opacity[:, :20] = 0
            pixels = np.dstack([pixels, opacity])
        frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if alpha else "rgb24")
        return frame.reformat(*size, format=pix_fmt)

    def shown(self, path: Path) -> Shown:
        with av.open(f"file:{path}") as file:
            frames = [
                (number_of(frame.to_ndarray(format="rgb24")), frame) for frame in file.decode(file.streams.video[0])
            ]
            return Shown([number for number, _ in frames], [frame.pts * frame.time_base for _, frame in frames])

    def remux(
        self,
        sources: Iterable[Path],
        path: Path,
        *,
        container: dict[str, str] | None = None,
        prepare: Callable[[Any, list[Any]], object] = lambda file, streams: None,
        change: Callable[[Any], bool] = lambda packet: True,
    ) -> Path:
        """Copy the first stream of each source into one file; `change` may edit a packet, and drops it if False."""
        files = [av.open(str(source)) for source in sources]
        with av.open(str(path), "w", options=container or {}) as made:
            streams = [made.add_stream_from_template(file.streams[0]) for file in files]
            prepare(made, streams)
            packets = []
            for file, stream in zip(files, streams, strict=True):
                for packet in file.demux(file.streams[0]):
                    if packet.dts is not None and change(packet):
                        packets.append((packet.dts * packet.time_base, packet, stream))
            for _, packet, stream in sorted(packets, key=lambda entry: entry[0]):
                packet.stream = stream
                made.mux(packet)
        for file in files:
            file.close()
        return path

    def subtitles(self, path: Path) -> Path:
        path.write_text("1\n00:00:00,100 --> 00:00:00,300\nhello\n")
        return path


def _tone(stream: Any, seconds: Fraction) -> list[Any]:
    packets = []
    for start in range(0, int(48000 * seconds), 1152):
        tone = (np.sin(np.arange(start, start + 1152) * 0.05) * 9000).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 48000, start
        packets += stream.encode(frame)
    return packets + stream.encode(None)
