"""A bundle: one folder NAME.srd with a network as ONNX files, its engines, and the report about them.

    manifest.json                     this module's: SHA-256 of every other file, the contract, the engines in order
    model.fp32.onnx, model.fp16.onnx, model.int8.<target>.onnx   each with its manifest next to it
    calibration/                      set.json (files, hashes, crop recipe) and ranges.json
    engines/                          one file per engine with its sidecar
    report/                           report.json, report.html
    reproduce.sh                      the commands that make the bundle again
    README.md                         a model card; its license is for the owner of the weights to add
    model.sig                         a signature, if the bundle was signed

Engines are code, so a file is opened only if its SHA-256 is the manifest's. Engines that missed their gate are not in
the bundle; the manifest lists them under `excluded` with the reason.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from srdeploy.core.artifact import sha256_of_bytes, sha256_of_file
from srdeploy.core.contract import PREFIX, ModelContract
from srdeploy.core.errors import CapabilityError, InputError
from srdeploy.core.manifest import Manifest, Source, check_sha256
from srdeploy.core.precision import Precision
from srdeploy.runtime.signature import SIGNATURE

MANIFEST = "manifest.json"
CARD = "README.md"
"""The one listed file that may be edited: nothing reads it, and its license is for its reader to add."""
SUFFIX = ".srd"


@dataclass(frozen=True)
class BundleEngine:
    """One engine of a bundle, with the numbers measured when the bundle was made.

    Attributes:
        file: path inside the bundle, with forward slashes.
        engine: engine family, for example "openvino".
        precision: what the heavy layers compute in.
        verified: whether it ran on the machine that made the bundle and passed its gate there. An engine that could be
            built but not run there (a TensorRT plan without a GPU) is not verified.
        fidelity_db: PSNR between its output and the eager FP32 network's; None when not verified, inf when equal.
        latency_ms: median on the machine that made the bundle; None when it did not run there.
        speedup: eager FP32 latency divided by this one's; None likewise.
        device: "cpu" or "cuda:N" that it was built for and measured on; None in bundles of earlier versions.
    """

    file: str
    engine: str
    precision: Precision
    verified: bool
    fidelity_db: float | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    device: str | None = None

    @property
    def on_cpu(self) -> bool:
        """Return True if the engine runs on the CPU."""
        from srdeploy.runtime.engines.registry import CPU_FAMILIES

        return self.engine in CPU_FAMILIES


@dataclass(frozen=True)
class Excluded:
    """A requested engine that is not in the bundle, and why."""

    engine: str
    precision: Precision
    stage: str
    reason: str
    device: str | None = None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its manifest. Call `file` for a path whose bytes were checked."""

    path: Path
    manifest: Manifest
    contract: ModelContract
    engines: tuple[BundleEngine, ...]
    excluded: tuple[Excluded, ...]

    @property
    def files(self) -> Mapping[str, str]:
        """SHA-256 of every file by its path inside the bundle."""
        files: Mapping[str, str] = self.manifest.details["files"]
        return files

    def file(self, name: str) -> Path:
        """Return the path of a file, after checking its bytes and those of its sidecar and external data.

        Raises:
            InputError: the bundle does not list it, or its bytes are others.
        """
        if name not in self.files:
            raise InputError(f"bundle {self.path} holds no {name}", expected=f"one of {', '.join(sorted(self.files))}")
        for entry in (name, name + ".json", name + ".data"):  # .data: weights beyond the 2 GB of an ONNX file
            if entry in self.files:
                self._check(entry)
        return self.path / name

    def onnx(self, precision: Precision = Precision.FP32) -> Path:
        """Return the checked path of the ONNX file of a precision that has only one (FP32, FP16)."""
        return self.file(f"model.{precision}.onnx")

    def verify(self) -> None:
        """Check every file, but not the text of the card.

        A signature, and hidden entries at the top (`.gitattributes`, `.cache` of a hub's download), are not listed.

        Raises:
            InputError: a file is missing, has other bytes, or is not listed.
        """
        for name in self.files:
            if name != CARD:
                self._check(name)
        found = {name for name in files_below(self.path) if not name.startswith(".")}
        unlisted_files = sorted(found - set(self.files) - {MANIFEST, CARD, SIGNATURE})
        if unlisted_files:
            raise InputError(
                f"bundle {self.path} holds {unlisted_files[0]}, which its manifest does not list",
                next_step="remove it, or deploy again",
            )

    def _check(self, name: str) -> None:
        path = self.path / name
        try:
            actual = sha256_of_file(path)
        except OSError as error:
            raise InputError(f"bundle {self.path} lacks {name}", next_step="copy the whole folder again") from error
        check_sha256(path, actual, self.files[name], stated_by="the bundle's manifest")


def is_bundle(path: Path) -> bool:
    """Return True if a path looks like a bundle: a folder with a manifest in it."""
    return path.is_dir() and (path / MANIFEST).is_file()


