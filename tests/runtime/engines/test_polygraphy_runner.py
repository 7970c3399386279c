"""Runners of srdeploy in Polygraphy's Comparator, next to Polygraphy's own ONNX Runtime runner."""

import runpy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from srdeploy.core.onnx_file import read_graph
from srdeploy.runtime.engines.literal import LiteralRunner
from srdeploy.runtime.engines.polygraphy_runner import polygraphy_runner
from srdeploy.runtime.engines.registry import open_engine

pytest.importorskip("polygraphy", reason="Polygraphy is not installed: pip install 'srdeploy[gpu]'")

GraphFactory = Callable[..., Path]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    from polygraphy.logger import G_LOGGER

    with G_LOGGER.verbosity():
        yield


def image(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).random(shape, dtype=np.float32)


def test_the_comparator_puts_our_engines_next_to_its_own(small_onnx: GraphFactory) -> None:
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, SimpleCompareFunc

    path, other = small_onnx(), small_onnx("other.onnx", seed=1)
    theirs = OnnxrtRunner(SessionFromOnnx(str(path), providers=["CPUExecutionProvider"]), name="polygraphy")
    ours = [polygraphy_runner(partial(open_engine, path, engine=name), name) for name in ("onnxruntime", "openvino")]
    wrong = polygraphy_runner(partial(open_engine, other), "other weights")
    feeds = [{"input": image(1, 3, 9, 12)}, {"input": image(2, 3, 4, 4)}]

    results = Comparator.run([theirs, *ours, wrong], data_loader=feeds)

    assert [name for name, _ in results.items()] == [
        "polygraphy",
        "onnxruntime",
        "openvino",
        "other weights",
    ]
    close = SimpleCompareFunc(atol=1e-4, rtol=1e-4)
    assert bool(Comparator.compare_accuracy(results, compare_func=close, comparisons=[(0, 1), (0, 2)]))
    assert not bool(Comparator.compare_accuracy(results, compare_func=close, comparisons=[(0, 3)]))
    for name, iterations in results.items():
        assert [iteration["output"].shape for iteration in iterations] == [(1, 3, 18, 24), (2, 3, 8, 8)], name


def test_our_literal_runner_returns_inner_tensors_to_polygraphy(small_onnx: GraphFactory) -> None:
    graph = read_graph(small_onnx())
    runner = polygraphy_runner(partial(LiteralRunner, graph, ["head", "output"]), "literal")

    for _ in range(2):  # a runner may be activated again
        with runner:
            assert list(runner.get_input_metadata(use_numpy_dtypes=False)) == ["input"]
            found = runner.infer({"input": image(1, 3, 6, 6)})

    assert found["head"].shape == (1, 16, 6, 6)


def test_the_example_runs(small_onnx: GraphFactory, capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[3] / "examples" / "polygraphy_compare.py"

    runpy.run_path(str(example))["main"](small_onnx())

    assert "onnxruntime against openvino: equal" in capsys.readouterr().out
