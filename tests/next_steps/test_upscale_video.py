"""Next steps of videos: containers, codecs, and sources that are damaged, interlaced or unusual."""

import itertools
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from next_steps.conftest import User

from srdeploy.upscale.video import reader
from srdeploy.upscale.video.parts import Parts

av = pytest.importorskip("av")

from clips import HEIGHT, WIDTH, Clips  # noqa: E402

UPSCALE = "upscale good.onnx"
HDR = (
    "log-level=none:bframes=0:pools=none:hdr10=1:repeat-headers=1:"
    "master-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50)"
)


@pytest.fixture
def clips() -> Clips:
    return Clips()


def suffixes(message: str) -> list[str]:
    """Return the containers that a message names."""
    named = re.search(r"an output ending in (\.\w+(?: or \.\w+)*)", message)
    return named[1].split(" or ") if named else []


def codecs(message: str) -> list[tuple[str, str]]:
    """Return the codecs that a message names, each with its container."""
    return re.findall(r"(--codec \w+)[^,;]* with an (\.\w+) output", message)


def takes_all(user: User, source: str, message: str, options: str = "") -> None:
    """Run a refused command with each container and each codec that its message names."""
    assert suffixes(message) or codecs(message), message
    for number, suffix in enumerate(suffixes(message)):
        user.runs(f"{UPSCALE} {source} {options} -o ending{number}{suffix}")
    for number, (codec, suffix) in enumerate(codecs(message)):
        user.runs(f"{UPSCALE} {source} {codec} -o codec{number}{suffix}")


def broadcast(clips: Clips, path: Path) -> None:
    """Make a transport stream with sound in LATM."""
    with av.open(str(path), "w", format="mpegts", options={"mpegts_flags": "latm"}) as file:
        video, sound = file.add_stream("libx264", rate=25), file.add_stream("aac", rate=48000, layout="mono")
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(5):
            frame = clips.frame(number, "yuv420p")
            frame.pts = number
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        for start in range(0, 9600, 1024):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 48000, start
            file.mux(sound.encode(silence))
        file.mux(sound.encode(None))


def anamorphic(file: Any, stream: Any) -> None:
    stream.codec_context.sample_aspect_ratio = Fraction(32, 27)


def recoded(source: Path, target: Path, codec: str, pix_fmt: str, change: Callable[[Any], Any] = lambda f: f) -> Path:
    """Decode a clip and encode it again, as any program that converts videos does."""
    with av.open(str(source)) as file, av.open(str(target), "w") as made:
        stream = made.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        for number, frame in enumerate(file.decode(video=0)):
            frame = change(frame).reformat(format=pix_fmt)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            made.mux(stream.encode(frame))
        made.mux(stream.encode(None))
    return target


# ----------------------------------------------------------------------------------------------------------------------
# Containers and codecs


@pytest.mark.advice("upscale/video/parts.py:_hold", "wait for it, or choose another output name")
def test_another_run_to_the_same_output(user: User, clips: Clips) -> None:
    clips.make(Path("a.mp4"), range(3))
    other = Parts(Path("out.mp4.parts"), "key")

    user.refused(f"{UPSCALE} a.mp4 -o out.mp4")
    user.runs(f"{UPSCALE} a.mp4 -o other.mp4")
    other.close()
    user.runs(f"{UPSCALE} a.mp4 -o out.mp4")


@pytest.mark.advice("upscale/video/plan.py:check_video_output", "a name ending in .mp4")
def test_a_suffix_that_is_no_container(user: User, clips: Clips) -> None:
    clips.make(Path("a.mp4"), range(2))

    message = user.refused(f"{UPSCALE} a.mp4 -o out.avi")

    for suffix in re.findall(r"\.\w+", message.rpartition("a name ending in")[2]):
        user.runs(f"{UPSCALE} a.mp4 -o out{suffix}")


ALPHA = {
    "8 bits": ("rgba", ["ffv1", "prores_ks", "png"]),
    "16 bits": ("gbrap16le", ["ffv1", "png"]),
    "4:2:0": ("yuva420p", ["ffv1", "prores_ks"]),
}


