"""ONNX Runtime on NVIDIA GPUs through its CUDA or its TensorRT provider: two engine families over one module.

ONNX Runtime answers a provider that cannot load with a warning and a CPU session. So its fallbacks are disabled, the
CPU provider is not offered, and after opening the place of every node is checked.

- `get_available_providers()` lists what the wheel was compiled with. Whether a provider works is probed with a session
  of one node.
- The TensorRT provider is linked to TensorRT 10 (libnvinfer.so.10) also where TensorRT 11 is installed, and has no
  option for TF32: FP32 is compared only with NVIDIA_TF32_OVERRIDE=0 in the environment of the process.
- TensorRT builds its engine at the first run. Its profile is fixed here, so that it is built once for all shapes, and
  engines and timings are cached in files.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.environment import package_versions
from srdeploy.core.errors import CapabilityError, GpuMemoryError, SrdeployError, UsageError
from srdeploy.core.extras import import_extra, is_installed
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo
from srdeploy.core.shapes import Shape, ShapeProfile, format_shape
from srdeploy.runtime.engines.cache import default_root
from srdeploy.runtime.engines.feasibility import footprint, largest_legal_shape
from srdeploy.runtime.engines.feeds import check_feeds, check_profile, check_shape
from srdeploy.runtime.engines.gpu import Gpu, find_gpu, why_no_gpu
from srdeploy.runtime.engines.tensorrt.full import FULL
from srdeploy.runtime.engines.tensorrt.products import version_numbers
from srdeploy.runtime.engines.timer import timed

if TYPE_CHECKING:
    import torch

OLDEST = (1, 24, 1)
"""The first release with `get_provider_graph_assignment_info`."""
LARGEST: tuple[int, int, int] = (4, 1088, 1920)
"""Batch, height and width that the TensorRT provider's profile covers if half of the GPU's free memory allows it."""
TUNED = 256
"""Height and width that the TensorRT provider times its kernels for."""
INSTALL = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'srdeploy[gpu]'"


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime as an engine family.

    Attributes:
        family: name of the engine family.
        name: the provider's name in ONNX Runtime.
    """

    family: str
    name: str

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that compute."""
        return package_versions(["onnxruntime-gpu", "onnxruntime", "tensorrt"])

    def why_not_run(self, device: str = "auto") -> str | None:
        """Return the reason why the provider cannot run on a GPU of this machine; None if it can."""
        reason = _why_not_installed(self.name) or why_no_gpu()
        if reason is None and self is TENSORRT:
            reason = _why_no_tensorrt_10()
        if reason is None:
            found = find_gpu(device)
            reason = _probe(self, found.device) if found else None
        return reason

    def precisions(self, found: Gpu | None) -> tuple[Precision, ...]:
        """Return the precisions that are worth building: graphs in FP16."""
        return (Precision.FP16,)

    def open_onnx(
        self, graph: GraphFile, *, threads: int | None, parity: bool, outputs: Sequence[str] | None, device: str
    ) -> "OnnxRuntimeGpuRunner":
        """Open an ONNX file on a GPU.

        Args:
            graph: the file.
            threads: must be None: the work is on the GPU.
            parity: compare numbers: no TF32 in FP32 layers. On the CUDA provider it is always off.
            outputs: tensors to return instead of the graph's outputs; inner ones are allowed.
            device: "cuda:N".

        Raises:
            CapabilityError: provider or GPU missing, or a part of the graph would run on the CPU.
            UsageError: threads were given.
        """
        if threads is not None:
            raise UsageError(f"--threads does not apply to {self.family}, which runs on the GPU", next_step="omit it")
        reason = self.why_not_run(device)
        if reason:
            raise CapabilityError(f"{self.family} cannot run here: {reason}")
        if self is TENSORRT and parity:
            _refuse_tf32(graph)
        import torch

        runtime = import_extra("onnxruntime", "gpu")
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        profile = next(iter(graph.contract.profiles), None)
        if profile is None and self is TENSORRT:
            profile = _profile(graph, device)
        options = provider_options(self, device, stream.cuda_stream, profile)
        data = graph.serialized(extra_outputs=tuple(outputs or ()))
        session = strict_session(runtime, data, self, options, what=str(graph.path))
        return OnnxRuntimeGpuRunner(runtime, session, graph, self, device, stream, outputs, profile)


CUDA = Provider("onnxruntime-cuda", "CUDAExecutionProvider")
TENSORRT = Provider("onnxruntime-tensorrt", "TensorrtExecutionProvider")


def strict_session(runtime: Any, data: bytes, provider: Provider, options: Mapping[str, str], *, what: str) -> Any:
    """Open a session whose every node runs on one provider.

    Args:
        runtime: the onnxruntime module.
        data: the ONNX file.
        provider: where all nodes must run.
        options: of the provider.
        what: the file's name for messages.

    Raises:
        CapabilityError: the provider did not load, or took only a part of the graph.
    """
    session_options = runtime.SessionOptions()
    session_options.log_severity_level = 3
    session_options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session_options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = runtime.InferenceSession(
            data,
            session_options,
            providers=[(provider.name, dict(options))],
            enable_fallback=0,  # else ONNX Runtime prints to stdout and opens the file on the CPU
        )
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CapabilityError(f"{provider.name} cannot run {what}: {first}") from error
    places = {assignment.ep_name for assignment in session.get_provider_graph_assignment_info()}
    if session.get_providers()[0] != provider.name or places != {provider.name}:
        raise CapabilityError(
            f"ONNX Runtime put {what} on {', '.join(sorted(places)) or session.get_providers()[0]}",
            expected=f"all of it on {provider.name}",
        )
    return session


def provider_options(provider: Provider, device: str, stream: int, profile: ShapeProfile | None) -> dict[str, str]:
    """Return the options of a provider: device, stream, exact FP32 where it can be set, profile and caches.

    Args:
        provider: CUDA or TENSORRT.
        device: "cuda:N".
        stream: handle of the CUDA stream; 0 for the provider's own.
        profile: shapes of the TensorRT provider's engine.
    """
    common = {"device_id": device.partition(":")[2] or "0"}
    if stream:
        common["user_compute_stream"] = str(stream)
    if provider is CUDA:
        # An exhaustive search would run again for every new shape; the heuristic search costs nothing.
        return {**common, "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", "cudnn_conv_use_max_workspace": "1"}
    # Precision is the graph's own: no FP16 or INT8 flag is set.
    folder = str(default_root().parent / "onnxruntime-tensorrt")
    caches = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }
    if profile is None:
        return {**common, **caches}
    shapes = (("min", profile.min), ("opt", profile.opt), ("max", profile.max))
    return {
        **common,
        **caches,
        **{f"trt_profile_{end}_shapes": f"input:{format_shape(shape)}" for end, shape in shapes},
    }


def _why_not_installed(provider: str) -> str | None:
    found = package_versions(["onnxruntime", "onnxruntime-gpu"])
    if not is_installed("onnxruntime"):
        return "onnxruntime-gpu is not installed; install it with: pip install 'srdeploy[gpu]'"
    if len(found) == 2:
        return f"onnxruntime and onnxruntime-gpu are both installed and overwrite each other; repair it with: {INSTALL}"
    import onnxruntime

    if version_numbers(onnxruntime.__version__) < OLDEST:
        return f"onnxruntime {onnxruntime.__version__} is too old; upgrade it with: {INSTALL}"
    if provider not in onnxruntime.get_available_providers():
        return f"this onnxruntime {onnxruntime.__version__} has no {provider}; install it with: {INSTALL}"
    return None


def _why_no_tensorrt_10() -> str | None:
    """Load libnvinfer.so.10, from the package `tensorrt` or from the system, or return why it cannot be loaded."""
    try:
        version = FULL.load().__version__
    except SrdeployError as error:
        version = str(error)
    if version.startswith("10."):
        return None
    try:
        ctypes.CDLL("libnvinfer.so.10")
    except OSError:
        found = f"TensorRT {version} is installed" if version[:1].isdigit() else "it is not installed"
        return (
            f"ONNX Runtime's TensorRT provider needs TensorRT 10 (libnvinfer.so.10), and {found};"
            " use --engine tensorrt, or install it with: pip install 'tensorrt<11'"
        )
    return None


@functools.cache
def _probe(provider: Provider, device: str) -> str | None:
    """Run one node on a provider; return what failed, None if it worked."""
    import onnx

    runtime = import_extra("onnxruntime", "gpu")
    tensor = functools.partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT, shape=[4])
    node = onnx.helper.make_node("Relu", ["input"], ["output"])
    graph = onnx.helper.make_graph([node], "probe", [tensor("input")], [tensor("output")])
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    try:
        options = provider_options(provider, device, 0, None)
        session = strict_session(runtime, model.SerializeToString(), provider, options, what="a test")
        (result,) = session.run(None, {"input": np.array([-1, 0, 1, 2], np.float32)})
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None if result.tolist() == [0, 0, 1, 2] else f"{provider.name} computes a wrong result"


def _refuse_tf32(graph: GraphFile) -> None:
    if graph.contract.precision is Precision.FP32 and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        raise CapabilityError(
            f"{TENSORRT.family} computes FP32 layers in TF32 (11 bits of mantissa) and has no option against it",
            expected="exact FP32 for a comparison",
            next_step="run the command with NVIDIA_TF32_OVERRIDE=0, or use --engine onnxruntime-cuda or tensorrt",
        )


def _profile(graph: GraphFile, device: str) -> ShapeProfile:
    """Return the shapes that the TensorRT provider builds its engine for."""
    channels, low = graph.contract.channels, graph.contract.min_size
    found = find_gpu(device)
    batch, height, width = LARGEST
    wanted: Shape = (batch, channels, height, width)
    legal = largest_legal_shape(footprint(graph), wanted, found.free_bytes() // 2 if found else None)
    height, width = (max(low, min(pair)) for pair in zip((height, width), legal[2:], strict=True))
    tuned = (1, channels, max(low, min(TUNED, height)), max(low, min(TUNED, width)))
    return ShapeProfile((1, channels, low, low), tuned, (min(batch, legal[0]), channels, height, width))


class OnnxRuntimeGpuRunner:
    """Runs an ONNX Runtime session on a GPU with inputs and outputs bound to GPU memory."""

    def __init__(
        self,
        runtime: Any,
        session: Any,
        graph: GraphFile,
        provider: Provider,
        device: str,
        stream: "torch.cuda.Stream",
        outputs: Sequence[str] | None,
        profile: ShapeProfile | None,
    ) -> None:
        import torch

        self._runtime = runtime
        self._session = session
        self._graph = graph
        self._device = torch.device(device)
        self._stream = stream
        self._lock = threading.Lock()
        self._outputs = list(outputs) if outputs is not None else [value.name for value in session.get_outputs()]
        found = find_gpu(device)
        exact = provider is CUDA or os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"
        precision = graph.contract.precision.value
        self._info = RunnerInfo(
            name=f"{provider.family} {precision}",
            engine=provider.family,
            device=device,
            contract=graph.contract,
            numeric_mode=f"{precision.upper()}, TF32 {'off' if exact else 'on'}",
            profiles=() if profile is None else (profile,),
            versions={**provider.versions(), "gpu": found.name if found else "none"},
            built={"read_from": "the graph", "convolutions": graph.layers_by_type()},
        )

    @property
    def info(self) -> RunnerInfo:
        """Description of this runner."""
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute from host arrays (see `srdeploy.core.runner.Runner`)."""
        import torch

        check_feeds(feeds, self._graph.inputs, engine=self._info.name)
        tensors = {name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in feeds.items()}
        moved = {name: tensor.pin_memory().to(self._device, non_blocking=True) for name, tensor in tensors.items()}
        return {name: value.cpu().numpy() for name, value in self.run_tensors(moved).items()}

    def run_tensors(self, feeds: Mapping[str, "torch.Tensor"]) -> dict[str, "torch.Tensor"]:
        """Compute on GPU tensors; the input is bound without a copy, outputs are new tensors."""
        import torch
        import torch.utils.dlpack

        spec = self._graph.inputs[0]
        image = feeds.get(spec.name)
        if image is None or len(feeds) != 1:
            raise UsageError(f"{self._info.name} got inputs {sorted(feeds)}", expected=str(spec))
        if image.device != self._device or str(image.dtype) != f"torch.{spec.dtype}":
            raise UsageError(
                f"input {spec.name!r} is {image.dtype} on {image.device}", expected=f"{spec.dtype} on {self._device}"
            )
        check_shape(tuple(image.shape), spec, engine=self._info.name)
        if self._info.profiles:
            check_profile(tuple(image.shape), self._info.profiles, engine=self._info.name, rebuilds=False)
        image = image.contiguous()
        current = torch.cuda.current_stream(self._device)
        with self._lock:
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(spec.name, self._runtime.OrtValue.from_dlpack(image))
            for output in self._outputs:
                binding.bind_output(output, "cuda", self._device.index or 0)
            self._stream.wait_stream(current)
            self._run(binding, tuple(image.shape))
            # Copied on the session's own stream: its next run, in whichever thread, takes the same memory again.
            with torch.cuda.stream(self._stream):
                results = {
                    output: torch.utils.dlpack.from_dlpack(value).clone()
                    for output, value in zip(self._outputs, binding.get_outputs(), strict=True)
                }
            current.wait_stream(self._stream)
            for result in results.values():
                result.record_stream(current)
            return results

    def _run(self, binding: Any, shape: tuple[int, ...]) -> None:
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            if "memory" in str(error).lower():  # "Failed to allocate memory for requested buffer of size ..."
                raise GpuMemoryError(f"{self._info.name} cannot run an input of {format_shape(shape)}") from error
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CapabilityError(f"{self._info.name} could not be run: {first}") from error

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Bind GPU memory and return a function that computes once, in milliseconds (see `TimedRunner`)."""
        import torch

        check_feeds(feeds, self._graph.inputs, engine=self._info.name)
        inputs = {
            name: torch.from_numpy(np.require(value, requirements=["C", "W"])).to(self._device)
            for name, value in feeds.items()
        }
        outputs = self.run_tensors(inputs)
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, self._runtime.OrtValue.from_dlpack(tensor))
        for name, tensor in outputs.items():
            binding.bind_ortvalue_output(name, self._runtime.OrtValue.from_dlpack(tensor))
        torch.cuda.synchronize(self._device)

        def compute(_held: object = (inputs, outputs)) -> None:
            self._session.run_with_iobinding(binding)

        return timed(compute, str(self._device), stream=self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import torch

        self._session = None
        torch.cuda.empty_cache()
