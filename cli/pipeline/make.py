"""The stages of `deploy` that make files: load, export, calibrate, quantize, build.

A defect of one engine only (its graph misses the gate, its builder refuses) leaves that engine out with its reason, and
the pipeline continues; everything else ends it, and no bundle is written.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from srdeploy.calibration.compress.compress import compress
from srdeploy.calibration.compress.result import CompressOptions
from srdeploy.calibration.images.dataset import CalibrationSet, make_calibration_set
from srdeploy.calibration.measurements import Measurements
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.quantize import CPU_TARGETS, artifacts_folder, quantize
from srdeploy.calibration.search.bound import Bound
from srdeploy.calibration.search.choose import Choice
from srdeploy.cli.checkpoint_options import load_from_options
from srdeploy.cli.pipeline.clock import clock_for
from srdeploy.cli.pipeline.engines import Placement, candidates_for, compressed_for, graphs_to_quantize, target_of
from srdeploy.cli.pipeline.opening import engine_opener
from srdeploy.cli.pipeline.types import (
    COMPRESSION_SHARE,
    FP32_ONNX,
    OPTIONAL,
    ORIGINAL_ONNX,
    Candidate,
    Work,
)
from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import package_versions
from srdeploy.core.errors import BuildError, GateError, PrecisionError, SrdeployError
from srdeploy.core.manifest import manifest_path, read_manifest
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.precision import Precision
from srdeploy.core.shapes import ShapeProfile
from srdeploy.core.sizes import format_bytes
from srdeploy.export.exporter import export_onnx
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine, family


def sized(path: Path) -> str:
    """Return a file's name and size, for one line of progress."""
    return f"{path.name} {format_bytes(path.stat().st_size)}"


def load(work: Work, report: list[str]) -> LoadedCheckpoint:
    """Load the checkpoint, and report what had to be assumed."""
    checkpoint = load_from_options(work.options.checkpoint, work.options.checkpoint_options, work.progress)
    contract = checkpoint.contract()
    report.append(f"{checkpoint.dialect}: {contract.architecture} x{contract.scale}, {contract.colours}")
    return checkpoint


def export(work: Work, checkpoint: LoadedCheckpoint, report: list[str]) -> None:
    """Write the FP32 graph."""
    export_onnx(checkpoint, work.folder / FP32_ONNX, progress=work.progress)
    report.append(sized(work.folder / FP32_ONNX))


def calibrate(work: Work, checkpoint: LoadedCheckpoint, report: list[str]) -> CalibrationSet:
    """Make the calibration set."""
    options = work.options
    calibration = make_calibration_set(
        options.images,
        contract=checkpoint.contract(),
        hr=options.hr,
        memory_bytes=options.memory,
        progress=work.progress,
    )
    (work.folder / "calibration").mkdir()
    report.append(f"{len(calibration)} crops from {len(calibration.image_hashes)} images")
    return calibration


def compress_graph(work: Work, placements: Sequence[Placement], calibration: CalibrationSet, report: list[str]) -> None:
    """Compress the FP32 graph with a part of the drop that is allowed; where nothing can be gained, keep it.

    Ranks suit the first engine; where it runs here, changes that are not faster on it are undone.
    """
    original, target = work.folder / ORIGINAL_ONNX, target_of(placements[0].engine)
    (work.folder / FP32_ONNX).rename(original)
    manifest_path(work.folder / FP32_ONNX).rename(manifest_path(original))
    assert work.options.max_psnr_drop is not None, "checked with the options"
    bound = Bound(COMPRESSION_SHARE * work.options.max_psnr_drop)
    try:
        result = compress(
            original,
            work.folder / FP32_ONNX,
            calibration=calibration,
            options=CompressOptions(bound, target, precision=compressed_for(target)),
            open_engine=engine_opener(target, work.options.threads),
            progress=work.progress,
        )
    except GateError as error:
        original.rename(work.folder / FP32_ONNX)
        manifest_path(original).rename(manifest_path(work.folder / FP32_ONNX))
        report.append(f"not compressed: {error}")
        return
    work.compression = read_graph(work.folder / FP32_ONNX).contract.compression
    report.append(
        f"{result.macs_before / result.macs_after:.2f}x fewer multiply-adds in {len(result.changes)} changes, drop "
        f"{result.quality.drop_db:.4f} dB (worst image {result.quality.largest_drop_db:.4f} dB), fidelity "
        f"{result.quality.fidelity_db:.2f} dB"
    )
    report.extend(result.notes)


def quantize_all(
    work: Work,
    placements: Sequence[Placement],
    contract: ModelContract,
    calibration: CalibrationSet,
    report: list[str],
) -> list[Candidate]:
    """Make the graph of every precision that some engine needs; one that misses its gate is excluded."""
    candidates = candidates_for(placements)
    refused: dict[str, SrdeployError] = {}
    graphs = graphs_to_quantize(candidates, fp16=True)
    targets = {target_of(entry.engine) for entry in graphs.values() if entry.precision is Precision.INT8}
    shared = Measurements([target for target in CPU_TARGETS if target in targets])
    for onnx, entry in graphs.items():
        try:
            report.append(_quantize(work, onnx, entry, contract, calibration, shared))
        except SrdeployError as error:
            if not isinstance(error, GateError | BuildError | PrecisionError) and entry.precision not in OPTIONAL:
                raise
            refused[onnx] = error
    for entry in candidates:
        if entry.onnx in refused:
            work.exclude(entry, "quantize", str(refused[entry.onnx]), refused[entry.onnx].exit_code)
    return [entry for entry in candidates if entry.onnx not in refused]


