"""The report as one JSON document: what was made, whether it may be trusted, how good and how fast it is.

`report_document` joins what the stages found; `srdeploy.runtime.report.write.write_report` checks it against the
published schema (report.schema.json in this package) and writes report.json, report.html and the pictures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.runtime.bench.conditions import conditions
from srdeploy.runtime.bench.latency import NOT_MEASURED, BenchResult, Fastest, Row, ratio_json
from srdeploy.runtime.report.crop_images import CropImages, image_entries
from srdeploy.runtime.verify.parity import VerifyResult

SCHEMA = 1
KIND = "srdeploy-report"

Status = Literal["passed", "failed", "measured", "not-run", "left-out"]


@dataclass(frozen=True, eq=False)
class EngineEntry:
    """One line of the report's table of engines.

    Attributes:
        name: unique in the report; the bench row of the same runner name is shown in this line.
        engine: the family, for example "openvino".
        precision: what was asked for.
        file: the artifact's name or path inside the bundle; None for what has no file.
        size_bytes: of the artifact.
        sha256: of the artifact.
        precision_built: what was read back from the built engine; None when nothing was read back.
        verify: the verdict; None for what did not run here.
        reason: why it did not run here or was excluded; None when the failures of `verify` are the reasons.
        excluded: it was asked for and is not delivered; then `reason` or the verdict's failures say why.
        measured: it ran here for its latency, and was not verified.
    """

    name: str
    engine: str
    precision: Precision
    file: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    precision_built: str | None = None
    verify: VerifyResult | None = None
    reason: str | None = None
    excluded: bool = False
    measured: bool = False

    @property
    def status(self) -> Status:
        """Where this engine stands: "passed" and "failed" are verdicts of a run."""
        if self.excluded:
            return "left-out"
        if self.verify is None:
            return "measured" if self.measured else "not-run"
        return "passed" if self.verify.passed else "failed"


def report_document(
    *,
    title: str,
    contract: ModelContract,
    engines: Sequence[EngineEntry],
    bench: BenchResult | Sequence[BenchResult] = (),
    checkpoint: Mapping[str, Any] | None = None,
    calibration: Mapping[str, Any] | None = None,
    sensitivity: Sequence[Mapping[str, Any]] = (),
    searches: Sequence[Mapping[str, Any]] = (),
    studies: Mapping[str, Any] | None = None,
    stages: Sequence[Mapping[str, Any]] = (),
    commands: Sequence[str] = (),
    environment: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Join what the stages found into one document.

    Args:
        title: the report's headline, for example the bundle's name.
        contract: of the FP32 graph.
        engines: the lines of the table, in the order in which they are shown. Give the reference no line: it appears
            as the baseline of the bench.
        bench: one result per device or shape; the first one with an engine's name fills its latency columns (see
            `srdeploy.runtime.bench.naming.named`). Other rows (the baselines) are shown next to them.
        checkpoint: where the weights came from: {"name", "sha256", "dialect", "evidence": JSON of what was assumed}.
        calibration: the calibration set as its `to_json()` gives it, with the coverage of the evaluation images if
            it was measured; shown key by key.
        sensitivity: one entry per layer, {"layer": name, "drop_db" or "fidelity_db": number, "kept": precision that
            the layer was kept in, or None}; plotted in the given order.
        searches: one entry per graph that a bound was searched for, {"graph", "bound_db", "points"}; a point has
            "int8_macs_share", "latency_ms" (or None), "fidelity_db", "drop_db", "layers_kept_float", "layers_split" and
            "taken".
        studies: further measurements by name, as `srdeploy.runtime.bench.studies` gives them ("throughput", "scaling").
        stages: one entry per stage of the pipeline, {"name", "seconds", "note"}.
        commands: the exact commands that reproduce the run, one line each.
        environment: the conditions (`srdeploy.runtime.bench.conditions.conditions()`); None reads them now.

    Returns:
        JSON values only; numbers that are not finite are the strings "inf", "-inf" and "nan". Crops are held as base64
        under "pictures" until `write_report` moves them into files.
    """
    benches = [bench] if isinstance(bench, BenchResult) else list(bench)
    pictures = CropImages()
    lines = [_engine_line(entry, _bench_of(entry, benches)) for entry in engines]
    verdicts = [entry.verify for entry in engines if entry.verify is not None]
    document = {
        "kind": KIND,
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "title": title,
        "verdict": _verdict(lines, benches),
        "model": _model(contract, checkpoint),
        "engines": lines,
        "verification": [{"name": entry.name, **entry.verify.to_json()} for entry in engines if entry.verify],
        "bench": [result.to_json() for result in benches],
        "images": image_entries([(entry.name, entry.verify) for entry in engines if entry.verify], pictures),
        "calibration": None if calibration is None else dict(calibration),
        "sensitivity": [dict(entry) for entry in sensitivity],
        "searches": [dict(entry) for entry in searches],
        "studies": dict(studies or {}),
        "stages": [dict(stage) for stage in stages],
        "commands": list(commands),
        "environment": dict(environment) if environment is not None else _environment(benches, verdicts),
        "pictures": pictures.to_json(),
    }
    plain: dict[str, Any] = jsonable(document)
    return plain


