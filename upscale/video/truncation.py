"""Find files that end before their own structure says, without decoding anything.

MP4/MOV, Matroska/WebM and AVI state the length of their outermost chunks. Transport streams, raw streams and recordings
written live state none: nothing can be said about their end.
"""

from pathlib import Path
from typing import BinaryIO

from srdeploy.core.errors import InputError

_EBML = b"\x1a\x45\xdf\xa3"
_MP4_FIRST = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"pnot")


def refuse_truncated(path: Path) -> None:
    """Refuse a video file whose last bytes are missing.

    Raises:
        InputError: a chunk reaches beyond the end of the file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        end = _stated_end(stream, size)
    if end > size:
        raise InputError(
            f"{path} is truncated: {size} bytes, and its structure states at least {end}",
            next_step="download or copy it again",
        )


def _stated_end(stream: BinaryIO, size: int) -> int:
    """Return where the last outermost chunk ends according to its header; 0 where the format does not state it."""
    start = stream.read(12)
    if start[4:8] in _MP4_FIRST:
        return _end_of_boxes(stream, size)
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return _end_of_riff(stream, size)
    if start[:4] == _EBML:
        return _end_of_segment(stream)
    return 0


def _end_of_boxes(stream: BinaryIO, size: int) -> int:
    position = 0
    while position + 8 <= size:
        stream.seek(position)
        header = stream.read(16)
        length = int.from_bytes(header[:4], "big")
        if length == 1:  # a 64-bit length follows the name
            length = int.from_bytes(header[8:16], "big")
        if length == 0:  # up to the end of the file
            return size
        if length < 8 or not header[4:8].isascii():  # bytes that are no box, such as padding of a recorder
            return size
        position += length
    return position


def _end_of_riff(stream: BinaryIO, size: int) -> int:
    position = 0
    while position + 8 <= size:  # OpenDML files are several RIFF chunks
        stream.seek(position)
        header = stream.read(8)
        length = int.from_bytes(header[4:8], "little")
        if header[:4] != b"RIFF" or not length:
            return size
        position += 8 + length
    return position


def _end_of_segment(stream: BinaryIO) -> int:
    stream.seek(4)
    header = _ebml_number(stream)
    if header is None:
        return 0
    stream.seek(header, 1)
    if stream.read(4) != b"\x18\x53\x80\x67":
        return 0
    length = _ebml_number(stream)
    return 0 if length is None else stream.tell() + length


def _ebml_number(stream: BinaryIO) -> int | None:
    """Return EBML's variable-length number; None when it is "unknown", as in live recordings."""
    first = stream.read(1)
    if not first or not first[0]:
        return None
    count = 9 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0xFF >> count)]) + stream.read(count - 1), "big")
    return None if value == (1 << 7 * count) - 1 else value
