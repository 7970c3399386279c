"""Pixels as a file stores them: what Pillow decodes without loss, and the kinds that it does not.

libvips (the `huge` extra) decodes color of 16 bits, TIFF with extra samples that nothing describes and gray TIFF with
alpha; numpy decodes PPM of 16 bits. `srdeploy.core.imaging.read` decides which one a file needs.
"""

import contextlib
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from srdeploy.core.errors import InputError
from srdeploy.core.extras import import_extra, is_installed
from srdeploy.core.imaging import png_chunks

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "GIF")
"""Formats that Pillow may open."""

Pixels = NDArray[np.uint8] | NDArray[np.uint16]

_MODES = {"1": "L", "L": "L", "LA": "LA", "La": "LA", "RGB": "RGB", "RGBX": "RGB", "YCbCr": "RGB"} | dict.fromkeys(
    ("RGBA", "RGBa", "PA"), "RGBA"
)
_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _EXTRA_SAMPLES = 258, 259, 262, 277, 338  # TIFF tags
_UNREAD_COMPRESSIONS = {50001: "WebP", 32809: "ThunderScan", 34676: "SGILog", 34677: "SGILog24"}


def pillow_pixels(path: Path, image: Image.Image) -> Pixels:
    """Return what Pillow decodes without loss: 8 bits of anything, 16 bits of gray."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return _wide_gray(path, image)
    mode = _MODES.get(image.mode)
    if image.mode == "P" or "transparency" in image.info:
        # Palette entries and a single transparent colour become an alpha channel of their own.
        mode = "RGBA" if image.has_transparency_data else "RGB"
        if image.mode in ("1", "L"):
            mode = "LA"
    if mode is None:
        raise InputError(f"{path} has pixels of mode {image.mode}", expected="gray or RGB of 8 or 16 bits")
    image.load()  # before convert, so that a truncated file fails as such
    converted = (
        image if image.mode == mode else image.convert("RGBA").convert("LA") if mode == "LA" else image.convert(mode)
    )
    pixels = np.array(converted, dtype=np.uint8)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _wide_gray(path: Path, image: Any) -> NDArray[np.uint16]:
    gray = np.asarray(image).astype(np.uint16)[..., None]
    bits = image.tag_v2.get(_BITS, (16,))[0] if image.format == "TIFF" else 16
    if bits < 16:  # Pillow passes 12 bits on as they are, which would be a picture 16 times too dark
        gray = np.rint(gray * (65535 / (2**bits - 1))).astype(np.uint16)
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:  # white is 0; Pillow turns 8 bits over only
        return np.uint16(65535) - gray
    transparent = png_chunks.transparent_color(path) if image.format == "PNG" else None
    if transparent:
        return np.concatenate([gray, np.where(gray == transparent[0], 0, 65535).astype(np.uint16)], axis=2)
    return gray


def as_stored(pixels: NDArray[Any], image: Image.Image, exif: bytes | None) -> NDArray[Any]:
    """Undo the turn that Pillow gives to TIFF files (and to no others) by their orientation."""
    if image.format != "TIFF" or exif is None:
        return pixels
    found = Image.Exif()
    found.load(exif)
    match found.get(274):
        case 2:
            pixels = pixels[:, ::-1]
        case 3:
            pixels = pixels[::-1, ::-1]
        case 4:
            pixels = pixels[::-1]
        case 5:
            pixels = pixels.swapaxes(0, 1)
        case 6:
            pixels = np.rot90(pixels, 1)
        case 7:
            pixels = pixels[::-1, ::-1].swapaxes(0, 1)
        case 8:
            pixels = np.rot90(pixels, -1)
    return np.ascontiguousarray(pixels)


def needs_libvips(path: Path, image: Any) -> bool:
    """Return True for what Pillow cannot decode whole: color above 8 bits, extra samples that nothing describes.

    Raises:
        InputError: a TIFF of more than four samples per pixel, or of a compression that nothing here reads.
    """
    if image.format == "PNG":
        with path.open("rb") as stream:
            header = stream.read(26)  # signature, IHDR: width, height, bit depth, color type
        return header[24] == 16 and header[25] != 0
    if image.format != "TIFF":
        return False
    samples = image.tag_v2.get(_SAMPLES, 1)
    if samples > 4:
        raise _too_many_samples(path, samples)
    if image.tag_v2.get(_COMPRESSION) in _UNREAD_COMPRESSIONS:
        raise _unread_compression(path, _UNREAD_COMPRESSIONS[image.tag_v2[_COMPRESSION]])
    bits = image.tag_v2.get(_BITS, (1,))
    return (len(bits) > 1 and max(bits) > 8) or 0 in image.tag_v2.get(_EXTRA_SAMPLES, ())


def is_gray_alpha_tiff(path: Path) -> bool:
    """Return True for the kinds of TIFF with gray and alpha that libvips decodes and Pillow does not."""
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError:
        return False
    if start not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or not is_installed("pyvips"):
        return False
    vips: Any = import_extra("pyvips", "huge")
    try:
        image = open_with_libvips(path)
        return image.bands == 2 and (image.format == "ushort" or (image.format == "uchar" and _is_unread(path)))
    except vips.Error:
        return False


def check_tiff(path: Path) -> None:
    """Refuse a TIFF that Pillow does not identify, if the reason can be named; other files pass.

    Raises:
        InputError: its directory is behind the end of the file, or it has more than four samples per pixel.
    """
    with path.open("rb") as stream:
        start = stream.read(16)
    order: Literal["little", "big"] = "little" if start[:2] == b"II" else "big"
    if start[:4] in (b"II*\0", b"MM\0*"):
        directory = int.from_bytes(start[4:8], order)
    elif start[:4] in (b"II+\0", b"MM\0+"):
        directory = int.from_bytes(start[8:16], order)
    else:
        return
    if directory + 2 > path.stat().st_size:
        raise InputError(
            f"{path} is truncated: its directory is missing",
            expected="a whole TIFF",
            next_step="download or copy it again",
        )
    if is_installed("pyvips"):
        vips: Any = import_extra("pyvips", "huge")
        with contextlib.suppress(vips.Error):
            bands = open_with_libvips(path).bands
            if bands > 4:
                raise _too_many_samples(path, bands)


def _is_unread(path: Path) -> bool:
    """Return True if Pillow does not know the kind of picture, or does not convert it (gray times alpha)."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.mode == "La"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return True


