"""Next steps of the TensorRTs and of ONNX Runtime's GPU providers: real builds of TensorRT-RTX, and simulated GPUs."""

import contextlib
import importlib
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gpu_simulator.cuda import Gpu, Simulator
from gpu_simulator.install import ADA, BLACKWELL, Setting, forget_polygraphy, simulated
from next_steps.conftest import User
from next_steps.test_core import EXTRAS
from next_steps.test_runtime import edited

from srdeploy.core.artifact import sha256_of_bytes
from srdeploy.core.errors import BuildError, CapabilityError, InputError, UsageError
from srdeploy.core.manifest import manifest_path, read_manifest
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.runtime.engines.sidecar import read_engine
from srdeploy.runtime.engines.tensorrt import products
from srdeploy.runtime.engines.tensorrt.build import _worker_error, check_memory
from srdeploy.runtime.engines.tensorrt.full import FULL
from srdeploy.runtime.engines.tensorrt.layers import Layers
from srdeploy.runtime.engines.tensorrt.log import Log
from srdeploy.runtime.engines.tensorrt.open import compare_with_sidecar
from srdeploy.runtime.engines.tensorrt.rtx import RTX
from srdeploy.runtime.engines.tensorrt.worker import _failed
from srdeploy.runtime.package.triton import _capability
from srdeploy.runtime.verify.layerwise import _backend

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'srdeploy[tensorrt-rtx]'")

GPU = Setting("10.16.1.11", gpus=(ADA,))
HOPPER = Gpu("Simulated GPU Hopper", (9, 0), 80 * 2**30)
SHAPES = "--min-shape 1x3x8x8 --opt-shape 1x3x20x24 --max-shape 1x3x32x32"
RTX_BUILD = f"build fp16.onnx --engine tensorrt-rtx {SHAPES}"
FULL_BUILD = f"build fp16.onnx --engine tensorrt {SHAPES}"
Machine = Callable[..., contextlib.AbstractContextManager[Simulator]]