@pytest.mark.advice("upscale/video/alternatives.py:refusal", "pass --codec ffv1")
@pytest.mark.parametrize(("pix_fmt", "named"), ALPHA.values(), ids=ALPHA.keys())
def test_alpha_in_a_codec_without(user: User, clips: Clips, pix_fmt: str, named: list[str]) -> None:
    """Each has the codecs that keep its bits, and no other."""
    clips.make(Path("a.nut"), range(2), codec="rawvideo", pix_fmt=pix_fmt, alpha=True)

    message = user.refused(f"{UPSCALE} a.nut -o out.mkv")

    assert [codec.split()[1] for codec, _ in codecs(message)] == named
    takes_all(user, "a.nut", message)
    assert codecs(user.refused(f"{UPSCALE} a.nut --codec libvpx-vp9 -o out.mp4"))


def test_alpha_and_a_pixel_aspect(user: User, clips: Clips) -> None:
    """FFV1 keeps the alpha, and loses the aspect: it is not named."""
    clips.make(Path("a.mov"), range(2), codec="png", pix_fmt="rgba", alpha=True, prepare=anamorphic)

    message = user.refused(f"{UPSCALE} a.mov -o out.mkv")

    assert [codec.split()[1] for codec, _ in codecs(message)] == ["prores_ks", "png"]
    takes_all(user, "a.mov", message)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bits": ("a.mkv", {"codec": "ffv1", "pix_fmt": "gbrp16le"}, "--codec prores_ks -o out.mov"),
    "codec in the container": ("a.mp4", {}, "--codec prores_ks -o out.webm"),
    "codec in none": ("a.mp4", {}, "--codec utvideo -o out.mov"),
    "clock": ("a.mp4", {"pts": range(10), "time_base": Fraction(1, 90_000)}, "--codec mpeg4 -o out.mp4"),
    "times": ("a.mp4", {"pts": range(10), "time_base": Fraction(1, 4000)}, "-o out.mkv"),
    "times and quality": ("a.mp4", {"pts": range(10), "time_base": Fraction(1, 4000)}, "--quality 20 -o out.webm"),
    "aspect": ("a.mp4", {"prepare": anamorphic}, "--codec ffv1 -o out.mkv"),
    "aspect in WebM": ("a.mp4", {"prepare": anamorphic}, "-o out.webm"),
}


