"""Decoding: what comes in as which pixels, and what is refused with one line."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, PngImagePlugin

from srdeploy.core.errors import GateError, InputError
from srdeploy.core.imaging.colour import y_from_rgb
from srdeploy.core.imaging.files import find_images, is_picture
from srdeploy.core.imaging.read import (
    MAX_PIXELS,
    full_page,
    image_size,
    network_input,
    picture_metadata,
    quantized,
    read_image,
    rgb8,
    to_uint8,
)

RANDOM = np.random.default_rng(0)
GRAY = RANDOM.integers(0, 256, (5, 7), dtype=np.uint8)
RGB = RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8)
RGBA = RANDOM.integers(0, 256, (5, 7, 4), dtype=np.uint8)
GRAY16 = RANDOM.integers(0, 65536, (5, 7), dtype=np.uint16)


def png16(pixels: np.ndarray) -> bytes:
    """Write (H, W, C) uint16 as a PNG by hand: Pillow cannot."""
    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def saved(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("name", "array", "kind", "format_name"),
    [
        ("gray.png", GRAY, "gray", "png"),
        ("rgb.png", RGB, "rgb", "png"),
        ("rgba.png", RGBA, "rgb+alpha", "png"),
        ("gray16.png", GRAY16, "gray", "png"),
        ("gray16.tif", GRAY16, "gray", "tiff"),
        ("rgb.tif", RGB, "rgb", "tiff"),
        ("rgb.bmp", RGB, "rgb", "bmp"),
        ("rgb.ppm", RGB, "rgb", "ppm"),
        ("gray16.pgm", GRAY16, "gray", "ppm"),
        ("lossless.webp", RGB, "rgb", "webp"),
        ("png_named.jpg", RGB, "rgb", "png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lossless_files_give_their_pixels(
    name: str, array: np.ndarray, kind: str, format_name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    options = {"lossless": True} if name.endswith("webp") else {"format": "PNG"} if name == "png_named.jpg" else {}

    picture = read_image(saved(path, array, **options))

    assert (picture.kind, picture.format, picture.bits) == (kind, format_name, 8 * array.dtype.itemsize)
    np.testing.assert_array_equal(picture.pixels.squeeze(axis=2) if array.ndim == 2 else picture.pixels, array)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_per_channel_survive(channels: int, tmp_path: Path) -> None:
    pytest.importorskip("pyvips")
    pixels = RANDOM.integers(0, 65536, (5, 7, channels), dtype=np.uint16)
    path = tmp_path / "wide.png"
    path.write_bytes(png16(pixels))

    picture = read_image(path)

    assert picture.pixels.dtype == np.uint16
    np.testing.assert_array_equal(picture.pixels, pixels)


@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind the pixels"])
def test_metadata_of_a_png_is_read_without_its_pixels(behind: bool, tmp_path: Path) -> None:
    """The pixels here cannot be decoded, so the metadata was read without them."""
    exif = Image.Exif()
    exif[0x010E] = "a description"
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    path = saved(tmp_path / "a.png", RGB, exif=exif, icc_profile=b"profile", dpi=(300, 300), pnginfo=text)
    data = path.read_bytes()
    begin, pixels, end = data.index(b"IHDR") + 21, data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    damaged = (
        data[pixels : pixels + 8] + bytes(end - pixels - 12) + zlib.crc32(data[pixels + 4 : pixels + 8]).to_bytes(4)
    )
    middle = [data[begin:pixels], damaged]
    path.write_bytes(data[:begin] + b"".join(reversed(middle) if behind else middle) + data[end:])

    picture = picture_metadata(path)

    with pytest.raises(InputError):
        read_image(path)
    assert (picture.exif, picture.icc, picture.xmp) == (exif.tobytes(), b"profile", xmp)
    assert picture.dpi == pytest.approx((300, 300), rel=1e-3)


@pytest.mark.parametrize("options", [{"interlace": True}, {}])
def test_a_file_that_changed_is_read_again(options: dict[str, bool], tmp_path: Path) -> None:
    """libvips keeps what it read from a path, unless it is told not to."""
    vips = pytest.importorskip("pyvips")
    path = tmp_path / "wide.png"

    for pixels in RANDOM.integers(0, 65536, (3, 64, 48, 3), dtype=np.uint16):
        vips.Image.new_from_array(pixels).copy(interpretation="rgb16").pngsave(str(path), **options)
        np.testing.assert_array_equal(read_image(path).pixels, pixels)


def test_palette_becomes_colour_and_its_transparency_alpha(tmp_path: Path) -> None:
    indexed = Image.fromarray(GRAY % 4).convert("P")
    indexed.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    indexed.save(tmp_path / "opaque.png")
    indexed.save(tmp_path / "holes.png", transparency=1)

    opaque, holes = read_image(tmp_path / "opaque.png"), read_image(tmp_path / "holes.png")

    assert (opaque.kind, holes.kind) == ("rgb", "rgb+alpha")
    assert opaque.palette
    np.testing.assert_array_equal(holes.pixels[..., 3] == 0, np.asarray(indexed) == 1)


def test_bilevel_becomes_gray_and_gray_with_a_transparent_value_gets_alpha(tmp_path: Path) -> None:
    Image.fromarray(GRAY > 100).save(tmp_path / "bilevel.png")
    Image.fromarray(GRAY).save(tmp_path / "keyed.png", transparency=int(GRAY[2, 3]))

    bilevel, keyed = read_image(tmp_path / "bilevel.png"), read_image(tmp_path / "keyed.png")

    np.testing.assert_array_equal(bilevel.pixels[..., 0], np.where(GRAY > 100, 255, 0))
    assert keyed.kind == "gray+alpha"
    assert keyed.pixels[2, 3, 1] == 0


def test_metadata_comes_along_and_pixels_are_not_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees when shown
    path = saved(tmp_path / "photo.jpg", RGB, exif=exif, dpi=(300, 300), icc_profile=b"profile", quality=95)

    picture = read_image(path)

    assert picture.pixels.shape == (5, 7, 3)
    assert picture.icc == b"profile"
    assert picture.dpi == (300.0, 300.0)
    assert picture.exif is not None
    assert picture.exif.startswith(b"Exif")
    assert picture_metadata(path).icc == b"profile"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".tif", ".png"])
def test_pixels_stay_as_stored_whatever_the_orientation(suffix: str, orientation: int, tmp_path: Path) -> None:
    """Pillow turns TIFF files when it loads them, and no others: a trap for whoever passes the tag on."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / f"turned{suffix}", RGB, exif=exif)

    picture = read_image(path)

    np.testing.assert_array_equal(picture.pixels, RGB)
    kept = Image.Exif()
    kept.load(picture.exif or b"")
    assert kept[0x0112] == orientation


