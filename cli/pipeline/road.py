"""The whole road in one run: checkpoint, ONNX, FP16 and INT8, engines, verification, latency, report, bundle.

Every stage is the one behind the verb of its name; here they are joined and their files land in one folder. What is a
defect of one engine only (its graph misses the gate, its builder refuses) leaves that engine out with its reason, and
the road goes on; everything else ends it, and no bundle is written.

    road.py        the request, and the stages that make files: load, export, calibrate, quantize, build
    proof.py       the stages that judge them: verify, bench
    bundling.py    the stage that closes the folder: report, reproduce.sh, manifest
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srdeploy.cli.checkpoint_options import CheckpointOptions, load_from_options
from srdeploy.core.artifact import atomic_folder
from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import package_versions
from srdeploy.core.errors import BuildError, CapabilityError, GateError, SrdeployError
from srdeploy.core.extras import is_installed
from srdeploy.core.manifest import manifest_path, read_manifest
from srdeploy.core.precision import Precision, Target
from srdeploy.core.progress import Progress
from srdeploy.core.shapes import Shape, ShapeProfile
from srdeploy.core.sizes import format_bytes
from srdeploy.runtime.bundle import BundleEngine, LeftOut

if TYPE_CHECKING:
    from srdeploy.calibration.images.dataset import CalibrationSet
    from srdeploy.calibration.search.choose import Choice
    from srdeploy.models.checkpoint.load import LoadedCheckpoint
    from srdeploy.runtime.bench.latency import BenchResult, Effort
    from srdeploy.runtime.verify.parity import VerifyResult

PRECISIONS: dict[str, tuple[Precision, ...]] = {
    # What is worth building on each engine. The CPU engines compute FP16 layers in FP32, so FP16 buys nothing there;
    # on TensorRT for RTX FP16 is quicker than INT8 for these networks.
    "onnxruntime": (Precision.FP32, Precision.INT8),
    "openvino": (Precision.FP32, Precision.INT8),
    "tensorrt-rtx": (Precision.FP16,),
    "tensorrt": (Precision.FP16, Precision.INT8),
    "onnxruntime-cuda": (Precision.FP16,),
    "onnxruntime-tensorrt": (Precision.FP16,),
}
UNASKED = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt-rtx": "tensorrt_rtx"}
"""Engines that are built when nobody says which, by the module that must be installed for it."""

CPU_ENGINES = ("onnxruntime", "openvino")
FP32_ONNX = "model.fp32.onnx"
FP16_ONNX = "model.fp16.onnx"
BENCH_SIZE = (180, 320)
"""Height and width that engines are tuned for and measured on, unless stated or too heavy."""
BENCH_MACS = 2.5e11
"""A default size that costs more multiply-adds than this is halved until it does not: eager PyTorch has to run it
dozens of times on a CPU."""


@dataclass(frozen=True)
class Request:
    """What is asked of the road.

    Attributes:
        checkpoint: the trained weights.
        images: calibration images, in any form that quantization takes.
        output: the bundle folder.
        hr: the images are high resolution: they are shrunk to be inputs, and are the ground truth of verification.
        evaluate: images to verify on; None takes those of `images` that calibration keeps aside.
        engines: engine families; empty for those installed here.
        size: (height, width) that engines are tuned for and measured on; None for `BENCH_SIZE`.
        max_psnr_drop: largest loss of Y PSNR in dB that an INT8 graph may have; None for the fidelity gate alone.
        stated: what the user says about the checkpoint.
        compute_capabilities: GPUs that TensorRT-RTX engines are built for; empty for all from Ampere on.
        threads: CPU threads of engines; None for all processors.
        effort: how long engines are measured; None for the default.
        force: replace an existing bundle.
    """

    checkpoint: Path
    images: Path
    output: Path
    hr: bool = False
    evaluate: Path | None = None
    engines: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    max_psnr_drop: float | None = None
    stated: CheckpointOptions = field(default_factory=CheckpointOptions)
    compute_capabilities: tuple[str, ...] = ()
    threads: int | None = None
    effort: "Effort | None" = None
    force: bool = False

    def words(self) -> list[str]:
        """Return the command line that asks for the same."""
        words = ["srdeploy", "deploy", str(self.checkpoint), "--images", str(self.images), *self.stated.flags()]
        words += ["--hr"] if self.hr else []
        words += [] if self.evaluate is None else ["--evaluate", str(self.evaluate)]
        words += [word for engine in self.engines for word in ("--engine", engine)]
        words += [word for gpu in self.compute_capabilities for word in ("--compute-capability", gpu)]
        words += [] if self.max_psnr_drop is None else ["--max-psnr-drop", f"{self.max_psnr_drop:g}"]
        words += [] if self.threads is None else ["--threads", str(self.threads)]
        if self.size is not None:
            words += ["--size", "x".join(str(side) for side in self.size)]
        return [*words, "-o", str(self.output)]

    def shape(self, contract: ModelContract) -> Shape:
        """Return the input shape that engines are tuned for and measured on."""
        height, width = self.size or BENCH_SIZE
        while self.size is None and height * width * contract.macs_per_pixel > BENCH_MACS and height > 24:
            height, width = height // 2, width // 2
        return 1, contract.channels, max(height, contract.min_size), max(width, contract.min_size)

    def profile(self, contract: ModelContract) -> ShapeProfile:
        """Return the shapes that TensorRT engines accept: from tiny to twice the tuned height and width."""
        n, c, height, width = self.shape(contract)
        least = max(16, contract.min_size)
        return ShapeProfile(
            (n, c, min(least, height), min(least, width)), (n, c, height, width), (n, c, 2 * height, 2 * width)
        )


@dataclass(frozen=True)
class Candidate:
    """An engine on its way into the bundle: one family at one precision.

    Attributes:
        engine: the family.
        precision: what its graph asks for.
        onnx: the graph's file in the bundle.
        file: the engine's file; the graph itself for families that open ONNX files.
        built: the precision read back from the built engine; None when nothing is built.
        seconds: of the build.
    """

    engine: str
    precision: Precision
    onnx: str
    file: str = ""
    built: str | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Name in tables, unique in a bundle."""
        return f"{self.engine} {self.precision}"

    @property
    def graph_name(self) -> str:
        """Name of the check of its graph on ONNX Runtime, where the engine itself cannot run."""
        return f"graph {self.onnx.removeprefix('model.').removesuffix('.onnx')}"