@pytest.fixture
def on(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Return a function that simulates a machine for a `with` block."""

    def enter(setting: Setting = GPU) -> contextlib.AbstractContextManager[Simulator]:
        return simulated(tmp_path_factory.mktemp("machine"), setting)

    return enter


def command_in(message: str, command: str = "srdeploy build") -> str:
    """Return the command that a message ends with."""
    return message[message.index(command) :].replace("MODEL.onnx", "fp16.onnx")


# ----------------------------------------------------------------------------------------------------------------------
# Building


@pytest.mark.parametrize(
    ("line", "commands"),
    [
        pytest.param(
            "Could not infer output types for operation: 12: deconv: x",
            (
                "export luma.pt -o luma.onnx",
                "quantize luma.onnx --precision bf16 --deconvolution rewrite --target tensorrt-rtx -o a.onnx",
                f"build a.onnx --engine tensorrt-rtx {SHAPES.replace('x3x', 'x1x')} -o a.rtx",
            ),
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py",
                "quantize again with --deconvolution rewrite: an exact convolution and pixel shuffle",
            ),
        ),
        pytest.param(
            "OutOfMemory (Requested size was 12345 bytes.)",
            (f"{RTX_BUILD} -o a.rtx", f"{RTX_BUILD.replace('32x32', '24x24')} --workspace 64MiB -o b.rtx"),
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py", "omit --workspace, or build for a smaller --max-shape"
            ),
        ),
        pytest.param(
            "no tactics to implement the operation within workspace limit.",
            (f"{RTX_BUILD} -o a.rtx", f"{RTX_BUILD} --workspace 1GiB -o b.rtx"),
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py",
                "omit --workspace, or raise it",
            ),
        ),
        pytest.param(
            "Could not find any implementation for node {Conv_3}",
            (f"{RTX_BUILD.replace('32x32', '24x24')} -o a.rtx",),
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py", "build for a smaller --max-shape, or on a GPU with more memory free"
            ),
        ),
        pytest.param(
            "No importer registered for op: Mystery. Attempting",
            ("export good.pt -o a.onnx", "build a.onnx --engine openvino -o a.engine"),
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py",
                "export the checkpoint with srdeploy export, or build for another engine",
            ),
        ),
        pytest.param(
            "this opset is not supported",
            ("export good.pt --opset 20 -o a.onnx", f"build a.onnx --engine tensorrt-rtx {SHAPES} -o a.rtx"),
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py", "export again with a lower --opset, or use a newer TensorRT"
            ),
        ),
        pytest.param(
            "Compute capability 9.0 (SM90) not supported by this version",
            ("build good.onnx --engine onnxruntime -o a.engine",),
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py", "use a CPU engine, or another release of TensorRT on this GPU"
            ),
        ),
        pytest.param(
            "The engine plan file is not compatible: Version tag does not match",
            (f"{RTX_BUILD} -o a.rtx",),
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py", "build it again with the release installed here"
            ),
        ),
        pytest.param(
            "CUDA initialization failure with error: 35 cudaError 35",
            ("build good.onnx --engine onnxruntime -o a.engine",),
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py", "install a driver of the 580 series or newer, or use a CPU engine"
            ),
        ),
        pytest.param(
            "Dynamic input tensor input is missing dimensions in profile 0",
            (f"{RTX_BUILD} -o a.rtx",),
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py", "check --min-shape, --opt-shape and --max-shape"
            ),
        ),
    ],
)
def test_what_tensorrt_logs_in_a_build(user: User, line: str, commands: tuple[str, ...]) -> None:
    with pytest.raises(BuildError):
        raise _failed(RTX, Log([line]), "cannot build a.onnx")
    for command in commands:
        user.runs(command)


@pytest.mark.parametrize(
    ("line", "command"),
    [
        pytest.param(
            "Unable to load library: libnvinfer_lean.so.1",
            f"{FULL_BUILD} -o a.plan",
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py", "omit --version-compatible, or install the full TensorRT packages"
            ),
        ),
        pytest.param(
            "generated on an incompatible device, please rebuild",
            f"{FULL_BUILD} -o a.plan",
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py",
                "build it again for this GPU",
            ),
        ),
        pytest.param(
            "CUDA error: out of memory",
            f"{FULL_BUILD.replace('32x32', '24x24')} -o a.plan",
            marks=pytest.mark.advice(
                "runtime/engines/tensorrt/log.py", "close other programs on the GPU, or use a smaller shape"
            ),
        ),
    ],
)
def test_what_tensorrt_logs_on_a_gpu(user: User, on: Machine, line: str, command: str) -> None:
    with pytest.raises(BuildError):
        raise _failed(FULL, Log([line]), "cannot build a.onnx")
    with on():
        user.runs(command)
        user.runs("upscale a.plan photo.png -o out.png")


@pytest.mark.advice(
    "runtime/engines/tensorrt/build.py:_check_profiles",
    "--min-shape, --opt-shape and --max-shape, or --profile-images FOLDER",
)
@pytest.mark.advice(
    "runtime/engines/tensorrt/rtx.py:<module>", "it builds for all GPUs of --compute-capability on any machine"
)
@pytest.mark.advice("runtime/engines/tensorrt/rtx.py:<module>", "name the GPUs with --compute-capability instead")
@pytest.mark.advice(
    "runtime/engines/tensorrt/rtx.py:_capabilities", "; Hopper and data-center GPUs need --engine tensorrt"
)
@pytest.mark.advice("runtime/engines/feasibility.py:check_feasible", "the largest legal shape of this kind is ")
def test_options_of_tensorrt_rtx(user: User, on: Machine) -> None:
    user.refused("build fp16.onnx --engine tensorrt-rtx -o a.rtx")
    user.runs("build fp16.onnx --engine tensorrt-rtx --profile-images photos -o a.rtx")
    user.refused(f"{RTX_BUILD} --device cuda:0 -o b.rtx")
    user.refused(f"{RTX_BUILD} --hardware-compatibility ampere_plus -o b.rtx")
    user.runs(f"{RTX_BUILD} --compute-capability 8.9 -o b.rtx")
    user.refused(f"{RTX_BUILD} --compute-capability 9.0 -o c.rtx")
    with on(replace(GPU, gpus=(HOPPER,))):
        user.runs(f"{FULL_BUILD} -o c.plan")

    large = "build fp16.onnx --engine tensorrt-rtx --memory 64MiB --min-shape 1x3x8x8 --opt-shape 1x3x8x8 --max-shape"
    message = user.refused(f"{large} 1x3x8192x8192 -o d.rtx")
    legal = re.search(r"shape of this kind is (\S+);", message)
    assert legal is not None
    code, printed = user.types(f"{large} {legal[1]} -o d.rtx")
    assert code == 0 or "build for a smaller --max-shape" in printed  # TensorRT-RTX can need more than the estimate
    user.runs(f"{large} 1x3x512x512 --force -o d.rtx")


@pytest.mark.advice("runtime/engines/tensorrt/full.py:<module>", "(see --hardware-compatibility)")
@pytest.mark.advice("runtime/engines/tensorrt/full.py:configure", "omit --timing-cache")
@pytest.mark.advice(
    "runtime/engines/tensorrt/full.py:check_build",
    "build on the machine with the GPU, or use --engine tensorrt-rtx, which needs none",
)
def test_options_of_tensorrt(user: User, on: Machine) -> None:
    with on(replace(GPU, gpus=())):
        user.refused(f"{FULL_BUILD} -o a.plan")
        user.runs(f"{RTX_BUILD} -o a.rtx")
    with on():
        user.refused(f"{FULL_BUILD} --compute-capability 8.9 -o a.plan")
        refusing = SimpleNamespace(create_timing_cache=lambda data: None)
        with pytest.raises(BuildError):
            FULL.configure(None, refusing, BuildOptions(timing_cache=Path("timings")))
        user.runs(f"{FULL_BUILD} --hardware-compatibility ampere_plus -o a.plan")


@pytest.mark.advice("runtime/engines/tensorrt/build.py:check_memory", "build for a smaller --max-shape")
@pytest.mark.advice(
    "runtime/engines/tensorrt/build.py:_worker_error", "usually the machine's memory was full: close other programs"
)
@pytest.mark.advice("runtime/engines/tensorrt/build.py:_work_folder", "free some space there, or set TMPDIR")
def test_memory_and_folders_of_a_build(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BuildError):
        check_memory(Layers((), 2**30, 2**20, "a log"), 2**20, 2**29, (ShapeProfile(*[(1, 3, 64, 64)] * 3),))
    with pytest.raises(BuildError):
        raise _worker_error(RTX, -9, {}, "")
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    user.refused(f"{RTX_BUILD} --no-cache -o a.rtx")
    monkeypatch.setattr(tempfile, "tempdir", None)  # as a new process
    monkeypatch.setenv("TMPDIR", str(user.folder))
    user.runs(f"{RTX_BUILD} --no-cache -o a.rtx")


@pytest.mark.tmpfs
@pytest.mark.advice("runtime/engines/tensorrt/build.py:_worker_error", "free some space there, or set TMPDIR")
def test_a_work_folder_that_is_full(
    user: User, small_onnx: Callable[..., Path], small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_onnx("small.onnx", dtype="float16")  # its engine has about 370 kB, the disk 128 kB
    command = RTX_BUILD.replace("fp16.onnx", "small.onnx") + " --no-cache -o a.rtx"

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(small_disk))
        user.refused(command)
    user.runs(command)


@pytest.mark.advice(
    "runtime/engines/tensorrt/rtx.py:check_build",
    "quantize again with --deconvolution rewrite: an exact convolution and pixel shuffle",
)
@pytest.mark.advice(
    "runtime/engines/tensorrt/layers.py:prove_precision",
    "the engine was discarded; quantize the graph for this engine (srdeploy quantize --target)",
)
def test_graphs_that_are_not_for_tensorrt_rtx(user: User, small_onnx: Callable[..., Path]) -> None:
    small_onnx("odd.onnx", dtype="float16", odd_layer="float32")
    small_onnx("deconvolution.onnx", dtype="bfloat16", upsampler="deconvolution")
    small_onnx("plain.onnx", upsampler="deconvolution")

    for name in ("odd", "deconvolution"):
        user.refused(RTX_BUILD.replace("fp16.onnx", f"{name}.onnx") + " -o a.rtx")
    user.runs("quantize plain.onnx --precision bf16 --deconvolution rewrite --target tensorrt-rtx -o again.onnx")
    user.runs(RTX_BUILD.replace("fp16.onnx", "again.onnx") + " -o a.rtx")


@pytest.mark.advice("runtime/engines/tensorrt/products.py:Product.load", "pip install --force-reinstall 'srdeploy[")
def test_bindings_that_do_not_load(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_extras.py runs pip on every extra that a message names."""
    real = importlib.import_module

    def broken(name: str, package: str | None = None) -> Any:
        if name == "tensorrt_rtx":
            raise OSError("libnvinfer.so: cannot open shared object file")
        return real(name, package)

    with monkeypatch.context() as patch:
        patch.setattr(products.importlib, "import_module", broken)
        message = user.refused(f"{RTX_BUILD} -o a.rtx")
    extra = re.search(r"'srdeploy\[([a-z-]+)\]'", message)
    assert extra is not None
    assert any("tensorrt" in entry for entry in EXTRAS[extra[1]])
    user.runs(f"{RTX_BUILD} -o a.rtx")


# ----------------------------------------------------------------------------------------------------------------------
# Opening and running


@pytest.mark.advice("runtime/engines/sidecar.py:Engine.shape_options", "--min-shape ")
@pytest.mark.advice("runtime/engines/tensorrt/full.py:check_engine", "build it again: srdeploy build MODEL.onnx")
@pytest.mark.advice(
    "runtime/engines/tensorrt/full.py:check_gpu",
    "build it again on this machine, or with --hardware-compatibility ampere_plus",
)
@pytest.mark.advice(
    "runtime/engines/tensorrt/open.py:check_opening",
    "run it on a machine with such a GPU, or build for openvino or onnxruntime to run here",
)
@pytest.mark.advice("runtime/engines/tensorrt/open.py:open_plan", "open the ONNX file for that")
@pytest.mark.advice("runtime/engines/tensorrt/open.py:compare_with_sidecar", "a name ending in ")
@pytest.mark.advice("runtime/engines/tensorrt/runner.py:TensorRtRunner._lane", "open the engine again")
@pytest.mark.advice("runtime/engines/feeds.py:check_profile", "use srdeploy upscale, which tiles and pads, or build")
@pytest.mark.advice("runtime/engines/feeds.py:check_profile", "--max-shape ")
@pytest.mark.advice("runtime/engines/feeds.py:check_profile", "--min-shape ")
@pytest.mark.advice(
    "runtime/verify/parity.py:_Evaluator.verdict",
    "give images within the engine's profile, or build it for other shapes",
)
@pytest.mark.advice("runtime/package/triton.py:_capability", "build the engine again")
def test_engines_of_tensorrt(user: User, on: Machine) -> None:
    upscale = "upscale a.plan photo.png --force -o out.png"
    verify = "verify {} --against good.pt --images {}"
    with on():
        user.runs(f"{FULL_BUILD} -o a.plan")
        inner = read_graph(Path("fp16.onnx")).model.graph.node[0].output[0]
        with pytest.raises(UsageError):
            open_engine(Path("a.plan"), outputs=[inner])
        open_engine(Path("fp16.onnx"), outputs=[inner], threads=1).__exit__(None, None, None)
        image = {"input": np.zeros((1, 3, 48, 4), "float32")}
        with open_engine(Path("a.plan")) as runner, pytest.raises(UsageError) as outside:
            runner.run(image)
        with pytest.raises(UsageError):
            runner.run({"input": image["input"][:, :, :8].repeat(2, 3)})
        wider = re.search(r"--min-shape (\S+) and --max-shape (\S+)", str(outside.value))
        assert wider is not None
        wide = f"build fp16.onnx --engine tensorrt --min-shape {wider[1]} --opt-shape 1x3x20x24 --max-shape {wider[2]}"
        user.runs(f"{wide} -o wide.plan")
        with open_engine(Path("wide.plan")) as runner:
            runner.run(image)
        large = "--min-shape 1x3x40x40 --opt-shape 1x3x48x48 --max-shape 1x3x96x112"
        user.runs(f"build fp16.onnx --engine tensorrt {large} -o large.plan")
        user.refused(verify.format("large.plan", "photo.png"))
        user.runs(verify.format("large.plan", "photos"))
        user.runs(verify.format("a.plan", "photo.png"))
        other = SimpleNamespace(name="another")
        with pytest.raises(InputError):
            compare_with_sidecar(None, other, read_engine(Path("a.plan")))
        shutil.copy("a.plan", "b.plan")
        shutil.copy("a.plan.json", "b.plan.json")
        edited(Path("b.plan.json"), lambda sidecar: sidecar["details"]["target"].pop("compute_capability"))
        with pytest.raises(InputError):
            _capability(read_engine(Path("b.plan")))
        assert _capability(read_engine(Path("a.plan"))) == "8.9"
    with on(replace(GPU, gpus=(BLACKWELL,))):
        user.refused(upscale)
        user.runs(f"{FULL_BUILD} -o new.plan")
        user.runs("upscale new.plan photo.png -o new.png")
    with on(replace(GPU, gpus=())):
        user.refused(upscale)
        user.runs("build good.onnx --engine openvino -o cpu.engine")
        user.runs("upscale cpu.engine photo.png -o cpu.png")
    with on(replace(GPU, version="11.4.0.106")):
        user.runs(command_in(user.refused(upscale)))
        user.runs(upscale)


@pytest.mark.advice("runtime/engines/tensorrt/rtx.py:check_engine", "build it again: srdeploy build MODEL.onnx")
@pytest.mark.advice("runtime/engines/tensorrt/rtx.py:check_engine", "build it again")
@pytest.mark.advice("runtime/engines/tensorrt/rtx.py:check_gpu", "build it again with --compute-capability ")
def test_engines_of_tensorrt_rtx(user: User, on: Machine) -> None:
    upscale = "upscale a.rtx photo.png --force -o out.png"
    user.runs(f"{RTX_BUILD} --compute-capability 8.9 -o a.rtx")
    intact = Path("a.rtx").read_bytes()
    with on(replace(GPU, gpus=(BLACKWELL,))):
        message = user.refused(upscale)
        advised = re.search(r"--compute-capability \S+(?=,)", message)
        assert advised is not None
        user.runs(f"{RTX_BUILD} {advised[0]} -o new.rtx")
        user.runs("upscale new.rtx photo.png -o new.png")
        user.runs(f"{FULL_BUILD} -o new.plan")
    _replace_bytes(Path("a.rtx"), intact[:24] + bytes([1, 8, 0, 5]) + intact[28:])
    with on():
        user.runs(command_in(user.refused(upscale)))
        user.runs(upscale)
        _replace_bytes(Path("a.rtx"), b"something else" * 20)
        user.refused(upscale)
        user.runs(f"{RTX_BUILD} --force -o a.rtx")
        user.runs(upscale)


def _replace_bytes(engine: Path, data: bytes) -> None:
    """Put other bytes in place of an engine, with a sidecar that fits them."""
    manifest = replace(read_manifest(engine), sha256=sha256_of_bytes(data))
    engine.write_bytes(data)
    manifest_path(engine).write_text(manifest.to_json())


@pytest.mark.advice("runtime/engines/feeds.py:check_profile", "use srdeploy upscale, which tiles and pads")
@pytest.mark.advice("runtime/engines/onnxruntime_gpu.py:Provider.open_onnx", "omit it")
@pytest.mark.advice(
    "runtime/engines/onnxruntime_gpu.py:_refuse_tf32",
    "run the command with NVIDIA_TF32_OVERRIDE=0, or use --engine onnxruntime-cuda or tensorrt",
)
@pytest.mark.advice(
    "runtime/engines/onnxruntime_gpu.py:_why_no_tensorrt_10", "; use --engine tensorrt, or install it with: pip install"
)
def test_providers_of_onnxruntime(user: User, on: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    upscale = "upscale fp16.onnx photo.png --engine onnxruntime-{} --force -o out.png"
    verify = "verify good.onnx --against good.pt --images photo.png --engine onnxruntime-{}"
    with on():
        user.refused(upscale.format("cuda") + " --threads 2")
        user.runs(upscale.format("cuda"))
        user.refused(verify.format("tensorrt"))
        with monkeypatch.context() as patch:
            patch.setenv("NVIDIA_TF32_OVERRIDE", "0")
            user.runs(verify.format("tensorrt"))
        user.runs(verify.format("cuda"))
        with open_engine(Path("fp16.onnx"), engine="onnxruntime-tensorrt") as runner:
            zeros = np.zeros((64, 3, 8, 8), "float32")
            with pytest.raises(UsageError) as caught:
                runner.run({"input": zeros})
        assert "build" not in str(caught.value)
        user.runs(upscale.format("tensorrt"))
    with on(replace(GPU, version="11.4.0.106")):
        user.refused(upscale.format("tensorrt"))
        user.runs(f"{FULL_BUILD} -o a.plan")
        user.runs("upscale a.plan photo.png --force -o out.png")


@pytest.mark.advice("runtime/engines/onnxruntime_gpu.py:<module>", "&& pip install 'srdeploy[gpu]'")
@pytest.mark.advice(
    "runtime/engines/onnxruntime_gpu.py:_why_not_installed",
    "onnxruntime-gpu is not installed; install it with: pip install 'srdeploy[gpu]'",
)
def test_onnxruntime_without_its_providers(user: User, on: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/test_extras.py runs pip on every extra that a message names."""
    upscale = "upscale fp16.onnx photo.png --engine onnxruntime-cuda -o out.png"

    user.refused(upscale)
    with monkeypatch.context() as patch:
        patch.setattr("srdeploy.runtime.engines.onnxruntime_gpu.is_installed", lambda name: False)
        user.refused(upscale)
    assert any(entry.startswith("onnxruntime-gpu") for entry in EXTRAS["gpu"])
    with on():
        user.runs(upscale)


@pytest.mark.advice("runtime/verify/layerwise.py:_backend", "run the comparison in a new process")
def test_polygraphy_with_the_other_tensorrt(on: Machine) -> None:
    pytest.importorskip("polygraphy")
    with on():
        _backend("tensorrt")
        with pytest.raises(CapabilityError):
            _backend("tensorrt-rtx")
        forget_polygraphy()  # as in a new process
        _backend("tensorrt-rtx")
