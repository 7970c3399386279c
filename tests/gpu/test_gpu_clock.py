"""Bounds on TensorRT's clock: kernels are timed in both types, and the search for INT8 pays in their milliseconds."""

import json
from pathlib import Path

import pytest
from gpu_simulator import engine_file
from gpu_simulator.cuda import Simulator

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.quantize import QuantizeResult, artifacts_folder, quantize
from srdeploy.calibration.search.layer_times import charge
from srdeploy.calibration.search.sensitivity import PAID_IN_MACS
from srdeploy.cli.pipeline.clock import TensorRtClock, clock_for
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.precision import Precision, Target
from srdeploy.core.progress import SILENT
from srdeploy.runtime.bench.turns import Effort
from srdeploy.runtime.engines.gpu import find_gpu

pytestmark = pytest.mark.once
BRIEF = Effort(warmup_runs=1, warmup_seconds=0.0, min_runs=5, max_runs=5, seconds=0.01)


@pytest.fixture
def clock() -> TensorRtClock:
    gpu = find_gpu()
    assert gpu is not None
    return TensorRtClock(gpu, (1, 3, 48, 64), SILENT, BRIEF)


def test_the_time_of_every_kernel_belongs_to_a_layer(clock: TensorRtClock, onnx_int8: Path, onnx_fp16: Path) -> None:
    for path in (onnx_int8, onnx_fp16):
        graph = read_graph(path)
        names = {layer.node: layer.name for layer in graph.layers}

        kernels = clock.kernel_times(path)
        by_layer = charge(kernels, graph.model, names)

        assert set(by_layer) == set(names.values())
        assert min(by_layer.values()) > 0
        assert sum(by_layer.values()) == pytest.approx(sum(kernel.ms for kernel in kernels))


def bounded(
    name: str, onnx_fp32: Path, calibration: CalibrationSet, clock: TensorRtClock | None, min_fidelity: float
) -> QuantizeResult:
    return quantize(
        onnx_fp32,
        onnx_fp32.with_name(name),
        precision=Precision.INT8,
        target=Target.TENSORRT,
        calibration=calibration,
        options=QuantizeOptions(strength=0.0, method="minmax", min_fidelity=min_fidelity),
        clock=clock,
        force=True,
    )


@pytest.fixture
def bound(onnx_fp32: Path, calibration: CalibrationSet) -> float:
    """A fidelity in dB that needs some layers in FP16."""
    plain = bounded("plain.onnx", onnx_fp32, calibration, None, 1.0)
    assert plain.quality is not None
    return plain.quality.fidelity_db + 2


def test_the_search_pays_in_the_milliseconds_of_kernels(
    clock: TensorRtClock,
    onnx_fp32: Path,
    calibration: CalibrationSet,
    bound: float,
    machine: Simulator | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(engine_file._MACS_PER_MS, "HALF", 1e8)  # of simulated GPUs

    result = bounded("timed.onnx", onnx_fp32, calibration, clock, bound)

    document = json.loads((artifacts_folder(result.output) / "sensitivity.json").read_text())
    assert "milliseconds of TensorRT on" in document["costs"]
    assert any(group["latency_share_float"] for group in document["groups"])
    assert result.latency_ms is not None
    assert result.floats
    int8_ms, fp16_ms = result.latency_ms
    assert any("not recommended" in note for note in result.notes) is (int8_ms >= fp16_ms)
    if machine is not None:
        assert int8_ms < fp16_ms


def test_int8_is_not_recommended_where_fp16_is_as_fast(
    clock: TensorRtClock,
    onnx_fp32: Path,
    calibration: CalibrationSet,
    bound: float,
    machine: Simulator | None,
) -> None:
    if machine is None:
        pytest.skip("a real GPU is as fast as it is")
    # On simulated GPUs the kernels that quantize outweigh what a network this small gains.
    result = bounded("slow.onnx", onnx_fp32, calibration, clock, bound)

    (note,) = [note for note in result.notes if "not recommended" in note]
    assert "the FP16 graph" in note
    assert "Simulated GPU" in note


def test_without_a_clock_the_search_says_that_it_paid_in_multiply_adds(
    onnx_fp32: Path, calibration: CalibrationSet, bound: float
) -> None:
    result = bounded("macs.onnx", onnx_fp32, calibration, None, bound)

    assert result.choice is not None
    assert result.choice.costs == PAID_IN_MACS
    assert result.latency_ms is None


def test_only_full_tensorrt_has_a_clock() -> None:
    shape = (1, 3, 48, 64)

    assert clock_for(Target.TENSORRT, shape, SILENT) is not None
    assert clock_for(Target.TENSORRT_RTX, shape, SILENT) is None
    assert clock_for(Target.OPENVINO, shape, SILENT) is None
