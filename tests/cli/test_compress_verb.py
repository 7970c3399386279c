"""compress, and deploy --compress: another network, said so everywhere, within one bound."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image

from srdeploy.cli.console import RichProgress
from srdeploy.cli.main import run
from srdeploy.cli.pipeline.deploy import deploy
from srdeploy.cli.pipeline.types import DeployOptions
from srdeploy.core.compression import change_label, summary
from srdeploy.core.manifest import read_manifest
from srdeploy.core.onnx_file import read_graph
from srdeploy.runtime.bench.turns import Effort
from srdeploy.runtime.bundle import read_bundle
from srdeploy.runtime.report.write import read_report

from .conftest import write_waves

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
SRDENSENET = CHECKPOINTS / "yjn870_srdensenet_x4" / "srdensenet_x4.pth"
BRIEF = Effort(warmup_runs=1, warmup_seconds=0.0, min_runs=5, max_runs=5, seconds=0.01)
DROP = "0.2"
INTERRUPTED_AFTER = 3
OTHER_BLOCKS = [f"dense_blocks.{index}" for index in range(1, 8)]


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth pictures of 128x96 pixels with an edge."""
    return write_waves(tmp_path_factory.mktemp("photos"), 96, 128)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first block of a small SRDenseNet; the deconvolutions read 8 mixtures of their 48 input channels."""
    weights = torch.load(SRDENSENET, weights_only=True)
    weights = {name: values for name, values in weights.items() if name[:14] not in OTHER_BLOCKS}
    weights["bottleneck.0.weight"] = weights["bottleneck.0.weight"][:, :64].clone()
    basis = torch.linalg.qr(torch.randn(48, 8, generator=torch.Generator().manual_seed(0))).Q
    for name in ("deconv.0.weight", "deconv.2.weight"):
        weights[name] = torch.einsum("ij,jokl->iokl", basis @ basis.T, weights[name])
    path = tmp_path_factory.mktemp("checkpoint") / "srdensenet_x4.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path) -> Path:
    path = checkpoint.with_name("model.onnx")
    assert run(["export", str(checkpoint), "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An RCAN with fewer channels than the smallest rank."""
    path = tmp_path_factory.mktemp("narrow") / "rcan.onnx"
    assert run(["export", str(CHECKPOINTS / "yulunzhang_rcan_x2" / "RCAN_BIX2.pt"), "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def small(exported: Path, photos: Path) -> Path:
    path = exported.with_name("small.onnx")
    images = ["--images", str(photos), "--hr"]
    assert run(["compress", str(exported), *images, "--max-psnr-drop", DROP, "--threads", "1", "-o", str(path)]) == 0
    return path


def test_a_compressed_graph_is_shown_and_verified_as_one(
    checkpoint: Path, small: Path, photos: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    document = read_manifest(small).details
    assert run(["inspect", str(small)]) == 0
    shown = capfd.readouterr().err
    verify = ["verify", str(small), "--against", str(checkpoint), "--hr", str(photos), "--max-side", "24"]
    assert run([*verify, "--json"]) == 0
    (verdict,) = json.loads(capfd.readouterr().out)

    assert document["fewer_macs"] > 1.2
    assert document["latency_ms"]["compressed"] > 0
    layer = max(document["layers"], key=lambda entry: entry["error_share"])
    assert f"{document['fewer_macs']:.2f}x fewer multiply-adds" in shown
    assert f"{layer['layer']} {change_label(layer)}" in " ".join(shown.replace("|", "").split())
    assert verdict["gates"]["max_psnr_drop_db"] == float(DROP)
    assert verdict["min_fidelity_db"] < 90  # the gate of FP32, which another network cannot keep
    assert run([*verify, "--max-psnr-drop", "-5"]) == 6
    assert "mean Y PSNR falls" in capfd.readouterr().err


def test_quantize_measures_a_compressed_graph_against_the_original(
    exported: Path, small: Path, photos: Path, tmp_path: Path
) -> None:
    images = ["--images", str(photos), "--hr"]
    quantize = ["quantize", str(small), "--precision", "fp16", "--target", "tensorrt", *images]

    assert run([*quantize, "-o", str(tmp_path / "own.onnx")]) == 0
    assert run([*quantize, "--reference", str(exported), "-o", str(tmp_path / "original.onnx")]) == 0

    own, original = (
        read_manifest(tmp_path / name).details["quality"]["fidelity_db"] for name in ("own.onnx", "original.onnx")
    )
    assert own > original + 3
    assert read_graph(tmp_path / "original.onnx").contract.compression is not None


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["compress", "--max-psnr-drop", DROP, "--target", "tensorrt"], id="compress"),
        pytest.param(["quantize", "--precision", "fp16", "--target", "tensorrt"], id="quantize"),
    ],
)
def test_without_hr_the_drop_is_measured_one_octave_down(
    command: list[str], exported: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "made.onnx"

    assert run([command[0], str(exported), "--images", str(photos), *command[1:], "-o", str(output)]) == 0

    details = read_manifest(output).details
    assert details["quality"]["truth"] == "shrunk"
    assert details["quality"]["worst_drop_db"] is not None  # there is none of an estimate
    assert {(crop["height"], crop["width"]) for crop in details["calibration"]["judges"]} == {(24, 32)}
    assert max(crop["height"] for crop in details["calibration"]["crops"]) > 24  # ranges are those of whole images


def test_deploy_spends_one_bound_on_compression_and_int8(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    options = DeployOptions(
        checkpoint=checkpoint, images=photos, hr=True, engines=("openvino",), max_psnr_drop=float(DROP), compress=True,
        size=(24, 32), threads=1, output=tmp_path / "small.srd",
    )  # fmt: skip

    outcome = deploy(options, RichProgress(), effort=BRIEF)

    bundle = read_bundle(options.output)
    bundle.verify()
    assert {"model.original.onnx", "model.fp32.onnx"} <= set(bundle.files)
    assert {str(entry.precision) for entry in bundle.engines} == {"fp32", "int8"}, outcome.excluded
    compression = read_graph(options.output / "model.int8.openvino.onnx").contract.compression
    assert compression is not None
    assert compression["max_psnr_drop_db"] == float(DROP) / 2
    assert compression["quality"]["drop_db"] <= float(DROP) / 2
    drop = read_manifest(options.output / "model.int8.openvino.onnx").details["quality"]["drop_db"]
    assert drop <= float(DROP)
    report = read_report(options.output / "report")
    assert report["model"]["provenance"]["compression"]["fewer_macs"] == compression["fewer_macs"]
    graph = read_graph(options.output / "model.fp32.onnx").contract
    assert report["model"]["macs_per_pixel"] == bundle.contract.macs_per_pixel == graph.macs_per_pixel
    page, card = (options.output / "report" / "report.html").read_text(), (options.output / "README.md").read_text()
    assert all(change_label(entry) in page for entry in compression["layers"])
    for text in (page, card):
        assert summary(compression) in " ".join(text.split())
    script = (options.output / "reproduce.sh").read_text()
    assert 'srdeploy compress "$OUT/model.original.onnx"' in script
    assert '--reference "$OUT/model.original.onnx"' in script


def test_deploy_compress_needs_a_bound(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    command = ["deploy", str(checkpoint), "--images", str(photos), "--compress", "-o", str(tmp_path / "a.srd")]

    assert run(command) == 2


@pytest.mark.parametrize(
    ("options", "code"),
    [
        pytest.param(["--max-psnr-drop", "0"], 2, id="a bound of nothing"),
        pytest.param(["--max-psnr-drop", "-0.01"], 2, id="a gain"),
        pytest.param(["--max-psnr-drop", "0.01", "--max-worst-drop", "-1"], 2, id="a bound below nothing"),
        pytest.param(["--max-psnr-drop", "0.01", "--time-budget", "0"], 2, id="no time"),
    ],
)
def test_what_cannot_be_kept_is_one_line_and_a_code(
    options: list[str], code: int, exported: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", str(exported), "--images", str(photos), "--hr", *options, "-o", str(tmp_path / "a.onnx")]

    assert run(command) == code

    text = capfd.readouterr().err
    assert "Traceback" not in text
    assert "expected" in text
    assert not list(tmp_path.glob("a.onnx*"))


def test_a_bound_that_nothing_meets_ends_with_the_table_of_what_was_measured(
    narrow: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["compress", str(narrow), "--images", str(photos), "--hr", "--max-psnr-drop", "0.01"]

    assert run([*command, "-o", str(tmp_path / "a.onnx")]) == 6

    lines = capfd.readouterr().err.splitlines()
    rows = [line for line in lines if line.startswith("|") and "x |" in line]
    (error,) = [line for line in lines if line.startswith("error:")]
    assert any(line.startswith("| fewer MACs | changes | fidelity dB | drop dB | worst image dB |") for line in lines)
    assert f"nothing to gain here: of {len(rows)} measured, no graph with at least 2 %" in error
    assert "expected at most 0.01 dB lost" in error
    assert "allow a larger --max-psnr-drop, search longer with --time-budget, or use the graph as it is" in error
    assert not list(tmp_path.glob("a.onnx*"))


def test_too_few_images_for_the_covariances_are_reported(
    exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(write_waves(few, 24, 26).iterdir())[3:]:
        path.unlink()
    command = ["compress", str(exported), "--images", str(few), "--max-psnr-drop", "5", "--target", "tensorrt"]

    assert run([*command, "-o", str(tmp_path / "a.onnx")]) == 0

    notes = read_manifest(tmp_path / "a.onnx").details["notes"]
    note = next(note for note in notes if "the images are too few or too small for" in note)
    assert "their fit is regularized" in note
    assert f"warning: {note}" in capfd.readouterr().err
    assert run(["inspect", str(tmp_path / "a.onnx")]) == 0
    assert note in " ".join(capfd.readouterr().err.replace("|", "").split())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("compressed", "is compressed already; expected the graph that it was made from"),
        ("quantized", "is quantized already"),
        ("half", "is typed already"),
        ("static", "is in a form for a consumer"),
        ("foreign", "carries no srdeploy metadata"),
    ],
)
def test_graphs_that_cannot_be_compressed(
    kind: str, reason: str, exported: Path, small: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    graph, images = tmp_path / "given.onnx", ["--images", str(photos)]
    makers = {
        "quantized": ["quantize", str(exported), "--precision", "int8", *images, "--crops", "4", "--crop-size", "16"],
        "half": ["quantize", str(exported), "--precision", "fp16", "--target", "tensorrt"],
        "static": ["export", str(exported), "--static", "1x1x24x24"],
    }
    if kind in makers:
        assert run([*makers[kind], "-o", str(graph)]) == 0
    elif kind == "foreign":
        model = onnx.load(exported)
        del model.metadata_props[:]
        onnx.save(model, graph)
    else:
        graph = small
    capfd.readouterr()

    assert run(["compress", str(graph), *images, "--max-psnr-drop", "1", "-o", str(tmp_path / "a.onnx")]) == 3

    (line,) = capfd.readouterr().err.splitlines()
    assert reason in line
    assert not list(tmp_path.glob("a.onnx*"))


def test_ctrl_c_keeps_what_was_measured(exported: Path, photos: Path, tmp_path: Path) -> None:
    """SIGINT to a process of its own while effects are measured: the next run resumes from what was measured."""
    out = tmp_path / "out"
    out.mkdir()
    command = ["compress", str(exported), "--images", str(photos), "--hr", "--max-psnr-drop", DROP, "--target",
               "tensorrt", "-o", str(out / "a.onnx")]  # fmt: skip
    program = f"""
import os, signal, sys
from srdeploy.calibration.search.evaluate import Evaluator
from srdeploy.cli.main import main
evaluate, calls = Evaluator.evaluate_model, []
def evaluate_model(self, *arguments):
    calls.append(None)
    if len(calls) == {INTERRUPTED_AFTER}:
        print("measured some", file=sys.stderr, flush=True)
        signal.pause()
    return evaluate(self, *arguments)
Evaluator.evaluate_model = evaluate_model
main()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SRDEPLOY_CACHE_DIR": str(tmp_path / "cache")}

    process = subprocess.Popen(
        [sys.executable, "-c", program, *command], stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    while "measured some" not in (line := process.stderr.readline()):
        assert line, "it ended before it was interrupted"
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    kept = [line for path in (tmp_path / "cache").rglob("*.jsonl") for line in path.read_text().splitlines()]

    assert process.returncode == 130, rest
    assert "error: interrupted; nothing was left half-written" in rest
    assert list(out.iterdir()) == []
    assert sum("effect" in line for line in kept) == INTERRUPTED_AFTER - 1
    again = subprocess.run(
        [sys.executable, "-m", "srdeploy.cli.main", *command],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "resuming with what an earlier, interrupted run measured" in again.stderr
    assert (out / "a.onnx").exists()
    assert not list((tmp_path / "cache").rglob("*.jsonl"))


def test_gray_images_are_refused_for_a_network_of_colors(
    narrow: Path, photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gray = tmp_path / "gray"
    gray.mkdir()
    for path in photos.iterdir():
        Image.open(path).convert("L").save(gray / path.name)

    command = [
        "compress",
        str(narrow),
        "--images",
        str(gray),
        "--max-psnr-drop",
        "0.01",
        "-o",
        str(tmp_path / "a.onnx"),
    ]
    assert run(command) == 3

    assert "gray" in capfd.readouterr().err
