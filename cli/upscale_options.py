"""Options of `srdeploy upscale`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

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
    option,
)
from srdeploy.core.precision import Precision

if TYPE_CHECKING:
    from srdeploy.upscale.budget import TileSettings
    from srdeploy.upscale.single_image import OutputOptions
    from srdeploy.upscale.video.job import VideoOptions


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
    ray: str | None = option(
        "--ray",
        default=None,
        metavar="ADDRESS",
        help="Use the running Ray cluster whose head is at HOST:PORT (auto: the one of this machine); folders, videos.",
    )
    mixed_engines: bool = option(
        "--mixed-engines",
        default=False,
        help="Allow several devices or machines to run different engines or precisions.",
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


def tile_settings(options: UpscaleOptions) -> "TileSettings":
    """Return the options about tiles."""
    from srdeploy.upscale.budget import TileSettings

    return TileSettings(
        mode=options.tiles,
        side=options.tile,
        overlap=options.overlap,
        batch=options.batch,
        memory_bytes=options.memory,
    )


def output_options(options: UpscaleOptions) -> "OutputOptions":
    """Return the options about written pictures."""
    from srdeploy.upscale.single_image import OutputOptions

    return OutputOptions(as_float=options.as_float, quality=options.quality, force=options.force)


def video_options(options: UpscaleOptions) -> "VideoOptions":
    """Return the options about written videos."""
    from srdeploy.upscale.video.job import VideoOptions

    return VideoOptions(options.codec, options.quality, force=options.force, progressive=options.progressive)
