"""Latency of several runners on one shape, measured so that the numbers can be compared and believed.

What is measured, and never mixed:

- *end to end*: from a numpy image to a numpy result, as a caller sees it (checks, copies, transfers, conversions);
- *compute*: the network alone, inputs and outputs already in place on the device, for runners that offer it.

What disturbs such numbers, and what is done about it: the first runs are slow (allocation, kernel selection, clocks
rising), so each runner is warmed up by count and by time; a machine drifts, so the candidates take turns, A B C A B C,
instead of one after the other, and their ratios stay meaningful when everything slows down; single runs are
disturbed by whatever else the machine does, so the median is reported with its confidence interval, and percentiles
beside it. A median whose interval stays wide, or that moves from the first half to the second, is called unstable.

How to read it: compare medians of one table only. p90 and p99 tell about the machine as much as about the engine.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT
from srdeploy.core.errors import UnstableError, UsageError
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import MeteredRunner, Runner, RunnerInfo, TimedRunner
from srdeploy.core.shapes import Shape, format_shape
from srdeploy.runtime.bench.inputs import bench_image
from srdeploy.runtime.bench.memory import ALLOCATOR, LOWER_BOUND, ON_CPU, Memory, process_memory, run_memory
from srdeploy.runtime.engines.timer import timed

Kind = Literal["compute", "end-to-end"]

NOT_MEASURED = Memory(None, "not measured", None, "not measured")

_Z95 = 1.959964


@dataclass(frozen=True)
class Effort:
    """How long to measure, and what counts as stable.

    Attributes:
        warmup_runs: least number of runs before measuring, per runner and kind.
        warmup_seconds: least time before measuring, per runner and kind.
        min_runs: least number of measured runs.
        max_runs: most measured runs.
        seconds: time budget per runner and kind; it may be passed to reach `min_runs`.
        tolerance: a median is stable when its 95 % confidence interval reaches at most this share to either side,
            and measuring stops early once every row is within half of it.
        drift: and when the medians of the first and second half of the runs differ by at most this share.
    """

    warmup_runs: int = 3
    warmup_seconds: float = 0.5
    min_runs: int = 15
    max_runs: int = 400
    seconds: float = 4.0
    tolerance: float = 0.05
    drift: float = 0.10

    def __post_init__(self) -> None:
        if self.min_runs < 5 or self.max_runs < self.min_runs or self.warmup_runs < 1:
            raise UsageError(
                f"{self.warmup_runs} warm-up, {self.min_runs} to {self.max_runs} measured runs",
                expected="at least 1 warm-up run and 5 measured ones: fewer give no median worth printing",
            )


@dataclass(frozen=True)
class Statistics:
    """What a sequence of durations says.

    Attributes:
        median_ms, p90_ms, p99_ms, min_ms, mean_ms: milliseconds.
        n: measured runs.
        cov: coefficient of variation, standard deviation over mean.
        ci_share: half-width of the median's 95 % confidence interval, as a share of the median.
        drift_share: difference of the medians of the two halves, as a share of the median.
    """

    median_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    mean_ms: float
    n: int
    cov: float
    ci_share: float
    drift_share: float


@dataclass(frozen=True)
class Row:
    """One runner measured in one way.

    Attributes:
        runner: what ran.
        kind: "compute" or "end-to-end".
        statistics: the durations' statistics.
        stable: whether the median may be called a number.
        why_unstable: the reason if it may not.
        times_ms: all measured durations in order.
    """

    runner: RunnerInfo
    kind: Kind
    statistics: Statistics
    stable: bool
    why_unstable: str | None
    times_ms: tuple[float, ...]


@dataclass(frozen=True)
class BenchResult:
    """Rows of one run over one shape; the first runner is the baseline of the ratios.

    Attributes:
        shape: of the input, (N, C, H, W).
        effort: how long was measured and what counted as stable.
        rows: two per runner that can be timed both ways, else one.
        memory: peak memory by runner name, with what it is in words; see `srdeploy.runtime.bench.memory`.
        environment: the machine and its state, see `srdeploy.runtime.bench.conditions`.
    """

    shape: Shape
    effort: Effort
    rows: tuple[Row, ...]
    memory: Mapping[str, Memory] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def unstable(self) -> tuple[Row, ...]:
        """Rows whose median may not be called a number."""
        return tuple(row for row in self.rows if not row.stable)

    def row(self, name: str, kind: Kind) -> Row | None:
        """Return one runner's row of a kind, None when it was not measured so."""
        return next((row for row in self.rows if row.runner.name == name and row.kind == kind), None)

    def ratio(self, row: Row) -> float | None:
        """Return how many times faster than the first runner a row is, in the same kind; None without that row."""
        base = self.row(self.rows[0].runner.name, row.kind)
        return None if base is None else base.statistics.median_ms / row.statistics.median_ms

    def require_stable(self) -> None:
        """Raise UnstableError when a row may not be called a number."""
        if self.unstable:
            worst = max(self.unstable, key=lambda row: row.statistics.ci_share)
            raise UnstableError(
                f"{len(self.unstable)} of {len(self.rows)} latencies are unstable; the worst is {worst.runner.name} "
                f"({worst.kind}): {worst.why_unstable}",
                expected=f"a median known to {self.effort.tolerance:.0%}",
                next_step="close what else runs on this machine, give it more --seconds, or pass --allow-unstable",
            )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values, durations included."""
        return {
            "shape": format_shape(self.shape),
            "effort": asdict(self.effort),
            "rows": [
                {
                    "runner": row.runner.to_json(),
                    "kind": row.kind,
                    "stable": row.stable,
                    "why_unstable": row.why_unstable,
                    **asdict(row.statistics),
                    "images_per_second": 1000.0 * self.shape[0] / row.statistics.median_ms,
                    "ratio": self.ratio(row),
                    **self.memory.get(row.runner.name, NOT_MEASURED).to_json(),
                    "times_ms": [round(value, 4) for value in row.times_ms],
                }
                for row in self.rows
            ],
            "environment": dict(self.environment),
        }


def bench(
    runners: Sequence[Runner],
    *,
    shape: Shape,
    effort: Effort | None = None,
    image: NDArray[np.float32] | None = None,
    environment: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> BenchResult:
    """Measure runners against each other on one shape.

    Args:
        runners: opened engines; the first one is the baseline of the ratios. Their names must differ.
        shape: (N, C, H, W) of the input.
        effort: how long to measure; None for the defaults.
        image: the input to compute on, of `shape`; None for smooth random data, made by a fixed seed.
        environment: recorded in the result.
        progress: told about every round.

    Returns:
        The rows; unstable ones are marked, not left out. `require_stable` turns them into an error.

    Raises:
        UsageError: two runners have one name, the image has another shape, or a runner refuses the shape.
    """
    effort = effort or Effort()
    names = [runner.info.name for runner in runners]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"runners {', '.join(names)}", expected="at least one runner, and each of another name")
    feeds = {INPUT: bench_image(shape) if image is None else image}
    if feeds[INPUT].shape != shape:
        raise UsageError(f"image of shape {feeds[INPUT].shape}", expected=format_shape(shape))
    memory = {runner.info.name: _first_run(runner, feeds) for runner in runners}
    subjects: list[tuple[RunnerInfo, Kind]] = []
    functions: list[Callable[[], float]] = []
    for runner in runners:
        if isinstance(runner, TimedRunner):
            subjects.append((runner.info, "compute"))
            functions.append(runner.prepare(feeds))
        subjects.append((runner.info, "end-to-end"))
        functions.append(timed(partial(runner.run, feeds)))
    durations = measure(functions, effort, progress=progress)
    rows = []
    for (info, kind), times in zip(subjects, durations, strict=True):
        statistics = statistics_of(times)
        reason = why_unstable(statistics, effort)
        rows.append(Row(info, kind, statistics, reason is None, reason, tuple(times)))
    return BenchResult(shape, effort, tuple(rows), memory, environment or {})


def with_process_memory(
    result: BenchResult, files: Mapping[str, tuple[Path, str | None]], *, threads: int | None = None
) -> BenchResult:
    """Return a result whose engines state the memory of a process of their own, opened once more for that.

    Args:
        result: of `bench`; other rows keep what showed in the measuring process.
        files: by runner name, the file and the engine family that opens it (None for the file's own).
        threads: CPU threads.
    """
    memory = dict(result.memory)
    devices = {row.runner.name: row.runner.device for row in result.rows}
    for name, (path, engine) in files.items():
        memory[name] = process_memory(path, result.shape, engine=engine, device=devices[name], threads=threads)
    return replace(result, memory=memory)


def named(runner: Runner, name: str) -> Runner:
    """Return the same runner under another name, for tables in which two runners would share one."""
    return _NamedTimed(runner, name) if isinstance(runner, TimedRunner) else _Named(runner, name)


def measure(
    functions: Sequence[Callable[[], float]], effort: Effort, *, progress: Progress = SILENT
) -> list[list[float]]:
    """Warm every function up, then let them take turns until all medians are known or the time is used.

    Args:
        functions: each runs once and returns its milliseconds.
        effort: how long.
        progress: told about every round.

    Returns:
        The milliseconds of the measured runs, per function, in order.
    """
    for function in functions:
        _warm_up(function, effort)
    durations: list[list[float]] = [[] for _ in functions]
    # The collector would otherwise run in the middle of some measurement, and always of the one that allocates most.
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with progress.task("measuring", total=effort.seconds * len(functions)) as advance:
            start = before = time.perf_counter()
            for round_number in range(effort.max_runs):
                # Every other round backwards: A B B A, so that no runner always follows the same neighbour.
                order = range(len(functions)) if round_number % 2 == 0 else reversed(range(len(functions)))
                for index in order:
                    durations[index].append(functions[index]())
                now = time.perf_counter()
                advance(now - before)
                before = now
                if round_number + 1 >= effort.min_runs and (
                    now - start > effort.seconds * len(functions)
                    or ((round_number + 1) % 5 == 0 and _all_known(durations, effort))
                ):
                    break
    finally:
        if collecting:
            gc.enable()
    return durations


def statistics_of(times_ms: Sequence[float]) -> Statistics:
    """Summarize durations in milliseconds, given in the order in which they were measured."""
    values = np.asarray(times_ms, dtype=np.float64)
    ordered = np.sort(values)
    n = len(values)
    median = float(np.median(values))
    # Order statistics bracket the median without assuming a distribution; latencies are skewed.
    reach = _Z95 * math.sqrt(n) / 2.0
    low = ordered[max(0, math.floor(n / 2.0 - reach))]
    high = ordered[min(n - 1, math.ceil(n / 2.0 + reach))]
    halves = np.median(values[: n // 2]), np.median(values[n // 2 :])
    return Statistics(
        median_ms=median,
        p90_ms=float(np.percentile(values, 90)),
        p99_ms=float(np.percentile(values, 99)),
        min_ms=float(ordered[0]),
        mean_ms=float(values.mean()),
        n=n,
        cov=float(values.std(ddof=1) / values.mean()) if n > 1 else math.inf,
        ci_share=float(max(high - median, median - low) / median),
        drift_share=float(abs(halves[1] - halves[0]) / median),
    )


def why_unstable(statistics: Statistics, effort: Effort) -> str | None:
    """Return why a median may not be called a number, None when it may."""
    if statistics.ci_share > effort.tolerance:
        return (
            f"after {statistics.n} runs the median is known only to ±{statistics.ci_share:.0%} "
            f"(CoV {statistics.cov:.0%})"
        )
    if statistics.drift_share > effort.drift:
        return f"the median moved by {statistics.drift_share:.0%} between the first and the second half"
    return None


class _Named:
    """A runner under another name."""

    def __init__(self, runner: Runner, name: str) -> None:
        self._runner = runner
        self._info = replace(runner.info, name=name)

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self._runner.run(feeds)

    def __enter__(self) -> Self:
        self._runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.__exit__(kind, error, trace)


class _NamedTimed(_Named):
    """A timed runner under another name."""

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        assert isinstance(self._runner, TimedRunner)
        return self._runner.prepare(feeds)


def _first_run(runner: Runner, feeds: Mapping[str, NDArray[Any]]) -> Memory:
    """Run once, for the first time, and tell what memory that took as far as this process can see it."""
    device: list[int] = []
    if runner.info.device == "cpu":
        peak = run_memory(partial(runner.run, feeds))
    elif isinstance(runner, MeteredRunner):
        peak = run_memory(lambda: device.append(runner.run_metered(feeds)))
    else:
        runner.run(feeds)
        return replace(NOT_MEASURED, device_words="not visible from the measuring process")
    words = LOWER_BOUND if peak is not None else "nothing showed in the measuring process"
    return Memory(peak, words, *((device[0], ALLOCATOR) if device else (None, ON_CPU)))


def _warm_up(function: Callable[[], float], effort: Effort) -> None:
    start = time.perf_counter()
    runs = 0
    while runs < effort.warmup_runs or time.perf_counter() - start < effort.warmup_seconds:
        function()
        runs += 1


def _all_known(durations: Sequence[Sequence[float]], effort: Effort) -> bool:
    statistics = [statistics_of(times) for times in durations]
    return all(entry.ci_share <= effort.tolerance / 2 and entry.drift_share <= effort.drift / 2 for entry in statistics)
