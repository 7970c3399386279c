"""Open an engine, an ONNX file or a bundle, and upscale pictures of any size with it.

    with Upscaler.open("rcan_x4.srd") as up:
        large = up(small)  # numpy (H, W, C) uint8, uint16 or float32; torch (C, H, W) or (N, C, H, W)

A picture runs as a whole if it fits the memory budget and the engine, else in tiles. Every tile is checked for NaN,
infinity and collapse to one color (`srdeploy.upscale.guards`).
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import CapabilityError, GpuMemoryError, UsageError
from srdeploy.core.memory import default_memory
from srdeploy.core.precision import Precision
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import Runner, RunnerInfo, run_image
from srdeploy.upscale.alpha import SpreadSource
from srdeploy.upscale.budget import Decision, TileSettings, decide, gpu_memory, needs_tiles
from srdeploy.upscale.guards import Guard, Tally, check_input, check_rows
from srdeploy.upscale.image_report import ImageReport
from srdeploy.upscale.lock_step import LockStep, lock_step_of
from srdeploy.upscale.model_files import ModelFiles, find_models
from srdeploy.upscale.planes import ArraySource, Chroma, Conversion, Floats, PixelSource, constant_alpha, converted
from srdeploy.upscale.tiles import Planes, SeamProbe, seam_score, stitch

if TYPE_CHECKING:
    import torch

AlphaMode = Literal["spread", "separate"]
"""What is done with the colors of fully transparent pixels: replaced by visible ones nearby, so that no fringe appears
around a cut-out; or kept, color and alpha being two pictures (textures whose alpha is a mask for something else)."""


class Upscaler:
    """An opened network and the settings to run it with. Use it as a context manager.

    Calls from several threads are safe: they take turns.
    """

    def __init__(
        self,
        runner: Runner,
        settings: TileSettings | None = None,
        *,
        open_fallback: Callable[[], Runner] | None = None,
        onnx: Path | None = None,
        threads: int | None = None,
        identity: str | None = None,
        alpha: AlphaMode = "spread",
    ) -> None:
        """Wrap an opened runner, which is closed with the upscaler.

        Args:
            runner: the engine.
            settings: tiles and memory.
            open_fallback: opens the FP32 runner for tiles that the engine fails on; None when there is none.
            onnx: the graph behind the engine, needed to run channel attention in lock-step.
            threads: CPU threads for the lock-step stages.
            identity: SHA-256 of the engine or ONNX file; by default the checkpoint's with the engine's name.
            alpha: see `AlphaMode`.
        """
        self._identity = identity or f"{runner.info.contract.checkpoint_sha256} {runner.info.name}"
        self._settings = settings or TileSettings()
        self._alpha = alpha
        self._resources = contextlib.ExitStack()
        self._runner = self._resources.enter_context(runner)
        self._open_fallback = open_fallback
        self._fallback: Runner | None = None
        self._onnx = onnx
        self._threads = threads
        self._stages: LockStep | None = None
        # Measured once: frames of a video must not alternate between whole and tiles as free memory fluctuates.
        self._free_memory = default_memory()
        self._gpu_limit = gpu_memory(runner.info.device)
        self._tried: set[tuple[int, ...]] = set()
        self._lock = threading.RLock()
        self._closed = False

    @classmethod
    def open(
        cls,
        path: Path | str,
        settings: TileSettings | None = None,
        *,
        engine: str | None = None,
        precision: Precision | None = None,
        device: str = "auto",
        threads: int | None = None,
        fallback: Path | None = None,
        alpha: AlphaMode = "spread",
    ) -> "Upscaler":
        """Open an engine, an ONNX file (on ONNX Runtime unless `engine` is given) or a bundle.

        Args:
            path: the file, or the folder of a bundle, whose best engine that runs here is opened. One that does not
                open (another GPU, another release, memory) is replaced by the next, with a RuntimeWarning.
            settings: tiles and memory.
            engine, precision: restrict the choice from a bundle; `engine` also applies to an ONNX file.
            device: "auto", "cpu", "cuda" or "cuda:N".
            threads: CPU threads, None for all.
            fallback: FP32 ONNX file for tiles that the engine fails on; a bundle has its own.
            alpha: see `AlphaMode`.

        Raises:
            InputError, CapabilityError, UsageError: as `srdeploy.runtime.engines.registry.open_engine` and
                `srdeploy.runtime.bundle.choose_engine`.
        """
        from srdeploy.runtime.engines.registry import is_engine, open_engine

        models = find_models(Path(path), engine=engine, precision=precision, device=device, fallback=fallback)
        runner, found = open_first(models, device, threads)
        path, fallback = found.path, found.fallback
        # Lock-step cuts the graph that the engine computes. A built FP32 engine computes the FP32 graph; an engine of
        # another precision computes a different one and is not cut.
        onnx = path if path.suffix == ".onnx" and not is_engine(path) else None
        if fallback is not None and runner.info.contract.precision is Precision.FP32:
            onnx = fallback
        same = fallback is not None and path == fallback and runner.info.engine == "onnxruntime"

        def open_fallback() -> Runner:
            assert fallback is not None
            return open_engine(fallback, engine="onnxruntime", threads=threads)

        return cls(
            runner,
            settings,
            open_fallback=None if fallback is None or same else open_fallback,
            onnx=onnx,
            threads=threads,
            identity=f"{sha256_of_file(path)} {runner.info.engine}",
            alpha=alpha,
        )

    @property
    def runner(self) -> Runner:
        """The opened engine.

        Raises:
            UsageError: the upscaler is closed.
        """
        if self._closed:
            raise UsageError("the upscaler is closed", next_step="use it inside its with block")
        return self._runner

    @property
    def identity(self) -> str:
        """Everything that determines the result (network bytes, engine family, tile settings) as one string."""
        settings = self._settings
        return f"{self._identity} {settings.mode} {settings.side} {settings.overlap} {self._alpha}"

    @property
    def info(self) -> RunnerInfo:
        """Description of the engine."""
        return self._runner.info

    @property
    def contract(self) -> ModelContract:
        """Contract of the network: scale, colors."""
        return self._runner.info.contract

    @overload
    def __call__(self, image: NDArray[Any]) -> NDArray[Any]: ...

    @overload
    def __call__(self, image: "torch.Tensor") -> "torch.Tensor": ...

    def __call__(self, image: "NDArray[Any] | torch.Tensor") -> "NDArray[Any] | torch.Tensor":
        """Upscale one picture (or a batch of torch planes).

        Args:
            image: numpy (H, W) or (H, W, C) of uint8, uint16 or float32 in 0..1, with C = 1 gray, 2 gray + alpha,
                3 RGB, 4 RGB + alpha (not premultiplied); or torch (C, H, W) or (N, C, H, W) of uint8 or float32 in
                0..1, on the CPU or a GPU.

        Returns:
            The same kind: layout, type and (torch) device. Whole numbers are clamped and rounded half to even; floats
            are not clamped.

        Raises:
            UsageError: another type or shape, or the tile settings do not fit.
            InputError: a float image holds NaN or infinity.
            GateError: a tile is NaN, infinity or one color, and no fallback could repair it.
        """
        if isinstance(image, np.ndarray):
            return self.upscale(image)[0]
        if type(image).__module__.split(".")[0] == "torch":
            from srdeploy.upscale.torch_images import upscale_tensor

            return upscale_tensor(self, image)
        raise UsageError(f"an image of type {type(image).__name__}", expected="a numpy array or a torch tensor")

    def upscale(
        self, image: NDArray[Any], *, dtype: Any = None, progress: Progress = SILENT
    ) -> tuple[NDArray[Any], ImageReport]:
        """Upscale a numpy picture and return it with a report; `dtype` selects another output type."""
        pixels = _checked(image)
        target = np.dtype(dtype or pixels.dtype)
        rows, report = self.rows(ArraySource(pixels), progress=progress)
        height, width = report.output_size
        output = np.empty((height, width, pixels.shape[2]), target)
        with self._lock:
            begin = 0
            for band in rows:
                output[begin : begin + len(band)] = converted(band, target)
                begin += len(band)
        if not report.decision.plan.whole:
            report.seam_score = seam_score(output, report.decision.plan, self.contract.scale)
        return (output[..., 0] if image.ndim == 2 else output), report

    def decide(self, height: int, width: int, channels: int = 3, *, memory_bytes: int | None = None) -> Decision:
        """Return how a picture of this size would be run; `memory_bytes` is the budget if the settings have none."""
        groups = 2 if channels in (2, 4) else 1
        settings = replace(self._settings, memory_bytes=self._budget(memory_bytes))
        if self._wants_lock_step(height, width, settings):
            decision = self._lock_step().decide(height, width, settings, groups=groups)
            if decision is not None:
                return decision
        return decide(height, width, self.contract, self.info.profile, settings, groups=groups)

    def _wants_lock_step(self, height: int, width: int, settings: TileSettings) -> bool:
        """Return True if a network with channel attention needs tiles, and overlapped ones are not requested."""
        if self.contract.receptive_radius is not None or settings.mode in ("whole", "overlapped"):
            return False
        if not needs_tiles(height, width, self.contract, self.info.profile, settings):
            return False
        return settings.mode == "exact" or (settings.overlap is None and self._can_cut())

    def rows(
        self, source: PixelSource, *, memory_bytes: int | None = None, progress: Progress = SILENT
    ) -> tuple[Iterator[Floats], ImageReport]:
        """Upscale a picture that may be too large for memory.

        Args:
            source: provides the rows.
            memory_bytes: budget if the settings have none.
            progress: receives the number of tiles.

        Returns:
            Finished rows from top to bottom, each (rows, W', C) float32 not clamped; and the report, complete when the
            rows are exhausted.
        """
        height, width, channels = source.shape
        constant = constant_alpha(source)
        contract = self.contract
        conversion = Conversion(
            colours=contract.colours,
            channels=channels,
            scale=contract.scale,
            trim=contract.trim,
            alpha=channels in (2, 4) and constant is None,
            constant_alpha=constant,
            uint8=contract.form.io == "uint8",
        )
        if conversion.alpha and self._alpha == "spread":
            source = SpreadSource(source)
        decision = self._decide_and_try(height, width, channels if conversion.alpha else 3, memory_bytes)
        _, _, *output_size = contract.output_shape((1, contract.channels, height, width))
        report = ImageReport((height, width), (output_size[0], output_size[1]), decision)
        run = self._lock_step_bands if decision.lock_step else self._bands
        return run(source, conversion, report, progress), report

    def run_planes(self, planes: Planes) -> Planes:
        """Run planes that are network inputs already, untiled: (N, C, H, W) to (N, C, H', W'). Every output is checked.

        Raises:
            InputError, GateError: as calling the upscaler.
        """
        check_input(planes)
        return Guard(self._run, self.info, self._fallback_run(), Tally())(planes)

    def run_tensors(self, feeds: "dict[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """Run tensors on the engine's device without checks, for engines that accept them."""
        runner: Any = self.runner
        with self._lock:
            outputs: dict[str, torch.Tensor] = runner.run_tensors(feeds)
        return outputs

    def close(self) -> None:
        """Free the engines. The upscaler cannot be used afterwards."""
        self._closed = True
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _decide_and_try(self, height: int, width: int, channels: int, memory_bytes: int | None) -> Decision:
        """Return a decision whose tiles the GPU has memory for: it is tried, and the limit is halved as needed.

        Raises:
            GpuMemoryError: the smallest possible tiles are too large, or the settings leave no choice.
        """
        while True:
            decision = self.decide(height, width, channels, memory_bytes=memory_bytes)
            plan = decision.plan
            batch = decision.batch if decision.fill_batches else min(decision.batch, plan.tiles)
            shape = (batch, self.contract.channels, plan.rows.window, plan.columns.window)
            if self._gpu_limit is None or decision.lock_step or shape in self._tried:
                return decision
            try:
                self._run(np.zeros(shape, np.float32))
            except GpuMemoryError as full:
                self._shrink(decision, full, lambda: self.decide(height, width, channels, memory_bytes=memory_bytes))
            else:
                self._tried.add(shape)
                return decision

    def _shrink(self, decision: Decision, full: GpuMemoryError, decide: Callable[[], Decision]) -> None:
        """Halve the limit until it leads to another decision; raise `full` if there is none."""
        assert self._gpu_limit is not None
        while True:
            self._gpu_limit //= 2
            if self._gpu_limit == 0:  # no limit leads to other tiles: their size was given
                raise full
            try:
                smaller = decide()
            except UsageError:  # not one tile fits
                raise full from None
            if (smaller.batch, smaller.plan) != (decision.batch, decision.plan):
                return

    def _budget(self, memory_bytes: int | None) -> int:
        budget = self._settings.memory_bytes or memory_bytes or self._free_memory
        return budget if self._gpu_limit is None else min(budget, self._gpu_limit)

    def _bands(
        self, source: PixelSource, conversion: Conversion, report: ImageReport, progress: Progress
    ) -> Iterator[Floats]:
        chroma = Chroma(source, conversion)
        plan = report.decision.plan
        guard = Guard(self._run, self.info, self._fallback_run(), report.tally)
        probe = None
        padded = plan.rows.padding or plan.columns.padding
        if not (report.decision.exact or plan.whole or padded or report.decision.fill_batches):
            multiple = int(self.contract.configuration.get("unshuffle", 1) or 1)
            probe = SeamProbe(plan, scale=conversion.scale, trim=conversion.trim, multiple=multiple)

        def read_rows(begin: int, end: int) -> Planes:
            strip = conversion.planes(source.rows(begin, end))
            if probe is not None:
                probe.see(begin, strip)
            return strip

        begin = 0
        with progress.task("upscaling", total=plan.tiles * conversion.groups) as advance:
            for planes in stitch(
                plan,
                scale=conversion.scale,
                trim=conversion.trim,
                read_rows=read_rows,
                run=guard,
                batch=report.decision.batch,
                fill_batches=report.decision.fill_batches,
                done=lambda tiles: advance(tiles),
            ):
                if probe is not None:
                    probe.take(begin, planes)
                begin += planes.shape[2]
                yield conversion.pixels(planes, chroma)
        if probe is not None:
            report.fidelity_db = probe.fidelity_db(Guard(self._run, self.info, self._fallback_run(), Tally()))

    def _lock_step_bands(
        self, source: PixelSource, conversion: Conversion, report: ImageReport, progress: Progress
    ) -> Iterator[Floats]:
        """As `_bands`, in lock-step; finished rows are checked as tiles are."""
        lock = self._lock_step()
        plan, chroma = report.decision.plan, Chroma(source, conversion)
        tiles = plan.tiles * conversion.groups * len(lock.stages)

        def group_rows(group: int) -> Callable[[int, int], Planes]:
            return lambda begin, end: conversion.planes(source.rows(begin, end))[group : group + 1]

        with progress.task("upscaling in lock-step", total=tiles) as advance:
            groups = [
                lock.bands(
                    group_rows(group), report.decision, scale=conversion.scale, done=lambda tiles: advance(tiles)
                )
                for group in range(conversion.groups)
            ]
            begin = 0
            for bands in zip(*groups, strict=True):
                planes = np.concatenate(bands)
                end = begin + planes.shape[2] // conversion.scale
                report.tally.tiles += len(plan.columns.starts) * conversion.groups
                check_rows(conversion.planes(source.rows(begin, end)), planes, self.info)
                begin = end
                yield conversion.pixels(planes, chroma)

    def _can_cut(self) -> bool:
        """Return True if the network of this engine can be run in stages."""
        try:
            self._lock_step()
        except UsageError:
            return False
        return True

    def _lock_step(self) -> LockStep:
        if self._stages is None:
            memory = self._settings.memory_bytes or self._free_memory
            self._stages = lock_step_of(self.runner, self._onnx, threads=self._threads, memory_bytes=memory)
        return self._stages

    def _run(self, tiles: Planes) -> Planes:
        with self._lock:
            return run_image(self.runner, np.ascontiguousarray(tiles))

    def _fallback_run(self) -> Callable[[], Callable[[Planes], Planes]] | None:
        opener = self._open_fallback
        if opener is None:
            return None

        def runner() -> Callable[[Planes], Planes]:
            with self._lock:
                if self._fallback is None:
                    self._fallback = self._resources.enter_context(opener())
                fallback = self._fallback
            return lambda tiles: run_image(fallback, np.ascontiguousarray(tiles))

        return runner


def _checked(image: NDArray[Any]) -> NDArray[Any]:
    if image.dtype not in (np.uint8, np.uint16, np.float32):
        raise UsageError(f"pixels of type {image.dtype}", expected="uint8, uint16 or float32")
    pixels = image[..., None] if image.ndim == 2 else image
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4) or 0 in pixels.shape:
        raise UsageError(f"an image of shape {image.shape}", expected="(H, W) or (H, W, C) with C from 1 to 4")
    check_input(pixels)
    return pixels


def open_first(models: Iterator[ModelFiles], device: str, threads: int | None) -> tuple[Runner, ModelFiles]:
    """Open the first that opens here; a warning names why those before it did not.

    Raises:
        CapabilityError: none opens; the reason of the first.
    """
    from srdeploy.runtime.engines.registry import open_engine

    refused: list[CapabilityError] = []
    for found in models:
        try:
            runner = open_engine(found.path, engine=found.engine, device=device, threads=threads)
        except CapabilityError as error:
            refused.append(error)
            continue
        if refused:
            reasons = "; ".join(str(error.found) for error in refused)
            warnings.warn(f"{reasons}: {found.path} is used instead", RuntimeWarning, stacklevel=3)
        return runner, found
    raise refused[0]
