"""The last stage of `deploy`: remove what failed, and write the report, reproduce.sh, the card and the manifest."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.cli.options import command_line
from srdeploy.cli.pipeline.card import model_card
from srdeploy.cli.pipeline.entries import checkpoint_entry
from srdeploy.cli.pipeline.reproduce import reproducing_lines, write_reproduce_script
from srdeploy.cli.pipeline.types import (
    FP16_ONNX,
    FP32_ONNX,
    GRAPH_FP16,
    ORIGINAL_ONNX,
    Candidate,
    Outcome,
    Verdicts,
    Work,
)
from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import package_versions
from srdeploy.core.errors import GateError
from srdeploy.core.manifest import Source, manifest_path
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.shapes import format_shape
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.bench.latency import BenchResult
from srdeploy.runtime.bundle import CARD, BundleEngine, write_bundle_manifest
from srdeploy.runtime.report.document import EngineEntry, report_document
from srdeploy.runtime.report.write import write_report

_DISTRIBUTIONS = (
    "srdeploy",
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "ncnn",
    "pnnx",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
)


def finish(
    work: Work,
    candidates: Sequence[Candidate],
    checkpoint: LoadedCheckpoint,
    calibration: CalibrationSet,
    verdicts: Verdicts,
    benches: Sequence[BenchResult],
    report: list[str],
) -> Outcome:
    """Complete the bundle's folder."""
    contract = _contract(work, checkpoint)
    kept = [candidate for candidate in candidates if verdicts.accepts(candidate)]
    _drop_failed(work, [candidate for candidate in candidates if candidate not in kept], verdicts)
    _drop_graphs(work, {entry.onnx for entry in kept}, verdicts)
    kept = sorted(kept, key=partial(_rank, benches=benches))
    engines = [_bundle_engine(entry, verdicts, benches) for entry in kept]
    versions = package_versions(_DISTRIBUTIONS)
    source = Source("checkpoint", checkpoint.path.name, checkpoint.sha256)
    lines = reproducing_lines(
        source,
        work.options,
        kept,
        checkpoint.contract(),
        ran=verdicts.runnable(kept),
        fp16=(work.folder / FP16_ONNX).exists(),
        compression=work.compression,
    )
    document = _write_report(work, kept, contract, checkpoint, calibration, verdicts, benches, lines)
    (work.folder / CARD).write_text(model_card(document), encoding="utf-8")
    write_reproduce_script(work.folder / "reproduce.sh", lines, versions=versions)
    excluded = tuple(entry for entry, _, _ in work.excluded)
    write_bundle_manifest(
        work.folder,
        contract=contract,
        checkpoint=source,
        engines=engines,
        excluded=excluded,
        details={
            "command": command_line("deploy", work.options),
            "evidence": checkpoint.evidence.to_json(),
            "bench_shape": format_shape(benches[0].shape) if benches else None,
        },
        versions=versions,
    )
    report.append(f"{len(engines)} engines in {work.options.output}")
    return Outcome(
        bundle=work.options.output,
        contract=contract,
        engines=tuple(engines),
        excluded=excluded,
        verdicts=verdicts.by_name,
        benches=tuple(benches),
        seconds=work.seconds,
        exit_code=work.exit_code,
    )


def _contract(work: Work, checkpoint: LoadedCheckpoint) -> ModelContract:
    """Return the contract of the FP32 graph: that of the network, with what compression changed."""
    contract = checkpoint.contract()
    if work.compression is None:
        return contract
    return replace(
        contract,
        macs_per_pixel=read_graph(work.folder / FP32_ONNX).contract.macs_per_pixel,
        provenance=dict(contract.provenance) | {"compression": dict(work.compression)},
    )


def _drop_failed(work: Work, failed: Sequence[Candidate], verdicts: Verdicts) -> None:
    """Delete the engines that missed their gate."""
    for candidate in failed:
        verdict = verdicts.of(candidate)
        assert verdict is not None
        work.exclude(candidate, "verify", "; ".join(verdict.failures), GateError.exit_code)
        if candidate.file != candidate.onnx:
            _remove(work.folder / candidate.file)


