"""srdeploy demo: both example networks deployed, verified and run on photographs of the clone's examples/ folder."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from srdeploy.cli.console import RichProgress, console, emit_json, next_command
from srdeploy.cli.options import EXISTING, FORCE, JSON, OUTPUT_PATH, arguments, example, option, verb
from srdeploy.core.errors import CapabilityError, InputError, UsageError
from srdeploy.core.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from srdeploy.cli.pipeline.types import Outcome

NETWORKS = {"rcan_x2": "rcan_x2_demo.pt", "srdensenet_x4": "srdensenet_x4_demo.pth"}
"""Bundle name to checkpoint file in the examples folder."""
PICTURE = "cat.png"
"""The photograph of the before/after picture."""
BOX = (150, 60, 310, 180)
"""What it shows of that photograph: left, top, right, bottom."""
BENCH_SIZE = (96, 128)
"""Height and width measured on: a fifth of the pixels that `deploy` takes by itself."""
BENCH_SECONDS = 3.0
"""Measuring time per engine and kind: some fifty runs of the slowest, which most machines need for a stable median."""

EXAMPLE = example(
    """
srdeploy demo -o demo-output
srdeploy upscale demo-output/rcan_x2.srd photo.jpg -o photo_x2.png
"""
)


@arguments
class DemoOptions:
    """What `srdeploy demo` is given."""

    output: Path = option(
        "-o",
        "--output",
        type=OUTPUT_PATH,
        default=Path("demo-output"),
        show_default=True,
        help="Folder for everything.",
    )
    examples: Path | None = option(
        "--examples", type=EXISTING, default=None, help="Folder of the examples; default: the source tree's own."
    )
    names: tuple[str, ...] = option(
        "--network", type=click.Choice(list(NETWORKS)), default=(), help="Only this one; repeatable."
    )
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)


@verb(DemoOptions, epilog=EXAMPLE)
def command(options: DemoOptions) -> int:
    """Deploy the two example networks, upscale photographs with them, and draw a before/after picture.

    The examples (two small networks and their photographs) are in the folder examples/ of the source tree; an installed
    wheel does not contain them.
    """
    from srdeploy.cli.deploy import show, to_json

    examples, output = examples_folder(options.examples), options.output
    if output.exists() and not options.force:
        raise UsageError(f"{output} exists already", next_step="choose another name, or pass --force to replace it")
    progress = RichProgress()
    started = time.perf_counter()
    documents = {}
    exit_code = 0
    for name in options.names or tuple(NETWORKS):
        console.rule(f"{name}: {NETWORKS[name]}", align="left", characters="=")
        outcome = _deploy(examples, output / f"{name}.srd", NETWORKS[name], progress)
        pictures = _upscale(outcome, examples, output / f"{name}_photos", progress)
        comparison = _compare(
            outcome, examples / "photos" / "evaluation" / PICTURE, output / f"{name}_before_after.png"
        )
        show(outcome)
        progress.note(f"before and after: {comparison}")
        documents[name] = {**to_json(outcome), "photos": pictures, "before_after": str(comparison)}
        exit_code = exit_code or outcome.exit_code
    progress.note(f"\nthe whole demo took {time.perf_counter() - started:.0f} s")
    if options.as_json:
        emit_json(documents)
    bundle = next(iter(documents.values()))["bundle"]
    next_command("srdeploy", "upscale", str(bundle), "YOUR_PHOTO.jpg", "-o", "larger.png")
    return exit_code


def examples_folder(given: Path | None) -> Path:
    """Return the folder of the example networks and photographs.

    Raises:
        CapabilityError: srdeploy was installed without its source tree, and no folder was given.
        InputError: the folder lacks a network or the photographs.
    """
    folder = given or Path(__file__).resolve().parents[1] / "examples"
    if given is None and not folder.is_dir():
        raise CapabilityError(
            "the examples are not part of the installed package",
            next_step="clone the repository and run `make demo` there, or name its folder with --examples",
        )
    for name in (*NETWORKS.values(), "photos/calibration", f"photos/evaluation/{PICTURE}"):
        if not (folder / name).exists():
            raise InputError(f"{folder} holds no {name}", expected="the examples folder of the source tree")
    return folder


def _deploy(examples: Path, bundle: Path, checkpoint: str, progress: Progress) -> "Outcome":
    from srdeploy.cli.pipeline.deploy import deploy
    from srdeploy.cli.pipeline.types import DeployOptions
    from srdeploy.runtime.bench.turns import Effort

    options = DeployOptions(
        checkpoint=examples / checkpoint,
        images=examples / "photos" / "calibration",
        evaluate=examples / "photos" / "evaluation",
        hr=True,
        output=bundle,
        size=BENCH_SIZE,
        force=True,
    )
    effort = Effort(warmup_runs=2, warmup_seconds=0.2, min_runs=7, seconds=BENCH_SECONDS)
    return deploy(options, progress, effort=effort)


def _upscale(outcome: "Outcome", examples: Path, output: Path, progress: Progress) -> list[dict[str, Any]]:
    """Upscale the evaluation photographs with the bundle's best engine."""
    from srdeploy.upscale.folders import upscale_folder
    from srdeploy.upscale.single_image import OutputOptions
    from srdeploy.upscale.upscaler import Upscaler

    started = time.perf_counter()
    with Upscaler.open(outcome.bundle) as up:
        report = upscale_folder(
            up, examples / "photos" / "evaluation", output, OutputOptions(force=True), progress=progress
        )
    report.raise_failures()
    summary = f"{len(report.made)} photos to {output}"
    if report.skipped:
        summary += f"; {len(report.skipped)} existed already, made by the same engine"
    progress.note(f"{'upscale':<10}{time.perf_counter() - started:7.1f} s  {summary}")
    return [{"photo": name, **made.to_json()} for name, made in report.made.items()]


