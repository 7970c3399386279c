"""Join finished segments with the other streams of the source, without encoding again."""

import errno
import heapq
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from srdeploy.upscale.video.media import (
    CannotHoldError,
    copied_streams,
    create_media,
    is_cover,
    open_media,
    open_video,
    pyav,
    takes_stream,
)
from srdeploy.upscale.video.parts import Segment
from srdeploy.upscale.video.probe import VideoInfo
from srdeploy.upscale.video.side_data import scaled_matrix
from srdeploy.upscale.video.timestamps import PacketClock, container_tick, place_on_ticks

_TS_NONSTRICT = 0x20000  # AVFMT_TS_NONSTRICT: packets of one time may follow each other
_TAGS_OF_STREAMS = ("language", "title", "handler_name", "timecode")
_NO_COVERS = (".webm", ".mov", ".m4v")
_PREROLL = Fraction(1, 10)
"""Seconds of hidden sound in front of the shown part that are kept: encoders of sound state a delay that way."""


def join_segments(
    segments: Sequence[Segment], source: Path, output: Path, info: VideoInfo, *, source_packets: int | None = None
) -> None:
    """Put segments one after the other, with the audio, subtitles, attachments, chapters and metadata of the source.

    Segments keep the order of their frames; the timestamps are the input's own, placed on the ticks of the container.

    Args:
        segments: at least one.
        source: the video whose other streams are copied.
        output: the file to write; its suffix names the container.
        info: of the source.
        source_packets: read only so many packets of the source, for a rehearsal; None reads all.

    Raises:
        CannotHoldError: the output's container cannot hold a stream of the source, or the timestamps.
        OSError: the file cannot be written.
    """
    original, video = open_video(source)
    with original, open_media(segments[0].path) as first, create_media(output, _options(original, output)) as joined:
        film = _film(joined, first.streams.video[0], video, info, container_tick(output, info.time_base))
        kept = _kept_streams(original, output)
        copied = {stream.index: _copied_stream(joined, stream) for stream in kept}
        for name, kind, data in _attachments(original, source) if _takes_attachments(output) else ():
            joined.add_attachment(name, kind, data)
        joined.metadata.update(original.metadata)
        joined.set_chapters(original.chapters())
        _begin(joined, kept)
        packets = heapq.merge(
            _film_packets(segments, film, info, output),
            _copied_packets(original, video, copied, least=_least_step(joined), packets=source_packets),
            key=lambda entry: entry[0],
        )
        _write(joined, packets)


def _options(original: Any, output: Path) -> dict[str, str]:
    """Keep tags such as com.apple.quicktime.location.ISO6709, which MP4 and MOV hold in a list of their own only."""
    own = any(key.startswith("com.") for key in original.metadata)
    return {"movflags": "use_metadata_tags"} if own and output.suffix.lower() in (".mp4", ".m4v", ".mov") else {}


def lost_streams(source: Path, output: Path) -> list[str]:
    """Return a description of what the source carries and the container of the output has no place for."""
    with open_media(source) as original:
        names = ", ".join(map(_name, original.streams.attachments))
        covers = _covers(original)
    lost = []
    if names and not _takes_attachments(output):
        lost.append(f"attachments ({names}): write an .mkv to keep them")
    if covers and output.suffix.lower() in _NO_COVERS:
        lost.append("the cover picture: write an .mkv or .mp4 to keep it")
    return lost


def _name(attachment: Any) -> str:
    """Return an attachment's name, with a mark for each byte that is no UTF-8: only such names can be written."""
    return (attachment.name or "unnamed").encode(errors="surrogateescape").decode(errors="replace")


def _takes_attachments(output: Path) -> bool:
    return output.suffix.lower() == ".mkv"


def _covers(container: Any) -> list[Any]:
    return [stream for stream in container.streams.video if is_cover(stream)]


