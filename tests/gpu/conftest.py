"""Everything in this folder needs an NVIDIA GPU and says so when it is skipped. It needs no network."""

from pathlib import Path

import pytest
import torch

from srdeploy.models.checkpoint.load import Evidence, LoadedCheckpoint
from srdeploy.models.networks.rcan import RcanConfig
from srdeploy.models.networks.spec import network_of, spec_of
from srdeploy.runtime.engines.tensorrt.families import why_no_gpu

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def own_engine_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRDEPLOY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def checkpoint() -> LoadedCheckpoint:
    """A small RCAN x2 with random weights on 0..1."""
    torch.manual_seed(0)
    config = RcanConfig(
        scale=2,
        groups=2,
        blocks=2,
        features=32,
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