def _truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def _encoded(array: np.ndarray, format_name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format=format_name, **options)  # type: ignore[arg-type]
    return stream.getvalue()


LARGE = RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8)


def _bomb(width: int, height: int) -> bytes:
    """A small valid PNG whose header is then changed to claim another size."""
    data = bytearray(_encoded(RGB, "PNG"))
    struct.pack_into(">II", data, 16, width, height)
    struct.pack_into(">I", data, 29, zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def _animation(format_name: str) -> bytes:
    stream = io.BytesIO()
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (0, 120, 250)]
    frames[0].save(stream, format=format_name, save_all=True, append_images=frames[1:])
    return stream.getvalue()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: b"", "is empty"),
        (lambda: b"just some text, no picture", "not an image that can be read"),
        (lambda: _truncated(_encoded(LARGE, "PNG")), "damaged or truncated"),
        (lambda: _truncated(_encoded(LARGE, "JPEG")), "damaged or truncated"),
        (lambda: _truncated(_encoded(LARGE, "TIFF")), "damaged or truncated"),
        (lambda: _truncated(png16(LARGE.astype(np.uint16) * 257)), "damaged or truncated"),
        (lambda: _encoded(LARGE, "PNG")[:20], "damaged or truncated|not an image"),
        (lambda: _bomb(20_000, 20_000), r"400,000,000 pixels.*at most 89,478,485"),
        (lambda: _bomb(2**31 - 1, 2**31 - 1), "declares .* pixels"),
        (lambda: _animation("GIF"), r"3 frames \(an animation\)"),
        (lambda: _animation("PNG"), r"3 frames \(an animation\)"),
        (lambda: _animation("WEBP"), r"3 frames \(an animation\)"),
        (lambda: _animation("TIFF"), "3 pages"),
        (lambda: _cmyk("TIFF"), "CMYK"),
        (lambda: _cmyk("JPEG"), "CMYK"),
        (lambda: _encoded(GRAY.astype(np.float32), "TIFF"), "32-bit floating point"),
        (lambda: _encoded(GRAY.astype(np.int32), "TIFF"), "32-bit integer"),
    ],
    ids=[
        "zero bytes", "text", "cut PNG", "cut JPEG", "cut TIFF", "cut 16-bit PNG", "cut header", "bomb", "absurd size",
        "GIF animation", "PNG animation", "WebP animation", "TIFF pages", "CMYK TIFF", "CMYK JPEG", "float", "int32",
    ],
)  # fmt: skip
def test_what_is_no_single_sound_picture_is_refused(make: Callable[[], bytes], words: str, tmp_path: Path) -> None:
    path = tmp_path / "input.png"
    path.write_bytes(make())

    with pytest.raises(InputError, match=words) as refusal:
        read_image(path)

    assert str(path) in str(refusal.value)


