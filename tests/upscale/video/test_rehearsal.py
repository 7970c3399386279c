"""What a container or an encoder cannot take is found out before the first frame is computed."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srdeploy.core.errors import UsageError
from srdeploy.upscale.upscaler import Upscaler
from srdeploy.upscale.video.job import VideoOptions, upscale_video
from srdeploy.upscale.video.mux import join_segments

av = pytest.importorskip("av")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the frames that are computed."""
    frames: list[int] = []
    upscale = Upscaler.upscale

    def counted(self: Upscaler, *args: Any, **kwargs: Any) -> Any:
        frames.append(1)
        return upscale(self, *args, **kwargs)

    monkeypatch.setattr(Upscaler, "upscale", counted)
    return frames


def _with_subtitles(clips: Any, folder: Path) -> Path:
    made: Path = clips.remux([clips.make(folder / "v.mp4"), clips.subtitles(folder / "s.srt")], folder / "a.mkv")
    return made


def _with_sound(clips: Any, folder: Path) -> Path:
    made: Path = clips.make(folder / "a.mkv", sound=True)
    return made


def _with_text_of_mp4(clips: Any, folder: Path) -> Path:
    """MP4 with subtitles of MP4, which Matroska does not take."""
    with av.open(str(clips.make(folder / "v.mp4"))) as video, av.open(str(folder / "a.mp4"), "w") as made:
        film = made.add_stream_from_template(video.streams[0])
        text = made.add_mux_stream("mov_text")
        for packet in video.demux():
            if packet.dts is not None:
                packet.stream = film
                made.mux(packet)
        said = av.Packet(b"\0\5hello")
        said.stream, said.time_base, said.pts, said.dts, said.duration = text, Fraction(1, 1000), 100, 100, 200
        made.mux(said)
    return folder / "a.mp4"


def test_subtitles_of_mp4_stay_in_it(up: Upscaler, clips: Any, tmp_path: Path, computed: list[int]) -> None:
    source = _with_text_of_mp4(clips, tmp_path)

    with pytest.raises(UsageError, match=r"\.mkv cannot hold .*mov_text.*; expected an output ending in \.mp4"):
        upscale_video(up, source, tmp_path / "out.mkv")
    assert not computed
    upscale_video(up, source, tmp_path / "out.mov")

    with av.open(str(tmp_path / "out.mov")) as file:
        assert b"\0\5hello" in [bytes(packet) for packet in file.demux(subtitles=0)]


@pytest.mark.parametrize(
    ("make", "output", "message"),
    [
        (_with_subtitles, "out.mp4", r"\.mp4 cannot hold the input's subtitle stream \(.*\); expected .* \.mkv"),
        (_with_sound, "out.webm", r"\.webm cannot hold the input's audio stream \(.*\); expected .*\.mp4.* \.mkv"),
    ],
    ids=["SubRip into MP4", "MP2 into WebM"],
)
def test_container_that_can_is_named_and_takes_it(
    make: Callable[[Any, Path], Path], output: str, message: str, up: Upscaler, clips: Any, tmp_path: Path,
    computed: list[int],
) -> None:  # fmt: skip
    source = make(clips, tmp_path)
    before = sorted(tmp_path.iterdir())

    with pytest.raises(UsageError, match=message):
        upscale_video(up, source, tmp_path / output)
    assert not computed
    assert sorted(tmp_path.iterdir()) == before
    upscale_video(up, source, tmp_path / "out.mkv")

    with av.open(str(source)) as one, av.open(str(tmp_path / "out.mkv")) as other:
        assert [stream.type for stream in other.streams] == [stream.type for stream in one.streams]


@pytest.mark.parametrize(
    ("codec", "output", "message"),
    [
        ("prores_ks", "out.webm", r"\.webm cannot hold prores_ks; expected an output ending in \.mkv or \.mov"),
        ("utvideo", "out.mov", r"\.mov cannot hold utvideo; pass --codec ffv1 with an \.mkv output"),
        ("mpeg4", "out.mp4", "mpeg4 does not encode .* clock of 1/90000"),
    ],
    ids=["codec in container", "codec in none", "clock"],
)
def test_encoders_are_tried(
    codec: str, output: str, message: str, up: Upscaler, clips: Any, tmp_path: Path, computed: list[int]
) -> None:
    source = clips.make(tmp_path / "a.mp4", range(2), pts=[0, 3600], time_base=Fraction(1, 90_000))

    with pytest.raises(UsageError, match=message):
        upscale_video(up, source, tmp_path / output, VideoOptions(codec=codec))

    assert not computed
    assert list(tmp_path.iterdir()) == [source]


