"""`torch.cuda` on simulated GPUs.

A tensor "on the GPU" is a CPU tensor of the class `CudaTensor` in memory of a simulated device; its device follows from
its address. Copies, clones and fills are work of the current stream. All other operations wait for what is queued on
the current stream and compute at once, which is an order that CUDA allows. Memory comes from a model of PyTorch's
caching allocator: a freed block serves its own stream at once, and another stream only after `record_stream` says so.

`install` replaces the names that it needs in `torch`, and `uninstall` restores them.
"""

import contextlib
import ctypes
import threading
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._device
import torch.utils.dlpack
from torch.utils._pytree import tree_map_only

from gpu_simulator.cuda import (
    ALIGNMENT,
    Allocation,
    Capture,
    CudaError,
    Marker,
    SimulatedOutOfMemoryError,
    Simulator,
    Stream,
    Work,
)

_PLAIN = torch._C.DisableTorchFunctionSubclass
_LOCAL = threading.local()
_PER_BYTE_MS = 1e-8
_METADATA = frozenset(
    "__get__ __set__ __hash__ __len__ __repr__ __format__ __str__ size dim ndimension numel nelement stride data_ptr"  # noqa: SIM905
    " storage_offset element_size is_contiguous is_complex is_floating_point is_signed is_inference requires_grad_"
    " untyped_storage detach as_subclass get_device".split()
)
_FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "arange", "tensor", "as_tensor",
              "empty_like", "zeros_like", "ones_like")  # fmt: skip

torch.utils._device._device_constructors()  # remembers the real factories, for `with torch.device("meta")`

machine: Simulator = Simulator(())
"""The devices; replaced by `install`."""


# --------------------------------------------------------------------------------------------------- devices
def _index(device: Any = None) -> int:
    """Return the number of a device; None and "cuda" are the current one."""
    if device is None:
        return machine.device
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return machine.device if device.index is None else int(device.index)


def _known(device: Any = None) -> int:
    index = _index(device)
    if not 0 <= index < len(machine.gpus):
        raise CudaError("invalid device ordinal")
    return index


class DeviceGuard:
    """torch.cuda.device."""

    def __init__(self, device: Any) -> None:
        self.idx = -1 if device is None else _index(device)

    def __enter__(self) -> None:
        self._before = machine.device
        if self.idx >= 0:
            machine.device = self.idx

    def __exit__(self, *_: object) -> None:
        machine.device = self._before


def _properties(device: Any = None) -> Any:
    index = _index(device)
    if not 0 <= index < len(machine.gpus):
        raise AssertionError("Invalid device id")
    gpu = machine.gpus[index]
    return SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory_bytes,
        multi_processor_count=gpu.multiprocessors,
        uuid=f"simulated-{index}",
        L2_cache_size=32 * 2**20,
    )


