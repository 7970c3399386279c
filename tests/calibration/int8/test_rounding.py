"""Weights rounded together: less error on what a layer reads, codes that fit, the same every time."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.int8.arithmetic import WEIGHT_TOPS, quantize_weights, weight_scales
from srdeploy.calibration.int8.builder import Decisions, GraphBuilder
from srdeploy.calibration.int8.placement import RECIPES
from srdeploy.calibration.int8.rounding import collect_covariances, round_with_compensation
from srdeploy.calibration.observe import run_outputs
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.precision import Precision, Target

Networks = dict[str, Callable[..., onnx.ModelProto]]


def smooth_windows(channels: int, count: int = 4000) -> NDArray[np.float64]:
    """Return windows (count, channels * 9) of which each is nearly constant, as windows of feature maps are."""
    random = np.random.default_rng(0)
    level = random.normal(size=(count, channels, 1))
    return (level + 0.1 * random.normal(size=(count, channels, 9))).reshape(count, -1)


@pytest.mark.parametrize("bits", [8, 7])
def test_errors_cancel_on_what_the_layer_reads(bits: int) -> None:
    random = np.random.default_rng(1)
    weights = random.normal(size=(6, 4, 3, 3)).astype(np.float32)
    windows = smooth_windows(4)
    covariance = np.cov(windows.T, bias=True)
    scales, top = weight_scales(weights, 0, bits), WEIGHT_TOPS[bits]

    codes, steps = round_with_compensation(weights, scales, [covariance], top)

    nearest = quantize_weights(weights, scales, 0)
    errors = [
        ((q * s.reshape(-1, 1, 1, 1) - weights).reshape(6, -1) @ windows.T).var(axis=1)
        for q, s in ((nearest, scales), (codes, steps))
    ]
    assert codes.dtype == np.int8
    assert np.abs(codes.astype(int)).max() <= top
    assert (steps <= scales).all()
    assert errors[1].mean() < 0.5 * errors[0].mean()  # 3 dB; each to nearest gains nothing from smooth windows


def test_weights_that_nothing_connects_are_as_near_as_the_nearest() -> None:
    weights = np.random.default_rng(2).normal(size=(5, 3, 1, 1)).astype(np.float32)
    scales = weight_scales(weights, 0)

    codes, steps = round_with_compensation(weights, scales, [np.eye(3)], 127)

    nearest = quantize_weights(weights, scales, 0) * scales.reshape(-1, 1, 1, 1) - weights
    found = codes * steps.reshape(-1, 1, 1, 1) - weights
    assert ((found**2).sum(axis=(1, 2, 3)) <= (nearest**2).sum(axis=(1, 2, 3)) + 1e-12).all()


def test_many_channels_are_rounded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.random.default_rng(5).normal(size=(3, 4, 3, 3)).astype(np.float32)
    covariance = np.cov(smooth_windows(4).T, bias=True)
    halves = [covariance[:18, :18], covariance[18:, 18:]]

    codes, steps = round_with_compensation(weights, weight_scales(weights, 0), halves, 127)

    first, second = (
        round_with_compensation(
            np.ascontiguousarray(weights[:, part]), steps, [half], 127, lambda s: np.tile(s[:3], 4)
        )[0]
        for part, half in zip((slice(0, 2), slice(2, 4)), halves, strict=True)
    )
    np.testing.assert_array_equal(codes, np.concatenate([first, second], axis=1))


def test_scales_are_those_that_the_graph_can_hold() -> None:
    weights = np.random.default_rng(3).normal(size=(5, 3, 3, 3)).astype(np.float32)
    half: Callable[[NDArray[np.float32]], NDArray[np.float32]] = lambda s: s.astype(np.float16).astype(np.float32)  # noqa: E731

    _, steps = round_with_compensation(weights, half(weight_scales(weights, 0)), [np.eye(27)], 127, half)

    np.testing.assert_array_equal(steps, half(steps))


def test_a_layer_that_reads_nothing_but_zeros_is_rounded_all_the_same() -> None:
    weights = np.random.default_rng(4).normal(size=(2, 2, 3, 3)).astype(np.float32)

    codes, _ = round_with_compensation(weights, weight_scales(weights, 0), [np.zeros((18, 18))], 127)

    assert np.abs(codes.astype(int)).max() == 127


def test_covariances_are_those_of_the_windows(networks: Networks, calibrations: dict[str, CalibrationSet]) -> None:
    graph = Graph(networks["residual"]())
    layer = next(layer for layer in graph.layers if layer.name == "body.0.2")
    batches = list(calibrations["residual"])[:4]

    ((found, (covariance,)),) = collect_covariances(graph, [layer], batches)

    # 16x16 maps have 14x14 windows, fewer than are taken: all of them are seen once.
    windows = []
    for entry in run_outputs(graph.model, [layer.input], batches):
        values = np.lib.stride_tricks.sliding_window_view(entry[layer.input][0], (3, 3), axis=(1, 2))
        windows.append(values.transpose(1, 2, 0, 3, 4).reshape(-1, layer.channels_in * 9))
    expected = np.cov(np.concatenate(windows).T, bias=True)
    assert found is layer
    np.testing.assert_allclose(covariance, expected, atol=1e-5 * np.abs(expected).max())


def test_networks_and_layers_in_parts_give_parts_of_the_whole(
    networks: Networks, calibrations: dict[str, CalibrationSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = Graph(networks["dense"]())
    layers = [layer for layer in graph.layers if graph.is_plain_convolution(layer)]
    batches = [batch[:, :, :8, :8] for batch in list(calibrations["dense"])[:2]]  # all windows of these are taken
    whole = {layer.name: found for layer, found in collect_covariances(graph, layers, batches)}

    monkeypatch.setattr("srdeploy.calibration.int8.rounding.MOMENTS_BYTES", 1)
    monkeypatch.setattr("srdeploy.calibration.int8.rounding.LARGEST", 9 * 20)
    parts = {layer.name: found for layer, found in collect_covariances(graph, layers, batches)}

    assert parts.keys() == whole.keys() == {layer.name for layer in layers}
    assert "deconv" not in whole
    assert [len(part) for part in parts["blocks.1.1"]] == [9 * 20, 9 * 20]
    for name, found in parts.items():
        (expected,), start = whole[name], 0
        for part in found:
            here = slice(start, start := start + len(part))
            np.testing.assert_allclose(part, expected[here, here], atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("target", [Target.OPENVINO, Target.TENSORRT])
def test_a_graph_of_cancelling_errors_is_as_good_as_another_and_the_same_again(
    target: Target, networks: Networks, calibrations: dict[str, CalibrationSet]
) -> None:
    calibration = calibrations["residual"]
    model, recipe = networks["residual"](), replace(RECIPES[target], weight_bits=7)
    batches = [sample.image for sample in calibration.held_out[:2]]
    truth = [entry["output"] for entry in run_outputs(model, ["output"], batches)]

    def error(compensate: bool) -> tuple[bytes, float]:
        builder = GraphBuilder(model, recipe, Precision.INT8, calibration)
        graph, _ = builder.build(Decisions(compensate=compensate))
        found = run_outputs(graph, ["output"], batches)
        power = [float(((f["output"] - t) ** 2).mean()) for f, t in zip(found, truth, strict=True)]
        return graph.SerializeToString(), sum(power)

    nearest, cancelling, again = error(False), error(True), error(True)

    assert cancelling[1] < nearest[1]
    assert cancelling[0] == again[0]
