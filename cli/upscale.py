"""srdeploy upscale: images, folders and videos through an engine, an ONNX file or a bundle."""

import contextlib
import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from srdeploy.cli.console import RichProgress, emit_json, next_command, warning_line
from srdeploy.cli.options import (
    ANY_PATH,
    BYTES,
    DEVICE,
    FORCE,
    JSON,
    OUTPUT_PATH,
    POSITIVE,
    THREADS,
    EnumChoice,
    argument,
    arguments,
    example,
    option,
    verb,
)
from srdeploy.cli.upscale_status import show_status
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.precision import Precision

if TYPE_CHECKING:
    from srdeploy.upscale.folders import FolderReport
    from srdeploy.upscale.upscaler import Upscaler

EXAMPLE = example(
    """
srdeploy upscale rcan_x4.srd photo.png -o photo_x4.png
srdeploy upscale model.int8.onnx photos/ -o photos_x4/ --engine openvino
srdeploy upscale rcan_x2.srd clip.mp4 -o clip_x2.mp4 --quality 16
srdeploy upscale rcan_x4.srd photos/ -o photos_x4/ --shard 0/8
srdeploy upscale --status photos_x4/
"""
)


@arguments
class UpscaleOptions:
    """What `srdeploy upscale` is given."""

    model: Path | None = argument(type=ANY_PATH, default=None)
    source: Path | None = argument(type=ANY_PATH, default=None)
    engine: str | None = option(
        "--engine",
        default=None,
        help="Engine family: for an ONNX file (default onnxruntime), or to choose from a bundle.",
    )
    precision: Precision | None = option(
        "--precision",
        type=EnumChoice(list(Precision)),
        default=None,
        help="Take only engines of this precision from a bundle.",
    )
    device: str = option(
        "--device", default="auto", show_default=True, help=f"{DEVICE} For folders also several: cuda:0,cuda:1."
    )
    threads: int | None = option("--threads", type=POSITIVE, default=None, help=THREADS)
    memory: int | None = option(
        "--memory",
        type=BYTES,
        default=None,
        help="Memory that a run may take, such as 1.5GiB; default: half of what is free.",
    )
    tiles: Literal["auto", "whole", "overlapped", "exact"] = option(
        "--tiles",
        type=click.Choice(["auto", "whole", "overlapped", "exact"]),
        default="auto",
        show_default=True,
        help="auto: the whole image if it fits, else tiles. exact: tiles that equal the whole image.",
    )
    tile: int | None = option(
        "--tile", type=POSITIVE, default=None, metavar="PIXELS", help="Side of the tiles; default: what fits."
    )
    overlap: int | None = option(
        "--overlap",
        type=click.IntRange(min=0),
        default=None,
        metavar="PIXELS",
        help="Overlap on each side of a seam.",
    )
    batch: int | None = option("--batch", type=POSITIVE, default=None, help="Tiles per run.")
    fallback: Path | None = option(
        "--fallback", type=ANY_PATH, default=None, help="FP32 ONNX file for tiles that the engine fails on."
    )
    alpha: Literal["spread", "separate"] = option(
        "--alpha",
        type=click.Choice(["spread", "separate"]),
        default="spread",
        show_default=True,
        help="Colors of transparent pixels: spread visible ones over them, or keep them (alpha is a separate picture).",
    )
    as_float: bool = option("--float", default=False, help="Write 32-bit floating-point TIFF, not clamped.")
    suffix: str | None = option(
        "--format", default=None, help="For folders: png, jpg, webp or tif; default: as each input."
    )
    quality: int | None = option(
        "--quality",
        type=click.IntRange(0, 100),
        default=None,
        help="JPEG and WebP: 1 to 100. Video: the codec's CRF, lower is better.",
    )
    codec: str | None = option(
        "--codec", default=None, help="Video codec: libx264 (default), libx265, libsvtav1, libvpx-vp9, ffv1, ..."
    )
    progressive: bool = option(
        "--progressive", default=False, help="Videos: take frames that are marked as interlaced for whole ones."
    )
    shard: str | None = option(
        "--shard",
        default=None,
        metavar="I/N",
        help="Upscale part I (from 0) of N of a folder; run each part anywhere that shares the two folders.",
    )
    mixed_engines: bool = option(
        "--mixed-engines",
        default=False,
        help="Allow several devices to run different engines or precisions of a bundle.",
    )
    output: Path | None = option(
        "-o", "--output", type=OUTPUT_PATH, default=None, help="Output file; a folder when SOURCE is one."
    )
    status: Path | None = option(
        "--status",
        type=ANY_PATH,
        default=None,
        metavar="OUT",
        help="Show what is done, failed and left of an output folder, and exit.",
    )
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)


