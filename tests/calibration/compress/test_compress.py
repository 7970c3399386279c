"""Compression of whole graphs: what is redundant by construction is found, and the bound holds."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from srdeploy.calibration.compress import effects as effects_module
from srdeploy.calibration.compress.compress import compress
from srdeploy.calibration.compress.layers import Change, candidates, readers
from srdeploy.calibration.compress.moments import Moments, collect_moments
from srdeploy.calibration.compress.rebuild import apply_changes
from srdeploy.calibration.compress.result import CompressOptions
from srdeploy.calibration.compress.search import CompressionSearch
from srdeploy.calibration.fp32 import read_fp32_graph
from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.journal import Journal
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.quantize import quantize
from srdeploy.calibration.search.bound import Bound
from srdeploy.calibration.search.evaluate import Evaluator
from srdeploy.core.contract import INPUT, OUTPUT, ModelContract
from srdeploy.core.errors import GateError, InputError, UsageError
from srdeploy.core.manifest import read_manifest
from srdeploy.core.onnx_graph import Graph, name_nodes
from srdeploy.core.ort import cpu_session
from srdeploy.core.precision import Precision, Target
from srdeploy.core.progress import SILENT

RANDOM = np.random.default_rng(0)


def with_weights(model: onnx.ModelProto, change: Callable[[str, np.ndarray], np.ndarray]) -> onnx.ModelProto:
    """Return a graph with other weights."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        values = change(tensor.name, numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(
            numpy_helper.from_array(values.astype(np.float32) if values.dtype == float else values, tensor.name)
        )
    name_nodes(copy)
    return copy


def low_rank_inputs(name: str, weights: np.ndarray) -> np.ndarray:
    """Let a few mixtures of the input channels decide in every wide layer."""
    if weights.ndim != 4 or not name.endswith(".weight"):
        return weights
    axis = 0 if name.startswith("deconv") else 1
    channels = weights.shape[axis]
    if channels < 16:
        return weights
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((channels, 6)))[0]
    return np.moveaxis(np.tensordot(basis @ basis.T, weights, axes=(1, axis)), 0, axis).astype(np.float32)


def images(channels: int) -> list[np.ndarray]:
    return [RANDOM.random((1, channels, 24, 24), dtype=np.float32) for _ in range(12)]


