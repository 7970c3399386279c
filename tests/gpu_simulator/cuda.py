"""Simulated CUDA: devices with memory of their own, streams, events, graphs, and three schedules.

GPU memory is host memory at real addresses, so a kernel is a function that reads and writes addresses. Work is queued
per stream; a schedule decides when it runs, always in an order that CUDA allows:

- "at-once": when it is queued;
- "late": when something waits for it, and then only what that needs;
- "random": by chance, with a seed.

A program that forgets to wait gets old data, garbage or an error under one of the three. What CUDA leaves undefined
(and real hardware may let pass) is a violation: it is recorded and raised.
"""

import bisect
import ctypes
import mmap
import random
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SCHEDULES = ("at-once", "late", "random")
GARBAGE = 0xFF
"""Fresh memory holds this byte: NaN in every floating-point type."""
ALIGNMENT = 512
_FILLED = 64 * 2**20
"""Larger allocations hold zeros: filling them would take the host's memory."""


class ViolationError(AssertionError):
    """Something that CUDA or TensorRT leaves undefined was done."""


class CudaError(RuntimeError):
    """An error code of the CUDA runtime, worded as PyTorch words it."""

    def __init__(self, text: str) -> None:
        super().__init__(f"CUDA error: {text}")


class SimulatedOutOfMemoryError(CudaError):
    """The device's memory does not suffice."""

    def __init__(self) -> None:
        super().__init__("out of memory")


CAPTURE_FORBIDS = "operation not permitted when stream is capturing"


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU: name, compute capability, memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int = 8


@dataclass(eq=False)
class Allocation:
    """A piece of memory at a fixed address: of a device, or pinned host memory (device None)."""

    address: int
    size: int
    device: int | None
    held: Any

    def __contains__(self, address: int) -> bool:
        return self.address <= address < self.address + self.size


@dataclass(eq=False)
class Marker:
    """A point in a stream: an event's last recording."""

    stream: "Stream"
    done: bool = False
    time_ms: float = 0.0
    capture: "Capture | None" = None


@dataclass(eq=False)
class Work:
    """One queued operation: what it does, how long it takes on the virtual clock, what it waits for or marks."""

    name: str
    run: Callable[[], None] | None = None
    ms: float = 0.0
    waits_for: Marker | None = None
    marks: Marker | None = None


@dataclass(eq=False)
class Capture:
    """A capture in progress, and afterwards the graph."""

    origin: "Stream"
    mode: str
    work: list[Work] = field(default_factory=list)
    streams: set["Stream"] = field(default_factory=set)
    broken: bool = False


class Stream:
    """Work in order."""

    def __init__(self, simulator: "Simulator", device: int, handle: int) -> None:
        self.simulator, self.device, self.handle = simulator, device, handle
        self.queue: deque[Work] = deque()
        self.clock_ms = 0.0
        self.capture: Capture | None = None

    def push(self, work: Work) -> None:
        """Queue work, or record it where the stream captures."""
        with self.simulator.lock:
            if self.capture is not None:
                self.capture.work.append(work)
                return
            self.queue.append(work)
            self.simulator.progress(self)

    def step(self) -> None:
        """Run the first queued operation, after what it waits for."""
        work = self.queue[0]
        if work.waits_for is not None:
            self.simulator.reach(work.waits_for)
            self.clock_ms = max(self.clock_ms, work.waits_for.time_ms)
        if self.queue and self.queue[0] is work:
            self.queue.popleft()
        if work.run is not None:
            work.run()
        self.clock_ms += work.ms
        if work.marks is not None:
            work.marks.done, work.marks.time_ms = True, self.clock_ms

    def ready(self) -> bool:
        """Return True if the first operation waits for nothing."""
        return bool(self.queue) and (self.queue[0].waits_for is None or self.queue[0].waits_for.done)

    def drain(self) -> None:
        """Run everything that is queued."""
        while self.queue:
            self.step()

    def synchronize(self) -> None:
        """Wait on the host (cudaStreamSynchronize)."""
        with self.simulator.lock:
            self.simulator.refuse_while_capturing(self)
            self.drain()


