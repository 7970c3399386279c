"""From an FP32 graph and real images to one of fewer multiply-adds that keeps a bound in dB on images kept aside."""

from dataclasses import replace
from pathlib import Path

import onnx as onnx_package

from srdeploy.calibration.compress.result import CompressOptions, CompressResult
from srdeploy.calibration.compress.search import CompressionSearch
from srdeploy.calibration.compress.timing import undo_what_is_not_faster
from srdeploy.calibration.fp32 import read_fp32_graph
from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.journal import Journal
from srdeploy.calibration.search.evaluate import OpenEngine
from srdeploy.core.artifact import atomic_files, sha256_of_bytes
from srdeploy.core.environment import package_versions
from srdeploy.core.errors import InputError
from srdeploy.core.manifest import Manifest, Source, manifest_path
from srdeploy.core.onnx_file import GraphFile, set_contract
from srdeploy.core.progress import SILENT, Progress

_PACKAGES = ("onnx", "onnxruntime", "openvino", "numpy")


def compress(
    onnx: Path,  # the name the command line and other stages use
    output: Path,
    *,
    calibration: CalibrationSet,
    options: CompressOptions,
    open_engine: OpenEngine | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> CompressResult:
    """Compress an FP32 graph and write it with a manifest.

    Args:
        onnx: an FP32 graph that `srdeploy export` wrote.
        output: the ONNX file to write; `output.json` goes next to it.
        calibration: real images: those that layers are fitted to, and those kept aside for the bound.
        options: bound, target, time.
        open_engine: opens an ONNX file with the target's engine where it runs here: changes that are not faster on it
            are undone.
        force: replace existing outputs.
        progress: where to report.

    Raises:
        InputError: the graph is not an exported FP32 graph, is compressed already, or the images do not fit.
        UsageError: options that make no sense, or an output that exists.
        NothingGainedError: nothing with fewer multiply-adds keeps the bound; it holds what was measured.
    """
    source = read_original(onnx)
    with atomic_files(output, manifest_path(output), force=force) as (file, sidecar):
        journal = Journal(source.sha256, calibration.sha256, "compress", str(options.target), options.precision.value)
        if journal.resumed:
            progress.note("resuming with what an earlier, interrupted run measured")
        search = CompressionSearch(source, calibration, options, journal, progress)
        point, model = search.run()
        latency = None
        if open_engine is not None:
            point, model, latency = undo_what_is_not_faster(search, point, model, open_engine, progress)
        result = CompressResult(
            output=output,
            bound=str(options.bound),
            changes=point.changes,
            macs_before=search.macs_before,
            macs_after=point.macs,
            quality=point.quality,
            points=tuple(search.points),
            latency_ms=latency,
            errors=search.error_shares(point.changes),
            widths={change.key: search.width(change) for change in point.changes},
            notes=tuple(search.notes),
        )
        _describe(model, source, result, calibration, options)
        data = model.SerializeToString()
        file.write_bytes(data)
        manifest = Manifest(
            kind="onnx",
            sha256=sha256_of_bytes(data),
            sources=(Source("onnx", onnx.name, source.sha256),),
            details=result.to_json() | {"calibration": calibration.to_json()},
            versions=package_versions(_PACKAGES),
        )
        sidecar.write_text(manifest.to_json(), encoding="utf-8")
    journal.close()
    return result


def read_original(path: Path) -> GraphFile:
    """Read an exported FP32 graph that is not compressed yet.

    Raises:
        InputError: as `read_fp32_graph`, or it is compressed: its loss and that of a second run would not be known
            together.
    """
    source = read_fp32_graph(path)
    if source.contract.compression is not None:
        raise InputError(
            f"{path} is compressed already",
            expected="the graph that it was made from",
            next_step="compress the file that `srdeploy export` wrote, with a larger --max-psnr-drop",
        )
    return source


def _describe(
    model: onnx_package.ModelProto,
    source: GraphFile,
    result: CompressResult,
    calibration: CalibrationSet,
    options: CompressOptions,
) -> None:
    """Write into a graph's metadata that it is compressed, and how."""
    document = result.to_json()
    compression = {
        "fp32_sha256": source.sha256,
        "calibration_sha256": calibration.sha256,
        "target": str(options.target),
        "max_psnr_drop_db": options.bound.max_psnr_drop,
        **{name: document[name] for name in ("fewer_macs", "quality", "layers", "notes")},
    }
    contract = source.contract
    set_contract(
        model,
        replace(
            contract,
            macs_per_pixel=contract.macs_per_pixel * result.macs_after / result.macs_before,
            provenance=dict(contract.provenance) | {"compression": compression},
        ),
    )
