"""The verbs build and doctor from the outside: exit codes, one line, one JSON document."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from srdeploy.cli.main import run
from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRDEPLOY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One convolution and a pixel shuffle, x2."""
    weights = np.random.default_rng(0).standard_normal((12, 3, 3, 3)).astype(np.float32) / 5
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["input", "w"], ["c"], pads=[1] * 4, name="conv"),
            helper.make_node("DepthToSpace", ["c"], ["output"], blocksize=2, mode="CRD", name="up"),
        ],
        "one",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 3, "h2", "w2"])],
        [numpy_helper.from_array(weights, "w")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    contract = ModelContract("rcan", {}, 2, "rgb", Precision.FP32, None, 324.0, 12, "0" * 64)
    helper.set_model_props(proto, contract.to_metadata())
    onnx.save(proto, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_build_prints_one_json_document(
    engine: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(["build", str(model), "--engine", engine, "-o", str(tmp_path / "e"), "--json"])

    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert status == 0
    assert document["details"]["engine"] == engine
    assert document["details"]["precision"]["built"] == "fp32"
    assert (tmp_path / "e.json").exists()


def test_build_for_people_ends_with_the_next_command(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(model), "--engine", "onnxruntime", "-o", str(tmp_path / "e")]) == 0

    printed = capsys.readouterr()
    assert printed.out == ""
    assert "next: srdeploy verify" in printed.err


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (["--engine", "tensorflow"], 2, "tensorflow"),
        (["--engine", "openvino", "--min-shape", "1x3x8x8"], 2, "each as often as the others"),
        (["--engine", "openvino", "--min-shape", "8x8"], 2, "1x3x180x320"),
        (["--engine", "tensorrt-rtx", "--min-shape", "1x3x9x9", "--opt-shape", "1x3x8x8", "--max-shape", "1x3x8x8"], 2,
         "min <= opt <= max"),
        (["--engine", "openvino", "--tf32"], 2, "--tf32 does not apply to openvino: the CPU has no TF32"),
        (["--engine", "openvino", "--workspace", "lots"], 2, "expected a size such as 8GiB"),
        (["--engine", "tensorrt-rtx", "--profile-images", "."], 3, "holds no image"),
        (["--engine", "openvino", "--profile-images", ".", "--min-shape", "1x3x8x8"], 2, "were both given"),
    ],
    ids=["engine", "two-shapes-missing", "shape", "min-above-opt", "tf32", "size", "no-images", "both"],
)  # fmt: skip
def test_wrong_options_are_one_line(
    more: list[str],
    status: int,
    words: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)

    assert run(["build", str(model), "-o", str(tmp_path / "e"), *more]) == status

    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert words in errors[0]
    assert not (tmp_path / "e").exists()


def test_profile_from_images(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'srdeploy[tensorrt-rtx]'")
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index, size in enumerate([(20, 12), (20, 12), (33, 17)]):  # width, height
        Image.new("RGB", size).save(tmp_path / "images" / f"{index}.png")
    arguments = ["--profile-images", str(tmp_path / "images"), "--profile-batch", "2"]

    status = run(["build", str(model), "--engine", "tensorrt-rtx", "-o", str(tmp_path / "e"), *arguments, "--json"])

    (profile,) = json.loads(capsys.readouterr().out)["details"]["profiles"]
    assert status == 0
    assert profile == {"min": [1, 3, 8, 16], "opt": [1, 3, 12, 20], "max": [2, 3, 24, 40]}


def test_doctor_names_every_engine_with_a_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0

    document = json.loads(capsys.readouterr().out)
    engines = {entry["engine"]: entry for entry in document["engines"]}
    assert set(engines) == {
        "onnxruntime", "openvino", "ncnn", "tensorrt-rtx", "tensorrt", "onnxruntime-cuda", "onnxruntime-tensorrt"
    }  # fmt: skip
    for entry in engines.values():
        assert entry["can_run"] == (entry["why_not_run"] is None)
        assert entry["can_build"] == (entry["why_not_build"] is None)
    if document["gpu"] is None:
        assert "GPU" in document["why_no_gpu"]
        assert not engines["tensorrt-rtx"]["can_run"]
        assert not engines["tensorrt"]["can_build"]
    assert document["machine"]["cpus"] >= 1
    assert "torch" in document["packages"]


def test_doctor_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SRDEPLOY_CACHE_DIR", str(tmp_path / "file"))

    assert run(["doctor"]) == 0

    printed = capsys.readouterr()
    assert printed.out == ""
    assert "openvino" in printed.err
    assert "cannot be written" in printed.err


def test_doctor_survives_a_broken_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from srdeploy.runtime.engines import openvino as openvino_engine
    from srdeploy.runtime.engines.registry import availability

    def broken(device: str) -> None:
        raise OSError("libopenvino.so: cannot open shared object file")

    monkeypatch.setattr(openvino_engine, "why_not_run", broken)

    statuses = {status.name: status for status in availability()}
    assert "libopenvino.so" in str(statuses["openvino"].why_not_run)
    assert statuses["onnxruntime"].why_not_run is None
