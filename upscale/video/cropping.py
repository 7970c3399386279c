"""Read how many pixels the container hides at each edge: the clean aperture of MP4 and MOV, the crop of Matroska.

Players cut them off; decoders do not, and PyAV does not tell.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from srdeploy.upscale.video.damage import SEGMENT, ebml_element

_TRACKS, _TRACK = b"\x16\x54\xae\x6b", b"\xae"
_TRACK_TYPE, _VIDEO = b"\x83", b"\xe0"
_EDGES = {b"\x54\xcc": 0, b"\x54\xbb": 1, b"\x54\xdd": 2, b"\x54\xaa": 3}  # left, top, right, bottom
_SAMPLE_ENTRY = 78  # bytes of a description of video before its own boxes
_MEDIA = (b"mdia", b"minf", b"stbl", b"stsd")


class Crop(NamedTuple):
    """Hidden pixels at each edge."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def cut(self, width: int, height: int) -> tuple[slice, slice]:
        """Return rows and columns of what is shown of a frame."""
        return slice(self.top, height - self.bottom), slice(self.left, width - self.right)


def container_crop(path: Path, form: str, stream: Any) -> Crop:
    """Return what the container of a video hides; nothing where it states it in a way that leaves no picture.

    Args:
        path: a file that was opened.
        form: FFmpeg's name of its format.
        stream: its video stream.
    """
    width, height = int(stream.width), int(stream.height)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if "matroska" in form:
            place = [each.index for each in stream.container.streams.video].index(stream.index)
            crop = _crop_of_matroska(data, place)
        elif "mp4" in form:
            crop = _clean_aperture(data, int(stream.id), width, height)
        else:
            return Crop()
    shown = min(*crop, width - crop.left - crop.right - 1, height - crop.top - crop.bottom - 1) >= 0
    return crop if shown else Crop()


def _crop_of_matroska(data: mmap.mmap, place: int) -> Crop:
    """Return the crop of the n-th track of video."""
    _, _, header = ebml_element(data, 0)
    name, begin, end = ebml_element(data, header or 0)
    if name != SEGMENT:
        return Crop()
    for kind, span in _contents(data, begin, end or len(data)):
        if kind != _TRACKS:
            continue
        tracks = (dict(_contents(data, *track)) for kind, track in _contents(data, *span) if kind == _TRACK)
        films = [track for track in tracks if _number(data, track.get(_TRACK_TYPE)) == 1]
        edges = [0, 0, 0, 0]
        if place < len(films) and _VIDEO in films[place]:
            for edge, span in _contents(data, *films[place][_VIDEO]):
                if edge in _EDGES:
                    edges[_EDGES[edge]] = _number(data, span)
        return Crop(*edges)
    return Crop()


def _contents(data: mmap.mmap, position: int, stop: int) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """Yield the name of each element in a part of a file, and where its content begins and ends."""
    while position < stop:
        name, start, end = ebml_element(data, position)
        if not name or end is None or end > stop:  # a cluster of a live recording has no length; it follows the tracks
            return
        yield name, (start, end)
        position = end


def _number(data: mmap.mmap, span: tuple[int, int] | None) -> int:
    return int.from_bytes(data[slice(*span)], "big") if span else 0


def _clean_aperture(data: mmap.mmap, track_id: int, width: int, height: int) -> Crop:
    for movie in _boxes(data, 0, len(data), b"moov"):
        for track in _boxes(data, *movie, b"trak"):
            for start, _ in _boxes(data, *track, b"tkhd"):
                place = start + (20 if data[start] else 12)  # times of 64 or 32 bits stand before the number
                if int.from_bytes(data[place : place + 4], "big") != track_id:
                    break
                spans = [track]
                for name in _MEDIA:
                    spans = [found for span in spans for found in _boxes(data, *span, name)]
                for start, stop in spans:
                    entry = start + 8  # version and count
                    end = min(entry + int.from_bytes(data[entry : entry + 4], "big"), stop)
                    for aperture, _ in _boxes(data, entry + 8 + _SAMPLE_ENTRY, end, b"clap"):
                        return _crop_of_aperture(data[aperture : aperture + 32], width, height)
    return Crop()


def _boxes(data: mmap.mmap, position: int, stop: int, wanted: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of the content of the boxes of one name in a part of a file."""
    while position + 8 <= stop:
        length, content = int.from_bytes(data[position : position + 4], "big"), position + 8
        if length == 1:  # a 64-bit length follows the name
            length, content = int.from_bytes(data[position + 8 : position + 16], "big"), position + 16
        end = stop if length == 0 else position + length
        if end < content or end > stop:
            return
        if data[position + 4 : position + 8] == wanted:
            yield content, end
        position = end


def _crop_of_aperture(box: bytes, width: int, height: int) -> Crop:
    """Return the crop of a clean aperture: its size, and the distance of its middle from that of the frame."""
    if len(box) < 32:
        return Crop()
    numbers = struct.unpack(">IIIIiIiI", box)
    if not all(numbers[1::2]):
        return Crop()
    wide, high, x, y = (Fraction(top, bottom) for top, bottom in zip(numbers[::2], numbers[1::2], strict=True))
    left, top = math.floor((width - wide) / 2 + x), math.floor((height - high) / 2 + y)
    return Crop(left, top, width - left - math.ceil(wide), height - top - math.ceil(high))
