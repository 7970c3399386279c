"""Computes an ONNX graph exactly as written: node by node in ONNX Runtime, without fusion or rewriting.

It is the reference that decides whether an engine or its graph is wrong. It is slow and keeps every requested tensor:
use small images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.ort import cpu_session


def literal_tensors(
    graph: GraphFile, feeds: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """Return tensors of a graph by name, as float32.

    Args:
        graph: any graph of ours, Q/DQ and FP16 included.
        feeds: the inputs.
        names: tensors to return, inner ones included.

    Raises:
        InputError: a tensor is not in the graph, or ONNX Runtime refuses the graph.
        MissingExtraError: onnxruntime is not installed.
    """
    data = graph.serialized(extra_outputs=names)
    session = cpu_session(data, arithmetic="literal", name=str(graph.path))
    values = session.run(list(names), dict(feeds))
    return {name: np.asarray(value).astype(np.float32) for name, value in zip(names, values, strict=True)}
