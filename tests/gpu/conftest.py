"""Everything in this folder runs on an NVIDIA GPU: a real one where there is one, else simulated ones. No network.

With SRDEPLOY_TEST_GPU=real (make test-gpu) only a real GPU will do, and an engine family that is missing is an error.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu.cases import BUILT, ELSEWHERE, FIRST, MACHINES, PROFILE, REAL, REAL_ONLY, needs
from gpu_simulator.cuda import Simulator
from gpu_simulator.install import simulated
from PIL import Image

from srdeploy.calibration.images.dataset import CalibrationSet, make_calibration_set
from srdeploy.core.precision import Precision
from srdeploy.core.runner import run_image
from srdeploy.models.checkpoint.load import Evidence, LoadedCheckpoint
from srdeploy.models.networks.rcan import RcanConfig
from srdeploy.models.networks.spec import network_of, spec_of
from srdeploy.runtime.bench.floor import Rates
from srdeploy.runtime.engines.gpu import why_no_gpu
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine, open_engine
from srdeploy.runtime.engines.tensorrt.runner import TensorRtRunner

HERE = Path(__file__).parent


def pytest_sessionstart() -> None:
    if REAL_ONLY and (reason := why_no_gpu()):
        pytest.exit(f"the GPU tests were asked for on a real GPU, and {reason}", returncode=8)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    for item in items:
        if HERE not in item.path.parents:
            kept.append(item)
            continue
        item.add_marker(pytest.mark.gpu)
        params = item.callspec.params if hasattr(item, "callspec") else {}
        wanted = {place for family, place in ELSEWHERE.items() if family in params.values()}
        if item.get_closest_marker("once"):
            wanted.add(FIRST)
        # Files with machines of their own have no such parameter.
        everywhere = params.get("machine", "real") == "real"
        (kept if everywhere or wanted <= {params["machine"]} else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="module", autouse=True, params=["real"] if REAL else MACHINES)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator | None]:
    """The GPU: a real one (None), or simulated ones of both generations of TensorRT and all schedules."""
    if request.param == "real":
        yield None
        return
    with simulated(tmp_path_factory.mktemp("simulated"), MACHINES[request.param]) as simulator:
        yield simulator


@pytest.fixture(autouse=True)
def no_rule_is_broken(machine: Simulator | None) -> Iterator[None]:
    """Fail a test that did what CUDA or TensorRT leaves undefined."""
    if machine is None:
        yield
        return
    machine.violations.clear()
    yield
    gc.collect()
    assert machine.violations == []


@pytest.fixture(autouse=True)
def own_engine_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRDEPLOY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module", autouse=True)
def rates_of_a_simulated_gpu(machine: Simulator | None) -> Iterator[None]:
    """State the rates that floors refer to: they are measured with large matrix products."""
    with pytest.MonkeyPatch.context() as patch:
        if machine is not None:
            rates = Rates("cuda:0", {Precision.FP32: 5e13, Precision.FP16: 5e14, Precision.INT8: 1e15}, 4e12, None)
            patch.setattr("srdeploy.runtime.bench.latency.measure_rates", lambda device: rates)
        yield


@pytest.fixture(scope="session")
def checkpoint() -> LoadedCheckpoint:
    """A small RCAN x2 with random weights on 0..1."""
    torch.manual_seed(0)
    config = RcanConfig(
        scale=2,
        groups=1,
        blocks=1,
        features=16,
        attention_width=2,
        upsampler=(2,),
        mean_shift="none",
        value_range=1.0,
    )
    return LoadedCheckpoint(
        path=Path("random.pt"),
        sha256="0" * 64,
        dialect="test",
        config=config,
        spec=spec_of(config),
        network=network_of(config).eval(),
        evidence=Evidence("test", "test", "test", "test", (), {}, ()),
    )


@pytest.fixture(scope="session")
def onnx_fp32(checkpoint: LoadedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from srdeploy.export.exporter import export_onnx

    path = tmp_path_factory.mktemp("onnx") / "model.fp32.onnx"
    export_onnx(checkpoint, path)
    return path


@pytest.fixture(scope="session")
def onnx_fp16(onnx_fp32: Path) -> Path:
    from srdeploy.calibration.quantize import quantize
    from srdeploy.core.precision import Precision, Target

    path = onnx_fp32.with_name("model.fp16.onnx")
    quantize(onnx_fp32, path, precision=Precision.FP16, target=Target.TENSORRT, calibration=None)
    return path


@pytest.fixture(scope="session")
def calibration(checkpoint: LoadedCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    """Crops of a few smooth pictures, which are the ground truth too."""
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(8):
        coarse = np.random.default_rng(seed).integers(0, 256, (12, 14, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((112, 96), Image.Resampling.BICUBIC).save(folder / f"{seed}.png")
    return make_calibration_set(folder, contract=checkpoint.contract(), hr=True, count=6, crop=32)


@pytest.fixture(scope="session")
def onnx_int8(onnx_fp32: Path, calibration: CalibrationSet) -> Path:
    from srdeploy.calibration.options import QuantizeOptions
    from srdeploy.calibration.quantize import quantize
    from srdeploy.core.precision import Target

    path = onnx_fp32.with_name("model.int8.onnx")
    options = QuantizeOptions(strength=0.0, method="minmax")
    quantize(
        onnx_fp32, path, precision=Precision.INT8, target=Target.TENSORRT, calibration=calibration, options=options
    )
    return path


@pytest.fixture(scope="session")
def expected(onnx_fp16: Path) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
    """What the FP16 graph computes on the CPU."""
    with open_engine(onnx_fp16, engine="onnxruntime", threads=1) as runner:
        yield lambda image: run_image(runner, image)


@pytest.fixture(scope="module", params=BUILT)
def built(
    request: pytest.FixtureRequest, machine: object, onnx_fp16: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An FP16 engine of every TensorRT that runs here."""
    needs(request.param)
    path = tmp_path_factory.mktemp(request.param) / "model.engine"
    options = BuildOptions(profiles=(PROFILE,), use_cache=False)
    return build_engine(onnx_fp16, path, engine=request.param, options=options).path


@pytest.fixture
def runner(built: Path) -> Iterator[TensorRtRunner]:
    with open_engine(built) as opened:
        assert isinstance(opened, TensorRtRunner)
        yield opened
