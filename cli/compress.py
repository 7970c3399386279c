"""srdeploy compress: make an FP32 graph of fewer multiply-adds that keeps a bound in dB."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
    command_line,
    example,
    option,
    verb,
)
from srdeploy.core.artifact import refuse_existing, refuse_input_as_output
from srdeploy.core.precision import Precision, Target

if TYPE_CHECKING:
    from srdeploy.calibration.compress.result import CompressResult, Point

EXAMPLE = example(
    """
srdeploy compress model.fp32.onnx --images photos/ --hr --max-psnr-drop 0.01 -o model.small.onnx
srdeploy quantize model.small.onnx --reference model.fp32.onnx --precision int8 --images photos/ --hr -o int8.onnx
"""
)


@arguments
class CompressVerbOptions:
    """What `srdeploy compress` is given."""

    onnx: Path = argument(type=EXISTING)
    images: Path = option(
        "--images", type=ANY_PATH, help="Real images: folder, image, pattern, zip, list file or video."
    )
    max_psnr_drop: float = option(
        "--max-psnr-drop", type=float, help="Maximum loss of Y PSNR in dB, the mean of held-out images."
    )
    max_worst_drop: float | None = option("--max-worst-drop", type=float, default=None, help=MAX_WORST_DROP)
    target: Target = option(
        "--target",
        type=EnumChoice(list(Target)),
        default=Target.OPENVINO,
        show_default=True,
        help="Engine family: ranks are multiples that suit it; where it runs here, changes that are not faster are "
        "undone.",
    )
    precision: Precision = option(
        "--precision",
        type=EnumChoice([Precision.FP32, Precision.INT8]),
        default=Precision.FP32,
        show_default=True,
        help="What the graph will be quantized to: for int8 output channels are removed, and nothing is factored.",
    )
    hr: bool = option(
        "--hr",
        default=False,
        help=HR,
    )
    seed: int = option("--seed", type=int, default=0, show_default=True, help="Seed of the choice of crops.")
    skip_bad: bool = option("--skip-bad", default=False, help="Use the rest when some images cannot be used.")
    time_budget: float = option(
        "--time-budget", type=float, default=600.0, show_default=True, help="Seconds that the search may take."
    )
    memory: int | None = option("--memory", type=BYTES, default=None, help=MEMORY)
    threads: int | None = option(
        "--threads", type=POSITIVE, default=None, help="CPU threads of the engine that times graphs."
    )
    output: Path = option("-o", "--output", type=OUTPUT_PATH, help="ONNX file to write.")
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)


@verb(CompressVerbOptions, epilog=EXAMPLE)
def command(options: CompressVerbOptions) -> None:
    """Replace layers of an exported ONNX file by cheaper ones, as far as a bound in dB allows.

    Layers become low-rank factors, and output channels that their reader can do without are removed; both are fitted
    to what the network computes on real images, without retraining. The result is another network than the trained one:
    its manifest lists every changed layer.
    """
    from srdeploy.calibration.compress.compress import compress, read_original
    from srdeploy.calibration.compress.result import CompressOptions, NothingGainedError
    from srdeploy.calibration.images.dataset import make_calibration_set
    from srdeploy.calibration.search.bound import Bound
    from srdeploy.cli.pipeline.opening import engine_opener

    refuse_input_as_output(options.output, options.onnx)
    refuse_existing(options.output, options.force)
    bound = Bound(options.max_psnr_drop, options.max_worst_drop)
    compress_options = CompressOptions(bound, options.target, options.time_budget, options.precision)
    progress = RichProgress()
    calibration = make_calibration_set(
        options.images,
        contract=read_original(options.onnx).contract,
        hr=options.hr,
        seed=options.seed,
        skip_bad=options.skip_bad,
        memory_bytes=options.memory,
        progress=progress,
    )
    for entry in calibration.document["passed_over"]:
        warning_line(f"skipped {entry['name']}: {entry['reason']}")
    try:
        result = compress(
            options.onnx,
            options.output,
            calibration=calibration,
            options=compress_options,
            open_engine=engine_opener(options.target, options.threads),
            force=options.force,
            progress=progress,
        )
    except NothingGainedError as error:
        _show_points(error.points, error.macs_before)
        raise
    _show(result, progress)
    if options.as_json:
        emit_json(result.to_json())
    _next(options)


def _show_points(points: "Sequence[Point]", macs_before: float) -> None:
    rows = [
        (
            f"{macs_before / point.macs:.2f}x",
            len(point.changes),
            f"{point.quality.fidelity_db:.2f}",
            f"{point.quality.drop_db:.4f}",
            "" if point.quality.worst_drop_db is None else f"{point.quality.worst_drop_db:.4f}",
            f"{point.quality.other_kinds_drop_db:.4f}",
            "test" if point.quality.tested else "held-out",
        )
        for point in sorted(points, key=lambda point: -point.macs)
    ]
    table("", ("fewer MACs", "changes", "fidelity dB", "drop dB", "worst image dB", "other kinds dB", "images"), rows)


def _show(result: "CompressResult", progress: RichProgress) -> None:
    _show_points(result.points, result.macs_before)
    quality = result.quality
    progress.note(
        f"{result.macs_before / result.macs_after:.2f}x fewer multiply-adds, fidelity {quality.fidelity_db:.2f} dB, "
        f"drop {quality.drop_db:.4f} dB on {quality.images_label}"
    )
    if result.latency_ms is not None:
        ours, original = result.latency_ms
        progress.note(f"{ours:.1f} ms on the engine, the original graph {original:.1f} ms ({original / ours:.2f}x)")
    for note in result.notes:
        warning_line(note)
    progress.note(f"wrote {result.output}")


def _next(options: CompressVerbOptions) -> None:
    from srdeploy.cli.quantize import QuantizeVerbOptions

    quantize = QuantizeVerbOptions(
        onnx=options.output,
        precision=Precision.INT8 if options.target in (Target.OPENVINO, Target.ONNXRUNTIME) else Precision.FP16,
        target=options.target,
        images=options.images,
        hr=options.hr,
        reference=options.onnx,
        output=options.output.with_suffix(".quantized.onnx"),
    )
    next_command(*command_line("quantize", quantize))
