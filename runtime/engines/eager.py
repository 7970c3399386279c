"""The PyTorch network as a runner: the reference that every engine is compared with, and the forms it is timed in."""

import contextlib
import copy
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.environment import cpu_count, package_versions
from srdeploy.core.errors import CapabilityError, UsageError
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo
from srdeploy.core.shapes import TensorSpec, format_shape
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.engines.feeds import check_feeds
from srdeploy.runtime.engines.timer import timed

_PRECISIONS = {torch.float32: Precision.FP32, torch.float16: Precision.FP16, torch.bfloat16: Precision.BF16}


@dataclass(frozen=True)
class EagerForm:
    """One way in which people run a PyTorch network without exporting it.

    Attributes:
        name: for tables, for example "eager fp32".
        dtype: what the convolutions compute in.
        channels_last: keep weights and activations as NHWC in memory, the faster layout for FP16 on tensor cores.
        autocast: the weights stay FP32, and PyTorch casts to `dtype` layer by layer; otherwise the network is cast.
        compiler: "torch.compile" or "AOTInductor"; both compile anew for each input shape, at its first run.
        compile_mode: of torch.compile, such as "max-autotune".
        cudnn_benchmark: let cuDNN time its algorithms at the first run of a shape and keep the fastest (GPU only).
    """

    name: str
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    autocast: bool = False
    compiler: Literal["torch.compile", "AOTInductor"] | None = None
    compile_mode: str = "default"
    cudnn_benchmark: bool = False

    @property
    def numeric_mode(self) -> str:
        """The arithmetic, for tables and reports."""
        label = _PRECISIONS[self.dtype].value.upper()
        arithmetic = f"autocast to {label}" if self.autocast else f"{label}, TF32 off"
        layout = ["channels last"] if self.channels_last else []
        mode = "" if self.compile_mode == "default" else f" {self.compile_mode}"
        return ", ".join([arithmetic, *layout, *([f"{self.compiler}{mode}"] if self.compiler else [])])


REFERENCE = EagerForm("eager fp32")
"""The form that every engine is compared with: FP32, contiguous, TF32 off, nothing compiled."""


def open_eager(
    checkpoint: LoadedCheckpoint, form: EagerForm = REFERENCE, *, device: str = "cpu", threads: int | None = None
) -> "EagerRunner":
    """Open the checkpoint's own network.

    Args:
        checkpoint: the loaded checkpoint; its `reference` works on the 0..1 scale.
        form: how the network is run.
        device: "cpu", "cuda" or "cuda:N".
        threads: CPU threads, a setting of the whole process; None uses all processors.

    Raises:
        CapabilityError: the device is a GPU that PyTorch does not see.
        UsageError: the form's dtype is not float32, float16 or bfloat16.
    """
    if form.dtype not in _PRECISIONS:
        raise UsageError(f"eager dtype {form.dtype}", expected="torch.float32, torch.float16 or torch.bfloat16")
    return EagerRunner(checkpoint, form, _device(device), threads or cpu_count())


class EagerRunner:
    """Runs one form of a PyTorch network without autograd, TF32 off."""

    def __init__(self, checkpoint: LoadedCheckpoint, form: EagerForm, device: torch.device, threads: int) -> None:
        self._form = form
        self._device = device
        self._threads = threads
        self._lock = threading.Lock()
        self._layout = torch.channels_last if form.channels_last else torch.contiguous_format
        self._dtype = torch.float32 if form.autocast else form.dtype
        self._module = _placed_network(checkpoint, form, device, self._dtype)
        self._weight_bytes = sum(part.nbytes for part in (*self._module.parameters(), *self._module.buffers()))
        self._network: Callable[[torch.Tensor], torch.Tensor] = self._module
        if form.compiler == "torch.compile":
            self._network = torch.compile(self._module, mode=form.compile_mode, dynamic=False)
        elif form.compiler == "AOTInductor":
            self._network = _AheadOfTime(self._module)
        contract = checkpoint.contract(_PRECISIONS[form.dtype])
        self._inputs = (TensorSpec(INPUT, "float32", (-1, contract.channels, -1, -1)),)
        self._info = RunnerInfo(
            name=form.name,
            engine="eager",
            device=str(device),
            contract=contract,
            numeric_mode=form.numeric_mode,
            threads=threads if device.type == "cpu" else None,
            versions=package_versions(["torch"]),
        )

    @property
    def info(self) -> RunnerInfo:
        """What is behind this runner."""
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute the output: (N, C, H, W) float32 in [0, 1] to (N, C, H', W') float32, not clamped.

        Raises:
            UsageError: the input has another name, type or number of channels.
            CapabilityError: the network could not be compiled for this shape.
        """
        output = self._compute(self._image(feeds))
        return {OUTPUT: output.float().contiguous().cpu().numpy()}

    def run_tensors(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute on torch tensors; the result stays on the runner's device and in its dtype."""
        return {OUTPUT: self._compute(self._placed(feeds[INPUT]))}

    def run_metered(self, feeds: Mapping[str, NDArray[Any]]) -> int:
        """Compute once on a GPU and return the peak of its memory; see `srdeploy.core.runner.MeteredRunner`."""
        return allocator_peak(partial(self.run, feeds), self._device, cuda=torch.cuda, held_bytes=self._weight_bytes)

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        """Place the input and return a function that computes once, in milliseconds (see `TimedRunner`)."""
        return timed(partial(self._compute, self._image(feeds)), str(self._device))

    def _image(self, feeds: Mapping[str, NDArray[Any]]) -> torch.Tensor:
        check_feeds(feeds, self._inputs, engine=self._info.name)
        return self._placed(torch.from_numpy(np.require(feeds[INPUT], requirements=["C", "W"])))

    def _placed(self, image: torch.Tensor) -> torch.Tensor:
        return image.to(device=self._device, dtype=self._dtype, memory_format=self._layout)

    def _compute(self, image: torch.Tensor) -> torch.Tensor:
        if self._form.compiler is None:
            with self._arithmetic():
                return self._network(image)
        try:
            with warnings.catch_warnings():
                # A compiler's own warnings (online softmax, TF32 advice, ...) say nothing about the result.
                warnings.simplefilter("ignore")
                if isinstance(self._network, _AheadOfTime):
                    self._network.compile(image)  # here: torch.export refuses a process with IEEE convolutions
                with self._arithmetic():
                    return self._network(image)
        except Exception as error:  # a compiler may raise anything, from a missing header to its own defect
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise CapabilityError(
                f"{self._form.compiler} could not compile the network for {format_shape(tuple(image.shape))}: "
                f"{lines[0] if lines else type(error).__name__}"
            ) from error

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Exact FP32, no autograd, own threads; one caller at a time, as these are settings of the process."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._lock)
            stack.enter_context(torch.inference_mode())
            stack.enter_context(IEEE_FP32)
            if self._device.type == "cpu":
                if torch.get_num_threads() != self._threads:
                    torch.set_num_threads(self._threads)
            elif self._form.cudnn_benchmark:
                stack.enter_context(_CUDNN_BENCHMARK)
            if self._form.autocast:
                stack.enter_context(torch.autocast(self._device.type, dtype=self._form.dtype))
            yield

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._form.compiler == "torch.compile":
            torch.compiler.reset()
        if self._device.type == "cuda":
            del self._network, self._module
            torch.cuda.empty_cache()


