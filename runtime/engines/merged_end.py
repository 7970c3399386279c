"""The end of a network as engines on the CPU compute it fastest: its linear part as one convolution, its last in tiles.

The exact rewrite of `core/tail.py` is applied when such an engine is built or opened, not at export: TensorRT-RTX gets
21 kernels more from it, and exported graphs also go to converters that have no padding by computed amounts. On two
cores of an AMD EPYC with AVX512 it makes RCAN x2 of 0.3 M values 1.14 times faster in OpenVINO and 1.2 times in ONNX
Runtime at 180x320; RCAN x4 of full size needs 837 instead of 4608 bytes of activations per LR pixel in its largest
layer.
"""

from srdeploy.core.narrow_end import widen_last
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.onnx_graph import DEQUANTIZE
from srdeploy.core.precision import Precision
from srdeploy.core.tail import merge_tail


def merge_end(graph: GraphFile) -> tuple[GraphFile, tuple[str, ...]]:
    """Return the graph with a merged end, and the names of the layers that it replaces.

    Graphs that round, of another precision than FP32 or with Q/DQ pairs, are returned unchanged: what is rounded where
    is part of them.
    """
    rounds = any(node.op_type == DEQUANTIZE for node in graph.model.graph.node)
    if rounds or graph.contract.precision != Precision.FP32:
        return graph, ()
    model, names = merge_tail(graph.model)
    if not names:
        return graph, ()
    return GraphFile(model, path=graph.path, sha256=graph.sha256, contract=graph.contract), names


def tile_end(graph: GraphFile) -> GraphFile:
    """Return the graph with a last convolution of few output channels computing tiles of pixels (`core/narrow_end.py`).

    Codes of INT8 graphs are only moved, so they are rewritten too. Count layers and multiply-adds in the graph as it
    was: tiles need more of them, of which engines see fewer.
    """
    if graph.contract.precision not in (Precision.FP32, Precision.INT8):
        return graph
    model, side = widen_last(graph.model)
    if side == 1:
        return graph
    return GraphFile(model, path=graph.path, sha256=graph.sha256, contract=graph.contract)
