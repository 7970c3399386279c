"""ONNX Runtime on NVIDIA GPUs, through its CUDA or its TensorRT provider, without a fallback that nobody asked for.

ONNX Runtime answers a provider that cannot load with a warning and a CPU session. So the fallback is switched off, the
CPU provider is not offered, and after opening every node's place is checked.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.utils.dlpack
from numpy.typing import NDArray

from srdeploy.core.environment import package_versions
from srdeploy.core.errors import CapabilityError, UsageError
from srdeploy.core.extras import import_extra, is_installed
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.runner import RunnerInfo
from srdeploy.runtime.engines.feeds import check_feeds, check_shape
from srdeploy.runtime.engines.tensorrt.families import gpu, why_no_gpu

PROVIDERS = {"onnxruntime-cuda": "CUDAExecutionProvider", "onnxruntime-tensorrt": "TensorrtExecutionProvider"}


def why_not_on(engine: str) -> str | None:
    """Say why a provider cannot run here; None when it can."""
    if not is_installed("onnxruntime"):
        return "onnxruntime-gpu is not installed; install it with: pip install 'srdeploy[cuda]'"
    import onnxruntime

    provider = PROVIDERS[engine]
    if provider not in onnxruntime.get_available_providers():
        return (
            f"this onnxruntime {onnxruntime.__version__} has no {provider};"
            " install it with: pip uninstall onnxruntime && pip install 'srdeploy[cuda]'"
        )
    return why_no_gpu()


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return package_versions(["onnxruntime-gpu", "onnxruntime"])


def open_gpu(
    graph: GraphFile,
    *,
    engine: str,
    threads: int | None,
    parity: bool,
    outputs: Sequence[str] | None,
    device: str = "cuda:0",
) -> "OnnxRuntimeGpuRunner":
    """Open an ONNX file on a GPU.

    Args:
        graph: the file.
        engine: "onnxruntime-cuda" or "onnxruntime-tensorrt".
        threads: must be None: the work is on the GPU.
        parity: no TF32 in FP32 layers; on the CUDA provider it is off in any case.
        outputs: tensors to return instead of the graph's outputs; inner ones are allowed.
        device: "cuda:N".

    Raises:
        CapabilityError: provider or GPU missing, or a part of the graph would run on the CPU.
    """
    if threads is not None:
        raise UsageError(f"--threads was given for {engine}, which runs on the GPU", next_step="leave it out")
    reason = why_not_on(engine)
    if reason:
        raise CapabilityError(f"{engine} cannot run here: {reason}")
    gpu(device)  # refuses a number that no GPU has
    runtime = import_extra("onnxruntime", "cuda")
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    session = strict_session(runtime, graph, engine, stream.cuda_stream, device, outputs)
    return OnnxRuntimeGpuRunner(runtime, session, graph, engine, device, stream, outputs)


def strict_session(
    runtime: Any, graph: GraphFile, engine: str, stream: int, device: str, outputs: Sequence[str] | None
) -> Any:
    """Open a session whose every node runs on the provider that was asked for.

    Raises:
        CapabilityError: the provider did not load, or took only a part of the graph.
    """
    provider = PROVIDERS[engine]
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = runtime.InferenceSession(
            graph.serialized(extra_outputs=tuple(outputs or ())),
            options,
            providers=[(provider, _provider_options(engine, stream, device))],
        )
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise CapabilityError(f"{provider} cannot run {graph.path}: {first}") from error
    session.disable_fallback()
    places = {assignment.ep_name for assignment in session.get_provider_graph_assignment_info()}
    if session.get_providers()[0] != provider or places != {provider}:
        raise CapabilityError(
            f"ONNX Runtime put {graph.path} on {', '.join(sorted(places)) or session.get_providers()[0]}",
            expected=f"all of it on {provider}",
        )
    return session


def _provider_options(engine: str, stream: int, device: str) -> dict[str, str]:
    common = {"device_id": str(torch.device(device).index or 0), "user_compute_stream": str(stream)}
    if engine == "onnxruntime-tensorrt":
        # Precision is the graph's own: no FP16 or INT8 flag is set.
        return common
    # An exhaustive search runs again for every new shape; the heuristic one costs nothing and is as quick in the end.
    return {**common, "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0", "cudnn_conv_use_max_workspace": "1"}


class OnnxRuntimeGpuRunner:
    """Runs an ONNX Runtime session on a GPU with inputs and outputs bound to GPU memory."""

    def __init__(
        self,
        runtime: Any,
        session: Any,
        graph: GraphFile,
        engine: str,
        device: str,
        stream: torch.cuda.Stream,
        outputs: Sequence[str] | None,
    ) -> None:
        self._runtime = runtime
        self._session = session
        self._graph = graph
        self._device = torch.device(device)
        self._stream = stream
        self._lock = threading.Lock()
        self._outputs = list(outputs) if outputs is not None else [value.name for value in session.get_outputs()]
        found = gpu(device)
        precision = graph.contract.precision.value
        self._info = RunnerInfo(
            name=f"{engine} {precision}",
            engine=engine,
            device=device,
            contract=graph.contract,
            numeric_mode=f"{precision.upper()}, " + ("TF32 off" if engine == "onnxruntime-cuda" else "TensorRT's TF32"),
            versions={**versions(), "gpu": found[0] if found else "none"},
            built={"read_from": "the graph", "convolutions": graph.layers_by_type()},
        )

    @property
    def info(self) -> RunnerInfo:
        """What is behind this runner."""
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute from host arrays (see `srdeploy.core.runner.Runner`)."""
        check_feeds(feeds, self._graph.inputs, engine=self._info.name)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}
        moved = {name: tensor.pin_memory().to(self._device, non_blocking=True) for name, tensor in tensors.items()}
        return {name: value.cpu().numpy() for name, value in self.run_tensors(moved).items()}

    def run_tensors(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute on GPU tensors; inputs are bound where they lie, outputs come as new tensors."""
        spec = self._graph.inputs[0]
        image = feeds.get(spec.name)
        if image is None or len(feeds) != 1:
            raise UsageError(f"{self._info.name} got inputs {sorted(feeds)}", expected=str(spec))
        if image.device != self._device or str(image.dtype) != f"torch.{spec.dtype}":
            raise UsageError(
                f"input {spec.name!r} is {image.dtype} on {image.device}", expected=f"{spec.dtype} on {self._device}"
            )
        check_shape(tuple(image.shape), spec, engine=self._info.name)
        image = image.contiguous()
        current = torch.cuda.current_stream(self._device)
        with self._lock:
            binding = self._session.io_binding()
            binding.bind_ortvalue_input(spec.name, self._runtime.OrtValue.from_dlpack(image))
            for output in self._outputs:
                binding.bind_output(output, "cuda", self._device.index or 0)
            self._stream.wait_stream(current)
            self._session.run_with_iobinding(binding)
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

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Bind GPU memory and return a function that computes once, in milliseconds (see `TimedRunner`)."""
        check_feeds(feeds, self._graph.inputs, engine=self._info.name)
        inputs = {name: torch.from_numpy(np.ascontiguousarray(value)).to(self._device) for name, value in feeds.items()}
        outputs = self.run_tensors(inputs)
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_ortvalue_input(name, self._runtime.OrtValue.from_dlpack(tensor))
        for name, tensor in outputs.items():
            binding.bind_ortvalue_output(name, self._runtime.OrtValue.from_dlpack(tensor))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._device)

        def compute(_held: object = (inputs, outputs)) -> float:
            start.record(self._stream)
            self._session.run_with_iobinding(binding)
            end.record(self._stream)
            end.synchronize()
            return float(start.elapsed_time(end))

        return compute

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None
        torch.cuda.empty_cache()
