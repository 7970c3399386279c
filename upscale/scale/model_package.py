"""Bring a model to a machine that does not see its path: packed once, unpacked once per machine."""

import io
import platform
import tarfile
from pathlib import Path

from srdeploy.core.artifact import atomic_folder, sha256_of_file
from srdeploy.core.environment import cache_folder
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.manifest import manifest_path
from srdeploy.runtime.bundle import MANIFEST, is_bundle, read_bundle


def model_sha256(model: Path) -> str:
    """Return what identifies a model: the SHA-256 of a bundle's manifest, which lists those of all its files, or that
    of an engine or ONNX file.

    Raises:
        InputError: the model does not exist.
    """
    try:
        return sha256_of_file(model / MANIFEST if model.is_dir() else model)
    except OSError as error:
        raise InputError(
            f"cannot read {model}: {(error.strerror or str(error)).lower()}",
            expected="an engine, an ONNX file or a bundle",
        ) from error


def check_model(model: Path) -> None:
    """Check every file of a bundle before it is sent anywhere.

    Raises:
        InputError: a file was edited, is missing or is not listed.
    """
    if is_bundle(model):
        read_bundle(model).verify()


def pack_model(model: Path) -> bytes:
    """Return a model with the files that belong to it as a tar archive."""
    beside = [manifest_path(model), model.with_name(model.name + ".data")]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in [model, *(path for path in beside if not model.is_dir() and path.exists())]:
            archive.add(path, arcname=path.name)
    return buffer.getvalue()


def find_copy(model: Path, sha256: str) -> Path | None:
    """Return where a model is on this machine: at its own path, else in the cache; None if it is in neither."""
    for path in (model, _cached(model, sha256)):
        if path.exists() and (not path.is_dir() or is_bundle(path)) and model_sha256(path) == sha256:
            return path
    return None


def unpack_model(package: bytes, model: Path, sha256: str) -> Path:
    """Unpack a packed model into this machine's cache, unless another process just did.

    Raises:
        InputError: the archive holds another model.
        OutputError: the cache cannot be written.
    """
    folder = _cached(model, sha256).parent
    try:
        with atomic_folder(folder) as temporary, tarfile.open(fileobj=io.BytesIO(package)) as archive:
            archive.extractall(temporary, filter="data")
    except UsageError:
        if not folder.is_dir():
            raise
    found = find_copy(model, sha256)
    if found is None:
        raise InputError(
            f"the copy of {model} in {folder} on {platform.node()} is another model",
            next_step=f"remove {folder} there and run again",
        )
    return found


def _cached(model: Path, sha256: str) -> Path:
    return cache_folder() / "models" / sha256 / model.name
