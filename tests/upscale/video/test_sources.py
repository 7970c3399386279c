"""Every frame that a player shows is there once, in order, with its time, whatever wrote the file."""

import itertools
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from clips import box, boxes_of

from srdeploy.core.errors import InputError, UsageError
from srdeploy.upscale.upscaler import Upscaler
from srdeploy.upscale.video.job import VideoOptions, upscale_video
from srdeploy.upscale.video.media import open_video
from srdeploy.upscale.video.reader import VideoReader
from srdeploy.upscale.video.survey import survey_video
from srdeploy.upscale.video.timestamps import PacketClock

av = pytest.importorskip("av")
FRAME = Fraction(1, 25)
REORDERED = {"crf": "10", "bf": "2", "b-adapt": "0", "g": "100"}
NONE_MOVED = VideoOptions(segment_frames=7)


def _cut(clips: Any, folder: Path) -> Path:
    """Cut without encoding: an edit list hides the 15 frames between the key frame and the cut."""
    clips.make(folder / "whole.mp4", range(40), options=REORDERED)

    def earlier(packet: Any) -> bool:
        shift = int(15 * FRAME / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        return True

    return clips.remux(
        [folder / "whole.mp4"], folder / "a.mp4", container={"avoid_negative_ts": "disabled"}, change=earlier
    )


def _edited_list(path: Path, edits: dict[int, list[tuple[int, int]]]) -> None:
    """Give tracks of an MP4 file edits, by place of the track: (duration in ms, first time in ticks of the track)."""
    lists = {
        place: box(b"edts", box(b"elst", struct.pack(">II", 0, len(entries))
                    + b"".join(struct.pack(">Iihh", *entry, 1, 0) for entry in entries)))
        for place, entries in edits.items()
    }  # fmt: skip
    tracks = itertools.count()

    def track(content: bytes) -> bytes:
        own = lists[next(tracks)]
        parts = [(name, data) for name, data in boxes_of(content) if name != b"edts"]
        return b"".join(box(name, data) + (own if name == b"tkhd" else b"") for name, data in parts)

    def movie(content: bytes) -> bytes:
        return b"".join(box(name, track(data) if name == b"trak" else data) for name, data in boxes_of(content))

    boxes = list(boxes_of(path.read_bytes()))
    path.write_bytes(b"".join(box(name, movie(data) if name == b"moov" else data) for name, data in boxes))


def _with_two_edits(clips: Any, folder: Path) -> Path:
    """An editor kept two parts, the second from between two key frames; 512 ticks per frame."""
    options = {"crf": "10", "bf": "0", "g": "12"}
    made: Path = clips.make(folder / "a.mp4", range(40), options=options, sound=True)
    parts = [(400, 2), (400, 20)]
    _edited_list(
        made,
        {
            0: [(duration, 512 * first) for duration, first in parts],
            1: [(duration, 1920 * first) for duration, first in parts],
        },
    )
    return made


def _joined(clips: Any, folder: Path) -> Path:
    one, two = (
        clips.make(folder / f"{n}.ts", range(20 * n, 20 * n + 20), form="mpegts", options=REORDERED, sound=True)
        for n in (0, 1)
    )
    (folder / "a.ts").write_bytes(one.read_bytes() + two.read_bytes())
    return folder / "a.ts"


def _joined_matroska(clips: Any, folder: Path) -> Path:
    parts = [clips.make(folder / f"{n}.mkv", range(20 * n, 20 * n + 20), options=REORDERED) for n in (0, 1)]
    (folder / "a.mkv").write_bytes(b"".join(part.read_bytes() for part in parts))
    return folder / "a.mkv"


def _without_start(clips: Any, folder: Path) -> Path:
    """A broadcast that was switched on between two key frames."""
    whole = clips.make(
        folder / "whole.ts", range(30), form="mpegts", options={"crf": "10", "bf": "0", "g": "10", "sc_threshold": "0"}
    )
    data = whole.read_bytes()
    (folder / "a.ts").write_bytes(data[188 * 24 :])
    return folder / "a.ts"


def _in_mkv_as_in_avi(clips: Any, folder: Path) -> Path:
    clips.make(folder / "a.avi", options=REORDERED)
    return clips.remux([folder / "a.avi"], folder / "a.mkv")


CASES: dict[str, tuple[Callable[[Any, Path], Path], list[int], list[int] | None]] = {
    "edit list": (_cut, list(range(15, 40)), None),
    "two edits": (_with_two_edits, [*range(2, 12), *range(20, 30)], None),
    "H.264 with B-frames in AVI": (lambda c, f: c.make(f / "a.avi", options=REORDERED), list(range(10)), None),
    "MPEG-4 with B-frames in AVI": (
        lambda c, f: c.make(f / "a.avi", codec="mpeg4", options={"bf": "2"}), list(range(10)), None,
    ),
    "empty chunks in AVI": (
        lambda c, f: c.make(f / "a.avi", range(6), options={"crf": "10", "bf": "0"}, pts=[0, 1, 2, 6, 7, 8]),
        list(range(6)), [1, 1, 4, 1, 1],
    ),
    "empty chunks in AVI with B-frames": (
        lambda c, f: c.make(f / "a.avi", range(12), options=REORDERED, pts=[*range(6), *range(9, 15)]),
        list(range(12)), [1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 1],
    ),
    "times of AVI in Matroska": (_in_mkv_as_in_avi, list(range(10)), None),
    "raw H.264": (lambda c, f: c.make(f / "a.h264", form="h264", options=REORDERED), list(range(10)), None),
    "raw HEVC": (
        lambda c, f: c.make(f / "a.hevc", codec="libx265", form="hevc", options={"x265-params": "log-level=none"}),
        list(range(10)), None,
    ),
    "raw MPEG-2": (
        lambda c, f: c.make(f / "a.m2v", codec="mpeg2video", form="mpeg2video", options={"bf": "2"}),
        list(range(10)), None,
    ),
    "MPEG-2 that could have B-frames": (
        lambda c, f: c.make(f / "a.mpg", codec="mpeg2video"), list(range(10)), None,
    ),
    "one frame of a codec that reorders": (lambda c, f: c.make(f / "a.mp4", range(1), options=REORDERED), [0], None),
    "clock starts again": (_joined, list(range(40)), None),
    "joined Matroska with B-frames": (_joined_matroska, list(range(40)), None),
    "clock wraps": (
        lambda c, f: c.make(f / "a.ts", form="mpegts", container={"output_ts_offset": "95443.5"}),
        list(range(10)), None,
    ),
    "starts between key frames": (_without_start, list(range(10, 30)), None),
    "variable rate": (
        lambda c, f: c.make(f / "a.mkv", range(5), pts=[0, 2, 3, 30, 31], options=REORDERED), list(range(5)),
        [2, 1, 27, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "numbers", "steps"), CASES.values(), ids=CASES.keys())
def test_shown_frames_come_out_once_in_order_with_their_times(
    make: Callable[[Any, Path], Path],
    numbers: list[int],
    steps: list[int] | None,
    up: Upscaler,
    clips: Any,
    tmp_path: Path,
) -> None:
    source = make(clips, tmp_path)

    report = upscale_video(up, source, tmp_path / "out.mp4", NONE_MOVED)

    shown = clips.shown(tmp_path / "out.mp4")
    assert shown.numbers == numbers
    assert report.frames == len(numbers)
    assert 0 <= shown.times[0] < 2
    expected = [FRAME * step for step in steps or [1] * (len(numbers) - 1)]
    # where a clock starts again, the new part begins when the longer of sound and picture of the old one ended
    slack = Fraction(1, 10) if source.name == "a.ts" else Fraction(1, 1000)
    assert all(abs(step - right) <= slack for step, right in zip(shown.steps, expected, strict=True))
    assert sum(step == right for step, right in zip(shown.steps, expected, strict=True)) >= len(expected) - 1


def test_sound_stays_with_the_picture_where_the_clock_starts_again(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    source = _joined(clips, tmp_path)

    upscale_video(up, source, tmp_path / "out.mkv", NONE_MOVED)

    shown = clips.shown(tmp_path / "out.mkv")
    with av.open(str(tmp_path / "out.mkv")) as file:
        sound = [packet.pts * packet.time_base for packet in file.demux(audio=0) if packet.size]
    with av.open(str(tmp_path / "0.ts")) as part:
        offset = part.streams.video[0].start_time * part.streams.video[0].time_base
        offset -= part.streams.audio[0].start_time * part.streams.audio[0].time_base
    steps = [later - earlier for earlier, later in itertools.pairwise(sound)]
    gap = max(range(len(steps)), key=lambda place: steps[place])
    # both parts began with the same distance between sound and picture
    assert abs((shown.times[20] - sound[gap + 1]) - (shown.times[0] - sound[0])) < Fraction(1, 100)
    assert abs(shown.times[0] - sound[0] - offset) < Fraction(1, 100)
    assert all(step > 0 for step in steps)


def test_times_of_presentation_are_kept_where_no_frame_is_reordered(clips: Any, tmp_path: Path) -> None:
    """MPEG-2 is decoded one frame earlier than shown; its sound belongs to the time when it is shown."""
    source = clips.make(tmp_path / "a.mpg", codec="mpeg2video", sound=True)

    assert Fraction(survey_video(source).times[0], 90_000) == clips.shown(source).times[0]


def test_packets_shorter_than_a_millisecond_do_not_delay_the_sound(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """Such as those of TrueHD: several have one time in Matroska."""
    video = clips.make(tmp_path / "v.mkv", options={"crf": "10", "bf": "0"})
    with av.open(str(video)) as film, av.open(str(tmp_path / "a.mkv"), "w") as made:
        picture = made.add_stream_from_template(film.streams[0])
        sound = made.add_stream("pcm_s16le", rate=48000, layout="mono")
        packets = [packet for packet in film.demux() if packet.size]
        for packet in packets:
            packet.dts, packet.stream = packet.pts, picture
        for start in range(0, 19200, 40):
            frame = av.AudioFrame.from_ndarray(np.full((1, 40), start, np.int16), format="s16", layout="mono")
            frame.sample_rate, frame.pts = 48000, start
            packets += sound.encode(frame)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            made.mux(packet)

    def times(path: Path) -> list[float]:
        with av.open(str(path)) as file:
            return [float(packet.pts * packet.time_base) for packet in file.demux(audio=0) if packet.size]

    for name in ("out.mkv", "out.mov"):
        upscale_video(up, tmp_path / "a.mkv", tmp_path / name)
        with av.open(str(tmp_path / name)) as file:
            last = list(file.decode(audio=0))[-1]
        assert float(last.pts * last.time_base) + last.samples / 48000 == pytest.approx(0.4, abs=1e-3)
    assert len(times(tmp_path / "a.mkv")) == 480
    assert times(tmp_path / "out.mkv") == pytest.approx(times(tmp_path / "a.mkv"), abs=1e-3)


def test_stated_rate_that_the_times_contradict_is_not_taken(clips: Any, tmp_path: Path) -> None:
    """DV states 60000 frames per second; time codes cannot be written at such a rate."""
    source = clips.make(
        tmp_path / "a.dv", range(4), codec="dvvideo", pix_fmt="yuv411p", time_base=Fraction(1001, 30000),
        rate=Fraction(30000, 1001), form="dv", size=(720, 480),
    )  # fmt: skip

    reader = VideoReader(source, progressive=True)
    reader.close()

    assert reader.info.frame_rate == Fraction(30000, 1001)


def test_stream_that_players_show_is_taken(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """Not always the first one: files flag it."""
    flags = av.stream.Disposition

    def prepare(file: Any, streams: list[Any]) -> None:
        streams[0].disposition, streams[1].disposition = flags(0), flags.default

    one, two = clips.make(tmp_path / "1.mp4"), clips.make(tmp_path / "2.mp4", range(10, 20))
    source = clips.remux([one, two], tmp_path / "a.mkv", prepare=prepare)

    report = upscale_video(up, source, tmp_path / "out.mkv")

    assert clips.shown(tmp_path / "out.mkv").numbers == list(range(10, 20))
    assert "not kept: the other video stream" in report.notes


def _edited(clips: Any, folder: Path, edit: Callable[[Any, int], None]) -> Path:
    """Copy a clip with sound; `edit` gets each packet and its place in its stream."""
    whole = clips.make(folder / "whole.mkv", sound=True, options={"crf": "10", "bf": "0"})
    with av.open(str(whole)) as source, av.open(str(folder / "a.mkv"), "w") as made:
        streams = [made.add_stream_from_template(stream) for stream in source.streams]
        places = [0] * len(streams)
        for packet in source.demux():
            if packet.size:
                index = packet.stream.index
                edit(packet, places[index])
                places[index] += 1
                packet.stream = streams[index]
                made.mux(packet)
    return folder / "a.mkv"


@pytest.mark.parametrize("output", ["out.mkv", "out.mp4"])
def test_sound_that_starts_later_does_so_in_the_output(output: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
    def later(packet: Any, place: int) -> None:
        packet.pts += 300 if packet.stream.type == "video" else 700
        packet.dts = packet.pts

    source = _edited(clips, tmp_path, later)

    upscale_video(up, source, tmp_path / output)

    starts = []
    for path in (source, tmp_path / output):
        with av.open(str(path)) as file:
            first = {packet.stream.type: packet for packet in reversed(list(file.demux())) if packet.size}
            starts.append({kind: float(packet.pts * packet.time_base) for kind, packet in first.items()})
    assert starts[1] == pytest.approx(starts[0], abs=1e-3)
    assert starts[0]["audio"] - starts[0]["video"] > 0.35


@pytest.mark.parametrize("output", ["out.mkv", "out.mp4"])
def test_repeated_timestamps_of_sound_and_picture_do_not_end_the_run(
    output: str, up: Upscaler, clips: Any, tmp_path: Path
) -> None:
    """Web remuxes with a coarse clock; MP4 takes growing times only."""

    def repeat(packet: Any, place: int) -> None:
        if packet.stream.type == "audio" and place == 5:
            packet.pts = packet.dts = packet.pts - 24
        if packet.stream.type == "video" and place == 3:
            packet.pts = packet.dts = 80

    source = _edited(clips, tmp_path, repeat)

    upscale_video(up, source, tmp_path / output)

    shown = clips.shown(tmp_path / output)
    assert shown.numbers == list(range(10))
    assert shown.times == [Fraction(ms, 1000) for ms in (0, 40, 80, 81, 160, 200, 240, 280, 320, 360)]
    with av.open(str(source)) as one, av.open(str(tmp_path / output)) as other:
        sounds = [[bytes(p) for p in file.demux(audio=0) if p.size] for file in (one, other)]
    assert sounds[0] == sounds[1]


def test_clock_that_goes_on_is_not_corrected(clips: Any, tmp_path: Path) -> None:
    """A pause in a file whose format has a continuous clock is a pause."""
    source = clips.make(tmp_path / "a.mkv", range(3), pts=[0, 1, 1000])

    survey = survey_video(source)

    assert survey.clock_jumps == 0
    assert list(survey.times) == [0, 40, 40_000]


@pytest.mark.parametrize("name", ["pts", "dts"])
def test_one_damaged_timestamp_of_a_broadcast_is_no_jump(name: str, clips: Any, tmp_path: Path) -> None:
    source = clips.make(tmp_path / "a.ts", form="mpegts", options=REORDERED)
    container, video = open_video(source)
    with container:
        whole, damaged = PacketClock.of(container, video), PacketClock.of(container, video)
        for place, packet in enumerate(packet for packet in container.demux(video) if packet.size):
            stated = packet.pts, packet.dts
            whole.correct(packet)
            right = packet.pts, packet.dts
            packet.pts, packet.dts = stated
            if place == 5:
                setattr(packet, name, 2**33 - 90_000)
            damaged.correct(packet)
            assert max(abs(one - other) for one, other in zip((packet.pts, packet.dts), right, strict=True)) <= 3 * 3600

    assert damaged.jumps == 0


def test_rate_that_is_not_stated_is_measured(clips: Any, tmp_path: Path) -> None:
    """Recordings of browsers; FFmpeg's guess is the greatest rate that divides all times."""
    whole = clips.make(
        tmp_path / "whole.webm",
        range(7),
        codec="libvpx",
        pts=[0, 33, 67, 101, 134, 167, 201],
        time_base=Fraction(1, 1000),
    )
    source = clips.remux([whole], tmp_path / "a.webm", container={"live": "1"})

    reader = VideoReader(source)
    reader.close()

    assert float(reader.info.frame_rate) == pytest.approx(6 / 0.201, rel=1e-3)


def test_sound_that_a_further_edit_hides_stays_hidden(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    source = _with_two_edits(clips, tmp_path)

    upscale_video(up, source, tmp_path / "out.mp4")

    with av.open(str(source)) as file:
        shown = [bytes(packet) for packet in file.demux(audio=0) if packet.size and not packet.is_discard]
    with av.open(str(tmp_path / "out.mp4")) as file:
        packets = [packet for packet in file.demux(audio=0) if packet.size]
    assert [bytes(packet) for packet in packets][-len(shown) :] == shown
    assert float(packets[-1].pts * packets[-1].time_base) == pytest.approx(0.8, abs=0.05)
    assert all(packet.pts < 0 for packet in packets[: -len(shown)])


def test_pause_of_days_is_kept(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """Three frames in a month are a rate below what a fraction of small numbers states."""
    source = clips.make(tmp_path / "a.mkv", range(3), pts=[0, 1, 25 * 86_400 * 25], options={"crf": "10", "bf": "0"})

    upscale_video(up, source, tmp_path / "out.mkv")

    assert clips.shown(tmp_path / "out.mkv").times == [0, FRAME, 25 * 86_400]


def test_picture_of_an_avi_starts_when_its_decoder_gives_it_back(up: Upscaler, clips: Any, tmp_path: Path) -> None:
    """Two B-frames: players show each frame two places later than its packet, and the sound was laid to that."""
    source = clips.make(tmp_path / "a.avi", options=REORDERED, sound=True)

    upscale_video(up, source, tmp_path / "out.mkv")

    with av.open(str(source)) as file:
        first = next(file.decode(video=0))
        late = first.dts * first.time_base
    with av.open(str(source)) as file:
        late -= next(packet.pts * packet.time_base for packet in file.demux(audio=0))
    with av.open(str(tmp_path / "out.mkv")) as file:
        sound = next(packet.pts * packet.time_base for packet in file.demux(audio=0))
    assert clips.shown(tmp_path / "out.mkv").times[0] - sound == pytest.approx(late, abs=1e-3)
    assert late >= 2 * FRAME


class TestTimesOfTheContainer:
    """Matroska counts milliseconds."""

    def test_two_frames_within_a_tick_are_moved_by_one(self, up: Upscaler, clips: Any, tmp_path: Path) -> None:
        base = Fraction(1, 90_000)
        source = clips.make(tmp_path / "a.mp4", range(4), pts=[0, 30, 3600, 7200], time_base=base)

        upscale_video(up, source, tmp_path / "out.mkv")
        upscale_video(up, source, tmp_path / "out.mov")

        assert clips.shown(tmp_path / "out.mkv").times == [0, Fraction(1, 1000), FRAME, 2 * FRAME]
        assert clips.shown(tmp_path / "out.mkv").numbers == [0, 1, 2, 3]
        assert clips.shown(tmp_path / "out.mov").times == [0, Fraction(30, 90_000), FRAME, 2 * FRAME]

    def test_faster_frames_are_refused_before_the_first_is_computed(
        self, up: Upscaler, clips: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = clips.make(tmp_path / "a.mp4", pts=range(10), time_base=Fraction(1, 4000))
        monkeypatch.setattr(Upscaler, "upscale", _must_not_run)

        with pytest.raises(UsageError, match=r"steps of 1 ms.*expected an output ending in .mp4 or .m4v or .mov"):
            upscale_video(up, source, tmp_path / "out.mkv")

        monkeypatch.undo()
        upscale_video(up, source, tmp_path / "out.mp4")
        assert clips.shown(tmp_path / "out.mp4").steps == [Fraction(1, 4000)] * 9


def _must_not_run(*args: object, **kwargs: object) -> None:
    raise AssertionError("a frame was computed")


def test_broadcast_with_lost_packets_is_read_as_players_do_and_says_so(
    up: Upscaler, clips: Any, tmp_path: Path
) -> None:
    options = {"crf": "1", "bf": "2", "g": "10", "sc_threshold": "0"}
    data = bytearray(clips.make(tmp_path / "whole.ts", range(40), form="mpegts", options=options).read_bytes())
    middle = len(data) // 2 // 188 * 188
    del data[middle : middle + 4 * 188]
    (tmp_path / "a.ts").write_bytes(data)

    report = upscale_video(up, tmp_path / "a.ts", tmp_path / "out.mkv")

    numbers = clips.shown(tmp_path / "out.mkv").numbers
    assert numbers == clips.shown(tmp_path / "a.ts").numbers
    assert 35 < len(numbers) < 40
    assert any("of the input is damaged" in note or "of the input are damaged" in note for note in report.notes)


@pytest.mark.parametrize("kept", [20, 60])
def test_matroska_that_cannot_be_read_to_its_stated_end_says_so(
    up: Upscaler, clips: Any, tmp_path: Path, kept: int
) -> None:
    """A download that stopped, in a file that was laid out in full size before: no byte is missing."""
    data = bytearray(clips.make(tmp_path / "whole.mkv", range(60), options={"crf": "1", "g": "10"}).read_bytes())
    with av.open(str(tmp_path / "whole.mkv")) as file:
        places = [packet.pos for packet in file.demux(video=0) if packet.size]
    for at in places[kept : kept + 1]:
        data[at:] = bytes(len(data) - at)
    (tmp_path / "a.mkv").write_bytes(data)

    report = upscale_video(up, tmp_path / "a.mkv", tmp_path / "out.mkv")

    assert clips.shown(tmp_path / "out.mkv").numbers == list(range(kept))
    assert any("earlier than it states" in note for note in report.notes) == (kept < 60)


def _overwritten(path: Path, start: int, count: int) -> None:
    data = bytearray(path.read_bytes())
    data[start : start + count] = np.random.default_rng(0).integers(0, 256, count, np.uint8).tobytes()
    path.write_bytes(data)


class TestUnreadableBytes:
    """Bytes amid a file that readers skip without an error: frames are missing, and a line says so."""

    PLAIN: ClassVar = {"crf": "1", "g": "10", "bf": "0", "sc_threshold": "0"}
    CONTAINERS: ClassVar = {
        "a.mkv": {"cluster_time_limit": "400"}, "a.ts": {}, "a.mp4": {"movflags": "empty_moov+frag_keyframe"},
    }  # fmt: skip

    def _clip(self, clips: Any, path: Path, **changes: Any) -> Path:
        made: Path = clips.make(path, range(60), options=self.PLAIN, container=self.CONTAINERS[path.name], **changes)
        return made

    @pytest.mark.parametrize("name", CONTAINERS)
    def test_counted(self, name: str, up: Upscaler, clips: Any, tmp_path: Path) -> None:
        source = self._clip(clips, tmp_path / name)
        data = source.read_bytes()
        starts = {
            "a.mkv": data.find(b"\x1f\x43\xb6\x75", len(data) // 2), "a.ts": 188 * 40,
            "a.mp4": data.find(b"moof", len(data) // 3) - 4,
        }  # fmt: skip
        _overwritten(source, starts[name], 8 if name == "a.mp4" else 188 * 5)

        report = upscale_video(up, source, tmp_path / "out.mkv")

        (line,) = (note for note in report.notes if "bytes of the input cannot be read" in note)
        assert int(line.split()[0].replace(",", "")) >= (800 if name == "a.mkv" else 188 * 5)
        numbers = clips.shown(tmp_path / "out.mkv").numbers
        assert numbers == clips.shown(source).numbers
        assert 5 < len(numbers) < 60

    @pytest.mark.parametrize("name", [*CONTAINERS, "live.mkv", "live twice.mkv", "padded.ts", "tail.mkv", "tail.mp4"])
    def test_none_in_a_whole_file(self, name: str, clips: Any, tmp_path: Path) -> None:
        live = {"container": {"live": "1"}} if name.startswith("live") else {}
        source = clips.make(tmp_path / name, range(60), options=self.PLAIN, **live)
        data = source.read_bytes()
        if name.startswith("tail"):
            source.write_bytes(data + bytes(777))
        if name == "live twice.mkv":
            source.write_bytes(data + data)
        if name == "padded.ts":  # as on Blu-ray: four bytes of a clock before each packet
            source.write_bytes(b"".join(b"\0\0\0\1" + data[at : at + 188] for at in range(0, len(data), 188)))

        assert survey_video(source).unreadable_bytes == 0


def _cut_off(path: Path, part: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    return path


@pytest.mark.parametrize(
    ("name", "container"),
    [("a.mp4", {"movflags": "faststart"}), ("b.mp4", {}), ("a.mkv", {}), ("a.avi", {}), ("a.mov", {})],
    ids=["mp4 with its index in front", "mp4", "mkv", "avi", "mov"],
)
def test_missing_bytes_are_noticed_before_the_first_frame_is_computed(
    name: str, container: dict[str, str], up: Upscaler, clips: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = clips.make(tmp_path / name, range(20), container=container)
    survey_video(whole)  # not refused
    monkeypatch.setattr(Upscaler, "upscale", _must_not_run)

    with pytest.raises(InputError, match="is truncated: "):
        upscale_video(up, _cut_off(whole, 0.8), tmp_path / "out.mkv")

    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("name", "container"),
    [("a.mkv", {"live": "1"}), ("a.mp4", {"movflags": "frag_keyframe+empty_moov"}), ("a.ts", {})],
    ids=["live mkv", "fragmented mp4", "transport stream"],
)
def test_formats_without_a_stated_end_are_read_to_their_end(
    name: str, container: dict[str, str], clips: Any, tmp_path: Path
) -> None:
    source = clips.make(tmp_path / name, container=container)

    reader = VideoReader(source)
    frames = [frame.pts for frame in reader.frames()]
    reader.close()

    assert len(frames) == 10
    assert reader.survey.packets == 10