class Simulator:
    """All devices of one process."""

    def __init__(self, gpus: tuple[Gpu, ...], schedule: str = "at-once", seed: int = 0) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r}, expected one of {SCHEDULES}")
        self.gpus, self.schedule = gpus, schedule
        self.chance = random.Random(seed)
        self.lock = threading.RLock()
        self.violations: list[str] = []
        self.tolerated: set[str] = set()
        self.noted: list[str] = []
        self.faulty: set[str] = set()
        """Names of ONNX nodes that TensorRT's kernels compute wrongly."""
        self.recordings = 0
        """CUDA graphs that TensorRT-RTX recorded by itself."""
        self.used = [0 for _ in gpus]
        self._local = threading.local()
        self._addresses: list[int] = []
        self._allocations: dict[int, Allocation] = {}
        self._next_handle = 0x5000
        self.streams: dict[int, Stream] = {}
        self._default = [Stream(self, index, 0) for index in range(len(gpus))]
        self._polls: dict[int, int] = {}

    # ---------------------------------------------------------------------------------------------- rules
    def violation(self, text: str) -> ViolationError:
        """Record a violation and return it, to be raised."""
        self.violations.append(text)
        return ViolationError(text)

    def rule(self, name: str, text: str) -> None:
        """Raise a violation of a rule by name, or note it where the rule is tolerated."""
        if name not in self.tolerated:
            raise self.violation(f"{name}: {text}")
        self.noted.append(name)

    # ---------------------------------------------------------------------------------------------- devices
    @property
    def device(self) -> int:
        """The calling thread's current device."""
        return getattr(self._local, "device", 0)

    @device.setter
    def device(self, index: int) -> None:
        if not 0 <= index < len(self.gpus):
            raise CudaError("invalid device ordinal")
        self._local.device = index

    def free_bytes(self, index: int) -> int:
        """Memory that is left."""
        return self.gpus[index].memory_bytes - self.used[index]

    # ---------------------------------------------------------------------------------------------- memory
    def allocate(self, size: int, device: int | None) -> Allocation:
        """Allocate device memory (cudaMalloc) or, with None, pinned host memory."""
        size = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        with self.lock:
            if device is not None:
                if size > self.free_bytes(device):
                    raise SimulatedOutOfMemoryError
                self.used[device] += size
            pages = mmap.mmap(-1, size)
            anchor = ctypes.c_char.from_buffer(pages)
            address = ctypes.addressof(anchor)
            if size <= _FILLED:
                ctypes.memset(address, GARBAGE, size)
            made = Allocation(address, size, device, (anchor, pages))
            bisect.insort(self._addresses, address)
            self._allocations[address] = made
            return made

    def release(self, allocation: Allocation) -> None:
        """Give memory back (cudaFree waits for the device)."""
        with self.lock:
            if allocation.device is not None:
                self.drain_device(allocation.device)
                self.used[allocation.device] -= allocation.size
            del self._allocations[allocation.address]
            self._addresses.remove(allocation.address)
            allocation.held = None

    def allocation_at(self, address: int) -> Allocation | None:
        """Return the allocation that holds an address."""
        with self.lock:
            index = bisect.bisect_right(self._addresses, address) - 1
            if index < 0:
                return None
            found = self._allocations[self._addresses[index]]
            return found if address in found else None

    def device_of(self, address: int) -> int | None:
        """Return the device that owns an address, None for host memory."""
        found = self.allocation_at(address)
        return None if found is None else found.device

    def on_device(self, address: int, size: int, device: int) -> bool:
        """Return True if `size` bytes from an address on belong to one allocation of a device."""
        found = self.allocation_at(address)
        return found is not None and found.device == device and address + size <= found.address + found.size

    def is_pinned(self, address: int) -> bool:
        """Return True for pinned host memory."""
        found = self.allocation_at(address)
        return found is not None and found.device is None

    # ---------------------------------------------------------------------------------------------- streams
    def new_stream(self, device: int) -> Stream:
        """Make a stream (cudaStreamNonBlocking, as PyTorch's)."""
        with self.lock:
            self._next_handle += 0x10
            made = self.streams[self._next_handle] = Stream(self, device, self._next_handle)
            return made

    def default_stream(self, device: int) -> Stream:
        """Return the legacy stream of a device, handle 0."""
        return self._default[device]

    def stream_of(self, handle: int) -> Stream:
        """Return the stream of a native handle; 0 is the current device's legacy stream."""
        if handle == 0:
            return self._default[self.device]
        found = self.streams.get(handle)
        if found is None:
            raise self.violation(f"{handle:#x} is no stream")
        return found

    def all_streams(self, device: int | None = None) -> list[Stream]:
        """Return the streams of a device, or all."""
        found = [*self._default, *self.streams.values()]
        return [stream for stream in found if device is None or stream.device == device]

    def reach(self, marker: Marker) -> None:
        """Run what a marker needs."""
        while not marker.done:
            if not marker.stream.queue:
                raise self.violation("waits for an event that was recorded in a graph")
            marker.stream.step()

    def drain_device(self, device: int) -> None:
        """Run everything on a device."""
        for stream in self.all_streams(device):
            stream.drain()

    def synchronize_device(self, device: int) -> None:
        """Wait for a device on the host (cudaDeviceSynchronize)."""
        with self.lock:
            for stream in self.all_streams(device):
                if stream.capture is not None:
                    stream.capture.broken = True
                    raise CudaError(CAPTURE_FORBIDS)
            self.drain_device(device)

    def refuse_while_capturing(self, stream: Stream) -> None:
        """Refuse what would wait for a stream that captures."""
        if stream.capture is not None:
            stream.capture.broken = True
            raise CudaError(CAPTURE_FORBIDS)

    def progress(self, stream: Stream) -> None:
        """Let the schedule run something after work was queued on a stream."""
        if self.schedule == "at-once":
            stream.drain()
        elif self.schedule == "random":
            for _ in range(self.chance.choice((0, 0, 1, 2, 4))):
                ready = [entry for entry in self.all_streams() if entry.ready()]
                if not ready:
                    return
                self.chance.choice(ready).step()

    def poll(self, marker: Marker) -> bool:
        """Ask for a marker without waiting; what is asked again and again does happen in the end."""
        with self.lock:
            if not marker.done and marker.capture is None:
                self._polls[id(marker)] = self._polls.get(id(marker), 0) + 1
                if self._polls[id(marker)] > 2:
                    self.reach(marker)
            return marker.done

    # ---------------------------------------------------------------------------------------------- events
    def record(self, stream: Stream) -> Marker:
        """Record a point of a stream (cudaEventRecord)."""
        with self.lock:
            marker = Marker(stream, capture=stream.capture)
            stream.push(Work("record", marks=marker))
            return marker

    def wait(self, stream: Stream, marker: Marker) -> None:
        """Order a stream behind a point (cudaStreamWaitEvent)."""
        with self.lock:
            if marker.capture is not None and stream.capture is None:
                stream.capture = marker.capture  # the stream joins the capture
                marker.capture.streams.add(stream)
            elif marker.capture is not stream.capture:
                if stream.capture is not None:
                    stream.capture.broken = True
                raise CudaError("dependency created on uncaptured work in another stream")
            if stream.capture is None:
                stream.push(Work("wait", waits_for=marker))

    def wait_on_host(self, marker: Marker) -> None:
        """Wait for a point on the host (cudaEventSynchronize)."""
        with self.lock:
            if marker.capture is not None:
                raise CudaError("operation not permitted on an event last recorded in a capturing stream")
            self.reach(marker)

    # ---------------------------------------------------------------------------------------------- graphs
    def begin_capture(self, stream: Stream, mode: str) -> Capture:
        """Begin a capture on a stream."""
        with self.lock:
            if stream.handle == 0 or stream.capture is not None:
                raise CudaError(CAPTURE_FORBIDS)
            stream.capture = Capture(stream, mode)
            stream.capture.streams.add(stream)
            return stream.capture

    def end_capture(self, capture: Capture) -> None:
        """End a capture; its work is then a graph."""
        with self.lock:
            for stream in capture.streams:
                stream.capture = None
            if capture.broken:
                raise CudaError("operation failed due to a previous error during capture")

    def launch(self, capture: Capture, stream: Stream) -> None:
        """Queue a captured graph (cudaGraphLaunch) as one operation."""

        def run() -> None:
            for work in capture.work:
                if work.run is not None:
                    work.run()

        stream.push(Work("graph", run, sum(work.ms for work in capture.work)))