def write_bundle_manifest(
    folder: Path,
    *,
    contract: ModelContract,
    checkpoint: Source,
    engines: Sequence[BundleEngine],
    excluded: Sequence[Excluded] = (),
    details: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Manifest:
    """Hash every file of a finished folder and write its manifest.

    Args:
        folder: the bundle, complete but for its manifest.
        contract: of the FP32 graph.
        checkpoint: the file it all came from.
        engines: those in the folder, best first: the order in which `choose_engine` considers them.
        excluded: requested engines that are not in the folder.
        details: further entries, as JSON values.
        versions: of the packages that were used.
    """
    files = {name: sha256_of_file(folder / name) for name in files_below(folder) if name != MANIFEST}
    manifest = Manifest(
        kind="bundle",
        sha256=tree_hash(files),
        sources=(checkpoint,),
        details={
            **(details or {}),
            "files": files,
            "contract": {name.removeprefix(PREFIX): text for name, text in contract.to_metadata().items()},
            "engines": [_engine_to_json(engine) for engine in engines],
            "excluded": [asdict(entry) for entry in excluded],
        },
        versions=versions or {},
    )
    (folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def read_bundle(path: Path) -> Bundle:
    """Read a bundle's manifest; the files are checked on access, or all of them by `Bundle.verify`.

    Raises:
        InputError: the folder is no bundle, or its manifest is unreadable or inconsistent.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} is not a bundle: it has no readable {MANIFEST}",
            next_step="make one with: srdeploy deploy CHECKPOINT --images DIR -o NAME.srd",
        ) from error
    manifest = Manifest.from_json(text, name=str(path / MANIFEST))
    try:
        files = manifest.details["files"]
        metadata = {PREFIX + name: value for name, value in manifest.details["contract"].items()}
        engines = tuple(_engine_from_json(entry) for entry in manifest.details["engines"])
        excluded = tuple(
            Excluded(**{**entry, "precision": Precision(entry["precision"])}) for entry in manifest.details["excluded"]
        )
        consistent = manifest.kind == "bundle" and manifest.sha256 == tree_hash(files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path / MANIFEST} is not a bundle's manifest ({error!r})") from error
    escaping = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    unlisted = [engine.file for engine in engines if engine.file not in files]
    if not consistent or escaping or unlisted:
        raise InputError(
            f"{path / MANIFEST} does not fit together: {', '.join(escaping + unlisted) or 'its file list was edited'}",
            next_step="copy the whole folder again, or deploy again",
        )
    contract = ModelContract.from_metadata(metadata, name=str(path / MANIFEST))
    return Bundle(path, manifest, contract, engines, excluded)


def choose_engine(
    bundle: Bundle,
    *,
    engine: str | None = None,
    precision: Precision | None = None,
    device: str = "auto",
    obstacles: Mapping[str, str | None] | None = None,
) -> BundleEngine:
    """Return the best engine of a bundle that can run here: the first of `runnable_engines`."""
    return runnable_engines(bundle, engine=engine, precision=precision, device=device, obstacles=obstacles)[0]


def runnable_engines(
    bundle: Bundle,
    *,
    engine: str | None = None,
    precision: Precision | None = None,
    device: str = "auto",
    obstacles: Mapping[str, str | None] | None = None,
) -> tuple[BundleEngine, ...]:
    """Return the engines of a bundle whose family can run here, best first, at least one.

    The order is the manifest's: engines that could not run where the bundle was made come first, since they were built
    for a faster machine, then the others, the fastest first. So a bundle made without a GPU uses its GPU engine on a
    machine that has one. Engines that were measured on `device` come before others of their kind. An engine may still
    refuse to open, when it was built with another release.

    Args:
        bundle: the bundle.
        engine: take only this engine family.
        precision: take only this precision.
        device: "auto", "cpu", "cuda" or "cuda:N": take only engines for it.
        obstacles: by engine family, why it cannot run here, None if it can; default: determined on this machine.

    Raises:
        CapabilityError: none fits; each is named with its reason.
    """
    requested = [
        entry
        for entry in bundle.engines
        if (engine is None or entry.engine == engine)
        and (precision is None or entry.precision == precision)
        and (device == "auto" or entry.on_cpu == (device == "cpu"))
    ]
    if not requested:
        held = ", ".join(f"{entry.engine} {entry.precision}" for entry in bundle.engines) or "none"
        raise CapabilityError(f"bundle {bundle.path} holds no such engine", expected=f"one of its own: {held}")
    known = machine_obstacles() if obstacles is None else obstacles
    able = [entry for entry in requested if known.get(entry.engine, "unknown engine") is None]
    if not able:
        reasons = {entry.engine: known.get(entry.engine, "unknown engine") for entry in requested}
        raise CapabilityError(
            f"no engine of bundle {bundle.path} can run here: "
            + ", ".join(f"{name} ({reason})" for name, reason in reasons.items()),
            next_step="to see what this machine lacks: srdeploy doctor",
        )
    on_device = "cuda:0" if device in ("auto", "cuda") else device
    return tuple(sorted(able, key=lambda entry: entry.device not in (None, "cpu", on_device)))  # sorted is stable


def machine_obstacles() -> dict[str, str | None]:
    """Return by engine family why it cannot run on this machine, None if it can."""
    from srdeploy.runtime.engines.registry import availability

    return {entry.name: entry.why_not_run for entry in availability()}


def _engine_to_json(engine: BundleEngine) -> dict[str, Any]:
    # JSON has no infinity; identical engines have an infinite fidelity.
    data = asdict(engine)
    if engine.fidelity_db == float("inf"):
        data["fidelity_db"] = "inf"
    return data


def _engine_from_json(data: Mapping[str, Any]) -> BundleEngine:
    fidelity = data["fidelity_db"]
    return BundleEngine(
        **{
            **data,
            "precision": Precision(data["precision"]),
            "fidelity_db": None if fidelity is None else float(fidelity),
        }
    )


def files_below(folder: Path) -> Iterable[str]:
    """Return the files below a folder, sorted, as paths relative to it with forward slashes."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def tree_hash(files: Mapping[str, str]) -> str:
    """Return one hash for the SHA-256 of files by their paths."""
    return sha256_of_bytes(json.dumps(dict(sorted(files.items()))).encode())
