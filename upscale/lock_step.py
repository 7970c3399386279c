"""Exact tiles for networks with channel attention: run each stage over all tiles, then average, then the next stage.

Feature maps are stored between stages, in memory if they fit the budget and otherwise in files, read and written a row
of tiles at a time. Memory is bounded by the budget; time is that of the whole image plus a thin overlap (the reach of a
stage's convolutions, 2 to 4 pixels) and the traffic of the stored maps.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.environment import cpu_count
from srdeploy.core.errors import CapabilityError, InputError, UsageError
from srdeploy.core.ort import cpu_session
from srdeploy.core.runner import Runner
from srdeploy.core.sizes import format_bytes
from srdeploy.runtime.engines.openvino import shared_core
from srdeploy.upscale.budget import Decision, TileSettings
from srdeploy.upscale.network_cuts import Arrays, Stage, StageRun, live_maps
from srdeploy.upscale.onnx_cuts import stages_from_onnx
from srdeploy.upscale.tiles import Planes, TilePlan, plan_tiles

_SIDE = 192
"""Side of the tiles: with such a thin overlap larger ones save little, and these fit the processor's cache."""
_SHARE_OF_DISK = 0.9
_SHARE_OF_MAPS = 0.6
"""Share of the budget for stored maps; the rest is for the tiles."""


def lock_step_of(runner: Runner, onnx_path: Path | None, *, threads: int | None, memory_bytes: int) -> "LockStep":
    """Cut the network behind an engine.

    Args:
        runner: the engine.
        onnx_path: the graph that the engine computes, None if it is not available.
        threads: CPU threads, None for all.
        memory_bytes: budget for maps and tiles.

    Raises:
        UsageError: the engine cannot run stages, or the network has operations that are not local.
        InputError: the graph cannot be read.
    """
    form = runner.info.contract.form
    if not form.plain:
        raise UsageError(
            f"exact tiles of a network with channel attention in a graph of another form ({form})",
            expected="a plain graph",
            next_step="use --tiles overlapped, or the graph that it was made from",
        )
    open_stage = _STAGE_OPENERS.get(runner.info.engine)
    if open_stage is None or onnx_path is None:
        raise UsageError(
            f"exact tiles of a network with channel attention on {runner.info.name}",
            expected=f"an ONNX file on {' or '.join(_STAGE_OPENERS)}: a built engine cannot be cut",
            next_step="use --tiles overlapped, or the bundle's model.fp32.onnx",
        )
    try:
        stages = stages_from_onnx(onnx.load(onnx_path))
    except (OSError, ValueError) as error:
        raise InputError(f"{onnx_path} cannot be read ({error})") from error
    count = threads or cpu_count()
    return LockStep(stages, lambda stage: open_stage(stage.model, count), memory_bytes=memory_bytes)


