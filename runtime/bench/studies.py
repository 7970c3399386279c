"""Latency as a curve: over image size against the machine's own floor, over batch size, and with runs side by side."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from srdeploy.core.contract import INPUT
from srdeploy.core.environment import cpu_count
from srdeploy.core.errors import SrdeployError
from srdeploy.core.precision import Precision
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import Runner
from srdeploy.core.shapes import Shape
from srdeploy.runtime.bench.floor import Cost, Rates, measure_rates
from srdeploy.runtime.bench.inputs import bench_image
from srdeploy.runtime.bench.latency import bench
from srdeploy.runtime.bench.turns import Effort


def scaling(
    runners: Sequence[Runner],
    shape: Shape,
    sides: Sequence[int],
    cost: Cost,
    effort: Effort,
    *,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure squares of several sides, next to the times that arithmetic and memory traffic alone would take.

    Both floors (see `srdeploy.runtime.bench.floor`) are those of FP32 on a CPU and of FP16 on a GPU, at rates measured
    on the device of the runners.

    Args:
        runners: opened engines; sizes outside a profile are skipped for that engine.
        shape: batch and channels are taken from it.
        sides: sides in low-resolution pixels.
        cost: of the network.
        effort: per runner and size.
        progress: advanced at every size.

    Returns:
        JSON values: "peak" (the measured rates), "floor" and "memory_floor", "runners" with their points, and a "note".
    """
    device = next((runner.info.device for runner in runners if runner.info.device != "cpu"), "cpu")
    peak = _peak(measure_rates(device))
    batch, channels = shape[:2]
    points: dict[str, list[dict[str, Any]]] = {runner.info.name: [] for runner in runners}
    for side in sides:
        for name, statistics in _measured(runners, (batch, channels, side, side), effort, progress).items():
            points[name].append({"side": side, "pixels": batch * side * side, **statistics})
    pixels = [batch * side * side for side in sides]
    moved = cost.traffic_per_pixel * peak["bytes_per_value"]
    return {
        "note": (
            f"end to end, batch {batch}; floors of this run: multiply-adds at the {peak['type']} matrix product's "
            f"{peak['flops'] / 1e9:.0f} GFLOP/s, and maps read and written once in {peak['type']} at the copy's "
            f"{peak['bytes_per_second'] / 1e9:.1f} GB/s"
        ),
        "peak": peak,
        "floor": [{"pixels": count, "ms": 2e3 * cost.macs_per_pixel * count / peak["flops"]} for count in pixels],
        "memory_floor": [{"pixels": count, "ms": 1e3 * moved * count / peak["bytes_per_second"]} for count in pixels],
        "runners": [{"name": name, "points": entry} for name, entry in points.items()],
    }


def _peak(rates: Rates) -> dict[str, Any]:
    """Return the rates in the type of a curve's floors: FP32 on a CPU, FP16 on a GPU."""
    precision = Precision.FP32 if rates.device == "cpu" else Precision.FP16
    return {
        "device": rates.device,
        "type": precision.value.upper(),
        "bytes_per_value": 4 if precision is Precision.FP32 else 2,
        "flops": 2.0 * rates.macs_per_second[precision],
        "bytes_per_second": rates.bytes_per_second,
        "threads": rates.threads,
    }


def throughput(
    runners: Sequence[Runner],
    shape: Shape,
    batches: Sequence[int],
    effort: Effort,
    *,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure images per second over batch sizes, one run at a time; arguments and result as `scaling`."""
    points: dict[str, list[dict[str, Any]]] = {runner.info.name: [] for runner in runners}
    for batch in batches:
        for name, statistics in _measured(runners, (batch, *shape[1:]), effort, progress).items():
            rate = 1000.0 * batch / statistics["median_ms"]
            points[name].append({"batch": batch, "images_per_second": rate, **statistics})
    return {
        "note": f"end to end, {shape[1]}x{shape[2]}x{shape[3]}, one run at a time",
        "runners": [{"name": name, "points": entry} for name, entry in points.items()],
    }


def stream_throughput(
    openers: Mapping[str, Callable[[int], Runner]],
    shape: Shape,
    streams: Sequence[int],
    effort: Effort,
    *,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure images per second with several runs at once, the processor's threads shared out among them.

    Args:
        openers: by name, a function that opens the engine with a number of threads.
        shape: of each run.
        streams: numbers of runs at once.
        effort: its `seconds` are the length of each measurement.
        progress: advanced at every number.

    Returns:
        JSON values: "runners" with their points, and a "note".
    """
    entries = []
    for name, opener in openers.items():
        points = []
        for count in streams:
            threads = max(1, cpu_count() // count)
            progress.note(f"{name}: {count} at once, threads each: {threads}")
            with ExitStack() as stack:
                runners = [stack.enter_context(opener(threads)) for _ in range(count)]
                points.append({"streams": count, "images_per_second": _together(runners, shape, effort)})
        entries.append({"name": name, "points": points})
    return {"note": "runs at once, the processor's threads shared out among them", "runners": entries}


def _measured(runners: Sequence[Runner], shape: Shape, effort: Effort, progress: Progress) -> dict[str, dict[str, Any]]:
    """Return the end-to-end statistics of the runners that take a shape."""
    fitting = [runner for runner in runners if runner.info.accepts(shape)]
    if not fitting:
        return {}
    result = bench(fitting, shape=shape, effort=effort, progress=progress)
    return {
        row.runner.name: {"median_ms": row.statistics.median_ms, "stable": row.stable, "n": row.statistics.n}
        for row in result.rows
        if row.kind == "end-to-end"
    }


def _together(runners: Sequence[Runner], shape: Shape, effort: Effort) -> float:
    """Run all runners at once and return their images per second, each over the time until its own last result."""
    feeds = {INPUT: bench_image(shape)}
    for runner in runners:
        for _ in range(effort.warmup_runs):
            runner.run(feeds)
    rates: list[float] = []
    failures: list[SrdeployError] = []
    gate = threading.Barrier(len(runners))

    def work(runner: Runner) -> None:
        gate.wait()
        start = time.perf_counter()
        runs, now = 0, start
        try:
            while now - start < effort.seconds or runs < effort.warmup_runs:
                runner.run(feeds)
                runs, now = runs + 1, time.perf_counter()
        except SrdeployError as error:
            failures.append(error)
        else:
            rates.append(shape[0] * runs / (now - start))

    threads = [threading.Thread(target=work, args=(runner,)) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return sum(rates)
