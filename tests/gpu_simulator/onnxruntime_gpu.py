"""ONNX Runtime's CUDA and TensorRT providers on simulated GPUs.

Sessions that ask for one of them compute with the real CPU session of the same graph, in simulated memory and on the
stream that was given. Options, bindings and failures follow ONNX Runtime's documentation and Python sources: a provider
that cannot load gives a CPU session and a line on standard output unless the fallbacks are off; an unknown option, a
wrong name, type or device is refused; a run waits for its stream.
"""

import math
import os
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from gpu_simulator import torch_cuda
from gpu_simulator.context_state import view
from gpu_simulator.cuda import SimulatedOutOfMemoryError, Simulator, Work
from gpu_simulator.engine_file import EngineFile, Header, cpu_session

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
_COMMON = {"device_id", "user_compute_stream", "has_user_compute_stream"}
_CUDA_OPTIONS = _COMMON | {
    "arena_extend_strategy", "cudnn_conv1d_pad_to_nc1d", "cudnn_conv_algo_search", "cudnn_conv_use_max_workspace",
    "do_copy_in_default_stream", "enable_cuda_graph", "enable_cudnn", "enable_skip_layer_norm_strict_mode",
    "fuse_conv_bias", "gpu_mem_limit", "prefer_nhwc", "sdpa_kernel", "tunable_op_enable",
    "tunable_op_max_tuning_duration_ms", "tunable_op_tuning_enable", "use_ep_level_unified_stream", "use_tf32",
}  # fmt: skip
_TENSORRT_OPTIONS = _COMMON | {
    f"trt_{name}"
    for name in (
        "auxiliary_streams", "bf16_enable", "build_heuristics_enable", "builder_optimization_level",
        "context_memory_sharing_enable", "cuda_graph_enable", "detailed_build_log", "dump_ep_context_model",
        "dump_subgraphs", "engine_cache_enable", "engine_cache_path", "engine_cache_prefix", "engine_hw_compatible",
        "ep_context_embed_mode", "ep_context_file_path", "extra_plugin_lib_paths", "force_sequential_engine_build",
        "force_timing_cache", "fp16_enable", "int8_enable", "layer_norm_fp32_fallback", "max_partition_iterations",
        "max_workspace_size", "min_subgraph_size", "op_types_to_exclude", "preview_features", "profile_max_shapes",
        "profile_min_shapes", "profile_opt_shapes", "sparsity_enable", "tactic_sources", "timing_cache_enable",
        "timing_cache_path",
    )
}  # fmt: skip
_REAL: dict[str, Any] = {
    "InferenceSession": onnxruntime.InferenceSession,
    "OrtValue": onnxruntime.OrtValue,
    "get_available_providers": onnxruntime.get_available_providers,
}
_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(int8)": torch.int8,
          "tensor(uint8)": torch.uint8, "tensor(int64)": torch.int64, "tensor(int32)": torch.int32}  # fmt: skip


_NO_FALLBACK = (
    "This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP has been "
    "explicitly disabled by the user."
)


class Fail(RuntimeError):  # noqa: N818  # the name that ONNX Runtime gives it
    """onnxruntime.capi.onnxruntime_pybind11_state.Fail."""


def install(simulator: Simulator, tensorrt_version: str | None) -> None:
    """Give `onnxruntime` its GPU providers; the TensorRT provider loads beside TensorRT 10 only."""

    class InferenceSession:
        """onnxruntime.InferenceSession: on a GPU where one was asked for."""

        def __new__(cls, source: Any, sess_options: Any = None, providers: Any = None, *rest: Any, **more: Any) -> Any:
            wanted = _normalized(providers, rest[0] if rest else more.get("provider_options"))
            if not wanted or wanted[0][0] not in (CUDA, TENSORRT):
                return _REAL["InferenceSession"](source, sess_options, providers, *rest, **more)
            options = sess_options or onnxruntime.SessionOptions()
            problem = _why_not_loaded(simulator, wanted[0][0], tensorrt_version)
            if problem is None:
                return GpuSession(simulator, source, options, wanted)
            if _entry(options, "session.disable_cpu_ep_fallback") == "1":
                raise Fail(f"{problem}; {_NO_FALLBACK}")
            if not more.get("enable_fallback", 1):
                raise RuntimeError(problem)
            print(f"EP Error {problem} when using {wanted}\nFalling back to ['CPUExecutionProvider']")
            return _REAL["InferenceSession"](source, options, ["CPUExecutionProvider"])

    class OrtValue:
        """onnxruntime.OrtValue: of GPU memory where the data is there."""

        def __new__(cls, *args: Any) -> Any:
            return _REAL["OrtValue"](*args)

        @staticmethod
        def from_dlpack(data: Any, /) -> Any:
            if isinstance(data, torch_cuda.Capsule):
                return GpuValue(data.taken())
            if isinstance(data, torch_cuda.CudaTensor):
                if not data.is_contiguous():
                    raise RuntimeError("ORT only supports contiguous tensor for now.")
                return GpuValue(data.detach())
            return _REAL["OrtValue"].from_dlpack(data)

        @staticmethod
        def ortvalue_from_numpy(array: np.ndarray, /, device_type: str = "cpu", device_id: int = 0, **more: Any) -> Any:
            if device_type == "cuda":
                return GpuValue(torch.from_numpy(array).to(f"cuda:{device_id}"))
            return _REAL["OrtValue"].ortvalue_from_numpy(array, device_type, device_id, **more)

        @staticmethod
        def ortvalue_from_shape_and_type(
            shape: Sequence[int], kind: Any, device_type: str = "cpu", device_id: int = 0, **more: Any
        ) -> Any:
            if device_type == "cuda":
                dtype = torch.from_numpy(np.empty(0, kind)).dtype
                return GpuValue(torch.empty(tuple(shape), dtype=dtype, device=f"cuda:{device_id}"))
            return _REAL["OrtValue"].ortvalue_from_shape_and_type(shape, kind, device_type, device_id, **more)

    onnxruntime.InferenceSession = InferenceSession
    onnxruntime.OrtValue = OrtValue
    onnxruntime.get_available_providers = lambda: [TENSORRT, CUDA, *_REAL["get_available_providers"]()]


