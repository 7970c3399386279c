"""OpenVINO on the CPU: opens any ONNX file of ours, and builds a compiled blob.

The built engine is OpenVINO's own exported blob: one file, all shapes stay free, no ONNX conversion and no graph
rewriting when it is opened. It opens only with the exact OpenVINO release that wrote it, which the sidecar states.
(The alternative, IR, is two files that must travel together and is optimized again at every opening.)

OpenVINO picks BF16 arithmetic by itself on processors with BF16 units. Precision lives in the graph, so FP32 layers are
told to compute in FP32 (inference precision hint f32), whether an engine is verified, timed or used. `open_native`
leaves the choice to OpenVINO: a baseline for `bench`, never what is shipped.
"""

import functools
import io
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import cpu_count, package_versions
from srdeploy.core.errors import BuildError, CapabilityError, InputError, UsageError
from srdeploy.core.extras import import_extra
from srdeploy.core.onnx_file import GraphFile, read_graph
from srdeploy.core.onnx_graph import Layer, combined_label
from srdeploy.core.precision import Precision
from srdeploy.core.progress import Progress
from srdeploy.core.runner import KernelTime, RunnerInfo
from srdeploy.core.shapes import TensorSpec
from srdeploy.runtime.engines.cpu_kernel_times import openvino_kernel_times
from srdeploy.runtime.engines.feeds import check_feeds
from srdeploy.runtime.engines.gpu import Gpu
from srdeploy.runtime.engines.merged_end import merge_end, tile_end
from srdeploy.runtime.engines.options import CPU_REFUSED_OPTIONS, BuildOptions, BuiltEngine
from srdeploy.runtime.engines.sidecar import Engine

FAMILY = "openvino"
DEVICE = "CPU"
_CORE = threading.Lock()
REFUSED_OPTIONS = CPU_REFUSED_OPTIONS
_LABELS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "u8": "int8", "i8": "int8", "I8": "int8"}
_CONVOLUTIONS = ("Convolution", "Deconvolution")


def why_not_build() -> str | None:
    """Return the reason why no engine can be built here; None if one can."""
    import_extra("openvino", "cpu")
    return None


def why_not_run(device: str = "auto") -> str | None:
    """Return the reason why nothing can run here; None if it can. The CPU is the only device."""
    return why_not_build()


def precisions(found: Gpu | None) -> tuple[Precision, ...]:
    """Return the precisions that are worth building: FP16 layers are computed in FP32, so FP16 gains nothing."""
    return Precision.FP32, Precision.INT8


def shared_core() -> Any:
    """Return the process's one `openvino.Core`, which is never freed.

    The CPU plugin gives the thread an alternate signal stack when it is made, and frees that memory with itself. With
    two of them, freed in the order they were made, the thread is left with a stack that is gone, and the next signal
    (Ctrl-C, an alarm) ends the process with a segmentation fault. Seen with OpenVINO 2026.4.

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    with _CORE:  # two threads at once would both make one
        return _core()


@functools.cache
def _core() -> Any:
    return import_extra("openvino", "cpu").Core()


def key_parts(options: BuildOptions) -> dict[str, Any]:
    """Return what decides the engine's bytes besides graph and options."""
    return {"versions": versions(), "target": _target(shared_core())}


def build(graph: GraphFile, options: BuildOptions, progress: Progress) -> BuiltEngine:
    """Compile a graph for this machine's processor and return the blob.

    Raises:
        BuildError: OpenVINO refuses the graph.
    """
    core = shared_core()
    graph, merged = merge_end(graph)
    with progress.task("compiling with OpenVINO"):
        try:
            model = core.read_model(tile_end(graph).serialized())
            compiled = core.compile_model(model, DEVICE, _configuration(options.threads))
            exported = compiled.export_model()
        except Exception as error:
            raise BuildError(f"OpenVINO cannot build {graph.path}: {_cause(error)}") from error
    data = exported.getvalue() if isinstance(exported, io.BytesIO) else bytes(exported)
    built = _built(compiled, graph.layers, merged)
    label = combined_label(built["convolutions"])
    return BuiltEngine(
        data=data,
        precision_built=label,
        built=built,
        versions=versions(),
        target=_target(core),
        notes=_notes(graph.contract, label),
    )


def open_onnx(
    graph: GraphFile, *, threads: int | None, parity: bool, outputs: Sequence[str] | None
) -> "OpenVinoRunner":
    """Open an ONNX file on the CPU.

    Args:
        graph: the file.
        threads: None uses all processors.
        parity: no difference here: FP32 layers always compute in FP32.
        outputs: tensors to return instead of the graph's outputs; inner ones are allowed.
    """
    return _open_graph(graph, threads=threads, outputs=outputs, native=False)


