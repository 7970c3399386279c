"""Give every frame its time: clocks that jump or wrap, missing and repeated timestamps, and what containers can hold.

Two clocks work in turn. `PacketClock` corrects packets of all streams alike while a file is read, so that picture and
sound stay together; it is deterministic, and reading the file again gives the same times. `FrameClock` gives decoded
frames strictly increasing times.
"""

import math
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from srdeploy.upscale.video.media import CannotHoldError

_TS_DISCONT = 0x0200  # AVFMT_TS_DISCONT: the format allows its clock to jump (transport and program streams)
_BACK = 0.1
_FORWARD = 10
"""Seconds backward, and forward where the format allows jumps, that start a new clock (as in FFmpeg's tool)."""
_MATROSKA_TICK = Fraction(1, 1000)


def is_broadcast(container: Any) -> bool:
    """Return True for transport and program streams: the clock may jump, and nothing but the stream describes it."""
    return bool(container.format.flags & _TS_DISCONT)


@dataclass
class _StreamClock:
    """One stream in `PacketClock`, in ticks of the stream.

    Packets of a `timed` stream (video, audio) follow each other without gaps; those of subtitles do not.

    Attributes:
        tick: seconds per tick.
        back, forward: steps from packet to packet below and above these are jumps.
        epoch: index of the stream's epoch.
        shift: what is added to timestamps in this epoch.
        end: corrected time when the last packet ends; None at the start of an epoch.
        recent: corrected times of presentation of as many packets as a frame can be decoded before it is shown; None
            where the file states decoding times. A packet that is shown before all of them starts a new clock.
    """

    timed: bool
    tick: Fraction
    back: float
    forward: float
    epoch: int = 0
    shift: int = 0
    end: int | None = None
    recent: deque[int] | None = None

    def jumps(self, stamp: int) -> bool:
        """Return True if a packet's time does not follow those of the last packets."""
        time = stamp + self.shift
        if self.recent is not None:
            return len(self.recent) == self.recent.maxlen and time - min(self.recent) < self.back
        return self.end is not None and not self.back <= time - self.end <= self.forward

    def follow(self, stamp: int, duration: int) -> None:
        """Remember a packet that does not jump."""
        time = stamp + self.shift
        self.end = time + duration if self.end is None else max(self.end, time + duration)
        if self.recent is not None:
            self.recent.append(time)

    def enter(self, epoch: int, offset: Fraction) -> None:
        """Take another offset in seconds."""
        self.epoch, self.end, self.shift = epoch, None, round(offset / self.tick)
        if self.recent is not None:
            self.recent.clear()


@dataclass
class PacketClock:
    """Adds an offset to packets after each jump of the file's clock, so that time only goes forward.

    Recordings joined byte by byte, wrapped counters and interrupted broadcasts start their clock anew. Each such epoch
    gets one offset for all streams, chosen by the first audio or video stream that enters it: it begins where the
    longest stream of the last epoch ended. Streams enter an epoch one after the other, because packets are interleaved.

    Attributes:
        back, forward: seconds from packet to packet below and above which a new clock starts. MP4 has one clock,
            and FFmpeg goes back in it for hidden packets that decoding needs where a further edit begins.
        video: index of the video stream, whose epoch subtitles follow.
        reordered: places by which its frames are reordered, in files that state no decoding times (Matroska); FFmpeg
            guesses them from times of presentation, and wrong where these start again.
    """

    back: float
    forward: float
    video: int
    reordered: int
    _offsets: list[Fraction]
    _streams: dict[int, _StreamClock] = field(default_factory=dict)

    @classmethod
    def of(cls, container: Any, video: Any) -> "PacketClock":
        """Make the clock of an opened file. A video that starts before 0 is moved there: MP4 would hide its start."""
        start = Fraction(0) if video.start_time is None else video.start_time * video.time_base
        back = math.inf if "mp4" in container.format.name else _BACK
        forward = _FORWARD if is_broadcast(container) else math.inf
        reordered = int(video.codec_context.has_b_frames) if "matroska" in container.format.name else 0
        return cls(-back, forward, video.index, reordered, [max(Fraction(0), -start)])

    @property
    def jumps(self) -> int:
        """Number of jumps so far."""
        return len(self._offsets) - 1

    def correct(self, packet: Any) -> None:
        """Change a packet's timestamps in place. Call it for every packet, in the order of the file."""
        pts, dts = packet.pts, packet.dts
        if dts is None and pts is None:
            return
        index = packet.stream.index
        own = self._streams.get(index) or self._begin(index, packet)
        if not own.timed:
            video = self._streams.get(self.video)
            if video is not None and video.epoch != own.epoch:
                self._enter(own, video.epoch)
        if pts is not None and dts is not None and abs(pts - dts) > own.forward:  # one of them is damaged
            pts, dts = (pts, pts) if own.jumps(dts) and not own.jumps(pts) else (dts, dts)
        stamp = dts if own.recent is None else pts
        if own.timed and stamp is not None:
            if own.jumps(stamp):
                if own.epoch == self.jumps:
                    self._offsets.append(self._end() - stamp * own.tick)
                self._enter(own, own.epoch + 1)
            own.follow(stamp, packet.duration or 0)
        if dts is not None:
            packet.dts = dts + own.shift
        if pts is not None:
            packet.pts = pts + own.shift

    def _begin(self, index: int, packet: Any) -> _StreamClock:
        tick = Fraction(packet.time_base)
        timed = packet.stream.type in ("video", "audio")
        recent = deque[int](maxlen=2 * self.reordered + 1) if index == self.video and self.reordered else None
        own = _StreamClock(timed, tick, self.back / float(tick), self.forward / float(tick), recent=recent)
        self._streams[index] = own
        self._enter(own, self.jumps)
        return own

    def _enter(self, own: _StreamClock, epoch: int) -> None:
        own.enter(epoch, self._offsets[epoch])

    def _end(self) -> Fraction:
        """Return the corrected time in seconds when the longest audio or video stream ends."""
        return max(own.end * own.tick for own in self._streams.values() if own.end is not None and own.timed)


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
        if self.in_order:
            pts = self.in_order[self._number] if self._number < len(self.in_order) else None
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
        CannotHoldError: frames follow each other faster than the output counts.
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
            raise CannotHoldError(
                f"{output.suffix} counts time in steps of {float(tick * 1000):g} ms, and frames of the input follow"
                " each other faster"
            )
        placed.append(place)
        last = place
    return placed