@dataclass(frozen=True)
class Outcome:
    """A finished bundle.

    Attributes:
        bundle: the folder.
        contract: of the FP32 graph.
        engines: those inside, best first.
        left_out: those asked for that are not, with the reason.
        verdicts: by candidate or graph name, of what ran here.
        bench: latencies; None when no engine can run here.
        seconds: wall time by stage.
        exit_code: 0, or the code of the first engine that was left out.
    """

    bundle: Path
    contract: ModelContract
    engines: tuple[BundleEngine, ...]
    left_out: tuple[LeftOut, ...]
    verdicts: "dict[str, VerifyResult]"
    bench: "BenchResult | None"
    seconds: dict[str, float]
    exit_code: int


@dataclass
class Work:
    """What the stages share: the request, the folder they write into, and what has happened so far."""

    request: Request
    folder: Path
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    left_out: list[tuple[LeftOut, int]] = field(default_factory=list)
    sensitivity: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    searches: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Time a stage, and print one line about it when it is done."""
        said: list[str] = []
        start = time.perf_counter()
        yield said
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.notes[name] = "; ".join(said)
        self.progress.note(f"{name:<10}{self.seconds[name]:7.1f} s  {self.notes[name]}")

    def leave_out(self, candidate: Candidate, stage: str, reason: str, exit_code: int) -> None:
        """Record an engine that does not come along."""
        self.left_out.append((LeftOut(candidate.engine, candidate.precision, stage, reason), exit_code))
        self.progress.note(f"left out: {candidate.name} ({stage}): {reason}")


def deploy(request: Request, progress: Progress) -> Outcome:
    """Go the whole road and write the bundle.

    Raises:
        InputError: the checkpoint or the images are not understood.
        ExportError: the FP32 graph could not be made, or does not agree with the network.
        CapabilityError: an engine was asked for that cannot be made here, or the bundle cannot be written.
        UsageError: the bundle exists already, or an engine is unknown.
    """
    from srdeploy.cli.pipeline.finish import finish
    from srdeploy.cli.pipeline.verify import bench_engines, verify_engines

    engines = possible_engines(request.engines)
    with atomic_folder(request.output, force=request.force, known_by="manifest.json") as folder:
        work = Work(request, folder, progress)
        with work.stage("load") as say:
            checkpoint = _load(work, say)
        # Before the export, which takes longer: images that cannot be used should be known soon.
        with work.stage("calibrate") as say:
            calibration = _calibrate(work, checkpoint, say)
        with work.stage("export") as say:
            _export(work, checkpoint, say)
        with work.stage("quantize") as say:
            candidates = _quantize_all(work, engines, calibration, say)
        with work.stage("build") as say:
            candidates = _build_all(work, candidates, checkpoint, say)
        with work.stage("verify") as say:
            verdicts = verify_engines(work, candidates, checkpoint, calibration, say)
        with work.stage("bench") as say:
            bench = bench_engines(work, verdicts.runnable(candidates), checkpoint, say)
        with work.stage("report") as say:
            return finish(work, candidates, checkpoint, calibration, verdicts, bench, say)


def possible_engines(asked: Sequence[str]) -> tuple[str, ...]:
    """Return the families to build. Those asked for must be possible here, and that is found out before any work.

    Raises:
        CapabilityError: an engine cannot be made here, or nobody asked and none is installed.
        UsageError: there is no engine of that name.
    """
    from srdeploy.runtime.engines.registry import family

    if not asked:
        found = tuple(name for name, module in UNASKED.items() if is_installed(module))
        if not found:
            raise CapabilityError("no engine is installed", next_step="install one with: pip install 'srdeploy[cpu]'")
        return found
    for name in asked:
        chosen = family(name)
        module = chosen.load()
        reason = module.why_not_build() if chosen.suffix else module.why_not_run()
        if reason is not None:
            raise CapabilityError(f"engine {name} cannot be made here: {reason}")
    return tuple(dict.fromkeys(asked))


def onnx_name(engine: str, precision: Precision) -> str:
    """Return the file of the graph that an engine is built from: Q/DQ differs by target, the float types do not."""
    if precision in (Precision.INT8, Precision.FP8):
        return f"model.{precision}.{target_of(engine)}.onnx"
    return f"model.{precision}.onnx"


def target_of(engine: str) -> Target:
    """Return the family that a graph for this engine is laid out for."""
    return Target.ONNXRUNTIME if engine.startswith("onnxruntime") else Target(engine)


def sized(path: Path) -> str:
    """Return a file's name and size, for one line of progress."""
    return f"{path.name} {format_bytes(path.stat().st_size)}"


