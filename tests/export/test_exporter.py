"""Exports of small networks: what is in the file, what is beside it, and what is refused."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import ExportError, OutputError, UsageError
from srdeploy.core.manifest import read_verified
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.progress import Advance
from srdeploy.export import capture
from srdeploy.export.exporter import export_onnx
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.models.networks.spec import NetworkConfig

CheckpointOf = Callable[[NetworkConfig], LoadedCheckpoint]
Variants = dict[str, NetworkConfig]

EXPORTED = {
    # One export for each thing the exporter could translate differently; the arithmetic of all variants is tested on
    # the folded networks, which is much quicker.
    "rcan-x1": {"Conv": 21, "DepthToSpace": 0},
    "rcan-x3": {"DepthToSpace": 1, "ReduceMean": 4},
    "rcan-x4-chained": {"DepthToSpace": 2},
    "rcan-x4-one-step": {"DepthToSpace": 1},
    "rcan-255-matrix": {"Sub": 1, "Conv": 22},
    "rcan-255-gelu-gate": {"Sub": 0, "Gelu": 4},
    "rcan-255-prelu": {"PRelu": 4},
    "rcan-learned-scale": {"LeakyRelu": 4, "Mul": 4},
    "rcan-no-group-ends": {"Elu": 4},
    "rcan-unshuffle-2": {"SpaceToDepth": 1, "DepthToSpace": 2, "Transpose": 0},
    "rcan-unshuffle-4-255": {"SpaceToDepth": 1, "DepthToSpace": 2, "Transpose": 0},
    "srdensenet-all": {"ConvTranspose": 2, "Concat": 4, "Conv": 7},
    "srdensenet-prelu-twice": {"PRelu": 10},
    "srdensenet-layer-scale": {"Mul": 0},
    "srdensenet-odd-output": {"ConvTranspose": 2},
    "srdensenet-shuffles-rgb-matrix": {"DepthToSpace": 2, "Sub": 1},
    "srdensenet-norm-on-block": {"BatchNormalization": 2},
    "srdensenet-norm-after-255-shuffle": {"BatchNormalization": 0},
}


@pytest.mark.parametrize(("name", "operators"), EXPORTED.items(), ids=EXPORTED.keys())
def test_export_passes_its_checks_in_canonical_form(
    name: str, operators: dict[str, int], checkpoint_of: CheckpointOf, variants: Variants, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(variants[name])

    result = export_onnx(checkpoint, tmp_path / "model.onnx")

    assert {operator: result.operators.get(operator, 0) for operator in operators} == operators
    assert len(result.check.deviations) == 10
    assert all(entry.max_abs <= entry.tolerance for entry in result.check.deviations)
    # What the configuration promises is what the graph costs.
    counted = sum(layer.macs for layer in read_graph(result.path).layers)
    assert counted == pytest.approx(result.contract.macs_per_pixel)
    assert result.check.max_abs > 0  # two implementations that agree to the last bit would be one implementation


@pytest.fixture
def exported(checkpoint_of: CheckpointOf, variants: Variants, tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    export_onnx(checkpoint_of(variants["rcan-255-matrix"]), path)
    return path


def test_file_has_the_contract_and_readable_names(
    exported: Path, checkpoint_of: CheckpointOf, variants: Variants
) -> None:
    model = onnx.load(exported)

    sizes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert sizes == [["batch", 3, "height", "width"], ["batch", 3, "2*height", "2*width"]]
    contract = ModelContract.from_metadata({entry.key: entry.value for entry in model.metadata_props}, name="model")
    checkpoint = checkpoint_of(variants["rcan-255-matrix"])
    assert contract.checkpoint_sha256 == checkpoint.sha256
    assert contract.configuration["value_range"] == 255.0
    assert contract.provenance["opset"] == 20
    assert contract.provenance["versions"]["torch"] == str(torch.__version__)
    nodes = {node.name: {entry.key: entry.value for entry in node.metadata_props} for node in model.graph.node}
    assert nodes["groups.1.blocks.0.conv2/Conv"] == {"srdeploy.module": "groups.1.blocks.0.conv2"}
    assert nodes["Sub"] == {"srdeploy.module": ""}
    assert {node.output[0] for node in model.graph.node} == {*nodes, "output"} - {model.graph.node[-1].name}
    weights = {tensor.name for tensor in model.graph.initializer}
    assert {"mean", "first.weight", "groups.1.blocks.0.gate.squeeze.bias"} <= weights


def test_manifest_belongs_to_the_file(exported: Path) -> None:
    manifest = read_verified(exported)[1]

    assert manifest.kind == "onnx"
    assert manifest.sources[0].role == "checkpoint"
    assert manifest.details["check"]["max_abs"] < 1e-5
    assert json.loads(manifest.to_json())["details"]["opset"] == 20


def test_equal_weights_of_two_layers_stay_two_tensors(
    checkpoint_of: CheckpointOf, variants: Variants, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(variants["rcan-x2"])
    for name, value in checkpoint.network.named_parameters():
        if name.endswith("conv1.bias"):
            value.data.zero_()

    export_onnx(checkpoint, tmp_path / "model.onnx")

    biases = [tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer if "conv1.bias" in tensor.name]
    assert len(biases) == 4
    assert not any(numpy_helper.to_array(bias).any() for bias in biases)


@pytest.mark.parametrize("opset", [21, 22, 23])
def test_newer_operator_sets(opset: int, checkpoint_of: CheckpointOf, variants: Variants, tmp_path: Path) -> None:
    export_onnx(checkpoint_of(variants["rcan-x2"]), tmp_path / "model.onnx", opset=opset)

    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == opset


@pytest.mark.parametrize("opset", [17, 19, 24])
def test_other_operator_sets_are_refused(
    opset: int, checkpoint_of: CheckpointOf, variants: Variants, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="20 to 23"):
        export_onnx(checkpoint_of(variants["rcan-x2"]), tmp_path / "model.onnx", opset=opset)


def test_weights_above_the_limit_go_to_a_file_beside(
    checkpoint_of: CheckpointOf, variants: Variants, tmp_path: Path
) -> None:
    inside, outside = tmp_path / "inside.onnx", tmp_path / "outside.onnx"
    checkpoint = checkpoint_of(variants["rcan-x2"])
    image = np.random.default_rng(1).random((1, 3, 6, 5), dtype=np.float32)

    result = export_onnx(checkpoint, outside, inline_bytes=1000)
    export_onnx(checkpoint, inside)

    assert result.external_data == tmp_path / "outside.onnx.data"
    assert read_verified(outside)[1].details["external_data"]["name"] == "outside.onnx.data"
    assert outside.stat().st_size < inside.stat().st_size
    outputs = [
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"input": image})[0]
        for path in (inside, outside)
    ]
    np.testing.assert_array_equal(*outputs)


@pytest.mark.parametrize("name", ["rcan-255-prelu", "srdensenet-k4", "rcan-255-silu"])
def test_skipping_the_decomposition_changes_nothing(
    name: str, checkpoint_of: CheckpointOf, variants: Variants, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_of(variants[name])
    export_onnx(checkpoint, tmp_path / "direct.onnx")
    monkeypatch.setattr(capture, "_TRANSLATED", frozenset())

    export_onnx(checkpoint, tmp_path / "decomposed.onnx")

    direct, decomposed = (onnx.load(tmp_path / f"{name}.onnx").graph for name in ("direct", "decomposed"))
    assert [normalised(node) for node in direct.node] == [normalised(node) for node in decomposed.node]
    assert list(direct.initializer) == list(decomposed.initializer)


def normalised(node: onnx.NodeProto) -> tuple[object, ...]:
    """Return what a node computes: attributes that state ONNX's default are left out."""
    defaults = {"auto_pad": "NOTSET", "group": 1, "dilations": [1, 1], "output_padding": [0, 0]}
    attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    plain = {name: value.decode() if isinstance(value, bytes) else value for name, value in attributes.items()}
    stated = {name: value for name, value in plain.items() if defaults.get(name) != value}
    return node.op_type, list(node.input), list(node.output), stated


