"""Speed-ups: the interval covers the truth, survives common disturbance, and is written with the digits it supports."""

import math

import numpy as np
import pytest

from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo
from srdeploy.runtime.bench.latency import BenchResult, Row
from srdeploy.runtime.bench.ratios import median_label, ratio_label, ratio_of_rounds
from srdeploy.runtime.bench.turns import Effort, statistics_of


def disturbance(generator: np.random.Generator, kind: str, rounds: int, visit: int) -> np.ndarray:
    """Return log-ratios around 0 as machines make them."""
    noise = generator.standard_normal(rounds) * 0.1
    if kind == "openings":  # every opening draws a level
        return np.repeat(generator.standard_normal(rounds // visit), visit) * 0.05 + noise
    if kind == "bursts":
        return noise + (generator.random(rounds) < 0.1) * generator.choice([-1, 1], rounds)
    if kind == "memory":  # what disturbs one round disturbs the next
        for index in range(1, rounds):
            noise[index] += 0.5 * noise[index - 1]
    return noise


@pytest.mark.parametrize("kind", ["independent", "openings", "bursts", "memory"])
def test_the_interval_covers_the_true_ratio(kind: str) -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        logs = disturbance(generator, kind, 60, 6)
        ratio = ratio_of_rounds(np.exp(logs) * 30.0, [10.0] * 60, visit=6)
        hits += ratio.low <= 3.0 <= ratio.high

    assert hits >= 0.89 * 300  # 95 % nominal; ten blocks estimate their own spread


def test_what_slows_a_whole_round_cancels() -> None:
    generator = np.random.default_rng(1)
    machine = np.exp(generator.standard_normal(40) * 0.5)  # durations scatter by half

    ratio = ratio_of_rounds(50.0 * machine, 10.0 * machine)

    assert (ratio.value, ratio.half_width) == (pytest.approx(5.0), pytest.approx(0.0, abs=1e-12))
    assert statistics_of(list(50.0 * machine)).ci_share > 0.1


def test_an_opening_that_lasts_is_one_draw() -> None:
    logs = np.repeat([0.0, 0.3, 0.0, 0.3, 0.0, 0.3, 0.0, 0.3], 8)

    by_round = ratio_of_rounds(np.exp(logs), np.ones(64))
    by_visit = ratio_of_rounds(np.exp(logs), np.ones(64), visit=8)

    assert by_visit.half_width > by_round.half_width


@pytest.mark.parametrize(
    ("base", "times"), [([1.0, 1.0], [1.0]), ([1.0], [1.0]), ([], [])], ids=["lengths", "one-round", "none"]
)
def test_rounds_that_cannot_be_compared_are_refused(base: list[float], times: list[float]) -> None:
    with pytest.raises(ValueError, match="rounds"):
        ratio_of_rounds(base, times)


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (5.13, 4.91, 5.31, "5.1x, 4.9 to 5.3"),
        (2.517, 2.501, 2.533, "2.52x, 2.50 to 2.53"),
        (7.2, 5.1, 9.4, "7.2x, 5.1 to 9.4"),
        (17.2, 9.8, 29.4, "17x, 10 to 29"),
        (1.0, 1.0, 1.0, "1.00x, 1.00 to 1.00"),
        (2.517, None, None, "2.52x"),
    ],
    ids=["tenths", "hundredths", "wide", "units", "exact", "older-report"],
)
def test_a_ratio_is_written_with_the_digits_that_its_interval_supports(
    value: float, low: float | None, high: float | None, expected: str
) -> None:
    assert ratio_label(value, low, high) == expected


def test_an_unstable_median_carries_its_uncertainty() -> None:
    assert median_label(24.123, 0.02, stable=True) == "24.1 ms"
    assert median_label(123.4, 0.05, stable=False) == "120 ms ±5 %"
    assert median_label(99.7, 0.05, stable=False) == "100 ms ±5 %"
    assert median_label(1234.5, 0.05, stable=True) == "1230 ms"
    assert median_label(24.123, 0.12, stable=False) == "24 ms ±12 %"


def result(**durations: list[float]) -> BenchResult:
    contract = ModelContract("rcan", {}, 2, "rgb", Precision.FP32, None, 1.0, 1, "0" * 64)
    rows = []
    for name, times in durations.items():
        info = RunnerInfo(name, "eager", "cpu", contract, "FP32")
        rows.append(Row(info, "end-to-end", statistics_of(times), True, None, tuple(times)))
    return BenchResult((1, 3, 4, 4), Effort(), tuple(rows))


def test_the_fastest_is_named_when_its_interval_excludes_the_runner_up() -> None:
    noise = np.exp(np.random.default_rng(2).standard_normal(40) * 0.02)
    found = result(eager=[50.0] * 40, a=list(10.0 * noise), b=list(11.0 * noise[::-1]))

    fastest = found.fastest(["a", "b"])

    assert fastest is not None
    assert (fastest.name, fastest.equals) == ("a", ())
    assert fastest.sentence == "a is the fastest"


def test_engines_that_cannot_be_told_apart_are_equally_fast() -> None:
    generator = np.random.default_rng(3)
    times = {name: list(10.0 * np.exp(generator.standard_normal(30) * 0.2)) for name in ("a", "b")}
    found = result(eager=[50.0] * 30, **times, c=[20.0] * 30)

    fastest = found.fastest(["a", "b", "c"])

    assert fastest is not None
    assert {fastest.name, *fastest.equals} == {"a", "b"}
    assert fastest.sentence.endswith("are equally fast here")
    assert found.fastest(["missing"]) is None


def test_speed_ups_settle_where_medians_do_not() -> None:
    machine = np.exp(np.random.default_rng(4).standard_normal(40) * 0.5)
    found = result(eager=list(50.0 * machine), a=list(10.0 * machine))

    assert found.unsettled == ()
    found.require_stable()
    row = found.to_json()["rows"][1]
    assert row["ratio"] == pytest.approx(5.0)
    assert math.isclose(row["ratio_low"], row["ratio_high"], rel_tol=1e-9)