def _load(work: Work, say: list[str]) -> "LoadedCheckpoint":
    checkpoint = load_from_options(work.request.checkpoint, work.request.stated, work.progress)
    contract = checkpoint.contract()
    say.append(f"{checkpoint.dialect}: {contract.architecture} x{contract.scale}, {contract.colours}")
    return checkpoint


def _export(work: Work, checkpoint: "LoadedCheckpoint", say: list[str]) -> None:
    from srdeploy.export.exporter import export_onnx

    export_onnx(checkpoint, work.folder / FP32_ONNX, progress=work.progress)
    say.append(sized(work.folder / FP32_ONNX))


def _calibrate(work: Work, checkpoint: "LoadedCheckpoint", say: list[str]) -> "CalibrationSet":
    from srdeploy.calibration.images.dataset import make_calibration_set

    request = work.request
    calibration = make_calibration_set(
        request.images, contract=checkpoint.contract(), hr=request.hr, progress=work.progress
    )
    (work.folder / "calibration").mkdir()
    say.append(f"{len(calibration)} crops from {len(calibration.image_hashes)} images")
    return calibration


def _quantize_all(work: Work, engines: Sequence[str], calibration: "CalibrationSet", say: list[str]) -> list[Candidate]:
    """Bring the FP32 graph to every precision that some engine needs; a graph that misses its gate is left out."""
    candidates = [
        Candidate(engine, precision, onnx_name(engine, precision))
        for engine in engines
        for precision in PRECISIONS[engine]
    ]
    # FP16 is made even when no engine here wants it: it is what other machines' engines are built from.
    needed = {FP16_ONNX: ("tensorrt", Precision.FP16)}
    needed |= {entry.onnx: (entry.engine, entry.precision) for entry in candidates if entry.onnx != FP32_ONNX}
    refused: dict[str, SrdeployError] = {}
    for onnx, (engine, precision) in needed.items():
        try:
            say.append(_quantize(work, onnx, engine, precision, calibration))
        except (GateError, BuildError) as error:
            refused[onnx] = error
    for entry in candidates:
        if entry.onnx in refused:
            work.leave_out(entry, "quantize", str(refused[entry.onnx]), refused[entry.onnx].exit_code)
    return [entry for entry in candidates if entry.onnx not in refused]


