"""One strongly typed build for TensorRT 10.12 to 11 and TensorRT-RTX: ONNX in, proven engine bytes out.

What can be known beforehand is checked first. The build itself runs in a process of its own
(`srdeploy.runtime.engines.tensorrt.worker`); afterwards its layer table is held against the graph.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from srdeploy.core.errors import BuildError, OutputError, SrdeployError, UsageError
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.progress import Advance, Progress
from srdeploy.core.shapes import ShapeProfile, format_shape
from srdeploy.core.sizes import format_bytes
from srdeploy.runtime.engines.cache import default_root
from srdeploy.runtime.engines.concatenation import concatenations_chained
from srdeploy.runtime.engines.feasibility import check_feasible, footprint, largest_legal_shape
from srdeploy.runtime.engines.options import BuildOptions, BuiltEngine
from srdeploy.runtime.engines.tensorrt import worker
from srdeploy.runtime.engines.tensorrt.families import Flavour, gpu
from srdeploy.runtime.engines.tensorrt.layers import Layers, layers_from_inspector, layers_from_log, prove_precision
from srdeploy.runtime.engines.tensorrt.log import read_log


def build_plan(flavour: Flavour, graph: GraphFile, options: BuildOptions, progress: Progress) -> BuiltEngine:
    """Build an engine and prove the precision of its convolutions.

    Raises:
        UsageError: no profile, a profile that does not fit the graph, or shapes beyond what can exist.
        BuildError: TensorRT failed, or built a convolution in another type.
        CapabilityError: the flavour is not installed, or needs a GPU that is not there.
        KeyboardInterrupt: Ctrl-C; nothing is left behind.
    """
    trt = flavour.load()
    _check_profiles(graph, options.profiles)
    flavour.check(graph, options)
    cost = footprint(graph)
    memory = options.memory_bytes or _gpu_memory()
    check_feasible(cost, options.profiles, memory)
    legal = largest_legal_shape(cost, options.profiles[-1].max, memory)
    progress.note(f"largest legal shape of this kind: {format_shape(legal)}")
    model, chained = concatenations_chained(graph.model)
    chained_graph = GraphFile(model, path=graph.path, sha256=graph.sha256, contract=graph.contract)
    data, layers, seconds = _in_worker(flavour, trt.__version__, chained_graph, options, progress)
    precision = prove_precision(layers, graph)
    check_memory(layers, cost.weights_bytes, memory, options.profiles)
    built = {
        **layers.to_json(),
        "footprint": cost.to_json(),
        "largest_legal_shape": list(legal),
        "tf32": options.tf32,
        "concatenations_chained": chained,
        "build_seconds": round(seconds, 2),
    }
    return BuiltEngine(
        data=data,
        precision_built=precision,
        built=built,
        versions={**flavour.versions(), flavour.name: trt.__version__},
        target=flavour.target(options),
        notes=_notes(precision, options),
    )


def log_path(flavour: Flavour, graph: GraphFile, options: BuildOptions) -> Path:
    """Return where the builder's whole log goes."""
    name = f"{graph.path.stem}-{graph.sha256[:12]}-{flavour.name}.log"
    return options.log_path or default_root().parent / "logs" / name


def _check_profiles(graph: GraphFile, profiles: tuple[ShapeProfile, ...]) -> None:
    if not profiles:
        raise UsageError(
            "no shapes were given for the engine",
            expected="--min-shape, --opt-shape and --max-shape, or --profile-images FOLDER",
        )
    channels = graph.contract.channels
    for profile in profiles:
        if profile.min[1] != channels:
            raise UsageError(f"profile {profile} has {profile.min[1]} channels", expected=f"{channels}, as the graph")
        if min(profile.min[2:]) < graph.contract.min_size:
            raise UsageError(
                f"profile {profile} begins below the network's least size", expected=f"{graph.contract.min_size} pixels"
            )


