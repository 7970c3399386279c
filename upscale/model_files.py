"""Find the files to open for a path: an engine, an ONNX file, or the best engine of a bundle."""

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


def find_model(
    path: Path, *, engine: str | None, precision: Precision | None, device: str, fallback: Path | None
) -> ModelFiles:
    """Find the files for a path; arguments as for `Upscaler.open`.

    Raises:
        InputError: the path does not exist, or is not one of these.
        UsageError, CapabilityError: the bundle has no such engine that runs here.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist", expected="an engine, an ONNX file or a bundle")
    if path.is_dir():
        return _from_bundle(path, engine, precision, device, fallback)
    if path.suffix != ".onnx" and not manifest_path(path).exists():
        raise InputError(
            f"{path} is not an ONNX file, and there is no readable manifest {manifest_path(path).name} next to it",
            expected="an engine, an ONNX file or a bundle",
            next_step=f"if it is a checkpoint: srdeploy export {path} -o model.onnx",
        )
    return ModelFiles(path, engine, fallback)


def _from_bundle(
    folder: Path, engine: str | None, precision: Precision | None, device: str, fallback: Path | None
) -> ModelFiles:
    from srdeploy.runtime.bundle import choose_engine, read_bundle

    bundle = read_bundle(folder)
    if fallback is None and "model.fp32.onnx" in bundle.files:
        fallback = bundle.onnx(Precision.FP32)
    chosen = choose_engine(bundle, engine=engine, precision=precision, device=device)
    return ModelFiles(bundle.file(chosen.file), chosen.engine, fallback)
