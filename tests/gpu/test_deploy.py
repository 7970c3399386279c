"""deploy on a machine with a GPU: engines are built, verified and timed against eager PyTorch on their own device."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu.cases import REAL
from gpu_simulator.cuda import Simulator
from gpu_simulator.install import Setting, simulated
from PIL import Image

from srdeploy.cli.console import RichProgress
from srdeploy.cli.pipeline import engines, measure
from srdeploy.cli.pipeline.deploy import deploy
from srdeploy.cli.pipeline.engines import checked_placements
from srdeploy.cli.pipeline.types import DeployOptions, Outcome
from srdeploy.core.precision import Precision
from srdeploy.runtime.bench.turns import Effort
from srdeploy.runtime.bundle import choose_engine, read_bundle
from srdeploy.runtime.engines.gpu import gpus
from srdeploy.runtime.report.write import read_report
from srdeploy.upscale.upscaler import Upscaler

CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoints" / "yulunzhang_rcan_x2" / "RCAN_BIX2.pt"
BRIEF = Effort(warmup_runs=1, warmup_seconds=0.0, min_runs=5, max_runs=5, seconds=0.01)


@pytest.fixture(scope="module", autouse=True)
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator | None]:
    """One GPU: what differs between simulated ones is below `deploy`, and has its own tests."""
    if REAL:
        yield None
        return
    setting = Setting("10.16.1.11")
    with simulated(tmp_path_factory.mktemp("simulated"), setting) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> DeployOptions:
    """TensorRT on the last GPU, and ONNX Runtime on the CPU."""
    photos = tmp_path_factory.mktemp("photos")
    for seed in range(8):
        coarse = np.random.default_rng(seed).integers(0, 256, (12, 14, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((112, 96), Image.Resampling.BICUBIC).save(photos / f"{seed}.png")
    return DeployOptions(
        checkpoint=CHECKPOINT,
        images=photos,
        output=tmp_path_factory.mktemp("bundle") / "a.srd",
        hr=True,
        size=(24, 32),
        engines=("tensorrt", "onnxruntime"),
        devices=(gpus()[-1].device, "cpu"),
    )


@pytest.fixture(scope="module")
def outcome(options: DeployOptions, machine: Simulator | None) -> Iterator[Outcome]:
    with pytest.MonkeyPatch.context() as patch:
        few = {"tensorrt": (Precision.FP16, Precision.FP8), "onnxruntime": (Precision.FP32,)}
        patch.setattr(engines, "precisions_of", lambda engine, found: few[engine])
        if machine is not None:  # compiled baselines need a real GPU, and memory has tests of its own
            patch.setattr(measure, "default_baselines", lambda device: ("eager", "half"))
            patch.setattr(measure, "with_process_memories", lambda results, files, threads: results)
        yield deploy(options, RichProgress(), effort=BRIEF)


def test_engines_of_the_gpu_are_the_default(options: DeployOptions) -> None:
    placements = checked_placements(replace(options, engines=(), devices=()))

    assert placements[0].engine in ("tensorrt", "tensorrt-rtx")
    assert {placement.device for placement in placements} == {"cuda:0"}


def test_each_engine_is_verified_on_its_device(outcome: Outcome, options: DeployOptions) -> None:
    device = options.devices[0]

    assert outcome.exit_code == 0
    plan = outcome.verdicts["tensorrt fp16"]
    assert (plan.candidate.device, plan.reference.device) == (device, device)
    assert plan.passed
    on_cpu = outcome.verdicts["onnxruntime fp32"]
    assert (on_cpu.candidate.device, on_cpu.reference.device) == ("cpu", "cpu")
    assert "graph fp16" not in outcome.verdicts


def test_each_engine_is_timed_beside_eager_on_its_device(outcome: Outcome, options: DeployOptions) -> None:
    by_device = {result.rows[0].runner.device: result for result in outcome.benches}

    assert set(by_device) == {options.devices[0], "cpu"}
    for device, result in by_device.items():
        assert {row.runner.device for row in result.rows} == {device}
        assert result.rows[0].runner.engine == "eager"
    names = {row.runner.name for row in by_device[options.devices[0]].rows}
    assert any("half" in name or "fp16 channels" in name for name in names - {"tensorrt fp16"}), names


def test_the_bundle_prefers_the_engine_that_is_for_the_gpu(outcome: Outcome, options: DeployOptions) -> None:
    bundle = read_bundle(outcome.bundle)

    assert {entry.device for entry in bundle.engines} == {options.devices[0], "cpu"}
    assert choose_engine(bundle, device=options.devices[0]).engine == "tensorrt"
    assert choose_engine(bundle, device="cpu").engine == "onnxruntime"
    picture = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    with Upscaler.open(outcome.bundle, device=options.devices[0]) as up:
        assert up(picture).shape == (48, 64, 3)
        assert up.info.device == options.devices[0]


def test_an_fp8_engine_that_cannot_be_made_is_reported_and_fails_nothing(outcome: Outcome) -> None:
    left = [entry for entry in outcome.excluded if entry.precision is Precision.FP8]
    made = [entry for entry in outcome.engines if entry.precision is Precision.FP8]

    assert len(left) + len(made) == 1
    assert outcome.exit_code == 0


def test_the_script_builds_and_verifies_on_the_same_gpu(outcome: Outcome, options: DeployOptions) -> None:
    lines = (outcome.bundle / "reproduce.sh").read_text().splitlines()
    device = options.devices[0]

    for verb in ("build", "verify", "bench"):
        (line, *_) = [line for line in lines if line.startswith(f"srdeploy {verb}") and "_fp16_" in line]
        assert ("--device " + device in line) == (device != "cuda:0"), line


def test_the_report_has_both_devices(outcome: Outcome, options: DeployOptions) -> None:
    report: dict[str, Any] = read_report(outcome.bundle)

    lines = {line["name"]: line for line in report["engines"]}
    assert lines["tensorrt fp16"]["status"] == "passed"
    assert lines["tensorrt fp16"]["latency"], "the bench of its device fills the line"
    assert lines["onnxruntime fp32"]["latency"]
    assert json.dumps(report).count(options.devices[0]) > 1
