"""srdeploy deploy: from a checkpoint to a verified bundle, in one command."""

from typing import TYPE_CHECKING, Any

from srdeploy.cli.console import RichProgress, console, emit_json, next_command, table, warning_line
from srdeploy.cli.options import example, verb
from srdeploy.cli.pipeline.types import DeployOptions
from srdeploy.core.shapes import format_shape

if TYPE_CHECKING:
    from srdeploy.cli.pipeline.types import Outcome
    from srdeploy.runtime.bench.latency import Row
    from srdeploy.runtime.bundle import BundleEngine

EXAMPLE = example(
    """
srdeploy deploy rcan_x4.pt --images photos/ -o rcan_x4.srd
srdeploy deploy rcan_x4.pt --images DIV2K_valid_HR/ --hr --max-psnr-drop 0.05 -o rcan_x4.srd
srdeploy upscale rcan_x4.srd photo.png -o photo_x4.png
"""
)


@verb(DeployOptions, epilog=EXAMPLE)
def command(options: DeployOptions) -> int:
    """Export CHECKPOINT, quantize it, build engines, verify and measure them; write it all as one bundle.

    An engine that misses its gate or cannot be built is excluded from the bundle and named with its reason; the exit
    code is then 6 (gate) or 5 (build), and the bundle holds the others.
    """
    from srdeploy.cli.pipeline.deploy import deploy

    outcome = deploy(options, RichProgress())
    show(outcome)
    if options.as_json:
        emit_json(to_json(outcome))
    next_command("srdeploy", "upscale", str(options.output), "IMAGE", "-o", "OUTPUT")
    return outcome.exit_code


def show(outcome: "Outcome") -> None:
    """Print the result: one line per engine, those excluded with their reason, and where the report is."""
    references = [
        row for result in outcome.benches if (row := result.row(result.rows[0].runner.name, "end-to-end")) is not None
    ]
    rows = [[_reference_name(row), "reference", "", "", "1.00x", row.median_label] for row in references]
    rows += [_row(engine, outcome) for engine in outcome.engines]
    rows += [[outcome.name_of(left), "excluded", "", "", "", ""] for left in outcome.excluded]
    measured = ""
    if references:
        devices = " and ".join("the CPU" if row.runner.device == "cpu" else row.runner.device for row in references)
        measured = f", {format_shape(outcome.benches[0].shape)} on {devices}"
    headers = ["engine", "verdict", "fidelity dB", "PSNR change dB", "speed-up", "median"]
    table(f"{outcome.bundle}{measured}", headers, rows)
    names = [f"{engine.engine} {engine.precision}" for engine in outcome.engines]
    for result in outcome.benches:
        if (fastest := result.fastest(names)) is not None:
            console.print(fastest.sentence, markup=False)
        if result.exchange is not None and result.exchange.changed:
            warning_line(result.exchange.sentence)
    for left in outcome.excluded:
        warning_line(f"{outcome.name_of(left)} was excluded ({left.stage}): {left.reason}")
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
                "device": engine.device,
                "verified": engine.verified,
                "fidelity_db": engine.fidelity_db,
                "psnr_drop_db": _drop(engine, outcome),
                "latency_ms": engine.latency_ms,
                "speedup": engine.speedup,
            }
            for engine in outcome.engines
        ],
        "excluded": [
            {"engine": left.engine, "precision": str(left.precision), "stage": left.stage, "reason": left.reason}
            for left in outcome.excluded
        ],
        "bench_shape": format_shape(outcome.benches[0].shape) if outcome.benches else None,
        "seconds": outcome.seconds,
    }


def _row(engine: "BundleEngine", outcome: "Outcome") -> list[str]:
    name = outcome.name_of(engine)
    if not engine.verified:
        graph = next((found for key, found in outcome.verdicts.items() if key == f"graph {engine.precision}"), None)
        checked = "" if graph is None else f"{graph.min_fidelity_db:.1f} (graph)"
        return [name, "built, not run here", checked, "", "", ""]
    drop = _drop(engine, outcome)
    fidelity = "" if engine.fidelity_db is None else f"{engine.fidelity_db:.1f}"
    speedup = median = ""
    for result in outcome.benches:
        row = result.row(name, "end-to-end")
        if row is not None and (ratio := result.ratio(row)) is not None:
            speedup, median = ratio.label, row.median_label
    return [
        name,
        "passed",
        fidelity,
        "" if drop is None else f"{round(-drop, 3) + 0.0:+.3f}",
        speedup,
        median,
    ]


def _drop(engine: "BundleEngine", outcome: "Outcome") -> float | None:
    result = outcome.verdicts.get(outcome.name_of(engine))
    return None if result is None else result.psnr_drop_db


def _reference_name(row: "Row") -> str:
    return row.runner.name if row.runner.device == "cpu" else f"{row.runner.name} ({row.runner.device})"
