"""Latency as a curve: over image size against the machine's own floor, over batch size, and with runs side by side."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from srdeploy.core.contract import INPUT
from srdeploy.core.environment import cpu_count
from srdeploy.core.errors import SrdeployError
from srdeploy.core.progress import SILENT, Progress
from srdeploy.core.runner import Runner
from srdeploy.core.shapes import Shape
from srdeploy.runtime.latency import Effort, bench, bench_image, measure, timed


def scaling(
    runners: Sequence[Runner],
    shape: Shape,
    sides: Sequence[int],
    macs_per_pixel: float,
    effort: Effort,
    *,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure squares of several sides, beside the time that the multiply-adds alone would take.

    The floor is the network's multiply-adds divided by the rate of a large FP32 matrix product measured in the same
    run. No FP32 convolution computed directly can be below it; Winograd's algorithm, INT8 and BF16 can.

    Args:
        runners: opened engines; sizes outside a profile are left out for that engine.
        shape: batch and channels are taken from it.
        sides: sides in low-resolution pixels.
        macs_per_pixel: multiply-adds per low-resolution pixel.
        effort: per runner and size.
        progress: told about every size.

    Returns:
        JSON values: "peak" (the measured rates), "floor" and "runners" with their points, and a "note" in words.
    """
    peak = machine_peak()
    batch, channels = shape[:2]
    points: dict[str, list[dict[str, Any]]] = {runner.info.name: [] for runner in runners}
    for side in sides:
        for name, statistics in _measured(runners, (batch, channels, side, side), effort, progress).items():
            points[name].append({"side": side, "pixels": batch * side * side, **statistics})
    floor = [
        {"pixels": batch * side * side, "ms": 2e3 * macs_per_pixel * batch * side * side / peak["flops"]}
        for side in sides
    ]
    return {
        "note": (
            f"end to end, batch {batch}; the floor is the multiply-adds at the FP32 matrix product's "
            f"{peak['flops'] / 1e9:.0f} GFLOP/s measured in this run"
        ),
        "peak": peak,
        "floor": floor,
        "runners": [{"name": name, "points": entry} for name, entry in points.items()],
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
        progress: told about every number.

    Returns:
        JSON values: "runners" with their points, and a "note" in words.
    """
    entries = []
    for name, opener in openers.items():
        points = []
        for count in streams:
            threads = max(1, cpu_count() // count)
            progress.note(f"{name}: {count} at once, {threads} threads each")
            with ExitStack() as stack:
                runners = [stack.enter_context(opener(threads)) for _ in range(count)]
                points.append({"streams": count, "images_per_second": _together(runners, shape, effort)})
        entries.append({"name": name, "points": points})
    return {"note": "runs at once, the processor's threads shared out among them", "runners": entries}


def machine_peak() -> dict[str, float]:
    """Measure what this processor reaches: FP32 matrix product in FLOP/s, copying in bytes read and written per second.

    Both with all threads of PyTorch, the best of several runs: a peak is what the machine can do when undisturbed.
    """
    import torch

    size = 1536
    first, second = torch.rand(size, size), torch.rand(size, size)
    out = torch.empty(size, size)
    source = torch.ones(16 * 2**20)  # 64 MiB, beyond the caches of most processors
    target = torch.empty_like(source)
    effort = Effort(warmup_runs=1, warmup_seconds=0.1, min_runs=7, max_runs=7)
    products, copies = measure(
        [timed(lambda: torch.mm(first, second, out=out)), timed(lambda: target.copy_(source))], effort
    )
    return {
        "flops": 2.0 * size**3 / (min(products) / 1e3),
        "bytes_per_second": 2.0 * source.numel() * 4 / (min(copies) / 1e3),
        "threads": float(torch.get_num_threads()),
    }


def _measured(runners: Sequence[Runner], shape: Shape, effort: Effort, progress: Progress) -> dict[str, dict[str, Any]]:
    """Return the end-to-end statistics of the runners that take a shape."""
    fitting = [runner for runner in runners if runner.info.profile is None or runner.info.profile.contains(shape)]
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
