"""Other programs, each in an environment of its own that `make test-consumers` makes, and graphs for them."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from srdeploy.cli.main import run

ROOT = Path(__file__).parents[2]

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def runner(name: str) -> Run:
    """Return a function that runs a program of an environment: its name, then its arguments.

    The test is skipped where the environment was not made.
    """
    programs = ROOT / "build" / "consumers" / name / "bin"
    if not (programs / "python").exists():
        pytest.skip(f"{programs.parent} does not exist; make test-consumers makes it")

    def run(program: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [programs / program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    return run


@pytest.fixture
def packages() -> Run:
    """Run a program of the environment of packages that read bundles."""
    return runner("packages")


@pytest.fixture
def vapoursynth() -> Run:
    """Run a program of the environment of VapourSynth."""
    return runner("vapoursynth")


@pytest.fixture(scope="session")
def picture() -> NDArray[np.float32]:
    """A smooth picture with an edge, (40, 56, 3) RGB in 0..1."""
    y, x = np.mgrid[0:40, 0:56] / 16.0
    pixels = np.stack([0.5 + 0.2 * np.sin(x * (c + 1)) + 0.2 * np.cos(y * (2 - 0.5 * c)) for c in range(3)], axis=-1)
    pixels[:, 30:] *= 0.5
    return pixels.astype(np.float32)


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory, picture: NDArray[np.float32]) -> dict[str, Path]:
    """Graphs of a small RCAN x2 by precision, and "y", an FP32 graph of a small SRDenseNet x4."""
    folder = tmp_path_factory.mktemp("graphs")
    (folder / "images").mkdir()
    for turn in range(3):
        pixels = (np.rot90(picture, turn) * 255).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{turn}.png")
    paths = {name: folder / f"{name}.onnx" for name in ("fp32", "fp16", "int8", "y")}
    rcan, srdensenet = (
        ROOT / "tests" / "data" / "checkpoints" / name
        for name in ("yulunzhang_rcan_x2/RCAN_BIX2.pt", "yjn870_srdensenet_x4/srdensenet_x4.pth")
    )
    quantize = ["--target", "onnxruntime", "--images", folder / "images", "--threads", "1"]
    for command in (
        ["export", rcan, "-o", paths["fp32"]],
        ["export", srdensenet, "-o", paths["y"]],
        ["quantize", paths["fp32"], "--precision", "fp16", *quantize, "-o", paths["fp16"]],
        ["quantize", paths["fp32"], "--precision", "int8", *quantize, "-o", paths["int8"]],
    ):
        assert run([str(word) for word in command]) == 0
    return paths


@pytest.fixture
def chainner() -> Run:
    """Run a program of the environment of the packages that chaiNNer's ONNX nodes use."""
    return runner("chainner")
