"""Running engines with the simulated TensorRT: the execution context and its rules.

Failures that TensorRT documents come as False or -1 with a line in the log; what it leaves undefined is a violation.
"""

import ctypes
import threading
import time
import weakref
from typing import Any

import numpy as np

from gpu_simulator.cuda import Simulator, Work
from gpu_simulator.engine_file import EngineFile
from gpu_simulator.states import API_USAGE, Part, error

_ALIGNMENT = 256
_SIZES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT8": 1, "UINT8": 1, "FP8": 1, "INT32": 4, "INT64": 8, "BOOL": 1}
_NUMPY = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}


class ContextState(Part):
    """trt.IExecutionContext: one thread at a time, on the engine's device."""

    def __init__(self, engine: Any, config: Any, strategy: str) -> None:
        super().__init__(engine.module)
        self._engine, self._file, self.logger = engine, engine.file, engine.logger
        self._kept = engine.handle()  # the bindings keep the engine alive as long as its contexts
        self.config, self._strategy = config, strategy
        self.name = ""
        self.debug_sync = False
        self.enqueue_emits_profile = True
        self.persistent_cache_limit = 0
        self.active_optimization_profile = 0
        self.gone = False
        self.profiler: Any = None
        self._shape: tuple[int, ...] | None = None
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._memory: tuple[int, int] | None = None
        self._own: Any = None
        self._updated = False
        self._ran: Any = None
        self._fresh_profile: Any = None
        self._user = threading.Lock()
        self._configuring: int | None = None
        self._last: Any = None
        self._recorded: Any = None
        self._fallbacks: dict[tuple[int, ...], int] = {}
        self.graphs: list[Any] = []
        if strategy != "USER_MANAGED":
            self._own = self.simulator.allocate(max(1, engine.device_memory_size_v2), engine.device)
            self._memory = (self._own.address, self._own.size)

    # ------------------------------------------------------------------------------------ shapes
    def set_input_shape(self, name: str, shape: Any) -> bool:
        with self._exclusive(begins=True):
            shape = tuple(int(size) for size in shape)
            found = self._file.tensors.get(name)
            if found is None or not found[0]:
                return self._refuse("setInputShape", f"{name} is not an input")
            low, _, high = self._file.header.profiles[self.active_optimization_profile][name]
            if len(shape) != len(low) or not all(a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
                text = f"Set dimension {list(shape)} for tensor {name} does not satisfy any optimization profiles."
                return self._refuse("setInputShape", text)
            if shape != self._shape:
                self._updated = False
            self._shape = shape
            return True

    def infer_shapes(self) -> list[str]:
        with self._exclusive(begins=True):
            return [] if self._shape is not None else [self._file.input_name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        is_input, _, shape = self._file.tensors[name]
        if self._shape is None:
            return shape
        return self._shape if is_input else self._file.output_shape(name, self._shape)

    def get_tensor_strides(self, name: str) -> tuple[int, ...]:
        shape = self.get_tensor_shape(name)
        return tuple(int(np.prod(shape[index + 1 :])) for index in range(len(shape)))

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        with self._exclusive(begins=True):
            if not 0 <= index < len(self._file.header.profiles):
                self._refuse("setOptimizationProfileAsync", f"profile {index} does not exist")
                raise RuntimeError("Error in set optimization profile async.")  # by the bindings, not by TensorRT
            target = self.simulator.stream_of(int(stream))
            target.push(Work("profile switch", ms=0.01))
            self._fresh_profile = self.simulator.record(target)
            self.active_optimization_profile = index
            self._shape, self._updated, self._ran = None, False, None
            return True

    # ------------------------------------------------------------------------------------ memory
    def update_device_memory_size_for_shapes(self) -> int:
        with self._exclusive(begins=True):
            if self._shape is None:
                raise self.simulator.violation("update_device_memory_size_for_shapes before all input shapes were set")
            self._updated = True
            return self._needed()

    def _needed(self) -> int:
        if self._updated and self._file.header.resizes_activations and self._shape is not None:
            return self._file.activation_bytes(self._shape)
        return self._engine.get_device_memory_size_for_profile_v2(self.active_optimization_profile)

    def set_device_memory(self, memory: int, size: int) -> None:
        with self._exclusive(begins=True):
            self._memory = (int(memory), int(size))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        with self._exclusive(begins=True):
            if name not in self._file.tensors:
                return self._refuse("setTensorAddress", f"Given invalid tensor name: {name}.")
            self._addresses[name] = int(memory)
            return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_output_allocator(self, name: str, allocator: Any) -> bool:
        with self._exclusive(begins=True):
            found = self._file.tensors.get(name)
            if found is None or found[0]:
                return self._refuse("setOutputAllocator", f"{name} is not an output")
            self._allocators[name] = allocator
            return True

    def get_output_allocator(self, name: str) -> Any:
        return self._allocators.get(name)

    def _allocate_outputs(self, stream: Any) -> None:
        """Ask the allocators for memory and tell them the shapes."""
        for name, allocator in self._allocators.items():
            shape = self.get_tensor_shape(name)
            size = int(np.prod(shape)) * _SIZES[self._file.tensors[name][1]]
            memory = self._addresses.get(name, 0)
            self._addresses[name] = int(
                allocator.reallocate_output_async(name, memory, size, _ALIGNMENT, stream.handle)
            )
            allocator.notify_shape(name, shape)

    # ------------------------------------------------------------------------------------ debugging
    def set_all_tensors_debug_state(self, flag: bool) -> bool:
        return True  # no tensor is marked for debugging

    def set_debug_listener(self, listener: Any) -> bool:
        return True

    # ------------------------------------------------------------------------------------ running
    def execute_async_v3(self, handle: int) -> bool:
        with self._exclusive(begins=False):
            return self._execute(self.simulator.stream_of(int(handle)))

    def _execute(self, stream: Any) -> bool:
        simulator = self.simulator
        if simulator.device != self._engine.device or stream.device != self._engine.device:
            raise simulator.violation(
                f"an engine of device {self._engine.device} runs with current device {simulator.device} on a stream of "
                f"{stream.device}"
            )
        if self._shape is None:
            return self._refuse("enqueueV3", "an input shape is not set")
        self._allocate_outputs(stream)
        problem = self._memory_problem() or self._address_problem()
        if problem:
            return self._refuse("enqueueV3", problem)
        key = (self._shape, self.active_optimization_profile)
        if stream.capture is not None and self._ran != key:
            raise simulator.violation("captured before an uncaptured run with this shape")
        if stream.capture is not None:
            self._check_graph(stream.capture)
        self._ran = key
        self._enqueue(stream)
        return True

    def _check_graph(self, capture: Any) -> None:
        """NVIDIA: one context per captured graph."""
        if any(graph() is not None and graph() is not capture for graph in self.graphs):
            self.simulator.rule("one-context-per-graph", "one context serves two captured graphs")
        self.graphs.append(weakref.ref(capture))

    def _memory_problem(self) -> str | None:
        needed = self._needed()
        if needed and self._memory is None:
            return "device memory is not set"
        address, size = self._memory or (0, 0)
        if needed > size:
            return f"device memory of {size} bytes is too small, {needed} are needed"
        if address % _ALIGNMENT:
            return "device memory is not aligned to 256 bytes"
        if needed and not self.simulator.on_device(address, needed, self._engine.device):
            return "device memory is not memory of the engine's device"
        return None

    def _address_problem(self) -> str | None:
        for name, (_, kind, _) in self._file.tensors.items():
            address = self._addresses.get(name)
            if not address:
                return f"the address of {name} is not set"
            if address % _ALIGNMENT:
                raise self.simulator.violation(f"the address of {name} is not aligned to 256 bytes")
            size = int(np.prod(self.get_tensor_shape(name))) * _SIZES[kind]
            if not self.simulator.on_device(address, size, self._engine.device):
                return f"the address of {name} is not {size} bytes of GPU memory"
        return None

    def _enqueue(self, stream: Any) -> None:
        assert self._shape is not None
        shape, addresses, needed = self._shape, dict(self._addresses), self._needed()
        memory = self._memory[0] if self._memory else 0
        device, captured = self._engine.device, stream.capture is not None
        times = [(layer.name, self._file.layer_ms(layer, shape)) for layer in self._file.layers]
        context, profile = self, self._fresh_profile

        def run() -> None:
            if profile is not None and not profile.done:
                raise context.simulator.violation("work is not ordered behind the switch of its profile")
            if context.gone:
                raise context.simulator.violation("a context was freed before its work, or its graph")
            if captured and context._shape != shape:
                context.simulator.rule(
                    "one-context-per-graph", "a graph is replayed after its context got another shape"
                )
            compute(context.simulator, context._file, shape, addresses, (memory, needed), device)

        factor = self._rtx_factor(shape)
        work = Work(f"engine {self._file.header.name}", run, factor * sum(ms for _, ms in times))
        stream.push(work)
        self._last = times
        if self.profiler is not None and not captured and self.enqueue_emits_profile:
            stream.synchronize()
            self.report_to_profiler()

    def _rtx_factor(self, shape: tuple[int, ...]) -> float:
        """TensorRT-RTX: kernels of a new shape are slow fallbacks, twice under LAZY, always under NONE.

        Its own CUDA graphs are bound to shape and addresses: another run records the graph again, which is counted.
        """
        if self.config is None or not hasattr(self.config, "cuda_graph_strategy"):
            return 1.0
        key = (shape, tuple(sorted(self._addresses.items())))
        if self.config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE" and self._recorded != key:
            self.simulator.recordings += 1
            self._recorded = key
        strategy = self.config.dynamic_shapes_kernel_specialization_strategy.name
        known = self.config.cache._state.shapes if self.config.cache is not None else set[str]()
        name = f"{self._file.header.name}|{shape}"
        if name in known:
            return 1.0
        self._fallbacks[shape] = self._fallbacks.get(shape, 0) + 1
        if strategy == "EAGER" or (strategy == "LAZY" and self._fallbacks[shape] > 2):
            known.add(name)
            return 1.0
        return 3.0

    def report_to_profiler(self) -> bool:
        if self.profiler is None or self._last is None:
            return False
        for name, ms in self._last:
            self.profiler.report_layer_time(name, ms)
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return False

    @property
    def engine(self) -> Any:
        return self._kept

    # ------------------------------------------------------------------------------------ rules
    def _exclusive(self, *, begins: bool) -> "_Exclusive":
        return _Exclusive(self, begins)

    def _refuse(self, where: str, text: str) -> bool:
        error(self.logger, f"IExecutionContext::{where}", API_USAGE, text)
        return False

    def released(self) -> None:
        with self.simulator.lock:
            queued = [work.run for stream in self.simulator.all_streams() for work in stream.queue if work.run]
            if any(self in _cells(run) for run in queued):
                self.simulator.violation("a context was freed while its work was queued")
        self.gone = True
        if self._own is not None:
            self.simulator.release(self._own)
        kind = type(self.logger)
        if kind.__module__ not in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings.tensorrt_rtx"):
            self.simulator.rule(
                "python-logger",
                "a context was freed under a logger written in Python: a helper thread that logs would hang it",
            )


def _cells(function: Any) -> list[Any]:
    return [cell.cell_contents for cell in function.__closure__ or ()]


class _Exclusive:
    """Two threads may not use a context at the same time, nor between its set-up and its run."""

    def __init__(self, context: ContextState, begins: bool) -> None:
        self._context, self._begins = context, begins

    def __enter__(self) -> None:
        context, me = self._context, threading.get_ident()
        if not context._user.acquire(blocking=False):
            raise context.simulator.violation("two threads use one execution context at the same time")
        if context._configuring not in (None, me):
            context._user.release()
            raise context.simulator.violation("a thread uses an execution context that another one is setting up")
        context._configuring = me if self._begins else None
        time.sleep(0)  # let other threads come in between

    def __exit__(self, *_: object) -> None:
        self._context._user.release()


def compute(
    simulator: Simulator,
    file: EngineFile,
    shape: tuple[int, ...],
    addresses: dict[str, int],
    memory: tuple[int, int],
    device: int,
) -> None:
    """Do what the engine's kernels do: read the input, use the shared memory, write the outputs."""
    if memory[1]:
        if not simulator.on_device(memory[0], memory[1], device):
            raise simulator.violation("device memory was given back while a kernel runs")
        view(memory[0], (memory[1],), np.uint8)[:] = 0xA5
    name = file.input_name
    kind = _NUMPY[file.tensors[name][1]]
    if not simulator.on_device(addresses[name], int(np.prod(shape)) * np.dtype(kind).itemsize, device):
        raise simulator.violation("the input was given back while a kernel runs")
    results = file.run(view(addresses[name], shape, kind).copy(), frozenset(simulator.faulty))
    for output, value in results.items():
        if not simulator.on_device(addresses[output], value.nbytes, device):
            raise simulator.violation("the output was given back while a kernel runs")
        view(addresses[output], value.shape, value.dtype)[...] = value


def view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return simulated memory as an array."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_ubyte * count).from_address(address), dtype=dtype).reshape(shape)
