"""All engine families in one tuple, and what every verb does with them: build, open, and list what works here."""

import contextlib
import importlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from srdeploy.core.artifact import atomic_files
from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import int8_weights_overflow
from srdeploy.core.errors import CapabilityError, InputError, OutputError, SrdeployError, UsageError
from srdeploy.core.manifest import Manifest, manifest_path, read_manifest
from srdeploy.core.onnx_file import GraphFile, read_graph
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import Runner
from srdeploy.runtime.engines.cache import KEY_SCHEMA, EngineCache, Lookup
from srdeploy.runtime.engines.options import BuildOptions, BuildResult
from srdeploy.runtime.engines.sidecar import KIND, engine_manifest, read_engine

_HERE = "srdeploy.runtime.engines."


@dataclass(frozen=True)
class Family:
    """An engine family.

    A module, or an object in a module, implements the family and is imported on first use. The implementation has
    `key_parts(options)`, `build(graph, options, progress)` and `REFUSED_OPTIONS` if it builds, `open_onnx(graph, ...)`
    if it opens ONNX files as they are, `open_built(engine, ...)` if it opens its own engines, `precisions(gpu)` for
    what is worth building, and `why_not_build()`, `why_not_run(device)` and `versions()` for the doctor.

    Attributes:
        name: as users write it.
        place: the module, or "module:object".
        summary: one line.
        suffix: of its engine files; None if there is nothing to build.
        opens_onnx: whether it opens ONNX files.
    """

    name: str
    place: str
    summary: str
    suffix: str | None = None
    opens_onnx: bool = False

    def load(self) -> Any:
        """Import the implementation; it imports its heavy package only inside functions."""
        module, _, name = self.place.partition(":")
        found = importlib.import_module(_HERE + module)
        return getattr(found, name) if name else found


ENGINES: tuple[Family, ...] = (
    Family("onnxruntime", "onnxruntime_cpu", "ONNX Runtime on the CPU", ".ort.onnx", opens_onnx=True),
    Family("openvino", "openvino", "OpenVINO on the CPU", ".blob", opens_onnx=True),
    Family("ncnn", "ncnn", "ncnn on the CPU, for apps on phones", ".ncnn"),
    Family(
        "tensorrt-rtx", "tensorrt.families:RTX_FAMILY", "TensorRT-RTX on GeForce and RTX GPUs, built anywhere", ".rtx"
    ),
    Family("tensorrt", "tensorrt.families:FULL_FAMILY", "TensorRT 10.12 to 11 on NVIDIA GPUs", ".plan"),
    Family("onnxruntime-cuda", "onnxruntime_gpu:CUDA", "ONNX Runtime on NVIDIA GPUs", opens_onnx=True),
    Family("onnxruntime-tensorrt", "onnxruntime_gpu:TENSORRT", "ONNX Runtime through TensorRT 10", opens_onnx=True),
)


CPU_FAMILIES = ("onnxruntime", "openvino", "ncnn")


def family(name: str) -> Family:
    """Return a family by its exact name.

    Raises:
        UsageError: there is none of that name.
    """
    for entry in ENGINES:
        if entry.name == name:
            return entry
    raise UsageError(f"engine {name!r}", expected="one of " + ", ".join(entry.name for entry in ENGINES))


