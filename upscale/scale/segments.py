"""Upscale one segment of a video, on any machine."""

import contextlib
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from srdeploy.upscale.read_compute_write import Pipeline, no_seconds
from srdeploy.upscale.upscaler import Upscaler
from srdeploy.upscale.video.encoding import Encoding
from srdeploy.upscale.video.parts import Segment
from srdeploy.upscale.video.reader import Frame, VideoReader
from srdeploy.upscale.video.segment import OpenSegment, open_segment
from srdeploy.upscale.video.stages import computed, decoded
from srdeploy.upscale.video.survey import Survey


@dataclass(frozen=True)
class VideoJob:
    """A video in segments.

    Attributes:
        source: the video.
        survey: what its packets say.
        progressive: see `srdeploy.upscale.video.plan.VideoOptions`.
        segment_frames: frames per segment.
        encoding, size: how segments are written.
        seek: decode from the key frame before a segment; else from the start of the video.
    """

    source: Path
    survey: Survey
    progressive: bool
    segment_frames: int
    encoding: Encoding
    size: tuple[int, int]
    seek: bool


@dataclass(frozen=True)
class SegmentOutcome:
    """Result of a segment.

    Attributes:
        segment: None if it holds no frame, as the video is shorter than its packets say.
        found: whether its frames were where the survey expects them; with False there is no segment.
        stage_seconds, repaired, mode: as in `srdeploy.upscale.video.job.VideoReport`.
    """

    segment: Segment | None = None
    found: bool = True
    stage_seconds: dict[str, float] = field(default_factory=dict)
    repaired: Counter[str] = field(default_factory=Counter)
    mode: str = ""


def upscale_segment(up: Upscaler, job: VideoJob, number: int, path: Path) -> SegmentOutcome:
    """Decode, compute and encode one segment, all three at the same time.

    Args:
        up: the network.
        job: the video.
        number: of the segment.
        path: its file.

    Raises:
        SrdeployError: as `srdeploy.upscale.video.job.upscale_video`.
    """
    with contextlib.closing(VideoReader(job.source, progressive=job.progressive, survey=job.survey)) as reader:
        run = _Run(up, job, reader, path)
        try:
            return run.run(number)
        except LookupError:
            return SegmentOutcome(found=False)
        finally:
            if run.segment is not None:
                run.segment.drop()


@dataclass
class _Run:
    up: Upscaler
    job: VideoJob
    reader: VideoReader
    path: Path
    segment: OpenSegment | None = None
    seconds: dict[str, float] = field(default_factory=no_seconds)
    repaired: Counter[str] = field(default_factory=Counter)

    def run(self, number: int) -> SegmentOutcome:
        info = self.reader.info
        Pipeline(decoded(self._frames(number), self.seconds), self._compute, self._write).run()
        segment, self.segment = self.segment, None
        return SegmentOutcome(
            segment=None if segment is None else segment.finish(),
            stage_seconds=self.seconds,
            repaired=self.repaired,
            mode=self.up.decide(info.height, info.width).reason,
        )

    def _frames(self, number: int) -> Iterator[Frame]:
        start = number * self.job.segment_frames
        stop = start + self.job.segment_frames
        if self.job.seek and start:
            return self.reader.frames_between(start, stop)
        return itertools.islice(self.reader.frames(skip=start), stop - start)

    def _compute(self, frame: Frame) -> Frame:
        return computed(self.up, frame, self.seconds, self.repaired)

    def _write(self, frame: Frame) -> None:
        started = time.monotonic()
        if self.segment is None:
            self.segment = open_segment(self.path, self.reader.info, self.job.encoding, self.job.size)
        self.segment.write(frame)
        self.seconds["encode"] += time.monotonic() - started
