"""Edits that must not change the function: equalization, rewritten deconvolutions."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.int8.placement import RECIPES, place
from srdeploy.calibration.observe import Observation, observe, run_outputs
from srdeploy.calibration.rewrites.deconvolution import phase_kernel, rewrite_deconvolutions
from srdeploy.calibration.rewrites.equalize import ChannelClasses, equalize_channels
from srdeploy.calibration.rewrites.streams import add_reader_scales, fold_reader_scales
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.precision import Target

Networks = dict[str, Callable[..., onnx.ModelProto]]


BOTH_FORMS = pytest.mark.parametrize("phases", [pytest.param(True, id="phases"), pytest.param(False, id="together")])


def outputs(model: onnx.ModelProto, batches: list[np.ndarray]) -> list[np.ndarray]:
    return [entry["output"] for entry in run_outputs(model, ["output"], batches)]


def assert_same_function(one: onnx.ModelProto, other: onnx.ModelProto, batches: list[np.ndarray]) -> None:
    for before, after in zip(outputs(one, batches), outputs(other, batches), strict=True):
        assert np.abs(before - after).max() < 2e-5 * max(1.0, np.abs(before).max())


@dataclass(frozen=True)
class Streams:
    """The residual network, its readers' scales as ones, and these equalized with strength 0.7."""

    plain: onnx.ModelProto
    tensors: list[str]
    batches: list[np.ndarray]
    seen: dict[str, Observation]
    model: onnx.ModelProto
    factors: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def streams(networks: Networks, calibrations: dict[str, CalibrationSet]) -> Streams:
    plain = networks["residual"]()
    graph = Graph(add_reader_scales(plain))
    tensors = [site.tensor for site in place(graph, RECIPES[Target.OPENVINO]).sites]
    batches = list(calibrations["residual"])[:3]
    seen = observe(graph, tensors, batches)
    return Streams(plain, tensors, batches, seen, *equalize_channels(graph, seen, tensors, 0.7))


