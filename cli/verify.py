"""srdeploy verify: engines against the eager network they were made from, in decibels."""

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from srdeploy.cli.checkpoint_options import CheckpointOptions, load_from_options
from srdeploy.cli.console import RichProgress, emit_json, markdown_table, next_command, table, warning_line
from srdeploy.cli.options import (
    BYTES,
    DEVICE,
    EXISTING,
    FORCE,
    JSON,
    MEMORY,
    OUTPUT_PATH,
    POSITIVE,
    THREADS,
    argument,
    arguments,
    example,
    option,
    option_group,
    refuse_two_documents,
    verb,
)
from srdeploy.core.errors import UsageError
from srdeploy.core.precision import Precision
from srdeploy.core.shapes import format_shape

if TYPE_CHECKING:
    from srdeploy.models.checkpoint.load import LoadedCheckpoint
    from srdeploy.runtime.verify.bisect import Bisection
    from srdeploy.runtime.verify.parity import Case, VerifyResult

EXAMPLE = example(
    """
srdeploy verify model.int8.onnx --against rcan_x2.pt --images lr/ --hr hr/ --max-psnr-drop 0.05
srdeploy verify model.onnx --engine openvino --against rcan_x2.pt --images photos/ --bisect
"""
)

HEADERS = ("engine", "verdict", "fidelity dB", "mean dB", "max |diff|", "8-bit pixels that differ", "Y PSNR eager",
           "Y PSNR engine", "drop dB", "SSIM engine")  # fmt: skip


@arguments
class VerifyOptions:
    """What `srdeploy verify` is given."""

    candidates: tuple[Path, ...] = argument(type=EXISTING, metavar="ONNX-OR-ENGINE...", many=True)
    checkpoint: Path = option("--against", type=EXISTING, help="Checkpoint: the eager FP32 reference.")
    checkpoint_options: CheckpointOptions = option_group(default_factory=CheckpointOptions)
    images: Path | None = option(
        "--images", type=EXISTING, default=None, help="Low-resolution images to compare on: a folder or a file."
    )
    hr: Path | None = option(
        "--hr",
        type=EXISTING,
        default=None,
        help="Ground truth by the same names; alone, the images are made from it (bicubic).",
    )
    engine: str | None = option("--engine", default=None, help="Engine family for ONNX files (default onnxruntime).")
    device: str = option("--device", default="auto", show_default=True, help=DEVICE)
    threads: int | None = option("--threads", type=POSITIVE, default=None, help=THREADS)
    memory: int | None = option("--memory", type=BYTES, default=None, help=MEMORY)
    min_fidelity: float | None = option(
        "--min-fidelity",
        type=float,
        default=None,
        metavar="DB",
        help="Gate instead of the precision's own (fp32 90, fp16 60).",
    )
    max_psnr_drop: float | None = option(
        "--max-psnr-drop", type=float, default=None, metavar="DB", help="Maximum loss of mean Y PSNR; needs --hr."
    )
    limit: int | None = option(
        "--limit", type=POSITIVE, default=None, help="Compare on at most this many images, spread over all."
    )
    max_side: int | None = option(
        "--max-side",
        type=click.IntRange(min=8),
        default=None,
        metavar="PIXELS",
        help="Crop images to this many pixels per axis.",
    )
    bisect: bool = option(
        "--bisect", default=False, help="Name the first ONNX node that differs, and its PyTorch module."
    )
    per_image: bool = option("--per-image", default=False, help="Show every image and shape.")
    crops: Path | None = option(
        "--crops",
        type=OUTPUT_PATH,
        default=None,
        metavar="DIR",
        help="Folder for the worst crops (default: next to a failed engine).",
    )
    report: Path | None = option(
        "--report", type=OUTPUT_PATH, default=None, metavar="DIR", help="Write report.json and report.html."
    )
    markdown: bool = option("--markdown", default=False, help="Print the table as Markdown on stdout.")
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)


