"""Which files are pictures: by name where a folder is searched, by their first bytes where one is opened."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from srdeploy.core.errors import InputError

EXTENSIONS = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jfif",
    ".webp",
    ".tif",
    ".tiff",
    ".bmp",
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".gif",
)
"""Names that count as images when a folder is searched."""

_SIGNATURES = (
    b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+",
    b"BM", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6",
)  # fmt: skip
_FOREIGN = {
    b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL", b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000", b"8BPS": "Photoshop", b"\x76\x2f\x31\x01": "OpenEXR", b"gimp xcf": "GIMP",
}  # fmt: skip
"""Pictures of formats that are not read, by their first bytes."""
_HEIF_BRANDS = {
    b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC",
    b"hevc": "HEIC", b"hevx": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF", b"miaf": "HEIF",
}  # fmt: skip


def find_images(source: Path) -> list[Path]:
    """Return the image files of a folder and everything below it, sorted by path; a file is returned as it is.

    Hidden files and folders are passed over, and pipes and devices. Links to folders are not followed.

    Raises:
        InputError: `source` does not exist, cannot be read, or holds no image.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise InputError(f"{source} does not exist", expected="an image or a folder of images")
    visible = _visible_files(source, _refuse_unreadable)
    found = [path for path in visible if path.suffix.lower() in EXTENSIONS and not _is_special(path)]
    if not found:
        raise InputError(f"{source} holds no image", expected=f"files named {', '.join(EXTENSIONS)}")
    return sorted(found, key=lambda path: path.relative_to(source).parts)


def unread_files(source: Path) -> dict[str, int]:
    """Return how many files below a folder `find_images` ignores, by suffix such as ".mp4", or "pipe or device"."""
    found: Counter[str] = Counter()
    for path in _visible_files(source):
        if (suffix := path.suffix.lower()) not in EXTENSIONS:
            found[suffix] += 1
        elif _is_special(path):
            found["pipe or device"] += 1
    return dict(sorted(found.items()))


def _visible_files(source: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Yield the files of a folder and everything below it, without hidden ones."""
    for folder, folders, files in os.walk(source, onerror=onerror):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder) / name for name in files if not name.startswith("."))


def _is_special(path: Path) -> bool:
    """Return True for a pipe, socket or device; reading one can wait forever. A broken link is an error of its own."""
    return path.exists() and not path.is_file()


def is_picture(path: Path) -> bool:
    """Return True if a file's first bytes are a picture's, however damaged or animated, of a format not read too."""
    start = first_bytes(path)
    webp = start[:4] == b"RIFF" and start[8:12] == b"WEBP"
    return webp or start.startswith(_SIGNATURES) or foreign_format(start) is not None


def first_bytes(path: Path) -> bytes:
    """Return a file's first 12 bytes, as many as it has; none where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(12)
    except OSError:
        return b""


def foreign_format(start: bytes) -> str | None:
    """Return the name of a picture format that is not read, from a file's first 12 bytes."""
    if start[4:8] == b"ftyp":
        return _HEIF_BRANDS.get(start[8:12])
    return next((name for signature, name in _FOREIGN.items() if start.startswith(signature)), None)


def _refuse_unreadable(error: OSError) -> None:
    raise InputError(f"cannot read the folder {error.filename}: {error.strerror}") from error
