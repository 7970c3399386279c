"""The eager baselines compute the same network; studies are curves of what was measured; conditions are recorded."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.core.runner import RunnerInfo, TimedRunner, run_image
from srdeploy.core.shapes import ShapeProfile
from srdeploy.models.checkpoint.load import LoadedCheckpoint, load_checkpoint
from srdeploy.runtime.bench.baselines import FORMS, Form, open_baseline, open_baselines, why_not
from srdeploy.runtime.bench.conditions import conditions
from srdeploy.runtime.bench.latency import Effort, bench_image, named
from srdeploy.runtime.bench.studies import machine_peak, scaling, stream_throughput, throughput
from srdeploy.runtime.engines.eager import open_eager
from srdeploy.runtime.verify.advice import advice
from srdeploy.runtime.verify.difference import difference
from srdeploy.runtime.verify.parity import Case, Gates, VerifyResult

RCAN = Path(__file__).parents[1] / "data" / "checkpoints" / "yulunzhang_rcan_x2" / "RCAN_BIX2.pt"
QUICK = Effort(warmup_runs=1, warmup_seconds=0.0, min_runs=5, max_runs=5, seconds=0.05)


@pytest.fixture(scope="module")
def checkpoint() -> LoadedCheckpoint:
    return load_checkpoint(RCAN)


@pytest.mark.parametrize(("index", "floor_db"), [(0, 200.0), (1, 100.0), (2, 25.0)], ids=["plain", "nhwc", "bf16"])
def test_every_form_computes_the_network(checkpoint: LoadedCheckpoint, index: int, floor_db: float) -> None:
    image = bench_image((1, 3, 12, 17))

    with open_eager(checkpoint, threads=1) as eager, open_baseline(checkpoint, FORMS[index], threads=1) as form:
        found = difference(run_image(form, image), run_image(eager, image))
        assert isinstance(form, TimedRunner)
        assert form.prepare({"input": image})() > 0

    assert found.problem is None
    assert found.fidelity_db > floor_db


def test_precision_is_stated_by_what_computes(checkpoint: LoadedCheckpoint) -> None:
    with ExitStack() as stack:
        forms = open_baselines(checkpoint, stack, forms=FORMS[:3], threads=1)

    assert [form.info.name for form in forms] == ["eager fp32", "eager fp32 channels-last", "eager bf16 autocast"]
    assert [form.info.contract.precision for form in forms] == [Precision.FP32, Precision.FP32, Precision.BF16]


def test_compiling_without_a_compiler_is_left_out_with_its_reason(
    checkpoint: LoadedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    compiled = next(form for form in FORMS if form.compiled)

    with ExitStack() as stack:
        assert open_baselines(checkpoint, stack, forms=[compiled], threads=1) == []
    assert why_not(compiled) == "torch.compile needs a C++ compiler"
    assert why_not(Form("plain")) is None


def test_the_machine_has_a_plausible_peak() -> None:
    peak = machine_peak()

    assert 1e9 < peak["flops"] < 1e14
    assert 1e8 < peak["bytes_per_second"] < 1e13
    assert (peak["device"], peak["type"], peak["bytes_per_value"]) == ("cpu", "FP32", 4)


def test_curves_have_the_points_that_were_asked_for(checkpoint: LoadedCheckpoint) -> None:
    narrow = ShapeProfile((1, 3, 4, 4), (1, 3, 4, 4), (1, 3, 6, 6))

    class Narrow:
        """The eager network behind a profile."""

        def __init__(self) -> None:
            self._runner = named(open_eager(checkpoint, threads=1), "narrow")
            contract = self._runner.info.contract
            self.info = RunnerInfo("narrow", "eager", "cpu", contract, "FP32", threads=1, profile=narrow)

        def run(self, feeds):  # type: ignore[no-untyped-def]
            return self._runner.run(feeds)

        def __enter__(self):  # type: ignore[no-untyped-def]
            return self

        def __exit__(self, *_: object) -> None:
            pass

    with open_eager(checkpoint, threads=1) as eager:
        sizes = scaling([eager, Narrow()], (1, 3, 8, 8), (4, 8), checkpoint.spec, QUICK)
        batches = throughput([eager], (1, 3, 4, 5), (1, 3), QUICK)

    points = {entry["name"]: [point["pixels"] for point in entry["points"]] for entry in sizes["runners"]}
    assert points == {"eager fp32": [16, 64], "narrow": [16]}
    peak, spec = sizes["peak"], checkpoint.spec
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

    study = stream_throughput({"eager": opener}, (1, 3, 4, 4), (1, 2), QUICK)

    assert len(asked) == 3
    assert asked[1] == asked[2] <= asked[0]
    assert all(point["images_per_second"] > 0 for point in study["runners"][0]["points"])


def test_conditions_name_what_numbers_depend_on() -> None:
    found = conditions()

    assert {"processor", "cpu_flags", "cpus", "governor", "gpus", "load_average", "versions", "time"} <= set(found)
    assert found["versions"]["torch"]


def _result(precision: Precision, problem: str | None, fidelity: float, grid_fidelity: float) -> VerifyResult:
    contract = ModelContract("rcan", {}, 2, "rgb", precision, None, 1.0, 1, "0" * 64)
    info = RunnerInfo("engine", "openvino", "cpu", contract, "FP32")

    def case(value: float, words: str | None) -> Case:
        plain = difference(np.zeros((1, 1, 2, 2), np.float32), np.full((1, 1, 2, 2), 10 ** (-value / 20), np.float32))
        return Case("a", (1, 1, 1, 1), type(plain)(**{**plain.to_json(), "problem": words}), 40.0)

    return VerifyResult(info, info, Gates.of(precision), (case(fidelity, problem),), (case(grid_fidelity, None),))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (_result(Precision.FP16, "4 NaN and 0 infinite values of 9", 50, 50), "leave FP16's range"),
        (_result(Precision.FP32, "4 NaN and 0 infinite values of 9", 50, 50), "--bisect"),
        (_result(Precision.FP32, "output shape (1,) instead of (2,)", 50, 50), "export it again"),
        (_result(Precision.FP32, None, 50, 20), "a size was baked into the graph"),
        (_result(Precision.INT8, None, 9, 9), "compute this graph wrongly"),
        (_result(Precision.INT8, None, 38, 38), "--max-psnr-drop"),
        (_result(Precision.BF16, None, 38, 38), "take fp16"),
    ],
    ids=["fp16-nan", "nan", "shape", "baked-size", "engine-wrong", "int8", "bf16"],
)
def test_advice_fits_what_went_wrong(result: VerifyResult, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srdeploy.core.environment.int8_sums_saturate", lambda: False)

    assert words in advice(result)


@pytest.mark.parametrize(("saturate", "advised"), [(True, True), (False, False)], ids=["without-vnni", "with-vnni"])
def test_overflowing_sums_are_named_only_where_they_overflow(
    saturate: bool, advised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srdeploy.core.environment.int8_sums_saturate", lambda: saturate)

    words = advice(_result(Precision.INT8, None, 9, 9))

    assert ("--weight-bits 7" in words) is advised
