"""Upscale a folder of images to another: recursive and resumable, with a report of what failed.

A journal in the output folder records each picture by content: the hash of the input, the identity of network and
settings, and the hash of the output. A second run skips what is recorded and unchanged. A line is written before an
output is renamed to its final name and another after, so a run killed at any moment leaves neither a half-written
picture nor one of unknown origin.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from srdeploy.core.artifact import atomic_file, refuse_existing, sha256_of_bytes, sha256_of_file
from srdeploy.core.errors import InputError, OutputError, SrdeployError, UsageError
from srdeploy.core.imaging.read import Picture, find_images, read_image, unread_files
from srdeploy.core.journal import Journal
from srdeploy.core.progress import SILENT, Progress
from srdeploy.upscale.image_report import ImageReport
from srdeploy.upscale.image_writer import FORMATS, check_quality, write_image
from srdeploy.upscale.read_compute_write import Pipeline
from srdeploy.upscale.single_image import (
    OutputOptions,
    check_fits,
    is_streamed,
    refuse_same,
    upscale_file,
    upscale_picture,
)
from srdeploy.upscale.upscaler import Upscaler

JOURNAL = ".srdeploy-upscale.jsonl"


@dataclass
class FolderReport:
    """Result of upscaling a folder.

    Attributes:
        made: outputs written by this run, with how each was run.
        skipped: sources whose outputs existed already, unchanged.
        failed: sources with their errors.
        unread: number of files that are not read as images, by suffix.
        seconds: wall time.
    """

    made: dict[str, ImageReport] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, SrdeployError] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "made": {name: report.to_json() for name, report in self.made.items()},
            "skipped": self.skipped,
            "failed": {name: {"error": str(e), "exit_code": e.exit_code} for name, e in self.failed.items()},
            "unread": self.unread,
            "tiles_run_again": sum(report.tally.fallbacks for report in self.made.values()),
            "seconds": round(self.seconds, 3),
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

    source: Path
    output: Path
    sha256: str
    picture: Picture | None = None
    pixels: NDArray[Any] | None = None
    report: ImageReport | None = None
    error: SrdeployError | None = None
    journaled: bool = False


def upscale_folder(
    up: Upscaler,
    source: Path,
    output: Path,
    options: OutputOptions | None = None,
    *,
    suffix: str | None = None,
    progress: Progress = SILENT,
) -> FolderReport:
    """Upscale every image below a folder into the same tree below another.

    Args:
        up: the network.
        source: folder of images.
        output: folder for the results, created if missing.
        options: how to write.
        suffix: format of all outputs (".png"); None keeps each input's, or .png if it cannot be written.
        progress: receives the number of images.

    Returns:
        Which images were made, skipped and failed; a failed image does not stop the rest.

    Raises:
        InputError: there is no image.
        UsageError: the output is inside the input.
        OutputError: the disk is full or the folder cannot be written, which stops the run.
    """
    options = options or OutputOptions()
    refuse_same(source, output)
    check_quality(Path("each" + (suffix or ".jpg")), options.quality)
    targets, collisions = _targets(source, output, suffix)
    report = FolderReport(failed=collisions, unread=unread_files(source))
    started = time.monotonic()
    with progress.task("upscaling images", total=len(targets)) as advance:
        job = _FolderJob(up, source, options, _Outputs(output), report, advance)
        Pipeline(read=job.read(targets), compute=job.compute, write=job.write, depth=2).run()
    report.seconds = time.monotonic() - started
    report.failed = dict(sorted(report.failed.items()))
    return report


class _Outputs:
    """The latest event about each output, from the journal in the output folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._journal = Journal(folder / JOURNAL)
        self._latest = {entry["output"]: entry for entry in self._journal.entries if "output" in entry}

    def add(self, output: Path, **facts: Any) -> None:
        """Record an event about an output."""
        entry = {"output": self._name(output), **facts}
        self._journal.append(entry)
        self._latest[entry["output"]] = entry

    def of(self, output: Path) -> dict[str, Any]:
        """Return the last event about an output, empty if there is none."""
        return self._latest.get(self._name(output), {})

    def _name(self, output: Path) -> str:
        return output.relative_to(self._folder).as_posix()


