"""srdeploy bench: latency next to the eager network, in one run under one set of rules."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from srdeploy.cli.checkpoint_options import CheckpointOptions, load_from_options
from srdeploy.cli.console import RichProgress, emit_json, markdown_table, next_command, table, warning_line
from srdeploy.cli.options import (
    DEVICE,
    EXISTING,
    FORCE,
    JSON,
    NUMBERS,
    OUTPUT_PATH,
    POSITIVE,
    SHAPE,
    argument,
    arguments,
    example,
    option,
    option_group,
    refuse_two_documents,
    verb,
)
from srdeploy.core.errors import UsageError
from srdeploy.core.runner import Runner
from srdeploy.core.shapes import Shape, format_shape
from srdeploy.core.sizes import format_bytes

if TYPE_CHECKING:
    from srdeploy.models.checkpoint.load import LoadedCheckpoint
    from srdeploy.runtime.bench.latency import BenchResult, Row
    from srdeploy.runtime.bench.turns import Effort

EXAMPLE = example(
    """
srdeploy bench model.fp16.onnx model.int8.openvino.blob --against rcan_x2.pt --shape 1x3x180x320
srdeploy bench model.onnx --against rcan_x2.pt --shape 1x3x64x64 --sizes 32,64,128,256 --batches 1,2,4 --report bench/
"""
)

HEADERS = (
    "runner",
    "measured",
    "speed-up",
    "median",
    "x floor",
    "p90 ms",
    "p99",
    "min",
    "first",
    "images/s",
    "CoV",
    "runs",
    "memory",
)

EAGER_BASELINES = ("eager", "channels-last", "half", "autocast", "compile", "aot")
ENGINE_BASELINES = ("onnxruntime", "openvino-f32", "openvino")
BASELINES = (*EAGER_BASELINES, *ENGINE_BASELINES)
"""What --baseline takes; "eager" is always measured, since ratios refer to it."""


@arguments
class BenchOptions:
    """What `srdeploy bench` is given."""

    candidates: tuple[Path, ...] = argument(type=EXISTING, metavar="ONNX-OR-ENGINE...", many=True)
    checkpoint: Path = option("--against", type=EXISTING, help="Checkpoint: the eager baselines.")
    checkpoint_options: CheckpointOptions = option_group(default_factory=CheckpointOptions)
    shape: Shape = option("--shape", type=SHAPE, help="Input shape, such as 1x3x180x320.")
    engine: str | None = option("--engine", default=None, help="Engine family for ONNX files (default onnxruntime).")
    device: str = option("--device", default="auto", show_default=True, help=DEVICE)
    threads: int | None = option(
        "--threads", type=POSITIVE, default=None, help="CPU threads for every runner; default: all."
    )
    baselines: tuple[str, ...] = option(
        "--baseline", type=click.Choice(BASELINES), default=(), help="Only these; repeatable."
    )
    no_baselines: bool = option(
        "--no-baselines", default=False, help="Only the eager FP32 network, to which ratios refer."
    )
    seconds: float = option("--seconds", type=float, default=4.0, show_default=True, help="Measuring time per row.")
    warmup_seconds: float = option(
        "--warmup-seconds", type=float, default=0.5, show_default=True, help="Minimum warm-up time per row."
    )
    min_runs: int = option(
        "--min-runs", type=click.IntRange(min=5), default=15, show_default=True, help="Minimum number of measured runs."
    )
    tolerance: float = option(
        "--tolerance",
        type=float,
        default=5.0,
        show_default=True,
        metavar="%",
        help="Maximum half width of the 95 % interval of a speed-up, and of a stable median.",
    )
    allow_unstable: bool = option(
        "--allow-unstable", default=False, help="Do not fail on speed-ups that are not known to --tolerance."
    )
    batches: tuple[int, ...] | None = option(
        "--batches", type=NUMBERS, default=None, help="Also: throughput over these batch sizes."
    )
    streams: tuple[int, ...] | None = option(
        "--streams", type=NUMBERS, default=None, help="Also: throughput with so many runs at once."
    )
    sizes: tuple[int, ...] | None = option(
        "--sizes",
        type=NUMBERS,
        default=None,
        help="Also: latency of squares of these sides, against the machine's floor.",
    )
    report: Path | None = option(
        "--report", type=OUTPUT_PATH, default=None, metavar="DIR", help="Write report.json and report.html."
    )
    markdown: bool = option("--markdown", default=False, help="Print the table as Markdown on stdout.")
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)


@verb(BenchOptions, epilog=EXAMPLE)
def command(options: BenchOptions) -> None:
    """Measure engines and ONNX files in turns with the eager network and the other usual ways of running it.

    The eager network runs on the device of the engines. Every runner is warmed up, then they take turns, so that a
    slow moment of the machine affects all of them. Rows state "compute" (the network alone) or "end-to-end" (numpy to
    numpy). Speed-ups compare what ran in the same round and carry a 95 % interval; one that is wider than --tolerance
    ends the command with exit code 7. A median that is not known to --tolerance carries its uncertainty.
    """
    from srdeploy.cli.pipeline.measure import measure_groups, with_process_memories

    effort = _effort(options)
    _check(options)
    progress = RichProgress()
    loaded = load_from_options(options.checkpoint, options.checkpoint_options, progress, quiet=options.as_json)
    _check_channels(options, loaded)
    with ExitStack() as stack:
        engines = _engines(options, loaded, stack)
        groups = _groups(options, engines, loaded, stack, progress)
        _check_studies(options, groups)
        results = measure_groups(groups, options.shape, cost=loaded.spec, effort=effort, progress=progress)
        studies = _studies(options, groups, loaded, effort, progress)
    files = {runner.info.name: (path, options.engine) for path, runner in zip(options.candidates, engines, strict=True)}
    results = with_process_memories(results, files, options.threads)
    _show(results, studies, markdown=options.markdown)
    if options.report is not None:
        _write_report(options, options.report, results, studies, engines, loaded)
    if options.as_json:
        devices = {"devices": [result.to_json() for result in results]} if len(results) > 1 else {}
        emit_json({**results[0].to_json(), "studies": studies, **devices})
    for result in results:
        if result.exchange is not None and result.exchange.changed:
            warning_line(result.exchange.sentence)
        if not options.allow_unstable:
            result.require_stable()
        for row in result.unstable:
            warning_line(f"median of {row.runner.name} ({row.kind}) is unstable: {row.why_unstable}")
    files_given = map(str, options.candidates)
    next_command("srdeploy", "verify", *files_given, "--against", str(options.checkpoint), "--images", "IMAGES")


def _effort(options: BenchOptions) -> "Effort":
    from srdeploy.runtime.bench.turns import Effort

    return Effort(
        warmup_seconds=options.warmup_seconds,
        min_runs=options.min_runs,
        seconds=options.seconds,
        tolerance=options.tolerance / 100.0,
    )


def _check(options: BenchOptions) -> None:
    """Refuse options that do not fit together, before any work."""
    from srdeploy.core.artifact import check_output_folder

    refuse_two_documents(as_json=options.as_json, markdown=options.markdown)
    if options.report is not None:
        check_output_folder(options.report, force=options.force, known_by="report.json")


def _check_channels(options: BenchOptions, loaded: "LoadedCheckpoint") -> None:
    channels = loaded.contract().channels
    if options.shape[1] != channels:
        raise UsageError(
            f"--shape {format_shape(options.shape)} has {options.shape[1]} channels",
            expected=f"{channels} for {options.checkpoint.name}",
        )


def _engines(options: BenchOptions, loaded: "LoadedCheckpoint", stack: ExitStack) -> list[Runner]:
    from srdeploy.cli.pipeline.opening import open_candidates

    return open_candidates(
        options.candidates,
        loaded,
        stack,
        engine=options.engine,
        device=options.device,
        threads=options.threads,
        parity=False,
    )


def _groups(
    options: BenchOptions,
    engines: Sequence[Runner],
    loaded: "LoadedCheckpoint",
    stack: ExitStack,
    progress: RichProgress,
) -> list[list[Runner]]:
    """Group the engines by device, after the baselines on that device, the plain eager network first."""
    from srdeploy.cli.pipeline.measure import with_baselines
    from srdeploy.runtime.bench.baselines import default_baselines, open_baselines

    def baselines(device: str) -> list[Runner]:
        usual = options.baselines or (*default_baselines(device), *ENGINE_BASELINES)
        chosen = {"eager"} if options.no_baselines else {"eager", *usual}
        opened = open_baselines(
            loaded,
            [name for name in EAGER_BASELINES if name in chosen],
            stack,
            shape=options.shape,
            device=device,
            threads=options.threads,
            progress=progress,
        )
        runners: list[Runner] = list(opened.runners)
        if device == "cpu":
            runners += _engine_baselines(options, engines, loaded, chosen, stack, progress)
        return runners

    return with_baselines(engines, baselines)


def _engine_baselines(
    options: BenchOptions,
    engines: Sequence[Runner],
    loaded: "LoadedCheckpoint",
    chosen: set[str],
    stack: ExitStack,
    progress: RichProgress,
) -> list[Runner]:
    """Open the FP32 graph in ONNX Runtime and OpenVINO: a candidate's file if one is FP32, else a fresh export."""
    from srdeploy.core.extras import is_installed
    from srdeploy.core.onnx_file import read_graph
    from srdeploy.core.precision import Precision
    from srdeploy.runtime.bench.naming import named
    from srdeploy.runtime.engines.openvino import open_native
    from srdeploy.runtime.engines.registry import open_engine

    rows = {
        "onnxruntime": ("onnxruntime", False, "onnxruntime fp32"),
        "openvino-f32": ("openvino", False, "openvino fp32 (hint f32)"),
        "openvino": ("openvino", True, "openvino fp32 (own choice)"),
    }
    rows = {name: entry for name, entry in rows.items() if name in chosen and is_installed(entry[0])}
    if not rows:
        return []
    plain = [
        path
        for path, engine in zip(options.candidates, engines, strict=True)
        if path.suffix == ".onnx" and engine.info.contract.precision is Precision.FP32
    ]
    graph = plain[0] if plain else _exported(loaded, stack, progress)
    runners: list[Runner] = []
    for family, native, name in rows.values():
        if native:
            runner: Runner = open_native(read_graph(graph), threads=options.threads)
        else:
            runner = open_engine(graph, engine=family, threads=options.threads, parity=True)
        runners.append(named(stack.enter_context(runner), name))
    return runners