@pytest.mark.advice("upscale/video/alternatives.py:refusal", " output")
@pytest.mark.parametrize(("name", "made", "command"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_container_or_codec_does_not_take(
    user: User, clips: Clips, name: str, made: dict[str, Any], command: str
) -> None:
    clips.make(Path(name), range(10), **made)

    message = user.refused(f"{UPSCALE} {name} {command}")

    takes_all(user, name, message, command.rpartition("-o")[0])


@pytest.mark.advice("upscale/video/alternatives.py:_without", " (without --quality)")
def test_a_quality_that_the_other_codec_does_not_have(user: User, clips: Clips) -> None:
    clips.make(Path("a.mov"), range(2), codec="png", pix_fmt="rgba", alpha=True)

    message = user.refused(f"{UPSCALE} a.mov --quality 20 -o out.mkv")

    assert "--codec ffv1 (without --quality) with an .mkv output" in message
    takes_all(user, "a.mov", message)


@pytest.mark.advice("upscale/video/writer.py:VideoWriter._mux", "pass another --codec")
def test_a_clock_that_a_codec_does_not_take(user: User, clips: Clips) -> None:
    clips.make(Path("a.mp4"), range(2), pts=[0, 3600], time_base=Fraction(1, 90_000))

    user.refused(f"{UPSCALE} a.mp4 --codec mpeg4 -o out.mp4")
    user.runs(f"{UPSCALE} a.mp4 --codec libx265 -o out.mp4")


@pytest.mark.advice("upscale/video/alternatives.py:refusal", "an output ending in ")
@pytest.mark.advice("upscale/video/alternatives.py:refusal", "copy the source without that first")
def test_streams_that_a_container_does_not_hold(user: User, clips: Clips) -> None:
    """The sound of many broadcasts, LATM, is one that no container here holds."""
    broadcast(clips, Path("a.ts"))
    clips.remux([clips.make(Path("v.mp4"), range(2)), clips.subtitles(Path("s.srt"))], Path("b.mkv"))

    assert "audio stream (aac_latm)" in user.refused(f"{UPSCALE} a.ts -o out.mkv")
    clips.remux([Path("a.ts")], Path("copy.ts"))
    user.runs(f"{UPSCALE} copy.ts -o out.mkv")
    takes_all(user, "b.mkv", user.refused(f"{UPSCALE} b.mkv -o out.mp4"))


@pytest.mark.advice("upscale/video/plan.py:VideoPlan.join", "write an .mkv; the finished frames are reused")
def test_a_packet_far_into_the_source(user: User, clips: Clips) -> None:
    """MP4 counts durations in 32 bits; here of the last packet of the sound, in 48000ths of a second."""
    whole = clips.make(Path("whole.mkv"), range(5), options={"crf": "10", "bf": "0"}, sound=True)
    with av.open(str(whole)) as source, av.open("a.mkv", "w") as made:
        streams = [made.add_stream_from_template(stream) for stream in source.streams]
        packets = [packet for packet in source.demux() if packet.size]
        sound = next(packet for packet in reversed(packets) if packet.stream.type == "audio")
        for packet in packets:
            packet.stream = streams[packet.stream.index]
            made.mux(packet)
        for number in range(1, 250):
            more = av.Packet(bytes(sound))
            more.stream, more.time_base = sound.stream, sound.time_base
            more.pts = more.dts = sound.pts + 24 * number
            more.duration = 24 if number < 249 else 60_000_000
            made.mux(more)

    user.refused(f"{UPSCALE} a.mkv -o out.mp4")
    assert "resuming after 5 frames" in user.runs(f"{UPSCALE} a.mkv -o out.mkv")


# ----------------------------------------------------------------------------------------------------------------------
# Things that are not kept


@pytest.mark.advice("upscale/video/rehearsal.py:_differences", "(--codec libx265 and libsvtav1 keep it)")
def test_hdr_metadata(user: User, clips: Clips) -> None:
    def hdr(file: Any, stream: Any) -> None:
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, 16, 9, 1

    clips.make(
        Path("a.mkv"), range(2), codec="libx265", pix_fmt="yuv420p10le", options={"x265-params": HDR}, prepare=hdr
    )

    assert "HDR10 metadata" in user.runs(f"{UPSCALE} a.mkv --codec prores_ks -o out.mov")
    for codec in ("libx265", "libsvtav1"):
        assert "HDR10" not in user.runs(f"{UPSCALE} a.mkv --codec {codec} -o {codec}.mkv")


@pytest.mark.advice("upscale/video/mux.py:lost_streams", ": write an .mkv to keep them")
@pytest.mark.advice("upscale/video/mux.py:lost_streams", "the cover picture: write an .mkv or .mp4 to keep it")
def test_fonts_and_covers(user: User, clips: Clips) -> None:
    def font(file: Any, streams: list[Any]) -> None:
        file.add_attachment("font.ttf", "application/x-truetype-font", b"data")

    def cover(file: Any, streams: list[Any]) -> None:
        streams[1].disposition = av.stream.Disposition.attached_pic

    picture = clips.make(Path("cover.mjpeg"), range(1), codec="mjpeg", pix_fmt="yuvj420p", form="mjpeg")
    film = clips.make(Path("film.mp4"), range(2))
    clips.remux([film], Path("font.mkv"), prepare=font)
    clips.remux([film, picture], Path("cover.mp4"), prepare=cover)

    for source, lost, kept in (("font.mkv", ".mp4", (".mkv",)), ("cover.mp4", ".webm", (".mkv", ".mp4"))):
        assert "not kept: " in user.runs(f"{UPSCALE} {source} -o lost{lost}")
        for suffix in kept:
            assert "not kept: " not in user.runs(f"{UPSCALE} {source} -o {source}_kept{suffix}")


# ----------------------------------------------------------------------------------------------------------------------
# Sources


def damaged(path: Path, where: float, count: int = 40) -> None:
    """Overwrite bytes in the middle of a file; a good copy is kept as good.SUFFIX."""
    shutil.copy(path, path.with_stem("good"))
    data = bytearray(path.read_bytes())
    start = int(len(data) * where)
    data[start : start + count] = np.random.default_rng(0).integers(0, 256, count, dtype=np.uint8).tobytes()
    path.write_bytes(data)


def cut(path: Path) -> None:
    shutil.copy(path, path.with_stem("good"))
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "made", "damage"),
    [
        pytest.param(
            "a.mp4",
            {},
            lambda path: damaged(path, 0, 2000),
            id="no video",
            marks=pytest.mark.advice("upscale/video/media.py:open_video", "download or copy it again"),
        ),
        pytest.param(
            "a.y4m",
            {"codec": "wrapped_avframe"},
            lambda path: damaged(path, 0.5, 5000),
            id="packets",
            marks=pytest.mark.advice("upscale/video/survey.py:survey_video", "download or copy it again"),
        ),
        pytest.param(
            "a.mov",
            {"codec": "png", "pix_fmt": "rgb24"},
            lambda path: damaged(path, 0.5),
            id="frames that are not decoded",
            marks=pytest.mark.advice("upscale/video/reader.py:VideoReader._decode", "download or copy it again"),
        ),
        pytest.param(
            "a.mp4",
            {},
            lambda path: damaged(path, 0.5),
            id="frames that are marked",
            marks=pytest.mark.advice("upscale/video/reader.py:VideoReader._check", "download or copy the file again"),
        ),
        pytest.param(
            "a.mkv",
            {},
            cut,
            id="bytes that are missing",
            marks=pytest.mark.advice("upscale/video/truncation.py:refuse_truncated", "download or copy it again"),
        ),
    ],
)
def test_damaged_files(
    user: User, clips: Clips, name: str, made: dict[str, Any], damage: Callable[[Path], None]
) -> None:
    source = clips.make(Path(name), range(30), **made)
    damage(source)

    user.refused(f"{UPSCALE} {name} -o out.mkv")
    shutil.copy(source.with_stem("good"), source)
    user.runs(f"{UPSCALE} {name} -o out.mkv")


