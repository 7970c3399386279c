"""Stream pictures that do not fit in memory from file to file.

libvips decodes: it reads PNG, JPEG and TIFF top to bottom a few rows at a time, with 16 bits, and is one wheel
(`pyvips[binary]`). Finished rows are written by `srdeploy.upscale.row_writers`.

Memory holds one row of tiles (input and output) and the engine's own tensors.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.errors import CapabilityError, InputError
from srdeploy.core.extras import import_extra
from srdeploy.core.imaging.decoders import not_decoded, open_with_libvips
from srdeploy.core.imaging.read import full_page, image_size, picture_metadata
from srdeploy.core.progress import SILENT, Progress
from srdeploy.upscale.alpha import REACH
from srdeploy.upscale.image_report import ImageReport
from srdeploy.upscale.image_writer import check_output
from srdeploy.upscale.metadata import kept_metadata
from srdeploy.upscale.planes import converted
from srdeploy.upscale.read_compute_write import Pipeline
from srdeploy.upscale.row_writers import open_rows
from srdeploy.upscale.upscaler import Upscaler

MAX_STREAMED_PIXELS = 1 << 34
"""Maximum pixels of a streamed input, 131,072 x 131,072: a larger header is damaged or an attack."""
MAX_EXPANSION = 3000
"""Maximum pixels per byte of file: flat PNG pixels deflate up to about 1030 times, flat JPEG pixels about 400."""
STREAM_MEMORY = 768 << 20
"""Default budget of tiles and strips: with the imported packages the process stays below 1.5 GB."""
_WRITTEN_ROWS = 64
_KEPT_ROWS = 16 + REACH
"""Rows kept before the last `begin` asked for: chroma lags behind the tiles by a few rows, and spreading colors under
transparent pixels reads earlier rows."""


class StreamedSource:
    """Rows of a file from top to bottom (see `srdeploy.upscale.planes.PixelSource`). Keeps recent rows only."""

    def __init__(self, path: Path) -> None:
        """Open a file; its header was checked by `check_header`.

        Raises:
            InputError: libvips cannot stream it.
            MissingExtraError: pyvips is not installed.
        """
        vips: Any = import_extra("pyvips", "huge")
        self._vips = vips
        self._path = path
        try:
            page = {"page": number} if (number := full_page(path)) else {}
            image = open_with_libvips(path, access="sequential", fail_on="error", **page)
        except vips.Error as error:
            raise not_decoded(path, error) from error
        if image.get_typeof("interlaced") and image.get("interlaced"):
            raise InputError(
                f"{path} is interlaced or progressive, so its rows are not stored from top to bottom",
                expected="a baseline JPEG, a PNG without interlacing or a TIFF",
                next_step="save it again without interlacing",
            )
        if image.format not in ("uchar", "ushort") or image.interpretation in ("cmyk", "lab", "labs"):
            raise InputError(
                f"{path} has pixels of {image.interpretation}, {image.format}",
                expected="gray or RGB of 8 or 16 bits",
            )
        self._dtype = np.dtype(np.uint8 if image.format == "uchar" else np.uint16)
        self._image = image
        self._region = vips.Region.new(image)
        self._rows: deque[NDArray[Any]] = deque()
        self._first = 0  # number of the first row kept
        self._asked = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self._image.height, self._image.width, self._image.bands

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return self._dtype

    def rows(self, begin: int, end: int) -> NDArray[Any]:
        """Return rows begin..end; `begin` may lag behind an earlier one by up to `_KEPT_ROWS` rows.

        Raises:
            InputError: the file ends early or is damaged.
        """
        self._asked = max(self._asked, begin)
        while self._first + len(self._rows) < end:
            self._fetch(min(end - self._first - len(self._rows), 64))
        while self._rows and self._first < self._asked - _KEPT_ROWS and self._first < begin:
            self._rows.popleft()
            self._first += 1
        if begin < self._first:
            raise ValueError(f"rows from {begin} are gone; the first kept is {self._first}")
        return np.stack([self._rows[row - self._first] for row in range(begin, end)])

    def _fetch(self, count: int) -> None:
        height, width, channels = self.shape
        top = self._first + len(self._rows)
        count = min(count, height - top)
        try:
            data = self._region.fetch(0, top, width, count)
        except self._vips.Error as error:
            raise not_decoded(self._path, error, f" near row {top}") from error
        self._rows.extend(np.frombuffer(data, self._dtype).reshape(count, width, channels))


def check_header(path: Path) -> tuple[int, int]:
    """Return (height, width) from the header, after refusing implausible ones; nothing is decoded.

    Raises:
        InputError: not an image, or larger than is plausible or can be streamed.
    """
    height, width = image_size(path)
    pixels = width * height
    size = path.stat().st_size
    if pixels > MAX_STREAMED_PIXELS or (pixels > 1 << 24 and pixels > MAX_EXPANSION * size):
        raise InputError(
            f"{path} declares {width}x{height} pixels in {size:,} bytes",
            expected=f"at most {MAX_STREAMED_PIXELS:,} pixels and {MAX_EXPANSION:,} per byte",
            next_step="download or copy it again: the header is damaged, or the file is a decompression bomb",
        )
    return height, width


def upscale_streamed(
    up: Upscaler, source: Path, output: Path, *, as_float: bool = False, progress: Progress = SILENT
) -> ImageReport:
    """Upscale a file into a (temporary) file without holding either in memory.

    Args:
        up: the network.
        source: PNG, JPEG or TIFF of any size.
        output: .png or .tif.
        as_float: write 32-bit floats (TIFF).
        progress: receives the number of tiles.

    Raises:
        InputError, UsageError, GateError: as for pictures in memory.
        CapabilityError: the format of the output cannot be streamed.
    """
    check_header(source)
    metadata = picture_metadata(source)
    pixels = StreamedSource(source)
    dtype = np.dtype(np.float32) if as_float else pixels.dtype
    rows, report = up.rows(pixels, memory_bytes=STREAM_MEMORY, progress=progress)
    height, width = report.output_size
    channels = pixels.shape[2]
    name = check_output(output, size=(height, width), channels=channels, dtype=dtype)
    if name not in ("PNG", "TIFF"):
        raise CapabilityError(f"{name} cannot be streamed", expected="a .png or .tif output")
    like, notes = kept_metadata(metadata, name, width=width, height=height, channels=channels)
    report.notes += notes

    def pieces() -> Iterator[NDArray[Any]]:
        for band in rows:
            for begin in range(0, len(band), _WRITTEN_ROWS):
                yield converted(band[begin : begin + _WRITTEN_ROWS], dtype)

    # Deflate takes about as long as a small network, so it runs in parallel.
    with open_rows(output, name, (height, width, channels), dtype, like) as writer:
        Pipeline(read=pieces(), compute=lambda piece: piece, write=writer.write).run()
    return report
