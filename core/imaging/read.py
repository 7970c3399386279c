"""The one place where image files become arrays: calibration, verification and upscaling decode alike.

Pillow decodes. It reduces 16-bit colour to 8 bits in silence, so such PNG and TIFF files go through libvips (the `huge`
extra) instead. Nothing is colour-managed or rotated: the ICC profile and the EXIF orientation travel with the pixels.

What is refused, each with one line: empty, truncated and foreign files; animations and multi-page files (a super-
resolution network has one picture as its input, and taking the first frame would lose the others unseen); CMYK, Lab and
floating point; pictures above MAX_PIXELS, which upscaling streams instead (`srdeploy.upscale.huge`).
The content decides about the format, not the name.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from srdeploy.core.errors import GateError, InputError
from srdeploy.core.extras import import_extra, is_installed

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".gif")
"""Names that count as images when a folder is searched."""

MAX_PIXELS = 89_478_485
"""Most pixels decoded into memory, 256 MiB as 8-bit RGB: where Pillow's own decompression-bomb warning begins."""

_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "GIF")
_MODES = {"1": "L", "L": "L", "LA": "LA", "La": "LA", "RGB": "RGB", "RGBX": "RGB", "YCbCr": "RGB"} | dict.fromkeys(
    ("RGBA", "RGBa", "PA"), "RGBA"
)
_SIGNATURES = (
    b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"BM", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6",
)  # fmt: skip
_EXIF_HEADER = b"Exif\0\0"
_XMP_KEYWORD = "XML:com.adobe.xmp"
_open_lock = threading.Lock()

Pixels = NDArray[np.uint8] | NDArray[np.uint16]
Kind = Literal["gray", "gray+alpha", "rgb", "rgb+alpha"]

_KINDS: tuple[Kind, ...] = ("gray", "gray+alpha", "rgb", "rgb+alpha")
_X_RESOLUTION = 282
_EXIF_TAGS = (270, 271, 272, 274, 305, 306, 315, 33432)
"""What of a TIFF's own directory is about the picture, not about its storage: description, camera, orientation, ..."""
_EXIF_FOLDERS = (34665, 34853)  # EXIF and GPS directories


@dataclass(frozen=True, eq=False)
class Picture:
    """One decoded image with what came along.

    Attributes:
        pixels: (H, W, C) uint8 or uint16; C = 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha. Alpha is not premultiplied.
        format: "png", "jpeg", "webp", "tiff", "bmp", "ppm" or "gif".
        palette: the file stored indices into a palette.
        icc: the colour profile's bytes; None when the file has none.
        exif: the EXIF block, "Exif\\0\\0" and a TIFF directory; the orientation is inside, the pixels are not rotated.
        xmp: the XMP packet.
        dpi: pixels per inch, horizontal and vertical.
    """

    pixels: Pixels
    format: str
    palette: bool = False
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None

    @property
    def kind(self) -> Kind:
        """What the channels are."""
        channels: int = self.pixels.shape[2]
        return _KINDS[channels - 1]

    @property
    def bits(self) -> int:
        """Bits per sample, 8 or 16."""
        return 8 * self.pixels.dtype.itemsize

    @property
    def colour(self) -> Pixels:
        """The pixels without alpha: (H, W, 1) or (H, W, 3)."""
        return self.pixels[..., :-1] if self.pixels.shape[2] in (2, 4) else self.pixels

    @property
    def alpha(self) -> Pixels | None:
        """The alpha channel (H, W), None for an opaque picture."""
        return self.pixels[..., -1] if self.pixels.shape[2] in (2, 4) else None


