"""Latency of several runners on one shape, measured so that they can be compared.

What is measured, and never mixed:

- *end to end*: from a numpy image to a numpy result, as a caller sees it (checks, copies, transfers, conversions);
- *compute*: the network alone, inputs and outputs already in place on the device, for runners that offer it.

How to read it: the speed-up over the first runner, with its interval, is what a measurement establishes, on a busy
machine too (see `srdeploy.runtime.bench.ratios`). A median in milliseconds describes this machine at this moment; one
whose confidence interval is wide, or that moves from the first half to the second, is called unstable. p90 and p99
describe the machine as much as the engine.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT
from srdeploy.core.errors import CapabilityError, UnstableError, UsageError
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import MeteredRunner, Runner, RunnerInfo, TimedRunner
from srdeploy.core.shapes import Shape, format_shape
from srdeploy.runtime.bench.exchange import Exchange, exchange_cost
from srdeploy.runtime.bench.floor import Cost, Floor, Rates, floor_of, measure_rates
from srdeploy.runtime.bench.inputs import bench_image
from srdeploy.runtime.bench.memory import ALLOCATOR, LOWER_BOUND, ON_CPU, Memory, process_memory, run_memory
from srdeploy.runtime.bench.naming import ReopenedRunner
from srdeploy.runtime.bench.ratios import Ratio, listed, median_label, ratio_of_rounds
from srdeploy.runtime.bench.turns import Effort, Statistics, measure, statistics_of, warm_up, why_unstable
from srdeploy.runtime.engines.timer import timed

Kind = Literal["compute", "end-to-end"]

LOOK_SECONDS = 0.25
"""Minimum time between two looks at how fast the processors exchange data: they stay where they are for a second."""
NOT_MEASURED = Memory(None, "not measured", None, "not measured")


@dataclass(frozen=True)
class Row:
    """One runner measured in one way.

    Attributes:
        runner: what ran.
        kind: "compute" or "end-to-end".
        statistics: the durations' statistics.
        stable: whether the median is known to the tolerance.
        why_unstable: the reason if it is not.
        times_ms: all measured durations in order.
    """

    runner: RunnerInfo
    kind: Kind
    statistics: Statistics
    stable: bool
    why_unstable: str | None
    times_ms: tuple[float, ...]

    @property
    def median_label(self) -> str:
        """The median for people; with its uncertainty where it is not stable."""
        return median_label(self.statistics.median_ms, self.statistics.ci_share, stable=self.stable)


@dataclass(frozen=True)
class Fastest:
    """The outcome of a comparison.

    Attributes:
        name: the runner with the largest speed-up.
        equals: runners whose ratio to it has an interval that includes 1: equally fast as far as was measured.
    """

    name: str
    equals: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The outcome as a sentence part: "A is the fastest", or "A and B are equally fast here"."""
        if not self.equals:
            return f"{self.name} is the fastest"
        return f"{listed([self.name, *self.equals])} are equally fast here"


