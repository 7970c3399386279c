"""Every verb with every GPU family, as a user runs them. `deploy` has a file of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu.cases import BUILT, OPENED, needs
from PIL import Image

from srdeploy.cli.main import run

CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoints" / "yulunzhang_rcan_x2" / "RCAN_BIX2.pt"
SHAPES = ("--min-shape", "1x3x8x8", "--opt-shape", "1x3x24x32", "--max-shape", "1x3x64x80")
BRIEF = ("--shape", "1x3x24x32", "--seconds", "0.02", "--warmup-seconds", "0.01", "--min-runs", "5", "--allow-unstable")
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two photographs, and the small RCAN as FP16 graph."""
    path = tmp_path_factory.mktemp("verbs")
    (path / "photos").mkdir()
    for seed in range(2):
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((80, 64), Image.Resampling.BICUBIC)
        picture.save(path / "photos" / f"{seed}.png")
    assert run(["export", str(CHECKPOINT), "-o", str(path / "fp32.onnx")]) == 0
    fp16 = ("--precision", "fp16", "--target", "tensorrt", "-o", str(path / "fp16.onnx"))
    assert run(["quantize", str(path / "fp32.onnx"), *fp16]) == 0
    return path


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a verb with --json that must succeed, and return its document: the only thing on standard output."""

    def call(*arguments: object) -> Any:
        capfd.readouterr()
        code = run([*map(str, arguments), "--json"])
        out, error = capfd.readouterr()
        assert code == 0, error
        return json.loads(out)

    return call


@pytest.fixture(scope="module", params=[*BUILT, *OPENED])
def model(
    request: pytest.FixtureRequest, machine: object, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, tuple[object, ...]]:
    """A family, and what opens it: a built engine, or the graph with --engine."""
    family = request.param
    needs(family)
    if family in OPENED:
        return family, (folder / "fp16.onnx", "--engine", family)
    path = tmp_path_factory.mktemp("engine") / f"model.{family}"
    build = ["build", str(folder / "fp16.onnx"), "--engine", family, *SHAPES, "--no-cache", "-o", str(path)]
    assert run(build) == 0
    return family, (path,)


def test_doctor_names_the_gpu(command: Command, machine: object) -> None:
    found = command("doctor")

    assert ("Simulated GPU" in json.dumps(found)) is (machine is not None)
    engines = {entry["engine"]: entry for entry in found["engines"]}
    assert engines["tensorrt"]["can_build"]
    assert engines["tensorrt"]["can_run"]


def test_inspect(command: Command, model: tuple[str, tuple[object, ...]]) -> None:
    family, (path, *_) = model

    found = json.dumps(command("inspect", path))

    assert (family if family in BUILT else "fp16") in found


def test_verify(command: Command, model: tuple[str, tuple[object, ...]], folder: Path) -> None:
    _, (path, *more) = model

    found = command("verify", path, *more, "--against", CHECKPOINT, "--images", folder / "photos", "--max-side", 32)

    (result,) = found
    assert result["passed"]
    assert "cuda:0" in json.dumps(result)


def test_bench(command: Command, model: tuple[str, tuple[object, ...]], folder: Path) -> None:
    family, (path, *more) = model

    found = command("bench", path, *more, "--against", CHECKPOINT, *BRIEF, "--no-baselines")

    text = json.dumps(found)
    assert family in text
    assert "cuda:0" in text


def test_upscale(command: Command, model: tuple[str, tuple[object, ...]], folder: Path, tmp_path: Path) -> None:
    _, (path, *more) = model
    command("upscale", path, folder / "photos" / "0.png", *more, "-o", tmp_path / "gpu.png")
    command("upscale", folder / "fp32.onnx", folder / "photos" / "0.png", "-o", tmp_path / "cpu.png")

    with Image.open(tmp_path / "gpu.png") as gpu, Image.open(tmp_path / "cpu.png") as cpu:
        difference = np.abs(np.asarray(gpu, np.int16) - np.asarray(cpu, np.int16))
    assert difference.shape == (128, 160, 3)
    assert difference.mean() < 1


def test_a_folder_on_two_gpus(
    command: Command, model: tuple[str, tuple[object, ...]], folder: Path, tmp_path: Path
) -> None:
    _, (path, *more) = model
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(6):
        shutil.copy(folder / "photos" / f"{index % 2}.png", photos / f"{index}.png")
    command("upscale", path, photos, *more, "-o", tmp_path / "one", "--device", "cuda:1")

    found = command("upscale", path, photos, *more, "-o", tmp_path / "two", "--device", "cuda:0,cuda:1")

    assert len(found["made"]) == 6
    for name in found["made"]:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
