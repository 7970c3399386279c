"""srdeploy upscale: images, folders and videos through an engine, an ONNX file or a bundle."""

import contextlib
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srdeploy.cli.console import RichProgress, emit_json, next_command
from srdeploy.cli.options import example, verb
from srdeploy.cli.upscale_cluster import run_on_cluster
from srdeploy.cli.upscale_options import UpscaleOptions, output_options, tile_settings, video_options
from srdeploy.cli.upscale_reports import folder_document, image_document, video_document
from srdeploy.cli.upscale_status import show_status
from srdeploy.core.errors import InputError, UsageError

if TYPE_CHECKING:
    from srdeploy.upscale.scale.shards import Shard
    from srdeploy.upscale.upscaler import Upscaler

FOLDER = "a folder of images"
EXAMPLE = example(
    """
srdeploy upscale rcan_x4.srd photo.png -o photo_x4.png
srdeploy upscale model.int8.onnx photos/ -o photos_x4/ --engine openvino
srdeploy upscale rcan_x2.srd clip.mp4 -o clip_x2.mp4 --quality 16
srdeploy upscale rcan_x4.srd photos/ -o photos_x4/ --shard 0/8
srdeploy upscale --status photos_x4/
"""
)


@verb(UpscaleOptions, epilog=EXAMPLE)
def command(options: UpscaleOptions) -> None:
    """Upscale SOURCE (an image, a folder of images or a video) with MODEL (an engine, ONNX file or bundle).

    Sizes that do not fit the memory or the engine run in tiles. A tile that comes out as NaN, infinity or one color
    is run again in FP32 where the bundle (or --fallback) has it; else the command ends with exit code 6, no output.
    """
    if options.status is not None:
        show_status(options.status, as_json=options.as_json)
        return
    from srdeploy.upscale.scale.shards import parse_shard
    from srdeploy.upscale.single_image import refuse_same

    model, source, output = _paths(options)
    if not source.exists():
        raise InputError(f"{source} does not exist", expected="an image, a folder of images or a video")
    if not source.is_dir() and not source.is_file():
        raise InputError(f"{source} is a pipe or a device", expected="a file or a folder: it is read more than once")
    refuse_same(source, output)
    progress = RichProgress()
    kind = _kind(source)
    _refuse(kind, _unfitting(kind, options))
    devices = _devices(options.device)
    shard = None if options.shard is None else parse_shard(options.shard)
    suffix = _suffix(options)
    if options.ray is not None:
        document = run_on_cluster(options, model, source, output, suffix=suffix, shard=shard, progress=progress)
    else:
        with contextlib.ExitStack() as opened:
            ups = [opened.enter_context(_open(options, model, device)) for device in devices]
            document = _run(ups, options, source, output, suffix, shard, progress)
    document = {"model": str(model), **document}
    failures = document.pop("failures", None)
    if options.as_json:
        emit_json(document)
    if failures is not None:
        failures.raise_failures()
    if kind == FOLDER:
        next_command("srdeploy", "upscale", "--status", str(output))
    else:
        next_command("srdeploy", "inspect", str(model))


def _run(
    ups: "list[Upscaler]",
    options: UpscaleOptions,
    source: Path,
    output: Path,
    suffix: str | None,
    shard: "Shard | None",
    progress: RichProgress,
) -> dict[str, Any]:
    """Upscale on this machine."""
    from srdeploy.upscale.folders import upscale_folder
    from srdeploy.upscale.single_image import upscale_file
    from srdeploy.upscale.video.job import upscale_video

    up, info = ups[0], ups[0].info
    where = ", ".join(each.info.device for each in ups)
    progress.note(f"{info.name} on {where}, {info.numeric_mode}; x{up.contract.scale}, {up.contract.colours}")
    facts = {"engine": info.name, "versions": dict(info.versions)}
    if source.is_dir():
        report = upscale_folder(
            ups,
            source,
            output,
            output_options(options),
            suffix=suffix,
            shard=shard,
            mixed_engines=options.mixed_engines,
            progress=progress,
        )
        return {**facts, **folder_document(report, output, progress)}
    if _is_video(source):
        return {
            **facts,
            **video_document(
                upscale_video(up, source, output, video_options(options), progress=progress), output, progress
            ),
        }
    started = time.monotonic()
    made = upscale_file(up, source, output, output_options(options), progress=progress)
    return {**facts, **image_document(made, output, time.monotonic() - started, progress)}


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
        return FOLDER
    return "a video" if _is_video(source) else "an image"


def _unfitting(kind: str, options: UpscaleOptions) -> dict[str, Any]:
    """Return the options that do not apply to this kind of input, with their values."""
    of_videos = {"--codec": options.codec, "--progressive": options.progressive}
    of_folders = {"--format": options.suffix, "--shard": options.shard}
    local = {"--mixed-engines": options.mixed_engines and options.ray is None}
    several = {"--device with several names": "," in options.device}
    return {
        FOLDER: of_videos,
        "a video": {"--float": options.as_float, **of_folders, **local, **several},
        "an image": {**of_videos, **of_folders, **local, **several, "--ray": options.ray},
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


def _suffix(options: UpscaleOptions) -> str | None:
    from srdeploy.upscale.image_writer import FORMATS

    if options.suffix is None:
        return ".tif" if options.as_float else None
    suffix = "." + options.suffix.lower().lstrip(".")
    if suffix not in FORMATS:
        raise UsageError(f"--format {options.suffix}", expected=", ".join(name.lstrip(".") for name in FORMATS))
    return suffix


def _is_video(source: Path) -> bool:
    from srdeploy.upscale.video.probe import is_video

    found: bool = is_video(source)
    return found


def _open(options: UpscaleOptions, model: Path, device: str) -> "Upscaler":
    from srdeploy.upscale.upscaler import Upscaler

    return Upscaler.open(
        model,
        tile_settings(options),
        engine=options.engine,
        precision=options.precision,
        device=device,
        threads=options.threads,
        fallback=options.fallback,
        alpha=options.alpha,
    )