@dataclass(frozen=True)
class BenchResult:
    """Rows of one run over one shape; the first runner is the baseline of the speed-ups.

    Attributes:
        shape: of the input, (N, C, H, W).
        effort: how long was measured and what counts as stable.
        rows: two per runner that can be timed both ways, else one; entry i of every row's times is of round i.
        memory: peak memory by runner name, with a note what it is; see `srdeploy.runtime.bench.memory`.
        environment: the machine and its state, see `srdeploy.runtime.bench.conditions`.
        first_run_ms: by runner name, the first run at this shape: allocation, kernel selection, compilation.
        floors: by runner name, see `srdeploy.runtime.bench.floor`.
        rates: measured rates of the device that the floors refer to; None without floors.
        openings: by runner name, how many times it was opened; runners that are not named were opened once.
    """

    shape: Shape
    effort: Effort
    rows: tuple[Row, ...]
    memory: Mapping[str, Memory] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    first_run_ms: Mapping[str, float] = field(default_factory=dict)
    openings: Mapping[str, int] = field(default_factory=dict)
    floors: Mapping[str, Floor] = field(default_factory=dict)
    rates: Rates | None = None

    @property
    def exchange(self) -> Exchange | None:
        """How fast the processors exchanged data meanwhile; None on a GPU and where it cannot be measured."""
        return Exchange.of_environment(self.environment)

    @property
    def unstable(self) -> tuple[Row, ...]:
        """Rows whose median in milliseconds is not known to the tolerance."""
        return tuple(row for row in self.rows if not row.stable)

    @property
    def unsettled(self) -> tuple[Row, ...]:
        """Rows whose speed-up is not known to the tolerance; without a second runner, those with an unstable median."""
        ratios = [(row, self.ratio(row)) for row in self.rows if row.runner.name != self.rows[0].runner.name]
        if not ratios:
            return self.unstable
        return tuple(row for row, ratio in ratios if ratio is not None and ratio.half_width > self.effort.tolerance)

    def row(self, name: str, kind: Kind) -> Row | None:
        """Return one runner's row of a kind, None when it was not measured so."""
        return next((row for row in self.rows if row.runner.name == name and row.kind == kind), None)

    def ratio(self, row: Row) -> Ratio | None:
        """Return how many times faster than the first runner a row is, in the same kind; None without that row."""
        base = self.row(self.rows[0].runner.name, row.kind)
        return None if base is None else self.compare(row, base)

    def compare(self, row: Row, base: Row) -> Ratio:
        """Return how many times faster a row is than another of the same kind, round by round."""
        return ratio_of_rounds(base.times_ms, row.times_ms, visit=self.effort.visit)

    def typical_ms(self, row: Row) -> float:
        """Return the first runner's median divided by the speed-up of a row: the latency to rank engines by.

        A median of its own ranks a row by the moments in which it happened to run; this one by the rounds it shared.
        """
        ratio = self.ratio(row)
        base = self.row(self.rows[0].runner.name, row.kind)
        return row.statistics.median_ms if ratio is None or base is None else base.statistics.median_ms / ratio.value

    def distance(self, row: Row) -> float | None:
        """Return a row's latency over its floor: 1.0 is a machine fully used; None without a floor."""
        floor = self.floors.get(row.runner.name)
        return None if floor is None else self.typical_ms(row) / floor.ms

    def fastest(self, names: Sequence[str], kind: Kind = "end-to-end") -> Fastest | None:
        """Return the fastest of some runners and those that cannot be told from it; None when none was measured."""
        rows = [row for name in names if (row := self.row(name, kind)) is not None]
        if not rows:
            return None
        leader = min(rows, key=self.typical_ms)
        rivals = [row for row in rows if row is not leader and not self.compare(leader, row).decided]
        return Fastest(leader.runner.name, tuple(row.runner.name for row in rivals))

    def require_stable(self) -> None:
        """Raise UnstableError when a speed-up is not known to the tolerance."""
        if not self.unsettled:
            return
        widths = [(ratio.half_width, row) for row in self.unsettled if (ratio := self.ratio(row)) is not None]
        width, worst = max(widths, key=lambda pair: pair[0])
        why = f", ±{width:.0%}" if width else f": {worst.why_unstable}"  # the ratio of a single runner is 1
        raise UnstableError(
            f"{len(widths)} of {len(self.rows)} latencies are unstable; the worst is {worst.runner.name} "
            f"({worst.kind}){why}",
            expected=f"speed-ups known to ±{self.effort.tolerance:.0%}",
            next_step="close what else runs on this machine, give it more --seconds, or pass --allow-unstable",
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values, durations included."""
        return {
            "shape": format_shape(self.shape),
            "effort": {**asdict(self.effort), "visit": self.effort.visit},
            "rows": [self._row_json(row) for row in self.rows],
            "rates": None if self.rates is None else self.rates.to_json(),
            "environment": dict(self.environment),
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        name = row.runner.name
        return {
            "runner": row.runner.to_json(),
            "kind": row.kind,
            "stable": row.stable,
            "why_unstable": row.why_unstable,
            **asdict(row.statistics),
            "images_per_second": 1000.0 * self.shape[0] / row.statistics.median_ms,
            **ratio_json(self.ratio(row)),
            "first_run_ms": self.first_run_ms.get(name),
            "openings": self.openings.get(name, 1),
            "floor": None if name not in self.floors else self.floors[name].to_json(),
            "floor_distance": self.distance(row),
            **self.memory.get(name, NOT_MEASURED).to_json(),
            "times_ms": [round(value, 4) for value in row.times_ms],
        }


def ratio_json(ratio: Ratio | None) -> dict[str, float | None]:
    """Return the fields of a speed-up in JSON documents."""
    if ratio is None:
        return {"ratio": None, "ratio_low": None, "ratio_high": None}
    return {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}


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
        runners: opened engines; the first one is the baseline of the speed-ups. Their names must differ. Those that
            are `ReopenedRunner` are opened several times, within the same time.
        shape: (N, C, H, W) of the input.
        effort: how long to measure; None for the defaults.
        image: the input to compute on, of `shape`; None for smooth random data, made by a fixed seed.
        environment: recorded in the result; on a CPU with how fast its processors exchange data.
        progress: advanced after every round.

    Returns:
        The rows; unstable ones are marked, not omitted. `require_stable` turns unsettled speed-ups into an error.

    Raises:
        UsageError: two runners have one name, the image has another shape, or a runner refuses the shape.
    """
    effort = effort or Effort()
    names = [runner.info.name for runner in runners]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"runners {', '.join(names)}", expected="at least one runner, and each with a name of its own")
    feeds = {INPUT: bench_image(shape) if image is None else image}
    if feeds[INPUT].shape != shape:
        raise UsageError(f"image of shape {feeds[INPUT].shape}", expected=format_shape(shape))
    memory: dict[str, Memory] = {}
    first_run_ms: dict[str, float] = {}
    for runner in runners:
        started = time.perf_counter()
        memory[runner.info.name] = _first_run(runner, feeds)
        first_run_ms[runner.info.name] = 1e3 * (time.perf_counter() - started)
    subjects: list[tuple[Runner, Kind]] = []
    for runner in runners:
        subjects += [(runner, "compute")] if isinstance(runner, TimedRunner) else []
        subjects.append((runner, "end-to-end"))
    functions = [_function(runner, kind, feeds) for runner, kind in subjects]
    costs: list[float] = []
    looked = -math.inf

    def look_at_processors() -> None:
        nonlocal looked
        if runners[0].info.device != "cpu" or time.perf_counter() - looked < LOOK_SECONDS:
            return
        if (cost := exchange_cost()) is not None:
            costs.append(cost)
        looked = time.perf_counter()

    def before_visit(seconds: float) -> None:
        look_at_processors()
        for runner in runners:
            if isinstance(runner, ReopenedRunner):
                started = time.perf_counter()
                if 2 * runner.opening_seconds > seconds:  # it is also warmed up
                    continue
                indices = [index for index, (subject, _) in enumerate(subjects) if subject is runner]
                for index in indices:  # they hold the engine that is closed now
                    functions[index] = _closed
                runner.reopen()
                for index in indices:
                    functions[index] = _function(runner, subjects[index][1], feeds)
                    warm_up(functions[index], replace(effort, warmup_seconds=0.0))
                seconds -= time.perf_counter() - started

    look_at_processors()
    durations = measure(functions, effort, before_visit=before_visit, progress=progress)
    look_at_processors()
    exchange = Exchange.of_costs(costs)
    recorded = dict(environment or {}) | ({"processor_exchange": exchange.to_json()} if exchange else {})
    rows = []
    for (runner, kind), times in zip(subjects, durations, strict=True):
        statistics = statistics_of(times)
        reason = why_unstable(statistics, effort)
        rows.append(Row(runner.info, kind, statistics, reason is None, reason, tuple(times)))
    openings = {runner.info.name: runner.openings for runner in runners if isinstance(runner, ReopenedRunner)}
    return BenchResult(shape, effort, tuple(rows), memory, recorded, first_run_ms, openings)