def build_engine(
    onnx: Path,
    output: Path,
    *,
    engine: str,
    options: BuildOptions | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> BuildResult:
    """Build an engine and its sidecar from an ONNX file, or take them from the cache.

    Args:
        onnx: a file with srdeploy metadata; the precision of its layers is the precision of the engine.
        output: the engine file; the sidecar is written to the same name with ".json" added.
        engine: a family that builds.
        options: see `BuildOptions`.
        force: replace an existing output.
        progress: receives the steps.

    Raises:
        UsageError: an option that the family does not have, or the output exists.
        InputError: the ONNX file is not understood.
        BuildError: the build failed, or a layer was built in another type. An existing output stays.
        CapabilityError: a package or GPU is missing, or the output cannot be written.
    """
    options = options or BuildOptions()
    chosen = family(engine)
    if chosen.suffix is None:
        builders = ", ".join(entry.name for entry in ENGINES if entry.suffix)
        raise UsageError(f"engine {engine!r} opens ONNX files as they are and has nothing to build", expected=builders)
    module = chosen.load()
    _refuse_device(chosen, options.device)
    _refuse_options(chosen, module, options)
    started = time.perf_counter()
    with atomic_files(output, manifest_path(output), force=force) as (engine_file, sidecar_file):
        graph = read_graph(onnx)
        if not options.profiles and "profiles" not in module.REFUSED_OPTIONS:
            options = replace(options, profiles=graph.contract.profiles)  # a static graph has no other
        key = engine_key(graph, engine, options)
        data, manifest, lookup = _cached_or_built(chosen, module, graph, options, key, progress)
        engine_file.write_bytes(data)
        sidecar_file.write_text(manifest.to_json(), encoding="utf-8")
    return BuildResult(
        path=output,
        manifest=manifest,
        seconds=time.perf_counter() - started,
        cached=lookup.engine is not None,
        cache_reason=lookup.reason,
        notes=tuple(manifest.details.get("notes", ())),
    )


def engine_key(graph: GraphFile, engine: str, options: BuildOptions) -> dict[str, Any]:
    """Return everything that decides an engine's bytes, as readable JSON values.

    The graph's hash covers its weights, its precision and the calibration that went into it.
    """
    return {
        "schema": KEY_SCHEMA,
        "engine": engine,
        "onnx_sha256": graph.sha256,
        "precision": graph.contract.precision.value,
        "options": options.to_key(),
        "system": f"{platform.system()} {platform.machine()}",
        **family(engine).load().key_parts(options),
    }


def open_engine(
    path: Path,
    *,
    engine: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    parity: bool = False,
    outputs: Sequence[str] | None = None,
) -> Runner:
    """Open an ONNX file or a built engine.

    Args:
        path: an ONNX file, or an engine with its sidecar next to it.
        engine: the family; for an ONNX file None means onnxruntime, for an engine None means the one in its sidecar.
        device: "auto", "cpu", "cuda" or "cuda:N"; a device that the engine cannot run on is refused, never replaced.
        threads: CPU threads, None for all processors.
        parity: for comparing numbers: exact FP32 arithmetic for FP32 layers, and INT8 graphs are opened even if this
            processor computes them wrongly, so that the difference can be measured.
        outputs: tensors to return instead of the graph's outputs, inner ones included (ONNX files on the CPU).

    Raises:
        InputError: not an ONNX file or engine of srdeploy, or the engine's SHA-256 differs from its sidecar's.
        CapabilityError: this machine cannot run it: package, GPU, version, or INT8 arithmetic.
        UsageError: options that do not apply to the file.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder", expected="an ONNX file or an engine")
    is_onnx = path.suffix == ".onnx" and not is_engine(path)
    if not is_onnx:
        return _open_built(path, engine, device, threads, parity, outputs)
    chosen = family(engine or "onnxruntime")
    if not chosen.opens_onnx:
        shapes = "" if chosen.name in CPU_FAMILIES else " --profile-images IMAGES"
        output = f"{path.stem}{chosen.suffix}"
        raise UsageError(
            f"{chosen.name} runs built engines, and {path} is an ONNX file",
            next_step=f"build one with: srdeploy build {path} --engine {chosen.name}{shapes} -o {output}",
        )
    _refuse_device(chosen, device)
    graph = read_graph(path)
    _refuse_overflow(path, graph.contract, chosen, parity)
    return _opened(chosen.load().open_onnx, graph, chosen, device, threads, parity, outputs)


@dataclass(frozen=True)
class EngineStatus:
    """Whether one family can build and run on this machine; a reason of None means yes."""

    name: str
    summary: str
    why_not_build: str | None
    why_not_run: str | None
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        return {
            "engine": self.name,
            "summary": self.summary,
            "can_build": self.why_not_build is None,
            "why_not_build": self.why_not_build,
            "can_run": self.why_not_run is None,
            "why_not_run": self.why_not_run,
            "versions": self.versions,
        }


def availability(device: str = "auto") -> list[EngineStatus]:
    """Return for every family whether it can build and run here, and why not; `device` selects the GPU."""
    return [engine_status(entry.name, device) for entry in ENGINES]


def engine_status(name: str, device: str = "auto") -> EngineStatus:
    """Return whether one family can build and run here, and why not; `device` selects the GPU."""
    entry = family(name)
    module = entry.load()
    not_built = "opens ONNX files as they are, nothing to build"
    return EngineStatus(
        name=entry.name,
        summary=entry.summary,
        why_not_build=_reason(module.why_not_build) if entry.suffix else not_built,
        why_not_run=_reason(lambda: module.why_not_run(device)),
        versions=module.versions(),
    )


def _reason(ask: Callable[[], str | None]) -> str | None:
    """A package that is installed but broken must not end the doctor."""
    try:
        return ask()
    except SrdeployError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip()}"


def _cached_or_built(
    chosen: Family, module: Any, graph: GraphFile, options: BuildOptions, key: dict[str, Any], progress: Progress
) -> tuple[bytes, Manifest, Lookup]:
    def build() -> tuple[bytes, Manifest]:
        built = module.build(graph, options, progress)
        return built.data, engine_manifest(graph, chosen.name, options, key, built)

    if not options.use_cache:
        return *build(), Lookup(None, "the cache was not used")
    cache = EngineCache()
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(cache.locked(key))
        except OSError as error:
            reason = f"the cache folder {cache.root} cannot be used ({(error.strerror or str(error)).lower()})"
            progress.note(reason)
            return *build(), Lookup(None, reason)
        lookup = cache.lookup(key)
        if lookup.engine is not None:
            return lookup.engine.data, lookup.engine.manifest, lookup
        data, manifest = build()
        try:
            cache.store(key, data, manifest)
        except OutputError as error:
            progress.note(f"the engine was built but not cached: {error}")
        return data, manifest, lookup


def _refuse_options(chosen: Family, module: Any, options: BuildOptions) -> None:
    """Refuse options that the family does not have: none is ignored silently."""
    unset = BuildOptions()
    for entry in fields(BuildOptions):
        if entry.name in module.REFUSED_OPTIONS and getattr(options, entry.name) != getattr(unset, entry.name):
            flag = _FLAGS.get(entry.name, "--" + entry.name.replace("_", "-"))
            raise UsageError(
                f"{flag} does not apply to {chosen.name}: {module.REFUSED_OPTIONS[entry.name]}",
                next_step="omit it",
            )


_FLAGS = {
    "profiles": "--min-shape/--opt-shape/--max-shape",
    "compute_capabilities": "--compute-capability",
    "workspace_bytes": "--workspace",
    "memory_bytes": "--memory",
}


def _refuse_device(chosen: Family, device: str) -> None:
    on_cpu = chosen.name in CPU_FAMILIES
    wanted, colon, number = device.partition(":")
    if wanted not in ("auto", "cpu", "cuda") or (colon and not (wanted == "cuda" and number.isdecimal())):
        raise UsageError(f"device {device!r}", expected="auto, cpu, cuda or cuda:N")
    if wanted == "cuda" and on_cpu:
        gpu = "; for NVIDIA GPUs use --engine onnxruntime-cuda" if chosen.name == "onnxruntime" else ""
        raise UsageError(f"{chosen.name} runs on the CPU, and device {device!r} was requested{gpu}")
    if wanted == "cpu" and not on_cpu:
        raise UsageError(f"{chosen.name} runs on NVIDIA GPUs, and device 'cpu' was requested")


def _refuse_overflow(path: Path, contract: ModelContract, chosen: Family, parity: bool) -> None:
    """Refuse an INT8 graph that CPU engines compute wrongly here, tens of decibels off, without a warning."""
    if chosen.name in CPU_FAMILIES and not parity and int8_weights_overflow(contract.weight_bits):
        raise CapabilityError(
            f"{path} has 8-bit weights, and this processor lacks VNNI: {chosen.name} adds their products in 16 bits, "
            "which overflow",
            next_step="quantize with --weight-bits 7, or use another precision; `srdeploy verify` measures the error",
        )


def is_engine(path: Path) -> bool:
    """Return True if a file is a built engine. Its sidecar decides, as ONNX Runtime's engines are ONNX files too."""
    if not manifest_path(path).is_file():
        return False
    try:
        return read_manifest(path).kind == KIND
    except SrdeployError:
        return False


def _open_built(
    path: Path, engine: str | None, device: str, threads: int | None, parity: bool, outputs: Sequence[str] | None
) -> Runner:
    opened = read_engine(path)
    names = [entry.name for entry in ENGINES if entry.suffix]
    if opened.family not in names:
        raise InputError(f"{path} was built for engine {opened.family!r}", expected="one of " + ", ".join(names))
    if engine is not None and family(engine).name != opened.family:
        raise UsageError(f"{path} is an engine of {opened.family}, and --engine {engine} was requested")
    chosen = family(opened.family)
    _refuse_device(chosen, device)
    _refuse_overflow(path, opened.contract, chosen, parity)
    return _opened(chosen.load().open_built, opened, chosen, device, threads, parity, outputs)


def _opened(
    opener: Callable[..., Runner],
    source: Any,
    chosen: Family,
    device: str,
    threads: int | None,
    parity: bool,
    outputs: Sequence[str] | None,
) -> Runner:
    more = {} if chosen.name in CPU_FAMILIES else {"device": "cuda:0" if device in ("auto", "cuda") else device}
    return opener(source, threads=threads, parity=parity, outputs=outputs, **more)
