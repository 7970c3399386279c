"""The graph that quantization starts from: the FP32 graph that `srdeploy export` wrote."""

from pathlib import Path

import onnx

from srdeploy.core.errors import InputError
from srdeploy.core.onnx_file import GraphFile, read_graph
from srdeploy.core.onnx_graph import name_nodes

MIN_OPSET = 19
"""Q/DQ with FP16 scales and FP8 types exist from opset 19 on."""
_NOT_FP32 = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)


def read_fp32_graph(path: Path) -> GraphFile:
    """Read an exported FP32 graph, with every node named.

    Raises:
        InputError: not ONNX, not written by srdeploy, quantized or typed already, invalid, or of too old an opset.
    """
    graph = read_graph(path)
    model = graph.model
    _refuse_unsuitable(graph)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path} is not a valid graph ({reason})", next_step="export it again") from error
    name_nodes(model)
    return GraphFile(model, path=path, sha256=graph.sha256, contract=graph.contract)


def _refuse_unsuitable(graph: GraphFile) -> None:
    path, model = graph.path, graph.model
    if not graph.contract.form.plain:
        raise InputError(
            f"{path} is in a form for a consumer ({graph.contract.form})",
            expected="a plain FP32 graph",
            next_step="start from the plain graph, and put the result into this form with: srdeploy export",
        )
    quantized = next(
        (node for node in model.graph.node if "Quantize" in node.op_type or "QLinear" in node.op_type), None
    )
    if quantized is not None:
        raise InputError(
            f"{path} is quantized already (node {quantized.name} is a {quantized.op_type})",
            expected="an FP32 graph",
            next_step="quantize the file that `srdeploy export` wrote",
        )
    half = next((t for t in model.graph.initializer if t.data_type in _NOT_FP32), None)
    if half is not None:
        kind = onnx.TensorProto.DataType.Name(half.data_type)
        raise InputError(f"{path} is typed already ({half.name} is {kind})", expected="an FP32 graph")
    if graph.opset < MIN_OPSET:
        raise InputError(
            f"{path} has opset {graph.opset}",
            expected=f"opset {MIN_OPSET} or newer",
            next_step="export the checkpoint again with --opset 20",
        )
