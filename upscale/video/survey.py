"""Read all packets of a video file once, without decoding: what is wrong is found before anything is computed."""

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srdeploy.core.errors import InputError
from srdeploy.upscale.video.damage import unreadable_bytes
from srdeploy.upscale.video.media import copied_streams, open_video, pyav
from srdeploy.upscale.video.timestamps import PacketClock
from srdeploy.upscale.video.truncation import refuse_truncated


@dataclass(frozen=True)
class Survey:
    """What the packets of a file say.

    Attributes:
        packets: of the video stream that are shown.
        times: their presentation times in ticks of the stream, sorted; empty when one of them states none.
        in_decoding_order: the file states decoding times only, frame n is shown at the n-th of `times`.
        clock_jumps: how often the clock of the file jumps.
        damaged: packets of the video stream that the container marks as damaged, as in broadcasts.
        missing_seconds: how much earlier the packets end than the file states, where it states that. Matroska readers
            skip what they cannot read without an error, to the next cluster.
        unreadable_bytes: bytes amid the file that readers skip without an error.
        without_packets: kinds of the streams of sound and subtitles that hold nothing.
    """

    packets: int
    times: Sequence[int]
    in_decoding_order: bool
    clock_jumps: int
    damaged: int = 0
    missing_seconds: float = 0.0
    unreadable_bytes: int = 0
    without_packets: tuple[str, ...] = ()


def survey_video(path: Path) -> Survey:
    """Read the packets of a video file. Takes the time of copying the file, and 8 bytes of memory per frame.

    Raises:
        InputError: bytes are missing at the end, or the file is damaged or not a video.
        MissingExtraError: PyAV is not installed.
    """
    refuse_truncated(path)
    container, video = open_video(path)
    with container:
        clock = PacketClock.of(container, video)
        shown = _Stamps()
        end = 0.0
        seen: set[int] = set()
        try:
            for packet in container.demux([video, *copied_streams(container)]):
                if not packet.size:
                    continue
                seen.add(packet.stream.index)
                clock.correct(packet)
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index == video.index and not packet.is_discard:
                    shown.add(packet)
        except pyav().FFmpegError as error:
            raise InputError(
                f"{path} is damaged after {shown.packets} frames ({error.strerror})",
                next_step="download or copy it again",
            ) from error
        empty = tuple(stream.type for stream in copied_streams(container) if stream.index not in seen)
        times = shown.in_decoding_order(container.format.name, bool(video.codec_context.has_b_frames))
        # Other containers state an estimate, or FFmpeg calculates the duration from the packets.
        stated = (container.duration or 0) / 1e6 if "matroska" in container.format.name else 0.0
    return Survey(
        shown.packets,
        shown.sorted() if times is None else times,
        times is not None,
        clock.jumps,
        shown.damaged,
        max(stated - end, 0.0),
        unreadable_bytes(path, container.format.name),
        empty,
    )


@dataclass
class _Stamps:
    """Timestamps of the packets so far, in the order of the file; None after one that was missing."""

    packets: int = 0
    damaged: int = 0
    pts: "array[int] | None" = field(default_factory=lambda: array("q"))
    dts: "array[int] | None" = field(default_factory=lambda: array("q"))

    def add(self, packet: Any) -> None:
        self.packets += 1
        self.damaged += bool(packet.is_corrupt)
        for name in ("pts", "dts"):
            stamps, stamp = getattr(self, name), getattr(packet, name)
            if stamp is None:
                setattr(self, name, None)
            elif stamps is not None:
                stamps.append(stamp)

    def sorted(self) -> Sequence[int]:
        stamps = self.pts or self.dts
        return array("q", sorted(stamps)) if stamps else ()

    def in_decoding_order(self, form: str, reorders: bool) -> Sequence[int] | None:
        """Return the times of frames in order of presentation if the file states decoding times only, else None.

        AVI, and codecs wrapped from it, state no time of presentation; what FFmpeg reports is a guess, and wrong where
        frames are dropped. Times of presentation that only grow, in a stream whose frames are reordered, do not belong
        to the frames of their packets either. Frame n is then shown at the n-th time.
        """
        if form == "avi":
            return self.dts or self.pts
        growing = self.pts is not None and all(one <= other for one, other in itertools.pairwise(self.pts))
        return self.pts if reorders and growing else None