def _quantize(work: Work, onnx: str, engine: str, precision: Precision, calibration: "CalibrationSet") -> str:
    from srdeploy.calibration.quantize import QuantizeOptions, artifacts_folder, quantize
    from srdeploy.runtime.engines.registry import open_engine

    output = work.folder / onnx
    int8 = precision is Precision.INT8
    result = quantize(
        work.folder / FP32_ONNX,
        output,
        precision=precision,
        target=target_of(engine),
        calibration=calibration,
        options=QuantizeOptions(max_psnr_drop=work.request.max_psnr_drop if int8 else None),
        open_engine=partial(open_engine, engine=engine) if engine in CPU_ENGINES else None,
        progress=work.progress,
    )
    if int8 and not result.int8_macs:
        output.unlink()
        manifest_path(output).unlink()
        shutil.rmtree(artifacts_folder(output), ignore_errors=True)
        raise GateError("the bound is kept only with every layer in FP32", expected="an INT8 graph")
    work.sensitivity[onnx] = _sensitivity(result.choice)
    if result.choice is not None and int8 and work.request.max_psnr_drop is not None:
        work.searches.append(_search(onnx, work.request.max_psnr_drop, result.choice))
    # One folder for all graphs: their calibration set is one and the same.
    places = {name: f"calibration/{'' if name == 'set' else output.stem + '.'}{name}.json" for name in result.artifacts}
    for name, path in result.artifacts.items():
        path.rename(work.folder / places[name])
    artifacts_folder(output).rmdir()
    manifest = read_manifest(output)
    details = {**manifest.details, "output": onnx, "artifacts": places}  # they named the folder's temporary name
    manifest_path(output).write_text(replace(manifest, details=details).to_json(), encoding="utf-8")
    return sized(output)


def _sensitivity(choice: "Choice | None") -> list[dict[str, Any]]:
    """Return the report's entries: how good the image stays when only these layers are quantized."""
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


def _search(onnx: str, bound_db: float, choice: "Choice") -> dict[str, Any]:
    """Return the report's entry: the graphs that were measured on the way to the bound, and which of them was taken."""
    taken = (tuple(choice.decisions.keep), choice.decisions.splits)
    points = [point.to_json() | {"taken": (point.keep, point.splits) == taken} for point in choice.points]
    return {"graph": onnx, "bound_db": bound_db, "points": points}


def _build_all(
    work: Work, candidates: Sequence[Candidate], checkpoint: "LoadedCheckpoint", say: list[str]
) -> list[Candidate]:
    """Build every candidate's engine; one that fails is left out."""
    (work.folder / "engines").mkdir()
    profile = work.request.profile(checkpoint.contract())
    built = []
    for candidate in candidates:
        try:
            built.append(_build(work, candidate, profile))
        except BuildError as error:
            work.leave_out(candidate, "build", str(error), error.exit_code)
    say.append(", ".join(entry.name for entry in built))
    return built


def _build(work: Work, candidate: Candidate, profile: ShapeProfile) -> Candidate:
    from srdeploy.runtime.engines.options import BuildOptions
    from srdeploy.runtime.engines.registry import build_engine, family

    suffix = family(candidate.engine).suffix
    if suffix is None:  # it opens the ONNX file as it is
        return replace(candidate, file=candidate.onnx)
    on_gpu = candidate.engine.startswith("tensorrt")
    capabilities = work.request.compute_capabilities if candidate.engine == "tensorrt-rtx" else ()
    file = f"engines/{_engine_name(candidate, profile if on_gpu else None, capabilities)}{suffix}"
    result = build_engine(
        work.folder / candidate.onnx,
        work.folder / file,
        engine=candidate.engine,
        options=BuildOptions(profiles=(profile,) if on_gpu else (), compute_capabilities=capabilities),
        progress=work.progress,
    )
    precision_built = str(result.manifest.details["precision"]["built"])
    return replace(candidate, file=file, built=precision_built, seconds=round(result.seconds, 2))


def _engine_name(candidate: Candidate, profile: ShapeProfile | None, capabilities: Sequence[str]) -> str:
    """Return <engine>-<version>_<target>_<precision>_<profile>, short enough to read."""
    version = package_versions([candidate.engine]).get(candidate.engine, "unknown")
    target = "cpu" if profile is None else "sm" + "-".join(capabilities) if capabilities else "gpu"
    shapes = "any"
    if profile is not None:
        height, width = (f"{low}-{high}" for low, high in zip(profile.min[2:], profile.max[2:], strict=True))
        shapes = f"{height}x{width}"
    return f"{candidate.engine}-{version}_{target}_{candidate.precision}_{shapes}"
