"""Quantized and typed graphs in the forms of consumers: the network inside computes what it did."""

from pathlib import Path

import numpy as np
import pytest

from srdeploy.calibration.images.dataset import CalibrationSet
from srdeploy.calibration.options import QuantizeOptions
from srdeploy.calibration.quantize import quantize
from srdeploy.core.contract import GraphForm
from srdeploy.core.imaging.read import quantized
from srdeploy.core.precision import Precision, Target
from srdeploy.export.exporter import export_form
from srdeploy.runtime.engines.registry import open_engine

OPTIONS = QuantizeOptions(strength=0.5, method="minmax")


@pytest.mark.parametrize(
    ("precision", "target", "engine"),
    [
        (Precision.INT8, Target.OPENVINO, "openvino"),
        (Precision.INT8, Target.ONNXRUNTIME, "onnxruntime"),
        (Precision.INT8, Target.TENSORRT, "onnxruntime"),
        (Precision.FP16, Target.TENSORRT, "openvino"),
    ],
    ids=["int8 openvino", "int8 onnxruntime", "int8 with fp16", "fp16"],
)
def test_a_uint8_form_of_a_quantized_graph_returns_its_bytes(
    precision: Precision,
    target: Target,
    engine: str,
    network_paths: dict[str, Path],
    calibrations: dict[str, CalibrationSet],
    tmp_path: Path,
) -> None:
    plain, formed = tmp_path / "plain.onnx", tmp_path / "formed.onnx"
    calibration = calibrations["residual"]
    source = network_paths["residual"]
    quantize(source, plain, precision=precision, target=target, calibration=calibration, options=OPTIONS)
    levels = np.random.default_rng(0).integers(0, 256, (1, 3, 24, 20), dtype=np.uint8)

    export_form(plain, formed, form=GraphForm((1, 3, 24, 20), "uint8"))

    with open_engine(plain, engine=engine, threads=1, parity=True) as runner:
        output = runner.run({"input": levels.astype(np.float32) / np.float32(255)})["output"]
    with open_engine(formed, engine=engine, threads=1, parity=True) as runner:
        answer = runner.run({"input": levels})["output"]
        assert runner.info.contract.precision is precision
    difference = np.abs(answer[0].transpose(1, 2, 0).astype(int) - quantized(output, np.uint8))
    # Engines keep half-precision values in float32 between some nodes, and their neighbors decide between which.
    assert difference.max() <= (1 if precision is Precision.FP16 or target is Target.TENSORRT else 0)
