"""ncnn on the CPU: the small engine of phones and of programs such as Upscayl, built through pnnx.

The built engine is a zip file of ncnn's own two files, model.ncnn.param and model.ncnn.bin, for an app to unpack.
Weights stay FP32, as the graph has them: pnnx by default stores them in FP16, which costs tens of decibels.
"""

import importlib.util
import io
import subprocess
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.environment import cpu_count, package_versions
from srdeploy.core.errors import BuildError, UsageError
from srdeploy.core.extras import import_extra, is_installed
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.precision import Precision
from srdeploy.core.progress import Progress
from srdeploy.core.runner import RunnerInfo
from srdeploy.core.shapes import TensorSpec, format_shape
from srdeploy.runtime.engines.feeds import check_feeds
from srdeploy.runtime.engines.gpu import Gpu
from srdeploy.runtime.engines.options import CPU_REFUSED_OPTIONS, BuildOptions, BuiltEngine
from srdeploy.runtime.engines.sidecar import Engine

FAMILY = "ncnn"
REFUSED_OPTIONS = CPU_REFUSED_OPTIONS
PARAM, BIN = "model.ncnn.param", "model.ncnn.bin"
_SIDES = ((32, 48), (40, 64))
"""pnnx is given two sizes, so that it leaves height and width free."""
_EPOCH = (1980, 1, 1, 0, 0, 0)


def why_not_build() -> str | None:
    """Return the reason why no engine can be built here; None if one can."""
    _pnnx()
    return why_not_run()


def why_not_run(device: str = "auto") -> str | None:
    """Return the reason why nothing can run here; None if it can. The CPU is the only device."""
    import_extra("ncnn", "ncnn")
    return None


def precisions(found: Gpu | None) -> tuple[Precision, ...]:
    """Return the precisions that are worth building."""
    return (Precision.FP32,)


def key_parts(options: BuildOptions) -> dict[str, Any]:
    """Return what decides the engine's bytes besides graph and options."""
    return {"versions": versions()}


def build(graph: GraphFile, options: BuildOptions, progress: Progress) -> BuiltEngine:
    """Convert a graph with pnnx.

    Raises:
        BuildError: the graph is not FP32 in float32, or has an operator that ncnn lacks.
    """
    contract = graph.contract
    if contract.precision is not Precision.FP32 or contract.form.io != "float32":
        raise BuildError(
            f"{graph.path} is {contract.precision.value.upper()} with {contract.form.io} images",
            expected="an FP32 graph with float32 images, which ncnn is built from",
        )
    program = _pnnx()
    with tempfile.TemporaryDirectory(prefix="srdeploy-ncnn-") as name, progress.task("converting with pnnx"):
        folder = Path(name)
        (folder / "model.onnx").write_bytes(graph.serialized())
        shapes = [contract.form.shape] if contract.form.shape else [(1, contract.channels, *side) for side in _SIDES]
        sizes = [
            f"inputshape{'' if turn == 0 else turn + 1}=[{','.join(map(str, shape))}]f32"
            for turn, shape in enumerate(shapes)
        ]
        done = subprocess.run(
            [program, "model.onnx", *sizes, "fp16=0"], cwd=folder, capture_output=True, text=True, check=False
        )
        files = {entry: folder / entry for entry in (PARAM, BIN)}
        if done.returncode or not all(path.exists() for path in files.values()):
            last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no output"]
            raise BuildError(f"pnnx cannot convert {graph.path}: {last[0]}")
        data = _packed({entry: path.read_bytes() for entry, path in files.items()})
    layers = Counter(line.split()[0] for line in _unpacked(data)[0].splitlines()[2:])
    if _net(data, 1) is None:
        raise BuildError(f"ncnn lacks an operator of {graph.path}; its layers are {', '.join(sorted(layers))}")
    convolutions = sum(count for kind, count in layers.items() if "onvolution" in kind)
    built = {"read_from": "ncnn's param file", "convolutions": {"fp32": convolutions}, "operations": dict(layers)}
    return BuiltEngine(data=data, precision_built="fp32", built=built, versions=versions(), target={"processor": "any"})


def open_built(engine: Engine, *, threads: int | None, parity: bool, outputs: Sequence[str] | None) -> "NcnnRunner":
    """Open a built engine.

    Raises:
        UsageError: inner tensors were requested.
    """
    if outputs is not None:
        raise UsageError("a built engine has no inner tensors to return", next_step="open the ONNX file for that")
    import_extra("ncnn", "ncnn")
    return NcnnRunner(engine, threads or cpu_count())


class NcnnRunner:
    """Runs an ncnn network, image by image; safe to call from several threads."""

    def __init__(self, engine: Engine, threads: int) -> None:
        contract = engine.contract
        self._net: Any = _net(engine.data, threads)
        assert self._net is not None, "the build opened it"
        n, c, h, w = contract.form.shape or (-1, contract.channels, -1, -1)
        self._inputs = (TensorSpec(INPUT, "float32", (n, c, h, w)),)
        self._info = RunnerInfo(
            name=f"{FAMILY} {contract.precision.value}",
            engine=FAMILY,
            device="cpu",
            contract=contract,
            numeric_mode="FP32",
            threads=threads,
            profiles=contract.profiles,
            versions=versions(),
            built=engine.built,
        )

    @property
    def info(self) -> RunnerInfo:
        """What is behind this runner."""
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute the outputs from the named inputs (see `srdeploy.core.runner.Runner`)."""
        check_feeds(feeds, self._inputs, engine=self._info.name)
        return {OUTPUT: np.stack([self._image(image) for image in feeds[INPUT]])}

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Return a function that computes once, in milliseconds (see `TimedRunner`)."""
        images = np.ascontiguousarray(feeds[INPUT])

        def compute() -> float:
            started = time.perf_counter()
            for image in images:
                self._image(image)
            return (time.perf_counter() - started) * 1000

        return compute

    def _image(self, image: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute one image, (C, H, W) to (C, H', W')."""
        mat = import_extra("ncnn", "ncnn").Mat
        extractor = self._net.create_extractor()
        extractor.input("in0", mat(np.ascontiguousarray(image)))
        failed, output = extractor.extract("out0")
        if failed:
            raise BuildError(f"ncnn failed at {format_shape(image.shape)} (code {failed})")
        return np.array(output, np.float32)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._net = None


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return package_versions(["ncnn", "pnnx"])


def _pnnx() -> Path:
    """Return the converter's program; importing its package would import all of PyTorch.

    Raises:
        MissingExtraError: pnnx is not installed.
    """
    found = importlib.util.find_spec("pnnx") if is_installed("pnnx") else None
    if found is None or found.origin is None:
        import_extra("pnnx", "ncnn")
        raise AssertionError
    return Path(found.origin).with_name("pnnx")


def _net(data: bytes, threads: int) -> Any | None:
    """Return a network that computes in FP32; None if ncnn lacks one of its layers."""
    net = import_extra("ncnn", "ncnn").Net()
    net.opt.num_threads = threads
    for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_packed", "use_bf16_storage"):
        setattr(net.opt, name, False)
    param, weights = _unpacked(data)
    with tempfile.TemporaryDirectory(prefix="srdeploy-ncnn-") as name:
        (Path(name) / PARAM).write_text(param)
        (Path(name) / BIN).write_bytes(weights)
        if net.load_param(str(Path(name) / PARAM)) or net.load_model(str(Path(name) / BIN)):
            return None
    return net


def _packed(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content)  # equal files give equal engines
    return buffer.getvalue()


def _unpacked(data: bytes) -> tuple[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(PARAM).decode(), archive.read(BIN)
