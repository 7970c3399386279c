"""verify, bench and report at the command line, on a small RCAN with random weights and its export."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from srdeploy.cli.main import run
from srdeploy.core.imaging.resize import imresize
from srdeploy.core.manifest import manifest_path
from srdeploy.runtime.report.write import read_report

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
RCAN = CHECKPOINTS / "yulunzhang_rcan_x2" / "RCAN_BIX2.pt"
THREADS = ("--threads", "1")


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    assert run(["export", str(RCAN), "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Low resolution and ground truth of two smooth pictures."""
    low, high = tmp_path_factory.mktemp("low"), tmp_path_factory.mktemp("high")
    y, x = np.mgrid[0:64, 0:80] / 7.0
    for name in ("a", "b"):
        planes = [127 + 100 * np.sin(x + c) * np.cos(y * (1 + (name == "b"))) for c in range(3)]
        pixels = np.stack(planes, axis=-1).astype(np.uint8)
        Image.fromarray(pixels).save(high / f"{name}.png")
        Image.fromarray(imresize(pixels, scale=0.5)).save(low / f"{name}.png")
    return low, high


@pytest.fixture
def perturbed(model: Path, tmp_path: Path) -> Path:
    """The same graph with one other weight in the middle of the network."""
    graph = onnx.load(model)
    (tensor,) = [entry for entry in graph.graph.initializer if entry.name == "groups.1.blocks.0.conv1.weight"]
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0, 1, 1] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    path = tmp_path / "perturbed.onnx"
    onnx.save(graph, path)
    manifest_path(path).write_bytes(manifest_path(model).read_bytes())
    return path