def find_images(source: Path) -> list[Path]:
    """Return the image files of a folder and everything below it, sorted by path; a file is returned as it is.

    Hidden files and folders are passed over. Links to folders are not followed.

    Raises:
        InputError: `source` does not exist, cannot be read, or holds no image.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(f"{source} does not exist", expected="an image or a folder of images")
    found = []
    for folder, folders, files in os.walk(source, onerror=_refuse_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder) / name
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS
        ]
    if not found:
        raise InputError(f"{source} holds no image", expected=f"files named {', '.join(EXTENSIONS)}")
    return sorted(found, key=lambda path: path.relative_to(source).parts)


def is_picture(path: Path) -> bool:
    """Tell by its first bytes whether a file claims to be a picture, however damaged, animated or strange."""
    try:
        with path.open("rb") as stream:
            start = stream.read(12)
    except OSError:
        return False
    return start.startswith(_SIGNATURES) or (start[:4] == b"RIFF" and start[8:] == b"WEBP")


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode one image file, with its metadata.

    Palettes become RGB (RGBA when an entry is transparent), bilevel becomes 8-bit gray; a second picture inside a
    camera's JPEG (MPO preview or depth map) is passed over.

    Raises:
        InputError: the file is empty, truncated, no image, animated, CMYK, floating point or above `max_pixels`.
        MissingExtraError: a 16-bit colour image, and pyvips is not installed.
    """
    if _is_wide_gray_alpha_tiff(path):
        return _picture_from_vips(path, max_pixels)
    with opened(path, max_pixels=max_pixels) as image:
        exif = _exif(image)  # before the pixels: loading a TIFF turns it and forgets its orientation
        if _is_wide_colour(path, image):
            pixels: Pixels = _wide_pixels(path)
        else:
            pixels = _as_stored(_narrow_pixels(path, image), image, exif)
        return _picture(image, pixels, exif)


def picture_metadata(path: Path) -> Picture:
    """Return what comes along with an image of any size, without decoding it: `pixels` is empty, (0, 0, C).

    Raises:
        InputError: as `read_image`, but no image is too large.
    """
    with opened(path, max_pixels=None) as image:
        return _picture(image, np.empty((0, 0, len(image.getbands())), np.uint8), _exif(image))


def _picture(image: Image.Image, pixels: Pixels, exif: bytes | None) -> Picture:
    """Put pixels and what an opened image says about them together."""
    info: dict[Any, Any] = dict(image.info)
    dpi = info.get("dpi")
    if image.format == "TIFF" and _X_RESOLUTION not in image.tag_v2:  # type: ignore[attr-defined]
        dpi = None  # Pillow makes 1 dot per inch of a file that states none
    return Picture(
        pixels=pixels,
        format="jpeg" if image.format == "MPO" else str(image.format).lower(),
        palette=image.mode in ("P", "PA"),
        icc=info.get("icc_profile") or None,
        exif=exif,
        xmp=_bytes_or_none(info.get("xmp") or info.get(_XMP_KEYWORD)),
        dpi=(float(dpi[0]), float(dpi[1])) if dpi and all(0 < float(value) < 1e6 for value in dpi) else None,
    )


def rgb8(source: Path | Picture) -> NDArray[np.uint8]:
    """Return an image as (H, W, 3) uint8 RGB: gray is repeated, 16 bits are rounded to 8, alpha is left out.

    Raises:
        InputError, MissingExtraError: as `read_image`.
    """
    picture = source if isinstance(source, Picture) else read_image(source)
    colour = picture.colour
    if colour.dtype == np.uint16:
        colour = np.rint(colour / 257.0).astype(np.uint8)  # 65535 = 257 * 255
    return np.array(np.broadcast_to(colour, (*colour.shape[:2], 3)), dtype=np.uint8, order="C")  # a copy: writable


def network_input(
    picture: Picture | NDArray[np.uint8] | NDArray[np.uint16], colours: Literal["rgb", "y"]
) -> NDArray[np.float32]:
    """Return what a network of these colours takes: (1, C, H, W) float32 in [0, 1].

    Args:
        picture: a decoded picture (alpha is left out) or an array (H, W), (H, W, 1) or (H, W, 3), uint8 or uint16.
        colours: "rgb", or "y" for the Y of BT.601 in studio swing, 16/255 to 235/255.
    """
    pixels = picture.colour if isinstance(picture, Picture) else picture
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    peak = np.float32(np.iinfo(pixels.dtype).max)
    if colours == "rgb":
        planes = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).transpose(2, 0, 1)  # (3, H, W)
        return np.ascontiguousarray(planes[None], dtype=np.float32) / peak
    from srdeploy.core.imaging.colour import y_from_rgb

    rgb = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).astype(np.float64) / float(peak)
    luma = y_from_rgb(rgb)
    return np.ascontiguousarray(luma, dtype=np.float32).reshape(1, 1, *pixels.shape[:2])


