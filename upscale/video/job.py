"""Upscale a video: decode, compute and encode at the same time, in segments that survive being killed.

Finished segments are in OUTPUT.parts/ with a journal of their content and origin; the same command resumes after them.
At the end they are joined without encoding again, with the audio, subtitles, chapters and metadata of the input, and
the folder is removed. Memory does not grow with the length of the video.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import atomic_file
from srdeploy.core.errors import InputError
from srdeploy.core.progress import SILENT, Progress
from srdeploy.upscale.read_compute_write import Pipeline, no_seconds
from srdeploy.upscale.upscaler import Upscaler
from srdeploy.upscale.video.plan import VideoOptions as VideoOptions
from srdeploy.upscale.video.plan import VideoPlan, check_video_output
from srdeploy.upscale.video.reader import Frame, VideoReader
from srdeploy.upscale.video.segment import OpenSegment, open_segment
from srdeploy.upscale.video.stages import computed, decoded


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
    stage_seconds: dict[str, float] = field(default_factory=no_seconds)
    repaired: Counter[str] = field(default_factory=Counter)
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
            "tiles_run_again": dict(self.repaired),
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
    check_video_output(source, output)
    started = time.monotonic()
    with contextlib.ExitStack() as held:
        with (
            atomic_file(output, force=options.force) as temporary,
            contextlib.closing(VideoReader(source, progressive=options.progressive)) as reader,
        ):
            plan = VideoPlan(reader, output, options, up.contract, up.identity)
            held.callback(plan.close)
            try:
                notes = plan.rehearse(progress)
                report = _VideoJob(up, plan, options).run(progress)
            except BaseException as error:
                plan.keep_or_remove_parts(error, progress)
                raise
            plan.join(temporary, progress)
        plan.parts.remove()
    report.notes = notes
    report.seconds = time.monotonic() - started
    return report


@dataclass
class _VideoJob:
    """Read, compute and write a video."""

    up: Upscaler
    plan: VideoPlan
    options: VideoOptions
    report: VideoReport = field(default_factory=VideoReport)

    def __post_init__(self) -> None:
        info = self.plan.reader.info
        self.parts = self.plan.parts
        self.report.encoding = self.plan.describe_encoding()
        self.report.mode = self.up.decide(info.height, info.width).reason
        self.begun = len(self.parts.segments)
        self.segment: OpenSegment | None = None
        self.finishing: Future[None] | None = None

    def run(self, progress: Progress) -> VideoReport:
        """Compute the missing segments."""
        self.report.resumed = self.parts.frames
        if self.parts.frames:
            progress.note(f"resuming after {self.parts.frames} frames")
        total = self.plan.reader.survey.packets or None
        with progress.task("upscaling frames", total=total) as advance:
            advance(self.parts.frames)
            rate = _Rate(advance)
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="srdeploy-finish") as finisher:
                try:
                    frames = decoded(self.plan.reader.frames(skip=self.parts.frames), self.report.stage_seconds)
                    Pipeline(frames, self._compute, lambda frame: self._write(frame, finisher, rate)).run()
                    self._end_segment(finisher)
                    self._wait_for_finishing()
                finally:
                    if self.segment is not None:
                        self.segment.drop()
        if not self.parts.segments:
            raise InputError(f"{self.plan.reader.path} holds no frame", expected="a video")
        self.report.frames = self.parts.frames
        return self.report

    def _compute(self, frame: Frame) -> Frame:
        return computed(self.up, frame, self.report.stage_seconds, self.report.repaired)

    def _write(self, frame: Frame, finisher: ThreadPoolExecutor, rate: "_Rate") -> None:
        started = time.monotonic()
        if self.segment is None:
            self.segment = self._begin_segment()
        self.segment.write(frame)
        if len(self.segment.pts) == self.options.segment_frames:
            self._end_segment(finisher)
        self.report.stage_seconds["encode"] += time.monotonic() - started
        rate.step()

    def _begin_segment(self) -> OpenSegment:
        plan = self.plan
        segment = open_segment(self.parts.path(self.begun), plan.reader.info, plan.encoding, plan.size)
        self.begun += 1
        return segment

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
