"""ONNX Runtime on the CPU: opens any ONNX file of ours, and builds a pre-optimized graph for this kind of processor.

The built engine is ONNX Runtime's own optimized graph, still an ONNX file: fused, with weights laid out for the
processor's vector width. It opens without optimizing again. Other processors may lack the instructions, so the
sidecar records them and opening checks them.

ONNX Runtime's CPU kernels compute FP16 convolutions in FP32 (it casts around them). That is useful for checking the
rounding of an FP16 graph, and no FP16 speed. In the same way a quantized convolution runs on integers only where its
output is quantized too; elsewhere it is FP32 on rounded values. The numeric mode and the sidecar say what came out.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import cpu_count, machine, package_versions
from srdeploy.core.errors import BuildError, CapabilityError, InputError, OutputError, UsageError
from srdeploy.core.extras import import_extra
from srdeploy.core.onnx_file import GraphFile, read_graph
from srdeploy.core.onnx_graph import combined_label, type_label
from srdeploy.core.ort import cpu_session
from srdeploy.core.precision import Precision
from srdeploy.core.progress import Progress
from srdeploy.core.runner import KernelTime, RunnerInfo
from srdeploy.core.shapes import TensorSpec
from srdeploy.runtime.engines.cpu_kernel_times import onnxruntime_kernel_times
from srdeploy.runtime.engines.feeds import check_feeds
from srdeploy.runtime.engines.gpu import Gpu
from srdeploy.runtime.engines.merged_end import merge_end
from srdeploy.runtime.engines.options import CPU_REFUSED_OPTIONS, BuildOptions, BuiltEngine
from srdeploy.runtime.engines.sidecar import Engine

FAMILY = "onnxruntime"
_SCRATCH_STEP = "free some space there, or set TMPDIR"
REFUSED_OPTIONS = CPU_REFUSED_OPTIONS
_LAYOUT_FLAGS = ("avx2", "avx512f", "avx512_vnni")
_DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8", "tensor(int8)": "int8",
           "tensor(double)": "float64", "tensor(int64)": "int64"}  # fmt: skip
_AGAIN = "build it again here: srdeploy build model.onnx --engine onnxruntime -o ENGINE"


def why_not_build() -> str | None:
    """Return the reason why no engine can be built here; None if one can."""
    import_extra("onnxruntime", "cpu")
    return None


def why_not_run(device: str = "auto") -> str | None:
    """Return the reason why nothing can run here; None if it can. The CPU is the only device."""
    return why_not_build()


def precisions(found: Gpu | None) -> tuple[Precision, ...]:
    """Return the precisions that are worth building: FP16 layers are computed in FP32, so FP16 gains nothing."""
    return Precision.FP32, Precision.INT8


def key_parts(options: BuildOptions) -> dict[str, Any]:
    """Return what decides the engine's bytes besides graph and options: exact versions and the processor."""
    import_extra("onnxruntime", "cpu")
    return {"versions": versions(), "target": _target()}


def build(graph: GraphFile, options: BuildOptions, progress: Progress) -> BuiltEngine:
    """Optimize a graph for this kind of processor and return it as ONNX bytes.

    Raises:
        BuildError: ONNX Runtime refuses the graph.
    """
    graph, merged = merge_end(graph)
    with _scratch_folder() as folder, progress.task("optimizing with ONNX Runtime"):
        optimized = folder / "optimized.onnx"
        try:
            cpu_session(graph.serialized(), threads=options.threads, optimized_path=optimized, name=str(graph.path))
        except InputError as error:
            _refuse_full_scratch(error)
            raise BuildError(error.found) from error
        data = optimized.read_bytes()
    built = _built(onnx.load_model_from_string(data), merged)
    return BuiltEngine(
        data=data,
        precision_built=combined_label(built["convolutions"]),
        built=built,
        versions=versions(),
        target=_target(),
        notes=_notes(graph.contract, built),
    )


def open_onnx(
    graph: GraphFile, *, threads: int | None, parity: bool, outputs: Sequence[str] | None
) -> "OnnxRuntimeRunner":
    """Open an ONNX file on the CPU.

    Args:
        graph: the file.
        threads: None uses all processors.
        parity: no difference here: FP32 arithmetic is always exact FP32.
        outputs: tensors to return instead of the graph's outputs; inner ones are allowed.
    """
    # Inner tensors of the end exist only in the graph as it is.
    graph, merged = merge_end(graph) if outputs is None else (graph, ())
    data = graph.serialized(extra_outputs=tuple(outputs or ()))
    with _scratch_folder() as folder:
        optimized = folder / "optimized.onnx"
        try:
            session = cpu_session(
                data,
                threads=threads,
                optimized_path=optimized if outputs is None else None,
                name=str(graph.path),
            )
        except InputError as error:
            _refuse_full_scratch(error)
            raise
        built = _built(onnx.load(optimized), merged) if outputs is None else {}
    return OnnxRuntimeRunner(session, graph.contract, built, threads, outputs, graph.path)


def open_built(
    engine: Engine, *, threads: int | None, parity: bool, outputs: Sequence[str] | None
) -> "OnnxRuntimeRunner":
    """Open a built engine: no optimization is left to do.

    Raises:
        CapabilityError: the processor lacks instructions that the engine was built with.
        UsageError: inner tensors were asked for.
    """
    import_extra("onnxruntime", "cpu")
    if outputs is not None:
        raise UsageError("a built engine has no inner tensors to return", next_step="open the ONNX file for that")
    here, there = versions().get("onnxruntime"), engine.manifest.versions.get("onnxruntime")
    if here != there:  # the optimized graph holds operations that are ONNX Runtime's own business
        raise CapabilityError(f"{engine.path} was built with ONNX Runtime {there}; here is {here}", next_step=_AGAIN)
    lacking = sorted(set(engine.target.get("cpu_flags", ())) - set(_target()["cpu_flags"]))
    if lacking:
        raise CapabilityError(
            f"{engine.path} was built for a processor with {', '.join(lacking)}, which this one lacks",
            next_step=_AGAIN,
        )
    session = cpu_session(engine.data, threads=threads, arithmetic="literal", name=str(engine.path))
    return OnnxRuntimeRunner(session, engine.contract, engine.built, threads, None)


