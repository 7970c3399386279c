"""The verb `quantize`: exit codes, the one JSON document, and a hint what to do next."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from srdeploy.cli.main import run
from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A x2 network of two convolutions and a pixel shuffle, RGB."""
    random = np.random.default_rng(0)
    shapes = {"head": (8, 3), "tail": (12, 8)}
    constants = []
    for name, (outputs, inputs) in shapes.items():
        weights = random.normal(0, 1 / (3 * inputs**0.5), (outputs, inputs, 3, 3)).astype(np.float32)
        constants.append(numpy_helper.from_array(weights, f"{name}.weight"))
        constants.append(numpy_helper.from_array(np.zeros(outputs, np.float32), f"{name}.bias"))
    nodes = [
        helper.make_node("Conv", ["input", "head.weight", "head.bias"], ["a"], name="head", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Conv", ["b", "tail.weight", "tail.bias"], ["c"], name="tail", pads=[1] * 4),
        helper.make_node("DepthToSpace", ["c"], ["output"], name="up", blocksize=2, mode="CRD"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 3, "h", "w"]) for n in ("input", "output")]
    values[1].type.tensor_type.shape.dim[2].dim_param = "H"
    values[1].type.tensor_type.shape.dim[3].dim_param = "W"
    graph = helper.make_graph(nodes, "network", values[:1], values[1:], constants)
    written = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    contract = ModelContract("rcan", {}, 2, "rgb", Precision.FP32, None, 1080.0, 12, "0" * 64)
    for key, value in contract.to_metadata().items():
        entry = written.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(written, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four small pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    y, x = np.mgrid[0:48, 0:64]
    for seed in range(4):
        waves = [np.sin((seed + 2 + c) * x / 20 + c + y / (7 + seed)) for c in range(3)]
        Image.fromarray((np.stack(waves, axis=2) * 120 + 128).astype(np.uint8)).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SRDEPLOY_CACHE_DIR", str(tmp_path / "cache"))


def test_int8_ends_with_one_json_document_and_the_next_command(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "int8.onnx"
    words = ["quantize", str(model), "--precision", "int8", "--images", str(images), "--hr", "--crop-size", "16"]

    code = run([*words, "--threads", "1", "-o", str(output), "--json"])

    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert code == 0
    assert output.is_file()
    assert document["readback"]["line"].endswith("of multiply-adds in INT8")
    assert document["quality"]["measured_against_hr"]
    assert document["search"]["trials"]
    assert "srdeploy build" in captured.err


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        pytest.param(["--precision", "int8"], 2, "--images", id="no images"),
        pytest.param(["--precision", "int8", "--images", "nowhere"], 3, "nowhere", id="images that are not there"),
        pytest.param(["--precision", "int9"], 2, "int9", id="unknown precision"),
        pytest.param(
            ["--precision", "int8", "--images", "IMAGES", "--target", "tensorrt"], 2, "no layer",
            id="nothing to quantize",
        ),
        pytest.param(
            ["--precision", "int8", "--images", "IMAGES", "--min-fidelity", "149", "--time-budget", "1"], 6, "149",
            id="a bound out of reach",
        ),
    ],
)  # fmt: skip
def test_failures_have_their_exit_code_and_write_nothing(
    words: list[str],
    code: int,
    line: str,
    model: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out.onnx"
    given = [str(images) if word == "IMAGES" else word for word in words]

    found = run(["quantize", str(model), *given, "--crop-size", "16", "-o", str(output)])

    assert found == code
    assert line in capsys.readouterr().err
    assert not output.exists()
    assert not list(tmp_path.glob(".out*"))


def test_an_existing_output_stays_unless_forced(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "fp16.onnx"
    output.write_text("mine")

    refused = run(["quantize", str(model), "--precision", "fp16", "-o", str(output)])
    kept = output.read_bytes()
    forced = run(["quantize", str(model), "--precision", "fp16", "-o", str(output), "--force"])

    assert (refused, kept, forced) == (2, b"mine", 0)
    assert output.read_bytes() != b"mine"


def test_help_ends_with_a_worked_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "--help"]) == 0

    assert "srdeploy quantize model.onnx --precision int8" in capsys.readouterr().out


@pytest.mark.parametrize(("bits", "words"), [("7", "for every processor"), ("8", "x86 CPUs need VNNI")])
def test_the_bits_of_weights_are_chosen_and_shown(
    bits: str, words: str, model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "int8.onnx"
    asked = ["--precision", "int8", "--images", str(images), "--crop-size", "16", "--weight-bits", bits]

    assert run(["quantize", str(model), *asked, "-o", str(output)]) == 0
    capsys.readouterr()
    assert run(["inspect", str(output)]) == 0

    shown = capsys.readouterr()
    assert words in " ".join((shown.out + shown.err).split())
