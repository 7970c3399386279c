"""Find the files to open for a path: an engine, an ONNX file, or the engines of a bundle, best first."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from srdeploy.core.errors import InputError
from srdeploy.core.manifest import manifest_path
from srdeploy.core.precision import Precision


@dataclass(frozen=True)
class ModelFiles:
    """What to open.

    Attributes:
        path: the engine or ONNX file.
        engine: the engine family; None for that of the sidecar, or ONNX Runtime for an ONNX file.
        fallback: FP32 ONNX file for tiles that the engine fails on; None if there is none.
    """

    path: Path
    engine: str | None
    fallback: Path | None


def find_models(
    path: Path, *, engine: str | None, precision: Precision | None, device: str, fallback: Path | None
) -> Iterator[ModelFiles]:
    """Find what can be opened for a path, best first; arguments as for `Upscaler.open`.

    The bytes of a bundle's engine are checked when its turn comes.

    Raises:
        InputError: the path does not exist, or is not one of these.
        UsageError, CapabilityError: the bundle has no such engine that runs here.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist", expected="an engine, an ONNX file or a bundle")
    if path.is_dir():
        yield from _from_bundle(path, engine, precision, device, fallback)
        return
    if path.suffix != ".onnx" and not manifest_path(path).exists():
        raise InputError(
            f"{path} is not an ONNX file, and there is no readable manifest {manifest_path(path).name} next to it",
            expected="an engine, an ONNX file or a bundle",
            next_step=f"if it is a checkpoint: srdeploy export {path} -o model.onnx",
        )
    yield ModelFiles(path, engine, fallback)


def _from_bundle(
    folder: Path, engine: str | None, precision: Precision | None, device: str, fallback: Path | None
) -> Iterator[ModelFiles]:
    from srdeploy.runtime.bundle import read_bundle, runnable_engines

    bundle = read_bundle(folder)
    if fallback is None and "model.fp32.onnx" in bundle.files:
        fallback = bundle.onnx(Precision.FP32)
    for chosen in runnable_engines(bundle, engine=engine, precision=precision, device=device):
        yield ModelFiles(bundle.file(chosen.file), chosen.engine, fallback)
