"""What exact layers cost on the target's engine: the graph in 8 bits and the one in floats, timed kernel by kernel.

The time of a kernel belongs to the layers in it. A kernel without a layer, which converts, quantizes or adds, belongs
to the layers that read its result: their type is the reason why it is there or what it costs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from srdeploy.calibration.search.evaluate import OpenEngine
from srdeploy.calibration.search.sensitivity import Change
from srdeploy.core.contract import INPUT
from srdeploy.core.onnx_graph import Layer
from srdeploy.core.runner import KernelTime, ProfiledRunner
from srdeploy.core.shapes import format_shape

Result = TypeVar("Result")


class KernelClock(Protocol):
    """Opens graphs with the target's engine, on the processor that they are for, and times their kernels."""

    @property
    def place(self) -> str:
        """Engine, processor and input shape, for people."""

    def kernel_times(self, path: Path) -> Sequence[KernelTime]:
        """Return the time of each kernel of a graph's engine."""


class Clock(KernelClock, Protocol):
    """Times whole graphs too."""

    def latencies_ms(self, *paths: Path) -> tuple[float, ...]:
        """Return the milliseconds of each graph's engine, copies excluded; the engines take turns."""


@dataclass(frozen=True)
class EngineClock:
    """Times kernels with an engine that opens ONNX files on this machine.

    Attributes:
        open_engine: the engine.
        image: (N, C, H, W) float32 in 0..1, what it computes meanwhile.
        name: of the engine, for people.
    """

    open_engine: OpenEngine
    image: NDArray[np.float32]
    name: str

    @property
    def place(self) -> str:
        """Engine and input shape."""
        return f"{self.name} on this machine at {format_shape(self.image.shape)}"

    def kernel_times(self, path: Path) -> Sequence[KernelTime]:
        """Return the time of each kernel of a graph's engine."""
        with self.open_engine(path) as runner:
            assert isinstance(runner, ProfiledRunner), f"{self.name} has no profiler"
            return runner.kernel_times({INPUT: self.image})


class LayerTimes:
    """What a layer costs as float instead of 8-bit, from the kernels of two engines.

    Args:
        layers: of the network.
        int8: the graph with all layers in 8 bits that may be.
        plain: the graph with none.
        clock: opens and times both, at the first question.
    """

    def __init__(
        self, layers: Sequence[Layer], int8: onnx.ModelProto, plain: onnx.ModelProto, clock: KernelClock
    ) -> None:
        self._names = {layer.node: layer.name for layer in layers}
        self._models = (int8, plain)
        self._clock = clock

    @cached_property
    def milliseconds(self) -> tuple[dict[str, float], dict[str, float]]:
        """Milliseconds by layer: in 8 bits, and in floats."""
        int8, plain = with_files(self._models, lambda *paths: [self._clock.kernel_times(path) for path in paths])
        return charge(int8, self._models[0], self._names), charge(plain, self._models[1], self._names)

    def share(self, change: Change) -> float:
        """Return by which part of the 8-bit graph's time a change makes it slower, at least a thousandth.

        A layer that runs as two 8-bit ones takes its time twice.
        """
        int8, plain = self.milliseconds
        before = sum(int8.get(name, 0.0) for name in change.layers)
        after = 2 * before if change.split else sum(plain.get(name, 0.0) for name in change.layers)
        return max((after - before) / max(sum(int8.values()), 1e-9), 0.001)

    @property
    def note(self) -> str:
        """What was measured, as a sentence."""
        int8, plain = (sum(times.values()) for times in self.milliseconds)
        return (
            f"exact layers were paid for in milliseconds of {self._clock.place}: "
            f"{int8:.3f} ms in kernels with all layers in 8 bits, {plain:.3f} ms with none"
        )


def charge(kernels: Sequence[KernelTime], model: onnx.ModelProto, names: Mapping[str, str]) -> dict[str, float]:
    """Return the milliseconds of each layer.

    Args:
        kernels: of an engine.
        model: that it was built from.
        names: node -> name, of the layers.
    """
    nodes = {node.name: node for node in model.graph.node}
    readers: dict[str, list[str]] = {}
    makers: dict[str, str] = {}
    for node in model.graph.node:
        makers.update(dict.fromkeys(node.output, node.name))
        for tensor in node.input:
            readers.setdefault(tensor, []).append(node.name)

    def behind(name: str) -> list[str]:
        return [reader for tensor in nodes[name].output for reader in readers.get(tensor, [])]

    def before(name: str) -> list[str]:
        return [makers[tensor] for tensor in nodes[name].input if tensor in makers]

    found: dict[str, float] = {}
    for kernel in kernels:
        known = [name for name in kernel.nodes if name in nodes]
        own = [name for name in known if name in names]
        causes = own or _nearest(known, behind, names) or _nearest(known, before, names)
        for name in causes:
            found[names[name]] = found.get(names[name], 0.0) + kernel.ms / len(causes)
    return found


def _nearest(start: Sequence[str], step: Callable[[str], list[str]], layers: Mapping[str, str]) -> list[str]:
    """Return the first layers on every way from some nodes."""
    seen, todo = set(start), list(start)
    found: list[str] = []
    while todo:
        for name in step(todo.pop()):
            if name not in seen:
                seen.add(name)
                (found if name in layers else todo).append(name)
    return found


def with_files(models: Sequence[onnx.ModelProto], do: Callable[..., Result]) -> Result:
    """Call a function with the paths of files that hold the models while it runs."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.onnx" for index in range(len(models))]
        for path, model in zip(paths, models, strict=True):
            path.write_bytes(model.SerializeToString())
        return do(*paths)