class LockStep:
    """A network cut into stages, run in lock-step over the tiles of a picture."""

    def __init__(self, stages: Sequence[Stage], open_stage: Callable[[Stage], StageRun], *, memory_bytes: int) -> None:
        """Wrap a network that is cut already.

        Args:
            stages: of the network, in order.
            open_stage: makes a stage runnable; its result is freed before the next stage is opened.
            memory_bytes: budget for maps and tiles.
        """
        self.stages = list(stages)
        self._open = open_stage
        self._memory = memory_bytes

    @property
    def radius(self) -> int:
        """Overlap on each side that makes every stage exact."""
        return max(stage.radius for stage in self.stages)

    def decide(self, height: int, width: int, settings: TileSettings, *, groups: int = 1) -> Decision | None:
        """Return how a picture runs in lock-step; None if its maps do not fit in memory and the mode is not "exact".

        Args:
            height, width: of the picture.
            settings: the options given; with mode "exact" maps that do not fit in memory are stored in files.
            groups: network inputs per picture, 2 with alpha.
        """
        needed = height * width * self.map_bytes_per_pixel() * groups
        fits = needed <= (settings.memory_bytes or self._memory) * _SHARE_OF_MAPS
        if not fits and settings.mode != "exact":
            return None
        side = max(settings.side or _SIDE, 2 * self.radius + 1)
        plan = plan_tiles(height, width, window=(side, side), halo=self.radius)
        where = "in memory" if fits else "in files"
        reason = (
            f"{plan.tiles} exact tiles of {plan.columns.window}x{plan.rows.window} in lock-step, "
            f"{len(self.stages)} stages, overlap {self.radius}, feature maps {where} ({format_bytes(needed)})"
        )
        return Decision(plan, 1, False, True, True, reason, maps_in_memory=fits)

    def bands(
        self,
        read_rows: Callable[[int, int], Planes],
        decision: Decision,
        *,
        scale: int,
        done: Callable[[int], None] = lambda tiles: None,
    ) -> Iterator[Planes]:
        """Run one picture and yield finished rows of its output.

        Args:
            read_rows: returns rows begin..end of the picture's planes, (1, C, end - begin, W).
            decision: from `decide`.
            scale: output pixels per input pixel.
            done: receives the number of tiles of all stages that were run.

        Yields:
            (1, C, rows, W') float32.
        """
        plan = decision.plan
        size = plan.rows.size, plan.columns.size
        with (
            tempfile.TemporaryDirectory(prefix="srdeploy-maps.") as folder,
            contextlib.closing(_Maps(Path(folder), size, decision.maps_in_memory)) as maps,
        ):
            if not decision.maps_in_memory:
                self._check_space(size, Path(folder))
            yield from self._run_stages(maps, read_rows, plan, scale, done)

    def _run_stages(
        self,
        maps: "_Maps",
        read_rows: Callable[[int, int], Planes],
        plan: TilePlan,
        scale: int,
        done: Callable[[int], None],
    ) -> Iterator[Planes]:
        means: Arrays = {}
        for number, stage in enumerate(self.stages):
            run = self._open(stage)
            rows = _StageRows(stage, run, plan, read_rows if number == 0 else None, maps, means, scale, done)
            if stage.pooled is None:
                yield from rows.outputs()
            else:
                means[str(stage.mean)] = rows.mean()
                maps.forget_all_but({name for later in self.stages[number + 1 :] for name in later.maps_in})

    def map_bytes_per_pixel(self) -> int:
        """Return the maximum bytes of stored maps per pixel of the picture."""
        return 4 * max(stage.channels for stage in self.stages) * live_maps(self.stages)

    def _check_space(self, size: tuple[int, int], folder: Path) -> None:
        needed = size[0] * size[1] * self.map_bytes_per_pixel()
        free = shutil.disk_usage(folder).free
        if needed > free * _SHARE_OF_DISK:
            raise CapabilityError(
                f"exact tiles of {size[1]}x{size[0]} need {format_bytes(needed)} for feature maps; {folder.parent} has "
                f"{format_bytes(free)} free",
                next_step="set TMPDIR to a larger disk, or use --tiles overlapped",
            )


class _Waiting(Protocol):
    """One feature map between stages."""

    def read(self, begin: int, end: int) -> NDArray[Any]: ...

    def write(self, begin: int, rows: NDArray[Any]) -> None: ...

    def close(self) -> None: ...


