"""`srdeploy export`: a checkpoint becomes an ONNX file that is checked against the network."""

from pathlib import Path

import click

from srdeploy.cli.checkpoint_options import CheckpointOptions, checkpoint_options, load_from_options
from srdeploy.cli.console import RichProgress, console, emit_json, next_command, table
from srdeploy.cli.options import EXISTING, example, force_option, json_option, output_option
from srdeploy.core.artifact import refuse_input_as_output


@click.command(
    epilog=example(
        """
srdeploy export examples/rcan_x2_demo.pt -o rcan_x2.onnx
srdeploy verify rcan_x2.onnx --against examples/rcan_x2_demo.pt --images examples/photos/evaluation
"""
    )
)
@click.argument("checkpoint", type=EXISTING)
@output_option(help_text="ONNX file to write; its manifest is written beside it, with .json added.")
@click.option(
    "--opset",
    type=click.IntRange(20, 23),
    default=20,
    show_default=True,
    help="ONNX operator set. Every supported engine reads 20; newer sets bring nothing these networks use.",
)
@checkpoint_options
@force_option
@json_option
def command(checkpoint: Path, output: Path, opset: int, stated: CheckpointOptions, force: bool, as_json: bool) -> None:
    """Export CHECKPOINT to ONNX, with dynamic batch, height and width, and check it against the network.

    The graph takes and gives values in 0..1, whatever the network was trained on. It is compared with the PyTorch
    network on a grid of sizes and batches; if it differs by more than 1e-5, nothing is written.
    """
    from srdeploy.export.exporter import export_onnx

    refuse_input_as_output(output, checkpoint)
    progress = RichProgress()
    loaded = load_from_options(checkpoint, stated, progress)
    result = export_onnx(loaded, output, opset=opset, force=force, progress=progress)
    if as_json:
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
        console.print(f"weights: {result.external_data}; keep it beside the ONNX file", soft_wrap=True)
    next_command("srdeploy", "verify", str(output), "--against", str(checkpoint), "--images", "DIR")
