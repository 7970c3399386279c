"""The one place where image files become arrays: calibration, verification and upscaling decode alike.

Pillow decodes. It silently reduces 16-bit color to 8 bits and drops unspecified extra samples, so such PNG and TIFF
files go through libvips (the `huge` extra) instead, and 16-bit PPM, which libvips' wheel lacks, through numpy. Nothing
is color-managed or rotated: the ICC profile and the EXIF orientation travel with the pixels.

What is refused, each with one line: empty, truncated and foreign files; animations and multi-page files (a super-
resolution network has one picture as its input, and taking the first frame would lose the others unseen), reduced
copies inside a TIFF excepted; CMYK, Lab and floating point; pictures above MAX_PIXELS, which upscaling streams instead
(`srdeploy.upscale.huge`).
The content decides about the format, not the name.
"""

import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from srdeploy.core.errors import GateError, InputError
from srdeploy.core.imaging import png_chunks
from srdeploy.core.imaging.decoders import (
    FORMATS,
    Pixels,
    as_stored,
    check_tiff,
    is_gray_alpha_tiff,
    needs_libvips,
    open_with_libvips,
    pillow_pixels,
    ppm_header,
    vips_pixels,
    wide_ppm,
)
from srdeploy.core.imaging.files import first_bytes, foreign_format, is_picture
from srdeploy.core.imaging.gain_map import announces_gain_map, without_gain_map

MAX_PIXELS = 89_478_485
"""Most pixels decoded into memory, 256 MiB as 8-bit RGB: where Pillow's own decompression-bomb warning begins."""

PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, png_chunks.MAX_BYTES)
# Pillow's own limit of 1 MiB refuses pictures whose settings, workflow or color profile are larger, as "damaged".
_EXIF_HEADER = b"Exif\0\0"
_XMP_KEYWORD = "XML:com.adobe.xmp"
_SEGMENTS = {"COM": 0xFE, "APP13": 0xED}
_PHOTOSHOP = b"Photoshop 3.0\0"
"""Beginning of the segments that hold IPTC: captions and keywords of agencies and archives."""
_EXTENDED_XMP = b"http://ns.adobe.com/xmp/extension/\0"
_open_lock = threading.Lock()

Kind = Literal["gray", "gray+alpha", "rgb", "rgb+alpha"]

_KINDS: tuple[Kind, ...] = ("gray", "gray+alpha", "rgb", "rgb+alpha")
_X_RESOLUTION = 282
_SUBFILE, _OLD_SUBFILE, _SAMPLE_FORMAT = 254, 255, 339  # TIFF tags
_SIGNED = 2  # of _SAMPLE_FORMAT
_MAX_PAGES = 32  # of a TIFF searched for reduced copies: a document of more pages is none with previews
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
        xmp: the XMP packet; without the announcement of a gain map, which is not read.
        dpi: pixels per inch, horizontal and vertical.
        chunks: text and color chunks of a PNG file, (type, data) each; XMP and EXIF are not among them.
        segments: comments and IPTC of a JPEG file, whole segments.
        notes: what the file holds and this picture does not, one line each.
    """

    pixels: Pixels
    format: str
    palette: bool = False
    icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    chunks: tuple[png_chunks.Chunk, ...] = ()
    segments: tuple[bytes, ...] = ()
    notes: tuple[str, ...] = ()

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


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Decode one image file, with its metadata.

    Palettes become RGB (RGBA when an entry is transparent), bilevel becomes 8-bit gray; a second picture inside a
    camera's JPEG (MPO preview or depth map) is passed over.

    Raises:
        InputError: the file is empty, truncated, no image, animated, CMYK, floating point or above `max_pixels`.
        MissingExtraError: a 16-bit colour image, and pyvips is not installed.
    """
    if is_gray_alpha_tiff(path):
        return _picture_from_vips(path, max_pixels)
    with opened(path, max_pixels=max_pixels) as image:
        exif = _exif(image)  # before the pixels: loading a TIFF turns it and forgets its orientation
        if image.format == "PPM" and image.mode == "RGB" and ppm_header(path)[2] > 255:
            pixels: Pixels = wide_ppm(path)
        elif needs_libvips(path, image):
            pixels = vips_pixels(path, page=image.tell() if image.format == "TIFF" else 0)
        else:
            pixels = as_stored(pillow_pixels(path, image), image, exif)
        return _picture(path, image, pixels, exif)


