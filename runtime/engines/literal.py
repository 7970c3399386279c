"""Computes an ONNX graph exactly as written: node by node in ONNX Runtime, without fusion or rewriting.

It is the reference that decides whether an engine or its graph is wrong. It is slow and keeps every requested tensor:
use small images.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from srdeploy.core.environment import package_versions
from srdeploy.core.onnx_file import GraphFile
from srdeploy.core.ort import cpu_session
from srdeploy.core.runner import RunnerInfo


class LiteralRunner:
    """Returns tensors of a graph by name, as float32.

    Args:
        graph: any graph of srdeploy, Q/DQ and FP16 included.
        names: tensors to return, inner ones included.

    Raises:
        InputError: a tensor is not in the graph, or ONNX Runtime refuses the graph.
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, graph: GraphFile, names: Sequence[str]) -> None:
        self._names = list(names)
        data = graph.serialized(extra_outputs=names)
        self._session: Any = cpu_session(data, arithmetic="literal", name=str(graph.path))
        self._info = RunnerInfo(
            name="literal",
            engine="onnxruntime",
            device="cpu",
            contract=graph.contract,
            numeric_mode=f"{graph.contract.precision.value.upper()}, node by node",
            versions=package_versions(["onnxruntime", "onnxruntime-gpu"]),
        )

    @property
    def info(self) -> RunnerInfo:
        """Description of this runner."""
        return self._info

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Compute the tensors from the named inputs."""
        values = self._session.run(self._names, dict(feeds))
        return {name: np.asarray(value).astype(np.float32) for name, value in zip(self._names, values, strict=True)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None


def literal_tensors(
    graph: GraphFile, feeds: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> dict[str, NDArray[np.float32]]:
    """Return tensors of a graph by name, as float32; see `LiteralRunner`."""
    with LiteralRunner(graph, names) as runner:
        return runner.run(feeds)
