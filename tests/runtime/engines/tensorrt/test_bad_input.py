"""What can be wrong with a GPU machine, on the simulated GPU: one line, the exit code, memory freed, no file left."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gpu_simulator.cuda import Gpu
from gpu_simulator.install import Setting, simulated

from srdeploy.core.errors import CapabilityError, GpuMemoryError, SrdeployError
from srdeploy.core.runner import run_image
from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines import gpu, onnxruntime_gpu, recommended
from srdeploy.runtime.engines.onnxruntime_gpu import CUDA, TENSORRT
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine, engine_status, open_engine
from srdeploy.runtime.engines.tensorrt import products
from srdeploy.upscale.upscaler import Upscaler

GraphFactory = Callable[..., Path]
PROFILE = ShapeProfile((1, 3, 8, 8), (1, 3, 16, 16), (1, 3, 512, 512))
ADA = Gpu("Simulated GPU Ada", (8, 9), 8 * 2**30)
OTHER_ADA = Gpu("Simulated GPU Ada, smaller", (8, 9), 4 * 2**30)
HOPPER = Gpu("Simulated GPU Hopper", (9, 0), 80 * 2**30)
SMALL = Gpu("Simulated GPU Ada", (8, 9), 24 * 2**20)

if not (Path(__file__).parents[4] / "build" / "tensorrt-bindings" / "10.16.1.11").is_dir():
    pytest.skip("the TensorRT bindings are missing: make test downloads them", allow_module_level=True)


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., object]:
    """Return a function that simulates a machine with these GPUs for a `with` block."""

    def make(*gpus: Gpu, version: str = "10.16.1.11") -> object:
        return simulated(tmp_path_factory.mktemp("machine"), Setting(version, gpus=gpus))

    return make


@pytest.fixture
def plan(machine: Callable[..., object], small_onnx: GraphFactory, tmp_path: Path) -> Path:
    """An FP16 engine that was built on an Ada GPU."""
    with machine(ADA):  # type: ignore[attr-defined]  # a context manager
        options = BuildOptions(profiles=(PROFILE,), use_cache=False)
        return build_engine(small_onnx(dtype="float16"), tmp_path / "e.plan", engine="tensorrt", options=options).path


def one_line(error: SrdeployError, code: int = 8) -> bool:
    return "\n" not in str(error) and error.exit_code == code


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def test_no_gpu(machine: Callable[..., object], plan: Path, small_onnx: GraphFactory) -> None:
    with machine():  # type: ignore[attr-defined]
        for attempt in (
            lambda: open_engine(plan),
            lambda: open_engine(small_onnx(), engine="onnxruntime-cuda"),
            lambda: build_engine(
                small_onnx(), plan.with_name("never"), engine="tensorrt", options=BuildOptions(profiles=(PROFILE,))
            ),
        ):
            with pytest.raises(CapabilityError, match="no NVIDIA GPU") as caught:
                attempt()
            assert one_line(caught.value)
        assert [entry.engine for entry in recommended()][:2] == ["onnxruntime", "openvino"]
    assert not plan.with_name("never").exists()


def test_a_gpu_number_that_does_not_exist(machine: Callable[..., object], plan: Path) -> None:
    with machine(ADA, HOPPER), pytest.raises(CapabilityError, match=r"device 'cuda:7'.*cuda:0 to cuda:1"):  # type: ignore[attr-defined]
        open_engine(plan, device="cuda:7")


def test_a_driver_that_is_too_old(machine: Callable[..., object], plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "driver_cuda", lambda: (12, 4))
    monkeypatch.setattr(products, "package_versions", lambda names: dict.fromkeys(names, "10.16.1.11"))

    with machine(ADA):  # type: ignore[attr-defined]
        with pytest.raises(
            CapabilityError, match=r"supports CUDA 12\.4, and this TensorRT needs CUDA 13 \(driver 580"
        ) as caught:
            open_engine(plan)
        assert one_line(caught.value)
        assert "needs CUDA 13" in str(engine_status("tensorrt").why_not_run)
        monkeypatch.setattr(products, "driver_cuda", lambda: (13, 0))
        assert engine_status("tensorrt").why_not_run is None


@pytest.mark.parametrize(
    ("built_for", "driver", "reason"),
    [
        (None, None, "was built without CUDA"),
        ("13.0", None, r"no NVIDIA driver \(libcuda"),
        ("13.0", (12, 4), r"driver supports CUDA 12\.4, and PyTorch .* needs CUDA 13\.0"),
        ("13.0", (13, 1), "the driver sees none"),
    ],
    ids=["cpu-build", "no-driver", "old-driver", "no-gpu"],
)
def test_the_reason_for_no_gpu_is_named(
    built_for: str | None, driver: tuple[int, int] | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(gpu, "driver_cuda", lambda: driver)

    found = gpu.why_no_gpu()

    assert found is not None
    assert found.startswith("no NVIDIA GPU")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found)


def test_an_engine_of_another_gpu(machine: Callable[..., object], plan: Path) -> None:
    with machine(HOPPER):  # type: ignore[attr-defined]
        with pytest.raises(CapabilityError, match=r"built for .*Ada \(8\.9\); this GPU is .*Hopper \(9\.0\)") as caught:
            open_engine(plan)
        assert one_line(caught.value)


def test_an_engine_of_another_model_of_the_same_capability_warns_and_runs(
    machine: Callable[..., object], plan: Path
) -> None:
    with machine(HOPPER, OTHER_ADA):  # type: ignore[attr-defined]  # two GPUs of different kinds
        with pytest.warns(RuntimeWarning, match="was built for Simulated GPU Ada; on Simulated GPU Ada, smaller"):
            runner = open_engine(plan, device="cuda:1")
        with runner:
            assert run_image(runner, image(1, 3, 8, 8)).shape == (1, 3, 16, 16)


def test_tensorrt_11_beside_the_providers_tensorrt_10(
    machine: Callable[..., object], small_onnx: GraphFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime_gpu, "_why_not_installed", lambda provider: None)
    with machine(ADA, version="11.4.0.106"):  # type: ignore[attr-defined]
        monkeypatch.setattr(onnxruntime_gpu.ctypes, "CDLL", _no_library)
        with pytest.raises(
            CapabilityError, match=r"needs TensorRT 10 \(libnvinfer.so.10\), and TensorRT 11\.4\.0\.106 is installed"
        ) as caught:
            TENSORRT.open_onnx(small_onnx, threads=None, parity=False, outputs=None, device="cuda:0")  # type: ignore[arg-type]  # not read
        assert one_line(caught.value)
        assert engine_status("tensorrt").why_not_run is None


def _no_library(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.mark.parametrize(
    ("packages", "reason"),
    [
        ({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}, "both installed and overwrite each other"),
        ({"onnxruntime": "1.31.1"}, "has no CUDAExecutionProvider"),
        ({"onnxruntime-gpu": "1.20.0"}, "1.20.0 is too old"),
    ],
    ids=["both", "cpu-only", "old"],
)
def test_the_wrong_onnxruntime_packages_name_the_repair(
    packages: dict[str, str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime_gpu, "package_versions", lambda names: packages)
    monkeypatch.setattr(onnxruntime, "__version__", next(iter(packages.values())))

    found = CUDA.why_not_run()

    assert found is not None
    assert reason in found
    assert found.endswith(onnxruntime_gpu.INSTALL)


def test_a_full_gpu_when_opening(machine: Callable[..., object], plan: Path) -> None:
    tiny = Gpu("Simulated GPU Ada", (8, 9), plan.stat().st_size // 2)

    with machine(tiny), pytest.raises(GpuMemoryError, match="the GPU's memory is full: .*e.plan needs more") as caught:  # type: ignore[attr-defined]
        open_engine(plan)
    assert one_line(caught.value)


def test_a_full_gpu_when_running_gives_its_memory_back(machine: Callable[..., object], plan: Path) -> None:
    with machine(SMALL) as simulator:  # type: ignore[attr-defined]
        with open_engine(plan) as runner:
            small = run_image(runner, image(1, 3, 16, 16))
            with pytest.raises(GpuMemoryError, match="cannot run an input of 1x3x512x512") as caught:
                run_image(runner, image(1, 3, 512, 512))
            assert one_line(caught.value)
            np.testing.assert_array_equal(run_image(runner, image(1, 3, 16, 16)), small)
        del runner, caught
        gc.collect()
        import torch

        torch.cuda.empty_cache()
        assert simulator.used == [0]


def test_tiles_become_smaller_until_they_fit_the_gpu(
    machine: Callable[..., object], plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = (np.random.default_rng(1).random((512, 512, 3)) * 255).astype(np.uint8)
    with machine(ADA), Upscaler.open(plan) as whole:  # type: ignore[attr-defined]
        expected, report = whole.upscale(picture)
        assert report.decision.plan.whole
    monkeypatch.setattr("srdeploy.upscale.upscaler.gpu_memory", lambda device: 1 << 40)  # far too optimistic
    with machine(SMALL), Upscaler.open(plan) as upscaler:  # type: ignore[attr-defined]
        tiled, report = upscaler.upscale(picture)

    assert not report.decision.plan.whole
    np.testing.assert_array_equal(tiled, expected)  # three 3x3 convolutions: tiles with an overlap are exact


def test_ctrl_c_in_a_build_ends_it_at_once_and_leaves_nothing(
    small_onnx: GraphFactory, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = small_onnx(dtype="float16")
    script = f"""