def picture_metadata(path: Path) -> Picture:
    """Return the metadata of an image of any size, without decoding it: `pixels` is empty, (0, 0, C).

    Raises:
        InputError: as `read_image`, but no image is too large.
    """
    if is_gray_alpha_tiff(path):
        return _metadata_from_vips(open_with_libvips(path))
    with opened(path, max_pixels=None) as image:
        exif = _png_exif(path, image) if image.format == "PNG" else _exif(image)
        return _picture(path, image, np.empty((0, 0, len(image.getbands())), np.uint8), exif)


def _png_exif(path: Path, image: Image.Image) -> bytes | None:
    """Return the EXIF block of a PNG, and complete its `info`, without decoding it: Pillow decodes it to find them."""
    with Image.open(io.BytesIO(png_chunks.metadata_only(path))) as small:
        small.load()
        image.info |= small.info
        return _exif(small)


def full_page(path: Path) -> int:
    """Return the number of the page that libvips streams; 0 but for a TIFF that begins with a reduced copy.

    Raises:
        InputError: as `picture_metadata`; or the page is stored as YCbCr, which libvips does not convert to RGB unless
            it is compressed as JPEG.
    """
    if is_gray_alpha_tiff(path):
        return 0
    with opened(path, max_pixels=None) as image:
        if image.format == "TIFF" and image.mode == "YCbCr":
            raise InputError(
                f"{path} is too large to be decoded at once, and its YCbCr cannot be streamed",
                expected="gray or RGB of 8 or 16 bits",
                next_step="convert it to RGB first",
            )
        return image.tell() if image.format == "TIFF" else 0


def image_size(path: Path) -> tuple[int, int]:
    """Return (height, width) of an image of any size, from its header.

    Raises:
        InputError: as `picture_metadata`.
    """
    if is_gray_alpha_tiff(path):
        tiff = open_with_libvips(path)
        return tiff.height, tiff.width
    with opened(path, max_pixels=None) as image:
        return image.size[1], image.size[0]


def _picture(path: Path, image: Image.Image, pixels: Pixels, exif: bytes | None) -> Picture:
    """Put pixels and what an opened image says about them together."""
    info: dict[Any, Any] = dict(image.info)
    dpi = info.get("dpi")
    if image.format == "TIFF" and _X_RESOLUTION not in image.tag_v2:  # type: ignore[attr-defined]
        dpi = None  # Pillow makes 1 dot per inch of a file that states none
    notes = []
    xmp = _bytes_or_none(info.get("xmp") or info.get(_XMP_KEYWORD))
    if xmp is not None and announces_gain_map(xmp):
        xmp = without_gain_map(xmp)
        notes.append("the gain map (HDR) is not passed on, nor what announces it in the XMP")
    elif image.format == "MPO":
        notes.append("further pictures in the file (previews, depth or gain maps) are not passed on")
    applied = image.applist if isinstance(image, JpegImagePlugin.JpegImageFile) else []
    if any(name == "APP1" and data.startswith(_EXTENDED_XMP) for name, data in applied):
        notes.append("the extended part of the XMP is not passed on")
    return Picture(
        pixels=pixels,
        format="jpeg" if image.format == "MPO" else str(image.format).lower(),
        palette=image.mode in ("P", "PA"),
        icc=info.get("icc_profile") or None,
        exif=exif,
        xmp=xmp,
        dpi=(float(dpi[0]), float(dpi[1])) if dpi and all(0 < float(value) < 1e6 for value in dpi) else None,
        chunks=png_chunks.read_chunks(path) if image.format == "PNG" else (),
        segments=tuple(
            b"\xff" + bytes([_SEGMENTS[name]]) + (len(data) + 2).to_bytes(2) + data
            for name, data in applied
            if name == "COM" or (name == "APP13" and data.startswith(_PHOTOSHOP))
        ),
        notes=tuple(notes),
    )


