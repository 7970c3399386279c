# ruff: noqa: N802  # the library's own names
"""The CUDA runtime library as Polygraphy calls it through ctypes: streams, memory and copies by address."""

import ctypes
from typing import Any

from gpu_simulator.cuda import Allocation, SimulatedOutOfMemoryError, Simulator, Work

SUCCESS, MEMORY_ALLOCATION = 0, 2


class CudaRuntime:
    """Functions of libcudart; every one returns an error code."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._allocations: dict[int, Allocation] = {}

    def cudaStreamCreate(self, pointer: Any) -> int:
        pointer._obj.value = self._simulator.new_stream(self._simulator.device).handle
        return SUCCESS

    def cudaStreamSynchronize(self, stream: Any) -> int:
        self._simulator.stream_of(stream.value or 0).synchronize()
        return SUCCESS

    def cudaStreamDestroy(self, stream: Any) -> int:
        self._simulator.stream_of(stream.value or 0).synchronize()
        return SUCCESS

    def cudaMalloc(self, pointer: Any, size: Any) -> int:
        try:
            made = self._simulator.allocate(size.value, self._simulator.device)
        except SimulatedOutOfMemoryError:
            return MEMORY_ALLOCATION
        self._allocations[made.address] = made
        pointer._obj.value = made.address
        return SUCCESS

    def cudaFree(self, pointer: Any) -> int:
        if pointer.value:
            self._simulator.release(self._allocations.pop(pointer.value))
        return SUCCESS

    def cudaMemcpy(self, target: Any, source: Any, size: Any, kind: Any) -> int:
        stream = self._simulator.default_stream(self._simulator.device)
        return self.cudaMemcpyAsync(target, source, size, kind, ctypes.c_void_p(stream.handle)) or SUCCESS

    def cudaMemcpyAsync(self, target: Any, source: Any, size: Any, kind: Any, stream: Any) -> int:
        """Queue a copy; one that touches pageable memory has run when this returns."""
        simulator = self._simulator
        queue = simulator.stream_of(stream.value or 0)
        to, origin, count = target.value, source.value, size.value
        for address in (to, origin):
            device = simulator.device_of(address)
            if device is not None and not simulator.on_device(address, count, device):
                raise simulator.violation("a copy leaves the memory that it was given")
        queue.push(Work("copy", lambda: ctypes.memmove(to, origin, count) and None, 0.002))
        if any(simulator.device_of(address) is None and not simulator.is_pinned(address) for address in (to, origin)):
            queue.synchronize()
        return SUCCESS


def install(simulator: Simulator) -> None:
    """Give Polygraphy, which has just been imported, the simulated library."""
    from polygraphy.cuda import cuda

    wrapper = cuda.Cuda.__new__(cuda.Cuda)
    wrapper.handle = CudaRuntime(simulator)
    cuda.G_CUDA = wrapper