def open_with_libvips(path: Path, **options: Any) -> Any:
    """Open an image file with libvips as it is now.

    Args:
        path: the file.
        options: of libvips' loader.

    Raises:
        pyvips.Error: libvips does not read it.
        MissingExtraError: pyvips is not installed.
    """
    vips: Any = import_extra("pyvips", "huge")
    # By default libvips answers with what it read from this path before, also if the file has changed since.
    return vips.Image.new_from_file(str(path), revalidate=True, **options)


def vips_pixels(path: Path, *, page: int = 0) -> Pixels:
    """Decode through libvips: (H, W, C) uint8 or uint16."""
    vips: Any = import_extra("pyvips", "huge")
    options: dict[str, Any] = {"page": page} if page else {}
    try:
        image = open_with_libvips(path, access="sequential", fail_on="error", **options)
        if image.format not in ("uchar", "ushort"):
            raise InputError(f"{path} has samples of type {image.format}", expected="gray or RGB of 8 or 16 bits")
        if image.interpretation == "cmyk":
            raise InputError(f"{path} is CMYK", expected="gray or RGB of 8 or 16 bits")
        if image.bands > 4:
            raise _too_many_samples(path, image.bands)
        pixels: Pixels = image.numpy()
    except vips.Error as error:
        raise not_decoded(path, error) from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def not_decoded(path: Path, error: Exception, place: str = "") -> InputError:
    """Return the error for a file that libvips does not decode.

    Args:
        path: the file.
        error: libvips' error.
        place: of the damage, such as " near row 5".
    """
    cause = "".join(str(error).strip().splitlines()[-1:])  # earlier lines may be about other files
    if unread := re.search(r"(\S+) compression support is not configured", cause):
        return _unread_compression(path, unread[1])
    return InputError(f"{path} is damaged or truncated{place} ({cause})", next_step="download or copy it again")


def _unread_compression(path: Path, name: str) -> InputError:
    return InputError(
        f"{path} is TIFF compressed with {name}, which is not read at this depth",
        expected="no compression, LZW, deflate or PackBits",
        next_step="save it with one of these first",
    )


def _too_many_samples(path: Path, samples: int) -> InputError:
    return InputError(
        f"{path} has {samples} samples per pixel",
        expected="gray or RGB, with at most one more channel",
        next_step="save it without the additional channels first",
    )


def ppm_header(path: Path) -> tuple[int, int, int, int]:
    """Return width, height, maximum, and where the samples begin, of a PPM file."""
    with path.open("rb") as stream:
        start = stream.read(4096)
    found = re.match(rb"P[36](?:\s|#[^\n]*\n)+" + rb"(?:\s|#[^\n]*\n)+".join([rb"(\d+)"] * 3) + rb"\s", start)
    if found is None:
        return 0, 0, 255, 0
    width, height, maximum = (int(value) for value in found.groups())
    return width, height, maximum, found.end()


def wide_ppm(path: Path) -> NDArray[np.uint16]:
    """Decode a PPM of more than 8 bits, binary or plain: (H, W, 3) uint16, the file's maximum becoming 65535."""
    width, height, maximum, begin = ppm_header(path)
    count = 3 * width * height
    data = path.read_bytes()
    if data.startswith(b"P6"):
        stored = np.frombuffer(data, ">u2", offset=begin, count=min(count, (len(data) - begin) // 2))
    else:
        stored = np.array(re.sub(rb"#[^\n]*", b"", data[begin:]).split()[:count], dtype=np.int64)
    if len(stored) < count:
        raise InputError(
            f"{path} is damaged or truncated ({len(stored)} of {count} samples)", next_step="download or copy it again"
        )
    scaled = np.rint(stored.astype(np.float64) * (65535 / maximum)) if maximum != 65535 else stored
    return scaled.clip(0, 65535).astype(np.uint16).reshape(height, width, 3)
