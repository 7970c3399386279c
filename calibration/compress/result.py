"""What a user decides about compression, and what is known about its result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srdeploy.calibration.compress.layers import Change
from srdeploy.calibration.search.bound import Bound
from srdeploy.calibration.search.evaluate import GraphQuality
from srdeploy.core.errors import GateError, UsageError
from srdeploy.core.precision import Precision, Target

MIN_GAIN = 1.02
"""A graph with less than 2 % fewer multiply-adds is not worth a network that is not quite the one that was trained."""


@dataclass(frozen=True)
class CompressOptions:
    """What a user decides about compression.

    Attributes:
        bound: what the graph may lose on images kept aside; it has a `max_psnr_drop`.
        target: the engine family that ranks are rounded for.
        time_budget_s: the search stops trying after so many seconds and takes the best found.
        precision: what the graph will be quantized to; INT8 only removes output channels: a mixture of channels is
            one more tensor that 8 bits have to hold, and the errors of few mixtures reach every output.
    """

    bound: Bound
    target: Target = Target.OPENVINO
    time_budget_s: float = 600.0
    precision: Precision = Precision.FP32

    def __post_init__(self) -> None:
        if not self.time_budget_s > 0:
            raise UsageError(f"--time-budget {self.time_budget_s}", expected="a positive number of seconds")


@dataclass(frozen=True)
class Point:
    """One measured graph.

    Attributes:
        changes: what was changed.
        macs: multiply-adds per LR pixel.
        cost: of multiply-adds and activations, see `costs`.
        quality: on the images kept aside.
        staged: whether its layers were fitted in stages, each to what the changed ones before it produce.
    """

    changes: tuple[Change, ...]
    macs: float
    cost: float
    quality: GraphQuality
    staged: bool = False

    def label(self, macs_before: float) -> str:
        """Return the point as a phrase; `macs_before` is the original's."""
        return f"{macs_before / self.macs:.2f}x fewer multiply-adds: {self.quality.drop_db:.4f} dB"

    def to_json(self) -> dict[str, Any]:
        """Return the point as JSON values."""
        return {"layers": len(self.changes), "macs_per_pixel": round(self.macs, 1), **self.quality.to_json()}


class NothingGainedError(GateError):
    """No graph with enough fewer multiply-adds keeps the bound (exit 6).

    Args:
        why: what was found, as a sentence part.
        bound: what a graph may lose.
        macs_before: multiply-adds of the original graph per LR pixel.
        points: all graphs that were measured.
    """

    def __init__(self, why: str, *, bound: Bound, macs_before: float, points: Sequence[Point]) -> None:
        self.macs_before = macs_before
        self.points = tuple(points)
        smaller = [point for point in points if macs_before >= MIN_GAIN * point.macs]
        near = min(smaller, key=lambda point: bound.used_by(point.quality), default=None)
        nearest = "" if near is None else f" (nearest: {near.label(macs_before)})"
        super().__init__(
            f"{why}: of {len(points)} measured, no graph with at least {100 * (MIN_GAIN - 1):.0f} % fewer "
            f"multiply-adds keeps the bound{nearest}",
            expected=str(bound),
            next_step="allow a larger --max-psnr-drop, search longer with --time-budget, or use the graph as it is",
        )


@dataclass(frozen=True)
class CompressResult:
    """What was written and what is known about it.

    Attributes:
        output: the ONNX file.
        bound: what it was allowed to lose.
        changes: the changed layers.
        macs_before, macs_after: multiply-adds per LR pixel.
        quality: of the written graph, on images kept aside.
        points: all graphs that were measured.
        latency_ms: of the graph and of the original on the target's engine, the first held-out image, interleaved; None
            where it does not run here.
        errors: predicted share of each change in the output's error power, by `Change.key`.
        widths: channels that each change reduces, before it, by `Change.key`.
        notes: what a user should know.
    """

    output: Path
    bound: str
    changes: tuple[Change, ...]
    macs_before: float
    macs_after: float
    quality: GraphQuality
    points: tuple[Point, ...]
    latency_ms: tuple[float, float] | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "output": str(self.output),
            "bound": self.bound,
            "macs_per_pixel": {"before": round(self.macs_before, 1), "after": round(self.macs_after, 1)},
            "fewer_macs": round(self.macs_before / self.macs_after, 3),
            "quality": self.quality.to_json(),
            "layers": [
                {
                    "layer": change.layer,
                    "kind": change.form,
                    "rank": change.rank,
                    "of": self.widths[change.key],
                    "reader": change.reader,
                    "error_share": round(self.errors.get(change.key, 0.0), 4),
                }
                for change in self.changes
            ],
            "pareto": [point.to_json() for point in self.points],
            "latency_ms": dict(zip(("compressed", "original"), self.latency_ms, strict=True))
            if self.latency_ms
            else None,
            "notes": list(self.notes),
        }
