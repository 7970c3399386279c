"""Passes over the images are shared by all graphs of one network, and change nothing about them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from srdeploy.calibration import measurements
from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.int8.rounding import collect_covariances, scale_covariances
from srdeploy.calibration.measurements import Measurements
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.quantize import quantize
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.precision import Precision, Target
from srdeploy.core.runner import Runner
from srdeploy.core.samples import windows_of

TARGETS = (Target.ONNXRUNTIME, Target.OPENVINO)  # in this order the second reads more layers


def open_with(engine: str, path: Path) -> Runner:
    from srdeploy.runtime.engines.registry import open_engine

    return open_engine(path, engine=engine, threads=1, parity=True)


def test_one_pass_serves_two_targets_and_changes_no_graph(
    network_paths: dict[str, Path],
    calibrations: dict[str, CalibrationSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[int] = []
    covariances: list[int] = []
    references: list[object] = []
    original = measurements.observe
    session = measurements.cpu_session
    monkeypatch.setattr(
        measurements, "cpu_session", lambda *args, **kwargs: references.append(args) or session(*args, **kwargs)
    )

    def counted(graph: Graph, tensors: list[str], *args: object, **kwargs: object) -> object:
        passes.append(len(tensors))
        return original(graph, tensors, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("srdeploy.calibration.measurements.observe", counted)

    collect = measurements.collect_covariances
    monkeypatch.setattr(
        measurements,
        "collect_covariances",
        lambda graph, layers, *args, **kwargs: (
            covariances.append(len(layers)) or collect(graph, layers, *args, **kwargs)
        ),
    )

    def run(target: Target, name: str, shared: Measurements | None) -> onnx.GraphProto:
        output = tmp_path / f"{name}.{target.value}.onnx"
        quantize(
            network_paths["residual"],
            output,
            precision=Precision.INT8,
            target=target,
            calibration=calibrations["residual"],
            options=QuantizeOptions(strength=0.5, method="mse"),
            open_engine=partial(open_with, target.value),
            shared=shared,
        )
        return onnx.load(output).graph

    shared = Measurements(TARGETS)
    together = [run(target, "together", shared) for target in TARGETS]
    assert (len(passes), len(covariances)) == (1, 1)
    assert len(references) == 2, "the FP32 graph on the windows to compare ways on, and on the held-out images"
    alone = [run(target, "alone", None) for target in TARGETS]

    assert (len(passes), len(references)) == (3, 6)
    for one, other in zip(together, alone, strict=True):
        assert [node.name for node in one.node] == [node.name for node in other.node]
        scales = [
            {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("_scale")}
            for graph in (one, other)
        ]
        assert scales[0].keys() == scales[1].keys()
        for name, scale in scales[0].items():  # graphs of two targets fuse differently, so sums round differently
            np.testing.assert_allclose(scale, scales[1][name], rtol=1e-4, err_msg=name)


def test_covariances_of_scaled_channels_follow(
    networks: dict[str, Callable[..., onnx.ModelProto]], calibrations: dict[str, CalibrationSet]
) -> None:
    graph = Graph(networks["residual"]())
    layer = next(entry for entry in graph.layers if entry.role == "trunk")
    batches = [sample.image for sample in windows_of(calibrations["residual"].samples, 3)]
    factors = np.linspace(-2, 3, layer.channels_in)

    (_, plain), = collect_covariances(graph, [layer], batches)  # fmt: skip
    (scaled,) = scale_covariances(plain, factors)

    channel, tap = 2, 4
    row = channel * 9 + tap
    assert scaled[row, row] == pytest.approx(plain[0][row, row] * factors[channel] ** 2, rel=1e-6)
    assert scaled[row, 0] == pytest.approx(plain[0][row, 0] * factors[channel] * factors[0], rel=1e-6)
