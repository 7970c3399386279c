"""What came with a picture and where it goes: PNG text and color chunks, profiles, long EXIF and XMP."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from srdeploy.core.imaging.read import Picture, read_image
from srdeploy.upscale.image_writer import write_image
from srdeploy.upscale.metadata import JPEG_SEGMENT

RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
CHROMA = struct.pack(">8I", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600)  # BT.2020's primaries
COLOR = ((b"cICP", b"\x09\x10\x00\x01"), (b"gAMA", struct.pack(">I", 100_000)), (b"cHRM", CHROMA))
TEXT = ((b"tEXt", b"parameters\0a tree, Steps: 20"), (b"iTXt", b'workflow\0\0\0\0\0{"nodes": []}'))
GAIN_MAP_XMP = b"""<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" xmlns:Container="http://ns.google.com/photos/1.0/container/"
 xmlns:Item="http://ns.google.com/photos/1.0/container/item/" hdrgm:Version="1.0" dc:format="image/jpeg">
<Container:Directory><rdf:Seq><rdf:li rdf:parseType="Resource"><Container:Item Item:Semantic="Primary"/></rdf:li>
<rdf:li rdf:parseType="Resource"><Container:Item Item:Semantic="GainMap" Item:Length="9"/></rdf:li></rdf:Seq>
</Container:Directory></rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""


def exif_block(comment: int) -> bytes:
    exif = Image.Exif()
    exif[0x10F], exif[0x112] = "Camera", 6
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + b"p" * comment
    return exif.tobytes()


def profile(space: str) -> bytes:
    made = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    made[16:20] = space.encode()
    return bytes(made)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_text_and_color_chunks_come_out_as_they_went_in(dtype: type, tmp_path: Path) -> None:
    like = Picture(RGB, "png", chunks=COLOR + TEXT)

    notes = write_image(tmp_path / "a.png", RGB.astype(dtype), like=like)
    back = read_image(tmp_path / "a.png")

    assert notes == ()
    assert sorted(back.chunks) == sorted(COLOR + TEXT)
    with Image.open(tmp_path / "a.png") as image:
        assert image.text == {"parameters": "a tree, Steps: 20", "workflow": '{"nodes": []}'}  # type: ignore[attr-defined]


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif"])
def test_formats_without_text_and_color_chunks_say_so(suffix: str, tmp_path: Path) -> None:
    notes = write_image(tmp_path / f"a{suffix}", RGB, like=Picture(RGB, "png", chunks=COLOR + TEXT))

    assert len(notes) == 2
    assert "parameters, workflow" in notes[0]
    assert "gamma" in notes[1]


def test_color_chunks_of_srgb_are_no_loss(tmp_path: Path) -> None:
    chunks = ((b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 45455)))

    assert write_image(tmp_path / "a.jpg", RGB, like=Picture(RGB, "png", chunks=chunks)) == ()


def test_large_text_and_profile_are_read(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * (3 << 20), zip=True)
    Image.fromarray(RGB).save(tmp_path / "a.png", pnginfo=text, icc_profile=profile("RGB ") + bytes(2 << 20))

    picture = read_image(tmp_path / "a.png")

    np.testing.assert_array_equal(picture.pixels, RGB)
    assert len(picture.icc or b"") > 2 << 20
    assert zlib.decompress(picture.chunks[0][1].split(b"\0\0", 1)[1]) == b"x" * (3 << 20)


@pytest.mark.parametrize(
    ("suffix", "channels", "space", "kept"),
    [
        (".png", 1, "GRAY", True),
        (".png", 3, "GRAY", False),
        (".png", 1, "RGB ", False),
        (".webp", 1, "GRAY", False),
        (".jpg", 1, "GRAY", True),
        (".tif", 4, "CMYK", False),
    ],
)
def test_profile_goes_only_where_its_pixels_go(
    suffix: str, channels: int, space: str, kept: bool, tmp_path: Path
) -> None:
    pixels = np.repeat(RGB[..., :1], channels, axis=2)
    notes = write_image(tmp_path / f"a{suffix}", pixels, like=Picture(pixels, "png", icc=profile(space)))

    assert (read_image(tmp_path / f"a{suffix}").icc is not None) == kept
    assert bool(notes) != kept


@pytest.mark.parametrize("comment", [100, 100_000])
def test_long_exif_keeps_its_short_values_in_a_jpeg(comment: int, tmp_path: Path) -> None:
    notes = write_image(tmp_path / "a.jpg", RGB, like=Picture(RGB, "webp", exif=exif_block(comment)))

    exif = Image.Exif()
    exif.load(read_image(tmp_path / "a.jpg").exif or b"")
    assert (exif[0x10F], exif[0x112]) == ("Camera", 6)
    assert exif.get_ifd(0x8769)[0x9003] == "2026:01:02 03:04:05"
    assert (0x9286 in exif.get_ifd(0x8769)) == (comment == 100)
    assert len(notes) == (comment > 100)


