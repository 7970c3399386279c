"""A last convolution that computes tiles of pixels computes the same numbers, as floats and as integers."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from srdeploy.calibration.observe import run_outputs
from srdeploy.core.narrow_end import widen_last
from srdeploy.core.onnx_graph import Graph

SIZES = [(1, 1), (1, 2), (3, 1), (4, 5)]


def network(
    scale: int, colors: int, *, kernel: int = 3, codes: bool = False, split: bool = False, crop: int = 0
) -> onnx.ModelProto:
    """Image -> deconvolution of `scale` -> ReLU -> Q/DQ pair -> last convolution, or the sum of two.

    `crop` pixels are missing at the right and bottom of what the last layer reads.
    """
    random = np.random.default_rng(scale)
    constants = {
        "up.weight": random.normal(size=(colors, 5, scale, scale)).astype(np.float32),
        "last.weight": random.normal(size=(colors, 5, kernel, kernel)).astype(np.float32),
        "last.bias": random.normal(size=colors).astype(np.float32),
        "scale": np.float32(0.02),
        "zero": np.uint8(3),
    }
    up = {"strides": [scale] * 2, "pads": [0, 0, crop, crop]}
    nodes = [
        helper.make_node("ConvTranspose", ["input", "up.weight"], ["up"], name="up", **up),
        helper.make_node("Relu", ["up"], ["relu"], name="relu"),
        helper.make_node("QuantizeLinear", ["relu", "scale", "zero"], ["codes"], name="q"),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["read"], name="dq"),
    ]
    weights = "last.weight"
    if codes:
        constants["last.weight"] = random.integers(-127, 128, constants["last.weight"].shape).astype(np.int8)
        constants["last.scales"] = random.uniform(0.001, 0.002, colors).astype(np.float32)
        weights = "last.read"
        nodes.append(
            helper.make_node("DequantizeLinear", ["last.weight", "last.scales"], [weights], name="dq_weights", axis=0)
        )
    pads = {"pads": [kernel // 2] * 4}
    high = "high" if split else "output"
    nodes.append(helper.make_node("Conv", ["read", weights, "last.bias"], [high], name="last", **pads))
    if split:
        nodes.append(helper.make_node("Conv", ["relu", weights], ["low"], name="last_low", **pads))
        nodes.append(helper.make_node("Add", ["high", "low"], ["output"], name="sum"))
    infos = [helper.make_tensor_value_info(name, 1, ["n", colors, None, None]) for name in ("input", "output")]
    tensors = [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "g", [infos[0]], [infos[1]], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("options", "side"),
    [
        pytest.param({"scale": 2, "colors": 1}, 2, id="x2"),
        pytest.param({"scale": 3, "colors": 1}, 3, id="x3"),
        pytest.param({"scale": 4, "colors": 1}, 4, id="x4"),
        pytest.param({"scale": 4, "colors": 3}, 2, id="x4, RGB: 48 channels would fill lanes worse than 12"),
        pytest.param({"scale": 4, "colors": 1, "kernel": 5}, 4, id="5x5"),
        pytest.param({"scale": 4, "colors": 1, "codes": True}, 4, id="codes"),
        pytest.param({"scale": 4, "colors": 3, "codes": True}, 2, id="codes, RGB"),
        pytest.param({"scale": 4, "colors": 1, "codes": True, "split": True}, 4, id="a split layer"),
    ],
)
def test_tiles_have_the_same_pixels_at_every_size(options: dict[str, int], side: int) -> None:
    model = network(**options)  # type: ignore[arg-type]  # the table's values are of several types
    random = np.random.default_rng(0)
    batches = [random.random((2, options["colors"], *size), dtype=np.float32) for size in SIZES]

    tiled, found = widen_last(model)

    assert found == side
    onnx.checker.check_model(tiled, full_check=True)
    (last, *_) = [layer for layer in Graph(tiled).layers if layer.role == "last"]
    assert last.channels_out == options["colors"] * side**2
    for before, after in zip(
        run_outputs(model, ["output"], batches), run_outputs(tiled, ["output"], batches), strict=True
    ):
        assert before["output"].std() > 0.1
        np.testing.assert_allclose(after["output"], before["output"], atol=2e-5)  # another order of sums


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"scale": 1, "colors": 1}, id="the image's own resolution"),
        pytest.param({"scale": 2, "colors": 16}, id="as many channels as lanes"),
        pytest.param({"scale": 4, "colors": 1, "crop": 1}, id="an output that tiles do not divide"),
    ],
)
def test_a_last_layer_that_tiles_do_not_fit_stays(options: dict[str, int]) -> None:
    model = network(**options)

    assert widen_last(model) == (model, 1)


def test_a_last_layer_with_an_activation_behind_it_stays() -> None:
    model = network(4, 1)
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("Tanh", ["before"], ["output"], name="bend"))

    assert widen_last(model) == (model, 1)