# --------------------------------------------------------------------------------------------------- streams, events
class CudaStream:
    """torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, **known: Any) -> None:
        self.native: Stream = known.get("native") or machine.new_stream(_known(device))
        self.priority = priority

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.native.device)

    @property
    def device_index(self) -> int:
        return self.native.device

    @property
    def cuda_stream(self) -> int:
        return self.native.handle

    def synchronize(self) -> None:
        self.native.synchronize()

    def query(self) -> bool:
        return machine.poll(machine.record(self.native)) if self.native.queue else True

    def wait_event(self, event: "CudaEvent") -> None:
        event.wait(self)

    def wait_stream(self, stream: "CudaStream") -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: "CudaEvent | None" = None) -> "CudaEvent":
        event = event or CudaEvent()
        event.record(self)
        return event

    def __enter__(self) -> "CudaStream":
        _LOCAL.entered = [*getattr(_LOCAL, "entered", []), StreamContext(self)]
        _LOCAL.entered[-1].__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        _LOCAL.entered.pop().__exit__()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CudaStream) and self.native is other.native

    def __hash__(self) -> int:
        return hash(id(self.native))


def _default_stream(device: Any = None) -> CudaStream:
    return CudaStream(native=machine.default_stream(_known(device)))


def _current_stream(device: Any = None) -> CudaStream:
    index = _known(device)
    return getattr(_LOCAL, "streams", {}).get(index) or _default_stream(index)


class StreamContext:
    """torch.cuda.StreamContext: makes a stream and its device the current ones."""

    def __init__(self, stream: CudaStream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is None:
            return
        if not hasattr(_LOCAL, "streams"):
            _LOCAL.streams = {}
        index = self.stream.native.device
        self._before = machine.device, _LOCAL.streams.get(index)
        machine.device = index
        _LOCAL.streams[index] = self.stream

    def __exit__(self, *_: object) -> None:
        if self.stream is None:
            return
        machine.device = self._before[0]
        _LOCAL.streams[self.stream.native.device] = self._before[1]


class CudaEvent:
    """torch.cuda.Event: of the device on whose stream it is first recorded."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> None:
        self._timing = enable_timing
        self._marker: Marker | None = None

    def record(self, stream: CudaStream | None = None) -> None:
        native = (stream or _current_stream()).native
        if self._marker is not None and self._marker.stream.device != native.device:
            raise CudaError("invalid resource handle")
        self._marker = machine.record(native)

    def wait(self, stream: CudaStream | None = None) -> None:
        if self._marker is not None:
            machine.wait((stream or _current_stream()).native, self._marker)

    def query(self) -> bool:
        return self._marker is None or machine.poll(self._marker)

    def synchronize(self) -> None:
        if self._marker is not None:
            machine.wait_on_host(self._marker)

    def elapsed_time(self, end: "CudaEvent") -> float:
        if not (self._timing and end._timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._marker is None or end._marker is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if self._marker.stream.device != end._marker.stream.device:
            raise CudaError("invalid resource handle")
        if not (self._marker.done and end._marker.done):
            raise CudaError("device not ready")
        return end._marker.time_ms - self._marker.time_ms


class CudaGraph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._capture: Capture | None = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        stream = _current_stream().native
        if stream.handle == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self._capture = machine.begin_capture(stream, capture_error_mode)

    def capture_end(self) -> None:
        assert self._capture is not None
        machine.end_capture(self._capture)

    def instantiate(self) -> None:
        pass

    def replay(self) -> None:
        if self._capture is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        machine.launch(self._capture, _current_stream().native)

    def reset(self) -> None:
        self._capture = None

    def pool(self) -> tuple[int, int]:
        return 0, 1


# --------------------------------------------------------------------------------------------------- memory
class Block:
    """A block of the caching allocator."""

    def __init__(self, allocation: Allocation, stream: Stream) -> None:
        self.allocation, self.stream = allocation, stream
        self.users: set[Stream] = set()
        self.pending: list[Marker] = []


class Allocator:
    """A model of PyTorch's caching allocator: one block per tensor, kept by device, stream and size."""

    def __init__(self) -> None:
        self.free: dict[tuple[int, int, int], list[Block]] = {}
        self.live: dict[int, Block] = {}
        self.allocated: dict[int, int] = {}
        self.peak: dict[int, int] = {}
        self.lock = threading.RLock()

    def allocate(self, size: int, device: int) -> Any:
        """Return a ctypes buffer in device memory; its end gives the block back."""
        size = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        stream = _current_stream(device).native
        with self.lock, machine.lock:
            block = self._reused(device, stream, size) or self._new(device, stream, size)
            self.live[block.allocation.address] = block
            self.allocated[device] = self.allocated.get(device, 0) + size
            self.peak[device] = max(self.peak.get(device, 0), self.allocated[device])
            buffer = (ctypes.c_ubyte * size).from_address(block.allocation.address)
            weakref.finalize(buffer, self._given_back, block).atexit = False
            return buffer

    def _reused(self, device: int, stream: Stream, size: int) -> Block | None:
        blocks = self.free.get((device, stream.handle, size), [])
        for block in reversed(blocks):
            if all(marker.done for marker in block.pending):
                blocks.remove(block)
                block.users, block.pending = set(), []
                return block
        return None

    def _new(self, device: int, stream: Stream, size: int) -> Block:
        for attempt in range(2):
            try:
                return Block(machine.allocate(size, device), stream)
            except SimulatedOutOfMemoryError:
                if attempt:
                    free = machine.free_bytes(device)
                    total = machine.gpus[device].memory_bytes
                    raise torch.cuda.OutOfMemoryError(
                        f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU {device} has a total "
                        f"capacity of {total / 2**20:.2f} MiB of which {free / 2**20:.2f} MiB is free."
                    ) from None
                self.empty()
        raise AssertionError

    def _given_back(self, block: Block) -> None:
        with self.lock, machine.lock:
            address, size = block.allocation.address, block.allocation.size
            if self.live.pop(address, None) is None:
                return
            self.allocated[block.allocation.device or 0] -= size
            block.pending = [machine.record(stream) for stream in block.users if stream.capture is None]
            self.free.setdefault((block.allocation.device or 0, block.stream.handle, size), []).append(block)

    def empty(self) -> None:
        """Return what is free to the device."""
        with self.lock, machine.lock:
            for blocks in self.free.values():
                while blocks:
                    machine.release(blocks.pop().allocation)


allocator = Allocator()


def _new_tensor(shape: Any, dtype: torch.dtype, device: int, strides: Any = None) -> "CudaTensor":
    with _PLAIN(), torch.no_grad():
        probe = _strided_meta(shape, strides, dtype)
        size = probe.untyped_storage().nbytes()
        flat = torch.frombuffer(allocator.allocate(size, device), dtype=torch.uint8)[:size].view(dtype)
        return torch.as_strided(flat, tuple(shape), probe.stride()).as_subclass(CudaTensor)


def _new_pinned(shape: Any, dtype: torch.dtype, strides: Any = None) -> torch.Tensor:
    with _PLAIN():
        probe = _strided_meta(shape, strides, dtype)
        size = probe.untyped_storage().nbytes()
        allocation = machine.allocate(size, None)
        buffer = (ctypes.c_ubyte * allocation.size).from_address(allocation.address)
        weakref.finalize(buffer, machine.release, allocation).atexit = False
        flat = torch.frombuffer(buffer, dtype=torch.uint8)[:size].view(dtype)
        return torch.as_strided(flat, tuple(shape), probe.stride())


def _strided_meta(shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
    if strides is None:
        return _RAW["empty"](tuple(shape), dtype=dtype, device="meta")
    return torch.empty_strided(tuple(shape), tuple(strides), dtype=dtype, device="meta")


def _mem_get_info(device: Any = None) -> tuple[int, int]:
    index = _known(device)
    return machine.free_bytes(index), machine.gpus[index].memory_bytes


# --------------------------------------------------------------------------------------------------- tensors
class CudaTensor(torch.Tensor):
    """A tensor in memory of a simulated GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        with _PLAIN():
            found = machine.device_of(self.data_ptr())
        return torch.device("cuda", machine.device if found is None else found)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    def __deepcopy__(self, memo: Any) -> Any:
        made = _clone(self)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        memo[id(self)] = made
        return made

    def __dlpack__(self, *_: Any, **__: Any) -> Any:
        return Capsule(self)

    def __dlpack_device__(self) -> Any:
        return 2, self.device.index

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _METADATA:
            with _PLAIN():
                return tree_map_only(torch.Tensor, _as_is, func(*args, **kwargs))
        handler = _HANDLERS.get(name)
        if handler is not None:
            return handler(*args, **kwargs)
        return _compute(func, name, args, kwargs)


CudaTensor.__module__ = "torch"


def _as_is(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of GPU memory as a GPU tensor; others unchanged."""
    on_gpu = tensor.numel() and machine.device_of(tensor.data_ptr()) is not None
    return tensor.as_subclass(CudaTensor) if on_gpu and not isinstance(tensor, CudaTensor) else tensor


def _compute(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Compute on the current stream."""
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, (args, kwargs))
    devices = {tensor.device for tensor in found if isinstance(tensor, CudaTensor)}
    devices |= {tensor.device for tensor in found if not isinstance(tensor, CudaTensor) and tensor.dim() > 0}
    if len(devices) > 1:
        places = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {places}! ({name})"
        )
    index = next(iter(devices)).index or 0
    stream = _current_stream(index).native
    stream.synchronize()
    kwargs = {key: value for key, value in kwargs.items() if key != "device"}
    with _PLAIN(), _cpu_autocast():
        out = func(*args, **kwargs)
        results: list[torch.Tensor] = []
        placed = tree_map_only(torch.Tensor, lambda tensor: _home(tensor, index, results), out)
    size = sum(tensor.numel() * tensor.element_size() for tensor in results)
    stream.push(Work(name, ms=0.005 + size * _PER_BYTE_MS))
    return placed


@contextlib.contextmanager
def _cpu_autocast() -> Iterator[None]:
    if not torch.is_autocast_enabled("cuda"):
        yield
        return
    with torch.autocast("cpu", dtype=torch.get_autocast_dtype("cuda")):
        yield


def _home(tensor: torch.Tensor, index: int, results: list[torch.Tensor]) -> torch.Tensor:
    """Bring a result into GPU memory; views of GPU memory are there already."""
    results.append(tensor)
    if isinstance(tensor, CudaTensor):
        return tensor
    if tensor.numel() and machine.device_of(tensor.data_ptr()) is not None:
        return tensor.as_subclass(CudaTensor)
    made = _new_tensor(tensor.shape, tensor.dtype, index, tensor.stride())
    with torch.no_grad():
        _TENSOR["copy_"](made, tensor.detach())
    return made


def _copy_(self: Any, source: Any, non_blocking: bool = False) -> Any:
    """Tensor.copy_: asynchronous between GPU and pinned memory, blocking with pageable memory."""
    if not isinstance(source, torch.Tensor):
        source = torch.tensor(source)
    to_gpu, from_gpu = isinstance(self, CudaTensor), isinstance(source, CudaTensor)
    if not (to_gpu or from_gpu):
        return _TENSOR["copy_"](self, source, non_blocking)
    with _PLAIN():
        if self.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed.")
        if self.requires_grad and self.is_leaf and torch.is_grad_enabled():
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        where = (self if to_gpu else source).device if to_gpu else CudaTensor.device.fget(source)  # type: ignore[attr-defined]
    stream = _current_stream(where).native
    host = source if to_gpu else self
    pinned = (to_gpu and from_gpu) or machine.is_pinned(_address(host))
    target, origin = _later(self), _later(source)
    unchanged = _unchanged(host) if pinned and to_gpu and not from_gpu and stream.capture is None else None

    def run() -> None:
        if unchanged is not None and not unchanged():
            raise machine.violation("pinned memory was written to before its copy to the GPU had run")
        with _PLAIN(), torch.inference_mode(False):
            _TENSOR["copy_"](target(), origin())

    if stream.capture is not None and not pinned:
        machine.refuse_while_capturing(stream)
    stream.push(Work("copy", run, 0.002 + self.numel() * self.element_size() * _PER_BYTE_MS))
    if not pinned or not (non_blocking or (to_gpu and from_gpu)):
        stream.synchronize()
    return self


def _later(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return what gives queued work a tensor's memory.

    GPU memory is known by its address alone: queued work does not keep a block from being handed out again. Host memory
    is kept, as PyTorch keeps pinned memory until its copies have run.
    """
    raw = _raw(tensor)
    if not isinstance(tensor, CudaTensor) or not raw.numel():
        return lambda: raw
    address, shape, strides, dtype = raw.data_ptr(), tuple(raw.shape), raw.stride(), raw.dtype
    size = (sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1) * raw.element_size()
    device = machine.device_of(address)
    assert device is not None

    def view() -> torch.Tensor:
        if not machine.on_device(address, size, device):
            raise machine.violation("GPU memory was given back while queued work uses it")
        buffer = (ctypes.c_ubyte * size).from_address(address)
        return torch.as_strided(torch.frombuffer(buffer, dtype=dtype), shape, strides)

    return view


def _unchanged(host: torch.Tensor) -> Callable[[], bool]:
    """Return what compares host memory with what it holds now."""
    raw = _raw(host)
    with _PLAIN():
        before = raw.contiguous().view(torch.uint8).clone()

    def same() -> bool:
        with _PLAIN():
            return torch.equal(raw.contiguous().view(torch.uint8), before)

    return same


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a tensor as a plain tensor outside autograd."""
    with _PLAIN():
        return tensor.detach().as_subclass(torch.Tensor)


def _address(tensor: torch.Tensor) -> int:
    with _PLAIN():
        return tensor.data_ptr()


def _to(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Tensor.to and what is written in its terms."""
    force = bool(kwargs.pop("copy", False))
    if args and isinstance(args[0], torch.Tensor):
        other = args[0]
        device, dtype, non_blocking, layout = other.device, other.dtype, False, None
    else:
        with _PLAIN():
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    on_gpu = isinstance(self, CudaTensor)
    target = device or self.device
    if not on_gpu and target.type != "cuda":
        return _TENSOR["to"](self, *args, **kwargs, **({"copy": True} if force else {}))
    if target.type == "cuda":
        target = torch.device("cuda", _known(target))
    dtype = dtype or self.dtype
    with _PLAIN():
        like = self.detach().as_subclass(torch.Tensor)
        keep = {} if layout in (None, torch.preserve_format) else {"memory_format": layout}
        strides = _RAW["empty_like"](like, device="meta", **keep).stride()
        same = target == (CudaTensor.device.fget(self) if on_gpu else self.device) and self.dtype == dtype  # type: ignore[attr-defined]
        if same and not force and (not keep or self.stride() == strides or self.is_contiguous(**keep)):
            return self
    converted = self
    if dtype != self.dtype:
        converted = _compute(_TENSOR["to"], "to", (self, dtype), {}) if on_gpu else _TENSOR["to"](self, dtype=dtype)
    if target.type != "cuda":
        with _PLAIN():
            made = torch.empty_strided(tuple(self.shape), strides, dtype=dtype)
        return _copy_(made, converted.detach(), non_blocking)
    made = _new_tensor(self.shape, dtype, target.index, strides)
    with torch.no_grad():
        _copy_(made, converted.detach(), non_blocking or isinstance(converted, CudaTensor))
    return made


def _clone(self: Any, *, memory_format: Any = torch.preserve_format) -> Any:
    if not isinstance(self, CudaTensor):
        return _TENSOR["clone"](self, memory_format=memory_format)
    raw = _raw(self)
    with _PLAIN():
        strides = _RAW["empty_like"](raw, device="meta", memory_format=memory_format).stride()
    made = _new_tensor(self.shape, self.dtype, self.device.index, strides)
    with torch.no_grad():
        _copy_(made, self.detach(), True)
    return made


def _contiguous(self: Any, memory_format: Any = torch.contiguous_format) -> Any:
    if not isinstance(self, CudaTensor):
        return _TENSOR["contiguous"](self, memory_format=memory_format)
    return self if self.is_contiguous(memory_format=memory_format) else _clone(self, memory_format=memory_format)


def _fill(self: Any, value: float = 0) -> Any:
    memory = _later(self)
    stream = _current_stream(self.device).native
    stream.push(Work("fill", lambda: memory().fill_(value), 0.002))
    return self


def _cpu(self: Any, *_: Any, **__: Any) -> Any:
    return _to(self, "cpu") if isinstance(self, CudaTensor) else self


def _cuda(self: Any, device: Any = None, non_blocking: bool = False, **_: Any) -> Any:
    return _to(self, torch.device("cuda", _known(device)), non_blocking=non_blocking)


def _numpy(self: Any, *_: Any, **__: Any) -> Any:
    raise TypeError(
        f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
        "first."
    )


def _pin_memory(self: Any, *_: Any) -> Any:
    made = _new_pinned(self.shape, self.dtype, self.stride())
    _TENSOR["copy_"](made, self.detach())
    return made


def _is_pinned(self: Any, *_: Any) -> bool:
    return machine.is_pinned(_address(self))


def _record_stream(self: Any, stream: CudaStream) -> None:
    if not isinstance(self, CudaTensor):
        raise RuntimeError("record_stream is for CUDA tensors")
    with _PLAIN():
        block = allocator.live.get(self.untyped_storage().data_ptr())
    if block is not None and stream.native is not block.stream:
        block.users.add(stream.native)


def _item(self: Any) -> Any:
    return _cpu(self).item()


_HANDLERS: dict[str, Callable[..., Any]] = {
    "copy_": _copy_,
    "to": _to,
    "clone": _clone,
    "contiguous": _contiguous,
    "cpu": _cpu,
    "cuda": _cuda,
    "numpy": _numpy,
    "__array__": _numpy,
    "tolist": lambda self: _cpu(self).tolist(),
    "item": _item,
    "__bool__": lambda self: bool(_cpu(self)),
    "__float__": lambda self: float(_cpu(self)),
    "__int__": lambda self: int(_cpu(self)),
    "__index__": lambda self: _cpu(self).__index__(),
    "record_stream": _record_stream,
    "is_pinned": lambda self, *_: False,
    "pin_memory": lambda self, *_: (_ for _ in ()).throw(RuntimeError("cannot pin 'torch.cuda.FloatTensor'")),
    "zero_": _fill,
    "fill_": _fill,
    "float": lambda self, **k: _to(self, torch.float32, **k),
    "half": lambda self, **k: _to(self, torch.float16, **k),
    "bfloat16": lambda self, **k: _to(self, torch.bfloat16, **k),
    "double": lambda self, **k: _to(self, torch.float64, **k),
    "type": lambda self, dtype=None, **_: "torch.cuda.Tensor" if dtype is None else _to(self, dtype),
    "__deepcopy__": lambda self, memo: CudaTensor.__deepcopy__(self, memo),
    "__dlpack__": lambda self, *_, **__: Capsule(self),
    "_has_compatible_shallow_copy_type": lambda one, other: (
        isinstance(one, CudaTensor) is isinstance(other, CudaTensor)
    ),
}


# --------------------------------------------------------------------------------------------------- factories, DLPack
def _factory(name: str) -> Callable[..., Any]:
    raw = _RAW[name]

    def make(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        like = name.endswith("_like") and isinstance(args[0], CudaTensor)
        on_gpu = device is not None and (isinstance(device, int) or torch.device(device).type == "cuda")
        if like and device is None:
            on_gpu, device = True, args[0].device
        if not on_gpu:
            if kwargs.pop("pin_memory", False):
                value = raw(*args, **kwargs)
                made = _new_pinned(value.shape, value.dtype, value.stride())
                if not name.startswith("empty"):
                    made.copy_(value)
                return made
            if like:
                args = (_raw(args[0]), *args[1:])
            return raw(*args, **kwargs)
        index = _known(device)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory", "requires_grad")}
        if like:
            args = (_raw(args[0]), *args[1:])
        with _PLAIN():
            value = raw(*args, **kwargs, **({"device": "meta"} if name.startswith("empty") else {}))
        made = _new_tensor(value.shape, value.dtype, index, value.stride())
        if name in ("zeros", "ones", "full", "zeros_like", "ones_like") and value.numel():
            _fill(made, value.reshape(-1)[0].item())
        elif not name.startswith("empty"):
            _copy_(made, value)
        return made

    make.__name__ = name
    return make


class Capsule:
    """A DLPack capsule: used once."""

    def __init__(self, tensor: CudaTensor) -> None:
        self._tensor: CudaTensor | None = tensor

    def taken(self) -> CudaTensor:
        if self._tensor is None:
            raise RuntimeError(
                "from_dlpack received an invalid capsule. Note that DLTensor capsules can be consumed only once"
            )
        tensor, self._tensor = self._tensor, None
        return tensor


def _to_dlpack(tensor: Any) -> Any:
    if isinstance(tensor, CudaTensor):
        if tensor.requires_grad:
            raise RuntimeError("Can't export tensors that require gradient, use tensor.detach()")
        return Capsule(tensor)
    return _RAW["to_dlpack"](tensor)


def _from_dlpack(value: Any, **kwargs: Any) -> Any:
    if isinstance(value, Capsule):
        return value.taken()
    if isinstance(value, CudaTensor):
        return value
    if hasattr(value, "simulated_dlpack"):
        return value.simulated_dlpack()
    return _RAW["from_dlpack"](value, **kwargs)


# --------------------------------------------------------------------------------------------------- installing
_RAW: dict[str, Any] = {name: getattr(torch, name) for name in _FACTORIES}
_RAW |= {"to_dlpack": torch.utils.dlpack.to_dlpack, "from_dlpack": torch.utils.dlpack.from_dlpack}
_TENSOR = {name: getattr(torch.Tensor, name) for name in ("to", "cuda", "cpu", "copy_", "clone", "contiguous",
           "pin_memory", "is_pinned", "record_stream")}  # fmt: skip


def _replacements() -> list[tuple[Any, str, Any]]:
    cuda = torch.cuda
    names: dict[str, Any] = {
        "is_available": lambda: bool(machine.gpus),
        "device_count": lambda: len(machine.gpus),
        "is_initialized": lambda: True,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "current_device": lambda: machine.device,
        "set_device": lambda device: setattr(machine, "device", _index(device)),
        "device": DeviceGuard,
        "get_device_properties": _properties,
        "get_device_capability": lambda device=None: (_properties(device).major, _properties(device).minor),
        "get_device_name": lambda device=None: _properties(device).name,
        "is_bf16_supported": lambda *_, **__: _properties().major >= 8,
        "Stream": CudaStream,
        "Event": CudaEvent,
        "CUDAGraph": CudaGraph,
        "StreamContext": StreamContext,
        "stream": StreamContext,
        "current_stream": _current_stream,
        "default_stream": _default_stream,
        "synchronize": lambda device=None: machine.synchronize_device(_known(device)),
        "empty_cache": allocator.empty,
        "mem_get_info": _mem_get_info,
        "memory_allocated": lambda device=None: allocator.allocated.get(_known(device), 0),
        "max_memory_allocated": lambda device=None: allocator.peak.get(_known(device), 0),
        "memory_reserved": lambda device=None: machine.used[_known(device)],
        "reset_peak_memory_stats": lambda device=None: allocator.peak.__setitem__(
            _known(device), allocator.allocated.get(_known(device), 0)
        ),
        "is_current_stream_capturing": lambda: _current_stream().native.capture is not None,
        "_sleep": lambda cycles: _current_stream().native.push(Work("sleep", ms=cycles / 1e6)),
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
    }
    found = [(cuda, name, value) for name, value in names.items()]
    found += [(cuda.graphs, name, names[name]) for name in ("CUDAGraph",) if hasattr(cuda.graphs, name)]
    found += [(cuda.graph, "default_capture_stream", None), (torch.version, "cuda", "13.0")]
    found += [(torch._C, "_host_emptyCache", lambda: None)]
    found += [(torch, name, _factory(name)) for name in _FACTORIES]
    found += [(torch.Tensor, name, value) for name, value in (
        ("to", _to), ("cuda", _cuda), ("cpu", _cpu), ("copy_", _copy_), ("clone", _clone), ("contiguous", _contiguous),
        ("pin_memory", _pin_memory), ("is_pinned", _is_pinned), ("record_stream", _record_stream),
    )]  # fmt: skip
    for place in (torch, torch.utils.dlpack):
        found += [(place, "to_dlpack", _to_dlpack), (place, "from_dlpack", _from_dlpack)]
    return found


_BEFORE: list[tuple[Any, str, Any]] = []
_MISSING = object()


def install(simulator: Simulator) -> None:
    """Make `torch.cuda` be simulated devices."""
    global machine, allocator
    torch.utils._device._device_constructors()  # keeps the real factories, for "with torch.device(...)"
    machine = simulator
    allocator = Allocator()
    for place, name, value in _replacements():
        _BEFORE.append((place, name, vars(place).get(name, _MISSING)))
        setattr(place, name, value)
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def uninstall() -> None:
    """Restore `torch`."""
    global machine, allocator
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    while _BEFORE:
        place, name, value = _BEFORE.pop()
        if value is _MISSING:
            delattr(place, name)
        else:
            setattr(place, name, value)
    _LOCAL.__dict__.clear()
    machine = Simulator(())
    allocator = Allocator()
