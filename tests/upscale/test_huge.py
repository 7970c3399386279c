"""Pictures streamed from file to file: the same result as in memory, and bounded memory."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from peak_memory import environment

from srdeploy.core.errors import CapabilityError, InputError, UsageError
from srdeploy.core.imaging.read import Picture, read_image
from srdeploy.core.runner import Runner
from srdeploy.upscale.budget import TileSettings
from srdeploy.upscale.huge import StreamedSource, check_header, upscale_streamed
from srdeploy.upscale.image_writer import write_image
from srdeploy.upscale.upscaler import Upscaler

vips = pytest.importorskip("pyvips")
RANDOM = np.random.default_rng(0)
Draw = Callable[..., NDArray[np.uint8]]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    ("network", "dtype", "channels"),
    [("rcan", np.uint8, 3), ("srdensenet all", np.uint8, 4), ("srdensenet all", np.uint16, 3), ("rcan", np.uint8, 1)],
    ids=["rgb", "alpha on y", "16 bits on y", "gray"],
)
def test_streamed_equals_in_memory(
    network: str,
    dtype: type,
    channels: int,
    suffix: str,
    make_runner: Callable[..., Runner],
    tmp_path: Path,
    picture: Draw,
) -> None:
    image = picture(150, 70, channels).astype(dtype) * (257 if dtype == np.uint16 else 1)
    like = Picture(image, "png", dpi=(300.0, 300.0), icc=b"not really a profile" if channels == 0 else None)
    write_image(tmp_path / "in.png", image, like=like)
    with Upscaler(make_runner(network), TileSettings(mode="overlapped", side=48, overlap=8)) as up:
        expected = up(image)

        report = upscale_streamed(up, tmp_path / "in.png", tmp_path / f"out{suffix}")

    back = read_image(tmp_path / f"out{suffix}")
    assert report.decision.plan.tiles > 4
    np.testing.assert_array_equal(back.pixels, expected)
    assert back.dpi == pytest.approx((300, 300), abs=0.02)


def test_float_output(make_runner: Callable[..., Runner], tmp_path: Path, picture: Draw) -> None:
    image = picture(40, 30)
    write_image(tmp_path / "in.png", image)
    with Upscaler(make_runner("rcan")) as up:
        upscale_streamed(up, tmp_path / "in.png", tmp_path / "out.tif", as_float=True)

        stored = vips.Image.new_from_file(str(tmp_path / "out.tif")).numpy()
        np.testing.assert_allclose(stored, up(image.astype(np.float32) / 255), atol=1e-6)


def test_rows_are_read_once_and_forgotten(tmp_path: Path) -> None:
    image = RANDOM.integers(0, 256, (300, 10, 3), dtype=np.uint8)
    write_image(tmp_path / "in.png", image)
    source = StreamedSource(tmp_path / "in.png")

    for begin in range(0, 280, 20):
        np.testing.assert_array_equal(source.rows(begin, begin + 40 if begin < 260 else 300), image[begin : begin + 40])
        np.testing.assert_array_equal(source.rows(max(0, begin - 10), begin + 1), image[max(0, begin - 10) : begin + 1])

    with pytest.raises(ValueError, match="are gone"):
        source.rows(0, 10)


def _claims(path: Path, width: int, height: int) -> Path:
    import struct
    import zlib

    write_image(path, RANDOM.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    data = bytearray(path.read_bytes())
    struct.pack_into(">II", data, 16, width, height)
    struct.pack_into(">I", data, 29, zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [(100_000, 90_000), (2**31 - 1, 2**31 - 1), (10_000, 10_000)], ids=str)
def test_absurd_headers_are_refused_without_decoding(size: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="decompression bomb"):
        check_header(_claims(tmp_path / "bomb.png", *size))


def test_flat_but_honest_picture_is_no_bomb(tmp_path: Path) -> None:
    image = vips.Image.black(6000, 6000)
    image.pngsave(str(tmp_path / "flat.png"), compression=9)

    assert check_header(tmp_path / "flat.png") == (6000, 6000)


def test_interlaced_and_truncated_files_are_refused(nearest_onnx: Callable[..., Path], tmp_path: Path) -> None:
    image = RANDOM.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    vips.Image.new_from_array(image).pngsave(str(tmp_path / "interlaced.png"), interlace=True)
    write_image(tmp_path / "whole.png", image)
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    with Upscaler.open(nearest_onnx(), TileSettings(side=32), threads=1) as up:
        with pytest.raises(InputError, match="interlaced or progressive"):
            upscale_streamed(up, tmp_path / "interlaced.png", tmp_path / "out.png")
        with pytest.raises(InputError, match="damaged or truncated"):
            upscale_streamed(up, tmp_path / "cut.png", tmp_path / "out.png")


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [("out.webp", CapabilityError, "WEBP cannot be streamed"), ("out.xyz", UsageError, "a name ending in")],
    ids=["format", "suffix"],
)
def test_outputs_that_cannot_be_streamed_are_refused(
    name: str, kind: type, words: str, nearest_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    write_image(tmp_path / "in.png", RANDOM.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    with Upscaler.open(nearest_onnx(), threads=1) as up, pytest.raises(kind, match=words):
        upscale_streamed(up, tmp_path / "in.png", tmp_path / name)


def test_memory_stays_bounded_where_the_picture_would_not_fit(
    nearest_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    """2000 x 6000 doubled is 144 MB as bytes and 576 MB as floats; the stream stays far below."""
    noise = vips.Image.xyz(2000, 6000)
    image = ((noise[0] * 3 + noise[1] * 5) % 256).cast("uchar").bandjoin([noise[1] % 251, noise[0] % 241]).cast("uchar")
    image.copy(interpretation="srgb").tiffsave(str(tmp_path / "in.tif"), compression="deflate")
    code = (
        "import sys; from pathlib import Path; from srdeploy.upscale.upscaler import Upscaler;"
        "from srdeploy.upscale.huge import upscale_streamed; from srdeploy.upscale.budget import TileSettings;"
        "from peak_memory import peak_kib;"
        "up = Upscaler.open(Path(sys.argv[1]), TileSettings(memory_bytes=64 << 20), threads=1);"
        "before = peak_kib();"
        "upscale_streamed(up, Path(sys.argv[2]), Path(sys.argv[3]));"
        "print((peak_kib() - before) / 1024)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, nearest_onnx(), tmp_path / "in.tif", tmp_path / "out.tif"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )

    assert 8 < float(run.stdout) < 220  # MiB; less than a row of tiles would mean that nothing was measured
    made = vips.Image.new_from_file(str(tmp_path / "out.tif"))
    assert (made.width, made.height, made.bands) == (4_000, 12_000, 3)
    np.testing.assert_array_equal(
        made.crop(3_000, 11_500, 4, 4).numpy()[::2, ::2], image.crop(1500, 5750, 2, 2).numpy()
    )