def test_weights_that_are_not_finite_are_refused(
    checkpoint_of: CheckpointOf, variants: Variants, tmp_path: Path
) -> None:
    checkpoint = checkpoint_of(variants["rcan-x2"])
    checkpoint.network.get_parameter("last.bias").data[1] = float("nan")

    with pytest.raises(ExportError, match="not finite") as caught:
        export_onnx(checkpoint, tmp_path / "model.onnx")

    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_graph_that_differs_is_not_written_and_the_old_one_stays(
    exported: Path, checkpoint_of: CheckpointOf, variants: Variants, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = exported.read_bytes()
    checkpoint = checkpoint_of(variants["rcan-x2"])
    # A fault of the kind an exporter makes: right almost everywhere, wrong in one weight.
    original = capture.graph_from_network

    def faulty(network: torch.nn.Module, *, channels: int, opset: int) -> object:
        network.get_parameter("last.weight").data[0, 0, 0, 0] += 1e-2
        return original(network, channels=channels, opset=opset)

    monkeypatch.setattr("srdeploy.export.exporter.graph_from_network", faulty)

    with pytest.raises(ExportError, match="differs from the network"):
        export_onnx(checkpoint, exported, force=True)

    assert exported.read_bytes() == before
    assert sorted(path.name for path in exported.parent.iterdir()) == ["model.onnx", "model.onnx.json"]


def test_existing_output_needs_force(exported: Path, checkpoint_of: CheckpointOf, variants: Variants) -> None:
    checkpoint = checkpoint_of(variants["rcan-x2"])

    with pytest.raises(UsageError, match="exists already"):
        export_onnx(checkpoint, exported)

    export_onnx(checkpoint, exported, force=True)
    assert read_verified(exported)[1].sources[0].sha256 == checkpoint.sha256


def test_folder_that_cannot_be_made_is_refused(checkpoint_of: CheckpointOf, variants: Variants, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(variants["rcan-x2"])

    with pytest.raises(OutputError, match="cannot"):
        export_onnx(checkpoint, checkpoint.path / "model.onnx")


class _Interrupter:
    """A progress display behind which somebody presses Ctrl-C while the graph is compared."""

    @contextmanager
    def task(self, description: str, total: float | None = None) -> Iterator[Advance]:
        def advance(amount: float = 1, note: str | None = None) -> None:
            raise KeyboardInterrupt

        yield advance

    def note(self, message: str) -> None:
        pass


def test_interruption_leaves_nothing(checkpoint_of: CheckpointOf, variants: Variants, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(variants["rcan-x2"])

    with pytest.raises(KeyboardInterrupt):
        export_onnx(checkpoint, tmp_path / "model.onnx", progress=_Interrupter())

    assert list(tmp_path.iterdir()) == []
