"""Verification against the eager FP32 network on the engine's own device: for `verify`, and a stage of `deploy`."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, overload

from srdeploy.cli.console import warning_line
from srdeploy.cli.pipeline.engines import threads_for
from srdeploy.cli.pipeline.opening import by_device
from srdeploy.cli.pipeline.types import FP16_ONNX, GRAPH_FP16, Candidate, Verdicts, Work
from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import CapabilityError
from srdeploy.core.extras import is_installed
from srdeploy.core.imaging.files import find_images
from srdeploy.core.memory import bytes_per_pixel, default_memory
from srdeploy.core.precision import Precision
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import Runner
from srdeploy.core.samples import Sample, SampleFolder
from srdeploy.core.sizes import format_bytes, format_minimum
from srdeploy.runtime.bench.naming import named
from srdeploy.runtime.engines.eager import open_eager
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.runtime.verify.parity import Gates, VerifyResult, verify_all

if TYPE_CHECKING:
    from srdeploy.calibration.images.dataset import CalibrationSet
    from srdeploy.models.checkpoint.load import LoadedCheckpoint

MAX_IMAGES = 8
"""`deploy` verifies on at most this many images, spread over all: each costs a run of the eager network."""
MAX_MACS = 1e11
"""And on a crop of each that costs no more multiply-adds than this, 320 pixels square at most."""
KEPT_CROPS = 3
"""Images that the report shows."""


def compare_with_eager(
    runners: Sequence[Runner],
    loaded: "LoadedCheckpoint",
    samples: Sequence[Sample],
    *,
    gates: Sequence[Gates],
    threads: int | None = None,
    keep_crops: int = 0,
    progress: Progress = SILENT,
) -> list[VerifyResult]:
    """Verify runners against the eager FP32 network, which runs on the same device as each of them.

    Args:
        runners: opened in their parity modes.
        loaded: the checkpoint that they were made from.
        samples: images to compare on.
        gates: one per runner.
        threads: CPU threads of the eager network; None for all processors.
        keep_crops: number of images whose crops are kept for a report.
        progress: where the work is reported.

    Returns:
        One result per runner, in their order.

    Raises:
        UsageError: no image is within an engine's profile.
    """
    gate_of = {id(runner): gate for runner, gate in zip(runners, gates, strict=True)}
    found: dict[int, VerifyResult] = {}
    for device, group in by_device(runners).items():
        with open_eager(loaded, device=device, threads=threads) as reference:
            results = verify_all(
                group,
                reference,
                samples,
                gates=[gate_of[id(runner)] for runner in group],
                keep_crops=keep_crops,
                progress=progress,
            )
        found |= {id(runner): result for runner, result in zip(group, results, strict=True)}
    return [found[id(runner)] for runner in runners]


def side_within(
    memory_bytes: int | None, contract: ModelContract, max_side: int | None, progress: Progress = SILENT
) -> int:
    """Return the maximum side of an image in LR pixels: a square of it runs within a memory budget.

    Args:
        memory_bytes: the budget; None for half of the free memory.
        contract: of the network.
        max_side: a limit that holds in any case; None for none.
        progress: receives the budget, and what it pays for.

    Raises:
        CapabilityError: the budget does not pay for 32 x 32 pixels or the network's minimum.
    """
    budget = memory_bytes or default_memory()
    needed = max(32, contract.min_size)
    side = math.isqrt(int(budget / bytes_per_pixel(contract)))
    if side < needed:
        raise CapabilityError(
            f"a memory budget of {format_bytes(budget)}",
            expected=f"at least {format_minimum(needed**2 * bytes_per_pixel(contract))} for {needed}x{needed} pixels",
            next_step="allow more with --memory",
        )
    if max_side is None or side < max_side:
        progress.note(f"memory budget {format_bytes(budget)}: larger images are cropped to {side} pixels per axis")
    return side if max_side is None else min(side, max_side)


def verify_engines(
    work: Work,
    candidates: Sequence[Candidate],
    checkpoint: "LoadedCheckpoint",
    calibration: "CalibrationSet",
    report: list[str],
) -> Verdicts:
    """Verify all engines that can run here.

    Where an engine cannot run (no GPU), its graph is verified on ONNX Runtime instead: weights and rounding are the
    engine's own, the kernels are not, and the report says so.
    """
    samples = _samples(work, checkpoint.contract(), calibration)
    threads = work.options.threads
    runners: dict[str, Runner] = {}
    obstacles: dict[str, str] = {}
    unseen = {FP16_ONNX: GRAPH_FP16} if (work.folder / FP16_ONNX).exists() else {}
    with ExitStack() as stack:
        for candidate in candidates:
            path = work.folder / candidate.file
            try:
                runner = open_engine(
                    path,
                    engine=candidate.engine,
                    device=candidate.device,
                    parity=True,
                    threads=threads_for(candidate.engine, threads),
                )
            except CapabilityError as error:
                # The folder has a temporary name until the end; messages name the one that it will have.
                obstacles[candidate.name] = str(error).replace(str(work.folder), str(work.options.output))
                unseen[candidate.onnx] = candidate.graph_name
            else:
                runners[candidate.name] = named(stack.enter_context(runner), candidate.name)
        seen = {candidate.onnx for candidate in candidates if candidate.name in runners}
        graphs = {name: onnx for onnx, name in unseen.items() if onnx not in seen and is_installed("onnxruntime")}
        for name, onnx in graphs.items():
            runner = open_engine(work.folder / onnx, parity=True, threads=threads)
            runners[name] = named(stack.enter_context(runner), name)
        found = compare_with_eager(
            list(runners.values()),
            checkpoint,
            samples,
            gates=[_gates(runner, work.options.max_psnr_drop) for runner in runners.values()],
            threads=threads,
            keep_crops=KEPT_CROPS,
            progress=work.progress,
        )
    report.append(f"{sum(result.passed for result in found)} of {len(found)} passed on {len(samples)} images")
    return Verdicts(dict(zip(runners, found, strict=True)), obstacles, graphs)


def _gates(runner: Runner, max_psnr_drop: float | None) -> Gates:
    contract = runner.info.contract
    bounded = contract.precision is Precision.INT8 or contract.compression is not None
    return Gates.of_contract(contract, max_psnr_drop_db=max_psnr_drop if bounded else None)


class _Files(Sequence[Sample]):
    """Single files as samples, decoded on access."""

    def __init__(self, files: Sequence[Path], hr: bool, contract: ModelContract, memory_bytes: int | None) -> None:
        side = max(64, min(320, int((MAX_MACS / contract.macs_per_pixel) ** 0.5)))
        side = side_within(memory_bytes, contract, side)
        self._folders = [
            SampleFolder(None if hr else path, path if hr else None, contract=contract, max_side=side) for path in files
        ]

    def __len__(self) -> int:
        return len(self._folders)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return [folder[0] for folder in self._folders[index]]
        return self._folders[index][0]


def _samples(work: Work, contract: ModelContract, calibration: "CalibrationSet") -> Sequence[Sample]:
    """Return the images to verify on: the given ones, or those that calibration held out."""
    options = work.options
    if options.evaluate is not None:
        files = find_images(options.evaluate)
        seen = [path.name for path in files if sha256_of_file(path) in calibration.image_hashes]
        if seen:
            warning_line(
                f"{len(seen)} of {len(files)} evaluation images were used for calibration ({seen[0]}): "
                "the figures of quantized engines will be optimistic"
            )
    elif options.images.is_dir():
        files = [path for path in find_images(options.images) if sha256_of_file(path) not in calibration.image_hashes]
    else:  # a zip, list, pattern or video: only calibration can read it
        return calibration.held_out
    chosen = (
        [files[index * len(files) // MAX_IMAGES] for index in range(MAX_IMAGES)] if len(files) > MAX_IMAGES else files
    )
    return _Files(chosen, options.hr, contract, options.memory)