def open_native(graph: GraphFile, *, threads: int | None) -> "OpenVinoRunner":
    """Open an ONNX file in the arithmetic that OpenVINO chooses by itself, BF16 on processors with BF16 units."""
    return _open_graph(graph, threads=threads, outputs=None, native=True)


def _open_graph(
    graph: GraphFile, *, threads: int | None, outputs: Sequence[str] | None, native: bool
) -> "OpenVinoRunner":
    core = shared_core()
    # Inner tensors of the end exist only in the graph as it is; a baseline is OpenVINO alone.
    whole = outputs is None and not native
    graph, merged = merge_end(graph) if whole else (graph, ())
    try:
        model = core.read_model((tile_end(graph) if whole else graph).serialized(extra_outputs=tuple(outputs or ())))
        compiled = core.compile_model(model, DEVICE, _configuration(threads, native=native))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"OpenVINO cannot open {graph.path}: {_cause(error)}") from error
    built = _built(compiled, graph.layers, merged)
    source = graph.path if whole else None
    return OpenVinoRunner(compiled, graph.contract, graph.inputs, built, threads, outputs, native, source)


def open_built(engine: Engine, *, threads: int | None, parity: bool, outputs: Sequence[str] | None) -> "OpenVinoRunner":
    """Open a compiled blob.

    Raises:
        CapabilityError: it was written by another OpenVINO release or for another processor.
        UsageError: inner tensors were asked for.
    """
    if outputs is not None:
        raise UsageError("a built engine has no inner tensors to return", next_step="open the ONNX file for that")
    core = shared_core()
    _check_made_for_here(engine, core)
    try:
        compiled = core.import_model(io.BytesIO(engine.data), DEVICE, _configuration(threads))
    except Exception as error:
        raise InputError(f"OpenVINO cannot open {engine.path}: {_cause(error)}") from error
    built = _built(compiled, (), engine.built.get("merged_layers", ()))
    built["macs_share"] = engine.built.get("macs_share", {})
    return OpenVinoRunner(compiled, engine.contract, engine.inputs, built, threads, None, False)


class OpenVinoRunner:
    """Runs a compiled OpenVINO model; each calling thread gets its own infer request."""

    def __init__(
        self,
        compiled: Any,
        contract: ModelContract,
        inputs: tuple[TensorSpec, ...],
        built: Mapping[str, Any],
        threads: int | None,
        outputs: Sequence[str] | None,
        native: bool,
        source: Path | None = None,
    ) -> None:
        self._compiled = compiled
        self._source = source
        self._local = threading.local()
        self._inputs = inputs
        ports = {name: port for port in compiled.outputs for name in port.get_names()}
        names = list(outputs) if outputs is not None else [port.get_any_name() for port in compiled.outputs]
        self._outputs = {name: ports[name] for name in names}
        self._info = RunnerInfo(
            name=f"{FAMILY} {contract.precision.value}",
            engine=FAMILY,
            device="cpu",
            contract=contract,
            numeric_mode=_numeric_mode(compiled, contract, built, native),
            threads=threads or cpu_count(),
            profiles=contract.profiles,
            versions=versions(),
            built=built,
        )

    @property
    def info(self) -> RunnerInfo:
        """What is behind this runner."""
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute the outputs from the named inputs (see `srdeploy.core.runner.Runner`)."""
        check_feeds(feeds, self._inputs, engine=self._info.name)
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._compiled.create_infer_request()
        # The copy of an input is avoided; the results are copied, as the request writes over them next time.
        request.infer({name: np.ascontiguousarray(array) for name, array in feeds.items()}, share_inputs=True)
        return {name: request.get_tensor(port).data.copy() for name, port in self._outputs.items()}

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Place the inputs and return a function that computes once, in milliseconds (see `TimedRunner`)."""
        check_feeds(feeds, self._inputs, engine=self._info.name)
        openvino = import_extra("openvino", "cpu")
        request = self._compiled.create_infer_request()
        # The tensors share the arrays' memory, so the arrays must live as long as the function.
        held = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        for name, array in held.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))

        def compute(_held: object = held) -> float:
            started = time.perf_counter()
            request.infer()
            return (time.perf_counter() - started) * 1000

        return compute

    def kernel_times(self, feeds: Mapping[str, NDArray[Any]]) -> list[KernelTime]:
        """Return the milliseconds of each kernel (see `ProfiledRunner`)."""
        check_feeds(feeds, self._inputs, engine=self._info.name)
        if self._source is None:
            raise UsageError(
                f"{self._info.name} cannot be profiled", next_step="open the ONNX file, with its own outputs"
            )
        graph = tile_end(merge_end(read_graph(self._source))[0])
        configuration = {**_configuration(self._info.threads), "PERF_COUNT": True}
        compiled = shared_core().compile_model(shared_core().read_model(graph.serialized()), DEVICE, configuration)
        return openvino_kernel_times(compiled, feeds, graph)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._local = threading.local()
        self._compiled = None


