"""What an engine has to beat: the eager network in the forms in which people run it without any export.

All of them compute the same network on the same device and are measured by the same rules as the engines. They are
quick copies for latency only: verification always uses the plain eager FP32 network.
"""

import contextlib
import copy
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.environment import cpu_count, package_versions
from srdeploy.core.precision import Precision
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import RunnerInfo
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.bench.latency import timed
from srdeploy.runtime.bench.memory import allocator_peak
from srdeploy.runtime.engines.eager import ieee_fp32


@dataclass(frozen=True)
class Form:
    """One way of running the eager network.

    Attributes:
        name: for tables and for --baseline.
        channels_last: weights and activations as NHWC in memory.
        half: autocast to BF16 (CPU) or FP16 (GPU).
        compiled: through torch.compile.
    """

    name: str
    channels_last: bool = False
    half: bool = False
    compiled: bool = False


FORMS: tuple[Form, ...] = (
    Form("eager fp32"),
    Form("eager fp32 channels-last", channels_last=True),
    Form("eager half autocast", channels_last=True, half=True),
    Form("torch.compile fp32", channels_last=True, compiled=True),
)
"""All forms, the plain one first: it is what ratios refer to."""


def why_not(form: Form) -> str | None:
    """Return why a form cannot be run on this machine, None when it can."""
    if form.compiled and not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "torch.compile needs a C++ compiler"
    return None


def open_baseline(
    checkpoint: LoadedCheckpoint, form: Form, *, device: str = "cpu", threads: int | None = None
) -> "BaselineRunner":
    """Open one form of the eager network; compiling happens at its first run of a shape.

    Args:
        checkpoint: the loaded checkpoint.
        form: one of `FORMS`.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads, a setting of the whole process; None uses all processors.
    """
    return BaselineRunner(checkpoint, form, torch.device(device), threads or cpu_count())


class BaselineRunner:
    """Runs one form of the eager network; also times it without conversions."""

    def __init__(self, checkpoint: LoadedCheckpoint, form: Form, device: torch.device, threads: int) -> None:
        self._form = form
        self._device = device
        self._threads = threads
        self._layout = torch.channels_last if form.channels_last else torch.contiguous_format
        network = copy.deepcopy(checkpoint.reference).eval().to(device=device, memory_format=self._layout)  # type: ignore[call-overload]
        self._weight_bytes = sum(part.nbytes for part in (*network.parameters(), *network.buffers()))
        self._half = torch.bfloat16 if device.type == "cpu" else torch.float16
        self._network: Callable[[torch.Tensor], torch.Tensor] = network
        if form.compiled:
            self._network = torch.compile(network, dynamic=False)
        precision = Precision.FP32
        if form.half:
            precision = Precision.BF16 if device.type == "cpu" else Precision.FP16
        self._info = RunnerInfo(
            name=form.name.replace("half", str(precision)),
            engine="eager",
            device=str(device),
            contract=checkpoint.contract(precision),
            numeric_mode=self._words(precision),
            threads=threads if device.type == "cpu" else None,
            versions=package_versions(["torch"]),
        )

    @property
    def info(self) -> RunnerInfo:
        """What is behind this runner."""
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute from numpy to numpy: (N, C, H, W) float32 in [0, 1] to (N, C, H', W') float32."""
        output = self._compute(self._placed(feeds))
        return {OUTPUT: output.float().contiguous().cpu().numpy()}

    def run_metered(self, feeds: Mapping[str, NDArray[Any]]) -> int:
        """Compute once on a GPU; see `srdeploy.core.runner.MeteredRunner`."""
        return allocator_peak(partial(self.run, feeds), self._device, cuda=torch.cuda, held_bytes=self._weight_bytes)

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Place the input; see `srdeploy.core.runner.TimedRunner`."""
        image = self._placed(feeds)
        if self._device.type == "cpu":
            return timed(lambda: self._compute(image))
        return lambda: self._event_ms(image)

    def _placed(self, feeds: Mapping[str, NDArray[Any]]) -> torch.Tensor:
        image = torch.from_numpy(np.require(feeds[INPUT], requirements=["C", "W"]))
        return image.to(device=self._device, memory_format=self._layout)

    def _compute(self, image: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu" and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        with torch.inference_mode(), self._arithmetic():
            return self._network(image)

    def _event_ms(self, image: torch.Tensor) -> float:
        events: Any = torch.cuda.Event
        start, end = events(enable_timing=True), events(enable_timing=True)
        start.record()
        self._compute(image)
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._device.type == "cuda" and not self._form.half:
                stack.enter_context(ieee_fp32())  # cuDNN's convolutions would take TF32 by themselves
            if self._form.half:
                stack.enter_context(torch.autocast(self._device.type, dtype=self._half))
            if self._form.compiled:
                # The compiler's own warnings (online softmax, TF32 advice, ...) say nothing about the result.
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            yield

    def _words(self, precision: Precision) -> str:
        words = "FP32, TF32 off" if not self._form.half else f"autocast to {precision.value.upper()}"
        if self._form.channels_last:
            words += ", channels last"
        return words + (", torch.compile" if self._form.compiled else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._form.compiled:
            torch.compiler.reset()


def open_baselines(
    checkpoint: LoadedCheckpoint,
    stack: contextlib.ExitStack,
    *,
    forms: Sequence[Form] = FORMS,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = SILENT,
) -> list[BaselineRunner]:
    """Open the forms that can run here; say which cannot, and why."""
    opened = []
    for form in forms:
        reason = why_not(form)
        if reason is None:
            opened.append(stack.enter_context(open_baseline(checkpoint, form, device=device, threads=threads)))
        else:
            progress.note(f"baseline {form.name} is left out: {reason}")
    return opened
