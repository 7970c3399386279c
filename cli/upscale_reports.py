"""What `srdeploy upscale` prints about a picture, a folder or a video, and its JSON document."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srdeploy.cli.console import RichProgress, warning_line

if TYPE_CHECKING:
    from srdeploy.upscale.folders import FolderReport
    from srdeploy.upscale.image_report import ImageReport
    from srdeploy.upscale.video.job import VideoReport


def image_document(report: "ImageReport", output: Path, seconds: float, progress: RichProgress) -> dict[str, Any]:
    """Print what happened to a picture, and return it as JSON values."""
    progress.note(report.decision.reason)
    _warn_repaired(report.tally.repaired)
    if report.seam_score is not None and not report.decision.exact:
        progress.note(f"seam score {report.seam_score:.3f} (1.0: no seam is visible)")
    if report.fidelity_db is not None:
        progress.note(f"tiles: {report.fidelity_db:.1f} dB between this picture and one more tile across its seams")
    height, width = report.output_size
    for note in report.notes:
        warning_line(note)
    progress.note(f"{output}: {width}x{height} in {seconds:.2f} s")
    return {"output": str(output), "seconds": round(seconds, 3), **report.to_json()}


def folder_document(report: "FolderReport", output: Path, progress: RichProgress) -> dict[str, Any]:
    """Print what happened to a folder, and return it as JSON values."""
    for name, error in report.failed.items():
        warning_line(f"{name}: {error}")
    repaired: Counter[str] = Counter()
    for made in report.made.values():
        repaired.update(made.tally.repaired)
    _warn_repaired(repaired)
    lost = Counter(note for made in report.made.values() for note in made.notes)
    for note, count in lost.items():
        warning_line(f"{count} of {len(report.made)} images: {note}")
    if report.unread:
        kinds = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in report.unread.items())
        progress.note(f"not read, as not named like images: {kinds}")
    progress.note(
        f"{output}: {len(report.made)} made, {len(report.skipped)} existed already, {len(report.failed)} failed "
        f"in {report.seconds:.1f} s"
    )
    if not report.workers and (advice := report.advice()):  # a cluster prints it early
        progress.note(advice)
    return {"output": str(output), **report.to_json(), "failures": report}


def video_document(report: "VideoReport", output: Path, progress: RichProgress) -> dict[str, Any]:
    """Print what happened to a video, and return it as JSON values."""
    _warn_repaired(report.repaired)
    progress.note(
        f"{output}: {report.frames} frames in {report.seconds:.1f} s ({report.frames_per_second:.2f} a second)"
    )
    return {"output": str(output), **report.to_json()}


def _warn_repaired(repaired: dict[str, int]) -> None:
    for fault, count in repaired.items():
        warning_line(f"{count} tiles came out as {fault} and were run again on the FP32 fallback")