@verb(UpscaleOptions, epilog=EXAMPLE)
def command(options: UpscaleOptions) -> None:
    """Upscale SOURCE (an image, a folder of images or a video) with MODEL (an engine, ONNX file or bundle).

    Sizes that do not fit the memory or the engine run in tiles. A tile that comes out as NaN, infinity or one color
    is run again in FP32 where the bundle (or --fallback) has it; else the command ends with exit code 6, no output.
    """
    if options.status is not None:
        show_status(options.status, as_json=options.as_json)
        return
    from srdeploy.upscale.folders import upscale_folder
    from srdeploy.upscale.scale.shards import parse_shard
    from srdeploy.upscale.single_image import OutputOptions, refuse_same

    model, source, output = _paths(options)
    if not source.exists():
        raise InputError(f"{source} does not exist", expected="an image, a folder of images or a video")
    refuse_same(source, output)
    written = OutputOptions(as_float=options.as_float, quality=options.quality, force=options.force)
    progress = RichProgress()
    kind = _kind(source)
    _refuse(kind, _unfitting(kind, options))
    devices = _devices(options.device)
    shard = None if options.shard is None else parse_shard(options.shard)
    suffix = _suffix(options)
    with contextlib.ExitStack() as opened:
        ups = [opened.enter_context(_open(options, model, device)) for device in devices]
        up, info = ups[0], ups[0].info
        where = ", ".join(each.info.device for each in ups)
        progress.note(f"{info.name} on {where}, {info.numeric_mode}; x{up.contract.scale}, {up.contract.colours}")
        if kind == "a folder of images":
            report = upscale_folder(
                ups,
                source,
                output,
                written,
                suffix=suffix,
                shard=shard,
                mixed_engines=options.mixed_engines,
                progress=progress,
            )
            document = _folder(report, output, progress)
        elif kind == "a video":
            document = _video(up, options, source, output, progress)
        else:
            document = _image(up, source, output, written, progress)
        document = {"model": str(model), "engine": info.name, "versions": dict(info.versions), **document}
    failures = document.pop("failures", None)
    if options.as_json:
        emit_json(document)
    if failures is not None:
        failures.raise_failures()
    if kind == "a folder of images":
        next_command("srdeploy", "upscale", "--status", str(output))
    else:
        next_command("srdeploy", "inspect", str(model))


def _paths(options: UpscaleOptions) -> tuple[Path, Path, Path]:
    """Return model, source and output, which only --status needs not.

    Raises:
        UsageError: one of them is missing.
    """
    given = {"MODEL": options.model, "SOURCE": options.source, "-o": options.output}
    missing = [name for name, value in given.items() if value is None]
    if options.model is None or options.source is None or options.output is None:
        raise UsageError(f"missing {' and '.join(missing)}", expected="srdeploy upscale MODEL SOURCE -o OUTPUT")
    return options.model, options.source, options.output


def _kind(source: Path) -> str:
    if source.is_dir():
        return "a folder of images"
    return "a video" if _is_video(source) else "an image"


