"""`srdeploy export` from the outside: exit codes, one JSON document, one line per error."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from srdeploy.cli.main import run
from srdeploy.models.networks.rcan import RcanConfig
from srdeploy.models.networks.spec import network_of
from srdeploy.models.networks.srdensenet import SrDenseNetConfig

Tensors = dict[str, torch.Tensor]


def official_rcan() -> Tensors:
    """Return a small RCAN x2 under the authors' keys, without mean shift."""
    torch.manual_seed(1)
    config = RcanConfig(scale=2, groups=1, blocks=1, features=8, attention_width=2, upsampler=(2,), mean_shift="none")
    block = "body.0.body.0.body"
    names = {
        "first": "head.0",
        "groups.0.blocks.0.conv1": f"{block}.0",
        "groups.0.blocks.0.conv2": f"{block}.2",
        "groups.0.blocks.0.gate.squeeze": f"{block}.3.conv_du.0",
        "groups.0.blocks.0.gate.expand": f"{block}.3.conv_du.2",
        "groups.0.end": "body.0.body.1",
        "body_end": "body.1",
        "upsampler.0.convolution": "tail.0.0",
        "last": "tail.1",
    }
    return renamed(network_of(config).state_dict(), names)


def yjn870_srdensenet() -> Tensors:
    """Return a small SRDenseNet x4 under the keys of the most used public code."""
    torch.manual_seed(1)
    config = SrDenseNetConfig(growth=4, layers=2, blocks=2, low_level=8, bottleneck=8, upsampled=8)
    names = {"first": "conv.conv", "bottleneck": "bottleneck.0", "last": "reconstruction"}
    names |= {f"blocks.{b}.layers.{i}": f"dense_blocks.{b}.block.{i}.conv" for b in range(2) for i in range(2)}
    names |= {f"upsampler.{step}.convolution": f"deconv.{2 * step}" for step in range(2)}
    return renamed(network_of(config).state_dict(), names)


def renamed(weights: Tensors, names: dict[str, str]) -> Tensors:
    return {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": value for key, value in weights.items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "rcan.pt"
    torch.save(official_rcan(), path)
    return path


@pytest.mark.parametrize(
    ("make", "architecture", "scale"),
    [(official_rcan, "rcan", 2), (yjn870_srdensenet, "srdensenet", 4)],
    ids=["official-rcan", "yjn870-srdensenet"],
)
def test_json_is_one_document_and_the_files_are_there(
    make: Callable[[], Tensors], architecture: str, scale: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = tmp_path / "network.pth", tmp_path / "new folder" / "model.onnx"
    torch.save(make(), path)

    code = run(["export", str(path), "-o", str(output), "--json"])

    document = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (document["architecture"], document["scale"], document["opset"]) == (architecture, scale, 20)
    assert document["check"]["max_abs"] <= 1e-5
    assert sorted(entry.name for entry in output.parent.iterdir()) == ["model.onnx", "model.onnx.json"]


def test_people_get_a_table_and_the_next_command(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["export", str(checkpoint), "-o", str(tmp_path / "model.onnx"), "--opset", "21"])

    captured = capsys.readouterr()
    assert code == 0
    assert captured.out == ""
    assert "largest difference from PyTorch" in captured.err
    assert "next: srdeploy verify" in captured.err


def not_a_checkpoint(path: Path) -> None:
    path.write_bytes(b"not a checkpoint at all")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4000])


def empty(path: Path) -> None:
    torch.save({}, path)


def not_finite(path: Path) -> None:
    weights = official_rcan()
    weights["tail.1.bias"][0] = float("inf")
    torch.save(weights, path)


@pytest.mark.parametrize(
    ("spoil", "codes"),
    [(not_a_checkpoint, {3}), (truncated, {3}), (empty, {3}), (not_finite, {3, 4})],
    ids=["not-a-checkpoint", "truncated", "empty", "not-finite"],
)
def test_bad_checkpoint_is_one_line_and_leaves_nothing(
    spoil: Callable[[Path], None],
    codes: set[int],
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(checkpoint)

    code = run(["export", str(checkpoint), "-o", str(tmp_path / "model.onnx")])

    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code in codes
    assert len(lines) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == [checkpoint.name]


def test_existing_output_is_kept_without_force(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.onnx"
    output.write_bytes(b"precious")

    assert run(["export", str(checkpoint), "-o", str(output)]) == 2
    assert output.read_bytes() == b"precious"
    assert run(["export", str(checkpoint), "-o", str(output), "--force"]) == 0
    assert output.read_bytes() != b"precious"


@pytest.mark.parametrize("opset", ["19", "24", "new"])
def test_other_opsets_are_usage_errors(opset: str, checkpoint: Path, tmp_path: Path) -> None:
    assert run(["export", str(checkpoint), "-o", str(tmp_path / "model.onnx"), "--opset", opset]) == 2
