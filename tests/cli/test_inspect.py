"""The verb inspect, and the options about checkpoints that several verbs share."""

import json
from pathlib import Path
from typing import Any

import click
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper

from srdeploy.cli.checkpoint_options import CheckpointOptions, load_from_options
from srdeploy.cli.inspect_documents import ELEMENT_LIMIT, largest_square
from srdeploy.cli.main import run
from srdeploy.cli.options import argument, arguments, option_group, verb
from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.contract import ModelContract
from srdeploy.core.manifest import Manifest, Source, manifest_path
from srdeploy.core.precision import Precision
from srdeploy.models.checkpoint.recognise import source_names
from srdeploy.models.choices import MEANS, Choices
from srdeploy.models.dialects import official_rcan, rcan_it
from srdeploy.models.dialects.base import Dialect
from srdeploy.models.networks.rcan import Rcan, RcanConfig
from srdeploy.runtime.bundle import BundleEngine, Excluded, write_bundle_manifest

CONTRACT = ModelContract("rcan", {"scale": 2}, 2, "rgb", Precision.FP32, None, 1e6, 256, "0" * 64)


def checkpoint(path: Path, dialect: Dialect, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = RcanConfig(scale=2, groups=1, blocks=2, features=4, attention_width=1, upsampler=(2,), **changes)
    state = Rcan(config).state_dict()
    torch.save({source: state[name] for name, source in source_names(dialect, config).items()}, path)
    return path


def graph(path: Path, contract: ModelContract | None) -> Path:
    nodes = [helper.make_node("DepthToSpace", ["input"], ["output"], blocksize=1)]
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, "height", "width"])]
    outputs = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3, "height", "width"])]
    model = helper.make_model(
        helper.make_graph(nodes, "tiny", inputs, outputs), opset_imports=[helper.make_opsetid("", 20)]
    )
    if contract is not None:
        helper.set_model_props(model, contract.to_metadata())
    onnx.save(model, path)
    return path


def engine(path: Path) -> Path:
    path.write_bytes(b"native code")
    details = {
        "engine": "openvino",
        "precision": {"asked": "fp32", "built": "fp32"},
        "profiles": [],
        "target": {},
        "built": {},
        "contract": CONTRACT.to_metadata(),
        "notes": ["first note"],
    }
    manifest = Manifest("engine", sha256_of_file(path), (Source("onnx", "model.onnx", "1" * 64),), details)
    manifest_path(path).write_text(manifest.to_json())
    return path


def bundle(path: Path) -> Path:
    (path / "engines").mkdir(parents=True)
    engine(path / "engines" / "a.engine")
    write_bundle_manifest(
        path,
        contract=CONTRACT,
        checkpoint=Source("checkpoint", "net.pt", "0" * 64),
        engines=[BundleEngine("engines/a.engine", "openvino", Precision.FP32, True, float("inf"), 1.5, 2.0)],
        excluded=[Excluded("tensorrt", Precision.FP16, "build", "no GPU")],
    )
    return path


def inspected(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[dict[str, Any], str]:
    assert run(["inspect", str(path), "--json", *flags]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path / "net.pt", official_rcan.DIALECT)

    document, shown = inspected(path, capsys)

    assert document["kind"] == "checkpoint"
    assert document["sha256"] == sha256_of_file(path)
    assert document["container"] == "torch zip"
    assert document["dialect"]["name"] == "official-rcan"
    assert document["configuration"]["features"] == 4
    assert document["hyperparameters"]["features"] == "head.0.weight 4x3x3x3, axis 0"
    assert document["network"]["receptive_field"] == "global"
    assert document["network"]["values"] == sum(tensor.numel() for tensor in torch.load(path).values())
    assert [each["choice"] for each in document["decisions"]] == ["value_range", "activation", "colours"]
    for part in ("the official RCAN layout", "head.0.weight 4x3x3x3", "assumed", "global", "export"):
        assert part in shown


def test_a_checkpoint_with_open_questions_is_shown_with_the_flags_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path / "best.pth", rcan_it.DIALECT, upsampler_activation="silu")

    document, shown = inspected(path, capsys)
    told, _ = inspected(path, capsys, "--activation", "silu", "--res-scale", "0.1")

    assert document["configuration"]["activation"] is None
    assert document["configuration"]["residual_scale"] is None
    assert {each["choice"] for each in document["decisions"] if each["by"] == "open"} == {"activation", "res_scale"}
    assert "OPEN" in shown
    assert "--activation relu --res-scale 0.1" in " ".join(shown.split())
    assert told["configuration"]["upsampler_activation"] == "silu"
    assert told["configuration"]["residual_scale"] == 0.1


def test_an_onnx_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, shown = inspected(graph(tmp_path / "model.onnx", CONTRACT), capsys)

    assert document["kind"] == "onnx"
    assert document["opset"] == {"ai.onnx": 20}
    assert document["inputs"] == [{"name": "input", "type": "float", "shape": ["batch", 3, "height", "width"]}]
    assert document["operators"] == {"DepthToSpace": 1}
    assert document["network"]["largest_square_input"] == largest_square(256)
    assert document["manifest"] is None
    assert "float batch x 3 x height x width" in shown


