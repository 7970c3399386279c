"""What a video carries beside its pixels is in the output, or the user is told before anything is computed."""

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import numbered

from srdeploy.core.errors import InputError, UsageError
from srdeploy.upscale.upscaler import Upscaler
from srdeploy.upscale.video.job import VideoOptions, upscale_video
from srdeploy.upscale.video.media import time_code
from srdeploy.upscale.video.reader import VideoReader

av = pytest.importorskip("av")
ONE = 1 << 16
MATRICES = {
    "mirrored": (-ONE, 0, 0, 0, ONE, 0, 64 * ONE, 0, 1 << 30),
    "upside down": (ONE, 0, 0, 0, -ONE, 0, 0, 48 * ONE, 1 << 30),
    "transposed": (0, ONE, 0, ONE, 0, 0, 0, 0, 1 << 30),
    "turned left": (0, -ONE, 0, ONE, 0, 0, 0, 0, 1 << 30),
}
MASTER = "G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"


def side_data(path: Path, kind: str) -> bytes | None:
    with av.open(str(path)) as file:
        frame = next(file.decode(file.streams.video[0]))
        found = [bytes(side) for side in frame.side_data.keys() if side.type.name == kind]  # noqa: SIM118
    return found[0] if found else None


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm"])
@pytest.mark.parametrize("name", MATRICES)
def test_display_matrix_is_kept_whole(name: str, suffix: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    source = clips.make(
        tmp_path / "a.mp4", range(1), prepare=lambda file, stream: stream.set_display_matrix(MATRICES[name])
    )

    upscale_video(up, source, tmp_path / f"out{suffix}")

    data = side_data(tmp_path / f"out{suffix}", "DISPLAYMATRIX")
    assert data is not None
    matrix = struct.unpack("<9i", data[:36])
    assert matrix[:6] == MATRICES[name][:6]
    if suffix in (".mp4", ".mov"):  # translations are in pixels, of which there are twice as many
        assert matrix[6:8] == tuple(2 * value for value in MATRICES[name][6:8])


def test_plain_picture_gets_no_display_matrix(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    upscale_video(up, clips.make(tmp_path / "a.mp4", range(1)), tmp_path / "out.mp4")

    assert side_data(tmp_path / "out.mp4", "DISPLAYMATRIX") is None


ALPHA = {
    "VP9 in WebM": ("a.webm", "libvpx-vp9", "yuva420p", {"auto-alt-ref": "0"}),
    "VP8 in WebM": ("a.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
    "PNG in MOV": ("a.mov", "png", "rgba", {}),
    "Animation in MOV": ("a.mov", "qtrle", "argb", {}),
    "ProRes 4444": ("a.mov", "prores_ks", "yuva444p10le", {}),
    "FFV1 of 16 bits": ("a.mkv", "ffv1", "gbrap16le", {}),
    "FFV1 gray": ("a.mkv", "ffv1", "ya8", {}),
}


ALPHA_KEPT = [
    *((name, "out.mkv", "ffv1") for name in ALPHA),
    *((name, "out.webm", None) for name in ("VP9 in WebM", "VP8 in WebM", "FFV1 gray")),
    *((name, "out.mov", "prores_ks") for name in ALPHA if name not in ("ProRes 4444", "FFV1 of 16 bits")),
    *((name, "out.mov", codec) for name in ("PNG in MOV", "Animation in MOV") for codec in ("qtrle", "png")),
]


def _transparent(name: str, clips: Any, folder: Path) -> Path:
    file, encoder, pix_fmt, options = ALPHA[name]
    made: Path = clips.make(folder / file, range(2), codec=encoder, pix_fmt=pix_fmt, options=options, alpha=True)
    return made


class TestAlpha:
    """Alpha in any pixel format is kept where the encoder stores it, and refused where it does not."""

    @pytest.mark.parametrize(("name", "output", "codec"), ALPHA_KEPT)
    def test_kept(self, name: str, output: str, codec: str | None, up: Upscaler, clips: Any, tmp_path: Path) -> None:
        upscale_video(up, _transparent(name, clips, tmp_path), tmp_path / output, VideoOptions(codec=codec))

        reader = VideoReader(tmp_path / output)
        frames = [frame.pixels for frame in reader.frames()]
        reader.close()
        assert len(frames) == 2
        peak = np.iinfo(frames[0].dtype).max
        for pixels in frames:
            assert pixels.shape == (96, 128, 4)
            assert pixels[:, :38, 3].max() < 0.03 * peak
            assert pixels[:, 42:, 3].min() > 0.97 * peak

    @pytest.mark.parametrize("name", ALPHA)
    def test_refused_by_an_encoder_without(self, name: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
        source = _transparent(name, clips, tmp_path)

        with pytest.raises(UsageError, match="alpha channel .* and libx264 stores none; .*pass --codec ffv1"):
            upscale_video(up, source, tmp_path / "out.mkv")

        assert list(tmp_path.iterdir()) == [source]

    @pytest.mark.parametrize("name", ["ProRes 4444", "FFV1 of 16 bits"])
    def test_refused_by_an_encoder_of_fewer_bits(self, name: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
        """ProRes 4444 is decoded with 12 bits, and its encoder takes 10."""
        source = _transparent(name, clips, tmp_path)

        with pytest.raises(UsageError, match="prores_ks stores none of .*; pass --codec ffv1 with an .mkv output"):
            upscale_video(up, source, tmp_path / "out.mov", VideoOptions(codec="prores_ks"))

    def test_transparent_palette_is_refused_and_an_opaque_one_is_read(
        self, up: Upscaler, clips: Any, tmp_path: Path
    ) -> None:
        opaque = clips.make(tmp_path / "a.mov", range(2), codec="png", pix_fmt="rgb24")

        def palette(path: Path, entry: bytes) -> Path:
            with av.open(str(path), "w") as file:
                stream = file.add_stream("png", rate=25)
                stream.width, stream.height, stream.pix_fmt = 64, 48, "pal8"
                frame = av.VideoFrame(64, 48, "pal8")
                frame.planes[0].update(bytes(frame.planes[0].buffer_size))
                frame.planes[1].update(entry * 256)
                frame.pts = 0
                file.mux(stream.encode(frame))
                file.mux(stream.encode(None))
            return path

        upscale_video(up, opaque, tmp_path / "out.mkv")
        upscale_video(up, palette(tmp_path / "p.mov", b"\x10\x20\x30\xff"), tmp_path / "p.mkv")
        with pytest.raises(InputError, match="transparent entries in its palette"):
            upscale_video(up, palette(tmp_path / "t.mov", b"\x10\x20\x30\x00"), tmp_path / "t.mkv")

        assert clips.shown(tmp_path / "out.mkv").numbers == [0, 1]


def _film(clips: Any, folder: Path, prepare: Any = lambda file, streams: None) -> Path:
    video = clips.make(folder / "film.mp4")
    return clips.remux([video, clips.subtitles(folder / "s.srt")], folder / "a.mkv", prepare=prepare)


def test_flags_and_fonts_of_tracks_are_kept(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    flags = av.stream.Disposition

    def prepare(file: Any, streams: list[Any]) -> None:
        streams[0].disposition = flags.original
        streams[1].disposition = flags.forced | flags.default
        file.add_attachment("font.ttf", "application/x-truetype-font", b"\0\1\0\0" + b"x" * 100)

    upscale_video(up, _film(clips, tmp_path, prepare), tmp_path / "out.mkv")

    with av.open(str(tmp_path / "out.mkv")) as file:
        assert [int(stream.disposition) for stream in file.streams] == [
            int(flags.original), int(flags.forced | flags.default), 0,
        ]  # fmt: skip
        (font,) = file.streams.attachments
        assert (font.name, font.mimetype, font.data) == (
            "font.ttf", "application/x-truetype-font", b"\0\1\0\0" + b"x" * 100,
        )  # fmt: skip


def test_attachments_that_a_container_cannot_hold_are_named(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    source = clips.remux(
        [clips.make(tmp_path / "film.mp4")],
        tmp_path / "a.mkv",
        prepare=lambda file, streams: file.add_attachment("font.ttf", "application/x-truetype-font", b"data"),
    )

    report = upscale_video(up, source, tmp_path / "out.mp4")

    assert "not kept: attachments (font.ttf): write an .mkv to keep them" in report.notes


def _with_cover(clips: Any, tmp_path: Path) -> Path:
    cover = clips.make(tmp_path / "cover.mjpeg", range(1), codec="mjpeg", pix_fmt="yuvj420p", form="mjpeg")
    video = clips.make(tmp_path / "film.mp4")

    def prepare(file: Any, streams: list[Any]) -> None:
        streams[1].disposition = av.stream.Disposition.attached_pic
        file.metadata.update({"title": "a title", "comment": "said"})

    made: Path = clips.remux([video, cover], tmp_path / "a.mp4", prepare=prepare)
    return made


@pytest.mark.parametrize("output", ["out.mp4", "out.mkv"])
def test_cover_picture_and_tags_are_kept(output: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    report = upscale_video(up, _with_cover(clips, tmp_path), tmp_path / output)

    with av.open(str(tmp_path / output)) as file:
        assert {k.lower(): v for k, v in file.metadata.items()}["title"] == "a title"
        films = list(file.streams.video)
        assert [bool(int(s.disposition) & int(av.stream.Disposition.attached_pic)) for s in films] == [False, True]
    assert clips.shown(tmp_path / output).numbers == list(range(10))
    assert not any(note.startswith("not kept") for note in report.notes)


@pytest.mark.parametrize("output", ["out.mov", "out.m4v", "out.webm"])
def test_cover_picture_that_has_no_place_is_named(output: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    report = upscale_video(up, _with_cover(clips, tmp_path), tmp_path / output)

    assert "not kept: the cover picture: write an .mkv or .mp4 to keep it" in report.notes
    with av.open(str(tmp_path / output)) as file:
        assert len(file.streams.video) == 1


@pytest.mark.parametrize("output", ["out.mov", "out.mp4", "out.mkv"])
@pytest.mark.parametrize("source", ["a.mov", "a.mkv"])
def test_time_code_is_kept(source: str, output: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    def stamp(file: Any, stream: Any) -> None:
        (stream if source == "a.mov" else file).metadata["timecode"] = "10:00:00:00"

    report = upscale_video(up, clips.make(tmp_path / source, prepare=stamp), tmp_path / output)

    assert not any("not kept" in note for note in report.notes)
    with av.open(str(tmp_path / output)) as file:
        assert time_code(file, file.streams.video[0]) == "10:00:00:00"


@pytest.mark.parametrize("output", ["out.mp4", "out.mkv"])
def test_chapters_are_kept_and_their_stream_is_not_called_lost(
    output: str, up: Upscaler, clips: Any, tmp_path: Path
) -> None:
    tick = Fraction(1, 1000)
    chapters = [
        {"id": 1, "start": 0, "end": 200, "time_base": tick, "metadata": {"title": "Anfänge"}},
        {"id": 2, "start": 200, "end": 400, "time_base": tick, "metadata": {"title": "第二"}},
    ]
    source = clips.make(tmp_path / "a.mp4", prepare=lambda file, stream: file.set_chapters(chapters))

    report = upscale_video(up, source, tmp_path / output)

    with av.open(str(tmp_path / output)) as file:
        found = [
            (float(c["start"] * c["time_base"]), float(c["end"] * c["time_base"]), c["metadata"]["title"])
            for c in file.chapters()
        ]
    assert found == [(0.0, 0.2, "Anfänge"), (0.2, 0.4, "第二")]
    assert not any("not kept" in note for note in report.notes)


def test_side_data_that_pyav_has_no_name_for_is_read(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """Frames with EXIF, as of cameras: asking PyAV for their side data raised ValueError."""
    source = clips.make(tmp_path / "a.mov", range(2), codec="tiff", pix_fmt="rgb24")

    report = upscale_video(up, source, tmp_path / "out.mkv")

    assert "not kept: EXIF metadata inside the video stream" in report.notes
    assert clips.shown(tmp_path / "out.mkv").numbers == [0, 1]


def test_hidden_pixels_at_the_left_stay_hidden(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """FFmpeg's decoders leave some of them unless asked not to, for the sake of alignment."""
    options = {"crf": "10", "x264-params": "crop-rect=24,0,8,0"}
    source = clips.make(tmp_path / "a.mp4", range(2), options=options)

    upscale_video(up, source, tmp_path / "out.mp4", VideoOptions(quality=1))

    reader = VideoReader(tmp_path / "out.mp4")
    (first, *_) = [frame.pixels for frame in reader.frames()]
    reader.close()
    assert first.shape == (96, 64, 3)
    assert np.abs(first[::2, ::2].astype(int) - numbered(0)[:, 24:56]).mean() < 4


@pytest.mark.parametrize("output", ["out.mkv", "out.mp4"])
def test_tags_in_another_encoding_are_passed_on(output: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """As old programs wrote them, in the code page of some computer."""

    def stamp(file: Any, stream: Any) -> None:
        file.metadata["title"] = stream.metadata["title"] = "XXXX"
        file.set_chapters(
            [{"id": 1, "start": 0, "end": 9, "time_base": Fraction(1, 1000), "metadata": {"title": "XXXX"}}]
        )
        file.add_attachment("XXXX.ttf", "application/x-truetype-font", b"data")

    source = clips.make(tmp_path / "a.mkv", range(2), prepare=stamp)
    latin = "Été!".encode("latin-1")
    source.write_bytes(source.read_bytes().replace(b"XXXX", latin))

    upscale_video(up, source, tmp_path / output)

    assert (tmp_path / output).read_bytes().count(latin) >= 3
    with av.open(str(tmp_path / output), metadata_encoding="latin-1") as file:
        assert {key.lower(): value for key, value in file.metadata.items()}["title"] == "Été!"
        assert [attachment.name for attachment in file.streams.attachments] in (
            [], ["\ufffdt\ufffd!.ttf".encode().decode("latin-1")],
        )  # fmt: skip


def test_place_of_a_phone_is_kept(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    tags = {"com.apple.quicktime.location.ISO6709": "+48.2-012.3/", "com.apple.quicktime.make": "Apple"}
    source = clips.make(
        tmp_path / "a.mov",
        container={"movflags": "use_metadata_tags"},
        prepare=lambda file, stream: file.metadata.update(tags),
    )

    report = upscale_video(up, source, tmp_path / "out.mov")

    with av.open(str(tmp_path / "out.mov")) as file:
        assert {key: file.metadata.get(key) for key in tags} == tags
    assert not any(note.startswith("not kept") for note in report.notes)


class TestHdr:
    """HDR10: mastering display and content light level."""

    def _source(self, clips: Any, folder: Path) -> Path:
        params = (
            f"log-level=none:bframes=0:pools=none:hdr10=1:repeat-headers=1:master-display={MASTER}:max-cll=1000,400"
        )

        def prepare(file: Any, stream: Any) -> None:
            context = stream.codec_context
            context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, 16, 9, 1

        made: Path = clips.make(
            folder / "hdr.mkv", range(2), codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": params},
            prepare=prepare,
        )  # fmt: skip
        return made

    @pytest.mark.parametrize("codec", ["libx265", "libsvtav1", "libx264"])
    def test_kept(self, codec: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
        source = self._source(clips, tmp_path)

        report = upscale_video(up, source, tmp_path / "out.mkv", VideoOptions(codec=codec))

        for name, size in (("MASTERING_DISPLAY_METADATA", 88), ("CONTENT_LIGHT_LEVEL", 8)):
            before, after = side_data(source, name), side_data(tmp_path / "out.mkv", name)
            assert before is not None
            assert after is not None
            if size == 8:
                assert after[:size] == before[:size]
            else:
                np.testing.assert_allclose(_fractions(after), _fractions(before), rtol=2e-3)
        assert not any("HDR10" in note for note in report.notes)

    def test_named_where_the_codec_cannot(self, up: Upscaler, clips: Any, tmp_path: Path) -> None:
        report = upscale_video(up, self._source(clips, tmp_path), tmp_path / "out.mkv", VideoOptions(codec="ffv1"))

        kept = side_data(tmp_path / "out.mkv", "MASTERING_DISPLAY_METADATA") is not None
        assert kept != any("HDR10 metadata" in note for note in report.notes)


def _fractions(data: bytes) -> list[float]:
    numbers = struct.unpack("<22i", data[:88])
    return [top / bottom for top, bottom in zip(numbers[0:20:2], numbers[1:20:2], strict=True)]


def test_interlaced_mark_can_be_overridden(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    source = clips.make(tmp_path / "a.mp4", range(5), options={"crf": "10", "x264-params": "tff=1:interlaced=1"})

    with pytest.raises(InputError, match="marked as interlaced at frame 0; .* or pass --progressive"):
        upscale_video(up, source, tmp_path / "out.mp4")
    upscale_video(up, source, tmp_path / "out.mp4", VideoOptions(progressive=True))

    assert clips.shown(tmp_path / "out.mp4").numbers == list(range(5))
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert not any(frame.interlaced_frame for frame in file.decode(video=0))


def test_second_video_stream_is_named(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    one, two = clips.make(tmp_path / "1.mp4"), clips.make(tmp_path / "2.mp4", range(10, 20))
    source = clips.remux([one, two], tmp_path / "a.mkv")

    report = upscale_video(up, source, tmp_path / "out.mkv")

    assert "not kept: the other video stream" in report.notes
    assert clips.shown(tmp_path / "out.mkv").numbers == list(range(10))


@pytest.mark.parametrize("output", ["out.mp4", "out.mov"])
def test_hevc_has_the_tag_that_apple_plays(output: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    upscale_video(up, clips.make(tmp_path / "a.mp4", range(2)), tmp_path / output, VideoOptions(codec="libx265"))

    with av.open(str(tmp_path / output)) as file:
        assert file.streams.video[0].codec_context.codec_tag == "hvc1"
    assert clips.shown(tmp_path / output).numbers == [0, 1]


ASPECT = Fraction(32, 27)


@pytest.mark.parametrize(
    ("output", "codec"),
    [
        ("out.mkv", None), ("out.mp4", None), ("out.mov", None), ("out.mp4", "libsvtav1"), ("out.mp4", "libvpx-vp9"),
        ("out.mov", "prores_ks"), ("out.mkv", "libx265"),
    ],
)  # fmt: skip
def test_pixel_aspect_is_kept(output: str, codec: str | None, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """Anamorphic DVDs: some codecs state it in the stream, others rely on the container."""
    source = clips.make(tmp_path / "a.mp4", range(2), prepare=_anamorphic)

    upscale_video(up, source, tmp_path / output, VideoOptions(codec=codec))

    with av.open(str(tmp_path / output)) as file:
        next(file.decode(video=0))
        assert file.streams.video[0].sample_aspect_ratio == ASPECT


@pytest.mark.parametrize(("output", "codec"), [("out.webm", None), ("out.mkv", "ffv1")])
def test_pixel_aspect_is_refused_where_it_would_be_lost(
    output: str, codec: str | None, up: Upscaler, clips: Any, tmp_path: Path
) -> None:
    source = clips.make(tmp_path / "a.mp4", range(2), prepare=_anamorphic)

    with pytest.raises(
        UsageError, match=r"cannot hold the input's pixel aspect 32/27; expected an output ending in .mp4"
    ):
        upscale_video(up, source, tmp_path / output, VideoOptions(codec=codec))

    assert list(tmp_path.iterdir()) == [source]


def _limited(file: Any, stream: Any) -> None:
    stream.codec_context.color_range, stream.codec_context.colorspace = 1, 6  # alone, libx264 does not write the first


def _anamorphic(file: Any, stream: Any) -> None:
    stream.codec_context.sample_aspect_ratio = ASPECT


@pytest.mark.parametrize(
    ("pix_fmt", "stored"),
    [
        ("yuv440p", "yuv444p"),
        ("yuv411p", "yuv422p"),
        ("yuyv422", "yuv422p"),
        ("nv12", "nv12"),
        ("y210le", "yuv422p10le"),
    ],
)
def test_no_chroma_is_lost(pix_fmt: str, stored: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    source = clips.make(tmp_path / "a.nut", range(3), codec="rawvideo", pix_fmt=pix_fmt)

    report = upscale_video(up, source, tmp_path / "out.mkv")

    assert report.encoding["pix_fmt"] == stored
    assert clips.shown(tmp_path / "out.mkv").numbers == [0, 1, 2]


@pytest.mark.parametrize("pix_fmt", ["xyz12le", "gbrpf32le"])
def test_pixels_that_are_not_rgb_yuv_or_gray_are_refused(
    pix_fmt: str, up: Upscaler, clips: Any, tmp_path: Path
) -> None:
    source = clips.make(tmp_path / "a.nut", range(1), codec="rawvideo", pix_fmt=pix_fmt)

    with pytest.raises(InputError, match=f"holds {pix_fmt}: raw sensor data, CIE XYZ or floating-point pixels"):
        upscale_video(up, source, tmp_path / "out.mkv", VideoOptions(codec="ffv1"))


def test_matrices_that_cannot_be_converted_are_refused(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """YCgCo read as BT.709 is green and pink."""

    def ycgco(file: Any, stream: Any) -> None:
        stream.codec_context.colorspace = 8

    source = clips.make(tmp_path / "a.mkv", range(1), prepare=ycgco)

    with pytest.raises(InputError, match="color matrix YCgCo; expected BT.601"):
        upscale_video(up, source, tmp_path / "out.mkv")


def test_range_that_players_would_guess_wrong_is_refused(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """MOV states no range, nor does ProRes: the picture would have too much contrast."""
    source = clips.make(tmp_path / "a.mp4", range(2), pix_fmt="yuvj420p")

    with pytest.raises(UsageError, match=r"prores_ks cannot state the input's color range \(full\); pass --codec"):
        upscale_video(up, source, tmp_path / "out.mov", VideoOptions(codec="prores_ks"))

    assert list(tmp_path.iterdir()) == [source]


class TestChanges:
    """Joined recordings whose second part differs."""

    def _joined(self, clips: Any, folder: Path, first: str, second: str, **changes: Any) -> Path:
        parts = [
            clips.make(
                folder / f"{place}.ts",
                range(10 * place, 10 * place + 10),
                pix_fmt=pix_fmt,
                form="mpegts",
                options={"crf": "10", "bf": "0"},
                **more,
            )
            for place, (pix_fmt, more) in enumerate([(first, {}), (second, {k: v for k, v in changes.items() if v})])
        ]
        (folder / "a.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
        return folder / "a.ts"

    # where a second part states no range, FFmpeg's decoder of H.264 goes on with that of the first
    @pytest.mark.parametrize("pair", ["yuv420p yuvj420p", "yuvj420p yuv420p", "yuv444p10le yuv420p"])
    def test_each_frame_is_read_by_its_own_colors(self, pair: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
        source = self._joined(clips, tmp_path, *pair.split(), prepare=_limited if pair.endswith("yuv420p") else None)

        upscale_video(up, source, tmp_path / "out.mkv", VideoOptions(quality=1))

        reader = VideoReader(tmp_path / "out.mkv")
        frames = [frame.pixels for frame in reader.frames()]
        reader.close()
        peak = np.iinfo(frames[0].dtype).max
        errors = [
            abs(pixels[::2, ::2].mean() * (255 / peak) - numbered(number).mean())
            for number, pixels in enumerate(frames)
        ]
        assert len(errors) == 20
        assert max(errors) < 2

    @pytest.mark.parametrize("second", ["yuv420p10le", "yuv422p"])
    def test_what_the_output_cannot_take_up_is_refused(
        self, second: str, up: Upscaler, clips: Any, tmp_path: Path
    ) -> None:
        source = self._joined(clips, tmp_path, "yuv420p", second)

        with pytest.raises(InputError, match=f"changes its pixels at frame 10, from yuv420p to {second}; .*split it"):
            upscale_video(up, source, tmp_path / "out.mkv")

    def test_pixel_aspect_of_a_broadcast(self, up: Upscaler, clips: Any, tmp_path: Path) -> None:
        source = self._joined(clips, tmp_path, "yuv420p", "yuv420p", prepare=_anamorphic)

        with pytest.raises(InputError, match="changes its pixel aspect at about frame .*, from None to 32/27"):
            upscale_video(up, source, tmp_path / "out.mkv")
