"""The floor under a latency: what the arithmetic and the memory traffic of a network take at the machine's own rates.

The rates are measured on the device, in the same process: multiply-adds per second of a large matrix product in each
type, and bytes per second of a copy beyond the caches. *Arithmetic* is an engine's multiply-adds, each at the rate of
the type that it computes in. *Memory* is every layer's maps, read and written once in that type. The larger of the two
is the floor, and latency over floor is the distance: 1.0 is a machine fully used.

What can be below it: Winograd's algorithm takes fewer multiplications; images whose maps stay in a cache, and engines
that compute several layers tile by tile, move fewer bytes.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from srdeploy.core.errors import CapabilityError
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo
from srdeploy.core.shapes import Shape
from srdeploy.runtime.bench.turns import Effort, measure
from srdeploy.runtime.engines.timer import timed

_BYTES = {Precision.FP32: 4, Precision.FP16: 2, Precision.BF16: 2, Precision.INT8: 1, Precision.FP8: 1}
_CPU_PRODUCTS, _GPU_PRODUCTS = (1536,), (1024, 2048, 4096, 8192)
_CPU_COPIES, _GPU_COPIES = (2**25,), (2**22, 2**24, 2**27)  # values of 4 bytes; the largest are beyond the caches
_EFFORT = Effort(warmup_runs=1, warmup_seconds=0.1, min_runs=10, max_runs=40, seconds=0.5)


class Cost(Protocol):
    """The cost of a network per low-resolution pixel; `srdeploy.models.networks.spec.ModelSpec` states it."""

    @property
    def macs_per_pixel(self) -> float:
        """Multiply-adds."""

    @property
    def traffic_per_pixel(self) -> float:
        """Values read and written."""


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device.

    Attributes:
        device: "cpu" or "cuda:N".
        macs_per_second: multiply-adds per second by precision; types that the device or PyTorch lacks are missing.
        bytes_per_second: of a copy, bytes read and written.
        threads: CPU threads; None on a GPU.
    """

    device: str
    macs_per_second: Mapping[Precision, float]
    bytes_per_second: float
    threads: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the rates as JSON values."""
        return {
            "device": self.device,
            "macs_per_second": {str(precision): rate for precision, rate in self.macs_per_second.items()},
            "bytes_per_second": self.bytes_per_second,
            "threads": self.threads,
        }


@dataclass(frozen=True)
class Floor:
    """The time that an engine needs at least.

    Attributes:
        arithmetic_ms: its multiply-adds at the measured peaks.
        memory_ms: its maps, read and written once, at the measured copy rate.
    """

    arithmetic_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        """The larger of the two."""
        return max(self.arithmetic_ms, self.memory_ms)

    def to_json(self) -> dict[str, float]:
        """Return the times as JSON values."""
        return {"arithmetic_ms": self.arithmetic_ms, "memory_ms": self.memory_ms, "ms": self.ms}


def floor_of(info: RunnerInfo, shape: Shape, cost: Cost, rates: Rates) -> Floor:
    """Return the floor of an engine at a shape.

    Args:
        info: of the engine; what it reads back of its layers decides which multiply-adds count in which type.
        shape: (N, C, H, W) of the input.
        cost: of the network.
        rates: of the engine's device.
    """
    pixels = shape[0] * shape[2] * shape[3]
    full = rates.macs_per_second[Precision.FP32]
    seconds = bytes_per_value = 0.0
    for precision, share in _shares(info).items():
        seconds += share * pixels * cost.macs_per_pixel / rates.macs_per_second.get(precision, full)
        bytes_per_value += share * _BYTES[precision]
    moved = pixels * cost.traffic_per_pixel * bytes_per_value
    return Floor(1e3 * seconds, 1e3 * moved / rates.bytes_per_second)


@functools.cache
def measure_rates(device: str = "cpu") -> Rates:
    """Measure what a device reaches, once per process; the best of several runs, as a peak is undisturbed.

    Raises:
        CapabilityError: PyTorch does not see the GPU, or its memory is full.
    """
    import torch

    on_gpu = device != "cpu"
    if on_gpu and not torch.cuda.is_available():
        raise CapabilityError(f"the rates of {device} cannot be measured: PyTorch sees no NVIDIA GPU")
    try:
        return _measured_rates(torch, device)
    except torch.cuda.OutOfMemoryError as error:
        raise CapabilityError(f"the rates of {device} cannot be measured: its memory is full") from error


def _measured_rates(torch: Any, device: str) -> Rates:
    on_gpu = device != "cpu"
    copy, count = _sized(partial(_copy, torch, device), _GPU_COPIES if on_gpu else _CPU_COPIES, torch, device)
    functions: dict[Precision | None, Callable[[], float]] = {None: timed(copy, device)}
    sizes: dict[Precision, int] = {}
    for precision in (Precision.FP32, *((Precision.FP16,) if on_gpu else ()), Precision.INT8):
        make = partial(_product, torch, device, precision)
        try:
            product, sizes[precision] = _sized(make, _GPU_PRODUCTS if on_gpu else _CPU_PRODUCTS, torch, device)
        except (AttributeError, RuntimeError):
            if precision is not Precision.INT8:
                raise
            continue  # PyTorch has no such product on this device
        functions[precision] = timed(product, device)
    times = dict(zip(functions, measure(list(functions.values()), _EFFORT), strict=True))
    best = {precision: min(durations) / 1e3 for precision, durations in times.items()}
    return Rates(
        device=device,
        macs_per_second={precision: size**3 / best[precision] for precision, size in sizes.items()},
        bytes_per_second=8.0 * count / best[None],  # 4 bytes read and 4 written per value
        threads=None if on_gpu else torch.get_num_threads(),
    )


def _sized(
    make: Callable[[int], Callable[[], object]], sizes: Sequence[int], torch: Any, device: str
) -> tuple[Callable[[], object], int]:
    """Return the smallest work that takes a millisecond, else the largest, with its size.

    Smaller work would measure how fast kernels are launched; larger work takes long on a slow device.
    """
    for size in sizes:
        work = make(size)
        work()
        started = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize(device)
        if time.perf_counter() - started >= 1e-3:
            break
    return work, size


def _copy(torch: Any, device: str, count: int) -> Callable[[], object]:
    source = torch.ones(count, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(torch: Any, device: str, precision: Precision, size: int) -> Callable[[], object]:
    """Return a square matrix product in a precision."""
    if precision is Precision.INT8:
        # PyTorch's public operators quantize around the product; the private one is the product alone.
        first, second = (torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: torch._int_mm(first, second)
    dtype = torch.float16 if precision is Precision.FP16 else torch.float32
    first, second = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(first)
    return lambda: torch.mm(first, second, out=out)


def _shares(info: RunnerInfo) -> dict[Precision, float]:
    """Return the share of multiply-adds by type where the engine reads it back, else all in the graph's precision."""
    read: Mapping[str, float] = info.built.get("macs_share") or {}
    known = {Precision(label): float(value) for label, value in read.items() if label in set(Precision)}
    total = sum(known.values())
    if not total:
        return {info.contract.precision: 1.0}
    return {precision: value / total for precision, value in known.items()}
