"""`srdeploy package`: what is in the folders of each target, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest

from srdeploy.core.artifact import sha256_of_bytes, sha256_of_file
from srdeploy.core.manifest import Manifest, Source, manifest_path
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.precision import Precision
from srdeploy.runtime.bundle import BundleEngine, write_bundle_manifest
from srdeploy.runtime.engines.registry import open_engine

OPENVINO = BundleEngine("engines/ov.blob", "openvino", Precision.FP32, True, 140.0, 3.0, 2.0)
RTX = BundleEngine("engines/net.rtx", "tensorrt-rtx", Precision.FP16, False)
CUDA = BundleEngine("model.fp32.onnx", "onnxruntime-cuda", Precision.FP32, True, device="cuda:0")
PLANS = tuple(
    BundleEngine(f"engines/{gpu}.plan", "tensorrt", Precision.FP16, True, device=device)
    for gpu, device in (("8.9", "cuda:0"), ("9.0", "cuda:1"), ("other", "cuda:2"))
)

Make = Callable[..., Path]
Command = Callable[..., Any]  # the fixture `srdeploy` in conftest.py


@pytest.fixture
def bundle(workshop: Path, tmp_path: Path) -> Make:
    """Return a function that makes a bundle of a small RCAN with the engines given."""

    def make(*engines: BundleEngine) -> Path:
        folder = tmp_path / "net.srd"
        (folder / "engines").mkdir(parents=True)
        shutil.copy(workshop / "good.onnx", folder / "model.fp32.onnx")
        graph = read_graph(folder / "model.fp32.onnx")
        for entry in engines:
            if entry.engine == "openvino":
                shutil.copy(workshop / "good.engine", folder / entry.file)
                sidecar = json.loads((workshop / "good.engine.json").read_text())
                sidecar["sources"][0]["name"] = "model.fp32.onnx"
                manifest_path(folder / entry.file).write_text(json.dumps(sidecar))
            elif entry.file.startswith("engines/"):
                _plan(folder / entry.file, graph.sha256)
        write_bundle_manifest(
            folder,
            contract=graph.contract,
            checkpoint=Source("checkpoint", "good.pt", "0" * 64),
            engines=engines,
            details={"bench_shape": "1x3x24x32"},
        )
        return folder

    return make


def _plan(path: Path, graph_sha256: str) -> None:
    """Write a file with the sidecar that a TensorRT engine has; "other" has another profile."""
    path.write_bytes(path.name.encode())
    largest = 2 if path.stem == "other" else 4
    profile = {"min": [1, 3, 16, 16], "opt": [2, 3, 24, 40], "max": [largest, 3, 64, 64]}
    capability = "10.0" if path.stem == "other" else path.stem
    manifest = Manifest(
        kind="engine",
        sha256=sha256_of_bytes(path.read_bytes()),
        sources=(Source("onnx", "model.fp32.onnx", graph_sha256),),
        details={"engine": "tensorrt", "profiles": [profile], "target": {"compute_capability": capability}},
        versions={"tensorrt": "10.16.1"},
    )
    manifest_path(path).write_text(manifest.to_json())


def fields(config: Path) -> dict[str, str]:
    """Return the top-level fields of a config.pbtxt as text without spaces."""
    lines = config.read_text().splitlines()
    return {match[1]: match[2].replace(" ", "") for line in lines if (match := re.match(r"(\w+):? *(.*)", line))}


def test_a_triton_repository_serves_portable_graphs_and_pictures(
    bundle: Make, srdeploy: Command, tmp_path: Path
) -> None:
    source, output = bundle(RTX, OPENVINO, CUDA), tmp_path / "new" / "models"

    outcome = srdeploy("package", source, "--triton", output, "--json")

    assert outcome.code == 0
    (packed,) = json.loads(outcome.stdout)["packages"]
    names = ["net_openvino_fp32", "net_onnxruntime-cuda_fp32", "net_pictures"]
    assert packed["contents"] == names
    assert packed["notes"] == ["tensorrt-rtx fp16 is not included: Triton has no backend for it"]
    assert sorted(path.name for path in output.iterdir()) == sorted([*names, "package.json"])
    unbatched, batched = (fields(output / name / "config.pbtxt") for name in names[:2])
    assert (unbatched["backend"], unbatched["max_batch_size"]) == ('"openvino"', "0")
    assert "dims:[-1,3,-1,-1]" in unbatched["input"]
    assert "dynamic_batching" not in unbatched
    assert "batch_size:0" in unbatched["model_warmup"]
    assert "dims:[1,3,24,32]" in unbatched["model_warmup"]
    assert (batched["backend"], batched["max_batch_size"]) == ('"onnxruntime"', "8")
    assert "dims:[3,-1,-1]" in batched["output"]
    assert "KIND_GPU" in batched["instance_group"]
    assert batched["dynamic_batching"] == "{}"
    for name in names[:2]:
        assert sha256_of_file(output / name / "1" / "model.onnx") == sha256_of_file(source / "model.fp32.onnx")
    manifest = Manifest.from_json((output / "package.json").read_text(), name="package.json")
    assert manifest.sources[0].sha256 == json.loads((source / "manifest.json").read_text())["sha256"]
    assert "net_pictures/1/bundle/manifest.json" in manifest.details["files"]


def test_plans_of_several_gpus_are_one_model(bundle: Make, srdeploy: Command, tmp_path: Path) -> None:
    output = tmp_path / "models"

    outcome = srdeploy("package", bundle(*PLANS), "--triton", output, "--name", "rcan")

    assert outcome.code == 0
    assert "engines/other.plan is not included: its profiles are not those of 8.9.plan" in outcome.stderr
    assert "rcan_tensorrt_fp16 needs a Triton container with TensorRT 10.16.1" in outcome.stderr
    folder = output / "rcan_tensorrt_fp16"
    assert sorted(path.name for path in (folder / "1").iterdir()) == ["sm89.plan", "sm90.plan"]
    text = (folder / "config.pbtxt").read_text()
    assert 'cc_model_filenames { key: "8.9" value: "sm89.plan" }' in text
    assert 'cc_model_filenames { key: "9.0" value: "sm90.plan" }' in text
    found = fields(folder / "config.pbtxt")
    assert (found["max_batch_size"], found["default_model_filename"]) == ("4", '"sm89.plan"')
    assert "batch_size:2" in found["model_warmup"]
    assert "dims:[3,24,40]" in found["model_warmup"]


def test_openvino_model_server_computes_what_the_engine_does(bundle: Make, srdeploy: Command, tmp_path: Path) -> None:
    source, output = bundle(OPENVINO), tmp_path / "ovms"
    image = np.random.default_rng(0).random((2, 3, 24, 32), np.float32)

    assert srdeploy("package", source, "--ovms", output).code == 0

    (entry,) = json.loads((output / "config.json").read_text())["model_config_list"]
    config = entry["config"]
    assert config["name"] == "net_fp32"
    # What the server does with the entry, by its documentation: read, reshape, compile with the configuration.
    core = openvino.Core()
    model = core.read_model(output / config["base_path"] / "1" / "model.onnx")
    model.reshape([int(size) for size in config["shape"].strip("()").split(",")])
    served = core.compile_model(model, config["target_device"], config["plugin_config"])
    with open_engine(source / "engines" / "ov.blob") as engine:
        expected = engine.run({"input": image})["output"]
    # The engine adds the end of the network in another order.
    assert np.abs(served({"input": image})["output"] - expected).max() <= 1e-5


def test_bad_requests_are_one_line_and_write_nothing(bundle: Make, srdeploy: Command, tmp_path: Path) -> None:
    source = bundle(RTX)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))

    for arguments, code, line in (
        ([source], 2, "nothing to write; expected --triton DIR, --ovms DIR or --flat DIR"),
        ([source, "--triton", tmp_path / "new"], 3, "has no engine that Triton runs (tensorrt-rtx fp16)"),
        ([source, "--ovms", tmp_path / "new"], 3, "has no OpenVINO engine"),
        ([source, "--triton", tmp_path / "new", "--ovms", tmp_path / "new"], 2, "two targets with the same output"),
        ([source, "--triton", tmp_path / "mine"], 2, "exists already"),
        ([source, "--triton", tmp_path / "mine", "--force"], 2, "folder of other files (it has no package.json)"),
        ([source, "--triton", tmp_path / "new", "--name", "../x"], 2, "the name '../x'"),
        ([tmp_path / "mine", "--triton", tmp_path / "new"], 3, "is not a bundle"),
    ):
        outcome = srdeploy("package", *arguments)
        assert (outcome.code, len(outcome.errors)) == (code, 1), outcome.stderr
        assert line in outcome.errors[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("edited", ["engines/ov.blob", "model.fp32.onnx", "extra.txt"])
def test_an_edited_bundle_is_refused(edited: str, bundle: Make, srdeploy: Command, tmp_path: Path) -> None:
    source = bundle(OPENVINO)
    (source / edited).write_bytes(b"edited")

    outcome = srdeploy("package", source, "--triton", tmp_path / "new", "--ovms", tmp_path / "other")

    assert (outcome.code, len(outcome.errors)) == (3, 1)
    assert edited in outcome.errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["net.srd"]


def test_an_earlier_package_is_replaced_with_force(bundle: Make, srdeploy: Command, tmp_path: Path) -> None:
    source, output = bundle(OPENVINO), tmp_path / "models"
    assert srdeploy("package", source, "--triton", output, "--name", "old").code == 0

    assert srdeploy("package", source, "--triton", output, "--force").code == 0

    assert sorted(path.name for path in output.iterdir()) == ["net_openvino_fp32", "net_pictures", "package.json"]