def _quantize(
    work: Work,
    onnx: str,
    entry: Candidate,
    contract: ModelContract,
    calibration: CalibrationSet,
    shared: Measurements,
) -> str:
    output = work.folder / onnx
    int8 = entry.precision is Precision.INT8
    target = target_of(entry.engine)
    clock = (
        None if entry.device == "cpu" else clock_for(target, work.options.shape(contract), work.progress, entry.device)
    )
    result = quantize(
        work.folder / FP32_ONNX,
        output,
        precision=entry.precision,
        target=target,
        calibration=calibration,
        options=QuantizeOptions(max_psnr_drop=work.options.max_psnr_drop if int8 else None),
        open_engine=engine_opener(target, work.options.threads),
        clock=clock,
        progress=work.progress,
        shared=shared,
        reference=work.original,
    )
    if int8 and not result.int8_macs:
        output.unlink()
        manifest_path(output).unlink()
        shutil.rmtree(artifacts_folder(output), ignore_errors=True)
        raise GateError("the bound is kept only with every layer in FP32", expected="an INT8 graph")
    work.sensitivity[onnx] = _sensitivity(result.choice)
    if result.choice is not None and int8 and work.options.max_psnr_drop is not None:
        work.searches.append(_search(onnx, work.options.max_psnr_drop, result.choice))
    # One folder for all graphs: their calibration set is one and the same.
    places = {name: f"calibration/{'' if name == 'set' else output.stem + '.'}{name}.json" for name in result.artifacts}
    for name, path in result.artifacts.items():
        path.rename(work.folder / places[name])
    artifacts_folder(output).rmdir()
    manifest = read_manifest(output)
    details = {**manifest.details, "output": onnx, "artifacts": places}  # they named the folder's temporary name
    manifest_path(output).write_text(replace(manifest, details=details).to_json(), encoding="utf-8")
    return sized(output)


def _sensitivity(choice: Choice | None) -> list[dict[str, Any]]:
    """Return the report's entries: the fidelity when only these layers are quantized."""
    if choice is None:
        return []
    return [
        {
            "layer": entry.layers[0] if len(entry.layers) == 1 else f"{entry.layers[0]} to {entry.layers[-1]}",
            "fidelity_db": entry.fidelity_db,
            "kept": "fp32" if entry.decision(choice.decisions) == "fp32" else None,
        }
        for entry in choice.sensitivities
    ]


def _search(onnx: str, bound_db: float, choice: Choice) -> dict[str, Any]:
    """Return the report's entry: the graphs that were measured on the way to the bound, and the chosen one."""
    taken = (tuple(choice.decisions.keep), choice.decisions.splits)
    points = [point.to_json() | {"taken": (point.keep, point.splits) == taken} for point in choice.points]
    return {"graph": onnx, "bound_db": bound_db, "points": points}


def build_all(
    work: Work, candidates: Sequence[Candidate], checkpoint: LoadedCheckpoint, report: list[str]
) -> list[Candidate]:
    """Build every candidate's engine; one that fails is excluded."""
    (work.folder / "engines").mkdir()
    profile = work.options.profile(checkpoint.contract())
    built = []
    for candidate in candidates:
        try:
            built.append(_build(work, candidate, profile))
        except SrdeployError as error:
            if not isinstance(error, BuildError) and candidate.precision not in OPTIONAL:
                raise
            work.exclude(candidate, "build", str(error), error.exit_code)
    report.append(", ".join(entry.name for entry in built))
    return built


def _build(work: Work, candidate: Candidate, profile: ShapeProfile) -> Candidate:
    suffix = family(candidate.engine).suffix
    if suffix is None:  # it opens the ONNX file as it is
        return replace(candidate, file=candidate.onnx)
    on_gpu = candidate.engine.startswith("tensorrt")
    capabilities = work.options.compute_capabilities if candidate.engine == "tensorrt-rtx" else ()
    file = f"engines/{_engine_name(candidate, profile if on_gpu else None, capabilities)}{suffix}"
    result = build_engine(
        work.folder / candidate.onnx,
        work.folder / file,
        engine=candidate.engine,
        options=BuildOptions(
            profiles=(profile,) if on_gpu else (),
            compute_capabilities=capabilities,
            device=candidate.device if candidate.engine == "tensorrt" else "auto",
        ),
        progress=work.progress,
    )
    precision_built = str(result.manifest.details["precision"]["built"])
    return replace(candidate, file=file, built=precision_built, seconds=round(result.seconds, 2))


def _engine_name(candidate: Candidate, profile: ShapeProfile | None, capabilities: Sequence[str]) -> str:
    """Return <engine>-<version>_<target>_<precision>_<profile>, short enough to read."""
    version = package_versions([candidate.engine]).get(candidate.engine, "unknown")
    target = "cpu" if profile is None else "sm" + "-".join(capabilities) if capabilities else "gpu"
    if candidate.shared:
        target += candidate.device.removeprefix("cuda:")
    shapes = "any"
    if profile is not None:
        height, width = (f"{low}-{high}" for low, high in zip(profile.min[2:], profile.max[2:], strict=True))
        shapes = f"{height}x{width}"
    return f"{candidate.engine}-{version}_{target}_{candidate.precision}_{shapes}"
