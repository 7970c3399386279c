"""Write PNG and TIFF files a few rows at a time, at any depth and size, with their metadata.

Ours, because no library takes rows: Pillow has no 16-bit color and needs the whole picture, pyvips takes rows as PPM
only (no alpha, no floats) and is optional, tifffile takes whole pages or tiles and needs imagecodecs for predictors.
"""

import struct
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.imaging.read import Picture
from srdeploy.upscale.tiff_tags import add_exif

_LEVEL = 6
_STRIP_ROWS = 32
_IDAT_BYTES = 1 << 20
_INCHES_PER_METRE = 1 / 0.0254


class PngRows:
    """A PNG file of 8 or 16 bits, gray or RGB, with or without alpha."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: np.dtype[Any], like: Picture | None) -> None:
        """Write everything that precedes the pixels.

        Args:
            path: output file.
            shape: (height, width, channels).
            dtype: uint8 or uint16.
            like: the picture whose metadata are copied; its EXIF is written unchanged.
        """
        height, width, channels = shape
        self._stored = dtype.newbyteorder(">")
        self._step = channels * dtype.itemsize
        self._above = np.zeros(width * self._step, np.uint8)
        self._compressor = zlib.compressobj(_LEVEL)
        self._file: BinaryIO = path.open("wb")
        self._file.write(b"\x89PNG\r\n\x1a\n")
        color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8 * dtype.itemsize, color_type, 0, 0, 0))
        if like is not None:
            self._metadata(like)

    def write(self, rows: NDArray[Any]) -> None:
        """Append rows (rows, W, C)."""
        raw = np.ascontiguousarray(rows).astype(self._stored, copy=False).view(np.uint8).reshape(len(rows), -1)
        filtered = np.empty((len(raw), raw.shape[1] + 1), np.uint8)
        for number, row in enumerate(raw):
            left = row.copy()
            left[self._step :] -= row[: -self._step]
            above = row - self._above
            # The filter whose bytes are closer to 0 compresses better; as signed bytes, 255 is -1.
            costs = [int(np.abs(option.view(np.int8).astype(np.int16)).sum()) for option in (left, above)]
            filtered[number, 0] = 1 if costs[0] < costs[1] else 2
            filtered[number, 1:] = left if costs[0] < costs[1] else above
            self._above = row
        self._data(self._compressor.compress(filtered.data))

    def close(self) -> None:
        """End the file."""
        self._data(self._compressor.flush())
        self._chunk(b"IEND", b"")
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def _metadata(self, like: Picture) -> None:
        for kind, data in like.chunks:
            if not (like.icc and kind == b"sRGB"):  # the specification allows one of profile and sRGB
                self._chunk(kind, data)
        if like.icc:
            self._chunk(b"iCCP", b"icc\0\0" + zlib.compress(like.icc))
        if like.dpi:
            across, down = (round(value * _INCHES_PER_METRE) for value in like.dpi)
            self._chunk(b"pHYs", struct.pack(">IIB", across, down, 1))
        if like.exif:
            self._chunk(b"eXIf", like.exif.removeprefix(b"Exif\0\0"))
        if like.xmp:
            self._chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + like.xmp)

    def _data(self, data: bytes) -> None:
        for begin in range(0, len(data), _IDAT_BYTES):
            self._chunk(b"IDAT", data[begin : begin + _IDAT_BYTES])

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


class TiffRows:
    """A BigTIFF file of deflated strips: 8, 16 or 32-bit floating point, gray or RGB, with or without alpha."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: np.dtype[Any], like: Picture | None) -> None:
        """Begin a file; arguments as for `PngRows`, and float32."""
        self._path = path
        self._shape = shape
        self._dtype = dtype.newbyteorder("<")
        self._like = like
        self._waiting: list[NDArray[Any]] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._file: BinaryIO = path.open("wb")
        self._file.write(
            b"II" + struct.pack("<HHHQ", 43, 8, 0, 0)
        )  # the offset of the directory is filled in at the end

    def write(self, rows: NDArray[Any]) -> None:
        """Append rows (rows, W, C)."""
        for begin in range(0, len(rows), _STRIP_ROWS):
            self._waiting.append(rows[begin : begin + _STRIP_ROWS])
            while sum(map(len, self._waiting)) >= _STRIP_ROWS:
                together = np.concatenate(self._waiting)
                self._strip(together[:_STRIP_ROWS])
                self._waiting = [together[_STRIP_ROWS:]] if len(together) > _STRIP_ROWS else []
        self._waiting = [np.array(part) for part in self._waiting]  # the caller may reuse its memory

    def close(self) -> None:
        """Write the remaining rows and the directory."""
        if self._waiting:
            self._strip(np.concatenate(self._waiting))
        self._directory()
        self._file.close()
        if self._like is not None and self._like.exif:
            add_exif(self._path, self._like.exif)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()

    def _strip(self, rows: NDArray[Any]) -> None:
        stored = np.ascontiguousarray(rows).astype(self._dtype, copy=True)
        if self._dtype.kind == "u":  # each pixel as its difference from the previous one
            stored[:, 1:] -= rows[:, :-1]
        data = zlib.compress(stored.data, _LEVEL)
        self._offsets.append(self._file.tell())
        self._sizes.append(self._file.write(data))

    def _directory(self) -> None:
        height, width, channels = self._shape
        bits = 8 * self._dtype.itemsize
        whole = self._dtype.kind == "u"
        entries: list[tuple[int, str, list[int] | bytes]] = [
            (256, "I", [width]),
            (257, "I", [height]),
            (258, "H", [bits] * channels),
            (259, "H", [8]),  # deflate
            (262, "H", [1 if channels <= 2 else 2]),
            (273, "Q", self._offsets),
            (277, "H", [channels]),
            (278, "I", [_STRIP_ROWS]),
            (279, "Q", self._sizes),
            (284, "H", [1]),
            (317, "H", [2 if whole else 1]),
            (339, "H", [1 if whole else 3] * channels),
        ]
        if channels in (2, 4):
            entries.append((338, "H", [2]))  # alpha, not premultiplied
        like = self._like
        if like is not None and like.dpi:
            for tag, value in zip((282, 283), like.dpi, strict=True):
                entries.append((tag, "R", [round(value * 10_000), 10_000]))
            entries.append((296, "H", [2]))
        if like is not None and like.icc:
            entries.append((34675, "B", like.icc))
        if like is not None and like.xmp:
            entries.append((700, "B", like.xmp))
        rows = [self._row(*entry) for entry in sorted(entries)]
        place = self._append(struct.pack("<Q", len(rows)) + b"".join(rows) + struct.pack("<Q", 0))
        self._file.seek(8)
        self._file.write(struct.pack("<Q", place))

    def _row(self, tag: int, kind: str, values: list[int] | bytes) -> bytes:
        number = {"B": 7, "H": 3, "I": 4, "R": 5, "Q": 16}[kind]
        if isinstance(values, bytes):
            data, count = values, len(values)
        else:
            data = struct.pack(f"<{len(values)}{'I' if kind == 'R' else kind}", *values)
            count = len(values) // 2 if kind == "R" else len(values)
        if len(data) > 8:
            data = struct.pack("<Q", self._append(data))
        return struct.pack("<HHQ", tag, number, count) + data.ljust(8, b"\0")

    def _append(self, data: bytes) -> int:
        place = self._file.seek(0, 2)
        if place % 2:
            place += self._file.write(b"\0")
        self._file.write(data)
        return place


def open_rows(
    path: Path, name: str, shape: tuple[int, int, int], dtype: np.dtype[Any], like: Picture | None
) -> PngRows | TiffRows:
    """Begin a "PNG" or "TIFF" file."""
    return PngRows(path, shape, dtype, like) if name == "PNG" else TiffRows(path, shape, dtype, like)
