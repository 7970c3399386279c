"""The one stopwatch of all runners: wall clock on a CPU, device events on a GPU."""

import time
from collections.abc import Callable
from typing import Any


def timed(work: Callable[[], object], device: str = "cpu", *, stream: Any = None) -> Callable[[], float]:
    """Return a function that runs `work` once and returns the milliseconds until its result is complete.

    Args:
        work: computes on `device`; on a GPU it only enqueues kernels.
        device: "cpu" or "cuda:N". On a GPU the events belong to that GPU, whichever is current.
        stream: `torch.cuda.Stream` that `work` enqueues on; None for the current stream of the GPU.
    """
    if device == "cpu":
        return lambda: _wall_clock_ms(work)
    import torch

    with torch.cuda.device(device):
        events: Any = torch.cuda.Event
        start, end = events(enable_timing=True), events(enable_timing=True)

    def run() -> float:
        with torch.cuda.device(device):  # an event is bound to the GPU that is current when it is first recorded
            on = stream if stream is not None else torch.cuda.current_stream(device)
            start.record(on)
            work()
            end.record(on)
            end.synchronize()
        return float(start.elapsed_time(end))

    return run


def _wall_clock_ms(work: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - started) / 1e6
