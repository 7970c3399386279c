"""Sessions of ONNX Runtime on the CPU: the one place that makes them, with the work-around that FP16 scales need."""

from pathlib import Path
from typing import Any, Literal

import onnx

from srdeploy.core.environment import cpu_count
from srdeploy.core.errors import InputError
from srdeploy.core.extras import import_extra
from srdeploy.core.onnx_graph import DEQUANTIZE

PROVIDER = "CPUExecutionProvider"

Arithmetic = Literal["optimized", "float", "literal"]

_HALF_SCALES = "WeightBiasQuantization"
"""This pass writes bias scales as the product of two others; in FP16 the product underflows and the image breaks."""
_INTEGER_CONVOLUTIONS = "QDQSelectorActionTransformer"


def cpu_session(
    model: onnx.ModelProto | bytes | Path,
    *,
    threads: int | None = None,
    arithmetic: Arithmetic = "optimized",
    optimized_path: Path | None = None,
    profile: Path | None = None,
    name: str = "the graph",
) -> Any:
    """Open a graph with ONNX Runtime's CPU kernels.

    Args:
        model: the graph with its weights, in memory or, with any external data, in a file.
        threads: CPU threads; None uses all.
        arithmetic: "optimized" fuses nodes and computes quantized convolutions on integers, as users' sessions do;
            "float" computes Q/DQ pairs as they are written, in float, and fuses the rest; "literal" computes node by
            node.
        optimized_path: where ONNX Runtime writes the graph that it really runs.
        profile: the beginning of the name of the file that `end_profiling` of the session writes.
        name: of the graph, for messages.

    Returns:
        The `onnxruntime.InferenceSession`; safe to run from several threads.

    Raises:
        InputError: ONNX Runtime refuses the graph.
        MissingExtraError: onnxruntime is not installed.
    """
    runtime = import_extra("onnxruntime", "cpu")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or cpu_count()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Worker threads spin for a while after a run; next to another engine in the same process that takes its time.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if arithmetic == "float":
        # By default nodes that nothing waits for run last, so what they read (every tensor that is observed) stays in
        # memory: 7 GB instead of 0.7 GB for RCAN of full size at 128x128.
        options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
    if arithmetic == "literal":
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    try:
        return runtime.InferenceSession(
            str(source) if isinstance(source, Path) else source,
            options,
            providers=[PROVIDER],
            disabled_optimizers=_disabled_passes(model, arithmetic),
        )
    except Exception as error:  # ONNX Runtime has a dozen types of its own
        raise InputError(f"ONNX Runtime cannot open {name}: {_first_line(error)}") from error


def _disabled_passes(model: onnx.ModelProto | bytes | Path, arithmetic: Arithmetic) -> list[str]:
    """Return the optimizer passes that would change what the graph computes."""
    if arithmetic == "literal":
        return []
    if arithmetic == "float":
        return [_HALF_SCALES, _INTEGER_CONVOLUTIONS]
    return [_HALF_SCALES] if _has_half_scales(model) else []


def _has_half_scales(model: onnx.ModelProto | bytes | Path) -> bool:
    if isinstance(model, bytes):
        model = onnx.load_model_from_string(model)
    elif isinstance(model, Path):
        model = onnx.load(model, load_external_data=False)
    floats = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    return any(node.op_type == DEQUANTIZE and node.input[1] not in floats for node in model.graph.node)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
