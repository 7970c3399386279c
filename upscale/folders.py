"""Upscale a folder of images to another: recursive and resumable, with a report of what failed.

A journal in the output folder records each picture by content: the hash of the input, the identity of network and
settings, and the hash of the output. A second run skips what is recorded and unchanged. A line is written before an
output is renamed to its final name and another after, so a run killed at any moment leaves neither a half-written
picture nor one of unknown origin. Several processes may work on one folder: each has a file of the journal to itself
(`srdeploy.upscale.scale.folder_journal`), and one that makes a picture again replaces it by the same bytes.
"""

import json
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.artifact import atomic_file, refuse_existing, sha256_of_bytes, sha256_of_file
from srdeploy.core.errors import CapabilityError, InputError, OutputError, SrdeployError
from srdeploy.core.imaging.files import unread_files
from srdeploy.core.imaging.read import Picture, read_image
from srdeploy.core.progress import SILENT, Advance, Progress
from srdeploy.upscale.image_report import ImageReport
from srdeploy.upscale.image_writer import FORMATS, check_quality, write_image
from srdeploy.upscale.read_compute_write import Pipeline, no_seconds
from srdeploy.upscale.scale.folder_journal import FolderJournal, RunFacts
from srdeploy.upscale.scale.shards import Shard
from srdeploy.upscale.scale.targets import Target, find_targets
from srdeploy.upscale.single_image import (
    OutputOptions,
    check_fits,
    is_streamed,
    refuse_same,
    upscale_file,
    upscale_picture,
)
from srdeploy.upscale.upscaler import Upscaler


@dataclass
class FolderReport:
    """Result of upscaling a folder.

    Attributes:
        made: outputs written by this run, with how each was run.
        skipped: sources whose outputs existed already, unchanged.
        failed: sources with their errors.
        unread: number of files that are not read as images, by suffix.
        seconds: wall time.
        stage_seconds: time that decoding, computing and encoding took each, of all devices; they overlap.
        lossless: number of outputs of 8 bits in PNG or lossless WebP, whose encoding is slow.
        workers: processes of a cluster that took part, 0 without one.
    """

    made: dict[str, ImageReport] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, SrdeployError] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=no_seconds)
    lossless: int = 0
    workers: int = 0

    def add(self, other: "FolderReport") -> None:
        """Add what another process did."""
        self.made.update(other.made)
        self.skipped += other.skipped
        self.failed.update(other.failed)
        self.lossless += other.lossless
        for name, seconds in other.stage_seconds.items():
            self.stage_seconds[name] += seconds

    def advice(self) -> str | None:
        """Return one line if encoding limits the speed, and how to encode faster; None otherwise."""
        spent = self.stage_seconds
        if not self.lossless or spent["encode"] <= max(spent["compute"], spent["decode"]):
            return None
        times = spent["encode"] / max(spent["compute"], 1e-9)
        return (
            f"encoding takes {times:.1f} times as long as the network and limits the speed: "
            "--format webp --quality 95 encodes faster, and so does --format jpg for pictures without alpha"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "made": {name: report.to_json() for name, report in self.made.items()},
            "skipped": self.skipped,
            "failed": {name: {"error": str(e), "exit_code": e.exit_code} for name, e in self.failed.items()},
            "unread": self.unread,
            "tiles_run_again": sum(report.tally.fallbacks for report in self.made.values()),
            "seconds": round(self.seconds, 3),
            "stage_seconds": {name: round(value, 3) for name, value in self.stage_seconds.items()},
            **({"workers": self.workers} if self.workers else {}),
            "images_per_second": round(len(self.made) / self.seconds, 3) if self.seconds else None,
        }

    def raise_failures(self) -> None:
        """Raise an error of the type of the first failure, if any; the command ends with its exit code."""
        if not self.failed:
            return
        name, first = next(iter(self.failed.items()))
        total = len(self.failed) + len(self.made) + len(self.skipped)
        raise type(first)(
            f"{len(self.failed)} of {total} images failed, the first of them {name}",
            next_step="the others are done; fix these and run the same command again, it skips finished images",
        ) from first


@dataclass
class _Item:
    """A picture in the pipeline: read, computed, or failed."""

    target: Target
    source: Path
    output: Path
    sha256: str = ""
    picture: Picture | None = None
    pixels: NDArray[Any] | None = None
    report: ImageReport | None = None
    error: SrdeployError | None = None
    journaled: bool = False