def test_an_onnx_file_of_somebody_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document, shown = inspected(graph(tmp_path / "model.onnx", None), capsys)

    assert document["contract"] is None
    assert "no srdeploy metadata" in shown


def test_an_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = engine(tmp_path / "a.engine")

    document, shown = inspected(path, capsys)

    assert document["kind"] == "engine"
    assert document["engine"] == "openvino"
    assert "first note" in shown
    path.write_bytes(b"other code")
    assert run(["inspect", str(path)]) == 3
    assert "SHA-256" in capsys.readouterr().err


def test_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle(tmp_path / "net.srd")

    document, shown = inspected(path, capsys)

    assert document["kind"] == "bundle"
    assert document["engines"][0]["fidelity_db"] == "inf"
    assert "no GPU" in shown
    assert document["signature"] is None
    (path / "model.sig").write_text("{}")
    assert run(["inspect", str(path)]) == 3
    assert "model.sig is not a signature" in capsys.readouterr().err
    (path / "model.sig").unlink()
    (path / "engines" / "a.engine").write_bytes(b"other code")
    assert run(["inspect", str(path)]) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("gone.pt", None, "does not exist", id="missing"),
        pytest.param("noise.pt", b"\x00\x01\x02 noise", "noise.pt", id="no checkpoint"),
        pytest.param("noise.onnx", b"\x00\x01\x02 noise", "is not an ONNX file", id="no onnx"),
        pytest.param("empty.onnx", b"", "has no outputs", id="empty onnx"),
        pytest.param("folder", "", "without a manifest.json", id="folder"),
    ],
)
def test_what_is_nothing_of_the_kind_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | str | None, message: str
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.mkdir()

    assert run(["inspect", str(path)]) == 3
    captured = capsys.readouterr()

    assert captured.out == ""
    assert message in captured.err
    assert captured.err.strip().splitlines()[-1].startswith("error:")


def test_a_contradicting_flag_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path / "net.pt", official_rcan.DIALECT)

    assert run(["inspect", str(path), "--res-scale", "0.1"]) == 2
    assert "--res-scale 0.1 contradicts the official RCAN layout" in capsys.readouterr().err


def test_the_largest_square_is_the_last_below_the_limit() -> None:
    for elements in (1, 256, 1024, 4096):
        side = largest_square(elements)

        assert side**2 * elements < ELEMENT_LIMIT <= (side + 1) ** 2 * elements


# ----------------------------------------------------------------------------------------------------------------------
# Shared options


@arguments
class Options:
    path: str = argument(type=str)
    checkpoint_options: CheckpointOptions = option_group(default_factory=CheckpointOptions)


@verb(Options, epilog="")
def shown(options: Options) -> None:
    """Print the options."""
    about = options.checkpoint_options
    click.echo(json.dumps({"flags": about.flags(), "stated": about.choices().stated()}))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--value-range", "255"],
        ["--res-scale", "0.1", "--activation", "silu"],
        ["--weights", "ema", "--colours", "bgr"],
        ["--mean", "0.4488,0.4371,0.404"],
        ["--mean", "0.44880000000001,0,1", "--res-scale", "0.1234567890123"],
        ["--group-skip"],
        ["--no-group-skip", "--layer-scale", "0.5"],
    ],
    ids=" ".join,
)
def test_flags_survive_a_round_trip(flags: list[str]) -> None:
    """What `flags()` writes into reproduce scripts states what was stated."""
    first = json.loads(CliRunner().invoke(shown, ["net.pt", *flags]).output)
    second = json.loads(CliRunner().invoke(shown, ["net.pt", *first["flags"]]).output)

    assert sorted(first["flags"]) == sorted(flags)
    assert second == first


@pytest.mark.parametrize(("name", "mean"), MEANS.items())
def test_means_have_names(name: str, mean: tuple[float, ...]) -> None:
    result = json.loads(CliRunner().invoke(shown, ["net.pt", "--mean", name]).output)

    assert tuple(result["stated"]["mean"]) == mean


@pytest.mark.parametrize("mean", ["red", "0.1,0.2", "1,2,3", "0.1,,0.2"])
def test_a_mean_that_is_none_is_a_usage_error(mean: str) -> None:
    result = CliRunner().invoke(shown, ["net.pt", "--mean", mean])

    assert result.exit_code == 2
    assert "numbers in 0..1" in result.output


def test_every_choice_is_an_option() -> None:
    assert set(Choices.__dataclass_fields__) | {"probe"} == set(CheckpointOptions.__dataclass_fields__)


def test_assumptions_are_said_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path / "net.pt", official_rcan.DIALECT)

    load_from_options(path, CheckpointOptions())
    said = capsys.readouterr().err
    load_from_options(path, CheckpointOptions(value_range=255.0))
    stated = capsys.readouterr().err
    load_from_options(path, CheckpointOptions(), quiet=True)

    assert "assumed --value-range 255" in said
    assert "(candidates: 255, 1)" in said
    assert stated == ""
    assert capsys.readouterr().err == ""
