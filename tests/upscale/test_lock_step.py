"""Channel attention in lock-step: tiles equal the whole image, on every engine that can be cut."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser

from srdeploy.core.errors import CapabilityError, UsageError
from srdeploy.core.onnx_file import read_graph
from srdeploy.core.precision import Precision
from srdeploy.core.runner import Runner, run_image
from srdeploy.core.tail import merge_tail
from srdeploy.models.checkpoint.load import LoadedCheckpoint
from srdeploy.runtime.engines.literal import literal_tensors
from srdeploy.runtime.engines.options import BuildOptions
from srdeploy.runtime.engines.registry import build_engine, open_engine
from srdeploy.upscale.budget import TileSettings
from srdeploy.upscale.lock_step import lock_step_of
from srdeploy.upscale.network_cuts import live_maps
from srdeploy.upscale.onnx_cuts import stages_from_onnx
from srdeploy.upscale.upscaler import Upscaler

Draw = Callable[..., NDArray[np.uint8]]
MakeCheckpoint = Callable[..., LoadedCheckpoint]


def test_network_is_cut_at_every_pooling(rcan_onnx: Path) -> None:
    stages = stages_from_onnx(onnx.load(rcan_onnx))

    assert len(stages) == 2 * 2 + 1  # one pooling per block, and the end
    assert stages[0].maps_in == ("input",)
    assert [stage.radius for stage in stages] == [3, 2, 3, 2, 4]
    assert stages[-1].pooled is None
    # the network's skip, the group's, the block's, the branch: and two of them are being written anew
    assert live_maps(stages) <= 6
    for stage in stages:
        onnx.checker.check_model(stage.model, full_check=True)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("memory", [1 << 30, 1000], ids=["maps in memory", "maps in files"])
def test_lock_step_equals_the_eager_whole_image(
    engine: str, memory: int, rcan_onnx: Path, make_runner: Callable[..., Runner]
) -> None:
    image = np.random.default_rng(0).random((1, 3, 43, 59), dtype=np.float32)
    runner = open_engine(rcan_onnx, engine=engine, threads=1)
    lock = lock_step_of(runner, rcan_onnx, threads=1, memory_bytes=memory)
    decision = lock.decide(43, 59, TileSettings(mode="exact", side=24))
    assert decision is not None

    bands = list(lock.bands(lambda begin, end: image[:, :, begin:end], decision, scale=2))

    assert decision.plan.tiles == 12
    assert decision.maps_in_memory == (memory > 1000)
    with make_runner("rcan") as reference:
        np.testing.assert_allclose(np.concatenate(bands, axis=2), run_image(reference, image), atol=1e-5)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_lock_step_of_a_graph_whose_end_is_merged_equals_the_whole_image(
    engine: str, rcan_onnx: Path, tmp_path: Path
) -> None:
    merged, names = merge_tail(onnx.load(rcan_onnx))
    assert names
    path = tmp_path / "merged.onnx"
    onnx.save(merged, path)
    image = np.random.default_rng(0).random((1, 3, 43, 59), dtype=np.float32)
    with open_engine(rcan_onnx, engine=engine, threads=1) as plain:
        expected = run_image(plain, image)
    lock = lock_step_of(open_engine(path, engine=engine, threads=1), path, threads=1, memory_bytes=1 << 30)
    decision = lock.decide(43, 59, TileSettings(mode="exact", side=24))
    assert decision is not None

    bands = list(lock.bands(lambda begin, end: image[:, :, begin:end], decision, scale=2))

    np.testing.assert_allclose(np.concatenate(bands, axis=2), expected, atol=1e-5)


@pytest.fixture
def half_scales_onnx(rcan_onnx: Path, tmp_path: Path) -> Path:
    """A gated 8-bit convolution whose scales are FP16, as in INT8 graphs for GPUs.

    The product of its scales, 2^-26, is the scale that ONNX Runtime would give the bias: 0 in FP16.
    """
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        gated (float[n, 3, h, w] input) => (float[n, 3, h, w] output) {
          x = Cast<to = 10>(input)
          xq = QuantizeLinear(x, x_scale, zero)
          xd = DequantizeLinear(xq, x_scale, zero)
          wd = DequantizeLinear(weights, w_scale, w_zero)
          y = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(xd, wd, bias)
          yq = QuantizeLinear(y, y_scale, zero)
          yd = DequantizeLinear(yq, y_scale, zero)
          mean = GlobalAveragePool(yd)
          gated = Mul(yd, mean)
          output = Cast<to = 1>(gated)
        }""")
    constants = {
        "zero": np.array(0, np.uint8),
        "w_zero": np.array(0, np.int8),
        "x_scale": np.array(2.0**-8, np.float16),
        "w_scale": np.array(2.0**-18, np.float16),
        "y_scale": np.array(2.0**-8, np.float16),
        "weights": np.random.default_rng(1).integers(-127, 128, (3, 3, 3, 3)).astype(np.int8),
        "bias": np.array([0.75, 0.5, 0.25], np.float16),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    contract = replace(read_graph(rcan_onnx).contract, scale=1, precision=Precision.INT8)
    helper.set_model_props(model, contract.to_metadata())
    path = tmp_path / "half_scales.onnx"
    onnx.save(model, path)
    return path


def test_stages_with_half_scales_are_computed_as_they_are_written(half_scales_onnx: Path) -> None:
    image = np.random.default_rng(0).random((1, 3, 43, 59), dtype=np.float32)
    expected = literal_tensors(read_graph(half_scales_onnx), {"input": image}, ["output"])["output"]
    runner = open_engine(half_scales_onnx, threads=1, parity=True)
    lock = lock_step_of(runner, half_scales_onnx, threads=1, memory_bytes=1 << 30)
    decision = lock.decide(43, 59, TileSettings(mode="exact", side=24))
    assert decision is not None

    bands = list(lock.bands(lambda begin, end: image[:, :, begin:end], decision, scale=1))

    np.testing.assert_allclose(np.concatenate(bands, axis=2), expected, atol=2.0**-7)


@pytest.mark.parametrize("shape", [(50, 62, 3), (50, 62, 4), (33, 80, 1), (1, 90, 3)], ids=str)
def test_upscaler_chooses_lock_step_by_itself_and_is_exact(
    shape: tuple[int, ...], rcan_onnx: Path, picture: Draw
) -> None:
    image = picture(*shape)
    with Upscaler.open(rcan_onnx, threads=1) as whole, Upscaler.open(rcan_onnx, TileSettings(side=32), threads=1) as up:
        expected, _ = whole.upscale(image, dtype=np.float32)
        actual, report = up.upscale(image, dtype=np.float32)

    assert report.decision.lock_step
    assert report.decision.exact
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_maps_that_do_not_fit_fall_back_to_overlapped_tiles_unless_asked(rcan_onnx: Path) -> None:
    small = 1 << 20
    with Upscaler.open(rcan_onnx, TileSettings(memory_bytes=small), threads=1) as up:
        assert not up.decide(300, 300).lock_step
    with Upscaler.open(rcan_onnx, TileSettings(mode="exact", memory_bytes=small), threads=1) as up:
        assert "in files" in up.decide(300, 300).reason


def test_maps_that_no_disk_holds_are_refused(rcan_onnx: Path) -> None:
    with open_engine(rcan_onnx, threads=1) as runner:
        lock = lock_step_of(runner, rcan_onnx, threads=1, memory_bytes=1000)
    decision = lock.decide(10**6, 10**6, TileSettings(mode="exact"))
    assert decision is not None

    with pytest.raises(CapabilityError, match="feature maps.*TMPDIR"):
        next(lock.bands(lambda begin, end: np.zeros((1, 3, end - begin, 10**6), np.float32), decision, scale=2))


def test_built_engine_is_not_taken_for_its_graph(rcan_onnx: Path, tmp_path: Path) -> None:
    """ONNX Runtime's engines are ONNX files too, of operations that are its own business."""
    built = tmp_path / "rcan.ort.onnx"
    build_engine(rcan_onnx, built, engine="onnxruntime", options=BuildOptions(use_cache=False))
    settings = TileSettings(mode="exact", side=24)

    with Upscaler.open(built, settings, threads=1) as up, pytest.raises(UsageError, match="built engine cannot be cut"):
        up.decide(50, 50)
    with Upscaler.open(built, settings, threads=1, fallback=rcan_onnx) as up:
        assert up.decide(50, 50).lock_step


def test_engine_without_its_graph_is_refused(rcan_onnx: Path) -> None:
    runner = open_engine(rcan_onnx, threads=1)
    with (
        Upscaler(runner, TileSettings(mode="exact", side=24)) as up,
        pytest.raises(UsageError, match="exact tiles.*on onnxruntime fp32.*cannot be cut"),
    ):
        up.decide(50, 50)


@pytest.mark.parametrize(
    ("operation", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [2, 2]}),
        ("Conv", {"strides": [2, 2], "kernel_shape": [1, 1]}),
        ("Conv", {"pads": [0, 0, 0, 0], "kernel_shape": [3, 3]}),
        ("ReduceMean", {"keepdims": 1}),
        ("Softmax", {"axis": 3}),
    ],
    ids=["pooling", "stride", "no padding", "mean over all", "softmax"],
)
def test_what_is_not_local_is_refused(operation: str, attributes: dict[str, object]) -> None:
    inputs = ["input", "weights"] if operation == "Conv" else ["input"]
    size = attributes.get("kernel_shape", [1, 1])
    weights = helper.make_tensor("weights", TensorProto.FLOAT, [3, 3, *size], np.zeros((3, 3, *size)).ravel())  # type: ignore[misc]
    graph = helper.make_graph(
        [helper.make_node(operation, inputs, ["output"], **attributes)],
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "h", "w"])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [weights],
    )

    with pytest.raises(UsageError, match=f"{operation}.*lock-step"):
        stages_from_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
