"""`srdeploy export`: a checkpoint becomes an ONNX file that is checked against the network."""

from pathlib import Path

import click

from srdeploy.cli.checkpoint_options import CheckpointOptions, load_from_options
from srdeploy.cli.console import RichProgress, console, emit_json, next_command, table
from srdeploy.cli.options import (
    EXISTING,
    FORCE,
    JSON,
    OUTPUT_PATH,
    argument,
    arguments,
    example,
    option,
    option_group,
    verb,
)
from srdeploy.core.artifact import refuse_input_as_output


@arguments
class ExportOptions:
    """What `srdeploy export` is given."""

    checkpoint: Path = argument(type=EXISTING)
    checkpoint_options: CheckpointOptions = option_group(default_factory=CheckpointOptions)
    opset: int = option(
        "--opset",
        type=click.IntRange(20, 23),
        default=20,
        show_default=True,
        help="ONNX operator set. Every supported engine reads 20; newer sets add nothing these networks use.",
    )
    output: Path = option(
        "-o",
        "--output",
        type=OUTPUT_PATH,
        help="ONNX file to write; its manifest is written next to it, with .json added.",
    )
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)


@verb(
    ExportOptions,
    epilog=example(
        """
srdeploy export examples/rcan_x2_demo.pt -o rcan_x2.onnx
srdeploy verify rcan_x2.onnx --against examples/rcan_x2_demo.pt --images examples/photos/evaluation
"""
    ),
)
def command(options: ExportOptions) -> None:
    """Export CHECKPOINT to ONNX, with dynamic batch, height and width, and check it against the network.

    The graph takes and returns values in 0..1, whatever the network was trained on. It is compared with the PyTorch
    network in float64 on a grid of sizes and batches; if it differs by more than a few times the FP32 network's own
    rounding error, nothing is written.
    """
    from srdeploy.export.exporter import export_onnx

    output = options.output
    refuse_input_as_output(output, options.checkpoint)
    progress = RichProgress()
    loaded = load_from_options(options.checkpoint, options.checkpoint_options, progress)
    result = export_onnx(loaded, output, opset=options.opset, force=options.force, progress=progress)
    if options.as_json:
        emit_json(result.to_json())
        return
    rows: list[list[object]] = [
        ["network", f"{result.contract.architecture} x{result.contract.scale}, {result.contract.colours}"],
        ["opset", result.opset],
        ["operators", ", ".join(f"{count} {name}" for name, count in result.operators.items())],
        ["largest difference from PyTorch", f"{result.check.max_abs:.2e} on {len(result.check.deviations)} shapes"],
        ["seconds", ", ".join(f"{step} {seconds:.1f}" for step, seconds in result.seconds.items())],
    ]
    rows += [["folded", note] for note in result.folded]
    table(str(output), ["what", "value"], rows)
    if result.external_data is not None:
        console.print(f"weights: {result.external_data}; keep it next to the ONNX file", soft_wrap=True)
    next_command("srdeploy", "verify", str(output), "--against", str(options.checkpoint), "--images", "DIR")
