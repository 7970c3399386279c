"""Pixels that a container hides are cut off, as players do; decoders do not."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import box, boxes_of, numbered

from srdeploy.upscale.upscaler import Upscaler
from srdeploy.upscale.video.cropping import Crop, container_crop
from srdeploy.upscale.video.job import VideoOptions, upscale_video
from srdeploy.upscale.video.media import open_video
from srdeploy.upscale.video.reader import VideoReader

SHOWN = (40, 1, 32, 1, 4, 1, -2, 1)
"""40x32 of 64x48 pixels, their middle 4 to the right and 2 above that of the frame."""
HIDDEN = Crop(16, 6, 8, 10)


def _with_aperture(path: Path, aperture: tuple[int, ...]) -> Path:
    """Add a clean aperture to the descriptions of video in an MP4 file, whose index stands at the end."""

    def rebuilt(content: bytes, *names: bytes) -> bytes:
        if not names:  # the description of samples
            description = content[16:] + box(b"clap", struct.pack(">IIIIiIiI", *aperture))
            return content[:8] + box(content[12:16], description)
        return b"".join(
            box(name, rebuilt(data, *names[1:]) if name == names[0] else data) for name, data in boxes_of(content)
        )

    path.write_bytes(rebuilt(path.read_bytes(), b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd"))
    return path


def _clip(clips: Any, folder: Path, suffix: str, aperture: tuple[int, ...] = SHOWN, **changes: Any) -> Path:
    made = clips.make(folder / "a.mp4", range(3), **changes)
    made.write_bytes(b"".join(box(name, data) for name, data in boxes_of(made.read_bytes())))
    made = _with_aperture(made, aperture)
    if suffix == ".mp4":
        return made
    copy: Path = clips.remux([made], folder / f"b{suffix}")
    made.unlink()
    return copy


def _crop(path: Path) -> Crop:
    container, stream = open_video(path)
    with container:
        return container_crop(path, container.format.name, stream)


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_hidden_pixels_are_cut_off(suffix: str, pix_fmt: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    source = _clip(clips, tmp_path, suffix, pix_fmt=pix_fmt)

    upscale_video(up, source, tmp_path / "out.mkv", VideoOptions(quality=1))

    assert _crop(source) == HIDDEN
    assert _crop(tmp_path / "out.mkv") == Crop()
    reader = VideoReader(tmp_path / "out.mkv")
    frames = [frame.pixels for frame in reader.frames()]
    reader.close()
    assert len(frames) == 3
    peak = np.iinfo(frames[0].dtype).max
    for number, pixels in enumerate(frames):
        assert pixels.shape == (64, 80, 3)
        assert np.abs(pixels[::2, ::2] * (255 / peak) - numbered(number)[6:38, 16:56]).mean() < 4


@pytest.mark.parametrize(
    "aperture",
    [(64, 1, 48, 1, 0, 1, 0, 1), (0, 1, 48, 1, 0, 1, 0, 1), (40, 0, 32, 1, 0, 1, 0, 1), (60, 1, 48, 1, 30, 1, 0, 1)],
    ids=["whole frame", "no width", "division by zero", "outside of the frame"],
)
def test_apertures_that_hide_nothing_or_make_no_sense(aperture: tuple[int, ...], clips: Any, tmp_path: Path) -> None:
    assert _crop(_clip(clips, tmp_path, ".mp4", aperture)) == Crop()


@pytest.mark.parametrize(("name", "container"), [("a.mkv", {"live": "1"}), ("a.ts", {}), ("a.avi", {}), ("a.mov", {})])
def test_files_without(name: str, container: dict[str, str], clips: Any, tmp_path: Path) -> None:
    assert _crop(clips.make(tmp_path / name, container=container)) == Crop()
