"""The stages of the road that judge: every engine against the eager FP32 network, in decibels and milliseconds."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

from srdeploy.cli.console import warning_line
from srdeploy.cli.pipeline.road import FP16_ONNX, Candidate, Work
from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import CapabilityError
from srdeploy.core.extras import is_installed
from srdeploy.core.imaging.read import find_images
from srdeploy.core.precision import Precision
from srdeploy.core.runner import Runner
from srdeploy.core.shapes import format_shape
from srdeploy.runtime.bench.conditions import conditions
from srdeploy.runtime.bench.latency import BenchResult, bench, named, with_process_memory
from srdeploy.runtime.engines.eager import open_eager
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.runtime.verify.parity import Gates, VerifyResult, verify_all
from srdeploy.runtime.verify.samples import Sample, SampleFolder

if TYPE_CHECKING:
    from srdeploy.calibration.images.dataset import CalibrationSet
    from srdeploy.models.checkpoint.load import LoadedCheckpoint

MAX_JUDGED = 8
"""Verification looks at this many images at most, spread over all: each costs a run of the eager network."""
JUDGED_MACS = 1e11
"""And at a crop of each that costs no more multiply-adds than this, 320 pixels square at most."""
GRAPH_FP16 = "graph fp16"
"""Name of the check of the FP16 graph on ONNX Runtime; it is made also when no engine here is built from it."""
KEPT_VIEWS = 3
"""Images that the report shows."""


@dataclass(frozen=True)
class Verdicts:
    """What verification found.

    Attributes:
        by_name: verdicts of engines by their name, and of graphs by theirs.
        obstacles: by engine name, why it cannot run here.
        graphs: by name, the ONNX files that were judged because no engine built from them runs here.
    """

    by_name: dict[str, VerifyResult]
    obstacles: dict[str, str]
    graphs: dict[str, str]

    def of(self, candidate: Candidate) -> VerifyResult | None:
        """Return the verdict on an engine, or on its graph where the engine cannot run."""
        name = candidate.graph_name if candidate.name in self.obstacles else candidate.name
        return self.by_name.get(name)

    def admits(self, candidate: Candidate) -> bool:
        """Tell whether an engine may come along: it passed, or nothing could be found out here."""
        verdict = self.of(candidate)
        return verdict is None or verdict.passed

    def runnable(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return those that ran here and passed."""
        return [entry for entry in candidates if entry.name not in self.obstacles and self.admits(entry)]


def verify_engines(
    work: Work,
    candidates: Sequence[Candidate],
    checkpoint: "LoadedCheckpoint",
    calibration: "CalibrationSet",
    say: list[str],
) -> Verdicts:
    """Evaluator all engines that can run here.

    Of an engine that cannot (no GPU), its graph is judged on ONNX Runtime: the weights and the rounding are the
    engine's own, the kernels are not, and the report says so.
    """
    samples = _samples(work, checkpoint.contract(), calibration)
    threads = work.request.threads
    runners: dict[str, Runner] = {}
    obstacles: dict[str, str] = {}
    unseen = {FP16_ONNX: GRAPH_FP16} if (work.folder / FP16_ONNX).exists() else {}
    with ExitStack() as stack:
        for candidate in candidates:
            path = work.folder / candidate.file
            try:
                runner = open_engine(path, engine=candidate.engine, parity=True, threads=threads)
            except CapabilityError as error:
                # The folder has a temporary name until the road ends; people read the one it will have.
                obstacles[candidate.name] = str(error).replace(str(work.folder), str(work.request.output))
                unseen[candidate.onnx] = candidate.graph_name
            else:
                runners[candidate.name] = named(stack.enter_context(runner), candidate.name)
        seen = {candidate.onnx for candidate in candidates if candidate.name in runners}
        graphs = {name: onnx for onnx, name in unseen.items() if onnx not in seen and is_installed("onnxruntime")}
        for name, onnx in graphs.items():
            runner = open_engine(work.folder / onnx, parity=True, threads=threads)
            runners[name] = named(stack.enter_context(runner), name)
        reference = stack.enter_context(open_eager(checkpoint, threads=threads))
        gates = [_gates(runner, work.request.max_psnr_drop) for runner in runners.values()]
        found = verify_all(
            list(runners.values()), reference, samples, gates=gates, keep_views=KEPT_VIEWS, progress=work.progress
        )
    say.append(f"{sum(verdict.passed for verdict in found)} of {len(found)} passed on {len(samples)} images")
    return Verdicts(dict(zip(runners, found, strict=True)), obstacles, graphs)


def bench_engines(
    work: Work, candidates: Sequence[Candidate], checkpoint: "LoadedCheckpoint", say: list[str]
) -> BenchResult | None:
    """Measure engines in turns with the eager network; None when there is none to measure."""
    if not candidates:
        say.append("no engine runs here")
        return None
    threads = work.request.threads
    shape = work.request.shape(checkpoint.contract())
    with ExitStack() as stack:
        runners: list[Runner] = [stack.enter_context(open_eager(checkpoint, threads=threads))]
        for candidate in candidates:
            runner = open_engine(work.folder / candidate.file, engine=candidate.engine, threads=threads)
            runners.append(named(stack.enter_context(runner), candidate.name))
        result = bench(
            runners, shape=shape, effort=work.request.effort, environment=conditions(), progress=work.progress
        )
    # The engines are closed by now: their memory is measured on a free machine.
    files = {entry.name: (work.folder / entry.file, entry.engine) for entry in candidates}
    result = with_process_memory(result, files, threads=threads)
    say.append(f"{len(runners)} networks in turns at {format_shape(shape)}")
    if result.unstable:
        say.append(f"{len(result.unstable)} of {len(result.rows)} medians are unstable (marked ~)")
    return result


def _gates(runner: Runner, max_psnr_drop: float | None) -> Gates:
    precision = runner.info.contract.precision
    return Gates.of(precision, max_psnr_drop_db=max_psnr_drop if precision is Precision.INT8 else None)


class _Files(Sequence[Sample]):
    """Single files as samples, decoded when asked for."""

    def __init__(self, files: Sequence[Path], hr: bool, contract: ModelContract) -> None:
        side = max(64, min(320, int((JUDGED_MACS / contract.macs_per_pixel) ** 0.5)))
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
    """Return the images to judge on: those stated, or those that calibration kept aside."""
    request = work.request
    if request.evaluate is not None:
        files = find_images(request.evaluate)
        seen = [path.name for path in files if sha256_of_file(path) in calibration.image_hashes]
        if seen:
            warning_line(
                f"{len(seen)} of {len(files)} evaluation images were calibrated on ({seen[0]}): "
                "the figures of quantized engines are too kind"
            )
    elif request.images.is_dir():
        files = [path for path in find_images(request.images) if sha256_of_file(path) not in calibration.image_hashes]
    else:  # a zip, list, pattern or video: only calibration can read it
        return [Sample(entry.name, entry.pixels, entry.truth) for entry in calibration.held_out]
    chosen = (
        [files[index * len(files) // MAX_JUDGED] for index in range(MAX_JUDGED)] if len(files) > MAX_JUDGED else files
    )
    return _Files(chosen, request.hr, contract)
