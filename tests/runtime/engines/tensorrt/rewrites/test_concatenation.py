"""Dense concatenations become chains: the same values, and no copies in the engine."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine
from srdeploy.runtime.engines.tensorrt.rewrites.concatenation import chain_concatenations
from srdeploy.runtime.engines.tensorrt.rewrites.rewrite import EVERYWHERE


def dense(layers: int, *, newest_first: bool = False) -> onnx.ModelProto:
    """A dense block of 3x3 convolutions with 8 features each, every one fed by all before it."""
    random = np.random.default_rng(0)
    nodes, weights, features = [], [], ["input"]
    for index in range(layers):
        joined = features[0]
        if len(features) > 1:
            joined = f"join{index}"
            order = features[::-1] if newest_first else features
            nodes.append(helper.make_node("Concat", order, [joined], axis=1, name=joined))
        inputs = 3 + 8 * index
        kernel = random.standard_normal((8, inputs, 3, 3)).astype(np.float32) / np.sqrt(9 * inputs)
        weights.append(numpy_helper.from_array(kernel, f"w{index}"))
        name = f"conv{index}"
        nodes.append(helper.make_node("Conv", [joined, f"w{index}"], [f"c{index}"], pads=[1] * 4, name=name))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"f{index}"], name=f"relu{index}"))
        features.append(f"f{index}")
    nodes.append(helper.make_node("Identity", [features[-1]], ["output"]))
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 8, "h", "w"])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    contract = ModelContract("srdensenet", {}, 1, "rgb", Precision.FP32, 5, 1.0, 8, "0" * 64)
    helper.set_model_props(model, contract.to_metadata())
    return model


@pytest.mark.parametrize("newest_first", [False, True], ids=["appended", "prepended"])
def test_values_stay_and_every_join_has_two_parts(newest_first: bool) -> None:
    model = dense(5, newest_first=newest_first)
    image = np.random.default_rng(1).random((1, 3, 6, 5), dtype=np.float32)

    chained, changed = chain_concatenations(model)

    onnx.checker.check_model(chained)
    assert changed == 3
    assert {len(node.input) for node in chained.graph.node if node.op_type == "Concat"} == {2}
    assert max(len(node.input) for node in model.graph.node if node.op_type == "Concat") == 5, "the argument stays"
    before, after = (ReferenceEvaluator(graph).run(None, {"input": image})[0] for graph in (model, chained))
    np.testing.assert_array_equal(before, after)


def test_unrelated_and_other_axes_are_left_alone() -> None:
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["ab"], axis=1),
        helper.make_node("Concat", ["a", "b", "c"], ["other_axis"], axis=2),
        helper.make_node("Concat", ["a", "c", "b"], ["other_order"], axis=1),
    ]
    model = onnx.ModelProto(graph=onnx.GraphProto(node=nodes))

    chained, changed = chain_concatenations(model)

    assert changed == 0
    assert chained == model


def test_tensorrt_rtx_copies_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'srdeploy[tensorrt-rtx]'")
    onnx.save(dense(5), tmp_path / "dense.onnx")
    profile = ShapeProfile((1, 3, 8, 8), (1, 3, 16, 16), (1, 3, 32, 32))
    options = BuildOptions(profiles=(profile,), compute_capabilities=("8.9",), use_cache=False)

    def copies(name: str) -> tuple[int, int]:
        built = build_engine(tmp_path / "dense.onnx", tmp_path / name, engine="tensorrt-rtx", options=options)
        details = built.manifest.details["built"]
        kernels = details["operations"].items()
        return details["concatenations_chained"], sum(n for kind, n in kernels if kind.startswith("runtime_function"))

    chained = copies("chained")
    monkeypatch.setitem(EVERYWHERE, "concatenations_chained", lambda model: (model, 0))
    plain = copies("plain")

    # The join with the three-channel input, which is not in the layout of the features, stays a copy.
    assert chained == (3, 1)
    assert plain == (0, 4)