from contextlib import contextmanager
from pathlib import Path
from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine

class Steps:
    def note(self, message): pass
    @contextmanager
    def task(self, description, total=None):
        yield lambda amount=1, note=None: print(note, flush=True)

shape = (1, 3, 8, 8)
options = BuildOptions(profiles=(ShapeProfile(shape, shape, shape),), use_cache=False)
output = Path({str(tmp_path / "e.plan")!r})
build_engine(Path({str(path)!r}), output, engine="tensorrt", options=options, progress=Steps())
"""
    setting = Setting("10.16.1.11", gpus=(ADA,), build_step_seconds=3600)
    with simulated(tmp_path_factory.mktemp("machine"), setting):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )
    assert process.stdout is not None
    process.stdout.readline()  # the builder is at work
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)

    assert "KeyboardInterrupt" in stderr
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_recommendations_follow_the_machine(machine: Callable[..., object]) -> None:
    with machine(ADA):  # type: ignore[attr-defined]
        found = {entry.engine: [str(precision) for precision in entry.precisions] for entry in recommended()}
        assert found["tensorrt"] == ["fp16", "int8", "fp8"]
        assert "tensorrt-rtx" not in found
        assert "openvino" not in found
        assert "openvino" in {entry.engine for entry in recommended("cpu")}
