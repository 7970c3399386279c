"""What the kernels of CPU engines take, and which layers of the ONNX file they compute."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from srdeploy.calibration.search.layer_times import charge
from srdeploy.core.errors import UsageError
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.runner import ProfiledRunner
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine, open_engine

GraphFactory = Callable[..., Path]
IMAGE = {"input": np.random.default_rng(0).random((1, 3, 64, 80), dtype=np.float32)}


@pytest.mark.parametrize("quantized", [False, "both"], ids=["fp32", "int8"])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_time_of_kernels_belongs_to_the_layers(
    engine: str, quantized: str | bool, small_onnx: GraphFactory
) -> None:
    graph = read_graph(small_onnx(quantized=quantized, features=32))
    names = {layer.node: layer.name for layer in graph.layers}

    with open_engine(graph.path, engine=engine, threads=1, parity=True) as runner:
        assert isinstance(runner, ProfiledRunner)
        kernels = runner.kernel_times(IMAGE)
    by_layer = charge(kernels, graph.model, names)

    total = sum(kernel.ms for kernel in kernels)
    assert set(by_layer) == set(names.values())
    assert min(by_layer.values()) > 0
    assert 0.7 * total < sum(by_layer.values()) <= total * 1.0001  # what follows the last layer belongs to none


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_that_lost_the_names_of_the_nodes_is_not_profiled(
    engine: str, small_onnx: GraphFactory, tmp_path: Path
) -> None:
    build_engine(small_onnx(), tmp_path / "engine", engine=engine, options=BuildOptions(use_cache=False))

    with open_engine(tmp_path / "engine", threads=1) as built, pytest.raises(UsageError, match="cannot be profiled"):
        built.kernel_times(IMAGE)  # type: ignore[attr-defined]