class _FolderJob:
    """The three stages of a folder."""

    def __init__(
        self, up: Upscaler, source: Path, options: OutputOptions, journal: _Outputs, report: FolderReport, advance: Any
    ) -> None:
        self._up = up
        self._source = source
        self._options = options
        self._journal = journal
        self._report = report
        self._advance = advance
        self._key = sha256_of_bytes(json.dumps([up.identity, options.as_float, options.quality]).encode())

    def read(self, targets: dict[Path, Path]) -> Iterator[_Item]:
        """Decode, one picture ahead of the network; skip finished outputs."""
        for source, output in targets.items():
            item = _Item(source, output, "")
            try:
                item.sha256 = _hash(source)
                if self._done(item):
                    self._report.skipped.append(self._name(item))
                    self._advance()
                    continue
                refuse_existing(output, self._may_replace(item))
                if not is_streamed(source, self._up):
                    item.picture = read_image(source)
                    check_fits(item.picture, self._up, output, self._options)
            except SrdeployError as error:
                item.error = error
            yield item

    def compute(self, item: _Item) -> _Item:
        """Run the network."""
        if item.error is not None:
            return item
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
        return item

    def write(self, item: _Item) -> None:
        """Encode, and record."""
        if item.error is None and item.pixels is not None:
            try:
                replace = self._may_replace(item)
                with atomic_file(item.output, force=replace) as temporary:
                    notes = write_image(temporary, item.pixels, like=item.picture, quality=self._options.quality)
                    if item.report is not None:
                        item.report.notes += notes
                    self._note_start(item)
            except OutputError:
                raise
            except SrdeployError as error:
                item.error = error
        name = self._name(item)
        if item.error is not None:
            self._report.failed[name] = item.error
        elif item.report is not None:
            self._journal.add(
                item.output, state="done", key=self._key, sha256=item.sha256, result=sha256_of_file(item.output)
            )
            self._report.made[name] = item.report
        self._advance(note=name)

    def _note_start(self, item: _Item) -> None:
        if not item.journaled:
            self._journal.add(item.output, state="started", key=self._key, sha256=item.sha256)
            item.journaled = True

    def _done(self, item: _Item) -> bool:
        entry = self._journal.of(item.output)
        same = (entry.get("state"), entry.get("key"), entry.get("sha256")) == ("done", self._key, item.sha256)
        return same and item.output.is_file() and sha256_of_file(item.output) == entry.get("result")

    def _may_replace(self, item: _Item) -> bool:
        """Return True if an output may be replaced: with `force`, or if a killed run of ours had begun it."""
        return self._options.force or item.journaled or self._journal.of(item.output).get("state") == "started"

    def _name(self, item: _Item) -> str:
        return item.source.relative_to(self._source).as_posix()


def _targets(source: Path, output: Path, suffix: str | None) -> tuple[dict[Path, Path], dict[str, SrdeployError]]:
    """Return the output of each image, and an error for each image whose output another one already has.

    A suffix that can be written is kept as it is, also `P.JPG` next to `P.jpg`.
    """
    targets: dict[Path, Path] = {}
    origins: dict[Path, Path] = {}
    collisions: dict[str, SrdeployError] = {}
    for path in find_images(source):
        kept = path.suffix if path.suffix.lower() in FORMATS else ".png"
        target = output / path.relative_to(source).with_suffix(suffix or kept)
        if target in origins:
            collisions[path.relative_to(source).as_posix()] = UsageError(
                f"{path} and {origins[target]} would both become {target}", next_step="rename one of them"
            )
            continue
        origins[target] = path
        targets[path] = target
    return targets, collisions


def _hash(path: Path) -> str:
    try:
        return sha256_of_file(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
