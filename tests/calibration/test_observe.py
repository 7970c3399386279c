"""Streaming statistics and the ranges that follow from them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from peak_memory import environment

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.int8.arithmetic import fake_quantize, params_for_range
from srdeploy.calibration.int8.ranges import METHODS, compute_range, read_ranges
from srdeploy.calibration.observe import CHANNEL_BINS, Observation, observe, observe_magnitudes, run_outputs
from srdeploy.core.errors import InputError, UsageError
from srdeploy.core.onnx_graph import Graph

Networks = dict[str, Callable[..., onnx.ModelProto]]


def observed(values: np.ndarray, chunks: int = 1) -> Observation:
    seen = Observation.empty(1)
    for part in np.array_split(values, chunks):
        seen.add(np.array([part.min()]), np.array([part.max()]), np.array([part.mean()]), part)
    return seen


def test_what_is_observed_is_what_flows(networks: Networks, calibrations: dict[str, CalibrationSet]) -> None:
    graph = Graph(networks["residual"]())
    tensors = [layer.input for layer in graph.layers if layer.role in ("trunk", "last")]
    batches = list(calibrations["residual"])

    seen = observe(graph, tensors, batches)

    truth = list(run_outputs(graph.model, tensors, batches))
    for tensor in tensors:
        arrays = [entry[tensor] for entry in truth]
        assert seen[tensor].range == pytest.approx(
            (min(a.min() for a in arrays), max(a.max() for a in arrays)), abs=1e-6
        )
        assert seen[tensor].mean == pytest.approx(np.mean([a.mean(axis=(0, 2, 3)) for a in arrays], axis=0), abs=1e-5)


def test_a_growing_histogram_loses_no_value() -> None:
    values = np.random.default_rng(0).normal(size=20000) * np.geomspace(1e-4, 30, 20000)
    values[::10] = 0.0

    seen = observed(values, chunks=13)

    assert seen.counts is not None
    limit = float(seen.limit[0])
    direct = np.histogram(values[values != 0], bins=CHANNEL_BINS, range=(-limit, limit))[0]
    assert seen.zeros == 2000
    assert seen.counts.sum() == values.size - 2000
    assert np.abs(np.cumsum(seen.counts) - np.cumsum(direct)).max() <= 25  # merged bins round at their edges


def test_a_histogram_of_scaled_channels_is_that_of_the_scaled_tensor() -> None:
    random = np.random.default_rng(1)
    values = np.maximum(random.normal(size=(1, 3, 60, 60)), 0) * np.array([1.0, 4.0, 0.1]).reshape(1, 3, 1, 1)
    factors = np.array([2.0, -0.5, 3.0])

    def observe_values(tensor: np.ndarray) -> Observation:
        seen = Observation.empty(3)
        seen.add(tensor.min(axis=(0, 2, 3)), tensor.max(axis=(0, 2, 3)), tensor.mean(axis=(0, 2, 3)), tensor)
        return seen

    followed, direct = observe_values(values).scaled(factors), observe_values(values * factors.reshape(1, 3, 1, 1))

    assert followed.range == pytest.approx(direct.range)
    assert followed.mean == pytest.approx(direct.mean)
    for position in (0.001, 0.1, 0.5, 0.9, 0.999):  # quantiles agree within a bin of the widest channel
        one, two = (
            float(centers[np.searchsorted(np.cumsum(counts) / counts.sum(), position)])
            for centers, counts in (followed.histogram(), direct.histogram())
        )
        assert one == pytest.approx(two, abs=2 * float(direct.limit.max()) / CHANNEL_BINS)


def test_magnitudes_are_those_of_the_tensors_or_bound_them(
    networks: Networks, calibrations: dict[str, CalibrationSet]
) -> None:
    graph = Graph(networks["residual"]())
    names = [name for node in graph.model.graph.node for name in node.output if graph.resolution.get(name, 0) > 0]
    batches = list(calibrations["residual"])[:3]

    largest = observe_magnitudes(graph, batches)

    truth = list(run_outputs(graph.model, names, batches))
    for name in names:
        expected = max(float(np.abs(entry[name]).max()) for entry in truth)
        if graph.producer[name].op_type in ("Conv", "Add"):
            assert largest[name] == pytest.approx(expected, rel=1e-5)
        assert largest[name] >= expected * (1 - 1e-5)


def test_an_activation_that_is_not_finite_names_its_layer(networks: Networks) -> None:
    model = networks["residual"]()
    weights = next(tensor for tensor in model.graph.initializer if tensor.name == "body.0.2.weight")
    broken = numpy_helper.to_array(weights).copy()
    broken[0] = np.nan
    weights.CopyFrom(numpy_helper.from_array(broken, weights.name))
    graph = Graph(model)
    tensors = [next(layer.output for layer in graph.layers if layer.name == "body.0.2")]

    with pytest.raises(InputError, match=r"body\.0\.2"):
        observe(graph, tensors, [np.full((1, 3, 8, 8), 0.5, np.float32)])


@pytest.mark.parametrize("kind", ["uint8", "int8"])
def test_clipping_for_least_error_beats_covering_outliers(kind: str) -> None:
    values = np.concatenate([np.random.default_rng(0).normal(0, 0.05, 1_000_000), [0.6, -0.6]])
    seen = observed(values)

    def error(method: str) -> float:
        low, high = compute_range(seen, method, kind)  # type: ignore[arg-type]
        return float(np.mean((values - fake_quantize(values, params_for_range(low, high, kind))) ** 2))  # type: ignore[arg-type]

    assert compute_range(seen, "minmax", kind) == pytest.approx((-0.6, 0.6))  # type: ignore[arg-type]
    assert error("mse") < 0.5 * error("minmax")
    assert error("mse") <= min(error(method) for method in METHODS) * 1.15


@pytest.mark.parametrize("method", METHODS)
def test_ranges_hold_zero_and_never_exceed_what_was_seen(method: str) -> None:
    seen = observed(np.random.default_rng(1).uniform(0.25, 2.0, 5000))

    low, high = compute_range(seen, method, "uint8")  # type: ignore[arg-type]

    assert low == 0.0
    assert 0.5 < high <= 2.0


def test_percentiles_leave_out_what_is_rarer_than_they_say() -> None:
    values = np.concatenate([np.linspace(0, 1, 1_000_000), [50.0]])

    low, high = compute_range(observed(values), "percentile", "uint8")

    assert low == 0.0
    assert high == pytest.approx(1.0, abs=0.02)


def test_ranges_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(
        '{"schema": 1, "model_sha256": "aa", "set_sha256": "bb", "method": "mse", "strength": 0.5,'
        ' "ranges": {"x": [0, 1]}, "channels": {}}'
    )

    ranges = read_ranges(path, model_sha256="aa")

    assert ranges.ranges["x"] == (0.0, 1.0)
    with pytest.raises(InputError, match="another|model"):
        read_ranges(path, model_sha256="cc")
    path.write_text("[1, 2]")
    with pytest.raises(InputError, match=r"not a ranges\.json"):
        read_ranges(path, model_sha256="aa")
    with pytest.raises(UsageError):
        read_ranges(tmp_path / "missing.json", model_sha256="aa")


_PEAK_OF_A_PASS = """
import numpy as np, onnx
from onnx import TensorProto, helper
from peak_memory import peak_kib
from srdeploy.calibration.observe import observe
from srdeploy.core.onnx_graph import Graph

names = ["input", *(f"map_{index}" for index in range(39)), "output"]
nodes = [helper.make_node("Sigmoid", [one], [two], name=two) for one, two in zip(names, names[1:])]
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 16, "h", "w"]) for name in ("input", "output")]
graph = helper.make_graph(nodes, "chain", values[:1], values[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
observe(Graph(model), names[1:], [np.zeros((1, 16, 8, 8), np.float32)], threads=1)
before = peak_kib()
observe(Graph(model), names[1:], [np.ones((1, 16, 256, 256), np.float32)], threads=1)
print(peak_kib() - before)
"""


def test_observed_tensors_are_freed_one_after_the_other() -> None:
    command = [sys.executable, "-c", _PEAK_OF_A_PASS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())

    # Forty maps of 4 MiB are alive together when their statistics run last; at least one is.
    assert 4 * 1024 < int(done.stdout) < 80 * 1024
