"""Videos: timing, colour, audio and subtitles kept; resumable; damaged ones refused."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srdeploy.core import file_lock
from srdeploy.core.errors import InputError, OutputError, SrdeployError, UsageError
from srdeploy.upscale.read_compute_write import Pipeline
from srdeploy.upscale.upscaler import Upscaler
from srdeploy.upscale.video.encoding import Encoding
from srdeploy.upscale.video.job import VideoOptions, upscale_video
from srdeploy.upscale.video.parts import Parts, Segment
from srdeploy.upscale.video.probe import is_video
from srdeploy.upscale.video.reader import Frame, VideoReader
from srdeploy.upscale.video.writer import VideoWriter

av = pytest.importorskip("av")
RATE = Fraction(30000, 1001)
BEST = VideoOptions(quality=1)


def clip(
    path: Path,
    *,
    frames: int = 12,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    matrix: int = 1,
    full_range: bool = False,
    variable: bool = False,
    audio: bool = False,
    subtitles: bool = False,
    rotation: int = 0,
    size: tuple[int, int] = (32, 48),
) -> Path:
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"crf": "1"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, 2 if full_range else 1
        context.color_primaries, context.color_trc = 1, 1
        if variable:
            context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        sound = container.add_stream("aac", rate=48000, layout="mono") if audio else None
        words = container.add_mux_stream("subrip") if subtitles else None
        ticks = 0
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(_drawn(number, height, width), format="rgb24").reformat(
                format=pix_fmt, dst_colorspace={1: 1, 2: 5, 6: 5, 9: 9}[matrix], dst_color_range=2 if full_range else 1
            )
            if variable:
                frame.pts, frame.time_base = ticks, Fraction(1, 1000)
                ticks += 20 if number % 3 else 65
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _add_tone(container, sound, frames)
        if words is not None:
            packet = av.Packet(b"hello")
            packet.stream, packet.time_base = words, Fraction(1, 1000)
            packet.pts = packet.dts = 100
            packet.duration = 200
            container.mux(packet)
    return path


def _drawn(number: int, height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [40 + columns * 2 + number * 3, 200 - rows * 3 + number, np.full_like(rows, 60 + number * 5)]
    return np.stack(planes, axis=2).clip(0, 255).astype(np.uint8)


def _add_tone(container: Any, stream: Any, frames: int) -> None:
    tone = (np.sin(np.arange(int(48000 * frames / RATE)) * 0.05) * 0.3).astype(np.float32)
    for start in range(0, len(tone) - 1024, 1024):
        frame = av.AudioFrame.from_ndarray(tone[None, start : start + 1024], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 48000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


@pytest.fixture
def up(nearest_onnx: Callable[..., Path]) -> Upscaler:
    return Upscaler.open(nearest_onnx(), threads=1)


def facts(path: Path) -> dict[str, Any]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        decoded = list(container.decode(stream))
        return {
            "rate": stream.average_rate,
            "times": [frame.pts * frame.time_base for frame in decoded],
            "matrix": int(context.colorspace),
            "range": int(context.color_range),
            "primaries": int(context.color_primaries),
            "transfer": int(context.color_trc),
            "rotation": decoded[0].rotation,
            "duration": container.duration,
        }


def packets(path: Path, kind: str) -> list[bytes]:
    with av.open(str(path)) as container:
        streams = getattr(container.streams, kind)
        return [bytes(packet) for packet in container.demux(streams[0]) if packet.size] if streams else []


def pixels(path: Path) -> list[np.ndarray]:
    reader = VideoReader(path)
    frames = [frame.pixels.astype(int) for frame in reader.frames()]
    reader.close()
    return frames


@pytest.mark.parametrize(
    ("source", "target", "options"),
    [
        ("a.mp4", "b.mp4", {"audio": True}),
        ("a.mkv", "b.mkv", {"audio": True, "subtitles": True}),
        ("a.mkv", "b.mkv", {"variable": True}),
        ("a.mov", "b.mov", {"matrix": 6, "full_range": True}),
        ("a.mkv", "b.mp4", {"pix_fmt": "yuv444p"}),
        ("a.mkv", "b.mkv", {"pix_fmt": "yuv420p10le", "matrix": 9}),
        ("a.mkv", "b.mkv", {"codec": "ffv1"}),
        ("a.mp4", "b.mp4", {"rotation": 90}),
    ],
    ids=["audio", "subtitles", "variable rate", "full range 601", "444", "10 bit 2020", "ffv1", "rotated"],
)
def test_only_the_size_changes(source: str, target: str, options: dict[str, Any], up: Upscaler, tmp_path: Path) -> None:
    clip(tmp_path / source, **options)

    report = upscale_video(up, tmp_path / source, tmp_path / target, VideoOptions(quality=1, segment_frames=5))

    before, after = facts(tmp_path / source), facts(tmp_path / target)
    # Matroska keeps milliseconds: half of one is what a copy into it may round
    np.testing.assert_allclose(
        [float(t) for t in after.pop("times")], [float(t) for t in before.pop("times")], atol=5e-4
    )
    assert after.pop("duration") == pytest.approx(before.pop("duration"), abs=2000)  # microseconds
    assert float(after.pop("rate")) == pytest.approx(float(before.pop("rate")), rel=2e-3)
    assert after == before
    assert report.frames == 12
    for kind in ("audio", "subtitles"):
        assert packets(tmp_path / target, kind) == packets(tmp_path / source, kind)
        assert bool(packets(tmp_path / target, kind)) == options.get(kind, False)
    peak = 65535 if "10le" in options.get("pix_fmt", "") else 255
    for small, large in zip(pixels(tmp_path / source), pixels(tmp_path / target), strict=True):
        assert large.shape == (2 * small.shape[0], 2 * small.shape[1], 3)
        # 1 % of the peak: chroma at half resolution is interpolated once more, and CRF 1 is nearly lossless
        assert np.abs(large[::2, ::2] - small).mean() < 0.01 * peak
        assert abs(large.mean() - small.mean()) < 0.004 * peak
    assert not (tmp_path / f"{target}.parts").exists()


@pytest.mark.parametrize("full_range", [True, False], ids=["full range", "limited range"])
@pytest.mark.parametrize("matrix", [1, 6])
@pytest.mark.parametrize("bits", [8, 10])
def test_colours_are_stored_and_read_to_half_a_step(bits: int, matrix: int, full_range: bool, tmp_path: Path) -> None:
    """Half a step of chroma lost in every frame is a tint; four steps are what 10 bits are there to avoid."""
    source = clip(tmp_path / "a.mkv", pix_fmt="yuv420p" if bits == 8 else "yuv420p10le", matrix=matrix,
                  full_range=full_range)  # fmt: skip
    reader = VideoReader(source)
    reader.close()
    kind = np.uint8 if bits == 8 else np.uint16
    rgb = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (32, 48, 3), dtype=kind, endpoint=True)
    writer = VideoWriter(
        tmp_path / "b.mkv", reader.info, Encoding("ffv1", "yuv444p" if bits == 8 else "yuv444p10le", {}), (32, 48)
    )
    writer.write(Frame(rgb, 0))
    writer.close()
    with av.open(str(tmp_path / "b.mkv")) as container:
        frame = next(container.decode(video=0))
        stored = np.stack([np.frombuffer(p, kind).reshape(32, -1)[:, :48] for p in frame.planes]).astype(float)

    red, blue = {1: (0.2126, 0.0722), 6: (0.299, 0.114)}[matrix]
    unit, step = rgb / np.iinfo(kind).max, 2 ** (bits - 8)
    luma = unit @ [red, 1 - red - blue, blue]
    chroma = [(unit[..., 2] - luma) / (2 * (1 - blue)), (unit[..., 0] - luma) / (2 * (1 - red))]
    spans = (2**bits - 1,) * 2 if full_range else (219 * step, 224 * step)
    black = 0 if full_range else 16 * step
    expected = [luma * spans[0] + black, *(values * spans[1] + 128 * step for values in chroma)]
    difference = stored - np.clip(expected, 0, 2**bits - 1)
    assert np.abs(difference).max() < 0.6  # rounding, and a little of swscale where it does the work
    assert np.abs(difference.mean(axis=(1, 2))).max() < 0.1
    # half a step of Y, U and V each: at most two and a half steps of a colour
    back = pixels(tmp_path / "b.mkv")[0] / np.iinfo(kind).max
    assert np.abs(back - unit).max() * 255 * step < 2.6
    assert abs((back - unit).mean()) * 255 * step < 0.1


def test_unstated_matrix_is_written_as_it_was_taken(up: Upscaler, tmp_path: Path) -> None:
    """Upscaled to many lines, an untagged video would be shown with the other matrix."""
    clip(tmp_path / "a.mkv", matrix=2)

    report = upscale_video(up, tmp_path / "a.mkv", tmp_path / "b.mkv", BEST)

    assert facts(tmp_path / "b.mkv")["matrix"] == 6
    assert any("BT.601" in note for note in report.notes)


@pytest.mark.parametrize(
    ("target", "codec"),
    [("b.mkv", "ffv1"), ("b.mp4", "libx265"), ("b.webm", None), ("b.mp4", "libsvtav1")],
    ids=["ffv1", "x265", "vp9", "av1"],
)
def test_codecs(target: str, codec: str | None, up: Upscaler, tmp_path: Path) -> None:
    clip(tmp_path / "a.mkv", size=(64, 64))

    report = upscale_video(up, tmp_path / "a.mkv", tmp_path / target, VideoOptions(codec=codec, segment_frames=7))

    assert report.encoding["codec"] == (codec or "libvpx-vp9")
    np.testing.assert_allclose(
        [float(t) for t in facts(tmp_path / target)["times"]],
        [float(t) for t in facts(tmp_path / "a.mkv")["times"]],
        atol=1.1e-3,
    )


def test_odd_sizes_are_stored_without_subsampling(nearest_onnx: Callable[..., Path], tmp_path: Path) -> None:
    clip(tmp_path / "a.mkv", pix_fmt="yuv444p", size=(33, 47), frames=3)
    with Upscaler.open(nearest_onnx(scale=3), threads=1) as up:
        report = upscale_video(up, tmp_path / "a.mkv", tmp_path / "b.mkv", BEST)

    assert report.encoding["pix_fmt"] == "yuv444p"
    assert pixels(tmp_path / "b.mkv")[0].shape == (99, 141, 3)


KILLED = """
import os, signal, sys
from pathlib import Path
from srdeploy.upscale.upscaler import Upscaler
from srdeploy.upscale.video.job import VideoOptions, upscale_video
from srdeploy.upscale.video.parts import Parts
add = Parts.add
def add_three(self, segment):
    if len(self.finished) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    add(self, segment)
