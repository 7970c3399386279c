"""Weights of 7 bits, for processors whose 8-bit kernels add products in 16 bits and overflow."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.int8.arithmetic import WEIGHT_TOPS, quantize_weights, weight_scales
from srdeploy.calibration.int8.placement import RECIPES
from srdeploy.calibration.options import QuantizeOptions, WeightBits
from srdeploy.calibration.quantize import NOT_RUN_HERE, QuantizeResult, quantize
from srdeploy.core.contract import ModelContract
from srdeploy.core.environment import int8_sums_saturate
from srdeploy.core.errors import BuildError
from srdeploy.core.precision import Precision, Target
from srdeploy.core.runner import Runner
from srdeploy.runtime.engines.registry import open_engine

CPU = [pytest.param(Target.OPENVINO, id="openvino"), pytest.param(Target.ONNXRUNTIME, id="onnxruntime")]
Networks = dict[str, Callable[..., onnx.ModelProto]]
Calibrations = dict[str, CalibrationSet]


@pytest.fixture
def bright(networks: Networks, tmp_path: Path) -> Path:
    """A network whose trunk's weights are all equal: every sum of two products is as large as it can be."""
    model = networks["residual"]()
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".weight") and tensor.name.startswith("body") and "gate" not in tensor.name:
            shape = tuple(tensor.dims)
            even = np.full(shape, 1 / np.prod(shape[1:]), dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(even, tensor.name))
    onnx.save(model, tmp_path / "bright.onnx")
    return tmp_path / "bright.onnx"


def quantized(
    source: Path,
    target: Target,
    bits: WeightBits,
    calibrations: Calibrations,
    opener: Callable[[Path], Runner] | None = None,
) -> QuantizeResult:
    return quantize(
        source,
        source.with_name("int8.onnx"),
        precision=Precision.INT8,
        target=target,
        calibration=calibrations["residual"],
        options=QuantizeOptions(strength=0.0, method="minmax", weight_bits=bits),
        open_engine=opener or (lambda path: open_engine(path, engine=target.value, threads=1, parity=True)),
        force=True,
    )


def largest_code(path: Path) -> int:
    codes = (numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer if t.name.endswith("weight_quantized"))
    return max(int(np.abs(array.astype(int)).max()) for array in codes)


def test_two_products_of_7_bit_weights_fit_in_16_bits() -> None:
    weights = np.random.default_rng(0).normal(size=(8, 6, 3, 3)).astype(np.float32)

    codes = quantize_weights(weights, weight_scales(weights, 0, bits=7), 0).astype(int)

    assert np.abs(codes).max() == WEIGHT_TOPS[7]
    assert 2 * 255 * np.abs(codes).max() <= 2**15 - 1
    assert 2 * 255 * WEIGHT_TOPS[8] > 2**15 - 1


@pytest.mark.parametrize("target", CPU)
def test_7_bit_weights_are_computed_as_written_on_every_processor(
    target: Target, bright: Path, calibrations: Calibrations
) -> None:
    result = quantized(bright, target, "7", calibrations)

    assert largest_code(result.output) == WEIGHT_TOPS[7]
    assert result.weight_bits == 7
    assert result.quality is not None
    assert result.quality.fidelity_db > 35


@pytest.mark.parametrize("target", CPU)
def test_auto_takes_what_this_processor_needs(target: Target, bright: Path, calibrations: Calibrations) -> None:
    result = quantized(bright, target, "auto", calibrations)

    assert result.weight_bits == (7 if int8_sums_saturate() else 8)
    metadata = {entry.key: entry.value for entry in onnx.load(result.output).metadata_props}
    assert ModelContract.from_metadata(metadata, name="int8").weight_bits == result.weight_bits
    assert result.readback is not None


def test_gpus_keep_8_bits_on_every_processor() -> None:
    for target in (Target.TENSORRT, Target.TENSORRT_RTX):
        assert QuantizeOptions().apply_to_recipe(RECIPES[target]).weight_bits == 8


def test_8_bits_for_other_processors_are_judged_without_an_engine_that_overflows(
    bright: Path, calibrations: Calibrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srdeploy.core.environment.int8_sums_saturate", lambda: True)

    result = quantized(bright, Target.OPENVINO, "8", calibrations)

    assert largest_code(result.output) == WEIGHT_TOPS[8]
    assert NOT_RUN_HERE in result.notes
    assert result.readback is None
    assert result.quality is not None
    assert result.quality.fidelity_db > 35


@pytest.mark.skipif(not int8_sums_saturate(), reason="this processor adds 8-bit products in 32 bits")
@pytest.mark.parametrize("target", CPU)
def test_8_bits_overflow_without_vnni_and_are_refused(
    target: Target, bright: Path, calibrations: Calibrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the processor's flags had not told: the comparison with the graph's own arithmetic finds it all the same.
    monkeypatch.setattr("srdeploy.core.environment.int8_sums_saturate", lambda: False)

    with pytest.raises(BuildError, match="otherwise than it is written"):
        quantized(bright, target, "8", calibrations)


def test_an_engine_that_computes_something_else_is_refused(bright: Path, calibrations: Calibrations) -> None:
    def defective(path: Path) -> Runner:
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tensor.name == "body.end.bias":
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.2), tensor.name))
        onnx.save(model, path)
        return open_engine(path, engine="openvino", threads=1, parity=True)

    with pytest.raises(BuildError, match="otherwise than it is written"):
        quantized(bright, Target.OPENVINO, "7", calibrations, defective)
    assert not bright.with_name("int8.onnx").exists()
