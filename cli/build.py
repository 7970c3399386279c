"""srdeploy build: an engine from an ONNX file, with proof of its precision."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from srdeploy.cli.console import RichProgress, emit_json, next_command, table, warning_line
from srdeploy.cli.options import (
    BYTES,
    EXISTING,
    FORCE,
    JSON,
    OUTPUT_PATH,
    POSITIVE,
    SHAPE,
    argument,
    arguments,
    example,
    option,
    verb,
)
from srdeploy.core.artifact import refuse_input_as_output
from srdeploy.core.errors import UsageError
from srdeploy.core.shapes import Shape, ShapeProfile
from srdeploy.core.sizes import format_bytes

if TYPE_CHECKING:
    from srdeploy.runtime.engines.options import BuildOptions

BUILDERS = ("onnxruntime", "openvino", "ncnn", "tensorrt-rtx", "tensorrt")

EXAMPLE = example(
    """
srdeploy build rcan_x4.fp16.onnx --engine tensorrt-rtx --compute-capability 8.9 \\
    --min-shape 1x3x16x16 --opt-shape 1x3x180x320 --max-shape 4x3x256x320 -o rcan_x4.rtx
srdeploy build rcan_x2.int8.openvino.onnx --engine openvino -o rcan_x2.blob
"""
)


@arguments
class BuildVerbOptions:
    """What `srdeploy build` is given."""

    onnx: Path = argument(type=EXISTING)
    engine: str = option("--engine", type=click.Choice(BUILDERS), help="Engine family.")
    min_shape: tuple[Shape, ...] = option(
        "--min-shape", type=SHAPE, default=(), help="Smallest input; repeat all three for several profiles."
    )
    opt_shape: tuple[Shape, ...] = option(
        "--opt-shape", type=SHAPE, default=(), help="Input that the engine is tuned for."
    )
    max_shape: tuple[Shape, ...] = option("--max-shape", type=SHAPE, default=(), help="Largest input.")
    profile_images: Path | None = option(
        "--profile-images",
        type=EXISTING,
        default=None,
        help="Propose the profile from the low-resolution images in a folder.",
    )
    profile_batch: int = option(
        "--profile-batch", type=POSITIVE, default=1, show_default=True, help="Largest batch of that profile."
    )
    compute_capability: tuple[str, ...] = option(
        "--compute-capability", default=(), metavar="X.Y", help="GPU to build for (tensorrt-rtx); repeatable."
    )
    device: str = option(
        "--device", default="auto", show_default=True, help="GPU to build on, cuda or cuda:N (tensorrt)."
    )
    workspace: int | None = option(
        "--workspace", type=BYTES, default=None, help="Limit of scratch memory, such as 2GiB (tensorrt)."
    )
    memory: int | None = option(
        "--memory", type=BYTES, default=None, help="GPU memory that the engine must fit in, such as 8GiB."
    )
    optimization_level: int | None = option(
        "--optimization-level",
        type=click.IntRange(0, 5),
        default=None,
        help="From 0 (fast build) to 5 (fast engine); tensorrt.",
    )
    tf32: bool = option(
        "--tf32/--no-tf32", default=False, show_default=True, help="TF32 in FP32 convolutions (TensorRT)."
    )
    timing_cache: Path | None = option(
        "--timing-cache",
        type=OUTPUT_PATH,
        default=None,
        help="Kernel timings to start from and to add to (tensorrt).",
    )
    hardware_compatibility: str | None = option(
        "--hardware-compatibility",
        type=click.Choice(["ampere_plus", "same_compute_capability"]),
        default=None,
        help="Other GPUs that may open the engine (tensorrt).",
    )
    version_compatible: bool = option(
        "--version-compatible", default=False, help="For later releases, in other programs (tensorrt)."
    )
    aux_streams: int | None = option(
        "--aux-streams", type=click.IntRange(min=0), default=None, help="Helper streams inside the engine (tensorrt)."
    )
    threads: int | None = option(
        "--threads", type=POSITIVE, default=None, help="CPU threads to compile with (openvino, onnxruntime)."
    )
    cache: bool = option("--cache/--no-cache", default=True, show_default=True, help="Use the engine cache.")
    log: Path | None = option("--log", type=OUTPUT_PATH, default=None, help="File for TensorRT's complete log.")
    output: Path = option(
        "-o", "--output", type=OUTPUT_PATH, help="Engine file; its sidecar gets the same name with .json added."
    )
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)


@verb(BuildVerbOptions, epilog=EXAMPLE)
def command(options: BuildVerbOptions) -> None:
    """Build an engine from an ONNX file and prove what it computes in.

    Precision lives in the ONNX file: an FP16 or INT8 engine is built from an FP16 or INT8 file (srdeploy quantize).
    After the build the engine's kernels are read back; a convolution in another type fails the build (exit 5).
    """
    from srdeploy.runtime.engines.registry import build_engine, family

    output, engine = options.output, options.engine
    refuse_input_as_output(output, options.onnx)
    result = build_engine(
        options.onnx,
        output,
        engine=engine,
        options=_build_options(options),
        force=options.force,
        progress=RichProgress(),
    )
    for note in result.notes:
        warning_line(note)
    if options.as_json:
        emit_json(result.to_json())
        return
    table(f"{output} ({engine})", ("what", "value"), _rows(result.to_json()))
    if family(engine).load().why_not_run() is None:
        next_command("srdeploy", "verify", str(output), "--against", "CHECKPOINT", "--images", "IMAGES")
    else:
        next_command("srdeploy", "inspect", str(output))


def _build_options(options: BuildVerbOptions) -> "BuildOptions":
    from srdeploy.runtime.engines.options import BuildOptions

    return BuildOptions(
        profiles=_profiles(options),
        compute_capabilities=options.compute_capability,
        device=options.device,
        workspace_bytes=options.workspace,
        memory_bytes=options.memory,
        optimization_level=options.optimization_level,
        tf32=options.tf32,
        timing_cache=options.timing_cache,
        hardware_compatibility=options.hardware_compatibility,
        version_compatible=options.version_compatible,
        max_aux_streams=options.aux_streams,
        threads=options.threads,
        use_cache=options.cache,
        log_path=options.log,
    )


def _profiles(options: BuildVerbOptions) -> tuple[ShapeProfile, ...]:
    low, middle, high = options.min_shape, options.opt_shape, options.max_shape
    if options.profile_images is not None:
        if low or middle or high:
            raise UsageError("--profile-images and --min-shape/--opt-shape/--max-shape were both given")
        return (_from_images(options.onnx, options.profile_images, options.profile_batch),)
    if not len(low) == len(middle) == len(high):
        raise UsageError(
            f"{len(low)} --min-shape, {len(middle)} --opt-shape and {len(high)} --max-shape were given",
            expected="each as often as the others: once per profile",
        )
    return tuple(ShapeProfile(*shapes) for shapes in zip(low, middle, high, strict=True))


def _from_images(onnx: Path, source: Path, batch: int) -> ShapeProfile:
    from srdeploy.core.imaging.files import find_images
    from srdeploy.core.imaging.read import opened
    from srdeploy.core.onnx_file import read_graph
    from srdeploy.runtime.engines.profiles import proposed_profile

    def size(path: Path) -> tuple[int, int]:
        with opened(path, max_pixels=None) as image:
            return image.height, image.width

    contract = read_graph(onnx).contract
    sizes = [size(path) for path in find_images(source)]
    profile = proposed_profile(sizes, channels=contract.channels, batch=batch, min_size=contract.min_size)
    RichProgress().note(f"profile from {len(sizes)} images: {profile}")
    return profile


def _rows(result: dict[str, Any]) -> list[tuple[str, str]]:
    details = result["details"]
    built, precision = details["built"], details["precision"]
    rows = [
        ("size", format_bytes(result["bytes"])),
        ("time", f"{result['seconds']:.1f} s" + (" (cached)" if result["cached"] else "")),
        ("cache", result["cache_reason"]),
        ("precision asked / built", f"{precision['asked']} / {precision['built']}"),
        ("convolutions", ", ".join(f"{count} {name}" for name, count in built["convolutions"].items())),
        ("read from", built["read_from"]),
    ]
    if built.get("kernels"):
        rows.append(("kernels", str(built["kernels"])))
    if built.get("activation_bytes"):
        rows.append(("activation memory", f"{format_bytes(built['activation_bytes'])} at the largest shape"))
    if details["target"].get("words"):
        rows.append(("runs on", details["target"]["words"]))
    rows += [("profile", _profile_text(profile)) for profile in details["profiles"]]
    return rows


def _profile_text(profile: dict[str, list[int]]) -> str:
    return " .. ".join("x".join(map(str, profile[name])) for name in ("min", "opt", "max"))
