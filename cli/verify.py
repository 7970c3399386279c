"""srdeploy verify: engines against the eager network they came from, in decibels."""

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from srdeploy.cli.checkpoint_options import CheckpointOptions, checkpoint_options, load_from_options
from srdeploy.cli.console import RichProgress, emit_json, markdown_table, next_command, table, warning_line
from srdeploy.cli.options import EXISTING, OUTPUT_PATH, example, force_option, json_option, refuse_two_documents
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


@click.command(epilog=EXAMPLE)
@click.argument("candidates", nargs=-1, required=True, type=EXISTING, metavar="ONNX-OR-ENGINE...")
@click.option("--against", "checkpoint", type=EXISTING, required=True, help="Checkpoint: the eager FP32 reference.")
@click.option("--images", type=EXISTING, help="Low-resolution images to judge by: a folder or a file.")
@click.option(
    "--hr", type=EXISTING, help="Ground truth by the same names; alone, the images are made from it (bicubic)."
)
@click.option("--engine", help="Engine family for ONNX files (default onnxruntime).")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all.")
@click.option(
    "--min-fidelity", type=float, metavar="DB", help="Gate instead of the precision's own (fp32 90, fp16 60)."
)
@click.option("--max-psnr-drop", type=float, metavar="DB", help="Largest loss of mean Y PSNR; needs --hr.")
@click.option("--limit", type=click.IntRange(min=1), help="Judge by at most this many images, spread over all.")
@click.option(
    "--max-side", type=click.IntRange(min=8), metavar="PIXELS", help="Crop images to this many pixels per axis."
)
@click.option("--bisect", is_flag=True, help="Name the first ONNX node that differs, and its PyTorch module.")
@click.option("--per-image", is_flag=True, help="Show every image and shape.")
@click.option(
    "--crops", type=OUTPUT_PATH, metavar="DIR", help="Where worst crops go (default: beside a failed engine)."
)
@click.option("--report", "report_folder", type=OUTPUT_PATH, metavar="DIR", help="Write report.json and report.html.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown on stdout.")
@force_option
@json_option
@checkpoint_options
def command(candidates: tuple[Path, ...], checkpoint: Path, stated: CheckpointOptions, **options: Any) -> None:
    """Compare engines or ONNX files with the eager FP32 network on real images and a grid of shapes.

    NaN, infinity, a constant picture and a wrong shape always fail. Otherwise each image must reach the fidelity of the
    engine's precision (PSNR between the two outputs), and with ground truth the mean PSNR may fall by at most
    --max-psnr-drop. A missed gate ends with exit code 6, the worst crop saved and what to try.
    """
    from srdeploy.core.artifact import check_output_folder
    from srdeploy.core.errors import UsageError

    refuse_two_documents(as_json=options["as_json"], markdown=options["markdown"])
    if options["max_psnr_drop"] is not None and options["hr"] is None:
        raise UsageError("--max-psnr-drop without --hr", next_step="give ground truth with --hr, or use --min-fidelity")
    if options["images"] is None and options["hr"] is None:
        raise UsageError("no images given", next_step="name a folder with --images, --hr or both")
    if options["report_folder"] is not None:
        check_output_folder(options["report_folder"], force=options["force"], known_by="report.json")
    progress = RichProgress()
    loaded = load_from_options(checkpoint, stated, progress, quiet=options["as_json"])
    results = _judged(candidates, loaded, options, progress)
    crops = _saved_crops(candidates, results, options["crops"])
    bisections = (
        _bisected(candidates, results, loaded, options, progress) if options["bisect"] else [None] * len(results)
    )
    _show(results, options)
    for path, bisection in zip(candidates, bisections, strict=True):
        if bisection is not None:
            progress.note(f"{path.name}: {bisection.sentence}")
    if options["report_folder"] is not None:
        _write_report(candidates, results, loaded, stated, options)
    if options["as_json"]:
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
    next_command("srdeploy", "bench", *map(str, candidates), "--against", str(checkpoint), "--shape", shape)