class _InMemory:
    def __init__(self, channels: int, size: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self._array = np.empty((channels, *size), dtype)

    def read(self, begin: int, end: int) -> NDArray[Any]:
        return self._array[:, begin:end]

    def write(self, begin: int, rows: NDArray[Any]) -> None:
        self._array[:, begin : begin + rows.shape[1]] = rows

    def close(self) -> None:
        del self._array


class _InFile:
    """Rows are consecutive, (H, C, W), so that a range of rows is one read; plain files, not mapped into memory."""

    def __init__(self, path: Path, channels: int, size: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self._stream = path.open("w+b")
        self._path = path
        self._row = (channels, size[1])
        self._dtype = dtype
        self._row_bytes = channels * size[1] * dtype.itemsize

    def read(self, begin: int, end: int) -> NDArray[Any]:
        self._stream.seek(begin * self._row_bytes)
        data = np.fromfile(self._stream, self._dtype, (end - begin) * self._row[0] * self._row[1])
        rows: NDArray[Any] = data.reshape(end - begin, *self._row)
        return rows.transpose(1, 0, 2)

    def write(self, begin: int, rows: NDArray[Any]) -> None:
        self._stream.seek(begin * self._row_bytes)
        self._stream.write(np.ascontiguousarray(rows.transpose(1, 0, 2)).data)

    def close(self) -> None:
        self._stream.close()
        self._path.unlink()


@dataclass
class _Maps:
    """All stored feature maps."""

    folder: Path
    size: tuple[int, int]
    in_memory: bool
    waiting: dict[str, _Waiting] = field(default_factory=dict)
    made: int = 0

    def write(self, name: str, begin: int, rows: NDArray[Any]) -> None:
        """Store rows (C, h, W) of a map."""
        if name not in self.waiting:
            self.made += 1
            self.waiting[name] = (
                _InMemory(rows.shape[0], self.size, rows.dtype)
                if self.in_memory
                else _InFile(self.folder / str(self.made), rows.shape[0], self.size, rows.dtype)
            )
        self.waiting[name].write(begin, rows)

    def read(self, name: str, begin: int, end: int) -> NDArray[Any]:
        """Return rows (C, end - begin, W) of a map."""
        return self.waiting[name].read(begin, end)

    def forget_all_but(self, needed: set[str]) -> None:
        """Free the maps that no later stage reads."""
        for name in set(self.waiting) - needed:
            self.waiting.pop(name).close()

    def close(self) -> None:
        """Free all maps."""
        self.forget_all_but(set())


@dataclass
class _StageRows:
    """One stage over all tiles, a row of tiles at a time."""

    stage: Stage
    run: StageRun
    plan: TilePlan
    read_input: Callable[[int, int], Planes] | None
    maps: _Maps
    means: Arrays
    scale: int
    done: Callable[[int], None]

    def mean(self) -> NDArray[Any]:
        """Store the stage's maps and return the mean of its pooled map over the whole picture, (1, C, 1, 1)."""
        stage, rows, columns = self.stage, self.plan.rows, self.plan.columns
        assert stage.pooled is not None
        total: NDArray[Any] | None = None
        kind: np.dtype[Any] | None = None
        for index, start in enumerate(rows.starts):
            begin, end = rows.support(index, 1, rows.size)
            band: Arrays = {}
            for place, outputs in self._tiles(start):
                left, right = columns.support(place, 1, columns.size)
                offset = columns.starts[place]
                core = np.s_[:, begin - start : end - start, left - offset : right - offset]
                pooled = outputs[stage.pooled][0][core]
                partial = pooled.sum(axis=(1, 2), dtype=np.float64)
                total, kind = partial if total is None else total + partial, pooled.dtype
                for name in stage.maps_out:
                    made = outputs[name][0]
                    if name not in band:
                        band[name] = np.empty((made.shape[0], end - begin, columns.size), made.dtype)
                    band[name][:, :, left:right] = made[core]
            for name, made in band.items():
                self.maps.write(name, begin, made)
        assert total is not None
        mean: NDArray[Any] = (total / (rows.size * columns.size)).astype(kind).reshape(1, -1, 1, 1)
        return mean

    def outputs(self) -> Iterator[Planes]:
        """Yield the output rows of the last stage, (1, C, rows, W')."""
        rows, columns, scale = self.plan.rows, self.plan.columns, self.scale
        for index, start in enumerate(rows.starts):
            begin, end = rows.support(index, scale, rows.size * scale)
            band: Planes | None = None
            for place, outputs in self._tiles(start):
                made = outputs[OUTPUT]
                left, right = columns.support(place, scale, columns.size * scale)
                offset = columns.starts[place] * scale
                if band is None:
                    band = np.empty((1, made.shape[1], end - begin, columns.size * scale), np.float32)
                band[..., left:right] = made[
                    :, :, begin - start * scale : end - start * scale, left - offset : right - offset
                ]
            assert band is not None
            yield band

    def _tiles(self, start: int) -> Iterator[tuple[int, Arrays]]:
        """Run a row of tiles: yield each one's column and outputs."""
        stage, columns = self.stage, self.plan.columns
        last = start + self.plan.rows.window
        strips: Arrays = {}
        for name in stage.maps_in:
            if name == INPUT:
                # Only the first stage can read the picture, whose rows come once, from top to bottom.
                strips[name] = self._input(start, last)
            else:
                strips[name] = self.maps.read(name, start, last)
        for place, left in enumerate(columns.starts):
            feeds: Arrays = {
                name: np.ascontiguousarray(strip[None, :, :, left : left + columns.window])
                for name, strip in strips.items()
            }
            feeds |= {name: self.means[name] for name in stage.means_in}
            yield place, self.run(feeds)
            self.done(1)

    def _input(self, begin: int, end: int) -> NDArray[Any]:
        if self.read_input is None:
            raise UsageError("the network reads its input again after a pooling", next_step="use --tiles overlapped")
        planes: NDArray[Any] = self.read_input(begin, end)[0]
        return planes


def _onnxruntime_stage(model: onnx.ModelProto, threads: int) -> StageRun:
    session = cpu_session(model, threads=threads)
    names = [value.name for value in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _openvino_stage(model: onnx.ModelProto, threads: int) -> StageRun:
    core = shared_core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)
    request = compiled.create_infer_request()
    names = [value.name for value in model.graph.output]

    def run(feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        request.infer(dict(feeds), share_inputs=True)
        return {name: request.get_tensor(name).data.copy() for name in names}

    return run


_STAGE_OPENERS: dict[str, Callable[[onnx.ModelProto, int], StageRun]] = {
    "onnxruntime": _onnxruntime_stage,
    "openvino": _openvino_stage,
}
"""Engines that can run stages of an ONNX graph; built GPU engines cannot be cut."""
