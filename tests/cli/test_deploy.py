"""deploy: one command writes a bundle that holds up, names what it excluded, and leaves nothing when it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srdeploy.cli.console import RichProgress
from srdeploy.cli.main import run
from srdeploy.cli.pipeline.card import model_card
from srdeploy.cli.pipeline.types import DeployOptions
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import InputError
from srdeploy.core.manifest import read_verified
from srdeploy.core.precision import Precision
from srdeploy.runtime.bundle import Bundle, choose_engine, read_bundle
from srdeploy.runtime.report.write import read_report
from srdeploy.upscale.upscaler import Upscaler

from .conftest import write_waves

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
RCAN = CHECKPOINTS / "yulunzhang_rcan_x2" / "RCAN_BIX2.pt"
SMALL = ("--size", "24x32", "--threads", "1")


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight smooth, colorful pictures of 96x80 pixels: waves of several directions, with an edge and a dark corner."""
    return write_waves(tmp_path_factory.mktemp("photos"), 80, 96, dark_corner=True)


@pytest.fixture(scope="module")
def deployed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bundle of the small RCAN for both CPU engines, made by the command, and the JSON document it printed."""
    output = tmp_path_factory.mktemp("bundle") / "rcan.srd"
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "srdeploy.cli.main",
        "deploy",
        RCAN,
        "--images",
        photos,
        "--hr",
        *SMALL,
    ]
    command += ["--engine", "onnxruntime", "--engine", "openvino", "--json", "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode in (0, 6), done.stderr  # random weights: INT8 may or may not reach its gate
    document = json.loads(done.stdout)  # exactly one document, or this raises
    assert document["exit_code"] == done.returncode
    return output, document


@pytest.fixture
def bundle(deployed: tuple[Path, dict[str, Any]]) -> Bundle:
    return read_bundle(deployed[0])


def test_every_file_is_as_the_manifest_says(bundle: Bundle) -> None:
    bundle.verify()

    held = set(bundle.files)
    assert {"model.fp32.onnx", "model.fp16.onnx", "reproduce.sh", "report/report.json", "report/report.html"} <= held
    assert {"calibration/set.json"} <= held
    for engine in bundle.engines:
        assert read_verified(bundle.path / engine.file)[1].kind == "engine"


def test_every_engine_asked_for_is_in_the_bundle_or_named_with_its_reason(bundle: Bundle) -> None:
    asked = {(engine, str(p)) for engine in ("onnxruntime", "openvino") for p in (Precision.FP32, Precision.INT8)}

    inside = {(entry.engine, str(entry.precision)) for entry in bundle.engines}
    outside = {(entry.engine, str(entry.precision)) for entry in bundle.excluded}

    assert inside | outside == asked
    assert not inside & outside
    assert {("onnxruntime", "fp32"), ("openvino", "fp32")} <= inside
    assert all(entry.reason for entry in bundle.excluded)


def test_fp32_engines_agree_with_the_eager_network(bundle: Bundle) -> None:
    fidelity = {entry.engine: entry.fidelity_db for entry in bundle.engines if entry.precision == Precision.FP32}

    assert all(value is not None and value > 100 for value in fidelity.values()), fidelity
    assert all(entry.verified and entry.latency_ms and entry.speedup for entry in bundle.engines)


def test_the_document_tells_what_the_manifest_tells(deployed: tuple[Path, dict[str, Any]], bundle: Bundle) -> None:
    _, document = deployed

    assert [entry["file"] for entry in document["engines"]] == [entry.file for entry in bundle.engines]
    assert [entry["reason"] for entry in document["excluded"]] == [entry.reason for entry in bundle.excluded]
    assert document["exit_code"] == (6 if bundle.excluded else 0)
    assert set(document["seconds"]) == {"load", "export", "calibrate", "quantize", "build", "verify", "bench", "report"}


def test_the_report_has_a_line_per_engine_and_the_commands(bundle: Bundle) -> None:
    report = read_report(bundle.path)

    lines = {line["name"]: line["status"] for line in report["engines"]}
    assert lines["openvino fp32"] == "passed"
    assert lines["graph fp16"] in ("passed", "left-out")
    assert {f"{entry.engine} {entry.precision}" for entry in bundle.excluded} <= set(lines)
    script = (bundle.path / "reproduce.sh").read_text()
    assert script.endswith("\n".join(report["commands"]) + "\n"), "the report states what the script runs"
    assert report["commands"][1].startswith("#   srdeploy deploy ")


def test_the_card_is_of_the_report_alone_and_names_no_place(bundle: Bundle, photos: Path) -> None:
    card = (bundle.path / "README.md").read_text(encoding="utf-8")

    assert "README.md" in bundle.files
    assert card == model_card(read_report(bundle.path))
    for engine in bundle.engines:
        assert f"`{engine.file}`" in card
        assert f"{engine.fidelity_db:.1f} dB" in card
    assert bundle.contract.checkpoint_sha256 in card
    assert not [place for place in (bundle.path.parent, photos, RCAN.parent) if str(place) in card]


def test_no_path_of_the_temporary_folder_is_left_in_any_document(bundle: Bundle) -> None:
    for path in bundle.path.rglob("*.json"):
        assert ".rcan.srd." not in path.read_text(encoding="utf-8"), path


def test_calibration_images_are_not_judged_on(bundle: Bundle, photos: Path) -> None:
    document = json.loads((bundle.path / "calibration" / "set.json").read_text())
    calibrated = {Path(entry["name"]).stem for entry in document["files"] if entry["use"] == "calibration"}
    report = read_report(bundle.path)

    judged = {image["name"] for entry in report["verification"] for image in entry["images"]}

    assert judged
    assert not judged & calibrated


def test_the_best_engine_upscales(bundle: Bundle) -> None:
    chosen = choose_engine(bundle)
    picture = np.full((20, 30, 3), 128, np.uint8)
    picture[5:9, 10:20] = (200, 30, 60)

    with Upscaler.open(bundle.path) as up:
        large = up(picture)

    assert (up.info.engine, large.shape) == (chosen.engine, (40, 60, 3))


def test_a_changed_engine_is_not_run(bundle: Bundle, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "copy.srd")
    engine = copy / choose_engine(bundle).file
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes(data)

    with pytest.raises(InputError, match="SHA-256"):
        Upscaler.open(copy)


def test_reproduce_sh_makes_the_same_graphs_and_checks_its_input(bundle: Bundle, photos: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = bundle.path / "reproduce.sh"
    # The measuring commands are the slow half and have their own tests: run those that make files.
    text = "\n".join(line for line in script.read_text().splitlines() if not line.startswith("srdeploy bench"))
    (tmp_path / "reproduce.sh").write_text(text)

    done = subprocess.run(
        ["bash", tmp_path / "reproduce.sh", tmp_path / "again"], env=environment, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    for name in ("model.fp32.onnx", *(entry.file for entry in bundle.engines)):
        made = read_verified(tmp_path / "again" / name)[1]
        if name.endswith(".onnx") and "/" not in name:
            assert made.sha256 == bundle.files[name]
    other = tmp_path / "other.pt"
    other.write_bytes(RCAN.read_bytes() + b"\0")

    refused = subprocess.run(
        ["bash", tmp_path / "reproduce.sh", tmp_path / "third"],
        env={**environment, "CHECKPOINT": str(other)},
        capture_output=True,
        text=True,
    )

    assert refused.returncode != 0
    assert not (tmp_path / "third").exists()


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["{garbage}", "--images", "{photos}", "-o", "{out}/a.srd"], 3, "garbage.pt"),
        (["{rcan}", "--images", "{empty}", "-o", "{out}/a.srd"], 3, "image"),
        (["{rcan}", "--images", "{out}/none", "-o", "{out}/a.srd"], 3, "none"),
        (["{rcan}", "--images", "{photos}", "-o", "{out}/a"], 2, "ends in .srd"),
        (["{rcan}", "--images", "{photos}", "-o", "{there}"], 2, "exists already"),
        (["{rcan}", "--images", "{photos}", "--engine", "tensort", "-o", "{out}/a.srd"], 2, "one of onnxruntime"),
        (["{rcan}", "--images", "{photos}", "--size", "0x4", "-o", "{out}/a.srd"], 2, "180x320"),
        (["{rcan}", "--images", "{photos}", "--max-psnr-drop", "-1", "-o", "{out}/a.srd"], 2, "positive"),
        (["{rcan}", "-o", "{out}/a.srd"], 2, "--images"),
        (["{rcan}", "--images", "{photos}", "-o", "{garbage}/a.srd"], 8, "it is a file"),
    ],
    ids=[
        "not a checkpoint",
        "no images",
        "no folder",
        "name",
        "exists",
        "engine",
        "size",
        "drop",
        "unstated",
        "parent",
    ],
)
def test_bad_requests_are_one_line_and_leave_nothing(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    places = {name: tmp_path / name for name in ("out", "empty", "there.srd")}
    for folder in places.values():
        folder.mkdir()
    garbage = tmp_path / "garbage.pt"
    garbage.write_bytes(b"not a checkpoint at all")
    names = {"garbage": garbage, "rcan": RCAN, "photos": photos, "empty": places["empty"], "out": places["out"]}
    names["there"] = places["there.srd"]

    assert run(["deploy", *(word.format(**names) for word in arguments)]) == code

    captured = capfd.readouterr()
    error = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert words in error[0]
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert leftovers(places["out"]) == []
    assert leftovers(places["there.srd"]) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into read-only folders")
def test_a_folder_that_cannot_be_written_is_exit_8(photos: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)

    assert run(["deploy", str(RCAN), "--images", str(photos), "-o", str(tmp_path / "a.srd")]) == 8


@pytest.mark.tmpfs
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a tmpfs needs root on Linux")
def test_a_full_disk_is_exit_8_and_leaves_nothing(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        command = ["deploy", str(RCAN), "--images", str(photos), "--engine", "onnxruntime", *SMALL]

        assert run([*command, "-o", str(tmp_path / "a.srd")]) == 8

        assert "no space left on device; free some space" in capfd.readouterr().err
        assert leftovers(tmp_path) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize(
    ("size", "macs", "expected", "on_cpu"),
    [
        (None, 0.3e6, (180, 320), (180, 320)),
        (None, 15.6e6, (90, 160), (45, 80)),
        (None, 1e9, (22, 40), (22, 40)),
        ((64, 48), 1e9, (64, 48), (64, 48)),
    ],
    ids=["light", "heavy", "heaviest", "stated"],
)
def test_the_measured_size_shrinks_only_when_nobody_stated_it(
    size: tuple[int, int] | None, macs: float, expected: tuple[int, int], on_cpu: tuple[int, int]
) -> None:
    contract = ModelContract(
        architecture="rcan",
        configuration={},
        scale=2,
        colours="rgb",
        precision=Precision.FP32,
        receptive_radius=None,
        macs_per_pixel=macs,
        largest_tensor_per_pixel=1,
        checkpoint_sha256="",
    )
    options = DeployOptions(checkpoint=Path("a.pt"), images=Path("photos"), output=Path("a.srd"), size=size)

    assert options.shape(contract) == (1, 3, *expected)
    assert options.profile(contract).contains(options.shape(contract))
    assert options.bench_shape(contract, ["cuda:0", "cpu"]) == options.shape(contract)
    assert options.bench_shape(contract, ["cpu", "cpu"]) == (1, 3, *on_cpu)


@pytest.mark.parametrize(
    "moment", ["reading RCAN_BIX2.pt", "exporting", "reading images", "collecting activation ranges", "verifying"]
)
def test_ctrl_c_in_a_stage_keeps_the_previous_bundle_and_leaves_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    output = tmp_path / "a.srd"
    output.mkdir()
    (output / "manifest.json").write_text("previous")
    reached = []
    real = RichProgress.task

    @contextmanager
    def task(self: RichProgress, description: str, total: float | None = None) -> Iterator[Any]:
        with real(self, description, total) as advance:
            if description.startswith(moment):
                reached.append(description)
                signal.raise_signal(signal.SIGINT)
            yield advance

    monkeypatch.setattr(RichProgress, "task", task)
    command = ["deploy", str(RCAN), "--images", str(photos), "--hr", "--engine", "onnxruntime", *SMALL]

    assert run([*command, "--force", "-o", str(output)]) == 130

    assert reached
    assert (output / "manifest.json").read_text() == "previous"
    assert leftovers(tmp_path) == ["a.srd"]


def test_a_bound_that_cannot_be_kept_is_exit_6_with_the_float_engines_in_the_bundle(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.srd"
    command = ["deploy", str(RCAN), "--images", str(photos), "--hr", "--engine", "openvino", *SMALL]

    assert run([*command, "--max-psnr-drop", "1e-9", "-o", str(output)]) == 6

    bundle = read_bundle(output)
    bundle.verify()
    assert [str(entry.precision) for entry in bundle.engines] == ["fp32"]
    assert [(entry.engine, str(entry.precision)) for entry in bundle.excluded] == [("openvino", "int8")]
    assert not list(output.glob("model.int8*"))
    assert "openvino int8 was excluded" in capfd.readouterr().err


def test_a_gpu_engine_is_built_here_and_marked_as_not_run(
    photos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")
    output = tmp_path / "a.srd"
    command = ["deploy", str(RCAN), "--images", str(photos), "--engine", "tensorrt-rtx", *SMALL, "--json"]

    assert run([*command, "-o", str(output)]) == 0

    document = json.loads(capfd.readouterr().out)
    (engine,) = read_bundle(output).engines
    if not engine.verified:  # no NVIDIA GPU here
        assert engine.latency_ms is None
        lines = {line["name"]: line for line in read_report(output)["engines"]}
        assert lines["tensorrt-rtx fp16"]["status"] == "not-run"
        assert "graph fp16" in lines["tensorrt-rtx fp16"]["reasons"][0]
        assert lines["graph fp16"]["status"] == "passed"
        assert document["bench_shape"] is None
