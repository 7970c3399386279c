"""Gates as weighted sums over rows: the same values, as many kernels for every profile, nothing else touched."""

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
from srdeploy.runtime.engines.tensorrt.rewrites.gates import weight_rows
from srdeploy.runtime.engines.tensorrt.rewrites.rewrite import AHEAD_OF_TIME

CHANNELS = 64
SMALL = ShapeProfile((1, 3, 16, 16), (1, 3, 128, 128), (4, 3, 256, 256))
LARGE = ShapeProfile((1, 3, 16, 16), (1, 3, 256, 256), (1, 3, 512, 512))


def attention(
    blocks: int = 1, *, axes: tuple[int, ...] = (2, 3), kernel: int = 1, pooled: str = "ReduceMean", hidden: int = 4
) -> onnx.ModelProto:
    """Residual blocks with channel attention, x1: means in FP32, all else in FP16, as our FP16 graphs have it."""
    random = np.random.default_rng(0)
    weights: list[onnx.TensorProto] = [numpy_helper.from_array(np.array(axes, np.int64), "axes")]
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def convolution(source: str, name: str, shape: tuple[int, ...]) -> str:
        values = (random.standard_normal(shape) * 0.05).astype(np.float16)
        weights.append(numpy_helper.from_array(values, name + ".w"))
        weights.append(numpy_helper.from_array(values[:, 0, 0, 0].copy(), name + ".b"))
        return add("Conv", [source, name + ".w", name + ".b"], name, pads=[shape[2] // 2] * 4)

    maps = convolution(add("Cast", ["input"], "half", to=TensorProto.FLOAT16), "first", (CHANNELS, 3, 3, 3))
    for index in range(blocks):
        body = add("Relu", [convolution(maps, f"conv{index}", (CHANNELS, CHANNELS, 3, 3))], f"active{index}")
        body = convolution(body, f"body{index}", (CHANNELS, CHANNELS, 3, 3))
        wide = add("Cast", [body], f"wide{index}", to=TensorProto.FLOAT)
        mean = add(pooled, [wide, "axes"] if pooled == "ReduceMean" else [wide], f"mean{index}")
        narrow = add("Cast", [mean], f"narrow{index}", to=TensorProto.FLOAT16)
        squeezed = convolution(narrow, f"squeeze{index}", (hidden, CHANNELS, kernel, kernel))
        squeezed = add("Relu", [squeezed], f"relu{index}")
        gate = add("Sigmoid", [convolution(squeezed, f"expand{index}", (CHANNELS, hidden, 1, 1))], f"gate{index}")
        maps = add("Add", [maps, add("Mul", [body, gate], f"gated{index}")], f"block{index}")
    last = convolution(maps, "last", (3, CHANNELS, 3, 3))
    add("Cast", [last], "output", to=TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("pooled", ["ReduceMean", "GlobalAveragePool"])
def test_the_values_stay(pooled: str, shape: tuple[int, ...]) -> None:
    model = attention(2, pooled=pooled)
    image = np.random.default_rng(1).random(shape, dtype=np.float32)

    rewritten, changed = weight_rows(model)

    onnx.checker.check_model(rewritten)
    assert changed == 2
    assert [node.op_type for node in rewritten.graph.node if node.name == "squeeze0"] == ["Mul"]
    assert not {"mean0", "narrow0"} & {name for node in rewritten.graph.node for name in node.output}
    (expected,), (found,) = (ReferenceEvaluator(m).run(None, {"input": image}) for m in (model, rewritten))
    np.testing.assert_allclose(found, expected, atol=2e-3)  # FP16 sums in another order


@pytest.mark.parametrize(
    "other",
    [{"axes": (2,)}, {"kernel": 3}, {"pooled": "Relu"}, {"hidden": 17}],
    ids=["mean-of-columns", "3x3", "not-pooled", "many-hidden-values"],
)
def test_other_convolutions_are_left_alone(other: dict) -> None:
    model = attention(**other)

    rewritten, changed = weight_rows(model)

    assert changed == 0
    assert rewritten is model


def test_older_operator_sets_are_left_alone() -> None:
    model = attention()
    model.opset_import[0].version = 17  # the axes of a mean are an attribute there

    assert weight_rows(model) == (model, 0)


def test_tensorrt_rtx_builds_as_many_kernels_for_every_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'srdeploy[tensorrt-rtx]'")

    def kernels(blocks: int, profile: ShapeProfile) -> int:
        model = attention(blocks)
        contract = ModelContract("rcan", {}, 1, "rgb", Precision.FP16, None, 1.0, CHANNELS, "0" * 64)
        helper.set_model_props(model, contract.to_metadata())
        onnx.save(model, tmp_path / "gates.onnx")
        options = BuildOptions(profiles=(profile,), compute_capabilities=("8.9",), use_cache=False)
        result = build_engine(
            tmp_path / "gates.onnx", tmp_path / "engine", engine="tensorrt-rtx", options=options, force=True
        )
        assert result.manifest.details["precision"]["built"] == "fp16"
        return int(result.manifest.details["built"]["kernels"])

    both = kernels(2, SMALL)
    # Per block: two convolutions, two sums, the rest of the gate.
    assert both - kernels(1, SMALL) == 5
    assert kernels(2, LARGE) == both

    monkeypatch.delitem(AHEAD_OF_TIME, "pooled_maps_multiplied")

    # Two convolutions, the mean, the cast of the mean, the 1x1 convolution, the rest; for large images also a counter.
    assert [kernels(2, SMALL), kernels(2, LARGE)] == [both + 2, both + 4]
