"""The whole stage: files in, files out, bounds kept or refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.journal import Journal
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.quantize import QuantizeResult, artifacts_folder, quantize
from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import machine
from srdeploy.core.errors import BuildError, GateError, InputError, SrdeployError, UsageError
from srdeploy.core.manifest import read_verified
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.precision import Precision, Target
from srdeploy.core.runner import Runner

Paths = dict[str, Path]
Calibrations = dict[str, CalibrationSet]
QUICK = QuantizeOptions(strength=0.5, method="minmax")


def openvino(path: Path) -> Runner:
    # Only tests join the stages: calibration itself never imports the runtime.
    from srdeploy.runtime.engines.registry import open_engine

    return open_engine(path, engine="openvino", threads=1, parity=True)


def onnxruntime(path: Path) -> Runner:
    from srdeploy.runtime.engines.registry import open_engine

    return open_engine(path, engine="onnxruntime", threads=1)


@pytest.mark.parametrize("name", ["dense", "residual"])
@pytest.mark.parametrize(
    ("target", "opener"),
    [
        pytest.param(Target.OPENVINO, openvino, id="openvino"),
        pytest.param(Target.ONNXRUNTIME, onnxruntime, id="onnxruntime"),
    ],
)
def test_what_was_asked_for_in_8_bits_runs_in_8_bits(
    name: str,
    target: Target,
    opener: Callable[[Path], Runner],
    network_paths: Paths,
    calibrations: Calibrations,
    tmp_path: Path,
) -> None:
    output = tmp_path / "int8.onnx"

    result = quantize(
        network_paths[name],
        output,
        precision=Precision.INT8,
        target=target,
        calibration=calibrations[name],
        options=QUICK,
        open_engine=opener,
    )

    assert result.readback is not None
    assert result.readback.ran >= len(result.int8_layers) > 0
    assert "multiply-adds in INT8" in result.readback.line()
    assert result.quality is not None
    assert result.quality.truth == "hr"
    assert result.quality.fidelity_db > 30
    assert result.latency_ms is not None
    manifest = read_verified(output)[1]
    assert manifest.details["readback"]["ran_int8"] == result.readback.ran
    assert manifest.details["calibration"]["files"]
    contract = ModelContract.from_metadata(
        {entry.key: entry.value for entry in onnx.load(output).metadata_props}, name="int8"
    )
    assert contract.precision is Precision.INT8
    assert contract.provenance["quantization"]["target"] == target.value
    assert {path.name for path in artifacts_folder(output).iterdir()} == {"set.json", "ranges.json", "sensitivity.json"}
    json.dumps(result.to_json(), allow_nan=False)


def test_a_deconvolution_of_both_signs_reads_signed_codes(
    networks: dict[str, Callable[..., onnx.ModelProto]], calibrations: Calibrations, tmp_path: Path
) -> None:
    """OpenVINO computes one of codes with an offset in FP32."""
    model = networks["dense"]()
    deconvolution = next(node for node in model.graph.node if node.op_type == "ConvTranspose")
    activation = next(node for node in model.graph.node if node.output[0] == deconvolution.input[0])
    assert activation.op_type == "Relu"
    deconvolution.input[0] = activation.input[0]
    model.graph.node.remove(activation)
    onnx.save(model, tmp_path / "linear.onnx")

    result = quantize(
        tmp_path / "linear.onnx",
        tmp_path / "int8.onnx",
        precision=Precision.INT8,
        target=Target.OPENVINO,
        calibration=calibrations["dense"],
        options=QUICK,
        open_engine=openvino,
    )

    assert result.readback is not None
    assert result.readback.macs == pytest.approx(1.0)
    assert result.quality is not None
    assert result.quality.fidelity_db > 30
    if "avx512_vnni" in machine()["cpu_flags"]:
        quantized = Graph(onnx.load(result.output))
        (found,) = [node for node in quantized.model.graph.node if node.op_type == "ConvTranspose"]
        codes = quantized.producer[found.input[0]]
        assert numpy_helper.to_array(quantized.initializers[codes.input[2]]).dtype == np.int8
        assert result.notes == ()


def test_the_linear_end_becomes_one_layer_unless_a_part_of_it_is_kept(
    network_paths: Paths, calibrations: Calibrations, tmp_path: Path
) -> None:
    def run(name: str, keep: tuple[str, ...], target: Target = Target.OPENVINO) -> QuantizeResult:
        return quantize(
            network_paths["residual"],
            tmp_path / f"{name}.onnx",
            precision=Precision.INT8,
            target=target,
            calibration=calibrations["residual"],
            options=replace(QUICK, keep=keep),
            open_engine=openvino if target is Target.OPENVINO else None,
        )

    merged, apart, other = run("merged", ()), run("apart", ("tail",)), run("gpu", (), Target.TENSORRT)

    assert merged.merged == ("up", "tail")
    assert merged.to_json()["merged_layers"] == ["up", "tail"]
    assert "merged_tail" in merged.int8_layers
    assert apart.merged == other.merged == ()
    assert "up" in apart.int8_layers
    assert apart.floats["tail"] == "asked for with --keep"


def test_ranges_of_a_graph_laid_out_otherwise_are_refused(
    network_paths: Paths, calibrations: Calibrations, tmp_path: Path
) -> None:
    def run(name: str, **options: object) -> None:
        quantize(
            network_paths["residual"],
            tmp_path / name,
            precision=Precision.INT8,
            target=Target.OPENVINO,
            calibration=calibrations["residual"],
            options=replace(QUICK, **options),  # type: ignore[arg-type]
        )

    run("first.onnx")
    ranges = artifacts_folder(tmp_path / "first.onnx") / "ranges.json"

    run("again.onnx", ranges=ranges)
    with pytest.raises(InputError, match="no range of .*laid out otherwise"):
        run("apart.onnx", ranges=ranges, keep=("tail",))
    assert not (tmp_path / "apart.onnx").exists()


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FP8])
def test_tensorrt_graphs_are_typed_throughout(
    precision: Precision,
    networks: dict[str, Callable[..., onnx.ModelProto]],
    calibrations: Calibrations,
    tmp_path: Path,
) -> None:
    onnx.save(networks["residual"](features=24), tmp_path / "wide.onnx")

    result = quantize(
        tmp_path / "wide.onnx",
        tmp_path / "typed.onnx",
        precision=precision,
        target=Target.TENSORRT,
        calibration=calibrations["residual"],
        options=QUICK,
    )

    model = onnx.load(tmp_path / "typed.onnx")
    onnx.checker.check_model(model, full_check=True)
    scales = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    codes = TensorProto.INT8 if precision is Precision.INT8 else TensorProto.FLOAT8E4M3FN
    assert scales
    assert all(types[name] == TensorProto.FLOAT16 for name in scales)
    assert all(types[f"{name.removesuffix('_scale')}_zero_point"] == codes for name in scales)
    assert result.quality is not None
    assert result.quality.fidelity_db > 25
    assert "head" in result.floats
    assert "tail" in result.floats


def test_rtx_says_why_fp16_is_its_precision(network_paths: Paths, calibrations: Calibrations, tmp_path: Path) -> None:
    result = quantize(
        network_paths["residual"],
        tmp_path / "rtx.onnx",
        precision=Precision.INT8,
        target=Target.TENSORRT_RTX,
        calibration=calibrations["residual"],
        options=QUICK,
    )

    assert any("FP16 is the recommended precision" in note for note in result.notes)


def test_the_bound_is_kept_by_splitting_and_the_search_is_deterministic(
    network_paths: Paths, calibrations: Calibrations, tmp_path: Path
) -> None:
    def run(name: str, fidelity: float | None) -> tuple[bytes, dict[str, object], float]:
        result = quantize(
            network_paths["residual"],
            tmp_path / name,
            precision=Precision.INT8,
            target=Target.OPENVINO,
            calibration=calibrations["residual"],
            options=QuantizeOptions(strength=0.5, method="minmax", min_fidelity=fidelity),
        )
        sensitivity = json.loads((artifacts_folder(tmp_path / name) / "sensitivity.json").read_text())
        assert result.quality is not None
        return (tmp_path / name).read_bytes(), sensitivity, result.quality.fidelity_db

    plain = run("plain.onnx", None)
    bound = plain[2] + 3

    first = run("one.onnx", bound)
    second = run("two.onnx", bound)

    assert first[2] >= bound
    assert first[0] == second[0]
    assert first[0] != plain[0]
    groups = first[1]["groups"]
    assert isinstance(groups, list)
    assert sum(len(group["layers"]) for group in groups) == len({name for group in groups for name in group["layers"]})
    assert all(group["image_mse"] > 0 for group in groups)


def test_a_bound_out_of_reach_fails_with_the_best_point_and_writes_nothing(
    network_paths: Paths, calibrations: Calibrations, tmp_path: Path
) -> None:
    options = QuantizeOptions(strength=0.5, method="minmax", min_fidelity=149.0, time_budget_s=0.01)

    with pytest.raises(GateError, match="best graph found loses") as caught:
        quantize(
            network_paths["dense"],
            tmp_path / "out" / "int8.onnx",
            precision=Precision.INT8,
            target=Target.OPENVINO,
            calibration=calibrations["dense"],
            options=options,
        )

    assert "multiply-adds in INT8" in str(caught.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_ranges_are_reused_without_looking_at_the_images_again(
    network_paths: Paths, calibrations: Calibrations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, ranges: Path | None) -> bytes:
        quantize(
            network_paths["dense"],
            tmp_path / name,
            precision=Precision.INT8,
            target=Target.OPENVINO,
            calibration=calibrations["dense"],
            options=QuantizeOptions(ranges=ranges, strength=None if ranges else 0.5, method=None if ranges else "mse"),
        )
        return (tmp_path / name).read_bytes()

    first = run("one.onnx", None)
    monkeypatch.setattr("srdeploy.calibration.measurements.observe", None)  # a pass over the images would now fail
    second = run("two.onnx", artifacts_folder(tmp_path / "one.onnx") / "ranges.json")

    quantized = [onnx.load_model_from_string(data).graph for data in (first, second)]
    assert quantized[0] == quantized[1]


def test_an_interrupted_search_goes_on_where_it_stopped(
    network_paths: Paths, calibrations: Calibrations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from srdeploy.calibration.search import choose

    def run() -> None:
        quantize(
            network_paths["dense"],
            tmp_path / "int8.onnx",
            precision=Precision.INT8,
            target=Target.OPENVINO,
            calibration=calibrations["dense"],
            options=QuantizeOptions(),
        )

    measured: list[str] = []
    original = choose.measure_fidelity

    def counted(*arguments: object) -> float:
        if len(measured) == 2:
            measured.append("interrupted")
            raise KeyboardInterrupt
        measured.append("measured")
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(choose, "measure_fidelity", counted)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (tmp_path / "int8.onnx").exists()

    run()

    total = len(json.loads((tmp_path / "int8.onnx.json").read_text())["details"]["search"]["trials"])
    assert measured.count("measured") == total  # the two measured before were not measured again
    assert not list((tmp_path / "cache").rglob("*.json*"))


def test_a_journal_of_other_images_is_another_journal(tmp_path: Path) -> None:
    Journal("model", "images", folder=tmp_path).number("a", lambda: 1.0)

    again = Journal("model", "images", folder=tmp_path)
    other = Journal("model", "other images", folder=tmp_path)

    assert again.resumed
    assert again.number("a", lambda: 2.0) == 1.0
    assert not other.resumed


def test_an_engine_that_runs_less_than_asked_fails(
    network_paths: Paths, calibrations: Calibrations, tmp_path: Path
) -> None:
    """ONNX Runtime computes no integers where outputs are floats, so it must refuse the layout made for OpenVINO."""
    with pytest.raises(BuildError, match="convolutions"):
        quantize(
            network_paths["residual"],
            tmp_path / "int8.onnx",
            precision=Precision.INT8,
            target=Target.OPENVINO,
            calibration=calibrations["residual"],
            options=QUICK,
            open_engine=onnxruntime,
        )

    assert not (tmp_path / "int8.onnx").exists()


def test_half_precision_without_images_says_what_was_not_checked(network_paths: Paths, tmp_path: Path) -> None:
    result = quantize(
        network_paths["residual"],
        tmp_path / "fp16.onnx",
        precision=Precision.FP16,
        target=Target.TENSORRT,
        calibration=None,
    )

    assert result.quality is None
    assert any("overflow" in note for note in result.notes)
    assert {island.reason for island in result.islands}


def test_bf16_for_tensorrt_has_no_deconvolution(
    network_paths: Paths, calibrations: Calibrations, tmp_path: Path
) -> None:
    result = quantize(
        network_paths["dense"],
        tmp_path / "bf16.onnx",
        precision=Precision.BF16,
        target=Target.TENSORRT,
        calibration=calibrations["dense"],
    )

    assert not [node for node in onnx.load(tmp_path / "bf16.onnx").graph.node if node.op_type == "ConvTranspose"]
    assert any("deconvolution" in note for note in result.notes)


def _not_onnx(path: Path, source: Path) -> None:
    path.write_bytes(b"not an onnx file at all")


def _no_metadata(path: Path, source: Path) -> None:
    model = onnx.load(source)
    del model.metadata_props[:]
    onnx.save(model, path)


def _old_opset(path: Path, source: Path) -> None:
    model = onnx.load(source)
    model.opset_import[0].version = 17
    onnx.save(model, path)


def _typed(path: Path, source: Path) -> None:
    model = onnx.load(source)
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        pytest.param(_not_onnx, "is not an ONNX file", id="not ONNX"),
        pytest.param(_no_metadata, "no srdeploy metadata", id="foreign ONNX"),
        pytest.param(_old_opset, "opset 17", id="opset too old"),
        pytest.param(_typed, "typed already", id="typed already"),
    ],
)
def test_graphs_that_do_not_fit_are_refused(
    spoil: Callable[[Path, Path], None], word: str, network_paths: Paths, calibrations: Calibrations, tmp_path: Path
) -> None:
    spoil(tmp_path / "bad.onnx", network_paths["dense"])

    with pytest.raises(InputError, match=word) as caught:
        quantize(
            tmp_path / "bad.onnx",
            tmp_path / "out.onnx",
            precision=Precision.INT8,
            target=Target.OPENVINO,
            calibration=calibrations["dense"],
            options=QUICK,
        )

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.onnx").exists()


def test_a_quantized_graph_is_not_quantized_again(
    network_paths: Paths, calibrations: Calibrations, tmp_path: Path
) -> None:
    common = {"precision": Precision.INT8, "target": Target.OPENVINO, "calibration": calibrations["dense"]}
    quantize(network_paths["dense"], tmp_path / "int8.onnx", options=QUICK, **common)  # type: ignore[arg-type]

    with pytest.raises(InputError, match="quantized already"):
        quantize(tmp_path / "int8.onnx", tmp_path / "again.onnx", options=QUICK, **common)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("precision", "target", "images", "word"),
    [
        pytest.param(Precision.INT8, Target.OPENVINO, False, "no images", id="int8 without images"),
        pytest.param(Precision.FP8, Target.OPENVINO, True, "fp8", id="fp8 on a CPU"),
        pytest.param(Precision.FP32, Target.OPENVINO, True, "fp32", id="fp32"),
    ],
)
def test_requests_that_make_no_sense_are_usage_errors(
    precision: Precision,
    target: Target,
    images: bool,
    word: str,
    network_paths: Paths,
    calibrations: Calibrations,
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=word):
        quantize(
            network_paths["dense"],
            tmp_path / "out.onnx",
            precision=precision,
            target=target,
            calibration=calibrations["dense"] if images else None,
        )


def test_a_network_too_narrow_for_fp8_is_refused(
    network_paths: Paths, calibrations: Calibrations, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="no layer"):
        quantize(
            network_paths["dense"],
            tmp_path / "out.onnx",
            precision=Precision.FP8,
            target=Target.TENSORRT,
            calibration=calibrations["dense"],
        )


def test_a_layer_to_keep_must_exist(network_paths: Paths, calibrations: Calibrations, tmp_path: Path) -> None:
    def run(layer: str) -> dict[str, str]:
        result = quantize(
            network_paths["dense"],
            tmp_path / f"{layer}.onnx",
            precision=Precision.INT8,
            target=Target.OPENVINO,
            calibration=calibrations["dense"],
            options=QuantizeOptions(strength=0.5, method="minmax", keep=(layer,)),
        )
        return dict(result.floats)

    assert run("tail") == {"tail": "asked for with --keep"}
    with pytest.raises(UsageError, match="names no layer"):
        run("nose")


@pytest.mark.parametrize(
    "wrong", [{"max_psnr_drop": 0.0}, {"strength": 2.0}, {"time_budget_s": 0.0}], ids=["drop", "strength", "time"]
)
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(SrdeployError):
        QuantizeOptions(**wrong)  # type: ignore[arg-type]


def test_a_bound_is_confirmed_on_images_that_chose_nothing(
    network_paths: dict[str, Path], nine_pictures: CalibrationSet, tmp_path: Path
) -> None:
    def run(calibration: CalibrationSet, options: QuantizeOptions, name: str) -> QuantizeResult:
        return quantize(
            network_paths["dense"], tmp_path / name, precision=Precision.INT8, target=Target.OPENVINO,
            calibration=calibration, options=replace(options, cost="macs"),
        )  # fmt: skip

    parts = [nine_pictures.held_out, nine_pictures.test]
    plain = [
        run(replace(nine_pictures, held_out=part, test=()), QuantizeOptions(), f"{index}.onnx").quality
        for index, part in enumerate(parts)
    ]
    assert all(quality is not None and not quality.tested for quality in plain)
    hard, easy = sorted(range(2), key=lambda index: plain[index].fidelity_db)
    between = (plain[hard].fidelity_db + plain[easy].fidelity_db) / 2
    swapped = replace(nine_pictures, held_out=parts[easy], test=parts[hard])

    result = run(swapped, QuantizeOptions(min_fidelity=between), "bounded.onnx")

    assert result.quality is not None
    assert result.quality.tested
    assert result.quality.fidelity_db >= between
    assert result.choice is not None
    first = result.choice.points[0]
    assert first.quality.fidelity_db >= between  # the images that choose were satisfied
    assert first.test is not None
    assert first.test.fidelity_db < between
    assert result.choice.taken is not first
