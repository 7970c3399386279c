"""Floors: the rates are plausible, and each multiply-add counts at the rate of the type that computes it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo
from srdeploy.runtime.bench.floor import Rates, floor_of, measure_rates
from srdeploy.runtime.bench.latency import BenchResult, Row, with_floors
from srdeploy.runtime.bench.turns import Effort, statistics_of

RATES = Rates("cpu", {Precision.FP32: 1e9, Precision.INT8: 4e9}, 1e10, 2)


@dataclass(frozen=True)
class Network:
    """Ten multiply-adds and five values per pixel."""

    macs_per_pixel: float = 10.0
    traffic_per_pixel: float = 5.0


def info(precision: Precision, built: Mapping[str, Any] | None = None) -> RunnerInfo:
    contract = ModelContract("rcan", {}, 2, "rgb", precision, None, 10.0, 1, "0" * 64)
    return RunnerInfo("engine", "openvino", "cpu", contract, "", built=built or {})


@pytest.mark.parametrize(
    ("runner", "arithmetic_ms", "memory_ms"),
    [
        (info(Precision.FP32), 10.0, 2.0),
        (info(Precision.INT8), 2.5, 0.5),
        (info(Precision.INT8, {"macs_share": {"int8": 0.5, "fp32": 0.5}}), 6.25, 1.25),
        (info(Precision.FP16), 10.0, 1.0),  # no rate for it here: FP32's
    ],
    ids=["fp32", "int8", "by-multiply-adds", "no-rate"],
)
def test_each_type_counts_at_its_rate(runner: RunnerInfo, arithmetic_ms: float, memory_ms: float) -> None:
    floor = floor_of(runner, (1, 3, 1000, 1000), Network(), RATES)

    assert (floor.arithmetic_ms, floor.memory_ms) == (pytest.approx(arithmetic_ms), pytest.approx(memory_ms))
    assert floor.ms == max(floor.arithmetic_ms, floor.memory_ms)


def test_the_machine_has_plausible_rates() -> None:
    rates = measure_rates()

    assert 1e9 < rates.macs_per_second[Precision.FP32] < 1e14
    assert rates.macs_per_second[Precision.INT8] > 1e9
    assert 1e8 < rates.bytes_per_second < 1e13
    assert measure_rates() is rates, "measured once per process"


def test_rows_of_a_device_that_cannot_be_measured_state_no_distance() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    times = (10.0, 10.1, 9.9, 10.0, 10.0)
    row = Row(replace(info(Precision.FP16), device="cuda:0"), "compute", statistics_of(times), True, None, times)

    result = BenchResult((1, 3, 64, 64), Effort(), (row,))

    assert with_floors(result, Network()) is result


def test_rows_state_their_distance() -> None:
    times = (10.0, 10.1, 9.9, 10.0, 10.0, 10.0)
    row = Row(info(Precision.FP32), "end-to-end", statistics_of(times), True, None, times)
    result = BenchResult((1, 3, 64, 64), Effort(), (row,))

    found = with_floors(result, Network())

    assert result.distance(row) is None
    (line,) = found.to_json()["rows"]
    assert line["floor_distance"] == pytest.approx(10.0 / line["floor"]["ms"])
    assert found.to_json()["rates"]["device"] == "cpu"
