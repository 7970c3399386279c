"""srdeploy quantize: make an FP16, BF16, INT8 or FP8 graph from an FP32 one with real images."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from srdeploy.cli.console import RichProgress, emit_json, next_command, table, warning_line
from srdeploy.cli.options import (
    ANY_PATH,
    BYTES,
    EXISTING,
    FORCE,
    HR,
    JSON,
    MAX_WORST_DROP,
    MEMORY,
    OUTPUT_PATH,
    POSITIVE,
    EnumChoice,
    argument,
    arguments,
    example,
    option,
    verb,
)
from srdeploy.core.artifact import refuse_existing, refuse_input_as_output
from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision, Target

TUNED_SIZE = (180, 320)
"""Height and width that graphs are timed with on a GPU, and that the build in the next step is tuned for."""

if TYPE_CHECKING:
    from srdeploy.calibration.images.dataset import CalibrationSet
    from srdeploy.calibration.options import QuantizeOptions
    from srdeploy.calibration.quantize import QuantizeResult

EXAMPLE = example(
    """
srdeploy quantize model.onnx --precision int8 --target openvino --images photos --hr --max-psnr-drop 0.02 -o int8.onnx
  67 of 69 layers in INT8 (98.9 % of multiply-adds), fidelity 57.1 dB, drop 0.012 dB