def uninstall() -> None:
    """Restore `onnxruntime`."""
    for name, value in _REAL.items():
        setattr(onnxruntime, name, value)


def _normalized(providers: Any, provider_options: Any) -> list[tuple[str, dict[str, Any]]]:
    found = [(entry, {}) if isinstance(entry, str) else (entry[0], dict(entry[1])) for entry in providers or ()]
    if provider_options:
        found = [(name, dict(options)) for (name, _), options in zip(found, provider_options, strict=True)]
    return found


def _why_not_loaded(simulator: Simulator, provider: str, version: str | None) -> str | None:
    if not simulator.gpus:
        return "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version"
    if provider == TENSORRT and not (version or "").startswith("10."):
        return "Failed to load libonnxruntime_providers_tensorrt.so: libnvinfer.so.10: cannot open shared object file"
    return None


def _entry(options: Any, name: str) -> str | None:
    try:
        return str(options.get_session_config_entry(name))
    except RuntimeError:
        return None


class GpuValue:
    """An OrtValue in GPU memory."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def device_name(self) -> str:
        return "cuda"

    def data_ptr(self) -> int:
        return int(self.tensor.data_ptr())

    def shape(self) -> list[int]:
        return list(self.tensor.shape)

    def data_type(self) -> str:
        return next(name for name, kind in _TYPES.items() if kind == self.tensor.dtype)

    def numpy(self) -> np.ndarray:
        return np.asarray(self.tensor.cpu().numpy())

    def simulated_dlpack(self) -> Any:
        return self.tensor

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return torch_cuda.Capsule(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.tensor.device.index


class GpuBinding:
    """onnxruntime.IOBinding."""

    def __init__(self, session: "GpuSession") -> None:
        self._session = session
        self.inputs: dict[str, GpuValue] = {}
        self.outputs: dict[str, GpuValue | None] = {}
        self.values: list[GpuValue] = []

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self._session.check_input(name, value)
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self._session.check_output(name)
        self.outputs[name] = value

    def bind_output(self, name: str, device_type: str = "cpu", device_id: int = 0, *_: Any, **__: Any) -> None:
        self._session.check_output(name)
        if device_type != "cuda" or device_id != self._session.device:
            raise RuntimeError(f"the simulator binds outputs on cuda:{self._session.device} only")
        self.outputs[name] = None

    def clear_binding_inputs(self) -> None:
        self.inputs.clear()

    def clear_binding_outputs(self) -> None:
        self.outputs.clear()

    def get_outputs(self) -> list[GpuValue]:
        return list(self.values)

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        return [value.numpy() for value in self.values]

    def synchronize_inputs(self) -> None:
        self._session.stream.synchronize()

    def synchronize_outputs(self) -> None:
        self._session.stream.synchronize()


class GpuSession:
    """A session with all nodes on one GPU provider."""

    def __init__(
        self, simulator: Simulator, source: Any, options: Any, wanted: list[tuple[str, dict[str, Any]]]
    ) -> None:
        self.provider, given = wanted[0]
        known = _CUDA_OPTIONS if self.provider == CUDA else _TENSORRT_OPTIONS
        for name, value in given.items():
            if name not in known:
                raise Fail(f'[ONNXRuntimeError] : 1 : FAIL : Unknown provider option: "{name}".')
            if not isinstance(name, str) or not isinstance(value, str | int | bool):
                raise ValueError(f"provider option {name} is {value!r}")
        self._simulator, self._options, self._given = simulator, options, given
        self.device = int(given.get("device_id", 0))
        if self.device >= len(simulator.gpus):
            raise Fail("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 101: invalid device ordinal")
        handle = int(given.get("user_compute_stream", 0) or 0)
        self.stream = simulator.stream_of(handle) if handle else simulator.new_stream(self.device)
        if self.stream.device != self.device:
            raise simulator.violation("a session computes on a stream of another device")
        data = source if isinstance(source, bytes) else _read(source)
        self._cpu = cpu_session(data)
        self._file = _as_engine(data)
        try:
            self._weights = simulator.allocate(self._file.weights_bytes, self.device)
        except SimulatedOutOfMemoryError as error:
            raise Fail("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory") from error

    def __del__(self) -> None:
        if hasattr(self, "_weights"):
            self._simulator.release(self._weights)

    def get_providers(self) -> list[str]:
        return [self.provider]

    def get_provider_options(self) -> dict[str, Any]:
        return {self.provider: self._given}

    def disable_fallback(self) -> None:
        pass

    def get_inputs(self) -> Any:
        return self._cpu.get_inputs()

    def get_outputs(self) -> Any:
        return self._cpu.get_outputs()

    def get_modelmeta(self) -> Any:
        return self._cpu.get_modelmeta()

    def get_provider_graph_assignment_info(self) -> list[Any]:
        if _entry(self._options, "session.record_ep_graph_assignment_info") != "1":
            raise Fail("Graph assignment info was not recorded: set session.record_ep_graph_assignment_info")
        nodes = [SimpleNamespace(name=node.name, op_type=node.op_type) for node in self._file.model.graph.node]
        return [SimpleNamespace(ep_name=self.provider, get_nodes=lambda: nodes)]

    def io_binding(self) -> GpuBinding:
        return GpuBinding(self)

    def check_input(self, name: str, value: Any) -> None:
        expected = next((entry for entry in self.get_inputs() if entry.name == name), None)
        if expected is None:
            raise RuntimeError(f"Failed to find NodeArg name: {name} in the required inputs")
        if not isinstance(value, GpuValue):
            raise TypeError("the simulator binds inputs in GPU memory only")
        if value.data_type() != expected.type:
            raise RuntimeError(
                f"Unexpected input data type. Actual: ({value.data_type()}), expected: ({expected.type})"
            )

    def check_output(self, name: str) -> None:
        if name not in [entry.name for entry in self.get_outputs()]:
            raise RuntimeError(f"Failed to find NodeArg name: {name} in the outputs")

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, np.ndarray], run_options: Any = None) -> Any:
        moved = {
            name: GpuValue(torch.from_numpy(np.ascontiguousarray(a)).to(f"cuda:{self.device}"))
            for name, a in feeds.items()
        }
        binding = self.io_binding()
        for name, value in moved.items():
            binding.bind_ortvalue_input(name, value)
        for name in names or [entry.name for entry in self.get_outputs()]:
            binding.bind_output(name, "cuda", self.device)
        self._simulator.drain_device(self.device)
        self.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()]

    def run_with_iobinding(self, binding: GpuBinding, run_options: Any = None) -> None:
        """Queue the computation on the session's stream, and wait for it as ONNX Runtime does."""
        missing = {entry.name for entry in self.get_inputs()} - set(binding.inputs)
        if missing:
            raise ValueError(f"Required inputs ({sorted(missing)}) are missing from input feed")
        names = list(binding.outputs)
        shape = tuple(next(iter(binding.inputs.values())).shape())
        place = torch_cuda.CudaStream(native=self.stream)
        kinds = {entry.name: _TYPES[entry.type] for entry in self.get_outputs()}
        shapes = self._file.inferred(shape)[0]
        with torch_cuda.StreamContext(place), torch.no_grad():
            binding.values = [
                binding.outputs[name]
                or GpuValue(torch.empty(shapes[name], dtype=kinds[name], device=f"cuda:{self.device}"))
                for name in names
            ]
        sources = {
            name: (value.data_ptr(), tuple(value.shape()), torch.empty(0, dtype=value.tensor.dtype).numpy().dtype)
            for name, value in binding.inputs.items()
        }
        targets = [(value.data_ptr(), tuple(value.shape())) for value in binding.values]

        def compute() -> None:
            feeds = {name: view(address, size, kind).copy() for name, (address, size, kind) in sources.items()}
            for (address, size), result in zip(targets, self._cpu.run(names, feeds), strict=True):
                if result.shape != size:
                    raise Fail(f"output of shape {result.shape} for a binding of {size}")
                view(address, size, result.dtype)[...] = result

        self.stream.push(Work(self.provider, compute, self._ms(shape)))
        self.stream.synchronize()

    def _ms(self, shape: tuple[int, ...]) -> float:
        if len(shape) != 4:
            return 0.01
        return math.fsum(self._file.layer_ms(layer, shape) for layer in self._file.layers)


def _as_engine(data: bytes) -> EngineFile:
    """Return the graph as an engine of one profile, for its layers and times."""
    file = EngineFile(Header("", "", ({},), None, None), data)
    name = file.input_name
    shape = tuple(32 if size < 0 else size for size in file.tensors[name][2])
    shape = (1, *shape[1:]) if len(shape) == 4 else shape
    file.header.profiles[0][name] = (shape, shape, shape)
    return file


def _read(path: Any) -> bytes:
    model = onnx.load(os.fspath(path))
    return bytes(model.SerializeToString())
