"""Upscale a folder of images on a cluster: the driver."""

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

from PIL import Image

from srdeploy.core.errors import InputError
from srdeploy.core.imaging.files import unread_files
from srdeploy.core.imaging.read import image_size
from srdeploy.core.progress import SILENT, Advance, Progress
from srdeploy.upscale.folders import FolderReport, folder_key
from srdeploy.upscale.image_writer import check_quality
from srdeploy.upscale.scale.chunks import ATTEMPTS, Chunk, ChunkPlanner, Lost, Work, dispatch
from srdeploy.upscale.scale.cluster import RayPool, Share
from srdeploy.upscale.scale.folder_journal import FolderJournal, RunFacts
from srdeploy.upscale.scale.shards import Shard
from srdeploy.upscale.scale.targets import Target, Targets, find_targets
from srdeploy.upscale.scale.worker import ChunkOutcome, FolderJob, RemoteError, WorkerOptions
from srdeploy.upscale.single_image import OutputOptions, refuse_same

_UNKNOWN_PIXELS = 1_000_000
"""Pixels of a picture whose header cannot be read; the worker will say why."""
_SAMPLE = 8
_GRACE_SECONDS = 20.0


def upscale_folder_on_cluster(
    ray: ModuleType,
    share: Share,
    model: WorkerOptions,
    source: Path,
    output: Path,
    options: OutputOptions,
    *,
    suffix: str | None = None,
    shard: Shard | None = None,
    mixed_engines: bool = False,
    progress: Progress = SILENT,
) -> FolderReport:
    """Upscale every image below a folder on the machines of a Ray cluster.

    Both folders must be visible on all machines under the same path. A picture whose worker dies is tried three times,
    then listed as failed.

    Args:
        ray: the connected module.
        share: resources of each worker.
        model: how a worker opens the network.
        source, output, options, suffix, shard, mixed_engines, progress: as for `upscale_folder`.

    Raises:
        CapabilityError: the cluster lacks something, or its workers run different engines or versions.
        SrdeployError: as `upscale_folder`.
    """
    source, output = source.resolve(), output.resolve()
    refuse_same(source, output)
    check_quality(Path("each" + (suffix or ".jpg")), options.quality)
    targets = find_targets(source, output, suffix, shard)
    started = time.monotonic()
    run = RunFacts(
        key="", source=str(source), suffix=suffix, total=targets.total, shard=None if shard is None else str(shard)
    )
    report = FolderReport(failed=dict(targets.collisions), unread=unread_files(source))
    with FolderJournal(output, run) as journal:
        journal.remove_leftovers(target.output for target in targets.items)
        driver = _Driver(source, output, options, run, targets, journal, report, progress)
        pool = RayPool(
            ray,
            share,
            replace(model, visible=(source, output)),
            lambda actor, chunk: actor.run_chunk.remote(driver.job, chunk.targets, chunk.attempt),
            mixed_engines=mixed_engines,
        )
        driver.run(pool, mixed_engines)
        if pool.losses:
            journal.wait_for_others(_GRACE_SECONDS)  # workers that are being ended still hold their files
        journal.remove_leftovers(target.output for target in targets.items)
    report.seconds = time.monotonic() - started
    report.failed = dict(sorted(report.failed.items()))
    report.workers = len(driver.used)
    return report


@dataclass
class _Driver:
    """Hands out chunks and collects what becomes of them."""

    source: Path
    output: Path
    options: OutputOptions
    run_facts: RunFacts
    targets: Targets
    journal: FolderJournal
    report: FolderReport
    progress: Progress
    used: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.job = FolderJob(self.source, self.output, self.options, self.run_facts)
        self.planner = ChunkPlanner(self.targets.items, self._pixels)
        self.advice_given = False

    def run(self, pool: RayPool, mixed_engines: bool) -> None:
        """Run all pictures, and end the workers."""
        try:
            first = pool.first()
            self.progress.note(
                f"{first.name} on {first.host} and {len(pool.workers) - 1} more workers now, {first.numeric_mode}; "
                f"x{first.contract.scale}, {first.contract.colours}"
            )
            for name, error in self.targets.collisions.items():
                self.journal.failed("", source=name, error=str(error), exit_code=error.exit_code)
            with self.progress.task("upscaling images", total=len(self.targets.items)) as advance:
                work: Work[Chunk, ChunkOutcome | RemoteError] = Work(
                    lambda worker: self._next(worker, pool, mixed_engines),
                    lambda worker, chunk, outcome: self._take(worker, chunk, outcome, advance),
                    lambda: self.planner.finished,
                )
                dispatch(pool, work)
        finally:
            pool.close()

    def _next(self, worker: int, pool: RayPool, mixed_engines: bool) -> Chunk | None:
        if mixed_engines:
            keys = {folder_key(opened.identity, self.options) for opened in pool.workers.values()}
            self.job = replace(self.job, run=replace(self.run_facts, others=frozenset(keys)))
        return self.planner.next(worker)

    def _take(self, worker: int, chunk: Chunk, outcome: ChunkOutcome | RemoteError | Lost, advance: Advance) -> None:
        if isinstance(outcome, RemoteError):
            raise outcome.error()
        if isinstance(outcome, Lost):
            names = [target.source for target in self.planner.lost(worker, chunk)]
            again = "are listed as failed" if names else "run again, one by one"
            self.progress.note(f"a worker died with {len(chunk.targets)} pictures, which {again}")
            for target in chunk.targets:
                error = InputError(
                    f"the worker process died while it upscaled {target.source} (attempt {chunk.attempt} of {ATTEMPTS})"
                )
                self.journal.failed(target.output, source=target.source, error=str(error), exit_code=error.exit_code)
                if target.source in names:
                    self.report.failed[target.source] = error
                    advance(note=target.source)
            return
        self.used.add(worker)
        self.planner.done(worker, chunk, outcome.seconds)
        self.report.add(outcome.report)
        self.report.failed.update((name, error.error()) for name, error in outcome.failed.items())
        advance(len(chunk.targets), note=chunk.targets[-1].source)
        if not self.advice_given and len(self.report.made) >= min(_SAMPLE, len(self.targets.items)):
            self.advice_given = True
            self._predict(len(self.targets.items) - len(self.report.skipped))

    def _predict(self, pictures: int) -> None:
        """Print how long the rest will take, and what limits it."""
        stages, made = self.report.stage_seconds, len(self.report.made)
        slowest = max(stages, key=lambda name: stages[name])
        each = {name: seconds / made for name, seconds in stages.items()}
        text = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in each.items())
        self.progress.note(f"per picture: {text}; about {each[slowest] * pictures:.0f} s of {slowest} on one worker")
        if advice := self.report.advice():
            self.progress.note(advice)

    def _pixels(self, target: Target) -> int:
        try:
            height, width = image_size(self.source / target.source)
            return height * width
        except (InputError, OSError, Image.DecompressionBombError):
            return _UNKNOWN_PIXELS