class _AheadOfTime:
    """A network compiled by AOTInductor, one program per input shape."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._network = network
        self._programs: dict[tuple[int, ...], Callable[[torch.Tensor], torch.Tensor]] = {}

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return self._programs[tuple(image.shape)](image)

    def compile(self, image: torch.Tensor) -> None:
        """Compile the program of an image's shape, unless there is one."""
        from torch import _inductor

        shape = tuple(image.shape)
        if shape in self._programs:
            return
        program = torch.export.export(self._network, (image,))
        with tempfile.TemporaryDirectory(prefix="srdeploy-aot-") as folder:
            package = _inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "network.pt2"))
            self._programs[shape] = _inductor.aoti_load_package(package)


def _placed_network(
    checkpoint: LoadedCheckpoint, form: EagerForm, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """Return the network on its device; the checkpoint's own one where nothing changes, else a copy."""
    network = checkpoint.reference.eval()
    if form == REFERENCE and device.type == "cpu":
        return network
    network = copy.deepcopy(network).to(device=device, dtype=dtype)
    if form.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stubs
    return network


def _device(name: str) -> torch.device:
    """Return the device with its number: "cuda" is the current GPU."""
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise CapabilityError(f"device {name!r} was requested, and PyTorch sees no NVIDIA GPU here")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise CapabilityError(
            f"device {name!r} was requested, and PyTorch sees {torch.cuda.device_count()} NVIDIA GPUs here",
            expected=f"cuda:0 to cuda:{torch.cuda.device_count() - 1}",
        )
    return torch.device("cuda", index)


def allocator_peak(function: Callable[[], object], device: Any, *, cuda: Any, held_bytes: int) -> int:
    """Run a function once and return the peak of PyTorch's CUDA allocator that belongs to it, in bytes.

    Args:
        function: computes on the device.
        device: as `torch.cuda` takes it.
        cuda: the module `torch.cuda`.
        held_bytes: what the function's own network held before: its weights.
    """
    cuda.synchronize(device)
    cuda.reset_peak_memory_stats(device)
    before = int(cuda.memory_allocated(device))
    function()
    cuda.synchronize(device)
    peak = int(cuda.max_memory_allocated(device))
    return peak - before + held_bytes


class _ForTheProcess:
    """Change settings of the process for a block, and restore what was set before.

    Blocks of several threads overlap: the first one in saves, the last one out restores. A wrong order would leave a
    change behind; of the FP32 settings a mixture, with which PyTorch refuses to export.
    """

    def __init__(self, settings: Callable[[], tuple[Any, ...]], name: str, value: Any) -> None:
        self._settings = settings
        self._name = name
        self._value = value
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[Any, ...] = ()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = tuple(getattr(setting, self._name) for setting in self._settings())
                for setting in self._settings():
                    setattr(setting, self._name, self._value)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                for setting, before in zip(self._settings(), self._before, strict=True):
                    setattr(setting, self._name, before)


def _fp32_settings() -> tuple[Any, ...]:
    return torch.backends.cudnn.conv, torch.backends.cuda.matmul, torch.backends.mkldnn.conv  # type: ignore[attr-defined]


IEEE_FP32 = _ForTheProcess(_fp32_settings, "fp32_precision", "ieee")
"""TF32 off, and oneDNN's reduced FP32 modes."""
_CUDNN_BENCHMARK = _ForTheProcess(lambda: (torch.backends.cudnn,), "benchmark", True)