Parts.add = add_three
up = Upscaler.open(Path(sys.argv[1]), threads=1)
upscale_video(up, Path(sys.argv[2]), Path(sys.argv[3]), VideoOptions(segment_frames=20))
"""
"""Upscales a video and kills itself when the fourth segment has its file and is not recorded yet."""


class TestResume:
    """Runs that end early are taken up where their last whole segment ended."""

    def test_interrupted_run_is_taken_up_and_equals_an_undisturbed_one(
        self, up: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = clip(tmp_path / "a.mp4", frames=23, audio=True)
        options = VideoOptions(codec="ffv1", segment_frames=5)  # x264 is not deterministic on pictures this small
        upscale_video(up, source, tmp_path / "undisturbed.mkv", options)
        computed = []

        def interrupted(self: Upscaler, *args: Any, **kwargs: Any) -> Any:
            computed.append(1)
            if len(computed) == 18:
                raise KeyboardInterrupt
            return upscale(self, *args, **kwargs)

        upscale = Upscaler.upscale
        monkeypatch.setattr(Upscaler, "upscale", interrupted)
        with pytest.raises(KeyboardInterrupt):
            upscale_video(up, source, tmp_path / "b.mkv", options)
        monkeypatch.undo()
        left = sorted(path.name for path in tmp_path.iterdir())
        parts = sorted(path.name for path in (tmp_path / "b.mkv.parts").iterdir())

        report = upscale_video(up, source, tmp_path / "b.mkv", options)

        assert left == ["a.mp4", "b.mkv.parts", "undisturbed.mkv"]
        assert parts[-1] == "segments.jsonl"
        assert all(name.startswith("0000") for name in parts[:-1])
        assert 5 <= report.resumed <= 15
        assert report.resumed % 5 == 0
        assert report.frames == 23
        for kind in ("video", "audio"):
            assert packets(tmp_path / "b.mkv", kind) == packets(tmp_path / "undisturbed.mkv", kind)
        assert facts(tmp_path / "b.mkv") == facts(tmp_path / "undisturbed.mkv")

    def test_killed_run_leaves_whole_segments(
        self, nearest_onnx: Callable[..., Path], up: Upscaler, tmp_path: Path
    ) -> None:
        source = clip(tmp_path / "a.mp4", frames=400)
        child = subprocess.run([sys.executable, "-c", KILLED, nearest_onnx(), source, tmp_path / "b.mp4"])
        assert child.returncode == -signal.SIGKILL
        assert not (tmp_path / "b.mp4").exists()
        assert len(list((tmp_path / "b.mp4.parts").glob("0*.mkv"))) == 4

        report = upscale_video(up, source, tmp_path / "b.mp4", VideoOptions(segment_frames=20))

        assert report.frames == 400
        assert report.resumed == 60
        assert len(facts(tmp_path / "b.mp4")["times"]) == 400
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_runs_at_once_leave_each_others_segments_alone(
        self, up: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A second run to the same output, and one to another container, when the first has finished a segment."""
        source = clip(tmp_path / "a.mp4", frames=12)
        options = VideoOptions(segment_frames=4)
        add, begun = Parts.add, []

        def add_and_begin_others(self: Parts, segment: Segment) -> None:
            add(self, segment)
            if not begun:
                begun.append(segment)
                with pytest.raises(UsageError, match="another run writes the segments of a video"):
                    upscale_video(up, source, tmp_path / "b.mp4", options)
                begun.append(upscale_video(up, source, tmp_path / "b.mkv", options))

        monkeypatch.setattr(Parts, "add", add_and_begin_others)
        first = upscale_video(up, source, tmp_path / "b.mp4", options)

        for report in (first, begun[1]):
            assert (report.frames, report.resumed) == (12, 0)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mkv", "b.mp4"]

    def test_a_run_that_only_looks_keeps_nobody_out(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real, refused = file_lock.hold_now, []

        def hold_late(descriptor: int) -> bool:
            if len(refused) < 3:
                refused.append(descriptor)
                return False
            return real(descriptor)

        monkeypatch.setattr(file_lock, "hold_now", hold_late)
        Parts(tmp_path / "b.mp4.parts", "key").close()

        assert len(refused) == 3

    def test_a_folder_that_another_run_removes_meanwhile_is_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was opened before it was removed, and the lock of what is gone keeps nobody out."""
        folder = tmp_path / "b.mp4.parts"
        real, removed = file_lock.hold_now, []

        def hold_late(descriptor: int) -> bool:
            if not removed:
                removed.append(folder.rmdir())
            return real(descriptor)

        monkeypatch.setattr(file_lock, "hold_now", hold_late)
        with contextlib.closing(Parts(folder, "key")):
            assert folder.is_dir()
            with pytest.raises(UsageError, match="another run"):
                Parts(folder, "key")
        Parts(folder, "key").close()

    def test_segments_of_another_video_or_changed_ones_are_not_taken_up(
        self, up: Upscaler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = clip(tmp_path / "a.mp4", frames=12)
        options = VideoOptions(segment_frames=4)
        monkeypatch.setattr("srdeploy.upscale.video.plan.join_segments", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            upscale_video(up, source, tmp_path / "b.mp4", options)
        monkeypatch.undo()
        second = tmp_path / "b.mp4.parts" / "000001.mkv"
        second.write_bytes(second.read_bytes()[:-1])

        damaged = upscale_video(up, source, tmp_path / "b.mp4", options)
        (tmp_path / "b.mp4.parts").mkdir()
        (tmp_path / "b.mp4.parts" / "000000.mkv").write_bytes(b"stranger")
        stranger = upscale_video(up, source, tmp_path / "b.mp4", VideoOptions(segment_frames=4, force=True))

        assert damaged.resumed == 4
        assert stranger.resumed == 0
        assert len(facts(tmp_path / "b.mp4")["times"]) == 12


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt


def _interlaced(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": "tff=1:interlaced=1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(_drawn(number, 64, 64), format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.write_text("no video"), "damaged or not a video"),
        (lambda path: path.write_bytes(clip(path, frames=30).read_bytes()[:2000]), "is truncated: 2000 bytes"),
        (_interlaced, "interlaced"),
    ],
    ids=["zero bytes", "text", "cut", "interlaced"],
)
def test_what_is_no_sound_video_is_refused(
    make: Callable[[Path], object], words: str, up: Upscaler, tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    make(path)

    with pytest.raises(InputError, match=words):
        upscale_video(up, path, tmp_path / "b.mp4")

    assert list(tmp_path.iterdir()) == [path]  # no folder for segments either: there is none


def test_video_cut_in_the_middle_is_refused_after_the_last_whole_frame(up: Upscaler, tmp_path: Path) -> None:
    """With its index in front a cut file opens; only the missing frames tell."""
    source = tmp_path / "a.mp4"
    with (
        av.open(str(clip(tmp_path / "whole.mp4", frames=60))) as original,
        av.open(str(source), "w", options={"movflags": "faststart"}) as fast,
    ):
        stream = fast.add_stream_from_template(original.streams.video[0])
        for packet in original.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                fast.mux(packet)
    data = source.read_bytes()
    source.write_bytes(data[: len(data) * 2 // 3])

    with pytest.raises(InputError, match="truncated"):
        upscale_video(up, source, tmp_path / "b.mp4")

    assert not (tmp_path / "b.mp4").exists()


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("b.avi", VideoOptions(), "a name ending in .mp4"),
        ("b.png", VideoOptions(), "a name ending in .mp4"),
        ("b.mp4", VideoOptions(codec="nonsense"), "video codec 'nonsense'"),
        ("b.mkv", VideoOptions(codec="ffv1", quality=3), "--quality 3 for ffv1"),
        ("there.mp4", VideoOptions(), "exists already"),
        ("a.mp4", VideoOptions(force=True), "is the input itself"),
        ("b.webm", VideoOptions(), "cannot hold the input's audio stream"),
    ],
    ids=["container", "picture name", "codec", "quality", "exists", "same", "audio codec"],
)
def test_refusals(target: str, options: VideoOptions, words: str, up: Upscaler, tmp_path: Path) -> None:
    source = clip(tmp_path / "a.mp4", frames=3, audio=True)
    before = source.read_bytes()
    (tmp_path / "there.mp4").write_bytes(b"kept")

    with pytest.raises((UsageError, SrdeployError), match=words):
        upscale_video(up, source, tmp_path / target, options)

    assert source.read_bytes() == before
    assert (tmp_path / "there.mp4").read_bytes() == b"kept"


@pytest.mark.tmpfs
def test_full_disk_is_one_line_and_the_run_can_go_on(up: Upscaler, tmp_path: Path) -> None:
    source = clip(tmp_path / "a.mkv", frames=40, size=(96, 128))
    disk = tmp_path / "disk"
    disk.mkdir()
    options = VideoOptions(codec="ffv1", segment_frames=4)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with pytest.raises(OutputError, match="no space left"):
            upscale_video(up, source, disk / "b.mkv", options)
        left = sorted(path.name for path in disk.rglob("*") if path.is_file())
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        report = upscale_video(up, source, disk / "b.mkv", options)
    finally:
        subprocess.run(["umount", disk], check=True)

    assert not [name for name in left if name.startswith(".")]
    assert "b.mkv" not in left
    assert report.frames == 40
    assert report.resumed % 4 == 0


def test_videos_are_known_by_content(tmp_path: Path, picture: Callable[..., Any]) -> None:
    from PIL import Image

    clip(tmp_path / "a.mp4", frames=2).rename(tmp_path / "video.dat")
    Image.fromarray(picture(8, 8)).save(tmp_path / "picture.mp4", format="PNG")
    (tmp_path / "text.txt").write_text("neither")
    frames = [Image.fromarray(picture(8, 8, seed=seed)) for seed in range(3)]
    for name in ("moving.gif", "moving.png", "moving.webp", "pages.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].convert("CMYK").save(tmp_path / "cmyk.tif")
    (tmp_path / "cut.png").write_bytes((tmp_path / "picture.mp4").read_bytes()[:20])

    assert is_video(tmp_path / "video.dat")
    assert not is_video(tmp_path / "picture.mp4")
    assert not is_video(tmp_path / "text.txt")
    # FFmpeg would open all of these; they are pictures, and refused as what they are
    for name in ("moving.gif", "moving.png", "moving.webp", "pages.tif", "cmyk.tif", "cut.png"):
        assert not is_video(tmp_path / name)


def test_memory_does_not_grow_with_the_length(up: Upscaler, tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    source = clip(tmp_path / "a.mp4", frames=1500, size=(16, 16))
    resident = []

    def watched(self: Pipeline[Any, Any]) -> None:
        compute = self.compute

        def counted(item: Any) -> Any:
            resident.append(psutil.Process().memory_info().rss)
            return compute(item)

        self.compute = counted
        run(self)

    run = Pipeline.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "run", watched)
        upscale_video(up, source, tmp_path / "b.mp4", VideoOptions(segment_frames=100))

    assert len(resident) == 1500
    assert max(resident[1000:]) - resident[300] < 16 << 20  # 16 MiB: encoders of some segments come and go
