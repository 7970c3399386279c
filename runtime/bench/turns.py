"""Functions that take turns: warm-up, rounds, and the statistics of what was measured.

The first runs are slow (allocation, kernel selection, clocks rising), so each function is warmed up by count and by
time. A machine drifts, so the functions take turns, A B B A, instead of one after the other. Single runs are disturbed
by whatever else the machine does, so medians are reported with their confidence intervals, percentiles beside them.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from srdeploy.core.errors import UsageError
from srdeploy.core.progress import SILENT, Progress
from srdeploy.runtime.bench.ratios import ratio_of_rounds

_Z95 = 1.959964
REOPENING_SHARE = 0.25
"""Maximum share of the measuring time that is spent on opening engines again."""


@dataclass(frozen=True)
class Effort:
    """How long to measure, and what counts as stable.

    Runs come in visits of `visit` rounds; before each visit, engines that can be opened again may be.

    Attributes:
        warmup_runs: minimum number of runs before measuring, per runner and kind.
        warmup_seconds: minimum time before measuring, per runner and kind.
        min_runs: minimum number of measured runs.
        max_runs: maximum number of measured runs.
        seconds: time budget per runner and kind; exceeded where `min_runs` need more.
        tolerance: a ratio or a median is stable when its 95 % confidence interval reaches at most this share to either
            side; measuring stops early once every one of them is within half of it.
        drift: a stable median also differs by at most this share between the first and second half of the runs.
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

    @property
    def visit(self) -> int:
        """Rounds per visit: eight visits make up the minimum."""
        return max(1, self.min_runs // 8)


@dataclass(frozen=True)
class Statistics:
    """Statistics of a sequence of durations.

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


def measure(
    functions: Sequence[Callable[[], float]],
    effort: Effort,
    *,
    before_visit: Callable[[float], None] | None = None,
    progress: Progress = SILENT,
) -> list[list[float]]:
    """Warm every function up, then let them take turns until the results are stable or the time is used.

    Args:
        functions: each runs once and returns its milliseconds; ratios refer to the first.
        effort: how long.
        before_visit: called before every visit but the first with the seconds that it may take; it may replace
            entries of `functions`.
        progress: advanced after every round.

    Returns:
        The milliseconds of the measured runs, per function, in order; all have the same number of rounds.
    """
    for function in functions:
        warm_up(function, effort)
    durations: list[list[float]] = [[] for _ in functions]
    budget = effort.seconds * len(functions)
    # The collector would otherwise run in the middle of some measurement, and always of the one that allocates most.
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with progress.task("measuring", total=budget) as advance:
            start = before = time.perf_counter()
            reopening = 0.0
            for round_number in range(effort.max_runs):
                if before_visit is not None and round_number and round_number % effort.visit == 0:
                    before_visit(REOPENING_SHARE * (before - start) - reopening)
                    reopening += time.perf_counter() - before
                # Every other round backwards: A B B A, so that no function always follows the same neighbor.
                order = range(len(functions)) if round_number % 2 == 0 else reversed(range(len(functions)))
                for index in order:
                    durations[index].append(functions[index]())
                now = time.perf_counter()
                advance(now - before)
                before = now
                rounds = round_number + 1
                if rounds >= effort.min_runs and (
                    now - start > budget or (rounds % 5 == 0 and _all_known(durations, effort))
                ):
                    break
    finally:
        if collecting:
            gc.enable()
    return durations


def warm_up(function: Callable[[], float], effort: Effort) -> None:
    """Run a function until both its warm-up runs and its warm-up time are used."""
    start = time.perf_counter()
    runs = 0
    while runs < effort.warmup_runs or time.perf_counter() - start < effort.warmup_seconds:
        function()
        runs += 1


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


def _all_known(durations: Sequence[Sequence[float]], effort: Effort) -> bool:
    medians = [statistics_of(times) for times in durations]
    ratios = [ratio_of_rounds(durations[0], times, visit=effort.visit) for times in durations[1:]]
    return all(
        entry.ci_share <= effort.tolerance / 2 and entry.drift_share <= effort.drift / 2 for entry in medians
    ) and all(ratio.half_width <= effort.tolerance / 2 for ratio in ratios)