def _cmyk(format_name: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RGB).convert("CMYK").save(stream, format=format_name)
    return stream.getvalue()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.png does not exist"):
        read_image(tmp_path / "no.png")


def test_size_limit_is_an_option(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.png", LARGE)

    assert MAX_PIXELS > 64 * 64
    assert read_image(path, max_pixels=64 * 64).pixels.shape == (64, 64, 3)
    with pytest.raises(InputError, match="at most 4,095"):
        read_image(path, max_pixels=64 * 64 - 1)


def test_folders_are_searched_in_order_and_hidden_files_passed_over(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.JPG", "a.tif", ".hidden.png", ".trash/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    assert [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path)] == ["a.tif", "b/1.JPG", "b/2.png"]
    assert find_images(tmp_path / "a.tif") == [tmp_path / "a.tif"]


@pytest.mark.parametrize(
    ("name", "words"), [("", "holds no image"), ("missing", "does not exist")], ids=["empty", "no"]
)
def test_nothing_to_find_is_an_error(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        find_images(tmp_path / name)


def test_unreadable_folder_is_an_error_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "a.png", RGB)

    def refuse(folder: object) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", refuse)

    with pytest.raises(InputError, match=r"cannot read the folder .*: Permission denied"):
        find_images(tmp_path)


def test_rgb8_repeats_gray_rounds_sixteen_bits_and_drops_alpha(tmp_path: Path) -> None:
    np.testing.assert_array_equal(rgb8(saved(tmp_path / "g.png", GRAY)), np.repeat(GRAY[..., None], 3, axis=2))
    np.testing.assert_array_equal(rgb8(saved(tmp_path / "a.png", RGBA)), RGBA[..., :3])
    wide = np.array([[0, 128, 129, 65535 - 128, 65535]], np.uint16)
    np.testing.assert_array_equal(rgb8(saved(tmp_path / "w.png", wide))[0, :, 0], [0, 0, 1, 255, 255])


def test_network_input_is_unit_floats_in_rgb_or_studio_luma() -> None:
    planes = network_input(RGB, "rgb")
    luma = network_input(RGB, "y")

    assert (planes.shape, planes.dtype) == ((1, 3, 5, 7), np.float32)
    np.testing.assert_array_equal(planes[0].transpose(1, 2, 0), RGB.astype(np.float32) / np.float32(255))
    np.testing.assert_allclose(luma[0, 0], y_from_rgb(RGB / 255.0), atol=1e-7)
    black_and_white = np.array([[0, 65535]], np.uint16)
    np.testing.assert_allclose(network_input(black_and_white, "y").ravel(), [16 / 255, 235 / 255], atol=1e-7)


def test_output_is_clamped_and_rounded_half_to_even() -> None:
    values = np.array([[[-1.0, 0.5 / 255, 1.5 / 255, 2.5 / 255, 1.0, 7.0]]])

    np.testing.assert_array_equal(to_uint8(values)[0, :, 0], [0, 0, 2, 2, 255, 255])
    np.testing.assert_array_equal(quantized(values, np.uint16)[0, [0, 4], 0], [0, 65535])


def test_bytes_survive_the_round_trip_through_the_network_s_range() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)

    np.testing.assert_array_equal(to_uint8(network_input(every, "rgb")), every)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_broken_output_becomes_no_picture(value: float) -> None:
    output = np.zeros((3, 4, 4), np.float32)
    output[1, 2, 3] = value

    with pytest.raises(GateError, match="NaN or infinite"):
        to_uint8(output)


