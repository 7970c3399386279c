"""Next steps on machines with a GPU, which is a simulated one here."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_simulator.install import ADA, Setting, simulated
from next_steps.conftest import User
from next_steps.test_calibration import changed_weights

from srdeploy.cli.verify import _refuse_failures
from srdeploy.core.errors import GateError
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.precision import Precision
from srdeploy.core.samples import SampleFolder
from srdeploy.models.checkpoint.load import load_checkpoint
from srdeploy.runtime.bench.floor import Rates
from srdeploy.runtime.engines.eager import open_eager
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.runtime.verify.bisect import Bisection, Suspect
from srdeploy.runtime.verify.parity import verify_all

GPU = Setting("10.16.1.11", gpus=(ADA,))
SHAPES = "--min-shape 1x3x8x8 --opt-shape 1x3x48x64 --max-shape 4x3x96x128"
BUILD = f"build fp16.onnx --engine tensorrt {SHAPES}"


@pytest.mark.advice("core/errors.py:GpuMemoryError.__init__", "or close other programs on the GPU")
def test_a_gpu_that_is_too_small(user: User, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A whole image cannot become smaller: the message comes instead of an endless search for a size."""
    small = replace(GPU, gpus=(replace(ADA, memory_bytes=int(1.2 * 2**20)),))
    command = "upscale a.plan photos/0.png -o a.png"

    with simulated(tmp_path_factory.mktemp("first"), GPU):
        user.runs(f"{BUILD} -o a.plan")
    with simulated(tmp_path_factory.mktemp("small"), small):
        user.refused(f"{command} --tiles whole")
        user.runs(f"{command} --tile 48 --batch 1")
    with simulated(tmp_path_factory.mktemp("free"), GPU):
        user.runs(f"{command} --tiles whole --force")


@pytest.mark.advice("cli/bench.py:_check_studies", "measure the engines of each device in a command of their own")
def test_studies_of_engines_on_several_devices(
    user: User, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = Rates("cuda:0", {Precision.FP32: 5e13, Precision.FP16: 5e14, Precision.INT8: 1e15}, 4e12, None)
    monkeypatch.setattr("srdeploy.runtime.bench.latency.measure_rates", lambda device: rates)
    brief = "--seconds 0.02 --warmup-seconds 0.01 --min-runs 5 --allow-unstable --no-baselines"
    command = f"--against good.pt --shape 1x3x24x32 {brief} --batches 1,2"

    with simulated(tmp_path_factory.mktemp("simulated"), GPU):
        user.runs(f"{BUILD} -o a.plan")
        user.refused(f"bench good.onnx a.plan {command}")
        user.runs(f"bench a.plan {command}")
        user.runs(f"bench good.onnx {command}")


@pytest.mark.advice("cli/pipeline/engines.py:_default_placements", "to see what is missing: srdeploy doctor")
def test_a_gpu_without_an_engine_for_it(
    user: User, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("empty").mkdir()
    for module in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, module, None)

    with simulated(tmp_path_factory.mktemp("bare"), replace(GPU, version=None, onnxruntime_gpu=False)):
        user.refused("deploy good.pt --images empty -o a.srd")
        assert "tensorrt" in user.runs("doctor")


@pytest.mark.advice("cli/verify.py:_refuse_failures", "use another --engine: this one computes that node wrongly")
def test_an_engine_that_computes_a_node_wrongly(user: User) -> None:
    """A graph with other weights takes the place of an engine that computes one layer wrongly."""
    changed_weights(lambda weights: weights * 1.5, layer=3)
    contract = read_graph(Path("good.onnx")).contract
    with open_eager(load_checkpoint(Path("good.pt"))) as eager, open_engine(Path("changed.onnx")) as wrong:
        results = verify_all([wrong], eager, SampleFolder(Path("photos"), None, contract=contract))
    node = Suspect("groups.0.blocks.0.conv1/Conv", "Conv", "groups.0.blocks.0.conv1", "a", 3.0, 99.0)

    with pytest.raises(GateError):
        _refuse_failures(results, [None], [Bisection("engine", "onnxruntime", node, (), 3.0, 1)])
    user.runs("verify good.onnx --against good.pt --images photo.png --engine openvino")
