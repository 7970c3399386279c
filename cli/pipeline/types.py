"""What the stages of `deploy` exchange: its options, the candidates, and what came of them."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srdeploy.cli.checkpoint_options import CheckpointOptions
from srdeploy.cli.options import (
    ANY_PATH,
    BYTES,
    EXISTING,
    FORCE,
    HR,
    JSON,
    MEMORY,
    OUTPUT_PATH,
    POSITIVE,
    SIZE,
    argument,
    arguments,
    option,
    option_group,
)
from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.core.progress import Progress
from srdeploy.core.shapes import Shape, ShapeProfile

if TYPE_CHECKING:
    from srdeploy.runtime.bench.latency import BenchResult
    from srdeploy.runtime.bundle import BundleEngine, Excluded
    from srdeploy.runtime.verify.parity import VerifyResult

FP32_ONNX = "model.fp32.onnx"
FP16_ONNX = "model.fp16.onnx"
ORIGINAL_ONNX = "model.original.onnx"
"""The exported graph, where FP32_ONNX is a compressed one."""
COMPRESSION_SHARE = 0.5
"""Part of the drop that compression may use; the rest, and what it left of its part, is for INT8."""
GRAPH_FP16 = "graph fp16"
"""Name of the check of the FP16 graph on ONNX Runtime; it is made also when no engine here is built from it."""

OPTIONAL = (Precision.FP8,)
"""Precisions that are tried where the GPU has them: a failure is reported and changes no exit code."""
BENCH_SIZE = (180, 320)
"""Default height and width that engines are tuned for and measured on."""
TUNED_MACS = 2.5e11
"""A default size that costs more multiply-adds than this is halved until it does not: larger pictures of such a network
run in tiles."""
CPU_BENCH_MACS = 1e11
"""The same for the size that is measured where all engines are on the CPU: eager PyTorch and every engine run it dozens
of times, which for RCAN of full size at 90x160 takes as long as all other stages together."""


@arguments
class DeployOptions:
    """What `srdeploy deploy` is given."""

    checkpoint: Path = argument(type=EXISTING)
    images: Path = option("--images", type=ANY_PATH, help="Calibration images: folder, zip, list.")
    checkpoint_options: CheckpointOptions = option_group(default_factory=CheckpointOptions)
    hr: bool = option(
        "--hr",
        default=False,
        help=HR,
    )
    evaluate: Path | None = option(
        "--evaluate",
        type=EXISTING,
        default=None,
        help="Images to verify on; default: every fourth of --images, which calibration holds out.",
    )
    engines: tuple[str, ...] = option(
        "--engine",
        default=(),
        help="Engine to build; repeatable. Default on a GPU: tensorrt, else tensorrt-rtx, and onnxruntime-cuda; else "
        "onnxruntime, openvino and tensorrt-rtx, those that are installed.",
    )
    max_psnr_drop: float | None = option(
        "--max-psnr-drop", type=float, default=None, metavar="DB", help="Maximum loss of Y PSNR that INT8 may cost."
    )
    compress: bool = option(
        "--compress",
        default=False,
        help="Replace layers by cheaper ones first, see `compress`: another network, within --max-psnr-drop together "
        "with INT8.",
    )
    size: tuple[int, int] | None = option(
        "--size",
        type=SIZE,
        default=None,
        help="Input height and width to tune for and measure on; default: 180x320, less if that is heavy.",
    )
    compute_capabilities: tuple[str, ...] = option(
        "--compute-capability", default=(), help="GPUs for tensorrt-rtx, such as 8.9."
    )
    devices: tuple[str, ...] = option(
        "--device",
        default=(),
        help="Device to deploy for: auto, cpu, cuda or cuda:N; repeatable. Default: the NVIDIA GPU if one can be used, "
        "else the CPU.",
    )
    threads: int | None = option(
        "--threads", type=POSITIVE, default=None, help="CPU threads of what runs on the CPU; default: all."
    )
    memory: int | None = option("--memory", type=BYTES, default=None, help=MEMORY)
    output: Path = option("-o", "--output", type=OUTPUT_PATH, help="Bundle folder, NAME.srd.")
    force: bool = option("--force", default=False, help=FORCE)
    as_json: bool = option("--json", default=False, help=JSON)

    def shape(self, contract: ModelContract) -> Shape:
        """Return the input shape that engines are tuned for, and measured on where one of them is on a GPU."""
        return self._shape(contract, TUNED_MACS)

    def bench_shape(self, contract: ModelContract, devices: Iterable[str]) -> Shape:
        """Return the input shape that engines on some devices are measured on."""
        return self._shape(contract, CPU_BENCH_MACS if set(devices) <= {"cpu"} else TUNED_MACS)

    def _shape(self, contract: ModelContract, max_macs: float) -> Shape:
        height, width = self.size or BENCH_SIZE
        while self.size is None and height * width * contract.macs_per_pixel > max_macs and height > 24:
            height, width = height // 2, width // 2
        return 1, contract.channels, max(height, contract.min_size), max(width, contract.min_size)

    def profile(self, contract: ModelContract) -> ShapeProfile:
        """Return the shapes that TensorRT engines accept: from tiny to twice the tuned height and width."""
        n, c, height, width = self.shape(contract)
        minimum = max(16, contract.min_size)
        return ShapeProfile(
            (n, c, min(minimum, height), min(minimum, width)), (n, c, height, width), (n, c, 2 * height, 2 * width)
        )


@dataclass(frozen=True)
class Candidate:
    """An engine that may become part of the bundle: one family at one precision on one device.

    Attributes:
        engine: the family.
        precision: of its graph.
        onnx: the graph's file in the bundle.
        device: "cpu" or "cuda:N", where it is built, verified and measured.
        shared: whether other candidates have the same family and precision on another device.
        file: the engine's file; the graph itself for families that open ONNX files.
        built: the precision read back from the built engine; None when nothing is built.
        seconds: of the build.
    """

    engine: str
    precision: Precision
    onnx: str
    device: str = "cpu"
    shared: bool = False
    file: str = ""
    built: str | None = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """Name in tables, unique in a bundle."""
        return f"{self.engine} {self.precision}" + (f" on {self.device}" if self.shared else "")

    @property
    def graph_name(self) -> str:
        """Name of the check of its graph on ONNX Runtime, where the engine itself cannot run."""
        return f"graph {self.onnx.removeprefix('model.').removesuffix('.onnx')}"


@dataclass(frozen=True)
class Verdicts:
    """What verification found.

    Attributes:
        by_name: results of engines by their name, and of graphs by theirs.
        obstacles: by engine name, why it cannot run here.
        graphs: by name, the ONNX files that were verified because no engine built from them runs here.
    """

    by_name: "Mapping[str, VerifyResult]"
    obstacles: Mapping[str, str]
    graphs: Mapping[str, str]

    def of(self, candidate: Candidate) -> "VerifyResult | None":
        """Return the result of an engine, or of its graph where the engine cannot run."""
        name = candidate.graph_name if candidate.name in self.obstacles else candidate.name
        return self.by_name.get(name)

    def accepts(self, candidate: Candidate) -> bool:
        """Return True if an engine belongs into the bundle: it passed, or nothing could be verified here."""
        result = self.of(candidate)
        return result is None or result.passed

    def runnable(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Return the candidates that ran here and passed."""
        return [entry for entry in candidates if entry.name not in self.obstacles and self.accepts(entry)]


