"""Running a TensorRT engine on CUDA tensors of PyTorch.

Every calling thread has a lane: a private stream, and for each input shape a plan. A plan has an execution context of
its own, whose shape, addresses and memory are set once: a captured CUDA graph is valid only while its context keeps
them. Contexts share the weights, and the plans of a lane share one activation buffer, as they run one after the other.

    https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html (CUDA graphs)
"""

import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
import torch.utils.dlpack
from numpy.typing import NDArray

from srdeploy.core.errors import CapabilityError, GpuMemoryError, SrdeployError, UsageError
from srdeploy.core.runner import RunnerInfo
from srdeploy.core.shapes import format_shape
from srdeploy.runtime.engines.feeds import check_feeds, check_profile, check_shape
from srdeploy.runtime.engines.gpu import find_gpu
from srdeploy.runtime.engines.sidecar import Engine
from srdeploy.runtime.engines.tensorrt.log import MEMORY_FULL, Log, runtime_log, translated
from srdeploy.runtime.engines.tensorrt.products import Product, RuntimeSettings
from srdeploy.runtime.engines.timer import timed

MAX_PLANS = 4
"""Input shapes that a lane keeps memory for; the least recently used one is freed."""
CAPTURE_AFTER = 3
"""Uses of a plan before its CUDA graph is captured: a shape that comes once is not worth it."""
_CAPTURING = threading.Lock()
"""PyTorch allows one capture at a time in a process."""
_TIMED = 3
"""Slot of the plans of `prepare`; `run` has slot 0, `run_many` slots 1 and 2."""


