"""FP16 and BF16 graphs: types, islands, and overflow."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from srdeploy.calibration.half import Island, convert_to_half, emulate_half, find_islands
from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.observe import observe_magnitudes, run_outputs
from srdeploy.calibration.search.evaluate import Evaluator
from srdeploy.core.contract import ModelContract
from srdeploy.core.errors import PrecisionError
from srdeploy.core.onnx_graph import Graph
from srdeploy.core.precision import MIN_FIDELITY_DB, Precision

Networks = dict[str, Callable[..., onnx.ModelProto]]


def scaled_inside(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    """Make the inside larger by a factor: what a network trained on 0..255 looks like behind a 0..1 contract.

    The first weights are multiplied and the last ones divided; biases on the way grow with the stream, and the gates
    divide it again before their sigmoid, so that the function stays what it was.
    """
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).copy()
        if tensor.name == "head.weight":
            values = values * factor
        elif tensor.name in ("tail.weight",) or tensor.name.endswith("gate.0.weight"):
            values = values / factor
        elif tensor.name.endswith(".bias") and "gate" not in tensor.name and tensor.name != "tail.bias":
            values = values * factor
        tensor.CopyFrom(numpy_helper.from_array(values.astype(values.dtype), tensor.name))
    return model


@pytest.mark.parametrize("name", ["dense", "residual"])
def test_fp16_reaches_its_fidelity(
    name: str, networks: Networks, calibrations: dict[str, CalibrationSet], contracts: dict[str, ModelContract]
) -> None:
    model = networks[name]()
    evaluator = Evaluator(model, calibrations[name].held_out, contracts[name])

    typed = convert_to_half(model, Precision.FP16, find_islands(Graph(model), Precision.FP16, None))

    onnx.checker.check_model(typed, full_check=True)
    floats = [t.name for t in typed.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert not [name for name in floats if "gate" not in name]
    assert [entry.type.tensor_type.elem_type for entry in typed.graph.output] == [TensorProto.FLOAT]
    emulated = emulate_half(model, Precision.FP16, find_islands(Graph(model), Precision.FP16, None))
    for graph in (typed, emulated):
        assert evaluator.evaluate_model(graph).fidelity_db >= MIN_FIDELITY_DB[Precision.FP16]


def test_what_overflows_naively_does_not_with_islands_from_ranges(
    networks: Networks, calibrations: dict[str, CalibrationSet], contracts: dict[str, ModelContract]
) -> None:
    model = scaled_inside(networks["residual"](), 255.0 * 200)
    graph = Graph(model)
    evaluator = Evaluator(model, calibrations["residual"].held_out, contracts["residual"])
    largest = observe_magnitudes(graph, calibrations["residual"])

    naive = evaluator.evaluate_model(emulate_half(model, Precision.FP16, ()))
    islands = find_islands(graph, Precision.FP16, largest)
    ours = evaluator.evaluate_model(emulate_half(model, Precision.FP16, islands))

    assert max(largest.values()) > 65504
    assert naive.fidelity_db < 20
    assert ours.fidelity_db >= MIN_FIDELITY_DB[Precision.FP16]
    assert all(island.reason for island in islands)
    assert any("reaches" in island.reason for island in islands)


def test_global_pooling_is_always_an_island(networks: Networks) -> None:
    graph = Graph(networks["residual"]())

    islands = find_islands(graph, Precision.BF16, None)

    assert {graph.nodes[island.node].op_type for island in islands} == {"ReduceMean"}
    assert len(islands) == 2


def test_weights_beyond_fp16_are_never_clamped(networks: Networks) -> None:
    model = networks["dense"]()
    tensor = next(entry for entry in model.graph.initializer if entry.name == "bottleneck.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] = 1e5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    islands = find_islands(Graph(model), Precision.FP16, None)
    typed = convert_to_half(model, Precision.FP16, islands)

    kept = next(entry for entry in typed.graph.initializer if entry.name.startswith("bottleneck.weight"))
    assert [island.reason for island in islands if "bottleneck.weight" in island.reason]
    assert kept.data_type == TensorProto.FLOAT
    assert numpy_helper.to_array(kept)[0, 0] == np.float32(1e5)
    with pytest.raises(PrecisionError, match=r"bottleneck\.weight"):
        convert_to_half(model, Precision.FP16, ())


def test_bf16_asks_for_the_opset_that_has_it(networks: Networks) -> None:
    typed = convert_to_half(networks["residual"](), Precision.BF16, ())

    onnx.checker.check_model(typed, full_check=True)
    assert Graph(typed).opset == 22
    assert {t.data_type for t in typed.graph.initializer} == {TensorProto.BFLOAT16, TensorProto.INT64}


def test_neighbouring_islands_share_their_casts(networks: Networks) -> None:
    model = networks["residual"]()
    islands = [Island(node.name, "test") for node in model.graph.node]

    typed = convert_to_half(model, Precision.FP16, islands)

    assert not [node for node in typed.graph.node if node.op_type == "Cast" and node.name != "output_to_fp32"]


@pytest.mark.parametrize(("precision", "step"), [(Precision.FP16, 2.0**-11), (Precision.BF16, 2.0**-8)])
def test_emulation_rounds_as_the_type_does(
    precision: Precision, step: float, networks: Networks, calibrations: dict[str, CalibrationSet]
) -> None:
    model = networks["dense"]()
    batch = calibrations["dense"].samples[0].image
    (exact,) = run_outputs(model, ["output"], [batch])
    (rounded,) = run_outputs(emulate_half(model, precision, ()), ["output"], [batch])

    error = np.abs(exact["output"] - rounded["output"]).max() / np.abs(exact["output"]).max()

    assert step / 50 < error < step * 10  # some ten layers, errors partly cancel