@verb(VerifyOptions, epilog=EXAMPLE)
def command(options: VerifyOptions) -> None:
    """Compare engines or ONNX files with the eager FP32 network on real images and a grid of shapes.

    The network runs on the device of the engine. NaN, infinity, a constant picture and a wrong shape always fail.
    Otherwise each image must reach the fidelity of the engine's precision (PSNR between the two outputs), and with
    ground truth the mean PSNR may fall by at most --max-psnr-drop. A missed gate ends with exit code 6, the worst crop
    saved and what to try.
    """
    _check(options)
    candidates = options.candidates
    progress = RichProgress()
    loaded = load_from_options(options.checkpoint, options.checkpoint_options, progress, quiet=options.as_json)
    results = _results(options, loaded, progress)
    crops = _saved_crops(candidates, results, options.crops)
    bisections = _bisected(options, results, loaded, progress) if options.bisect else [None] * len(results)
    _show(results, options)
    for path, bisection in zip(candidates, bisections, strict=True):
        if bisection is not None:
            progress.note(f"{path.name}: {bisection.sentence}")
    if options.report is not None:
        _write_report(options, options.report, results, loaded)
    if options.as_json:
        emit_json([
            {
                "file": str(path),
                **result.to_json(),
                "worst_crop_file": None if crop is None else str(crop),
                "bisection": None if bisection is None else bisection.to_json(),
            }
            for path, result, crop, bisection in zip(candidates, results, crops, bisections, strict=True)
        ])  # fmt: skip
    _refuse_failures(results, crops, bisections)
    shape = format_shape(max((case.shape for case in results[0].images), key=math.prod))
    next_command("srdeploy", "bench", *map(str, candidates), "--against", str(options.checkpoint), "--shape", shape)


def _check(options: VerifyOptions) -> None:
    """Refuse options that do not fit together, before any work."""
    from srdeploy.core.artifact import check_output_folder

    refuse_two_documents(as_json=options.as_json, markdown=options.markdown)
    if options.max_psnr_drop is not None and options.hr is None:
        raise UsageError("--max-psnr-drop without --hr", next_step="give ground truth with --hr, or use --min-fidelity")
    if options.images is None and options.hr is None:
        raise UsageError("no images given", next_step="name a folder with --images, --hr or both")
    if options.report is not None:
        check_output_folder(options.report, force=options.force, known_by="report.json")


def _results(options: VerifyOptions, loaded: "LoadedCheckpoint", progress: RichProgress) -> "list[VerifyResult]":
    from srdeploy.cli.pipeline.opening import open_candidates
    from srdeploy.cli.pipeline.verify import compare_with_eager, side_within
    from srdeploy.core.samples import SampleFolder
    from srdeploy.runtime.verify.parity import Gates

    with ExitStack() as stack:
        runners = open_candidates(
            options.candidates,
            loaded,
            stack,
            engine=options.engine,
            device=options.device,
            threads=options.threads,
            parity=True,
        )
        samples = SampleFolder(
            options.images,
            options.hr,
            contract=loaded.contract(),
            limit=options.limit,
            max_side=side_within(options.memory, loaded.contract(), options.max_side, progress),
        )
        gates = [
            Gates.of_contract(
                runner.info.contract,
                min_fidelity_db=options.min_fidelity,
                max_psnr_drop_db=options.max_psnr_drop,
            )
            for runner in runners
        ]
        return compare_with_eager(
            runners,
            loaded,
            samples,
            gates=gates,
            threads=options.threads,
            keep_crops=4 if options.report is not None else 0,
            progress=progress,
        )


def _bisected(
    options: VerifyOptions,
    results: "Sequence[VerifyResult]",
    loaded: "LoadedCheckpoint",
    progress: RichProgress,
) -> "list[Bisection | None]":
    from srdeploy.core.samples import SampleFolder
    from srdeploy.export.exporter import export_onnx
    from srdeploy.runtime.verify.bisect import bisect_path

    samples = SampleFolder(options.images, options.hr, contract=loaded.contract(), limit=options.limit)
    found: list[Bisection | None] = []
    with tempfile.TemporaryDirectory(prefix="srdeploy-bisect-") as folder:
        plain = Path(folder) / "fp32.onnx"

        def fp32() -> Path:
            if not plain.exists():
                export_onnx(loaded, plain, progress=progress)
            return plain

        for path, result in zip(options.candidates, results, strict=True):
            worst = next((sample for sample in samples if sample.name == result.worst_case.name), samples[0])
            progress.note(f"looking for the first node of {path.name} that differs")
            found.append(
                bisect_path(
                    path,
                    worst.image,
                    fp32=fp32,
                    engine=options.engine,
                    device=options.device,
                    threads=options.threads,
                    progress=progress,
                )
            )
    return found


def _saved_crops(
    candidates: Sequence[Path], results: "Sequence[VerifyResult]", folder: Path | None
) -> list[Path | None]:
    """Save the worst crop of every engine that failed, and of every engine when a folder is named."""
    from srdeploy.core.errors import OutputError
    from srdeploy.runtime.report.crop_images import save_crop

    saved: list[Path | None] = []
    for path, result in zip(candidates, results, strict=True):
        target = None if result.worst is None else (folder or path.parent) / f"{path.name}.worst.png"
        if target is None or result.worst is None or (folder is None and result.passed):
            saved.append(None)
            continue
        try:
            save_crop(result.worst, target)
        except OutputError as error:  # the result matters more than its picture
            warning_line(f"the worst crop was not saved: {error}")
            target = None
        saved.append(target)
    return saved