Y, X = np.mgrid[0:6, 0:8]
WIDE = ((X * 5 + Y * 7) * 811 % 65536).astype(np.uint16)
WIDE_RGB = np.dstack([WIDE, WIDE[::-1], WIDE[:, ::-1]])


@pytest.mark.parametrize("maximum", [65535, 1023])
def test_ppm_and_pgm_above_8_bits(maximum: int, tmp_path: Path) -> None:
    for name, kind, values in (("a.pgm", "P5", WIDE[..., None]), ("a.ppm", "P6", WIDE_RGB)):
        stored = values.astype(np.int64) % (maximum + 1)
        head = f"{kind}\n# by a camera\n8 6\n{maximum}\n".encode()
        (tmp_path / name).write_bytes(head + stored.astype(">u2").tobytes())

        expected = np.rint(stored * (65535 / maximum))
        assert np.abs(read_image(tmp_path / name).pixels - expected).max() <= (0 if kind == "P6" else 1)


def test_plain_ppm_above_8_bits_and_a_truncated_one(tmp_path: Path) -> None:
    (tmp_path / "a.ppm").write_text("P3\n2 1\n65535\n1000 2000 3000\n65535 0 # blue\n40000\n")
    (tmp_path / "b.ppm").write_bytes(b"P6 8 6 65535\n" + bytes(50))

    assert read_image(tmp_path / "a.ppm").pixels.tolist() == [[[1000, 2000, 3000], [65535, 0, 40000]]]
    with pytest.raises(InputError, match=r"25 of 144 samples"):
        read_image(tmp_path / "b.ppm")


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("alpha", [False, True])
def test_tiff_that_stores_white_as_0_is_no_negative(bits: int, alpha: bool, tmp_path: Path) -> None:
    gray = (WIDE >> (16 - bits)).astype(f"u{bits // 8}")
    stored = np.iinfo(gray.dtype).max - gray
    if alpha:
        stored = np.dstack([stored, gray])
    tifffile.imwrite(
        tmp_path / "a.tif", stored, photometric="miniswhite", planarconfig="contig",
        extrasamples=["unassalpha"] if alpha else None,
    )  # fmt: skip

    pixels = read_image(tmp_path / "a.tif").pixels

    assert pixels.shape[2] == 1 + alpha
    np.testing.assert_array_equal(pixels[..., 0], gray)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [2, 4])
def test_tiff_with_an_extra_sample_that_nothing_describes_keeps_it(bits: int, channels: int, tmp_path: Path) -> None:
    stored = np.dstack([WIDE_RGB, WIDE])[..., -channels:] >> (16 - bits)
    stored = stored.astype(f"u{bits // 8}")
    tifffile.imwrite(
        tmp_path / "a.tif", stored, photometric="rgb" if channels == 4 else "minisblack", planarconfig="contig",
        extrasamples=["unspecified"],
    )  # fmt: skip

    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, stored)