def output_of(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_right_engine_passes(
    model: Path, images: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    low, high = images

    code, out, err = output_of(capsys, "verify", model, "--against", RCAN, "--images", low, "--hr", high, "--json",
                               "--engine", "openvino", "--report", tmp_path / "report", *THREADS)  # fmt: skip

    assert code == 0, err
    (document,) = json.loads(out)
    assert document["passed"]
    assert document["min_fidelity_db"] > 90
    assert abs(document["psnr_drop_db"]) < 1e-3
    assert [case["name"] for case in document["images"]] == ["a", "b"]
    assert document["candidate"]["numeric_mode"].endswith("f32")
    assert f"next: srdeploy bench {model} --against {RCAN} --shape 1x3x32x40" in err
    report = read_report(tmp_path / "report")
    assert report["verdict"]["status"] == "passed"
    assert [entry["image"] for entry in report["images"] if entry["kind"] == "view"] == ["a", "b"]


def test_one_other_weight_fails_with_its_layer_named(
    perturbed: Path, images: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = output_of(capsys, "verify", perturbed, "--against", RCAN, "--images", images[0], "--bisect",
                               "--per-image", *THREADS)  # fmt: skip

    assert code == 6
    assert out == ""
    assert "PyTorch module groups.1.blocks.0.conv1" in err
    assert "FAILED" in err
    assert "worst crop in" in err
    assert "groups.1.blocks.0.conv1/Conv differs first; export it again: srdeploy export" in err.splitlines()[-1]
    with Image.open(perturbed.with_name("perturbed.onnx.worst.png")) as crop:
        assert crop.size == (4 * 80 + 3 * 4, 64)  # input, eager, engine, difference, with gaps


def test_ground_truth_alone_is_enough_and_markdown_is_markdown(
    model: Path, images: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = output_of(
        capsys, "verify", model, "--against", RCAN, "--hr", images[1], "--limit", "1", "--markdown", *THREADS
    )

    assert code == 0, err
    lines = out.strip().splitlines()
    assert lines[0].startswith("| engine | verdict | fidelity dB |")
    assert lines[2].startswith("| onnxruntime fp32 | passed |")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--images", "LOW", "--max-psnr-drop", "0.1"], 2, "--max-psnr-drop without --hr"),
        ([], 2, "no images given"),
        (["--images", "EMPTY"], 3, "holds no image"),
        (["--images", "LOW", "--engine", "nonsense"], 2, "nonsense"),
        (["--images", "LOW", "--min-fidelity", "400"], 6, "fidelity"),
        (["--images", "HIGH", "--hr", "LOW"], 3, "ground truth"),
        (["--images", "LOW", "--json", "--markdown"], 2, "both write to stdout"),
    ],
    ids=["drop-without-truth", "no-images", "empty-folder", "engine", "gate", "swapped-folders", "two-documents"],
)
def test_refusals_of_verify(
    model: Path, images: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    words: list[str], code: int, message: str,
) -> None:  # fmt: skip
    places = {"LOW": str(images[0]), "HIGH": str(images[1]), "EMPTY": str(tmp_path)}

    found, _, err = output_of(
        capsys, "verify", model, "--against", RCAN, "--crops", tmp_path / "crops", *THREADS,
        *(places.get(word, word) for word in words),
    )  # fmt: skip

    assert found == code, err
    assert message in err.splitlines()[-1]


def test_another_networks_checkpoint_is_refused(
    model: Path, images: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    other = next((CHECKPOINTS / "yjn870_rcan_x3").glob("*.pth"))

    code, _, err = output_of(capsys, "verify", model, "--against", other, "--images", images[0], *THREADS)

    assert code == 3
    assert "is x2 rgb; expected x3 rgb" in err


QUICK = ("--shape", "1x3x8x8", "--seconds", "0.1", "--warmup-seconds", "0", "--min-runs", "5", *THREADS)


def test_bench_compares_forms_and_engines(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = output_of(
        capsys, "bench", model, "--against", RCAN, *QUICK, "--allow-unstable", "--json",
        *("--report", tmp_path / "report"),
        *("--baseline", "channels-last", "--baseline", "autocast", "--baseline", "openvino-f32"),
        *("--batches", "1,2", "--sizes", "4,8", "--streams", "1,2"),
    )  # fmt: skip

    assert code == 0, err
    document = json.loads(out)
    names = list(dict.fromkeys(row["runner"]["name"] for row in document["rows"]))
    assert names == ["eager fp32", "eager fp32 channels-last", "eager bf16 autocast", "openvino fp32 (hint f32)",
                     "onnxruntime fp32"]  # fmt: skip
    assert {row["kind"] for row in document["rows"] if row["runner"]["name"] == names[-1]} == {"compute", "end-to-end"}
    assert document["rows"][0]["ratio"] == 1.0
    assert document["environment"]["versions"]["torch"]
    studies = document["studies"]
    assert [point["batch"] for point in studies["throughput"]["runners"][0]["points"]] == [1, 2]
    assert [point["streams"] for point in studies["streams"]["runners"][0]["points"]] == [1, 2]
    floor = [point["ms"] for point in studies["scaling"]["floor"]]
    assert floor[1] == pytest.approx(4 * floor[0])
    assert studies["scaling"]["peak"]["flops"] > 1e9
    assert studies["scaling"]["memory_floor"][1]["ms"] > studies["scaling"]["memory_floor"][0]["ms"] > 0
    assert "floor: memory traffic" in err
    memory = {row["runner"]["name"]: row for row in document["rows"]}[names[-1]]
    assert memory["memory_bytes"] > 5e6
    assert memory["memory_note"].startswith("peak of a process of its own")
    assert (memory["device_memory_bytes"], memory["device_memory_note"]) == (None, "computes on the CPU")
    assert read_report(tmp_path / "report")["engines"][0]["name"] == "onnxruntime fp32"


def test_an_unstable_bench_ends_with_seven(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = output_of(
        capsys, "bench", model, "--against", RCAN, *QUICK, "--no-baselines", "--tolerance", "0", "--markdown"
    )

    assert code == 7
    assert re.search(r" ms ±\d+ % \|", out), "a median that is not known carries its uncertainty"
    assert "--allow-unstable" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "8x8"], "8x8"),
        (["--batches", "1,x"], "1,x"),
        (["--min-runs", "2"], "2"),
        (["--baseline", "nonsense"], "nonsense"),
        (["--shape", "1x1x8x8"], "channels"),
        (["--json", "--markdown"], "both write to stdout"),
    ],
    ids=["shape", "batches", "runs", "baseline", "colours", "two-documents"],
)
def test_refusals_of_bench(model: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, _, err = output_of(capsys, "bench", model, "--against", RCAN, *QUICK, "--no-baselines", *words)

    assert code == 2
    assert message in err


@pytest.fixture(scope="module")
def report(model: Path, images: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports") / "report"
    words = ["verify", model, "--against", RCAN, "--hr", images[1], "--report", folder, *THREADS]
    assert run([str(word) for word in words]) == 0
    return folder


def test_a_report_is_written_again(report: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = output_of(capsys, "report", report, "-o", tmp_path / "again", "--json")

    assert code == 0
    assert json.loads(out)["verdict"]["status"] == "passed"
    assert (tmp_path / "again" / "report.html").read_bytes() == (report / "report.html").read_bytes()


def _worse(report: Path, folder: Path) -> Path:
    document: dict[str, Any] = read_report(report)
    document["engines"][0]["fidelity_min_db"] = 62.0
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(document))
    return folder


def test_a_regression_ends_with_six(report: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    worse = _worse(report, tmp_path / "worse")

    forward = output_of(capsys, "report", "--compare", report, worse, "--json")
    backward = output_of(capsys, "report", "--compare", worse, report)
    allowed = output_of(capsys, "report", "--compare", report, worse, "--max-fidelity-loss", "60", "--markdown")

    assert forward[0] == 6
    assert json.loads(forward[1])["regressions"] == 1
    assert "fidelity went from" in forward[2]
    assert backward[0] == 0
    assert allowed[0] == 0
    assert allowed[1].startswith("| engine | figure |")


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--compare", "REPORT"], 2), (["REPORT"], 2), ([], 2), (["EMPTY", "-o", "x"], 3)],
    ids=["one-to-compare", "no-output", "nothing", "no-report"],
)
def test_refusals_of_report(
    report: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], code: int
) -> None:
    places = {"REPORT": str(report), "EMPTY": str(tmp_path)}

    assert output_of(capsys, "report", *(places.get(word, word) for word in words))[0] == code


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = output_of(capsys, "report", "--schema")

    assert code == 0
    assert json.loads(out)["title"] == "srdeploy report"


@pytest.mark.parametrize("verb", ["verify", "bench", "report"])
def test_help_ends_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = output_of(capsys, verb, "--help")

    assert code == 0
    assert f"Example:\n    srdeploy {verb}" in out
