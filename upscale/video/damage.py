"""Count the bytes in the middle of a file that its own structure says cannot be read.

Readers of Matroska, transport streams and fragmented MP4 skip such bytes without an error, to the next place where they
can go on or to the end of the file: frames are missing in every player, and no frame looks damaged.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_Bytes = NDArray[np.uint8]
SEGMENT = b"\x18\x53\x80\x67"
_CLUSTER = b"\x1f\x43\xb6\x75"
_OUTSIDE_CLUSTERS = {
    b"\x1a\x45\xdf\xa3", SEGMENT, _CLUSTER, b"\x11\x4d\x9b\x74", b"\x15\x49\xa9\x66", b"\x16\x54\xae\x6b",
    b"\x1c\x53\xbb\x6b", b"\x19\x41\xa4\x69", b"\x10\x43\xa7\x70", b"\x12\x54\xc3\x67", b"\xec", b"\xbf",
}  # fmt: skip
"""File, segment, cluster, seek head, info, tracks, cues, attachments, chapters, tags; void and checksum."""
_SYNC = 0x47
_PACKET_BYTES = (188, 192, 204)
_STEP = 1 << 16  # packets that are looked at together


def unreadable_bytes(path: Path, form: str) -> int:
    """Return how many bytes readers of a video file skip because they are nothing that belongs there.

    Args:
        path: a file that was opened.
        form: FFmpeg's name of its format.

    Returns:
        0 for formats that are not looked at: in them such damage is an error, or shows in a frame.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if "matroska" in form:
            return sum(stop - start for start, stop in _gaps_in_matroska(data))
        if "mp4" in form:
            return _behind_broken_box(data)
        return _out_of_sync(data) if form == "mpegts" else 0


def _gaps_in_matroska(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of what is no element of a file, a segment or a cluster, up to the next cluster.

    Live recordings state no lengths, and joined ones are several files; what follows a file's stated end is no gap.
    """
    position, stated_end = 0, None
    while position < len(data):
        name, content, stop = ebml_element(data, position)
        if name == SEGMENT:
            position, stated_end = content, stop
            continue
        if name == _CLUSTER:
            limit = len(data) if stop is None else min(stop, len(data))
            position = _end_of_elements(data, content, limit)
            if position == limit or (stop is None and data[position : position + 4] in _OUTSIDE_CLUSTERS):
                continue
        elif stop is not None and _can_end(data, name, stop):
            position = stop
            continue
        found = data.find(_CLUSTER, position + 1)
        if found < 0 and stated_end is not None and position >= stated_end:
            return
        found = len(data) if found < 0 else found
        yield position, found
        position = found


def _can_end(data: mmap.mmap, name: bytes, stop: int) -> bool:
    """Return True if an element that is known, or followed by one that is known, can end at a place."""
    return stop == len(data) or (stop < len(data) and bool({name, ebml_element(data, stop)[0]} & _OUTSIDE_CLUSTERS))


def _end_of_elements(data: mmap.mmap, position: int, limit: int) -> int:
    """Return where the elements of a cluster end: at the limit, or at what is none of them."""
    while position < limit:
        name, _, stop = ebml_element(data, position)
        if not name or (len(name) == 4 and name in _OUTSIDE_CLUSTERS) or stop is None or stop > limit:
            break
        position = stop
    return position


def ebml_element(data: mmap.mmap, position: int) -> tuple[bytes, int, int | None]:
    """Return an EBML element's name (empty if it is none), where its content begins, and ends if it says so."""
    first = data[position] if position < len(data) else 0
    count = 9 - first.bit_length()
    if count > 4 or position + count >= len(data):
        return b"", position, None
    name, position = data[position : position + count], position + count
    first = data[position]
    count = 9 - first.bit_length()
    if count > 8:
        return b"", position, None
    size = int.from_bytes(data[position : position + count], "big") & ((1 << 7 * count) - 1)
    content = position + count
    return name, content, None if size == (1 << 7 * count) - 1 else content + size


def _behind_broken_box(data: mmap.mmap) -> int:
    """Return how many bytes follow a broken outermost box of a fragmented MP4, if there are fragments among them."""
    position, fragmented = 0, False
    while position + 8 <= len(data):
        length, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if length == 1:  # a 64-bit length follows the name
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        if not name.isalnum() or 0 < length < 8:
            return len(data) - position if fragmented and data.find(b"moof", position) >= 0 else 0
        if not length:  # up to the end of the file
            return 0
        fragmented = fragmented or name == b"moof"
        position += length
    return 0


def _out_of_sync(data: mmap.mmap) -> int:
    """Return how many bytes lie between packets of a transport stream, which begin with the sync byte."""
    values: _Bytes = np.frombuffer(data, np.uint8)
    starts = ((start, length) for start in range(_PACKET_BYTES[-1]) for length in _PACKET_BYTES)
    position, length = next((place for place in starts if (values[place[0] :: place[1]][:5] == _SYNC).all()), (0, 0))
    lost = 0
    while length and position + length <= len(values):
        heads = values[position : position + length * _STEP : length]
        wrong = np.flatnonzero(heads != _SYNC)
        if not wrong.size:
            position += length * len(heads)
            continue
        position += length * int(wrong[0])
        found = _next_packet(values, position, length)
        lost += found - position
        position = found
    return lost


def _next_packet(values: _Bytes, position: int, length: int) -> int:
    """Return where three packets follow each other, or the end."""
    while position + 2 * length < len(values):
        window = values[position : position + length * _STEP]
        count = len(window) - 2 * length
        synced = np.logical_and.reduce([window[place : place + count] == _SYNC for place in (0, length, 2 * length)])
        if synced.any():
            return position + int(synced.argmax())
        position += count
    return len(values)
