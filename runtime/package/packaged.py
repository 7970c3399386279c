"""What every target of `srdeploy package` shares: a folder that is whole or absent, with a manifest of its files."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import atomic_folder, sha256_of_file
from srdeploy.core.environment import package_versions
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.manifest import Manifest, Source
from srdeploy.runtime.bundle import MANIFEST, Bundle, BundleEngine, files_below, tree_hash
from srdeploy.runtime.engines.registry import family
from srdeploy.runtime.engines.sidecar import read_engine

PACKAGE = "package.json"
"""The manifest of a folder that `package` wrote; `--force` replaces only folders that have one."""


@dataclass(frozen=True)
class Packaged:
    """The result of one target.

    Attributes:
        target: "triton", "ovms", ...
        path: the file or folder.
        contents: what is in it, one line each: models, or files.
        notes: what was not included and why, and what the consumer has to know.
    """

    target: str
    path: Path
    contents: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "target": self.target,
            "path": str(self.path),
            "contents": list(self.contents),
            "notes": list(self.notes),
        }


@contextmanager
def package_folder(bundle: Bundle, output: Path, *, target: str, force: bool) -> Iterator[Path]:
    """Yield a temporary folder; it replaces `output` when the block succeeds, with a manifest of what is in it.

    Raises:
        UsageError: the folder exists and `force` is false, or `package` did not write it.
        OutputError: the disk is full, or the parent folder cannot be written.
    """
    with atomic_folder(output, force=force, known_by=PACKAGE) as folder:
        yield folder
        files = {name: sha256_of_file(folder / name) for name in files_below(folder)}
        manifest = Manifest(
            kind="package",
            sha256=tree_hash(files),
            sources=(Source("bundle", bundle.path.name, bundle.manifest.sha256),),
            details={"target": target, "files": files},
            versions=package_versions(("srdeploy",)),
        )
        (folder / PACKAGE).write_text(manifest.to_json(), encoding="utf-8")


def package_name(bundle: Bundle, name: str | None) -> str:
    """Return the name of the models: the one given, or the bundle's without its suffix.

    Raises:
        UsageError: servers cannot take the name as part of an address.
    """
    chosen = name if name is not None else bundle.path.resolve().stem
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", chosen):
        raise UsageError(
            f"the name {chosen!r}",
            expected="letters, digits, '_', '-' and '.', with a letter or digit first",
            next_step="pass --name NAME",
        )
    return chosen


def portable_graph(bundle: Bundle, engine: BundleEngine) -> str:
    """Return the name of the ONNX file in a bundle that an engine was built from, or that it opens.

    Raises:
        InputError: the engine's sidecar names no ONNX file of the bundle.
    """
    if family(engine.engine).suffix is None:
        return engine.file
    sources = read_engine(bundle.file(engine.file)).manifest.sources
    name = next((source.name for source in sources if source.role == "onnx"), "")
    if name not in bundle.files:
        raise InputError(
            f"{engine.file} was built from {name or 'no ONNX file'}", expected="an ONNX file of the bundle"
        )
    return name


def copy_graph(bundle: Bundle, name: str, folder: Path) -> None:
    """Copy an ONNX file of a bundle as `model.onnx`, with its external weights, which keep the name it refers to."""
    shutil.copyfile(bundle.file(name), folder / "model.onnx")
    if name + ".data" in bundle.files:
        shutil.copyfile(bundle.path / (name + ".data"), folder / (name + ".data"))


def copy_bundle(bundle: Bundle, folder: Path) -> None:
    """Copy the files of a verified bundle that its manifest lists, and the manifest."""
    for name in (*bundle.files, MANIFEST):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, target)
