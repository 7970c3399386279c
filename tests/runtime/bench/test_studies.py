"""Studies are curves of what was measured, and conditions are recorded."""

from pathlib import Path

import pytest

from srdeploy.core.runner import RunnerInfo
from srdeploy.core.shapes import ShapeProfile
from srdeploy.models.checkpoint.load import LoadedCheckpoint, load_checkpoint
from srdeploy.runtime.bench.conditions import conditions
from srdeploy.runtime.bench.naming import named
from srdeploy.runtime.bench.studies import scaling, stream_throughput, throughput
from srdeploy.runtime.bench.turns import Effort
from srdeploy.runtime.engines.eager import open_eager

RCAN = Path(__file__).parents[2] / "data" / "checkpoints" / "yulunzhang_rcan_x2" / "RCAN_BIX2.pt"
SHORT = Effort(warmup_runs=1, warmup_seconds=0.0, min_runs=5, max_runs=5, seconds=0.05)


@pytest.fixture(scope="module")
def checkpoint() -> LoadedCheckpoint:
    return load_checkpoint(RCAN)


def test_curves_have_the_points_that_were_asked_for(checkpoint: LoadedCheckpoint) -> None:
    narrow = ShapeProfile((1, 3, 4, 4), (1, 3, 4, 4), (1, 3, 6, 6))

    class Narrow:
        """The eager network behind a profile."""

        def __init__(self) -> None:
            self._runner = named(open_eager(checkpoint, threads=1), "narrow")
            contract = self._runner.info.contract
            self.info = RunnerInfo("narrow", "eager", "cpu", contract, "FP32", threads=1, profiles=(narrow,))

        def run(self, feeds):  # type: ignore[no-untyped-def]
            return self._runner.run(feeds)

        def __enter__(self):  # type: ignore[no-untyped-def]
            return self

        def __exit__(self, *_: object) -> None:
            pass

    with open_eager(checkpoint, threads=1) as eager:
        sizes = scaling([eager, Narrow()], (1, 3, 8, 8), (4, 8), checkpoint.spec, SHORT)
        batches = throughput([eager], (1, 3, 4, 5), (1, 3), SHORT)

    points = {entry["name"]: [point["pixels"] for point in entry["points"]] for entry in sizes["runners"]}
    assert points == {"eager fp32": [16, 64], "narrow": [16]}
    peak, spec = sizes["peak"], checkpoint.spec
    assert (peak["device"], peak["type"], peak["bytes_per_value"]) == ("cpu", "FP32", 4)
    assert sizes["floor"][0]["ms"] == pytest.approx(2e3 * spec.macs_per_pixel * 16 / peak["flops"])
    assert sizes["memory_floor"][1]["ms"] == pytest.approx(4e3 * spec.traffic_per_pixel * 64 / peak["bytes_per_second"])
    (line,) = batches["runners"]
    assert [point["batch"] for point in line["points"]] == [1, 3]
    for point in line["points"]:
        assert point["images_per_second"] == pytest.approx(1000 * point["batch"] / point["median_ms"])


def test_streams_share_the_threads(checkpoint: LoadedCheckpoint) -> None:
    asked: list[int] = []

    def opener(threads: int):  # type: ignore[no-untyped-def]
        asked.append(threads)
        return open_eager(checkpoint, threads=1)

    study = stream_throughput({"eager": opener}, (1, 3, 4, 4), (1, 2), SHORT)

    assert len(asked) == 3
    assert asked[1] == asked[2] <= asked[0]
    assert all(point["images_per_second"] > 0 for point in study["runners"][0]["points"])


def test_conditions_name_what_numbers_depend_on() -> None:
    found = conditions()

    assert {"processor", "cpu_flags", "cpus", "governor", "gpus", "load_average", "versions", "time"} <= set(found)
    assert found["versions"]["torch"]
