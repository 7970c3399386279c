"""The eager PyTorch network as a runner: the reference that every engine is compared with."""

import contextlib
import copy
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.environment import cpu_count, package_versions
from srdeploy.core.errors import CapabilityError, UsageError
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.engines.feeds import TensorSpec, check_feeds

_PRECISIONS = {torch.float32: Precision.FP32, torch.float16: Precision.FP16, torch.bfloat16: Precision.BF16}


def open_eager(
    checkpoint: LoadedCheckpoint,
    *,
    device: str = "cpu",
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> "EagerRunner":
    """Open the checkpoint's own network.

    Args:
        checkpoint: the loaded checkpoint; its `reference` takes and gives the 0..1 scale.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads, a setting of the whole process; None uses all processors.
        dtype: torch.float32 (the reference), torch.float16 or torch.bfloat16 (baselines for latency).
        channels_last: keep activations as NHWC in memory, the quicker layout for FP16 on tensor cores.

    Raises:
        CapabilityError: a GPU was asked for and there is none.
        UsageError: another dtype.
    """
    if dtype not in _PRECISIONS:
        raise UsageError(f"eager dtype {dtype}", expected="torch.float32, torch.float16 or torch.bfloat16")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise CapabilityError(f"device {device!r} was asked for, and PyTorch sees no NVIDIA GPU here")
    return EagerRunner(checkpoint, device, threads or cpu_count(), dtype, channels_last)


class EagerRunner:
    """Runs a PyTorch network without autograd, TF32 off."""

    def __init__(
        self, checkpoint: LoadedCheckpoint, device: str, threads: int, dtype: torch.dtype, channels_last: bool
    ) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._layout = layout
        self._device = torch.device(device)
        self._dtype = dtype
        self._threads = threads
        self._lock = threading.Lock()
        network = checkpoint.reference.eval()
        if dtype is not torch.float32 or self._device.type != "cpu":
            network = copy.deepcopy(network).to(device=self._device, dtype=dtype)
            if channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stubs
        self._network = network
        contract = checkpoint.contract(_PRECISIONS[dtype])
        self._inputs = (TensorSpec(INPUT, "float32", (-1, contract.channels, -1, -1)),)
        on_gpu = self._device.type == "cuda"
        label = _PRECISIONS[dtype].value
        self._info = RunnerInfo(
            name=f"eager {label}",
            engine="eager",
            device=str(self._device),
            contract=contract,
            numeric_mode=f"{label.upper()}, TF32 off" + (", channels last" if channels_last else ""),
            threads=None if on_gpu else threads,
            versions=package_versions(["torch"]),
        )

    @property
    def info(self) -> RunnerInfo:
        """What is behind this runner."""
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute the output: (N, C, H, W) float32 in [0, 1] to (N, C, H', W') float32, not clamped."""
        check_feeds(feeds, self._inputs, engine=self._info.name)
        image = torch.from_numpy(np.require(feeds[INPUT], requirements=["C", "W"]))
        return {OUTPUT: self.run_tensors({INPUT: image})[OUTPUT].float().cpu().numpy()}

    def run_tensors(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute on torch tensors; the result stays on the runner's device and in its dtype."""
        with self._arithmetic():
            return {OUTPUT: self._network(self._placed(feeds[INPUT]))}

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Place the input and return a function that computes once, in milliseconds (see `TimedRunner`)."""
        check_feeds(feeds, self._inputs, engine=self._info.name)
        image = self._placed(torch.from_numpy(np.require(feeds[INPUT], requirements=["C", "W"])))
        return partial(self._timed_on_gpu if self._device.type == "cuda" else self._timed_on_cpu, image)

    def _timed_on_cpu(self, image: torch.Tensor) -> float:
        with self._arithmetic():
            started = time.perf_counter()
            self._network(image)
            return (time.perf_counter() - started) * 1000

    def _timed_on_gpu(self, image: torch.Tensor) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with self._arithmetic():
            start.record()
            self._network(image)
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def _placed(self, image: torch.Tensor) -> torch.Tensor:
        return image.to(device=self._device, dtype=self._dtype, memory_format=self._layout)

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Exact FP32, no autograd, own threads; one caller at a time, as these are settings of the process."""
        with self._lock, torch.inference_mode(), ieee_fp32():
            if self._device.type == "cpu" and torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            del self._network
            torch.cuda.empty_cache()


class ieee_fp32:  # noqa: N801  # reads as a statement: with ieee_fp32()
    """Switch TF32 (and oneDNN's reduced FP32 modes) off for a block, and restore what was set before.

    These are settings of the process, and blocks of several threads overlap: the first one in saves, the last one out
    restores. PyTorch refuses to export with a mixture of settings, which is what a wrong order would leave behind.
    """

    _lock = threading.Lock()
    _inside = 0
    _before: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        kind = type(self)
        with kind._lock:
            if kind._inside == 0:
                kind._before = tuple(place.fp32_precision for place in _fp32_places())
                for place in _fp32_places():
                    place.fp32_precision = "ieee"
            kind._inside += 1

    def __exit__(self, *_: object) -> None:
        kind = type(self)
        with kind._lock:
            kind._inside -= 1
            if kind._inside == 0:
                for place, before in zip(_fp32_places(), kind._before, strict=True):
                    place.fp32_precision = before


def _fp32_places() -> tuple[Any, ...]:
    return torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.conv  # type: ignore[attr-defined]