def _drop_graphs(work: Work, needed: Collection[str], verdicts: Verdicts) -> None:
    """Delete the graphs of a lower precision that no engine of the bundle was built from.

    FP16 stays unless its own check failed: engines on other machines are built from it.
    """
    for path in sorted(work.folder.glob("model.*.onnx")):
        fp16 = verdicts.by_name.get(GRAPH_FP16)
        accepted = path.name == FP16_ONNX and (fp16 is None or fp16.passed)
        if path.name not in needed and path.name not in (FP32_ONNX, ORIGINAL_ONNX) and not accepted:
            _remove(path)


def _remove(artifact: Path) -> None:
    artifact.unlink()
    manifest_path(artifact).unlink()


def _bundle_engine(candidate: Candidate, verdicts: Verdicts, benches: Sequence[BenchResult]) -> BundleEngine:
    verdict = verdicts.by_name.get(candidate.name)
    measured = [(result, row) for result in benches if (row := result.row(candidate.name, "end-to-end"))]
    bench, row = measured[0] if measured else (None, None)
    ratio = None if row is None or bench is None else bench.ratio(row)
    return BundleEngine(
        file=candidate.file,
        engine=candidate.engine,
        precision=candidate.precision,
        verified=verdict is not None,
        fidelity_db=None if verdict is None else verdict.min_fidelity_db,
        latency_ms=None if row is None else round(row.statistics.median_ms, 4),
        speedup=None if ratio is None else ratio.value,
        device=candidate.device,
    )


def _rank(candidate: Candidate, benches: Sequence[BenchResult]) -> tuple[bool, float]:
    """Order engines: first those that cannot run here (they are for a faster machine), then the fastest."""
    for bench in benches:
        row = bench.row(candidate.name, "end-to-end")
        if row is not None:
            return True, bench.typical_ms(row)
    return False, 0.0


def _write_report(
    work: Work,
    kept: Sequence[Candidate],
    contract: ModelContract,
    checkpoint: LoadedCheckpoint,
    calibration: CalibrationSet,
    verdicts: Verdicts,
    benches: Sequence[BenchResult],
    commands: Sequence[str],
) -> dict[str, Any]:
    document = report_document(
        title=work.options.output.name,
        contract=contract,
        engines=_entries(work, kept, verdicts),
        bench=benches,
        checkpoint=checkpoint_entry(checkpoint),
        calibration=calibration.to_json(),
        sensitivity=next((entries for entries in work.sensitivity.values() if entries), []),
        searches=work.searches,
        stages=[{"name": name, "seconds": work.seconds[name], "note": work.notes[name]} for name in work.seconds],
        commands=commands,
    )
    write_report(document, work.folder / "report")
    return document


def _entries(work: Work, kept: Sequence[Candidate], verdicts: Verdicts) -> list[EngineEntry]:
    """Return the report's lines: engines, graphs that were verified in place of one, and what was excluded."""
    entries = [_entry(work.folder, candidate, verdicts) for candidate in kept]
    for name, onnx in verdicts.graphs.items():
        path, verdict = work.folder / onnx, verdicts.by_name[name]
        kept_graph = path.exists()
        entries.append(
            EngineEntry(
                name,
                "onnxruntime",
                verdict.candidate.contract.precision,
                file=onnx if kept_graph else None,
                size_bytes=path.stat().st_size if kept_graph else None,
                sha256=sha256_of_file(path) if kept_graph else None,
                verify=verdict,
                excluded=not kept_graph,
            )
        )
    for left, name, _ in work.excluded:
        result = verdicts.by_name.get(name)  # where there is one, its failures are the reason
        reason = None if result is not None else f"{left.stage}: {left.reason}"
        entries.append(EngineEntry(name, left.engine, left.precision, verify=result, reason=reason, excluded=True))
    return entries


def _entry(folder: Path, candidate: Candidate, verdicts: Verdicts) -> EngineEntry:
    path = folder / candidate.file
    reason = verdicts.obstacles.get(candidate.name)
    if reason is not None and candidate.graph_name in verdicts.by_name:
        reason += f"; its graph was verified on ONNX Runtime instead (line {candidate.graph_name!r})"
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
