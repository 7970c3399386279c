"""What comes in is kept: a round trip of pixels and metadata through every format."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from srdeploy.core.errors import InputError, OutputError, SrdeployError, UsageError
from srdeploy.core.imaging.read import Picture, read_image
from srdeploy.upscale.image_writer import write_image
from srdeploy.upscale.metadata import resized_exif
from srdeploy.upscale.single_image import OutputOptions, upscale_file
from srdeploy.upscale.upscaler import Upscaler

RANDOM = np.random.default_rng(0)
XMP = b'<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"/><?xpacket end="w"?>'


def exif_block(width: int = 7, height: int = 5) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Camera maker"
    inner = exif.get_ifd(0x8769)
    inner[0xA002], inner[0xA003] = width, height
    inner[0x9003] = "2026:01:02 03:04:05"
    exif[0x8769] = inner
    return exif.tobytes()


def picture(dtype: type, channels: int) -> Picture:
    pixels = RANDOM.integers(0, np.iinfo(dtype).max, (5, 7, channels), endpoint=True).astype(dtype)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return Picture(pixels, "png", icc=profile if channels > 2 else None, exif=exif_block(), xmp=XMP, dpi=(300.0, 150.0))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_lossless_formats_keep_pixels_and_metadata(suffix: str, dtype: type, channels: int, tmp_path: Path) -> None:
    original = picture(dtype, channels)
    path = tmp_path / f"out{suffix}"

    write_image(path, original.pixels, like=original)
    back = read_image(path)

    np.testing.assert_array_equal(back.pixels, original.pixels)
    assert back.icc == original.icc
    assert back.xmp == original.xmp
    assert back.dpi == pytest.approx((300, 150), abs=0.02)  # PNG counts in whole pixels per metre
    exif = Image.Exif()
    exif.load(back.exif or b"")
    assert exif[0x0112] == 6
    if (suffix, dtype, channels) == (".tif", np.uint16, 2):
        return  # Pillow does not open this kind, and libvips tells no more than the orientation
    assert exif[0x010F] == "Camera maker"
    assert exif.get_ifd(0x8769)[0x9003] == "2026:01:02 03:04:05"


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_photo_formats_keep_metadata(suffix: str, tmp_path: Path) -> None:
    original = picture(np.uint8, 3)
    path = tmp_path / f"out{suffix}"

    write_image(path, original.pixels, like=original)
    back = read_image(path)

    assert (back.icc, back.xmp) == (original.icc, original.xmp)
    assert back.exif == original.exif
    if suffix == ".webp":
        np.testing.assert_array_equal(back.pixels, original.pixels)  # lossless unless a quality is given
    else:
        assert back.dpi == (300.0, 150.0)


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 3), (np.uint16, 3), (np.uint16, 1)])
def test_tiff_that_states_no_resolution_gets_none(dtype: type, channels: int, tmp_path: Path) -> None:
    write_image(tmp_path / "a.tif", np.zeros((3, 4, channels), dtype))

    assert read_image(tmp_path / "a.tif").dpi is None


def test_quality_makes_smaller_files(tmp_path: Path) -> None:
    pixels = RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in (".jpg", ".webp"):
        write_image(tmp_path / f"a{suffix}", pixels)
        write_image(tmp_path / f"b{suffix}", pixels, quality=30)

        assert (tmp_path / f"b{suffix}").stat().st_size < (tmp_path / f"a{suffix}").stat().st_size / 2


def test_float_tiff_keeps_values_outside_the_unit_range(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.array([[[-0.25, 0.5, 1.5], [0.1, 0.2, 0.3]]], np.float32)

    write_image(tmp_path / "float.tif", values)

    np.testing.assert_array_equal(tifffile.imread(tmp_path / "float.tif"), values)


def test_exif_dimensions_follow_and_every_other_byte_stays() -> None:
    before = exif_block()

    after = resized_exif(before, width=14, height=10)

    exif = Image.Exif()
    exif.load(after)
    assert (exif.get_ifd(0x8769)[0xA002], exif.get_ifd(0x8769)[0xA003]) == (14, 10)
    changed = [index for index, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    assert len(changed) <= 8  # type and value of two entries


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"nonsense"], ids=repr)
def test_damaged_exif_is_passed_on_as_it_is(block: bytes) -> None:
    assert resized_exif(block, width=1, height=1) == block


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "words"),
    [
        ("out.xyz", (4, 4, 3), np.uint8, "a name ending in .png"),
        ("out", (4, 4, 3), np.uint8, "a name ending in .png"),
        ("out.jpg", (4, 4, 4), np.uint8, "JPEG holds no alpha"),
        ("out.jpg", (4, 4, 3), np.uint16, "JPEG holds 8 bits"),
        ("out.webp", (4, 4, 3), np.uint16, "WEBP holds 8 bits"),
        ("out.png", (4, 4, 3), np.float32, "no floating-point"),
        ("out.webp", (2, 16_384, 3), np.uint8, "too large for WEBP"),
        ("out.jpg", (2, 65_501, 3), np.uint8, "too large for JPEG"),
    ],
    ids=["suffix", "no suffix", "jpeg alpha", "jpeg 16", "webp 16", "png float", "webp size", "jpeg size"],
)
def test_format_that_cannot_hold_the_picture_is_refused(
    name: str, shape: tuple[int, ...], dtype: type, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        write_image(tmp_path / name, np.zeros(shape, dtype))

    assert list(tmp_path.iterdir()) == []


class TestFiles:
    """Whole files through a network that repeats pixels."""

    @pytest.fixture
    def up(self, nearest_onnx: Callable[..., Path]) -> Upscaler:
        return Upscaler.open(nearest_onnx(), threads=1)

    @pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 3), (np.uint8, 1), (np.uint16, 3), (np.uint16, 1)])
    def test_picture_is_twice_as_large_and_otherwise_the_same(
        self, dtype: type, channels: int, up: Upscaler, tmp_path: Path
    ) -> None:
        original = picture(dtype, channels)
        write_image(tmp_path / "in.png", original.pixels, like=original)

        upscale_file(up, tmp_path / "in.png", tmp_path / "out.png")
        back = read_image(tmp_path / "out.png")

        np.testing.assert_array_equal(back.pixels, original.pixels.repeat(2, axis=0).repeat(2, axis=1))
        assert (back.icc, back.xmp, back.kind) == (original.icc, original.xmp, original.kind)
        exif = Image.Exif()
        exif.load(back.exif or b"")
        assert (exif[0x0112], exif.get_ifd(0x8769)[0xA002]) == (6, 14)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (1, 65_500)], ids=str)
    def test_thin_pictures_come_through(self, shape: tuple[int, int], up: Upscaler, tmp_path: Path) -> None:
        pixels = RANDOM.integers(0, 256, (*shape, 3), dtype=np.uint8)
        write_image(tmp_path / "in.png", pixels)

        upscale_file(up, tmp_path / "in.png", tmp_path / "out.png")

        np.testing.assert_array_equal(
            read_image(tmp_path / "out.png").pixels, pixels.repeat(2, axis=0).repeat(2, axis=1)
        )

    def test_gif_of_one_frame_is_a_palette_picture(
        self, up: Upscaler, tmp_path: Path, picture: Callable[..., NDArray[np.uint8]]
    ) -> None:
        Image.fromarray(picture(8, 9)).convert("P").save(tmp_path / "in.gif")

        upscale_file(up, tmp_path / "in.gif", tmp_path / "out.png")

        assert read_image(tmp_path / "out.png").pixels.shape == (16, 18, 3)

    @pytest.mark.parametrize(
        ("source", "output", "words"),
        [
            ("in.png", "in.png", "is the input itself"),
            ("in.png", "link.png", "is the input itself"),
            ("in.png", "there.png", "exists already"),
            ("alpha.png", "out.jpg", "no alpha"),
            ("text.png", "out.png", "not an image"),
            ("empty.png", "out.png", "is empty"),
        ],
        ids=["same path", "same file", "exists", "alpha", "text", "empty"],
    )
    def test_refusals_leave_nothing_behind(
        self, source: str, output: str, words: str, up: Upscaler, tmp_path: Path
    ) -> None:
        write_image(tmp_path / "in.png", RANDOM.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        write_image(tmp_path / "alpha.png", RANDOM.integers(0, 256, (4, 4, 4), dtype=np.uint8))
        (tmp_path / "link.png").hardlink_to(tmp_path / "in.png")
        (tmp_path / "there.png").write_bytes(b"kept")
        (tmp_path / "text.png").write_text("text")
        (tmp_path / "empty.png").touch()
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        with pytest.raises(SrdeployError, match=words):
            upscale_file(up, tmp_path / source, tmp_path / output)

        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize(("name", "quality"), [("out.png", 50), ("out.tif", 50), ("out.jpg", 0), ("out.webp", 101)])
    def test_quality_that_a_format_does_not_have_is_refused(
        self, name: str, quality: int, up: Upscaler, tmp_path: Path
    ) -> None:
        write_image(tmp_path / "in.png", RANDOM.integers(0, 256, (4, 4, 3), dtype=np.uint8))

        with pytest.raises(UsageError, match=f"--quality {quality}"):
            upscale_file(up, tmp_path / "in.png", tmp_path / name, OutputOptions(quality=quality))

        assert not (tmp_path / name).exists()

    def test_force_replaces(self, up: Upscaler, tmp_path: Path) -> None:
        write_image(tmp_path / "in.png", RANDOM.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        (tmp_path / "out.png").write_bytes(b"old")

        upscale_file(up, tmp_path / "in.png", tmp_path / "out.png", OutputOptions(force=True))

        assert read_image(tmp_path / "out.png").pixels.shape == (8, 8, 3)

    @pytest.mark.tmpfs
    @pytest.mark.parametrize("wide", [False, True], ids=["pillow", "own writer"])
    @pytest.mark.parametrize("name", ["out.png", "out.tif"])
    def test_full_disk_is_one_line_and_nothing_is_left(
        self, name: str, wide: bool, up: Upscaler, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        source = tmp_path / "in.png"
        dtype = np.uint16 if wide else np.uint8
        write_image(source, RANDOM.integers(0, 256, (300, 300, 3)).astype(dtype))
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True)
        if mounted.returncode:
            pytest.skip("a tmpfs cannot be mounted here")
        try:
            with pytest.raises(OutputError, match="no space left"):
                upscale_file(up, source, disk / name)
            left = list(disk.iterdir())
        finally:
            subprocess.run(["umount", disk], check=True)

        assert left == []
        assert capfd.readouterr() == ("", "")  # libraries that write in C have nothing to say either

    def test_cmyk_is_refused(self, up: Upscaler, tmp_path: Path) -> None:
        Image.new("CMYK", (8, 8)).save(tmp_path / "in.jpg")

        with pytest.raises(InputError, match="CMYK"):
            upscale_file(up, tmp_path / "in.jpg", tmp_path / "out.jpg")