def to_uint8(output: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Return a network's output as pixels: (C, H, W) or (1, C, H, W) in 0..1 to (H, W, C) uint8.

    Clamped to 0..1, times 255, rounded half to even.

    Raises:
        GateError: a value is NaN or infinite; no such picture is passed on.
    """
    return quantized(output, np.uint8)


def to_uint16(output: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Return a network's output as (H, W, C) uint16: as `to_uint8`, times 65535.

    Raises:
        GateError: a value is NaN or infinite.
    """
    return quantized(output, np.uint16)


def quantized(output: NDArray[np.floating[Any]], dtype: Any) -> NDArray[Any]:
    """Clamp, scale to the peak of an unsigned type, round half to even: (1?, C, H, W) to (H, W, C)."""
    planes = output[0] if output.ndim == 4 else output
    # NaN and infinity both survive in the extremes, so two numbers tell about all of them.
    if planes.size and not (np.isfinite(planes.min()) and np.isfinite(planes.max())):
        raise GateError("the network's output holds NaN or infinite values", expected="numbers near 0..1")
    peak = np.iinfo(dtype).max
    pixels = np.empty((*planes.shape[1:], len(planes)), dtype)
    for channel, plane in enumerate(planes):  # plane by plane: three times quicker than turning the whole
        scaled = np.clip(plane, 0, 1).astype(np.float64 if dtype == np.uint16 else np.float32, copy=False)
        scaled *= peak
        pixels[..., channel] = np.rint(scaled, out=scaled)
    return pixels


@contextmanager
def opened(path: Path, *, max_pixels: int | None = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open an image with Pillow for the block, its header checked and every decoding failure put in one line.

    Args:
        path: the file.
        max_pixels: refuse larger pictures; None reads headers of any size (nothing is decoded before the block asks).

    Raises:
        InputError: as `read_image`.
    """
    try:
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty (0 bytes)", expected="an image")
        # Pillow's own limit is lifted because this module judges the size itself, just below, and headers of any
        # size may be asked for; the limit is process-wide, hence the lock.
        with _open_lock, _pillow_limit(None):
            image = Image.open(path, formats=_FORMATS)
        with image:
            _check_header(path, image, max_pixels)
            yield image
    except InputError:
        raise
    except UnidentifiedImageError as error:
        if is_picture(path):
            raise InputError(
                f"{path} is a picture of a kind that is not read here, or damaged at its beginning",
                expected="gray or RGB of 8 or 16 bits",
                next_step="convert it in an image editor first; floating-point TIFF is written (--float), not read",
            ) from error
        raise InputError(
            f"{path} is not an image that can be read", expected="PNG, JPEG, WebP, TIFF, BMP, PPM or GIF content"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, f"more than {2 * MAX_PIXELS:,}", MAX_PIXELS) from error
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist", expected="an image") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's ways of meeting broken content
        raise InputError(
            f"{path} is damaged or truncated ({error})", next_step="copy the file again from where it came from"
        ) from error


@contextmanager
def _pillow_limit(pixels: int | None) -> Iterator[None]:
    previous = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = previous


def _check_header(path: Path, image: Image.Image, max_pixels: int | None) -> None:
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise _too_large(path, f"{width}x{height}, {width * height:,}", max_pixels)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        what = "pages" if image.format == "TIFF" else "frames (an animation)"
        raise InputError(
            f"{path} holds {frames} {what}",
            expected="one picture",
            next_step="split it into single pictures, or make it a video, first",
        )
    if image.mode in ("CMYK", "LAB", "HSV", "F", "I") and not (image.format == "PPM" and image.mode == "I"):
        names = {"LAB": "Lab", "F": "32-bit floating point", "I": "32-bit integer"}
        raise InputError(
            f"{path} is {names.get(image.mode, image.mode)}",
            expected="gray or RGB of 8 or 16 bits",
            next_step="convert it to RGB with its colour profile in an image editor first",
        )


def _too_large(path: Path, size: str, max_pixels: int) -> InputError:
    return InputError(
        f"{path} declares {size} pixels",
        expected=f"at most {max_pixels:,} decoded into memory",
        next_step="srdeploy upscale streams larger PNG, TIFF and JPEG files; elsewhere use crops",
    )


def _narrow_pixels(path: Path, image: Image.Image) -> Pixels:
    """Return what Pillow decodes without loss: 8 bits of anything, 16 bits of gray."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return np.asarray(image).astype(np.uint16)[..., None]
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


def _as_stored(pixels: NDArray[Any], image: Image.Image, exif: bytes | None) -> NDArray[Any]:
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


def _is_wide_colour(path: Path, image: Image.Image) -> bool:
    """Tell whether the file stores more than 8 bits in several channels, which Pillow would cut to 8."""
    if image.format == "PNG":
        with path.open("rb") as stream:
            header = stream.read(26)  # signature, IHDR: width, height, bit depth, colour type
        return header[24] == 16 and header[25] != 0
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]
        return len(bits) > 1 and max(bits) > 8
    return image.format == "PPM" and image.mode == "RGB" and _ppm_maximum(path) > 255


def _is_wide_gray_alpha_tiff(path: Path) -> bool:
    """Tell whether a file is the one kind that libvips decodes and Pillow does not even identify."""
    try:
        with path.open("rb") as stream:
            if stream.read(4) not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or not is_installed("pyvips"):
                return False
        vips: Any = import_extra("pyvips", "huge")
        image = vips.Image.new_from_file(str(path))
        return bool(image.format == "ushort" and image.bands == 2)
    except OSError:
        return False
    except vips.Error:
        return False


def _picture_from_vips(path: Path, max_pixels: int) -> Picture:
    vips: Any = import_extra("pyvips", "huge")
    image = vips.Image.new_from_file(str(path))
    if image.width * image.height > max_pixels:
        raise _too_large(path, f"{image.width}x{image.height}, {image.width * image.height:,}", max_pixels)

    def blob(name: str) -> bytes | None:
        return bytes(image.get(name)) if image.get_typeof(name) else None

    exif = Image.Exif()
    if image.get_typeof("orientation"):
        exif[274] = image.get("orientation")
    return Picture(
        pixels=_wide_pixels(path),
        format="tiff",
        icc=blob("icc-profile-data"),
        exif=exif.tobytes() if len(exif) else None,
        xmp=blob("xmp-data"),
        dpi=(image.xres * 25.4, image.yres * 25.4) if image.xres > 0 else None,
    )


def _ppm_maximum(path: Path) -> int:
    with path.open("rb") as stream:
        lines = [line.split(b"#")[0] for line in stream.read(4096).splitlines()]
    words = b" ".join(lines).split()
    return int(words[3]) if len(words) > 3 and words[3].isdigit() else 255


def _wide_pixels(path: Path) -> NDArray[np.uint16]:
    """Decode 16-bit colour through libvips: (H, W, C) uint16."""
    vips: Any = import_extra("pyvips", "huge")
    try:
        image = vips.Image.new_from_file(str(path), access="sequential", fail_on="truncated")
        if image.format != "ushort":
            raise InputError(f"{path} has samples of type {image.format}", expected="gray or RGB of 8 or 16 bits")
        if image.interpretation == "cmyk":
            raise InputError(f"{path} is CMYK", expected="gray or RGB of 8 or 16 bits")
        pixels: NDArray[np.uint16] = image.numpy()
    except vips.Error as error:
        raise InputError(
            f"{path} is damaged or truncated ({error})", next_step="copy the file again from where it came from"
        ) from error
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _exif(image: Image.Image) -> bytes | None:
    """Return the EXIF block; a TIFF's own directory also describes its strips, which must not travel."""
    stored = image.info.get("exif")
    if image.format != "TIFF" and isinstance(stored, bytes) and stored:
        return stored if stored.startswith(_EXIF_HEADER) else _EXIF_HEADER + stored  # WebP stores it without
    found = image.getexif()
    if image.format == "TIFF":
        kept = Image.Exif()
        for tag in _EXIF_TAGS:
            if tag in found:
                kept[tag] = found[tag]
        for tag in _EXIF_FOLDERS:
            if folder := found.get_ifd(tag):
                kept.get_ifd(tag).update(folder)
                kept[tag] = kept.get_ifd(tag)
        found = kept
    return found.tobytes() if len(found) else None


def _refuse_unreadable(error: OSError) -> None:
    raise InputError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _bytes_or_none(value: object) -> bytes | None:
    if isinstance(value, str):
        return value.encode()
    return value if isinstance(value, bytes) and value else None