def _show(results: "Sequence[VerifyResult]", options: VerifyOptions) -> None:
    rows = [_row(result) for result in results]
    if options.markdown:
        click.echo(markdown_table(HEADERS, rows))
    else:
        table("", HEADERS, rows)
    if options.per_image:
        headers = ("case", "input", "verdict", *HEADERS[2:3], *HEADERS[4:8], "SSIM engine", "problem")
        for result in results:
            cases = [_case_row(case) for case in (*result.images, *result.grid)]
            if options.markdown:
                click.echo("\n" + markdown_table(headers, cases))
            else:
                table(result.candidate.name, headers, cases)


def _row(result: "VerifyResult") -> list[str]:
    worst = result.worst_case.difference
    before, after = result.reference_quality, result.candidate_quality
    return [
        result.candidate.name,
        "passed" if result.passed else "FAILED",
        f"{result.min_fidelity_db:.1f}",
        f"{result.mean_fidelity_db:.1f}",
        f"{worst.max_abs:.2e}",
        f"{worst.changed_share:.2%} by {worst.changed_levels_max}",
        "" if before is None else f"{before.psnr_y_db:.3f}",
        "" if after is None else f"{after.psnr_y_db:.3f}",
        "" if result.psnr_drop_db is None else f"{result.psnr_drop_db:.4f}",
        "" if after is None or after.ssim_y is None else f"{after.ssim_y:.4f}",
    ]


def _case_row(case: "Case") -> list[str]:
    before, after = case.reference_quality, case.candidate_quality
    return [
        case.name,
        format_shape(case.shape),
        "passed" if case.passed else "FAILED",
        f"{case.difference.fidelity_db:.1f}",
        f"{case.difference.max_abs:.2e}",
        f"{case.difference.changed_share:.2%} by {case.difference.changed_levels_max}",
        "" if before is None else f"{before.psnr_y_db:.3f}",
        "" if after is None else f"{after.psnr_y_db:.3f}",
        "" if after is None or after.ssim_y is None else f"{after.ssim_y:.4f}",
        case.difference.problem or "",
    ]


def _write_report(
    options: VerifyOptions, folder: Path, results: "Sequence[VerifyResult]", loaded: "LoadedCheckpoint"
) -> None:
    from srdeploy.cli.pipeline.entries import checkpoint_entry, this_command, verified_entry
    from srdeploy.runtime.report.document import report_document
    from srdeploy.runtime.report.write import write_report

    document = report_document(
        title=f"Verification of {', '.join(path.name for path in options.candidates)}",
        contract=loaded.contract(),
        engines=[verified_entry(path, result) for path, result in zip(options.candidates, results, strict=True)],
        checkpoint=checkpoint_entry(loaded),
        commands=[this_command()],
    )
    write_report(document, folder, force=options.force)


def _refuse_failures(
    results: "Sequence[VerifyResult]", crops: Sequence[Path | None], bisections: "Sequence[Bisection | None]"
) -> None:
    from srdeploy.core.errors import GateError
    from srdeploy.runtime.verify.advice import advice

    failed = [entry for entry in zip(results, crops, bisections, strict=True) if not entry[0].passed]
    if not failed:
        return
    result, crop, bisection = failed[0]
    more = len(result.failures) - 1
    message = f"{result.candidate.name} failed: {result.failures[0]}" + (f" (and {more} more)" if more else "")
    if len(failed) > 1:
        message += f" (and {len(failed) - 1} more engines failed)"
    if crop is not None:
        message += f"; worst crop in {crop}"
    if bisection is None or bisection.first is None:
        raise GateError(message, next_step=advice(result))
    raise GateError(f"{message}; {bisection.first.node} differs first", next_step=_step_after(bisection, result))


def _step_after(bisection: "Bisection", result: "VerifyResult") -> str:
    """Return what to do about the first node that differs."""
    from srdeploy.runtime.verify.advice import advice

    assert bisection.first is not None
    precision, module = result.candidate.contract.precision, bisection.first.module
    if bisection.blame == "engine":
        return "use another --engine: this one computes that node wrongly"
    if precision is Precision.FP32:
        return "export it again: srdeploy export CHECKPOINT -o model.onnx"
    if precision in (Precision.INT8, Precision.FP8) and module:
        return f"leave that layer float: srdeploy quantize --keep {module}"
    return advice(result)
