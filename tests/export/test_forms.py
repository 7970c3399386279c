"""Graphs in other forms: what they compute, what their contract says, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from srdeploy.calibration.fp32 import read_fp32_graph
from srdeploy.calibration.images.dataset import make_calibration_set
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.quantize import quantize
from srdeploy.cli.main import run
from srdeploy.core.contract import GraphForm, ModelContract
from srdeploy.core.errors import ExportError, InputError, UsageError
from srdeploy.core.manifest import read_verified
from srdeploy.core.onnx_file import GraphFile, read_graph
from srdeploy.core.precision import Precision, Target
from srdeploy.export.exporter import export_form, export_onnx
from srdeploy.export.form_checks import check_against_plain
from srdeploy.export.forms import formed_graph
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.models.networks.spec import NetworkConfig

Plain = Callable[[str], Path]
PHOTOS = Path(__file__).parents[2] / "examples" / "photos"


@pytest.fixture(scope="module")
def plain(
    checkpoint_of: Callable[[NetworkConfig], LoadedCheckpoint],
    variants: dict[str, NetworkConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> Plain:
    """Return a function from a variant to its plain graph, exported once."""
    folder, made = tmp_path_factory.mktemp("plain"), dict[str, Path]()

    def export(name: str) -> Path:
        if name not in made:
            made[name] = export_onnx(checkpoint_of(variants[name]), folder / f"{name}.onnx").path
        return made[name]

    return export


@pytest.mark.parametrize(
    ("variant", "form"),
    [
        ("rcan-x2", GraphForm((2, 3, 12, 20))),
        ("rcan-unshuffle-2", GraphForm((1, 3, 13, 18))),
        ("rcan-255-matrix", GraphForm(io="uint8")),
        ("srdensenet-all", GraphForm(io="uint8")),
        ("srdensenet-odd-output", GraphForm(color_wrapper=True)),
        ("srdensenet-k3-stride-3", GraphForm((1, 3, 9, 10), "uint8", True)),
    ],
    ids=["static", "static with a pixel unshuffle", "uint8", "uint8 luma", "wrapped, trimmed", "everything"],
)
def test_the_form_computes_what_the_plain_graph_and_the_product_do(
    variant: str, form: GraphForm, plain: Plain, tmp_path: Path
) -> None:
    result = export_form(plain(variant), tmp_path / "formed.onnx", form=form)

    assert result.form_check is not None
    if form.io == "uint8" and not form.color_wrapper:
        assert set(result.form_check.max_abs.values()) == {0.0}
    formed, original = read_graph(result.path), read_graph(plain(variant))
    assert formed.contract.form == form
    assert formed.contract.checkpoint_sha256 == original.contract.checkpoint_sha256
    assert formed.contract.colours == ("rgb" if form.color_wrapper else original.contract.colours)
    assert [formed.inputs[0].dtype, formed.outputs[0].dtype] == [form.io] * 2
    assert formed.inputs[0].shape == (form.shape or (-1, formed.contract.channels, -1, -1))
    assert sum(layer.macs for layer in formed.layers) == pytest.approx(formed.contract.macs_per_pixel)
    manifest = read_verified(result.path)[1]
    assert [(source.role, source.sha256) for source in manifest.sources] == [("onnx", original.sha256)]
    assert manifest.details["form"] == json.loads(json.dumps(form.to_json()))


def test_an_8_bit_graph_of_fixed_size_computes_what_the_plain_one_does(plain: Plain, tmp_path: Path) -> None:
    contract = read_graph(plain("rcan-x2")).contract
    calibration = make_calibration_set(PHOTOS, contract=contract, count=4, crop=16, whole=1)
    quantized = tmp_path / "int8.onnx"
    quantize(
        plain("rcan-x2"),
        quantized,
        precision=Precision.INT8,
        target=Target.OPENVINO,
        calibration=calibration,
        options=QuantizeOptions(strength=0.5, method="minmax"),
    )

    for number, height in enumerate(range(20, 60, 4)):
        form = GraphForm((1, contract.channels, height, 32))
        result = export_form(quantized, tmp_path / f"formed{number}.onnx", form=form)

        assert result.form_check is not None
        assert set(result.form_check.max_abs.values()) == {0.0}


def test_a_static_graph_computes_no_sizes(plain: Plain) -> None:
    original = read_graph(plain("rcan-unshuffle-2"))
    assert any(node.op_type == "Shape" for node in original.model.graph.node)

    formed = formed_graph(original, GraphForm((1, 3, 13, 18)))

    assert not any(node.op_type in ("Shape", "Reshape") for node in formed.model.graph.node)
    free = [value.name for value in formed.model.graph.value_info for dim in _dims(value) if not dim.dim_value]
    assert free == []


def _dims(value: onnx.ValueInfoProto) -> list[onnx.TensorShapeProto.Dimension]:
    return list(value.type.tensor_type.shape.dim)


def test_a_uint8_input_feeds_casts_alone_and_every_level_is_its_quotient(plain: Plain) -> None:
    formed = formed_graph(read_graph(plain("rcan-x1")), GraphForm(io="uint8"))

    assert [node.op_type for node in formed.consumers["input"]] == ["Cast"]
    formed.model.graph.output.append(onnx.helper.make_tensor_value_info("form.values", TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(formed.model.SerializeToString(), providers=["CPUExecutionProvider"])
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(3, axis=1)
    (values,) = session.run(["form.values"], {"input": levels})
    assert (values == levels.astype(np.float32) / np.float32(255)).all()


@pytest.mark.parametrize("constant", ["form.chroma.weight", "form.to_rgb.bias", "form.to_ycbcr.weight"])
def test_a_wrapper_that_computes_other_colors_is_refused(constant: str, plain: Plain) -> None:
    original = read_graph(plain("srdensenet-all"))
    formed = formed_graph(original, GraphForm(color_wrapper=True))
    values = formed.array(constant) * np.float32(1.001)
    formed.initializers[constant].CopyFrom(numpy_helper.from_array(values, constant))

    with pytest.raises(ExportError, match="differs from"):
        check_against_plain(formed, original)


def test_the_checkpoint_is_exported_and_checked_before_its_form(
    checkpoint_of: Callable[[NetworkConfig], LoadedCheckpoint], variants: dict[str, NetworkConfig], tmp_path: Path
) -> None:
    form = GraphForm((1, 3, 9, 8), "uint8", True)

    result = export_onnx(checkpoint_of(variants["srdensenet-k2"]), tmp_path / "model.onnx", form=form)

    assert result.check is not None
    assert result.form_check is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.json"]
    session = onnxruntime.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"input": np.zeros((1, 3, 9, 8), np.uint8)})
    assert (output.shape, output.dtype) == ((1, 3, 36, 32), np.uint8)


@pytest.mark.parametrize(
    ("variant", "form", "match"),
    [
        ("rcan-x2", GraphForm((1, 1, 8, 8)), "--static 1x1x8x8 has 1 channels; expected 3"),
        ("srdensenet-all", GraphForm((1, 1, 8, 8), color_wrapper=True), "has 1 channels; expected 3"),
        ("rcan-unshuffle-2", GraphForm((1, 3, 1, 1)), "minimum size; expected 2 pixels"),
        ("rcan-x2", GraphForm((64, 3, 8192, 8192)), "largest tensor .* choose a smaller shape"),
        ("rcan-x2", GraphForm(color_wrapper=True), "--color-wrapper on a network of rgb"),
    ],
    ids=["channels", "channels behind a wrapper", "minimum", "2^31", "wrapper on RGB"],
)
def test_a_form_that_does_not_fit_is_refused_and_nothing_is_written(
    variant: str, form: GraphForm, match: str, plain: Plain, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=match):
        export_form(plain(variant), tmp_path / "new" / "formed.onnx", form=form)

    assert list(tmp_path.iterdir()) == []


def test_a_form_is_the_last_step(plain: Plain, tmp_path: Path) -> None:
    result = export_form(plain("rcan-x2"), tmp_path / "formed.onnx", form=GraphForm(io="uint8"))

    with pytest.raises(InputError, match="in another form already .uint8 in and out.; expected a plain graph"):
        export_form(result.path, tmp_path / "again.onnx", form=GraphForm((1, 3, 8, 8)))
    with pytest.raises(InputError, match="in a form for a consumer .*start from the plain graph"):
        read_fp32_graph(result.path)


def test_a_graph_of_an_earlier_version_is_plain(plain: Plain) -> None:
    graph: GraphFile = read_graph(plain("rcan-x2"))
    metadata = graph.contract.to_metadata()
    del metadata["srdeploy.form"]

    assert ModelContract.from_metadata(metadata, name="old.onnx").form.plain
    with pytest.raises(InputError, match="incomplete"):
        ModelContract.from_metadata({**metadata, "srdeploy.form": '{"io": "uint4"}'}, name="odd.onnx")


def test_the_verb_takes_a_graph_and_refuses_what_a_graph_has_already(
    plain: Plain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, output = str(plain("srdensenet-all")), tmp_path / "formed.onnx"

    assert run(["export", graph, "--color-wrapper", "--io", "uint8", "--static", "1x3x8x9", "-o", str(output)]) == 0
    printed = capsys.readouterr().err
    assert "static 1x3x8x9, uint8 in and out, RGB around a network of one channel" in printed
    assert "next: srdeploy upscale" in printed
    assert run(["export", graph, "--io", "uint8", "--opset", "21", "-o", str(tmp_path / "other.onnx")]) == 2
    assert "a graph has its network and opset already" in capsys.readouterr().err
    assert run(["export", graph, "-o", str(tmp_path / "other.onnx")]) == 2
    assert "is a graph already" in capsys.readouterr().err
    assert run(["inspect", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["contract"]["form"]["shape"] == [1, 3, 8, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["formed.onnx", "formed.onnx.json"]
