"""The zip archives that torch.save writes, read by position and with every claim checked.

Python's zipfile believes the archive's own lengths and never minds two entries over the same bytes. An untrusted
checkpoint gets the reader below: a bounded directory, names that stay inside the archive, sizes inside the file.
Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

import struct
import zlib
from dataclasses import dataclass

from srdeploy.core.sizes import format_bytes
from srdeploy.models.checkpoint.filebytes import FileBytes, RefusedError, shown

MOST_ENTRIES = 100_000
"""A default-size RCAN with EMA copy and Adam state has 8,200 entries."""
MOST_INFLATED_BYTES = 256 * 1024**2
"""torch.save never compresses; an archive that was packed again may hold this much of compressed data."""

_STORED, _DEFLATED = 0, 8
_STEEPEST = 1032  # bytes out per byte in, the limit of the deflate format
_PIECE_BYTES = 1 << 20
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in the archive; sizes in bytes, `offset` of its local header."""

    name: str
    method: int
    packed_size: int
    size: int
    offset: int


class Archive:
    """A zip archive in an untrusted file."""

    def __init__(self, file: FileBytes) -> None:
        """Read the directory.

        Raises:
            RefusedError: it is damaged, hostile or uses features that torch.save does not.
        """
        self._file = file
        self._inflated = 0
        self.entries = _directory(file)

    def read(self, name: str, *, most: int | None = None) -> bytearray:
        """Return an entry's bytes in fresh memory.

        Raises:
            RefusedError: there is no such entry, it is larger than `most`, or its data is damaged.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise RefusedError(
                f"lacks its entry {shown(name)}", expected="a complete torch.save archive", next_step=_AGAIN
            )
        if most is not None and entry.size > most:
            raise RefusedError(f"has an entry {shown(name)} of {entry.size} bytes", expected=f"at most {most}")
        start = self._data_start(entry)
        if entry.method == _STORED:
            return self._file.buffer(start, entry.size, f"entry {shown(name)}")
        return self._inflate(entry, start)

    def _data_start(self, entry: Entry) -> int:
        header = self._file.read(entry.offset, _LOCAL.size, "zip entry header")
        fields = _LOCAL.unpack(header)
        if fields[0] != b"PK\x03\x04":
            raise RefusedError(f"is damaged: entry {shown(entry.name)} has no header", next_step=_AGAIN)
        name_length: int = fields[9]
        extra_length: int = fields[10]
        name = self._file.read(entry.offset + _LOCAL.size, name_length, "zip entry name")
        if name != entry.name.encode():
            raise RefusedError(f"is damaged: the directory and the header disagree on the name of {shown(entry.name)}")
        return entry.offset + _LOCAL.size + name_length + extra_length

    def _inflate(self, entry: Entry, start: int) -> bytearray:
        self._inflated += entry.size
        if self._inflated > MOST_INFLATED_BYTES:
            raise RefusedError(
                f"holds compressed data that grows beyond {format_bytes(MOST_INFLATED_BYTES)}",
                expected="an uncompressed archive, as torch.save writes it",
                next_step="unpack it and store it without compression, if you trust it",
            )
        if entry.size > _STEEPEST * entry.packed_size + 64:
            raise RefusedError(f"is damaged: entry {shown(entry.name)} claims more than deflate can hold")
        packed = self._file.read(start, entry.packed_size, f"entry {shown(entry.name)}")
        data = bytearray(entry.size)
        done = 0
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            while piece := inflater.decompress(packed, _PIECE_BYTES):
                data[done : done + len(piece)] = piece
                done += len(piece)
                packed = inflater.unconsumed_tail
                if done > entry.size:
                    break
        except zlib.error:
            done = -1
        if done != entry.size:
            raise RefusedError(f"is damaged: compressed entry {shown(entry.name)} cannot be unpacked", next_step=_AGAIN)
        return data


def _directory(file: FileBytes) -> dict[str, Entry]:
    count, size, offset = _end_of_directory(file)
    if count > MOST_ENTRIES or size > MOST_ENTRIES * 512:
        raise RefusedError(f"is a zip archive of {count} entries", expected=f"at most {MOST_ENTRIES}")
    data = file.read(offset, size, "zip directory")
    entries: dict[str, Entry] = {}
    position = 0
    for _ in range(count):
        entry, position = _entry(data, position)
        _check_name(entry.name)
        if entry.name in entries:
            raise RefusedError(f"has two entries named {shown(entry.name)}", expected="one", next_step=_AGAIN)
        entries[entry.name] = entry
    _check_overlaps(entries, directory_start=offset)
    return entries


def _end_of_directory(file: FileBytes) -> tuple[int, int, int]:
    """Return number of entries, size and offset of the directory."""
    tail_length = min(file.size, _END.size + 0xFFFF)
    tail = file.read(file.size - tail_length, tail_length, "zip directory")
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise RefusedError(
            "is truncated: it starts as a zip archive, but has no directory at its end", next_step=_AGAIN
        )
    _, disk, directory_disk, _, count, size, offset, _ = _END.unpack_from(tail, at)
    at += file.size - tail_length
    if at >= _END64_LOCATOR.size:
        locator = _END64_LOCATOR.unpack(file.read(at - _END64_LOCATOR.size, _END64_LOCATOR.size, "zip directory"))
        if locator[0] == b"PK\x06\x07":
            end64 = _END64.unpack(file.read(locator[2], _END64.size, "zip directory"))
            if end64[0] != b"PK\x06\x06":
                raise RefusedError("is damaged: its zip directory has no end record", next_step=_AGAIN)
            disk, directory_disk, count, size, offset = end64[4], end64[5], end64[7], end64[8], end64[9]
    if disk or directory_disk:
        raise RefusedError("is one part of a zip archive of several", next_step="join the parts first")
    return count, size, offset


def _entry(data: bytes, position: int) -> tuple[Entry, int]:
    if position + _CENTRAL.size > len(data):
        raise RefusedError("is damaged: its zip directory is too short", next_step=_AGAIN)
    fields = _CENTRAL.unpack_from(data, position)
    signature, flags, method = fields[0], fields[3], fields[4]
    packed_size, size = fields[8], fields[9]
    name_length, extra_length, comment_length = fields[10], fields[11], fields[12]
    offset = fields[16]
    position += _CENTRAL.size
    end = position + name_length + extra_length + comment_length
    if signature != b"PK\x01\x02" or end > len(data):
        raise RefusedError("is damaged: its zip directory cannot be read", next_step=_AGAIN)
    try:
        name = data[position : position + name_length].decode("utf-8")
    except UnicodeDecodeError:
        raise RefusedError("is damaged: a name in its zip directory is not UTF-8", next_step=_AGAIN) from None
    if flags & 0x41:
        raise RefusedError(f"has an encrypted entry {shown(name)}", next_step="unpack it with its password first")
    if method not in (_STORED, _DEFLATED):
        raise RefusedError(
            f"has an entry {shown(name)} with compression method {method}", expected="stored or deflated"
        )
    extra = data[position + name_length : position + name_length + extra_length]
    size, packed_size, offset = _wide(extra, size, packed_size, offset)
    if method == _STORED and size != packed_size:
        raise RefusedError(f"is damaged: entry {shown(name)} has two sizes", next_step=_AGAIN)
    return Entry(name, method, packed_size, size, offset), end


def _wide(extra: bytes, *values: int) -> list[int]:
    """Replace 32-bit values of all ones by those of the zip64 extra field, in the order the format gives them."""
    wide: list[int] = list(values)
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            field = extra[position + 4 : position + 4 + length]
            numbers = [number for (number,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            for index, value in enumerate(wide):
                if value == 0xFFFFFFFF and numbers:
                    wide[index] = numbers.pop(0)
            break
        position += 4 + length
    return wide


def _check_name(name: str) -> None:
    if not name.isprintable():
        raise RefusedError(f"is damaged: a zip entry is named {shown(name)}", next_step=_AGAIN)
    parts = name.split("/")
    if "\\" in name or ".." in parts or name.startswith("/") or ":" in parts[0]:
        raise RefusedError(
            f"has a zip entry named {shown(name)}",
            expected="names that stay inside the archive",
            next_step="nothing was unpacked; get the checkpoint from its authors",
        )


def _check_overlaps(entries: dict[str, Entry], directory_start: int) -> None:
    """Refuse entries that share bytes: a small file can claim any amount of data that way."""
    end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        if entry.offset < end:
            raise RefusedError(f"has a zip entry {shown(entry.name)} that overlaps another", next_step=_AGAIN)
        end = entry.offset + _LOCAL.size + len(entry.name.encode()) + entry.packed_size
    if end > directory_start:
        raise RefusedError("is damaged or truncated: a zip entry runs into the directory", next_step=_AGAIN)
