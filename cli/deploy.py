"""srdeploy deploy: from a checkpoint to a verified bundle, in one command."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from srdeploy.cli.checkpoint_options import CheckpointOptions, checkpoint_options
from srdeploy.cli.console import RichProgress, console, emit_json, next_command, table, warning_line
from srdeploy.cli.options import EXISTING, SIZE, example, force_option, json_option, output_option
from srdeploy.core.errors import UsageError
from srdeploy.core.shapes import format_shape

if TYPE_CHECKING:
    from srdeploy.cli.pipeline.road import Outcome
    from srdeploy.runtime.bundle import BundleEngine

EXAMPLE = example(
    """
srdeploy deploy rcan_x4.pt --images photos/ -o rcan_x4.srd
srdeploy deploy rcan_x4.pt --images DIV2K_valid_HR/ --hr --max-psnr-drop 0.05 -o rcan_x4.srd
srdeploy upscale rcan_x4.srd photo.png -o photo_x4.png
"""
)


@click.command(epilog=EXAMPLE)
@click.argument("checkpoint", type=EXISTING)
@click.option("--images", type=click.Path(path_type=Path), required=True, help="Calibration images: folder, zip, list.")
@click.option("--hr", is_flag=True, help="The images are high resolution: shrink them, and judge against them.")
@click.option(
    "--evaluate",
    type=EXISTING,
    help="Images to verify on; default: every fourth of --images, which calibration keeps aside.",
)
@click.option(
    "--engine",
    "engines",
    multiple=True,
    help="Engine to build; repeatable. Default: those installed of onnxruntime, openvino, tensorrt-rtx.",
)
@click.option("--max-psnr-drop", type=float, metavar="DB", help="Largest loss of Y PSNR that INT8 may cost.")
@click.option(
    "--size",
    type=SIZE,
    help="Input height and width to tune for and measure on; default: 180x320, less if that is heavy.",
)
@click.option("--compute-capability", "capabilities", multiple=True, help="GPUs for tensorrt-rtx, such as 8.9.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all.")
@checkpoint_options
@output_option(help_text="Bundle folder, NAME.srd.")
@force_option
@json_option
def command(
    checkpoint: Path,
    images: Path,
    output: Path,
    engines: tuple[str, ...],
    capabilities: tuple[str, ...],
    stated: CheckpointOptions,
    as_json: bool,
    **options: Any,
) -> int:
    """Export CHECKPOINT, quantize it, build engines, verify and measure them; write it all as one bundle.

    An engine that misses its gate or cannot be built is left out of the bundle and named with its reason; the exit
    code is then 6 (gate) or 5 (build), and the bundle holds the others.
    """
    from srdeploy.cli.pipeline.road import Request, deploy

    if output.suffix != ".srd":
        raise UsageError(f"bundle name {output}", expected="a name that ends in .srd")
    request = Request(
        checkpoint=checkpoint,
        images=images,
        output=output,
        engines=engines,
        stated=stated,
        compute_capabilities=capabilities,
        **options,
    )
    outcome = deploy(request, RichProgress())
    show(outcome)
    if as_json:
        emit_json(to_json(outcome))
    next_command("srdeploy", "upscale", str(output), "IMAGE", "-o", "OUTPUT")
    return outcome.exit_code


def show(outcome: "Outcome") -> None:
    """Print the verdict: one line per engine, those left out with their reason, and where the report is."""
    rows = [_row(engine, outcome) for engine in outcome.engines]
    rows += [[f"{left.engine} {left.precision}", "left out", "", "", "", ""] for left in outcome.left_out]
    bench = outcome.bench
    measured = "" if bench is None else f", {format_shape(bench.shape)} on the CPU"
    if bench is not None:
        base = bench.rows[0]
        rows.insert(0, [base.runner.name, "reference", "", "", _latency(outcome, base.runner.name), "1.00x"])
    headers = ["engine", "verdict", "fidelity dB", "PSNR change dB", "median ms", "speed-up"]
    table(f"{outcome.bundle}{measured}", headers, rows)
    for left in outcome.left_out:
        warning_line(f"{left.engine} {left.precision} was left out ({left.stage}): {left.reason}")
    console.print(f"report: {outcome.bundle / 'report' / 'report.html'}", soft_wrap=True, markup=False)


def to_json(outcome: "Outcome") -> dict[str, Any]:
    """Return an outcome as JSON values."""
    return {
        "bundle": str(outcome.bundle),
        "report": str(outcome.bundle / "report" / "report.json"),
        "exit_code": outcome.exit_code,
        "architecture": outcome.contract.architecture,
        "scale": outcome.contract.scale,
        "colours": outcome.contract.colours,
        "engines": [
            {
                "file": engine.file,
                "engine": engine.engine,
                "precision": str(engine.precision),
                "verified": engine.verified,
                "fidelity_db": engine.fidelity_db,
                "psnr_drop_db": _drop(engine, outcome),
                "latency_ms": engine.latency_ms,
                "speedup": engine.speedup,
            }
            for engine in outcome.engines
        ],
        "left_out": [
            {"engine": left.engine, "precision": str(left.precision), "stage": left.stage, "reason": left.reason}
            for left in outcome.left_out
        ],
        "bench_shape": None if outcome.bench is None else format_shape(outcome.bench.shape),
        "seconds": outcome.seconds,
    }


def _row(engine: "BundleEngine", outcome: "Outcome") -> list[str]:
    name = f"{engine.engine} {engine.precision}"
    if not engine.verified:
        graph = next((found for key, found in outcome.verdicts.items() if key == f"graph {engine.precision}"), None)
        checked = "" if graph is None else f"{graph.min_fidelity_db:.1f} (graph)"
        return [name, "built, not run here", checked, "", "", ""]
    drop = _drop(engine, outcome)
    fidelity = "" if engine.fidelity_db is None else f"{engine.fidelity_db:.1f}"
    speedup = "" if engine.speedup is None else f"{engine.speedup:.2f}x"
    return [
        name,
        "passed",
        fidelity,
        "" if drop is None else f"{round(-drop, 3) + 0.0:+.3f}",
        _latency(outcome, name),
        speedup,
    ]


def _drop(engine: "BundleEngine", outcome: "Outcome") -> float | None:
    verdict = outcome.verdicts.get(f"{engine.engine} {engine.precision}")
    return None if verdict is None else verdict.psnr_drop_db


def _latency(outcome: "Outcome", name: str) -> str:
    row = None if outcome.bench is None else outcome.bench.row(name, "end-to-end")
    if row is None:
        return ""
    return f"{'' if row.stable else '~'}{row.statistics.median_ms:.2f}"
