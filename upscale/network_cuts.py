"""Cut a network at its global poolings, where tiles in lock-step are synchronized.

Channel attention makes every output pixel depend on the mean of whole feature maps, so no overlap makes tiles equal to
the whole image. But between two poolings the network is local: a stage takes feature maps and the means so far, and
returns feature maps and the map to average next. Running each stage over all tiles and averaging over the whole image
gives the result of the whole image. `srdeploy.upscale.lock_step` runs the stages; this module decides where to cut.
The network is a list of operations by the names of their tensors, made from an ONNX graph by `onnx_cuts`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from numpy.typing import NDArray

from srdeploy.core.contract import INPUT, OUTPUT
from srdeploy.core.errors import UsageError

Arrays = dict[str, NDArray[Any]]
StageRun = Callable[[Mapping[str, NDArray[Any]]], Arrays]
"""A stage that can be run: maps and means by name to maps by name."""


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation of a network.

    Attributes:
        node: the node of its library.
        label: for messages.
        kind: "local" (an output pixel depends on a neighborhood), "pool" (the mean of its one input over the whole
            map) or "other", which is refused on feature maps.
        inputs, outputs: names of tensors.
        reach: pixels on each side that a local operation reads.
        growth: factor by which it enlarges its maps.
    """

    node: Any
    label: str
    kind: Literal["local", "pool", "other"]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    reach: int = 0
    growth: int = 1


@dataclass(frozen=True, eq=False)
class Cut:
    """The operations between two poolings; attributes otherwise as `Stage`."""

    operations: tuple[Operation, ...]
    maps_in: tuple[str, ...]
    means_in: tuple[str, ...]
    maps_out: tuple[str, ...]
    pooled: str | None
    mean: str | None
    radius: int


@dataclass(frozen=True, eq=False)
class Stage:
    """The network between two poolings.

    Attributes:
        model: the stage as a network of its own, for the engine that runs it: ONNX or PyTorch.
        maps_in: feature maps it takes, (1, C, h, w); the first stage takes `input`.
        means_in: means it takes, (1, C, 1, 1).
        maps_out: feature maps that later stages take.
        pooled: the map whose mean ends the stage; None for the last, whose output is `output`.
        mean: name of that mean.
        radius: pixels on each side that an output pixel depends on.
        channels: of the widest map in `maps_out`.
    """

    model: Any
    maps_in: tuple[str, ...]
    means_in: tuple[str, ...]
    maps_out: tuple[str, ...]
    pooled: str | None
    mean: str | None
    radius: int
    channels: int


def cut(operations: Sequence[Operation]) -> list[Cut]:
    """Cut a network, its operations in order of computation, from `input` to `output`.

    Raises:
        UsageError: an operation on feature maps is neither local nor a mean over the whole map.
    """
    maps, pools = _maps_and_pools(operations)
    means = {pool.outputs[0] for pool in pools}
    done: set[str] = set()  # maps computed by earlier stages
    cuts = []
    for place, pool in enumerate([*pools, None]):
        target = OUTPUT if pool is None else pool.inputs[0]
        members = _operations_for(target, operations, done | means)
        made = {name for member in members for name in member.outputs if name in maps}
        # A stage may only take the mean of a map that an earlier stage stored.
        later = set() if pool is None else _taken_later(operations, maps, done | made, pools[place + 1 :])
        taken = {name for member in members for name in member.inputs if name not in made}
        maps_in = tuple(sorted(taken & (done | {INPUT}))) if members else (target,)
        cuts.append(
            Cut(
                operations=members,
                maps_in=maps_in,
                means_in=tuple(sorted(taken & means)),
                maps_out=tuple(sorted(made & later)),
                pooled=None if pool is None else target,
                mean=None if pool is None else pool.outputs[0],
                radius=_radius(members, maps_in),
            )
        )
        done |= made
    return cuts


def live_maps(stages: Iterable[Stage]) -> int:
    """Return the maximum number of feature maps stored at the same time, including those being written."""
    listed = list(stages)
    most = 0
    for index, stage in enumerate(listed):
        needed = {name for later in listed[index + 1 :] for name in later.maps_in}
        waiting = {name for earlier in listed[: index + 1] for name in earlier.maps_out}
        most = max(most, len((needed | set(stage.maps_in)) & waiting | set(stage.maps_out)))
    return most


def _maps_and_pools(operations: Sequence[Operation]) -> tuple[set[str], list[Operation]]:
    """Return the tensors that are maps (the size of the image times a factor), and their poolings."""
    maps, pools = {INPUT}, []
    for operation in operations:
        if not maps.intersection(operation.inputs):
            continue
        if operation.kind == "other":
            raise UsageError(
                f"operation {operation.label} cannot be run tile by tile in lock-step",
                expected="same-size convolutions, point-wise operations, pixel shuffles and means over the whole map",
                next_step="use --tiles overlapped",
            )
        if operation.kind == "pool":
            pools.append(operation)
        else:
            maps.update(operation.outputs)
    return maps, pools


def _operations_for(target: str, operations: Sequence[Operation], known: set[str]) -> tuple[Operation, ...]:
    """Return the operations that compute a tensor from known tensors and constants, in order."""
    makers = {name: operation for operation in operations for name in operation.outputs}
    wanted, pending = set(), [target]
    while pending:
        name = pending.pop()
        operation = makers.get(name)
        if operation is None or name in known or operation in wanted:
            continue
        wanted.add(operation)
        pending.extend(operation.inputs)
    return tuple(operation for operation in operations if operation in wanted)


def _taken_later(
    operations: Sequence[Operation], maps: set[str], done: set[str], pools: Sequence[Operation]
) -> set[str]:
    """Return the computed maps that later operations or poolings read."""
    taken = {pool.inputs[0] for pool in pools}
    for operation in operations:
        made = maps.intersection(operation.outputs)
        if made and not made <= done:
            taken.update(operation.inputs)
    return taken & done


def _radius(operations: Sequence[Operation], inputs: Iterable[str]) -> int:
    """Return the total reach of the operations in input pixels."""
    reach: dict[str, Fraction] = dict.fromkeys(inputs, Fraction(0))
    scale: dict[str, int] = dict.fromkeys(inputs, 1)
    for operation in operations:
        known = [name for name in operation.inputs if name in reach]
        if not known:
            continue
        factor = max(scale[name] for name in known)
        most = max(reach[name] for name in known) + Fraction(operation.reach, factor)
        for name in operation.outputs:
            reach[name], scale[name] = most, factor * operation.growth
    return math.ceil(max(reach.values(), default=Fraction(0)))