def _unfitting(kind: str, options: UpscaleOptions) -> dict[str, Any]:
    """Return the options that do not apply to this kind of input, with their values."""
    of_videos = {"--codec": options.codec, "--progressive": options.progressive}
    of_folders = {"--format": options.suffix, "--shard": options.shard, "--mixed-engines": options.mixed_engines}
    several = {"--device with several names": "," in options.device}
    return {
        "a folder of images": of_videos,
        "a video": {"--float": options.as_float, **of_folders, **several},
        "an image": {**of_videos, **of_folders, **several},
    }[kind]


def _devices(text: str) -> list[str]:
    """Return the names of --device.

    Raises:
        UsageError: several of which one is no GPU, or is named twice.
    """
    names = [name.strip() for name in text.split(",")]
    if len(names) > 1 and (len(set(names)) < len(names) or not all(re.fullmatch(r"cuda:[0-9]+", n) for n in names)):
        raise UsageError(f"--device {text}", expected="one name, or different GPUs such as cuda:0,cuda:1")
    return names


def _refuse(what: str, given: dict[str, Any]) -> None:
    """Refuse options that do not apply: nothing that was requested is dropped silently."""
    for name, value in given.items():
        if value:
            raise UsageError(f"{name} does not apply to {what}", next_step=f"remove {name}")


def _image(up: Any, source: Path, output: Path, written: Any, progress: RichProgress) -> dict[str, Any]:
    from srdeploy.upscale.single_image import upscale_file

    started = time.monotonic()
    report = upscale_file(up, source, output, written, progress=progress)
    seconds = time.monotonic() - started
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


def _folder(report: "FolderReport", output: Path, progress: RichProgress) -> dict[str, Any]:
    """Print what happened to a folder, and return it as JSON values."""
    for name, error in report.failed.items():
        warning_line(f"{name}: {error}")
    repaired: dict[str, int] = {}
    for made in report.made.values():
        for fault, count in made.tally.repaired.items():
            repaired[fault] = repaired.get(fault, 0) + count
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
    return {"output": str(output), **report.to_json(), "failures": report}


def _suffix(options: UpscaleOptions) -> str | None:
    from srdeploy.upscale.image_writer import FORMATS

    if options.suffix is None:
        return ".tif" if options.as_float else None
    suffix = "." + options.suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise UsageError(f"--format {options.suffix}", expected=", ".join(name.lstrip(".") for name in FORMATS))
    return suffix


def _video(up: Any, given: UpscaleOptions, source: Path, output: Path, progress: RichProgress) -> dict[str, Any]:
    from srdeploy.upscale.video.job import VideoOptions, upscale_video

    options = VideoOptions(given.codec, given.quality, force=given.force, progressive=given.progressive)
    report = upscale_video(up, source, output, options, progress=progress)
    _warn_repaired(report.repaired)
    progress.note(
        f"{output}: {report.frames} frames in {report.seconds:.1f} s ({report.frames_per_second:.2f} a second)"
    )
    return {"output": str(output), **report.to_json()}


def _is_video(source: Path) -> bool:
    from srdeploy.upscale.video.probe import is_video

    found: bool = is_video(source)
    return found


def _warn_repaired(repaired: dict[str, int]) -> None:
    for fault, count in repaired.items():
        warning_line(f"{count} tiles came out as {fault} and were run again on the FP32 fallback")


def _open(options: UpscaleOptions, model: Path, device: str) -> "Upscaler":
    from srdeploy.upscale.budget import TileSettings
    from srdeploy.upscale.upscaler import Upscaler

    settings = TileSettings(
        mode=options.tiles,
        side=options.tile,
        overlap=options.overlap,
        batch=options.batch,
        memory_bytes=options.memory,
    )
    return Upscaler.open(
        model,
        settings,
        engine=options.engine,
        precision=options.precision,
        device=device,
        threads=options.threads,
        fallback=options.fallback,
        alpha=options.alpha,
    )
