"""The linear end of a network as one layer computes the same numbers, to the last pixel of every edge."""

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from srdeploy.calibration.observe import run_outputs
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.tail import NAME, merge_tail
from srdeploy.core.tail_map import Link, compute_tail

SIZES = [(1, 1), (1, 2), (2, 1), (1, 7), (6, 1), (2, 2), (3, 2), (4, 5), (11, 8)]


def end_of_a_network(
    steps: Sequence[tuple[int, str]], kernel: int = 3, bias: bool = True, features: int = 8
) -> onnx.ModelProto:
    """Image -> convolution -> ReLU -> (convolution -> pixel shuffle)* -> convolution; steps are (block, mode)."""
    random = np.random.default_rng(len(steps) * 10 + kernel)
    nodes, constants = [], []

    def conv(name: str, source: str, inputs: int, outputs: int, size: int = 3) -> str:
        weights = random.normal(0, 1 / np.sqrt(inputs * size * size), (outputs, inputs, size, size))
        constants.append(numpy_helper.from_array(weights.astype(np.float32), f"{name}.weight"))
        names = [source, f"{name}.weight"]
        if bias:
            constants.append(numpy_helper.from_array(random.normal(0, 1, outputs).astype(np.float32), f"{name}.bias"))
            names.append(f"{name}.bias")
        nodes.append(helper.make_node("Conv", names, [name], name=f"{name}/Conv", pads=[size // 2] * 4))
        return name

    conv("first", "input", 3, features)
    nodes.append(helper.make_node("Relu", ["first"], ["relu"], name="relu/Relu"))
    x = "relu"
    for index, (block, mode) in enumerate(steps):
        conv(f"up{index}", x, features, features * block * block, kernel)
        x = f"shuffle{index}"
        nodes.append(helper.make_node("DepthToSpace", [f"up{index}"], [x], name=f"{x}/D", blocksize=block, mode=mode))
    conv("output", x, features, 3)
    infos = [helper.make_tensor_value_info(name, 1, ["n", 3, None, None]) for name in ("input", "output")]
    graph = helper.make_graph(nodes, "g", [infos[0]], [infos[1]], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def largest_difference(one: onnx.ModelProto, other: onnx.ModelProto) -> float:
    random = np.random.default_rng(0)
    batches = [random.random((2, 3, *size), dtype=np.float32) for size in SIZES]
    pairs = zip(run_outputs(one, ["output"], batches), run_outputs(other, ["output"], batches), strict=True)
    return max(float(np.abs(before["output"] - after["output"]).max()) for before, after in pairs)


@pytest.mark.parametrize(
    ("steps", "kernel", "bias"),
    [
        pytest.param([(2, "CRD")], 3, True, id="x2"),
        pytest.param([(3, "CRD")], 3, True, id="x3"),
        pytest.param([(2, "CRD"), (2, "CRD")], 3, True, id="x4 in two steps"),
        pytest.param([(4, "CRD")], 3, True, id="x4 in one step"),
        pytest.param([(2, "CRD"), (2, "DCR"), (2, "CRD")], 3, True, id="x8, an order of channels in between"),
        pytest.param([(2, "DCR")], 3, False, id="x2 without biases"),
        pytest.param([(2, "CRD")], 1, True, id="x2, 1x1 before the shuffle"),
    ],
)
def test_a_merged_end_computes_the_same_at_every_size(steps: list[tuple[int, str]], kernel: int, bias: bool) -> None:
    model = end_of_a_network(steps, kernel, bias)

    merged, names = merge_tail(model)

    assert names == (*(f"up{index}" for index in range(len(steps))), "output")
    onnx.checker.check_model(merged, full_check=True)
    graph = Graph(merged)
    assert [layer.name for layer in graph.layers if layer.role == "last"] == [NAME]
    assert {layer.macs for layer in graph.layers if layer.role == "edge"} == {0.0}
    # Sums of some hundred float32 products of size one, in another order.
    assert largest_difference(model, merged) < 3e-5


def test_a_missing_correction_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = end_of_a_network([(2, "CRD")])
    merged, _ = merge_tail(model)
    for tensor in merged.graph.initializer:
        if tensor.name == f"{NAME}.bottom_right.weight":
            tensor.CopyFrom(numpy_helper.from_array(0 * numpy_helper.to_array(tensor), tensor.name))

    assert largest_difference(model, merged) > 1e-3


def test_a_merged_end_costs_less() -> None:
    model = end_of_a_network([(2, "CRD")])

    merged, names = merge_tail(model)

    before, after = (sum(layer.macs for layer in Graph(entry).layers) for entry in (model, merged))
    assert names == ("up0", "output")
    assert after < before


def test_an_end_that_is_not_linear_or_wanted_apart_stays() -> None:
    curved = end_of_a_network([(2, "CRD")])
    curved.graph.node.insert(4, helper.make_node("Relu", ["shuffle0"], ["bent"], name="bent/Relu"))
    curved.graph.node[5].input[0] = "bent"

    for model, apart in ((curved, ()), (end_of_a_network([]), ()), (end_of_a_network([(2, "CRD")]), ("up0",))):
        merged, names = merge_tail(model, apart=apart)

        assert names == ()
        assert merged is model


def test_an_end_that_is_read_elsewhere_stays() -> None:
    model = end_of_a_network([(2, "CRD")])
    model.graph.output.append(helper.make_tensor_value_info("up0", 1, None))
    model.graph.node.append(helper.make_node("Relu", ["up0"], ["other"], name="other/Relu"))

    assert merge_tail(model)[1] == ()


def test_merging_that_would_cost_more_is_not_done() -> None:
    narrow = end_of_a_network([(2, "CRD")], features=1)  # 3 * 4 * 25 for 9 * 4 + 3 * 4 * 9 multiply-adds

    assert merge_tail(narrow)[1] == ()


def test_a_chain_whose_inner_pixels_need_corrections_too_is_not_merged() -> None:
    random = np.random.default_rng(0)
    wide = Link(random.normal(size=(8, 2, 3, 3)), random.normal(size=8), 2)
    reaching_far = Link(random.normal(size=(3, 2, 9, 9)), random.normal(size=3))

    assert compute_tail([wide, Link(random.normal(size=(3, 2, 3, 3)), random.normal(size=3))]) is not None
    assert compute_tail([wide, reaching_far]) is None