@dataclass(frozen=True)
class Outcome:
    """A finished bundle.

    Attributes:
        bundle: the folder.
        contract: of the FP32 graph.
        engines: those inside, best first.
        excluded: requested engines that are not inside, with the reason.
        verdicts: by candidate or graph name, of what ran here.
        benches: latencies, one result per device; empty when no engine can run here.
        seconds: wall time by stage.
        exit_code: 0, or the code of the first engine that was excluded and is not optional.
    """

    bundle: Path
    contract: ModelContract
    engines: "tuple[BundleEngine, ...]"
    excluded: "tuple[Excluded, ...]"
    verdicts: "Mapping[str, VerifyResult]"
    benches: "tuple[BenchResult, ...]"
    seconds: dict[str, float]
    exit_code: int

    def name_of(self, entry: "BundleEngine | Excluded") -> str:
        """Return the name of an engine in tables: `Candidate.name`."""
        all_entries: list[BundleEngine | Excluded] = [*self.engines, *self.excluded]
        same = sum((other.engine, other.precision) == (entry.engine, entry.precision) for other in all_entries)
        return f"{entry.engine} {entry.precision}" + (f" on {entry.device}" if same > 1 else "")


@dataclass
class Work:
    """What the stages share: the options, the folder they write into, and what has happened so far."""

    options: DeployOptions
    folder: Path
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    excluded: "list[tuple[Excluded, str, int]]" = field(default_factory=list)
    sensitivity: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    searches: list[dict[str, Any]] = field(default_factory=list)
    compression: Mapping[str, Any] | None = None

    @property
    def original(self) -> Path:
        """The exported graph."""
        return self.folder / (FP32_ONNX if self.compression is None else ORIGINAL_ONNX)

    @contextmanager
    def stage(self, name: str) -> Iterator[list[str]]:
        """Time a stage, and print one line about it when it is done; the block appends what the line reports."""
        reported: list[str] = []
        start = time.perf_counter()
        yield reported
        self.seconds[name] = round(time.perf_counter() - start, 2)
        self.notes[name] = "; ".join(reported)
        self.progress.note(f"{name:<10}{self.seconds[name]:7.1f} s  {self.notes[name]}")

    @property
    def exit_code(self) -> int:
        """0, or the code of the first engine that was excluded and is not optional."""
        return next((code for entry, _, code in self.excluded if entry.precision not in OPTIONAL), 0)

    def exclude(self, candidate: Candidate, stage: str, reason: str, exit_code: int) -> None:
        """Record an engine that does not become part of the bundle."""
        from srdeploy.runtime.bundle import Excluded

        left = Excluded(candidate.engine, candidate.precision, stage, reason, candidate.device)
        self.excluded.append((left, candidate.name, exit_code))
        self.progress.note(f"excluded: {candidate.name} ({stage}): {reason}")
