"""The clock of `quantize` on a GPU: builds graphs with TensorRT and times them there."""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from srdeploy.core.contract import INPUT
from srdeploy.core.precision import Target
from srdeploy.core.progress import Progress
from srdeploy.core.runner import KernelTime, TimedRunner
from srdeploy.core.shapes import Shape, ShapeProfile, format_shape
from srdeploy.runtime.bench.inputs import bench_image
from srdeploy.runtime.bench.turns import Effort, measure, statistics_of
from srdeploy.runtime.engines.gpu import Gpu, find_gpu
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine, engine_status, open_engine
from srdeploy.runtime.engines.sidecar import read_engine
from srdeploy.runtime.engines.tensorrt.full import FULL

_EFFORT = Effort(seconds=2.0)


@dataclass(frozen=True)
class TensorRtClock:
    """Times graphs with TensorRT; see `calibration.search.layer_times.Clock`.

    Attributes:
        gpu: that engines are built for and run on.
        shape: of the input.
        progress: of the builds.
        effort: how long latencies are measured.
    """

    gpu: Gpu
    shape: Shape
    progress: Progress
    effort: Effort = _EFFORT

    @property
    def place(self) -> str:
        """Engine, processor and input shape."""
        return f"{FULL.title} on {self.gpu} at {format_shape(self.shape)}"

    def kernel_times(self, path: Path) -> Sequence[KernelTime]:
        """Return the time of each kernel of a graph's engine."""
        from srdeploy.runtime.engines.tensorrt.kernel_times import kernel_times

        with tempfile.TemporaryDirectory(prefix="srdeploy-clock-") as folder:
            return kernel_times(read_engine(self._built(path, Path(folder))), self.shape, self.gpu.device)

    def latencies_ms(self, *paths: Path) -> tuple[float, ...]:
        """Return the median milliseconds of each graph's engine on the GPU alone; the engines take turns."""
        with tempfile.TemporaryDirectory(prefix="srdeploy-clock-") as folder, ExitStack() as stack:
            functions = []
            for path in paths:
                runner = stack.enter_context(open_engine(self._built(path, Path(folder)), device=self.gpu.device))
                assert isinstance(runner, TimedRunner)
                functions.append(runner.prepare({INPUT: bench_image(self.shape)}))
            return tuple(statistics_of(times).median_ms for times in measure(functions, self.effort))

    def _built(self, path: Path, folder: Path) -> Path:
        profile = ShapeProfile(self.shape, self.shape, self.shape)
        options = BuildOptions(profiles=(profile,), device=self.gpu.device)
        plan = folder / f"{path.stem}.plan"
        return build_engine(path, plan, engine=FULL.name, options=options, progress=self.progress).path


def clock_for(target: Target, shape: Shape, progress: Progress, device: str = "auto") -> TensorRtClock | None:
    """Return the clock of a target; None where nothing of it can be built and timed here."""
    if target is not Target.TENSORRT or engine_status(FULL.name).why_not_build:
        return None
    gpu = find_gpu(device)
    return None if gpu is None else TensorRtClock(gpu, shape, progress)