def _configuration(threads: int | None, *, native: bool = False) -> dict[str, Any]:
    configuration: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads or cpu_count(),
    }
    if not native:
        configuration["INFERENCE_PRECISION_HINT"] = "f32"
    return configuration


def _built(compiled: Any, layers: Sequence[Layer], merged: Sequence[str]) -> dict[str, Any]:
    """Read back what runs: layers by kind and type, convolutions by type, and their share of the multiply-adds.

    `merged` names the layers of the network that are one convolution (see merged_end.py).
    """
    macs = {layer.node: layer.macs for layer in layers}
    operations: Counter[str] = Counter()
    convolutions: Counter[str] = Counter()
    macs_by_type: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ops():
        information = node.get_rt_info()
        kind = information["layerType"].astype(str)
        precision = information["runtimePrecision"].astype(str)
        operations[f"{kind}:{precision}"] += 1
        if kind in _CONVOLUTIONS:
            # The kernel's name ends in the type it computes in. `runtimePrecision` is the type asked for, and says i8
            # of deconvolutions that OpenVINO 2026.4 computes in FP32 on processors without VNNI.
            computed = information["primitiveType"].astype(str).rpartition("_")[2]
            label = _LABELS.get(computed) or _LABELS.get(precision, precision)
            convolutions[label] += 1
            # The layer that computes the output is named "output"; the part without its bias keeps the node's name.
            listed = information["originalLayersNames"].astype(str).split(",")
            originals = {name.removesuffix("/WithoutBiases") for name in listed}
            macs_by_type[label] += sum(macs.get(name, 0.0) for name in originals)  # type: ignore[assignment]
    total = sum(macs_by_type.values())
    share = {label: round(value / total, 4) for label, value in sorted(macs_by_type.items())} if total else {}
    return {
        "read_from": "OpenVINO's runtime model",
        "convolutions": dict(sorted(convolutions.items())),
        "macs_share": share,
        "operations": dict(sorted(operations.items())),
        "merged_layers": list(merged),
    }


def _numeric_mode(compiled: Any, contract: ModelContract, built: Mapping[str, Any], native: bool) -> str:
    hint = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    asked, computed = contract.precision.value.upper(), combined_label(built["convolutions"]).upper()
    graph = asked if computed == asked else f"{asked} graph, convolutions computed in {computed}"
    return f"{graph}, inference precision hint {hint}" + (" (OpenVINO's own choice)" if native else "")


def _notes(contract: ModelContract, built: str) -> tuple[str, ...]:
    asked = contract.precision.value
    return () if built == asked else (f"OpenVINO on this processor: {asked} graph, convolutions computed in {built}",)


def _check_made_for_here(engine: Engine, core: Any) -> None:
    here, there = versions()["openvino"], engine.manifest.versions.get("openvino")
    step = "build it again here: srdeploy build model.onnx --engine openvino -o ENGINE"
    if here != there:
        raise CapabilityError(f"{engine.path} was built with OpenVINO {there}; here is {here}", next_step=step)
    lacking = sorted(set(engine.target.get("capabilities", ())) - set(_target(core)["capabilities"]))
    if lacking:
        raise CapabilityError(
            f"{engine.path} was built for a processor with {', '.join(lacking)}, which this one lacks", next_step=step
        )


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return package_versions(["openvino"])


def _target(core: Any) -> dict[str, Any]:
    return {"capabilities": sorted(core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))}


def _cause(error: Exception) -> str:
    """Return the line that names the cause, from a text that begins with a call stack and may end with links."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
    for mark in ("No conversion rule", "with a message:"):
        for index, line in enumerate(lines):
            if mark in line:
                return " ".join(lines[index : index + (1 if mark.startswith("No") else 2)])
    noise = ("Exception from", "Check '", "FrontEnd API failed", "To facilitate")
    telling = [line for line in lines if not line.startswith(noise)]
    return (telling or lines or [type(error).__name__])[0]
