"""The one factory of ONNX Runtime sessions on the CPU."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser

from srdeploy.core.errors import InputError
from srdeploy.core.ort import Arithmetic, cpu_session

IMAGE = (np.random.default_rng(0).integers(0, 256, (1, 3, 9, 9)) / 255).astype(np.float32)


def quantized(scale_type: type[np.floating], weight_scale: float = 2.0**-13) -> onnx.ModelProto:
    """One convolution with Q/DQ pairs on its operands and its result, and a bias.

    The scale that ONNX Runtime would give the bias is the product of the other two: 2^-26 is 0 in FP16.
    """
    kind = "float16" if scale_type is np.float16 else "float"
    model = parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : 20]>
        one (float[n, 3, h, w] input) => (float[n, 2, h, w] output) {{
          x = Cast<to = {onnx.TensorProto.FLOAT16 if kind == "float16" else onnx.TensorProto.FLOAT}>(input)
          xq = QuantizeLinear(x, x_scale, x_zero)
          xd = DequantizeLinear(xq, x_scale, x_zero)
          wd = DequantizeLinear(w, w_scale, w_zero)
          y = Conv<pads = [1, 1, 1, 1]>(xd, wd, bias)
          yq = QuantizeLinear(y, y_scale, x_zero)
          yd = DequantizeLinear(yq, y_scale, x_zero)
          output = Cast<to = 1>(yd)
        }}""")
    random = np.random.default_rng(1)
    constants = {
        "x_scale": np.array(2.0**-8, scale_type),
        "x_zero": np.array(0, np.uint8),
        "y_scale": np.array(2.0**-7, scale_type),
        "w": random.integers(-127, 128, (2, 3, 3, 3)).astype(np.int8),
        "w_scale": np.array(weight_scale, scale_type),
        "w_zero": np.array(0, np.int8),
        "bias": np.array([0.5, 0.25], scale_type),
    }
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return model


def output(model: onnx.ModelProto | bytes | Path, arithmetic: Arithmetic = "optimized") -> NDArray[np.float32]:
    result: NDArray[np.float32] = cpu_session(model, threads=1, arithmetic=arithmetic).run(None, {"input": IMAGE})[0]
    return result


def test_half_scales_do_not_break_the_image() -> None:
    model = quantized(np.float16)

    expected = output(model, "literal")

    np.testing.assert_allclose(output(model), expected, atol=2.0**-7)
    np.testing.assert_allclose(output(model.SerializeToString()), expected, atol=2.0**-7)


def test_without_the_work_around_they_would() -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        quantized(np.float16).SerializeToString(), providers=["CPUExecutionProvider"]
    )

    broken = session.run(None, {"input": IMAGE})[0]

    assert np.abs(broken - output(quantized(np.float16), "literal")).max() > 0.1


@pytest.mark.parametrize(("arithmetic", "integer"), [("optimized", True), ("float", False)])
def test_quantized_convolutions_run_on_integers_unless_computed_as_written(
    arithmetic: Arithmetic, integer: bool, tmp_path: Path
) -> None:
    path = tmp_path / "optimized.onnx"

    cpu_session(quantized(np.float32), arithmetic=arithmetic, optimized_path=path)

    assert ("QLinearConv" in [node.op_type for node in onnx.load(path).graph.node]) == integer


def test_a_file_with_external_weights_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantized(np.float16), path, save_as_external_data=True, location="weights", size_threshold=0)

    np.testing.assert_allclose(output(path), output(quantized(np.float16), "literal"), atol=2.0**-7)


def test_a_refused_graph_is_named() -> None:
    model = quantized(np.float32)
    model.graph.node.append(helper.make_node("NoSuchOperator", ["output"], ["more"]))

    with pytest.raises(InputError, match=r"ONNX Runtime cannot open x\.onnx: .*NoSuchOperator"):
        cpu_session(model, name="x.onnx")
