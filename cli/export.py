"""`srdeploy export`: a checkpoint becomes an ONNX file that is checked against the network, in the form requested."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from srdeploy.cli.checkpoint_options import CheckpointOptions, load_from_options
from srdeploy.cli.console import RichProgress, console, emit_json, next_command, table
from srdeploy.cli.options import (
    EXISTING,
    FORCE,
    JSON,
    OUTPUT_PATH,
    SHAPE,
    argument,
    arguments,
    example,
    option,
    option_group,
    verb,
)
from srdeploy.core.artifact import refuse_input_as_output
from srdeploy.core.contract import GraphForm, ModelContract
from srdeploy.core.errors import UsageError
from srdeploy.core.shapes import Shape

if TYPE_CHECKING:
    from srdeploy.export.exporter import ExportResult


_OPSET = 20


@arguments
class ExportOptions:
    """What `srdeploy export` is given."""

    checkpoint: Path = argument(type=EXISTING, metavar="CHECKPOINT|ONNX")
    checkpoint_options: CheckpointOptions = option_group(default_factory=CheckpointOptions)
    opset: int = option(
        "--opset",
        type=click.IntRange(20, 23),
        default=_OPSET,
        show_default=True,
        help="ONNX operator set. Every supported engine reads 20; newer sets add nothing these networks use.",
    )
    static: Shape | None = option(
        "--static", type=SHAPE, default=None, help="The only input shape, for NPUs, DLAs and Windows ML; default: free."
    )
    io: str = option(
        "--io",
        type=click.Choice(["float32", "uint8"]),
        default="float32",
        show_default=True,
        help="Type of input and output: values in 0..1, or 8-bit pictures that are scaled and rounded in the graph.",
    )
    color_wrapper: bool = option(
        "--color-wrapper", default=False, help="RGB in and out of a Y network: chroma is enlarged in the graph."
    )
    target: str | None = option(
        "--target",
        type=click.Choice(["web"]),
        default=None,
        help="What the graph is for: web adds --color-wrapper where needed, and lists what WebGPU cannot compute.",
    )
    output: Path = option(
        "-o",
        "--output",
        type=OUTPUT_PATH,
        help="ONNX file to write; its manifest is written next to it, with .json added.",
    )
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)

    def form(self, contract: ModelContract) -> GraphForm:
        """Return the form to put a graph into."""
        color_wrapper = self.color_wrapper or (self.target == "web" and contract.colours == "y")
        return GraphForm(self.static, "uint8" if self.io == "uint8" else "float32", color_wrapper)


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

    With --static, --io or --color-wrapper the graph takes and returns images as a consumer needs it. A graph that
    srdeploy wrote, quantized ones too, is put into such a form by naming it in place of the checkpoint.
    """
    output = options.output
    refuse_input_as_output(output, options.checkpoint)
    result = _from_graph(options) if options.checkpoint.suffix == ".onnx" else _from_checkpoint(options)
    notes = _target_notes(result) if options.target == "web" else []
    if options.as_json:
        emit_json({**result.to_json(), "notes": notes})
        return
    rows: list[list[object]] = [
        ["network", f"{result.contract.architecture} x{result.contract.scale}, {result.contract.colours}"],
        ["opset", result.opset],
        ["operators", ", ".join(f"{count} {name}" for name, count in result.operators.items())],
        ["form", result.contract.form],
        ["seconds", ", ".join(f"{step} {seconds:.1f}" for step, seconds in result.seconds.items())],
    ]
    if result.check is not None:
        shapes = len(result.check.deviations)
        rows.append(["largest difference from PyTorch", f"{result.check.max_abs:.2e} on {shapes} shapes"])
    if result.form_check is not None:
        rows.append(["largest difference from the plain graph", _form_difference(result)])
    rows += [["folded", note] for note in result.folded]
    table(str(output), ["what", "value"], rows)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
    if result.external_data is not None:
        console.print(f"weights: {result.external_data}; keep it next to the ONNX file", soft_wrap=True, markup=False)
    next_command(*_next_command(result, options))


def _from_checkpoint(options: ExportOptions) -> "ExportResult":
    from srdeploy.export.exporter import export_onnx

    progress = RichProgress()
    loaded = load_from_options(options.checkpoint, options.checkpoint_options, progress)
    form, force = options.form(loaded.contract()), options.force
    return export_onnx(loaded, options.output, opset=options.opset, form=form, force=force, progress=progress)


def _from_graph(options: ExportOptions) -> "ExportResult":
    from srdeploy.core.onnx_file import read_graph
    from srdeploy.export.exporter import export_form

    given = options.checkpoint_options.flags() + (["--opset"] if options.opset != _OPSET else [])
    if given:
        raise UsageError(
            f"{given[0]} and the graph {options.checkpoint}",
            expected="a checkpoint: a graph has its network and opset already",
            next_step="omit it",
        )
    form = options.form(read_graph(options.checkpoint).contract)
    if form.plain and options.target is None:
        raise UsageError(
            f"{options.checkpoint} is a graph already",
            expected="a checkpoint, or a form to put the graph into",
            next_step="add --static, --io uint8, --color-wrapper or --target web",
        )
    return export_form(options.checkpoint, options.output, form=form, force=options.force)


def _target_notes(result: "ExportResult") -> list[str]:
    from srdeploy.export.web import web_notes

    size = result.path.stat().st_size
    one_file = result.external_data is None
    return web_notes(result.operators, result.contract.precision, size, one_file=one_file)


def _form_difference(result: "ExportResult") -> str:
    assert result.form_check is not None
    largest = max(result.form_check.max_abs.values())
    if result.contract.form.io == "uint8":
        return f"{largest:.0f} of 255 levels"
    return f"{largest:.2e}"


def _next_command(result: "ExportResult", options: ExportOptions) -> list[str]:
    output, form = str(result.path), result.contract.form
    if form.io == "uint8" or form.color_wrapper:
        return ["srdeploy", "upscale", output, "PICTURE", "-o", "OUTPUT"]
    against = str(options.checkpoint) if result.check is not None else "CHECKPOINT"
    return ["srdeploy", "verify", output, "--against", against, "--images", "DIR"]
