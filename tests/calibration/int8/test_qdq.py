"""Q/DQ pairs in a graph: what a split convolution adds up, and in which order."""

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from srdeploy.calibration.int8.arithmetic import params_for_range, quantize_weights, weight_scales
from srdeploy.calibration.int8.qdq import QuantWeight, Site, insert_qdq
from srdeploy.core.ort import cpu_session


@pytest.mark.parametrize("early", [pytest.param(True, id="before"), pytest.param(False, id="after")])
def test_a_skip_is_added_to_the_low_half_of_a_split_convolution(early: bool) -> None:
    model, weight = residual(early=early)
    image = np.random.default_rng(1).random((1, 4, 9, 7), dtype=np.float32)
    site = Site("input", ("end",), "input")

    split = insert_qdq(model, [site], {"input": params_for_range(0, 1, "uint8")}, {"weight": weight}, splits=["end"])

    onnx.checker.check_model(split)
    producer = {name: node for node in split.graph.node for name in node.output}
    last = producer["output"]
    summands = {producer[name].op_type for name in last.input}
    if early:
        # Two sums, each of a convolution and one map: engines compute them in the convolution's own pass.
        inner = next(producer[name] for name in last.input if producer[name].op_type == "Add")
        assert summands == {"Conv", "Add"}
        assert {producer[name].op_type for name in inner.input} == {"Conv", "Relu"}
    else:  # the map does not exist yet when the halves are added
        assert summands == {"Add", "Relu"}
    float_model = onnx.ModelProto()
    float_model.CopyFrom(model)
    float_model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight.dequantized(), "weight"))
    expected, result = (cpu_session(x, arithmetic="float").run(None, {"input": image})[0] for x in (float_model, split))
    step = 1 / 255 / 256  # of the low half
    assert np.abs(result - expected).max() < step * np.abs(weight.dequantized()).sum(axis=(1, 2, 3)).max()


@pytest.mark.parametrize(
    ("outer", "size"), [pytest.param(0.1, 3, id="small outer taps"), pytest.param(1.0, 5, id="equal taps")]
)
def test_the_low_half_does_without_outer_taps_that_read_little_of_it(outer: float, size: int) -> None:
    values = np.random.default_rng(0).normal(0, 0.2, (4, 4, 5, 5)).astype(np.float32)
    frame = np.full((5, 5), outer, dtype=np.float32)
    frame[1:-1, 1:-1] = 1
    model, weight = residual(early=True, values=values * frame)
    image = np.random.default_rng(1).random((1, 4, 9, 7), dtype=np.float32)
    site = Site("input", ("end",), "input")

    split = insert_qdq(model, [site], {"input": params_for_range(0, 1, "uint8")}, {"weight": weight}, splits=["end"])

    onnx.checker.check_model(split, full_check=True)
    (low,) = [node for node in split.graph.node if node.name == "end_low"]
    sizes = {entry.name: list(entry.ints) for entry in low.attribute}
    assert sizes == {"kernel_shape": [size] * 2, "pads": [size // 2] * 4}
    float_model = onnx.ModelProto()
    float_model.CopyFrom(model)
    float_model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight.dequantized(), "weight"))
    expected, result = (cpu_session(x, arithmetic="float").run(None, {"input": image})[0] for x in (float_model, split))
    taps = np.abs(weight.dequantized()).sum(axis=(0, 1))
    inner = taps[1:-1, 1:-1].sum() if size == 3 else taps.sum()
    allowed = (inner / 256 + (taps.sum() - inner) / 2) / 255  # the outer taps read what 8-bit rounding leaves
    assert np.abs(result - expected).max() < allowed


def residual(*, early: bool, values: NDArray[np.float32] | None = None) -> tuple[onnx.ModelProto, QuantWeight]:
    if values is None:
        values = np.random.default_rng(0).normal(0, 0.2, (4, 4, 3, 3)).astype(np.float32)
    scales = weight_scales(values, 0, 8)
    size = values.shape[2]
    pads = {"kernel_shape": [size] * 2, "pads": [size // 2] * 4}
    convolution = helper.make_node("Conv", ["input", "weight"], ["end_out"], name="end", **pads)
    skip = helper.make_node("Relu", ["input"], ["skip"], name="skip")
    total = helper.make_node("Add", ["end_out", "skip"], ["output"], name="total")
    nodes = [skip, convolution, total] if early else [convolution, skip, total]
    tensors = [helper.make_tensor_value_info(name, 1, [1, 4, None, None]) for name in ("input", "output")]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], [numpy_helper.from_array(values, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return model, QuantWeight(quantize_weights(values, scales, 0), scales, 0)
