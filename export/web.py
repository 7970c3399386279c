"""What a browser needs of a graph: onnxruntime-web computes it with WebGPU, or with WebAssembly on the CPU.

WebAssembly has kernels for every operator and INT8. WebGPU has none for some operators; onnxruntime-web then computes
them on the CPU without saying so, and moves every tensor between. The page in examples/web does not allow that.
"""

from collections.abc import Iterable

from srdeploy.core.precision import Precision
from srdeploy.core.sizes import format_bytes

WEBGPU_OPERATORS = frozenset(
    {
        "Add", "Cast", "Clip", "Concat", "Conv", "ConvTranspose", "DepthToSpace", "Div", "HardSigmoid", "LeakyRelu",
        "Mul", "Pad", "ReduceMean", "Relu", "Resize", "Sigmoid", "Slice", "Split", "Sub", "Tanh", "Transpose",
    }
)  # fmt: skip
"""Operators that these networks may use and that have WebGPU kernels in every opset since 20 (onnxruntime-web 1.30,
docs/webgpu-operators.md in its package)."""

_LARGE_BYTES = 100_000_000


def web_notes(operators: Iterable[str], precision: Precision, size_bytes: int, *, one_file: bool) -> list[str]:
    """Return what keeps a graph from WebGPU, or from a browser, one sentence each.

    Args:
        operators: types of its nodes.
        precision: of its heavy layers.
        size_bytes: of the file, which every visitor of a page downloads.
        one_file: whether the weights are inside.
    """
    notes = []
    missing = sorted(set(operators) - WEBGPU_OPERATORS)
    if missing:
        notes.append(f"WebGPU has no kernel for {', '.join(missing)}: browsers compute this graph with WebAssembly")
    elif precision is Precision.FP16:
        notes.append("WebGPU needs a GPU with shader-f16; without it, browsers compute this graph with WebAssembly")
    if size_bytes > _LARGE_BYTES:
        notes.append(f"every visitor downloads {format_bytes(size_bytes)}; the FP16 graph is half as large")
    if not one_file:
        notes.append("weights in a second file: a page has to load both (externalData of onnxruntime-web)")
    return notes