def with_floors(result: BenchResult, cost: Cost) -> BenchResult:
    """Return a result whose rows state their distance to the floor; without rates of the device, the result as it is.

    Args:
        result: of `bench`; all runners compute the same network on the same device.
        cost: of the network.
    """
    try:
        rates = measure_rates(result.rows[0].runner.device)
    except CapabilityError:
        return result
    floors = {row.runner.name: floor_of(row.runner, result.shape, cost, rates) for row in result.rows}
    return replace(result, floors=floors, rates=rates)


def with_process_memory(
    result: BenchResult, files: Mapping[str, tuple[Path, str | None]], *, threads: int | None = None
) -> BenchResult:
    """Return a result whose engines state the memory of a process of their own, opened once more for it.

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


def _function(runner: Runner, kind: Kind, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
    """Return what computes once and returns its milliseconds."""
    if kind == "compute":
        assert isinstance(runner, TimedRunner)
        return runner.prepare(feeds)
    return timed(partial(runner.run, feeds))


def _closed() -> float:
    raise AssertionError("the engine was closed")


def _first_run(runner: Runner, feeds: Mapping[str, NDArray[Any]]) -> Memory:
    """Run once, for the first time, and return the memory that it took, as far as this process sees it."""
    device: list[int] = []
    if runner.info.device == "cpu":
        peak = run_memory(partial(runner.run, feeds))
    elif isinstance(runner, MeteredRunner):
        peak = run_memory(lambda: device.append(runner.run_metered(feeds)))
    else:
        runner.run(feeds)
        return replace(NOT_MEASURED, device_note="not visible from the measuring process")
    note = LOWER_BOUND if peak is not None else "nothing showed in the measuring process"
    return Memory(peak, note, *((device[0], ALLOCATOR) if device else (None, ON_CPU)))
