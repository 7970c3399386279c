"""What a user can get wrong with GPUs, on the command line: one line, the exit code, nothing half-written.

Every case has a simulated machine of its own, also where a real GPU is. The engines' own errors are tested beside them
(tests/runtime/engines/tensorrt).
"""

import gc
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu.cases import PROFILE, image
from gpu_simulator.cuda import Simulator
from gpu_simulator.install import ADA, BLACKWELL, Setting, simulated
from PIL import Image

from srdeploy.cli.main import run
from srdeploy.core.errors import CapabilityError, UsageError
from srdeploy.core.runner import run_image
from srdeploy.runtime.bench.conditions import gpus
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine, open_engine
from srdeploy.runtime.engines.tensorrt.runner import TensorRtRunner
from srdeploy.upscale.model_files import ModelFiles
from srdeploy.upscale.upscaler import open_first

ONE_GPU = Setting("10.16.1.11", gpus=(ADA,))
SHAPES = ("--min-shape", "1x3x8x8", "--opt-shape", "1x3x48x64", "--max-shape", "4x3x96x128")
Machine = Callable[[Setting], AbstractContextManager[Simulator]]


@pytest.fixture(scope="module", autouse=True)
def machine() -> None:
    """No machine is shared here."""


@pytest.fixture
def on(tmp_path: Path) -> Machine:
    def enter(setting: Setting) -> AbstractContextManager[Simulator]:
        folder = tmp_path / "simulated"
        folder.mkdir(exist_ok=True)
        return simulated(folder, setting)

    return enter


@pytest.fixture(scope="module")
def plan(onnx_fp16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that was built on the first kind of GPU."""
    path = tmp_path_factory.mktemp("plan") / "model.plan"
    with simulated(tmp_path_factory.mktemp("simulated"), ONE_GPU):
        return build_engine(
            onnx_fp16, path, engine="tensorrt", options=BuildOptions(profiles=(PROFILE,), use_cache=False)
        ).path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "in.png"
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run a command that must fail; return its exit code and its one line."""
    capfd.readouterr()
    code = run([str(argument) for argument in arguments])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1, lines
    return code, lines[0]


@pytest.mark.parametrize("case", ["build", "open", "cuda-provider", "tensorrt-provider"])
def test_no_gpu(
    case: str,
    on: Machine,
    onnx_fp16: Path,
    plan: Path,
    picture: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out.png"
    provider = f"onnxruntime-{case.partition('-')[0]}"
    command = {
        "build": ("build", onnx_fp16, "--engine", "tensorrt", *SHAPES),
        "open": ("upscale", plan, picture),
    }.get(case, ("upscale", onnx_fp16, picture, "--engine", provider))
    with on(replace(ONE_GPU, gpus=())):
        code, line = refused(capfd, *command, "-o", output)

    assert code == 8
    assert "no NVIDIA GPU was found: the driver sees none" in line
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["simulated"]


def test_a_driver_that_is_too_old(on: Machine, plan: Path, picture: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with on(replace(ONE_GPU, driver=(12, 4))):
        code, line = refused(capfd, "upscale", plan, picture, "-o", picture.with_name("never.png"))
        found = gpus()

    assert code == 8
    assert "the NVIDIA driver supports CUDA 12.4, and PyTorch" in line
    assert "needs CUDA 13.0" in line
    assert (found[0]["name"], found[0]["driver_version"]) == (ADA.name, "550.54.14")
    assert not picture.with_name("never.png").exists()


def test_an_engine_of_the_other_kind_of_gpu(
    on: Machine, plan: Path, picture: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.png"
    with on(replace(ONE_GPU, gpus=(BLACKWELL, ADA))):
        code, line = refused(capfd, "upscale", plan, picture, "-o", output)
        assert run(["upscale", str(plan), str(picture), "--device", "cuda:1", "-o", str(output)]) == 0

    assert code == 8
    assert "was built for Simulated GPU Ada (8.9); this GPU is Simulated GPU Blackwell (12.0)" in line
    assert output.is_file()


def test_an_engine_that_does_not_open_is_replaced_by_the_next(on: Machine, plan: Path, onnx_fp16: Path) -> None:
    bundled = [ModelFiles(plan, "tensorrt", None), ModelFiles(onnx_fp16, "onnxruntime", None)]
    with on(replace(ONE_GPU, gpus=(BLACKWELL,))):
        with pytest.warns(RuntimeWarning, match=r"this GPU is Simulated GPU Blackwell.*fp16.onnx is used instead"):
            runner, found = open_first(iter(bundled), "auto", 1)
        with runner:
            assert (runner.info.device, found) == ("cpu", bundled[1])
        with pytest.raises(CapabilityError, match="this GPU is"):
            open_first(iter(bundled[:1]), "auto", 1)


def test_memory_is_full_when_an_engine_is_built(
    on: Machine, onnx_fp16: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "model.plan"
    with on(replace(ONE_GPU, gpus=(replace(ADA, memory_bytes=2**20),))):
        code, line = refused(capfd, "build", onnx_fp16, "--engine", "tensorrt", *SHAPES, "--no-cache", "-o", output)

    assert code in (2, 5)
    assert "memory" in line or "largest" in line
    assert not output.exists()


def test_tensorrt_11_beside_the_provider_for_tensorrt_10(
    on: Machine, onnx_fp16: Path, picture: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.png"
    with on(replace(ONE_GPU, version="11.4.0.106")):
        code, line = refused(capfd, "upscale", onnx_fp16, picture, "--engine", "onnxruntime-tensorrt", "-o", output)

    assert code == 8
    assert "needs TensorRT 10 (libnvinfer.so.10), and TensorRT 11.4.0.106 is installed" in line
    assert not output.exists()


def test_an_image_larger_than_the_profile_is_tiled(on: Machine, plan: Path, picture: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.png"
    with on(replace(ONE_GPU, schedule="late")):
        with open_engine(plan) as runner, pytest.raises(UsageError, match="1x3x8x8 to 4x3x96x128"):
            run_image(runner, image(1, 3, 120, 200))
        assert run(["upscale", str(plan), str(picture), "-o", str(output)]) == 0

    with Image.open(output) as found:
        assert found.size == (400, 240)


def test_interrupting_between_two_tiles_gives_the_memory_back(
    on: Machine, plan: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = TensorRtRunner.run, []

    def interrupted(self: TensorRtRunner, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls.append(len(feeds))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, feeds)

    monkeypatch.setattr(TensorRtRunner, "run", interrupted)
    with on(replace(ONE_GPU, schedule="late")) as simulator:
        code = run(["upscale", str(plan), str(picture), "-o", str(tmp_path / "out.png")])
        gc.collect()
        torch.cuda.empty_cache()
        assert simulator.used == [0]
        assert simulator.violations == []

    assert code == 130
    assert len(calls) == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["simulated"]
