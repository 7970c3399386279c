"""Write pictures with the bit depth, alpha, color profile, EXIF, XMP and resolution of the input.

Pillow writes the formats that it can write without loss; `srdeploy.upscale.row_writers` writes 16-bit color and floats.
The EXIF block is copied byte for byte, except that the pixel dimensions in it, if any, are set to the new ones
(`srdeploy.upscale.metadata`, which also reports what a format cannot hold). The resolution (pixels per inch) is
unchanged, so a picture twice as wide in pixels prints twice as wide.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from srdeploy.core.errors import UsageError
from srdeploy.core.imaging.read import Picture
from srdeploy.upscale.metadata import kept_metadata
from srdeploy.upscale.row_writers import open_rows
from srdeploy.upscale.tiff_tags import add_exif

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jfif": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
"""Formats that can be written, by suffix."""
JPEG_QUALITY = 95
_MAX_SIDE = {"JPEG": 65_500, "WEBP": 16_383, "PNG": 2**31 - 1, "TIFF": 2**31 - 1}
_XMP_KEYWORD = "XML:com.adobe.xmp"


def check_quality(path: Path, quality: int | None) -> None:
    """Refuse a quality that the format of the output does not have.

    Raises:
        UsageError: PNG and TIFF are lossless, and JPEG and WebP start at 1.
    """
    name = FORMATS.get(path.suffix.lower())
    if quality is None or name is None:
        return
    if name in ("PNG", "TIFF"):
        raise UsageError(f"--quality {quality} for {name}, which is lossless", expected="a .jpg or .webp output")
    if not 1 <= quality <= 100:
        raise UsageError(f"--quality {quality} for {name}", expected="1 to 100")


def check_output(path: Path, *, size: tuple[int, int], channels: int, dtype: Any) -> str:
    """Return the format of an output, after checking before anything is computed that it can hold the picture.

    Args:
        path: output file.
        size: (height, width).
        channels: 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha.
        dtype: uint8, uint16 or float32.

    Raises:
        UsageError: the format is unknown, or cannot hold the picture. Nothing is dropped to make it fit.
    """
    name = FORMATS.get(path.suffix.lower())
    if name is None:
        raise UsageError(f"output {path}", expected=f"a name ending in {', '.join(FORMATS)}")
    kind = np.dtype(dtype)
    if kind.kind == "f" and name != "TIFF":
        raise UsageError(f"{name} holds no floating-point pixels", expected="a .tif output")
    if kind.itemsize == 2 and name in ("JPEG", "WEBP"):
        raise UsageError(f"{name} holds 8 bits and the picture has 16", expected="a .png or .tif output")
    if channels in (2, 4) and name == "JPEG":
        raise UsageError("JPEG holds no alpha and the picture has some", expected="a .png, .webp or .tif output")
    if max(size) > _MAX_SIDE[name]:
        raise UsageError(
            f"{size[1]}x{size[0]} is too large for {name}: at most {_MAX_SIDE[name]} pixels a side",
            expected="a .png or .tif output",
        )
    return name


def write_image(
    path: Path, pixels: NDArray[Any], *, like: Picture | None = None, quality: int | None = None
) -> tuple[str, ...]:
    """Write a picture under a (temporary) name; see `srdeploy.core.artifact.atomic_file`.

    Args:
        path: output file; its suffix chooses the format.
        pixels: (H, W, C) uint8, uint16 or float32; C = 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha.
        like: the picture whose color profile, EXIF, XMP, resolution, PNG text and color chunks are passed on.
        quality: 1 to 100, for JPEG (default 95) and WebP (default lossless).

    Returns:
        One line for each part of the input's metadata that the format cannot hold.

    Raises:
        UsageError: the format cannot hold the picture.
        OSError: the disk is full or the folder cannot be written.
    """
    height, width, channels = pixels.shape
    name = check_output(path, size=(height, width), channels=channels, dtype=pixels.dtype)
    kept, notes = None, tuple[str, ...]()
    if like is not None:
        kept, notes = kept_metadata(like, name, width=width, height=height, channels=channels)
    if pixels.dtype == np.uint8 or (pixels.dtype == np.uint16 and channels == 1):
        _save_with_pillow(path, pixels, name, kept, quality)
    else:
        with open_rows(path, name, (height, width, channels), pixels.dtype, kept) as rows:
            rows.write(pixels)
    return notes


def _save_with_pillow(path: Path, pixels: NDArray[Any], name: str, like: Picture | None, quality: int | None) -> None:
    channels = pixels.shape[2]
    if channels == 1:
        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0]))
    else:
        image = Image.fromarray(np.ascontiguousarray(pixels), mode={2: "LA", 3: "RGB", 4: "RGBA"}[channels])
    options: dict[str, Any] = {}
    if like is not None:
        options = _pillow_metadata(like, name)
    if name == "JPEG":
        # Chroma at full resolution: subsampling would discard three quarters of what the network computed.
        options |= {"quality": JPEG_QUALITY if quality is None else quality, "subsampling": 0}
    elif name == "WEBP":
        options |= {"lossless": True, "exact": True} if quality is None else {"quality": quality}
    elif name == "TIFF":
        options |= {"compression": "tiff_adobe_deflate"}
        exif = options.pop("exif", None)
    if name != "TIFF":
        image.save(path, format=name, **options)
        return
    encoded = io.BytesIO()  # on a full disk libtiff prints lines of its own and reports no reason
    image.save(encoded, format=name, **options)
    path.write_bytes(encoded.getbuffer())
    if exif:
        add_exif(path, exif)


def _pillow_metadata(like: Picture, name: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if like.icc:
        options["icc_profile"] = like.icc
    if like.dpi and name != "WEBP":  # WebP states its resolution in EXIF only
        options["dpi"] = like.dpi
    if like.exif:
        options["exif"] = like.exif
    if name == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for kind, data in like.chunks:
            chunks.add(kind, data)
        if like.xmp:
            chunks.add_itxt(_XMP_KEYWORD, like.xmp.decode("utf-8", "surrogateescape"))
        options["pnginfo"] = chunks
    if name == "JPEG" and like.segments:
        options["extra"] = b"".join(like.segments)
    if name != "PNG" and like.xmp:
        if name == "TIFF":
            options["tiffinfo"] = {700: like.xmp}
        else:
            options["xmp"] = like.xmp
    return options
