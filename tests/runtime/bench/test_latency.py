"""The timing code on known durations, its statistics on known sequences, and its refusals."""

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from srdeploy.core.contract import INPUT, OUTPUT, ModelContract
from srdeploy.core.errors import UnstableError, UsageError
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo, TimedRunner
from srdeploy.runtime.bench import latency, naming, turns
from srdeploy.runtime.bench.inputs import bench_image
from srdeploy.runtime.bench.latency import BenchResult, Row, bench
from srdeploy.runtime.bench.naming import ReopenedRunner, named
from srdeploy.runtime.bench.turns import Effort, measure, statistics_of, why_unstable
from srdeploy.runtime.engines import timer
from srdeploy.runtime.engines.timer import timed

SHORT = Effort(warmup_runs=1, warmup_seconds=0.0, min_runs=8, max_runs=12, seconds=0.3, tolerance=0.5, drift=0.5)
SHAPE = (1, 3, 8, 8)


class Clock:
    """Time that passes when a runner says so; a stopwatch costs 1 us."""

    def __init__(self) -> None:
        self.nanoseconds = 0

    def sleep(self, seconds: float) -> None:
        self.nanoseconds += round(1e9 * seconds)

    def perf_counter_ns(self) -> int:
        self.nanoseconds += 1000
        return self.nanoseconds

    def perf_counter(self) -> float:
        return self.perf_counter_ns() / 1e9