def test_output_that_is_not_read_back_is_refused(
    up: Upscaler, clips: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a damaged source did to it; the message names no file of the rehearsal."""
    source = clips.make(tmp_path / "a.mp4", range(2))

    def damaged(segments: Any, source: Path, output: Path, *args: Any, **options: Any) -> None:
        join_segments(segments, source, output, *args, **options)
        if output.suffix != ".mp4":
            return
        clips.make(output, range(2))
        content = output.read_bytes()
        start = content.find(b"mdat") + 4
        output.write_bytes(content[:start] + b"\xff" * 700 + content[start + 700 :])

    monkeypatch.setattr("srdeploy.upscale.video.rehearsal.join_segments", damaged)

    with pytest.raises(UsageError, match=r"^a first frame that was written to \.mp4 cannot be read back"):
        upscale_video(up, source, tmp_path / "out.mp4")

    assert list(tmp_path.iterdir()) == [source]


def test_general_name_of_a_codec_is_that_of_its_encoder(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """With the quality that is stated for it."""
    source = clips.make(tmp_path / "a.mp4", range(2))

    report = upscale_video(up, source, tmp_path / "out.mp4", VideoOptions(codec="h264"))

    assert (report.encoding["codec"], report.encoding["options"]["crf"]) == ("libx264", "16")
    with pytest.raises(UsageError, match="video codec 'aac'; expected an encoder"):
        upscale_video(up, source, tmp_path / "out.mkv", VideoOptions(codec="aac"))


@pytest.mark.parametrize("begin", [None, 12])
def test_sound_that_begins_late_or_never(begin: int | None, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """MP4 leaves out streams without packets, as in the rehearsal of sound that begins after hundreds of frames."""
    whole = clips.make(tmp_path / "v.mkv", [number % 64 for number in range(320)], sound=True)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "a.mkv"), "w") as made:
        streams = [made.add_stream_from_template(stream) for stream in source.streams]
        for packet in source.demux():
            late = packet.stream.type == "audio" and (begin is None or (packet.pts or 0) < 1000 * begin)
            if packet.size and not late:
                packet.stream = streams[packet.stream.index]
                made.mux(packet)

    report = upscale_video(up, tmp_path / "a.mkv", tmp_path / "out.mp4")

    line = "not kept by .mp4: streams without content (audio)"
    assert (line in report.notes) == (begin is None)
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert len(file.streams.audio) == (begin is not None)
        if begin is not None:
            first = next(packet for packet in file.demux(audio=0))
            assert float(first.pts * first.time_base) == pytest.approx(begin, abs=0.05)


@pytest.mark.parametrize("sound", ["flac", "libopus"])
def test_stream_that_the_header_refuses_is_named(sound: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """Some are refused when the header is written, not when they are added."""
    with av.open(str(clips.make(tmp_path / "v.mkv"))) as film, av.open(str(tmp_path / "a.mkv"), "w") as made:
        picture = made.add_stream_from_template(film.streams[0])
        tone = made.add_stream(sound, rate=48000, layout="mono")
        kind = "s16" if tone.codec_context.codec.name != "libopus" else "flt"
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 19200), {"s16": np.int16, "flt": np.float32}[kind]), format=kind, layout="mono"
        )
        frame.sample_rate, frame.pts = 48000, 0
        packets = [*film.demux(video=0), *tone.encode(frame), *tone.encode(None)]
        for packet in packets:
            if packet.size:
                packet.stream = tone if packet.stream.type == "audio" else picture
                made.mux(packet)

    with pytest.raises(UsageError, match=rf"\.mov cannot hold the input's audio stream \({sound.removeprefix('lib')}"):
        upscale_video(up, tmp_path / "a.mkv", tmp_path / "out.mov")


def test_frames_made_for_one_container_are_reused_for_another(
    up: Upscaler, clips: Any, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = clips.make(tmp_path / "a.mp4", range(20))
    options = VideoOptions(segment_frames=5)
    with monkeypatch.context() as patch:
        patch.setattr("srdeploy.upscale.video.plan.join_segments", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            upscale_video(up, source, tmp_path / "out.mp4", options)
    assert len(computed) == 20

    report = upscale_video(up, source, tmp_path / "out.mkv", options)

    assert report.resumed == 20
    assert len(computed) == 20
    assert clips.shown(tmp_path / "out.mkv").numbers == list(range(20))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "out.mkv"]


def _interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt
