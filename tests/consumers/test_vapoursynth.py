"""The graphs run in VapourSynth through vs-mlrt as they are, and give the frames of `Upscaler`."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from consumers.conftest import Run
from numpy.typing import NDArray

from srdeploy.cli.main import run
from srdeploy.core.imaging.psnr import psnr_db
from srdeploy.upscale.upscaler import Upscaler

Frame = Callable[[Path], NDArray[np.float32]]

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "examples" / "upscale.vpy"


@pytest.fixture
def frame(vapoursynth: Run, picture: NDArray[np.float32], tmp_path: Path) -> Frame:
    def framed(network: Path) -> NDArray[np.float32]:
        np.save(tmp_path / "in.npy", picture)
        files = [SCRIPT, network, tmp_path / "in.npy", tmp_path / "out.npy"]
        done = vapoursynth("python", HERE / "vapoursynth_frame.py", *files)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
        output: NDArray[np.float32] = np.load(tmp_path / "out.npy")
        return output

    return framed


@pytest.mark.parametrize(
    ("precision", "minimum_db"),
    [("fp32", 130.0), ("fp16", 130.0), ("int8", 50.0)],  # INT8: a sum that rounds to the next level changes others
)
def test_frames_are_those_of_the_upscaler(
    frame: Frame, graphs: dict[str, Path], picture: NDArray[np.float32], precision: str, minimum_db: float
) -> None:
    with Upscaler.open(graphs[precision], engine="onnxruntime", threads=1) as up:
        expected = up(picture)

    assert psnr_db(frame(graphs[precision]), expected) > minimum_db


def test_a_network_of_one_channel_is_refused_without_the_wrapper(frame: Frame, graphs: dict[str, Path]) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        frame(graphs["y"])

    assert "expects 1 input planes" in error.value.stderr


def test_a_network_of_one_channel_runs_in_the_wrapper(
    frame: Frame, graphs: dict[str, Path], picture: NDArray[np.float32], tmp_path: Path
) -> None:
    assert run(["export", str(graphs["y"]), "--color-wrapper", "-o", str(tmp_path / "rgb.onnx")]) == 0
    with Upscaler.open(graphs["y"], engine="onnxruntime", threads=1) as up:
        expected = up(picture)

    assert psnr_db(frame(tmp_path / "rgb.onnx"), expected) > 100