def _attachments(original: Any, source: Path) -> Iterator[tuple[str, str, bytes]]:
    """Yield name, MIME type and bytes of each attachment; in Matroska cover pictures are attachments too."""
    for attachment in original.streams.attachments:
        yield _name(attachment), attachment.mimetype or "application/octet-stream", attachment.data
    if not (indices := [cover.index for cover in _covers(original)]):
        return
    with open_media(source) as container:  # its packets are read from the start
        for packet in container.demux([container.streams[index] for index in indices]):
            kind = {"mjpeg": "jpeg"}.get(packet.stream.codec_context.name, packet.stream.codec_context.name)
            if packet.size and packet.stream.index in indices:
                indices.remove(packet.stream.index)
                name = packet.stream.metadata.get("filename", f"cover.{kind.replace('jpeg', 'jpg')}")
                yield name, packet.stream.metadata.get("mimetype", f"image/{kind}"), bytes(packet)
            if not indices:
                return


def _begin(joined: Any, kept: Sequence[Any]) -> None:
    """Write the header: from here on the container's own clocks are known."""
    try:
        joined.start_encoding()
    except pyav().FFmpegError as error:
        _raise_system_error(error)
        alone = (describe(stream) for stream in kept if not takes_stream(joined.format.name, stream))
        raise _refused(joined, next(alone, f"the input's streams and tags together ({error.strerror})")) from error


def _write(joined: Any, packets: Iterator[tuple[Fraction, Any]]) -> None:
    kind = ""
    try:
        for _, packet in packets:
            kind = packet.stream.type
            joined.mux_one(packet)
        joined.close()  # packets that wait for those of other streams are written here
    except pyav().FFmpegError as error:
        _raise_system_error(error)
        raise _refused(joined, f"a packet of the input's {kind} stream ({error.strerror})") from error


def _raise_system_error(error: Any) -> None:
    """Raise errors such as of a full disk as those of the system, and pass over what FFmpeg says about media."""
    unspecific = error.errno == errno.EPERM  # -1, which muxers return for whatever they have no number for
    media = isinstance(error, pyav().InvalidDataError | ValueError)
    if isinstance(error, OSError) and error.errno and not (unspecific or media):
        raise OSError(error.errno, error.strerror) from error


def _film(joined: Any, encoded: Any, original: Any, info: VideoInfo, tick: Fraction) -> Any:
    """Add the stream of the upscaled video, described as the original."""
    try:
        film = joined.add_stream_from_template(encoded, opaque=True)
    except (pyav().FFmpegError, ValueError) as error:
        raise _refused(joined, f"the video stream ({encoded.codec_context.name})") from error
    film.time_base = tick
    film.codec_context.framerate = info.frame_rate
    if encoded.codec_context.name == "hevc" and joined.format.name in ("mp4", "mov", "ipod"):
        film.codec_context.codec_tag = "hvc1"  # Apple's players take no hev1; parameter sets are in the header only
    if info.aspect is not None:
        film.codec_context.sample_aspect_ratio = info.aspect
    if info.display_matrix is not None:
        film.set_display_matrix(scaled_matrix(info.display_matrix, Fraction(encoded.width, info.width)))
    film.disposition = original.disposition
    film.metadata.update({k: v for k, v in original.metadata.items() if k.lower() in _TAGS_OF_STREAMS})
    if info.alpha:
        film.metadata["alpha_mode"] = "1"
    return film


def _kept_streams(original: Any, output: Path) -> list[Any]:
    covers = [] if output.suffix.lower() in (".mkv", *_NO_COVERS) else _covers(original)
    return [*copied_streams(original), *covers]


def _copied_stream(joined: Any, stream: Any) -> Any:
    av = pyav()
    try:
        copy = joined.add_stream_from_template(stream)
    except (av.FFmpegError, av.codec.codec.UnknownCodecError, ValueError) as error:
        raise _refused(joined, describe(stream)) from error
    copy.metadata.update(stream.metadata)
    copy.disposition = stream.disposition
    return copy


def _refused(joined: Any, what: str) -> CannotHoldError:
    return CannotHoldError(f"{Path(joined.name).suffix} cannot hold {what}")


def describe(stream: Any) -> str:
    """Return a stream's kind and codec for messages."""
    name = stream.codec_context.name if stream.codec_context else "unknown"
    return f"the input's {stream.type} stream ({name})"


