"""Give every frame its time: clocks that jump or wrap, missing and repeated timestamps, and what containers can hold.

Two clocks work in turn. `PacketClock` corrects packets of all streams alike while a file is read, so that picture and
sound stay together; it is deterministic, and reading the file again gives the same times. `FrameClock` gives decoded
frames strictly increasing times.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from srdeploy.core.errors import UsageError

_TS_DISCONT = 0x0200  # AVFMT_TS_DISCONT: the format allows its clock to jump (transport and program streams)
_BACK = Fraction(1, 10)
_FORWARD = 10
"""Seconds backward, and forward where the format allows jumps, that start a new clock (as in FFmpeg's tool)."""
_MATROSKA_TICK = Fraction(1, 1000)


@dataclass
class _StreamClock:
    """One stream in `PacketClock`: its epoch, and the corrected time when its last packet ends.

    Packets of a `timed` stream (video, audio) follow each other without gaps; those of subtitles do not.
    """

    timed: bool
    epoch: int = 0
    end: Fraction | None = None


@dataclass
class PacketClock:
    """Adds an offset to packets after each jump of the file's clock, so that time only goes forward.

    Recordings joined byte by byte, wrapped counters and interrupted broadcasts start their clock anew. Each such epoch
    gets one offset for all streams, chosen by the first audio or video stream that enters it: it begins where the
    longest stream of the last epoch ended. Streams enter an epoch one after the other, because packets are interleaved.

    Attributes:
        jumps_allowed: the format's clock may jump forward too.
        first_video: index of the video stream that sparse streams follow.
    """

    jumps_allowed: bool
    first_video: int
    _offsets: list[Fraction]
    _streams: dict[int, _StreamClock] = field(default_factory=dict)

    @classmethod
    def of(cls, container: Any, video: Any) -> "PacketClock":
        """Make the clock of an opened file. A video that starts before 0 is moved there: MP4 would hide its start."""
        start = Fraction(0) if video.start_time is None else video.start_time * video.time_base
        return cls(bool(container.format.flags & _TS_DISCONT), video.index, [max(Fraction(0), -start)])

    @property
    def jumps(self) -> int:
        """How often the clock jumped so far."""
        return len(self._offsets) - 1

    def correct(self, packet: Any) -> None:
        """Change a packet's timestamps in place. Call it for every packet, in the order of the file."""
        if packet.dts is None and packet.pts is None:
            return
        timed = packet.stream.type in ("video", "audio")
        own = self._streams.setdefault(packet.stream.index, _StreamClock(timed))
        tick = packet.time_base
        if not timed:
            own.epoch = self._streams[self.first_video].epoch if self.first_video in self._streams else 0
        elif packet.dts is not None:  # times of presentation are out of order: they say nothing about jumps
            self._enter_epoch(own, packet.dts * tick)
        shift = round(self._offsets[own.epoch] / tick)
        if packet.dts is not None:
            packet.dts += shift
            end = (packet.dts + (packet.duration or 0)) * tick
            own.end = end if own.end is None else max(own.end, end)
        if packet.pts is not None:
            packet.pts += shift

    def _enter_epoch(self, own: _StreamClock, raw: Fraction) -> None:
        if own.end is None or not self._jumps(raw + self._offsets[own.epoch] - own.end):
            return
        if own.epoch == self.jumps:
            ends = [other.end for other in self._streams.values() if other.end is not None and other.timed]
            self._offsets.append(max(ends) - raw)
        own.epoch += 1
        own.end = None

    def _jumps(self, step: Fraction) -> bool:
        return step < -_BACK or (self.jumps_allowed and step > _FORWARD)


@dataclass
class FrameClock:
    """Gives decoded frames their timestamps, strictly increasing.

    Attributes:
        step: ticks from frame to frame where nothing is stated.
        in_order: the timestamps of the packets, for files that state decoding times only: frame n gets the n-th.
    """

    step: int
    in_order: Sequence[int] = ()
    _last: int | None = None
    _last_duration: int = 0
    _number: int = 0

    def time_of(self, pts: int | None, duration: int) -> int:
        """Return the next frame's timestamp, given what the decoder says about it."""
        if self._number < len(self.in_order):
            pts = self.in_order[self._number]
        if pts is None:
            pts = 0 if self._last is None else self._last + (self._last_duration or self.step)
        if self._last is not None and pts <= self._last:
            pts = self._last + 1
        self._number += 1
        self._last, self._last_duration = pts, duration
        return pts


def container_tick(output: Path, time_base: Fraction) -> Fraction:
    """Return the duration in seconds of one tick of the output container: Matroska counts milliseconds."""
    return _MATROSKA_TICK if output.suffix.lower() in (".mkv", ".webm") else time_base


def place_on_ticks(times: Sequence[int], time_base: Fraction, tick: Fraction, output: Path) -> Sequence[int]:
    """Return strictly increasing timestamps in ticks of the output, each at most one tick from its rounded place.

    Args:
        times: strictly increasing, in `time_base`.
        time_base: seconds per tick of `times`.
        tick: seconds per tick of the output.
        output: for the message.

    Raises:
        UsageError: frames follow each other faster than the output counts.
    """
    if tick == time_base:
        return times
    ratio = time_base / tick
    placed = array("q")
    last = None
    for time in times:
        rounded = round(time * ratio)
        place = rounded if last is None else max(rounded, last + 1)
        if place - rounded > 1:
            raise UsageError(
                f"{output.suffix} counts time in steps of {float(tick * 1000):g} ms, and frames of the input follow"
                " each other faster",
                expected="an output .mov or .mp4",
            )
        placed.append(place)
        last = place
    return placed
