"""srdeploy quantize: bring an ONNX file to FP16, BF16, INT8 or FP8 with real images."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from srdeploy.cli.console import RichProgress, emit_json, next_command, table, warning_line
from srdeploy.cli.options import EXISTING, example, force_option, json_option, output_option
from srdeploy.core.artifact import refuse_existing, refuse_input_as_output

if TYPE_CHECKING:
    from srdeploy.calibration.quantize import QuantizeResult
    from srdeploy.core.precision import Target
    from srdeploy.core.runner import Runner

_EPILOG = example(
    """
srdeploy quantize model.onnx --precision int8 --target openvino --images photos --hr --max-psnr-drop 0.02 -o int8.onnx
  67 of 69 layers in INT8 (98.9 % of multiply-adds), fidelity 57.1 dB, drop 0.012 dB
"""
)


@click.command(epilog=_EPILOG)
@click.argument("onnx", type=EXISTING)
@click.option("--precision", type=click.Choice(["fp16", "bf16", "int8", "fp8"]), required=True)
@click.option(
    "--target",
    type=click.Choice(["tensorrt", "tensorrt-rtx", "openvino", "onnxruntime"]),
    default="openvino",
    show_default=True,
    help="Engine family that the graph is laid out for.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Real images: folder, image, pattern, zip, list file or video. Needed for int8 and fp8.",
)
@click.option(
    "--hr", is_flag=True, help="The images are high resolution: shrink them to be inputs, judge against them."
)
@click.option("--crops", type=int, default=64, show_default=True, help="Crops that ranges are taken from.")
@click.option("--crop-size", type=int, default=64, show_default=True, help="Their height and width in LR pixels.")
@click.option("--whole", type=int, default=4, show_default=True, help="Images taken whole besides.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides which crops are taken.")
@click.option("--skip-bad", is_flag=True, help="Use the rest when some images cannot be used.")
@click.option("--max-psnr-drop", type=float, help="Largest loss of Y PSNR in dB; layers leave INT8 until it is kept.")
@click.option("--min-fidelity", type=float, help="Least PSNR in dB between the result and the FP32 graph.")
@click.option(
    "--cost",
    type=click.Choice(["latency", "macs"]),
    default="latency",
    show_default=True,
    help="What the search pays for exact layers: time on the engine, or multiply-adds (the same graph every time).",
)
@click.option("--time-budget", type=float, default=600.0, show_default=True, help="Seconds the search may take.")
@click.option(
    "--method", type=click.Choice(["minmax", "percentile", "mse", "entropy"]), help="Ranges; default: measured."
)
@click.option("--equalize", type=float, help="Strength of channel equalization, 0 to 1; default: measured.")
@click.option(
    "--deconvolution", type=click.Choice(["auto", "int8", "float", "rewrite"]), default="auto", show_default=True
)
@click.option(
    "--weight-bits",
    type=click.Choice(["auto", "7", "8"]),
    default="auto",
    show_default=True,
    help="7 runs on every CPU; 8 needs VNNI on x86 CPUs, and is a little more exact; auto: what this processor needs.",
)
@click.option("--keep", multiple=True, metavar="LAYER", help="Leave a layer float; may be repeated.")
@click.option("--ranges", type=EXISTING, help="A ranges.json of this model, instead of collecting ranges again.")
@click.option("--threads", type=int, help="CPU threads of the engine that judges.")
@output_option(help_text="ONNX file to write.")
@force_option
@json_option
def command(onnx: Path, precision: str, target: str, images: Path | None, output: Path, **choices: Any) -> None:
    """Bring an exported ONNX file to FP16, BF16, INT8 or FP8, and tell what that costs."""
    from srdeploy.calibration.fp32 import read_fp32_graph
    from srdeploy.calibration.options import QuantizeOptions
    from srdeploy.calibration.quantize import quantize
    from srdeploy.core.precision import Precision, Target

    refuse_input_as_output(output, onnx)
    refuse_existing(output, choices["force"])
    progress = RichProgress()
    contract = read_fp32_graph(onnx).contract
    calibration = None
    if images is not None:
        from srdeploy.calibration.images.dataset import make_calibration_set

        calibration = make_calibration_set(
            images,
            contract=contract,
            hr=choices["hr"],
            count=choices["crops"],
            crop=choices["crop_size"],
            whole=choices["whole"],
            seed=choices["seed"],
            skip_bad=choices["skip_bad"],
            progress=progress,
        )
        for entry in calibration.document["passed_over"]:
            warning_line(f"passed over {entry['name']}: {entry['reason']}")
    result = quantize(
        onnx,
        output,
        precision=Precision(precision),
        target=Target(target),
        calibration=calibration,
        options=QuantizeOptions(
            method=choices["method"],
            strength=choices["equalize"],
            keep=choices["keep"],
            deconvolution=choices["deconvolution"],
            weight_bits=choices["weight_bits"],
            max_psnr_drop=choices["max_psnr_drop"],
            min_fidelity=choices["min_fidelity"],
            cost=choices["cost"],
            time_budget_s=choices["time_budget"],
            ranges=choices["ranges"],
            seed=choices["seed"],
        ),
        open_engine=engine_for(Target(target), choices["threads"]),
        force=choices["force"],
        progress=progress,
    )
    _show(result)
    if choices["as_json"]:
        emit_json(result.to_json())
    from srdeploy.runtime.engines.registry import family

    engine = output.with_suffix(family(target).suffix or ".engine")
    shapes: list[str] = []
    if Target(target) in (Target.TENSORRT, Target.TENSORRT_RTX):  # their engines are built for a range of shapes
        sizes = {"--min-shape": "16x16", "--opt-shape": "180x320", "--max-shape": "360x640"}
        shapes = [word for flag, size in sizes.items() for word in (flag, f"1x{contract.channels}x{size}")]
    next_command("srdeploy", "build", str(output), "--engine", target, *shapes, "-o", str(engine))


def engine_for(target: "Target", threads: int | None) -> "Callable[[Path], Runner] | None":
    """Return a function that opens an ONNX file with the target's engine; None when none runs ONNX files here."""
    from srdeploy.core.precision import Target

    if target not in (Target.OPENVINO, Target.ONNXRUNTIME):
        return None
    from srdeploy.runtime.engines.registry import open_engine

    return lambda path: open_engine(path, engine=target.value, threads=threads, parity=True)


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
                "" if point.latency_ms is None else f"{point.latency_ms:.1f}",
            )
            for point in result.choice.points
        ]
        table("", ("MACs in INT8", "layers kept float", "split", "fidelity dB", "drop dB", "ms"), rows)
    if result.int8_layers:
        total = len(result.int8_layers) + len(result.floats)
        progress.note(
            f"{len(result.int8_layers)} of {total} layers in {result.precision.value.upper()} "
            f"({100 * result.int8_macs:.1f} % of multiply-adds)"
        )
    if result.merged:
        names = ", ".join(result.merged)
        progress.note(f"{names} became one exact convolution (--keep one of them to leave them apart)")
    if result.readback is not None:
        progress.note(f"{result.readback.engine} runs {result.readback.line()}")
    for island in result.islands if len(result.islands) <= 5 else ():
        progress.note(f"FP32: {island.node} {island.reason}")
    if len(result.islands) > 5:
        progress.note(f"FP32: {len(result.islands)} nodes, listed with reasons in {result.output.name}.json")
    if result.quality is not None:
        kind = "measured against HR images" if result.quality.measured else "expected from the fidelity"
        progress.note(
            f"fidelity {result.quality.fidelity_db:.2f} dB (worst image {result.quality.worst_db:.2f}), "
            f"drop {result.quality.drop_db:.4f} dB ({kind}, {result.quality.images} images kept aside)"
        )
    for note in result.notes:
        warning_line(note)
    progress.note(f"wrote {result.output}")
