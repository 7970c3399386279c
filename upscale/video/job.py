"""Upscale a video: decode, compute and encode at the same time, in segments that survive being killed.

Finished segments are in OUTPUT.parts/ with a journal of their content and origin; the same command resumes after them.
At the end they are joined without encoding again, with the audio, subtitles, chapters and metadata of the input, and
the folder is removed. Memory does not grow with the length of the video.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from srdeploy.core.artifact import atomic_file, sha256_of_bytes, sha256_of_file
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.progress import SILENT, Progress
from srdeploy.upscale.read_compute_write import Pipeline
from srdeploy.upscale.single_image import refuse_folder, refuse_same
from srdeploy.upscale.upscaler import Upscaler
from srdeploy.upscale.video.encoding import Encoding, choose_encoding
from srdeploy.upscale.video.media import CONTAINERS
from srdeploy.upscale.video.mux import CannotHoldError, join_segments, lost_streams
from srdeploy.upscale.video.parts import Parts, Segment, adopt_parts
from srdeploy.upscale.video.reader import Frame, VideoReader
from srdeploy.upscale.video.rehearsal import rehearse
from srdeploy.upscale.video.survey import Survey
from srdeploy.upscale.video.writer import VideoWriter

SEGMENT_FRAMES = 120
"""Frames per segment: the work that a kill can lose, and the maximum distance between key frames."""


@dataclass(frozen=True)
class VideoOptions:
    """Options of the output.

    Attributes:
        codec: FFmpeg's name of the encoder; None for libx264, libvpx-vp9 in .webm.
        quality: the codec's CRF, lower is better; None for a transparent one.
        force: replace an existing output.
        progressive: take frames that are marked as interlaced for whole ones.
        segment_frames: frames per segment.
    """

    codec: str | None = None
    quality: int | None = None
    force: bool = False
    progressive: bool = False
    segment_frames: int = SEGMENT_FRAMES


@dataclass
class VideoReport:
    """Result of upscaling a video.

    Attributes:
        frames: in the output.
        resumed: of these, frames made by an earlier run.
        seconds: wall time of this run.
        stage_seconds: time that decoding, computing and encoding took each; they overlap.
        repaired: tiles run again on the fallback, by fault.
        mode: tiles or whole, and why.
        encoding: codec, stored format, options.
        notes: what differs from the input, one line each.
    """

    frames: int = 0
    resumed: int = 0
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=lambda: {"decode": 0.0, "compute": 0.0, "encode": 0.0})
    repaired: dict[str, int] = field(default_factory=dict)
    mode: str = ""
    encoding: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def frames_per_second(self) -> float:
        """Frames computed by this run per second of wall time."""
        return (self.frames - self.resumed) / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "frames": self.frames,
            "frames_resumed": self.resumed,
            "seconds": round(self.seconds, 3),
            "frames_per_second": round(self.frames_per_second, 3),
            "stage_seconds": {name: round(value, 3) for name, value in self.stage_seconds.items()},
            "tiles_run_again": self.repaired,
            "mode": self.mode,
            "encoding": self.encoding,
            "notes": list(self.notes),
        }


def upscale_video(
    up: Upscaler,
    source: Path,
    output: Path,
    options: VideoOptions | None = None,
    *,
    progress: Progress = SILENT,
) -> VideoReport:
    """Upscale a video file; an interrupted run resumes after its last finished segment.

    Args:
        up: the network.
        source: anything FFmpeg's libraries decode; the first video stream is upscaled, audio and subtitles are copied.
        output: .mp4, .mkv, .mov or .webm.
        options: how to write.
        progress: receives the number of frames, with frames per second.

    Raises:
        InputError: damaged, truncated, interlaced, or no video.
        UsageError: the output exists or is the source, or the container or codec cannot hold the result.
        GateError: a frame is broken and no fallback repaired it; nothing is written.
        OutputError: the disk is full or the folder cannot be written; finished segments stay for the next run.
    """
    options = options or VideoOptions()
    refuse_same(source, output)
    refuse_folder(output)
    if output.suffix.lower() not in CONTAINERS:
        raise UsageError(f"video output {output}", expected="a name ending in " + ", ".join(CONTAINERS))
    started = time.monotonic()
    with (
        atomic_file(output, force=options.force) as temporary,
        contextlib.closing(VideoReader(source, progressive=options.progressive)) as reader,
    ):
        job = _VideoJob(up, reader, output, options)
        try:
            job.rehearse(progress)
            report = job.run(progress)
        except BaseException as error:
            if not job.parts.frames:
                job.parts.remove()
            elif isinstance(error, KeyboardInterrupt):
                progress.note(
                    f"{job.parts.frames} frames are kept in {job.parts.folder}; run the same command to resume"
                )
            raise
        with progress.task("joining segments, copying audio and subtitles"):
            _join(job, source, temporary)
    job.parts.remove()
    report.seconds = time.monotonic() - started
    return report


def _join(job: "_VideoJob", source: Path, temporary: Path) -> None:
    try:
        join_segments(job.parts.segments, source, temporary, job.reader.info)
    except CannotHoldError as error:
        raise UsageError(
            f"{job.output.suffix} cannot hold {error}", next_step="write an .mkv; the finished frames are reused"
        ) from error


@dataclass
class _OpenSegment:
    """A segment that is being written."""

    path: Path
    writer: VideoWriter
    file: contextlib.ExitStack
    pts: list[int] = field(default_factory=list)
    last_duration: int = 0

    def write(self, frame: Frame) -> None:
        """Encode one frame."""
        self.writer.write(frame)
        self.pts.append(frame.pts)
        self.last_duration = frame.duration

    def finish(self) -> Segment:
        """Flush the encoder and rename the file to its name; on failure the file is removed."""
        with self.file:
            try:
                self.writer.close()
            except BaseException:
                self._abort()
                raise
        return Segment(self.path, tuple(self.pts), self.last_duration)

    def drop(self) -> None:
        """Discard an unfinished segment."""
        self._abort()
        with contextlib.suppress(_Dropped), self.file:
            raise _Dropped

    def _abort(self) -> None:
        with contextlib.suppress(OSError):  # a full disk was met before, and closing meets it again
            self.writer.abort()


@dataclass
class _VideoJob:
    """Read, compute and write a video."""

    up: Upscaler
    reader: VideoReader
    output: Path
    options: VideoOptions
    parts: Parts = field(init=False)
    report: VideoReport = field(default_factory=VideoReport)

    def __post_init__(self) -> None:
        info, contract = self.reader.info, self.up.contract
        _, _, *size = contract.output_shape((1, contract.channels, info.height, info.width))
        self.size = (size[0], size[1])
        self.encoding = choose_encoding(
            info, self.output, size=self.size, codec=self.options.codec, quality=self.options.quality
        )
        self.report.encoding = {
            "codec": self.encoding.codec,
            "pix_fmt": self.encoding.pix_fmt,
            "options": self.encoding.options,
        }
        self.report.mode = self.up.decide(info.height, info.width).reason
        key = self._key(self.encoding)
        folder, *others = (
            self.output.with_name(f"{self.output.stem}{suffix}.parts") for suffix in (self.output.suffix, *CONTAINERS)
        )
        adopt_parts(folder, others, key)
        self.parts = Parts(folder, key, self.encoding.segment_suffix)
        self.begun = len(self.parts.segments)
        self.segment: _OpenSegment | None = None
        self.finishing: Future[None] | None = None

    def rehearse(self, progress: Progress) -> None:
        """Print what the output will lack, before anything is computed.

        Raises:
            UsageError: see `rehearse`.
        """
        notes = rehearse(self.reader, self.encoding, self.size, self.output, self.parts.folder)
        lost = lost_streams(self.reader.path, self.output)
        self.report.notes = (
            *_notes_about(self.reader.survey),
            *self.encoding.notes,
            *(f"not kept: {name}" for name in lost),
            *notes,
        )
        for line in self.report.notes:
            progress.note(line)

    def run(self, progress: Progress) -> VideoReport:
        """Compute the missing segments."""
        self.report.resumed = self.parts.frames
        if self.parts.frames:
            progress.note(f"resuming after {self.parts.frames} frames")
        total = self.reader.survey.packets or None
        with progress.task("upscaling frames", total=total) as advance:
            advance(self.parts.frames)
            rate = _Rate(advance)
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="srdeploy-finish") as finisher:
                try:
                    Pipeline(self._read(), self._compute, lambda frame: self._write(frame, finisher, rate)).run()
                    self._end_segment(finisher)
                    self._wait_for_finishing()
                finally:
                    if self.segment is not None:
                        self.segment.drop()
        if not self.parts.segments:
            raise InputError(f"{self.reader.path} holds no frame", expected="a video")
        self.report.frames = self.parts.frames
        return self.report

    def _read(self) -> Iterator[Frame]:
        frames = self.reader.frames(skip=self.parts.frames)
        while True:
            started = time.monotonic()
            frame = next(frames, None)
            self.report.stage_seconds["decode"] += time.monotonic() - started
            if frame is None:
                return
            yield frame

    def _compute(self, frame: Frame) -> Frame:
        started = time.monotonic()
        pixels, report = self.up.upscale(frame.pixels)
        for fault, count in report.tally.repaired.items():
            self.report.repaired[fault] = self.report.repaired.get(fault, 0) + count
        self.report.stage_seconds["compute"] += time.monotonic() - started
        return Frame(np.ascontiguousarray(pixels), frame.pts, frame.duration)

    def _write(self, frame: Frame, finisher: ThreadPoolExecutor, rate: "_Rate") -> None:
        started = time.monotonic()
        if self.segment is None:
            self.segment = self._begin_segment()
        self.segment.write(frame)
        if len(self.segment.pts) == self.options.segment_frames:
            self._end_segment(finisher)
        self.report.stage_seconds["encode"] += time.monotonic() - started
        rate.step()

    def _begin_segment(self) -> _OpenSegment:
        path = self.parts.path(self.begun)
        with contextlib.ExitStack() as file:
            temporary = file.enter_context(atomic_file(path, force=True))
            writer = VideoWriter(temporary, self.reader.info, self.encoding, self.size)
            self.begun += 1
            return _OpenSegment(path, writer, file.pop_all())

    def _end_segment(self, finisher: ThreadPoolExecutor) -> None:
        """Finish a segment in parallel to the next one: an encoder delays dozens of frames until it is flushed."""
        self._wait_for_finishing()
        if self.segment is not None:
            segment, self.segment = self.segment, None
            self.finishing = finisher.submit(lambda: self.parts.add(segment.finish()))

    def _wait_for_finishing(self) -> None:
        finishing, self.finishing = self.finishing, None
        if finishing is not None:
            finishing.result()

    def _key(self, encoding: Encoding) -> str:
        parts = [sha256_of_file(self.reader.path), self.up.identity, encoding.codec, encoding.pix_fmt]
        return sha256_of_bytes(json.dumps([*parts, encoding.options, self.options.segment_frames]).encode())


def _notes_about(survey: Survey) -> Iterator[str]:
    if survey.clock_jumps:
        yield f"the clock of the input jumps {survey.clock_jumps} times: the parts follow each other in the output"
    if survey.damaged:
        yield f"{survey.damaged} packets of the input are damaged: frames may be missing there, as in a player"


class _Dropped(Exception):  # noqa: N818 - not an error: it tells atomic_file not to keep the file
    pass


class _Rate:
    """Advances a task by frames and shows frames per second."""

    def __init__(self, advance: Callable[..., None]) -> None:
        self._advance = advance
        self._started = time.monotonic()
        self._frames = 0

    def step(self) -> None:
        self._frames += 1
        seconds = time.monotonic() - self._started
        self._advance(1, f"{self._frames / seconds:.2f} frames/s" if seconds else None)
