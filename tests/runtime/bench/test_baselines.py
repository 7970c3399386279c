"""Every baseline computes the same network, and one that cannot be compiled is skipped with its reason."""

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from srdeploy.core.errors import CapabilityError
from srdeploy.core.precision import Precision
from srdeploy.core.runner import MeteredRunner, TimedRunner, run_image
from srdeploy.models.checkpoint.load import LoadedCheckpoint, load_checkpoint
from srdeploy.runtime.bench.baselines import ON_CPU, ON_GPU, default_baselines, open_baselines
from srdeploy.runtime.bench.inputs import bench_image
from srdeploy.runtime.engines.eager import open_eager
from srdeploy.runtime.verify.difference import difference

RCAN = Path(__file__).parents[2] / "data" / "checkpoints" / "yulunzhang_rcan_x2" / "RCAN_BIX2.pt"
SHAPE = (1, 3, 12, 17)


@pytest.fixture(scope="module")
def checkpoint() -> LoadedCheckpoint:
    return load_checkpoint(RCAN)


@pytest.mark.parametrize(
    ("name", "floor_db"), [("eager", 200.0), ("channels-last", 100.0), ("half", 25.0), ("autocast", 25.0)], ids=str
)
def test_every_form_computes_the_network(checkpoint: LoadedCheckpoint, name: str, floor_db: float) -> None:
    image = bench_image(SHAPE)

    with open_eager(checkpoint, threads=1) as eager, open_eager(checkpoint, ON_CPU[name], threads=1) as form:
        found = difference(run_image(form, image), run_image(eager, image))
        assert isinstance(form, TimedRunner)
        assert isinstance(form, MeteredRunner)
        assert form.prepare({"input": image})() > 0

    assert found.problem is None
    assert found.fidelity_db > floor_db


def test_precision_is_stated_by_what_computes(checkpoint: LoadedCheckpoint) -> None:
    with ExitStack() as stack:
        forms = open_baselines(checkpoint, ["channels-last", "autocast"], stack, shape=SHAPE, threads=1).runners

    assert [form.info.name for form in forms] == ["eager fp32", "eager fp32 channels-last", "eager bf16 autocast"]
    assert [form.info.contract.precision for form in forms] == [Precision.FP32, Precision.FP32, Precision.BF16]
    assert forms[2].info.numeric_mode == "autocast to BF16, channels last"


def test_compiling_without_a_compiler_is_skipped_with_its_reason(
    checkpoint: LoadedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")

    with ExitStack() as stack:
        found = open_baselines(checkpoint, ["compile", "aot"], stack, shape=SHAPE, threads=1)

    assert [runner.info.name for runner in found.runners] == ["eager fp32"]
    assert found.skipped == {
        "torch.compile fp32": "torch.compile needs a C++ compiler",
        "AOTInductor fp32": "AOTInductor needs a C++ compiler",
    }


def test_a_compiler_that_fails_ends_its_baseline_only(
    checkpoint: LoadedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(network: torch.nn.Module, **_: object) -> object:
        def run(image: torch.Tensor) -> torch.Tensor:
            raise TypeError("backend='inductor' raised:\nno header")

        return run

    monkeypatch.setattr(torch, "compile", failing)

    with ExitStack() as stack:
        found = open_baselines(checkpoint, ["compile", "channels-last"], stack, shape=SHAPE, threads=1)

    assert [runner.info.name for runner in found.runners] == ["eager fp32", "eager fp32 channels-last"]
    assert "could not compile the network for 1x3x12x17: backend" in found.skipped["torch.compile fp32"]


def test_the_plain_network_is_never_skipped(checkpoint: LoadedCheckpoint) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")

    with ExitStack() as stack, pytest.raises(CapabilityError, match="sees no NVIDIA GPU"):
        open_baselines(checkpoint, [], stack, shape=SHAPE, device="cuda:0")


def test_gpu_baselines_are_those_that_people_run() -> None:
    forms = [ON_GPU[name] for name in default_baselines("cuda:0")]

    assert [form.name for form in forms] == [
        "eager fp32", "eager fp16 channels-last", "eager fp16 autocast", "torch.compile fp16", "AOTInductor fp16",
    ]  # fmt: skip
    assert forms[1].cudnn_benchmark
    assert set(ON_CPU) == set(ON_GPU)
    assert set(default_baselines("cpu")) <= set(ON_CPU)
