"""FP32 networks run on the CPU with their linear end as one convolution; nothing else about them changes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from srdeploy.core.onnx_file import read_graph
from srdeploy.core.runner import run_image
from srdeploy.core.tail import NAME
from srdeploy.runtime.engines import openvino
from srdeploy.runtime.engines.merged_end import merge_end
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine, open_engine

GraphFactory = Callable[..., Path]


def with_longer_end(path: Path) -> Path:
    """Let a graph of 16 features end as RCAN does: convolution, pixel shuffle, convolution."""
    model = onnx.load(path)
    after = next(node for node in model.graph.node if "up" in node.input)
    random = np.random.default_rng(5)
    for name, shape in (("w_tail", (64, 16, 3, 3)), ("w_last", (3, 16, 3, 3))):
        for tensor in [tensor for tensor in model.graph.initializer if tensor.name == name]:
            model.graph.initializer.remove(tensor)
        model.graph.initializer.append(numpy_helper.from_array(random.normal(0, 0.1, shape).astype(np.float32), name))
    last = helper.make_node("Conv", ["up", "w_last"], list(after.output), name="node_last", pads=[1] * 4)
    model.graph.node.remove(after)
    model.graph.node.append(last)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_fp32_engine_runs_the_end_as_one_convolution(engine: str, small_onnx: GraphFactory, tmp_path: Path) -> None:
    path = with_longer_end(small_onnx())
    image = np.random.default_rng(0).random((2, 3, 9, 7), dtype=np.float32)
    build_engine(path, tmp_path / "engine", engine=engine, options=BuildOptions(use_cache=False))

    with (
        open_engine(path, engine=engine, threads=1) as opened,
        open_engine(tmp_path / "engine", threads=1) as built,
        open_engine(path, engine=engine, threads=1, outputs=["up", "output"]) as as_written,
    ):
        expected = as_written.run({"input": image})

        assert opened.info.built["merged_layers"] == built.info.built["merged_layers"] == ["w_tail", "w_last"]
        assert expected["up"].shape == (2, 16, 18, 14)  # inner tensors of the end can still be looked at
        # Sums of some hundred float32 products of size one, in another order.
        np.testing.assert_allclose(run_image(opened, image), expected["output"], atol=1e-5)
        np.testing.assert_allclose(run_image(built, image), expected["output"], atol=1e-5)


def test_a_baseline_of_openvino_alone_runs_the_graph_as_it_is(small_onnx: GraphFactory) -> None:
    graph = read_graph(with_longer_end(small_onnx()))

    with openvino.open_native(graph, threads=1) as runner:
        assert runner.info.built["merged_layers"] == []


@pytest.mark.parametrize("change", [{"dtype": "float16"}, {"quantized": "inputs"}, {"upsampler": "deconvolution"}])
def test_graphs_that_round_or_end_otherwise_are_unchanged(change: dict[str, str], small_onnx: GraphFactory) -> None:
    path = small_onnx(**change)
    graph = read_graph(path if "upsampler" in change else with_longer_end(path))

    unchanged, names = merge_end(graph)

    assert names == ()
    assert unchanged is graph
    assert NAME not in {layer.name for layer in unchanged.layers}