class TensorRtRunner:
    """Runs a TensorRT engine on one GPU; safe to call from several threads, each has contexts of its own.

    Args:
        product: TensorRT or TensorRT-RTX.
        trt: its bindings.
        engine: the verified file.
        native: runtime and engine object; the runtime must outlive the engine.
        device: "cuda:N".
        settings: what the product sets on the contexts.
        graphs: use CUDA graphs.
    """

    def __init__(
        self,
        product: Product,
        trt: Any,
        engine: Engine,
        native: tuple[Any, Any],
        device: str,
        *,
        settings: RuntimeSettings,
        graphs: bool,
    ) -> None:
        self._trt = trt
        self._engine = engine
        self._native = native
        self._device = torch.device(device)
        self._settings = settings
        self._local = threading.local()
        self._lanes: list[tuple[threading.Thread, _Lane]] = []
        self._lock = threading.Lock()
        self._cold_ms: float | None = None
        self.capture = graphs and product.captures_graphs
        self._info = _info(product, trt, engine, device)

    @property
    def info(self) -> RunnerInfo:
        """Description of this runner."""
        return self._info

    @property
    def peak_activation_bytes(self) -> int:
        """Activation memory held by all lanes now."""
        return sum(lane.activation_bytes() for _, lane in list(self._lanes))

    @property
    def cold_ms(self) -> float | None:
        """Milliseconds from the last `prepare` to its first result: context, memory, compilation of RTX kernels."""
        return self._cold_ms

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute from host arrays through pinned buffers; the result is the caller's own array."""
        check_feeds(feeds, self._engine.inputs, engine=self._info.name)
        image = next(iter(feeds.values()))
        lane = self._lane()
        plan = lane.plan(image.shape)
        plan.load(image)
        lane.execute(plan)
        plan.fetch(lane.stream).synchronize()
        return {self._engine.outputs[0].name: plan.host_output.numpy().copy()}

    def run_tensors(self, feeds: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Compute on a GPU tensor, or anything with DLPack; the result is the caller's own tensor.

        The work is ordered after what PyTorch's current stream has to do, and that stream is ordered after the work.
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
        return {self._engine.outputs[0].name: lane.execute_on(plan, image.detach())}

    def run_many(self, images: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        """Compute a stream of images, overlapping the copies of one with the computation of another.

        While the GPU computes image i, image i + 1 travels to it and image i - 1 travels back. Yields in order. `run`
        may be called in between, but no second `run_many` in the same thread.
        """
        lane = self._lane()
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
        """Place the input and return a function that computes once, in milliseconds on the GPU (see `TimedRunner`).

        RTX kernels are specialized for the shape first, and CUDA graphs are captured; `cold_ms` has the time of that.
        """
        check_feeds(feeds, self._engine.inputs, engine=self._info.name)
        lane = self._lane()
        image = next(iter(feeds.values()))
        started = time.perf_counter()
        plan = lane.plan(image.shape, slot=_TIMED, eager=True)
        plan.load(image)
        lane.execute(plan)
        lane.stream.synchronize()
        self._cold_ms = (time.perf_counter() - started) * 1000
        while self.capture and lane.capturing and plan.graph is None:
            lane.execute(plan)
        lane.stream.synchronize()
        return timed(partial(lane.execute, plan), str(self._device), stream=lane.stream)

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
            self._settings.close()
            # The engine must be freed before the runtime that made it.
            runtime, cuda_engine = self._native
            self._native = (None, None)
            del cuda_engine, runtime

    def _lane(self) -> "_Lane":
        lane = getattr(self._local, "lane", None)
        if self._native[1] is None:
            raise UsageError(f"{self._info.name} is closed", next_step="open the engine again")
        if lane is None:
            lane = self._local.lane = _Lane(
                self._trt, self._engine, self._native[1], self._device, self._settings, self.capture
            )
            with self._lock:
                for ended in [entry for entry in self._lanes if not entry[0].is_alive()]:
                    ended[1].close()  # a program with a thread per image would fill the GPU's memory
                    self._lanes.remove(ended)
                self._lanes.append((threading.current_thread(), lane))
        return lane


class _Plan:
    """Context and buffers for one input shape. All tensors are (N, C, H, W).

    Args:
        context: has the shape already.
        runtime_config: of the context; nothing says that a context does not read it later.
        shape: of the input.
        output: shape of the output.
        dtypes: of input and output.
        memory: activation memory.
    """

    def __init__(
        self,
        context: Any,
        runtime_config: Any,
        shape: tuple[int, ...],
        output: tuple[int, ...],
        dtypes: tuple[torch.dtype, ...],
        memory: torch.Tensor,
    ) -> None:
        device = memory.device
        self.context = context
        self.runtime_config = runtime_config
        self.memory = memory
        self.input = torch.empty(shape, dtype=dtypes[0], device=device)
        self.output = torch.empty(output, dtype=dtypes[1], device=device)
        self.host_input = torch.empty(shape, dtype=dtypes[0], device="cpu", pin_memory=True)
        self.host_output = torch.empty(output, dtype=dtypes[1], device="cpu", pin_memory=True)
        self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.loaded: torch.cuda.Event | None = None
        self.computed: torch.cuda.Event | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.uses = 0

    def load(self, image: NDArray[Any]) -> None:
        """Start the copy of a host array to the GPU on the copy stream."""
        self.copies.synchronize()  # the pinned buffers, and the output, are in use until their last copies have ended
        if self.computed is not None:  # and the buffer on the GPU until its last computation has ended
            self.copies.wait_event(self.computed)
        self.host_input.numpy()[...] = image
        with torch.cuda.stream(self.copies):
            self.input.copy_(self.host_input, non_blocking=True)
            self.loaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.loaded.record(self.copies)

    def fetch(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Start the copy of the output to the host after the computation; the event marks its end."""
        self.copies.wait_stream(stream)
        with torch.cuda.stream(self.copies):
            self.host_output.copy_(self.output, non_blocking=True)
            fetched = torch.cuda.Event()  # type: ignore[no-untyped-call]
            fetched.record(self.copies)
        return fetched

    def close(self) -> None:
        """Free the graph before the context whose kernels it holds."""
        self.copies.synchronize()
        self.graph = None
        self.context = None


class _Lane:
    """One thread's stream, plans and activation memory."""

    def __init__(
        self,
        trt: Any,
        engine: Engine,
        cuda_engine: Any,
        device: torch.device,
        settings: RuntimeSettings,
        capturing: bool,
    ) -> None:
        self._trt = trt
        self._engine = engine
        self._cuda_engine = cuda_engine
        self._device = device
        self._settings = settings
        self._dtypes = tuple(getattr(torch, spec.dtype) for spec in (engine.inputs[0], engine.outputs[0]))
        self._memory: torch.Tensor | None = None
        self.capturing = capturing
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()

    def activation_bytes(self) -> int:
        """Return the size of all activation buffers; plans share them."""
        plans = list(self.plans.values())  # the lane's own thread may add one
        return sum({plan.memory.data_ptr(): plan.memory.numel() for plan in plans}.values())

    def plan(self, shape: tuple[int, ...], *, slot: int = 0, eager: bool = False) -> _Plan:
        """Return the plan of an input shape, created at its first use.

        Args:
            shape: of the input.
            slot: distinguishes plans of the same shape.
            eager: compile RTX kernels before the first run.

        Raises:
            UsageError: no profile takes the shape.
            CapabilityError: not enough GPU memory.
        """
        key = (slot, *shape)
        found = self.plans.get(key)
        if found is None:
            while len(self.plans) >= MAX_PLANS:
                self._evict()
            # Buffers made while the caller's inference mode is on could not be written to once it is off.
            with torch.cuda.device(self._device), torch.inference_mode(False):
                try:
                    found = self._new_plan(shape, eager)
                except GpuMemoryError:
                    self.release()  # plans of other shapes, and what PyTorch keeps for reuse
                    found = self._new_plan(shape, eager)
                self.plans[key] = found
                # PyTorch hands out memory that work of the caller's stream may still be using.
                self.stream.wait_stream(torch.cuda.current_stream(self._device))
                found.copies.wait_stream(self.stream)
        self.plans.move_to_end(key)
        return found

    def execute(self, plan: _Plan) -> None:
        """Enqueue one inference from the plan's input to its output on the private stream."""
        with torch.cuda.device(self._device):
            if plan.loaded is not None:
                self.stream.wait_event(plan.loaded)
                plan.loaded = None
            self._compute(plan)
            plan.computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            plan.computed.record(self.stream)

    def execute_on(self, plan: _Plan, image: torch.Tensor) -> torch.Tensor:
        """Enqueue one inference on a tensor of the caller and return a tensor of the caller's stream."""
        with torch.cuda.device(self._device):
            caller = torch.cuda.current_stream(self._device)
            try:
                result = torch.empty_like(plan.output)
            except torch.cuda.OutOfMemoryError as error:
                raise self._out_of_memory(tuple(plan.input.shape)) from error
            self.stream.wait_stream(caller)
            image.record_stream(self.stream)
            with torch.cuda.stream(self.stream):
                plan.input.copy_(image, non_blocking=True)
            self.execute(plan)
            with torch.cuda.stream(self.stream):
                result.copy_(plan.output, non_blocking=True)
            caller.wait_stream(self.stream)
        return result

    def release(self) -> None:
        """Wait for the stream, free all plans, and return the memory to the GPU."""
        while self.plans:
            self._evict()
        self._memory = None
        torch.cuda.empty_cache()

    def close(self) -> None:
        """Free everything."""
        self.release()
        self._cuda_engine = None

    def _evict(self) -> None:
        self.stream.synchronize()
        _, oldest = self.plans.popitem(last=False)
        oldest.close()

    def _compute(self, plan: _Plan) -> None:
        if plan.graph is not None:
            with torch.cuda.stream(self.stream):
                plan.graph.replay()
            return
        plan.uses += 1
        if plan.uses == 1:  # errors that can be foreseen appear here, with TensorRT's reason
            with runtime_log(self._trt) as (_, log):
                enqueued = plan.context.execute_async_v3(self.stream.cuda_stream)
            if not enqueued:
                cause, step = translated(log)
                if cause == MEMORY_FULL:
                    raise self._out_of_memory(tuple(plan.input.shape))
                raise CapabilityError(f"{self._engine.path} could not be run: {cause}", next_step=step)
            return
        self._enqueue(plan)
        if self.capturing and plan.uses >= CAPTURE_AFTER:
            self._capture(plan)

    def _enqueue(self, plan: _Plan) -> None:
        if not plan.context.execute_async_v3(self.stream.cuda_stream):
            raise CapabilityError(f"{self._engine.path} could not be run: TensorRT refused to enqueue it")

    def _capture(self, plan: _Plan) -> None:
        """Record the plan, which has run uncaptured, as a CUDA graph.

        `torch.cuda.graph` would first empty PyTorch's memory caches for the whole program; nothing is allocated here.
        """
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with _CAPTURING, torch.cuda.stream(self.stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._enqueue(plan)
                finally:
                    graph.capture_end()
        except (RuntimeError, SrdeployError) as error:
            # The result is the same without a graph: a warning, not an error.
            warnings.warn(f"{self._engine.path} runs without CUDA graphs: {error}", RuntimeWarning, stacklevel=2)
            self.capturing = False
            return
        plan.graph = graph

    def _new_plan(self, shape: tuple[int, ...], eager: bool) -> _Plan:
        profile = check_profile(shape, self._engine.profiles, engine=str(self._engine.path))
        log = Log()
        try:
            with runtime_log(self._trt) as (_, log):
                return self._allocated(shape, *self._context(shape, profile, eager))
        except torch.cuda.OutOfMemoryError as error:
            raise self._out_of_memory(shape) from error
        except _RefusedError as error:
            cause, step = translated(log)
            if cause == MEMORY_FULL:
                raise self._out_of_memory(shape) from error
            raise CapabilityError(f"{self._engine.path} {error}: {cause}", next_step=step) from error

    def _out_of_memory(self, shape: tuple[int, ...]) -> GpuMemoryError:
        return GpuMemoryError(f"{self._engine.path} cannot run an input of {format_shape(shape)}")

    def _context(self, shape: tuple[int, ...], profile: int, eager: bool) -> tuple[Any, Any]:
        """Return a context with profile and shape set, and its runtime configuration."""
        runtime_config = self._cuda_engine.create_runtime_config()
        if runtime_config is None:
            raise _RefusedError("has no runtime configuration")
        # Activation memory by the real shape; the other strategies take the largest of all profiles.
        runtime_config.set_execution_context_allocation_strategy(
            self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self._settings.configure(runtime_config, eager=eager)
        context = self._cuda_engine.create_execution_context(runtime_config)
        if context is None:
            raise _RefusedError("has no execution context")
        if profile:
            try:
                context.set_optimization_profile_async(profile, self.stream.cuda_stream)
            except RuntimeError as error:
                raise _RefusedError(f"refuses its profile {profile}") from error
        if not context.set_input_shape(self._engine.inputs[0].name, shape):
            raise _RefusedError(f"refuses input shape {format_shape(shape)}")
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:
            raise _RefusedError(f"cannot infer shapes for input {format_shape(shape)} ({error})") from error
        if missing:
            raise _RefusedError(f"cannot infer shapes without {list(missing)}")
        return context, runtime_config

    def _allocated(self, shape: tuple[int, ...], context: Any, runtime_config: Any) -> _Plan:
        """Return a plan whose context has its memory and addresses."""
        memory = self._activations(int(context.update_device_memory_size_for_shapes()))
        output = tuple(context.get_tensor_shape(self._engine.outputs[0].name))
        plan = _Plan(context, runtime_config, shape, output, self._dtypes, memory)
        context.set_device_memory(memory.data_ptr(), memory.numel())
        for name, tensor in ((self._engine.inputs[0].name, plan.input), (self._engine.outputs[0].name, plan.output)):
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise _RefusedError(f"refuses a buffer for {name!r}")
        return plan

    def _activations(self, needed: int) -> torch.Tensor:
        """Return the lane's activation buffer, or a larger one; plans keep the buffer that they were made with.

        PyTorch's allocator aligns to 512 bytes; TensorRT needs 256.
        """
        if self._memory is None or self._memory.numel() < needed:
            self._memory = torch.empty(max(needed, 1), dtype=torch.uint8, device=self._device)
        return self._memory


class _RefusedError(Exception):
    """TensorRT returned None or False; the text is the end of a sentence about the engine."""


def _info(product: Product, trt: Any, engine: Engine, device: str) -> RunnerInfo:
    found = find_gpu(device)
    tf32 = "TF32 on" if engine.built.get("tf32") else "TF32 off"
    return RunnerInfo(
        name=f"{product.name} {engine.contract.precision.value}",
        engine=product.name,
        device=device,
        contract=engine.contract,
        numeric_mode=f"{engine.precision_built.upper()}, {tf32}",
        profiles=engine.profiles,
        versions={**product.versions(), product.name: trt.__version__, "gpu": found.name if found else "none"},
        built=engine.built,
    )
