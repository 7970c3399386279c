"""Where Q/DQ pairs stand in the written graphs, target by target."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.int8.builder import Decisions, GraphBuilder
from srdeploy.calibration.int8.placement import RECIPES, can_split, macs_share_of, place
from srdeploy.calibration.rewrites.deconvolution import rewrite_deconvolutions
from srdeploy.calibration.search.evaluate import Evaluator
from srdeploy.core.contract import ModelContract
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.precision import Precision, Target
from srdeploy.core.tail import merge_tail

Networks = dict[str, Callable[..., onnx.ModelProto]]
Calibrations = dict[str, CalibrationSet]


def bench_for(name: str, target: Target, networks: Networks, calibrations: Calibrations) -> GraphBuilder:
    return GraphBuilder(networks[name](), RECIPES[target], Precision.INT8, calibrations[name])


@pytest.mark.parametrize("target", [Target.OPENVINO, Target.TENSORRT])
@pytest.mark.parametrize("name", ["dense", "residual"])
def test_no_pair_between_a_convolution_and_its_relu(
    name: str, target: Target, networks: Networks, calibrations: Calibrations
) -> None:
    model, _ = bench_for(name, target, networks, calibrations).build(Decisions())

    producer = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "Relu":
            assert producer[node.input[0]].op_type in ("Conv", "ConvTranspose")
    onnx.checker.check_model(model)


@pytest.mark.parametrize("target", list(Target))
def test_channel_attention_and_the_image_after_the_last_layer_stay_float(
    target: Target, networks: Networks, calibrations: Calibrations
) -> None:
    model, placement = bench_for("residual", target, networks, calibrations).build(Decisions())

    gates = [name for name in placement.floats if "gate" in name]
    quantized = {node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    assert len(gates) == 4
    assert all("1x1" in placement.floats[name] for name in gates)
    assert "output" not in quantized


def test_openvino_gets_uint8_and_tensorrt_symmetric_int8(networks: Networks, calibrations: Calibrations) -> None:
    zeros = {}
    for target in (Target.OPENVINO, Target.TENSORRT):
        model, placement = bench_for("residual", target, networks, calibrations).build(Decisions())
        zeros[target] = [
            next(tensor for tensor in model.graph.initializer if tensor.name == f"{site.tensor}_zero_point")
            for site in placement.sites
        ]

    assert {zero.data_type for zero in zeros[Target.OPENVINO]} == {TensorProto.UINT8}
    assert {zero.data_type for zero in zeros[Target.TENSORRT]} == {TensorProto.INT8}
    assert all(onnx.numpy_helper.to_array(zero) == 0 for zero in zeros[Target.TENSORRT])


def test_what_meets_in_a_concatenation_has_one_scale_and_is_not_quantized_again(
    networks: Networks, calibrations: Calibrations
) -> None:
    builder = bench_for("dense", Target.OPENVINO, networks, calibrations)

    shared = builder.build(Decisions(share=True))
    single = builder.build(Decisions(share=False))

    concats = {node.output[0] for node in shared[0].graph.node if node.op_type == "Concat"}
    scales = builder.params(shared[1], Decisions(share=True))
    met = {scales[site.tensor] for site in shared[1].sites if site.share != site.tensor or "relu" in site.share}
    assert not concats & {site.tensor for site in shared[1].sites}
    assert concats & {site.tensor for site in single[1].sites}
    assert len({(params.scale, params.zero_point) for params in met}) < len(shared[1].sites)


def test_onnxruntime_chains_integers_from_layer_to_layer(networks: Networks, calibrations: Calibrations) -> None:
    model, count = rewrite_deconvolutions(networks["dense"](), phases=False)
    builder = GraphBuilder(model, RECIPES[Target.ONNXRUNTIME], Precision.INT8, calibrations["dense"])

    quantized, placement = builder.build(Decisions())

    graph = Graph(quantized)
    assert count == 1
    for layer in graph.layers:
        assert layer.name not in placement.layers  # their weights are no float initializers any more
    concats = [node.output[0] for node in quantized.graph.node if node.op_type == "Concat"]
    assert concats
    assert all([reader.op_type for reader in graph.consumers[name]] == ["QuantizeLinear"] for name in concats)


def test_fp8_takes_wide_convolutions_only(networks: Networks) -> None:
    placement = place(Graph(networks["dense"]()), RECIPES[Target.TENSORRT], precision=Precision.FP8)

    assert "deconv" in placement.floats
    assert "head" in placement.floats
    assert "bottleneck" in placement.floats  # 16 output channels are one too few
    assert all("16" in placement.floats[name] for name in ("bottleneck",))


@pytest.mark.parametrize("name", ["dense", "residual"])
def test_eight_bits_stay_close_to_the_float_graph(
    name: str, networks: Networks, calibrations: Calibrations, contracts: dict[str, ModelContract]
) -> None:
    builder = bench_for(name, Target.OPENVINO, networks, calibrations)
    evaluator = Evaluator(builder.graph.model, calibrations[name].held_out, contracts[name])
    swing = np.mean([np.ptp(expected) for expected in evaluator.expected])

    model, _ = builder.build(Decisions())

    # Eight bits have 48 dB of signal-to-noise per tensor; half a dozen tensors and the weights add up to some 10 dB.
    assert evaluator.evaluate_model(model).fidelity_db > 36 - 20 * np.log10(swing)


def test_a_split_layer_brings_fidelity_back(
    networks: Networks, calibrations: Calibrations, contracts: dict[str, ModelContract]
) -> None:
    builder = bench_for("residual", Target.OPENVINO, networks, calibrations)
    evaluator = Evaluator(builder.graph.model, calibrations["residual"].held_out, contracts["residual"])
    names = tuple(layer.name for layer in builder.graph.layers if can_split(builder.graph, layer))

    plain = evaluator.evaluate_model(builder.build(Decisions())[0]).fidelity_db
    split = evaluator.evaluate_model(builder.build(Decisions(splits=names))[0]).fidelity_db

    assert split > plain + 5


def test_layers_behind_a_shared_concatenation_cannot_be_split(networks: Networks) -> None:
    graph = Graph(networks["dense"]())

    splittable = {layer.name for layer in graph.layers if can_split(graph, layer)}

    assert "tail" in splittable
    assert "blocks.0.1" not in splittable
    assert "head" not in splittable


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_what_a_pixel_shuffle_writes_is_quantized_before_it(name: str, networks: Networks) -> None:
    model, _ = rewrite_deconvolutions(networks[name](), phases=True)
    graph = Graph(model)
    shuffle = next(node for node in model.graph.node if node.op_type == "DepthToSpace")

    moved = place(graph, RECIPES[Target.OPENVINO])
    split = place(graph, RECIPES[Target.OPENVINO], splits=["tail"])  # which reads the float value of the shuffle
    fixed = place(graph, RECIPES[Target.TENSORRT])

    readers = {reader for site in moved.sites for reader in site.readers}
    assert shuffle.output[0] not in {site.tensor for site in moved.sites}
    assert shuffle.name in readers or any(graph.nodes[reader].op_type == "Concat" for reader in readers)
    assert shuffle.output[0] in {site.tensor for site in split.sites}
    assert shuffle.name not in {reader for site in fixed.sites for reader in site.readers}


def test_the_phases_of_a_deconvolution_share_one_scale(networks: Networks, calibrations: Calibrations) -> None:
    model, _ = rewrite_deconvolutions(networks["dense"](), phases=True)
    for target in (Target.OPENVINO, Target.ONNXRUNTIME):
        builder = GraphBuilder(model, RECIPES[target], Precision.INT8, calibrations["dense"])

        _, placement = builder.build(Decisions())

        params = builder.params(placement, Decisions())
        phases = {params[site.tensor] for site in placement.sites if "phase" in site.tensor}
        assert len(phases) == 1


@pytest.mark.parametrize("name", ["residual", "dense"])
def test_moving_quantization_through_a_shuffle_changes_no_number(
    name: str, networks: Networks, calibrations: Calibrations, contracts: dict[str, ModelContract]
) -> None:
    model, _ = rewrite_deconvolutions(networks[name](), phases=True)
    recipe = RECIPES[Target.OPENVINO]
    # The sampled pixels of a histogram differ on the two sides of a shuffle; extremes do not.
    decisions = Decisions(strength=0.0, method="minmax", correct_bias=False)
    evaluator = Evaluator(model, calibrations[name].held_out, contracts[name])

    moved, fixed = (
        evaluator.evaluate_model(
            GraphBuilder(
                model, replace(recipe, quantize_before_shuffle=shuffled), Precision.INT8, calibrations[name]
            ).build(decisions)[0]
        )
        for shuffled in (True, False)
    )

    assert moved == fixed


def test_edges_of_a_merged_end_stay_float_and_count_for_nothing(networks: Networks) -> None:
    graph = Graph(merge_tail(networks["residual"]())[0])

    placement = place(graph, RECIPES[Target.OPENVINO])

    edges = [layer.name for layer in graph.layers if layer.role == "edge"]
    assert len(edges) == 8
    assert set(edges) <= set(placement.floats)
    assert "merged_tail" in placement.layers
    assert macs_share_of(graph, placement.layers) == 1.0