@pytest.mark.parametrize("name", ["dense", "residual"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_equalization_keeps_the_function_and_evens_the_channels(
    name: str, strength: float, networks: Networks, calibrations: dict[str, CalibrationSet]
) -> None:
    graph = Graph(networks[name]())
    sites = place(graph, RECIPES[Target.OPENVINO]).sites
    tensors = [site.tensor for site in sites]
    batches = list(calibrations[name])[:3]
    seen = observe(graph, tensors, batches)

    model, factors = equalize_channels(graph, seen, tensors, strength)

    assert_same_function(graph.model, model, batches)
    inner = [tensor for tensor in tensors if np.ptp(factors[tensor]) > 0]
    assert inner, "equalization did nothing"
    if strength == 1.0:
        spreads = []
        for tensor in inner:
            reach = np.maximum(np.abs(seen[tensor].low), np.abs(seen[tensor].high))
            alive = reach > 1e-6
            spreads.append(np.ptp(np.log((reach * factors[tensor])[alive])) - np.ptp(np.log(reach[alive])))
        assert np.mean(spreads) < 0


def test_readers_of_a_residual_stream_get_scales_of_their_own(streams: Streams) -> None:
    scaled = [tensor for tensor in streams.tensors if tensor.endswith("_scaled")]

    # Two blocks, the end of the body and the upsampler read the stream, each through other scales.
    assert len(scaled) == 4
    assert len({tuple(np.round(streams.factors[tensor], 6)) for tensor in scaled}) == 4
    assert_same_function(streams.plain, streams.model, streams.batches)


def test_scales_of_a_layer_that_stays_float_go_into_its_weights(streams: Streams) -> None:
    folded = fold_reader_scales(streams.model, ["body.end"])

    onnx.checker.check_model(folded, full_check=True)
    products = [sum(node.name.endswith("/scaled") for node in entry.graph.node) for entry in (streams.model, folded)]
    assert products == [4, 3]
    assert_same_function(streams.model, folded, streams.batches)


def test_channels_that_reach_further_down_are_turned_over_and_written_with_a_sum_behind(streams: Streams) -> None:
    settled = fold_reader_scales(streams.model, [])

    after = observe(Graph(streams.model), streams.tensors, streams.batches)
    for tensor in (name for name in streams.tensors if name.endswith("_scaled")):
        assert (streams.factors[tensor] < 0).any()
        assert (after[tensor].high >= -after[tensor].low - 1e-6).all()
        assert Graph(settled).producer[tensor].op_type == "Add"
        predicted = streams.seen[tensor].scaled(streams.factors[tensor])
        np.testing.assert_allclose(after[tensor].low, predicted.low, atol=1e-4)
        np.testing.assert_allclose(after[tensor].high, predicted.high, atol=1e-4)
    pairs = zip(outputs(streams.model, streams.batches), outputs(settled, streams.batches), strict=True)
    for one, other in pairs:
        assert np.abs(one - other).max() < 1e-6


def test_what_is_concatenated_gets_no_second_scale(networks: Networks) -> None:
    assert add_reader_scales(networks["dense"]()) == networks["dense"]()


def test_image_and_gates_are_never_scaled(networks: Networks) -> None:
    graph = Graph(networks["residual"]())
    gate = next(node for node in graph.model.graph.node if node.op_type == "Sigmoid")

    classes = ChannelClasses(graph)

    assert not classes.roots("input").any()
    assert not classes.roots("output").any()
    assert not classes.roots(gate.input[0]).any()


def test_channels_met_in_a_sum_share_their_class_and_others_do_not(networks: Networks) -> None:
    graph = Graph(networks["residual"]())
    add = next(node for node in graph.model.graph.node if node.op_type == "Add")

    classes = ChannelClasses(graph)

    assert np.array_equal(classes.roots(add.input[0]), classes.roots(add.input[1]))
    assert len(set(classes.roots(add.input[1]).tolist())) == 16


def test_an_operation_that_does_not_scale_pins_its_channels(networks: Networks) -> None:
    model = networks["residual"]()
    relu = next(node for node in model.graph.node if node.op_type == "Relu")
    relu.op_type = "Softplus"

    classes = ChannelClasses(Graph(model))

    assert not classes.roots(relu.input[0]).any()
    assert relu.output[0] not in classes.of


@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "extra"),
    [
        pytest.param(3, 2, 1, 1, id="3x3 stride 2, the paper's"),
        pytest.param(4, 2, 1, 0, id="4x4 stride 2"),
        pytest.param(2, 2, 0, 0, id="2x2 stride 2"),
        pytest.param(5, 3, 1, 0, id="5x5 stride 3"),
    ],
)
@BOTH_FORMS
def test_a_deconvolution_is_convolutions_and_a_shuffle(
    kernel: int, stride: int, pad: int, extra: int, phases: bool
) -> None:
    random = np.random.default_rng(0)
    weights = random.normal(size=(4, 3, kernel, kernel)).astype(np.float32)
    bias = random.normal(size=3).astype(np.float32)
    node = helper.make_node(
        "ConvTranspose", ["input", "w", "b"], ["y"], name="up", kernel_shape=[kernel] * 2, strides=[stride] * 2,
        pads=[pad] * 4, output_padding=[extra] * 2,
    )  # fmt: skip
    relu = helper.make_node("Relu", ["y"], ["output"], name="relu")
    float_info = [helper.make_tensor_value_info(name, 1, None) for name in ("input", "output")]
    constants = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")]
    graph = helper.make_graph([node, relu], "g", [float_info[0]], [float_info[1]], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    rewritten, count = rewrite_deconvolutions(model, phases=phases)

    assert count == 1
    kinds = ["Conv", "Relu"] * (stride**2 if phases else 1) + ["Concat"] * phases + ["DepthToSpace"]
    assert [entry.op_type for entry in rewritten.graph.node] == kinds
    taps = sum(np.prod(t.dims[2:]) for t in rewritten.graph.initializer if len(t.dims) == 4)
    assert taps == kernel**2 or not phases
    for shape in ((1, 4, 1, 1), (2, 4, 5, 7)):
        image = random.normal(size=shape).astype(np.float32)
        assert np.abs(outputs(model, [image])[0] - outputs(rewritten, [image])[0]).max() < 1e-5


@BOTH_FORMS
def test_a_deconvolution_of_another_size_is_left_alone(networks: Networks, phases: bool) -> None:
    model = networks["dense"]()
    deconv = next(node for node in model.graph.node if node.op_type == "ConvTranspose")
    next(entry for entry in deconv.attribute if entry.name == "output_padding").ints[:] = [0, 0]

    rewritten, count = rewrite_deconvolutions(model, phases=phases)

    assert count == 0
    assert any(node.op_type == "ConvTranspose" for node in rewritten.graph.node)


def test_the_phases_of_the_papers_kernel_take_nine_of_sixteen_taps() -> None:
    kernel, first, last = phase_kernel(np.ones((1, 1, 3, 3), dtype=np.float32), 2, 1)

    assert (first, last) == (0, 1)
    assert kernel.shape == (4, 1, 2, 2)
    assert int(kernel.sum()) == 9