class OnnxRuntimeRunner:
    """Runs an ONNX Runtime session on the CPU; safe to call from several threads."""

    def __init__(
        self,
        session: Any,
        contract: ModelContract,
        built: Mapping[str, Any],
        threads: int | None,
        outputs: Sequence[str] | None,
        source: Path | None = None,
    ) -> None:
        self._session = session
        self._source = source
        self._inputs = tuple(_spec(value) for value in session.get_inputs())
        self._outputs = list(outputs) if outputs is not None else [value.name for value in session.get_outputs()]
        self._info = RunnerInfo(
            name=f"{FAMILY} {contract.precision.value}",
            engine=FAMILY,
            device="cpu",
            contract=contract,
            numeric_mode=_numeric_mode(contract, built),
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
        return dict(zip(self._outputs, self._session.run(self._outputs, dict(feeds)), strict=True))

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Bind inputs and outputs and return a function that computes once, in milliseconds (see `TimedRunner`)."""
        results = self.run(feeds)
        runtime, session = import_extra("onnxruntime", "cpu"), self._session
        binding = session.io_binding()
        arrays = [(name, np.ascontiguousarray(array), binding.bind_ortvalue_input) for name, array in feeds.items()]
        arrays += [(name, np.ascontiguousarray(array), binding.bind_ortvalue_output) for name, array in results.items()]
        for name, array, bind in arrays:
            bind(name, runtime.OrtValue.ortvalue_from_numpy(array))

        def compute() -> float:
            started = time.perf_counter()
            session.run_with_iobinding(binding)
            return (time.perf_counter() - started) * 1000

        return compute

    def kernel_times(self, feeds: Mapping[str, NDArray[Any]]) -> list[KernelTime]:
        """Return the milliseconds of each kernel (see `ProfiledRunner`)."""
        check_feeds(feeds, self._inputs, engine=self._info.name)
        if self._source is None:
            raise UsageError(f"{self._info.name} cannot be profiled", next_step="open the ONNX file")
        graph, _ = merge_end(read_graph(self._source))
        with _scratch_folder() as folder:
            session = cpu_session(
                graph.serialized(), threads=self._info.threads, profile=folder / "profile", name=str(self._source)
            )
            return onnxruntime_kernel_times(session, feeds, graph)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """Yield a folder for the graph that ONNX Runtime writes so that one can read what it really built."""
    try:
        with tempfile.TemporaryDirectory(prefix="srdeploy-ort-", ignore_cleanup_errors=True) as name:
            yield Path(name)
    except OSError as error:
        raise OutputError(
            f"cannot write the optimized graph in a temporary folder: {error.strerror or error}",
            next_step=_SCRATCH_STEP,
        ) from error


def _refuse_full_scratch(error: InputError) -> None:
    """ONNX Runtime names neither the file nor the reason when the optimized graph cannot be written."""
    if "Protobuf serialization failed" in str(error.__cause__):
        raise OutputError(
            f"cannot write the optimized graph in {tempfile.gettempdir()}", next_step=_SCRATCH_STEP
        ) from error


def _built(model: onnx.ModelProto, merged: Sequence[str]) -> dict[str, Any]:
    """Count the convolutions of an optimized graph by the type they compute in, and all nodes by operation.

    `merged` names the layers of the network that are one convolution (see merged_end.py).
    """
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for value in (*model.graph.value_info, *model.graph.input):
        types.setdefault(value.name, value.type.tensor_type.elem_type)
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":  # a convolution behind it computes in the type of the scale
            types[node.output[0]] = types.get(node.input[1], TensorProto.UNDEFINED)
    convolutions: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in ("QLinearConv", "ConvInteger"):
            convolutions["int8"] += 1
        elif "Conv" in node.op_type:
            convolutions[type_label(types.get(node.input[1], TensorProto.UNDEFINED))] += 1
    operations = Counter(f"{node.domain}:{node.op_type}".lstrip(":") for node in model.graph.node)
    return {
        "read_from": "ONNX Runtime's optimized graph",
        "convolutions": dict(sorted(convolutions.items())),
        "operations": dict(sorted(operations.items())),
        "merged_layers": list(merged),
    }


def _numeric_mode(contract: ModelContract, built: Mapping[str, Any]) -> str:
    asked = contract.precision.value.upper()
    computed = combined_label(built["convolutions"]).upper() if built else asked
    return asked if computed == asked else f"{asked} graph, convolutions computed in {computed}"


def _notes(contract: ModelContract, built: Mapping[str, Any]) -> tuple[str, ...]:
    mode = _numeric_mode(contract, built)
    return () if mode == contract.precision.value.upper() else (f"ONNX Runtime on the CPU: {mode}",)


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return package_versions(["onnxruntime", "onnxruntime-gpu", "onnx"])


def _target() -> dict[str, Any]:
    flags = machine()["cpu_flags"]
    return {"cpu_flags": [flag for flag in _LAYOUT_FLAGS if flag in flags]}


def _spec(value: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
    return TensorSpec(value.name, _DTYPES.get(value.type, value.type), shape)