def upscale_folder(
    up: Upscaler | Sequence[Upscaler],
    source: Path,
    output: Path,
    options: OutputOptions | None = None,
    *,
    suffix: str | None = None,
    shard: Shard | None = None,
    mixed_engines: bool = False,
    progress: Progress = SILENT,
) -> FolderReport:
    """Upscale every image below a folder into the same tree below another.

    Args:
        up: the network; several of them, on a device each, share the work.
        source: folder of images.
        output: folder for the results, created if missing.
        options: how to write.
        suffix: format of all outputs (".png"); None keeps each input's, or .png if it cannot be written.
        shard: the part of the folder to upscale; None for all.
        mixed_engines: allow networks of several engines or precisions, whose results differ slightly.
        progress: receives the number of images.

    Returns:
        Which images were made, skipped and failed; a failed image does not stop the rest.

    Raises:
        InputError: there is no image.
        UsageError: the output is inside the input, or another run with other settings writes into it now.
        CapabilityError: several networks differ, and that is not allowed.
        OutputError: the disk is full or the folder cannot be written, which stops the run.
    """
    options = options or OutputOptions()
    ups = [up] if isinstance(up, Upscaler) else list(up)
    refuse_same(source, output)
    check_quality(Path("each" + (suffix or ".jpg")), options.quality)
    if not mixed_engines:
        refuse_mixed_engines({each.info.device: each.identity for each in ups})
    targets = find_targets(source, output, suffix, shard)
    report = FolderReport(failed=dict(targets.collisions), unread=unread_files(source))
    started = time.monotonic()
    run = RunFacts(
        key=folder_key(ups[0].identity, options),
        source=str(source.resolve()),
        suffix=suffix,
        total=targets.total,
        pictures=len(targets.items) + len(targets.collisions),
        shard=None if shard is None else str(shard),
        device=",".join(each.info.device for each in ups),
        others=frozenset(folder_key(each.identity, options) for each in ups[1:]),
    )
    with (
        FolderJournal(output, run) as journal,
        progress.task("upscaling images", total=len(targets.items)) as advance,
    ):
        journal.remove_leftovers(target.output for target in targets.items)
        upscale_targets(ups, source, targets.items, options, journal, report, advance)
        for name, error in targets.collisions.items():  # no output is theirs
            journal.failed("", source=name, error=str(error), exit_code=error.exit_code)
    report.seconds = time.monotonic() - started
    report.failed = dict(sorted(report.failed.items()))
    return report


def folder_key(identity: str, options: OutputOptions) -> str:
    """Return the hash of everything but the input that determines an output."""
    return sha256_of_bytes(json.dumps([identity, options.as_float, options.quality]).encode())


def refuse_mixed_engines(identities: dict[str, str]) -> None:
    """Refuse devices that run different engines: the same picture would differ with the device that makes it.

    Args:
        identities: of the opened networks (`Upscaler.identity`), by device.

    Raises:
        CapabilityError: they differ.
    """
    (first, identity), *others = identities.items()
    for device, other in others:
        if other != identity:
            raise CapabilityError(
                f"{first} and {device} run different engines or precisions of this model",
                expected="one engine everywhere, so that results do not depend on the device",
                next_step="choose with --engine and --precision, or pass --mixed-engines",
            )


def upscale_targets(
    ups: Sequence[Upscaler],
    source: Path,
    targets: Iterable[Target],
    options: OutputOptions,
    journal: FolderJournal,
    report: FolderReport,
    advance: Advance,
) -> None:
    """Upscale pictures of a folder, on several devices at once; arguments as for `upscale_folder`.

    Each device takes the next picture when it is ready for one.
    """
    waiting: queue.SimpleQueue[Target] = queue.SimpleQueue()
    for target in targets:
        waiting.put(target)
    lock = threading.Lock()
    jobs = [_FolderJob(up, source, options, journal, report, advance, lock) for up in ups]
    pipelines = [Pipeline(read=job.read(waiting), compute=job.compute, write=job.write, depth=2) for job in jobs]
    if len(pipelines) == 1:
        pipelines[0].run()
        return
    with ThreadPoolExecutor(len(pipelines), thread_name_prefix="srdeploy-device") as threads:
        running = [threads.submit(pipeline.run) for pipeline in pipelines]
        try:
            done, _ = wait(running, return_when=FIRST_EXCEPTION)
            for finished in done:
                finished.result()
        finally:
            for pipeline in pipelines:
                pipeline.stop()


