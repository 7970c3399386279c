"""The last stage of the road: remove what failed, and write the report, reproduce.sh and the bundle's manifest."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from srdeploy.cli.pipeline.reproduce import reproducing_lines, write_reproduce_script
from srdeploy.cli.pipeline.road import FP16_ONNX, FP32_ONNX, Candidate, Outcome, Request, Work, target_of
from srdeploy.cli.pipeline.verify import GRAPH_FP16, Verdicts
from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import package_versions
from srdeploy.core.errors import GateError
from srdeploy.core.manifest import Source, manifest_path
from srdeploy.core.shapes import format_shape
from srdeploy.runtime.bench.latency import BenchResult
from srdeploy.runtime.bundle import BundleEngine, write_bundle_manifest
from srdeploy.runtime.report.document import EngineEntry, report_document
from srdeploy.runtime.report.write import write_report

if TYPE_CHECKING:
    from srdeploy.calibration.images.dataset import CalibrationSet
    from srdeploy.models.checkpoint.load import LoadedCheckpoint

QUICK = ("--no-baselines", "--allow-unstable")
"""How `bench` is called by reproduce.sh: what `deploy` itself measures, and noise is no reason to stop a script."""
_DISTRIBUTIONS = (
    "srdeploy",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
)


def finish(
    work: Work,
    candidates: Sequence[Candidate],
    checkpoint: "LoadedCheckpoint",
    calibration: "CalibrationSet",
    verdicts: Verdicts,
    bench: BenchResult | None,
    say: list[str],
) -> Outcome:
    """Close the folder."""
    contract = checkpoint.contract()
    kept = [candidate for candidate in candidates if verdicts.admits(candidate)]
    _drop_failed(work, [candidate for candidate in candidates if candidate not in kept], verdicts)
    _drop_graphs(work, {entry.onnx for entry in kept}, verdicts)
    ranked = sorted(
        ((_bundle_engine(entry, verdicts, bench), entry) for entry in kept), key=lambda pair: _rank(pair[0])
    )
    engines, kept = [engine for engine, _ in ranked], [entry for _, entry in ranked]
    versions = package_versions(_DISTRIBUTIONS)
    source = Source("checkpoint", checkpoint.path.name, checkpoint.sha256)
    lines = reproducing_lines(
        checkpoint=source,
        inputs=_inputs(work.request),
        whole=work.request.words(),
        stages=_stages(work.request, kept, contract),
    )
    _write_report(work, kept, checkpoint, calibration, verdicts, bench, lines)
    write_reproduce_script(work.folder / "reproduce.sh", lines, versions=versions)
    left_out = tuple(entry for entry, _ in work.left_out)
    write_bundle_manifest(
        work.folder,
        contract=contract,
        checkpoint=source,
        engines=engines,
        left_out=left_out,
        details={
            "command": work.request.words(),
            "evidence": checkpoint.evidence.to_json(),
            "bench_shape": None if bench is None else format_shape(bench.shape),
        },
        versions=versions,
    )
    say.append(f"{len(engines)} engines in {work.request.output}")
    return Outcome(
        bundle=work.request.output,
        contract=contract,
        engines=tuple(engines),
        left_out=left_out,
        verdicts=verdicts.by_name,
        bench=bench,
        seconds=work.seconds,
        exit_code=work.left_out[0][1] if work.left_out else 0,
    )


def _drop_failed(work: Work, failed: Sequence[Candidate], verdicts: Verdicts) -> None:
    """Delete the engines that missed their gate."""
    for candidate in failed:
        verdict = verdicts.of(candidate)
        assert verdict is not None
        work.leave_out(candidate, "verify", "; ".join(verdict.failures), GateError.exit_code)
        if candidate.file != candidate.onnx:
            _remove(work.folder / candidate.file)


def _drop_graphs(work: Work, needed: Collection[str], verdicts: Verdicts) -> None:
    """Delete the graphs of a lower precision that no engine of the bundle stands for.

    FP16 stays unless its own check failed: it is what engines on other machines are built from.
    """
    for path in sorted(work.folder.glob("model.*.onnx")):
        fp16 = verdicts.by_name.get(GRAPH_FP16)
        admitted = path.name == FP16_ONNX and (fp16 is None or fp16.passed)
        if path.name not in needed and path.name != FP32_ONNX and not admitted:
            _remove(path)


def _remove(artifact: Path) -> None:
    artifact.unlink()
    manifest_path(artifact).unlink()


def _bundle_engine(candidate: Candidate, verdicts: Verdicts, bench: BenchResult | None) -> BundleEngine:
    verdict = verdicts.by_name.get(candidate.name)
    row = None if bench is None else bench.row(candidate.name, "end-to-end")
    return BundleEngine(
        file=candidate.file,
        engine=candidate.engine,
        precision=candidate.precision,
        verified=verdict is not None,
        fidelity_db=None if verdict is None else verdict.min_fidelity_db,
        latency_ms=None if row is None else round(row.statistics.median_ms, 4),
        speedup=None if row is None or bench is None else bench.ratio(row),
    )


def _rank(engine: BundleEngine) -> tuple[bool, float]:
    """Order engines: first those that never ran here (they want a better machine), then the fastest.

    `choose_engine` puts verified engines first where both can run.
    """
    return engine.latency_ms is not None, engine.latency_ms or 0.0


def _write_report(
    work: Work,
    kept: Sequence[Candidate],
    checkpoint: "LoadedCheckpoint",
    calibration: "CalibrationSet",
    verdicts: Verdicts,
    bench: BenchResult | None,
    commands: Sequence[str],
) -> None:
    document = report_document(
        title=work.request.output.name,
        contract=checkpoint.contract(),
        engines=_entries(work, kept, verdicts),
        bench=() if bench is None else bench,
        checkpoint={
            "name": checkpoint.path.name,
            "sha256": checkpoint.sha256,
            "dialect": checkpoint.dialect,
            "evidence": checkpoint.evidence.to_json(),
        },
        calibration=calibration.to_json(),
        sensitivity=next((entries for entries in work.sensitivity.values() if entries), []),
        searches=work.searches,
        stages=[{"name": name, "seconds": work.seconds[name], "note": work.notes[name]} for name in work.seconds],
        commands=commands,
    )
    write_report(document, work.folder / "report")


def _entries(work: Work, kept: Sequence[Candidate], verdicts: Verdicts) -> list[EngineEntry]:
    """Return the report's lines: engines, graphs that were checked in place of one, and what was left out."""
    entries = [_entry(work.folder, candidate, verdicts) for candidate in kept]
    for name, onnx in verdicts.graphs.items():
        path, verdict = work.folder / onnx, verdicts.by_name[name]
        there = path.exists()
        entries.append(
            EngineEntry(
                name,
                "onnxruntime",
                verdict.candidate.contract.precision,
                file=onnx if there else None,
                size_bytes=path.stat().st_size if there else None,
                sha256=sha256_of_file(path) if there else None,
                verify=verdict,
                left_out=not there,
            )
        )
    for left, _ in work.left_out:
        name = f"{left.engine} {left.precision}"
        judged = verdicts.by_name.get(name)  # where there is one, its failures are the reason
        reason = None if judged is not None else f"{left.stage}: {left.reason}"
        entries.append(EngineEntry(name, left.engine, left.precision, verify=judged, reason=reason, left_out=True))
    return entries


