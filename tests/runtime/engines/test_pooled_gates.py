"""1x1 convolutions of pooled maps as matrix products: the same values, fewer kernels, nothing else touched."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from srdeploy.core.precision import Precision
from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines import BuildOptions, build_engine
from srdeploy.runtime.engines.pooled_gates import multiply_pooled_maps

CHANNELS = 64


def attention(*, axes: tuple[int, ...] = (2, 3), kernel: int = 1, pooled: str = "ReduceMean") -> onnx.ModelProto:
    """A residual block with channel attention, x1: mean in FP32, all else in FP16, as our FP16 graphs have it."""
    random = np.random.default_rng(0)
    weights: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def add(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def convolution(source: str, name: str, shape: tuple[int, ...]) -> str:
        values = (random.standard_normal(shape) * 0.05).astype(np.float16)
        weights.append(numpy_helper.from_array(values, name + ".w"))
        weights.append(numpy_helper.from_array(values[:, 0, 0, 0].copy(), name + ".b"))
        return add("Conv", [source, name + ".w", name + ".b"], name, pads=[shape[2] // 2] * 4)

    first = convolution(add("Cast", ["input"], "half", to=TensorProto.FLOAT16), "first", (CHANNELS, 3, 3, 3))
    body = convolution(first, "body", (CHANNELS, CHANNELS, 3, 3))
    wide = add("Cast", [body], "wide", to=TensorProto.FLOAT)
    if pooled == "ReduceMean":
        weights.append(numpy_helper.from_array(np.array(axes, np.int64), "axes"))
        mean = add("ReduceMean", [wide, "axes"], "mean", keepdims=1)
    else:
        mean = add(pooled, [wide], "mean")
    narrow = add("Cast", [mean], "narrow", to=TensorProto.FLOAT16)
    squeezed = add("Relu", [convolution(narrow, "squeeze", (4, CHANNELS, kernel, kernel))], "relu")
    gate = add("Sigmoid", [convolution(squeezed, "expand", (CHANNELS, 4, 1, 1))], "gate")
    block = add("Add", [first, add("Mul", [body, gate], "gated")], "block")
    last = convolution(block, "last", (3, CHANNELS, 3, 3))
    add("Cast", [last], "output", to=TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


@pytest.mark.parametrize("pooled", ["ReduceMean", "GlobalAveragePool"])
def test_the_values_stay(pooled: str) -> None:
    model = attention(pooled=pooled)
    image = np.random.default_rng(1).random((2, 3, 5, 7), dtype=np.float32)

    rewritten, changed = multiply_pooled_maps(model)

    onnx.checker.check_model(rewritten)
    assert changed == 1
    assert [node.op_type for node in rewritten.graph.node if node.name == "squeeze"] == ["Gemm"]
    (expected,), (found,) = (ReferenceEvaluator(m).run(None, {"input": image}) for m in (model, rewritten))
    np.testing.assert_allclose(found, expected, atol=2e-3)  # FP16 sums in another order


@pytest.mark.parametrize("other", [{"axes": (2,)}, {"kernel": 3}, {"pooled": "Relu"}], ids=str)
def test_other_convolutions_are_left_alone(other: dict) -> None:
    model = attention(**other)

    rewritten, changed = multiply_pooled_maps(model)

    assert changed == 0
    assert rewritten == model


def test_tensorrt_rtx_needs_a_kernel_less_and_proves_the_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'srdeploy[tensorrt-rtx]'")
    from srdeploy.core.contract import ModelContract
    from srdeploy.runtime.engines.tensorrt import build as tensorrt_build

    model = attention()
    contract = ModelContract(
        architecture="rcan",
        configuration={"note": "one gate, random weights"},
        scale=1,
        colours="rgb",
        precision=Precision.FP16,
        receptive_radius=None,
        macs_per_pixel=CHANNELS * 54 + CHANNELS**2 * 9,
        largest_tensor_per_pixel=CHANNELS,
        checkpoint_sha256="0" * 64,
    )
    helper.set_model_props(model, contract.to_metadata())
    onnx.save(model, tmp_path / "gate.onnx")
    profile = ShapeProfile((1, 3, 16, 16), (1, 3, 128, 128), (4, 3, 256, 256))
    options = BuildOptions(profiles=(profile,), compute_capabilities=("8.9",), use_cache=False)

    def kernels(name: str) -> int:
        details = build_engine(
            tmp_path / "gate.onnx", tmp_path / name, engine="tensorrt-rtx", options=options
        ).manifest.details
        assert details["precision"]["built"] == "fp16"
        return int(details["built"]["kernels"])

    products = kernels("products")
    monkeypatch.setattr(tensorrt_build, "multiply_pooled_maps", lambda model: (model, 0))

    assert kernels("plain") == products + 1
