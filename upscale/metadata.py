"""Which of a picture's metadata an output format can hold: what does not fit is taken out, and named in a note."""

import struct
from dataclasses import replace
from typing import Any

from PIL import Image

from srdeploy.core.imaging.png_chunks import COLOR, keywords
from srdeploy.core.imaging.read import Picture

_EXIF_HEADER = b"Exif\0\0"
_SHORT, _LONG = 3, 4
_EXIF_FOLDERS = (0x8769, 0x8825)  # EXIF, GPS
_PROFILE_SPACES = {b"GRAY": "gray", b"RGB ": "RGB", b"CMYK": "CMYK", b"Lab ": "Lab"}
_SRGB_GAMMA = struct.pack(">I", 45455)
JPEG_SEGMENT = 65_533
"""Bytes that a JPEG segment holds behind its length (ITU-T T.81, B.1.1.4). ICC profiles are split; EXIF and XMP are
not, since readers differ in how they put the parts together."""
_JPEG_PROFILE = 255 * (JPEG_SEGMENT - 14)
"""Bytes of an ICC profile in at most 255 segments (ICC.1:2022, B.4)."""
_XMP_HEADER = b"http://ns.adobe.com/xap/1.0/\0"
_LONG_VALUE = 4096  # bytes: maker notes, previews and user comments are above it, descriptions below


def kept_metadata(
    like: Picture, name: str, *, width: int, height: int, channels: int
) -> tuple[Picture, tuple[str, ...]]:
    """Return a picture's metadata for an output file, and one line about each thing that cannot be kept.

    Args:
        like: the input picture.
        name: format of the output: "PNG", "TIFF", "JPEG" or "WEBP".
        width, height, channels: of the output; the pixel dimensions in the EXIF block become these.

    Returns:
        The picture with metadata that the format holds (its pixels are the input's), and the notes, those about the
        input included.
    """
    notes = list(like.notes)
    exif = None if like.exif is None else resized_exif(like.exif, width=width, height=height)
    icc, xmp, chunks = like.icc, like.xmp, like.chunks
    if icc is not None and (space := _wrong_space(icc, name, channels)) is not None:
        icc = None
        notes.append(f"the color profile is for {space} pixels and the output's are not: not kept")
    if name == "JPEG" and icc is not None and len(icc) > _JPEG_PROFILE:
        notes.append(f"a color profile of {len(icc):,} bytes is longer than JPEG holds ({_JPEG_PROFILE:,}): not kept")
        icc = None
    if name != "JPEG" and like.segments:
        notes.append(f"the JPEG's comments and IPTC are not kept in {name}")
    if name == "JPEG" and exif is not None and len(exif) > JPEG_SEGMENT:
        exif = _short_exif(exif)
        notes.append(f"EXIF is longer than a JPEG segment ({JPEG_SEGMENT:,} bytes): only its short values are kept")
    if name == "JPEG" and xmp is not None and len(_XMP_HEADER + xmp) > JPEG_SEGMENT:
        notes.append(f"XMP of {len(xmp):,} bytes is longer than a JPEG segment ({JPEG_SEGMENT:,} bytes): not kept")
        xmp = None
    if name != "PNG":
        if texts := keywords(chunks):
            notes.append(f"PNG text ({', '.join(dict.fromkeys(texts))}) is not kept in {name}")
        if icc is None and any(_says_more_than_srgb(*chunk) for chunk in chunks):
            notes.append(f"the PNG's color chunks (gamma, primaries) are not kept in {name}")
        chunks = ()
    return replace(like, exif=exif, icc=icc, xmp=xmp, chunks=chunks, notes=()), tuple(notes)


def resized_exif(exif: bytes, *, width: int, height: int) -> bytes:
    """Set the pixel dimensions inside an EXIF block, if it states any; every other byte stays.

    Args:
        exif: the block, with or without its "Exif" header.
        width, height: of the new picture.
    """
    header = len(_EXIF_HEADER) if exif.startswith(_EXIF_HEADER) else 0
    block = bytearray(exif[header:])
    order = {b"II": "<", b"MM": ">"}.get(bytes(block[:2]))
    if order is None:
        return exif
    values = {0x0100: width, 0x0101: height, 0xA002: width, 0xA003: height}
    try:
        pending, seen = [struct.unpack_from(order + "I", block, 4)[0]], set[int]()
        while pending:
            start = pending.pop()
            if start in seen:  # a damaged directory that points to itself
                continue
            seen.add(start)
            for entry in range(struct.unpack_from(order + "H", block, start)[0]):
                at = start + 2 + 12 * entry
                tag, kind, count = struct.unpack_from(order + "HHI", block, at)
                if tag == 0x8769:
                    pending.append(struct.unpack_from(order + "I", block, at + 8)[0])
                elif tag in values and count == 1:
                    value = values[tag]
                    if kind == _SHORT and value < 1 << 16:
                        struct.pack_into(order + "HHIHH", block, at, tag, _SHORT, 1, value, 0)
                    else:
                        struct.pack_into(order + "HHII", block, at, tag, _LONG, 1, value)
    except struct.error:  # a damaged directory is passed on as it is
        return exif
    return exif[:header] + bytes(block)


def _short_exif(exif: bytes) -> bytes | None:
    """Return an EXIF block without its long values; None where nothing is left."""
    found = Image.Exif()
    found.load(exif)
    kept = Image.Exif()
    for tag, value in found.items():
        if tag not in _EXIF_FOLDERS and not _is_long(value):
            kept[tag] = value
    for tag in _EXIF_FOLDERS:
        if folder := {key: value for key, value in found.get_ifd(tag).items() if not _is_long(value)}:
            kept.get_ifd(tag).update(folder)
            kept[tag] = kept.get_ifd(tag)
    return kept.tobytes() if len(kept) else None


def _is_long(value: Any) -> bool:
    size = len(value) if isinstance(value, bytes | str) else 8 * len(value) if isinstance(value, tuple) else 8
    return size > _LONG_VALUE


def _wrong_space(icc: bytes, name: str, channels: int) -> str | None:
    """Return what pixels a profile is for, where the output's are others; WebP stores gray as RGB."""
    space = icc[16:20]
    stored = b"GRAY" if channels <= 2 and name != "WEBP" else b"RGB "
    return None if space == stored else _PROFILE_SPACES.get(space, space.decode("latin-1").strip() or "unknown")


def _says_more_than_srgb(kind: bytes, data: bytes) -> bool:
    """Return True for a color chunk without which a reader, assuming sRGB, shows other colors."""
    return kind in COLOR and kind not in (b"sRGB", b"cHRM") and data not in (_SRGB_GAMMA, b"\x01\x0d\x00\x01")
