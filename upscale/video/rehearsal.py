"""Find out before anything is computed what the encoder and the output's container take.

One blank frame is encoded, joined with the first packets of the other streams of the source and read back, by the same
functions that make the output. What fails would have failed at the end; what does not come back would be lost.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from srdeploy.core.errors import UsageError
from srdeploy.upscale.video.color import JPEG, LUMA_WEIGHTS, MPEG
from srdeploy.upscale.video.encoding import Encoding
from srdeploy.upscale.video.media import CannotHoldError, copied_streams, open_video, pyav, time_code
from srdeploy.upscale.video.mux import join_segments
from srdeploy.upscale.video.parts import Segment
from srdeploy.upscale.video.probe import VideoInfo, info_of
from srdeploy.upscale.video.reader import Frame, VideoReader, decoder_of
from srdeploy.upscale.video.side_data import same_orientation
from srdeploy.upscale.video.timestamps import container_tick, place_on_ticks
from srdeploy.upscale.video.writer import VideoWriter

_SOURCE_PACKETS = 200
_RANGES = {MPEG: "limited", JPEG: "full"}
_TECHNICAL_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration", "variant_bitrate",
    "timecode",
}  # fmt: skip


@dataclass(frozen=True)
class _ReadBack:
    """What a joined file says about itself."""

    info: VideoInfo
    tags: frozenset[str]
    time_code: str | None
    dispositions: tuple[int, ...]


def rehearse(
    reader: VideoReader, encoding: Encoding, size: tuple[int, int], output: Path, folder: Path
) -> tuple[str, ...]:
    """Make an output of one blank frame, look at it, and remove it.

    Args:
        reader: the opened source.
        encoding: how frames will be encoded.
        size: (height, width) of the output.
        output: where the output will be; its suffix names the container.
        folder: for the files of the rehearsal.

    Returns:
        A line for each thing that the output will lack.

    Raises:
        CannotHoldError: the encoder does not take the frames; or the container cannot hold a stream, the timestamps,
            the orientation or the alpha channel.
    """
    blank = folder / f"rehearsal{encoding.segment_suffix}"
    made = folder / f"joined{output.suffix}"
    try:
        segment = _encode_blank(blank, reader, encoding, size)
        join_segments([segment], reader.path, made, reader.info, source_packets=_SOURCE_PACKETS)
        place_on_ticks(
            reader.survey.times, reader.info.time_base, container_tick(output, reader.info.time_base), output
        )
        return _differences(reader, made, output, encoding)
    finally:
        for path in (blank, made):
            path.unlink(missing_ok=True)


def _encode_blank(path: Path, reader: VideoReader, encoding: Encoding, size: tuple[int, int]) -> Segment:
    info = reader.info
    pixels = np.zeros((*size, info.channels), np.uint16 if info.bits > 8 else np.uint8)
    pts = reader.survey.times[0] if reader.survey.times else 0
    writer = VideoWriter(path, info, encoding, size)
    try:
        writer.write(Frame(pixels, pts))
        writer.close()
    except BaseException as error:
        with contextlib.suppress(OSError, pyav().FFmpegError):
            writer.abort()
        if isinstance(error, UsageError):
            raise CannotHoldError(error.found, by_codec=True) from error
        raise
    return Segment(path, (pts,), 0)


def _differences(reader: VideoReader, made: Path, output: Path, encoding: Encoding) -> tuple[str, ...]:
    before, after = _read_back(reader.path, reader.info), _read_back(made, None)
    if before.info.alpha and not after.info.alpha:
        raise CannotHoldError(f"the alpha channel is lost with {encoding.codec} in {output.suffix}", by_codec=True)
    if not same_orientation(before.info.display_matrix, after.info.display_matrix):
        raise CannotHoldError(f"{output.suffix} cannot hold the input's display matrix")
    if before.info.aspect != after.info.aspect:
        raise CannotHoldError(
            f"{output.suffix} with {encoding.codec} cannot hold the input's pixel aspect {before.info.aspect}",
            by_codec=True,
        )
    notes = []
    if before.info.mastering is not None and not before.info.mastering.equals(after.info.mastering):
        notes.append(f"not kept by {encoding.codec}: HDR10 metadata (--codec libx265 and libsvtav1 keep it)")
    for name in ("matrix", "range", "primaries", "transfer") if before.info.rgb == after.info.rgb else ():
        one, other = getattr(before.info, name), getattr(after.info, name)
        if one == other or (name == "matrix" and LUMA_WEIGHTS[one] == LUMA_WEIGHTS[other]):
            continue
        if name in ("matrix", "range"):  # players would show other colors
            raise CannotHoldError(
                f"{output.suffix} with {encoding.codec} cannot state the input's color {name}"
                f" ({_RANGES[one] if name == 'range' else f'{one} in H.273'})",
                by_codec=True,
            )
        notes.append(f"not kept by {encoding.codec} in {output.suffix}: color {name} ({one} in H.273)")
    if len(after.dispositions) < len(before.dispositions):  # MP4 leaves out streams that hold nothing, or nothing yet
        if empty := reader.survey.without_packets:
            notes.append(f"not kept by {output.suffix}: streams without content ({', '.join(empty)})")
    elif any(one & ~other for one, other in zip(before.dispositions, after.dispositions, strict=True)):
        notes.append(f"not kept by {output.suffix}: flags of streams, such as default or forced")
    if before.time_code not in (None, after.time_code):
        notes.append(f"not kept by {output.suffix}: the time code {before.time_code}")
    lost = sorted(before.tags - after.tags)
    if lost:
        notes.append(f"not kept by {output.suffix}: tags {', '.join(lost)}")
    return tuple(notes)


def _read_back(path: Path, info: VideoInfo | None) -> _ReadBack:
    container, video = open_video(path)
    with container:
        tags = frozenset(key.lower() for key in container.metadata) - _TECHNICAL_TAGS
        start = time_code(container, video)
        dispositions = tuple(int(stream.disposition) for stream in (video, *copied_streams(container)))
    return _ReadBack(info or _first_info(path), tags, start, dispositions)


def _first_info(path: Path) -> VideoInfo:
    container, stream = open_video(path)
    with container:
        decoder = decoder_of(stream, path)
        with contextlib.suppress(pyav().FFmpegError):
            for packet in container.demux(stream):
                for frame in decoder.decode(packet):
                    return info_of(container, stream, frame)
    raise CannotHoldError(f"a first frame that was written to {path.suffix} cannot be read back", by_codec=True)
