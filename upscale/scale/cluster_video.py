"""Upscale a video on a cluster: the driver hands out segments and joins them."""

import contextlib
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

from srdeploy.core.artifact import atomic_file
from srdeploy.core.errors import InputError
from srdeploy.core.progress import SILENT, Advance, Progress
from srdeploy.upscale.scale.chunks import ATTEMPTS, Lost, Work, dispatch
from srdeploy.upscale.scale.cluster import RayPool, Share
from srdeploy.upscale.scale.segments import SegmentOutcome, VideoJob
from srdeploy.upscale.scale.worker import RemoteError, WorkerOptions
from srdeploy.upscale.video.job import VideoReport
from srdeploy.upscale.video.plan import VideoOptions, VideoPlan, check_video_output
from srdeploy.upscale.video.reader import VideoReader


def upscale_video_on_cluster(
    ray: ModuleType,
    share: Share,
    model: WorkerOptions,
    source: Path,
    output: Path,
    options: VideoOptions,
    *,
    mixed_engines: bool = False,
    progress: Progress = SILENT,
) -> VideoReport:
    """Upscale a video file on the machines of a Ray cluster: the same segments as on one machine, joined once.

    Source and the folder of the output must be visible on all machines under the same path.

    Args:
        ray: the connected module.
        share: resources of each worker.
        model: how a worker opens the network.
        source, output, options, mixed_engines, progress: as for `srdeploy.upscale.video.job.upscale_video`.

    Raises:
        CapabilityError: the cluster lacks something, or its workers run different engines or versions.
        SrdeployError: as `upscale_video`.
    """
    source, output = source.resolve(), output.resolve()
    check_video_output(source, output)
    started = time.monotonic()
    with contextlib.ExitStack() as held:
        with (
            atomic_file(output, force=options.force) as temporary,
            contextlib.closing(VideoReader(source, progressive=options.progressive)) as reader,
        ):
            pool = RayPool(
                ray,
                share,
                replace(model, visible=(source, output.parent)),
                lambda actor, task: actor.run_segment.remote(*task),
                mixed_engines=mixed_engines,
            )
            try:
                first = pool.first()
                plan = VideoPlan(reader, output, options, first.contract, first.identity)
                held.callback(plan.close)
                try:
                    notes = plan.rehearse(progress)
                    driver = _Driver(ray, pool, plan, options)
                    report = driver.run(reader.can_seek(), progress)
                except BaseException as error:
                    plan.keep_or_remove_parts(error, progress)
                    raise
            finally:
                pool.close()
            plan.join(temporary, progress)
        plan.parts.remove()
    report.notes = notes
    report.seconds = time.monotonic() - started
    return report


Task = tuple[object, int, Path]


@dataclass
class _Driver:
    """Hands out segments and collects them."""

    ray: ModuleType
    pool: RayPool
    plan: VideoPlan
    options: VideoOptions
    report: VideoReport = field(default_factory=VideoReport)
    waiting: deque[int] = field(default_factory=deque)
    running: set[int] = field(default_factory=set)
    losses: Counter[int] = field(default_factory=Counter)
    misplaced: bool = False

    def run(self, seek: bool, progress: Progress) -> VideoReport:
        """Make the missing segments.

        Args:
            seek: decode from key frames. If that finds other frames than expected, all is made again from the start.
            progress: receives the number of frames.
        """
        parts = self.plan.parts
        reader = self.plan.reader
        total = math.ceil(reader.survey.packets / self.options.segment_frames)
        self.waiting.extend(number for number in range(total) if number not in parts.finished)
        self.report.resumed = sum(len(segment.pts) for segment in parts.finished.values())
        if self.report.resumed:
            progress.note(f"resuming after {self.report.resumed} frames")
        job = VideoJob(
            source=reader.path,
            survey=reader.survey,
            progressive=self.options.progressive,
            segment_frames=self.options.segment_frames,
            encoding=self.plan.encoding,
            size=self.plan.size,
            seek=seek,
        )
        shared = self.ray.put(job)
        with progress.task("upscaling frames", total=reader.survey.packets) as advance:
            advance(self.report.resumed)
            work: Work[Task, SegmentOutcome | RemoteError] = Work(
                lambda worker: self._next(shared),
                lambda worker, task, outcome: self._take(task[1], outcome, progress, advance),
                lambda: not (self.waiting or self.running),
            )
            dispatch(self.pool, work)
        if self.misplaced:
            progress.note("the frames are not where the file's index says: decoding each segment from the start")
            parts.clear()
            return _Driver(self.ray, self.pool, self.plan, self.options).run(False, progress)
        return self._finished(total)

    def _next(self, shared: object) -> Task | None:
        if not self.waiting:
            return None
        number = self.waiting.popleft()
        self.running.add(number)
        return shared, number, self.plan.parts.path(number)

    def _take(
        self, number: int, outcome: SegmentOutcome | RemoteError | Lost, progress: Progress, advance: Advance
    ) -> None:
        self.running.discard(number)
        if isinstance(outcome, RemoteError):
            raise outcome.error()
        if isinstance(outcome, Lost):
            self.losses[number] += 1
            if self.losses[number] >= ATTEMPTS:
                raise InputError(
                    f"the worker process died each of {ATTEMPTS} times that it upscaled segment {number} of"
                    f" {self.plan.reader.path}",
                    next_step="finished segments are kept; the same command resumes",
                )
            progress.note(f"a worker died with segment {number}, which runs again")
            self.waiting.appendleft(number)
            return
        if not outcome.found:
            self.misplaced = True
            self.waiting.clear()
            return
        for name, seconds in outcome.stage_seconds.items():
            self.report.stage_seconds[name] += seconds
        self.report.repaired.update(outcome.repaired)
        self.report.mode = outcome.mode
        if outcome.segment is not None:
            self.plan.parts.add(outcome.segment)
            advance(len(outcome.segment.pts))

    def _finished(self, total: int) -> VideoReport:
        """Check that only the end of the video may lack frames, as it does on one machine."""
        parts = self.plan.parts
        lengths = [len(parts.finished[number].pts) if number in parts.finished else 0 for number in range(total)]
        short = next((n for n, length in enumerate(lengths) if length < self.options.segment_frames), total)
        if not sum(lengths):
            raise InputError(f"{self.plan.reader.path} holds no frame", expected="a video")
        if any(lengths[short + 1 :]):
            raise InputError(
                f"{self.plan.reader.path} decodes to other frames each time", next_step="upscale it without --ray"
            )
        self.report.frames = parts.frames
        self.report.encoding = self.plan.describe_encoding()
        return self.report
