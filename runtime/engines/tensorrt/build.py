"""One strongly typed build for TensorRT 10.12 to 11 and TensorRT-RTX: from ONNX to engine bytes with proven types.

Shapes, options and memory are checked first. The build runs in a process of its own
(`srdeploy.runtime.engines.tensorrt.worker`); afterwards its layer table is compared with the graph.
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
from srdeploy.runtime.engines.feasibility import check_feasible, footprint, largest_legal_shape
from srdeploy.runtime.engines.gpu import find_gpu
from srdeploy.runtime.engines.options import BuildOptions, BuiltEngine
from srdeploy.runtime.engines.tensorrt import worker
from srdeploy.runtime.engines.tensorrt.layers import (
    Layers,
    Proof,
    layers_from_inspector,
    layers_from_log,
    prove_precision,
)
from srdeploy.runtime.engines.tensorrt.log import read_messages
from srdeploy.runtime.engines.tensorrt.products import Product
from srdeploy.runtime.engines.tensorrt.rewrites.rewrite import rewrite


def build_plan(product: Product, graph: GraphFile, options: BuildOptions, progress: Progress) -> BuiltEngine:
    """Build an engine and prove the types of its convolutions.

    Raises:
        UsageError: no profile, a profile that does not fit the graph, or shapes beyond the limits.
        BuildError: TensorRT failed, or built a convolution in another type.
        CapabilityError: the product is not installed, or needs a GPU and there is none.
        KeyboardInterrupt: Ctrl-C; nothing is left behind.
    """
    trt = product.load()
    _check_profiles(graph, options.profiles)
    product.check_build(graph, options)
    cost = footprint(graph)
    found = find_gpu(options.device)
    memory = options.memory_bytes or (found.memory_bytes if found else None)
    check_feasible(cost, options.profiles, memory)
    legal = largest_legal_shape(cost, options.profiles[-1].max, memory)
    progress.note(f"largest shape within the limits: {format_shape(legal)}")
    model, rewritten_nodes = rewrite(graph.model, ahead_of_time=product.builds_ahead_of_time)
    rewritten = GraphFile(model, path=graph.path, sha256=graph.sha256, contract=graph.contract)
    data, layers, seconds = _in_worker(product, trt.__version__, rewritten, options, progress)
    proof = prove_precision(layers, graph)
    check_memory(layers, cost.weights_bytes, memory, options.profiles)
    built = {
        **layers.to_json(),
        "footprint": cost.to_json(),
        "largest_legal_shape": list(legal),
        "tf32": options.tf32,
        **rewritten_nodes,
        "build_seconds": round(seconds, 2),
        "unproven": list(proof.unproven),
    }
    return BuiltEngine(
        data=data,
        precision_built=proof.built,
        built=built,
        versions={**product.versions(), product.name: trt.__version__},
        target=product.target(options),
        notes=_notes(proof, layers, options),
    )


def log_path(product: Product, graph: GraphFile, options: BuildOptions) -> Path:
    """Return the file for the builder's full log."""
    name = f"{graph.path.stem}-{graph.sha256[:12]}-{product.name}.log"
    return options.log_path or default_root().parent / "logs" / name


def _check_profiles(graph: GraphFile, profiles: tuple[ShapeProfile, ...]) -> None:
    if not profiles:
        raise UsageError(
            "the engine needs shapes",
            expected="--min-shape, --opt-shape and --max-shape, or --profile-images FOLDER",
        )
    channels, static = graph.contract.channels, graph.contract.profiles
    for profile in profiles:
        if static and profile not in static:
            raise UsageError(f"profile {profile} of a static graph", expected=f"{format_shape(static[0].max)} alone")
        if profile.min[1] != channels:
            raise UsageError(f"profile {profile} has {profile.min[1]} channels", expected=f"{channels}, as the graph")
        if min(profile.min[2:]) < graph.contract.min_size:
            raise UsageError(
                f"profile {profile} begins below the network's minimum size",
                expected=f"{graph.contract.min_size} pixels",
            )


def _in_worker(
    product: Product, version: str, graph: GraphFile, options: BuildOptions, progress: Progress
) -> tuple[bytes, Layers, float]:
    """Run the worker; return the plan, its kernels and the seconds it took."""
    request = {"sha256": graph.sha256, "path": str(graph.path), "options": worker.options_to_json(options)}
    kept = log_path(product, graph, options)
    with _work_folder() as folder:
        (folder / worker.GRAPH).write_bytes(graph.serialized())
        (folder / worker.REQUEST).write_text(json.dumps(request), encoding="utf-8")
        try:
            with progress.task(f"building with {product.title} {version}") as advance:
                seconds = _run(product, folder, advance)
        except SrdeployError as error:
            where = _keep_log(folder, kept)
            raise type(error)(
                error.found, expected=error.expected, next_step=f"{error.next_step or ''}{where}".strip() or None
            ) from error
        _keep_log(folder, kept)
        return (folder / worker.PLAN).read_bytes(), _layers(product, folder), seconds


def _run(product: Product, folder: Path, advance: Advance) -> float:
    # -P: files of the current folder must not shadow modules
    command = [sys.executable, "-P", "-m", "srdeploy.runtime.engines.tensorrt.worker", product.name, str(folder)]
    with (folder / "stderr").open("wb") as stderr:
        # A session of its own: Ctrl-C reaches only this process, which then ends the worker.
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
    raise _worker_error(product, status, last, (folder / "stderr").read_text(encoding="utf-8", errors="replace"))


def _worker_error(product: Product, status: int, last: dict[str, Any], stderr: str) -> SrdeployError:
    """Return the error for a worker that failed."""
    if "error" in last:
        found, expected, step = last["error"]
        if last["code"] == OutputError.exit_code:
            return OutputError(found, expected=expected, next_step=step or "free some space there, or set TMPDIR")
        return BuildError(found, expected=expected, next_step=step)
    tail = " ".join(stderr.split())[-300:]
    if status == -9:
        return BuildError(
            f"{product.title} was killed during the build",
            next_step="usually the machine's memory was full: close other programs",
        )
    if status < 0:
        return BuildError(f"{product.title} crashed with signal {-status} during the build: {tail}")
    return BuildError(f"{product.title} ended unexpectedly (status {status}): {tail}")


def _layers(product: Product, folder: Path) -> Layers:
    from_log = layers_from_log(text for _, text in read_messages(folder / worker.LOG))
    if product.reads_layers_from_log:
        return from_log
    documents = json.loads((folder / worker.LAYERS).read_text(encoding="utf-8"))
    return layers_from_inspector(
        documents, activation_bytes=from_log.activation_bytes, weights_bytes=from_log.weights_bytes
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
    """Copy the log to its final place. Best effort: never fails the build."""
    source = folder / worker.LOG
    if not source.exists():
        return ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    except OSError:
        return ""
    return f" (full log: {target})"


def check_memory(layers: Layers, weights_bytes: int, memory: int | None, profiles: Sequence[ShapeProfile]) -> None:
    """Compare the memory that an engine needs, which may exceed the estimate, with the GPU's.

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


def _notes(proof: Proof, layers: Layers, options: BuildOptions) -> tuple[str, ...]:
    notes = []
    if options.tf32 and "fp32" in proof.built:
        notes.append("TF32 is on: FP32 convolutions are computed with 11 bits of mantissa")
    if proof.unproven:
        notes.append(f"not proven: {layers.read_from} does not state the type of {len(proof.unproven)} convolutions")
    return tuple(notes)
