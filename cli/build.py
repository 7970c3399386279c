"""srdeploy build: an engine from an ONNX file, with proof of its precision."""

from pathlib import Path
from typing import Any

import click

from srdeploy.cli.console import RichProgress, emit_json, next_command, table, warning_line
from srdeploy.cli.options import EXISTING, OUTPUT_PATH, SHAPE, example, force_option, json_option, output_option
from srdeploy.core.artifact import refuse_input_as_output
from srdeploy.core.errors import UsageError
from srdeploy.core.shapes import Shape, ShapeProfile
from srdeploy.core.sizes import format_bytes, parse_bytes

BUILDERS = ("onnxruntime", "openvino", "tensorrt-rtx", "tensorrt")

EXAMPLE = example(
    """
srdeploy build rcan_x4.fp16.onnx --engine tensorrt-rtx --compute-capability 8.9 \\
    --min-shape 1x3x16x16 --opt-shape 1x3x180x320 --max-shape 4x3x256x320 -o rcan_x4.rtx
srdeploy build rcan_x2.int8.openvino.onnx --engine openvino -o rcan_x2.blob
"""
)


@click.command(epilog=EXAMPLE)
@click.argument("onnx", type=EXISTING)
@click.option("--engine", type=click.Choice(BUILDERS), required=True, help="Engine family.")
@output_option(help_text="Engine file; its sidecar is written to the same name with .json added.")
@click.option("--min-shape", type=SHAPE, multiple=True, help="Smallest input; repeat all three for several profiles.")
@click.option("--opt-shape", type=SHAPE, multiple=True, help="Input that the engine is tuned for.")
@click.option("--max-shape", type=SHAPE, multiple=True, help="Largest input.")
@click.option("--profile-images", type=EXISTING, help="Propose the profile from the low-resolution images in a folder.")
@click.option("--profile-batch", type=click.IntRange(min=1), default=1, show_default=True, help="Its largest batch.")
@click.option("--compute-capability", multiple=True, metavar="X.Y", help="GPU to build for (tensorrt-rtx); repeatable.")
@click.option("--workspace", metavar="SIZE", help="Limit of scratch memory, such as 2GiB (tensorrt).")
@click.option("--memory", metavar="SIZE", help="GPU memory the engine must fit in, such as 8GiB.")
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Quick build (0) to quick engine (5); tensorrt.")
@click.option("--tf32/--no-tf32", default=False, show_default=True, help="TF32 in FP32 convolutions (TensorRT).")
@click.option("--timing-cache", type=OUTPUT_PATH, help="Kernel timings to start from and to add to (tensorrt).")
@click.option(
    "--hardware-compatibility",
    type=click.Choice(["ampere_plus", "same_compute_capability"]),
    help="GPUs besides this one that may open the engine (tensorrt).",
)
@click.option("--version-compatible", is_flag=True, help="For later releases, in other programs (tensorrt).")
@click.option("--aux-streams", type=click.IntRange(min=0), help="Helper streams inside the engine (tensorrt).")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads to compile with (openvino, onnxruntime).")
@click.option("--cache/--no-cache", default=True, show_default=True, help="Use the engine cache.")
@click.option("--log", "log_path", type=OUTPUT_PATH, help="Where TensorRT's whole log goes.")
@force_option
@json_option
def command(onnx: Path, engine: str, output: Path, force: bool, as_json: bool, **chosen: Any) -> None:
    """Build an engine from an ONNX file and prove what it computes in.

    Precision lives in the ONNX file: an FP16 or INT8 engine is built from an FP16 or INT8 file (srdeploy quantize).
    After the build the engine's kernels are read back; a convolution in another type fails the build (exit 5).
    """
    from srdeploy.runtime.engines.options import BuildOptions
    from srdeploy.runtime.engines.registry import build_engine, family

    refuse_input_as_output(output, onnx)
    options = BuildOptions(
        profiles=_profiles(onnx, chosen),
        compute_capabilities=tuple(chosen["compute_capability"]),
        workspace_bytes=_size(chosen, "workspace"),
        memory_bytes=_size(chosen, "memory"),
        optimization_level=chosen["optimization_level"],
        tf32=chosen["tf32"],
        timing_cache=chosen["timing_cache"],
        hardware_compatibility=chosen["hardware_compatibility"],
        version_compatible=chosen["version_compatible"],
        max_aux_streams=chosen["aux_streams"],
        threads=chosen["threads"],
        use_cache=chosen["cache"],
        log_path=chosen["log_path"],
    )
    result = build_engine(onnx, output, engine=engine, options=options, force=force, progress=RichProgress())
    for note in result.notes:
        warning_line(note)
    if as_json:
        emit_json(result.to_json())
        return
    table(f"{output} ({engine})", ("what", "value"), _rows(result.to_json()))
    if family(engine).load().why_not_run() is None:
        next_command("srdeploy", "verify", str(output), "--against", "CHECKPOINT", "--images", "IMAGES")
    else:
        next_command("srdeploy", "inspect", str(output))


def _size(chosen: dict[str, Any], name: str) -> int | None:
    return None if chosen[name] is None else parse_bytes(chosen[name], f"--{name}")


def _profiles(onnx: Path, chosen: dict[str, Any]) -> tuple[ShapeProfile, ...]:
    low, middle, high = (list[Shape](chosen[name]) for name in ("min_shape", "opt_shape", "max_shape"))
    if chosen["profile_images"] is not None:
        if low or middle or high:
            raise UsageError("--profile-images and --min-shape/--opt-shape/--max-shape were both given")
        return (_from_images(onnx, chosen["profile_images"], chosen["profile_batch"]),)
    if not len(low) == len(middle) == len(high):
        raise UsageError(
            f"{len(low)} --min-shape, {len(middle)} --opt-shape and {len(high)} --max-shape were given",
            expected="each as often as the others: once per profile",
        )
    return tuple(ShapeProfile(*shapes) for shapes in zip(low, middle, high, strict=True))


def _from_images(onnx: Path, source: Path, batch: int) -> ShapeProfile:
    from srdeploy.core.imaging.read import find_images, opened
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
    rows += [("profile", _profile_words(profile)) for profile in details["profiles"]]
    return rows


def _profile_words(profile: dict[str, list[int]]) -> str:
    return " .. ".join("x".join(map(str, profile[name])) for name in ("min", "opt", "max"))
