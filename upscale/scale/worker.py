"""What runs on each worker of a cluster: one opened engine, and the pictures or video segments that it is given.

Nothing here knows about Ray. Errors that a user can cause are returned, not raised: exceptions with arguments of their
own do not survive the way between processes.
"""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from srdeploy.core import errors
from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import package_versions
from srdeploy.core.errors import CapabilityError, SrdeployError
from srdeploy.core.precision import Precision
from srdeploy.upscale.budget import TileSettings
from srdeploy.upscale.folders import FolderReport, folder_key, upscale_targets
from srdeploy.upscale.scale.folder_journal import FolderJournal, RunFacts
from srdeploy.upscale.scale.model_package import find_copy, unpack_model
from srdeploy.upscale.scale.segments import SegmentOutcome, VideoJob, upscale_segment
from srdeploy.upscale.scale.targets import Target
from srdeploy.upscale.single_image import OutputOptions
from srdeploy.upscale.upscaler import AlphaMode, Upscaler

_COMPARED = (
    "srdeploy", "numpy", "pillow", "av", "pyvips", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt",
    "tensorrt-rtx",
)  # fmt: skip
"""Packages whose versions can change a result."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class RemoteError:
    """An error of `srdeploy.core.errors` as it travels: the name of its class, and its line."""

    kind: str
    line: str

    @classmethod
    def of(cls, error: SrdeployError) -> "RemoteError":
        """Describe an error."""
        return cls(type(error).__name__, str(error))

    def error(self, where: str = "") -> SrdeployError:
        """Return the error again; a class that takes other arguments comes back as the one that it derives from."""
        kind = getattr(errors, self.kind, CapabilityError)
        if kind in (errors.MissingExtraError, errors.GpuMemoryError):
            kind = CapabilityError
        made: SrdeployError = kind(f"{where}: {self.line}" if where else self.line)
        return made


@dataclass(frozen=True)
class WorkerOptions:
    """How a worker opens the network.

    Attributes:
        model: absolute path of the model where the driver runs.
        model_sha256: see `srdeploy.upscale.scale.model_package`.
        visible: folders that the worker must see.
        others: as for `Upscaler.open`.
    """

    model: Path
    model_sha256: str
    visible: tuple[Path, ...] = ()
    settings: TileSettings = field(default_factory=TileSettings)
    engine: str | None = None
    precision: Precision | None = None
    device: str = "cpu"
    threads: int | None = None
    fallback: Path | None = None
    alpha: AlphaMode = "spread"


@dataclass(frozen=True)
class Opened:
    """A worker that is ready: where it runs, and what the network is there."""

    host: str
    identity: str
    name: str
    device: str
    numeric_mode: str
    contract: ModelContract
    versions: dict[str, str]
    engine_versions: dict[str, str]


@dataclass(frozen=True)
class FolderJob:
    """A folder of pictures; `run` lacks what only the worker knows."""

    source: Path
    output: Path
    options: OutputOptions
    run: RunFacts


@dataclass(frozen=True)
class ChunkOutcome:
    """Result of a chunk: as in `FolderReport`, the failures as they travel."""

    report: FolderReport
    failed: dict[str, RemoteError]
    seconds: float


class Worker:
    """One engine. The methods are called one at a time."""

    def __init__(self, options: WorkerOptions) -> None:
        self._options = options
        self._up: Upscaler | None = None
        self._journal: FolderJournal | None = None

    def open(self, package: bytes | None = None) -> Opened | RemoteError | None:
        """Open the engine once.

        Args:
            package: the packed model, if an earlier call returned None.

        Returns:
            What was opened; None if this machine does not have the model.
        """

        def opened() -> Opened | None:
            for folder in self._options.visible:
                if not folder.exists():
                    raise CapabilityError(
                        f"{folder} does not exist on {platform.node()}",
                        expected="input and output folders that all machines of the cluster share",
                    )
            up = self._opened(package)
            return None if up is None else _facts(up)

        return _answer(opened)

    def run_chunk(self, job: FolderJob, targets: tuple[Target, ...], attempt: int) -> ChunkOutcome | RemoteError:
        """Upscale pictures; a failed one does not stop the rest.

        Returns:
            What was made; an error that ends the whole run, such as a full disk.
        """

        def run() -> ChunkOutcome:
            up = self._network()
            if self._journal is None:
                run = replace(job.run, key=folder_key(up.identity, job.options), device=up.info.device)
                self._journal = FolderJournal(job.output, run)
            elif attempt > 1:
                self._journal.refresh()  # what the worker that died had finished
            report = FolderReport()
            started = time.monotonic()
            upscale_targets([up], job.source, targets, job.options, self._journal, report, _ignore)
            failed = {name: RemoteError.of(error) for name, error in report.failed.items()}
            report.failed.clear()
            return ChunkOutcome(report, failed, time.monotonic() - started)

        return _answer(run)

    def run_segment(self, job: VideoJob, number: int, path: Path) -> SegmentOutcome | RemoteError:
        """Upscale one segment of a video into a file.

        Returns:
            What was made; an error that ends the whole run.
        """

        def run() -> SegmentOutcome:
            return upscale_segment(self._network(), job, number, path)

        return _answer(run)

    def _network(self) -> Upscaler:
        """Return the network, which a worker that was started again has to open first."""
        up = self._opened(None)
        if up is None:
            raise CapabilityError(f"{platform.node()} does not have the model any more")
        return up

    def _opened(self, package: bytes | None) -> Upscaler | None:
        options = self._options
        if self._up is None:
            model = find_copy(options.model, options.model_sha256)
            if model is None and package is not None:
                model = unpack_model(package, options.model, options.model_sha256)
            if model is None:
                return None
            self._up = Upscaler.open(
                model,
                options.settings,
                engine=options.engine,
                precision=options.precision,
                device=options.device,
                threads=options.threads,
                fallback=options.fallback,
                alpha=options.alpha,
            )
        return self._up


def compared_versions() -> dict[str, str]:
    """Return the versions, here, of the packages that must agree between machines."""
    return {"python": platform.python_version(), **package_versions(_COMPARED)}


def _facts(up: Upscaler) -> Opened:
    info = up.info
    return Opened(
        host=platform.node(),
        identity=up.identity,
        name=info.name,
        device=info.device,
        numeric_mode=info.numeric_mode,
        contract=up.contract,
        versions=compared_versions(),
        engine_versions=dict(info.versions),
    )


def _answer(function: Callable[[], Value]) -> Value | RemoteError:
    try:
        return function()
    except SrdeployError as error:
        return RemoteError.of(error)


def _ignore(amount: float = 1, note: str | None = None) -> None:
    pass
