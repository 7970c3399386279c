"""Add an EXIF block to a finished TIFF or BigTIFF file without changing its pixels.

Ours, because TIFF stores EXIF in directories of its own, and Pillow, libvips and tifffile do not write a whole block
into them. The entries of the block are appended to the file in its byte order, and a new first directory that lists
them with the file's own entries replaces the old one.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_UNITS = {3: 2, 4: 4, 5: 4, 8: 2, 9: 4, 10: 4, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Size of the units whose bytes are swapped, by entry type; other types are bytes."""
_ABOUT_THE_PICTURE = (270, 271, 272, 274, 305, 306, 315, 33432)
_FOLDERS = {34665: (40965,), 34853: (), 40965: ()}
"""Entries that point to directories (EXIF, GPS, interoperability), and the directories inside them."""
_LONG, _LONG8 = 4, 16


@dataclass(frozen=True)
class _Entry:
    tag: int
    kind: int
    count: int
    data: bytes  # in the byte order of the output


@dataclass(frozen=True)
class _Layout:
    """Byte order and number sizes of a TIFF file."""

    order: str
    big: bool

    @property
    def offset(self) -> str:
        return self.order + ("Q" if self.big else "I")

    @property
    def inline(self) -> int:
        return 8 if self.big else 4

    def entries(self, file: BinaryIO, start: int) -> list[tuple[int, int, int, bytes]]:
        """Read a directory: tag, type, count and the raw value field."""
        file.seek(start)
        (count,) = struct.unpack(self.order + ("Q" if self.big else "H"), file.read(8 if self.big else 2))
        form = self.order + ("HHQ8s" if self.big else "HHI4s")
        return [struct.unpack(form, file.read(struct.calcsize(form))) for _ in range(count)]


def add_exif(path: Path, exif: bytes) -> None:
    """Add the entries of an EXIF block to a TIFF file; existing entries are not changed.

    Args:
        path: a TIFF file, changed in place: call this on a temporary file.
        exif: the block, with or without its "Exif" header. Damaged entries are skipped.

    Raises:
        OSError: the disk is full.
    """
    block = exif.removeprefix(b"Exif\0\0")
    if block[:2] not in (b"II", b"MM"):
        return
    with path.open("r+b") as file:
        head = file.read(16)
        order = "<" if head[:2] == b"II" else ">"
        big = struct.unpack_from(order + "H", head, 2)[0] == 43
        layout = _Layout(order, big)
        at = 8 if big else 4
        own = layout.entries(file, struct.unpack_from(layout.offset, head, at)[0])
        present = {entry[0] for entry in own}
        added = [entry for entry in _read_block(block, order) if entry.tag not in present]
        if not added:
            return
        rows = [struct.pack(order + ("HHQ" if big else "HHI"), *entry[:3]) + entry[3] for entry in own]
        rows += [_placed(file, layout, entry) for entry in added]
        first = _write_directory(file, layout, rows)
        file.seek(at)
        file.write(struct.pack(layout.offset, first))


def _read_block(block: bytes, order: str) -> list[_Entry]:
    """Return the entries worth keeping of an EXIF block; a directory's data is its entries, packed."""
    source = "<" if block[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(source + "I", block, 4)
        first = _directory(block, start, source, order, {start})
    except struct.error:
        return []
    return [entry for entry in first if entry.tag in _ABOUT_THE_PICTURE or entry.tag in _FOLDERS]


def _directory(block: bytes, start: int, source: str, order: str, seen: set[int]) -> list[_Entry]:
    """Return the entries of a directory; `seen` holds the offsets of those around it, which it may not point to."""
    entries = []
    (count,) = struct.unpack_from(source + "H", block, start)
    for index in range(count):
        at = start + 2 + 12 * index
        tag, kind, number = struct.unpack_from(source + "HHI", block, at)
        size = _SIZES.get(kind, 0) * number
        (offset,) = struct.unpack_from(source + "I", block, at + 8)
        begin = at + 8 if size <= 4 else offset
        if tag in _FOLDERS:
            sound = 0 < offset < len(block) and offset not in seen
            inner = _directory(block, offset, source, order, seen | {offset}) if sound else []
            entries.append(_Entry(tag, 0, 0, _packed(inner)))
        elif 0 < size <= len(block) - begin:
            data = block[begin : begin + size]
            entries.append(_Entry(tag, kind, number, _swapped(data, _UNITS.get(kind, 1)) if source != order else data))
    return entries


def _packed(entries: list[_Entry]) -> bytes:
    """Serialize the entries of a directory until its offset is known."""
    return b"".join(struct.pack("<HHII", e.tag, e.kind, e.count, len(e.data)) + e.data for e in entries)


def _unpacked(data: bytes) -> list[_Entry]:
    entries, at = [], 0
    while at < len(data):
        tag, kind, count, size = struct.unpack_from("<HHII", data, at)
        entries.append(_Entry(tag, kind, count, data[at + 12 : at + 12 + size]))
        at += 12 + size
    return entries


def _placed(file: BinaryIO, layout: _Layout, entry: _Entry) -> bytes:
    """Append long data of an entry to the file; return its row of a directory."""
    if entry.tag in _FOLDERS:
        rows = [_placed(file, layout, inner) for inner in _unpacked(entry.data)]
        start = _write_directory(file, layout, rows)
        kind = _LONG8 if layout.big else _LONG
        return _row(layout, entry.tag, kind, 1, struct.pack(layout.offset, start))
    if len(entry.data) <= layout.inline:
        return _row(layout, entry.tag, entry.kind, entry.count, entry.data)
    return _row(layout, entry.tag, entry.kind, entry.count, struct.pack(layout.offset, _append(file, entry.data)))


def _row(layout: _Layout, tag: int, kind: int, count: int, value: bytes) -> bytes:
    form = layout.order + ("HHQ" if layout.big else "HHI")
    return struct.pack(form, tag, kind, count) + value.ljust(layout.inline, b"\0")


def _write_directory(file: BinaryIO, layout: _Layout, rows: list[bytes]) -> int:
    """Append a directory, its rows sorted by tag as TIFF requires; return its offset."""
    rows = sorted(rows, key=lambda row: int(struct.unpack_from(layout.order + "H", row)[0]))
    count = struct.pack(layout.order + ("Q" if layout.big else "H"), len(rows))
    return _append(file, count + b"".join(rows) + struct.pack(layout.offset, 0))


def _append(file: BinaryIO, data: bytes) -> int:
    start = file.seek(0, 2)
    if start % 2:
        start += file.write(b"\0")  # values begin at even offsets
    file.write(data)
    return start


def _swapped(data: bytes, unit: int) -> bytes:
    return b"".join(data[at : at + unit][::-1] for at in range(0, len(data), unit))