def _film_packets(
    segments: Sequence[Segment], film: Any, info: VideoInfo, output: Path
) -> Iterator[tuple[Fraction, Any]]:
    """Yield (decoding time in seconds, packet). Decoding times are made anew: the sorted timestamps, some places later.

    A packet must not be decoded later than it is shown, so the shift is the encoder's longest reordering.
    """
    tick = container_tick(output, info.time_base)
    times = [pts for segment in segments for pts in segment.pts]
    placed = place_on_ticks(times, info.time_base, tick, output)
    ends = [*placed[1:], placed[-1] + _last_duration(segments[-1], info, tick)]
    delay = max(_reordering(segment) for segment in segments)
    step = max(1, min(ends[0] - placed[0], round(1 / info.frame_rate / tick)))
    waiting = deque(placed[0] - step * place for place in range(delay, 0, -1))
    begin = 0
    for segment in segments:
        waiting.extend(placed[begin : begin + len(segment.pts)])
        for packet, rank in ranked_packets(segment):
            packet.time_base = tick
            packet.pts, packet.dts = placed[begin + rank], waiting.popleft()
            packet.duration = ends[begin + rank] - placed[begin + rank]
            packet.stream = film
            yield packet.dts * tick, packet
        begin += len(segment.pts)


def _last_duration(segment: Segment, info: VideoInfo, tick: Fraction) -> int:
    pts = segment.pts
    last = segment.last_duration or (pts[-1] - pts[-2] if len(pts) > 1 else 0)
    return max(1, round(last * info.time_base / tick if last else 1 / info.frame_rate / tick))


def ranked_packets(segment: Segment) -> list[tuple[Any, int]]:
    """Return a segment's packets in decoding order, each with the place of its frame in order of presentation."""
    with open_media(segment.path) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    if len(packets) != len(segment.pts) or any(packet.pts is None for packet in packets):
        raise RuntimeError(f"{segment.path} holds {len(packets)} packets for {len(segment.pts)} frames")
    ranks = {index: rank for rank, index in enumerate(sorted(range(len(packets)), key=lambda i: packets[i].pts))}
    return [(packet, ranks[index]) for index, packet in enumerate(packets)]


def _reordering(segment: Segment) -> int:
    """Return by how many places a packet of the segment is shown earlier than it is decoded, at most."""
    return max(place - rank for place, (_, rank) in enumerate(ranked_packets(segment)))


def _is_hidden(packet: Any, *, begun: bool) -> bool:
    """Return True if an edit list hides a packet that decoders do not need to start with the shown part.

    Args:
        packet: of sound or subtitles.
        begun: a packet of its stream was shown before.
    """
    if not packet.is_discard or packet.pts is None:
        return False
    return begun or bool((packet.pts + (packet.duration or 0)) * packet.time_base < -_PREROLL)


def _least_step(container: Any) -> int:
    """Return how many ticks a packet must be later than the last one of its stream."""
    return 0 if container.format.flags & _TS_NONSTRICT else 1


def _copied_packets(
    original: Any, video: Any, copied: dict[int, Any], *, least: int, packets: int | None
) -> Iterator[tuple[Fraction, Any]]:
    """Yield (time in seconds, packet) of the copied streams, on the corrected clock.

    Decoding times increase in ticks of the output, or stay where the container takes that: Matroska counts
    milliseconds, and packets of TrueHD last five sixths of one. Moved behind the last, they would run later and later.
    """
    clock = PacketClock.of(original, video)
    last: dict[int, int] = {}
    begun: set[int] = set()
    clocked = {video.index, *(stream.index for stream in copied_streams(original))}
    streams = [stream for stream in original.streams if stream.index in clocked | set(copied)]
    for packet in itertools.islice(original.demux(streams), packets):
        index = packet.stream.index
        if not packet.size:
            continue
        if index in clocked:
            clock.correct(packet)
        elif packet.pts is None:  # a cover picture is shown at no time
            packet.pts = packet.dts = 0
        if packet.dts is None and packet.pts is None:
            continue
        if index not in copied or _is_hidden(packet, begun=index in begun):
            continue
        if not packet.is_discard:
            begun.add(index)
        when = (packet.dts if packet.dts is not None else packet.pts) * packet.time_base
        stream = copied[index]
        ratio = packet.time_base / stream.time_base
        dts = round(when / stream.time_base)
        last[index] = dts = max(dts, last[index] + least) if index in last else dts
        packet.pts = dts if packet.pts is None else max(round(packet.pts * ratio), dts)
        packet.dts, packet.duration = dts, round((packet.duration or 0) * ratio)
        packet.time_base, packet.stream = stream.time_base, stream
        yield when, packet