def _exported(loaded: "LoadedCheckpoint", stack: ExitStack, progress: RichProgress) -> Path:
    from srdeploy.export.exporter import export_onnx

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="srdeploy-bench-")))
    progress.note("exporting the FP32 graph for the ONNX Runtime and OpenVINO baselines")
    export_onnx(loaded, folder / "fp32.onnx", progress=progress)
    return folder / "fp32.onnx"


def _check_studies(options: BenchOptions, groups: Sequence[Sequence[Runner]]) -> None:
    if len(groups) > 1 and (options.batches or options.streams or options.sizes):
        raise UsageError(
            "--batches, --streams and --sizes with engines on several devices",
            expected="engines on one device",
            next_step="measure the engines of each device in a command of their own",
        )


def _studies(
    options: BenchOptions,
    groups: Sequence[Sequence[Runner]],
    loaded: "LoadedCheckpoint",
    effort: "Effort",
    progress: RichProgress,
) -> dict[str, Any]:
    from dataclasses import replace

    from srdeploy.runtime.bench.studies import scaling, stream_throughput, throughput
    from srdeploy.runtime.engines.registry import open_engine

    (runners, *_) = groups
    shape = options.shape
    # A curve has many points, and its shape is clear with half the time and half the precision for each.
    effort = replace(
        effort,
        min_runs=max(5, effort.min_runs * 2 // 3),
        seconds=effort.seconds / 2,
        tolerance=effort.tolerance * 2,
        drift=effort.drift * 2,
    )
    studies: dict[str, Any] = {}
    if options.batches:
        studies["throughput"] = throughput(runners, shape, options.batches, effort, progress=progress)
    if options.streams:

        def opener(path: Path) -> Any:
            return lambda threads: open_engine(path, engine=options.engine, device=options.device, threads=threads)

        studies["streams"] = stream_throughput(
            {path.name: opener(path) for path in options.candidates}, shape, options.streams, effort, progress=progress
        )
    if options.sizes:
        studies["scaling"] = scaling(runners, shape, options.sizes, loaded.spec, effort, progress=progress)
    return studies


def _show(results: "Sequence[BenchResult]", studies: dict[str, Any], *, markdown: bool) -> None:
    for result in results:
        rows = [_row(result, row) for row in result.rows]
        headers = [*HEADERS, "GPU memory"] if _on_gpu(result) else list(HEADERS)
        base = result.rows[0].runner
        _print(
            f"latency at {format_shape(result.shape)}, speed-up over {base.name} on {base.device}",
            headers,
            rows,
            markdown,
        )
    for name, study in studies.items():
        steps, lines = _study_table(name, study)
        _print(f"{name}: {study['note']}", steps, lines, markdown)


def _print(title: str, headers: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> None:
    if markdown:
        click.echo(markdown_table(headers, rows))
    else:
        table(title, headers, rows)


def _row(result: "BenchResult", row: "Row") -> list[str]:
    from srdeploy.runtime.bench.latency import NOT_MEASURED

    numbers = row.statistics
    ratio, distance = result.ratio(row), result.distance(row)
    memory = result.memory.get(row.runner.name, NOT_MEASURED)
    cells = [
        row.runner.name,
        row.kind,
        "" if ratio is None else ratio.label,
        row.median_label,
        "" if distance is None else f"{distance:.1f}",
        f"{numbers.p90_ms:.3g}",
        f"{numbers.p99_ms:.3g}",
        f"{numbers.min_ms:.3g}",
        f"{result.first_run_ms[row.runner.name]:.3g}" if row.runner.name in result.first_run_ms else "",
        f"{1000 * result.shape[0] / numbers.median_ms:.3g}" if row.stable else "",
        f"{numbers.cov:.1%}",
        str(numbers.n),
        "" if memory.process_bytes is None else format_bytes(memory.process_bytes),
    ]
    if _on_gpu(result):
        cells.append("" if memory.device_bytes is None else format_bytes(memory.device_bytes))
    return cells


def _on_gpu(result: "BenchResult") -> bool:
    return any(row.runner.device != "cpu" for row in result.rows)


def _study_table(name: str, study: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    keys = {"throughput": ("batch", "images_per_second"), "streams": ("streams", "images_per_second")}
    key, value = keys.get(name, ("side", "median_ms"))
    steps = sorted({point[key] for entry in study["runners"] for point in entry["points"]})
    lines = []
    for entry in study["runners"]:
        found = {
            point[key]: f"{point[value]:.3g}" if point.get("stable", True) else "unstable" for point in entry["points"]
        }
        lines.append([entry["name"], *(found.get(step, "") for step in steps)])
    for floor, label in (("floor", "floor: multiply-adds"), ("memory_floor", "floor: memory traffic")):
        if floor in study:
            lines.append([label, *(f"{point['ms']:.3g}" for point in study[floor])])
    return ["runner", *(f"{key} {step}" for step in steps)], lines


def _write_report(
    options: BenchOptions,
    folder: Path,
    results: "Sequence[BenchResult]",
    studies: dict[str, Any],
    engines: Sequence[Runner],
    loaded: "LoadedCheckpoint",
) -> None:
    from srdeploy.cli.pipeline.entries import checkpoint_entry, measured_entry, this_command
    from srdeploy.runtime.report.document import report_document
    from srdeploy.runtime.report.write import write_report

    document = report_document(
        title=f"Latency of {', '.join(path.name for path in options.candidates)}",
        contract=loaded.contract(),
        engines=[measured_entry(path, runner.info) for path, runner in zip(options.candidates, engines, strict=True)],
        bench=results,
        studies=studies,
        checkpoint=checkpoint_entry(loaded),
        commands=[this_command()],
    )
    write_report(document, folder, force=options.force)