def _in_worker(
    flavour: Flavour, version: str, graph: GraphFile, options: BuildOptions, progress: Progress
) -> tuple[bytes, Layers, float]:
    """Run the worker; return the plan, its kernels and the seconds it took."""
    request = {"sha256": graph.sha256, "path": str(graph.path), "options": worker.options_to_json(options)}
    kept = log_path(flavour, graph, options)
    with _work_folder() as folder:
        (folder / worker.GRAPH).write_bytes(graph.serialized())
        (folder / worker.REQUEST).write_text(json.dumps(request), encoding="utf-8")
        try:
            with progress.task(f"building with {flavour.title} {version}") as advance:
                seconds = _run(flavour, folder, advance)
        except SrdeployError as error:
            where = _keep_log(folder, kept)
            raise type(error)(
                error.found, expected=error.expected, next_step=f"{error.next_step or ''}{where}".strip() or None
            ) from error
        _keep_log(folder, kept)
        return (folder / worker.PLAN).read_bytes(), _layers(flavour, folder), seconds


def _run(flavour: Flavour, folder: Path, advance: Advance) -> float:
    # -P: a file of the current folder must not stand in for a module
    command = [sys.executable, "-P", "-m", "srdeploy.runtime.engines.tensorrt.launch", flavour.name, str(folder)]
    with (folder / "stderr").open("wb") as stderr:
        # A session of its own: Ctrl-C reaches this process alone, which then ends the worker.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True, text=True
        )
        last: dict[str, Any] = {}
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("{"):
                    continue
                last = json.loads(line)
                if "phase" in last:
                    advance(last["steps"], str(last["phase"]).lower())
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):
                        stream.close()
    if status == 0 and "seconds" in last:
        return float(last["seconds"])
    raise _worker_error(flavour, status, last, (folder / "stderr").read_text(encoding="utf-8", errors="replace"))


def _worker_error(flavour: Flavour, status: int, last: dict[str, Any], stderr: str) -> SrdeployError:
    """Turn how the worker ended into an error of ours."""
    if "error" in last:
        found, expected, step = last["error"]
        if last["code"] == OutputError.exit_code:
            return OutputError(found, expected=expected, next_step=step or "free some space there, or set TMPDIR")
        return BuildError(found, expected=expected, next_step=step)
    tail = " ".join(stderr.split())[-300:]
    if status == -9:
        return BuildError(
            f"{flavour.title} was killed while it built", next_step="most often the memory was full: close programs"
        )
    if status < 0:
        return BuildError(f"{flavour.title} crashed with signal {-status} while it built: {tail}")
    return BuildError(f"{flavour.title} ended unexpectedly (status {status}): {tail}")


def _layers(flavour: Flavour, folder: Path) -> Layers:
    log = read_log(folder / worker.LOG)
    from_log = layers_from_log(text for _, text in log.messages)
    if flavour.reads_layers_from_log:
        return from_log
    document = (folder / worker.LAYERS).read_text(encoding="utf-8")
    return layers_from_inspector(
        document, activation_bytes=from_log.activation_bytes, weights_bytes=from_log.weights_bytes
    )


@contextlib.contextmanager
def _work_folder() -> Iterator[Path]:
    try:
        with tempfile.TemporaryDirectory(prefix="srdeploy-build-", ignore_cleanup_errors=True) as name:
            yield Path(name)
    except OSError as error:
        raise OutputError(
            f"cannot write the work folder of the build in {tempfile.gettempdir()}: {error.strerror or error}",
            next_step="free some space there, or set TMPDIR",
        ) from error


def _keep_log(folder: Path, target: Path) -> str:
    """Copy the log to where it stays; it is a help, so a failure to write it is no failure of the build."""
    source = folder / worker.LOG
    if not source.exists():
        return ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError:
        return ""
    return f" (whole log: {target})"


def check_memory(layers: Layers, weights_bytes: int, memory: int | None, profiles: Sequence[ShapeProfile]) -> None:
    """Hold the memory that an engine states, which may be more than was estimated, against the GPU's.

    Raises:
        BuildError: it does not fit.
    """
    if memory is None or layers.activation_bytes is None:
        return
    needed = layers.activation_bytes + (layers.weights_bytes or weights_bytes)
    if needed > memory:
        raise BuildError(
            f"the engine needs {format_bytes(needed)} of GPU memory at {format_shape(profiles[-1].max)}",
            expected=f"at most {format_bytes(memory)}",
            next_step="build for a smaller --max-shape",
        )


def _notes(precision: str, options: BuildOptions) -> tuple[str, ...]:
    if options.tf32 and "fp32" in precision:
        return ("TF32 is on: FP32 convolutions are computed with 11 bits of mantissa",)
    return ()


def _gpu_memory() -> int | None:
    found = gpu()
    return found[2] if found else None
