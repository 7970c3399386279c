"""Upscale one image file to one image file with the same bits, alpha, profile, EXIF and resolution."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srdeploy.core.artifact import atomic_file
from srdeploy.core.errors import UsageError
from srdeploy.core.imaging.read import MAX_PIXELS, Picture, image_size, read_image
from srdeploy.core.progress import SILENT, Progress
from srdeploy.upscale.huge import check_header, upscale_streamed
from srdeploy.upscale.image_report import ImageReport
from srdeploy.upscale.image_writer import check_output, check_quality, write_image
from srdeploy.upscale.upscaler import Upscaler


@dataclass(frozen=True)
class OutputOptions:
    """Options of the output.

    Attributes:
        as_float: 32-bit floating-point TIFF, not clamped.
        quality: of JPEG and WebP (1 to 100), or the video codec's CRF; None for the format's default.
        force: replace existing files.
    """

    as_float: bool = False
    quality: int | None = None
    force: bool = False


def refuse_same(source: Path, output: Path) -> None:
    """Refuse an output that is the input, or is inside the input folder.

    Raises:
        UsageError: it is one of these.
    """
    if output.exists() and source.exists() and output.samefile(source):
        raise UsageError(f"{output} is the input itself", next_step="choose another output name")
    inside = source.resolve() in output.resolve().parents
    if source.is_dir() and inside:
        raise UsageError(
            f"{output} is inside the input folder {source}",
            expected="an output folder elsewhere: its pictures would become inputs of the next run",
        )


def refuse_folder(output: Path) -> None:
    """Refuse a folder as the output of one file.

    Raises:
        UsageError: the output is a folder.
    """
    if output.is_dir():
        raise UsageError(f"{output} is a folder", expected=f"a file, such as {output / 'NAME'}.png or .mp4")


def upscale_file(
    up: Upscaler,
    source: Path,
    output: Path,
    options: OutputOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> ImageReport:
    """Upscale one image file; pictures that do not fit in memory are streamed.

    Args:
        up: the network.
        source: the image.
        output: .png, .jpg, .webp or .tif.
        options: how to write.
        progress: receives the number of tiles.

    Raises:
        InputError: the source is not an image that can be read.
        UsageError: the output exists, is the source, or its format cannot hold the picture.
        GateError: a tile is broken and no fallback repaired it; nothing is written.
        OutputError: the disk is full or the folder cannot be written.
    """
    options = options or OutputOptions()
    refuse_same(source, output)
    refuse_folder(output)
    check_quality(output, options.quality)
    with atomic_file(output, force=options.force) as temporary:
        if is_streamed(source, up):
            return upscale_streamed(up, source, temporary, as_float=options.as_float, progress=progress)
        picture = read_image(source)
        check_fits(picture, up, output, options)
        pixels, report = upscale_picture(up, picture, options, progress=progress)
        report.notes += write_image(temporary, pixels, like=picture, quality=options.quality)
        return report


def is_streamed(source: Path, up: Upscaler) -> bool:
    """Return True if a picture is too large to be held in memory: 89 megapixels, or 358 after upscaling.

    Raises:
        InputError: not an image, or its header is implausible.
    """
    height, width = image_size(source)
    pixels = height * width
    if pixels <= MAX_PIXELS and pixels * up.contract.scale**2 <= 4 * MAX_PIXELS:
        return False
    check_header(source)
    return True


def check_fits(picture: Picture, up: Upscaler, output: Path, options: OutputOptions) -> None:
    """Refuse, before anything is computed, an output format that cannot hold the result.

    Raises:
        UsageError: see `srdeploy.upscale.image_writer.check_output`.
    """
    height, width, channels = picture.pixels.shape
    _, _, *size = up.contract.output_shape((1, up.contract.channels, height, width))
    check_output(output, size=(size[0], size[1]), channels=channels, dtype=_dtype(picture, options))


def upscale_picture(
    up: Upscaler, picture: Picture, options: OutputOptions, *, progress: Progress = SILENT
) -> tuple[np.ndarray[Any, Any], ImageReport]:
    """Upscale a decoded picture to pixels of the type that will be written."""
    return up.upscale(picture.pixels, dtype=_dtype(picture, options), progress=progress)


def _dtype(picture: Picture, options: OutputOptions) -> np.dtype[Any]:
    return np.dtype(np.float32) if options.as_float else picture.pixels.dtype
