"""srdeploy bench: latency beside the eager network, in one run under one set of rules."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from srdeploy.cli.checkpoint_options import CheckpointOptions, checkpoint_options, load_from_options
from srdeploy.cli.console import RichProgress, emit_json, markdown_table, next_command, table, warning_line
from srdeploy.cli.options import EXISTING, OUTPUT_PATH, SHAPE, example, force_option, json_option, refuse_two_documents
from srdeploy.core.errors import UsageError
from srdeploy.core.runner import Runner
from srdeploy.core.shapes import Shape, format_shape
from srdeploy.core.sizes import format_bytes

if TYPE_CHECKING:
    from srdeploy.models.checkpoint.load import LoadedCheckpoint
    from srdeploy.runtime.bench.latency import BenchResult, Effort, Row

EXAMPLE = example(
    """
srdeploy bench model.fp16.onnx model.int8.openvino.blob --against rcan_x2.pt --shape 1x3x180x320
srdeploy bench model.onnx --against rcan_x2.pt --shape 1x3x64x64 --sizes 32,64,128,256 --batches 1,2,4 --report bench/
"""
)

HEADERS = ("runner", "measured", "median ms", "p90", "p99", "min", "images/s", "ratio", "CoV", "runs", "memory")

EAGER_BASELINES = ("eager", "channels-last", "half", "autocast", "compile", "aot")
ENGINE_BASELINES = ("onnxruntime", "openvino-f32", "openvino")
BASELINES = (*EAGER_BASELINES, *ENGINE_BASELINES)
"""What --baseline takes; "eager" is always measured, as ratios refer to it."""


class _Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers joined by commas."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse the text; a wrong one is a usage error."""
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of positive whole numbers such as 1,2,4", param, ctx)
        return tuple(sorted({int(part) for part in parts}))


@click.command(epilog=EXAMPLE)
@click.argument("candidates", nargs=-1, required=True, type=EXISTING, metavar="ONNX-OR-ENGINE...")
@click.option("--against", "checkpoint", type=EXISTING, required=True, help="Checkpoint: the eager baselines.")
@click.option("--shape", type=SHAPE, required=True, help="Input shape, such as 1x3x180x320.")
@click.option("--engine", help="Engine family for ONNX files (default onnxruntime).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for every runner; default: all.")
@click.option("--baseline", "baselines", multiple=True, type=click.Choice(BASELINES), help="Only these; repeatable.")
@click.option("--no-baselines", is_flag=True, help="Only the eager FP32 network, to which ratios refer.")
@click.option("--seconds", type=float, default=4.0, show_default=True, help="Measuring time per row.")
@click.option("--warmup-seconds", type=float, default=0.5, show_default=True, help="Least warm-up time per row.")
@click.option("--min-runs", type=click.IntRange(min=5), default=15, show_default=True, help="Least measured runs.")
@click.option("--tolerance", type=float, default=5.0, show_default=True, metavar="%", help="What a stable median is.")
@click.option("--allow-unstable", is_flag=True, help="Do not fail on unstable medians; they stay unprinted.")
@click.option("--batches", type=_Numbers(), help="Also: throughput over these batch sizes.")
@click.option("--streams", type=_Numbers(), help="Also: throughput with so many runs at once.")
@click.option("--sizes", type=_Numbers(), help="Also: latency of squares of these sides, against the machine's floor.")
@click.option("--report", "report_folder", type=OUTPUT_PATH, metavar="DIR", help="Write report.json and report.html.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown on stdout.")
@force_option
@json_option
@checkpoint_options
def command(
    candidates: tuple[Path, ...], checkpoint: Path, shape: Shape, stated: CheckpointOptions, **options: Any
) -> None:
    """Measure engines and ONNX files in turns with the eager network and the other usual ways of running it.

    Every runner is warmed up, then they take turns, so that a slower moment of the machine meets all of them. Rows say
    "compute" (the network alone) or "end-to-end" (numpy to numpy). A median that is not known to --tolerance is not
    printed, and the command ends with exit code 7.
    """
    from srdeploy.core.artifact import check_output_folder
    from srdeploy.runtime.bench.conditions import conditions
    from srdeploy.runtime.bench.latency import Effort, bench, with_process_memory

    refuse_two_documents(as_json=options["as_json"], markdown=options["markdown"])
    effort = Effort(
        warmup_seconds=options["warmup_seconds"],
        min_runs=options["min_runs"],
        seconds=options["seconds"],
        tolerance=options["tolerance"] / 100.0,
    )
    if options["report_folder"] is not None:
        check_output_folder(options["report_folder"], force=options["force"], known_by="report.json")
    progress = RichProgress()
    loaded = load_from_options(checkpoint, stated, progress, quiet=options["as_json"])
    channels = loaded.contract().channels
    if shape[1] != channels:
        raise UsageError(
            f"--shape {format_shape(shape)} has {shape[1]} channels", expected=f"{channels} for {checkpoint.name}"
        )
    with ExitStack() as stack:
        runners = _runners(candidates, loaded, shape, stack, options, progress)
        result = bench(runners, shape=shape, effort=effort, environment=conditions(), progress=progress)
        names = [runner.info.name for runner in runners[-len(candidates) :]]
        files = {name: (path, options["engine"]) for path, name in zip(candidates, names, strict=True)}
        result = with_process_memory(result, files, threads=options["threads"])
        studies = _studies(candidates, runners, loaded, shape, effort, options, progress)
    _show(result, studies, options)
    if options["report_folder"] is not None:
        _write_report(result, studies, candidates, loaded, options)
    if options["as_json"]:
        emit_json({**result.to_json(), "studies": studies})
    if options["allow_unstable"]:
        for row in result.unstable:
            warning_line(f"{row.runner.name} ({row.kind}) is unstable: {row.why_unstable}")
    else:
        result.require_stable()
    next_command("srdeploy", "verify", *map(str, candidates), "--against", str(checkpoint), "--images", "IMAGES")


