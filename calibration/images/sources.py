"""Sources of calibration images: a folder, an image, a pattern, a zip, a list file or a video, one image at a time."""

import glob
import hashlib
import zipfile
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.artifact import sha256_of_bytes, sha256_of_file
from srdeploy.core.errors import InputError
from srdeploy.core.extras import import_extra
from srdeploy.core.imaging.files import EXTENSIONS, find_images
from srdeploy.core.imaging.read import read_image, rgb8
from srdeploy.core.sizes import format_bytes

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".y4m")
MAX_ZIP_ENTRY_BYTES = 512 * 1024**2
"""Larger entries of a zip are refused as decompression bombs."""
VIDEO_FRAMES = 64
"""Frames taken from a video, evenly over its length: neighboring frames add nothing."""
MAX_IMAGES = 256
"""Images decoded from one source. Ranges stop changing long before; more only cost time."""


@dataclass(frozen=True)
class Photo:
    """One decoded calibration image.

    Attributes:
        name: file name, or file name and frame of a video.
        sha256: of the file, or of the decoded frame.
        pixels: (H, W, 3) uint8 RGB.
    """

    name: str
    sha256: str
    pixels: NDArray[np.uint8]


class PhotoSource:
    """The images of a source. They are decoded one at a time and not kept; iterate again to see them again.

    Of a source with more than MAX_IMAGES images, those with the smallest SHA-256 are taken: a choice that depends on
    contents, not on names or order.

    Args:
        path: folder, image, pattern with "*", zip, text file with one path per line, or video.

    Raises:
        InputError: the source does not exist, cannot be read, or holds no images.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        suffix = path.suffix.lower()
        self._kind = "files"
        self._hashes: dict[str, str] = {}
        self._paths: dict[str, Path] = {}
        if suffix == ".zip" and path.is_file():
            self._kind = "zip"
            with _open_zip(path) as archive:
                names = _image_names(archive, path)
                self.found = len(names)
                large = {name for name in names if archive.getinfo(name).file_size > MAX_ZIP_ENTRY_BYTES}
                hashes = {name: "" if name in large else sha256_of_bytes(archive.read(name)) for name in names}
            self._hashes = _smallest(hashes)
        elif suffix in VIDEO_EXTENSIONS and path.is_file():
            self._kind = "video"
            self.found = _frame_count(path)
        else:
            paths = _paths(path)
            self.found = len(paths)
            self._paths = {str(index): entry for index, entry in enumerate(paths)}
            self._hashes = _smallest({name: _hash_or_empty(entry) for name, entry in self._paths.items()})

    @property
    def limit(self) -> int:
        """The number of images that are decoded at most."""
        return VIDEO_FRAMES if self._kind == "video" else MAX_IMAGES

    def photos(self, *, bad: list[tuple[str, str]], only: Collection[str] | None = None) -> Iterator[Photo]:
        """Decode the images in a fixed order.

        Args:
            bad: images that cannot be decoded are appended as (name, reason).
            only: SHA-256 of the images to decode; None decodes all.
        """
        if self._kind == "video":
            yield from (photo for photo in _frames(self._path) if only is None or photo.sha256 in only)
            return
        wanted = [(name, digest) for name, digest in self._hashes.items() if only is None or digest in only]
        if self._kind == "zip":
            yield from self._unzipped(wanted, bad)
            return
        for name, digest in wanted:
            path = self._paths[name]
            photo = _decode(path, path.name, digest, bad)
            if photo is not None:
                yield photo

    def _unzipped(self, wanted: Sequence[tuple[str, str]], bad: list[tuple[str, str]]) -> Iterator[Photo]:
        with _open_zip(self._path) as archive, TemporaryDirectory() as folder:
            for name, digest in wanted:
                size = archive.getinfo(name).file_size
                if size > MAX_ZIP_ENTRY_BYTES:
                    bad.append((name, f"it has {format_bytes(size)}"))
                    continue
                # A name of our own: the archive's own paths are not trusted.
                path = Path(folder) / f"image{PurePosixPath(name).suffix.lower()}"
                path.write_bytes(archive.read(name))
                photo = _decode(path, name, digest, bad)
                if photo is not None:
                    yield photo


def _smallest(hashes: dict[str, str]) -> dict[str, str]:
    """Return the entries with the MAX_IMAGES smallest hashes, in their order."""
    if len(hashes) <= MAX_IMAGES:
        return hashes
    kept = set(sorted(hashes, key=lambda name: hashes[name])[:MAX_IMAGES])
    return {name: digest for name, digest in hashes.items() if name in kept}


def _hash_or_empty(path: Path) -> str:
    try:
        return sha256_of_file(path)
    except OSError:  # decoding reports it
        return ""


def _paths(source: Path) -> list[Path]:
    if any(letter in str(source) for letter in "*?[") and not source.exists():
        found = sorted(Path(name) for name in glob.glob(str(source), recursive=True))  # noqa: PTH207  # a pattern may be absolute
        if not found:
            raise InputError(f"no file matches {source}", expected="a pattern that names images")
        return [path for path in found if path.is_file()]
    if source.suffix.lower() in (".txt", ".lst") and source.is_file():
        lines = source.read_text(encoding="utf-8").splitlines()
        paths = [source.parent / line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not paths:
            raise InputError(f"{source} names no images", expected="one path per line")
        return paths
    return find_images(source)


def _decode(path: Path, name: str, digest: str, bad: list[tuple[str, str]]) -> Photo | None:
    try:
        return Photo(name, digest, rgb8(read_image(path)))
    except (InputError, OSError) as error:
        bad.append((name, error.found if isinstance(error, InputError) else str(error)))
        return None


@contextmanager
def _open_zip(source: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(source) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # zipfile has an exception each for damaged, truncated, unusually packed and encrypted archives
        raise InputError(f"{source} is not a readable zip file ({error})") from error


def _image_names(archive: zipfile.ZipFile, source: Path) -> list[str]:
    names = sorted({name for name in archive.namelist() if PurePosixPath(name).suffix.lower() in EXTENSIONS})
    if not names:
        raise InputError(f"{source} contains no images", expected=f"files named {', '.join(EXTENSIONS)}")
    return names


@contextmanager
def _open_video(source: Path) -> Iterator[Any]:
    av = import_extra("av", "video")
    try:
        with av.open(str(source)) as container:
            yield container
    except (av.error.FFmpegError, IndexError) as error:
        raise InputError(f"{source} is not a readable video ({error})") from error


def _frame_count(source: Path) -> int:
    with _open_video(source) as container:
        stream = container.streams.video[0]
        return int(stream.frames or sum(1 for _ in container.decode(stream)))


def _frames(source: Path) -> Iterator[Photo]:
    total = _frame_count(source)
    wanted = set(np.linspace(0, max(total - 1, 0), min(VIDEO_FRAMES, max(total, 1))).round().astype(int).tolist())
    with _open_video(source) as container:
        for index, frame in enumerate(container.decode(container.streams.video[0])):
            if index in wanted:
                pixels = frame.to_ndarray(format="rgb24")
                yield Photo(f"{source.name} frame {index}", hashlib.sha256(pixels.tobytes()).hexdigest(), pixels)
