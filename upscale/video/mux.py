"""Join finished segments with the other streams of the source, without encoding again."""

import heapq
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from srdeploy.core.errors import UsageError
from srdeploy.core.extras import import_extra
from srdeploy.upscale.video.parts import Segment
from srdeploy.upscale.video.probe import VideoInfo


def join_segments(segments: list[Segment], source: Path, output: Path, info: VideoInfo) -> None:
    """Put segments one after the other without encoding, with the other streams of the source.

    Segments keep the order of their frames; the timestamps are the input's own, which no container in between rounds.

    Raises:
        UsageError: the output's container cannot hold an audio or subtitle stream of the source.
    """
    av: Any = import_extra("av", "video")
    with av.open(str(source)) as original, av.open(str(segments[0].path)) as first, av.open(str(output), "w") as joined:
        film = joined.add_stream_from_template(first.streams.video[0], opaque=True)
        film.time_base = info.time_base
        film.codec_context.framerate = info.frame_rate
        if info.rotation:
            film.set_display_rotation(info.rotation)
        copied = {}
        for stream in [*original.streams.audio, *original.streams.subtitles]:
            copied[stream.index] = _copied_stream(av, joined, stream, output)
        joined.metadata.update(original.metadata)
        film.metadata.update({k: v for k, v in _film(original).metadata.items() if k in ("language", "title")})
        joined.set_chapters(original.chapters())
        packets = heapq.merge(
            _film_packets(av, segments, film, info.time_base),
            _copied_packets(original, copied),
            key=lambda entry: entry[0],
        )
        try:
            for _, packet in packets:
                joined.mux_one(packet)
        except av.FFmpegError as error:
            if isinstance(error, OSError) and error.errno and not isinstance(error, av.InvalidDataError):
                raise OSError(error.errno, error.strerror) from error
            raise UsageError(
                f"{output.suffix} cannot hold the streams of {source} ({error.strerror})", next_step="write an .mkv"
            ) from error


def _film(container: Any) -> Any:
    return container.streams.video[0]


def _copied_stream(av: Any, joined: Any, stream: Any, output: Path) -> Any:
    name = stream.codec_context.name if stream.codec_context else "unknown"
    try:
        copy = joined.add_stream_from_template(stream)
    except (av.FFmpegError, av.codec.codec.UnknownCodecError, ValueError) as error:
        raise UsageError(
            f"{output.suffix} cannot hold the input's {stream.type} stream ({name})",
            expected="a container that can",
            next_step="write an .mkv",
        ) from error
    copy.metadata.update(stream.metadata)
    return copy


def _film_packets(av: Any, segments: list[Segment], film: Any, time_base: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Yield (decoding time in seconds, packet). Decoding times are made anew: the sorted timestamps, some places later.

    A packet must not be decoded later than it is shown, so the shift is the encoder's longest reordering.
    """
    delay = max(_reordering(av, segment) for segment in segments)
    first = segments[0].pts[0]
    second = next((pts for segment in segments for pts in segment.pts if pts > first), first + 1)
    waiting = deque(first - (second - first) * place for place in range(delay, 0, -1))
    for number, segment in enumerate(segments):
        waiting.extend(segment.pts)
        following = segments[number + 1].pts[0] if number + 1 < len(segments) else None
        durations = _durations(segment, following)
        for packet, pts in _timed_packets(av, segment):
            packet.time_base = time_base
            packet.pts, packet.dts, packet.duration = pts, waiting.popleft(), durations[pts]
            packet.stream = film
            yield packet.dts * time_base, packet


def _durations(segment: Segment, following: int | None) -> dict[int, int]:
    """Return how long each frame is shown, by its timestamp; `following` is the next segment's first."""
    pts = segment.pts
    last = segment.last_duration or (pts[-1] - pts[-2] if len(pts) > 1 else 1)
    ends = [*pts[1:], following if following is not None else pts[-1] + last]
    return {begin: end - begin for begin, end in zip(pts, ends, strict=True)}


def _timed_packets(av: Any, segment: Segment) -> list[tuple[Any, int]]:
    """Return a segment's packets in decoding order, each with its frame's timestamp."""
    with av.open(str(segment.path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    if len(packets) != len(segment.pts) or any(packet.pts is None for packet in packets):
        raise RuntimeError(f"{segment.path} holds {len(packets)} packets for {len(segment.pts)} frames")
    ranks = {index: rank for rank, index in enumerate(sorted(range(len(packets)), key=lambda i: packets[i].pts))}
    return [(packet, segment.pts[ranks[index]]) for index, packet in enumerate(packets)]


def _reordering(av: Any, segment: Segment) -> int:
    """Return by how many places a packet of the segment is shown earlier than it is decoded, at most."""
    shown = {pts: place for place, pts in enumerate(segment.pts)}
    return max(place - shown[pts] for place, (_, pts) in enumerate(_timed_packets(av, segment)))


def _copied_packets(original: Any, copied: dict[int, Any]) -> Iterator[tuple[Fraction, Any]]:
    streams = [original.streams[index] for index in copied]
    if not streams:
        return
    for packet in original.demux(streams):
        if packet.dts is None and packet.pts is None:
            continue
        when = (packet.dts if packet.dts is not None else packet.pts) * packet.time_base
        packet.stream = copied[packet.stream_index]
        yield when, packet