def _runners(
    candidates: Sequence[Path],
    loaded: "LoadedCheckpoint",
    shape: Shape,
    stack: ExitStack,
    options: dict[str, Any],
    progress: RichProgress,
) -> list[Runner]:
    """Open the baselines, the plain eager network first, and then the candidates."""
    from srdeploy.cli.opening import open_candidates
    from srdeploy.runtime.bench.baselines import default_baselines, open_baselines

    opening = {name: options[name] for name in ("engine", "device", "threads")}
    engines = open_candidates(candidates, loaded, stack, parity=False, **opening)
    # Eager baselines compute where the engines do: a CPU network beside a GPU engine compares machines.
    device = next((engine.info.device for engine in engines if engine.info.device.startswith("cuda")), "cpu")
    wanted = set(options["baselines"]) or {*default_baselines(device), *ENGINE_BASELINES}
    if options["no_baselines"]:
        wanted = set()
    names = [name for name in EAGER_BASELINES if name in wanted]
    opened = open_baselines(
        loaded, names, stack, shape=shape, device=device, threads=options["threads"], progress=progress
    )
    runners = list(opened.runners)
    if device == "cpu":
        runners += _engine_baselines(candidates, engines, loaded, wanted, stack, options, progress)
    taken = {runner.info.name for runner in engines}
    return [runner for runner in runners if runner.info.name not in taken] + engines


def _engine_baselines(
    candidates: Sequence[Path],
    engines: Sequence[Runner],
    loaded: "LoadedCheckpoint",
    wanted: set[str],
    stack: ExitStack,
    options: dict[str, Any],
    progress: RichProgress,
) -> list[Runner]:
    """Open the FP32 graph in ONNX Runtime and OpenVINO: a candidate's file where there is one, else a fresh export."""
    from srdeploy.core.extras import is_installed
    from srdeploy.core.onnx_file import read_graph
    from srdeploy.core.precision import Precision
    from srdeploy.runtime.bench.latency import named
    from srdeploy.runtime.engines.openvino import open_native
    from srdeploy.runtime.engines.registry import open_engine

    chosen = {
        "onnxruntime": ("onnxruntime", False, "onnxruntime fp32"),
        "openvino-f32": ("openvino", False, "openvino fp32 (hint f32)"),
        "openvino": ("openvino", True, "openvino fp32 (own choice)"),
    }
    chosen = {name: entry for name, entry in chosen.items() if name in wanted and is_installed(entry[0])}
    if not chosen:
        return []
    plain = [
        path
        for path, engine in zip(candidates, engines, strict=True)
        if path.suffix == ".onnx" and engine.info.contract.precision is Precision.FP32
    ]
    graph = plain[0] if plain else _exported(loaded, stack, progress)
    runners: list[Runner] = []
    for family, native, name in chosen.values():
        if native:
            runner: Runner = open_native(read_graph(graph), threads=options["threads"])
        else:
            runner = open_engine(graph, engine=family, threads=options["threads"], parity=True)
        runners.append(named(stack.enter_context(runner), name))
    return runners