def _entry(folder: Path, candidate: Candidate, verdicts: Verdicts) -> EngineEntry:
    path = folder / candidate.file
    reason = verdicts.obstacles.get(candidate.name)
    if reason is not None and candidate.graph_name in verdicts.by_name:
        reason += f"; its graph was checked on ONNX Runtime instead (line {candidate.graph_name!r})"
    return EngineEntry(
        candidate.name,
        candidate.engine,
        candidate.precision,
        file=candidate.file,
        size_bytes=path.stat().st_size,
        sha256=sha256_of_file(path),
        precision_built=candidate.built,
        verify=verdicts.by_name.get(candidate.name),
        reason=reason,
    )


def _inputs(request: Request) -> dict[str, Path]:
    inputs = {"CHECKPOINT": request.checkpoint, "IMAGES": request.images}
    return inputs if request.evaluate is None else {**inputs, "EVALUATE": request.evaluate}


def _stages(request: Request, kept: Sequence[Candidate], contract: ModelContract) -> list[list[str]]:
    """Return the road verb by verb, with "$NAME" words for inputs and outputs."""
    stated = request.stated.flags()
    hr = ["--hr"] if request.hr else []
    commands = [["srdeploy", "export", "$CHECKPOINT", *stated, "-o", f"$OUT/{FP32_ONNX}"]]
    graphs = {entry.onnx: entry for entry in kept if entry.onnx != FP32_ONNX}
    for onnx, entry in graphs.items():
        words = ["srdeploy", "quantize", f"$OUT/{FP32_ONNX}", "--precision", str(entry.precision)]
        words += ["--target", str(target_of(entry.engine)), "--images", "$IMAGES", *hr]
        if request.max_psnr_drop is not None and onnx != FP16_ONNX:
            words += ["--max-psnr-drop", f"{request.max_psnr_drop:g}"]
        commands.append([*words, "-o", f"$OUT/{onnx}"])
    profile = request.profile(contract)
    for entry in kept:
        if entry.file == entry.onnx:
            continue
        words = ["srdeploy", "build", f"$OUT/{entry.onnx}", "--engine", entry.engine]
        if entry.engine.startswith("tensorrt"):
            for name, size in (("min", profile.min), ("opt", profile.opt), ("max", profile.max)):
                words += [f"--{name}-shape", format_shape(size)]
            if entry.engine == "tensorrt-rtx":
                words += [
                    word for capability in request.compute_capabilities for word in ("--compute-capability", capability)
                ]
        commands.append([*words, "-o", f"$OUT/{entry.file}"])
    evaluate = "$IMAGES" if request.evaluate is None else "$EVALUATE"
    source = ["--hr", evaluate] if request.hr else ["--images", evaluate]
    runnable = [entry for entry in kept if not entry.engine.startswith("tensorrt")]
    for entry in runnable:
        commands.append(["srdeploy", "verify", f"$OUT/{entry.file}", "--against", "$CHECKPOINT", *stated, *source])
    if runnable:
        files = [f"$OUT/{entry.file}" for entry in runnable]
        shape = format_shape(request.shape(contract))
        commands.append(["srdeploy", "bench", *files, "--against", "$CHECKPOINT", *stated, "--shape", shape, *QUICK])
    return commands
