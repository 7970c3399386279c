"""Which node is at fault: the engine's own faults told from the graph's, on graphs made in the test."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from srdeploy.core.artifact import sha256_of_file
from srdeploy.core.contract import INPUT, OUTPUT, ModelContract
from srdeploy.core.errors import UsageError
from srdeploy.core.manifest import Manifest, Source, manifest_path
from srdeploy.core.precision import Precision
from srdeploy.core.samples import Sample
from srdeploy.runtime.engines.registry import open_engine
from srdeploy.runtime.verify.bisect import bisect_path, channels_fitted, middle
from srdeploy.runtime.verify.difference import snr_db
from srdeploy.runtime.verify.parity import verify_all


def dense_graph(path: Path, codes: str | None = None, *, perturbed: str | None = None) -> Path:
    """Write a dense pair of convolutions that meet in a concatenation, x1 RGB, optionally quantized behind it.

    Args:
        path: of the ONNX file.
        codes: "int8" or "uint8" puts a Q/DQ pair of that type behind the concatenation and on the last weights.
        perturbed: the convolution of this name gets one other weight.
    """
    generator = np.random.default_rng(0)
    nodes, weights = [], []

    def convolution(name: str, source: str, inputs: int, outputs: int, target: str) -> None:
        values = generator.normal(0, 1 / math.sqrt(9 * inputs), (outputs, inputs, 3, 3)).astype(np.float32)
        if name == perturbed:
            values[0, 0, 1, 1] += 0.5
        weight = f"{name}.weight"
        if codes is not None and name == "last":
            scale = (np.abs(values).max(axis=(1, 2, 3)) / 127).astype(np.float32)
            integers = np.clip(np.rint(values / scale[:, None, None, None]), -127, 127).astype(np.int8)
            weights.extend([
                numpy_helper.from_array(integers, f"{weight}.codes"),
                numpy_helper.from_array(scale, f"{weight}.scale"),
                numpy_helper.from_array(np.zeros(outputs, np.int8), f"{weight}.zero"),
            ])  # fmt: skip
            pair = [f"{weight}.codes", f"{weight}.scale", f"{weight}.zero"]
            nodes.append(helper.make_node("DequantizeLinear", pair, [weight], name=f"{weight}_dequantize", axis=0))
        else:
            weights.append(numpy_helper.from_array(values, weight))
        weights.append(numpy_helper.from_array(np.full(outputs, 0.1, np.float32), f"{name}.bias"))
        node = helper.make_node("Conv", [source, weight, f"{name}.bias"], [target], name=f"{name}/Conv", pads=[1] * 4)
        entry = node.metadata_props.add()
        entry.key, entry.value = "srdeploy.module", f"body.{name}"
        nodes.append(node)

    convolution("low", INPUT, 3, 16, "low")
    nodes.append(helper.make_node("Relu", ["low"], ["low_relu"], name="low/Relu"))
    convolution("dense", "low_relu", 16, 16, "dense")
    nodes.append(helper.make_node("Relu", ["dense"], ["dense_relu"], name="dense/Relu"))
    nodes.append(helper.make_node("Concat", ["low_relu", "dense_relu"], ["joined"], name="Concat", axis=1))
    source = "joined"
    if codes is not None:
        steps = {"int8": 127, "uint8": 255}[codes]
        weights += [
            numpy_helper.from_array(np.array(2.5 / steps, np.float32), "joined.scale"),
            numpy_helper.from_array(np.array(0, codes), "joined.zero"),
        ]
        pair = ["joined.scale", "joined.zero"]
        nodes.append(helper.make_node("QuantizeLinear", [source, *pair], ["joined.codes"], name="joined_quantize"))
        nodes.append(helper.make_node("DequantizeLinear", ["joined.codes", *pair], ["joined.back"], name="joined_dq"))
        source = "joined.back"
    convolution("last", source, 32, 3, OUTPUT)
    shape: list[str | int | None] = ["N", 3, "H", "W"]
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    precision = Precision.FP32 if codes is None else Precision.INT8
    contract = ModelContract("srdensenet", {}, 1, "rgb", precision, 3, 100.0, 32, "0" * 64)
    helper.set_model_props(model, contract.to_metadata())
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def image() -> NDArray[np.float32]:
    return np.random.default_rng(1).random((1, 3, 40, 56), dtype=np.float32)


def test_a_right_engine_and_a_right_graph_are_not_blamed(tmp_path: Path, image: NDArray[np.float32]) -> None:
    graph = dense_graph(tmp_path / "a.onnx")

    for engine in ("onnxruntime", "openvino"):
        found = bisect_path(graph, image, fp32=lambda: graph, engine=engine)

        assert found.blame == "none"
        assert found.first is None
        assert found.output_snr_db > 90
        assert "agrees with the network" in found.sentence


def test_a_half_graph_is_compared_up_to_the_cast_that_makes_its_output(small_onnx: Callable[..., Path]) -> None:
    found = bisect_path(small_onnx(dtype="float16"), np.random.default_rng(1).random((1, 3, 24, 32), np.float32))

    assert found.blame == "none"
    assert found.output_snr_db > 35


def test_a_wrong_weight_is_found_with_its_module(tmp_path: Path, image: NDArray[np.float32]) -> None:
    plain = dense_graph(tmp_path / "plain.onnx")
    wrong = dense_graph(tmp_path / "wrong.onnx", perturbed="dense")

    found = bisect_path(wrong, image, fp32=lambda: plain)

    assert found.blame == "graph"
    assert found.first is not None
    assert (found.first.node, found.first.module) == ("dense/Conv", "body.dense")
    assert found.first.inputs_snr_db == math.inf
    assert "body.dense" in found.sentence


def test_signed_codes_behind_a_concatenation_in_openvino_are_caught(tmp_path: Path, image: NDArray[np.float32]) -> None:
    """OpenVINO 2026.4 computes this graph wrongly and says nothing, seen with and without VNNI. uint8 is right."""
    plain = dense_graph(tmp_path / "plain.onnx")
    signed = dense_graph(tmp_path / "signed.onnx", "int8")
    unsigned = dense_graph(tmp_path / "unsigned.onnx", "uint8")
    sample = Sample("noise", image)

    def passes(path: Path, engine: str) -> bool:
        with open_engine(path, engine=engine, parity=True) as candidate, open_engine(plain) as reference:
            return verify_all([candidate], reference, [sample])[0].passed

    assert passes(signed, "onnxruntime")
    assert passes(unsigned, "onnxruntime")
    assert passes(unsigned, "openvino")
    if passes(signed, "openvino"):
        pytest.skip("this OpenVINO on this processor computes signed codes behind a concatenation correctly")
    found = bisect_path(signed, image, engine="openvino")
    assert found.blame == "engine"
    assert found.first is not None
    assert found.first.node == "last/Conv"
    assert found.first.inputs_snr_db > 24
    assert "computes last/Conv (Conv), PyTorch module body.last wrongly" in found.sentence
    assert bisect_path(unsigned, image, engine="openvino").blame == "none"
    assert bisect_path(signed, image, engine="onnxruntime").blame == "none"


def test_quantization_error_is_laid_at_the_quantized_layer(tmp_path: Path, image: NDArray[np.float32]) -> None:
    plain = dense_graph(tmp_path / "plain.onnx")
    quantized = dense_graph(tmp_path / "quantized.onnx", "uint8")

    found = bisect_path(quantized, image, fp32=lambda: plain)

    assert found.blame == "graph"
    assert found.first is not None
    assert found.first.node == "last/Conv"
    assert found.to_json()["suspects"][0]["tensor"] == OUTPUT


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("openvino", r"model.onnx that it was built from, with --engine openvino"),
        ("tensorrt", "model.onnx .* next to it"),
    ],
    ids=["openvino", "tensorrt"],
)
def test_a_built_engine_without_its_graph_is_refused(
    family: str, message: str, tmp_path: Path, image: NDArray[np.float32]
) -> None:
    engine = tmp_path / "engine.bin"
    engine.write_bytes(b"engine")
    source = Source("onnx", "model.onnx", "0" * 64)
    manifest = Manifest("engine", sha256_of_file(engine), (source,), {"engine": family}, {})
    manifest_path(engine).write_text(manifest.to_json())

    with pytest.raises(UsageError, match=message):
        bisect_path(engine, image)


def test_signal_to_noise() -> None:
    ones = np.ones((2, 3), np.float32)

    assert snr_db(ones, ones) == math.inf
    assert snr_db(ones, ones * 1.1) == pytest.approx(20.0, abs=0.01)
    assert snr_db(ones, np.full((2, 3), np.nan, np.float32)) == -math.inf
    assert snr_db(ones, np.ones((3, 2), np.float32)) == -math.inf


def test_factors_per_channel_are_no_error_and_everything_else_is() -> None:
    expected = np.random.default_rng(2).normal(0, 1, (1, 3, 5, 6)).astype(np.float32)
    factors = np.array([2.0, 0.5, 7.0], np.float32)[None, :, None, None]

    assert snr_db(expected, channels_fitted(expected, expected * factors)) > 120
    assert snr_db(expected, channels_fitted(expected, expected[:, ::-1] * factors)) < 5


def test_the_middle_is_cut_out() -> None:
    image = np.arange(2 * 3 * 9 * 5, dtype=np.float32).reshape(2, 3, 9, 5)

    np.testing.assert_array_equal(middle(image, 3), image[:1, :, 3:6, 1:4])
    np.testing.assert_array_equal(middle(image, 20), image[:1])
