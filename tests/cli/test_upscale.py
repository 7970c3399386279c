"""srdeploy upscale: images, folders and videos from the command line."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, PngImagePlugin

from srdeploy.cli.main import run
from srdeploy.core.contract import ModelContract
from srdeploy.core.imaging.read import read_image
from srdeploy.core.precision import Precision
from srdeploy.upscale.image_writer import write_image

RANDOM = np.random.default_rng(0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A network that repeats pixels."""
    return _nearest(tmp_path / "model.onnx")


def _nearest(path: Path, *, broken: bool = False) -> Path:
    weights = np.zeros((12, 3, 1, 1), np.float32)
    for channel in range(3):
        weights[4 * channel : 4 * channel + 4, channel] = np.nan if broken else 1
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "weights"], ["repeated"]),
            helper.make_node("DepthToSpace", ["repeated"], ["output"], blocksize=2, mode="CRD"),
        ],
        "nearest",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 3, "h2", "w2"])],
        [numpy_helper.from_array(weights, "weights")],
    )
    contract = ModelContract("srdensenet", {}, 2, "rgb", Precision.FP32, 0, 1.0, 12, "0" * 64)
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(network, contract.to_metadata())
    onnx.save(network, path)
    return path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    write_image(path, RANDOM.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    return path


def upscale(*words: object) -> int:
    return run(["upscale", *(str(word) for word in words), "--threads", "1"])


def test_image_with_json(model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = upscale(model, photo, "-o", tmp_path / "out.png", "--tile", 16, "--overlap", 0, "--json")

    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert code == 0
    assert (document["output_size"], document["tiles"], document["equals_whole_image"]) == ([80, 60], 6, True)
    assert "exact tiles" in shown.err
    assert "next:" in shown.err
    pixels = read_image(photo).pixels.repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(read_image(tmp_path / "out.png").pixels, pixels)


def test_folder_with_one_bad_picture_does_the_rest_and_ends_with_its_code(
    model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    photo.rename(folder / "good.png")
    (folder / "bad.png").write_text("no picture")

    code = upscale(model, folder, "-o", tmp_path / "out", "--format", "webp", "--json")

    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert code == 3
    assert list(document["made"]) == ["good.png"]
    assert list(document["failed"]) == ["bad.png"]
    assert "1 of 2 images failed, the first of them bad.png" in shown.err
    assert (tmp_path / "out" / "good.webp").exists()


def test_float_folder_becomes_tiff(model: Path, photo: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyvips")
    folder = tmp_path / "in"
    folder.mkdir()
    photo.rename(folder / "good.png")

    assert upscale(model, folder, "-o", tmp_path / "out", "--float") == 0
    assert (tmp_path / "out" / "good.tif").exists()


def test_broken_engine_is_exit_6_without_output_and_repaired_by_a_fallback(
    model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = _nearest(tmp_path / "broken.onnx", broken=True)

    failed = upscale(broken, photo, "-o", tmp_path / "out.png")
    exists = (tmp_path / "out.png").exists()
    repaired = upscale(broken, photo, "-o", tmp_path / "out.png", "--fallback", model)

    assert (failed, exists, repaired) == (6, False, 0)
    assert "1 tiles came out as NaN and were run again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["missing.onnx", "photo.png", "-o", "out.png"], 3, "missing.onnx does not exist"),
        (["model.onnx", "missing.png", "-o", "out.png"], 3, "missing.png does not exist"),
        (["model.onnx", "pipe", "-o", "out.png"], 3, "is a pipe or a device"),
        (["model.onnx", "y" * 256, "-o", "out.png"], 2, "longer than the 255 bytes of a file name"),
        (["model.onnx", "y/" * 2048 + "z", "-o", "out.png"], 2, "longer than the 4095 bytes of a path"),
        (["model.onnx", "photo.png", "-o", "photo.png"], 2, "is the input itself"),
        (["model.onnx", "photo.png", "-o", "out.xyz"], 2, "a name ending in"),
        (["model.onnx", "photo.png", "-o", "out.png", "--memory", "lots"], 2, "size 'lots'"),
        (["model.onnx", "photo.png", "-o", "out.png", "--precision", "int3"], 2, "'int3' is not one of 'fp32'"),
        (["model.onnx", "photo.png", "-o", "out.png", "--engine", "nothing"], 2, "engine 'nothing'"),
        (["model.onnx", "photo.png", "-o", "out.png", "--device", "cuda"], 2, "cuda"),
        (["model.onnx", "photo.png", "-o", "out.png", "--tiles", "some"], 2, "some"),
        (["model.onnx", "empty", "-o", "out"], 3, "holds no image"),
        (["model.onnx", "empty", "-o", "out", "--format", "xyz"], 2, "--format xyz"),
        (["photo.png", "photo.png", "-o", "out.png"], 3, "photo.png"),
        (["model.onnx", "photo.png", "-o", "out.png", "--codec", "libx264"], 2, "--codec does not apply to an image"),
        (["model.onnx", "photo.png", "-o", "out.png", "--quality", "9"], 2, "PNG, which is lossless"),
    ],
    ids=[
        "no model", "no source", "pipe", "long name", "long path",
        "same path", "format", "memory", "precision", "engine", "device", "tiles", "empty",
        "folder format", "model is a picture", "codec of a picture", "quality of a PNG",
    ],
)  # fmt: skip
def test_refusals_have_their_code_and_one_line(
    words: list[str],
    code: int,
    message: str,
    model: Path,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)

    result = run(["upscale", *words])

    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert result == code
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out.png").exists()


def test_help_ends_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["upscale", "--help"]) == 0

    assert capsys.readouterr().out.rstrip().endswith("--status photos_x4/")


WAITING = """
import signal, sys
from srdeploy.cli.main import main
from srdeploy.upscale.video.job import _VideoJob
compute = _VideoJob._compute
def waiting(self, frame):
    if self.parts.finished:
        print("one segment is finished", file=sys.stderr, flush=True)
        signal.pause()
    return compute(self, frame)
_VideoJob._compute = waiting
main()
"""
"""Runs a command that upscales a video, and waits for a signal when the first segment is finished."""


def test_ctrl_c_in_a_video_keeps_finished_segments_and_the_next_run_goes_on(model: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    source = tmp_path / "clip.mp4"
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(400):
            pixels = np.full((64, 64, 3), number % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    words = ["upscale", str(model), str(source), "-o", str(tmp_path / "out.mp4"), "--threads", "1"]
    child = subprocess.Popen([sys.executable, "-c", WAITING, *words], stderr=subprocess.PIPE, text=True)
    parts = tmp_path / "out.mp4.parts"
    assert child.stderr is not None
    while "one segment is finished" not in (line := child.stderr.readline()):
        assert line, "it ended before it was interrupted"
    child.send_signal(signal.SIGINT)
    errors = child.communicate(timeout=120)[1]

    assert child.returncode == 130
    assert "run the same command to resume" in errors
    assert not (tmp_path / "out.mp4").exists()
    assert sorted(path.suffix for path in parts.iterdir())[0] == ".jsonl"
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    command = [sys.executable, "-m", "srdeploy.cli.main", *words, "--json"]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(again.stdout)
    assert document["frames"] == 400
    assert document["frames_resumed"] >= 120
    assert not parts.exists()


def test_what_is_not_kept_and_not_read_is_said(
    model: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a tree")
    Image.open(photo).save(folder / "a.png", pnginfo=text)
    (folder / "clip.mp4").write_bytes(b"")

    code = upscale(model, folder, "-o", tmp_path / "out", "--format", "jpg", "--json")

    shown = capsys.readouterr()
    assert code == 0
    assert "1 of 1 images: PNG text (parameters) is not kept in JPEG" in shown.err
    assert "1 .mp4" in shown.err
    assert json.loads(shown.out)["made"]["a.png"]["not_kept"]


def test_hidden_colors_are_kept_on_request(model: Path, tmp_path: Path) -> None:
    texture = RANDOM.integers(0, 256, (12, 10, 4), dtype=np.uint8)
    texture[..., 3] = np.where(RANDOM.random((12, 10)) < 0.5, 0, 200)
    write_image(tmp_path / "in.png", texture)

    assert upscale(model, tmp_path / "in.png", "-o", tmp_path / "out.png", "--alpha", "separate") == 0

    pixels = texture.repeat(2, axis=0).repeat(2, axis=1)
    np.testing.assert_array_equal(read_image(tmp_path / "out.png").pixels, pixels)