"""
)


@arguments
class QuantizeVerbOptions:
    """What `srdeploy quantize` is given."""

    onnx: Path = argument(type=EXISTING)
    precision: Precision = option(
        "--precision",
        type=EnumChoice([Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8]),
        help="Type of the heavy layers.",
    )
    target: Target = option(
        "--target",
        type=EnumChoice(list(Target)),
        default=Target.OPENVINO,
        show_default=True,
        help="Engine family that the graph is laid out for.",
    )
    images: Path | None = option(
        "--images",
        type=ANY_PATH,
        default=None,
        help="Real images: folder, image, pattern, zip, list file or video. Needed for int8 and fp8.",
    )
    hr: bool = option(
        "--hr",
        default=False,
        help=HR,
    )
    crops: int | None = option(
        "--crops",
        type=int,
        default=None,
        help="Number of crops that ranges are taken from; default: 64, fewer for networks of full size.",
    )
    crop_size: int = option(
        "--crop-size", type=int, default=64, show_default=True, help="Their height and width in LR pixels."
    )
    whole: int = option("--whole", type=int, default=4, show_default=True, help="Number of whole images besides.")
    seed: int = option("--seed", type=int, default=0, show_default=True, help="Seed of the choice of crops.")
    skip_bad: bool = option("--skip-bad", default=False, help="Use the rest when some images cannot be used.")
    max_psnr_drop: float | None = option(
        "--max-psnr-drop",
        type=float,
        default=None,
        help="Maximum loss of Y PSNR in dB; layers leave INT8 until it is kept.",
    )
    max_worst_drop: float | None = option("--max-worst-drop", type=float, default=None, help=MAX_WORST_DROP)
    reference: Path | None = option(
        "--reference",
        type=EXISTING,
        default=None,
        help="FP32 ONNX file that losses are measured against, for a compressed ONNX: the one that it was made from.",
    )
    min_fidelity: float | None = option(
        "--min-fidelity",
        type=float,
        default=None,
        help="Minimum PSNR in dB between the result and the FP32 graph.",
    )
    cost: Literal["latency", "macs"] = option(
        "--cost",
        type=click.Choice(["latency", "macs"]),
        default="latency",
        show_default=True,
        help="What an exact layer costs in the search: time on the engine, or multiply-adds (the same graph every "
        "time).",
    )
    time_budget: float = option(
        "--time-budget", type=float, default=300.0, show_default=True, help="Seconds that the search may take."
    )
    method: Literal["minmax", "percentile", "mse", "entropy"] | None = option(
        "--method",
        type=click.Choice(["minmax", "percentile", "mse", "entropy"]),
        default=None,
        help="Method of the ranges; default: measured.",
    )
    equalize: float | None = option(
        "--equalize", type=float, default=None, help="Strength of channel equalization, 0 to 1; default: measured."
    )
    deconvolution: Literal["auto", "int8", "float", "rewrite"] = option(
        "--deconvolution",
        type=click.Choice(["auto", "int8", "float", "rewrite"]),
        default="auto",
        show_default=True,
        help="How deconvolutions are computed; rewrite: as exact convolutions.",
    )
    weight_bits: Literal["auto", "7", "8"] = option(
        "--weight-bits",
        type=click.Choice(["auto", "7", "8"]),
        default="auto",
        show_default=True,
        help="7 runs on every CPU; 8 needs VNNI on x86 CPUs, and is a little more exact; auto: what this processor "
        "needs.",
    )
    keep: tuple[str, ...] = option("--keep", default=(), metavar="LAYER", help="Keep a layer float; repeatable.")
    ranges: Path | None = option(
        "--ranges",
        type=EXISTING,
        default=None,
        help="A ranges.json of this model, instead of collecting ranges again.",
    )
    memory: int | None = option("--memory", type=BYTES, default=None, help=MEMORY)
    threads: int | None = option(
        "--threads", type=POSITIVE, default=None, help="CPU threads of the engine that evaluates graphs."
    )
    output: Path = option("-o", "--output", type=OUTPUT_PATH, help="ONNX file to write.")
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)


@verb(QuantizeVerbOptions, epilog=EXAMPLE)
def command(options: QuantizeVerbOptions) -> None:
    """Make an FP16, BF16, INT8 or FP8 graph from an exported ONNX file, and report what that costs."""
    from srdeploy.calibration.fp32 import read_fp32_graph
    from srdeploy.calibration.quantize import quantize
    from srdeploy.cli.pipeline.clock import clock_for
    from srdeploy.cli.pipeline.opening import engine_opener

    output = options.output
    refuse_input_as_output(output, options.onnx)
    refuse_existing(output, options.force)
    quantize_options = _quantize_options(options)
    progress = RichProgress()
    contract = read_fp32_graph(options.onnx).contract
    result = quantize(
        options.onnx,
        output,
        precision=options.precision,
        target=options.target,
        calibration=None if options.images is None else _calibration(options, options.images, contract, progress),
        options=quantize_options,
        open_engine=engine_opener(options.target, options.threads),
        clock=clock_for(options.target, (1, contract.channels, *TUNED_SIZE), progress),
        force=options.force,
        progress=progress,
        reference=options.reference,
    )
    _show(result)
    if options.as_json:
        emit_json(result.to_json())
    _next(options, contract)


def _quantize_options(options: QuantizeVerbOptions) -> "QuantizeOptions":
    from srdeploy.calibration.options import QuantizeOptions

    return QuantizeOptions(
        method=options.method,
        strength=options.equalize,
        keep=options.keep,
        deconvolution=options.deconvolution,
        weight_bits=options.weight_bits,
        max_psnr_drop=options.max_psnr_drop,
        max_worst_drop=options.max_worst_drop,
        min_fidelity=options.min_fidelity,
        cost=options.cost,
        time_budget_s=options.time_budget,
        ranges=options.ranges,
        seed=options.seed,
    )


def _calibration(
    options: QuantizeVerbOptions, images: Path, contract: ModelContract, progress: RichProgress
) -> "CalibrationSet":
    from srdeploy.calibration.images.dataset import make_calibration_set

    calibration = make_calibration_set(
        images,
        contract=contract,
        hr=options.hr,
        count=options.crops,
        crop=options.crop_size,
        whole=options.whole,
        seed=options.seed,
        skip_bad=options.skip_bad,
        memory_bytes=options.memory,
        progress=progress,
    )
    for entry in calibration.document["passed_over"]:
        warning_line(f"skipped {entry['name']}: {entry['reason']}")
    return calibration


def _next(options: QuantizeVerbOptions, contract: ModelContract) -> None:
    from srdeploy.cli.build import BuildVerbOptions
    from srdeploy.cli.options import command_line
    from srdeploy.runtime.engines.registry import family

    target = options.target.value
    small, tuned, large = ((1, contract.channels, *size) for size in ((16, 16), TUNED_SIZE, (360, 640)))
    ranged = options.target in (Target.TENSORRT, Target.TENSORRT_RTX)  # their engines are built for a range of shapes
    build = BuildVerbOptions(
        onnx=options.output,
        engine=target,
        min_shape=(small,) if ranged else (),
        opt_shape=(tuned,) if ranged else (),
        max_shape=(large,) if ranged else (),
        output=options.output.with_suffix(family(target).suffix or ".engine"),
    )
    next_command(*command_line("build", build))


def _show(result: "QuantizeResult") -> None:
    progress = RichProgress()
    if result.choice is not None and result.choice.points:
        rows = [
            (
                f"{100 * point.int8_macs:.1f} %",
                len(point.keep),
                len(point.splits),
                f"{point.quality.fidelity_db:.2f}",
                f"{point.quality.drop_db:.4f}",
                "" if point.quality.worst_drop_db is None else f"{point.quality.worst_drop_db:.4f}",
                "" if point.latency_ms is None else f"{point.latency_ms:.1f}",
            )
            for point in result.choice.points
        ]
        table(
            "", ("MACs in INT8", "layers kept float", "split", "fidelity dB", "drop dB", "worst image dB", "ms"), rows
        )
    if result.int8_layers:
        total = len(result.int8_layers) + len(result.floats)
        progress.note(
            f"{len(result.int8_layers)} of {total} layers in {result.precision.value.upper()} "
            f"({100 * result.int8_macs:.1f} % of multiply-adds)"
        )
    if result.merged:
        names = ", ".join(result.merged)
        progress.note(f"{names} became one exact convolution (--keep one of them to keep them separate)")
    if result.choice is not None and result.choice.costs is not None:
        progress.note(result.choice.costs)
    if result.readback is not None:
        progress.note(f"{result.readback.engine} runs {result.readback.line()}")
    for island in result.islands if len(result.islands) <= 5 else ():
        progress.note(f"FP32: {island.node} {island.reason}")
    if len(result.islands) > 5:
        progress.note(f"FP32: {len(result.islands)} nodes, listed with reasons in {result.output.name}.json")
    if result.quality is not None:
        kinds = {"hr": "measured against HR images", "shrunk": "measured on the images, shrunk to be inputs"}
        kind = kinds.get(result.quality.truth or "", "expected from the fidelity")
        progress.note(
            f"fidelity {result.quality.fidelity_db:.2f} dB (worst image {result.quality.worst_db:.2f}), "
            f"drop {result.quality.drop_db:.4f} dB ({kind}, {result.quality.images_label})"
        )
    for note in result.notes:
        warning_line(note)
    progress.note(f"wrote {result.output}")