def output(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    return cpu_session(model).run([OUTPUT], {INPUT: image})[0]


@pytest.mark.parametrize("network", ["dense", "residual"])
def test_factors_of_a_layer_of_low_rank_reproduce_the_graph(
    network: str, networks: dict[str, Callable[..., onnx.ModelProto]]
) -> None:
    graph = Graph(with_weights(networks[network](), low_rank_inputs))
    layers = [layer for layer in candidates(graph) if layer.channels_in >= 16]
    batches = images(1 if network == "dense" else 3)
    moments = collect_moments(graph, None, layers, batches)
    changes = [Change(layer.name, "inputs", 8, 0.0) for layer in layers]

    made = apply_changes(graph, changes, moments)

    onnx.checker.check_model(made, full_check=True)
    assert sum("first.weight" in tensor.name for tensor in made.graph.initializer) == len(layers) >= 5
    np.testing.assert_allclose(output(made, batches[0]), output(graph.model, batches[0]), atol=1e-3)
    small = batches[0][:, :, :1, :1]
    np.testing.assert_allclose(output(made, small), output(graph.model, small), atol=1e-3)


def test_factors_behind_a_layer_whose_outputs_repeat_reproduce_the_graph(
    networks: dict[str, Callable[..., onnx.ModelProto]],
) -> None:
    def repeated(name: str, values: np.ndarray) -> np.ndarray:
        if name.startswith(("body.end", "body.0.2")) and values.shape[0] == 16:
            return np.repeat(values[:8], 2, axis=0) * np.arange(1, 17).reshape(-1, *[1] * (values.ndim - 1)) / 16
        return values

    graph = Graph(with_weights(networks["residual"](), repeated))
    layers = [layer for layer in candidates(graph) if layer.name in ("body.end", "body.0.2")]
    batches = images(3)

    made = apply_changes(
        graph,
        [Change(layer.name, "outputs", 8, 0.0) for layer in layers],
        collect_moments(graph, None, layers, batches),
    )

    np.testing.assert_allclose(output(made, batches[0]), output(graph.model, batches[0]), atol=1e-3)


def test_a_deconvolution_keeps_what_its_mean_input_gives_to_each_phase(
    networks: dict[str, Callable[..., onnx.ModelProto]],
) -> None:
    def constant(name: str, values: np.ndarray) -> np.ndarray:
        """Let one channel that the deconvolution reads vary; the others are constants."""
        if name == "bottleneck.weight":
            values[1:] = 0
        return np.abs(values) + 0.5 if name == "bottleneck.bias" else values

    graph = Graph(with_weights(networks["dense"](), constant))
    layer = next(layer for layer in graph.layers if layer.name == "deconv")
    batches = images(1)

    made = apply_changes(graph, [Change("deconv", "inputs", 8, 0.0)], collect_moments(graph, None, [layer], batches))

    np.testing.assert_allclose(output(made, batches[0]), output(graph.model, batches[0]), atol=1e-3)


@pytest.mark.parametrize("activation", ["Relu", "PRelu"])
def test_channels_that_repeat_others_are_removed_without_loss(
    activation: str, networks: dict[str, Callable[..., onnx.ModelProto]]
) -> None:
    def repeated(name: str, values: np.ndarray) -> np.ndarray:
        if name in ("body.0.0.weight", "body.0.0.bias", "deconv.bias"):
            return np.concatenate([values[:8], values[:8]])
        return np.concatenate([values[:, :8]] * 2, axis=1) if name == "deconv.weight" else values

    for network, first in (("residual", "body.0.0"), ("dense", "deconv")):
        graph = Graph(with_weights(networks[network](), repeated))
        if activation == "PRelu":
            graph = Graph(with_slopes(graph.model))
        pairs = {layer.name: reader for layer, reader in readers(graph)}
        reader = pairs[first]
        batches = images(3 if network == "residual" else 1)
        moments = collect_moments(graph, None, [reader], batches)
        change = Change(first, "channels", 8, 0.0, tuple(range(8)), reader.name)

        made = apply_changes(graph, [change], moments)

        assert Graph(made).layers[-1].macs <= graph.layers[-1].macs
        onnx.checker.check_model(made, full_check=True)
        np.testing.assert_allclose(output(made, batches[0]), output(graph.model, batches[0]), atol=1e-3)


def with_slopes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph whose first ReLUs of 16 channels are PReLUs, with the same slope for channels 8 apart."""
    graph = Graph(model)
    slopes = np.tile(RANDOM.random(8, dtype=np.float32) * 0.3, 2)[:, None, None]
    model.graph.initializer.append(numpy_helper.from_array(slopes, "slopes"))
    for node in model.graph.node:
        layer = next((layer for layer in graph.layers if layer.output == node.input[0]), None)
        if node.op_type == "Relu" and layer is not None and layer.channels_out == 16 and layer.resolution > 0:
            node.op_type = "PRelu"
            node.input.append("slopes")
    return model


def test_what_is_redundant_is_found_within_the_bound_and_written_down(
    networks: dict[str, Callable[..., onnx.ModelProto]],
    calibrations: dict[str, CalibrationSet],
    tmp_path: Path,
) -> None:
    onnx.save(with_weights(networks["dense"](), low_rank_inputs), tmp_path / "model.onnx")
    options = CompressOptions(Bound(0.01), target=Target.TENSORRT)

    result = compress(
        tmp_path / "model.onnx", tmp_path / "small.onnx", calibration=calibrations["dense"], options=options
    )

    assert result.macs_before / result.macs_after > 1.2
    assert result.quality.drop_db <= 0.01
    assert result.quality.worst_drop_db is not None
    model = onnx.load(tmp_path / "small.onnx")
    assert sum(layer.macs for layer in Graph(model).layers) == pytest.approx(result.macs_after)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    contract = ModelContract.from_metadata(metadata, name="small.onnx")
    assert contract.provenance["compression"]["fewer_macs"] == pytest.approx(
        result.macs_before / result.macs_after, abs=1e-3
    )
    details = read_manifest(tmp_path / "small.onnx").details
    assert {entry["layer"] for entry in details["layers"]} == {change.layer for change in result.changes}
    assert sum(entry["error_share"] for entry in details["layers"]) == pytest.approx(1, abs=0.01)
    json.dumps(result.to_json(), allow_nan=False)


def test_a_graph_for_int8_loses_channels_and_gets_no_mixtures(
    networks: dict[str, Callable[..., onnx.ModelProto]],
    calibrations: dict[str, CalibrationSet],
    tmp_path: Path,
) -> None:
    onnx.save(with_weights(networks["dense"](), low_rank_inputs), tmp_path / "model.onnx")
    source = read_fp32_graph(tmp_path / "model.onnx")
    options = CompressOptions(Bound(0.05), target=Target.TENSORRT, precision=Precision.INT8)

    search = CompressionSearch(source, calibrations["dense"], options, Journal("int8"), SILENT)
    point, model = search.run()

    assert {change.form for change in point.changes} == {"channels"}
    assert len(Graph(model).layers) == len(search.graph.layers)


def test_the_loss_that_is_reported_is_of_images_that_chose_nothing(
    networks: dict[str, Callable[..., onnx.ModelProto]], nine_pictures: CalibrationSet, tmp_path: Path
) -> None:
    model = with_weights(networks["dense"](), low_rank_inputs)
    onnx.save(model, tmp_path / "model.onnx")

    result = compress(
        tmp_path / "model.onnx",
        tmp_path / "small.onnx",
        calibration=nine_pictures,
        options=CompressOptions(Bound(0.05), target=Target.TENSORRT),
    )

    contract = read_fp32_graph(tmp_path / "model.onnx").contract
    small = onnx.load(tmp_path / "small.onnx")
    tested = Evaluator(model, nine_pictures.test, contract, tested=True).evaluate_model(small)
    chosen = Evaluator(model, nine_pictures.held_out, contract).evaluate_model(small)
    assert result.quality == tested
    assert result.quality.fidelity_db != chosen.fidelity_db
    assert sum(not point.quality.tested for point in result.points) >= 1
    assert result.to_json()["quality"]["tested"]


def test_a_graph_that_misses_the_bound_on_the_test_images_gives_way_to_a_larger_one(
    network_paths: dict[str, Path], nine_pictures: CalibrationSet
) -> None:
    search = search_for(network_paths["dense"], nine_pictures)
    layers = [layer.name for layer in candidates(search.graph) if layer.channels_in >= 16]
    small, _ = search.measured([Change(name, "inputs", 8, 0.0) for name in layers])
    large, _ = search.measured([Change(layers[0], "inputs", 8, 0.0)])
    search.bound = Bound(min_fidelity=search.tested(large, search.build(large.changes)).quality.fidelity_db - 0.1)

    point, model = search.confirmed([large, small])

    assert (point.changes, point.quality.tested) == (large.changes, True)
    assert sum(layer.macs for layer in Graph(model).layers) == large.macs
    with pytest.raises(GateError, match="misses it on the test images"):
        search.confirmed([small])


def search_for(path: Path, calibration: CalibrationSet) -> CompressionSearch:
    source = read_fp32_graph(path)
    return CompressionSearch(source, calibration, CompressOptions(Bound(0.05)), Journal("test"), SILENT)


def test_too_few_images_for_a_test_are_reported(
    network_paths: dict[str, Path], calibrations: dict[str, CalibrationSet]
) -> None:
    search = search_for(network_paths["dense"], calibrations["dense"])

    assert search.test is None
    assert any("fewer than 8 images" in note for note in search.notes)


def test_a_compressed_graph_is_quantized_like_any_other(
    networks: dict[str, Callable[..., onnx.ModelProto]],
    calibrations: dict[str, CalibrationSet],
    tmp_path: Path,
) -> None:
    onnx.save(with_weights(networks["dense"](), low_rank_inputs), tmp_path / "model.onnx")
    compress(
        tmp_path / "model.onnx",
        tmp_path / "small.onnx",
        calibration=calibrations["dense"],
        options=CompressOptions(Bound(0.05), target=Target.TENSORRT),
    )

    result = quantize(
        tmp_path / "small.onnx",
        tmp_path / "int8.onnx",
        precision=Precision.INT8,
        target=Target.OPENVINO,
        calibration=calibrations["dense"],
        options=QuantizeOptions(),
    )

    assert any(".first" in name or ".second" in name for name in result.int8_layers)


def test_a_bound_that_nothing_meets_ends_with_what_was_measured(
    network_paths: dict[str, Path], calibrations: dict[str, CalibrationSet], tmp_path: Path
) -> None:
    with pytest.raises(GateError, match=r"nothing to gain here: of \d+ measured"):
        compress(
            network_paths["residual"],
            tmp_path / "small.onnx",
            calibration=calibrations["residual"],
            options=CompressOptions(Bound(1e-6)),
        )
    assert not list(tmp_path.glob("small*"))


def test_a_search_that_had_no_time_does_not_say_that_nothing_can_be_gained(
    network_paths: dict[str, Path], calibrations: dict[str, CalibrationSet], tmp_path: Path
) -> None:
    with pytest.raises(GateError, match=r"the time budget was spent: of \d+ measured.*--time-budget"):
        compress(
            network_paths["residual"],
            tmp_path / "small.onnx",
            calibration=calibrations["residual"],
            options=CompressOptions(Bound(1e-6), time_budget_s=1e-3),
        )


def test_what_was_measured_is_not_measured_again_after_an_interruption(
    networks: dict[str, Callable[..., onnx.ModelProto]],
    calibrations: dict[str, CalibrationSet],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnx.save(with_weights(networks["dense"](), low_rank_inputs), tmp_path / "model.onnx")
    arguments = (tmp_path / "model.onnx", tmp_path / "small.onnx")
    options = CompressOptions(Bound(0.01), target=Target.TENSORRT)
    effects: list[str] = []
    effect = effects_module.apply_changes

    def counted(graph: Graph, changes: Sequence[Change], moments: Mapping[str, Moments]) -> onnx.ModelProto:
        effects.append("; ".join(change.key for change in changes))
        return effect(graph, changes, moments)

    monkeypatch.setattr(effects_module, "apply_changes", counted)
    with monkeypatch.context() as patch:
        patch.setattr(CompressionSearch, "run", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(*arguments, calibration=calibrations["dense"], options=options)
    measured = len(effects)

    compress(*arguments, calibration=calibrations["dense"], options=options)

    assert measured > 3
    assert len(effects) == measured


@pytest.mark.parametrize(("drop", "worst"), [(0.0, None), (-1.0, None), (0.1, 0.0)])
def test_bounds_that_make_no_sense_are_refused(drop: float, worst: float | None) -> None:
    with pytest.raises(UsageError, match="positive number of decibels"):
        Bound(drop, worst)


def test_a_quantized_graph_is_refused(
    network_paths: dict[str, Path], calibrations: dict[str, CalibrationSet], tmp_path: Path
) -> None:
    quantize(
        network_paths["dense"], tmp_path / "int8.onnx", precision=Precision.INT8, target=Target.OPENVINO,
        calibration=calibrations["dense"],
    )  # fmt: skip

    with pytest.raises(InputError, match="quantized already"):
        compress(
            tmp_path / "int8.onnx", tmp_path / "small.onnx", calibration=calibrations["dense"],
            options=CompressOptions(Bound(0.1)),
        )  # fmt: skip


def test_tiles_of_a_compressed_graph_are_those_of_the_whole_image(
    networks: dict[str, Callable[..., onnx.ModelProto]],
) -> None:
    graph = Graph(with_weights(networks["dense"](), low_rank_inputs))
    pairs = {layer.name: reader for layer, reader in readers(graph)}
    layers = [layer for layer in candidates(graph) if layer.channels_in >= 16]
    changes = [Change(layer.name, "inputs", 8, 0.0) for layer in layers if layer.role != "last"]
    changes.append(Change("deconv", "channels", 8, 0.0, tuple(range(8)), pairs["deconv"].name))
    moments = collect_moments(graph, None, [*layers, pairs["deconv"]], images(1))
    made = apply_changes(graph, changes, moments)
    image = RANDOM.random((1, 1, 40, 48), dtype=np.float32)
    margin = 8  # the network's own receptive radius: five 3x3 convolutions, a deconvolution, one more at twice the size

    whole, tile = output(made, image), output(made, image[:, :, 4:36, 8:44])

    inner = tile[:, :, 2 * margin : -2 * margin, 2 * margin : -2 * margin]
    top, left = 2 * (4 + margin), 2 * (8 + margin)
    expected = whole[:, :, top : top + inner.shape[2], left : left + inner.shape[3]]
    np.testing.assert_allclose(inner, expected, atol=1e-6)
    assert np.abs(output(made, image) - output(graph.model, image)).max() > 1e-4  # it is another network