class _FolderJob:
    """The three stages of a folder, on one device."""

    def __init__(
        self,
        up: Upscaler,
        source: Path,
        options: OutputOptions,
        journal: FolderJournal,
        report: FolderReport,
        advance: Advance,
        lock: threading.Lock,
    ) -> None:
        self._up = up
        self._source = source
        self._options = options
        self._journal = journal
        self._report = report
        self._advance = advance
        self._key = folder_key(up.identity, options)
        self._report_lock = lock

    def read(self, waiting: "queue.SimpleQueue[Target]") -> Iterator[_Item]:
        """Decode, one picture ahead of the network; skip finished outputs."""
        while True:
            try:
                target = waiting.get_nowait()
            except queue.Empty:
                return
            item = _Item(target, self._source / target.source, self._journal.folder / target.output)
            started = time.monotonic()
            try:
                item.sha256 = _hash(item.source)
                if self._done(item):
                    self._skip(item)
                    continue
                if item.output.exists() and not self._may_replace(item):
                    self._journal.refresh()  # another writer may be making it
                    if self._done(item):
                        self._skip(item)
                        continue
                refuse_existing(item.output, self._may_replace(item))
                if not is_streamed(item.source, self._up):
                    item.picture = read_image(item.source)
                    check_fits(item.picture, self._up, item.output, self._options)
            except SrdeployError as error:
                item.error = error
            self._spent("decode", started)
            yield item

    def compute(self, item: _Item) -> _Item:
        """Run the network."""
        if item.error is not None:
            return item
        started = time.monotonic()
        try:
            if item.picture is None:
                self._note_start(item)
                options = OutputOptions(self._options.as_float, force=self._may_replace(item))
                item.report = upscale_file(self._up, item.source, item.output, options)
            else:
                item.pixels, item.report = upscale_picture(self._up, item.picture, self._options)
        except OutputError:
            raise
        except SrdeployError as error:
            item.error = error
        self._spent("compute", started)
        return item

    def write(self, item: _Item) -> None:
        """Encode, and record."""
        started = time.monotonic()
        if item.error is None and item.pixels is not None:
            try:
                with atomic_file(item.output, force=self._may_write(item)) as temporary:
                    notes = write_image(temporary, item.pixels, like=item.picture, quality=self._options.quality)
                    if item.report is not None:
                        item.report.notes += notes
                    self._note_start(item)
            except OutputError:
                raise
            except SrdeployError as error:
                item.error = error
        target = item.target
        facts: dict[str, Any] = {"key": self._key, "sha256": item.sha256, "source": target.source}
        if item.error is not None:
            self._report.failed[target.source] = item.error
            self._journal.failed(target.output, **facts, error=str(item.error), exit_code=item.error.exit_code)
        elif item.report is not None:
            self._journal.done(target.output, **facts)
            self._report.made[target.source] = item.report
            with self._report_lock:
                self._report.lossless += self._is_slow_to_encode(item)
        self._spent("encode", started)
        self._advance(note=target.source)

    def _is_slow_to_encode(self, item: _Item) -> bool:
        """Return True for PNG and lossless WebP of 8 bits, which lossy formats could hold too."""
        name = FORMATS.get(item.output.suffix.lower())
        lossless = name == "PNG" or (name == "WEBP" and self._options.quality is None)
        return lossless and item.pixels is not None and item.pixels.dtype == np.uint8

    def _spent(self, stage: str, started: float) -> None:
        with self._report_lock:
            self._report.stage_seconds[stage] += time.monotonic() - started

    def _skip(self, item: _Item) -> None:
        if self._journal.has_failed(item.target.output):  # with other settings; it is not a failure any more
            self._journal.done(item.target.output, key=self._key, sha256=item.sha256, source=item.target.source)
        self._report.skipped.append(item.target.source)
        self._advance()

    def _note_start(self, item: _Item) -> None:
        if not item.journaled:
            self._journal.started(item.target.output, key=self._key, sha256=item.sha256, source=item.target.source)
            item.journaled = True

    def _done(self, item: _Item) -> bool:
        return self._journal.is_done(item.target.output, item.sha256)

    def _may_write(self, item: _Item) -> bool:
        """As `_may_replace`, also if another writer made the same output while this one computed it."""
        if item.output.exists() and not self._may_replace(item):
            self._journal.refresh()
            return self._done(item) or self._may_replace(item)
        return self._may_replace(item)

    def _may_replace(self, item: _Item) -> bool:
        """Return True if an output may be replaced: with `force`, or if a killed run of ours had begun it."""
        return self._options.force or item.journaled or self._journal.was_started(item.target.output)


def _hash(path: Path) -> str:
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
