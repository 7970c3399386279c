"""PNG chunks that are about the picture and not its pixels: text and color, as raw bytes.

Pillow decodes them, and writes only what it is told; passed on raw, they come out byte for byte.
"""

import struct
import zlib
from pathlib import Path

TEXT = (b"tEXt", b"zTXt", b"iTXt")
COLOR = (b"cICP", b"sRGB", b"gAMA", b"cHRM")
"""Color chunks from the strongest to the weakest; a reader takes the first that it knows (PNG 3rd edition, 4.3)."""
_METADATA = (*TEXT, b"eXIf", b"iCCP", b"pHYs")
"""Chunks that decoders turn into EXIF, XMP, ICC profile and resolution."""
MAX_BYTES = 64 << 20
"""Bytes of text that are read and passed on; a picture's settings and workflow take kilobytes."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_ELSEWHERE = (b"XML:com.adobe.xmp", b"Raw profile type")  # XMP and EXIF, which are read and written by their own rules

Chunk = tuple[bytes, bytes]


def read_chunks(path: Path) -> tuple[Chunk, ...]:
    """Return the text and color chunks of a PNG file as (type, data); of other files and damaged ends, what there is.

    Raises:
        OSError: the file cannot be read.
    """
    found: list[Chunk] = []
    total = 0
    with path.open("rb") as stream:
        if stream.read(8) != _SIGNATURE:
            return ()
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind not in TEXT + COLOR:
                stream.seek(length + 4, 1)
                continue
            total += length
            if total > MAX_BYTES:
                break
            data = stream.read(length)
            stream.seek(4, 1)
            if len(data) == length and not (kind in TEXT and data.startswith(_ELSEWHERE)):
                found.append((kind, data))
    return tuple(found)


def metadata_only(path: Path) -> bytes:
    """Return a PNG of one pixel with the metadata of a PNG file, which may follow the pixels.

    Decoders find what follows the pixels only after decoding all of them.

    Raises:
        OSError: the file cannot be read.
    """
    kept, total = [], 0
    with path.open("rb") as stream:
        stream.seek(8)
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            total += length if kind in _METADATA else 0
            if kind not in _METADATA or total > MAX_BYTES:
                stream.seek(length + 4, 1)
                continue
            rest = stream.read(length + 4)
            if len(rest) == length + 4:
                kept.append(head + rest)
    gray = struct.pack(">2I5B", 1, 1, 8, 0, 0, 0, 0)
    begin, pixel, end = _chunk(b"IHDR", gray), _chunk(b"IDAT", zlib.compress(bytes(2))), _chunk(b"IEND", b"")
    return b"".join([_SIGNATURE, begin, *kept, pixel, end])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def keywords(chunks: tuple[Chunk, ...]) -> list[str]:
    """Return the keywords of the text chunks, for example "parameters"."""
    return [data.split(b"\0", 1)[0].decode("latin-1") for kind, data in chunks if kind in TEXT]


def transparent_color(path: Path) -> tuple[int, ...] | None:
    """Return the samples of the one color that a 16-bit PNG declares transparent (tRNS); None without one."""
    with path.open("rb") as stream:
        if stream.read(8) != _SIGNATURE:
            return None
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"tRNS":
                return struct.unpack(f">{length // 2}H", stream.read(length // 2 * 2))
            if kind == b"IDAT":
                return None
            stream.seek(length + 4, 1)
    return None