def _judged(
    candidates: Sequence[Path], loaded: "LoadedCheckpoint", options: dict[str, Any], progress: RichProgress
) -> "list[VerifyResult]":
    from srdeploy.cli.opening import open_candidates
    from srdeploy.runtime.engines.eager import open_eager
    from srdeploy.runtime.verify.parity import Gates, verify_all
    from srdeploy.runtime.verify.samples import SampleFolder

    with ExitStack() as stack:
        runners = open_candidates(candidates, loaded, stack, parity=True, **_opening(options))
        reference = stack.enter_context(open_eager(loaded, threads=options["threads"]))
        # With one engine its profile may crop the images; several engines must be judged on the same pictures.
        profile = runners[0].info.profile if len(runners) == 1 else None
        samples = SampleFolder(
            options["images"],
            options["hr"],
            contract=loaded.contract(),
            profile=profile,
            limit=options["limit"],
            max_side=options["max_side"],
        )
        gates = [
            Gates.of(
                runner.info.contract.precision,
                min_fidelity_db=options["min_fidelity"],
                max_psnr_drop_db=options["max_psnr_drop"],
            )
            for runner in runners
        ]
        keep_views = 4 if options["report_folder"] is not None else 0
        return verify_all(runners, reference, samples, gates=gates, keep_views=keep_views, progress=progress)


def _bisected(
    candidates: Sequence[Path],
    results: "Sequence[VerifyResult]",
    loaded: "LoadedCheckpoint",
    options: dict[str, Any],
    progress: RichProgress,
) -> "list[Bisection | None]":
    from srdeploy.export.exporter import export_onnx
    from srdeploy.runtime.verify.bisect import bisect_path
    from srdeploy.runtime.verify.samples import SampleFolder

    samples = SampleFolder(options["images"], options["hr"], contract=loaded.contract(), limit=options["limit"])
    found: list[Bisection | None] = []
    with tempfile.TemporaryDirectory(prefix="srdeploy-bisect-") as folder:
        plain = Path(folder) / "fp32.onnx"

        def fp32() -> Path:
            if not plain.exists():
                export_onnx(loaded, plain, progress=progress)
            return plain

        for path, result in zip(candidates, results, strict=True):
            worst = next((sample for sample in samples if sample.name == result.worst_case.name), samples[0])
            progress.note(f"looking for the first node of {path.name} that differs")
            found.append(
                bisect_path(
                    path,
                    worst.image,
                    fp32=fp32,
                    engine=options["engine"],
                    threads=options["threads"],
                    progress=progress,
                )
            )
    return found


def _saved_crops(
    candidates: Sequence[Path], results: "Sequence[VerifyResult]", folder: Path | None
) -> list[Path | None]:
    """Save the worst crop of every engine that failed, and of every engine when a folder is named."""
    from srdeploy.core.errors import OutputError
    from srdeploy.runtime.report.crops import save_strip

    saved: list[Path | None] = []
    for path, result in zip(candidates, results, strict=True):
        target = None if result.worst is None else (folder or path.parent) / f"{path.name}.worst.png"
        if target is None or result.worst is None or (folder is None and result.passed):
            saved.append(None)
            continue
        try:
            save_strip(result.worst, target)
        except OutputError as error:  # the verdict matters more than its picture
            warning_line(f"the worst crop was not saved: {error}")
            target = None
        saved.append(target)
    return saved


def _show(results: "Sequence[VerifyResult]", options: dict[str, Any]) -> None:
    rows = [_row(result) for result in results]
    if options["markdown"]:
        click.echo(markdown_table(HEADERS, rows))
    else:
        table("", HEADERS, rows)
    if options["per_image"]:
        headers = ("case", "input", "verdict", *HEADERS[2:3], *HEADERS[4:8], "SSIM engine", "problem")
        for result in results:
            cases = [_case_row(case) for case in (*result.images, *result.grid)]
            if options["markdown"]:
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
    candidates: Sequence[Path],
    results: "Sequence[VerifyResult]",
    loaded: "LoadedCheckpoint",
    stated: CheckpointOptions,
    options: dict[str, Any],
) -> None:
    from srdeploy.cli.opening import engine_entry, spoken_command
    from srdeploy.runtime.report.document import report_document
    from srdeploy.runtime.report.write import write_report

    document = report_document(
        title=f"Verification of {', '.join(path.name for path in candidates)}",
        contract=loaded.contract(),
        engines=[engine_entry(path, result) for path, result in zip(candidates, results, strict=True)],
        checkpoint={"name": loaded.path.name, "dialect": loaded.dialect, "evidence": loaded.evidence.to_json()},
        commands=[spoken_command()],
    )
    write_report(document, options["report_folder"], force=options["force"])


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
    words = f"{result.candidate.name} failed: {result.failures[0]}" + (f" (and {more} more)" if more else "")
    if len(failed) > 1:
        words += f" (and {len(failed) - 1} more engines failed)"
    if crop is not None:
        words += f"; worst crop in {crop}"
    found = None if bisection is None else bisection.first
    raise GateError(words, next_step=advice(result) if found is None else f"start at {found.node}, named above")


def _opening(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("engine", "device", "threads")}