def jsonable(value: Any) -> Any:
    """Return JSON values: tuples as lists, paths and enumerations as strings, not-finite numbers as strings."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(entry) for entry in value]
    if hasattr(value, "item"):  # numpy scalars
        return jsonable(value.item())
    return str(value)


def _bench_of(entry: EngineEntry, benches: Sequence[BenchResult]) -> BenchResult | None:
    """Return the result that measured an engine: there is one per device."""
    return next((bench for bench in benches if any(row.runner.name == entry.name for row in bench.rows)), None)


def _engine_line(entry: EngineEntry, bench: BenchResult | None) -> dict[str, Any]:
    verify = entry.verify
    rows: dict[str, Row] = {}
    if bench is not None:
        rows = {row.kind: row for row in bench.rows if row.runner.name == entry.name}
    reasons = list(verify.failures) if verify is not None else []
    if entry.reason is not None:
        reasons.insert(0, entry.reason)
    worst = None if verify is None else verify.worst_case
    return {
        "name": entry.name,
        "engine": entry.engine,
        "precision": str(entry.precision),
        "precision_built": entry.precision_built,
        "file": entry.file,
        "size_bytes": entry.size_bytes,
        "sha256": entry.sha256,
        "status": entry.status,
        "reasons": reasons,
        "numeric_mode": None if verify is None else verify.candidate.numeric_mode,
        "built": {} if verify is None else dict(verify.candidate.built),
        "fidelity_min_db": None if verify is None else verify.min_fidelity_db,
        "fidelity_mean_db": None if verify is None else verify.mean_fidelity_db,
        "max_abs": None if worst is None else worst.difference.max_abs,
        "changed_share": None if worst is None else worst.difference.changed_share,
        "worst_image": None if worst is None else worst.name,
        "psnr_drop_db": None if verify is None else verify.psnr_drop_db,
        "ssim_drop": None if verify is None else verify.ssim_drop,
        "latency": {kind: _latency(row, bench) for kind, row in rows.items() if bench is not None},
        **(NOT_MEASURED if bench is None else bench.memory.get(entry.name, NOT_MEASURED)).to_json(),
    }


def _latency(row: Row, bench: BenchResult) -> dict[str, Any]:
    statistics = row.statistics
    return {
        "median_ms": statistics.median_ms,
        "p90_ms": statistics.p90_ms,
        "p99_ms": statistics.p99_ms,
        "n": statistics.n,
        "cov": statistics.cov,
        "ci_share": statistics.ci_share,
        "stable": row.stable,
        **ratio_json(bench.ratio(row)),
    }


def _verdict(lines: Sequence[Mapping[str, Any]], benches: Sequence[BenchResult]) -> dict[str, Any]:
    counts = {status: sum(line["status"] == status for line in lines) for status in get_args(Status)}
    if counts["failed"] or not counts["passed"]:
        status = "failed" if counts["failed"] else "not-verified"
    else:
        status = "partial" if counts["left-out"] else "passed"
    tally = {
        "failed": "failed", "left-out": "excluded", "not-run": "not run here", "measured": "measured, not verified"
    }  # fmt: skip
    others = [f"{counts[key]} {label}" for key, label in tally.items() if counts[key]]
    sentences = [", ".join([f"{counts['passed']} of {len(lines)} engines passed", *others])]
    verified = _fastest(lines, benches, "passed")
    for bench, fastest in verified or _fastest(lines, benches, "measured"):
        where = f" on {bench.rows[0].runner.device}" if len(benches) > 1 else ""
        sentences.append(_speed_sentence(fastest, lines, bench, where))
    best = min(verified, key=_typical_ms)[1] if verified else None
    return {
        "status": status,
        "headline": ". ".join(sentences) + ".",
        "best": None if best is None else best.name,
        "equally_fast": [] if best is None else list(best.equals),
        "reasons": [f"{line['name']}: {reason}" for line in lines for reason in line["reasons"]],
    }


def _fastest(
    lines: Sequence[Mapping[str, Any]], benches: Sequence[BenchResult], status: Status
) -> list[tuple[BenchResult, Fastest]]:
    """Return the fastest engine of a status on each device."""
    names = [line["name"] for line in lines if line["status"] == status]
    return [(bench, fastest) for bench in benches if (fastest := bench.fastest(names)) is not None]


def _typical_ms(entry: tuple[BenchResult, Fastest]) -> float:
    bench, fastest = entry
    row = bench.row(fastest.name, "end-to-end")
    assert row is not None, "it was compared in this kind"
    return bench.typical_ms(row)


def _speed_sentence(fastest: Fastest, lines: Sequence[Mapping[str, Any]], bench: BenchResult, where: str) -> str:
    """Return which engine is fastest, and by how much; with the quality of a verified engine."""
    line = next(line for line in lines if line["name"] == fastest.name)
    row = bench.row(fastest.name, "end-to-end")
    base = bench.rows[0].runner.name
    details = []
    if row is not None and (ratio := bench.ratio(row)) is not None and fastest.name != base:
        value, _, interval = ratio.label.partition(", ")
        details += [f"{value} the speed of {base}", interval]
    if line["fidelity_min_db"] is not None:
        details.append(f"fidelity {line['fidelity_min_db']:.1f} dB")
    if line["psnr_drop_db"] is not None:
        details.append(f"PSNR change {-line['psnr_drop_db']:+.3f} dB")
    subject = f"{fastest.name}: " if fastest.equals else ""
    return fastest.sentence + where + (f" ({subject}{', '.join(details)})" if details else "")


def _model(contract: ModelContract, checkpoint: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "architecture": contract.architecture,
        "configuration": dict(contract.configuration),
        "scale": contract.scale,
        "colours": contract.colours,
        "receptive_radius": contract.receptive_radius,
        "macs_per_pixel": contract.macs_per_pixel,
        "checkpoint": {"sha256": contract.checkpoint_sha256, **(checkpoint or {})},
        "provenance": dict(contract.provenance),
    }


def _environment(benches: Sequence[BenchResult], verdicts: Sequence[VerifyResult]) -> dict[str, Any]:
    """Conditions of the bench where there is one: they hold for the numbers."""
    if benches and benches[0].environment:
        return dict(benches[0].environment)
    found = conditions()
    if verdicts:
        found["reference"] = f"{verdicts[0].reference.name}: {verdicts[0].reference.numeric_mode}"
    return found