def _exported(loaded: "LoadedCheckpoint", stack: ExitStack, progress: RichProgress) -> Path:
    from srdeploy.export.exporter import export_onnx

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="srdeploy-bench-")))
    progress.note("exporting the FP32 graph for the ONNX Runtime and OpenVINO baselines")
    export_onnx(loaded, folder / "fp32.onnx", progress=progress)
    return folder / "fp32.onnx"


def _studies(
    candidates: Sequence[Path],
    runners: Sequence[Runner],
    loaded: "LoadedCheckpoint",
    shape: Shape,
    effort: "Effort",
    options: dict[str, Any],
    progress: RichProgress,
) -> dict[str, Any]:
    from dataclasses import replace

    from srdeploy.runtime.bench.studies import scaling, stream_throughput, throughput
    from srdeploy.runtime.engines.registry import open_engine

    # A curve has many points, and its shape is clear with half the time and half the precision for each.
    effort = replace(
        effort,
        min_runs=max(5, effort.min_runs * 2 // 3),
        seconds=effort.seconds / 2,
        tolerance=effort.tolerance * 2,
        drift=effort.drift * 2,
    )
    studies: dict[str, Any] = {}
    if options["batches"]:
        studies["throughput"] = throughput(runners, shape, options["batches"], effort, progress=progress)
    if options["streams"]:

        def opener(path: Path) -> Any:
            return lambda threads: open_engine(
                path, engine=options["engine"], device=options["device"], threads=threads
            )

        studies["streams"] = stream_throughput(
            {path.name: opener(path) for path in candidates}, shape, options["streams"], effort, progress=progress
        )
    if options["sizes"]:
        studies["scaling"] = scaling(runners, shape, options["sizes"], loaded.spec, effort, progress=progress)
    return studies


def _show(result: "BenchResult", studies: dict[str, Any], options: dict[str, Any]) -> None:
    rows = [_row(result, row) for row in result.rows]
    headers = [*HEADERS, "GPU memory"] if _on_gpu(result) else list(HEADERS)
    if options["markdown"]:
        click.echo(markdown_table(headers, rows))
    else:
        table(f"latency at {format_shape(result.shape)}, ratio to {result.rows[0].runner.name}", headers, rows)
    for name, study in studies.items():
        steps, lines = _study_table(name, study)
        if options["markdown"]:
            click.echo("\n" + markdown_table(steps, lines))
        else:
            table(f"{name}: {study['note']}", steps, lines)


def _row(result: "BenchResult", row: "Row") -> list[str]:
    from srdeploy.runtime.bench.latency import NOT_MEASURED

    numbers = row.statistics
    ratio = result.ratio(row)
    memory = result.memory.get(row.runner.name, NOT_MEASURED)
    cells = [
        row.runner.name,
        row.kind,
        f"{numbers.median_ms:.3g}" if row.stable else "unstable",
        f"{numbers.p90_ms:.3g}",
        f"{numbers.p99_ms:.3g}",
        f"{numbers.min_ms:.3g}",
        f"{1000 * result.shape[0] / numbers.median_ms:.3g}" if row.stable else "",
        f"{ratio:.2f}" if ratio is not None and row.stable else "",
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
    for floor, words in (("floor", "floor: multiply-adds"), ("memory_floor", "floor: memory traffic")):
        if floor in study:
            lines.append([words, *(f"{point['ms']:.3g}" for point in study[floor])])
    return ["runner", *(f"{key} {step}" for step in steps)], lines


def _write_report(
    result: "BenchResult",
    studies: dict[str, Any],
    candidates: Sequence[Path],
    loaded: "LoadedCheckpoint",
    options: dict[str, Any],
) -> None:
    from srdeploy.cli.opening import benched_entry, spoken_command
    from srdeploy.runtime.report.document import report_document
    from srdeploy.runtime.report.write import write_report

    infos = list(dict.fromkeys(row.runner.name for row in result.rows))[-len(candidates) :]
    by_name = {row.runner.name: row.runner for row in result.rows}
    document = report_document(
        title=f"Latency of {', '.join(path.name for path in candidates)}",
        contract=loaded.contract(),
        engines=[benched_entry(path, by_name[name]) for path, name in zip(candidates, infos, strict=True)],
        bench=result,
        studies=studies,
        checkpoint={"name": loaded.path.name, "dialect": loaded.dialect, "evidence": loaded.evidence.to_json()},
        commands=[spoken_command()],
    )
    write_report(document, options["report_folder"], force=options["force"])