@pytest.mark.parametrize("bits", [8, 16])
def test_gray_times_alpha_in_a_tiff_is_divided_again(bits: int, tmp_path: Path) -> None:
    peak = 2**bits - 1
    gray, alpha = (WIDE >> (16 - bits)).astype(np.float64), np.full(WIDE.shape, peak // 2)
    stored = np.dstack([np.rint(gray * alpha / peak), alpha]).astype(f"u{bits // 8}")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stored, photometric="minisblack", planarconfig="contig", extrasamples=["assocalpha"])

    pixels = read_image(path).pixels

    assert np.abs(pixels[..., 0] - gray).max() <= 2
    assert np.all(pixels[..., 1] == peak // 2)
    assert image_size(path) == WIDE.shape
    assert (picture_metadata(path).kind, full_page(path)) == ("gray+alpha", 0)


@pytest.mark.parametrize(("code", "name"), [(50000, "ZSTD"), (50001, "WebP"), (34925, "LZMA")])
def test_a_tiff_of_an_unread_compression_is_not_called_damaged(code: int, name: str, tmp_path: Path) -> None:
    """The wheel of libvips has none of these, and Pillow does not read 16-bit color."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, RGB.astype(np.uint16), photometric="rgb", compression="deflate")
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<HHI", 259, 3, 1))
    data[at + 8 : at + 10] = struct.pack("<H", code)
    path.write_bytes(data)

    with pytest.raises(InputError, match=f"compressed with {name}, which is not read"):
        read_image(path)


def test_tiff_of_five_samples_is_refused(tmp_path: Path) -> None:
    stored = np.dstack([WIDE_RGB, WIDE, WIDE]).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["unassalpha", "unspecified"])

    with pytest.raises(InputError, match="5 samples per pixel"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1, 1, 0]], ids=str)
def test_reduced_copies_inside_a_tiff_are_no_pages(order: list[int], tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for reduced in order:
            file.write(RGB[::2, ::2] if reduced else RGB, photometric="rgb", subfiletype=reduced)

    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, RGB)


def test_two_full_pages_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(RGB, photometric="rgb")
        file.write(RGB, photometric="rgb")

    with pytest.raises(InputError, match="holds 2 pages"):
        read_image(tmp_path / "a.tif")


def test_transparent_color_of_a_16_bit_png_becomes_alpha(tmp_path: Path) -> None:
    value = int(WIDE[2, 3])
    for name, pixels, samples in (("g.png", WIDE[..., None], [value]), ("c.png", WIDE_RGB, WIDE_RGB[2, 3].tolist())):
        plain = png16(pixels)
        data = struct.pack(f">{len(samples)}H", *samples)
        chunk = struct.pack(">I", len(data)) + b"tRNS" + data + struct.pack(">I", zlib.crc32(b"tRNS" + data))
        (tmp_path / name).write_bytes(plain[:33] + chunk + plain[33:])

        read = read_image(tmp_path / name).pixels

        np.testing.assert_array_equal(read[..., :-1], pixels)
        np.testing.assert_array_equal(read[..., -1] == 0, (pixels == samples).all(axis=2))


@pytest.mark.parametrize(
    ("start", "name"),
    [
        (b"\0\0\0\x1cftypavif", "AVIF"),
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypmif1", "HEIF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\1", "Photoshop"),
    ],
)
def test_pictures_of_formats_that_are_not_read_are_named(start: bytes, name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(start + bytes(100))

    assert is_picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=f"picture in {name} format, which is not read"):
        read_image(tmp_path / "a.png")


def test_a_film_is_no_picture(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"\0\0\0\x1cftypisom" + bytes(100))

    assert not is_picture(tmp_path / "a.mp4")


def test_gray_tiff_of_12_bits_spans_the_whole_range(tmp_path: Path) -> None:
    values = np.array([[0, 1, 2048, 4095]])
    packed = int("".join(f"{value:012b}" for value in values.ravel()), 2).to_bytes(6, "big")
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 6)]
    rows = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    (tmp_path / "a.tif").write_bytes(struct.pack("<2sHIH", b"II", 42, 8, 9) + rows + bytes(4) + packed)

    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels[..., 0], np.rint(values * 65535 / 4095))


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
def test_tiff_of_signed_samples_is_refused(dtype: type, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.arange(-6, 6, dtype=dtype).reshape(3, 4), photometric="minisblack")

    with pytest.raises(InputError, match="signed samples"):
        read_image(tmp_path / "a.tif")