def rgb8(source: Path | Picture) -> NDArray[np.uint8]:
    """Return an image as (H, W, 3) uint8 RGB: gray is repeated, 16 bits are rounded to 8, alpha is dropped.

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
        picture: a decoded picture (alpha is dropped) or an array (H, W), (H, W, 1) or (H, W, 3), uint8 or uint16.
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


def quantized(output: NDArray[np.floating[Any]], dtype: Any) -> NDArray[Any]:
    """Clamp, scale to the peak of an unsigned type, round half to even: (1?, C, H, W) to (H, W, C)."""
    planes = output[0] if output.ndim == 4 else output
    # NaN and infinity both survive in the extremes, so two numbers tell about all of them.
    if planes.size and not (np.isfinite(planes.min()) and np.isfinite(planes.max())):
        raise GateError("the network's output holds NaN or infinite values", expected="numbers near 0..1")
    peak = np.iinfo(dtype).max
    pixels = np.empty((*planes.shape[1:], len(planes)), dtype)
    for channel, plane in enumerate(planes):  # plane by plane: three times faster than transposing the whole
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
        # Pillow's own limit is lifted because this module checks the size itself, just below, and headers of any
        # size may be asked for; the limit is process-wide, hence the lock. Pillow warns of damaged tags: either they
        # do not matter, or the picture is refused below.
        with _open_lock, _pillow_limit(None), warnings.catch_warnings(action="ignore"):
            image = Image.open(path, formats=FORMATS)
        with image:
            _check_header(path, image, max_pixels)
            yield image
    except InputError:
        raise
    except UnidentifiedImageError as error:
        foreign = foreign_format(first_bytes(path))
        if foreign is not None:
            raise InputError(
                f"{path} is a picture in {foreign} format, which is not read",
                expected="PNG, JPEG, WebP, TIFF, BMP, PPM or GIF content",
                next_step="convert it to PNG or TIFF first",
            ) from error
        if is_picture(path):
            check_tiff(path)
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
        if "MAX_TEXT" in str(error):
            raise InputError(
                f"{path} holds text or a color profile of more than {png_chunks.MAX_BYTES >> 20} MiB",
                next_step="save it without its text first",
            ) from error
        raise InputError(f"{path} is damaged or truncated ({error})", next_step="download or copy it again") from error


@contextmanager
def _pillow_limit(pixels: int | None) -> Iterator[None]:
    previous = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = previous


def _check_header(path: Path, image: Any, max_pixels: int | None) -> None:
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise _too_large(path, f"{width}x{height}, {width * height:,}", max_pixels)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format == "TIFF":
        frames = _seek_full_page(image)
    if frames > 1 and image.format != "MPO":
        what = "pages" if image.format == "TIFF" else "frames (an animation)"
        raise InputError(
            f"{path} holds {frames} {what}",
            expected="one picture",
            next_step="split it into single pictures, or make it a video, first",
        )
    if (
        image.format == "TIFF"
        and max(image.tag_v2.get(258, (1,))) <= 16
        and _SIGNED in image.tag_v2.get(_SAMPLE_FORMAT, ())
    ):
        raise InputError(f"{path} has signed samples", expected="gray or RGB of 8 or 16 bits, unsigned")
    if image.mode in ("CMYK", "LAB", "HSV", "F", "I") and not (image.format == "PPM" and image.mode == "I"):
        names = {"LAB": "Lab", "F": "32-bit floating point", "I": "32-bit integer"}
        raise InputError(
            f"{path} is {names.get(image.mode, image.mode)}",
            expected="gray or RGB of 8 or 16 bits",
            next_step="convert it to RGB with its colour profile in an image editor first",
        )


def _seek_full_page(image: Any) -> int:
    """Go to the one page of a TIFF that is no reduced copy of another; return how many such pages there are."""
    full = []
    for page in range(min(image.n_frames, _MAX_PAGES)):
        image.seek(page)
        if not (image.tag_v2.get(_SUBFILE, 0) & 1 or image.tag_v2.get(_OLD_SUBFILE) == 2):
            full.append(page)
    image.seek(full[0] if full else 0)
    return len(full) if image.n_frames <= _MAX_PAGES else int(image.n_frames)


def _too_large(path: Path, size: str, max_pixels: int) -> InputError:
    return InputError(
        f"{path} declares {size} pixels",
        expected=f"at most {max_pixels:,} decoded into memory",
        next_step="srdeploy upscale streams larger PNG, TIFF and JPEG files; elsewhere use crops",
    )


def _picture_from_vips(path: Path, max_pixels: int) -> Picture:
    image = open_with_libvips(path)
    if image.width * image.height > max_pixels:
        raise _too_large(path, f"{image.width}x{image.height}, {image.width * image.height:,}", max_pixels)
    return replace(_metadata_from_vips(image), pixels=vips_pixels(path))


def _metadata_from_vips(image: Any) -> Picture:
    def blob(name: str) -> bytes | None:
        return bytes(image.get(name)) if image.get_typeof(name) else None

    exif = Image.Exif()
    if image.get_typeof("orientation"):
        exif[274] = image.get("orientation")
    return Picture(
        pixels=np.empty((0, 0, image.bands), np.uint8),
        format="tiff",
        icc=blob("icc-profile-data"),
        exif=exif.tobytes() if len(exif) else None,
        xmp=blob("xmp-data"),
        dpi=(image.xres * 25.4, image.yres * 25.4) if image.xres > 0 else None,
    )


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


def _bytes_or_none(value: object) -> bytes | None:
    if isinstance(value, str):
        return value.encode()
    return value if isinstance(value, bytes) and value else None
