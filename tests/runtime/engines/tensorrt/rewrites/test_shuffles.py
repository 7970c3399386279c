"""Convolutions before pixel shuffles: the same values, borders included, and fewer maps to move."""

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
from srdeploy.runtime.engines.tensorrt.rewrites.rewrite import AHEAD_OF_TIME
from srdeploy.runtime.engines.tensorrt.rewrites.shuffles import convolve_before_shuffles


def upscaler(
    factor: int, *, size: int = 3, mode: str = "CRD", between: bool = False, outputs: int = 2, twice: bool = False
) -> onnx.ModelProto:
    """A convolution to more maps, a pixel shuffle, perhaps an activation, and a convolution to a few."""
    random = np.random.default_rng(0)
    features = 48
    shapes = {"widen": (features * factor**2, 3, 3, 3), "last": (outputs, features, size, size)}
    weights = []
    for name, shape in shapes.items():
        weights.append(numpy_helper.from_array(random.standard_normal(shape).astype(np.float32) / 9, f"{name}.w"))
        weights.append(numpy_helper.from_array(random.standard_normal(shape[0]).astype(np.float32), f"{name}.b"))
    shuffled = "relu" if between else "shuffled"
    pads = [size // 2] * 4
    nodes = [
        helper.make_node("Conv", ["input", "widen.w", "widen.b"], ["wide"], name="widen", pads=[1] * 4),
        helper.make_node("DepthToSpace", ["wide"], ["shuffled"], name="shuffle", blocksize=factor, mode=mode),
        *([helper.make_node("Relu", ["shuffled"], ["relu"], name="relu")] if between else []),
        helper.make_node("Conv", [shuffled, "last.w", "last.b"], ["output"], name="last", pads=pads),
    ]
    results = [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", outputs, "H", "W"])]
    if twice:
        results.append(helper.make_tensor_value_info("shuffled", TensorProto.FLOAT, ["n", features, "H", "W"]))
    graph = helper.make_graph(
        nodes,
        "upscaler",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        results,
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("mode", ["CRD", "DCR"])
@pytest.mark.parametrize(("factor", "size"), [(2, 3), (3, 3), (4, 3), (2, 5), (3, 9), (2, 1)])
def test_the_values_stay(factor: int, size: int, mode: str, shape: tuple[int, ...]) -> None:
    model = upscaler(factor, size=size, mode=mode)
    image = np.random.default_rng(1).random(shape, dtype=np.float32)

    rewritten, changed = convolve_before_shuffles(model)

    onnx.checker.check_model(rewritten)
    assert changed == 1
    assert [node.name for node in rewritten.graph.node] == ["widen", "last", "shuffle"]
    before, after = (ReferenceEvaluator(graph).run(None, {"input": image})[0] for graph in (model, rewritten))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [{"between": True}, {"outputs": 16}, {"twice": True}],
    ids=["activation-between", "many-outputs", "shuffled-maps-read-twice"],
)
def test_other_convolutions_are_left_alone(other: dict) -> None:
    model = upscaler(2, **other)

    assert convolve_before_shuffles(model) == (model, 0)


def test_tensorrt_rtx_needs_a_kernel_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'srdeploy[tensorrt-rtx]'")
    model = upscaler(2, outputs=3)
    contract = ModelContract("rcan", {}, 2, "rgb", Precision.FP32, 2, 1.0, 192, "0" * 64)
    helper.set_model_props(model, contract.to_metadata())
    onnx.save(model, tmp_path / "shuffle.onnx")
    profile = ShapeProfile((1, 3, 16, 16), (1, 3, 64, 64), (1, 3, 128, 128))
    options = BuildOptions(profiles=(profile,), compute_capabilities=("8.9",), use_cache=False)

    def built(name: str) -> tuple[int, int]:
        details = build_engine(
            tmp_path / "shuffle.onnx", tmp_path / name, engine="tensorrt-rtx", options=options
        ).manifest.details["built"]
        return details["kernels"], details["activation_bytes"]

    kernels, activations = built("before")
    monkeypatch.delitem(AHEAD_OF_TIME, "convolutions_before_shuffles")
    plain_kernels, plain_activations = built("plain")

    assert plain_kernels == kernels + 1
    assert plain_activations > activations
