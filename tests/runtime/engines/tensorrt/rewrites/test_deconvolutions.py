"""Deconvolutions with their biases apart, and in place of 1x1 convolutions of joined maps: the same values."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from srdeploy.core.contract import ModelContract
from srdeploy.core.precision import Precision
from srdeploy.core.shapes import ShapeProfile
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine
from srdeploy.runtime.engines.tensorrt.rewrites.deconvolutions import add_biases_apart, deconvolve_joined_maps
from srdeploy.runtime.engines.tensorrt.rewrites.rewrite import AHEAD_OF_TIME


def network(kernel: int = 1, dtype: int = TensorProto.FLOAT, *, bias: bool = True) -> onnx.ModelProto:
    """The end of SRDenseNet x4: joined maps, a bottleneck, two deconvolutions, and a last convolution without ReLU."""
    random = np.random.default_rng(0)
    shapes = {"a": (128, 1, 3, 3), "b": (128, 128, 3, 3), "narrow": (256, 256, kernel, kernel)}
    shapes |= {"up": (256, 64, 3, 3), "again": (64, 64, 3, 3), "last": (1, 64, 3, 3)}
    nodes, weights = [], []

    def layer(op: str, source: str, name: str, *, relu: bool = True, **attributes: object) -> str:
        values = random.standard_normal(shapes[name]).astype(np.float32) / np.sqrt(np.prod(shapes[name][1:]))
        tensors = [values, random.standard_normal(shapes[name][op == "ConvTranspose"]).astype(np.float32)]
        inputs = [f"{name}.w", f"{name}.b"][: 2 if bias else 1]
        for full, tensor in zip(inputs, tensors, strict=False):
            weights.append(helper.make_tensor(full, dtype, tensor.shape, tensor.ravel()))
        nodes.append(helper.make_node(op, [source, *inputs], [name], name=name, **attributes))
        if relu:
            nodes.append(helper.make_node("Relu", [name], [f"{name}.relu"], name=f"{name}.relu"))
        return f"{name}.relu" if relu else name

    a = layer("Conv", "image", "a", pads=[1] * 4)
    b = layer("Conv", a, "b", pads=[1] * 4)
    nodes.append(helper.make_node("Concat", [a, b], ["joined"], name="joined", axis=1))
    maps = layer("Conv", "joined", "narrow", pads=[kernel // 2] * 4)
    for name in ("up", "again"):
        maps = layer("ConvTranspose", maps, name, pads=[1] * 4, strides=[2, 2], output_padding=[1, 1])
    last = layer("Conv", maps, "last", relu=False, pads=[1] * 4)
    nodes.insert(0, helper.make_node("Cast", ["input"], ["image"], name="in", to=dtype))
    nodes.append(helper.make_node("Cast", [last], ["output"], name="out", to=TensorProto.FLOAT))
    graph = helper.make_graph(
        nodes,
        "dense",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", 1, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", 1, "H", "W"])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (1, 1, 1, 1)], ids=str)
def test_the_values_stay(shape: tuple[int, ...]) -> None:
    model = network()
    image = np.random.default_rng(1).random(shape, dtype=np.float32)

    joined, deconvolutions = deconvolve_joined_maps(model)
    rewritten, biases = add_biases_apart(joined)

    onnx.checker.check_model(rewritten)
    assert (deconvolutions, biases) == (1, 3)
    layers = {node.name: node for node in rewritten.graph.node}
    assert [layers[name].op_type for name in ("narrow", "up", "again", "last")] == ["ConvTranspose"] * 3 + ["Conv"]
    assert [len(layers[name].input) for name in ("narrow", "up", "again", "last")] == [2, 2, 2, 3]
    before, after = (ReferenceEvaluator(graph).run(None, {"input": image})[0] for graph in (model, rewritten))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "other", [{"kernel": 3}, {"dtype": TensorProto.BFLOAT16}], ids=["3x3", "no-bfloat16-deconvolution"]
)
def test_other_convolutions_are_left_alone(other: dict) -> None:
    model = network(**other)

    assert deconvolve_joined_maps(model) == (model, 0)


def test_without_a_bias_there_is_nothing_to_add() -> None:
    model = network(bias=False)

    assert add_biases_apart(model) == (model, 0)


def test_tensorrt_rtx_reads_the_largest_maps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'srdeploy[tensorrt-rtx]'")
    model = network(dtype=TensorProto.FLOAT16)
    contract = ModelContract("srdensenet", {}, 4, "y", Precision.FP16, 5, 1.0, 1024, "0" * 64)
    helper.set_model_props(model, contract.to_metadata())
    onnx.save(model, tmp_path / "dense.onnx")
    profile = ShapeProfile((1, 1, 16, 16), (1, 1, 64, 64), (1, 1, 128, 128))
    options = BuildOptions(profiles=(profile,), compute_capabilities=("8.9",), use_cache=False)

    def built(name: str) -> tuple[int, int]:
        manifest = build_engine(
            tmp_path / "dense.onnx", tmp_path / name, engine="tensorrt-rtx", options=options
        ).manifest
        assert manifest.details["precision"]["built"] == "fp16"
        return manifest.details["built"]["kernels"], manifest.details["built"]["activation_bytes"]

    kernels, activations = built("rewritten")
    # Six layers, two casts, and a function of the CPU that computes shapes: not one kernel more than the graph needs.
    assert kernels == 9

    monkeypatch.delitem(AHEAD_OF_TIME, "joined_maps_deconvolved")
    monkeypatch.delitem(AHEAD_OF_TIME, "biases_added_apart")
    plain_kernels, plain_activations = built("plain")

    # A copy of the joined maps, and the bias and activation of the last deconvolution.
    assert plain_kernels == kernels + 2
    assert plain_activations > 1.4 * activations