def _compare(outcome: "Outcome", photo: Path, output: Path) -> Path:
    """Draw three panels: the photograph shrunk and enlarged by bicubic, by the bundle's engine, and as it was."""
    from PIL import Image, ImageDraw, ImageFont

    from srdeploy.core.artifact import atomic_file
    from srdeploy.core.imaging.psnr import y_psnr_db
    from srdeploy.core.imaging.read import read_image, rgb8
    from srdeploy.core.imaging.resize import imresize
    from srdeploy.upscale.upscaler import Upscaler

    scale = outcome.contract.scale
    truth = rgb8(read_image(photo))
    truth = truth[: truth.shape[0] // scale * scale, : truth.shape[1] // scale * scale]
    small = imresize(truth, scale=1 / scale)
    with Upscaler.open(outcome.bundle) as up:
        large = up(small)
        engine = up.info.name
    bicubic = imresize(small, scale=float(scale))
    labels = [
        f"bicubic x{scale}, {y_psnr_db(bicubic, truth, shave=scale):.2f} dB",
        f"{engine} x{scale}, {y_psnr_db(large, truth, shave=scale):.2f} dB",
        "the photograph",
    ]
    panels = [_panel(picture, Image) for picture in (bicubic, large, truth)]
    width, height = panels[0].size
    sheet = Image.new("RGB", (3 * width + 2 * 8, height + 28), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (panel, label) in enumerate(zip(panels, labels, strict=True)):
        sheet.paste(panel, (index * (width + 8), 28))
        draw.text((index * (width + 8) + 4, 5), label, fill="black", font=ImageFont.load_default(15))
    with atomic_file(output, force=True) as temporary:
        sheet.save(temporary, optimize=True)
    return output


def _panel(pixels: "NDArray[np.uint8]", images: Any) -> Any:
    """Cut the shown part out and enlarge it twice by repeating pixels, so that no resampling flatters it."""
    left, top, right, bottom = BOX
    panel = images.fromarray(pixels[top:bottom, left:right])
    return panel.resize((2 * panel.width, 2 * panel.height), images.Resampling.NEAREST)
