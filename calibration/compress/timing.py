"""Which changes are faster on the target's engine: fewer multiply-adds are not always less time."""

from typing import Any

import onnx

from srdeploy.calibration.compress.layers import Change
from srdeploy.calibration.compress.result import Point
from srdeploy.calibration.compress.search import CompressionSearch
from srdeploy.calibration.search.evaluate import OpenEngine, open_model
from srdeploy.core.progress import Progress

REPEATS = 7
MARGIN = 1.005
"""A change has to make the graph faster by more than this: clocks are not better than that."""


def undo_what_is_not_faster(
    search: CompressionSearch, point: Point, model: onnx.ModelProto, open_engine: OpenEngine, progress: Progress
) -> tuple[Point, onnx.ModelProto, tuple[float, float]]:
    """Time a graph without each kind of change on the engine, and undo those that it does not gain from.

    Args:
        search: that found the graph.
        point: the graph's changes and quality.
        model: the graph.
        open_engine: the target's engine.
        progress: where to report.

    Returns:
        The graph that is left, and its latency and that of the original in ms, interleaved, on the first held-out
        image.

    Raises:
        NothingGainedError: no change is left.
    """
    changes = list(point.changes)
    whole = search.build(changes)
    kinds = _by_kind(search, point)
    with progress.task("timing changes on the engine", total=len(kinds)) as advance:
        for kind in kinds:
            others = [change for change in changes if change not in kind]
            reduced = search.build(others)
            with open_model(whole, open_engine) as with_kind, open_model(reduced, open_engine) as without:
                fast, slow = search.evaluator.latencies_ms(with_kind, without, repeats=REPEATS, fastest=True)
            if slow < MARGIN * fast:
                changes, whole = others, reduced
                more = f" and {len(kind) - 1} like it" if len(kind) > 1 else ""
                search.notes.append(
                    f"undone, since not faster on the engine: {kind[0].form} {kind[0].rank} of {kind[0].layer}{more}"
                )
            advance()
    if len(changes) < len(point.changes):
        if not changes:
            raise search.nothing_found("no change is faster on the engine")
        left, made = search.measured(changes, staged=point.staged)
        if not search.is_worthwhile(left):
            raise search.nothing_found("too few changes are faster on the engine")
        left = search.tested(left, made)
        if search.bound.is_satisfied_by(left.quality):
            point, model = left, made
        else:  # fewer changes, but other fits: rare, and then all of them stay
            search.notes.append("nothing was undone after all: without those changes, the bound is missed")
    with open_model(model, open_engine) as ours, open_model(search.graph.model, open_engine) as original:
        latency = search.evaluator.latencies_ms(ours, original, repeats=REPEATS)
    return point, model, (latency[0], latency[1])


def _by_kind(search: CompressionSearch, point: Point) -> list[list[Change]]:
    """Group changes that are alike for an engine: kind, rank, kernel and resolution; a dense block is one group."""
    kinds: dict[tuple[Any, ...], list[Change]] = {}
    for change in point.changes:
        layer = search.costs.layer(change.layer)
        kernel = tuple(search.graph.initializers[layer.weight].dims[2:])
        key = (change.form, change.rank, layer.op, kernel, layer.resolution)
        kinds.setdefault(key, []).append(change)
    return list(kinds.values())
