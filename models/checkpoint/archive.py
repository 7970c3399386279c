"""Zip archives in untrusted files: the standard library reads the directory, every claim is checked before use.

`zipfile` parses the directory and inflates; stored entries are read by position, because PyTorch can write them
without a valid CRC (`torch.serialization.set_crc32_options(False)`), which `zipfile` refuses to read.
Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

import struct
import zipfile
import zlib

from srdeploy.core.sizes import format_bytes
from srdeploy.models.checkpoint.filebytes import FileBytes, RefusedError, shown

MAX_DIRECTORY_BYTES = 4 * 1024**2
"""A default-size RCAN with EMA copy and Adam state has 8,200 entries and 0.8 MB of directory."""
MAX_INFLATED_BYTES = 256 * 1024**2
"""torch.save never compresses; an archive that was packed again may hold this much of compressed data."""

_LOCAL = struct.Struct("<4s5H3I2H")
_AGAIN = "copy or download the file again"
_DAMAGE = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    EOFError,
    struct.error,
    zlib.error,
)


class Archive:
    """A zip archive in an untrusted file."""

    def __init__(self, file: FileBytes) -> None:
        """Read the directory.

        Raises:
            RefusedError: it is damaged, hostile or uses features that torch.save does not.
        """
        self._file = file
        self._inflated = 0
        try:
            # zipfile reads the whole directory at once, however long it claims to be: each read is bounded.
            self._zip = zipfile.ZipFile(file.stream(MAX_DIRECTORY_BYTES, "zip directory"))
            directory_start = self._zip.start_dir
        except _DAMAGE as error:
            detail = shown(str(error), 80)
            raise RefusedError(
                f"is truncated or damaged: its zip directory cannot be read ({detail})", next_step=_AGAIN
            ) from error
        self.entries = _checked(self._zip.infolist(), directory_start)

    def read(self, name: str, *, limit: int | None = None) -> bytearray:
        """Return an entry's bytes in fresh memory.

        Raises:
            RefusedError: there is no such entry, it is larger than `limit`, or its data is damaged.
        """
        entry = self._entry(name)
        if limit is not None and entry.file_size > limit:
            raise RefusedError(f"has an entry {shown(name)} of {entry.file_size} bytes", expected=f"at most {limit}")
        if entry.compress_type == zipfile.ZIP_STORED:
            return self._file.buffer(self._data_start(entry), entry.file_size, f"entry {shown(name)}")
        return self._inflate(entry)

    def section(self, name: str) -> FileBytes:
        """Return a stored entry as a file of its own, unread.

        Raises:
            RefusedError: there is no such entry, or it is compressed.
        """
        entry = self._entry(name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise RefusedError(f"has a compressed entry {shown(name)}", expected="a stored one", next_step=_AGAIN)
        return self._file.section(self._data_start(entry), entry.file_size, f"entry {shown(name)}")

    def _entry(self, name: str) -> zipfile.ZipInfo:
        entry = self.entries.get(name)
        if entry is None:
            raise RefusedError(f"lacks its entry {shown(name)}", expected="a complete archive", next_step=_AGAIN)
        return entry

    def _data_start(self, entry: zipfile.ZipInfo) -> int:
        fields = _LOCAL.unpack(self._file.read(entry.header_offset, _LOCAL.size, "zip entry header"))
        if fields[0] != b"PK\x03\x04":
            raise RefusedError(f"is damaged: entry {shown(entry.filename)} has no header", next_step=_AGAIN)
        return entry.header_offset + _LOCAL.size + int(fields[9]) + int(fields[10])

    def _inflate(self, entry: zipfile.ZipInfo) -> bytearray:
        self._inflated += entry.file_size
        if self._inflated > MAX_INFLATED_BYTES:
            raise RefusedError(
                f"holds compressed data that grows beyond {format_bytes(MAX_INFLATED_BYTES)}",
                expected="an uncompressed archive, as torch.save writes it",
                next_step="unpack it and pack it again without compression (zip -0), if you trust it",
            )
        if entry.file_size > 1032 * entry.compress_size + 64:  # the limit of the deflate format
            raise RefusedError(
                f"is damaged: entry {shown(entry.filename)} claims more than deflate can hold", next_step=_AGAIN
            )
        data = bytearray()
        try:
            with self._zip.open(entry) as stream:
                while piece := stream.read(1 << 20):
                    data += piece
        except _DAMAGE as error:
            raise RefusedError(
                f"is damaged: compressed entry {shown(entry.filename)} cannot be unpacked", next_step=_AGAIN
            ) from error
        if len(data) != entry.file_size:
            raise RefusedError(f"is damaged: entry {shown(entry.filename)} is too short", next_step=_AGAIN)
        return data


def _checked(entries: list[zipfile.ZipInfo], directory_start: int) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by name; refuse what torch.save never writes, and entries that share bytes.

    A small file can claim any amount of data with entries that overlap.
    """
    by_name: dict[str, zipfile.ZipInfo] = {}
    end = 0
    for entry in sorted(entries, key=lambda entry: entry.header_offset):
        name = entry.filename
        _check_name(name)
        if name in by_name:
            raise RefusedError(f"has two entries named {shown(name)}", expected="one", next_step=_AGAIN)
        if entry.flag_bits & 0x41:
            raise RefusedError(f"has an encrypted entry {shown(name)}", next_step="unpack it with its password first")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise RefusedError(
                f"has an entry {shown(name)} with compression method {entry.compress_type}",
                expected="stored or deflated",
                next_step="unpack it and pack it again without compression (zip -0), if you trust it",
            )
        if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
            raise RefusedError(f"is damaged: entry {shown(name)} has two sizes", next_step=_AGAIN)
        if entry.header_offset < end:
            raise RefusedError(f"has a zip entry {shown(name)} that overlaps another", next_step=_AGAIN)
        end = entry.header_offset + _LOCAL.size + entry.compress_size
        by_name[name] = entry
    if end > directory_start:
        raise RefusedError("is damaged or truncated: a zip entry runs into the directory", next_step=_AGAIN)
    return by_name


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
