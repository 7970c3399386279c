"""Where calibration images come from: a folder, one image, a pattern, a zip, a list file or a video."""

import glob
import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.errors import InputError
from srdeploy.core.extras import import_extra
from srdeploy.core.imaging.read import EXTENSIONS, find_images, read_image, rgb8
from srdeploy.core.sizes import format_bytes

VIDEO_EXTENSIONS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".y4m")
MAX_ZIP_ENTRY_BYTES = 512 * 1024**2
"""Of one image in a zip: beyond, it is no image but a bomb."""
VIDEO_FRAMES = 64
"""Frames taken from a video, evenly over its length: neighbours tell nothing new."""


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


def read_photos(source: Path, *, bad: list[tuple[str, str]]) -> Iterator[Photo]:
    """Decode all images of a source in a fixed order.

    Args:
        source: folder, image, pattern with "*", zip, text file with one path per line, or video.
        bad: undecodable files are added here as (name, reason); deciding about them is the caller's business.

    Raises:
        InputError: the source does not exist, or holds no images.
    """
    suffix = source.suffix.lower()
    if suffix == ".zip" and source.is_file():
        yield from _from_zip(source, bad)
    elif suffix in VIDEO_EXTENSIONS and source.is_file():
        yield from _from_video(source)
    else:
        for path in _paths(source):
            photo = _decode(path, path.name, bad)
            if photo is not None:
                yield photo


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


def _decode(path: Path, name: str, bad: list[tuple[str, str]]) -> Photo | None:
    try:
        return Photo(name, sha256_of_file(path), rgb8(read_image(path)))
    except (InputError, OSError) as error:
        bad.append((name, error.found if isinstance(error, InputError) else str(error)))
        return None


def _from_zip(source: Path, bad: list[tuple[str, str]]) -> Iterator[Photo]:
    try:
        with zipfile.ZipFile(source) as archive, TemporaryDirectory() as folder:
            entries = {entry.filename: entry for entry in archive.infolist()}
            names = sorted(name for name in entries if PurePosixPath(name).suffix.lower() in EXTENSIONS)
            if not names:
                raise InputError(f"{source} contains no images", expected=f"files named {', '.join(EXTENSIONS)}")
            for name in names:
                if entries[name].file_size > MAX_ZIP_ENTRY_BYTES:
                    bad.append((name, f"it has {format_bytes(entries[name].file_size)}"))
                    continue
                # A name of our own: the archive's own paths are not trusted.
                path = Path(folder) / f"image{PurePosixPath(name).suffix.lower()}"
                path.write_bytes(archive.read(name))
                photo = _decode(path, name, bad)
                if photo is not None:
                    yield photo
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        # damaged, truncated, packed in an unusual way, or encrypted: zipfile has an exception for each
        raise InputError(f"{source} is not a readable zip file ({error})") from error


def _from_video(source: Path) -> Iterator[Photo]:
    av = import_extra("av", "video")
    try:
        with av.open(str(source)) as container:
            stream = container.streams.video[0]
            total = stream.frames or sum(1 for _ in container.decode(stream))
        wanted = set(np.linspace(0, max(total - 1, 0), min(VIDEO_FRAMES, max(total, 1))).round().astype(int).tolist())
        with av.open(str(source)) as container:
            for index, frame in enumerate(container.decode(container.streams.video[0])):
                if index in wanted:
                    pixels = frame.to_ndarray(format="rgb24")
                    digest = hashlib.sha256(io.BytesIO(pixels.tobytes()).getbuffer()).hexdigest()
                    yield Photo(f"{source.name} frame {index}", digest, pixels)
    except (av.error.FFmpegError, IndexError) as error:
        raise InputError(f"{source} is not a readable video ({error})") from error