@pytest.mark.advice("upscale/video/reader.py:VideoReader._check", "split it there")
def test_a_size_that_changes(user: User, clips: Clips) -> None:
    first = clips.make(Path("first.ts"), range(5), form="mpegts")
    with av.open("second.ts", "w", format="mpegts") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH // 2, HEIGHT // 2, "yuv420p"
        for number in range(5):
            frame = clips.frame(number, "yuv420p").reformat(width=WIDTH // 2, height=HEIGHT // 2)
            frame.pts = 5 + number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    Path("a.ts").write_bytes(first.read_bytes() + Path("second.ts").read_bytes())

    assert "at frame 5, to 32x24" in user.refused(f"{UPSCALE} a.ts -o out.mkv")
    for name, count in (("first", 5), ("second", 5)):
        user.runs(f"{UPSCALE} {name}.ts -o {name}.mkv")
        with av.open(f"{name}.mkv") as file:
            assert sum(1 for _ in file.decode(video=0)) == count


@pytest.mark.advice("upscale/video/reader.py:VideoReader._info_of", "split it there")
def test_pixels_and_their_aspect_that_change(user: User, clips: Clips) -> None:
    def anamorphic(file: Any, stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)

    parts = [
        clips.make(Path("plain.ts"), range(5), form="mpegts"),
        clips.make(Path("wide.ts"), range(5), form="mpegts", prepare=anamorphic),
        clips.make(Path("deep.ts"), range(5), form="mpegts", pix_fmt="yuv420p10le"),
    ]
    for part, message in zip(parts[1:], ("changes its pixel aspect", "changes its pixels at frame 5"), strict=True):
        Path("a.ts").write_bytes(parts[0].read_bytes() + part.read_bytes())
        assert message in user.refused(f"{UPSCALE} a.ts -o out.mkv")
    for part in parts:
        user.runs(f"{UPSCALE} {part} -o {part.stem}.mkv")


@pytest.mark.advice("upscale/video/reader.py:VideoReader._check", "deinterlace it first, or pass --progressive")
def test_interlaced_frames(user: User, clips: Clips) -> None:
    clips.make(Path("a.mp4"), range(4), options={"crf": "10", "x264-params": "tff=1:interlaced=1"})
    with av.open("a.mp4") as file, av.open("b.mp4", "w") as made:
        video = file.streams.video[0]
        graph = av.filter.Graph()
        chain = [graph.add_buffer(template=video), graph.add("bwdif", "mode=send_frame"), graph.add("buffersink")]
        for one, other in itertools.pairwise(chain):
            one.link_to(other)
        graph.configure()
        stream = made.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for frame in [*file.decode(video), None]:
            graph.push(frame)
            while True:
                try:
                    made.mux(stream.encode(graph.pull()))
                except (av.BlockingIOError, av.EOFError):
                    break
        made.mux(stream.encode(None))

    user.refused(f"{UPSCALE} a.mp4 -o out.mp4")
    user.runs(f"{UPSCALE} a.mp4 --progressive -o out.mp4")
    user.runs(f"{UPSCALE} b.mp4 -o out_b.mp4")


@pytest.mark.advice("upscale/video/probe.py:info_of", "convert it first")
@pytest.mark.advice("upscale/video/probe.py:_stated_matrix", "convert it to one of these first")
@pytest.mark.advice("upscale/video/reader.py:VideoReader._pixels", "convert it to one, such as PNG in .mov (rgba)")
def test_pixels_that_are_not_read(user: User, clips: Clips) -> None:
    clips.make(Path("float.nut"), range(2), codec="rawvideo", pix_fmt="gbrpf32le")
    clips.make(Path("ycgco.mkv"), range(2), prepare=lambda file, stream: setattr(stream.codec_context, "colorspace", 8))
    with av.open("palette.mov", "w") as file:
        stream = file.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "pal8"
        frame = av.VideoFrame(WIDTH, HEIGHT, "pal8")
        frame.planes[0].update(bytes(frame.planes[0].buffer_size))
        frame.planes[1].update(b"\x10\x20\x30\x00" * 256)
        frame.pts = 0
        file.mux([*stream.encode(frame), *stream.encode(None)])

    def bt709(frame: Any) -> Any:
        """Here the pixels are BT.601 and only the mark is YCgCo."""
        frame.colorspace = 5
        return frame

    for name, codec, pix_fmt, suffix in (
        ("float.nut", "ffv1", "gbrp16le", ".mkv"), ("ycgco.mkv", "libx264", "yuv420p", ".mp4"),
        ("palette.mov", "png", "rgba", ".mov"),
    ):  # fmt: skip
        user.refused(f"{UPSCALE} {name} --codec ffv1 -o out.mkv")
        converted = recoded(Path(name), Path(name).with_name(f"converted{suffix}"), codec, pix_fmt, bt709)
        user.runs(f"{UPSCALE} {converted} --codec ffv1 -o out_{pix_fmt}.mkv")


@pytest.mark.advice("upscale/video/reader.py:decoder_of", "pip install --force-reinstall --no-deps av")
def test_a_decoder_that_is_missing(user: User, clips: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of distributions may be built without libvpx; PyAV's wheel, which the tests run with, has it."""
    clips.make(
        Path("a.webm"), range(2), codec="libvpx-vp9", pix_fmt="yuva420p", options={"auto-alt-ref": "0"}, alpha=True
    )

    with monkeypatch.context() as patch:
        patch.setattr(reader, "_ALPHA_DECODERS", {"vp9": "libvpx-vp9-missing"})
        user.refused(f"{UPSCALE} a.webm -o out.webm")
    user.runs(f"{UPSCALE} a.webm -o out.webm")