def test_exif_in_two_segments_is_read_whole_and_shortened(tmp_path: Path) -> None:
    plain = io.BytesIO()
    Image.fromarray(RGB).save(plain, "JPEG")
    body = exif_block(100_000)[6:]
    segments = b""
    for at in range(0, len(body), 65_000):
        part = b"Exif\0\0" + body[at : at + 65_000]
        segments += b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part
    (tmp_path / "in.jpg").write_bytes(plain.getvalue()[:2] + segments + plain.getvalue()[2:])

    picture = read_image(tmp_path / "in.jpg")
    notes = write_image(tmp_path / "out.jpg", RGB, like=picture)

    assert "only its short values" in notes[0]
    write_image(tmp_path / "out.png", RGB, like=picture)  # no limit there
    assert len(read_image(tmp_path / "out.png").exif or b"") > 100_000


@pytest.mark.parametrize("length", [JPEG_SEGMENT - 29, JPEG_SEGMENT - 28])
def test_xmp_goes_into_a_jpeg_as_far_as_a_segment_holds_it(length: int, tmp_path: Path) -> None:
    notes = write_image(tmp_path / "a.jpg", RGB, like=Picture(RGB, "webp", xmp=b"x" * length))

    fits = length == JPEG_SEGMENT - 29
    assert (read_image(tmp_path / "a.jpg").xmp is not None) == fits
    assert bool(notes) != fits


def test_a_gain_map_that_is_gone_takes_its_announcement_with_it(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "in.jpg", xmp=GAIN_MAP_XMP)

    picture = read_image(tmp_path / "in.jpg")
    notes = write_image(tmp_path / "out.jpg", RGB, like=picture)

    xmp = read_image(tmp_path / "out.jpg").xmp or b""
    assert b"hdrgm:" not in xmp
    assert b"GainMap" not in xmp
    assert b'dc:format="image/jpeg"' in xmp  # the rest stays
    assert any("gain map" in note for note in notes)


def test_comments_and_captions_of_a_jpeg_stay_in_jpegs(tmp_path: Path) -> None:
    """IPTC is what agencies and archives write; it is in Photoshop's segment."""
    caption = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", 12) + b"\x1c\x02\x78\0\x07caption"
    segment = b"\xff\xed" + struct.pack(">H", len(caption) + 2) + caption
    Image.fromarray(RGB).save(tmp_path / "a.jpg", comment=b"a comment", extra=segment)
    like = read_image(tmp_path / "a.jpg")

    assert write_image(tmp_path / "b.jpg", RGB, like=like) == ()
    with Image.open(tmp_path / "b.jpg") as back:
        assert ("APP13", caption) in back.applist  # type: ignore[attr-defined]
        assert back.info["comment"] == b"a comment"
    (note,) = write_image(tmp_path / "b.png", RGB, like=like)
    assert "comments and IPTC" in note


def test_parts_of_a_jpeg_that_are_not_read_are_named(tmp_path: Path) -> None:
    extension = b"http://ns.adobe.com/xmp/extension/\0" + b"A" * 32 + struct.pack(">II", 4, 0) + b"<x/>"
    segment = b"\xff\xe1" + struct.pack(">H", len(extension) + 2) + extension
    Image.fromarray(RGB).save(tmp_path / "long.jpg", extra=segment)
    Image.fromarray(RGB).save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[Image.fromarray(RGB)])

    notes = [note for name in ("long.jpg", "two.jpg") for note in read_image(tmp_path / name).notes]

    assert ["extended part of the XMP" in notes[0], "further pictures" in notes[1]] == [True, True]
    assert len(notes) == 2


def test_a_profile_longer_than_a_jpeg_holds_is_named(tmp_path: Path) -> None:
    like = Picture(RGB, "png", icc=profile("RGB ") + bytes(255 * 65_519))

    (note,) = write_image(tmp_path / "a.jpg", RGB, like=like)

    assert "longer than JPEG holds" in note
    with Image.open(tmp_path / "a.jpg") as back:
        assert "icc_profile" not in back.info


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_an_exif_directory_that_points_to_itself_ends(suffix: str, tmp_path: Path) -> None:
    pointer = struct.pack("<HHHII", 1, 0x8769, 4, 1, 8) + struct.pack("<I", 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<I", 8) + pointer

    write_image(tmp_path / f"a{suffix}", RGB, like=Picture(RGB, "jpeg", exif=exif))

    np.testing.assert_allclose(read_image(tmp_path / f"a{suffix}").pixels, RGB, atol=60)