CLOCK = Clock()


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure on that clock: on a busy machine a real sleep, and all around it, takes longer than was asked for."""
    for module in (latency, naming, timer, turns):
        monkeypatch.setattr(module, "time", CLOCK)
    monkeypatch.setattr(latency, "exchange_cost", lambda: 1.1)


class SleepingRunner:
    """Answers after a stated time."""

    def __init__(self, name: str, seconds: float) -> None:
        contract = ModelContract("rcan", {}, 2, "rgb", Precision.FP32, None, 1.0, 1, "0" * 64)
        self._info = RunnerInfo(name, "eager", "cpu", contract, "FP32", threads=1)
        self.seconds = seconds
        self.shapes: list[tuple[int, ...]] = []
        self.runs = 0

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.shapes.append(feeds[INPUT].shape)
        CLOCK.sleep(self.seconds)
        self.runs += 1
        return {OUTPUT: feeds[INPUT]}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


class PreparedRunner(SleepingRunner):
    """Also computes without moving data, in a time that it states."""

    def prepare(self, feeds: Mapping[str, NDArray[Any]]) -> Callable[[], float]:
        return lambda: 1e3 * self.seconds


def test_a_known_sleep_is_measured() -> None:
    runner = SleepingRunner("sleep", 0.03)
    effort = Effort(warmup_runs=2, warmup_seconds=0.0, min_runs=15, max_runs=15)

    result = bench([runner], shape=SHAPE, effort=effort)

    statistics = result.rows[0].statistics
    assert statistics.n == 15
    assert statistics.min_ms == pytest.approx(30.001)
    assert statistics.median_ms == pytest.approx(30.001)
    assert timed(lambda: None)() == pytest.approx(0.001)
    assert runner.shapes == [SHAPE] * 18  # one for memory, two for warm-up, fifteen measured


def test_the_stopwatch_runs_on_the_real_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timer, "time", time)

    assert timed(lambda: time.sleep(0.03))() >= 30.0


def test_a_result_records_how_fast_the_processors_exchange_data(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = iter([1.1, 2.2] * 20)
    monkeypatch.setattr("srdeploy.runtime.bench.latency.exchange_cost", lambda: next(costs))
    monkeypatch.setattr("srdeploy.runtime.bench.latency.LOOK_SECONDS", 0.0)

    result = bench([SleepingRunner("sleep", 0.001)], shape=SHAPE, effort=SHORT, environment={"cpus": 2})

    assert result.environment["cpus"] == 2
    assert result.exchange is not None
    assert result.exchange.changed
    assert "1.1x to 2.2x" in result.exchange.sentence


def test_compute_and_end_to_end_are_two_rows_with_their_own_ratios() -> None:
    result = bench(
        [PreparedRunner("a", 0.02), PreparedRunner("b", 0.01), SleepingRunner("c", 0.01)], shape=SHAPE, effort=SHORT
    )

    assert [(row.runner.name, row.kind) for row in result.rows] == [
        ("a", "compute"), ("a", "end-to-end"), ("b", "compute"), ("b", "end-to-end"), ("c", "end-to-end"),
    ]  # fmt: skip
    assert isinstance(PreparedRunner("a", 0.0), TimedRunner)
    assert not isinstance(SleepingRunner("c", 0.0), TimedRunner)
    ratios = [result.ratio(row) for row in result.rows]
    assert [ratio and ratio.value for ratio in ratios[:2]] == [1.0, 1.0]
    assert ratios[2] is not None
    assert ratios[2].value == pytest.approx(2.0)


def test_candidates_take_turns() -> None:
    calls: list[str] = []

    def named(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or 1.0  # type: ignore[func-returns-value]

    durations = measure([named("a"), named("b")], Effort(1, 0.0, 5, 6, 0.0))

    assert calls == ["a", "b", *("abbaabbaabba"[:10])]
    assert [len(times) for times in durations] == [5, 5]


def test_engines_that_can_be_opened_again_are_opened_several_times() -> None:
    opened: list[SleepingRunner] = []

    def opener() -> SleepingRunner:
        opened.append(PreparedRunner("engine", 0.001))
        return opened[-1]

    effort = Effort(warmup_runs=1, warmup_seconds=0.0, min_runs=16, max_runs=16, seconds=0.0)
    with ReopenedRunner(opener, "again") as runner:
        result = bench([SleepingRunner("base", 0.002), runner], shape=SHAPE, effort=effort)

    assert len(opened) == 8, "one opening per visit of two rounds"
    assert [row.runner.name for row in result.rows] == ["base", "again", "again"]
    assert [row["openings"] for row in result.to_json()["rows"]] == [1, 8, 8]
    assert all(row.statistics.n == 16 for row in result.rows)
    assert all(0 < result.first_run_ms[name] < 1e4 for name in ("base", "again"))
    assert all(runner.runs >= 2 for runner in opened), "every opening was warmed up and measured"


def test_engines_that_take_long_to_open_are_opened_once() -> None:
    opened: list[SleepingRunner] = []

    def opener() -> SleepingRunner:
        CLOCK.sleep(0.2)
        opened.append(PreparedRunner("engine", 0.0001))
        return opened[-1]

    with ReopenedRunner(opener) as runner:
        bench([runner], shape=SHAPE, effort=Effort(1, 0.0, min_runs=16, max_runs=16, seconds=0.0))

    assert len(opened) == 1


def test_a_reopened_engine_is_closed_before_it_is_opened_again() -> None:
    events: list[str] = []

    class Noting(SleepingRunner):
        def __exit__(self, *_: object) -> None:
            events.append("closed")

    def opener() -> Noting:
        events.append("opened")
        return Noting("engine", 0.0)

    with named(ReopenedRunner(opener), "another name") as runner:
        assert isinstance(runner, ReopenedRunner)
        runner.reopen()
        assert runner.info.name == "another name"

    assert events == ["opened", "closed", "opened", "closed"]


def test_measuring_ends_early_when_all_is_known() -> None:
    durations = measure([lambda: 1.0], Effort(1, 0.0, 5, 400, 60.0))

    assert len(durations[0]) == 5


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ([10.0, 10.1, 9.9] * 10, None),
        ([10.0, 14.0] * 10, "known only to"),
        ([10.0] * 20 + [13.0] * 20, "moved by"),
        ([10.0] * 29 + [200.0], None),
    ],
    ids=["steady", "two-levels", "drifting", "one-outlier"],
)
def test_what_is_stable(times: list[float], reason: str | None) -> None:
    effort = Effort(tolerance=0.05, drift=0.10)
    if reason == "moved by":
        effort = Effort(tolerance=0.5, drift=0.10)

    verdict = why_unstable(statistics_of(times), effort)

    if reason is None:
        assert verdict is None
    else:
        assert verdict is not None
        assert reason in verdict


def test_statistics_of_a_known_sequence() -> None:
    statistics = statistics_of([float(value) for value in range(1, 101)])

    assert (statistics.median_ms, statistics.min_ms, statistics.n) == (50.5, 1.0, 100)
    assert statistics.p90_ms == pytest.approx(90.1)
    assert statistics.p99_ms == pytest.approx(99.01)
    assert statistics.cov == pytest.approx(29.01 / 50.5, rel=1e-3)


def test_the_interval_of_the_median_holds_what_it_promises() -> None:
    generator = np.random.default_rng(0)
    truth = float(np.exp(0.0))  # median of a log-normal with mu = 0
    hits = 0
    for _ in range(300):
        statistics = statistics_of(list(generator.lognormal(0.0, 0.3, 25)))
        hits += abs(statistics.median_ms - truth) <= statistics.ci_share * statistics.median_ms

    assert hits >= 0.93 * 300


def test_unstable_rows_raise_with_advice() -> None:
    steps = iter([0.001, 0.02] * 100)

    class Erratic(SleepingRunner):
        def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            self.seconds = next(steps)
            return super().run(feeds)

    result = bench([Erratic("erratic", 0.0)], shape=SHAPE, effort=Effort(1, 0.0, 10, 10, 0.1))

    assert [row.stable for row in result.rows] == [False]
    assert result.to_json()["rows"][0]["stable"] is False
    with pytest.raises(UnstableError, match="erratic.*--allow-unstable"):
        result.require_stable()


def test_stable_rows_do_not_raise() -> None:
    times = (10.0, 10.1, 9.9, 10.05, 10.0, 9.95) * 3
    row = Row(SleepingRunner("steady", 0.0).info, "end-to-end", statistics_of(times), True, None, times)

    result = BenchResult(SHAPE, SHORT, (row,))

    result.require_stable()
    assert result.unstable == ()
    ratio = result.ratio(row)
    assert ratio is not None
    assert ratio.label == "1.00x, 1.00 to 1.00"
    assert result.to_json()["rows"][0]["images_per_second"] == pytest.approx(100.0)


@pytest.mark.parametrize("names", [[], ["a", "a"]], ids=["none", "twice"])
def test_names_must_tell_runners_apart(names: list[str]) -> None:
    with pytest.raises(UsageError, match="a name of its own"):
        bench([SleepingRunner(name, 0.0) for name in names], shape=SHAPE)


def test_an_image_of_another_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="1x3x8x8"):
        bench([SleepingRunner("a", 0.0)], shape=SHAPE, image=np.zeros((1, 3, 4, 4), np.float32))


@pytest.mark.parametrize("options", [{"min_runs": 3}, {"max_runs": 2}, {"warmup_runs": 0}], ids=str)
def test_too_few_runs_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="fewer give no median"):
        Effort(**options)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 17), (1, 3, 64, 48)], ids=str)
def test_the_image_is_smooth_and_reproducible(shape: tuple[int, int, int, int]) -> None:
    image = bench_image(shape)

    assert image.shape == shape
    assert image.dtype == np.float32
    assert 0 <= image.min() <= image.max() <= 1
    np.testing.assert_array_equal(image, bench_image(shape))
