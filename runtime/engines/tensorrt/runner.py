"""Running a TensorRT engine on torch CUDA tensors with nothing wasted.

Every calling thread has a lane of its own: an execution context, a private stream, and for each input shape a plan with
activation memory of just the size that shape needs, a preallocated output, and pinned host buffers. Contexts share the
weights. On full TensorRT a plan is captured as a CUDA graph once it has run; TensorRT-RTX captures by itself.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
import torch.utils.dlpack
from numpy.typing import NDArray

from srdeploy.core.errors import CapabilityError, UsageError
from srdeploy.core.runner import RunnerInfo
from srdeploy.core.shapes import format_shape
from srdeploy.core.sizes import format_bytes
from srdeploy.runtime.engines.feeds import check_feeds, check_profile, check_shape
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.families import Flavour, gpu
from srdeploy.runtime.engines.tensorrt.log import last_problem

MAX_PLANS = 4
"""Input shapes that a lane keeps memory for; the least recently used one is given back."""
_CAPTURING = threading.Lock()
"""PyTorch allows one capture at a time in a process: it waits for the whole device before it begins one."""


class TensorRtRunner:
    """Runs a TensorRT engine on one GPU; safe to call from several threads, each gets a context of its own.

    Args:
        flavour: which TensorRT.
        trt: its bindings.
        engine: the verified file.
        native: runtime and engine object; the runtime must outlive the engine.
        device: "cuda:N".
        configure: sets on a runtime configuration what only this flavour has.
        capture: capture CUDA graphs here.
        on_close: called once when the runner is closed.
    """

    def __init__(
        self,
        flavour: Flavour,
        trt: Any,
        engine: Engine,
        native: tuple[Any, Any],
        device: str,
        *,
        configure: Callable[[Any], None],
        capture: bool,
        on_close: Callable[[], None],
    ) -> None:
        self._trt = trt
        self._engine = engine
        self._native = native
        self._device = torch.device(device)
        self._configure = configure
        self._on_close = on_close
        self._local = threading.local()
        self._lanes: list[tuple[threading.Thread, _Lane]] = []
        self._lock = threading.Lock()
        self.capture = capture
        self._info = _info(flavour, trt, engine, device)

    @property
    def info(self) -> RunnerInfo:
        """What is behind this runner."""
        return self._info

    @property
    def peak_activation_bytes(self) -> int:
        """Activation memory held by all lanes now."""
        return sum(plan.memory.numel() for _, lane in list(self._lanes) for plan in lane.plans.values())

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute from host arrays through pinned buffers; the result is the caller's own array."""
        check_feeds(feeds, self._engine.inputs, engine=self._info.name)
        image = next(iter(feeds.values()))
        lane = self._lane()
        lane.wait_for_caller()
        plan = lane.plan(image.shape)
        plan.load(image)
        lane.execute(plan)
        plan.fetch(lane.stream).synchronize()
        return {self._engine.outputs[0].name: plan.host_output.numpy().copy()}

    def run_tensors(self, feeds: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Compute on GPU tensors, or anything with DLPack, without a copy where no CUDA graph fixes the addresses.

        The result is the plan's own buffer: it holds until this thread runs the same shape again. The work is ordered
        behind what PyTorch's current stream has to do, and that stream is ordered behind the work.
        """
        spec = self._engine.inputs[0]
        value = feeds.get(spec.name)
        if value is None or len(feeds) != 1:
            raise UsageError(f"{self._info.name} got inputs {sorted(feeds)}", expected=str(spec))
        image = value if isinstance(value, torch.Tensor) else torch.utils.dlpack.from_dlpack(value)
        if image.device != self._device or str(image.dtype) != f"torch.{spec.dtype}":
            raise UsageError(
                f"input {spec.name!r} is {image.dtype} on {image.device}", expected=f"{spec.dtype} on {self._device}"
            )
        check_shape(tuple(image.shape), spec, engine=self._info.name)
        lane = self._lane()
        plan = lane.plan(tuple(image.shape))
        image = image.detach().contiguous()  # a copy is work of the caller's stream: the private stream waits for it
        lane.wait_for_caller()
        image.record_stream(lane.stream)
        lane.execute(plan, image)
        torch.cuda.current_stream(self._device).wait_stream(lane.stream)
        return {self._engine.outputs[0].name: plan.output}

    def run_many(self, images: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        """Compute a stream of images, overlapping the copies of one with the computation of another.

        While the GPU computes image i, image i + 1 travels to it and image i - 1 travels back. Yields in order. `run`
        may be called in between, another `run_many` of the same thread not.
        """
        lane = self._lane()
        lane.wait_for_caller()
        waiting: tuple[_Plan, torch.cuda.Event] | None = None
        for turn, image in enumerate(images):
            check_feeds({self._engine.inputs[0].name: image}, self._engine.inputs, engine=self._info.name)
            plan = lane.plan(image.shape, slot=1 + turn % 2)
            plan.load(image)
            lane.execute(plan)
            done = plan.fetch(lane.stream)
            if waiting is not None:
                waiting[1].synchronize()
                yield waiting[0].host_output.numpy().copy()
            waiting = (plan, done)
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0].host_output.numpy().copy()

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Place the input and return a function that computes once, in milliseconds on the GPU (see `TimedRunner`)."""
        check_feeds(feeds, self._engine.inputs, engine=self._info.name)
        lane = self._lane()
        image = next(iter(feeds.values()))
        plan = lane.plan(image.shape)
        plan.load(image)
        lane.execute(plan)
        lane.stream.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

        def compute() -> float:
            start.record(lane.stream)
            lane.execute(plan)
            end.record(lane.stream)
            end.synchronize()
            return float(start.elapsed_time(end))

        return compute

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._native[1] is None:
                return
            for _, lane in self._lanes:
                lane.close()
            self._lanes.clear()
            self._local = threading.local()
            self._on_close()
            # The engine goes before the runtime that made it.
            runtime, cuda_engine = self._native
            self._native = (None, None)
            del cuda_engine, runtime

    def _lane(self) -> "_Lane":
        lane = getattr(self._local, "lane", None)
        if self._native[1] is None:
            raise UsageError(f"{self._info.name} is closed", next_step="open the engine again")
        if lane is None:
            with torch.cuda.device(self._device):
                lane = self._local.lane = _Lane(
                    self._trt, self._engine, self._native[1], self._device, self._configure, self.capture
                )
            with self._lock:
                for ended in [entry for entry in self._lanes if not entry[0].is_alive()]:
                    ended[1].close()  # a program with a thread per picture would fill the GPU's memory
                    self._lanes.remove(ended)
                self._lanes.append((threading.current_thread(), lane))
        return lane


class _Plan:
    """Buffers for one input shape. All tensors are (N, C, H, W)."""

    def __init__(self, shape: tuple[int, ...], output: tuple[int, ...], dtypes: Any, memory: int, device: Any) -> None:
        self.shape = shape
        self.input = torch.empty(shape, dtype=dtypes[0], device=device)
        self.output = torch.empty(output, dtype=dtypes[1], device=device)
        # PyTorch's allocator aligns to 512 bytes; TensorRT wants 256.
        self.memory = torch.empty(max(memory, 1), dtype=torch.uint8, device=device)
        self.host_input = torch.empty(shape, dtype=dtypes[0], device="cpu", pin_memory=True)
        self.host_output = torch.empty(output, dtype=dtypes[1], device="cpu", pin_memory=True)
        self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.loaded: torch.cuda.Event | None = None
        self.computed: torch.cuda.Event | None = None
        self.fetched: torch.cuda.Event | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, image: NDArray[Any]) -> None:
        """Start the copy of a host array to the GPU on the copy stream."""
        self.copies.synchronize()  # the pinned buffer is still read until its last copy has ended
        if self.computed is not None:  # and the buffer on the GPU until its last computation has
            self.copies.wait_event(self.computed)
        self.host_input.numpy()[...] = image
        with torch.cuda.stream(self.copies):
            self.input.copy_(self.host_input, non_blocking=True)
            self.loaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.loaded.record(self.copies)

    def fetch(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Start the copy of the output to the host behind the computation; the event marks its end."""
        self.copies.wait_stream(stream)
        with torch.cuda.stream(self.copies):
            self.host_output.copy_(self.output, non_blocking=True)
            self.fetched = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.fetched.record(self.copies)
        return self.fetched


class _Lane:
    """One thread's context, stream and plans."""

    def __init__(
        self, trt: Any, engine: Engine, cuda_engine: Any, device: Any, configure: Callable[[Any], None], capture: bool
    ) -> None:
        self._engine = engine
        self._capture = capture
        self._device = device
        self._trt = trt
        self._dtypes = tuple(getattr(torch, spec.dtype) for spec in (engine.inputs[0], engine.outputs[0]))
        runtime_config = cuda_engine.create_runtime_config()
        if runtime_config is None:
            raise CapabilityError(f"no runtime configuration for {engine.path}: {last_problem(trt)}")
        # Activation memory by the real shape; the other strategies take the largest of all profiles.
        runtime_config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        configure(runtime_config)
        context = cuda_engine.create_execution_context(runtime_config)
        if context is None:
            raise CapabilityError(
                f"no execution context for {engine.path}: {last_problem(trt)}",
                next_step="most often the GPU's memory is full: close other programs on the GPU",
            )
        self.context = context
        self._runtime_config = runtime_config  # nothing says that a context does not look at it again
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()
        self._active: _Plan | None = None
        self._profile = 0

    def wait_for_caller(self) -> None:
        """Order the private stream behind the caller's, which may still read what the next computation writes over."""
        self.stream.wait_stream(torch.cuda.current_stream(self._device))

    def plan(self, shape: tuple[int, ...], *, slot: int = 0) -> _Plan:
        """Return the plan of an input shape, made at its first use; `slot` keeps two of the same shape apart."""
        key = (slot, *shape)
        found = self.plans.get(key)
        if found is None:
            while len(self.plans) >= MAX_PLANS:
                self.stream.synchronize()
                _, oldest = self.plans.popitem(last=False)
                oldest.copies.synchronize()
            # Buffers made while the caller's inference mode is on could not be written to once it is off.
            with torch.cuda.device(self._device), torch.inference_mode(False):
                found = self.plans[key] = self._new_plan(shape)
                # PyTorch hands out memory that work of the caller's stream may still be using.
                self.wait_for_caller()
                found.copies.wait_stream(self.stream)
        self.plans.move_to_end(key)
        return found

    def execute(self, plan: _Plan, image: torch.Tensor | None = None) -> None:
        """Enqueue one inference on the private stream.

        Args:
            plan: of the input's shape.
            image: the input on the GPU; None reads the plan's own input buffer.
        """
        with torch.cuda.device(self._device):
            self._execute(plan, image)
            plan.computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            plan.computed.record(self.stream)

    def _execute(self, plan: _Plan, image: torch.Tensor | None) -> None:
        if plan.loaded is not None:
            self.stream.wait_event(plan.loaded)
            plan.loaded = None
        if plan.fetched is not None:  # this computation must not write over an output that still travels
            self.stream.wait_event(plan.fetched)
            plan.fetched = None
        if plan.graph is not None:
            with torch.cuda.stream(self.stream):
                if image is not None:
                    plan.input.copy_(image, non_blocking=True)
                plan.graph.replay()
            return
        self._activate(plan, plan.input if image is None else image)
        self._enqueue()
        if self._capture:
            self._capture_graph(plan)

    def close(self) -> None:
        """Wait for the stream and give everything back."""
        self.stream.synchronize()
        for plan in self.plans.values():
            plan.copies.synchronize()
        self.plans.clear()  # graphs go before the context whose kernels they hold
        self._active = None
        self.context = None
        self._runtime_config = None

    def _new_plan(self, shape: tuple[int, ...]) -> _Plan:
        self._set_shape(shape)
        needed = self.context.update_device_memory_size_for_shapes()
        output = tuple(self.context.get_tensor_shape(self._engine.outputs[0].name))
        try:
            return _Plan(shape, output, self._dtypes, needed, self._device)
        except torch.cuda.OutOfMemoryError as error:
            raise CapabilityError(
                f"the GPU's memory does not suffice for an input of {format_shape(shape)}"
                f" ({format_bytes(needed)} of activations)",
                next_step="tile the image (srdeploy upscale does), or free GPU memory",
            ) from error

    def _set_shape(self, shape: tuple[int, ...]) -> None:
        index = check_profile(shape, self._engine.profiles, engine=str(self._engine.path))
        name = self._engine.inputs[0].name
        self._active = None
        if index != self._profile:
            if not self.context.set_optimization_profile_async(index, self.stream.cuda_stream):
                raise CapabilityError(f"{self._engine.path} refuses its profile {index}: {last_problem(self._trt)}")
            self._profile = index
        if not self.context.set_input_shape(name, shape):
            raise UsageError(f"{self._engine.path} refuses input shape {format_shape(shape)}")
        try:
            missing = self.context.infer_shapes()
        except RuntimeError as error:
            raise UsageError(f"{self._engine.path} cannot take input shape {format_shape(shape)}: {error}") from error
        if missing:
            raise UsageError(f"{self._engine.path} cannot infer its shapes", expected=f"inputs {list(missing)}")

    def _activate(self, plan: _Plan, image: torch.Tensor) -> None:
        """Point the context at a plan's shape, memory and buffers."""
        if self._active is not plan:
            self._set_shape(plan.shape)
            self.context.update_device_memory_size_for_shapes()
            self.context.set_device_memory(plan.memory.data_ptr(), plan.memory.numel())
            self._address(self._engine.outputs[0].name, plan.output)
            self._active = plan
        self._address(self._engine.inputs[0].name, image)

    def _address(self, name: str, tensor: torch.Tensor) -> None:
        if not self.context.set_tensor_address(name, tensor.data_ptr()):
            raise UsageError(f"{self._engine.path} refuses a buffer for {name!r}")

    def _enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise CapabilityError(f"{self._engine.path} could not be run: {last_problem(self._trt)}")

    def _capture_graph(self, plan: _Plan) -> None:
        """Record the plan, which has just run once, as a CUDA graph for this shape and these buffers."""
        self._activate(plan, plan.input)
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer block gives the caller's stream back also where PyTorch's own leaves it, after a failed capture.
            with (
                _CAPTURING,
                torch.cuda.stream(self.stream),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                self._enqueue()
        except (RuntimeError, CapabilityError) as error:
            # The result is the same without, so this is a line to read and not an end.
            warnings.warn(f"{self._engine.path} runs without CUDA graphs: {error}", RuntimeWarning, stacklevel=2)
            self._capture = False
            return
        plan.graph = graph


def _info(flavour: Flavour, trt: Any, engine: Engine, device: str) -> RunnerInfo:
    found = gpu(device)
    tf32 = "TF32 on" if engine.built.get("tf32") else "TF32 off"
    precision = engine.precision_built
    return RunnerInfo(
        name=f"{flavour.name} {engine.contract.precision.value}",
        engine=flavour.name,
        device=device,
        contract=engine.contract,
        numeric_mode=f"{precision.upper()}, {tf32}",
        profile=engine.profiles[-1],
        versions={**flavour.versions(), flavour.name: trt.__version__, "gpu": found[0] if found else "none"},
        built=engine.built,
    )
